//! The example kernels: how a kernel finds, links and uses VMI.

use crate::build::{self, Tools, read, write};
use crate::link::Link;
use crate::progress::Progress;
use crate::toolchain::{CCompilers, output};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// For a machine without a library, an operating system or a floating-point unit in the kernel's hands.
const C_FLAGS: [&str; 13] = [
    "-O2",
    "-std=c99",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pedantic",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-mno-mmx",
    "-mno-sse",
    "-c",
];

/// Builds the kernel in C: target/examples/c-kernel.elf, for a multiboot loader.
///
/// # Errors
///
/// It does not compile.
pub fn c_kernel(tools: &Tools, compilers: &CCompilers, link: &Link) -> Result<PathBuf> {
    let path = crate::workspace().join("target/examples/c-kernel.elf");
    let _progress = Progress::start(format!("building {}", build::shown(&path)));
    let source = crate::workspace().join("examples/c-kernel");
    let folder = tempfile::tempdir().context("no folder for objects")?;
    let mut objects = Vec::new();
    for name in ["boot.S", "kernel.c"] {
        let object = folder.path().join(name).with_extension("o");
        let mut compiler = compilers.c();
        compiler.args(C_FLAGS).arg("-I").arg(link.header.parent().unwrap_or(Path::new(".")));
        run(compiler.arg("-o").arg(&object).arg(source.join(name)))?;
        objects.push(object);
    }
    let executable = folder.path().join("c-kernel.elf");
    let mut linker = Command::new(&tools.linker.path);
    linker.args(["-m", "elf_i386", "--fatal-warnings", "-z", "max-page-size=4096", "-T"]);
    linker.arg(source.join("kernel.ld")).args(objects).arg(&link.archive);
    run(linker.arg("-o").arg(&executable))?;
    write(&path, &read(&executable)?)?;
    Ok(path)
}

/// Builds the kernel in Rust, with the native calls linked in.
///
/// # Errors
///
/// It does not compile.
pub fn rust_kernel(tools: &Tools, link: &Link) -> Result<PathBuf> {
    let path = crate::workspace().join("target/examples/rust-kernel.elf");
    build::kernel(tools, "vmi-example-kernel", &path, std::slice::from_ref(link))?;
    Ok(path)
}

/// Runs a compiler or linker, which says something only if it fails.
fn run(command: &mut Command) -> Result<()> {
    log::debug!("{command:?}");
    output(command).map_err(anyhow::Error::msg)?;
    Ok(())
}
