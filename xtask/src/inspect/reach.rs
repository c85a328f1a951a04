//! The instructions that can be reached from an entry, on both sides of every condition.

use super::machine::{Code, Trace};
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
    /// Whether the inspection's budget ran out before all was followed.
    pub cut_short: bool,
}

/// Offsets that some execution came through.
#[derive(Clone, Debug)]
pub struct Executed {
    known: Vec<bool>,
    offsets: BTreeSet<usize>,
}

impl Executed {
    /// None yet.
    #[must_use]
    pub fn new(code: &Code<'_>) -> Self {
        Self { known: vec![false; code.image().len()], offsets: BTreeSet::new() }
    }

    /// Adds what a run came through. Most of it is known from the run before.
    pub fn add(&mut self, trace: &Trace) {
        for offset in &trace.offsets {
            if let Some(known) = self.known.get_mut(*offset).filter(|known| !**known) {
                *known = true;
                self.offsets.insert(*offset);
            }
        }
    }

    /// The offsets.
    #[must_use]
    pub fn offsets(&self) -> &BTreeSet<usize> {
        &self.offsets
    }
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
    let mut known = vec![false; code.image().len() + 1];
    let mut todo: Vec<usize> = executed.iter().copied().chain([entry]).collect();
    while let Some(offset) = todo.pop() {
        // All that lies beyond the image is one place.
        let offset = offset.min(code.image().len());
        if std::mem::replace(&mut known[offset], true) {
            continue;
        }
        if !code.follow() {
            reach.cut_short = true;
            break;
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
    reach
}
