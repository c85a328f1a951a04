//! The code that the BIOS runs at POST.
//!
//! It says who is there, on the screen and on the debug port, and leaves. The native image needs no
//! memory, so it allocates none. What an image that rewrites call sites must know of the machine is
//! found out here too, and written into the image while its memory can still be written.

#![expect(unsafe_code, reason = "UNSAFETY: `global_asm!` with symbols")]

use crate::REVISION;
use core::arch::global_asm;

/// The debug console of Bochs and of QEMU's `-debugcon`. Reading it answers its own number.
const DEBUG_PORT: u16 = 0xe9;

/// Where SeaBIOS writes its own log; reading it answers [`DEBUG_PORT`]'s number too.
const SEABIOS_DEBUG_PORT: u16 = 0x402;

/// BIOS video service: write a character as a terminal does.
const TELETYPE: u8 = 0x0e;

/// What else there is to do at POST, with DS = CS. May change every general register.
#[cfg(not(feature = "rewrite-sites"))]
macro_rules! look_at_the_machine {
    () => {
        ""
    };
}

global_asm!(
    ".pushsection .rom.entry, \"ax\", @progbits",
    ".code16",

    // The BIOS's far call. In: CS = segment of the image, a stack. Out: AX = 0, no device to boot
    // from. Changes nothing else but flags.
    "post_entry:",
    "pushal",
    "pushw %ds",
    "pushw %cs",
    "popw %ds",
    "cld",
    look_at_the_machine!(),
    "callw put_string",
    concat!(".ascii \"VMI ROM ", env!("CARGO_PKG_VERSION"), ": interface \""),
    ".if {major_tens}",
    ".byte 0x30 + {major_tens}",
    ".endif",
    ".byte 0x30 + {major_ones}, 0x2e, 0x30 + {minor}", // A dot between.
    concat!(".asciz \", ", backends!(), ", at \""),

    // The address: CS in hexadecimal, and a zero for the four bits that a segment leaves out.
    "movw %cs, %bp",
    "movw $4, %cx",
    "1: rolw $4, %bp",
    "movw %bp, %ax",
    "andb $0x0f, %al",
    "cmpb $10, %al",
    "sbbb $0x69, %al", // With DAS: 0 to 9 become '0' to '9', 10 to 15 'A' to 'F'.
    "das",
    "callw put_character",
    "loop 1b",
    "callw put_string",
    ".asciz \"0h\\r\\n\"",

    "popw %ds",
    "popal",
    "xorw %ax, %ax",
    "lretw",

    // Writes the NUL-ended string that follows the call, and returns behind it.
    // In: DS = CS, DF = 0. Changes AX, BX, DX, SI, flags.
    "put_string:",
    "popw %si",
    "2: lodsb",
    "testb %al, %al",
    "jz 3f",
    "callw put_character",
    "jmp 2b",
    "3: jmpw *%si",

    // Writes a character to the screen and to the debug ports that are there.
    // In: AL. Changes AH, BX, DX, flags.
    "put_character:",
    "pushaw",
    "movb ${teletype}, %ah",
    "movw $7, %bx", // Page 0, light grey.
    "int $0x10",
    "popaw",
    "movw ${debug_port}, %dx",
    "callw put_debug",
    "movw ${seabios_port}, %dx",

    // Writes a character to a debug port if reading it says that it is one.
    // In: AL, DX. Changes AH, flags.
    "put_debug:",
    "movb %al, %ah",
    "inb %dx, %al",
    "cmpb ${debug_port}, %al",
    "movb %ah, %al",
    "jne 6f",
    "outb %al, %dx",
    "6: retw",

    ".code32",
    ".popsection",
    major_tens = const REVISION.major / 10,
    major_ones = const REVISION.major % 10,
    minor = const REVISION.minor,
    teletype = const TELETYPE,
    debug_port = const DEBUG_PORT,
    seabios_port = const SEABIOS_DEBUG_PORT,
    options(att_syntax),
);
