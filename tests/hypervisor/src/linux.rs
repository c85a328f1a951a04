//! A Linux kernel's file and the way it wants to be started: the 32-bit boot protocol for x86, from version 2.05 of Linux 2.6.20 on.
//!
//! Nothing here touches memory: what is to lie where, and with which bytes.

use core::fmt;
use core::ops::Range;

/// Offsets of the setup header's fields, in the file and in [`Parameters`] alike.
mod field {
    pub(super) const SETUP_SECTS: usize = 0x1f1;
    pub(super) const SYSSIZE: usize = 0x1f4;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    /// A short jump over the header: its distance tells where the header ends.
    pub(super) const JUMP_DISTANCE: usize = 0x201;
    pub(super) const HEADER: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const CODE32_START: usize = 0x214;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22c;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const RELOCATABLE_KERNEL: usize = 0x234;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
}

/// Offsets in [`Parameters`] alone.
mod parameter {
    /// `screen_info`: column and row of the cursor, page, mode, columns; rows, kind, lines of a character.
    pub(super) const ORIG_VIDEO_MODE: usize = 0x06;
    pub(super) const ORIG_VIDEO_COLS: usize = 0x07;
    pub(super) const ORIG_VIDEO_LINES: usize = 0x0e;
    pub(super) const ORIG_VIDEO_ISVGA: usize = 0x0f;
    pub(super) const ORIG_VIDEO_POINTS: usize = 0x10;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const E820_TABLE: usize = 0x2d0;
}

const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");

/// `loadflags`: the kernel is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1 << 0;

/// `type_of_loader`: none that has a number.
const UNDEFINED_LOADER: u8 = 0xff;

/// Versions of the protocol.
const OLDEST: u16 = 0x205;
const HAS_CMDLINE_SIZE: u16 = 0x206;
const HAS_INIT_SIZE: u16 = 0x20a;

/// The longest command line, without the zero at its end, of kernels that do not say.
const CMDLINE_SIZE: u32 = 255;

/// Memory for a kernel that does not say what it needs: more than any of that time did.
const INIT_SIZE: u64 = 48 << 20;

/// A sector of a disk, in which the file's first part is counted.
const SECTOR: usize = 512;

/// What the rest of it is counted in.
const PARAGRAPH: usize = 16;

/// Where the header must end, so that it does not overwrite what follows in [`Parameters`].
const HEADER_END: usize = 0x290;

/// The most ranges of the memory map.
pub const RANGES: usize = 128;

/// Bytes of a range in the memory map.
const RANGE_SIZE: usize = 20;

/// An initramfs begins on a page.
const PAGE: u64 = 4096;

/// `boot_params`, the page that the kernel finds by ESI.
pub type Parameters = [u8; 4096];

/// Why a kernel cannot be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The file ends within its header, or within what the header says that it has.
    Truncated,
    /// The file does not begin as a bzImage does.
    NotLinux,
    /// The protocol's version is older than 2.05.
    TooOld(u16),
    /// It is to be loaded below 1 MiB: a zImage.
    LoadedLow,
    /// The header's end, its alignment or its addresses make no sense.
    BadHeader,
    /// No memory for the kernel: it needs so many bytes.
    NoRoom(u64),
    /// No memory for an initramfs of so many bytes.
    NoRoomForInitrd(u64),
    /// The command line is longer than this.
    LongLine(u32),
    /// The memory map has more ranges than [`RANGES`].
    ManyRanges,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => write!(f, "the file is cut off"),
            Self::NotLinux => write!(f, "not a bzImage"),
            Self::TooOld(version) => write!(
                f,
                "its boot protocol is {}.{:02}; 2.05 is the oldest that is known",
                version >> 8,
                version & 0xff
            ),
            Self::LoadedLow => write!(f, "it is to be loaded below 1 MiB: a zImage"),
            Self::BadHeader => write!(f, "its header makes no sense"),
            Self::NoRoom(bytes) => write!(f, "there is no room for the {bytes:#x} bytes it needs"),
            Self::NoRoomForInitrd(bytes) => {
                write!(f, "there is no room for its initramfs of {bytes:#x} bytes")
            }
            Self::LongLine(most) => write!(f, "its command line is longer than {most}"),
            Self::ManyRanges => write!(f, "the memory map has more than {RANGES} ranges"),
        }
    }
}

/// What lies where, in physical addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The kernel's protected-mode part, and its entry.
    pub kernel: u32,
    /// The initramfs; empty without one.
    pub initrd: Range<u32>,
}

/// A kernel's file.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<'a> {
    file: &'a [u8],
    header_end: usize,
    /// What is loaded: the protected-mode part.
    pub system: &'a [u8],
}

fn byte(file: &[u8], offset: usize) -> u8 {
    file.get(offset).copied().unwrap_or_default()
}

fn word(file: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([byte(file, offset), byte(file, offset + 1)])
}

fn long(file: &[u8], offset: usize) -> u32 {
    u32::from(word(file, offset)) | u32::from(word(file, offset + 2)) << 16
}

/// Whether a file begins as a bzImage does.
#[must_use]
pub fn is_linux(file: &[u8]) -> bool {
    word(file, field::BOOT_FLAG) == BOOT_FLAG && long(file, field::HEADER) == MAGIC
}

impl<'a> Kernel<'a> {
    /// Reads a file's header.
    ///
    /// # Errors
    ///
    /// It is none, is cut off, or wants what is not known.
    pub fn parse(file: &'a [u8]) -> Result<Self, Error> {
        if !is_linux(file) {
            return Err(Error::NotLinux);
        }
        let version = word(file, field::VERSION);
        if version < OLDEST {
            return Err(Error::TooOld(version));
        }
        if byte(file, field::LOADFLAGS) & LOADED_HIGH == 0 {
            return Err(Error::LoadedLow);
        }
        let header_end = field::HEADER + usize::from(byte(file, field::JUMP_DISTANCE));
        if !(field::CMDLINE_SIZE..=HEADER_END).contains(&header_end) {
            return Err(Error::BadHeader);
        }
        // 0 stands for 4, and the boot sector is one more.
        let sectors = match byte(file, field::SETUP_SECTS) {
            0 => 5,
            count => usize::from(count) + 1,
        };
        let (start, paragraphs) = (sectors * SECTOR, long(file, field::SYSSIZE) as usize);
        let end = paragraphs.checked_mul(PARAGRAPH).and_then(|bytes| bytes.checked_add(start));
        // Before Linux 2.6.26 the last paragraph need not be full.
        let system = end
            .filter(|end| end.saturating_sub(file.len()) < PARAGRAPH)
            .and_then(|end| file.get(start..end.min(file.len())))
            .ok_or(Error::Truncated)?;
        if system.is_empty() || file.len() < header_end {
            return Err(Error::Truncated);
        }
        let kernel = Self { file, header_end, system };
        if kernel.is_relocatable() && !kernel.alignment().is_power_of_two() {
            return Err(Error::BadHeader);
        }
        Ok(kernel)
    }

    fn version(&self) -> u16 {
        word(self.file, field::VERSION)
    }

    fn is_relocatable(&self) -> bool {
        byte(self.file, field::RELOCATABLE_KERNEL) != 0
    }

    fn alignment(&self) -> u64 {
        long(self.file, field::KERNEL_ALIGNMENT).into()
    }

    /// The longest command line, without the zero at its end.
    #[must_use]
    pub fn longest_line(&self) -> u32 {
        if self.version() < HAS_CMDLINE_SIZE {
            return CMDLINE_SIZE;
        }
        long(self.file, field::CMDLINE_SIZE)
    }

    /// Where it would like to lie, and the bytes that it needs from there on until it knows the memory map.
    fn wish(&self) -> (u64, u64) {
        let (start, room) = if self.version() < HAS_INIT_SIZE {
            (long(self.file, field::CODE32_START).into(), INIT_SIZE)
        } else {
            let high = u64::from(long(self.file, field::PREF_ADDRESS + 4)) << 32;
            let preferred = high | u64::from(long(self.file, field::PREF_ADDRESS));
            (preferred, long(self.file, field::INIT_SIZE).into())
        };
        (start, room.max(self.system.len() as u64))
    }

    /// Finds a place for the kernel, and for an initramfs of so many bytes, 0 without one. `free` is the memory that may be used, in any
    /// order; nothing is put below 1 MiB or beyond 4 GiB.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn place(
        &self,
        free: impl Iterator<Item = Range<u64>> + Clone,
        initrd: u64,
    ) -> Result<Placement, Error> {
        const LOWEST: u64 = 1 << 20;
        const HIGHEST: u64 = 1 << 32;
        let free = free.map(|range| range.start.max(LOWEST)..range.end.min(HIGHEST));
        let (wished, room) = self.wish();
        let fits = |range: &Range<u64>, start: u64| {
            range.start <= start && start.checked_add(room).is_some_and(|end| end <= range.end)
        };
        let wish = free.clone().find_map(|range| fits(&range, wished).then_some(wished));
        // A relocatable kernel may lie at each multiple of its alignment.
        let other = || {
            let first = |range: Range<u64>| {
                let start = range.start.checked_next_multiple_of(self.alignment())?;
                fits(&range, start).then_some(start)
            };
            if self.is_relocatable() { free.clone().filter_map(first).min() } else { None }
        };
        let kernel = wish.or_else(other).ok_or(Error::NoRoom(room))?;
        let taken = kernel..kernel + room;
        let initrd = if initrd == 0 { 0..0 } else { self.place_initrd(free, &taken, initrd)? };
        // Both lie below 4 GiB; an end may lie there.
        let low = |address: u64| u32::try_from(address).map_err(|_| Error::BadHeader);
        Ok(Placement { kernel: low(kernel)?, initrd: low(initrd.start)?..low(initrd.end)? })
    }

    /// The highest place below what the kernel can reach, clear of itself.
    fn place_initrd(
        &self,
        free: impl Iterator<Item = Range<u64>>,
        taken: &Range<u64>,
        bytes: u64,
    ) -> Result<Range<u64>, Error> {
        let limit = u64::from(long(self.file, field::INITRD_ADDR_MAX));
        let highest = |range: Range<u64>| {
            let start = range.end.min(limit).checked_sub(bytes)? & !(PAGE - 1);
            (range.start <= start).then_some(start)
        };
        free.flat_map(|range| {
            [range.start..range.end.min(taken.start), range.start.max(taken.end)..range.end]
        })
        .filter_map(highest)
        .max()
        .map(|start| start..start + bytes)
        .ok_or(Error::NoRoomForInitrd(bytes))
    }

    /// Fills the page that the kernel finds by ESI: its own header, what the loader says in it, the screen in text mode, and the memory
    /// map with kinds as of the firmware.
    ///
    /// # Errors
    ///
    /// The map has too many ranges, or the line is too long.
    pub fn parameters(
        &self,
        placement: &Placement,
        line: &str,
        line_address: u32,
        map: impl Iterator<Item = (Range<u64>, u32)>,
    ) -> Result<Parameters, Error> {
        let most = self.longest_line();
        if line.len() > most as usize {
            return Err(Error::LongLine(most));
        }
        let mut page = [0; 4096];
        let header = field::SETUP_SECTS..self.header_end;
        page[header.clone()].copy_from_slice(&self.file[header]);
        let mut set = |offset: usize, bytes: &[u8]| {
            page[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        set(field::TYPE_OF_LOADER, &[UNDEFINED_LOADER]);
        set(field::CODE32_START, &placement.kernel.to_le_bytes());
        set(field::RAMDISK_IMAGE, &placement.initrd.start.to_le_bytes());
        set(field::RAMDISK_SIZE, &(placement.initrd.end - placement.initrd.start).to_le_bytes());
        set(field::CMD_LINE_PTR, &line_address.to_le_bytes());
        set(parameter::ORIG_VIDEO_MODE, &[3]);
        set(parameter::ORIG_VIDEO_COLS, &[80]);
        set(parameter::ORIG_VIDEO_LINES, &[25]);
        set(parameter::ORIG_VIDEO_ISVGA, &[1]);
        set(parameter::ORIG_VIDEO_POINTS, &16_u16.to_le_bytes());
        let mut count = 0;
        for (range, kind) in map.filter(|(range, _)| range.start < range.end) {
            if count == RANGES {
                return Err(Error::ManyRanges);
            }
            let entry = parameter::E820_TABLE + count * RANGE_SIZE;
            set(entry, &range.start.to_le_bytes());
            set(entry + 8, &(range.end - range.start).to_le_bytes());
            set(entry + 16, &kind.to_le_bytes());
            count += 1;
        }
        set(parameter::E820_ENTRIES, &[count as u8]);
        Ok(page)
    }
}

#[cfg(test)]
mod tests;
