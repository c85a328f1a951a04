//! Page tables.
//!
//! A page that is not announced is the guest's memory, with the guest's frames in its entries. Announced, it is a table: the machine's
//! frames are in its entries, it is read-only wherever it is mapped, and entries change by hypercalls. Who announces a table
//! announces all that it leads to. Released, it is as before.

use super::frames::frame_in;
use super::interface::{
    Entry, MmuExtOp, MmuUpdate, MulticallEntry, PAGE_SHIFT, PAGE_SIZE, hypercall, mmuext, sched,
    uvmf,
};
use super::machine::Machine;
use super::{ONE_UPDATE, Xen, calls_in, updates_in};
use crate::CallNumber;
use core::cell::Cell;
use core::ops::Range;
use vmi_abi::flags::{FlushFlags, LazyMode, PageFlags};
use vmi_abi::number;

/// How far a table is from the pages that it leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    /// A page table.
    Table,
    /// A page directory.
    Directory,
    /// A page directory pointer table, of four entries.
    Pointers,
}

impl Level {
    /// The level that flags say. One that says nothing, or more than PAE has, is taken for a page table.
    const fn of(flags: PageFlags) -> Self {
        if flags.contains(PageFlags::PDP) {
            Self::Pointers
        } else if flags.contains(PageFlags::PD) {
            Self::Directory
        } else {
            Self::Table
        }
    }

    const fn entries(self) -> u32 {
        match self {
            Self::Pointers => 4,
            Self::Table | Self::Directory => PAGE_SIZE / 8,
        }
    }

    const fn above(self) -> Self {
        match self {
            Self::Table => Self::Directory,
            Self::Directory | Self::Pointers => Self::Pointers,
        }
    }

    const fn below(self) -> Option<Self> {
        match self {
            Self::Pointers => Some(Self::Directory),
            Self::Directory => Some(Self::Table),
            Self::Table => None,
        }
    }
}

/// What is done with entries on the way through new tables.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Mark,
    Translate,
}

/// Which entries of a table have the machine's frames already: none.
const NONE: Range<u32> = 0..0;

const PRESENT: u64 = Entry::PRESENT.bits();
const LARGE: u64 = Entry::LARGE.bits();

/// In an entry: it leads to a table that is only being announced. Neither Xen nor the guest sees the bit, which 32-bit processors reserve.
const NEW: u64 = 1 << 62;

impl Xen {
    /// SetPxELong: at once, or it waits. In the image the frequent case is assembly, in `rom/src/xen.rs`, for which this notes the table.
    pub fn set_entry(&self, machine: &impl Machine, value: u64, entry: u32) {
        let Some(table) = self.frames.frame_of(entry) else {
            return self.refuse(machine, number::SetPxELong, entry, 0);
        };
        if !self.frames.is_table(machine, table) {
            // Memory: it is translated when it becomes a table. No processor looks at it before.
            return machine.store_long(entry, value);
        }
        let place = u64::from(self.frames.machine_frame(machine, table)) << PAGE_SHIFT;
        self.last_table.set(entry & !(PAGE_SIZE - 1));
        self.last_place.set(place);
        let leads_to_tables = || self.frames.is_directory(machine, table);
        let val = self.frames.machine_entry(machine, value, leads_to_tables);
        self.take_update(machine, MmuUpdate { ptr: place | u64::from(entry % PAGE_SIZE), val });
    }

    /// Has the next entry looked at whole: no table of the guest's lies in Xen's part of the address space.
    pub(super) fn forget_table(&self) {
        self.last_table.set(self.frames.virtual_top.get());
    }

    /// Has an update wait, or be applied at once with all that does.
    pub fn take_update(&self, machine: &impl Machine, update: MmuUpdate) {
        let waits = self.is_in(LazyMode::MMU);
        if !waits {
            self.flush(machine);
        }
        let waiting = self.waiting.get();
        if let Some(free) = self.updates.get(updates_in(waiting)) {
            free.set(update);
            self.waiting.set(waiting + ONE_UPDATE);
        }
        if !waits || waiting >= self.most.get() {
            self.flush(machine);
        }
    }

    /// MachineToPhysical.
    pub fn machine_to_physical(&self, machine: &impl Machine, frame: u32) -> u32 {
        self.frames.own_frame(machine, frame)
    }

    /// PhysicalToMachine.
    pub fn physical_to_machine(&self, machine: &impl Machine, frame: u32) -> u32 {
        self.frames.machine_frame(machine, frame)
    }

    /// SetLinearMapping.
    pub fn set_linear_mapping(&self, slot: u32, start: u32, pages: u32, frame: u32) {
        self.frames.set_slot(slot, start, pages, frame);
    }

    /// InvalPage.
    pub fn invalidate(&self, machine: &impl Machine, address: u32) {
        self.flush(machine);
        let operation = MmuExtOp { cmd: mmuext::INVLPG_LOCAL, arg1: address, arg2: 0 };
        self.expect(machine, number::InvalPage, address, machine.mmuext_op(operation));
    }

    /// FlushTLB. Nothing is global, so both kinds are one.
    pub fn flush_translations(&self, machine: &impl Machine, flags: u32) {
        self.flush(machine);
        if FlushFlags::from_bits_retain(flags).intersects(FlushFlags::all()) {
            let operation = MmuExtOp { cmd: mmuext::TLB_FLUSH_LOCAL, arg1: 0, arg2: 0 };
            self.expect(machine, number::FlushTLB, 0, machine.mmuext_op(operation));
        }
    }

    /// AllocatePage. What was copied from a table has the machine's frames already; what was copied from a page that is none has not.
    pub fn allocate_page(
        &self,
        machine: &impl Machine,
        frame: u32,
        flags: u32,
        clone: (u32, u32, u32),
    ) {
        self.flush(machine);
        if self.frames.is_table(machine, frame) {
            return;
        }
        let flags = PageFlags::from_bits_retain(flags);
        let (source, start, count) = clone;
        let cloned = flags.contains(PageFlags::CLONE) && self.frames.is_table(machine, source);
        let done = if cloned { start..start.saturating_add(count) } else { NONE };
        self.announce(machine, frame, Level::of(flags), done);
    }

    /// Makes a table of a page, and of all that it leads to.
    fn announce(&self, machine: &impl Machine, frame: u32, level: Level, done: Range<u32>) {
        if !self.frames.is_own(frame) {
            return self.refuse(machine, number::AllocatePage, frame, 0);
        }
        // First all of them are marked: they may map each other, and must do so read-only.
        self.frames.set_table(machine, frame, true, level != Level::Table);
        self.pass(machine, frame, level, &done, Pass::Mark);
        self.pass(machine, frame, level, &done, Pass::Translate);
        if level == Level::Pointers {
            let arg1 = self.frames.machine_frame(machine, frame);
            let pin = MmuExtOp { cmd: mmuext::PIN_L3_TABLE, arg1, arg2: 0 };
            self.expect(machine, number::AllocatePage, frame, machine.mmuext_op(pin));
        }
    }

    /// Does something with all entries of a table, and of the new tables that it leads to. The way there is in the state, for a guest's
    /// stack is small.
    #[inline(never)]
    fn pass(&self, machine: &impl Machine, root: u32, top: Level, done: &Range<u32>, pass: Pass) {
        let (mut depth, mut level, mut table, mut index) = (0, top, root, 0);
        loop {
            if index == level.entries() {
                if pass == Pass::Translate {
                    self.map(machine, table, 0, number::AllocatePage);
                }
                let Some(above) = usize::checked_sub(depth, 1) else { return };
                depth = above;
                level = level.above();
                (table, index) = self.path.get(depth).map_or((root, 0), Cell::get);
                continue;
            }
            let next = if depth == 0 && done.contains(&index) {
                None
            } else if pass == Pass::Mark {
                self.mark(machine, table, index, level)
            } else {
                self.translate(machine, table, index, level)
            };
            index += 1;
            if let (Some(next), Some(below)) = (next, level.below()) {
                if let Some(place) = self.path.get(depth) {
                    place.set((table, index));
                }
                depth += 1;
                (level, table, index) = (below, next, 0);
            }
        }
    }

    /// If an entry leads to a new table, marks the table, and the entry.
    fn mark(&self, machine: &impl Machine, table: u32, index: u32, level: Level) -> Option<u32> {
        let below = level.below()?;
        let entry = self.entry(machine, table, index);
        let next = frame_in(entry);
        let is_new = entry & (PRESENT | LARGE) == PRESENT
            && self.frames.is_own(next)
            && !self.frames.is_table(machine, next);
        is_new.then(|| {
            self.frames.set_table(machine, next, true, below != Level::Table);
            self.set(machine, table, index, entry | NEW);
            next
        })
    }

    /// Puts the machine's frame into an entry, and tells where it leads to if that is marked as new.
    fn translate(
        &self,
        machine: &impl Machine,
        table: u32,
        index: u32,
        level: Level,
    ) -> Option<u32> {
        let entry = self.entry(machine, table, index);
        if entry & PRESENT == 0 {
            return None;
        }
        let leads_on = || level != Level::Table;
        self.set(machine, table, index, self.frames.machine_entry(machine, entry & !NEW, leads_on));
        (entry & NEW != 0 && leads_on()).then(|| frame_in(entry))
    }

    /// Maps a frame where all memory is mapped, read-only or with what is added. Whether Xen let it.
    pub(super) fn map(
        &self,
        machine: &impl Machine,
        frame: u32,
        added: u64,
        call: CallNumber,
    ) -> bool {
        let found = u64::from(self.frames.machine_frame(machine, frame)) << PAGE_SHIFT;
        let entry = found | PRESENT | (Entry::ACCESSED | Entry::DIRTY).bits() | added;
        let address = self.frames.address(frame);
        let status = machine.update_va_mapping(address, entry, uvmf::INVLPG | uvmf::ALL);
        self.expect(machine, call, frame, status)
    }

    /// ReleasePage: the guest's memory again, with the guest's frames in it.
    pub fn release_page(&self, machine: &impl Machine, frame: u32, flags: u32) {
        self.flush(machine);
        if !self.frames.is_table(machine, frame) {
            return;
        }
        self.forget_table();
        let level = Level::of(PageFlags::from_bits_retain(flags));
        if level == Level::Pointers {
            let arg1 = self.frames.machine_frame(machine, frame);
            let unpin = MmuExtOp { cmd: mmuext::UNPIN_TABLE, arg1, arg2: 0 };
            if !self.expect(machine, number::ReleasePage, frame, machine.mmuext_op(unpin)) {
                return;
            }
        }
        if !self.map(machine, frame, Entry::WRITABLE.bits(), number::ReleasePage) {
            return;
        }
        self.frames.set_table(machine, frame, false, false);
        for index in 0..level.entries() {
            let entry = self.entry(machine, frame, index);
            // Xen leaves its own entries behind in a directory that was one for the last GiB.
            let is_xens =
                level == Level::Directory && index >= self.frames.first_of_xens_directories();
            if entry & PRESENT != 0 {
                let own = if is_xens { 0 } else { self.frames.own_entry(machine, entry) };
                self.set(machine, frame, index, own);
            }
        }
    }

    /// SetCR3: at once, or it waits. A page directory pointer table that was never announced is announced now.
    pub fn set_cr3(&self, machine: &impl Machine, value: u32) {
        let frame = value >> PAGE_SHIFT;
        if !self.frames.is_table(machine, frame) {
            self.flush(machine);
            self.announce(machine, frame, Level::Pointers, NONE);
        }
        self.cr3.set(value);
        let arg1 = self.frames.machine_frame(machine, frame);
        let operation = MmuExtOp { cmd: mmuext::NEW_BASEPTR, arg1, arg2: 0 };
        let place = calls_in(self.waiting.get());
        if self.is_in(LazyMode::CPU)
            && let (Some(call), Some(origin)) = (self.calls.get(place), self.origins.get(place))
        {
            origin.operation.set(operation);
            let args = machine.mmuext_arguments(&origin.operation);
            call.set(MulticallEntry { op: hypercall::MMUEXT_OP, result: 0, args });
            return self.called(machine, number::SetCR3);
        }
        self.flush(machine);
        if !self.expect(machine, number::SetCR3, value, machine.mmuext_op(operation)) {
            // It would go on in an address space that it believes to have left.
            machine.shut_down(sched::SHUTDOWN_CRASH);
        }
    }

    /// GetCR3, after a flush.
    pub fn cr3(&self, machine: &impl Machine) -> u32 {
        self.flush(machine);
        self.cr3.get()
    }

    fn entry(&self, machine: &impl Machine, table: u32, index: u32) -> u64 {
        let address = self.frames.address(table).wrapping_add(8 * index);
        u64::from(machine.load(address)) | u64::from(machine.load(address.wrapping_add(4))) << 32
    }

    /// Writes an entry of a page that is no table of Xen's.
    fn set(&self, machine: &impl Machine, table: u32, index: u32, entry: u64) {
        let address = self.frames.address(table).wrapping_add(8 * index);
        machine.store(address, entry as u32);
        machine.store(address.wrapping_add(4), (entry >> 32) as u32);
    }
}
