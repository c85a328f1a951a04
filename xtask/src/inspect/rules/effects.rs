//! What a call is for, as far as it shows: flags, and stores through pointer arguments.

use super::Rule;
use super::calls::Check;
use crate::inspect::machine::flags;
use crate::inspect::machine::registers::GENERAL;
use crate::inspect::trial::{TASK_STATE, Trial};
use iced_x86::{Mnemonic, Register};
use vmi_abi::{Answers, Ending, Registers, number, slot};

/// EFLAGS behind a call that returned.
pub(super) fn judge_flags(check: &mut Check<'_, '_>, trial: &Trial<'_>) {
    let machine = &trial.machine;
    let (before, after) = (trial.entry.eflags, machine.registers.eflags);
    let argument = trial.entry.get(Register::EAX);
    let mask = flags::INTERRUPT;
    let number = check.call.number;
    // The system's flags, as the call's meaning has them.
    let wanted = if number == Some(number::EnableInterrupts) || number == Some(number::Halt) {
        before | mask
    } else if number == Some(number::DisableInterrupts) {
        before & !mask
    } else if number == Some(number::SetInterruptMask) {
        (before & !mask) | (argument & mask)
    } else if number == Some(number::SetIOPLMask) {
        (before & !flags::IOPL) | (argument & flags::IOPL)
    } else {
        before
    };
    let at = machine.trace.flags_writer.or(machine.trace.last);
    if (wanted ^ after) & mask != 0 {
        let state = |flags: u32| if flags & mask != 0 { "enabled" } else { "disabled" };
        let detail =
            format!("returns with interrupts {}, they must be {}", state(after), state(wanted));
        check.once(Rule::Flags, at, detail);
    }
    let others = (wanted ^ after) & !flags::ARITHMETIC & !mask;
    if others != 0 {
        let detail = format!("changes {}, which the call must keep", names(others));
        check.once(Rule::Flags, at, detail);
    }
    let arithmetic = (before ^ after) & flags::ARITHMETIC;
    if arithmetic != 0 && !check.call.contract.may_change().contains(Registers::FLAGS) {
        let detail = format!("changes {}, and the call must keep all flags", names(arithmetic));
        check.once(Rule::Flags, at, detail);
    }
    if number == Some(number::GetInterruptMask)
        && (machine.registers.get(Register::EAX) ^ before) & mask != 0
    {
        let is = |set: bool| if set { "set" } else { "clear" };
        let detail = format!(
            "bit 9 of the result is {} while the interrupt flag is {}",
            is(machine.registers.get(Register::EAX) & mask != 0),
            is(before & mask != 0)
        );
        check.once(Rule::Effect, machine.trace.last, detail);
    }
}

/// The names of flags.
fn names(set: u32) -> String {
    let all = [
        (flags::CARRY, "CF"),
        (flags::PARITY, "PF"),
        (flags::ADJUST, "AF"),
        (flags::ZERO, "ZF"),
        (flags::SIGN, "SF"),
        (flags::TRAP, "TF"),
        (flags::INTERRUPT, "IF"),
        (flags::DIRECTION, "DF"),
        (flags::OVERFLOW, "OF"),
        (flags::IOPL, "IOPL"),
        (flags::NESTED, "NT"),
        (flags::RESUME, "RF"),
        (flags::VIRTUAL_8086, "VM"),
        (flags::ALIGNMENT, "AC"),
        (flags::IDENTIFICATION, "ID"),
    ];
    let found: Vec<&str> =
        all.iter().filter(|(flag, _)| set & flag != 0).map(|(_, name)| *name).collect();
    if found.is_empty() { format!("EFLAGS bits {set:08X}h") } else { found.join(", ") }
}

/// Memory behind a call that returned.
pub(super) fn judge_effect(check: &mut Check<'_, '_>, trial: &Trial<'_>) {
    let Some(number) = check.call.number else { return judge_slot_effect(check, trial) };
    match number {
        number::SetPxE => judge_entry(check, trial, 4),
        number::SetPxELong => judge_entry(check, trial, 8),
        number::WriteGDTEntry | number::WriteLDTEntry | number::WriteIDTEntry => {
            judge_descriptor(check, trial);
        }
        number::UpdateKernelStack => judge_kernel_stack(check, trial),
        number::GetGDT | number::GetIDT => {
            if let Some((at, size)) = pointed(check, trial, "buffer", 6) {
                expect_only(check, trial, at, size);
            }
        }
        _ => {}
    }
}

/// Memory and result behind a call that only revision 13.x has.
fn judge_slot_effect(check: &mut Check<'_, '_>, trial: &Trial<'_>) {
    let Some(call_slot) = check.call.contract.slot else { return };
    let size = match call_slot {
        slot::SetPxETwoArguments => return judge_entry(check, trial, 4),
        slot::SetPxELongTwoArguments => return judge_entry(check, trial, 8),
        slot::GetPxE | slot::SwapPxE | slot::TestAndSetPxEBit | slot::TestAndClearPxEBit => 4,
        slot::GetPxELong
        | slot::SwapPxELongAtomic
        | slot::DeactivatePxELongAtomic
        | slot::TestAndSetPxELongBit
        | slot::TestAndClearPxELongBit => 8,
        _ => return,
    };
    let Some((at, _)) = pointed(check, trial, "entry", size) else { return };
    let Some(old) = trial.pages.iter().find_map(|(_, page)| page.number(at, size)) else { return };
    let mask = u64::MAX >> (64 - 8 * size as u32);
    let bit = trial.argument(check.call, "bit").map_or(0, |bit| 1u64.unbounded_shl(bit as u32));
    let new = match call_slot {
        slot::SwapPxE | slot::SwapPxELongAtomic => {
            trial.argument(check.call, "value").unwrap_or_default() & mask
        }
        slot::DeactivatePxELongAtomic => 0,
        slot::TestAndSetPxEBit | slot::TestAndSetPxELongBit => old | bit,
        slot::TestAndClearPxEBit | slot::TestAndClearPxELongBit => old & !bit,
        _ => old,
    };
    let last = trial.machine.trace.last;
    let found = number_at(trial, at, size).unwrap_or_default();
    if found != new {
        let detail = format!("the entry holds {found:X}h on return and must hold {new:X}h");
        check.once(Rule::Effect, last, detail);
    }
    expect_only(check, trial, at, size);
    let [eax, _, edx, ..] = trial.machine.registers.general();
    let high = if size == 8 { u64::from(edx) << 32 } else { 0 };
    let wrong = if bit != 0 {
        ((eax != 0) != (old & bit != 0)).then(|| {
            let is = if old & bit != 0 { "set" } else { "clear" };
            format!("returns EAX = {eax:X}h, and the bit was {is}")
        })
    } else {
        let result = u64::from(eax) | high;
        (result != old).then(|| format!("returns {result:X}h, and the entry held {old:X}h"))
    };
    if let Some(detail) = wrong {
        check.once(Rule::Effect, last, detail);
    }
    // Of SwapPxE nobody says that it is one step.
    if !matches!(call_slot, slot::GetPxE | slot::GetPxELong | slot::SwapPxE) {
        judge_one_step(check, trial, old, mask);
    }
}

/// Each change of the entry is made by one instruction that no other processor can come between.
fn judge_one_step(check: &mut Check<'_, '_>, trial: &Trial<'_>, old: u64, mask: u64) {
    let mut before = old;
    for (offset, state) in &trial.machine.trace.watched {
        let changed = before != state & mask;
        before = state & mask;
        let locked = offset.and_then(|offset| check.code.at(offset)).is_some_and(|instruction| {
            instruction.has_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg
        });
        if changed && !locked {
            let detail = "changes the entry without a LOCK prefix: what another processor writes there can be lost";
            return check.violation(Rule::Effect, *offset, detail);
        }
    }
}

/// Remembers what an execution that returned has done.
pub(super) fn note_deeds(check: &mut Check<'_, '_>, trial: &Trial<'_>) {
    let trace = &trial.machine.trace;
    check.deeds.returned += 1;
    for (written, writer) in check.deeds.written.iter_mut().zip(&trace.writers) {
        *written |= writer.is_some();
    }
    check.deeds.acted = check.deeds.acted
        || !trace.events.is_empty()
        || trial.pages.iter().any(|(_, before)| {
            let regions = &trial.machine.memory.regions;
            regions.iter().any(|region| region.base == before.base && region.bytes != before.bytes)
        });
}

/// A slot that does nothing where its call must do something.
///
/// In revision 3.0 the honest answer is NONE. A slot is entered whatever is in it.
pub(super) fn judge_deeds(check: &mut Check<'_, '_>) {
    let contract = check.call.contract;
    // What is known to be wrong with the call says more.
    if check.is_broken() || check.deeds.returned == 0 || contract.ending != Ending::Returns {
        return;
    }
    let missing: Vec<&str> = (GENERAL.iter().zip(check.deeds.written))
        .filter(|((_, register), written)| contract.results.contains(*register) && !written)
        .map(|((name, _), _)| *name)
        .collect();
    if !missing.is_empty() {
        let detail = format!("returns no result: no instruction writes {}", missing.join(" or "));
        check.once(Rule::Effect, None, detail);
    }
    let may_do_nothing = contract.answers.contains(Answers::NOP) || !contract.results.is_empty();
    if check.deeds.acted || may_do_nothing {
        return;
    }
    if contract.group.is_some() {
        check.note("does nothing; whether the ROM has what it is for cannot be seen");
    } else {
        let detail =
            "does nothing: no instruction reaches beyond the program, and nothing is stored";
        check.once(Rule::Effect, None, detail);
    }
}

/// The place that a pointer argument points to.
fn pointed(
    check: &Check<'_, '_>,
    trial: &Trial<'_>,
    name: &str,
    size: usize,
) -> Option<(u32, usize)> {
    Some((trial.argument(check.call, name)? as u32, size))
}

fn number_at(trial: &Trial<'_>, at: u32, size: usize) -> Option<u64> {
    trial.machine.memory.read(at, size).ok()
}

/// A page-table entry: stored, alone, and never half of it present.
fn judge_entry(check: &mut Check<'_, '_>, trial: &Trial<'_>, size: usize) {
    let Some((at, _)) = pointed(check, trial, "entry", size) else { return };
    let mask = u64::MAX >> (64 - 8 * size as u32);
    let Some(value) = trial.argument(check.call, "value").map(|value| value & mask) else { return };
    let last = trial.machine.trace.last;
    let found = number_at(trial, at, size);
    if found != Some(value) {
        let found = found.map_or("nothing".to_owned(), |found| format!("{found:X}h"));
        let detail = format!("the entry holds {found} on return, the caller gave {value:X}h");
        check.once(Rule::Effect, last, detail);
    }
    expect_only(check, trial, at, size);
    let old = trial.pages.iter().find_map(|(_, page)| page.number(at, size));
    let torn = trial.machine.trace.watched.iter().find(|(_, state)| {
        let state = state & mask;
        state & 1 != 0 && state != value && Some(state) != old
    });
    if let Some((offset, state)) = torn {
        let detail = format!(
            "for a moment the entry is {:X}h, a present mapping that is neither the old nor the new one",
            state & mask
        );
        check.violation(Rule::Effect, *offset, detail);
    }
}

/// A descriptor: stored, save for what a ROM may alter on its way in.
fn judge_descriptor(check: &mut Check<'_, '_>, trial: &Trial<'_>) {
    let argument = |name| trial.argument(check.call, name);
    let (Some(table), Some(index)) = (argument("table"), argument("index")) else { return };
    let (Some(low), Some(high)) = (argument("low"), argument("high")) else { return };
    let at = (table + 8 * index) as u32;
    let value = (low & 0xffff_ffff) | (high << 32);
    // DPL, and of a gate its selector's RPL or of a segment the limit.
    let alterable: u64 = if check.call.number == Some(number::WriteIDTEntry) {
        0x0000_6000_0003_0000
    } else {
        0x000f_6000_0000_ffff
    };
    let found = number_at(trial, at, 8);
    if found.is_none_or(|found| (found ^ value) & !alterable != 0) {
        let found = found.map_or("nothing".to_owned(), |found| format!("{found:016X}h"));
        let detail = format!("the descriptor is {found} on return, the caller gave {value:016X}h");
        check.once(Rule::Effect, trial.machine.trace.last, detail);
    }
    expect_only(check, trial, at, 8);
}

/// The ring-0 stack pointer in the current task state segment.
fn judge_kernel_stack(check: &mut Check<'_, '_>, trial: &Trial<'_>) {
    let esp0 = trial.argument(check.call, "esp0");
    let found = number_at(trial, TASK_STATE + 4, 4);
    if found != esp0 {
        let detail =
            "the current task state segment does not hold the new ring-0 stack pointer on return";
        check.once(Rule::Effect, trial.machine.trace.last, detail);
    }
}

/// Nothing but `size` bytes at `at` differs in the pages that arguments point to.
fn expect_only(check: &mut Check<'_, '_>, trial: &Trial<'_>, at: u32, size: usize) {
    for (_, before) in &trial.pages {
        let Some(after) =
            trial.machine.memory.regions.iter().skip(1).find(|region| region.base == before.base)
        else {
            continue;
        };
        let inside = |place: usize| {
            let address = before.base.wrapping_add(place as u32);
            (address.wrapping_sub(at) as usize) < size
        };
        if after.bytes == before.bytes {
            continue;
        }
        let stray = (before.bytes.iter().zip(&after.bytes).enumerate())
            .find(|(place, (old, new))| old != new && !inside(*place));
        if let Some((place, _)) = stray {
            let distance = i64::from(before.base) + place as i64 - i64::from(at);
            let detail = format!(
                "changes memory {distance:+} bytes from where its pointer argument points to"
            );
            check.once(Rule::Effect, trial.machine.trace.last, detail);
        }
    }
}
