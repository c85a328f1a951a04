//! Identification, model-specific, control and debug registers, counters, caches.

#![expect(non_snake_case, reason = "the specification's names")]
#![expect(unsafe_code, reason = "UNSAFETY: memory that a debug register watches")]

use super::{own_code, run_own};
use crate::harness::{Outcome, Registers};
use crate::session::{Arguments, Session};
use crate::traps;
use crate::{host, processor};
use vmi_abi::number;
use vmi_abi::state::ApState;
use x86::controlregs::{Cr0, Cr4};
use x86::msr::{IA32_EFER, IA32_PAT, IA32_SYSENTER_ESP};

const TASK_SWITCHED: u32 = Cr0::CR0_TASK_SWITCHED.bits() as u32;

/// Leaves on which all processors agree with themselves, and a subleaf where one counts.
const LEAVES: [(u32, u32); 10] = [
    (0, 0),
    (1, 0),
    (4, 0),
    (4, 1),
    (7, 0),
    (0xd, 0),
    (0xd, 2),
    (0x4000_0000, 0),
    (0x8000_0000, 0),
    (0x8000_0001, 0),
];

pub(crate) fn CPUID(s: &mut Session) {
    s.each(|s| {
        for (leaf, subleaf) in LEAVES {
            let Outcome { after, .. } = s.call(Arguments::NONE.eax(leaf).ecx(subleaf));
            let found = [after.registers.eax, after.registers.ebx, after.registers.ecx, after.registers.edx];
            let hardware = processor::cpuid_of_hardware(leaf, subleaf);
            for (index, name) in ["EAX", "EBX", "ECX", "EDX"].into_iter().enumerate() {
                let (found, hardware) = (found[index], hardware[index]);
                // Features may be missing, but none may be invented.
                let is_features = matches!((leaf, index), (1 | 0x8000_0001, 2..) | (7, 1..));
                // A host shows itself, and how many leaves it knows.
                let is_hosts = leaf == 0x4000_0000 || matches!((leaf, index), (0 | 0x8000_0000, 0));
                let holds = match (is_features, host::is_hosted() && is_hosts) {
                    (true, _) => found & !hardware == 0,
                    (_, true) => found >= leaf,
                    _ => found == hardware,
                };
                s.expect(holds, format_args!("leaf {leaf:#x}, {subleaf}: {name} is {found:#x}, the processor's {hardware:#x}"));
            }
        }
    });
}

/// A register of 32 bits and one of 64, and a value that each takes.
fn model_specific(s: &mut Session) -> [(u32, u64); 2] {
    // Each byte of the page attribute table holds a memory type; 0, 4, 6 and 7 exist everywhere.
    let types = s.random();
    let attributes = (0..8)
        .fold(0, |table, index| table << 8 | [0_u64, 4, 6, 7][(types >> (index * 2) & 3) as usize]);
    [(IA32_SYSENTER_ESP, u64::from(s.random())), (IA32_PAT, attributes)]
}

pub(crate) fn WRMSR(s: &mut Session) {
    if host::is_hosted() {
        s.skipped = Some("a host lets its guest keep nothing of its own in these registers");
        return;
    }
    s.each(|s| {
        for (register, value) in model_specific(s) {
            let old = processor::rdmsr(register);
            s.call(Arguments::NONE.eax(value as u32).edx((value >> 32) as u32).ecx(register));
            let found = processor::rdmsr(register);
            s.expect(
                found == value,
                format_args!("register {register:#x} is {found:#x}, must be {value:#x}"),
            );
            processor::wrmsr(register, old);
        }
    });
}

pub(crate) fn RDMSR(s: &mut Session) {
    s.each(|s| {
        if host::is_hosted() {
            let Outcome { after, .. } = s.call(Arguments::NONE.ecx(IA32_EFER));
            s.equal("EAX for EFER", after.registers.eax, processor::rdmsr(IA32_EFER) as u32);
            return;
        }
        for (register, value) in model_specific(s) {
            let old = processor::rdmsr(register);
            processor::wrmsr(register, value);
            let Outcome { after, .. } = s.call(Arguments::NONE.ecx(register));
            s.equal("EAX", after.registers.eax, value as u32);
            s.equal("EDX", after.registers.edx, (value >> 32) as u32);
            processor::wrmsr(register, old);
        }
    });
}

pub(crate) fn SetCR0(s: &mut Session) {
    s.each(|s| {
        let old = processor::cr0();
        for value in [old | TASK_SWITCHED, old & !TASK_SWITCHED] {
            s.call(Arguments::NONE.eax(value));
            s.equal("CR0", processor::cr0(), value);
        }
        processor::set_cr0(old);
    });
}

pub(crate) fn SetCR2(s: &mut Session) {
    s.each(|s| {
        let value = s.random();
        s.call(Arguments::NONE.eax(value));
        s.equal("CR2", processor::cr2(), value);
    });
}

pub(crate) fn SetCR4(s: &mut Session) {
    s.each(|s| {
        let old = processor::cr4();
        let toggled = old ^ Cr4::CR4_DEBUGGING_EXTENSIONS.bits() as u32;
        for value in [toggled, old] {
            s.call(Arguments::NONE.eax(value));
            s.equal("CR4", processor::cr4(), value);
        }
        processor::set_cr4(old);
    });
}

pub(crate) fn GetCR0(s: &mut Session) {
    s.each(|s| {
        let old = processor::cr0();
        for value in [old | TASK_SWITCHED, old & !TASK_SWITCHED] {
            processor::set_cr0(value);
            let Outcome { after, .. } = s.call(Arguments::NONE);
            s.equal("EAX", after.registers.eax, value);
        }
        processor::set_cr0(old);
    });
}

pub(crate) fn GetCR2(s: &mut Session) {
    s.each(|s| {
        let value = s.random();
        processor::set_cr2(value);
        let Outcome { after, .. } = s.call(Arguments::NONE);
        s.equal("EAX", after.registers.eax, value);
    });
}

pub(crate) fn GetCR3(s: &mut Session) {
    s.each(|s| {
        let Outcome { after, .. } = s.call(Arguments::NONE);
        s.equal("EAX", after.registers.eax, processor::cr3());
    });
}

pub(crate) fn GetCR4(s: &mut Session) {
    s.each(|s| {
        let old = processor::cr4();
        for value in [old ^ Cr4::CR4_DEBUGGING_EXTENSIONS.bits() as u32, old] {
            processor::set_cr4(value);
            let Outcome { after, .. } = s.call(Arguments::NONE);
            s.equal("EAX", after.registers.eax, value);
        }
    });
}

pub(crate) fn WBINVD(s: &mut Session) {
    s.each(|s| {
        s.call(Arguments::NONE);
    });
}

/// What DR7 holds when nothing is watched.
const NOTHING_WATCHED: u32 = 0x400;

/// In DR7: watch four bytes at DR0 for writes.
const WATCH_WRITES: u32 = NOTHING_WATCHED | 0xd_0001;

static mut WATCHED: u32 = 0;

/// Writes to the watched word.
extern "C" fn write_watched() {
    // SAFETY: a word that only this test uses.
    unsafe { (&raw mut WATCHED).write_volatile(1) };
}

pub(crate) fn SetDR(s: &mut Session) {
    const READERS: [fn() -> u32; 4] =
        [processor::dr0, processor::dr1, processor::dr2, processor::dr3];
    s.each(|s| {
        for (register, read) in READERS.into_iter().enumerate() {
            let value = s.random();
            s.call(Arguments::NONE.eax(register as u32).edx(value));
            s.expect(
                read() == value,
                format_args!("DR{register} is {:#x}, must be {value:#x}", read()),
            );
        }
        if s.variant.traced {
            return; // Stepping uses DR6, and what DR7 watches would interfere.
        }
        const BREAKPOINT_2: u32 = 0xffff_0ff4;
        s.call(Arguments::NONE.eax(6).edx(BREAKPOINT_2));
        s.equal("DR6", processor::dr6(), BREAKPOINT_2);
        processor::set_dr6(0);
        s.call(Arguments::NONE.eax(0).edx((&raw const WATCHED) as u32));
        s.call(Arguments::NONE.eax(7).edx(WATCH_WRITES));
        s.equal("DR7", processor::dr7(), WATCH_WRITES);
        let outcome = run_own(write_watched, Registers::default(), &[]);
        let vector = outcome.trap.map(|trap| trap.frame.vector);
        s.expect(
            vector == Some(traps::DEBUG),
            format_args!("a write to the watched word raised {vector:?}, not a debug exception"),
        );
        processor::set_dr7(NOTHING_WATCHED);
        processor::set_dr6(0);
    });
}

pub(crate) fn GetDR(s: &mut Session) {
    const WRITERS: [fn(u32); 4] =
        [processor::set_dr0, processor::set_dr1, processor::set_dr2, processor::set_dr3];
    s.each(|s| {
        for (register, write) in WRITERS.into_iter().enumerate() {
            let value = s.random();
            write(value);
            let Outcome { after, .. } = s.call(Arguments::NONE.eax(register as u32));
            s.expect(
                after.registers.eax == value,
                format_args!("EAX is {:#x}, DR{register} {value:#x}", after.registers.eax),
            );
        }
        let Outcome { after, .. } = s.call(Arguments::NONE.eax(7));
        s.equal("EAX for DR7", after.registers.eax, processor::dr7());
        if !s.variant.traced {
            processor::set_dr6(0xffff_0ff2);
            let Outcome { after, .. } = s.call(Arguments::NONE.eax(6));
            s.equal("EAX for DR6", after.registers.eax, 0xffff_0ff2);
            processor::set_dr6(0);
        }
    });
}

/// Some processors have no such counter: then the ROM's instruction faults as the guest's own does.
pub(crate) fn RDPMC(s: &mut Session) {
    s.each(|s| {
        let own = own_code(number::RDPMC).map(|code| {
            // SAFETY: the address of a routine of the native backend.
            let routine =
                unsafe { core::mem::transmute::<usize, unsafe extern "C" fn()>(code as usize) };
            run_own(routine, Registers::default(), &[])
        });
        let own_vector = own.and_then(|outcome| outcome.trap).map(|trap| trap.frame.vector);
        if own_vector.is_none() {
            s.call(Arguments::NONE.ecx(0));
            return;
        }
        let (_, outcome) = s.enter(Arguments::NONE.ecx(0));
        let vector = outcome.trap.map(|trap| trap.frame.vector);
        s.expect(
            vector == own_vector,
            format_args!("raised {vector:?}, the guest's own RDPMC {own_vector:?}"),
        );
        let eip = outcome.trap.map_or(0, |trap| trap.frame.eip);
        let target = s.target();
        s.expect(
            (target..target + 256).contains(&eip),
            format_args!("the exception is at {eip:#x}, not in the call's code"),
        );
    });
}

pub(crate) fn RDTSC(s: &mut Session) {
    s.each(|s| {
        let before = processor::rdtsc();
        let Outcome { after, .. } = s.call(Arguments::NONE);
        let last = processor::rdtsc();
        let found = u64::from(after.registers.edx) << 32 | u64::from(after.registers.eax);
        s.expect(
            (before..=last).contains(&found),
            format_args!("{found} is not between {before} and {last}"),
        );
    });
}

pub(crate) fn CLTS(s: &mut Session) {
    s.each(|s| {
        let old = processor::cr0();
        processor::set_cr0(old | TASK_SWITCHED);
        s.call(Arguments::NONE);
        s.equal("CR0", processor::cr0(), old & !TASK_SWITCHED);
        processor::set_cr0(old);
    });
}

pub(crate) fn SetInitialAPState(s: &mut Session) {
    s.each(|s| {
        let state =
            ApState { eip: s.random().into(), esp: s.random().into(), ..ApState::default() };
        s.call(Arguments::NONE.eax((&raw const state) as u32).edx(1));
    });
}
