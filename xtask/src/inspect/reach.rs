//! The instructions that can be reached from an entry, on both sides of every condition.

use super::machine::Code;
use iced_x86::{FlowControl, Instruction, OpKind};
use std::collections::{BTreeMap, BTreeSet};

/// What can be reached.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    /// Instructions by offset.
    pub instructions: BTreeMap<usize, Instruction>,
    /// Branches whose target lies outside the image: the branch's offset and the target's.
    pub leaves: Vec<(usize, u32)>,
    /// Offsets where no instruction can be read.
    pub unreadable: Vec<usize>,
    /// Branches through a register or memory of which no execution showed a target.
    pub unresolved: Vec<usize>,
}

impl Reach {
    /// Bytes of the instructions.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.instructions.values().map(Instruction::len).sum()
    }
}

/// Follows the code from `entry` and from everything that was executed.
///
/// A CALL that was executed but never came back is taken for a way to learn the address behind it,
/// where data may lie. `cut_short` says that executions ended before their time, so that a missing
/// return means nothing.
#[must_use]
pub fn reach(code: &Code<'_>, entry: usize, executed: &BTreeSet<usize>, cut_short: bool) -> Reach {
    let mut reach = Reach::default();
    let mut todo: Vec<usize> = executed.iter().copied().chain([entry]).collect();
    while let Some(offset) = todo.pop() {
        if reach.instructions.contains_key(&offset) {
            continue;
        }
        let Some(instruction) = code.at(offset).filter(|found| !found.is_invalid()) else {
            reach.unreadable.push(offset);
            continue;
        };
        reach.instructions.insert(offset, instruction);
        let next = offset + instruction.len();
        let flow = instruction.flow_control();
        let branches = matches!(
            flow,
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call
        );
        if branches && instruction.op0_kind() == OpKind::NearBranch32 {
            let target = instruction.near_branch32();
            if (target as usize) < code.image().len() {
                todo.push(target as usize);
            } else {
                reach.leaves.push((offset, target));
            }
        }
        if flow == FlowControl::IndirectBranch && !executed.contains(&offset) {
            reach.unresolved.push(offset);
        }
        let falls_through = match flow {
            FlowControl::Next | FlowControl::ConditionalBranch => true,
            FlowControl::Call | FlowControl::IndirectCall => {
                cut_short || executed.contains(&next) || !executed.contains(&offset)
            }
            _ => false,
        };
        if falls_through {
            todo.push(next);
        }
    }
    reach.unreadable.sort_unstable();
    reach.unreadable.dedup();
    reach
}
