//! The interrupt flag.

#![expect(non_snake_case, reason = "the specification's names")]

use super::{COME_BACK, place_user_code, run_user};
use crate::console::{COM1, SCRATCH};
use crate::harness::{Outcome, Registers};
use crate::paging::{USER_CODE, USER_STACK_TOP};
use crate::processor::{inb, outb};
use crate::segments::{KERNEL_CODE, USER_CODE as USER_CODE_SELECTOR, USER_DATA};
use crate::session::{Arguments, FIXED_FLAG, Form, INTERRUPT_FLAG, Session};
use crate::{devices, host, processor, suite, traps};
use x86::bits32::eflags::EFlags;
use x86::msr::{IA32_SYSENTER_CS, IA32_SYSENTER_EIP, IA32_SYSENTER_ESP};

/// IOPL.
const PRIVILEGE: u32 = EFlags::FLAGS_IOPL3.bits();

/// Whether the processor has SYSENTER.
pub(super) fn has_sysenter() -> bool {
    processor::cpuid(1, 0)[3] & 1 << 11 != 0
}

/// Runs a call while IRQ 0 is pending and its line open; answers how often it was delivered.
fn with_pending_interrupt(s: &mut Session, arguments: Arguments) -> u32 {
    if !devices::make_timer_pending() {
        s.expect(
            false,
            format_args!("the machine's timer raises no interrupt: nothing can be tested"),
        );
    }
    let before = traps::interrupts();
    devices::enable_timer_line(true);
    s.call_changing(arguments, INTERRUPT_FLAG);
    devices::discard_interrupts();
    traps::interrupts() - before
}

pub(crate) fn EnableInterrupts(s: &mut Session) {
    s.each(|s| {
        let Outcome { after, .. } = s.call_changing(Arguments::NONE, INTERRUPT_FLAG);
        s.equal("IF", after.eflags & INTERRUPT_FLAG, INTERRUPT_FLAG);
        if s.variant.eflags & INTERRUPT_FLAG == 0 {
            let delivered = with_pending_interrupt(s, Arguments::NONE);
            s.equal("interrupts delivered of one that was pending", delivered, 1);
        }
        if has_sysenter() && !s.variant.traced && s.variant.form == Form::Patched {
            first_on_the_sysenter_path(s);
        }
    });
}

/// Linux calls EnableInterrupts before it has saved anything: every register is the user's.
///
/// For the patched form only: the guest's own way into ring 3 goes through the pointer site.
fn first_on_the_sysenter_path(s: &mut Session) {
    const SYSENTER: [u8; 2] = [0x0f, 0x34];
    place_user_code(&SYSENTER);
    let site = s.write_site().start;
    let stack = suite::trap_stack_top();
    for (register, value) in [
        (IA32_SYSENTER_CS, u32::from(KERNEL_CODE)),
        (IA32_SYSENTER_ESP, stack),
        (IA32_SYSENTER_EIP, site),
    ] {
        processor::wrmsr(register, u64::from(value));
    }
    let before = Registers {
        eax: s.random(),
        ecx: s.random(),
        edx: s.random(),
        ebx: s.random(),
        ebp: s.random(),
        esi: s.random(),
        edi: s.random(),
    };
    let frame = [
        USER_CODE,
        u32::from(USER_CODE_SELECTOR),
        FIXED_FLAG | INTERRUPT_FLAG,
        USER_STACK_TOP,
        u32::from(USER_DATA),
    ];
    let outcome = run_user(before, &frame);
    if s.no_exception(&outcome) {
        s.keeps_registers(&before, &outcome.after.registers);
        s.equal("ESP on the SYSENTER path", outcome.after.esp, stack);
        s.equal("IF on the SYSENTER path", outcome.after.eflags & INTERRUPT_FLAG, INTERRUPT_FLAG);
    }
}

pub(crate) fn DisableInterrupts(s: &mut Session) {
    s.each(|s| {
        let Outcome { after, .. } = s.call_changing(Arguments::NONE, INTERRUPT_FLAG);
        s.equal("IF", after.eflags & INTERRUPT_FLAG, 0);
        if s.variant.eflags & INTERRUPT_FLAG == 0 {
            let delivered = with_pending_interrupt(s, Arguments::NONE);
            s.equal("interrupts delivered while they are disabled", delivered, 0);
        }
    });
}

pub(crate) fn GetInterruptMask(s: &mut Session) {
    s.each(|s| {
        let Outcome { after, .. } = s.call(Arguments::NONE);
        let entered = s.variant.eflags & INTERRUPT_FLAG;
        s.equal("bit 9 of EAX", after.registers.eax & INTERRUPT_FLAG, entered);
    });
}

pub(crate) fn SetInterruptMask(s: &mut Session) {
    s.each(|s| {
        let others = s.variant.eflags & !INTERRUPT_FLAG;
        for wanted in [INTERRUPT_FLAG, 0] {
            let Outcome { after, .. } =
                s.call_changing(Arguments::NONE.eax(others | wanted), INTERRUPT_FLAG);
            s.equal("IF", after.eflags & INTERRUPT_FLAG, wanted);
            if s.variant.eflags & INTERRUPT_FLAG == 0 {
                let delivered = with_pending_interrupt(s, Arguments::NONE.eax(others | wanted));
                s.equal(
                    "interrupts delivered of one that was pending",
                    delivered,
                    u32::from(wanted != 0),
                );
            }
        }
    });
}

pub(crate) fn Halt(s: &mut Session) {
    s.each(|s| {
        let before = traps::interrupts();
        devices::start_ticking();
        devices::enable_timer_line(true);
        let Outcome { after, .. } = s.call_changing(Arguments::NONE, INTERRUPT_FLAG);
        devices::discard_interrupts();
        s.equal("IF", after.eflags & INTERRUPT_FLAG, INTERRUPT_FLAG);
        s.expect(traps::interrupts() > before, format_args!("it returned without an interrupt"));
    });
}

/// `in al, dx`, then back into the kernel.
const READ_PORT: [u8; 3] = [0xec, COME_BACK[0], COME_BACK[1]];

/// Where EFLAGS do not show it, what ring 3 may do shows it. The kernel has its ports at every level, as in ring 0.
fn set_level_on_a_host(s: &mut Session) {
    place_user_code(&READ_PORT);
    s.each(|s| {
        for level in [PRIVILEGE, EFlags::FLAGS_IOPL1.bits(), 0, EFlags::FLAGS_IOPL2.bits()] {
            s.call(Arguments::NONE.eax(level));
            let frame = [
                USER_CODE,
                u32::from(USER_CODE_SELECTOR),
                FIXED_FLAG | INTERRUPT_FLAG,
                USER_STACK_TOP,
                u32::from(USER_DATA),
            ];
            let registers = Registers { edx: u32::from(COM1 + SCRATCH), ..Registers::default() };
            let vector = run_user(registers, &frame).trap.map(|trap| trap.frame.vector);
            let is_allowed = level == PRIVILEGE;
            let wanted = if is_allowed { traps::SYSTEM_CALL } else { traps::GENERAL_PROTECTION };
            s.expect(
                vector == Some(wanted),
                format_args!(
                    "at level {level:#x} a port that ring 3 read raised {vector:?}, not {wanted}"
                ),
            );
            outb(COM1 + SCRATCH, (level >> 8) as u8 | 1);
            s.equal(
                "what the kernel reads from a port",
                inb(COM1 + SCRATCH).into(),
                (level >> 8) | 1,
            );
        }
        s.call(Arguments::NONE.eax(0));
    });
}

pub(crate) fn SetIOPLMask(s: &mut Session) {
    if host::is_hosted() {
        return set_level_on_a_host(s);
    }
    s.each(|s| {
        for level in [PRIVILEGE, EFlags::FLAGS_IOPL1.bits(), 0, EFlags::FLAGS_IOPL2.bits()] {
            let Outcome { after, .. } = s.call_changing(Arguments::NONE.eax(level), PRIVILEGE);
            s.equal("IOPL", after.eflags & PRIVILEGE, level);
        }
    });
}
