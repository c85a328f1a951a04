//! The processor: one wrapper for each privileged instruction that the guest itself executes.
//!
//! A guest that runs on a [`host`] asks its ROM for what the ring does not allow, or what would show the host's own
//! state; the rest it executes there too, and the host emulates it.
//!
//! The guest is the kernel of its machine. What it changes here (tables, control registers) it
//! changes on purpose and puts back; the functions are safe in the sense that a kernel's are.

#![expect(unsafe_code, reason = "UNSAFETY: each wrapper is one instruction of inline assembly")]

use crate::host::{self, CALLS};
use core::arch::asm;
use vmi_abi::state::DescriptorTable;

macro_rules! register {
    ($read:ident, $write:ident, $name:literal, [$($get:ident)?], [$($set:ident)?]) => {
        #[allow(dead_code, reason = "made in pairs")]
        pub(crate) fn $read() -> u32 {
            $(
                if host::is_hosted() {
                    return CALLS.$get();
                }
            )?
            let value;
            // SAFETY: reading changes nothing.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nostack, preserves_flags)) };
            value
        }

        #[allow(dead_code, reason = "made in pairs")]
        pub(crate) fn $write(value: u32) {
            $(
                if host::is_hosted() {
                    // SAFETY: as below.
                    return unsafe { CALLS.$set(value) };
                }
            )?
            // SAFETY: the kernel's own register; callers keep the mappings that the guest runs on.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags)) };
        }
    };
}

register!(cr0, set_cr0, "cr0", [], [SetCR0]);
register!(cr2, set_cr2, "cr2", [GetCR2], [SetCR2]);
register!(cr3, set_cr3, "cr3", [GetCR3], [SetCR3]);
register!(cr4, set_cr4, "cr4", [], [SetCR4]);
register!(dr0, set_dr0, "dr0", [], []);
register!(dr1, set_dr1, "dr1", [], []);
register!(dr2, set_dr2, "dr2", [], []);
register!(dr3, set_dr3, "dr3", [], []);
register!(dr6, set_dr6, "dr6", [], []);
register!(dr7, set_dr7, "dr7", [], []);

macro_rules! port {
    ($read:ident, $write:ident, $type:ty) => {
        #[allow(dead_code, reason = "made in pairs")]
        pub(crate) fn $read(port: u16) -> $type {
            // SAFETY: the guest owns its machine's ports.
            unsafe { x86::io::$read(port) }
        }

        #[allow(dead_code, reason = "made in pairs")]
        pub(crate) fn $write(port: u16, value: $type) {
            // SAFETY: the guest owns its machine's ports.
            unsafe { x86::io::$write(port, value) }
        }
    };
}

port!(inb, outb, u8);
port!(inl, outl, u32);

macro_rules! table_register {
    ($read:ident, $write:ident, $store:literal, $load:literal, $get:ident, $set:ident) => {
        pub(crate) fn $read() -> DescriptorTable {
            let mut table = DescriptorTable::default();
            if host::is_hosted() {
                // SAFETY: as below.
                unsafe { CALLS.$get((&raw mut table) as u32) };
                return core::hint::black_box(table);
            }
            // SAFETY: stores six bytes into a structure of six.
            unsafe { asm!(concat!($store, " [{}]"), in(reg) &raw mut table, options(nostack, preserves_flags)) };
            table
        }

        pub(crate) fn $write(table: DescriptorTable) {
            if host::is_hosted() {
                // SAFETY: as below.
                return unsafe { CALLS.$set(core::hint::black_box(&raw const table) as u32) };
            }
            // SAFETY: callers name a table that holds what the guest's selectors and handlers need.
            unsafe { asm!(concat!($load, " [{}]"), in(reg) &raw const table, options(nostack, preserves_flags, readonly)) };
        }
    };
}

table_register!(gdt, set_gdt, "sgdt", "lgdt", GetGDT, SetGDT);
table_register!(idt, set_idt, "sidt", "lidt", GetIDT, SetIDT);

macro_rules! selector_register {
    ($read:ident, $write:ident, $store:literal, $load:literal, $get:ident, $set:ident) => {
        pub(crate) fn $read() -> u16 {
            if host::is_hosted() {
                return CALLS.$get() as u16;
            }
            let value: u16;
            // SAFETY: reading changes nothing.
            unsafe { asm!(concat!($store, " {:x}"), out(reg) value, options(nostack, preserves_flags)) };
            value
        }

        pub(crate) fn $write(selector: u16) {
            if host::is_hosted() {
                // SAFETY: as below.
                return unsafe { CALLS.$set(selector.into()) };
            }
            // SAFETY: the selector names a descriptor of the guest's own table.
            unsafe { asm!(concat!($load, " {:x}"), in(reg) selector, options(nostack, preserves_flags)) };
        }
    };
}

selector_register!(ldt, set_ldt, "sldt", "lldt", GetLDT, SetLDT);
selector_register!(task, set_task, "str", "ltr", GetTR, SetTR);

/// Reads a model-specific register.
pub(crate) fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: callers name registers that the processor has.
    unsafe {
        asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nostack, preserves_flags))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
pub(crate) fn wrmsr(index: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: callers name registers that the processor has, and values that keep the guest going.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") low, in("edx") high, options(nostack, preserves_flags))
    };
}

/// EAX, EBX, ECX and EDX of a CPUID leaf, as the guest is to see them.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    if host::is_hosted() {
        // SAFETY: changes nothing.
        let result = unsafe { CALLS.CPUID(leaf, subleaf) };
        return [result.eax, result.ebx, result.ecx, result.edx];
    }
    cpuid_of_hardware(leaf, subleaf)
}

/// The same of the instruction itself.
pub(crate) fn cpuid_of_hardware(leaf: u32, subleaf: u32) -> [u32; 4] {
    let result = core::arch::x86::__cpuid_count(leaf, subleaf);
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// Whether eight bytes can be exchanged by one instruction.
pub(crate) fn has_cmpxchg8b() -> bool {
    cpuid(1, 0)[3] & 1 << 8 != 0
}

/// The time-stamp counter.
pub(crate) fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading changes nothing.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Drops the translation of one page.
pub(crate) fn invlpg(address: u32) {
    if host::is_hosted() {
        // SAFETY: as below.
        return unsafe { CALLS.InvalPage(address) };
    }
    // SAFETY: costs a table walk, nothing else.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}

/// Lets non-maskable interrupts in again: the processor holds them back from one until an IRET.
pub(crate) fn accept_non_maskable_interrupts() {
    // SAFETY: the frame leads to the instruction behind the call.
    unsafe {
        asm!(
            "pushfd",
            "push {code}",
            "call 2f",
            "jmp 3f",
            "2: iretd",
            "3:",
            code = const crate::segments::KERNEL_CODE,
        );
    }
}

/// Whether an interrupt that came at this address found the processor halted: a HLT stands before it.
pub(crate) fn halted_before(eip: u32) -> bool {
    const HLT: u8 = 0xf4;
    // SAFETY: code was just executed there, and neither an image nor the guest begins with its page's
    // first instruction: a header stands before both.
    unsafe { ((eip - 1) as *const u8).read_volatile() == HLT }
}

/// Loads FS and GS.
pub(crate) fn set_fs_gs(fs: u16, gs: u16) {
    // SAFETY: the selectors name data descriptors of the guest's tables or are null; the guest
    // itself uses neither register.
    unsafe {
        asm!("mov fs, {:x}", "mov gs, {:x}", in(reg) fs, in(reg) gs, options(nostack, preserves_flags))
    };
}

/// Ends the processor's part: nothing is left to do.
pub(crate) fn halt_forever() -> ! {
    loop {
        // SAFETY: waits with interrupts disabled.
        unsafe { asm!("cli", "hlt", options(nostack)) };
    }
}
