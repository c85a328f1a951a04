//! The images of revision 13.x as bytes: the slots, what lies behind them, and what `verify` says.

use anyhow::{Context, Result, ensure};
use iced_x86::Register;
use object::{Object, ObjectSymbol};
use std::path::PathBuf;
use vmi_abi::calls::SLOTS_13;
use vmi_abi::flags::CycleCounter;
use vmi_abi::header::{SLOT_SIZE, SLOT_TABLE_SIZE, checksum};
use vmi_abi::{
    CallNumber, REVISION_13_0, REVISION_13_3, RelocationType, Revision, number, probe,
    slot as slot_of,
};
use xtask::artifacts;
use xtask::inspect::machine::Code;
use xtask::inspect::survey::CallFacts;
use xtask::inspect::trial::{self, Placement};
use xtask::inspect::{self, COPY_BASE, HIGH_BASE, LOW_BASE, Rom, Rule, verify};

/// What unserved slots hold.
const UD2: [u8; 2] = [0x0f, 0x0b];

/// What fills the rest of a slot behind its call.
const GAP: u8 = 0xcc;

/// Instructions that a call of the timer does not come near.
const BUDGET: u64 = 1000;

/// `jmp rel32`.
const JUMP: u8 = 0xe9;

/// The offset behind the last slot that any revision serves: from there on code may lie anywhere.
const SPARE: usize = (*SLOTS_13.end() as usize + 1) * SLOT_SIZE;

/// The images, with the revision that each is to serve.
fn images() -> Result<[(Revision, PathBuf); 2]> {
    let built = artifacts::ensure()?;
    Ok([(REVISION_13_0, built.slots_13_0.clone()), (REVISION_13_3, built.slots_13_3.clone())])
}

/// The bytes of a slot.
fn slot(image: &[u8], number: u8) -> &[u8] {
    &image[usize::from(number) * SLOT_SIZE..][..SLOT_SIZE]
}

/// What the inspector found out of each call.
fn calls(image: &[u8]) -> Result<Vec<CallFacts>> {
    Ok(inspect::survey(&Rom::parse(image)?, HIGH_BASE)?.calls)
}

#[test]
fn our_images_are_clean_and_no_longer_than_what_guests_copy() -> Result<()> {
    for (revision, path) in images()? {
        let bytes = std::fs::read(path)?;
        let report = verify(&Rom::parse(&bytes)?);
        assert!(report.is_clean(), "{revision:?}: {:#?}", report.violations);
        let executed = report.executed.iter().flatten().count();
        assert_eq!(executed, revision.calls().count(), "{revision:?}");
        assert_eq!(bytes.len(), SLOT_TABLE_SIZE);
        assert_eq!(checksum(&bytes), 0);
        let header = probe::probe(&bytes, revision)?;
        assert_eq!(
            (header.api_version_maj, header.api_version_min),
            (revision.major, revision.minor)
        );
    }
    Ok(())
}

/// A call is as long as its slot at most, or leaves it at once for the free slots behind the last call.
#[test]
fn every_call_is_in_its_slot() -> Result<()> {
    for (revision, path) in images()? {
        let bytes = std::fs::read(path)?;
        let facts = calls(&bytes)?;
        assert_eq!(facts.len(), revision.calls().count());
        for (found, (number, call)) in facts.iter().zip(revision.calls()) {
            let start = call.contract.slot.context(call.name)?.offset();
            assert_eq!((found.number, found.name, found.offset), (number, call.name, Some(start)));
            let slot = slot(&bytes, u8::try_from(number)?);
            let code = found.code.as_ref().context(call.name)?;
            let inside = if slot[0] == JUMP {
                let distance = i32::from_le_bytes(slot[1..5].try_into()?);
                let target = (start + 5).checked_add_signed(distance.try_into()?);
                let spare = SPARE..SLOT_TABLE_SIZE;
                assert!(target.is_some_and(|target| spare.contains(&target)), "{}", call.name);
                5
            } else {
                code.bytes
            };
            assert!(inside <= SLOT_SIZE, "{}", call.name);
            assert!(slot[inside..].iter().all(|byte| *byte == GAP), "{}: {slot:x?}", call.name);
        }
    }
    Ok(())
}

#[test]
fn slots_without_a_call_trap() -> Result<()> {
    for (revision, path) in images()? {
        let bytes = std::fs::read(&path)?;
        let linked = std::fs::read(path.with_extension("elf"))?;
        let linked = object::File::parse(&*linked)?;
        let end = linked.symbols().find(|symbol| symbol.name() == Ok("rom_end"));
        let end = usize::try_from(end.context("no symbol rom_end")?.address())?;
        let unserved = SLOTS_13.filter(|number| revision.call((*number).into()).is_none());
        for number in unserved {
            assert!(slot(&bytes, number).chunks(2).all(|bytes| bytes == UD2), "{number}");
        }
        // The last byte makes the sum of all right.
        let free = &bytes[end.next_multiple_of(UD2.len())..SLOT_TABLE_SIZE - UD2.len()];
        assert!(free.chunks(2).all(|bytes| bytes == UD2), "{revision:?}");
    }
    Ok(())
}

/// 13.3 adds calls and changes none.
#[test]
fn both_revisions_have_the_same_calls() -> Result<()> {
    let [old, new] = images()?.map(|(_, path)| std::fs::read(path));
    let (old, new) = (old?, new?);
    let first = slot_of::Init.offset();
    let last = slot_of::GetRelocationInfo.offset();
    assert!(old[first..last] == new[first..last]);
    Ok(())
}

/// Sanos stops at any other answer.
#[test]
fn every_call_is_answered_with_its_slot() -> Result<()> {
    let bytes = std::fs::read(&artifacts::ensure()?.slots_13_3)?;
    let rom = Rom::parse(&bytes)?;
    // A ROM in place, at another address, and a copy of its slots.
    for base in [HIGH_BASE, LOW_BASE, COPY_BASE] {
        let table = inspect::answers(&rom, base);
        for (number, call) in REVISION_13_3.calls() {
            let found = table.answer_at(number).context(call.name)?;
            assert_eq!(found.kind, RelocationType::CALL_REL, "{}", call.name);
            let slot = call.contract.slot.context(call.name)?;
            assert_eq!(found.offset, Some(slot.offset()), "{}", call.name);
        }
    }
    Ok(())
}

/// A call that both 3.0 and 13.x have is the same code, which a jump may lead to.
#[test]
fn calls_are_those_of_revision_3_0() -> Result<()> {
    let built = artifacts::ensure()?;
    let lookup = calls(&std::fs::read(&built.call)?)?;
    let bytes = std::fs::read(&built.slots_13_3)?;
    let slots = calls(&bytes)?;
    for (number, call) in REVISION_13_3.calls() {
        // Of IRET the two have different forms: here no return address is to be dropped.
        let is_shared = call.number.is_some() && call.contract.group.is_none();
        if !is_shared || call.name == "IRET" {
            continue;
        }
        let instructions = |calls: &[CallFacts]| {
            let facts = calls.iter().find(|facts| facts.name == call.name)?;
            Some(facts.code.as_ref()?.instructions)
        };
        let jump = usize::from(slot(&bytes, u8::try_from(number)?)[0] == JUMP);
        let expected = instructions(&lookup).context(call.name)? + jump;
        assert_eq!(instructions(&slots), Some(expected), "{}", call.name);
    }
    Ok(())
}

/// EDX:EAX after a call with this argument in EAX.
fn result(image: &[u8], number: CallNumber, argument: u32) -> Result<u64> {
    let call = number.call().context("a call of 3.0")?;
    let code = Code::new(image, BUDGET);
    let placement = Placement { base: HIGH_BASE, length: SLOT_TABLE_SIZE };
    let offset = call.contract.slot.context(call.name)?.offset();
    let mut trial = trial::call(&code, placement, offset, call, RelocationType::CALL_REL, 1);
    trial.machine.registers.set(Register::EAX, argument);
    let stop = trial.machine.run(BUDGET);
    ensure!(trial.returned(stop), "{} does not return", call.name);
    let register = |register| u64::from(trial.machine.registers.get(register));
    Ok(register(Register::EDX) << 32 | register(Register::EAX))
}

/// There is no state, and no clock but one of unknown speed.
#[test]
fn the_timer_tells_nothing_that_it_does_not_know() -> Result<()> {
    let bytes = std::fs::read(&artifacts::ensure()?.slots_13_3)?;
    assert_eq!(result(&bytes, number::GetCycleFrequency, 0)?, 0);
    assert_eq!(result(&bytes, number::GetWallclockTime, 0)?, 0);
    assert_eq!(result(&bytes, number::CancelAlarm, 0)? as u32, 0);
    assert_eq!(result(&bytes, number::WallclockUpdated, 0)? as u32, 0);
    for counter in [CycleCounter::REAL, CycleCounter::AVAILABLE] {
        assert_ne!(result(&bytes, number::GetCycleCounter, counter.0)?, 0);
    }
    for counter in [CycleCounter::STOLEN.0, 3, u32::MAX] {
        assert_eq!(result(&bytes, number::GetCycleCounter, counter)?, 0);
    }
    Ok(())
}

/// The inspector sees a fault in one slot of this image, so its silence means something.
#[test]
fn a_broken_slot_is_named() -> Result<()> {
    let bytes = std::fs::read(&artifacts::ensure()?.slots_13_0)?;
    let number = slot_of::SwapPxE.number;
    let broken = |code: &[u8], rule: Rule| -> Result<()> {
        let mut image = bytes.clone();
        let start = usize::from(number) * SLOT_SIZE;
        image[start..start + code.len()].copy_from_slice(code);
        let last = image.len() - 1;
        image[last] = image[last].wrapping_sub(checksum(&image));
        let report = verify(&Rom::parse(&image)?);
        let found = report
            .violations
            .iter()
            .any(|found| found.rule == rule && found.call == Some(number.into()));
        assert!(found, "{rule:?} is not among {:#?}", report.violations);
        Ok(())
    };
    broken(&[0xc3], Rule::Effect)?;
    broken(&[GAP; SLOT_SIZE], Rule::Slot)?;
    broken(&[0x90; SLOT_SIZE], Rule::Slot)?;
    broken(&[0x31, 0xdb, 0x87, 0x02, 0xc3], Rule::Register)
}
