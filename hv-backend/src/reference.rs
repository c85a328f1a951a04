//! The backend for the reference hypervisor, which `tests/hypervisor` is.
//!
//! Here is what runs anywhere: when the hypervisor is taken, which calls are served, and what is said of a failure. The
//! instructions themselves are in `transport`, for 32-bit x86 only.

#![cfg_attr(
    not(target_arch = "x86"),
    allow(dead_code, reason = "only the instructions need all of it")
)]

pub mod interface;
pub mod record;
#[cfg(target_arch = "x86")]
mod transport;

#[cfg(target_arch = "x86")]
pub use transport::cpuid;

use crate::update::contains;
use crate::{CallNumber, Failure, Hypervisor, Vendor};
use core::fmt;
use interface::{BASE, BATCH_LIMIT, Features, LEAF_GRANT, LEAF_INTERFACE, Status, is_understood};
use vmi_abi::flags::{EntryFlags, LazyMode};
use vmi_abi::number;

/// The transport to the reference hypervisor.
///
/// It lies in the memory that the hypervisor granted, within its first [`Self::LIMIT`] bytes, and so does the queue: the
/// hypervisor reads batches there by their physical addresses. The rest, up to [`Self::MEMORY`] bytes, holds the last words.
#[derive(Debug)]
pub struct Reference {
    /// The physical address of the granted memory, a multiple of [`Self::MEMORY`].
    physical: u32,
    /// Whether updates may wait.
    batches: bool,
    /// Whether they may wait for what drops translations.
    late: bool,
    /// Whether page faults may then be quiet.
    quiet: bool,
}

/// The most bytes of the last words.
const TEXT_LIMIT: u32 = 96;

/// Why the guest is left with native code under a reference hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It is another hypervisor.
    Stranger,
    /// Its CPUID leaves end before the granted memory.
    FewLeaves,
    /// Another version of the interface.
    Version,
    /// It has no need to be told of page tables.
    NoPageTables,
    /// The granted memory is too small, or does not begin with a page.
    Grant,
}

impl Unfit {
    /// In words.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Stranger => "another hypervisor",
            Self::FewLeaves => "too few CPUID leaves",
            Self::Version => "another version of the interface",
            Self::NoPageTables => "page tables are not shadowed",
            Self::Grant => "not enough memory granted",
        }
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl Reference {
    /// Bytes of memory for all that is remembered: one page. An address in it has the same low bits
    /// wherever the guest maps it, so the physical one is easily found.
    pub const MEMORY: u32 = 4096;

    /// Bytes of it that transport and queue may have.
    pub const LIMIT: u32 = Self::MEMORY - TEXT_LIMIT;

    /// Where in that memory the guest finds how many updates were refused so far, 32 bits.
    pub const REFUSALS: u32 = 4;

    /// The calls that are served: what changes page tables, and what could see them unchanged.
    ///
    /// All others are left to native code, for the guest's processor has the guest's own descriptor tables, task state, interrupt
    /// flag and CR0.TS: WriteGDTEntry and its like, UpdateKernelStack, CLTS and the interrupt calls have nobody to tell. IRET and
    /// SYSEXIT run on whatever page tables are there: nothing waits outside of the lazy modes, and a guest leaves those before it
    /// goes to user mode. APICWrite cannot be served, since nobody knows where the guest maps its local APIC; therefore
    /// [`Self::entry_flags`].
    #[rustfmt::skip]
    pub const SERVED: &[CallNumber] = &[
        number::SetPxE, number::SetPxELong, number::UpdatePxE, number::UpdatePxELong,
        number::AllocatePage, number::ReleasePage, number::InvalPage, number::FlushTLB,
        number::SetCR3, number::SetLazyMode, number::SetLinearMapping,
        // The page fault's own call; what SetCR3 may have left waiting; paging on or off, and the form of the tables.
        number::GetCR2, number::GetCR3, number::SetCR0, number::SetCR4,
        // Whoever stops does not leave work behind.
        number::Halt, number::Shutdown, number::Reboot,
    ];

    /// Whether a call is one of [`Self::SERVED`].
    #[must_use]
    pub const fn is_served(call: CallNumber) -> bool {
        contains(Self::SERVED, call)
    }

    /// The transport to a hypervisor, from its CPUID leaves.
    ///
    /// # Errors
    ///
    /// Why native code is to run instead.
    pub fn of(
        hypervisor: &Hypervisor,
        cpuid: impl Fn(u32, u32) -> [u32; 4],
    ) -> Result<Self, Unfit> {
        if hypervisor.vendor != Vendor::Reference {
            return Err(Unfit::Stranger);
        }
        if hypervisor.highest - hypervisor.base < LEAF_GRANT - BASE {
            return Err(Unfit::FewLeaves);
        }
        let leaf = |leaf: u32| cpuid(leaf - BASE + hypervisor.base, 0);
        let [version, features, limit, _] = leaf(LEAF_INTERFACE);
        let features = Features::from_bits_retain(features);
        if !is_understood(version) {
            return Err(Unfit::Version);
        }
        if !features.contains(Features::PAGE_TABLES) {
            return Err(Unfit::NoPageTables);
        }
        let [physical, granted, ..] = leaf(LEAF_GRANT);
        let begins_with_a_page = physical != 0 && physical & (Self::MEMORY - 1) == 0;
        if granted < Self::MEMORY || !begins_with_a_page {
            return Err(Unfit::Grant);
        }
        // A full queue goes over at once, so batches of fewer than it holds are as good as none.
        let batches = features.contains(Features::BATCH) && limit >= BATCH_LIMIT;
        let late = batches && features.contains(Features::LATE);
        let quiet = late && features.contains(Features::QUIET);
        Ok(Self { physical, batches, late, quiet })
    }

    /// Whether changes may be told late: [`Features::LATE`].
    #[inline]
    #[must_use]
    pub const fn may_be_late(&self) -> bool {
        self.late
    }

    /// The mode that the queue is to be in where the guest asks for this one: without batches nothing waits.
    #[inline]
    #[must_use]
    pub const fn lazy_mode(&self, asked: LazyMode) -> LazyMode {
        if self.batches { asked } else { LazyMode::OFF }
    }

    /// The flags of an update without DEFER: a flush on another processor goes unseen, and what waits by that flag must not
    /// wait beyond it. In a lazy mode the guest itself knows that updates wait.
    #[inline(always)]
    #[must_use]
    pub const fn entry_flags(flags: u32) -> u32 {
        flags & !EntryFlags::DEFER.bits()
    }

    /// The physical address of something that lies in the granted memory beside the transport.
    fn physical<T>(&self, there: *const T) -> u32 {
        self.physical | there.addr() as u32 & (Self::MEMORY - 1)
    }
}

/// Says what was refused, byte for byte: `SetPxE at C0001018: busy`.
///
/// Without `core::fmt`, whose tables are absolute addresses.
fn describe(failure: &Failure, put: &mut impl FnMut(u8)) {
    let Failure { update, status, .. } = failure;
    say(update.name(), put);
    say(" at ", put);
    for digit in (0..8).rev() {
        let value = (update.address >> (4 * digit) & 0xf) as u8;
        put(if value < 10 { b'0' + value } else { b'A' + value - 10 });
    }
    say(": ", put);
    let known = Status::ALL.iter().find(|known| **known as i32 == *status);
    say(known.map_or("an unknown status", |known| known.text()), put);
}

fn say(text: &str, put: &mut impl FnMut(u8)) {
    text.bytes().for_each(put);
}

#[cfg(test)]
mod tests;
