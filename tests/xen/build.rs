//! Hands the loader's layout to the linker.

use std::env;
use std::path::Path;

fn main() {
    let script =
        Path::new(&env::var("CARGO_MANIFEST_DIR").expect("set by Cargo")).join("linker.ld");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=linker.ld");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        for argument in
            ["-static", "--build-id=none", "--gc-sections", &format!("-T{}", script.display())]
        {
            println!("cargo::rustc-link-arg-bins={argument}");
        }
    }
}
