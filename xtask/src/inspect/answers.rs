//! What the ROM's own `vmi_init` and `get_reloc` say, found by executing them.

use super::machine::{Code, Machine, Stop};
use super::random::Random;
use super::rom::Rom;
use super::trial;
use iced_x86::Register;
use std::mem::offset_of;
use vmi_abi::{CALLS_3_0, CallNumber, RelocationInfo, RelocationType, RomHeader};

/// Instructions that `vmi_init` may take before it is said not to return.
pub const INIT_BUDGET: u64 = 1_000_000;

/// Instructions that one `get_reloc` may take before it is said not to return.
pub const ASK_BUDGET: u64 = 10_000;

/// Instructions that everything about one ROM may take.
pub const FUEL: u64 = 12_000_000;

/// Offset of `vmi_init`'s entry.
pub const VMI_INIT: usize = offset_of!(RomHeader, vmi_init);

/// Offset of `get_reloc`'s entry.
pub const GET_RELOC: usize = offset_of!(RomHeader, get_reloc);

/// The answer to one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How the guest is to reach the call.
    pub kind: RelocationType,
    /// The linear address; it means something only where the type has one.
    pub eip: u32,
    /// Where that is in the image; `None` without an address, or with one outside.
    pub offset: Option<usize>,
    /// Instructions that `get_reloc` took.
    pub instructions: u64,
}

/// The answers to all calls of revision 3.0, at one linear base.
#[derive(Clone, Debug)]
pub struct Table {
    /// Where the image was.
    pub base: u32,
    /// EAX as `vmi_init` returned it; `None` if it did not return.
    pub init: Option<u32>,
    /// By number; `None` where `get_reloc` did not return.
    pub answers: Vec<Option<Answer>>,
}

impl Table {
    /// The answer for a call; `None` if `get_reloc` did not return one, or for no call of 3.0.
    #[must_use]
    pub fn answer_of(&self, number: CallNumber) -> Option<Answer> {
        self.answers.get(usize::try_from(number.0).ok()?).copied().flatten()
    }

    /// The most instructions that an answer took.
    #[must_use]
    pub fn most_instructions(&self) -> u64 {
        self.answers.iter().flatten().map(|answer| answer.instructions).max().unwrap_or(0)
    }
}

/// Initialises the ROM at a linear base and asks it for every call.
#[must_use]
pub fn answers(rom: &Rom, base: u32) -> Table {
    let code = Code::new(rom.image(), FUEL);
    table(&code, base)
}

pub(super) fn table(code: &Code<'_>, base: u32) -> Table {
    let (machine, stop) = initialise(code, base);
    let init = (stop == Stop::Left && machine.registers.eip == trial::RETURN_ADDRESS)
        .then(|| machine.registers.get(Register::EAX));
    let answers = (0..CALLS_3_0.len() as u32).map(|number| ask(code, base, number, 0).1).collect();
    Table { base, init, answers }
}

/// Executes `vmi_init`.
pub(super) fn initialise<'a>(code: &'a Code<'a>, base: u32) -> (Machine<'a>, Stop) {
    let mut start = trial::plain(code, base, VMI_INIT, 0);
    start.machine.registers.eflags &= !super::machine::flags::INTERRUPT;
    let stop = start.machine.run(INIT_BUDGET);
    (start.machine, stop)
}

/// Executes `get_reloc` for a number, from a state that the seed chooses.
pub(super) fn ask<'a>(
    code: &'a Code<'a>,
    base: u32,
    number: u32,
    seed: u64,
) -> (Asked<'a>, Option<Answer>) {
    let mut start = trial::plain(code, base, GET_RELOC, seed);
    start.machine.registers.set(Register::EAX, number);
    let stop = start.machine.run(ASK_BUDGET);
    let machine = &start.machine;
    let answer = start.returned(stop).then(|| {
        let info = RelocationInfo::from_registers(
            machine.registers.get(Register::EAX),
            machine.registers.get(Register::EDX),
        );
        let eip = info.eip.get();
        let offset = machine.memory.offset_of(eip).filter(|_| info.kind.has_address());
        Answer { kind: info.kind, eip, offset, instructions: machine.trace.instructions }
    });
    (Asked { start, stop }, answer)
}

/// An execution of `get_reloc`.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    /// The machine as it ended.
    pub(super) start: trial::Trial<'a>,
    /// Why it ended.
    pub(super) stop: Stop,
}

/// The numbers of a boot's worth of questions: `rounds` times each call in a new order.
pub(super) fn questions(rounds: usize) -> impl Iterator<Item = u32> {
    let mut random = Random::new(0x4460);
    let count = CALLS_3_0.len();
    (0..rounds).flat_map(move |round| {
        let mut order: Vec<u32> = (0..count as u32).collect();
        if round == 0 {
            order.reverse();
        } else {
            for place in (1..count).rev() {
                order.swap(place, random.below(place as u32 + 1) as usize);
            }
        }
        order
    })
}
