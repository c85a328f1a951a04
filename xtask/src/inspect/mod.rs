//! The inspector: what a VMI ROM's call table does, and whether it keeps the contract.
//!
//! Nothing is taken from symbols or from what we know of our own image. The ROM's own `vmi_init`,
//! `get_reloc` and calls are executed, at a linear address of choice:
//!
//! - [`source`]: where ROMs come from: files, objects, dumps, machines,
//! - [`rom`]: the bytes and the structures in them,
//! - [`hostile`]: what must hold for any input,
//! - [`machine`]: a flat 32-bit ring-0 processor that watches what the code does,
//! - [`interface`]: what differs between revisions,
//! - [`answers`]: what `get_reloc` says of each call,
//! - [`reach`]: the instructions that can be reached from an entry, executed or not,
//! - [`site`]: where a kernel calls from,
//! - [`trial`]: a call executed as a guest would call it, from a random state,
//! - [`rules`]: the contract, held against all of that,
//! - [`survey`] and [`report`]: the same facts for a reader,
//! - [`flow`] and [`difference`]: two ROMs compared,
//! - [`map`]: where every byte goes,
//! - [`format`]: verdicts for other programs.

pub mod answers;
pub mod difference;
pub mod flow;
pub mod format;
pub mod hostile;
pub mod interface;
pub mod machine;
pub mod map;
pub mod random;
pub mod reach;
pub mod report;
pub mod rom;
pub mod rules;
#[cfg(test)]
mod samples;
pub mod site;
#[cfg(test)]
mod site_tests;
#[cfg(test)]
mod slot_samples;
#[cfg(test)]
mod slot_tests;
pub mod source;
pub mod survey;
#[cfg(test)]
mod tests;
pub mod trial;

pub use answers::{Answer, Table, answers};
pub use interface::Interface;
pub use rom::{ReadError, Rom};
pub use rules::{Note, Report, Rule, Violation, verify};
pub use survey::{Survey, survey};

/// Where Linux sees a ROM that the firmware placed at C8000h.
pub const HIGH_BASE: u32 = 0xc00c_8000;

/// Another place, as far from [`HIGH_BASE`] in every byte as the 2 KiB boundary permits.
pub const LOW_BASE: u32 = 0x000d_1800;

/// Where a guest of 13.0 may have copied the slots to: a page of its own.
pub const COPY_BASE: u32 = 0xc043_2000;
