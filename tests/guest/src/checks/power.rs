//! The end of the machine, or of one processor.

#![expect(non_snake_case, reason = "the specification's names")]

use crate::session::{Arguments, INTERRUPT_FLAG, Session};
use crate::{devices, paging, processor, traps};
use vmi_abi::flags::RebootKind;

/// The guest tests it last of all, from outside of the list: it does not survive it.
pub(crate) fn Reboot(_s: &mut Session) {}

/// Asks for a reset. Whoever comes back from here was not reset.
pub(crate) fn reboot(s: &mut Session, kind: RebootKind) {
    let (_, outcome) = s.enter(Arguments::NONE.eax(kind.0));
    let exception = outcome.trap.map(|trap| trap.frame.vector);
    s.expect(
        false,
        format_args!("kind {} did not reset the machine; exception: {exception:?}", kind.0),
    );
}

/// So many ticks of the timer may come before the processor is halted.
const TICKS_TO_HALT: u32 = 20;

/// Only what cannot be masked wakes a processor that is off: the timer's line, wired as an NMI.
///
/// The NMI must find the processor halted with interrupts disabled, an ordinary interrupt that is
/// pending all the while must not be delivered.
pub(crate) fn Shutdown(s: &mut Session) {
    let Some(apic) = paging::LocalApic::map(s.space) else {
        s.skipped = Some("without a local APIC nothing would ever bring the guest back");
        return;
    };
    s.each(|s| {
        if s.variant.traced {
            return;
        }
        let before = traps::interrupts();
        apic.wire_timer_as_nmi(true);
        devices::start_ticking();
        let mut outcome = s.enter(Arguments::NONE).1;
        // A tick may be faster than the call that it is to wake, where the machine's time is the host's.
        for _ in 0..TICKS_TO_HALT {
            if outcome.trap.is_none_or(|trap| processor::halted_before(trap.frame.eip)) {
                break;
            }
            devices::acknowledge_interrupt();
            processor::accept_non_maskable_interrupts();
            outcome = s.enter(Arguments::NONE).1;
        }
        // The timer stops first: a tick must not come as an ordinary interrupt.
        devices::discard_interrupts();
        processor::accept_non_maskable_interrupts();
        apic.wire_timer_as_nmi(false);
        let Some(trap) = outcome.trap else {
            s.expect(false, format_args!("it returned"));
            return;
        };
        s.equal("the exception that ended the wait", trap.frame.vector, traps::NON_MASKABLE);
        s.equal("IF while waiting", trap.frame.eflags & INTERRUPT_FLAG, 0);
        let target = s.target();
        // An entry may have come to other code of the image.
        let is_inside = |code: &core::ops::Range<u32>| code.contains(&trap.frame.eip);
        s.expect(
            is_inside(&(target..target + 256)) || is_inside(&s.rom.code()),
            format_args!("it waits at {:#x}, not in the call's code", trap.frame.eip),
        );
        s.equal("interrupts delivered", traps::interrupts() - before, 0);
    });
}
