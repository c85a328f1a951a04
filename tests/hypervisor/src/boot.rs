//! From the boot loader to Rust.
//!
//! A multiboot loader starts `boot` in 32-bit protected mode without paging. It maps the first 4 GiB as they are, in pages of
//! 2 MiB, switches to long mode and calls [`crate::main`].

#![expect(unsafe_code, reason = "UNSAFETY: `global_asm!`, symbols of the linker")]

use crate::report::Ending;
use core::arch::global_asm;
use x86::controlregs::{Cr0, Cr4};
use x86::msr::IA32_EFER;

/// Multiboot specification 0.6.96, section 3.1.1.
const HEADER_MAGIC: u32 = 0x1bad_b002;

/// Flags of the header: modules on page boundaries, a memory map is wanted, the header has addresses. Loaders take a 64-bit
/// program only by the last: as a flat file.
const HEADER_FLAGS: u32 = 1 << 0 | 1 << 1 | 1 << 16;

/// Bytes of the hypervisor's stack.
const STACK_SIZE: usize = 256 << 10;

/// EFER: long mode, no-execute.
pub(crate) const LONG_MODE_ENABLE: u32 = 1 << 8;
pub(crate) const NO_EXECUTE_ENABLE: u32 = 1 << 11;

/// CPUID leaf 80000001h, EDX.
const CPUID_LONG_MODE: u32 = 1 << 29;

/// A present, writable table; a page of 2 MiB.
const TABLE: u32 = 0x3;
const LARGE_PAGE: u32 = 0x83;

/// Selectors of the descriptor table below.
pub(crate) const CODE: u16 = 8;
const DATA: u16 = 16;
pub(crate) const TASK: u16 = 24;

global_asm!(
    ".pushsection .multiboot, \"ax\", @progbits",
    ".balign 4",
    "boot_header:",
    ".long {magic}, {flags}, -({magic} + {flags})",
    ".long boot_header, hypervisor_start, hypervisor_loaded, hypervisor_end, boot",

    // In: paging off, flat segments, interrupts off, EAX and EBX from the loader.
    ".code32",
    ".globl boot",
    "boot:",
    "cld",
    "mov esp, offset boot_stack + {stack_size}",
    "mov [boot_magic], eax",
    "mov [boot_information], ebx",
    "mov eax, cr0",
    "mov [boot_cr0], eax",
    "mov eax, 0x80000001",
    "cpuid",
    "test edx, {cpuid_long_mode}",
    "jnz 2f",
    "mov al, {unfit}",
    "out {exit_port}, al",
    "1: hlt",
    "jmp 1b",
    // Four directories of 512 pages each, behind each other.
    "2: mov edi, offset boot_directories",
    "mov eax, {large_page}",
    "mov ecx, 2048",
    "3: mov [edi], eax",
    "mov dword ptr [edi + 4], 0",
    "add edi, 8",
    "add eax, 0x200000",
    "dec ecx",
    "jnz 3b",
    "mov edi, offset boot_pointers",
    "mov eax, offset boot_directories + {table}",
    "mov ecx, 4",
    "4: mov [edi], eax",
    "add edi, 8",
    "add eax, 4096",
    "dec ecx",
    "jnz 4b",
    "mov dword ptr [boot_root], offset boot_pointers + {table}",
    "mov eax, {cr4}",
    "mov cr4, eax",
    "mov eax, offset boot_root",
    "mov cr3, eax",
    "mov ecx, {efer}",
    "rdmsr",
    "or eax, {efer_bits}",
    "wrmsr",
    "mov eax, {cr0}",
    "mov cr0, eax",
    "lgdt [boot_descriptors_pointer]",
    "mov eax, offset boot_long",
    "push {code}",
    "push eax",
    "retf",
    ".code64",
    "boot_long:",
    "mov eax, {data}",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov rsp, offset boot_stack + {stack_size}",
    "xor ebp, ebp",
    "mov edi, [boot_magic]",
    "mov esi, [boot_information]",
    "mov edx, [boot_cr0]",
    "call {main}",
    "ud2",
    ".popsection",

    ".pushsection .data.boot, \"aw\", @progbits",
    ".balign 8",
    ".globl boot_descriptors",
    "boot_descriptors:",
    ".quad 0",
    ".quad 0x00af9b000000ffff", // 64-bit code
    ".quad 0x00cf93000000ffff", // flat data
    ".quad 0, 0",               // the task, which Rust fills in
    "boot_descriptors_end:",
    "boot_descriptors_pointer:",
    ".short boot_descriptors_end - boot_descriptors - 1",
    ".long boot_descriptors, 0",
    "boot_magic: .long 0",
    "boot_information: .long 0",
    "boot_cr0: .long 0",
    ".popsection",

    ".pushsection .bss.boot, \"aw\", @nobits",
    ".balign 4096",
    "boot_root: .skip 4096",
    "boot_pointers: .skip 4096",
    "boot_directories: .skip 4 * 4096",
    "boot_stack: .skip {stack_size}",
    ".popsection",
    magic = const HEADER_MAGIC,
    flags = const HEADER_FLAGS,
    stack_size = const STACK_SIZE,
    cpuid_long_mode = const CPUID_LONG_MODE,
    unfit = const Ending::UnfitMachine as u8,
    exit_port = const crate::report::EXIT_PORT as u8,
    large_page = const LARGE_PAGE,
    table = const TABLE,
    cr4 = const Cr4::CR4_ENABLE_PAE.bits(),
    efer = const IA32_EFER,
    efer_bits = const LONG_MODE_ENABLE | NO_EXECUTE_ENABLE,
    cr0 = const (Cr0::CR0_PROTECTED_MODE.bits()
        | Cr0::CR0_EXTENSION_TYPE.bits()
        | Cr0::CR0_NUMERIC_ERROR.bits()
        | Cr0::CR0_WRITE_PROTECT.bits()
        | Cr0::CR0_ENABLE_PAGING.bits()),
    code = const CODE,
    data = const DATA,
    main = sym crate::main,
);

unsafe extern "C" {
    static hypervisor_end: u8;
}

/// Where the hypervisor's own image ends.
pub(crate) fn end_of_image() -> u64 {
    (&raw const hypervisor_end) as u64
}
