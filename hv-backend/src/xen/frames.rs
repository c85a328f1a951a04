//! The guest's frames and the machine's.

use super::interface::{Entry, PAGE_SHIFT, Placement, hypercall, memory};
use super::machine::Machine;
use core::cell::Cell;

/// Slots of SetLinearMapping.
const SLOTS: usize = 4;

/// A stretch of linear addresses that is mapped onto as many frames in a row.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    start: u32,
    pages: u32,
    frame: u32,
}

/// Where Xen's and the loader's lists are, and how addresses are translated.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Frames {
    /// The linear address of the guest's physical memory.
    pub(super) linear: Cell<u32>,
    /// How many frames the guest has.
    pub(super) pages: Cell<u32>,
    /// The linear addresses of the loader's lists.
    pub(super) p2m: Cell<u32>,
    pub(super) tables: Cell<u32>,
    /// That of Xen's page.
    pub(super) shared_info: Cell<u32>,
    /// That of this state.
    pub(super) own: Cell<u32>,
    /// Where Xen's part of the linear address space begins, and in it its list of the guest's frames.
    pub(super) virtual_top: Cell<u32>,
    /// How many frames that list has.
    machine_frames: Cell<u32>,
    slots: [Cell<Slot>; SLOTS],
}

impl Frames {
    pub(super) fn start(
        &self,
        machine: &impl Machine,
        placement: &Placement,
        linear: u32,
        own: u32,
    ) {
        let at = |physical: u32| linear.wrapping_add(physical);
        self.linear.set(linear);
        self.pages.set(placement.pages);
        self.p2m.set(at(placement.p2m));
        self.tables.set(at(placement.tables));
        self.shared_info.set(at(placement.shared_info));
        self.own.set(own);
        self.virtual_top.set(placement.virtual_top);
        let last = machine.hypercall(hypercall::MEMORY_OP, [memory::MAXIMUM_RAM_PAGE, 0, 0, 0]);
        self.machine_frames.set(last.cast_unsigned().wrapping_add(1).min(MACHPHYS_ENTRIES));
    }

    /// The first entry of a page directory for the last GiB that leads to what is Xen's.
    pub(super) fn first_of_xens_directories(&self) -> u32 {
        self.virtual_top.get() >> 21 & 511
    }

    /// The linear address of a frame.
    #[inline(always)]
    pub(super) fn address(&self, frame: u32) -> u32 {
        self.linear.get().wrapping_add(frame << PAGE_SHIFT)
    }

    /// Whether a frame is the guest's memory.
    #[inline(always)]
    pub(super) fn is_own(&self, frame: u32) -> bool {
        frame < self.pages.get()
    }

    /// PhysicalToMachine. What is not the guest's memory is the machine's: devices. A frame that the domain does not have leads to
    /// none, which Xen refuses.
    #[inline(always)]
    pub(super) fn machine_frame(&self, machine: &impl Machine, frame: u32) -> u32 {
        if self.is_own(frame) {
            machine.load(self.p2m.get().wrapping_add(frame * 4))
        } else {
            frame
        }
    }

    /// MachineToPhysical. Xen's list is believed only where the loader's says the same: it also has frames of others.
    pub(super) fn own_frame(&self, machine: &impl Machine, frame: u32) -> u32 {
        if frame >= self.machine_frames.get() {
            return frame;
        }
        let own = machine.load(self.virtual_top.get().wrapping_add(frame * 4));
        if self.is_own(own) && self.machine_frame(machine, own) == frame { own } else { frame }
    }

    /// Whether a frame has to stay read-only.
    #[inline(always)]
    pub(super) fn is_table(&self, machine: &impl Machine, frame: u32) -> bool {
        self.is_own(frame) && machine.load(self.word_of(frame)) >> (frame % 32) & 1 != 0
    }

    /// Whether a frame is a table that leads to tables.
    pub(super) fn is_directory(&self, machine: &impl Machine, frame: u32) -> bool {
        self.is_own(frame) && machine.load(self.directory_word(frame)) >> (frame % 32) & 1 != 0
    }

    /// Notes that a frame is a table, and whether it leads to tables, or that it is none.
    pub(super) fn set_table(
        &self,
        machine: &impl Machine,
        frame: u32,
        is_table: bool,
        is_directory: bool,
    ) {
        let bit = 1 << (frame % 32);
        let set = |word, on| {
            let old = machine.load(word);
            machine.store(word, if on { old | bit } else { old & !bit });
        };
        if self.is_own(frame) {
            set(self.word_of(frame), is_table);
            set(self.directory_word(frame), is_directory);
        }
    }

    #[inline(always)]
    fn word_of(&self, frame: u32) -> u32 {
        self.tables.get().wrapping_add(frame / 32 * 4)
    }

    fn directory_word(&self, frame: u32) -> u32 {
        self.word_of(frame).wrapping_add(self.pages.get().div_ceil(32) * 4)
    }

    /// SetLinearMapping. An unknown slot changes nothing.
    pub(super) fn set_slot(&self, slot: u32, start: u32, pages: u32, frame: u32) {
        if let Some(place) = self.slots.get(slot as usize) {
            place.set(Slot { start, pages, frame });
        }
    }

    /// The guest's frame of a linear address: of its memory where it is mapped whole, or of one of the slots.
    #[inline(always)]
    pub(super) fn frame_of(&self, address: u32) -> Option<u32> {
        let frame = address.wrapping_sub(self.linear.get()) >> PAGE_SHIFT;
        if self.is_own(frame) { Some(frame) } else { self.frame_in_slots(address) }
    }

    #[cold]
    #[inline(never)]
    fn frame_in_slots(&self, address: u32) -> Option<u32> {
        self.slots.iter().map(Cell::get).find_map(|slot| {
            let page = address.wrapping_sub(slot.start) >> PAGE_SHIFT;
            (page < slot.pages).then(|| slot.frame.wrapping_add(page))
        })
    }

    /// An entry as Xen takes it: the machine's frame, and not global. One that maps a table does so read-only; `leads_to_tables` says
    /// whether it is in a table whose entries do not map, but lead on.
    #[inline(always)]
    pub(super) fn machine_entry(
        &self,
        machine: &impl Machine,
        entry: u64,
        leads_to_tables: impl FnOnce() -> bool,
    ) -> u64 {
        if entry & Entry::PRESENT.bits() == 0 {
            return entry;
        }
        let frame = frame_in(entry);
        let mut entry = entry & !Entry::GLOBAL.bits();
        if self.is_own(frame) {
            if self.is_table(machine, frame) && !leads_to_tables() {
                entry &= !Entry::WRITABLE.bits();
            }
            let found = u64::from(self.machine_frame(machine, frame)) << PAGE_SHIFT;
            entry = entry & !Entry::FRAME.bits() | found;
        }
        entry
    }

    /// The entry that the guest would have written for one that Xen has.
    pub(super) fn own_entry(&self, machine: &impl Machine, entry: u64) -> u64 {
        if entry & Entry::PRESENT.bits() == 0 {
            return entry;
        }
        let own = u64::from(self.own_frame(machine, frame_in(entry))) << PAGE_SHIFT;
        entry & !Entry::FRAME.bits() | own
    }
}

/// Entries that Xen's list has room for, in 32-bit guests: 16 MiB of words.
const MACHPHYS_ENTRIES: u32 = 0x0100_0000 / 4;

/// The frame in an entry.
#[inline(always)]
pub(super) const fn frame_in(entry: u64) -> u32 {
    ((entry & Entry::FRAME.bits()) >> PAGE_SHIFT) as u32
}
