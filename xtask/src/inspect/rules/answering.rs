//! `vmi_init` and `get_reloc`.

use super::{Report, Rule, Subject, slots};
use crate::inspect::answers::{self, ASK_BUDGET, Asked, INIT_BUDGET, Table};
use crate::inspect::interface::Function;
use crate::inspect::machine::registers::GENERAL;
use crate::inspect::machine::{Code, Machine, Registers, Stop, flags};
use crate::inspect::reach::{Executed, reach};
use crate::inspect::trial::{self, Placement};
use crate::inspect::{HIGH_BASE, Interface, LOW_BASE};
use iced_x86::Register;
use vmi_abi::header::SLOT_COUNT;
use vmi_abi::{Answers, Group, KEEP_SITE, REVISION_13_3, RelocationType, STACK_LIMIT};

/// Times that each call is asked for: with them a ROM gets as many questions as in a boot of Linux.
const ROUNDS: usize = 60;

/// Numbers that name no call.
const BEYOND: [u32; 14] = [
    74,
    75,
    87,
    100,
    127,
    128,
    255,
    256,
    0x1_0000,
    0x2000_0000,
    KEEP_SITE,
    KEEP_SITE | 74,
    KEEP_SITE | 128,
    0xffff_ffff,
];

/// Instructions for an answer that this project grants its own image.
const OWN_LIMIT: u64 = 24;

/// Where the whole image lies.
const WHOLE: [Placement; 2] = [Placement::whole(HIGH_BASE), Placement::whole(LOW_BASE)];

pub(super) fn check_init(code: &Code<'_>, interface: &Interface, report: &mut Report) {
    let init = interface.init;
    let subject = Subject::function(init);
    let has_slots = interface.revision.has_slots();
    if has_slots && !slots::has_code(code, &subject, init.offset, report) {
        return;
    }
    let mut executed = Executed::new(code);
    let copy = has_slots.then_some((Placement::COPY, Rule::Copy));
    for (placement, rule) in WHOLE.map(|placement| (placement, Rule::Init)).into_iter().chain(copy)
    {
        let mut entry = trial::plain(code, placement, init.offset, 0).entry;
        entry.eflags &= !flags::INTERRUPT;
        let (machine, stop) = answers::initialise(code, interface, placement);
        executed.add(&machine.trace);
        if let Some(number) = init.number {
            report.ran(number, machine.trace.instructions);
        }
        let before = report.violations.len();
        if ended(code, &subject, rule, &machine, stop, INIT_BUDGET, report) {
            let result = machine.registers.get(Register::EAX);
            if result != 0 {
                let base = placement.base;
                let detail = format!(
                    "returns EAX = {result:08X}h at base {base:08X}h: the guest does not use the ROM"
                );
                report.code(code, &subject, rule, machine.trace.writers[0], detail);
            }
            keeps(code, &subject, rule, &entry, &machine, report);
        }
        report.breaches(code, &subject, &machine.trace.breaches);
        if report.violations.len() > before {
            break;
        }
    }
    let reached = reach(code, init.offset, executed.offsets(), false);
    report.reachable(code, &subject, &reached);
    if has_slots {
        slots::check_reach(code, &subject, interface, init.offset, &reached, report);
    }
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
    let at = machine.trace.last;
    let detail = match stop {
        Stop::Left if machine.registers.eip == trial::RETURN_ADDRESS => return true,
        Stop::Left => match machine.missed() {
            Some(offset) => slots::leaves(offset),
            None => format!("leaves the image for linear {:08X}h", machine.registers.eip),
        },
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
        report.code(code, subject, Rule::StackBalance, machine.trace.last, detail);
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

pub(super) fn check(
    code: &Code<'_>,
    interface: &Interface,
    high: &Table,
    low: &Table,
    report: &mut Report,
) {
    let Some(lookup) = interface.lookup else { return };
    let subject = Subject::function(lookup);
    let has_slots = interface.revision.has_slots();
    if has_slots && !slots::has_code(code, &subject, lookup.offset, report) {
        return;
    }
    let asking = Asking { code, interface, lookup, subject };
    let mut executed = Executed::new(code);
    if asking.check_each(high, low, &mut executed, report) {
        asking.check_constancy(high, report);
        asking.check_beyond(report);
        if has_slots {
            asking.check_copy(high, report);
        } else {
            asking.check_keep_site(high, low, report);
        }
    }
    let reached = reach(code, lookup.offset, executed.offsets(), false);
    report.reachable(code, &subject, &reached);
    if has_slots {
        slots::check_reach(code, &subject, interface, lookup.offset, &reached, report);
    }
    check_answers(code, interface, high, low, report);
    if !has_slots {
        check_groups(code, interface, high, report);
    }
    let most = high.most_instructions();
    if let Some(number) = lookup.number {
        report.ran(number, most);
    }
    let judgement =
        if most > OWN_LIMIT { ", more than the 24 that this project grants itself" } else { "" };
    report.note(lookup.name, format!("at most {most} instructions for an answer{judgement}"));
}

/// Who is asked, and how.
struct Asking<'a> {
    code: &'a Code<'a>,
    interface: &'a Interface,
    lookup: Function,
    subject: Subject,
}

impl<'a> Asking<'a> {
    fn ask(
        &self,
        placement: Placement,
        number: u32,
        seed: u64,
    ) -> (Asked<'a>, Option<answers::Answer>) {
        answers::ask(self.code, self.lookup, placement, number, seed)
    }

    /// One question for each call at each base; whether all were answered.
    fn check_each(
        &self,
        high: &Table,
        low: &Table,
        executed: &mut Executed,
        report: &mut Report,
    ) -> bool {
        for (table, placement) in [high, low].into_iter().zip(WHOLE) {
            for (number, _) in self.interface.calls() {
                let (asked, answer) = self.ask(placement, number, 1 + u64::from(number));
                executed.add(&asked.start.machine.trace);
                self.judge(&asked, Rule::GetReloc, report);
                if answer.is_none() {
                    let known = table.answers.iter().flatten().count();
                    report.note(
                        self.lookup.name,
                        format!("does not answer for call {number}; {known} calls were answered"),
                    );
                    return false;
                }
            }
        }
        true
    }

    fn judge(&self, asked: &Asked<'_>, rule: Rule, report: &mut Report) {
        let (code, subject, machine) = (self.code, &self.subject, &asked.start.machine);
        if ended(code, subject, rule, machine, asked.stop, ASK_BUDGET, report) {
            let mut entry = asked.start.entry.clone();
            entry.set(Register::EAX, machine.registers.get(Register::EAX));
            keeps(code, subject, rule, &entry, machine, report);
        }
        report.breaches(code, subject, &machine.trace.breaches);
    }

    fn check_constancy(&self, high: &Table, report: &mut Report) {
        for (time, number) in answers::questions(self.interface, ROUNDS).enumerate() {
            let (asked, answer) = self.ask(WHOLE[0], number, 0x1000 + time as u64);
            let first = high.answer_at(number);
            let same = match (first, answer) {
                (Some(a), Some(b)) => a.kind == b.kind && (a.eip == b.eip || !a.kind.has_address()),
                _ => false,
            };
            if !same {
                let subject = Subject::call(Some(self.interface), number);
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
                report.code(self.code, &subject, Rule::Constancy, None, detail);
                return;
            }
            if time % 16 == 0 {
                self.judge(&asked, Rule::GetReloc, report);
            }
        }
    }

    fn check_beyond(&self, report: &mut Report) {
        let revision = self.interface.revision;
        // What a later minor revision has in the other slots is not known.
        let later = revision.has_slots() && revision.minor > REVISION_13_3.minor;
        let keeps = |number: u32| {
            !revision.has_slots()
                && number & KEEP_SITE != 0
                && revision.call(number ^ KEEP_SITE).is_some()
        };
        let names_none = |number: u32| {
            revision.call(number).is_none()
                && !(later && number < SLOT_COUNT as u32)
                && !keeps(number)
        };
        for number in BEYOND.into_iter().filter(|number| names_none(*number)) {
            let (asked, answer) = self.ask(WHOLE[0], number, 0x9000 + u64::from(number));
            self.judge(&asked, Rule::GetReloc, report);
            if let Some(answer) = answer
                && answer.kind != RelocationType::NONE
            {
                let detail = format!(
                    "answers {} for number {number}, which names no call",
                    kind_name(answer.kind)
                );
                report.code(self.code, &self.subject, Rule::Answer, None, detail);
                return;
            }
        }
    }

    /// What is asked with [`KEEP_SITE`] is answered as without, or NONE by a ROM that does not know it.
    fn check_keep_site(&self, high: &Table, low: &Table, report: &mut Report) {
        for (number, _) in self.interface.calls() {
            let subject = Subject::call(Some(self.interface), number);
            let [mut first, mut second] = [None, None];
            for (kept, placement) in [&mut first, &mut second].into_iter().zip(WHOLE) {
                let (asked, answer) =
                    self.ask(placement, number | KEEP_SITE, 0xa000 + u64::from(number));
                self.judge(&asked, Rule::GetReloc, report);
                *kept = answer;
            }
            let (Some(kept), Some(plain)) = (first, high.answer_at(number)) else { continue };
            let place = |answer: Option<answers::Answer>| answer.map(|a| (a.kind, a.offset));
            let asked_again =
                [place(high.keep_site_at(number)), place(low.keep_site_at(number)), place(second)];
            if asked_again.iter().any(|other| *other != place(first)) {
                let detail = "asked for code that keeps its site, answers differently at another base or another time";
                report.code(self.code, &subject, Rule::Constancy, None, detail);
            } else if kept.kind != RelocationType::NONE && kept.kind != plain.kind {
                let detail = format!(
                    "answered {}, and {} where code that keeps its site is asked for",
                    kind_name(plain.kind),
                    kind_name(kept.kind)
                );
                report.code(self.code, &subject, Rule::Answer, None, detail);
            } else if kept.kind.has_address() && kept.offset.is_none() {
                let detail = format!(
                    "answered with linear {:08X}h, outside the image, where code that keeps its site is asked for",
                    kept.eip
                );
                report.code(self.code, &subject, Rule::Answer, None, detail);
            }
        }
    }

    /// The answers of a copy of the slots are those of the whole, seen from where the copy lies.
    fn check_copy(&self, high: &Table, report: &mut Report) {
        for (number, _) in self.interface.calls() {
            let (asked, answer) = self.ask(Placement::COPY, number, 1 + u64::from(number));
            let Some(answer) = answer else { return self.judge(&asked, Rule::Copy, report) };
            let machine = &asked.start.machine;
            if let Some((at, breach)) = machine.trace.breaches.first() {
                let detail = format!("in a copy of the slots: {breach}");
                return report.code(self.code, &self.subject, Rule::Copy, *at, detail);
            }
            let same = high.answer_at(number).is_some_and(|first| {
                let distance = |eip: u32, base: u32| eip.wrapping_sub(base);
                let there = distance(answer.eip, Placement::COPY.base);
                first.kind == answer.kind
                    && (distance(first.eip, HIGH_BASE) == there || !first.kind.has_address())
            });
            if !same {
                let subject = Subject::call(Some(self.interface), number);
                let detail = "answered differently by a copy of the slots";
                return report.code(self.code, &subject, Rule::Copy, None, detail);
            }
        }
    }
}

fn check_answers(
    code: &Code<'_>,
    interface: &Interface,
    high: &Table,
    low: &Table,
    report: &mut Report,
) {
    for (number, call) in interface.calls() {
        let Some(high) = high.answer_at(number) else { continue };
        let subject = Subject::call(Some(interface), number);
        let Some(kind) = high.kind.as_answers() else {
            let detail = format!("answered with type {}, which no revision defines", high.kind.0);
            report.code(code, &subject, Rule::Answer, None, detail);
            continue;
        };
        let has_slots = interface.revision.has_slots();
        let allowed = if has_slots { Answers::SLOT } else { call.contract.answers };
        if !allowed.contains(kind) {
            let reason = if has_slots {
                "and Sanos stops at anything but CALL_REL"
            } else {
                "which this call's guests cannot live with"
            };
            let detail = format!("answered {}, {reason}", kind_name(high.kind));
            report.code(code, &subject, Rule::Answer, high.offset, detail);
        }
        if high.kind.has_address() && high.offset.is_none() {
            let detail = format!("answered with linear {:08X}h, outside the image", high.eip);
            report.code(code, &subject, Rule::Answer, None, detail);
        }
        let alike = low
            .answer_at(number)
            .is_some_and(|low| low.kind == high.kind && low.offset == high.offset);
        if !alike {
            let detail = format!(
                "answered differently at linear bases {HIGH_BASE:08X}h and {LOW_BASE:08X}h"
            );
            report.code(code, &subject, Rule::Base, None, detail);
        }
    }
}

fn check_groups(code: &Code<'_>, interface: &Interface, table: &Table, report: &mut Report) {
    for (group, name) in [(Group::Timer, "timer"), (Group::Apic, "APIC")] {
        let members = || {
            interface
                .calls()
                .filter(move |(_, call)| call.contract.group == Some(group))
                .filter_map(|(number, _)| {
                    Some((number, table.answer_at(number)?.kind != RelocationType::NONE))
                })
        };
        if !members().any(|(_, answered)| answered) {
            continue;
        }
        for (number, _) in members().filter(|(_, answered)| !answered) {
            let subject = Subject::call(Some(interface), number);
            let detail =
                format!("answered NONE while other {name} calls are answered: all or none");
            report.code(code, &subject, Rule::Group, None, detail);
        }
    }
}

/// The specification's name of a relocation type.
pub fn kind_name(kind: RelocationType) -> String {
    kind.name().map_or_else(|| format!("type {}", kind.0), str::to_owned)
}
