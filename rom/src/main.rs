//! The VMI option-ROM image.
//!
//! Almost all of it is assembly fed by constants of [`vmi_abi`] and the backends:
//!
//! - `header`: the structures and strings that firmware and guest read,
//! - `entry`: the 16-bit code that the BIOS runs at POST,
//! - `processors`: the part of it that finds out whether call sites may be rewritten,
//! - `table`: `vmi_init`, `get_reloc` and its table, made from the declaration of the calls.
//!
//! This crate alone picks backends. `cargo xtask build` links it, cuts out the bytes, pads them and
//! sets length and checksum.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(all(target_os = "none", feature = "rewrite-sites"))]
#[macro_use]
mod processors;
#[cfg(target_os = "none")]
mod entry;
#[cfg(target_os = "none")]
mod header;
#[cfg(target_os = "none")]
mod table;

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
