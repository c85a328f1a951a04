//! The kernel's file, its boot information, its first instruction: `docs/vmi-entry.md`.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: reads what Xen has put into memory, and jumps into the kernel"
)]

use crate::boot::refuse;
use crate::console::line;
use crate::elf::{Program, Segment};
use crate::memory::{Memory, PAGE_OFFSET};
use core::arch::asm;
use core::ffi::CStr;
use vmi_abi::entry::{MAGIC, NOTE_ENTRY, NOTE_NAME};
use vmi_hv_backend::xen::interface::{PAGE_SHIFT, StartInfo};

/// Where the guest finds the boot information, a page; the guest's first stack ends there.
const INFORMATION: u32 = 0x9000;

/// In that page, behind the information itself: the memory map, the command line.
const MAP: usize = 128;
const LINE: usize = 512;
const PAGE: usize = 4096;

/// Multiboot specification 0.6.96, section 3.3: the flags, and the fields that are filled in, by their words.
const HAS_MEMORY: u32 = 1 << 0;
const HAS_COMMAND_LINE: u32 = 1 << 2;
const HAS_MEMORY_MAP: u32 = 1 << 6;
const MEMORY_LOWER: usize = 1;
const MEMORY_UPPER: usize = 2;
const COMMAND_LINE: usize = 4;
const MAP_LENGTH: usize = 11;
const MAP_ADDRESS: usize = 12;

/// Kinds of memory.
const USABLE: u32 = 1;
const RESERVED: u32 = 2;

/// Where a PC's memory has its first hole, and where that ends.
const LOW_END: u32 = 0x9_f000;
const HIGH: u32 = 0x10_0000;

/// Loads the kernel and enters it.
pub(crate) fn enter(memory: &mut Memory, start: &StartInfo) -> ! {
    if start.mod_len == 0 {
        refuse!("no kernel: it is the first module behind the loader");
    }
    // SAFETY: Xen has mapped the module there.
    let file = unsafe {
        core::slice::from_raw_parts(start.mod_start as *const u8, start.mod_len as usize)
    };
    let entry = load(memory, file);
    let line = CStr::from_bytes_until_nul(&start.cmd_line).unwrap_or_default().to_bytes();
    store_information(memory, line);
    line!("the kernel begins at {entry:#x}");
    // SAFETY: the kernel's own promise; nothing of the loader's is used from here on.
    unsafe {
        asm!(
            "mov esp, {stack}",
            "push {entry}",
            "xor ecx, ecx",
            "mov fs, ecx",
            "mov gs, ecx",
            "cld",
            "mov ebx, {information}",
            "ret",
            stack = in(reg) PAGE_OFFSET + INFORMATION,
            entry = in(reg) entry,
            information = const INFORMATION,
            in("eax") MAGIC,
            options(noreturn),
        )
    }
}

/// Loads each segment to its physical address; the linear address of the VMI entry.
fn load(memory: &mut Memory, file: &[u8]) -> u32 {
    let Some(program) = Program::of(file) else {
        refuse!("the kernel is no ELF program for 32-bit x86")
    };
    let free = memory.free();
    for Segment { bytes, physical: start, size, .. } in program.loaded() {
        let fits = start.checked_add(size).is_some_and(|end| end <= free.end);
        if start < free.start || !fits || bytes.len() > size as usize {
            refuse!(
                "the segment at {start:#x}, {size:#x} bytes, is not within {:#x} to {:#x}",
                free.start,
                free.end
            );
        }
        memory.store(start, bytes);
        memory.fill(start + bytes.len() as u32..start + size, 0);
    }
    match program.note(NOTE_NAME, NOTE_ENTRY).and_then(<[u8]>::first_chunk) {
        Some(entry) => u32::from_le_bytes(*entry),
        None => refuse!("the kernel has no VMI entry"),
    }
}

/// Tells the guest of its memory and its command line.
fn store_information(memory: &mut Memory, line: &[u8]) {
    let mut page = [0; PAGE];
    if LINE + line.len() >= PAGE {
        refuse!("the command line is longer than {}", PAGE - LINE - 1);
    }
    page[LINE..LINE + line.len()].copy_from_slice(line);
    let own = memory.own();
    let end = memory.pages() << PAGE_SHIFT;
    let ranges = [
        (0..LOW_END, USABLE),
        (LOW_END..HIGH, RESERVED),
        (HIGH..own.start, USABLE),
        (own.clone(), RESERVED),
        (own.end..end, USABLE),
    ];
    let mut length = 0;
    for (range, kind) in ranges.into_iter().filter(|(range, _)| !range.is_empty()) {
        // What follows the first word, the start, the bytes, the kind.
        let words = [20, range.start, 0, range.end - range.start, 0, kind];
        for word in words {
            page[MAP + length..MAP + length + 4].copy_from_slice(&word.to_le_bytes());
            length += 4;
        }
    }
    let mut set = |index: usize, word: u32| {
        page[index * 4..index * 4 + 4].copy_from_slice(&word.to_le_bytes());
    };
    set(0, HAS_MEMORY | HAS_COMMAND_LINE | HAS_MEMORY_MAP);
    set(MEMORY_LOWER, LOW_END >> 10);
    set(MEMORY_UPPER, (own.start - HIGH) >> 10);
    set(COMMAND_LINE, INFORMATION + LINE as u32);
    set(MAP_LENGTH, length as u32);
    set(MAP_ADDRESS, INFORMATION + MAP as u32);
    memory.store(INFORMATION, &page);
}
