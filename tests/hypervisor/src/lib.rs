//! The reference hypervisor's parts that need no machine: they are tested on the host.
//!
//! - [`memory`]: the guest's physical memory, as the hypervisor sees it.
//! - [`walk`]: the guest's own translation of linear addresses, as its processor would make it.
//! - [`shadow`]: the page tables that the processor really walks.
//! - [`hypercall`]: what a guest asks for, checked and done.
//! - [`emulate`]: single instructions, carried out for the guest.
//! - [`linux`]: how a Linux kernel is started.

#![no_std]

#[cfg(test)]
extern crate std;

pub mod emulate;
pub mod hypercall;
pub mod linux;
pub mod memory;
pub mod shadow;
pub mod walk;
