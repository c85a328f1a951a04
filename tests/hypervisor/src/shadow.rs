//! Shadow page tables: what the processor walks instead of the guest's tables.

use crate::memory::Memory;
use crate::walk::Registers;

/// A page of the pool, which the processor walks.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(4096))]
pub struct Page(pub [u64; 512]);

impl Page {
    /// All entries clear.
    pub const EMPTY: Self = Self([0; 512]);
}

/// What [`Shadow`] knows of a page of the pool. All bytes zero is [`Slot::EMPTY`].
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    next: u32,
}

impl Slot {
    /// Of a page that nothing is known of.
    pub const EMPTY: Self = Self { next: 0 };
}

/// What [`Shadow`] knows of a frame. All bytes zero is [`Frame::EMPTY`].
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    head: u32,
}

impl Frame {
    /// Of a frame that nothing is known of.
    pub const EMPTY: Self = Self { head: 0 };
}

/// What [`Shadow`] works with, all of it the hypervisor's own.
#[derive(Debug)]
pub struct Storage<'a> {
    /// The shadow tables: 3 at least.
    pub pool: &'a mut [Page],
    /// The machine-physical address of `pool`; it ends below 4 GiB.
    pub base: u64,
    /// One for each page of the pool, [`Slot::EMPTY`].
    pub slots: &'a mut [Slot],
    /// One for each frame number of the guest's memory, guest-physical and of the machine, [`Frame::EMPTY`].
    pub frames: &'a mut [Frame],
    /// The machine-physical address of a page of ones, that is mapped where there is nothing.
    pub ones: u64,
}

/// What became of a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The shadow was behind and has caught up: the guest goes on with the same instruction.
    Filled,
    /// It is the guest's own: to be injected with this error code.
    Guest {
        /// The error code.
        error: u32,
    },
    /// A store to a page table that is watched: to be emulated, and [`Shadow::written`] to be told.
    TableWrite {
        /// Where the store goes.
        physical: u64,
    },
    /// A store that goes nowhere, to a ROM or to nothing: to be emulated without the store.
    Dropped {
        /// Where the store would go.
        physical: u64,
    },
}

/// The shadow page tables of one guest.
#[derive(Debug)]
pub struct Shadow<'a> {
    storage: Storage<'a>,
    /// Guest page tables, or parts of one, that got a shadow.
    pub shadowed: u64,
}

impl<'a> Shadow<'a> {
    /// Without any table.
    #[must_use]
    pub fn new(storage: Storage<'a>) -> Self {
        Self { storage, shadowed: 0 }
    }

    /// Machine-physical address of the page-directory-pointer table that the processor walks: never another.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.storage.base
    }

    /// The guest has other registers: CR3 was loaded, or a bit of CR0, CR4 or EFER changed that decides on translation.
    pub fn load(&mut self, registers: &Registers, memory: &impl Memory) {
        let _ = (registers, memory);
    }

    /// Resolves a page fault of the guest's processor: the linear address from CR2 and the error code.
    #[must_use]
    pub fn fault(
        &mut self,
        registers: &Registers,
        memory: &impl Memory,
        address: u32,
        error: u32,
    ) -> Resolution {
        let _ = (registers, memory, address);
        Resolution::Guest { error }
    }

    /// Follows a store of `size` bytes to guest-physical memory that may be a page table.
    pub fn written(
        &mut self,
        registers: &Registers,
        memory: &impl Memory,
        physical: u64,
        size: usize,
    ) {
        let _ = (registers, memory, physical, size);
    }

    /// Forgets what was known of a linear address: INVLPG.
    pub fn invalidate_page(&mut self, registers: &Registers, memory: &impl Memory, address: u32) {
        let _ = (registers, memory, address);
    }

    /// Has the processor's TLB flushed.
    pub fn flush(&mut self) {}

    /// Whether the processor's TLB, global pages too, has to be flushed before the guest goes on. Asking clears it.
    #[must_use]
    pub fn take_flush(&mut self) -> bool {
        true
    }

    /// The guest will tell of changes of this frame, a page table: it is watched no longer.
    pub fn announce(&mut self, frame: u64) {
        let _ = frame;
    }

    /// The frame is no page table any more.
    pub fn release(&mut self, frame: u64) {
        let _ = frame;
    }
}
