//! The VMI binary interface between a guest kernel and a ROM.
//!
//! This crate is the one place where the interface is written down. The image, the backends, the
//! inspector, the test guest, the tables in `docs/` and the C header are all made from it:
//!
//! - [`calls`]: every call of revisions 3.0 and 13.x with its number and its [`Contract`],
//! - [`header`]: the option-ROM header and the `PCIR` and `$PnP` structures,
//! - [`relocation`]: what `get_reloc` answers,
//! - [`flags`]: the bit sets that travel in arguments,
//! - [`state`]: structures in memory (descriptor table registers, the state of a starting processor),
//! - [`probe`]: how a guest recognises a ROM,
//! - [`entry`]: a kernel's second start, for hypervisors that start kernels themselves,
//! - [`vmi`]: the calls as functions, for kernels in Rust.
//!
//! The facts come from the interface proposal of March 2006 and from the clients that exist (Linux
//! 2.6.21 to 2.6.36, Sanos). Where they disagree the clients win: they are what a ROM must serve.
//!
//! Values that cross the boundary are integers in newtypes with constants, never Rust enums: the
//! other side may send any bit pattern.

#![no_std]

pub mod calls;
pub mod contract;
pub mod entry;
pub mod flags;
pub mod header;
pub mod probe;
pub mod relocation;
pub mod state;
pub mod vmi;

pub use calls::{CALLS_3_0, CALLS_13, CallNumber, number, slot};
pub use contract::{
    Answers, Argument, Call, Contract, Deferral, Ending, Group, Place, Registers, Segments, Site,
    Slot,
};
pub use header::RomHeader;
pub use relocation::{KEEP_SITE, RelocationInfo, RelocationType};

/// The interface revision that Linux 2.6.21 to 2.6.36 accepts: the major exactly, the minor or more.
pub const REVISION_3_0: Revision = Revision { major: 3, minor: 0 };

/// The slot-table revision of the Linux patches of March 2006. Older than 3.0: the number was reset.
pub const REVISION_13_0: Revision = Revision { major: 13, minor: 0 };

/// The slot-table revision that Sanos insists on.
pub const REVISION_13_3: Revision = Revision { major: 13, minor: 3 };

/// A revision of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revision {
    /// Must match exactly.
    pub major: u8,
    /// The guest needs at least its own.
    pub minor: u8,
}

/// Bytes of its own stack that a guest can spare for a call. The stack is the guest's and small.
pub const STACK_LIMIT: u32 = 256;
