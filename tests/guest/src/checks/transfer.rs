//! The ways out of the kernel: IRET and SYSEXIT.
//!
//! Everything already belongs to the interrupted context. The contexts entered here come back at
//! once by an exception, which shows all their registers.

#![expect(non_snake_case, reason = "the specification's names")]

use super::interrupt::has_sysenter;
use super::{COME_BACK, place_code, place_user_code, run_own};
use crate::boot::PAGE_OFFSET;
use crate::harness::{Context, DataSegments, Outcome, Registers, return_point};
use crate::paging::{USER_CODE, USER_STACK_TOP, VIRTUAL_8086};
use crate::segments::{
    ABSENT_CODE, ABSENT_DATA, KERNEL_CODE, KERNEL_DATA, USER_CODE as USER_CODE_SELECTOR, USER_DATA,
};
use crate::session::{Arguments, FIXED_FLAG, INTERRUPT_FLAG, Session};
use crate::{devices, host, processor, traps};
use x86::bits32::eflags::EFlags;
use x86::msr::IA32_SYSENTER_CS;

/// EFLAGS for the entered context: recognisable, and without interrupts or with.
const FLAGS: [u32; 2] = [
    FIXED_FLAG | EFlags::FLAGS_CF.bits() | EFlags::FLAGS_SF.bits(),
    FIXED_FLAG
        | EFlags::FLAGS_ZF.bits()
        | EFlags::FLAGS_OF.bits()
        | EFlags::FLAGS_DF.bits()
        | INTERRUPT_FLAG,
];

/// All of IOPL: a process may try.
const IOPL: u32 = EFlags::FLAGS_IOPL3.bits();

/// What an exception reports beyond the flags that were loaded.
const RESUME: u32 = EFlags::FLAGS_RF.bits();

pub(crate) fn IRET(s: &mut Session) {
    place_user_code(&COME_BACK);
    s.each(|s| {
        // With NT the instruction would switch tasks: no kernel comes here with it.
        s.variant.eflags &= !EFlags::FLAGS_NT.bits();
        for eflags in FLAGS {
            to_the_same_ring(s, eflags);
            to_ring_3(s, eflags | INTERRUPT_FLAG);
            // Hosts in long mode have no such mode.
            if !host::is_hosted() {
                to_virtual_8086_mode(s, eflags);
            }
        }
        to_a_bad_frame(s);
    });
}

fn to_the_same_ring(s: &mut Session, eflags: u32) {
    let code = host::selector(KERNEL_CODE);
    let frame = [return_point as *const () as u32, u32::from(code), eflags];
    let (before, outcome) = s.enter(Arguments::NONE.stack(&frame));
    if !s.no_exception(&outcome) {
        return;
    }
    keeps_all(s, &before, &outcome);
    s.equal("ESP behind the frame", outcome.after.esp, before.esp + 12);
    s.equal("EFLAGS", outcome.after.eflags, eflags);
    s.keeps_segments(before.segments, outcome.after.segments);
}

fn to_ring_3(s: &mut Session, eflags: u32) {
    let frame =
        [USER_CODE, u32::from(USER_CODE_SELECTOR), eflags, USER_STACK_TOP, u32::from(USER_DATA)];
    let (before, outcome) = s.enter(Arguments::NONE.stack(&frame));
    arrived_in_ring_3(s, &before, &outcome, eflags);
}

/// Checks the context that came back from ring 3.
fn arrived_in_ring_3(s: &mut Session, before: &Context, outcome: &Outcome, eflags: u32) {
    let Some(trap) = outcome.trap.filter(|trap| trap.frame.vector == traps::SYSTEM_CALL) else {
        s.no_exception(outcome);
        s.expect(outcome.trap.is_some(), format_args!("ring 3 was never entered"));
        return;
    };
    keeps_all(s, before, outcome);
    s.equal("EIP in ring 3", trap.frame.eip, USER_CODE + COME_BACK.len() as u32);
    s.equal("CS in ring 3", trap.frame.cs & 0xffff, u32::from(USER_CODE_SELECTOR));
    s.equal("SS in ring 3", trap.frame.ss & 0xffff, u32::from(USER_DATA));
    s.equal("ESP in ring 3", trap.frame.esp, USER_STACK_TOP);
    // A host enters ring 3 by IRET: then the trap comes behind the first instruction, and that one leads back.
    let untaken = if host::is_hosted() { EFlags::FLAGS_TF.bits() } else { 0 };
    s.equal("EFLAGS in ring 3", trap.frame.eflags & !(RESUME | untaken), eflags);
    s.keeps_segments(before.segments, outcome.after.segments);
}

fn to_virtual_8086_mode(s: &mut Session, eflags: u32) {
    // Without the privilege for it, INT raises a general protection fault here.
    place_code((PAGE_OFFSET + VIRTUAL_8086) as *mut u8, &COME_BACK);
    let eflags = eflags | EFlags::FLAGS_VM.bits();
    let segments = DataSegments { es: 0x1111, ds: 0x2222, fs: 0x3333, gs: 0x4444 };
    let frame = [
        0,
        VIRTUAL_8086 >> 4,
        eflags,
        0x0ff0,
        VIRTUAL_8086 >> 4,
        segments.es,
        segments.ds,
        segments.fs,
        segments.gs,
    ];
    let (before, outcome) = s.enter(Arguments::NONE.stack(&frame));
    let Some(trap) = outcome.trap.filter(|trap| trap.frame.is_virtual_8086()) else {
        s.no_exception(&outcome);
        s.expect(false, format_args!("virtual-8086 mode was never entered"));
        return;
    };
    keeps_all(s, &before, &outcome);
    s.equal("exception in virtual-8086 mode", trap.frame.vector, traps::GENERAL_PROTECTION);
    s.equal("IP in virtual-8086 mode", trap.frame.eip, 0);
    s.equal("CS in virtual-8086 mode", trap.frame.cs & 0xffff, VIRTUAL_8086 >> 4);
    s.equal("SP in virtual-8086 mode", trap.frame.esp, 0x0ff0);
    s.equal("EFLAGS in virtual-8086 mode", trap.frame.eflags & !RESUME, eflags);
    s.keeps_segments(segments, outcome.after.segments);
}

/// Frames that a process can make up, by a signal handler's return for example. The exception is the
/// one that the guest's own IRET raises; where the ROM has put an IRET into the kernel, it is raised
/// there, where the kernel's table of fix-ups knows it. Nothing is lost.
fn to_a_bad_frame(s: &mut Session) {
    const NO_SELECTOR: u32 = 0x0ffb;
    let (code, data) = (u32::from(USER_CODE_SELECTOR), u32::from(USER_DATA));
    let selectors = [
        ("a CS beyond the table", NO_SELECTOR, data),
        ("a null CS", 3, data),
        ("a null CS of ring 0", 0, data),
        ("a CS of data", data, data),
        ("a CS that is not present", u32::from(ABSENT_CODE), data),
        ("a CS of ring 0 asked for by ring 3", u32::from(KERNEL_CODE) | 3, data),
        ("a CS in a table that is not there", code | 4, data),
        ("a null SS", code, 3),
        ("an SS beyond the table", code, NO_SELECTOR),
        ("an SS of code", code, code),
        ("an SS that is not present", code, u32::from(ABSENT_DATA)),
        ("an SS of ring 0", code, u32::from(KERNEL_DATA)),
    ];
    for (what, cs, ss) in selectors {
        let frame = [USER_CODE, cs, FIXED_FLAG | IOPL, USER_STACK_TOP, ss];
        let own = run_own(traps::return_natively, Registers::default(), &frame);
        let (before, outcome) = s.enter(Arguments::NONE.stack(&frame));
        let fault =
            |outcome: &Outcome| outcome.trap.map(|trap| (trap.frame.vector, trap.frame.error));
        let (found, wanted) = (fault(&outcome), fault(&own));
        s.expect(
            found.is_some() && found == wanted,
            format_args!("{what} raised {found:x?}, the guest's own IRET {wanted:x?}"),
        );
        let eip = outcome.trap.map_or(0, |trap| trap.frame.eip);
        if host::is_hosted() && outcome.trap.is_some_and(|trap| trap.frame.is_outer()) {
            // Better still: it appears as the process's own, at the place that the frame names.
            keeps_all(s, &before, &outcome);
            s.equal("EIP of the process's exception", eip, USER_CODE);
            s.equal("ESP of the process's exception", outcome.after.esp, USER_STACK_TOP);
            continue;
        }
        match s.native_site() {
            Some(site) => s.expect(
                site.executes_at(eip),
                format_args!(
                    "EIP of the exception is {eip:#x}, not the kernel's own site {:#x}",
                    site.start
                ),
            ),
            // A ROM's own IRET faults in the ROM, which no table of the kernel's knows. One that
            // makes the fault appear at the site does better.
            None if s.answer.has_address() => s.expect(
                s.rom.code().contains(&eip) || s.is_site(eip),
                format_args!(
                    "EIP of the exception is {eip:#x}, neither in the ROM nor at the site"
                ),
            ),
            None => {}
        }
        keeps_all(s, &before, &outcome);
        s.equal("ESP at the fault, where the frame is", outcome.after.esp, before.esp);
    }
}

/// A transfer changes no register.
fn keeps_all(s: &mut Session, before: &Context, outcome: &Outcome) {
    s.keeps_registers(&before.registers, &outcome.after.registers);
    let limit = vmi_abi::STACK_LIMIT;
    let used = outcome.stack_used;
    s.expect(
        used <= limit || !s.measures_stack(),
        format_args!("{used} bytes of stack used, {limit} are allowed"),
    );
}

pub(crate) fn SYSEXIT(s: &mut Session) {
    // A host's ROM may do without the instruction.
    if !has_sysenter() && !host::is_hosted() {
        s.skipped = Some("the processor has no SYSENTER");
        return;
    }
    place_user_code(&COME_BACK);
    if !host::is_hosted() {
        processor::wrmsr(IA32_SYSENTER_CS, u64::from(KERNEL_CODE));
    }
    s.each(|s| {
        let arguments = Arguments::NONE.edx(USER_CODE).ecx(USER_STACK_TOP);
        let (before, outcome) = s.enter(arguments);
        let eflags = s.variant.eflags | INTERRUPT_FLAG;
        let tracing = if s.variant.traced { EFlags::FLAGS_TF.bits() } else { 0 };
        arrived_in_ring_3(s, &before, &outcome, eflags & !tracing);
        if s.variant.eflags & INTERRUPT_FLAG == 0 && !s.variant.traced {
            // One that is pending waits for the shadow of STI to end, which is in ring 3.
            let pending = devices::make_timer_pending();
            let interrupts = traps::interrupts();
            devices::enable_timer_line(true);
            s.enter(arguments);
            devices::discard_interrupts();
            s.expect(
                pending,
                format_args!("the machine's timer raises no interrupt: nothing can be tested"),
            );
            s.equal(
                "interrupts delivered of one that was pending",
                traps::interrupts() - interrupts,
                1,
            );
            s.equal("EIP at the interrupt", traps::last_interrupted(), USER_CODE);
        }
    });
}
