//! Multiboot specification 0.6.96: what the loader left for the hypervisor, and what the hypervisor leaves for the guest.

#![expect(unsafe_code, reason = "UNSAFETY: reads what the boot loader left in memory")]

use crate::report::{Ending, give_up};
use core::ffi::CStr;
use core::slice;

/// What a loader leaves in EAX.
pub(crate) const LOADER_MAGIC: u32 = 0x2bad_b002;

/// Flags of [`Information`]: which fields are there.
pub(crate) const HAS_MEMORY: u32 = 1 << 0;
pub(crate) const HAS_COMMAND_LINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
pub(crate) const HAS_MEMORY_MAP: u32 = 1 << 6;

/// Section 3.3, as far as it is used.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Information {
    pub(crate) flags: u32,
    /// In KiB, from 0 and from 1 MiB on.
    pub(crate) memory_lower: u32,
    pub(crate) memory_upper: u32,
    pub(crate) boot_device: u32,
    pub(crate) command_line: u32,
    pub(crate) module_count: u32,
    pub(crate) modules: u32,
    symbols: [u32; 4],
    pub(crate) map_length: u32,
    pub(crate) map: u32,
}

/// A range of the memory map. In memory its `size`, which does not count itself, comes first.
#[derive(Clone, Copy, Default)]
#[repr(C, packed(4))]
pub(crate) struct Range {
    pub(crate) size: u32,
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) kind: u32,
}

/// Kinds of a range.
pub(crate) const USABLE: u32 = 1;
pub(crate) const RESERVED: u32 = 2;

impl Range {
    /// What is stored in `size`.
    pub(crate) const SIZE: u32 = 20;

    pub(crate) fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }
}

/// A file that was loaded along.
#[derive(Clone, Copy)]
pub(crate) struct Module {
    pub(crate) bytes: &'static [u8],
    pub(crate) line: &'static str,
}

#[repr(C)]
struct ModuleEntry {
    start: u32,
    end: u32,
    line: u32,
    reserved: u32,
}

/// The most ranges of the memory map.
const RANGES: usize = 64;

/// What the loader left. Its own lie where the guest may be loaded to, so what is needed later is copied.
pub(crate) struct Loader {
    pub(crate) information: Information,
    address: u64,
    map: [Range; RANGES],
    ranges: usize,
}

impl Loader {
    /// From what was in EAX and EBX.
    pub(crate) fn of(magic: u32, address: u32) -> Self {
        if magic != LOADER_MAGIC {
            give_up(Ending::BadArguments, format_args!("not started by a multiboot loader"));
        }
        // SAFETY: the loader's promise: it is there, and nothing has overwritten it.
        let information = unsafe { (address as usize as *const Information).read_unaligned() };
        if information.flags & HAS_MEMORY_MAP == 0 {
            give_up(Ending::BadArguments, format_args!("the boot loader passes no memory map"));
        }
        let mut loader = Self {
            information,
            address: address.into(),
            map: [Range::default(); RANGES],
            ranges: 0,
        };
        let (mut next, end) =
            (information.map, information.map.saturating_add(information.map_length));
        while next < end {
            if loader.ranges == RANGES {
                give_up(
                    Ending::UnfitMachine,
                    format_args!("the memory map has more than {RANGES} ranges"),
                );
            }
            // SAFETY: as above.
            let range = unsafe { (next as usize as *const Range).read_unaligned() };
            loader.map[loader.ranges] = range;
            loader.ranges += 1;
            next = next.saturating_add(range.size).saturating_add(4);
        }
        loader
    }

    /// The command line.
    pub(crate) fn command_line(&self) -> &'static str {
        if self.information.flags & HAS_COMMAND_LINE == 0 {
            return "";
        }
        text(self.information.command_line)
    }

    /// The modules.
    pub(crate) fn modules(&self) -> impl Iterator<Item = Module> + use<> {
        let count = if self.information.flags & HAS_MODULES == 0 {
            0
        } else {
            self.information.module_count
        };
        let entries = self.information.modules as usize as *const ModuleEntry;
        (0..count as usize).map(move |index| {
            // SAFETY: the loader's promise.
            let entry = unsafe { &*entries.add(index) };
            let length = entry.end.saturating_sub(entry.start) as usize;
            // SAFETY: the same; the hypervisor's image lies elsewhere, and the guest's memory is not written yet.
            let bytes = unsafe { slice::from_raw_parts(entry.start as usize as *const u8, length) };
            Module { bytes, line: text(entry.line) }
        })
    }

    /// The memory map.
    pub(crate) fn memory_map(&self) -> impl Iterator<Item = Range> + Clone {
        self.map[..self.ranges].iter().copied()
    }

    /// The end of everything that the loader put between two addresses.
    pub(crate) fn end_within(&self, start: u64, end: u64) -> u64 {
        let line = |line: &str| line.as_ptr() as u64 + line.len() as u64 + 1;
        let entries = u64::from(self.information.modules)
            + u64::from(self.information.module_count) * size_of::<ModuleEntry>() as u64;
        let map = u64::from(self.information.map) + u64::from(self.information.map_length);
        let own = [
            self.address + size_of::<Information>() as u64,
            line(self.command_line()),
            entries,
            map,
        ];
        let modules = self
            .modules()
            .flat_map(|module| [module.bytes.as_ptr_range().end as u64, line(module.line)]);
        own.into_iter()
            .chain(modules)
            .filter(|last| (start..end).contains(last))
            .max()
            .unwrap_or(start)
    }
}

/// A text that ends in a zero.
fn text(address: u32) -> &'static str {
    if address == 0 {
        return "";
    }
    // SAFETY: the loader's promise.
    let text = unsafe { CStr::from_ptr(address as usize as *const _) };
    text.to_str().unwrap_or_else(|_| {
        give_up(Ending::BadArguments, format_args!("a command line is not UTF-8"))
    })
}
