//! Build script of the `rom` package: hands the image's layout to the linker.
//!
//! `cargo xtask build` links every image at two bases and compares the bytes; the base comes
//! through `VMI_ROM_LINK_BASE` (a hexadecimal number, 0 when unset). Which call lies in which slot of
//! revision 13.x, and which routines are kept for a kernel to link, comes from the declaration of the calls.

use std::env;
use std::fmt::Write;
use std::path::Path;
use vmi_abi::calls::SLOTS_13;
use vmi_abi::header::SLOT_SIZE;
use vmi_abi::{REVISION_3_0, REVISION_13_0, REVISION_13_3, Revision};

fn main() {
    let variable = |name| env::var(name).expect("set by Cargo");
    let script = Path::new(&variable("CARGO_MANIFEST_DIR")).join("../linker.ld");
    println!("cargo::rerun-if-changed=../build.rs");
    println!("cargo::rerun-if-changed=../linker.ld");
    println!("cargo::rerun-if-env-changed=VMI_ROM_LINK_BASE");

    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return; // Built for the host, the package is a program that only says how to build it.
    }
    let has = |feature| env::var_os(feature).is_some();
    let calls = if has("CARGO_FEATURE_REVISION_13_3") {
        slots(REVISION_13_3)
    } else if has("CARGO_FEATURE_REVISION_13_0") {
        slots(REVISION_13_0)
    } else if has("CARGO_FEATURE_LINKED") {
        routines(REVISION_3_0)
    } else {
        String::new()
    };
    let output = variable("OUT_DIR");
    std::fs::write(Path::new(&output).join("calls.ld"), calls).expect("Cargo's own folder");

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
        &format!("-L{output}"), // Where linker.ld finds calls.ld.
        &format!("-T{}", script.display()),
    ];
    for argument in arguments {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}

/// The routines of all calls, in the linker's language: those that no answer leads to are kept as well.
fn routines(revision: Revision) -> String {
    revision.calls().map(|(_, call)| format!("KEEP(*(.text.call.{}))\n", call.name)).collect()
}

/// The slots that hold calls, in the linker's language. What lies behind them is free for code.
///
/// A slot that this revision does not have holds UD2, the rest of any other what fills every gap.
fn slots(revision: Revision) -> String {
    let mut script = format!(". = {:#x};\n", usize::from(*SLOTS_13.start()) * SLOT_SIZE);
    for number in SLOTS_13 {
        let start = usize::from(number) * SLOT_SIZE;
        let end = start + SLOT_SIZE;
        // MAX, so that the linker comes to the assertion. Writing to a string cannot fail.
        let _ = match revision.call(number.into()) {
            Some(call) => writeln!(
                script,
                "KEEP(*(.text.call.{name}))\n\
                 ASSERT(. > {start:#x}, \"slot {number}: no code for {name}\");\n\
                 ASSERT(. <= {end:#x}, \"slot {number}: {name} is longer than a slot; make it one of `long_routines!`\");\n\
                 . = MAX(., {end:#x});",
                name = call.name,
            ),
            None => writeln!(script, "FILL(0x0f0b)\n. = {end:#x};\nFILL(0xcccccccc)"),
        };
    }
    script
}
