//! The timer group, the local APIC's registers, and what nobody knows: for ROMs that answer them.

#![expect(non_snake_case, reason = "the specification's names")]

use crate::harness::Outcome;
use crate::paging::LocalApic;
use crate::session::{Arguments, Session};
use crate::{devices, host};
use vmi_abi::flags::CycleCounter;

/// Whether a ROM may say that it knows no time, by a 0: every slot holds code, where get_reloc would
/// answer NONE.
fn may_have_no_timer(s: &Session) -> bool {
    s.rom.client.revision().has_slots()
}

/// EDX:EAX.
pub(super) fn long(outcome: &Outcome) -> u64 {
    u64::from(outcome.after.registers.edx) << 32 | u64::from(outcome.after.registers.eax)
}

pub(crate) fn GetCycleFrequency(s: &mut Session) {
    s.each(|s| {
        let frequency = long(&s.call(Arguments::NONE));
        let unknown = frequency == 0 && may_have_no_timer(s);
        s.expect(frequency >= 1000 || unknown, format_args!("{frequency} Hz"));
    });
}

pub(crate) fn GetCycleCounter(s: &mut Session) {
    s.each(|s| {
        for counter in [CycleCounter::REAL, CycleCounter::AVAILABLE] {
            let first = long(&s.call(Arguments::NONE.eax(counter.0)));
            let second = long(&s.call(Arguments::NONE.eax(counter.0)));
            s.expect(
                first <= second,
                format_args!("counter {} went from {first} to {second}", counter.0),
            );
        }
        s.call(Arguments::NONE.eax(CycleCounter::STOLEN.0));
        let other = long(&s.call(Arguments::NONE.eax(3)));
        s.expect(other == 0, format_args!("counter 3 is {other}, must be 0"));
    });
}

/// An alarm in the far future: armed, and gone after it was cancelled.
pub(crate) fn SetAlarm(s: &mut Session) {
    s.each(|s| {
        s.call(Arguments::NONE.eax(0).edx(u32::MAX).ecx(0x7fff_ffff).stack(&[0, 0]));
    });
}

pub(crate) fn CancelAlarm(s: &mut Session) {
    s.each(|s| {
        s.call(Arguments::NONE.eax(0));
        let Outcome { after, .. } = s.call(Arguments::NONE.eax(0));
        s.equal("EAX for an alarm that is not armed", after.registers.eax, 0);
    });
}

pub(crate) fn GetWallclockTime(s: &mut Session) {
    const YEAR_2000: u64 = 946_684_800_000_000_000;
    s.each(|s| {
        let first = long(&s.call(Arguments::NONE));
        let second = long(&s.call(Arguments::NONE));
        let unknown = first == 0 && may_have_no_timer(s);
        s.expect(first > YEAR_2000 || unknown, format_args!("{first} ns is before the year 2000"));
        s.expect(first <= second, format_args!("the time went from {first} to {second}"));
    });
}

pub(crate) fn WallclockUpdated(s: &mut Session) {
    s.each(|s| {
        s.call(Arguments::NONE);
        let Outcome { after, .. } = s.call(Arguments::NONE);
        s.equal("EAX just after it was asked", after.registers.eax, 0);
    });
}

/// How the client names a register of the local APIC: Linux of 3.0 by its offset, 13.x by its linear
/// address.
fn register(s: &Session, apic: LocalApic, offset: u32) -> u32 {
    if s.rom.client.revision().has_slots() { apic.linear(offset) } else { offset }
}

/// The offset of the version register.
const VERSION: u32 = 0x30;

/// The offset of the task priority register, which keeps what is written.
const TASK_PRIORITY: u32 = 0x80;

/// The offset of the timer's vector, the one register that a host without a local APIC has: alarms come at what is in it.
const TIMER_VECTOR: u32 = 0x320;

/// Two vectors for it.
const VECTORS: [u32; 2] = [devices::IRQ_BASE as u32 + 5, devices::IRQ_BASE as u32 + 9];

pub(crate) fn APICRead(s: &mut Session) {
    if host::is_hosted() {
        return s.each(|s| {
            for vector in VECTORS {
                host::write_apic(TIMER_VECTOR, vector);
                let Outcome { after, .. } = s.call(Arguments::NONE.eax(TIMER_VECTOR));
                s.equal("EAX for the timer's vector", after.registers.eax & 0xff, vector);
            }
        });
    }
    let Some(apic) = LocalApic::map(s.space) else {
        s.skipped = Some("the processor has no local APIC");
        return;
    };
    s.each(|s| {
        let version = register(s, apic, VERSION);
        let Outcome { after, .. } = s.call(Arguments::NONE.eax(version));
        s.equal("EAX for the version register", after.registers.eax, apic.read(VERSION));
    });
}

pub(crate) fn APICWrite(s: &mut Session) {
    if host::is_hosted() {
        return s.each(|s| {
            for vector in VECTORS {
                s.call(Arguments::NONE.eax(TIMER_VECTOR).edx(vector));
                let line = devices::line_of_alarm();
                s.expect(
                    line == Some(vector - u32::from(devices::IRQ_BASE)),
                    format_args!("an alarm came at line {line:?}, the vector is {vector:#x}"),
                );
            }
        });
    }
    let Some(apic) = LocalApic::map(s.space) else {
        s.skipped = Some("the processor has no local APIC");
        return;
    };
    s.each(|s| {
        let priority = register(s, apic, TASK_PRIORITY);
        for value in [0x20, 0] {
            s.call(Arguments::NONE.eax(priority).edx(value));
            s.equal("the task priority register", apic.read(TASK_PRIORITY), value);
        }
    });
}

/// No guest knows its arguments: any answer but NONE is refused before it comes to this.
pub(crate) fn SetCallbacks(_s: &mut Session) {}
