//! The calls of VMI on a machine without a hypervisor: each is the instruction that it stands for.
//!
//! - [`binding`] decides what `get_reloc` answers for each call, and says why.
//! - `calls` is the code, for 32-bit x86 only. Each routine keeps every register but those that
//!   its contract in [`vmi_abi::calls`] gives away, uses no memory of its own and runs at whatever
//!   address it finds itself.

#![no_std]

pub mod binding;

#[cfg(target_arch = "x86")]
pub mod calls;
