//! What the ROM's own `vmi_init` and `get_reloc` say, found by executing them.

use super::interface::{Function, Interface};
use super::machine::{Code, Machine, Stop};
use super::random::Random;
use super::rom::Rom;
use super::trial::{self, Placement};
use iced_x86::Register;
use vmi_abi::{CallNumber, KEEP_SITE, RelocationInfo, RelocationType};

/// Instructions that `vmi_init` may take before it is said not to return.
pub const INIT_BUDGET: u64 = 1_000_000;

/// Instructions that one `get_reloc` may take before it is said not to return.
pub const ASK_BUDGET: u64 = 10_000;

/// Instructions that everything about one ROM may take.
pub const FUEL: u64 = 12_000_000;

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

/// What `vmi_init` and `get_reloc` answered at one linear base, or in 13.x Init and GetRelocationInfo.
#[derive(Clone, Debug)]
pub struct Table {
    /// Where the image was.
    pub base: u32,
    /// EAX as `vmi_init` returned it; `None` if it did not return.
    pub init: Option<u32>,
    /// By number; `None` where `get_reloc` did not return, or for no call, or where nobody can be asked.
    pub answers: Vec<Option<Answer>>,
    /// The same for questions with [`KEEP_SITE`], which only revision 3.0 has.
    pub keep_site: Vec<Option<Answer>>,
}

impl Table {
    /// The answer for a call of revision 3.0; `None` if `get_reloc` did not return one.
    #[must_use]
    pub fn answer_of(&self, number: CallNumber) -> Option<Answer> {
        self.answer_at(number.0)
    }

    /// The answer for a number of the ROM's own revision.
    #[must_use]
    pub fn answer_at(&self, number: u32) -> Option<Answer> {
        self.answers.get(usize::try_from(number).ok()?).copied().flatten()
    }

    /// The answer for a number with [`KEEP_SITE`].
    #[must_use]
    pub fn keep_site_at(&self, number: u32) -> Option<Answer> {
        self.keep_site.get(usize::try_from(number).ok()?).copied().flatten()
    }

    /// The most instructions that an answer took.
    #[must_use]
    pub fn most_instructions(&self) -> u64 {
        self.answers.iter().flatten().map(|answer| answer.instructions).max().unwrap_or(0)
    }
}

/// Initialises the ROM at a linear base and asks it for every call.
///
/// Of a ROM of a revision that the inspector does not know, nothing is executed.
#[must_use]
pub fn answers(rom: &Rom, base: u32) -> Table {
    let code = Code::new(rom.image(), FUEL);
    match rom.interface() {
        Ok(interface) => table(&code, &interface, base),
        Err(_) => Table { base, init: None, answers: Vec::new(), keep_site: Vec::new() },
    }
}

pub(super) fn table(code: &Code<'_>, interface: &Interface, base: u32) -> Table {
    let placement = Placement::whole(base);
    let (machine, stop) = initialise(code, interface, placement);
    let init = (stop == Stop::Left && machine.registers.eip == trial::RETURN_ADDRESS)
        .then(|| machine.registers.get(Register::EAX));
    let mut answers = Vec::new();
    for (number, _) in interface.calls() {
        answers.resize(number as usize, None);
        answers.push(interface.lookup.and_then(|by| ask(code, by, placement, number, 0).1));
    }
    // A ROM that does not come back from a question is asked no more of them.
    let answered = answers.iter().all(Option::is_some) && !interface.revision.has_slots();
    let lookup = interface.lookup.filter(|_| answered);
    let keep_site = interface
        .calls()
        .map(|(number, _)| lookup.and_then(|by| ask(code, by, placement, number | KEEP_SITE, 0).1))
        .collect();
    Table { base, init, answers, keep_site }
}

/// Executes `vmi_init`.
pub(super) fn initialise<'a>(
    code: &'a Code<'a>,
    interface: &Interface,
    placement: Placement,
) -> (Machine<'a>, Stop) {
    let mut start = trial::plain(code, placement, interface.init.offset, 0);
    start.machine.registers.eflags &= !super::machine::flags::INTERRUPT;
    let stop = start.machine.run(INIT_BUDGET);
    (start.machine, stop)
}

/// Executes `get_reloc` for a number, from a state that the seed chooses.
pub(super) fn ask<'a>(
    code: &'a Code<'a>,
    by: Function,
    placement: Placement,
    number: u32,
    seed: u64,
) -> (Asked<'a>, Option<Answer>) {
    let mut start = trial::plain(code, placement, by.offset, seed);
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
pub(super) fn questions(interface: &Interface, rounds: usize) -> impl Iterator<Item = u32> {
    let mut random = Random::new(0x4460);
    let numbers: Vec<u32> = interface.calls().map(|(number, _)| number).collect();
    (0..rounds).flat_map(move |round| {
        let mut order = numbers.clone();
        if round == 0 {
            order.reverse();
        } else {
            for place in (1..order.len()).rev() {
                order.swap(place, random.below(place as u32 + 1) as usize);
            }
        }
        order
    })
}
