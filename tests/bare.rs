//! What the build scripts of the programs for a bare machine have in common.

use std::env;
use std::path::Path;

/// Hands the linker the script that lays the program out, if there is one, and more words. False on the host, where nothing is linked.
pub(crate) fn link(layout: Option<&str>, more: &[&str]) -> bool {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../bare.rs");
    let folder = env::var("CARGO_MANIFEST_DIR").expect("set by Cargo");
    let script = layout.map(|layout| {
        println!("cargo::rerun-if-changed={layout}");
        format!("-T{}", Path::new(&folder).join(layout).display())
    });
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return false;
    }
    let common = ["-static", "--build-id=none", "--gc-sections"];
    for argument in common.iter().chain(more).copied().chain(script.as_deref()) {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    true
}
