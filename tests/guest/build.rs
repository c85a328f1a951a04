//! Hands the guest's layout to the linker, and the objects with the native calls, for machines without a
//! ROM: `VMI_NATIVE_OBJECTS` holds their paths, as `PATH` holds folders.

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
        println!("cargo::rerun-if-env-changed=VMI_NATIVE_OBJECTS");
        // Without them the linker says what is missing; the lints do not link.
        let objects = env::var_os("VMI_NATIVE_OBJECTS");
        for object in objects.iter().flat_map(env::split_paths) {
            println!("cargo::rerun-if-changed={}", object.display());
            println!("cargo::rustc-link-arg-bins={}", object.display());
        }
    }
}
