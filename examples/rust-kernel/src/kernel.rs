//! A kernel that uses the platform's VMI ROM where there is one of revision 3.0, and otherwise the native
//! calls that are linked into it.
//!
//! Two processes in address spaces of their own share the processor by a timer's ticks. Here are the start and
//! the choice of a ROM; `tables` has segments and interrupts, and how an interrupt ends by VMI's IRET;
//! `memory` the page tables; `process` the switch and the system call; `devices` the ports.
//!
//! No instruction of the kernel is privileged: whatever needs ring 0 is a call of [`VMI`]. Even the start gets by
//! without, since a multiboot loader leaves the processor in protected mode, in flat segments, without
//! paging, interrupts disabled.

#![expect(unsafe_code, reason = "UNSAFETY: assembly, the loader's structures, and a ROM's code")]

mod devices;
mod memory;
mod process;
mod tables;

use core::arch::global_asm;
use core::ffi::{CStr, c_char};
use core::sync::atomic::{AtomicBool, Ordering};
use devices::line;
use vmi_abi::probe::SCAN_AREA;
use vmi_abi::vmi::{Calls, Rom, Unusable};
use vmi_abi::{REVISION_3_0, RomHeader, for_each_call, native_calls, number};

/// The calls, once [`main`] has bound them.
static VMI: Calls = Calls::new();

/// Multiboot specification 0.6.96, section 3.1.1.
const MULTIBOOT_MAGIC: u32 = 0x1bad_b002;

global_asm!(
    ".pushsection .multiboot, \"ax\", @progbits",
    ".balign 4",
    ".long {magic}, 0, -{magic}",
    // In: EBX = what the loader has to say.
    ".globl boot",
    "boot: mov esp, offset boot_stack",
    "cld",
    "push ebx",
    "call {main}",
    ".popsection",
    ".pushsection .bss.boot, \"aw\", @nobits",
    ".balign 16",
    ".skip 16384",
    "boot_stack:",
    ".popsection",
    magic = const MULTIBOOT_MAGIC,
    main = sym main,
);

// Defines `native_call`: the kernel's own code for a call that a ROM leaves to it.
for_each_call!(native_calls);

unsafe extern "C" {
    static vmi_native_rom: RomHeader;
}

/// Prepares a ROM and binds its calls.
fn bind(rom: &Rom<'_>) -> Result<(), Unusable> {
    // SAFETY: ring 0, flat segments, interrupts disabled. Memory is seen at its physical addresses, and still
    // is when there are page tables, so the ROM stays where it is. What the platform trusts we trust.
    unsafe {
        rom.initialize()?;
        VMI.bind(|number| rom.relocation(number), native_call)
    }
}

/// The platform's ROM, if there is one that can be used.
fn platform() -> Option<Rom<'static>> {
    let (start, length) = (SCAN_AREA.start as *const u8, SCAN_AREA.len());
    // SAFETY: memory to which nobody writes, or none, which reads as ones.
    let area = unsafe { core::slice::from_raw_parts(start, length) };
    Rom::find(area, REVISION_3_0).filter(|rom| bind(rom).is_ok())
}

/// The native calls that are linked in: a ROM like the other.
fn linked_in() -> Rom<'static> {
    // SAFETY: the object that defines the symbol has the whole image behind it.
    let rom = unsafe { Rom::linked(&raw const vmi_native_rom, REVISION_3_0) };
    let rom = rom.expect("the linker had the right object");
    bind(&rom).expect("the native calls are in order");
    rom
}

extern "C" fn main(information: *const u32) -> ! {
    let (rom, place) = match platform() {
        Some(rom) => (rom, "platform ROM"),
        None => (linked_in(), "linked in"),
    };
    devices::initialize_console();
    line!("rust-kernel: VMI 3.0, {place}, at {:p}", rom.image().as_ptr());
    EXIT_BY_DEBUG_PORT.store(has_word(information, b"debug-exit"), Ordering::Relaxed);
    tables::initialize();
    memory::initialize();
    line!("rust-kernel: paging: CR0 {:#010x}, CR3 {:#010x}", VMI.GetCR0(), VMI.GetCR3());
    devices::initialize_timer();
    VMI.Halt(); // Until the first tick.
    VMI.DisableInterrupts();
    process::start()
}

/// Whether the command line has a word: multiboot specification 0.6.96, section 3.3.
fn has_word(information: *const u32, word: &[u8]) -> bool {
    const HAS_COMMAND_LINE: u32 = 1 << 2;
    const COMMAND_LINE: usize = 4;
    // SAFETY: the loader's words, and a string if the flag says so.
    let line = unsafe {
        let there = *information & HAS_COMMAND_LINE != 0;
        if there { CStr::from_ptr(*information.add(COMMAND_LINE) as *const c_char) } else { c"" }
    };
    line.to_bytes().split(|byte| *byte == b' ').any(|there| there == word)
}

static EXIT_BY_DEBUG_PORT: AtomicBool = AtomicBool::new(false);

/// The end: QEMU's, if the command line has said so, otherwise the processor's.
fn end(success: bool) -> ! {
    if EXIT_BY_DEBUG_PORT.load(Ordering::Relaxed) {
        devices::exit(success);
    }
    loop {
        VMI.Shutdown();
    }
}

#[panic_handler]
fn panic(information: &core::panic::PanicInfo<'_>) -> ! {
    if VMI.is_bound(number::OUTB) {
        line!("rust-kernel: {information}");
        end(false)
    }
    loop {
        core::hint::spin_loop(); // Without calls there is nothing else to do.
    }
}
