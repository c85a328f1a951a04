//! Bit sets and small numbers that travel in arguments.

use bitflags::bitflags;

bitflags! {
    /// Flags of SetPxE, SetPxELong, UpdatePxE and UpdatePxELong.
    ///
    /// Linux sometimes passes the wrong level: a ROM must not trust it where a wrong level would corrupt.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EntryFlags: u32 {
        /// An entry of a page table.
        const PT = 0x01;
        /// An entry of a page directory.
        const PD = 0x02;
        /// An entry of a page directory pointer table.
        const PDP = 0x04;
        /// An entry of a level-4 table.
        const PML4 = 0x08;
        /// The entry belongs to the current address space; bits 12 to 31 hold the linear address that it maps.
        const CURRENT_AS = 0x10;
        /// The update may wait for the next TLB invalidation.
        const DEFER = 0x20;
    }

    /// Flags of AllocatePage and ReleasePage in revision 3.0.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PageFlags: u32 {
        /// The page becomes, or was, a page table.
        const PT = 0x01;
        /// A page directory.
        const PD = 0x02;
        /// A page directory pointer table.
        const PDP = 0x04;
        /// A level-4 table.
        const PML4 = 0x08;
        /// Its entries have 64 bits.
        const PAE = 0x10;
        /// Entries are copied from another page: the clone arguments say which.
        const CLONE = 0x20;
        /// The page holds zeroes.
        const ZEROED = 0x40;
    }

    /// Flags of SetAlarm and CancelAlarm, above the counter's number in bits 0 to 7.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct AlarmFlags: u32 {
        /// The alarm repeats. A period of 0 makes it a one-shot all the same.
        const PERIODIC = 0x100;
        /// The alarm arrives by the local APIC's timer vector; without it, as IRQ 0.
        const WIRED_LVTT = 0x1_0000;
    }

    /// What FlushTLB drops.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FlushFlags: u32 {
        /// Translations that are not global.
        const TLB = 1;
        /// Global ones too.
        const GLOBAL = 2;
    }

    /// What FlushDeferredCalls of revision 13.x makes visible.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeferredFlags: u32 {
        /// Processor state.
        const CPU = 0x40;
        /// Page tables.
        const PT = 0x80;
    }
}

impl PageFlags {
    /// PAGE_PAE as revision 13.x has it.
    pub const PAE_13: u32 = 0x04;
}

impl AlarmFlags {
    /// The counter's number within the flags.
    pub const COUNTER_MASK: u32 = 0xff;
}

/// SetLazyMode's argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LazyMode(pub u32);

impl LazyMode {
    /// Leave the lazy mode; everything deferred becomes visible.
    pub const OFF: Self = Self(0);
    /// Page-table updates may wait.
    pub const MMU: Self = Self(1);
    /// Descriptor and control-register updates may wait.
    pub const CPU: Self = Self(2);
}

/// GetCycleCounter's argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CycleCounter(pub u32);

impl CycleCounter {
    /// Cycles of real time; real = available + stolen.
    pub const REAL: Self = Self(0);
    /// Cycles in which the guest could run.
    pub const AVAILABLE: Self = Self(1);
    /// Cycles that the hypervisor took.
    pub const STOLEN: Self = Self(2);
}

/// Reboot's argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RebootKind(pub u32);

impl RebootKind {
    /// Reset the processor.
    pub const SOFT: Self = Self(0);
    /// Reset the machine.
    pub const HARD: Self = Self(1);
}
