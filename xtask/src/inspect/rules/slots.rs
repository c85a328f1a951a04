//! What only revision 13.x asks for: each call's code in a slot of its own, and slots that can be copied.

use super::{Report, Rule, Subject};
use crate::inspect::Interface;
use crate::inspect::machine::Code;
use crate::inspect::reach::Reach;
use iced_x86::{FlowControl, Instruction, OpKind};
use std::ops::Range;
use vmi_abi::header::{SLOT_SIZE, SLOT_TABLE_SIZE};

/// Bytes with which an unused slot is filled: `add`, NOP, INT3, erased memory. None of them returns.
const FILLERS: [u8; 4] = [0x00, 0x90, 0xcc, 0xff];

/// Whether there is code in the slot at an offset. If not, that is the one thing to say of it.
pub(super) fn has_code(
    code: &Code<'_>,
    subject: &Subject,
    offset: usize,
    report: &mut Report,
) -> bool {
    let (at, detail) = match code.image().get(offset..offset + SLOT_SIZE) {
        // An offset that is not in the file would mislead whoever looks there.
        None => (
            None,
            format!(
                "the slot ends at {:X}h, behind the end of the image: there is no code for the call",
                offset + SLOT_SIZE
            ),
        ),
        Some(bytes) => {
            let filler = FILLERS.iter().find(|filler| bytes.iter().all(|byte| byte == *filler));
            let Some(filler) = filler else { return true };
            (
                Some(offset),
                format!(
                    "the slot is empty ({SLOT_SIZE} times {filler:02X}h): nothing in it returns, and no answer can \
                 keep a guest away"
                ),
            )
        }
    };
    report.image_of(subject, Rule::Slot, at, detail);
    false
}

/// Code that was followed from a slot stays in it, or leaves it by a branch, and within the copy.
pub(super) fn check_reach(
    code: &Code<'_>,
    subject: &Subject,
    interface: &Interface,
    offset: usize,
    reach: &Reach,
    report: &mut Report,
) {
    let end = offset + SLOT_SIZE;
    let next =
        u32::try_from(end / SLOT_SIZE).ok().and_then(|number| interface.revision.call(number));
    // Slots that hold no call are as good a place for code as any.
    if let Some(next) = next
        && let Some(at) = runs_over(reach, offset..end)
    {
        let detail = format!("runs over into the slot of {}, without a jump", next.name);
        report.code(code, subject, Rule::Slot, Some(at), detail);
    }
    for (at, instruction) in reach.instructions.range(..SLOT_TABLE_SIZE) {
        let target = branch_target(instruction).filter(|target| *target >= SLOT_TABLE_SIZE);
        if let Some(target) = target.filter(|target| *target < code.image().len()) {
            report.code(code, subject, Rule::Copy, Some(*at), leaves(target));
        }
    }
    if let Some(at) = runs_over(reach, 0..SLOT_TABLE_SIZE) {
        report.code(code, subject, Rule::Copy, Some(at), leaves(SLOT_TABLE_SIZE));
    }
}

/// What is wrong with code that goes on behind the copied slots.
pub(super) fn leaves(target: usize) -> String {
    format!(
        "goes on at offset {target:X}h: guests copy the first {SLOT_TABLE_SIZE} bytes and run the copy, \
         behind which lies something else"
    )
}

fn branch_target(instruction: &Instruction) -> Option<usize> {
    (instruction.op0_kind() == OpKind::NearBranch32).then(|| instruction.near_branch32() as usize)
}

/// The instruction in a range that ends behind it, or ends with it and goes on there.
fn runs_over(reach: &Reach, range: Range<usize>) -> Option<usize> {
    let (at, instruction) = reach.instructions.range(range.clone()).next_back()?;
    let next = at + instruction.len();
    let goes_on = matches!(
        instruction.flow_control(),
        FlowControl::Next
            | FlowControl::ConditionalBranch
            | FlowControl::Call
            | FlowControl::IndirectCall
    );
    // A call that never comes back was not followed behind.
    let followed = reach.instructions.contains_key(&next) || reach.unreadable.contains(&next);
    (next > range.end || next == range.end && goes_on && followed).then_some(*at)
}
