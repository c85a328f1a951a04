//! Hands the guest's layout to the linker, and the objects with the native calls, for machines without a
//! ROM: `VMI_NATIVE_OBJECTS` holds their paths, as `PATH` holds folders.

#[path = "../bare.rs"]
mod bare;

use std::env;

fn main() {
    if bare::link(Some("linker.ld"), &[]) {
        println!("cargo::rerun-if-env-changed=VMI_NATIVE_OBJECTS");
        // Without them the linker says what is missing; the lints do not link.
        let objects = env::var_os("VMI_NATIVE_OBJECTS");
        for object in objects.iter().flat_map(env::split_paths) {
            println!("cargo::rerun-if-changed={}", object.display());
            println!("cargo::rustc-link-arg-bins={}", object.display());
        }
    }
}
