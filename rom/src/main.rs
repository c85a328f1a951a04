//! The VMI option-ROM image.
//!
//! Almost all of it is assembly fed by constants of [`vmi_abi`] and the backends:
//!
//! - `header`: the structures and strings that firmware and guest read,
//! - `entry`: the 16-bit code that the BIOS runs at POST,
//! - `processors`: the part of it that finds out whether call sites may be rewritten,
//! - `table`: `get_reloc` of revision 3.0 and its table, made from the declaration of the calls,
//! - `granted`: what backends for hypervisors share,
//! - `reference`: the backend for the reference hypervisor, its memory and its entries,
//! - `xen`: the same for Xen; below it, in assembly, the calls that come often,
//! - `slots`: what revision 13.x has in its place,
//! - `linked`: the names under which a kernel links to the calls.
//!
//! This crate alone picks backends. `cargo xtask build` links it, cuts out the bytes, pads them and
//! sets length and checksum.

#![cfg_attr(target_os = "none", no_std, no_main)]

/// The backends, as firmware and guest print them.
#[cfg(all(target_os = "none", not(feature = "reference")))]
macro_rules! backends {
    () => {
        "native backend"
    };
}

/// The backends, as firmware and guest print them.
#[cfg(all(target_os = "none", feature = "reference", not(feature = "xen")))]
macro_rules! backends {
    () => {
        "native and reference backends"
    };
}

/// The backends, as firmware and guest print them.
#[cfg(all(target_os = "none", feature = "xen"))]
macro_rules! backends {
    () => {
        "native, reference and Xen backends"
    };
}

#[cfg(all(target_os = "none", feature = "rewrite-sites"))]
#[macro_use]
mod processors;
#[cfg(target_os = "none")]
mod entry;
#[cfg(all(target_os = "none", feature = "reference"))]
mod granted;
#[cfg(target_os = "none")]
mod header;
#[cfg(all(target_os = "none", feature = "linked"))]
mod linked;
#[cfg(all(target_os = "none", feature = "reference"))]
mod reference;
#[cfg(all(target_os = "none", feature = "slots"))]
mod slots;
#[cfg(all(target_os = "none", not(feature = "slots")))]
mod table;
#[cfg(all(target_os = "none", feature = "xen"))]
mod xen;

/// The revision of the interface that this image serves.
#[cfg(target_os = "none")]
const REVISION: vmi_abi::Revision = if cfg!(feature = "revision-13-3") {
    vmi_abi::REVISION_13_3
} else if cfg!(feature = "revision-13-0") {
    vmi_abi::REVISION_13_0
} else {
    vmi_abi::REVISION_3_0
};

/// No code in the image panics; the language wants the handler all the same.
#[cfg(target_os = "none")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_os = "none"))]
fn main() {
    println!("the image is built by `cargo xtask build`");
}
