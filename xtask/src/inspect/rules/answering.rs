//! `vmi_init` and `get_reloc`.

use super::{Report, Rule, Subject};
use crate::inspect::answers::{self, ASK_BUDGET, Asked, GET_RELOC, INIT_BUDGET, Table, VMI_INIT};
use crate::inspect::machine::registers::GENERAL;
use crate::inspect::machine::{Code, Machine, Registers, Stop, flags};
use crate::inspect::reach::{Executed, reach};
use crate::inspect::trial;
use crate::inspect::{HIGH_BASE, LOW_BASE};
use iced_x86::Register;
use vmi_abi::{CALLS_3_0, Group, RelocationType, STACK_LIMIT};

/// Times that each call is asked for: with them a ROM gets as many questions as in a boot of Linux.
const ROUNDS: usize = 60;

/// Numbers that name no call.
const BEYOND: [u32; 12] =
    [74, 75, 87, 100, 127, 128, 255, 256, 0x1_0000, 0x2000_0000, 0x8000_0000, 0xffff_ffff];

/// Instructions for an answer that this project grants its own image.
const OWN_LIMIT: u64 = 24;

pub(super) fn check_init(code: &Code<'_>, report: &mut Report) {
    let mut executed = Executed::new(code);
    for base in [HIGH_BASE, LOW_BASE] {
        let mut entry = trial::plain(code, base, VMI_INIT, 0).entry;
        entry.eflags &= !flags::INTERRUPT;
        let (machine, stop) = answers::initialise(code, base);
        executed.add(&machine.trace);
        let before = report.violations.len();
        if ended(code, &Subject::INIT, Rule::Init, &machine, stop, INIT_BUDGET, report) {
            let result = machine.registers.get(Register::EAX);
            if result != 0 {
                let detail = format!(
                    "returns EAX = {result:08X}h at base {base:08X}h: the guest does not use the ROM"
                );
                report.code(code, &Subject::INIT, Rule::Init, machine.trace.writers[0], detail);
            }
            keeps(code, &Subject::INIT, Rule::Init, &entry, &machine, report);
        }
        report.breaches(code, &Subject::INIT, &machine.trace.breaches);
        if report.violations.len() > before {
            break;
        }
    }
    let reached = reach(code, VMI_INIT, executed.offsets(), false);
    report.reachable(code, &Subject::INIT, &reached);
}

/// Whether an execution ended where it was called from; if not, that is a violation.
fn ended(
    code: &Code<'_>,
    subject: &Subject,
    rule: Rule,
    machine: &Machine<'_>,
    stop: Stop,
    budget: u64,
    report: &mut Report,
) -> bool {
    let at = Some(machine.trace.last);
    let detail = match stop {
        Stop::Left if machine.registers.eip == trial::RETURN_ADDRESS => return true,
        Stop::Left => format!("leaves the image for linear {:08X}h", machine.registers.eip),
        Stop::Halted => "halts with interrupts disabled".to_owned(),
        Stop::Reset => "shuts the processor down".to_owned(),
        Stop::Interrupt(vector) => format!("raises exception or interrupt {vector}"),
        Stop::Budget => format!("did not return within {budget} instructions"),
        Stop::Fuel => {
            let detail = super::OUT_OF_FUEL;
            report.code(code, subject, Rule::Undecided, at, detail);
            return false;
        }
        Stop::Undecided => {
            let detail = "cannot decide: this instruction is not known to the inspector";
            report.code(code, subject, Rule::Undecided, at, detail);
            return false;
        }
    };
    report.code(code, subject, rule, at, detail);
    false
}

/// What every function keeps.
fn keeps(
    code: &Code<'_>,
    subject: &Subject,
    rule: Rule,
    entry: &Registers,
    machine: &Machine<'_>,
    report: &mut Report,
) {
    let (before, after) = (entry.general(), machine.registers.general());
    for (place, (name, register)) in GENERAL.iter().enumerate() {
        let free = vmi_abi::Registers::STANDARD | vmi_abi::Registers::ESP;
        if after[place] != before[place] && !free.contains(*register) {
            let writer = machine.trace.writers[place];
            report.code(code, subject, rule, writer, format!("changes {name}, which it must keep"));
        }
    }
    let expected = entry.get(Register::ESP).wrapping_add(4);
    let by = machine.registers.get(Register::ESP).wrapping_sub(expected) as i32;
    if by != 0 {
        let detail = format!("returns with ESP {by:+} bytes from where the caller expects it");
        report.code(code, subject, Rule::StackBalance, Some(machine.trace.last), detail);
    }
    let changed = (entry.eflags ^ machine.registers.eflags) & !flags::ARITHMETIC;
    if changed != 0 {
        let detail = format!("changes flags that it must keep (EFLAGS bits {changed:08X}h)");
        report.code(code, subject, Rule::Flags, machine.trace.flags_writer, detail);
    }
    if machine.stack_depth() > STACK_LIMIT {
        let detail =
            format!("uses {} bytes of stack, {STACK_LIMIT} are granted", machine.stack_depth());
        report.code(code, subject, Rule::StackUse, None, detail);
    }
}

pub(super) fn check(code: &Code<'_>, high: &Table, low: &Table, report: &mut Report) {
    let mut executed = Executed::new(code);
    if check_asking(code, high, low, &mut executed, report) {
        check_constancy(code, high, report);
        check_beyond(code, report);
    }
    let reached = reach(code, GET_RELOC, executed.offsets(), false);
    report.reachable(code, &Subject::GET_RELOC, &reached);
    check_answers(code, high, low, report);
    check_groups(code, high, report);
    let most = high.most_instructions();
    let judgement =
        if most > OWN_LIMIT { ", more than the 24 that this project grants itself" } else { "" };
    report.note("get_reloc", format!("at most {most} instructions for an answer{judgement}"));
}

/// One question for each call at each base; whether all were answered.
fn check_asking(
    code: &Code<'_>,
    high: &Table,
    low: &Table,
    executed: &mut Executed,
    report: &mut Report,
) -> bool {
    for (table, base) in [(high, HIGH_BASE), (low, LOW_BASE)] {
        for number in 0..CALLS_3_0.len() as u32 {
            let (asked, answer) = answers::ask(code, base, number, 1 + u64::from(number));
            executed.add(&asked.start.machine.trace);
            judge_asked(code, &asked, report);
            if answer.is_none() {
                let known = table.answers.iter().flatten().count();
                report.note(
                    "get_reloc",
                    format!("does not answer for call {number}; {known} calls were answered"),
                );
                return false;
            }
        }
    }
    true
}

fn judge_asked(code: &Code<'_>, asked: &Asked<'_>, report: &mut Report) {
    let machine = &asked.start.machine;
    if ended(code, &Subject::GET_RELOC, Rule::GetReloc, machine, asked.stop, ASK_BUDGET, report) {
        let mut entry = asked.start.entry.clone();
        entry.set(Register::EAX, machine.registers.get(Register::EAX));
        keeps(code, &Subject::GET_RELOC, Rule::GetReloc, &entry, machine, report);
    }
    report.breaches(code, &Subject::GET_RELOC, &machine.trace.breaches);
}

fn check_constancy(code: &Code<'_>, high: &Table, report: &mut Report) {
    for (time, number) in answers::questions(ROUNDS).enumerate() {
        let (asked, answer) = answers::ask(code, HIGH_BASE, number, 0x1000 + time as u64);
        let first = high.answers.get(number as usize).copied().flatten();
        let same = match (first, answer) {
            (Some(a), Some(b)) => a.kind == b.kind && (a.eip == b.eip || !a.kind.has_address()),
            _ => false,
        };
        if !same {
            let subject = subject(number);
            let shown = |answer: Option<answers::Answer>| {
                answer.map_or("nothing".to_owned(), |a| {
                    format!("{} {:08X}h", kind_name(a.kind), a.eip)
                })
            };
            let detail = format!(
                "answered {} at first and {} when asked again",
                shown(first),
                shown(answer)
            );
            report.code(code, &subject, Rule::Constancy, None, detail);
            return;
        }
        if time % 16 == 0 {
            judge_asked(code, &asked, report);
        }
    }
}

fn check_beyond(code: &Code<'_>, report: &mut Report) {
    for number in BEYOND {
        let (asked, answer) = answers::ask(code, HIGH_BASE, number, 0x9000 + u64::from(number));
        judge_asked(code, &asked, report);
        if let Some(answer) = answer
            && answer.kind != RelocationType::NONE
        {
            let detail = format!(
                "answers {} for number {number}, which names no call",
                kind_name(answer.kind)
            );
            report.code(code, &Subject::GET_RELOC, Rule::Answer, None, detail);
            return;
        }
    }
}

fn check_answers(code: &Code<'_>, high: &Table, low: &Table, report: &mut Report) {
    for (call, (high, low)) in CALLS_3_0.iter().zip(high.answers.iter().zip(&low.answers)) {
        let Some((number, high)) = call.number.zip(*high) else { continue };
        let subject = subject(number.0);
        let Some(kind) = high.kind.as_answers() else {
            let detail = format!("answered with type {}, which no revision defines", high.kind.0);
            report.code(code, &subject, Rule::Answer, None, detail);
            continue;
        };
        if !call.contract.answers.contains(kind) {
            let detail = format!(
                "answered {}, which this call's guests cannot live with",
                kind_name(high.kind)
            );
            report.code(code, &subject, Rule::Answer, high.offset, detail);
        }
        if high.kind.has_address() && high.offset.is_none() {
            let detail = format!("answered with linear {:08X}h, outside the image", high.eip);
            report.code(code, &subject, Rule::Answer, None, detail);
        }
        let alike = low.is_some_and(|low| low.kind == high.kind && low.offset == high.offset);
        if !alike {
            let detail = format!(
                "answered differently at linear bases {HIGH_BASE:08X}h and {LOW_BASE:08X}h"
            );
            report.code(code, &subject, Rule::Base, None, detail);
        }
    }
}

fn check_groups(code: &Code<'_>, table: &Table, report: &mut Report) {
    for (group, name) in [(Group::Timer, "timer"), (Group::Apic, "APIC")] {
        let members = || {
            CALLS_3_0.iter().filter(move |call| call.contract.group == Some(group)).filter_map(
                |call| Some((call, table.answer_of(call.number?)?.kind != RelocationType::NONE)),
            )
        };
        if !members().any(|(_, answered)| answered) {
            continue;
        }
        for (call, _) in members().filter(|(_, answered)| !answered) {
            let subject = subject(call.number.map_or(0, |number| number.0));
            let detail =
                format!("answered NONE while other {name} calls are answered: all or none");
            report.code(code, &subject, Rule::Group, None, detail);
        }
    }
}

/// A call of the table as the subject of a violation.
pub(super) fn subject(number: u32) -> Subject {
    let name = CALLS_3_0.get(number as usize).map_or("call", |call| call.name);
    Subject { name, call: Some(number) }
}

/// The specification's name of a relocation type.
pub fn kind_name(kind: RelocationType) -> String {
    kind.name().map_or_else(|| format!("type {}", kind.0), str::to_owned)
}
