//! Hands the linker the layout, and the object with the native calls: `VMI_NATIVE_OBJECTS` names it.

fn main() {
    println!("cargo::rerun-if-env-changed=VMI_NATIVE_OBJECTS");
    // Without one nothing is linked for the bare machine: the host has its own `main`.
    let Ok(object) = std::env::var("VMI_NATIVE_OBJECTS") else { return };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/linker.ld");
    for file in [script, &object] {
        println!("cargo::rerun-if-changed={file}");
    }
    for argument in ["-static", "--build-id=none", "--gc-sections", "-T", script, &object] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
