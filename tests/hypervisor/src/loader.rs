//! Puts the guest's kernel into memory, as its boot loader would.

use crate::machine::{Machine, OWN};
use crate::multiboot::{
    HAS_COMMAND_LINE, HAS_MEMORY, HAS_MEMORY_MAP, Information, LOADER_MAGIC, Loader, Module,
    RESERVED, Range, USABLE,
};
use crate::report::{Ending, give_up};
use core::mem::size_of;
use object::Endianness;
use object::elf::{EM_386, ET_EXEC, FileHeader32, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use vmi_hypervisor::linux;

/// Multiboot specification 0.6.96, section 3.1: the header lies in the first bytes of the file.
const HEADER_MAGIC: u32 = 0x1bad_b002;
const HEADER_AREA: usize = 8192;

/// Header flags that a loader must know or refuse: all of the lower half. Modules on page boundaries, memory, video mode.
const REQUIRED: u32 = 0xffff;
const KNOWN: u32 = 1 << 0 | 1 << 1;

/// Header flag: addresses in the header, instead of those of ELF.
const HAS_ADDRESSES: u32 = 1 << 16;

/// Where the guest finds the multiboot information, a page.
const INFORMATION: u32 = 0x9000;
const INFORMATION_SIZE: usize = 4096;

/// What follows in that page: the memory map, the command line.
const MAP_OFFSET: usize = 128;
const MAP_RANGES: usize = 64;
const LINE_OFFSET: usize = MAP_OFFSET + MAP_RANGES * size_of::<Range>();

/// A Linux kernel's parameters, a page; in the next its descriptor table, and behind that its command line.
const PARAMETERS: u32 = 0x9000;
const TABLE: u32 = 0xa000;
const LINUX_LINE: u32 = TABLE + (DESCRIPTORS.len() * 8) as u32;
const LINUX_LINE_END: u32 = 0xc000;

/// What the 32-bit boot protocol wants: at 10h code, at 18h data, both flat.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// How the guest is entered: in protected mode, paging off.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entry {
    pub(crate) eip: u32,
    pub(crate) eax: u32,
    pub(crate) ebx: u32,
    pub(crate) esi: u32,
    /// Its descriptor table and the selectors of code and data, for a kernel that wants them.
    pub(crate) table: Option<Table>,
}

/// A descriptor table of the guest's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    pub(crate) base: u32,
    pub(crate) limit: u16,
    pub(crate) code: u16,
    pub(crate) data: u16,
}

/// The kernels that can be started.
enum Kernel<'a> {
    /// An ELF file with a multiboot header.
    Multiboot(&'a FileHeader32<Endianness>),
    /// A bzImage.
    Linux(linux::Kernel<'a>),
}

/// Ends: the guest is not one.
fn refuse(reason: core::fmt::Arguments<'_>) -> ! {
    give_up(Ending::BadArguments, format_args!("the guest: {reason}"))
}

impl<'a> Kernel<'a> {
    /// Recognises it by its magic numbers.
    fn of(file: &'a [u8]) -> Self {
        if linux::is_linux(file) {
            return match linux::Kernel::parse(file) {
                Ok(kernel) => Self::Linux(kernel),
                Err(error) => refuse(format_args!("{error}")),
            };
        }
        let word = |offset: usize| {
            let bytes = file.get(offset..offset + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        let header = (0..file.len().min(HEADER_AREA)).step_by(4).find_map(|offset| {
            let (magic, flags, checksum) = (word(offset)?, word(offset + 4)?, word(offset + 8)?);
            let sum = magic.wrapping_add(flags).wrapping_add(checksum);
            (magic == HEADER_MAGIC && sum == 0).then_some(flags)
        });
        let Some(flags) = header else {
            refuse(format_args!(
                "neither a bzImage nor a multiboot kernel: no multiboot header in its first 8 KiB"
            ))
        };
        if flags & REQUIRED & !KNOWN != 0 {
            refuse(format_args!("its multiboot header wants what is not there: flags {flags:#x}"));
        }
        if flags & HAS_ADDRESSES != 0 {
            refuse(format_args!("its multiboot header has addresses; only ELF files are loaded"));
        }
        match FileHeader32::<Endianness>::parse(file) {
            Ok(header)
                if header.endian().is_ok_and(|endian| endian == Endianness::Little)
                    && header.e_machine(Endianness::Little) == EM_386
                    && header.e_type(Endianness::Little) == ET_EXEC =>
            {
                Self::Multiboot(header)
            }
            _ => refuse(format_args!("not a 32-bit x86 ELF program")),
        }
    }
}

/// Loads the guest, and for Linux its initramfs; nothing of it lies where something else does.
pub(crate) fn load(
    machine: &Machine,
    loader: &Loader,
    module: &Module,
    initrd: Option<&Module>,
) -> Entry {
    match Kernel::of(module.bytes) {
        Kernel::Multiboot(_) if initrd.is_some() => {
            refuse(format_args!("only Linux takes an initramfs, the module that is no ROM"))
        }
        Kernel::Multiboot(header) => {
            let entry = load_segments(machine, module.bytes, header);
            store_information(machine, loader, module.line);
            Entry { eip: entry, eax: LOADER_MAGIC, ebx: INFORMATION, ..Entry::default() }
        }
        Kernel::Linux(kernel) => {
            let initrd = initrd.map_or(&[][..], |module| module.bytes);
            load_linux(machine, loader, &kernel, arguments(module.line), initrd)
        }
    }
}

/// A module's line without its first word, the file's name.
fn arguments(line: &str) -> &str {
    line.split_once(' ').map_or("", |(_, arguments)| arguments)
}

/// Loads a kernel, its initramfs and its parameters.
fn load_linux(
    machine: &Machine,
    loader: &Loader,
    kernel: &linux::Kernel<'_>,
    line: &str,
    initrd: &[u8],
) -> Entry {
    let refuse_by = |error: linux::Error| -> ! { refuse(format_args!("{error}")) };
    let free = ranges_of_guest(loader)
        .filter(|range| range.kind == USABLE)
        .map(|range| range.start..range.end());
    let placement =
        kernel.place(free, initrd.len() as u64).unwrap_or_else(|error| refuse_by(error));
    let map = ranges_of_guest(loader).map(|range| (range.start..range.end(), range.kind));
    let page = kernel
        .parameters(&placement, line, LINUX_LINE, map)
        .unwrap_or_else(|error| refuse_by(error));
    if line.len() >= (LINUX_LINE_END - LINUX_LINE) as usize {
        refuse_by(linux::Error::LongLine(LINUX_LINE_END - LINUX_LINE - 1));
    }
    let low = u64::from(LINUX_LINE_END - PARAMETERS);
    if !machine.is_memory(PARAMETERS.into(), low) {
        refuse(format_args!("{PARAMETERS:#x}, where its parameters go, is not memory"));
    }
    machine.clear(PARAMETERS.into(), low);
    machine.store(PARAMETERS.into(), &page);
    for (descriptor, address) in DESCRIPTORS.iter().zip((u64::from(TABLE)..).step_by(8)) {
        machine.store(address, &descriptor.to_le_bytes());
    }
    machine.store(LINUX_LINE.into(), line.as_bytes());
    machine.store(placement.kernel.into(), kernel.system);
    if !initrd.is_empty() {
        machine.store(placement.initrd.start.into(), initrd);
    }
    Entry {
        eip: placement.kernel,
        esi: PARAMETERS,
        table: Some(Table {
            base: TABLE,
            limit: size_of_val(&DESCRIPTORS) as u16 - 1,
            code: 0x10,
            data: 0x18,
        }),
        ..Entry::default()
    }
}

/// The memory map without the hypervisor's own memory, which is reserved.
fn ranges_of_guest(loader: &Loader) -> impl Iterator<Item = Range> + Clone {
    loader.memory_map().flat_map(|range| {
        let part = |start: u64, end: u64, kind: u32| Range {
            size: Range::SIZE,
            start,
            length: end.saturating_sub(start),
            kind,
        };
        let parts = if range.kind == USABLE && range.start < OWN.end && OWN.start < range.end() {
            [
                part(range.start, OWN.start, USABLE),
                part(OWN.start, OWN.end, RESERVED),
                part(OWN.end, range.end(), USABLE),
            ]
        } else {
            [range, Range::default(), Range::default()]
        };
        parts.into_iter().filter(|range| range.length != 0)
    })
}

/// Loads each segment to its physical address; the physical address of the entry.
fn load_segments(machine: &Machine, file: &[u8], header: &FileHeader32<Endianness>) -> u32 {
    let endian = Endianness::Little;
    let Ok(segments) = header.program_headers(endian, file) else {
        refuse(format_args!("its program headers are not in the file"))
    };
    let information = u64::from(INFORMATION)..u64::from(INFORMATION) + INFORMATION_SIZE as u64;
    let virtual_entry = header.e_entry(endian);
    let mut entry = None;
    for segment in segments.iter().filter(|segment| segment.p_type(endian) == PT_LOAD) {
        let (start, size) =
            (u64::from(segment.p_paddr(endian)), u64::from(segment.p_memsz(endian)));
        let Ok(bytes) = segment.data(endian, file) else {
            refuse(format_args!("the segment at {start:#x} is not in the file"))
        };
        if bytes.len() as u64 > size {
            refuse(format_args!("the segment at {start:#x} has more bytes than memory"));
        }
        if size == 0 {
            continue;
        }
        if !machine.is_memory(start, size) {
            refuse(format_args!(
                "the segment at {start:#x} to {:#x} does not fit the guest's memory; {:#x} to {:#x} are the hypervisor's",
                start + size,
                OWN.start,
                OWN.end
            ));
        }
        if start < information.end && information.start < start + size {
            refuse(format_args!(
                "the segment at {start:#x} to {:#x} covers {INFORMATION:#x}, where the boot information goes",
                start + size
            ));
        }
        machine.store(start, bytes);
        machine.clear(start + bytes.len() as u64, size - bytes.len() as u64);
        let offset = virtual_entry.wrapping_sub(segment.p_vaddr(endian));
        if u64::from(offset) < size {
            entry = Some(segment.p_paddr(endian) + offset);
        }
    }
    entry.unwrap_or_else(|| refuse(format_args!("its entry {virtual_entry:#x} is in no segment")))
}

/// Tells the guest of its memory and its command line.
fn store_information(machine: &Machine, loader: &Loader, line: &str) {
    let mut page = [0; INFORMATION_SIZE];
    if LINE_OFFSET + line.len() >= INFORMATION_SIZE {
        refuse(format_args!(
            "its command line is longer than {}",
            INFORMATION_SIZE - LINE_OFFSET - 1
        ));
    }
    page[LINE_OFFSET..LINE_OFFSET + line.len()].copy_from_slice(line.as_bytes());

    let mut count = 0;
    let mut add = |range: Range| {
        if count == MAP_RANGES {
            refuse(format_args!("the memory map has more than {MAP_RANGES} ranges"));
        }
        let start = MAP_OFFSET + count * size_of::<Range>();
        let Range { start: first, length, kind, .. } = range;
        page[start..start + 4].copy_from_slice(&Range::SIZE.to_le_bytes());
        page[start + 4..start + 12].copy_from_slice(&first.to_le_bytes());
        page[start + 12..start + 20].copy_from_slice(&length.to_le_bytes());
        page[start + 20..start + 24].copy_from_slice(&kind.to_le_bytes());
        count += 1;
    };
    ranges_of_guest(loader).for_each(&mut add);
    let of_loader = loader.information;
    let below = ((OWN.start - (1 << 20)) >> 10) as u32;
    let information = [
        (of_loader.flags & HAS_MEMORY) | HAS_COMMAND_LINE | HAS_MEMORY_MAP,
        of_loader.memory_lower,
        of_loader.memory_upper.min(below),
        of_loader.boot_device,
        INFORMATION + LINE_OFFSET as u32,
        0,
        0,
        0,
        0,
        0,
        0,
        (count * size_of::<Range>()) as u32,
        INFORMATION + MAP_OFFSET as u32,
    ];
    for (bytes, word) in page.chunks_exact_mut(4).zip(information) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    const { assert!(size_of::<Information>() == 13 * size_of::<u32>()) };
    if !machine.is_memory(INFORMATION.into(), INFORMATION_SIZE as u64) {
        refuse(format_args!("{INFORMATION:#x}, where the boot information goes, is not memory"));
    }
    machine.store(INFORMATION.into(), &page);
}
