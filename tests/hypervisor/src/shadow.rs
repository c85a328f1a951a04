//! Shadow page tables: what the processor walks instead of the guest's tables.
//!
//! They are PAE tables with NX in use, whatever the guest has. A guest's page table has one shadow, or two where it has 1024
//! entries; such a page directory has four. A large page of the guest gets a shadow table without a table of the guest's behind
//! it, which maps 2 MiB. Shadows are kept when CR3 is loaded, so that several address spaces stay; only the
//! page-directory-pointer table is made anew.
//!
//! An entry is filled in when the guest needs it: [`Shadow::fault`]. There the guest's accessed and dirty bits are set as its
//! processor would have, so an entry stands for one that was accessed, and allows stores only where the guest's is dirty.
//! Those that are accessed already are filled in with their table, and tables that are announced with the entry that leads to them:
//! when that is told, or when their directory is made. Directories that are announced are made when CR3 is loaded. What is
//! announced costs nothing to keep; a table that is watched is made when it is used, since each store to it costs.
//!
//! A guest's table that has a shadow is watched, unless it is announced: no shadow entry allows a store to it. A store is
//! then emulated by the caller, who tells [`Shadow::written`]. A table that no other one leads to any more is not watched
//! at its next store, but loses its shadow: it may be a table no longer.
//!
//! A shadow is complete while the guest's own tables would raise each page fault that it raises, with the same error code, and no other:
//! [`Shadow::complete`]. What stands in the way is counted with each entry that is made. So it costs little to know that nothing does.
//!
//! The processor runs with CR0.PG and WP, CR4.PAE and EFER.NXE set, and with the guest's CR4.PGE. Where nobody looks at page faults
//! because the shadow is complete, NXE is the guest's.

#[cfg(test)]
pub(crate) mod machine;
#[cfg(test)]
pub(crate) mod tests;

use crate::memory::{FRAME, Memory, Place};
use crate::walk::{
    ACCESSED, ATTRIBUTE, Access, CACHE_DISABLE, DIRTY, GLOBAL, LARGE_ATTRIBUTE, Level, Mode,
    NO_EXECUTE, PRESENT, Registers, Translation, USER, WRITABLE, WRITE_THROUGH, translate,
};
use core::iter::successors;
use core::ops::Range;
use vmi_hv_backend::reference::interface::{DIRECTORIES, MAP_WORDS};

/// Entries of a shadow table.
const ENTRIES: usize = 512;

/// The frame's address in an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bit 9 of a shadow entry, which the processor ignores: it allows stores to memory, and is counted in [`Frame::writers`].
const TRACKED: u64 = 1 << 9;

/// Bit 10 of a shadow entry, which the processor ignores too, also where nothing is present: with the guest's entry, as it was read, some
/// access would end otherwise. Counted in [`Slot::missing`].
const MISSING: u64 = 1 << 10;

/// A reason to be [`MISSING`], unless a test leaves it out.
macro_rules! missing {
    ($reason:ident) => {{
        #[cfg(test)]
        let missing = if tests::quiet::Reason::$reason.is_left_out() { 0 } else { MISSING };
        #[cfg(not(test))]
        let missing = MISSING;
        missing
    }};
}

/// Bits of the map that [`Shadow::map`] is.
const MAP_BITS: usize = MAP_WORDS * 32;

/// Bits of an entry that say how memory is cached, and that it is global: the same in the shadow.
const ATTRIBUTES: u64 = WRITE_THROUGH | CACHE_DISABLE | ATTRIBUTE | GLOBAL;

/// The slot of the page-directory-pointer table: the pool's first page.
const ROOT: usize = 0;

/// The most tables that one page fault needs: a directory and a table.
const LONGEST_PATH: usize = 2;

/// A page of the pool, which the processor walks.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(4096))]
pub struct Page(pub [u64; ENTRIES]);

impl Page {
    /// All entries clear.
    pub const EMPTY: Self = Self([0; ENTRIES]);
}

/// What a page of the pool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Role {
    /// The page-directory-pointer table, or nothing.
    Other = 0,
    /// The shadow of a guest's page directory.
    Directory,
    /// The shadow of a guest's page table.
    Table,
    /// A directory of linear addresses that are physical ones.
    Identity,
    /// A table of 512 frames in their order.
    Direct,
}

/// What a shadow is made from. Two that are equal would have the same content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    role: Role,
    /// Of two-level tables: which half of a table, which quarter of a directory. Identity: which GiB. Direct: attributes.
    part: u16,
    mode: Mode,
    /// The guest's table, or the first frame of a direct table.
    frame: u64,
}

impl Key {
    /// Where the mode makes no difference.
    const NO_MODE: Mode =
        Mode { pae: false, large_pages: false, no_execute: false, write_protect: false, width: 0 };
    const EMPTY: Self = Self { role: Role::Other, part: 0, mode: Self::NO_MODE, frame: 0 };

    const fn direct(frame: u64, attributes: u64) -> Self {
        Self { role: Role::Direct, part: attributes as u16, mode: Self::NO_MODE, frame }
    }

    const fn identity(quarter: usize) -> Self {
        Self { role: Role::Identity, part: quarter as u16, mode: Self::NO_MODE, frame: 0 }
    }

    /// The level of the guest's table, if it is the shadow of one.
    const fn level(&self) -> Option<Level> {
        match self.role {
            Role::Directory => Some(Level::Directory),
            Role::Table => Some(Level::Table),
            Role::Other | Role::Identity | Role::Direct => None,
        }
    }

    /// Whether its entries map pages.
    const fn maps_pages(&self) -> bool {
        matches!(self.role, Role::Table | Role::Direct)
    }

    /// The index of the guest's entry that a shadow entry is made from.
    const fn guest_index(&self, index: usize) -> usize {
        match self.role {
            _ if self.mode.pae => index,
            Role::Directory => self.part as usize * (ENTRIES / 2) + index / 2,
            _ => self.part as usize * ENTRIES + index,
        }
    }

    /// Of a directory: what the table is made from that a shadow entry leads to, by the guest's entry.
    fn below(&self, index: usize, entry: u64) -> Self {
        let mode = self.mode;
        let frame = mode.frame(Level::Directory, entry);
        // Two neighbours share an entry of a two-level directory.
        let half = if mode.pae { 0 } else { index % 2 };
        if mode.is_large(Level::Directory, entry) {
            let attributes = entry & ATTRIBUTES & !ATTRIBUTE
                | if entry & LARGE_ATTRIBUTE != 0 { ATTRIBUTE } else { 0 };
            Self::direct(frame + (half * ENTRIES) as u64, attributes)
        } else {
            Self { role: Role::Table, part: half as u16, mode, frame }
        }
    }

    /// The guest-physical address of that entry.
    const fn guest_entry(&self, index: usize) -> u64 {
        self.frame * FRAME + (self.guest_index(index) * self.mode.entry_size()) as u64
    }

    /// The shadow entries that are made from the guest's entry with this index; none where they are in another part.
    const fn indices(&self, guest_index: usize) -> Range<usize> {
        let (per_part, copies) = match self.role {
            Role::Directory if !self.mode.pae => (ENTRIES / 2, 2),
            _ => (ENTRIES, 1),
        };
        let first = guest_index % per_part * copies;
        if guest_index / per_part == self.part as usize { first..first + copies } else { 0..0 }
    }
}

/// What [`Shadow`] knows of a page of the pool.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    key: Key,
    /// The next slot of the same list, 0 at its end.
    next: u32,
    /// How many shadow entries lead to it.
    parents: u32,
    /// The place of one of them, perhaps.
    parent: u32,
    /// How many of its entries are [`MISSING`].
    missing: u32,
    /// Of a directory: the value of [`Shadow::epoch`] at which nothing was missing there and below; 0 once it changed.
    complete_at: u64,
    /// Entries that the guest had not accessed were once filled in ahead.
    ahead: bool,
}

impl Slot {
    /// Nothing is known. All bytes are zero.
    pub const EMPTY: Self = Self {
        key: Key::EMPTY,
        next: 0,
        parents: 0,
        parent: 0,
        missing: 0,
        complete_at: 0,
        ahead: false,
    };
}

/// What [`Shadow`] knows of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// The first slot of a list: shadows of this guest-physical frame, and of others whose number has the same remainder.
    head: u32,
    /// How many shadows the guest-physical frame has as a table.
    tables: u32,
    /// How many shadow entries allow stores to the machine's frame.
    writers: u32,
    /// The place of one of them, perhaps.
    writer: u32,
    /// The guest said that it tells of changes of the guest-physical frame.
    announced: bool,
    /// It was a table before there was anybody to tell: [`Shadow::adopt`].
    adopted: bool,
}

impl Frame {
    /// Nothing is known. All bytes are zero.
    pub const EMPTY: Self =
        Self { head: 0, tables: 0, writers: 0, writer: 0, announced: false, adopted: false };

    const fn is_told(&self) -> bool {
        self.announced || self.adopted
    }
}

/// What [`Shadow`] works with, all of it the hypervisor's own.
#[derive(Debug)]
pub struct Storage<'a> {
    /// The shadow tables: 3 at least.
    pub pool: &'a mut [Page],
    /// The machine-physical address of `pool`, a multiple of 4096; it ends below 4 GiB.
    pub base: u64,
    /// At least one for each page of the pool.
    pub slots: &'a mut [Slot],
    /// One for each frame number of [`Place::Memory`], as the guest counts frames and as the machine does. Of memory beyond
    /// it, tables are never watched. No two frames of the guest are the same memory.
    pub frames: &'a mut [Frame],
    /// The machine-physical address of a page of ones, which is mapped where there is nothing.
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
    pool: &'a mut [Page],
    base: u64,
    slots: &'a mut [Slot],
    frames: &'a mut [Frame],
    ones: u64,
    /// The first slot of the list of free ones.
    free: u32,
    free_count: usize,
    flush: bool,
    /// Something came or went that [`Shadow::complete`] has not looked at, and what it found before.
    changed: bool,
    is_complete: bool,
    /// One more whenever a table that maps pages begins to miss something.
    epoch: u64,
    /// For each bit of the map how many shadows set it.
    marks: [u16; MAP_BITS],
    /// Guest page tables, or parts of one, that got a shadow.
    pub shadowed: u64,
    /// How often the pool was full, and everything began anew.
    pub recycled: u64,
}

impl<'a> Shadow<'a> {
    /// Without any table; [`Shadow::load`] comes next.
    ///
    /// # Panics
    ///
    /// The storage is too small, or not where [`Storage`] wants it.
    #[must_use]
    pub fn new(storage: Storage<'a>) -> Self {
        let Storage { pool, base, slots, frames, ones } = storage;
        let end = base + pool.len() as u64 * FRAME;
        assert!(pool.len() > LONGEST_PATH, "a pool of 3 pages or more");
        assert!(base.is_multiple_of(FRAME) && end <= 1 << 32, "a pool of whole frames below 4 GiB");
        assert!(slots.len() >= pool.len() && !frames.is_empty(), "slots and frames");
        frames.fill(Frame::EMPTY);
        let mut shadow = Self {
            pool,
            base,
            slots,
            frames,
            ones,
            free: 0,
            free_count: 0,
            flush: true,
            changed: true,
            is_complete: false,
            epoch: 1,
            marks: [0; MAP_BITS],
            shadowed: 0,
            recycled: 0,
        };
        shadow.drop_all();
        shadow
    }

    /// Machine-physical address of the page-directory-pointer table that the processor walks: always the same.
    #[must_use]
    pub const fn root(&self) -> u64 {
        self.base
    }

    /// The guest loaded CR3, or changed a bit of CR0, CR4 or EFER that decides on translation, or on global pages.
    pub fn load(&mut self, registers: &Registers, memory: &impl Memory) {
        for quarter in 0..4 {
            self.load_quarter(registers, memory, quarter);
        }
        self.flush = true;
        self.changed = true;
    }

    /// Resolves a page fault of the guest's processor: the linear address from CR2 and the error code.
    ///
    /// `registers` are those of the last [`Shadow::load`], here and wherever they are asked for.
    #[must_use]
    pub fn fault(
        &mut self,
        registers: &Registers,
        memory: &impl Memory,
        linear: u32,
        error: u32,
    ) -> Resolution {
        let access = Access::of_error(error);
        let translation = match translate(registers, memory, linear, access) {
            Ok(translation) => translation,
            Err(fault) => return Resolution::Guest { error: fault.error },
        };
        let physical = translation.physical;
        let frame = physical / FRAME;
        if access.write {
            match memory.place(frame) {
                Place::Nothing | Place::ReadOnly(_) => return Resolution::Dropped { physical },
                Place::Memory(_) if self.is_watched(frame) => {
                    if self.tables(frame).any(|slot| self.slots[slot].parents > 0) {
                        return Resolution::TableWrite { physical };
                    }
                    self.drop_tables(frame);
                }
                Place::Memory(_) | Place::Device(_) => {}
            }
        }
        self.fill(registers, memory, linear, access, &translation);
        Resolution::Filled
    }

    /// Follows a store of `size` bytes to guest-physical memory that may be a page table.
    ///
    /// What came from the changed entries is removed, or made from the new ones where they are present and accessed already. Where
    /// they are not, the processor would set the accessed bit at the next use; so that must not be missed.
    pub fn written(
        &mut self,
        registers: &Registers,
        memory: &impl Memory,
        physical: u64,
        size: usize,
    ) {
        let end = physical + size as u64;
        if registers.has_paging() && registers.mode().pae {
            let pointers = registers.root()..registers.root() + 32;
            if physical < pointers.end && pointers.start < end {
                for quarter in 0..4 {
                    self.load_quarter(registers, memory, quarter);
                }
            }
        }
        for frame in physical / FRAME..end.div_ceil(FRAME) {
            let start = frame * FRAME;
            let bytes =
                (physical.max(start) - start) as usize..(end.min(start + FRAME) - start) as usize;
            // No slot goes while its entries follow, and one that comes is put before all others of its list.
            let mut next = self.head(frame);
            while let Some(slot) = next {
                let key = self.slots[slot].key;
                if key.frame == frame && key.level().is_some() {
                    let entry_size = key.mode.entry_size();
                    for index in bytes.start / entry_size..bytes.end.div_ceil(entry_size) {
                        for index in key.indices(index) {
                            self.follow(memory, slot, index);
                        }
                    }
                }
                next = link(self.slots[slot].next);
            }
        }
    }

    /// INVLPG: what is known of a linear address is read again, in tables too that changed without being told.
    pub fn invalidate_page(&mut self, registers: &Registers, memory: &impl Memory, linear: u32) {
        self.flush = true;
        let [quarter, middle, low] = indices(linear);
        self.load_quarter(registers, memory, quarter);
        let Some(directory) = self.child(ROOT, quarter) else { return };
        if self.slots[directory].key.role != Role::Directory {
            return;
        }
        self.follow(memory, directory, middle);
        if let Some(table) = self.child(directory, middle)
            && self.slots[table].key.role == Role::Table
        {
            self.follow(memory, table, low);
        }
    }

    /// Has the processor's TLB flushed.
    pub fn flush(&mut self) {
        self.flush = true;
    }

    /// Whether the processor's TLB, global pages too, has to be flushed before the guest goes on. Asking clears it.
    #[must_use]
    pub fn take_flush(&mut self) -> bool {
        core::mem::take(&mut self.flush)
    }

    /// The guest will tell of changes of this frame, a page table: it is not watched any more.
    pub fn announce(&mut self, frame: u64) {
        if let Some(state) = self.state(frame) {
            state.announced = true;
        }
        self.changed = true;
    }

    /// The frame is no page table any more. Should it be one yet, it is watched.
    pub fn release(&mut self, frame: u64) {
        if let Some(state) = self.state(frame) {
            (state.announced, state.adopted) = (false, false);
        }
        self.drop_tables(frame);
        self.changed = true;
    }

    /// The guest tells from here on of changes of all tables that CR3 leads to, as if they were announced, and of no others that were adopted.
    pub fn adopt(&mut self, registers: &Registers, memory: &impl Memory) {
        self.disown();
        if !registers.has_paging() {
            return;
        }
        for key in (0..4).filter_map(|quarter| Self::directory(registers, memory, quarter)) {
            self.adopt_frame(key.frame);
            let mode = key.mode;
            let entries = (0..ENTRIES).map(|index| mode.read(memory, key.guest_entry(index)));
            for entry in entries.filter(|entry| {
                entry & PRESENT != 0
                    && !mode.is_large(Level::Directory, *entry)
                    && !mode.has_reserved(Level::Directory, *entry)
            }) {
                self.adopt_frame(mode.frame(Level::Directory, entry));
            }
        }
    }

    fn adopt_frame(&mut self, frame: u64) {
        if let Some(state) = self.state(frame) {
            state.adopted = true;
        }
    }

    /// The guest tells no longer of changes of tables that it did not announce.
    pub fn disown(&mut self) {
        for frame in 0..self.frames.len() {
            let state = &mut self.frames[frame];
            if core::mem::take(&mut state.adopted) && !state.announced {
                self.drop_tables(frame as u64);
            }
        }
        self.changed = true;
    }

    /// Whether changes of a frame will be told.
    #[must_use]
    pub fn is_announced(&self, frame: u64) -> bool {
        self.frames.get(frame as usize).is_some_and(Frame::is_told)
    }

    /// What the guest uses a frame as, as far as it has shadows.
    pub fn uses(&self, frame: u64) -> impl Iterator<Item = (Level, Mode)> {
        self.tables(frame).filter_map(|slot| {
            let key = self.slots[slot].key;
            Some((key.level()?, key.mode))
        })
    }

    /// Whether stores to a frame are not to be missed.
    fn is_watched(&self, frame: u64) -> bool {
        self.frames.get(frame as usize).is_some_and(|state| state.tables > 0 && !state.is_told())
    }

    fn state(&mut self, frame: u64) -> Option<&mut Frame> {
        self.frames.get_mut(usize::try_from(frame).ok()?)
    }
}

// Completeness.
impl Shadow<'_> {
    /// Whether the processor may keep page faults to itself, because each would be one by the guest's own tables: what they map that
    /// CR3 leads to is here, with all that it allows, and will be as long as the guest tells of what becomes present.
    ///
    /// All tables on the way have to be announced. Where nothing else is in the way, entries that were not accessed are filled in ahead,
    /// once for each table; then their accessed bits are set, as by a processor that looks ahead. Dirty bits never are.
    #[must_use]
    pub fn complete(&mut self, registers: &Registers, memory: &impl Memory) -> bool {
        if self.changed {
            // The kernel's half first, where most that is missing is missing for good.
            self.is_complete = registers.has_paging()
                && (registers.mode().write_protect || missing!(OnlyKernels) == 0)
                && (0..4).rev().all(|quarter| self.has_quarter(registers, memory, quarter));
            self.changed = false;
        }
        self.is_complete
    }

    fn has_quarter(&mut self, registers: &Registers, memory: &impl Memory, quarter: usize) -> bool {
        match (Self::directory(registers, memory, quarter), self.child(ROOT, quarter)) {
            (Some(key), Some(slot)) => {
                let is_it = self.slots[slot].key == key || missing!(OtherDirectory) == 0;
                is_it && self.has_directory(memory, slot)
            }
            (Some(_), None) => missing!(NoDirectory) == 0,
            (None, Some(_)) => missing!(OtherDirectory) == 0,
            (None, None) => {
                let pointer = registers.root() + quarter as u64 * 8;
                let is_present = registers.mode().read(memory, pointer) & PRESENT != 0;
                !is_present || missing!(ReservedPointer) == 0
            }
        }
    }

    /// Whether nothing is missing in the directory, one that the guest uses now, and below.
    fn has_directory(&mut self, memory: &impl Memory, directory: usize) -> bool {
        if self.slots[directory].complete_at == self.epoch {
            return true;
        }
        if !self.has_entries(memory, directory) {
            return false;
        }
        for index in (0..ENTRIES).rev() {
            let Some(table) = self.child(directory, index) else { continue };
            if self.slots[table].missing > 0 && missing!(OtherTable) != 0 {
                // The guest may have changed the entry without a word. What is stored to is one of its tables.
                self.follow(memory, directory, index);
                if self.child(directory, index) != Some(table) {
                    return false;
                }
            }
            if !self.has_entries(memory, table) {
                return false;
            }
        }
        self.slots[directory].complete_at = self.epoch;
        true
    }

    /// Whether nothing is missing in a table that the guest uses now, after an attempt to fill it in.
    fn has_entries(&mut self, memory: &impl Memory, slot: usize) -> bool {
        let key = self.slots[slot].key;
        if key.level().is_some() && !self.is_announced(key.frame) {
            return false;
        }
        if self.slots[slot].missing > 0 {
            let is_first = !core::mem::replace(&mut self.slots[slot].ahead, true);
            for index in 0..ENTRIES {
                if self.pool[slot].0[index] & MISSING != 0 {
                    self.fill_ahead(memory, slot, index, is_first);
                }
            }
        }
        self.slots[slot].missing == 0
    }

    fn fill_ahead(&mut self, memory: &impl Memory, slot: usize, index: usize, accesses: bool) {
        let key = self.slots[slot].key;
        let Some(level) = key.level() else {
            self.forget_unused(key.frame + index as u64);
            return self.set_direct(memory, slot, index);
        };
        let place = key.guest_entry(index);
        let entry = key.mode.read(memory, place);
        if entry & PRESENT != 0 && !key.mode.has_reserved(level, entry) {
            if level == Level::Table {
                self.forget_unused(key.mode.frame(level, entry));
            } else if key.mode.is_large(level, entry) && self.free_count > self.reserve() {
                let _ = self.find_or_make(memory, key.below(index, entry));
            }
            if accesses && entry & ACCESSED == 0 {
                memory.write(place, key.mode.entry_size(), entry | ACCESSED);
            }
        }
        self.follow(memory, slot, index);
    }

    /// Forgets the shadows of a frame that is watched and that no entry leads to: it may be a table no longer.
    fn forget_unused(&mut self, frame: u64) {
        if self.is_watched(frame) && self.tables(frame).all(|slot| self.slots[slot].parents == 0) {
            self.drop_tables(frame);
        }
    }

    /// A map of the frames that have shadows as tables, a bit for each remainder of their numbers: where it is clear there is none.
    pub fn map(&self) -> impl Iterator<Item = u32> {
        self.marks
            .chunks(32)
            .map(|marks| marks.iter().rev().fold(0, |word, mark| word << 1 | u32::from(*mark != 0)))
    }

    /// The guest's directories that the processor walks the shadows of, as [`DIRECTORIES`] has them.
    pub fn directories(registers: &Registers, memory: &impl Memory) -> [u32; DIRECTORIES] {
        core::array::from_fn(|quarter| {
            let key = Self::directory(registers, memory, quarter);
            // With entries of 32 bits it is one directory for all of them.
            let is_first = |key: &Key| key.part == 0;
            let address = key.filter(is_first).map(|key| (key.frame * FRAME) | PRESENT);
            address.and_then(|address| address.try_into().ok()).unwrap_or(0)
        })
    }
}

// Entries.
impl Shadow<'_> {
    /// Fills in what a translation needs that succeeded for an access.
    fn fill(
        &mut self,
        registers: &Registers,
        memory: &impl Memory,
        linear: u32,
        access: Access,
        translation: &Translation,
    ) {
        if self.free_count < LONGEST_PATH {
            self.drop_all();
            self.recycled += 1;
        }
        let mode = registers.mode();
        let [quarter, middle, low] = indices(linear);
        let directory = match translation.steps() {
            [] => Key::identity(quarter),
            [pointer, ..] if pointer.level == Level::Pointers => {
                let frame = mode.frame(Level::Pointers, pointer.value);
                Key { role: Role::Directory, part: 0, mode, frame }
            }
            [..] => Self::two_level_directory(registers, quarter),
        };
        let directory = self.find_or_make(memory, directory);
        // QEMU sets the accessed bit here, which is no reason to set the entry again and to flush.
        if self.child(ROOT, quarter) != Some(directory) {
            self.set(ROOT, quarter, self.table_address(directory) | PRESENT);
        }
        let mut table = None;
        for step in translation.steps() {
            match step.level {
                Level::Pointers => {}
                Level::Directory => {
                    let value = self.made_of(memory, directory, middle, step.value, Some(access));
                    self.set(directory, middle, value);
                    table = self.child(directory, middle);
                }
                Level::Table => {
                    if let Some(table) = table {
                        let value = self.made_of(memory, table, low, step.value, Some(access));
                        self.set(table, low, value);
                    }
                }
            }
        }
        if translation.steps().is_empty() {
            let frame = u64::from(linear) / FRAME;
            let direct = self.find_or_make(memory, Key::direct(frame - low as u64, 0));
            let value = self.table_address(direct) | PRESENT | WRITABLE | USER | ACCESSED;
            self.set(directory, middle, value);
            table = Some(direct);
        }
        if let Some(table) = table
            && self.slots[table].key.role == Role::Direct
        {
            // It may have been watched when the table was made.
            self.set_direct(memory, table, low);
        }
    }

    /// Makes an entry of the page-directory-pointer table, if there is a shadow that it can lead to.
    fn load_quarter(&mut self, registers: &Registers, memory: &impl Memory, quarter: usize) {
        let key = Self::directory(registers, memory, quarter);
        let directory = key.and_then(|key| self.find_or_make_ahead(memory, key));
        let value = directory.map_or(0, |directory| self.table_address(directory) | PRESENT);
        self.set(ROOT, quarter, value);
    }

    /// What the directory of a quarter is made from, if there is one.
    fn directory(registers: &Registers, memory: &impl Memory, quarter: usize) -> Option<Key> {
        let mode = registers.mode();
        if !registers.has_paging() {
            Some(Key::identity(quarter))
        } else if mode.pae {
            let pointer = mode.read(memory, registers.root() + quarter as u64 * 8);
            let is_usable = pointer & PRESENT != 0 && !mode.has_reserved(Level::Pointers, pointer);
            let frame = mode.frame(Level::Pointers, pointer);
            is_usable.then_some(Key { role: Role::Directory, part: 0, mode, frame })
        } else {
            Some(Self::two_level_directory(registers, quarter))
        }
    }

    fn two_level_directory(registers: &Registers, quarter: usize) -> Key {
        let (mode, frame) = (registers.mode(), registers.root() / FRAME);
        Key { role: Role::Directory, part: quarter as u16, mode, frame }
    }

    /// Makes an entry anew from the guest's entry as it is now.
    fn follow(&mut self, memory: &impl Memory, slot: usize, index: usize) {
        let key = self.slots[slot].key;
        let entry = key.mode.read(memory, key.guest_entry(index));
        let value = self.made_of(memory, slot, index, entry, None);
        self.set(slot, index, value);
    }

    /// The shadow entry that is made from a guest's entry: for an access that succeeded, or, with `None`, as far as one would
    /// not change the guest's entry, and making no table but ahead.
    fn made_of(
        &mut self,
        memory: &impl Memory,
        slot: usize,
        index: usize,
        entry: u64,
        access: Option<Access>,
    ) -> u64 {
        let key = self.slots[slot].key;
        let (Some(level), mode) = (key.level(), key.mode) else { return 0 };
        if entry & PRESENT == 0 {
            return 0;
        }
        if mode.has_reserved(level, entry) {
            return missing!(Reserved);
        }
        if entry & ACCESSED == 0 {
            return missing!(NotAccessed);
        }
        let is_large = mode.is_large(level, entry);
        let mut allowed = entry & (WRITABLE | USER);
        if mode.no_execute {
            allowed |= entry & NO_EXECUTE;
        }
        let mut missing = 0;
        let by_kernel = access.is_some_and(|access| access.write && !access.user);
        if by_kernel && !mode.write_protect && entry & WRITABLE == 0 {
            // The guest's kernel may store here and its processes may not, which no entry can say. It is the kernel's
            // until a process comes and faults.
            allowed = (allowed | WRITABLE) & !USER;
            missing = MISSING;
        }
        if (level == Level::Table || is_large) && entry & DIRTY == 0 && allowed & WRITABLE != 0 {
            allowed &= !WRITABLE;
            missing |= missing!(NotDirty);
        }
        if level == Level::Table {
            let frame = mode.frame(level, entry);
            return self.page(memory, frame, entry & ATTRIBUTES, allowed) | missing;
        }
        let key = key.below(index, entry);
        let table = match access {
            Some(_) => self.find_or_make(memory, key),
            None => match self.find_or_make_ahead(memory, key) {
                Some(table) => table,
                None => return missing!(NoTable),
            },
        };
        let caching = entry & (WRITE_THROUGH | CACHE_DISABLE);
        self.table_address(table) | PRESENT | ACCESSED | caching | allowed | missing
    }

    /// An entry that maps a frame of the guest.
    fn page(&self, memory: &impl Memory, frame: u64, attributes: u64, allowed: u64) -> u64 {
        let (address, stores) = match memory.place(frame) {
            Place::Memory(address) if self.is_watched(frame) => (address, missing!(NoStores)),
            Place::Memory(address) if address / FRAME < self.frames.len() as u64 => {
                (address, WRITABLE | TRACKED)
            }
            Place::Memory(address) | Place::Device(address) => (address, WRITABLE),
            // Kernels have all of low memory mapped for stores, and store to no ROM.
            Place::ReadOnly(address) => (address, 0),
            Place::Nothing => (self.ones, 0),
        };
        let stores = if allowed & WRITABLE == 0 { 0 } else { stores };
        let given = allowed & !WRITABLE | stores;
        address & ADDRESS | PRESENT | ACCESSED | DIRTY | attributes | given
    }

    /// Makes an entry of a direct table.
    fn set_direct(&mut self, memory: &impl Memory, slot: usize, index: usize) {
        let key = self.slots[slot].key;
        let frame = key.frame + index as u64;
        let value = self.page(memory, frame, key.part.into(), WRITABLE | USER);
        self.set(slot, index, value);
    }

    /// Sets an entry, the only way to: what is counted is counted here.
    fn set(&mut self, slot: usize, index: usize, value: u64) {
        let place = (slot * ENTRIES + index) as u32;
        let old = core::mem::replace(&mut self.pool[slot].0[index], value);
        if old == value {
            return;
        }
        let maps_pages = self.slots[slot].key.maps_pages();
        self.note(slot, maps_pages, old, value);
        if maps_pages {
            for (entry, comes) in [(old, false), (value, true)] {
                if entry & TRACKED != 0
                    && let Some(state) = self.state((entry & ADDRESS) / FRAME)
                {
                    count(&mut state.writers, &mut state.writer, place, comes);
                }
            }
        } else {
            for (entry, comes) in [(old, false), (value, true)] {
                if let Some(child) = self.table_at(entry) {
                    let child = &mut self.slots[child];
                    count(&mut child.parents, &mut child.parent, place, comes);
                }
            }
        }
        // Processors look again before they raise a fault, so an entry that allows more needs no flush.
        let differs = (old ^ value) & !MISSING;
        let allows_more = differs & !(WRITABLE | TRACKED) == 0 && value & WRITABLE != 0;
        if old & PRESENT != 0 && differs != 0 && !allows_more {
            self.flush = true;
        }
    }

    /// Counts what is missing in a table, of which an entry changes.
    fn note(&mut self, slot: usize, maps_pages: bool, old: u64, value: u64) {
        let state = &mut self.slots[slot];
        let before = state.missing;
        state.missing = before + u32::from(value & MISSING != 0) - u32::from(old & MISSING != 0);
        if !maps_pages {
            state.complete_at = 0;
            self.changed = true;
        } else if state.missing != before {
            self.changed = true;
            if before == 0 {
                self.epoch += 1;
            }
        }
    }
}

// Tables.
impl Shadow<'_> {
    /// Forgets all shadows; which tables are announced stays known.
    fn drop_all(&mut self) {
        let tables = self.pool.len();
        self.pool[ROOT] = Page::EMPTY;
        for (i, slot) in self.slots[..tables].iter_mut().enumerate() {
            let next = (i + 1) % tables;
            *slot = Slot { next: if i == ROOT { 0 } else { next as u32 }, ..Slot::EMPTY };
        }
        self.free = 1;
        self.free_count = tables - 1;
        for state in &mut *self.frames {
            let Frame { announced, adopted, .. } = *state;
            *state = Frame { announced, adopted, ..Frame::EMPTY };
        }
        self.marks.fill(0);
        self.flush = true;
        self.changed = true;
    }

    fn table_address(&self, slot: usize) -> u64 {
        self.base + slot as u64 * FRAME
    }

    /// The slot of the table that an entry leads to.
    fn table_at(&self, entry: u64) -> Option<usize> {
        (entry & PRESENT != 0).then(|| (((entry & ADDRESS) - self.base) / FRAME) as usize)
    }

    fn child(&self, slot: usize, index: usize) -> Option<usize> {
        self.table_at(self.pool[slot].0[index])
    }

    /// The list that a frame's shadows are in.
    fn bucket(&self, frame: u64) -> usize {
        (frame % self.frames.len() as u64) as usize
    }

    /// The first slot of it.
    fn head(&self, frame: u64) -> Option<usize> {
        link(self.frames[self.bucket(frame)].head)
    }

    fn list(&self, frame: u64) -> impl Iterator<Item = usize> {
        successors(self.head(frame), |&slot| link(self.slots[slot].next))
    }

    /// The shadows that a frame has as a table.
    fn tables(&self, frame: u64) -> impl Iterator<Item = usize> {
        self.list(frame).filter(move |&slot| {
            let key = &self.slots[slot].key;
            key.frame == frame && key.level().is_some()
        })
    }

    fn find(&self, key: &Key) -> Option<usize> {
        self.list(key.frame).find(|&slot| self.slots[slot].key == *key)
    }

    /// Finds a shadow, or makes one before it is needed, where that costs nothing later, and leaves the pool to what is needed.
    fn find_or_make_ahead(&mut self, memory: &impl Memory, key: Key) -> Option<usize> {
        let is_cheap = key.level().is_some() && self.is_announced(key.frame);
        match self.find(&key) {
            None if is_cheap && self.free_count > self.reserve() => {
                Some(self.find_or_make(memory, key))
            }
            found => found,
        }
    }

    /// The tables of the pool that are left to what is needed.
    fn reserve(&self) -> usize {
        (self.pool.len() / 4).max(LONGEST_PATH)
    }

    fn find_or_make(&mut self, memory: &impl Memory, key: Key) -> usize {
        if let Some(slot) = self.find(&key) {
            return slot;
        }
        // `fill` has seen to it that there are enough.
        let slot = self.free as usize;
        self.free = self.slots[slot].next;
        self.free_count -= 1;
        self.pool[slot] = Page::EMPTY;
        let bucket = self.bucket(key.frame);
        self.slots[slot] = Slot { key, next: self.frames[bucket].head, ..Slot::EMPTY };
        self.frames[bucket].head = slot as u32;
        if key.level().is_some() {
            self.shadowed += 1;
            self.marks[key.frame as usize % MAP_BITS] += 1;
            if let Some(state) = self.state(key.frame) {
                state.tables += 1;
                if !state.is_told() {
                    self.protect(memory, key.frame);
                }
            }
        }
        // All that needs no fault, at once.
        for index in 0..ENTRIES {
            match key.role {
                Role::Directory | Role::Table => self.follow(memory, slot, index),
                Role::Direct => self.set_direct(memory, slot, index),
                Role::Other | Role::Identity => {}
            }
        }
        slot
    }

    /// Takes stores to a frame out of all entries.
    fn protect(&mut self, memory: &impl Memory, frame: u64) {
        let Place::Memory(address) = memory.place(frame) else { return };
        let frame = address / FRAME;
        let allows_stores = |entry| entry & TRACKED != 0 && (entry & ADDRESS) / FRAME == frame;
        let Some(&mut Frame { writers: 1.., writer, .. }) = self.state(frame) else { return };
        let (slot, index) = (writer as usize / ENTRIES, writer as usize % ENTRIES);
        self.forbid_stores(slot, index..index + 1, allows_stores);
        for slot in 0..self.pool.len() {
            if self.state(frame).is_none_or(|state| state.writers == 0) {
                return;
            }
            self.forbid_stores(slot, 0..ENTRIES, allows_stores);
        }
    }

    fn forbid_stores(&mut self, slot: usize, indices: Range<usize>, which: impl Fn(u64) -> bool) {
        if self.slots[slot].key.maps_pages() {
            for index in indices {
                let entry = self.pool[slot].0[index];
                if which(entry) {
                    self.set(slot, index, entry & !(WRITABLE | TRACKED) | missing!(Protected));
                }
            }
        }
    }

    /// Forgets the shadows of a frame.
    fn drop_tables(&mut self, frame: u64) {
        loop {
            let slot = self.tables(frame).next();
            let Some(slot) = slot else { return };
            self.drop_table(slot);
        }
    }

    fn drop_table(&mut self, slot: usize) {
        for index in 0..ENTRIES {
            self.set(slot, index, 0);
        }
        let Slot { key, next, parent, .. } = self.slots[slot];
        let (holder, index) = (parent as usize / ENTRIES, parent as usize % ENTRIES);
        self.forget(slot, holder, index..index + 1);
        for holder in 0..self.pool.len() {
            if self.slots[slot].parents == 0 {
                break;
            }
            self.forget(slot, holder, 0..ENTRIES);
        }
        let before = self.list(key.frame).find(|&other| self.slots[other].next == slot as u32);
        match before {
            Some(before) => self.slots[before].next = next,
            None => {
                let bucket = self.bucket(key.frame);
                self.frames[bucket].head = next;
            }
        }
        if let Some(state) = self.state(key.frame) {
            state.tables -= 1;
        }
        self.marks[key.frame as usize % MAP_BITS] -= 1;
        self.slots[slot] = Slot { next: self.free, ..Slot::EMPTY };
        self.free = slot as u32;
        self.free_count += 1;
    }

    /// Clears the entries of a table that lead to another.
    fn forget(&mut self, slot: usize, holder: usize, indices: Range<usize>) {
        let is_table = matches!(self.slots[holder].key.role, Role::Directory | Role::Identity);
        if is_table || holder == ROOT {
            for index in indices {
                if self.child(holder, index) == Some(slot) {
                    self.set(holder, index, if holder == ROOT { 0 } else { missing!(Forgotten) });
                }
            }
        }
    }
}

/// The indices of a linear address in the three shadow tables.
const fn indices(linear: u32) -> [usize; 3] {
    [linear as usize >> 30, linear as usize >> 21 & 511, linear as usize >> 12 & 511]
}

/// The slot that a link of a list leads to.
fn link(slot: u32) -> Option<usize> {
    (slot != 0).then_some(slot as usize)
}

/// Counts an entry that comes or goes, and keeps the place of one.
fn count(number: &mut u32, place_of_one: &mut u32, place: u32, comes: bool) {
    if comes {
        *number += 1;
        if *number == 1 {
            *place_of_one = place;
        }
    } else {
        *number -= 1;
    }
}
