//! Each call's code, executed from many states.

use super::{Report, Rule, Subject, effects, slots};
use crate::inspect::answers::Table;
use crate::inspect::interface::Entry;
use crate::inspect::machine::registers::{GENERAL, SEGMENTS};
use crate::inspect::machine::{Code, Machine, Stop, WRITE_PROTECT, flags};
use crate::inspect::reach::{Executed, reach};
use crate::inspect::site::WORD;
use crate::inspect::trial::{self, Placement, Trial};
use crate::inspect::{HIGH_BASE, Interface, LOW_BASE};
use iced_x86::Register;
use std::collections::BTreeSet;
use vmi_abi::{Call, Ending, Registers, STACK_LIMIT, number};

/// States from which each call is executed, at each base.
const TRIALS: u64 = 64;

/// States from which a call that never returns is executed.
const STOPPING_TRIALS: u64 = 4;

/// Instructions that a call may take before it is said not to return.
const CALL_BUDGET: u64 = 200_000;

/// Reads of kernel text before each of which another processor may change it.
const RACE_READS: u32 = 16;

/// How often a call may change its site, from call to call, until nothing is left to change.
const SITE_CHANGES: u64 = 3;

/// Instructions after which a call that must not return is believed, once; then a tenth of it.
const STOPPING_BUDGET: u64 = 600_000;

pub(super) fn check(code: &Code<'_>, interface: &Interface, table: &Table, report: &mut Report) {
    for (number, call) in interface.calls().filter(|(number, _)| !interface.is_function(*number)) {
        let keeping = interface.keep_site_entry(table, number);
        let is_keeping = |entry: &Entry| keeping.is_some_and(|other| other.offset == entry.offset);
        let mut entries = interface.entries(table, number, call);
        for entry in &mut entries {
            entry.keeps_site = is_keeping(entry);
        }
        let elsewhere = keeping.filter(|_| !entries.iter().any(is_keeping));
        for entry in entries {
            let subject = Subject { name: call.name, call: Some(number) };
            if entry.is_slot && !slots::has_code(code, &subject, entry.offset, report) {
                continue;
            }
            let most = check_call(code, interface, call, subject, entry, report);
            report.ran(number, most);
        }
        if let Some(entry) = elsewhere {
            let subject = Subject { name: call.name, call: Some(number) };
            check_call(code, interface, call, subject, entry, report);
        }
    }
    // It may know that there is one processor, as in the memory of a running machine: who can tell?
    let count = report.one_processor.len();
    if count != 0 {
        let detail = format!(
            "not decided: {count} calls change sites that lie in two aligned words of {WORD} bytes, which is right on a \
             machine with one processor only"
        );
        report.note("image", detail);
    }
}

/// Executes and judges a call's code at one entry; the most instructions that an execution took.
fn check_call(
    code: &Code<'_>,
    interface: &Interface,
    call: &Call,
    subject: Subject,
    entry: Entry,
    report: &mut Report,
) -> u64 {
    let mut check = Check {
        code,
        call,
        subject,
        report,
        kept: Registers::empty(),
        deeds: Deeds::default(),
        keeps_site: entry.keeps_site,
        place: String::new(),
    };
    let stops = call.contract.ending == Ending::Stops;
    let trials = if stops { STOPPING_TRIALS } else { TRIALS };
    let Entry { offset, kind, is_slot, .. } = entry;
    let mut copies = is_slot;
    let mut executed = Executed::new(code);
    let mut most = 0;
    let mut cut_short = false;
    for seed in 0..trials {
        let budget = match stops {
            true if seed < 2 => STOPPING_BUDGET,
            true => STOPPING_BUDGET / 10,
            false => CALL_BUDGET,
        };
        let mut high = trial::call(code, Placement::whole(HIGH_BASE), offset, call, kind, seed);
        let stop = high.machine.run(budget);
        executed.add(&high.machine.trace);
        let trace = &high.machine.trace;
        most = most.max(trace.instructions - trace.site.len() as u64);
        cut_short |= matches!(stop, Stop::Budget | Stop::Fuel);
        let goes_on = check.judge(&high, stop);
        if !goes_on {
            break;
        }
        let again = |seed, before: &Trial<'_>| {
            trial::again(code, Placement::whole(HIGH_BASE), offset, call, kind, seed, before)
        };
        check.half_done(&high, |half| again(seed + trials, half), budget, &mut executed);
        let mut before = high.clone();
        for time in 1..=SITE_CHANGES {
            let Some(mut next) = again(seed + trials * time, &before) else { break };
            let stop = next.machine.run(budget);
            executed.add(&next.machine.trace);
            check.judge(&next, stop);
            check.half_done(&next, |half| again(seed, half), budget, &mut executed);
            if time == SITE_CHANGES && next.rewrote() {
                let detail = "changes its call site each time that it is called from there";
                check.once(Rule::Site, next.machine.trace.last, detail);
            }
            before = next;
        }
        if high.rewrote() {
            let fresh = || trial::call(code, Placement::whole(HIGH_BASE), offset, call, kind, seed);
            check.race(&high, fresh, budget, &mut executed);
        }
        if stops && seed > 0 {
            continue;
        }
        let mut low = trial::call(code, Placement::whole(LOW_BASE), offset, call, kind, seed);
        let low_stop = low.machine.run(budget);
        if !check.same(&high, stop, &low, low_stop) {
            break;
        }
        if copies {
            let mut copy = trial::call(code, Placement::COPY, offset, call, kind, seed);
            let copy_stop = copy.machine.run(budget);
            copies = check.same_in_copy(&high, stop, &copy, copy_stop);
        }
    }
    if interface.revision.has_slots() {
        effects::judge_deeds(&mut check);
    }
    let executed = executed.offsets();
    let reached = reach(code, offset, executed, cut_short);
    check.report.reachable(code, &check.subject, &reached);
    if is_slot {
        slots::check_reach(code, &check.subject, interface, offset, &reached, check.report);
    }
    let looked_at = reached.instructions.keys().filter(|offset| !executed.contains(offset));
    if let Some(first) = looked_at.clone().next() {
        let count = looked_at.count();
        let plural = if count == 1 { "instruction was" } else { "instructions were" };
        let detail =
            format!("{count} {plural} looked at but never executed, the first at {first:X}h");
        check.report.note(call.name, detail);
    }
    most
}

/// A call under examination.
pub(super) struct Check<'a, 'b> {
    pub(super) code: &'a Code<'a>,
    pub(super) call: &'a Call,
    subject: Subject,
    report: &'b mut Report,
    /// Registers already reported.
    kept: Registers,
    /// What the call was seen to do.
    pub(super) deeds: Deeds,
    /// Whether the code was asked for with [`KEEP_SITE`](vmi_abi::KEEP_SITE).
    keeps_site: bool,
    /// What is to be said of where the execution under judgement went besides the image.
    place: String,
}

/// What a call that returned was seen to do, in any execution.
#[derive(Default)]
pub(super) struct Deeds {
    /// Executions that returned.
    pub(super) returned: u64,
    /// Whether an instruction reached beyond the program, or a store changed what an argument points to.
    pub(super) acted: bool,
    /// Places of the general registers that an instruction wrote.
    pub(super) written: [bool; 8],
}

impl Check<'_, '_> {
    /// Whether the call is known to break a rule.
    pub(super) fn is_broken(&self) -> bool {
        self.report.violations.iter().any(|found| found.call == self.subject.call)
    }

    pub(super) fn note(&mut self, detail: impl Into<String>) {
        self.report.note(self.subject.name, detail);
    }

    pub(super) fn violation(
        &mut self,
        rule: Rule,
        offset: Option<usize>,
        detail: impl Into<String>,
    ) {
        let detail = format!("{}{}", self.place, detail.into());
        self.report.code(self.code, &self.subject, rule, offset, detail);
    }

    /// A violation that carries no place, or a place that differs by state: once for a call.
    pub(super) fn once(&mut self, rule: Rule, offset: Option<usize>, detail: impl Into<String>) {
        let known = self
            .report
            .violations
            .iter()
            .any(|found| found.rule == rule && found.call == self.subject.call);
        if !known {
            self.violation(rule, offset, detail);
        }
    }

    /// Judges one execution; whether more would tell more.
    fn judge(&mut self, trial: &Trial<'_>, stop: Stop) -> bool {
        let trace = &trial.machine.trace;
        self.report.breaches(self.code, &self.subject, &trace.breaches);
        self.judge_site(trial);
        let base = trial.machine.memory.image_base();
        let end = trial.site.as_ref().map_or(0, |site| site.end);
        // A filler alone is nothing to speak of.
        self.place = match trace.site.iter().any(|i| base.wrapping_add(i.ip32()) < end) {
            false => String::new(),
            true => format!("with `{}` at the call site: ", super::at_site(&trace.site)),
        };
        let goes_on = self.judge_contract(trial, stop);
        self.place.clear();
        goes_on
    }

    fn judge_contract(&mut self, trial: &Trial<'_>, stop: Stop) -> bool {
        let trace = &trial.machine.trace;
        let depth = trial.machine.stack_depth();
        if depth > STACK_LIMIT {
            let detail =
                format!("uses {depth} bytes of the caller's stack, {STACK_LIMIT} are granted");
            self.once(Rule::StackUse, trace.last, detail);
        }
        match stop {
            Stop::Undecided => {
                let detail = "cannot decide: this instruction is not known to the inspector";
                self.violation(Rule::Undecided, trace.last, detail);
                return true;
            }
            Stop::Fuel => {
                let detail = super::OUT_OF_FUEL;
                self.once(Rule::Undecided, trace.last, detail);
                return false;
            }
            Stop::Interrupt(vector) => {
                let detail = format!("raises exception or interrupt {vector}");
                self.violation(Rule::Ending, trace.last, detail);
                return true;
            }
            _ => {}
        }
        match self.call.contract.ending {
            Ending::Returns => self.judge_return(trial, stop),
            Ending::Transfers if self.call.number == Some(number::IRET) => {
                self.judge_iret(trial, stop)
            }
            Ending::Transfers => self.judge_sysexit(trial, stop),
            Ending::Stops => self.judge_end(trial, stop),
        }
    }

    fn judge_return(&mut self, trial: &Trial<'_>, stop: Stop) -> bool {
        let machine = &trial.machine;
        let at = machine.trace.last;
        match stop {
            Stop::Left if machine.registers.eip == trial.return_address() => {}
            Stop::Left => {
                let detail = format!(
                    "does not return to its caller: leaves the image for {:04X}:{:08X}h",
                    machine.registers.get(Register::CS),
                    machine.registers.eip
                );
                self.violation(Rule::Ending, at, detail);
                return true;
            }
            Stop::Halted => {
                self.violation(
                    Rule::Ending,
                    at,
                    "halts with interrupts disabled: it never returns",
                );
                return true;
            }
            Stop::Reset => {
                self.violation(Rule::Ending, at, "shuts the processor down");
                return true;
            }
            _ => {
                let detail = format!("did not return within {CALL_BUDGET} instructions");
                self.once(Rule::Ending, at, detail);
                return false;
            }
        }
        let expected = trial.entry.get(Register::ESP).wrapping_add(4);
        let esp = machine.registers.get(Register::ESP);
        if esp != expected {
            let detail = format!(
                "returns with ESP {:+} bytes from where the caller expects it",
                esp.wrapping_sub(expected) as i32
            );
            self.violation(Rule::StackBalance, at, detail);
        }
        self.judge_registers(trial, self.call.contract.may_change() | Registers::ESP);
        self.judge_write_protection(trial);
        effects::judge_flags(self, trial);
        effects::judge_effect(self, trial);
        effects::note_deeds(self, trial);
        true
    }

    /// Registers beyond those of `may_change` are as they were.
    fn judge_registers(&mut self, trial: &Trial<'_>, may_change: Registers) {
        let machine = &trial.machine;
        let (before, after) = (trial.entry.general(), machine.registers.general());
        for (place, (name, register)) in GENERAL.iter().enumerate() {
            if before[place] == after[place]
                || may_change.contains(*register)
                || self.kept.contains(*register)
            {
                continue;
            }
            self.kept |= *register;
            // Two registers lost to one instruction are two violations.
            let detail = format!("changes {name}, which the call must keep");
            self.register(machine.trace.writers[place], detail);
        }
        for segment in SEGMENTS {
            if trial.entry.get(segment) != machine.registers.get(segment) {
                let detail = format!("changes {segment:?}, which the call must keep");
                self.violation(Rule::Register, machine.trace.last, detail);
            }
        }
    }

    fn register(&mut self, offset: Option<usize>, detail: String) {
        let instruction =
            offset.and_then(|offset| self.code.at(offset)).map(|i| super::disassemble(&i));
        let detail = format!("{}{detail}", self.place);
        self.report.violations.push(super::Violation {
            rule: Rule::Register,
            call: self.subject.call,
            subject: self.subject.name,
            offset,
            instruction,
            detail,
        });
    }

    fn judge_iret(&mut self, trial: &Trial<'_>, stop: Stop) -> bool {
        let machine = &trial.machine;
        let at = machine.trace.last;
        if stop != Stop::Left {
            let detail = format!("does not end in an interrupt return ({})", told(stop));
            self.once(Rule::Ending, at, detail);
            return stop != Stop::Budget;
        }
        let word = |place: usize| trial.frame.get(place).copied();
        let registers = &machine.registers;
        if Some(registers.eip) != word(0) {
            let detail = match registers.eip {
                eip if eip == trial.return_address() => {
                    "takes the return address for the frame: reached by CALL_REL, it must drop it".to_owned()
                }
                eip if Some(eip) == word(1) => {
                    "drops a word of the frame: reached by JUMP_REL, no return address lies above it".to_owned()
                }
                eip => format!("goes on at {eip:08X}h instead of the frame's EIP"),
            };
            self.once(Rule::Ending, at, detail);
            return true;
        }
        // Virtual-8086 mode runs at privilege level 3 whatever its CS is.
        let virtual_8086 = word(2).is_some_and(|flags| flags & flags::VIRTUAL_8086 != 0);
        let level = if virtual_8086 { 3 } else { 0 };
        let mut wanted = vec![
            ("CS", registers.get(Register::CS), word(1).map(|cs| cs | level)),
            (
                "EFLAGS",
                registers.eflags,
                word(2).map(|flags| flags | (registers.eflags & flags::FIXED)),
            ),
        ];
        let outer = trial.frame.len() > 3;
        let esp = if outer { word(3) } else { Some(trial.frame_at.wrapping_add(12)) };
        wanted.push(("ESP", registers.get(Register::ESP), esp));
        if outer {
            wanted.push(("SS", registers.get(Register::SS), word(4)));
        }
        let segments = [Register::ES, Register::DS, Register::FS, Register::GS];
        for (place, segment) in (5..).zip(segments) {
            let value = if virtual_8086 { word(place) } else { Some(trial.entry.get(segment)) };
            wanted.push(("a data segment register", registers.get(segment), value));
        }
        for (name, found, wanted) in wanted {
            if Some(found) != wanted {
                let wanted = wanted.unwrap_or_default();
                let detail = format!(
                    "{name} is {found:X}h behind the return, the interrupted context has {wanted:X}h"
                );
                self.once(Rule::Ending, at, detail);
            }
        }
        self.judge_registers_of(trial, Registers::ESP);
        self.judge_write_protection(trial);
        true
    }

    /// General registers alone: segments belong to the other context.
    fn judge_registers_of(&mut self, trial: &Trial<'_>, may_change: Registers) {
        let (before, after) = (trial.entry.general(), trial.machine.registers.general());
        for (place, (name, register)) in GENERAL.iter().enumerate() {
            let free = may_change.contains(*register) || self.kept.contains(*register);
            if before[place] != after[place] && !free {
                self.kept |= *register;
                let detail =
                    format!("changes {name}, which belongs to the interrupted context already");
                self.register(trial.machine.trace.writers[place], detail);
            }
        }
    }

    fn judge_sysexit(&mut self, trial: &Trial<'_>, stop: Stop) -> bool {
        let machine = &trial.machine;
        let at = machine.trace.last;
        if stop != Stop::Left || machine.registers.ring() != 3 {
            let detail = match stop {
                Stop::Left => format!(
                    "leaves the image for linear {:08X}h in ring 0 instead of going to user mode",
                    machine.registers.eip
                ),
                _ => format!("does not end in a return to user mode ({})", told(stop)),
            };
            self.once(Rule::Ending, at, detail);
            return stop != Stop::Budget;
        }
        let registers = &machine.registers;
        for (name, found, wanted) in [
            ("EIP", registers.eip, trial.entry.get(Register::EDX)),
            ("ESP", registers.get(Register::ESP), trial.entry.get(Register::ECX)),
        ] {
            if found != wanted {
                let detail = format!(
                    "goes to user mode with {name} {found:08X}h, the caller gave {wanted:08X}h"
                );
                self.once(Rule::Ending, at, detail);
            }
        }
        let by_frame = machine.trace.mnemonic == iced_x86::Mnemonic::Iretd;
        if registers.eflags & flags::INTERRUPT == 0 {
            self.once(Rule::Flags, at, "goes to user mode with interrupts disabled");
        } else if !machine.trace.shadowed && !by_frame {
            let detail = "enables interrupts too early: only in the shadow of STI, one instruction \
                          before, does no interrupt come between";
            self.once(Rule::Flags, at, detail);
        }
        let quiet = flags::DIRECTION | flags::TRAP | flags::NESTED | flags::IOPL;
        let changed = (trial.entry.eflags ^ registers.eflags) & quiet;
        if changed != 0 && !by_frame {
            let detail = format!("changes flags that it must keep (EFLAGS bits {changed:08X}h)");
            self.once(Rule::Flags, machine.trace.flags_writer, detail);
        }
        self.judge_registers_of(trial, Registers::ESP);
        self.judge_write_protection(trial);
        true
    }

    /// What became of the call site, and of the text around it.
    fn judge_site(&mut self, trial: &Trial<'_>) {
        let Some(site) = &trial.site else { return };
        let stores = &trial.machine.trace.text_stores;
        for store in stores {
            let at = store.offset;
            let (first, end) = (store.changed.start, store.changed.end);
            let beside = first < site.first || end > site.resume;
            let crosses = first / WORD != (end - 1) / WORD;
            if self.keeps_site {
                let detail =
                    "changes its call site, although the guest asked for code that does not";
                self.violation(Rule::Site, at, detail);
            } else if beside {
                let detail = "changes kernel text beside the instruction that called it";
                self.violation(Rule::Site, at, detail);
            } else if !site.proven {
                let detail = "changes a call site whose bytes do not prove that it calls this code";
                self.violation(Rule::Site, at, detail);
            } else if crosses && !store.locked {
                let detail = "changes bytes in two aligned words of 8 bytes: another processor may execute what is half done";
                self.violation(Rule::Site, at, detail);
            } else if !store.locked
                && (store.covered.start < site.first || store.covered.end > site.resume)
            {
                let detail = "stores over bytes beside its call site without a LOCK prefix: what another processor \
                              writes there can be lost";
                self.violation(Rule::Site, at, detail);
            } else if store.interruptible && trial.control & WRITE_PROTECT != 0 {
                let detail = "clears CR0.WP with interrupts enabled: an interrupt may go on without write protection";
                self.violation(Rule::Site, at, detail);
            } else if crosses {
                self.report.one_processor.insert(self.subject.name);
            }
        }
    }

    /// What another processor may find at a site that was changed by more than one store, each of which it
    /// sees as a whole: it reads the site from its start, so what it reads later may be newer.
    fn half_done<'b>(
        &mut self,
        trial: &Trial<'_>,
        again: impl Fn(&Trial<'_>) -> Option<Trial<'b>>,
        budget: u64,
        executed: &mut Executed,
    ) {
        let (Some(site), stores) = (&trial.site, &trial.machine.trace.text_stores) else { return };
        if stores.len() < 2 || stores.iter().any(|store| store.left.len() != site.bytes.len()) {
            return;
        }
        let states: Vec<&[u8]> =
            [&*site.bytes].into_iter().chain(stores.iter().map(|store| &*store.left)).collect();
        let splits = |at: u32| {
            stores.iter().any(|store| (store.changed.start + 1..store.changed.end).contains(&at))
        };
        let mut found = BTreeSet::new();
        for (place, older) in states.iter().enumerate() {
            for newer in states.get(place..).unwrap_or_default() {
                let borders = (0..older.len()).filter(|at| !splits(site.start + *at as u32));
                found.extend(borders.map(|at| [&older[..at], &newer[at..]].concat()));
            }
        }
        for bytes in found.iter().filter(|bytes| **bytes != site.bytes) {
            let mut half = trial.clone();
            if let Some(text) = &mut half.machine.memory.text {
                text.set_site(bytes);
            }
            let Some(mut half) = again(&half) else { continue };
            let stop = half.machine.run(budget);
            executed.add(&half.machine.trace);
            let known = self.report.violations.len();
            self.judge_contract(&half, stop);
            if self.report.violations.len() > known || !half.machine.trace.breaches.is_empty() {
                self.report.violations.truncate(known);
                let detail = "changes its call site by more than one store, and what is half done is another thing: \
                              another processor may execute it";
                self.once(Rule::Site, trial.machine.trace.last, detail);
            }
        }
    }

    /// The same again, while another processor makes of the site what `before` made of it, and of the
    /// bytes beside it something else.
    fn race<'b>(
        &mut self,
        before: &Trial<'_>,
        fresh: impl Fn() -> Trial<'b>,
        budget: u64,
        executed: &mut Executed,
    ) {
        let Some(mut after) = before.machine.memory.text.clone() else { return };
        after.change_neighbours();
        for reads in 0..RACE_READS {
            let mut raced = fresh();
            if let Some(text) = &mut raced.machine.memory.text {
                text.rival = Some((reads, after.bytes.clone()));
            }
            let stop = raced.machine.run(budget);
            executed.add(&raced.machine.trace);
            let Some(text) = &raced.machine.memory.text else { return };
            if text.rival.is_some() {
                return;
            }
            if text.bytes != after.bytes {
                let detail = "another processor changed the call site in the meantime, and what it put there is lost";
                self.once(Rule::Site, raced.machine.trace.last, detail);
            }
            self.judge_race(&raced, stop);
        }
    }

    /// What was stored is known to be right or wrong; this is about the call.
    fn judge_race(&mut self, raced: &Trial<'_>, stop: Stop) {
        self.report.breaches(self.code, &self.subject, &raced.machine.trace.breaches);
        self.place = "while another processor changes the call site: ".to_owned();
        self.judge_contract(raced, stop);
        self.place.clear();
    }

    /// CR0.WP as it was, or as SetCR0 has it.
    fn judge_write_protection(&mut self, trial: &Trial<'_>) {
        let machine = &trial.machine;
        let after = machine.system.control[0];
        let asked = match self.call.number {
            Some(number::SetCR0) => trial.entry.get(Register::EAX),
            _ => trial.control,
        };
        if [trial.control, asked].iter().all(|wanted| (wanted ^ after) & WRITE_PROTECT != 0) {
            let state = if after & WRITE_PROTECT == 0 { "clear" } else { "set" };
            let detail = format!("leaves CR0.WP {state}, which it was not before");
            self.once(Rule::Site, machine.trace.last, detail);
        }
    }

    fn judge_end(&mut self, trial: &Trial<'_>, stop: Stop) -> bool {
        let machine = &trial.machine;
        let at = machine.trace.last;
        let off = self.call.number == Some(number::Shutdown);
        match stop {
            Stop::Left => {
                let detail = if machine.registers.eip == trial.return_address() {
                    "returns to its caller, which expects to be gone".to_owned()
                } else {
                    format!("leaves the image for linear {:08X}h", machine.registers.eip)
                };
                self.violation(Rule::Ending, at, detail);
            }
            Stop::Budget if off && machine.registers.eflags & flags::INTERRUPT != 0 => {
                self.violation(
                    Rule::Flags,
                    at,
                    "waits with interrupts enabled: this processor is not off",
                );
            }
            Stop::Reset if off => {
                self.violation(Rule::Ending, at, "resets the machine instead of waiting");
            }
            _ => {}
        }
        true
    }

    /// Whether the code does the same at another base.
    fn same(&mut self, high: &Trial<'_>, stop: Stop, low: &Trial<'_>, low_stop: Stop) -> bool {
        let Some(difference) = self.differs(high, stop, low, low_stop) else { return true };
        let b = &low.machine;
        self.report.breaches(self.code, &self.subject, &b.trace.breaches);
        let detail =
            format!("with the image at linear {HIGH_BASE:08X}h and {LOW_BASE:08X}h: {difference}");
        let last = b.trace.breaches.first().map_or(b.trace.last, |(offset, _)| *offset);
        self.once(Rule::Base, last, detail);
        false
    }

    /// Whether the code does the same in a copy of the slots.
    fn same_in_copy(
        &mut self,
        whole: &Trial<'_>,
        stop: Stop,
        copy: &Trial<'_>,
        copy_stop: Stop,
    ) -> bool {
        let trace = &copy.machine.trace;
        let known = |offset: Option<usize>| {
            whole.machine.trace.breaches.iter().any(|(at, _)| *at == offset)
        };
        let (at, detail) = if copy_stop == Stop::Fuel {
            self.once(Rule::Undecided, trace.last, super::OUT_OF_FUEL);
            return false;
        } else if let Some(offset) = copy.machine.missed().filter(|_| copy_stop == Stop::Left) {
            (trace.last, slots::leaves(offset))
        } else if let Some((at, breach)) = trace.breaches.iter().find(|(at, _)| !known(*at)) {
            (*at, format!("in a copy of the slots: {breach}"))
        } else if let Some(difference) = self.differs(whole, stop, copy, copy_stop) {
            (trace.last, format!("in the image and in a copy of the slots: {difference}"))
        } else {
            return true;
        };
        self.violation(Rule::Copy, at, detail);
        false
    }

    /// What differs between two executions that should be alike.
    fn differs(
        &self,
        high: &Trial<'_>,
        stop: Stop,
        low: &Trial<'_>,
        low_stop: Stop,
    ) -> Option<String> {
        let (a, b) = (&high.machine, &low.machine);
        let places = |trial: &Trial<'_>| -> Vec<Option<usize>> {
            trial.machine.trace.breaches.iter().map(|(offset, _)| *offset).collect()
        };
        if stop != low_stop {
            Some(format!("{} at one base and {} at the other", told(stop), told(low_stop)))
        } else if places(high) != places(low) {
            Some("reaches memory that it may touch at one base only".to_owned())
        } else if stop == Stop::Left && a.registers.eip != b.registers.eip {
            Some("goes on at different places".to_owned())
        } else if a.trace.offsets != b.trace.offsets {
            Some("takes different ways".to_owned())
        } else if stored(a).ne(stored(b)) || high.rewrote() != low.rewrote() {
            Some("stores different values".to_owned())
        } else if stop == Stop::Left {
            let names: Vec<&str> = GENERAL
                .iter()
                .enumerate()
                .filter(|(place, (_, register))| {
                    self.call.contract.results.contains(*register)
                        && a.registers.general()[*place] != b.registers.general()[*place]
                })
                .map(|(_, (name, _))| *name)
                .collect();
            (!names.is_empty()).then(|| format!("returns different values in {}", names.join(", ")))
        } else {
            None
        }
    }
}

/// What lies in the memory that the call may change, the stack left out.
fn stored<'a>(machine: &'a Machine<'_>) -> impl Iterator<Item = &'a [u8]> {
    machine.memory.regions.iter().skip(1).filter(|r| r.writable).map(|r| r.bytes.as_slice())
}

/// How an execution ended, in words.
fn told(stop: Stop) -> String {
    match stop {
        Stop::Left => "leaves the image".to_owned(),
        Stop::Halted => "halts with interrupts disabled".to_owned(),
        Stop::Reset => "shuts the processor down".to_owned(),
        Stop::Interrupt(vector) => format!("raises exception {vector}"),
        Stop::Budget => "runs for ever".to_owned(),
        Stop::Fuel | Stop::Undecided => "cannot be decided".to_owned(),
    }
}
