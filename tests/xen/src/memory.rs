//! The guest's memory: the domain's frames from 0 on, as far as Xen has mapped them, at C0000000h.

#![expect(unsafe_code, reason = "UNSAFETY: what lies in memory is known by its address alone")]

use crate::hypercall;
use core::ops::Range;
use vmi_hv_backend::xen::interface::{Entry, PAGE_SHIFT, PAGE_SIZE, Placement, StartInfo};

/// Where physical address 0 is mapped.
pub(crate) const PAGE_OFFSET: u32 = 0xc000_0000;

/// Frames of a PC's devices and its firmware, which the guest sees where they are.
const SCREEN: Range<u32> = 0xa0..0xc0;
const FIRMWARE: Range<u32> = 0xe0..0x100;

/// Frames where a PC has its option ROMs.
const ROMS: Range<u32> = 0xc0..0xe0;

/// Entries of a page table.
const ENTRIES: u32 = PAGE_SIZE / 8;

/// The most frames of a domain.
const MOST: usize = 1 << 18;

/// Two bits for each frame, in one list after the other: what is to stay read-only; what is a table of a higher level than the lowest.
static mut TABLES: [u32; MOST / 32 * 2] = [0; MOST / 32 * 2];

/// Levels of page tables.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    /// The lowest: they lead to pages.
    Pages,
    /// Those above, which lead to tables.
    Tables,
}

/// A page whose frame becomes Xen's.
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE as usize]);

static mut SHARED_INFO: Page = Page([0; PAGE_SIZE as usize]);

unsafe extern "C" {
    static image_start: u8;
}

/// What may be read, and what may be written to as well.
const READ: Entry = Entry::PRESENT.union(Entry::USER);
const WRITE: Entry = READ.union(Entry::WRITABLE);

/// The guest-physical address of something of the loader's.
pub(crate) fn physical<T>(object: *const T) -> u32 {
    object as u32 - PAGE_OFFSET
}

/// The tables that Xen has made.
struct InitialTables {
    /// The linear address of the four entries at the top.
    root: u32,
    /// Xen's list of the frames of machine frames.
    frames: *const u32,
}

impl InitialTables {
    /// The frame of the table that an entry leads to.
    fn frame(&self, entry: u64) -> u32 {
        let frame = ((entry & Entry::FRAME.bits()) >> PAGE_SHIFT) as usize;
        // SAFETY: the list has every machine frame of the domain.
        unsafe { self.frames.add(frame).read() }
    }

    /// An entry of the table at a linear address.
    fn entry(table: u32, index: u32) -> u64 {
        // SAFETY: a table that Xen has mapped, read-only.
        unsafe { (table as *const u64).add(index as usize).read() }
    }

    /// The frames of the top level and the directories below.
    fn higher(&self) -> impl Iterator<Item = u32> {
        let root = physical(self.root as *const u8) >> PAGE_SHIFT;
        let there =
            (0..4).map(|index| Self::entry(self.root, index)).filter(|entry| is_present(*entry));
        core::iter::once(root).chain(there.map(|entry| self.frame(entry)))
    }

    /// Pages that are mapped from [`PAGE_OFFSET`] on. Xen leaves no table there half empty.
    fn mapped(&self) -> u32 {
        let directory = self.frame(Self::entry(self.root, PAGE_OFFSET >> 30));
        let directory = PAGE_OFFSET + (directory << PAGE_SHIFT);
        let is_there = |index: &u32| is_present(Self::entry(directory, *index));
        (0..ENTRIES).take_while(is_there).count() as u32 * ENTRIES
    }
}

const fn is_present(entry: u64) -> bool {
    entry & Entry::PRESENT.bits() != 0
}

/// The guest's memory.
pub(crate) struct Memory {
    pages: u32,
    /// The list of machine frames.
    frames: *mut u32,
    /// Where Xen's own page tables begin, and how many they are.
    tables: Range<u32>,
    /// Pages that are mapped, from 0 on.
    mapped: u32,
}

impl Memory {
    /// What Xen gave the domain; the frames of devices and firmware and what Xen shares are put in their places.
    pub(crate) fn of(start: &StartInfo) -> Self {
        let first = physical(start.pt_base as *const u8) >> PAGE_SHIFT;
        let tables = first..first + start.nr_pt_frames;
        let pages = start.nr_pages.min(MOST as u32);
        let initial =
            InitialTables { root: start.pt_base, frames: hypercall::virtual_top() as *const u32 };
        let mapped = initial.mapped().min(pages);
        let mut memory = Self { pages, frames: start.mfn_list as *mut u32, tables, mapped };
        for frame in memory.tables.clone() {
            memory.mark(frame, Level::Pages);
        }
        for frame in initial.higher() {
            memory.mark(frame, Level::Tables);
        }
        for frame in SCREEN {
            memory.replace(frame, frame, WRITE);
        }
        for frame in FIRMWARE {
            memory.replace(frame, frame, READ);
        }
        memory.replace(
            physical(&raw const SHARED_INFO) >> PAGE_SHIFT,
            start.shared_info >> PAGE_SHIFT,
            WRITE,
        );
        memory
    }

    /// Sets a frame's bit in the list for a level.
    fn mark(&mut self, frame: u32, level: Level) {
        assert!(frame < self.pages);
        let list = if level == Level::Tables { self.pages.div_ceil(32) } else { 0 };
        let words = (&raw mut TABLES).cast::<u32>();
        // SAFETY: inside the lists; the loader is alone.
        unsafe { *words.add((list + frame / 32) as usize) |= 1 << (frame % 32) };
    }

    /// Pages of the domain.
    pub(crate) const fn pages(&self) -> u32 {
        self.pages
    }

    /// Pages that are mapped.
    pub(crate) const fn mapped(&self) -> u32 {
        self.mapped
    }

    /// The machine frame of a frame.
    fn machine_frame(&self, frame: u32) -> u32 {
        assert!(frame < self.pages);
        // SAFETY: the list has a word for each page.
        unsafe { self.frames.add(frame as usize).read() }
    }

    /// Maps another machine frame.
    fn map(&self, frame: u32, machine: u32, bits: Entry) {
        assert!(frame < self.mapped && !self.tables.contains(&frame));
        // SAFETY: callers name frames that hold nothing of the loader's code, stack or data.
        unsafe { hypercall::map(PAGE_OFFSET + (frame << PAGE_SHIFT), machine, bits) };
    }

    /// Gives the guest another machine frame in the place of a frame.
    fn replace(&mut self, frame: u32, machine: u32, bits: Entry) {
        self.map(frame, machine, bits);
        // SAFETY: as in `machine_frame`.
        unsafe { self.frames.add(frame as usize).write(machine) };
    }

    /// Lets `look` look at the machine's option ROMs, in the place of the guest's.
    pub(crate) fn with_machine_roms<R>(&mut self, look: impl FnOnce(&[u8]) -> R) -> R {
        ROMS.for_each(|frame| self.map(frame, frame, READ));
        let result = look(self.bytes(ROMS.start << PAGE_SHIFT..ROMS.end << PAGE_SHIFT));
        ROMS.for_each(|frame| self.map(frame, self.machine_frame(frame), WRITE));
        result
    }

    /// Makes a range read-only; it ends at pages' borders.
    pub(crate) fn protect(&mut self, range: Range<u32>) {
        for frame in range.start >> PAGE_SHIFT..range.end >> PAGE_SHIFT {
            self.map(frame, self.machine_frame(frame), READ);
        }
    }

    /// What is the guest's from 1 MiB on.
    pub(crate) fn free(&self) -> Range<u32> {
        0x10_0000..physical(&raw const image_start)
    }

    /// What the loader and Xen have in memory.
    pub(crate) fn own(&self) -> Range<u32> {
        physical(&raw const image_start)..self.mapped << PAGE_SHIFT
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self, range: Range<u32>) -> &[u8] {
        assert!(range.end <= self.mapped << PAGE_SHIFT);
        // SAFETY: it is mapped, and nobody writes there while the slice is used.
        unsafe {
            core::slice::from_raw_parts((PAGE_OFFSET + range.start) as *const u8, range.len())
        }
    }

    /// Stores bytes where nothing of the loader's lies.
    pub(crate) fn store(&mut self, address: u32, bytes: &[u8]) {
        assert!(address as usize + bytes.len() <= self.free().end as usize);
        let to = (PAGE_OFFSET + address) as *mut u8;
        // SAFETY: below the loader, mapped; a source lies elsewhere, or is the module, which lies behind the loader.
        unsafe { core::ptr::copy(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Stores what the ROM has to know of Xen.
    pub(crate) fn store_placement(&mut self, address: u32, placement: Placement) {
        let bytes = &raw const placement;
        // SAFETY: its words, one after the other.
        let bytes = unsafe { core::slice::from_raw_parts(bytes.cast(), size_of::<Placement>()) };
        self.store(address, bytes);
    }

    /// Fills a range with one byte.
    pub(crate) fn fill(&mut self, range: Range<u32>, byte: u8) {
        assert!(range.end <= self.free().end);
        let to = (PAGE_OFFSET + range.start) as *mut u8;
        // SAFETY: as above.
        unsafe { core::ptr::write_bytes(to, byte, range.len()) };
    }

    /// Guest-physical addresses for the ROM: what Xen shares, the list of machine frames, the bits of page tables.
    pub(crate) fn lists(&self) -> [u32; 3] {
        [physical(&raw const SHARED_INFO), physical(self.frames), physical(&raw const TABLES)]
    }
}
