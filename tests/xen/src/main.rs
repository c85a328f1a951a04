//! Starts an unmodified kernel on Xen, at its VMI entry: see `docs/vmi-entry.md`.
//!
//! Xen starts this program as its first domain, with the kernel's ELF file as the module. The program
//! does what a boot loader and a firmware do on a PC: it puts the ROM that the machine's firmware has found where
//! the guest looks for one, and with it what the ROM has to know of Xen, loads the kernel, describes memory, and
//! enters the kernel. From there on the ROM alone deals with Xen.
//!
//! - `boot`: what Xen wants to know of the program, and where it begins,
//! - `hypercall`: the hypercalls that it makes, `console`: one of them,
//! - `memory`: the guest's memory, which Xen has mapped from C0000000h on,
//! - `place`: the ROM,
//! - `guest`: the kernel, its `elf` file, its boot information, its first instruction.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod boot;
#[cfg(target_os = "none")]
mod console;
#[cfg(target_os = "none")]
mod elf;
#[cfg(target_os = "none")]
mod guest;
#[cfg(target_os = "none")]
mod hypercall;
#[cfg(target_os = "none")]
mod memory;
#[cfg(target_os = "none")]
mod place;

#[cfg(not(target_os = "none"))]
fn main() {
    println!("the loader is built by `cargo xtask run --on xen`");
}
