//! The queue against a machine that sees every update at once: enumerated, by chance, and with deliberate faults.

mod model;

use super::*;
use model::{ENTRIES, Interrupt, Machine, Operation, Outcome, Scenario};
use proptest::prelude::*;
use std::format;
use std::string::String;
use std::vec::Vec;

/// Ways to get the queue wrong. A test that passes with one of them could not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// What a hypervisor did not take of a batch is forgotten.
    PartialBatchIsLost,
    /// What it did take of it is handed over again.
    PartialBatchIsRepeated,
    /// What is refused for now is left out.
    RefusedIsSkipped,
    /// After a refusal everything is tried at once again.
    RetriesAsBatch,
    /// What comes when the queue is full is dropped.
    FullQueueDrops,
    /// An update replaces one of the same place, whatever lies between.
    CoalescesAcrossOthers,
    /// An update gets in front of the one before it.
    SwapsNeighbours,
    /// Everything may wait.
    EverythingWaits,
    /// SetCR3 waits, and lets what is before it wait.
    EntriesWaitBeyondSetCr3,
    /// InvalPage waits with the others.
    InvalPageWaits,
    /// GetCR2 goes ahead of what waits.
    GetCR2DoesNotFlush,
    /// SetLazyMode(0) does not flush.
    LeavingDoesNotFlush,
    /// Changing between the lazy modes does not flush.
    OtherModeDoesNotFlush,
    /// A stopped queue goes on at the next flush.
    GoesOnAfterStop,
    /// Interrupts come in the middle.
    InterruptsStayOn,
    /// AllocatePage waits with the frame's ReleasePage.
    BeginsAnewUntold,
    /// Told late, leaving the mode CPU does not flush.
    SetCr3WaitsForEver,
    /// Told late, GetCR2 goes ahead of SetCR3.
    FaultsOvertakeSetCr3,
    /// Quiet, what becomes present waits.
    PresentWaits,
    /// Quiet, what became present in the mode MMU waits when that is left.
    PresentWaitsBeyondTheMode,
    /// Quiet, GetCR2 goes ahead of entries.
    FaultsOvertakeEntries,
    /// Quiet, what becomes present waits for the kernel's own pages too.
    KernelsBearAll,
    /// Quiet, the hypervisor is never asked about a page fault that comes again.
    FaultsComeForEver,
}

std::thread_local! {
    static FAULT: Cell<Option<Fault>> = const { Cell::new(None) };
}

impl Fault {
    const ALL: [Self; 23] = [
        Self::PartialBatchIsLost,
        Self::PartialBatchIsRepeated,
        Self::RefusedIsSkipped,
        Self::RetriesAsBatch,
        Self::FullQueueDrops,
        Self::CoalescesAcrossOthers,
        Self::SwapsNeighbours,
        Self::EverythingWaits,
        Self::EntriesWaitBeyondSetCr3,
        Self::InvalPageWaits,
        Self::GetCR2DoesNotFlush,
        Self::LeavingDoesNotFlush,
        Self::OtherModeDoesNotFlush,
        Self::GoesOnAfterStop,
        Self::InterruptsStayOn,
        Self::BeginsAnewUntold,
        Self::SetCr3WaitsForEver,
        Self::FaultsOvertakeSetCr3,
        Self::PresentWaits,
        Self::PresentWaitsBeyondTheMode,
        Self::FaultsOvertakeEntries,
        Self::KernelsBearAll,
        Self::FaultsComeForEver,
    ];

    pub(super) fn is_on(self) -> bool {
        FAULT.get() == Some(self)
    }

    /// How many updates of a batch leave the queue if so many were applied.
    pub(super) fn gone(applied: usize, batch: usize) -> usize {
        match FAULT.get() {
            Some(Self::PartialBatchIsLost) => batch,
            Some(Self::PartialBatchIsRepeated) => 0,
            Some(Self::RefusedIsSkipped) => batch.min(applied + 1),
            _ => applied,
        }
    }

    /// Runs with this fault.
    fn within<R>(self, run: impl FnOnce() -> R) -> R {
        FAULT.set(Some(self));
        let result = run();
        FAULT.set(None);
        result
    }
}

fn run<const CAPACITY: usize>(scenario: &Scenario) -> Result<(), String> {
    let queue = Queue::<CAPACITY>::new();
    Machine::new(&queue, scenario).run()
}

/// Runs a scenario with a queue of some capacity.
type Run = fn(&Scenario) -> Result<(), String>;

const CAPACITIES: [Run; 5] = [run::<1>, run::<2>, run::<3>, run::<5>, run::<32>];

const SET_A: Operation = Operation::SetPxE { entry: 0, present: true, defer: false };
const CLEAR_A: Operation = Operation::SetPxE { entry: 0, present: false, defer: false };
const SET_B: Operation = Operation::SetPxELong { entry: 1, present: true, defer: false };
const DEFER_A: Operation = Operation::SetPxELong { entry: 0, present: true, defer: true };
/// Of the kernel's own.
const SET_C: Operation = Operation::SetPxE { entry: 2, present: true, defer: false };
const TELL_C: Operation = Operation::UpdatePxE { entry: 2, defer: false };
const DESCRIPTOR: Operation = Operation::WriteEntry { table: 0, index: 1 };

/// Of each kind of operation one or two.
const ALPHABET: [Operation; 18] = [
    SET_A,
    CLEAR_A,
    SET_B,
    SET_C,
    DEFER_A,
    TELL_C,
    DESCRIPTOR,
    Operation::SetCR3,
    Operation::CLTS,
    Operation::SetCR0,
    Operation::SetLazyMode(0),
    Operation::SetLazyMode(1),
    Operation::SetLazyMode(2),
    Operation::InvalPage(0),
    Operation::Page { release: true },
    Operation::Page { release: false },
    Operation::Access(0),
    Operation::Forget(0),
];

/// Calls `each` with every sequence of operations of this length, until it says that it has seen enough.
fn sequences(length: usize, mut each: impl FnMut(&[Operation]) -> bool) {
    let mut sequence = Vec::new();
    for mut number in 0..ALPHABET.len().pow(length as u32) {
        sequence.clear();
        for _ in 0..length {
            sequence.push(ALPHABET[number % ALPHABET.len()]);
            number /= ALPHABET.len();
        }
        if each(&sequence) {
            return;
        }
    }
}

/// Every scenario of a small size: the runs, and the first violation.
///
/// All sequences of `length` operations, not told late, told late, and then with page faults that are quiet too, in each lazy mode to begin with, with the capacities 1, 2 and 3, each
/// - without failures and interrupts,
/// - with the first, second or third hypercall stopped after 0 or 1 updates, or complaining,
/// - with the first, second, third or fourth update refused for good,
/// - with each of three calls made by an interrupt at each of the first steps, on a hypervisor that stops a batch at its second update.
fn enumerate(length: usize) -> (usize, Result<(), String>) {
    let outcomes: Vec<Vec<Outcome>> = (0..3)
        .flat_map(|at| {
            [Outcome::Stopped(0), Outcome::Stopped(1), Outcome::Complains].map(|outcome| {
                let mut outcomes = std::vec![Outcome::Applied; at];
                outcomes.push(outcome);
                outcomes.extend([Outcome::Applied; 20]);
                outcomes
            })
        })
        .collect();
    let (mut runs, mut result) = (0, Ok(()));
    let mut scenario = Scenario::default();
    sequences(length, |sequence| {
        let kinds = [(false, false), (true, false), (true, true)];
        for ((late, quiet), mode) in
            kinds.into_iter().flat_map(|kind| (0..3).map(move |mode| (kind, mode)))
        {
            (scenario.late, scenario.quiet) = (late, quiet);
            scenario.operations.clear();
            scenario.operations.push(Operation::SetLazyMode(mode));
            scenario.operations.extend(sequence);
            let mut attempt = |scenario: &Scenario| {
                for run in &CAPACITIES[..3] {
                    runs += 1;
                    if result.is_ok() {
                        result = run(scenario).map_err(|why| format!("{why}\n{scenario:?}"));
                    }
                }
            };
            attempt(&scenario);
            for outcomes in &outcomes {
                scenario.outcomes.clone_from(outcomes);
                attempt(&scenario);
            }
            scenario.outcomes.clear();
            // Value 1 is the first SetLazyMode's.
            for value in 2..2 + length as u32 {
                scenario.refused = Some(value << 1);
                attempt(&scenario);
            }
            scenario.refused = None;
            scenario.outcomes.push(Outcome::Stopped(1));
            for step in 1..8 * (length as u32 + 1) {
                for operation in [DEFER_A, SET_B, Operation::InvalPage(0)] {
                    scenario.interrupts.push(Interrupt { step, operation, nests: false });
                    attempt(&scenario);
                    scenario.interrupts.clear();
                }
            }
            scenario.outcomes.clear();
        }
        result.is_err()
    });
    (runs, result)
}

#[test]
fn every_small_scenario_keeps_the_promises() {
    // QUEUE_LENGTH asks for more: 4 takes a minute.
    let longest =
        std::env::var("QUEUE_LENGTH").map_or(3, |length| length.parse().expect("a number"));
    for length in 1..=longest {
        let (runs, result) = enumerate(length);
        std::println!("{runs} runs with {length} operations");
        assert_eq!(result, Ok(()));
    }
}

#[test]
fn every_fault_is_found() {
    for fault in Fault::ALL {
        let found = fault.within(|| (1..=3).find_map(|length| enumerate(length).1.err()));
        let found = found.unwrap_or_else(|| panic!("{fault:?} is not found"));
        std::println!("{fault:?}: {found}\n");
    }
}

prop_compose! {
    fn operation()(
        kind in 0..26_u32, entry in 0..ENTRIES, present: bool, defer in prop::bool::weighted(0.2), table in 0..3_usize,
        index in 0..2_usize, mode in 0..4_u32, observer in 0..5_usize,
    ) -> Operation {
        match kind {
            0..=4 => Operation::SetPxE { entry, present, defer },
            5..=7 => Operation::SetPxELong { entry, present, defer },
            8 => Operation::UpdatePxE { entry, defer },
            9..=11 => Operation::WriteEntry { table, index },
            12 => Operation::UpdateKernelStack,
            13 => Operation::SetCR3,
            14 => Operation::CLTS,
            15 => Operation::SetCR0,
            16..=18 => Operation::SetLazyMode(mode),
            19 => Operation::InvalPage(entry),
            20 => Operation::FlushTLB,
            21 => Operation::Access(entry),
            22 => Operation::Page { release: present },
            23 => if present { Operation::Observer(observer) } else { Operation::Indifferent },
            24 => Operation::Forget(entry),
            _ => Operation::Interrupts(present || defer),
        }
    }
}

prop_compose! {
    fn interrupts()(
        mut interrupts in prop::collection::vec((0..100_u32, operation(), any::<bool>()), 0..5)
    ) -> Vec<Interrupt> {
        interrupts.sort_by_key(|(step, ..)| *step);
        interrupts.into_iter().map(|(step, operation, nests)| Interrupt { step, operation, nests }).collect()
    }
}

prop_compose! {
    fn scenario()(
        late: bool,
        quiet: bool,
        operations in prop::collection::vec(operation(), 1..40),
        interrupts in interrupts(),
        outcomes in prop::collection::vec(prop_oneof![
            4 => Just(Outcome::Applied),
            2 => (0..4_usize).prop_map(Outcome::Stopped),
            1 => Just(Outcome::Complains),
        ], 0..8),
        refused in prop::option::weighted(0.2, (1..40_u32).prop_map(|value| value << 1)),
    ) -> Scenario {
        Scenario { late, quiet: late && quiet, operations, interrupts, outcomes, refused }
    }
}

proptest! {
    // PROPTEST_CASES asks for more.
    #![proptest_config(ProptestConfig {
        cases: ProptestConfig::default().cases.max(4096), failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn whatever_a_guest_does_keeps_the_promises(scenario in scenario(), capacity in 0..CAPACITIES.len()) {
        prop_assert_eq!(CAPACITIES[capacity](&scenario), Ok(()));
    }
}

#[test]
fn updates_go_over_together() {
    let mut operations: Vec<Operation> = [Operation::SetLazyMode(1)].into();
    for _ in 0..50 {
        operations.extend([SET_A, SET_B]);
    }
    let scenario = Scenario { operations, ..Scenario::default() };
    let queue = Queue::<32>::new();
    let machine = Machine::new(&queue, &scenario);
    assert_eq!(machine.run(), Ok(()));
    assert_eq!(machine.hypercalls(), 4);
}

#[test]
fn updates_of_one_entry_in_a_row_are_one() {
    let operations = [&[Operation::SetLazyMode(1)][..], &[CLEAR_A, SET_A].repeat(20)].concat();
    let scenario = Scenario { operations, ..Scenario::default() };
    let queue = Queue::<64>::new();
    let machine = Machine::new(&queue, &scenario);
    assert_eq!(machine.run(), Ok(()));
    assert_eq!((machine.hypercalls(), machine.received()), (1, 1));
}

#[test]
fn without_the_section_an_interrupt_is_lost_or_loses() {
    let lost = |step| {
        let scenario = Scenario {
            operations: [Operation::SetLazyMode(1), SET_A].into(),
            interrupts: [Interrupt { step, operation: SET_B, nests: false }].into(),
            ..Scenario::default()
        };
        let queue = Queue::<8>::new();
        let machine = Machine::new(&queue, &scenario);
        let _ = machine.run();
        !machine.agrees()
    };
    assert!(!(0..40).any(lost));
    assert!(Fault::InterruptsStayOn.within(|| (0..40).any(lost)));
}

/// The table that [`told_at_once`] is about, as a directory that is shown.
const DIRECTORY: u32 = 0x5001;

const CALLS: [fn(u32, u32) -> Update; 2] = [Update::UpdatePxE, Update::UpdatePxELong];

/// Page faults are quiet, all tables matter, and the processor walks these directories.
fn shown(directories: [u32; DIRECTORIES]) -> impl Fn(&Queue<8>, &Always) {
    move |queue, _| {
        queue.shown().map.iter().for_each(|word| word.set(!0));
        queue.shown().directories.iter().zip(directories).for_each(|(word, is)| word.set(is));
    }
}

/// Whether it takes a hypercall to tell late that an entry of a table became present, with flags of the guest's and a queue that was
/// prepared.
fn told_at_once(
    call: fn(u32, u32) -> Update,
    offset: u32,
    flags: u32,
    prepare: impl Fn(&Queue<8>, &Always),
) -> bool {
    let backend = Always(Ok(()), Cell::default(), Cell::default());
    let queue = Queue::<8>::new();
    queue.tell_late(true, LinearMapping::of_pages(0xc000_0000, 0, 0));
    prepare(&queue, &backend);
    let before = backend.1.get();
    let update = Update { low: PRESENT, high: flags, ..call(DIRECTORY - PRESENT + offset, 0) };
    let (settle, flush) = (|| queue.settle(&backend), || queue.flush(&backend));
    queue.submit_late(&backend, update, PRESENT, settle, flush);
    backend.1.get() > before
}

#[test]
fn what_is_about_to_be_used_is_told_at_once() {
    let current = |linear: u32| linear | EntryFlags::CURRENT_AS.bits();
    let after_fault = |queue: &Queue<8>, backend: &Always| queue.fault(backend, 0x1234, || ());
    let told = |flags| told_at_once(Update::UpdatePxE, 0, flags, after_fault);
    assert!(told(current(0x1000)));
    assert!(!told(current(0x2000)));
    // Of another space, and nobody has made anything of the table.
    assert!(!told(0x1000));
}

#[test]
fn only_the_directory_that_is_loaded_is_in_use() {
    let directory = EntryFlags::PD.bits();
    for call in CALLS {
        assert!(told_at_once(call, 0xff8, directory, shown([0, 0, 0, DIRECTORY])));
        assert!(!told_at_once(call, 0xff8, directory, shown([0x6001, 0, 0, 0])));
        // A page table may be one of any directory's.
        assert!(told_at_once(call, 0xff8, EntryFlags::PT.bits(), shown([0x6001, 0, 0, 0])));
    }
}

#[test]
fn directories_wait_where_programs_are() {
    // The kernel's own addresses begin at entry 768 of 1,024, and at entry 0 of the fourth directory of 512. The guest's flags are not asked.
    for flags in [EntryFlags::PT.bits(), EntryFlags::PD.bits()] {
        let two_levels = |entry: u32| {
            told_at_once(Update::UpdatePxE, 4 * entry, flags, shown([DIRECTORY, 0, 0, 0]))
        };
        assert_eq!([0, 767, 768, 1023].map(two_levels), [false, false, true, true]);
        for gibibyte in 0..4 {
            let mut directories = [0x6001; DIRECTORIES];
            directories[gibibyte] = DIRECTORY;
            let pae = |entry: u32| {
                told_at_once(Update::UpdatePxELong, 8 * entry, flags, shown(directories))
            };
            assert_eq!([0, 511].map(pae), [gibibyte == 3; 2]);
        }
    }
}

/// A backend that always gives the same answer.
struct Always(Result<(), Refusal>, Cell<u32>, Cell<Option<Failure>>);

impl Backend for Always {
    fn recognise(_: &crate::Hypervisor) -> Option<Self> {
        None
    }
    fn disable_interrupts(&self) -> InterruptMask {
        InterruptMask(0)
    }
    fn set_interrupt_mask(&self, _: InterruptMask) {}
    fn apply(&self, _: Batch<'_>) -> Result<(), Refusal> {
        self.1.set(self.1.get() + 1);
        self.0
    }
    fn stop(&self, failure: &Failure) {
        self.2.set(Some(*failure));
    }
}

#[test]
fn what_is_refused_for_ever_stops_the_guest() {
    for (reason, attempts) in
        [(Reason::Transient, ATTEMPTS), (Reason::Permanent, 1), (Reason::Unsupported, 1)]
    {
        let backend = Always(
            Err(Refusal { applied: 0, reason, status: -22 }),
            Cell::default(),
            Cell::default(),
        );
        let queue = Queue::<2>::new();
        let update = Update::SetCR3(0x1000);
        queue.submit(&backend, update);
        let failure = Failure { update, reason, status: -22, attempts };
        assert_eq!(backend.2.get(), Some(failure));
        assert_eq!((backend.1.get(), queue.failures()), (attempts, attempts));
        assert!(queue.is_stopped());
        assert!(queue.pending().iter().eq([update]));
        // A backend whose `stop` comes back all the same is asked nothing more, and nothing overflows.
        for value in 1..9 {
            queue.submit(&backend, Update::SetPxE(value, value, 0));
        }
        queue.set_lazy_mode(&backend, LazyMode::OFF);
        assert_eq!((backend.1.get(), queue.pending().len()), (attempts, 2));
    }
}

#[test]
fn a_failure_says_what_was_refused() {
    let update = Update::SetPxELong(0x12_3456_7067, 0xc000_1018, 1);
    let failure = Failure { update, reason: Reason::Permanent, status: -22, attempts: 1 };
    assert_eq!(
        format!("{failure}"),
        "SetPxELong at 0xc0001018, value 0000001234567067, flags 0x1: refused for good, status -22, attempt 1"
    );
}
