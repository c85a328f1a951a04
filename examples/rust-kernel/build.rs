//! Hands the kernel's layout to the linker, and the object with the native calls that `VMI_NATIVE_OBJECT` names.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=linker.ld");
    println!("cargo::rerun-if-env-changed=VMI_NATIVE_OBJECT");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }
    let script = format!("-T{}/linker.ld", env::var("CARGO_MANIFEST_DIR").expect("set by Cargo"));
    for argument in ["-static", "--build-id=none", "--gc-sections", &script] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    // Without it the linker says what is missing; the lints do not link.
    if let Ok(object) = env::var("VMI_NATIVE_OBJECT") {
        println!("cargo::rerun-if-changed={object}");
        println!("cargo::rustc-link-arg-bins={object}");
    }
}
