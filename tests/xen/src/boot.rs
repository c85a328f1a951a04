//! From Xen to Rust.

#![expect(unsafe_code, reason = "UNSAFETY: `global_asm!`, and what Xen leaves in memory")]

use crate::console::line;
use crate::memory::{Memory, PAGE_OFFSET};
use crate::{guest, hypercall, place};
use core::arch::global_asm;
use vmi_hv_backend::xen::interface::{StartInfo, VIRTUAL_TOP};

/// Bytes of the loader's stack.
const STACK_SIZE: usize = 32 * 1024;

/// Types of Xen's notes in an ELF file.
const ENTRY: u32 = 1;
const VIRT_BASE: u32 = 3;
const PADDR_OFFSET: u32 = 4;
const XEN_VERSION: u32 = 5;
const GUEST_OS: u32 = 6;
const LOADER: u32 = 8;
const PAE_MODE: u32 = 9;
const HV_START_LOW: u32 = 12;

global_asm!(
    // A note: bytes of the name, bytes of the text, type, name, text. Both are filled up to words.
    ".macro number type, value",
    ".long 4, 4, \\type",
    ".asciz \"Xen\"",
    ".long \\value",
    ".endm",
    ".macro text type, value",
    ".long 4, 3f - 2f, \\type",
    ".asciz \"Xen\"",
    "2: .asciz \"\\value\"",
    "3: .balign 4",
    ".endm",
    ".pushsection .note.xen, \"a\", @note",
    ".balign 4",
    "number {entry}, start",
    "number {virt_base}, {page_offset}",
    "number {paddr_offset}, 0",
    "number {hv_start_low}, {virtual_top}",
    "text {xen_version}, xen-3.0",
    "text {guest_os}, vmi",
    "text {loader}, generic",
    "text {pae_mode}, yes",
    ".popsection",

    // In: ring 1, flat segments, paging on, no events, ESI the linear address of the start information.
    ".pushsection .text.start, \"ax\", @progbits",
    ".globl start",
    "start:",
    "cld",
    "mov esp, offset loader_stack + {stack_size}",
    "xor ebp, ebp",
    "push esi",
    "call {main}",
    "ud2",
    ".popsection",

    ".pushsection .bss.stack, \"aw\", @nobits",
    ".balign 16",
    "loader_stack: .skip {stack_size}",
    ".popsection",
    entry = const ENTRY,
    virt_base = const VIRT_BASE,
    paddr_offset = const PADDR_OFFSET,
    hv_start_low = const HV_START_LOW,
    xen_version = const XEN_VERSION,
    guest_os = const GUEST_OS,
    loader = const LOADER,
    pae_mode = const PAE_MODE,
    page_offset = const PAGE_OFFSET,
    virtual_top = const VIRTUAL_TOP,
    stack_size = const STACK_SIZE,
    main = sym main,
);

extern "C" fn main(start: *const StartInfo) -> ! {
    // SAFETY: Xen has left it there, and nobody changes it.
    let start = unsafe { &*start };
    hypercall::grant_ports();
    let mut memory = Memory::of(start);
    line!("{} pages, {} of them mapped", memory.pages(), memory.mapped());
    place::place(&mut memory, start);
    guest::enter(&mut memory, start)
}

#[panic_handler]
fn panic(information: &core::panic::PanicInfo<'_>) -> ! {
    line!("{information}");
    hypercall::crash()
}

/// Ends: what Xen, the ROM or the guest's file has will not do.
macro_rules! refuse {
    ($($argument:tt)*) => {{
        $crate::console::line!($($argument)*);
        $crate::hypercall::crash()
    }};
}
pub(crate) use refuse;
