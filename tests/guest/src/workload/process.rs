//! Address spaces of processes: made, filled, copied, protected and taken down as Linux 2.6 does it.

#![expect(unsafe_code, reason = "UNSAFETY: frames of memory are written")]

use super::kernel::Kernel;
use crate::boot::PAGE_OFFSET;
use crate::harness::Demand;
use crate::paging::{ACCESSED, DIRTY, Mode, PAGE, PRESENT, Space, USER, WRITE};
use core::ops::Range;
use spin::Mutex;
use vmi_abi::flags::{EntryFlags, LazyMode, PageFlags};

/// What an entry above the lowest level has: present, writable, the user's, accessed, dirty.
const TABLE_BITS: u64 = PRESENT | WRITE | USER | ACCESSED | DIRTY;

/// What the entry of a page has that its process may write to, and has written to.
pub(super) const PAGE_BITS: u64 = PRESENT | WRITE | USER | ACCESSED | DIRTY;

/// What the entry of a page of a file has that was read.
pub(super) const FILE_BITS: u64 = PRESENT | USER | ACCESSED;

/// Linear pages that follow each other.
#[derive(Clone, Copy)]
pub(super) struct Area {
    pub(super) start: u32,
    pub(super) pages: u32,
}

impl Area {
    /// One of the pages.
    pub(super) const fn page(self, index: u32) -> Self {
        Self { start: self.start + index * PAGE, pages: 1 }
    }

    pub(super) fn addresses(self) -> impl Iterator<Item = u32> {
        (self.start..).step_by(PAGE as usize).take(self.pages as usize)
    }
}

/// The program, where programs are linked.
pub(super) const PROGRAM: Area = Area { start: 0x0804_8000, pages: 512 };

/// Its libraries. With the program they are 1024 pages, in two tables of long entries each, or one of short ones.
pub(super) const LIBRARIES: Area = Area { start: 0xb7d0_0000, pages: 512 };

/// Where the next mapping goes, top down: below the libraries, in a table that is there already.
pub(super) const MAPPING: Area = Area { start: 0xb7c0_0000, pages: 256 };

/// The first linear address of the kernel's.
pub(super) const KERNEL: u32 = PAGE_OFFSET;

/// Frames for the workloads: behind the guest and its record, and before the end of the direct mapping.
const FRAMES: Range<u32> = 0x90_0000..0xf0_0000;

/// Frames, taken in order.
pub(super) struct Memory {
    next: u32,
    /// Tables that are empty again: physical addresses.
    tables: Pile,
    /// Top levels that have the kernel's half.
    roots: Pile,
}

/// Frames that wait to be used again.
struct Pile {
    frames: [u32; 32],
    count: usize,
}

impl Pile {
    const EMPTY: Self = Self { frames: [0; 32], count: 0 };

    fn put(&mut self, frame: u32) {
        self.frames[self.count] = frame;
        self.count += 1;
    }

    fn take(&mut self) -> Option<u32> {
        self.count = self.count.checked_sub(1)?;
        Some(self.frames[self.count])
    }
}

/// The word that a frame begins with.
pub(super) fn mark(frame: u32) -> u32 {
    0x5a00_0000 | (frame / PAGE)
}

/// A word of a frame.
pub(super) fn word(frame: u32, index: u32) -> u32 {
    // SAFETY: in the direct mapping.
    unsafe { ((PAGE_OFFSET + frame + index * 4) as *const u32).read_volatile() }
}

pub(super) fn set_word(frame: u32, index: u32, value: u32) {
    // SAFETY: in the direct mapping, and a frame of the workloads.
    unsafe { ((PAGE_OFFSET + frame + index * 4) as *mut u32).write_volatile(value) };
}

impl Memory {
    pub(super) const fn new() -> Self {
        Self { next: FRAMES.start, tables: Pile::EMPTY, roots: Pile::EMPTY }
    }

    /// The first of some frames that follow each other, each marked.
    pub(super) fn take(&mut self, count: u32) -> u32 {
        let first = self.next;
        self.next += count * PAGE;
        assert!(self.next <= FRAMES.end, "out of frames");
        for frame in (first..self.next).step_by(PAGE as usize) {
            set_word(frame, 0, mark(frame));
            set_word(frame, 1, 0);
        }
        first
    }

    /// An empty table.
    fn table(&mut self) -> u32 {
        self.tables.take().unwrap_or_else(|| self.empty())
    }

    /// A frame of zeroes that no table was in.
    fn empty(&mut self) -> u32 {
        let frame = self.take(1);
        (0..PAGE / 4).for_each(|index| set_word(frame, index, 0));
        frame
    }
}

/// A process: its address space.
#[derive(Clone, Copy)]
pub(super) struct Process {
    pub(super) space: Space,
    pub(super) kernel: Kernel,
}

impl Process {
    /// A space that holds nothing but the kernel's half (`pgd_alloc`).
    pub(super) fn new(kernel: Kernel, swapper: Space, memory: &mut Memory) -> Self {
        let root = memory.roots.take().unwrap_or_else(|| memory.empty());
        let space = Space::at(kernel.mode, root);
        let process = Self { space, kernel };
        // The kernel's entries are copied before anybody is told of the page.
        let shared = match kernel.mode {
            Mode::NonPae => KERNEL >> 22..1024,
            Mode::Pae => KERNEL >> 30..4,
        };
        for index in shared.clone() {
            space.store(space.top_entry(index), swapper.load(swapper.top_entry(index)));
        }
        match kernel.mode {
            Mode::NonPae => {
                let count = shared.end - shared.start;
                kernel.announce_clone(root, swapper.cr3(), shared.start, count);
            }
            Mode::Pae => {
                for index in 0..shared.start {
                    let directory = memory.table();
                    kernel.announce(directory, PageFlags::PD);
                    let value = u64::from(directory) | PRESENT;
                    kernel.set(space.top_entry(index), value, EntryFlags::PDP.bits());
                }
            }
        }
        process
    }

    /// The call flags of the entry that maps a page; the space may be the current one.
    pub(super) fn flags(self, linear: u32) -> u32 {
        let current = if self.kernel.is_current(self.space) {
            EntryFlags::CURRENT_AS.bits() | linear
        } else {
            0
        };
        EntryFlags::PT.bits() | current
    }

    /// Makes the table for a page where there is none (`__pte_alloc`).
    pub(super) fn provide_table(self, linear: u32, memory: &mut Memory) {
        let entry = self.space.directory_entry(linear);
        if self.space.load(entry) & PRESENT != 0 {
            return;
        }
        let table = memory.table();
        self.kernel.announce(table, PageFlags::PT);
        self.kernel.set(entry, u64::from(table) | TABLE_BITS, EntryFlags::PD.bits());
    }

    /// The parts of an area that one table maps each.
    fn parts(self, area: Area) -> impl Iterator<Item = Area> {
        let span = self.kernel.mode.table_span();
        let end = area.start + area.pages * PAGE;
        let mut start = area.start;
        core::iter::from_fn(move || {
            let stop = ((start | (span - 1)) + 1).min(end);
            let part = Area { start, pages: (stop - start) / PAGE };
            start = stop;
            (part.pages != 0).then_some(part)
        })
    }

    /// Maps an area to frames that follow each other, present and written to (`remap_pte_range`; the entries are young and
    /// dirty, as those of memory that is populated).
    pub(super) fn map(self, area: Area, frame: u32, memory: &mut Memory) {
        for part in self.parts(area) {
            self.provide_table(part.start, memory);
            self.kernel.lazily(LazyMode::MMU, || {
                for linear in part.addresses() {
                    let frame = frame + (linear - area.start);
                    let value = u64::from(frame) | PAGE_BITS;
                    self.kernel.set(self.space.entry(linear), value, self.flags(linear));
                }
            });
        }
    }

    /// Takes an area away (`zap_pte_range`, `tlb_finish_mmu`): the tables stay.
    pub(super) fn unmap(self, area: Area) {
        for part in self.parts(area) {
            self.kernel.lazily(LazyMode::MMU, || {
                for linear in part.addresses() {
                    self.kernel.get_and_clear(self.space.entry(linear), self.flags(linear));
                }
            });
        }
        self.kernel.flush();
    }

    /// Changes what the process may do with an area (`change_pte_range`, `flush_tlb_range`).
    pub(super) fn protect(self, area: Area, writable: bool) {
        for part in self.parts(area) {
            self.kernel.lazily(LazyMode::MMU, || {
                for linear in part.addresses() {
                    let (entry, flags) = (self.space.entry(linear), self.flags(linear));
                    let old = self.kernel.get_and_clear(entry, flags);
                    let new = if writable { old | WRITE } else { old & !WRITE };
                    self.kernel.set(entry, new, flags);
                }
            });
        }
        self.kernel.flush();
    }

    /// A copy that shares the pages of some areas, read-only in both (`dup_mmap`, `copy_pte_range`).
    pub(super) fn fork(self, areas: &[Area], swapper: Space, memory: &mut Memory) -> Self {
        let child = Self::new(self.kernel, swapper, memory);
        for part in areas.iter().flat_map(|area| self.parts(*area)) {
            child.provide_table(part.start, memory);
            self.kernel.lazily(LazyMode::MMU, || {
                for linear in part.addresses() {
                    let entry = self.space.entry(linear);
                    if self.space.load(entry) & PRESENT == 0 {
                        continue;
                    }
                    self.kernel.write_protect(entry, self.flags(linear));
                    // The child has not used the page yet.
                    let value = self.space.load(entry) & !(WRITE | ACCESSED);
                    self.kernel.set(child.space.entry(linear), value, child.flags(linear));
                }
            });
        }
        self.kernel.flush();
        child
    }

    /// Takes the space down; another one is current (`exit_mmap`, `pgd_free`).
    pub(super) fn exit(self, memory: &mut Memory) {
        self.empty(&[MAPPING, PROGRAM, LIBRARIES], memory);
        self.kernel.flush();
        self.free(memory);
    }

    /// Takes away all areas that the space has, with their tables (`exit_mmap`).
    pub(super) fn empty(self, areas: &[Area], memory: &mut Memory) {
        let kernel = self.kernel;
        let parts = || areas.iter().flat_map(|area| self.parts(*area));
        let is_there =
            |part: &Area| self.space.load(self.space.directory_entry(part.start)) & PRESENT != 0;
        for part in parts().filter(is_there) {
            kernel.lazily(LazyMode::MMU, || {
                for linear in part.addresses() {
                    let entry = self.space.entry(linear);
                    if self.space.load(entry) != 0 {
                        kernel.drop_entry(entry);
                    }
                }
            });
        }
        for part in parts() {
            let entry = self.space.directory_entry(part.start);
            let table = self.space.load(entry) as u32 & !(PAGE - 1);
            if table != 0 {
                kernel.set(entry, 0, EntryFlags::PD.bits());
                kernel.release(table, PageFlags::PT);
                memory.tables.put(table);
            }
        }
    }

    /// Frees what is left of a space without areas; another one is current (`pgd_free`).
    pub(super) fn free(self, memory: &mut Memory) {
        let kernel = self.kernel;
        if kernel.mode == Mode::Pae {
            for index in 0..KERNEL >> 30 {
                let entry = self.space.top_entry(index);
                let directory = self.space.load(entry) as u32 & !(PAGE - 1);
                kernel.set(entry, 0, EntryFlags::PDP.bits());
                kernel.release(directory, PageFlags::PD);
                memory.tables.put(directory);
            }
        }
        // Of the top level Linux tells nothing, here nor there.
        memory.roots.put(self.space.cr3());
    }

    /// Runs something during which write faults on shared pages are served; how many there were.
    pub(super) fn with_faults<T>(
        self,
        sharing: Sharing,
        copies: Range<u32>,
        work: impl FnOnce(Demand) -> T,
    ) -> (T, u32) {
        *SERVED.lock() = Some(Served { process: self, sharing, copies, faults: 0 });
        let result = work((0..KERNEL, serve));
        (result, SERVED.lock().take().map_or(0, |served| served.faults))
    }
}

/// Who else has the pages that a process writes to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// The other process of a fork: the page is copied.
    Shared,
    /// Nobody any more: it becomes writable again.
    Alone,
}

/// What a fault is served from.
struct Served {
    process: Process,
    sharing: Sharing,
    /// Frames for copies.
    copies: Range<u32>,
    faults: u32,
}

/// More faults than a workload has pages.
const MOST_FAULTS: u32 = 2048;

static SERVED: Mutex<Option<Served>> = Mutex::new(None);

/// A write to a page that is read-only because it is, or was, shared (`do_wp_page`).
fn serve(address: u32) {
    let mut served = SERVED.lock();
    let Some(Served { process, sharing, copies, faults }) = served.as_mut() else { return };
    let Process { space, kernel } = *process;
    // A handler of page faults asks for the address, and may find nothing to do.
    Kernel::fault_address();
    let linear = address & !(PAGE - 1);
    let (entry, flags) = (space.entry(linear), process.flags(linear));
    if space.load(entry) & WRITE != 0 {
        return;
    }
    *faults += 1;
    assert!(*faults < MOST_FAULTS, "write faults that are served come again: {address:#x}");
    match sharing {
        Sharing::Alone => {
            kernel.relax(entry, space.load(entry) | WRITE | ACCESSED | DIRTY, flags);
            kernel.flush_page(linear);
        }
        Sharing::Shared => {
            let old = space.load(entry) as u32 & !(PAGE - 1);
            let copy = copies.start;
            assert!(copies.contains(&copy), "a page is copied again and again: {address:#x}");
            copies.start += PAGE;
            (0..PAGE / 4).for_each(|index| set_word(copy, index, word(old, index)));
            kernel.get_and_clear(entry, flags);
            kernel.flush_page(linear);
            kernel.set(entry, u64::from(copy) | PAGE_BITS, flags);
        }
    }
}
