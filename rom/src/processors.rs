//! What decides at POST whether call sites may be rewritten, and how.
//!
//! A site is rewritten by one instruction, CMPXCHG8B, which the earliest processors do not have.
//! Where a site lies in two aligned words, only a machine with one processor lets nobody see it half
//! changed. The MultiProcessor Specification's table lists the processors, of each package the first
//! (SeaBIOS) or all, and CPUID tells whether a package may hold more. Firmware without the table
//! leaves the question open, and then only sites within one word are rewritten. An emulator may even
//! read a word in pieces (QEMU does, with several host threads): there, one byte is changed at a time.

#![expect(unsafe_code, reason = "UNSAFETY: `global_asm!` with symbols")]

use core::arch::global_asm;
use vmi_native_backend::binding::SiteRule;
use x86::bits32::eflags::EFlags;

/// What the 16-bit entry does besides saying who is there.
macro_rules! look_at_the_machine {
    () => {
        "callw set_site_rule"
    };
}

/// CPUID leaf 1, EDX: CMPXCHG8B.
const HAS_CMPXCHG8B: u16 = 1 << 8;

/// CPUID leaf 1, ECX: a hypervisor's processor, which may be an emulator's.
const HYPERVISOR: u32 = 1 << 31;

/// CPUID leaf 1, EDX: the third byte of EBX says how many processors a package may hold.
const HAS_PACKAGE_COUNT: u32 = 1 << 28;

/// The segment in which firmware keeps its tables, and the first address that it covers.
const FIRMWARE_SEGMENT: u16 = 0xf000;
const FIRMWARE_BASE: u32 = 0xf_0000;

/// The MP floating pointer structure: signature, size, and offsets of the table's address and of
/// the byte that says that there is no table, but one of the usual machines with two processors.
const POINTER_SIGNATURE: u32 = u32::from_le_bytes(*b"_MP_");
const POINTER_SIZE: u16 = 16;
const TABLE_ADDRESS: u16 = 4;
const USUAL_MACHINE: u16 = 11;

/// The MP configuration table: signature, offset of the number of entries, and where they start.
/// Those of processors come first. One that is there but not enabled counts: it may be, later.
const TABLE_SIGNATURE: u32 = u32::from_le_bytes(*b"PCMP");
const ENTRY_COUNT: u16 = 34;
const ENTRIES: u16 = 44;
const PROCESSOR: u8 = 0;
const PROCESSOR_SIZE: u16 = 20;

global_asm!(
    ".pushsection .rom.entry, \"ax\", @progbits",
    ".code16",

    // Sets the rule, and the byte behind it so that their sum stays the same.
    // In: DS = CS = segment of the image, DF = 0. Changes EAX, EBX, ECX, EDX, SI, flags.
    "set_site_rule:",
    "pushw %es",
    "movb ${never}, %bl",

    // CPUID is there if its flag can be changed.
    "pushfl",
    "popl %eax",
    "movl %eax, %ecx",
    "xorl ${identification}, %eax",
    "pushl %eax",
    "popfl",
    "pushfl",
    "popl %eax",
    "pushl %ecx",
    "popfl",
    "xorl %ecx, %eax",
    "testl ${identification}, %eax",
    "jz 9f",
    "movl $1, %eax",
    "cpuid",
    "shrl $16, %ebx",
    "movb %bl, %bh",
    "movb ${never}, %bl",
    "testw ${has_cmpxchg8b}, %dx",
    "jz 9f",
    "movb ${one_byte}, %bl",
    "testl ${hypervisor}, %ecx",
    "jnz 1f",
    "movb ${in_a_word}, %bl",
    "1:",
    "testl ${has_package_count}, %edx",
    "jz 1f",
    "cmpb $1, %bh",
    "ja 9f",
    "1:",

    // The floating pointer lies on a multiple of its size; its bytes add up to zero.
    "movw ${firmware_segment}, %ax",
    "movw %ax, %es",
    "xorw %si, %si",
    "2: cmpl ${pointer_signature}, %es:(%si)",
    "je 4f",
    "3: addw ${pointer_size}, %si",
    "jnz 2b",
    "jmp 9f",
    "4: movw ${pointer_size}, %cx",
    "xorb %al, %al",
    "5: addb %es:(%si), %al",
    "incw %si",
    "loop 5b",
    "subw ${pointer_size}, %si",
    "testb %al, %al",
    "jnz 3b",

    "cmpb $0, %es:{usual_machine}(%si)",
    "jne 9f",
    "movl %es:{table_address}(%si), %eax",
    "subl ${firmware_base}, %eax",
    "cmpl $0x10000 - {entries} - {processor_size}, %eax",
    "ja 9f",
    "movw %ax, %si",
    "cmpl ${table_signature}, %es:(%si)",
    "jne 9f",
    "movw %es:{entry_count}(%si), %cx",
    "xorw %ax, %ax",
    "addw ${entries}, %si",
    "6: jcxz 7f",
    "cmpb ${processor}, %es:(%si)",
    "jne 7f",
    "incw %ax",
    "addw ${processor_size}, %si",
    "loop 6b",
    "7: cmpw $1, %ax",
    "jne 9f",
    "movb ${anywhere}, %bl",

    // The bytes lie somewhere else in the image: a distance says where.
    "9: callw 8f",
    ".word site_rule - .",
    "8: popw %si",
    "addw (%si), %si",
    "movb (%si), %al",
    "subb %bl, %al",
    "addb %al, 1(%si)",
    "movb %bl, (%si)",
    "popw %es",
    "retw",

    ".code32",
    ".popsection",
    never = const SiteRule::Never as u8,
    one_byte = const SiteRule::OneByte as u8,
    in_a_word = const SiteRule::InAWord as u8,
    hypervisor = const HYPERVISOR,
    anywhere = const SiteRule::Anywhere as u8,
    identification = const EFlags::FLAGS_ID.bits(),
    has_cmpxchg8b = const HAS_CMPXCHG8B,
    has_package_count = const HAS_PACKAGE_COUNT,
    firmware_segment = const FIRMWARE_SEGMENT,
    firmware_base = const FIRMWARE_BASE,
    pointer_signature = const POINTER_SIGNATURE,
    pointer_size = const POINTER_SIZE,
    table_address = const TABLE_ADDRESS,
    usual_machine = const USUAL_MACHINE,
    table_signature = const TABLE_SIGNATURE,
    entry_count = const ENTRY_COUNT,
    entries = const ENTRIES,
    processor = const PROCESSOR,
    processor_size = const PROCESSOR_SIZE,
    options(att_syntax),
);
