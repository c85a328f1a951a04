//! The guest's own translation of linear addresses: what its processor would do with its page tables.
//!
//! Two-level tables, with pages of 4 MiB below 4 GiB where CR4.PSE is set (PSE-36 is not offered: its address bits are reserved),
//! and PAE tables with pages of 2 MiB. Two things are simpler than in a processor. The entries of a page-directory-pointer
//! table are read at each walk, not when CR3 is loaded, so a reserved bit in one is a page fault. And nothing is kept between
//! two walks.
//!
//! A table that is neither in memory nor in a ROM reads as ones, in every bit.

#[cfg(test)]
mod tests;

use crate::memory::{FRAME, Memory};

/// CR0 bit 16, WP: ring 0 obeys write protection too.
pub const CR0_WRITE_PROTECT: u32 = 1 << 16;
/// CR0 bit 31, PG.
pub const CR0_PAGING: u32 = 1 << 31;
/// CR4 bit 4, PSE: directories of two-level tables may hold pages of 4 MiB.
pub const CR4_PAGE_SIZE: u32 = 1 << 4;
/// CR4 bit 5, PAE.
pub const CR4_PAE: u32 = 1 << 5;
/// EFER bit 11, NXE: bit 63 of PAE entries is NX.
pub const EFER_NO_EXECUTE: u64 = 1 << 11;

/// Bit 0 of an entry, P.
pub const PRESENT: u64 = 1 << 0;
/// Bit 1 of an entry, R/W.
pub const WRITABLE: u64 = 1 << 1;
/// Bit 2 of an entry, U/S.
pub const USER: u64 = 1 << 2;
/// Bit 3 of an entry, PWT.
pub const WRITE_THROUGH: u64 = 1 << 3;
/// Bit 4 of an entry, PCD.
pub const CACHE_DISABLE: u64 = 1 << 4;
/// Bit 5 of an entry, A.
pub const ACCESSED: u64 = 1 << 5;
/// Bit 6 of an entry that maps a page, D.
pub const DIRTY: u64 = 1 << 6;
/// Bit 7 of a directory's entry, PS: it maps a large page.
pub const LARGE: u64 = 1 << 7;
/// Bit 7 of a page table's entry, PAT.
pub const ATTRIBUTE: u64 = 1 << 7;
/// Bit 8 of an entry that maps a page, G.
pub const GLOBAL: u64 = 1 << 8;
/// Bit 12 of an entry that maps a large page, PAT.
pub const LARGE_ATTRIBUTE: u64 = 1 << 12;
/// Bit 63 of a PAE entry, NX.
pub const NO_EXECUTE: u64 = 1 << 63;

/// Error code: the page is present, and the fault is one of permissions or reserved bits.
pub const ERROR_PRESENT: u32 = 1 << 0;
/// Error code: a store.
pub const ERROR_WRITE: u32 = 1 << 1;
/// Error code: in ring 3.
pub const ERROR_USER: u32 = 1 << 2;
/// Error code: a reserved bit is set in a present entry.
pub const ERROR_RESERVED: u32 = 1 << 3;
/// Error code: the fetch of an instruction, where NX is in use.
pub const ERROR_EXECUTE: u32 = 1 << 4;

/// The registers that decide on translation, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// CR0: PG and WP matter.
    pub cr0: u32,
    /// CR3.
    pub cr3: u32,
    /// CR4: PSE and PAE matter.
    pub cr4: u32,
    /// EFER: NXE matters.
    pub efer: u64,
    /// The bits of a physical address, 32 to 52: CPUID leaf 80000008h, EAX bits 0 to 7. Higher ones are reserved in entries.
    pub width: u8,
}

/// What the guest does with a linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Stores there.
    pub write: bool,
    /// In ring 3.
    pub user: bool,
    /// Fetches an instruction.
    pub execute: bool,
}

impl Access {
    /// The access that led to a page fault with this error code.
    #[must_use]
    pub const fn of_error(error: u32) -> Self {
        Self {
            write: error & ERROR_WRITE != 0,
            user: error & ERROR_USER != 0,
            execute: error & ERROR_EXECUTE != 0,
        }
    }
}

/// The guest's processor would raise a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// The error code.
    pub error: u32,
}

/// What a table is used as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// A page-directory-pointer table of PAE, four entries.
    Pointers,
    /// A page directory.
    Directory,
    /// A page table.
    Table,
}

/// How entries are read: what [`Registers`] say, but for the address of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Entries have 64 bits.
    pub pae: bool,
    /// Directories may hold large pages.
    pub large_pages: bool,
    /// Bit 63 is NX.
    pub no_execute: bool,
    /// Ring 0 obeys write protection too.
    pub write_protect: bool,
    /// The bits of a physical address.
    pub width: u8,
}

impl Registers {
    /// Whether linear addresses are translated at all.
    #[must_use]
    pub const fn has_paging(&self) -> bool {
        self.cr0 & CR0_PAGING != 0
    }

    /// How entries are read.
    #[must_use]
    pub const fn mode(&self) -> Mode {
        let pae = self.cr4 & CR4_PAE != 0;
        Mode {
            pae,
            large_pages: pae || self.cr4 & CR4_PAGE_SIZE != 0,
            no_execute: pae && self.efer & EFER_NO_EXECUTE != 0,
            write_protect: self.cr0 & CR0_WRITE_PROTECT != 0,
            width: self.width,
        }
    }

    /// The physical address of the highest table: CR3 without the bits that the processor ignores.
    #[must_use]
    pub const fn root(&self) -> u64 {
        (self.cr3 & if self.mode().pae { !0x1f } else { !0xfff }) as u64
    }
}

impl Mode {
    /// Bytes of an entry.
    #[must_use]
    pub const fn entry_size(self) -> usize {
        if self.pae { 8 } else { 4 }
    }

    /// The highest table's level.
    #[must_use]
    pub const fn highest(self) -> Level {
        if self.pae { Level::Pointers } else { Level::Directory }
    }

    /// The first bit of a linear address that a table of this level does not translate.
    const fn shift(self, level: Level) -> u32 {
        match level {
            Level::Pointers => 30,
            Level::Directory if self.pae => 21,
            Level::Directory => 22,
            Level::Table => 12,
        }
    }

    /// Which entry of a table of this level translates a linear address.
    #[must_use]
    pub const fn index(self, level: Level, linear: u32) -> u64 {
        let entries = match level {
            Level::Pointers => 4,
            Level::Directory | Level::Table if self.pae => 512,
            Level::Directory | Level::Table => 1024,
        };
        (linear >> self.shift(level)) as u64 % entries
    }

    /// Whether a present entry maps a large page.
    #[must_use]
    pub fn is_large(self, level: Level, entry: u64) -> bool {
        level == Level::Directory && self.large_pages && entry & LARGE != 0
    }

    /// Whether a present entry of this level has bits set that are reserved.
    #[must_use]
    pub fn has_reserved(self, level: Level, entry: u64) -> bool {
        let mut reserved = 0;
        if self.pae {
            reserved |= !NO_EXECUTE & !0 << self.width;
            if !self.no_execute || level == Level::Pointers {
                reserved |= NO_EXECUTE;
            }
        }
        if level == Level::Pointers {
            // Bit 5 is reserved too, but QEMU sets it in the entries that it uses.
            reserved |= WRITABLE | USER | DIRTY | LARGE | GLOBAL;
        }
        if self.is_large(level, entry) {
            reserved |= ((1 << self.shift(level)) - 1) & !(LARGE_ATTRIBUTE | 0xfff);
        }
        entry & reserved != 0
    }

    /// The number of the frame that a present entry without reserved bits leads to: the next table's, or the first of the page.
    #[must_use]
    pub fn frame(self, level: Level, entry: u64) -> u64 {
        let address = entry & !(!0 << self.width);
        if self.is_large(level, entry) {
            (address & !0 << self.shift(level)) / FRAME
        } else {
            address / FRAME
        }
    }

    /// The frames that a page has which a present entry maps, or 1 where it leads to a table.
    #[must_use]
    pub fn frames(self, level: Level, entry: u64) -> u64 {
        if self.is_large(level, entry) { (1 << self.shift(level)) / FRAME } else { 1 }
    }

    /// Reads the entry at a guest-physical address; ones where no memory is.
    #[must_use]
    pub fn read(self, memory: &impl Memory, address: u64) -> u64 {
        let size = self.entry_size();
        memory.read(address, size).unwrap_or(u64::MAX >> (64 - 8 * size))
    }
}

/// An entry on the way of a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The level of its table.
    pub level: Level,
    /// Its guest-physical address.
    pub address: u64,
    /// Its value, present and without reserved bits.
    pub value: u64,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address.
    pub physical: u64,
    steps: [Step; 3],
    count: usize,
}

impl Translation {
    /// The entries on the way, the one that maps the page last. None without paging.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps[..self.count]
    }

    /// Whether each directory and page table on the way has this bit.
    fn all(&self, bit: u64) -> bool {
        self.steps().iter().all(|step| step.level == Level::Pointers || step.value & bit != 0)
    }

    /// Whether one of them has.
    fn any(&self, bit: u64) -> bool {
        self.steps().iter().any(|step| step.value & bit != 0)
    }
}

/// Finds the entries that map a linear address, and changes nothing.
///
/// # Errors
///
/// The bits of the error code that tell why there are none.
pub fn find(registers: &Registers, memory: &impl Memory, linear: u32) -> Result<Translation, u32> {
    let mode = registers.mode();
    let mut level = mode.highest();
    let nowhere = Step { level, address: 0, value: 0 };
    let mut found = Translation { physical: linear.into(), steps: [nowhere; 3], count: 0 };
    if !registers.has_paging() {
        return Ok(found);
    }
    let mut table = registers.root();
    loop {
        let address = table + mode.index(level, linear) * mode.entry_size() as u64;
        let value = mode.read(memory, address);
        if value & PRESENT == 0 {
            return Err(0);
        }
        if mode.has_reserved(level, value) {
            return Err(ERROR_PRESENT | ERROR_RESERVED);
        }
        found.steps[found.count] = Step { level, address, value };
        found.count += 1;
        table = mode.frame(level, value) * FRAME;
        level = match level {
            Level::Pointers => Level::Directory,
            Level::Directory if !mode.is_large(level, value) => Level::Table,
            Level::Directory | Level::Table => {
                found.physical = table + u64::from(linear) % (1 << mode.shift(level));
                return Ok(found);
            }
        };
    }
}

/// Translates a linear address for an access, as the guest's processor does: with accessed and dirty bits set where the
/// access succeeds, and nothing changed where it does not.
///
/// Where a table cannot be written, as in a ROM, the bits are lost; in [`Translation::steps`] they are set.
///
/// # Errors
///
/// The page fault that the access raises.
pub fn translate(
    registers: &Registers,
    memory: &impl Memory,
    linear: u32,
    access: Access,
) -> Result<Translation, PageFault> {
    let mode = registers.mode();
    let fault = |why| {
        let mut error = why;
        error |= if access.write { ERROR_WRITE } else { 0 };
        error |= if access.user { ERROR_USER } else { 0 };
        error |= if access.execute && mode.no_execute { ERROR_EXECUTE } else { 0 };
        PageFault { error }
    };
    let mut found = find(registers, memory, linear).map_err(fault)?;
    if !registers.has_paging() {
        return Ok(found);
    }
    let forbidden = (access.user && !found.all(USER))
        || (access.write && (access.user || mode.write_protect) && !found.all(WRITABLE))
        || (access.execute && mode.no_execute && found.any(NO_EXECUTE));
    if forbidden {
        return Err(fault(ERROR_PRESENT));
    }
    let last = found.count - 1;
    for (i, step) in found.steps[..found.count].iter_mut().enumerate() {
        let old = step.value;
        if step.level != Level::Pointers {
            step.value |= ACCESSED;
        }
        if access.write && i == last {
            step.value |= DIRTY;
        }
        if step.value != old {
            memory.write(step.address, mode.entry_size(), step.value);
        }
    }
    Ok(found)
}
