//! Bad ends that a kernel can come to, by the word `end=` on the command line: a hypervisor below has to say where the guest was.

#![expect(unsafe_code, reason = "UNSAFETY: each end is a few instructions of inline assembly")]

use crate::hypervisor::Hypervisor;
use crate::paging::{ACCESSED, LocalApic, Space, physical};
use crate::processor;
use crate::report;
use core::arch::asm;
use vmi_abi::state::DescriptorTable;
use vmi_hv_backend::reference::interface::Hypercall;

/// A frame of the screen.
const SCREEN: u32 = 0xb_8000;

/// Hypercalls that do not exist.
const GARBAGE: core::ops::Range<u32> = 0x100..0x108;

/// What the guest says when it asks for its end.
const LAST_WORDS: &str = "no hypercall is left to try";

/// Comes to an end. Interrupts are off, and every line of the interrupt controller is masked.
pub(crate) fn meet(name: &str, space: Space) -> ! {
    match name {
        "triple-fault" => triple_fault(),
        // SAFETY: nothing else is to happen.
        "loop" => unsafe { asm!("sti", "2: jmp 2b", options(noreturn)) },
        // SAFETY: as above.
        "loop-masked" => unsafe { asm!("cli", "2: jmp 2b", options(noreturn)) },
        "halt-masked" => processor::halt_forever(),
        "loop-of-exits" => loop {
            processor::cpuid(0, 0);
        },
        "device-tables" => {
            // What is found there is anything, a way into a handler too: the first exception is to be the end.
            processor::set_idt(DescriptorTable::default());
            processor::set_cr3(SCREEN);
            // SAFETY: translations that are known still may serve for a while.
            unsafe { asm!("2: jmp 2b", options(noreturn)) }
        }
        "own-nmi" => {
            let Some(apic) = LocalApic::map(space) else {
                report::abandon(format_args!("there is no local APIC"))
            };
            // What the way to the handler begins with was not accessed: below a shadow that has to be filled.
            let table = processor::idt().base.get();
            let entry = space.entry(table);
            space.store(entry, space.load(entry) & !ACCESSED);
            processor::invlpg(table);
            apic.interrupt_itself();
            // That was none.
            triple_fault()
        }
        "garbage" => {
            let Some(hypervisor) = Hypervisor::find() else {
                report::abandon(format_args!("there is no reference hypervisor"))
            };
            for number in GARBAGE {
                hypervisor.call(number, number, number);
            }
            let text = physical(LAST_WORDS.as_ptr());
            hypervisor.call(Hypercall::Stop as u32, text, LAST_WORDS.len() as u32);
            report::abandon(format_args!("the hypervisor refuses to stop"))
        }
        _ => report::abandon(format_args!("there is no end `{name}`")),
    }
}

/// An exception where there is no table of handlers.
fn triple_fault() -> ! {
    processor::set_idt(DescriptorTable::default());
    // SAFETY: the processor does not come back.
    unsafe { asm!("ud2", options(noreturn)) }
}
