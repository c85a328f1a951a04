//! The example kernels: how a kernel finds, links and uses VMI.

use crate::build::{self, Tools, read, write};
use crate::link;
use crate::progress::Progress;
use crate::toolchain::CCompilers;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use vmi_abi::REVISION_3_0;

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
/// It does not compile, or what it links cannot be built.
pub fn c_kernel(tools: &Tools, compilers: &CCompilers) -> Result<PathBuf> {
    let path = crate::workspace().join("target/examples/c-kernel.elf");
    let link = link::build(tools, REVISION_3_0)?;
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
    let output = folder.path().join("c-kernel.elf");
    let mut linker = Command::new(&tools.linker.path);
    linker.args(["-m", "elf_i386", "--fatal-warnings", "-z", "max-page-size=4096", "-T"]);
    linker.arg(source.join("kernel.ld")).args(objects).arg(&link.archive);
    run(linker.arg("-o").arg(&output))?;
    write(&path, &read(&output)?)?;
    Ok(path)
}

/// Builds the kernel in Rust, with the native calls linked in.
///
/// # Errors
///
/// It does not compile, or the object with the calls cannot be built.
pub fn rust_kernel(tools: &Tools) -> Result<PathBuf> {
    let object = link::build(tools, REVISION_3_0)?.object;
    let path = crate::workspace().join("target/examples/rust-kernel.elf");
    build::kernel(tools, "vmi-example-kernel", &path, &[("VMI_NATIVE_OBJECT", &object)])?;
    Ok(path)
}

/// Runs a compiler or linker, and shows what it says if it fails.
fn run(command: &mut Command) -> Result<()> {
    log::debug!("{command:?}");
    let name = command.get_program().to_string_lossy().into_owned();
    let done = command.output().with_context(|| format!("{name} does not start"))?;
    if !done.status.success() {
        bail!("{name} failed ({}):\n{}", done.status, String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(())
}
