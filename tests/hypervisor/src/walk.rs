//! The guest's own translation of linear addresses: what its processor would do with its page tables.

use crate::memory::{FRAME, Memory};

/// The registers that decide on translation, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// CR0: PG and WP matter.
    pub cr0: u32,
    /// CR3.
    pub cr3: u32,
    /// CR4: PSE and PAE matter.
    pub cr4: u32,
    /// EFER: NXE matters.
    pub efer: u64,
    /// The bits of a physical address, 32 to 52: CPUID leaf 80000008h, EAX bits 0 to 7. Higher ones are reserved in entries.
    pub width: u8,
}

/// What the guest does with a linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Stores there.
    pub write: bool,
    /// In ring 3.
    pub user: bool,
    /// Fetches an instruction.
    pub execute: bool,
}
