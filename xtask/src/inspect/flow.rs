//! Code as the processor goes through it, wherever it lies: for a comparison of two images.

use super::reach::Reach;
use iced_x86::{FlowControl, Instruction, OpKind};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// One step of normalised code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The instruction; targets of branches are numbers of steps.
    pub text: String,
    /// Where it lies.
    pub offset: usize,
}

enum Raw {
    /// The instruction at an offset.
    Instruction(usize),
    /// The code goes on at a step that stands elsewhere already.
    GoOn(usize),
}

/// The steps that can be reached, in an order that does not depend on where they lie.
///
/// A plain jump is no step: it only says where the code lies.
#[must_use]
pub fn steps(reach: &Reach, entry: usize) -> Vec<Step> {
    let mut raw = Vec::new();
    let mut places: BTreeMap<usize, usize> = BTreeMap::new();
    let mut todo: VecDeque<usize> = VecDeque::from([entry]);
    // What only an execution showed, behind a branch through a register for instance, comes last.
    let mut rest = reach.instructions.keys().copied();
    loop {
        let Some(start) = todo.pop_front() else {
            match rest.next() {
                Some(offset) if jump_target(reach, offset).is_none() => todo.push_back(offset),
                Some(_) => {}
                None => break,
            }
            continue;
        };
        let mut at = resolve(reach, start);
        if places.contains_key(&at) {
            continue;
        }
        while let Some(instruction) = reach.instructions.get(&at) {
            if places.contains_key(&at) {
                raw.push(Raw::GoOn(at));
                break;
            }
            places.insert(at, raw.len());
            raw.push(Raw::Instruction(at));
            let flow = instruction.flow_control();
            if let Some(target) = target(instruction)
                && flow != FlowControl::UnconditionalBranch
            {
                todo.push_back(target);
            }
            let goes_on = matches!(
                flow,
                FlowControl::Next
                    | FlowControl::ConditionalBranch
                    | FlowControl::Call
                    | FlowControl::IndirectCall
            );
            let next = at + instruction.len();
            if !goes_on || !reach.instructions.contains_key(&next) {
                break;
            }
            at = resolve(reach, next);
        }
    }
    raw.iter().map(|step| written(reach, &places, step)).collect()
}

/// Where a branch leads, if the instruction says so.
fn target(instruction: &Instruction) -> Option<usize> {
    matches!(instruction.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32)
        .then(|| instruction.near_branch_target() as usize)
}

/// Where a plain jump within the code leads.
fn jump_target(reach: &Reach, offset: usize) -> Option<usize> {
    let instruction = reach.instructions.get(&offset)?;
    if instruction.flow_control() != FlowControl::UnconditionalBranch {
        return None;
    }
    target(instruction).filter(|target| reach.instructions.contains_key(target))
}

/// Follows plain jumps to the first other instruction; in a ring of jumps, to one of them.
fn resolve(reach: &Reach, mut at: usize) -> usize {
    let mut seen = BTreeSet::new();
    while let Some(next) = jump_target(reach, at) {
        if !seen.insert(at) {
            break;
        }
        at = next;
    }
    at
}

fn written(reach: &Reach, places: &BTreeMap<usize, usize>, step: &Raw) -> Step {
    let (Raw::Instruction(offset) | Raw::GoOn(offset)) = *step;
    let label = |target: usize| match places.get(&resolve(reach, target)) {
        Some(place) => format!("step {place}"),
        None => "out of the image".to_owned(),
    };
    if matches!(step, Raw::GoOn(_)) {
        return Step { text: format!("jmp {}", label(offset)), offset };
    }
    let Some(instruction) = reach.instructions.get(&offset) else {
        return Step { text: String::new(), offset };
    };
    let text = match target(instruction) {
        Some(target) => {
            let name = format!("{:?}", instruction.mnemonic()).to_ascii_lowercase();
            format!("{name} {}", label(target))
        }
        None => super::rules::disassemble(instruction),
    };
    Step { text, offset }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::machine::Code;
    use crate::inspect::reach::reach;
    use crate::inspect::samples::assemble;
    use iced_x86::IcedError;
    use iced_x86::code_asm::*;

    fn texts(image: &[u8]) -> Vec<String> {
        let code = Code::new(image, 1_000);
        let reached = reach(&code, 0, &BTreeSet::new(), false);
        steps(&reached, 0).into_iter().map(|step| step.text).collect()
    }

    #[test]
    fn the_same_way_through_other_places() {
        let straight = assemble(|a| {
            let mut out = a.create_label();
            a.test(eax, eax)?;
            a.jz(out)?;
            a.inc(ecx)?;
            a.set_label(&mut out)?;
            a.ret()
        });
        let scattered = assemble(|a| -> Result<(), IcedError> {
            let (mut out, mut body, mut go) =
                (a.create_label(), a.create_label(), a.create_label());
            a.jmp(go)?;
            a.set_label(&mut body)?;
            a.inc(ecx)?;
            a.jmp(out)?;
            a.db(&[0xcc; 200])?;
            a.set_label(&mut go)?;
            a.test(eax, eax)?;
            a.jz(out)?;
            a.jmp(body)?;
            a.set_label(&mut out)?;
            a.ret()
        });
        assert_eq!(texts(&straight), ["test eax, eax", "je step 3", "inc ecx", "ret"]);
        assert_eq!(texts(&straight), texts(&scattered));
    }

    #[test]
    fn rings_of_jumps_end() {
        assert_eq!(texts(&[0xeb, 0xfe]), ["jmp step 0"]);
        assert_eq!(texts(&[0xeb, 0x00, 0xeb, 0xfc]).len(), 1);
        assert_eq!(texts(&[0xe9, 0, 0, 1, 0]), ["jmp out of the image"]);
        assert!(texts(&[]).is_empty());
    }
}
