//! From the boot loader to Rust.
//!
//! A multiboot loader starts `boot` in 32-bit protected mode without paging. Four-megabyte pages
//! map the first 16 MiB at 0 and at C0000000h until [`crate::paging`] builds the real tables.
//!
//! Where a hypervisor starts kernels itself, `vmi_entry` comes first: see `docs/vmi-entry.md`.

#![expect(unsafe_code, reason = "UNSAFETY: `global_asm!`")]

use core::arch::global_asm;
use x86::controlregs::{Cr0, Cr4};

/// Where the kernel sees physical address 0.
pub(crate) const PAGE_OFFSET: u32 = 0xc000_0000;

/// Multiboot specification 0.6.96, section 3.1.1.
const MULTIBOOT_MAGIC: u32 = 0x1bad_b002;

/// A 4 MiB page: present, writable.
const LARGE_PAGE: u32 = 0x83;

/// Bytes of the kernel's stack.
const STACK_SIZE: usize = 64 * 1024;

global_asm!(
    ".pushsection .multiboot, \"ax\", @progbits",
    ".balign 4",
    ".long {magic}, 0, -{magic}",

    // In: paging off, flat segments, interrupts off, EAX and EBX from the loader. Every address is
    // physical until paging is on.
    ".globl boot",
    "boot:",
    "mov esi, eax",
    "mov edi, offset boot_directory - {page_offset}",
    "mov eax, {large_page}",
    "mov ecx, 4",
    "2: mov [edi], eax",
    "mov [edi + {high_entries}], eax",
    "add edi, 4",
    "add eax, 0x400000",
    "loop 2b",
    "mov eax, cr4",
    "or eax, {pse}",
    "mov cr4, eax",
    "mov eax, offset boot_directory - {page_offset}",
    "mov cr3, eax",
    "mov eax, cr0",
    "or eax, {paging}",
    "mov cr0, eax",
    "mov eax, offset boot_high",
    "jmp eax",
    "boot_high:",
    "mov esp, offset boot_stack + {stack_size}",
    "xor ebp, ebp",
    "push ebx",
    "push esi",
    "call {command_line}",
    "call {start}",
    "ud2",
    ".popsection",

    ".pushsection .note.vmi, \"a\", @note",
    ".balign 4",
    // Bytes of the name, bytes of the text, the type, the name, the text.
    ".long 4, 4, {note_type}",
    ".asciz \"VMI\"",
    ".long vmi_entry",
    ".popsection",

    // In: paging on, flat segments, interrupts off, EAX and EBX as the VMI entry says.
    ".pushsection .text.vmi_entry, \"ax\", @progbits",
    "vmi_entry:",
    "mov esp, offset boot_stack + {stack_size}",
    "xor ebp, ebp",
    "push ebx",
    "push eax",
    "call {command_line}",
    "call {start_hosted}",
    "ud2",
    ".popsection",

    ".pushsection .bss.boot, \"aw\", @nobits",
    ".balign 4096",
    "boot_directory: .skip 4096",
    "boot_stack: .skip {stack_size}",
    ".popsection",
    magic = const MULTIBOOT_MAGIC,
    page_offset = const PAGE_OFFSET,
    large_page = const LARGE_PAGE,
    high_entries = const (PAGE_OFFSET >> 22) * 4,
    pse = const Cr4::CR4_ENABLE_PSE.bits(),
    paging = const (Cr0::CR0_ENABLE_PAGING.bits() | Cr0::CR0_WRITE_PROTECT.bits()),
    stack_size = const STACK_SIZE,
    command_line = sym crate::command_line::initialize,
    start = sym crate::suite::main,
    start_hosted = sym crate::suite::main_on_a_host,
    note_type = const vmi_abi::entry::NOTE_ENTRY,
);

#[panic_handler]
fn panic(information: &core::panic::PanicInfo<'_>) -> ! {
    crate::report::abandon(format_args!("the guest itself panicked: {information}"))
}
