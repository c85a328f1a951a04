//! Build script of the `rom` package: hands the image's layout to the linker.
//!
//! `cargo xtask build` links every image at two bases and compares the bytes; the base comes
//! through `VMI_ROM_LINK_BASE` (a hexadecimal number, 0 when unset).

use std::env;
use std::path::Path;

fn main() {
    let script =
        Path::new(&env::var("CARGO_MANIFEST_DIR").expect("set by Cargo")).join("../linker.ld");
    println!("cargo::rerun-if-changed=../build.rs");
    println!("cargo::rerun-if-changed=../linker.ld");
    println!("cargo::rerun-if-env-changed=VMI_ROM_LINK_BASE");

    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return; // Built for the host, the package is a program that only says how to build it.
    }
    let base = env::var("VMI_ROM_LINK_BASE").unwrap_or_else(|_| "0".into());
    let arguments = [
        // Position-independent: what cannot be resolved now becomes a relocation, which the build refuses.
        "-pie",
        "--no-dynamic-linker",
        "-znorelro",
        "-zmax-page-size=16",
        "--build-id=none",
        "--gc-sections",
        &format!("--defsym=rom_link_base=0x{base}"),
        &format!("-T{}", script.display()),
    ];
    for argument in arguments {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
