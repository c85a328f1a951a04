//! What the queue holds: a call that changes what the processor sees, and which of them may wait.

use core::fmt;
use core::mem::size_of;
use static_assertions::const_assert_eq;
use vmi_abi::flags::{EntryFlags, LazyMode};
use vmi_abi::{CALLS_3_0, Call, CallNumber, Deferral, number};

/// A call that changes what the processor sees: a table entry, a descriptor, a register, what is known of page tables.
///
/// Calls of revision 13.x that do the same have the number of 3.0 here, and no flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Update {
    /// The call's number in revision 3.0.
    pub call: CallNumber,
    /// The linear address of what is changed; 0 for a register. Of AllocatePage and ReleasePage the frame's number.
    pub address: u32,
    /// The new value, or its low half.
    pub low: u32,
    /// The high half of a new value of 64 bits.
    pub high: u32,
    /// Flags as the guest passed them: [`EntryFlags`], or the call's own.
    pub flags: u32,
}

const_assert_eq!(size_of::<Update>(), 20);

/// Bytes of a descriptor.
const DESCRIPTOR_SIZE: u32 = 8;

macro_rules! updates {
    ($( $(#[$doc:meta])* $name:ident( $( $argument:ident: $type:ty ),* ) { $( $field:ident: $value:expr ),* } )*) => {
        #[expect(non_snake_case, reason = "the specification's names")]
        impl Update {
            $(
                $(#[$doc])*
                #[inline(always)]
                #[must_use]
                pub const fn $name($( $argument: $type ),*) -> Self {
                    Self { $( $field: $value, )* ..Self::of(number::$name) }
                }
            )*
        }

        impl Update {
            /// The calls that are updates.
            pub const CALLS: &[CallNumber] = &[$( number::$name ),*];

            /// The call's name, without a table: what is in the image has no place for one.
            #[must_use]
            pub const fn name(&self) -> &'static str {
                match self.call {
                    $( number::$name => stringify!($name), )*
                    _ => "unknown call",
                }
            }

            /// What the contract of its call lets it wait for.
            #[inline(always)]
            #[must_use]
            pub const fn deferral(&self) -> Deferral {
                match self.call {
                    $( number::$name => const { CALLS_3_0[number::$name.0 as usize].contract.deferral }, )*
                    _ => Deferral::Never,
                }
            }
        }
    };
}

updates! {
    /// Stores a 32-bit page-table entry.
    SetPxE(value: u32, entry: u32, flags: u32) { address: entry, low: value, flags: flags }
    /// Stores a 64-bit page-table entry.
    SetPxELong(value: u64, entry: u32, flags: u32) {
        address: entry, low: value as u32, high: (value >> 32) as u32, flags: flags
    }
    /// The guest wrote a 32-bit page-table entry itself.
    UpdatePxE(entry: u32, flags: u32) { address: entry, flags: flags }
    /// The guest wrote a 64-bit page-table entry itself.
    UpdatePxELong(entry: u32, flags: u32) { address: entry, flags: flags }
    /// Stores a descriptor of a GDT.
    WriteGDTEntry(table: u32, index: u32, low: u32, high: u32) {
        address: descriptor(table, index), low: low, high: high
    }
    /// Stores a descriptor of an LDT.
    WriteLDTEntry(table: u32, index: u32, low: u32, high: u32) {
        address: descriptor(table, index), low: low, high: high
    }
    /// Stores a descriptor of an IDT.
    WriteIDTEntry(table: u32, index: u32, low: u32, high: u32) {
        address: descriptor(table, index), low: low, high: high
    }
    /// Sets the stack for entries into ring 0. Its contract lets it wait for nothing, but it keeps its place behind what waits.
    UpdateKernelStack(task_state: u32, esp0: u32) { address: task_state, low: esp0 }
    /// Loads CR3.
    SetCR3(value: u32) { low: value }
    /// Clears the task-switched flag.
    CLTS() {}
    /// A page becomes a page table. As the next three it has no lazy mode to wait in.
    AllocatePage(frame: u32, flags: u32) { address: frame, flags: flags }
    /// A page is a page table no longer.
    ReleasePage(frame: u32, flags: u32) { address: frame, flags: flags }
    /// Drops what is known of a linear address.
    InvalPage(address: u32) { address: address }
    /// Drops what is known of all addresses.
    FlushTLB(flags: u32) { flags: flags }
}

impl Update {
    /// A call without arguments.
    const fn of(call: CallNumber) -> Self {
        Self { call, address: 0, low: 0, high: 0, flags: 0 }
    }

    /// What the places of the queue hold at first: zeroes.
    pub(crate) const ZERO: Self = Self::of(CallNumber(0));

    /// Whether it may wait in this lazy mode.
    #[inline(always)]
    #[must_use]
    pub const fn may_wait(&self, mode: LazyMode) -> bool {
        match self.deferral() {
            Deferral::Never => false,
            Deferral::LazyMmu => {
                mode.0 == LazyMode::MMU.0 || self.flags & EntryFlags::DEFER.bits() != 0
            }
            Deferral::LazyCpu => mode.0 == LazyMode::CPU.0,
        }
    }

    /// Whether a page becomes a page table, or is one no longer.
    #[inline(always)]
    pub(crate) const fn is_of_page(&self) -> bool {
        matches!(self.call, number::AllocatePage | number::ReleasePage)
    }

    /// Whether it leaves nothing of an update directly before it: same call, same place.
    #[inline(always)]
    #[must_use]
    pub const fn replaces(&self, before: &Self) -> bool {
        self.address == before.address && self.call.0 == before.call.0
    }
}

/// The linear address of a descriptor. An index that points out of the address space is the guest's mistake, not ours.
const fn descriptor(table: u32, index: u32) -> u32 {
    table.wrapping_add(index.wrapping_mul(DESCRIPTOR_SIZE))
}

impl fmt::Display for Update {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, low, high, flags, .. } = self;
        let name = self.name();
        write!(f, "{name} at {address:#x}, value {high:08x}{low:08x}, flags {flags:#x}")
    }
}

/// What a call has to do with updates that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Is one itself.
    Update,
    /// Could see or show what is not there yet: everything that waits goes first.
    Flush,
    /// Neither sees nor shows page tables, descriptors, CR3 or the task-switched flag.
    Indifferent,
}

impl Role {
    /// A call's role. What is not known to be indifferent flushes: forgetting a call here costs time, not correctness.
    #[must_use]
    pub const fn of(call: &Call) -> Self {
        let Some(number) = call.number else { return Self::Flush };
        if contains(Update::CALLS, number) {
            Self::Update
        } else if contains(INDIFFERENT, number) {
            Self::Indifferent
        } else {
            Self::Flush
        }
    }
}

/// The indifferent calls. GetCR2 is not one: it is the call by which a guest looks at a page fault,
/// and the address may be one that a waiting update maps. Nor is APICWrite, by which a guest tells another
/// processor to flush.
#[rustfmt::skip]
const INDIFFERENT: &[CallNumber] = &[
    number::CPUID, number::RDMSR, number::RDPMC, number::RDTSC, number::WBINVD,
    number::GetGDT, number::GetLDT, number::GetIDT, number::GetTR,
    number::SetCR2, number::GetCR4, number::SetDR, number::GetDR,
    number::EnableInterrupts, number::DisableInterrupts, number::GetInterruptMask, number::SetInterruptMask,
    number::SetIOPLMask, number::MachineToPhysical, number::PhysicalToMachine,
    number::INL, number::INB, number::INW, number::INSL, number::INSB, number::INSW,
    number::OUTL, number::OUTB, number::OUTW, number::OUTSL, number::OUTSB, number::OUTSW,
    number::IODelay, number::APICRead,
    number::GetCycleFrequency, number::GetCycleCounter, number::SetAlarm, number::CancelAlarm,
    number::GetWallclockTime, number::WallclockUpdated,
];

pub(crate) const fn contains(calls: &[CallNumber], call: CallNumber) -> bool {
    let mut i = 0;
    while i < calls.len() {
        if calls[i].0 == call.0 {
            return true;
        }
        i += 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmi_abi::calls::{CALLS_13, slot};

    #[test]
    fn every_call_that_may_wait_is_an_update() {
        for call in CALLS_3_0 {
            if call.contract.deferral != Deferral::Never {
                assert_eq!(Role::of(call), Role::Update, "{}", call.name);
            }
        }
    }

    #[test]
    fn what_the_interface_says_makes_updates_visible_flushes() {
        for number in [number::SetLazyMode, number::GetCR2, number::APICWrite] {
            assert_eq!(Role::of(number.call().expect("in the table")), Role::Flush, "{number:?}");
        }
        // As updates they take along what is before them.
        let modes = [LazyMode::OFF, LazyMode::MMU, LazyMode::CPU];
        let defer = EntryFlags::DEFER.bits();
        for update in [Update::FlushTLB(defer), Update::InvalPage(0x1000)] {
            assert!(!modes.into_iter().any(|mode| update.may_wait(mode)), "{update}");
        }
        let deferred = CALLS_13[usize::from(slot::FlushDeferredCalls.number)];
        assert_eq!(Role::of(deferred.expect("in the table")), Role::Flush);
    }

    #[test]
    fn only_its_mode_or_its_flag_lets_an_update_wait() {
        let defer = EntryFlags::DEFER.bits();
        let modes = [LazyMode::OFF, LazyMode::MMU, LazyMode::CPU, LazyMode(3), LazyMode(u32::MAX)];
        let waits = |update: Update| modes.map(|mode| update.may_wait(mode));
        let (mmu, cpu) = ([false, true, false, false, false], [false, false, true, false, false]);
        assert_eq!(waits(Update::SetPxE(1, 2, 0)), mmu);
        assert_eq!(waits(Update::SetPxE(1, 2, defer)), [true; 5]);
        assert_eq!(waits(Update::SetPxELong(1, 2, 0)), mmu);
        assert_eq!(waits(Update::UpdatePxE(2, 0)), mmu);
        assert_eq!(waits(Update::UpdatePxELong(2, defer)), [true; 5]);
        assert_eq!(waits(Update::WriteGDTEntry(1, 2, 3, 4)), cpu);
        assert_eq!(waits(Update::WriteLDTEntry(1, 2, 3, 4)), cpu);
        assert_eq!(waits(Update::WriteIDTEntry(1, 2, 3, 4)), cpu);
        assert_eq!(waits(Update::UpdateKernelStack(1, 2)), [false; 5]);
        assert_eq!(waits(Update::SetCR3(1)), cpu);
        assert_eq!(waits(Update::CLTS()), cpu);
        assert_eq!(waits(Update::AllocatePage(1, defer)), [false; 5]);
        assert_eq!(waits(Update::ReleasePage(1, defer)), [false; 5]);
        assert_eq!(waits(Update::InvalPage(0x1000)), [false; 5]);
        assert_eq!(waits(Update::FlushTLB(defer)), [false; 5]);
        assert_eq!(waits(Update::ZERO), [false; 5]);
    }

    #[test]
    fn a_descriptor_is_named_by_its_address() {
        assert_eq!(Update::WriteGDTEntry(0x1000, 3, 0, 0).address, 0x1018);
        assert_eq!(Update::WriteGDTEntry(0x1000, u32::MAX, 0, 0).address, 0xff8);
    }
}
