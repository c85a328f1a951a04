//! The reference hypervisor's parts that need no machine: they are tested on the host.
//!
//! - [`memory`]: the guest's physical memory, as the hypervisor sees it.

#![no_std]

#[cfg(test)]
extern crate std;

pub mod memory;
