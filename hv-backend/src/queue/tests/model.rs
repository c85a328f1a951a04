//! A machine twice: one that sees every update at once, and one that sees what the queue hands over.
//!
//! The second may be behind the first, never beside it. Each update that it gets must be the next one in the order of
//! the first; only one that the update after it replaces may be left out. At each point where the interface promises
//! visibility it must have caught up, and both machines must hold the same.

use crate::*;
use core::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::format;
use std::string::String;
use std::vec::Vec;
use vmi_abi::flags::{EntryFlags, LazyMode};
use vmi_abi::{CALLS_13, Call, number, slot};

pub(super) const ENTRIES: usize = 3;
const DESCRIPTORS: usize = 2;
const ENTRY_BASE: u32 = 0xc000_1000;
const TABLE_BASES: [u32; 3] = [0xc001_0000, 0xc002_0000, 0xc003_0000];
const TASK_STATE: u32 = 0xc004_0000;
/// The indices of pages are those of their entries, of 4 bytes each.
const PAGE_BASE: u32 = 0x4000_0000;
/// The last entry maps a page of the kernel's own.
const KERNEL: u32 = page_address(ENTRIES - 1);
const PAGE: u32 = 0x1000;
const PRESENT: u64 = 1;

/// What the guest does. Every value that it writes is another one, so that no two updates look alike by chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::upper_case_acronyms, reason = "the specification's names")]
pub(super) enum Operation {
    SetPxE {
        entry: usize,
        present: bool,
        defer: bool,
    },
    SetPxELong {
        entry: usize,
        present: bool,
        defer: bool,
    },
    UpdatePxE {
        entry: usize,
        defer: bool,
    },
    WriteEntry {
        table: usize,
        index: usize,
    },
    UpdateKernelStack,
    SetCR3,
    CLTS,
    SetCR0,
    SetLazyMode(u32),
    InvalPage(usize),
    FlushTLB,
    /// AllocatePage or ReleasePage, of another frame each time.
    Page {
        release: bool,
    },
    /// An access to memory that the entry maps; if it is not present, the page fault asks for GetCR2.
    Access(usize),
    /// Quiet, the guest makes an entry present that it was to tell of, and does not.
    Forget(usize),
    /// A flush by a call that has no effect here: IRET, GetCR3, APICWrite, GetPxELong, FlushDeferredCalls.
    Observer(usize),
    /// A call that needs to see nothing.
    Indifferent,
    Interrupts(bool),
}

/// How a hypercall ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Well.
    Applied,
    /// After at most so many updates, for now.
    Stopped(usize),
    /// Well, but says that it failed, and that it applied more than it got.
    Complains,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Interrupt {
    /// The step, at the earliest.
    pub(super) step: u32,
    pub(super) operation: Operation,
    /// Whether the handler enables interrupts, so that it can be interrupted.
    pub(super) nests: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Scenario {
    /// Changes are told late: memory holds each before its update is taken.
    pub(super) late: bool,
    /// And the hypervisor does not see the guest's page faults.
    pub(super) quiet: bool,
    pub(super) operations: Vec<Operation>,
    pub(super) interrupts: Vec<Interrupt>,
    /// Repeated for ever.
    pub(super) outcomes: Vec<Outcome>,
    /// The update with this value is refused for good.
    pub(super) refused: Option<u32>,
}

/// What a processor sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    entries: [u64; ENTRIES],
    descriptors: [[(u32, u32); DESCRIPTORS]; TABLE_BASES.len()],
    kernel_stack: u32,
    cr3: u32,
    task_switched: bool,
    /// The last page that became a page table, and the last one that no longer is.
    pages: [u32; 2],
}

/// A call on its way.
#[derive(Clone, Copy, Debug)]
enum Begun {
    Update(Update),
    /// An entry is stored in memory, in the section in which the update that tells of it is taken. With what the queue is to know of the
    /// value.
    Change(usize, u32, u32, Update),
    SetLazyMode(u32),
}

/// What is due when a call returns.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Updates in the order so far, its own included.
    updates: usize,
    /// Whether all of them must be visible then.
    settles: bool,
}

const fn entry_address(entry: usize) -> u32 {
    ENTRY_BASE + 8 * entry as u32
}

/// What an entry maps.
const fn page_address(entry: usize) -> u32 {
    PAGE_BASE + 2 * PAGE * entry as u32
}

fn entry_of(update: &Update) -> usize {
    ((update.address - ENTRY_BASE) / 8) as usize
}

impl State {
    fn apply(&mut self, update: &Update) {
        let &Update { call, address, low, high, flags } = update;
        match call {
            number::SetPxE => {
                let entry = &mut self.entries[entry_of(update)];
                *entry = *entry & !0xffff_ffff | u64::from(low);
            }
            number::SetPxELong => {
                self.entries[entry_of(update)] = u64::from(high) << 32 | u64::from(low);
            }
            number::UpdatePxE => {}
            number::WriteGDTEntry | number::WriteLDTEntry | number::WriteIDTEntry => {
                let table = (call.0 - number::WriteGDTEntry.0) as usize;
                self.descriptors[table][((address - TABLE_BASES[table]) / 8) as usize] =
                    (low, high);
            }
            number::UpdateKernelStack => self.kernel_stack = low,
            number::SetCR3 => self.cr3 = low,
            number::CLTS => self.task_switched = false,
            number::AllocatePage => self.pages[0] = address | flags,
            number::ReleasePage => self.pages[1] = address | flags,
            // What they drop is the processor's.
            number::InvalPage | number::FlushTLB => {}
            _ => panic!("{update} is no update"),
        }
    }
}

/// What may wait where changes are told late, if `waiting` waits.
fn may_be_late(update: &Update, mode: u32, waiting: &[Update]) -> bool {
    let is_end =
        |other: &Update| other.call == number::ReleasePage && other.address == update.address;
    match update.call {
        number::ReleasePage => true,
        number::AllocatePage => !waiting.iter().any(is_end),
        _ => may_wait(update, mode),
    }
}

/// What the interface says may wait, a second time: the queue has it from the contracts.
fn may_wait(update: &Update, mode: u32) -> bool {
    let defer = update.flags & EntryFlags::DEFER.bits() != 0;
    match update.call {
        number::SetPxE | number::SetPxELong | number::UpdatePxE => mode == 1 || defer,
        number::WriteGDTEntry
        | number::WriteLDTEntry
        | number::WriteIDTEntry
        | number::SetCR3
        | number::CLTS => mode == 2,
        _ => false,
    }
}

pub(super) struct Machine<'a, const CAPACITY: usize> {
    queue: &'a Queue<CAPACITY>,
    scenario: &'a Scenario,
    /// The machine that sees every update at once, and the order in which it did.
    reference: RefCell<State>,
    order: RefCell<Vec<Update>>,
    /// The machine behind the queue, and how far it is in that order.
    processor: RefCell<State>,
    reached: Cell<usize>,
    tlb: RefCell<[Option<u64>; ENTRIES]>,
    /// Told late, what the hypervisor made of the entries, which the processor uses.
    shadow: RefCell<[Option<u64>; ENTRIES]>,
    /// Values that an access may use: all since the last invalidation.
    possible: RefCell<[Vec<u64>; ENTRIES]>,
    /// What the guest began, and no machine has seen.
    begun: Cell<Option<Begun>>,
    /// What the one that sees everything saw last.
    seen: Cell<Seen>,
    value: Cell<u32>,
    /// The last page fault's address.
    fault: Cell<u32>,
    mode: Cell<u32>,
    interrupts_are_on: Cell<bool>,
    interrupts: RefCell<VecDeque<Interrupt>>,
    steps: Cell<u32>,
    hypercalls: Cell<usize>,
    received: Cell<u32>,
    /// Refusals, of them those without an update to blame, and those that the queue spoke of.
    refusals: Cell<u32>,
    blameless: Cell<u32>,
    notes: Cell<u32>,
    /// Refusals of the update that is due.
    in_a_row: Cell<u32>,
    is_stopped: Cell<bool>,
    /// Entries that the guest made present without a word, and nobody has found yet.
    forgotten: Cell<u32>,
    violation: RefCell<Option<String>>,
}

fn add(counter: &Cell<u32>) -> u32 {
    counter.set(counter.get() + 1);
    counter.get()
}

impl<'a, const CAPACITY: usize> Machine<'a, CAPACITY> {
    pub(super) fn new(queue: &'a Queue<CAPACITY>, scenario: &'a Scenario) -> Self {
        Self {
            queue,
            scenario,
            reference: RefCell::default(),
            order: RefCell::default(),
            processor: RefCell::default(),
            reached: Cell::new(0),
            tlb: RefCell::default(),
            shadow: RefCell::default(),
            possible: RefCell::new(
                [const { Vec::new() }; ENTRIES].map(|_: Vec<u64>| Vec::from([0])),
            ),
            begun: Cell::new(None),
            seen: Cell::default(),
            value: Cell::new(0),
            fault: Cell::new(0),
            mode: Cell::new(0),
            interrupts_are_on: Cell::new(true),
            interrupts: RefCell::new(scenario.interrupts.iter().copied().collect()),
            steps: Cell::new(0),
            hypercalls: Cell::new(0),
            received: Cell::new(0),
            refusals: Cell::new(0),
            blameless: Cell::new(0),
            notes: Cell::new(0),
            in_a_row: Cell::new(0),
            is_stopped: Cell::new(false),
            forgotten: Cell::new(0),
            violation: RefCell::new(None),
        }
    }

    /// Runs the scenario, leaves the lazy mode, and tells what was not as promised.
    pub(super) fn run(&self) -> Result<(), String> {
        if self.scenario.late {
            self.queue.tell_late(self.scenario.quiet, LinearMapping::of_pages(KERNEL, 0, 0));
        }
        if self.scenario.quiet {
            self.queue.shown().map.iter().for_each(|word| word.set(!0));
        }
        for operation in &self.scenario.operations {
            self.step();
            self.perform(*operation);
            if self.violation.borrow().is_some() {
                break;
            }
        }
        self.interrupts.borrow_mut().clear();
        self.perform(Operation::SetLazyMode(0));
        if self.scenario.late {
            self.perform(Operation::FlushTLB);
        }
        self.check(self.queue.failures() == self.refusals.get(), || {
            "refusals are not counted".into()
        });
        let spoken_of = self.notes.get() + self.blameless.get();
        self.check(spoken_of == self.refusals.get(), || "refusals are not reported".into());
        let stopped = self.is_stopped.get();
        self.check(self.queue.is_stopped() == stopped, || "a stop is not remembered".into());
        self.check(self.queue.pending().is_empty() != stopped, || {
            format!("{} updates left, stopped: {stopped}", self.queue.pending().len())
        });
        self.violation.take().map_or(Ok(()), Err)
    }

    /// How many hypercalls there were.
    pub(super) fn hypercalls(&self) -> usize {
        self.hypercalls.get()
    }

    /// How many updates the machine behind the queue got.
    pub(super) fn received(&self) -> u32 {
        self.received.get()
    }

    /// Whether both machines hold the same, whatever the order was.
    pub(super) fn agrees(&self) -> bool {
        *self.reference.borrow() == *self.processor.borrow()
    }

    fn check(&self, holds: bool, message: impl FnOnce() -> String) {
        if !holds {
            self.violation.borrow_mut().get_or_insert_with(message);
        }
    }

    pub(super) fn perform(&self, operation: Operation) {
        let interrupted = self.begun.take();
        self.perform_inner(operation);
        self.begun.set(interrupted);
    }

    fn perform_inner(&self, operation: Operation) {
        let value = add(&self.value) << 1;
        let flags = |defer| if defer { EntryFlags::DEFER.bits() } else { 0 };
        match operation {
            Operation::SetPxE { entry, present, defer }
            | Operation::SetPxELong { entry, present, defer }
                if self.scenario.late =>
            {
                let value = value | u32::from(present);
                let current = page_address(entry) | EntryFlags::CURRENT_AS.bits();
                self.change(entry, value, if defer { 0 } else { current }, value, value);
            }
            Operation::UpdatePxE { entry, defer } if self.scenario.late => {
                let value = value | PRESENT as u32;
                let known = if defer { 0 } else { value };
                self.change(entry, value, 0, known, CHANGED);
            }
            // The same frame again and again.
            Operation::Page { release } if self.scenario.late => {
                let call = [Update::AllocatePage, Update::ReleasePage][usize::from(release)];
                self.submit(call(0, value << 12));
            }
            Operation::SetPxE { entry, present, defer } => {
                let value = value | u32::from(present);
                self.submit(Update::SetPxE(value, entry_address(entry), flags(defer)));
            }
            Operation::SetPxELong { entry, present, defer } => {
                let value = u64::from(value) << 32 | u64::from(value | u32::from(present));
                self.submit(Update::SetPxELong(value, entry_address(entry), flags(defer)));
            }
            Operation::UpdatePxE { entry, defer } => {
                // The guest's part: it does not write an entry itself while an update of it waits.
                while self.is_waiting(entry) && !self.is_stopped.get() {
                    self.perform(Operation::InvalPage(entry));
                }
                for state in [&self.reference, &self.processor] {
                    state.borrow_mut().entries[entry] = u64::from(value) | PRESENT;
                }
                self.possible.borrow_mut()[entry].push(u64::from(value) | PRESENT);
                // It has no value; the bits of the linear address make it another one each time.
                self.submit(Update::UpdatePxE(entry_address(entry), flags(defer) | value << 12));
            }
            Operation::WriteEntry { table, index } => {
                let write =
                    [Update::WriteGDTEntry, Update::WriteLDTEntry, Update::WriteIDTEntry][table];
                self.submit(write(TABLE_BASES[table], index as u32, value, !value));
            }
            Operation::UpdateKernelStack => {
                self.submit(Update::UpdateKernelStack(TASK_STATE, value))
            }
            Operation::SetCR3 => self.submit(Update::SetCR3(value)),
            Operation::CLTS => self.submit(Update::CLTS()),
            Operation::SetCR0 => self.call(number::SetCR0, || {
                for state in [&self.reference, &self.processor] {
                    state.borrow_mut().task_switched = true;
                }
            }),
            Operation::SetLazyMode(mode) => {
                self.begun.set(Some(Begun::SetLazyMode(mode)));
                self.queue.set_lazy_mode(self, LazyMode(mode));
                let seen = self.see();
                if seen.settles {
                    self.expect_visible(seen.updates, "SetLazyMode");
                }
            }
            Operation::InvalPage(entry) => {
                self.submit(Update::InvalPage(page_address(entry) + value % PAGE));
            }
            Operation::FlushTLB => self.submit(Update::FlushTLB(value)),
            Operation::Page { release: false } => self.submit(Update::AllocatePage(value, 0)),
            Operation::Page { release: true } => self.submit(Update::ReleasePage(value, 0)),
            Operation::Access(entry) => self.access(entry),
            Operation::Forget(entry) if self.scenario.quiet => {
                let value = u64::from(value) | PRESENT;
                for state in [&self.reference, &self.processor] {
                    state.borrow_mut().entries[entry] = value;
                }
                self.possible.borrow_mut()[entry].push(value);
                self.forgotten.set(self.forgotten.get() | 1 << entry);
            }
            Operation::Forget(_) => {}
            Operation::Observer(which) => match which {
                0 => self.before(number::IRET.call().expect("in the table")),
                1 => self.call(number::GetCR3, || ()),
                2 => self.call(number::APICWrite, || ()),
                3 => self
                    .before(CALLS_13[usize::from(slot::GetPxELong.number)].expect("in the table")),
                _ => {
                    let target = self.order.borrow().len();
                    self.queue.flush(self);
                    self.expect_visible(target, "FlushDeferredCalls");
                }
            },
            Operation::Indifferent => {
                let before = self.hypercalls.get();
                let call = number::GetCycleCounter.call().expect("in the table");
                self.queue.call(self, call, || ());
                self.check(self.hypercalls.get() == before, || "flushed for nothing".into());
            }
            Operation::Interrupts(on) => {
                self.interrupts_are_on.set(on);
                self.step();
            }
        }
    }

    /// An entry changes, and that is told late.
    fn change(&self, entry: usize, value: u32, flags: u32, known: u32, note: u32) {
        let update = Update::UpdatePxE(entry_address(entry), value << 12);
        let update = Update { low: note, high: flags, ..update };
        self.begun.set(Some(Begun::Change(entry, value, known, update)));
        self.take(update);
    }

    /// Whether a value for an entry waits.
    fn is_waiting(&self, entry: usize) -> bool {
        self.order.borrow()[self.reached.get()..].iter().any(|update| {
            update.address == entry_address(entry) && update.call != number::UpdatePxE
        })
    }

    fn submit(&self, update: Update) {
        self.begun.set(Some(Begun::Update(update)));
        self.take(update);
    }

    fn take(&self, update: Update) {
        if let Some(Begun::Change(_, _, known, _)) = self.begun.get() {
            // As an entry of the image does it.
            let mask = self.queue.begin(self);
            let (settle, flush) = (|| self.queue.settle(self), || self.queue.flush(self));
            self.queue.submit_late(self, update, known, settle, flush);
            self.queue.end(self, mask);
        } else {
            self.queue.submit(self, update);
        }
        let seen = self.see();
        if seen.settles {
            self.expect_visible(seen.updates, "an update that may not wait");
        } else if update.call == number::SetCR3 && !self.scenario.late {
            self.expect_visible(seen.updates - 1, "SetCR3");
        }
    }

    fn call(&self, number: CallNumber, effect: impl FnOnce()) {
        let call = number.call().expect("in the table");
        let target = self.order.borrow().len();
        self.queue.call(self, call, effect);
        self.expect_visible(target, call.name);
    }

    /// GetCR2 for a fault of this entry's page.
    fn look_at_fault(&self, entry: usize) {
        let target = self.order.borrow().len();
        let linear = page_address(entry);
        // Told late, a page fault is looked at in memory, unless CR3 waits to be loaded.
        let is_due = !self.scenario.late
            || self.mode.get() == 2
            || self.scenario.quiet
                && self.is_missed(!0, |update| update.address == entry_address(entry));
        self.fault.set(linear);
        self.queue.fault(self, linear + 1, || {
            let value = self.processor.borrow().entries[entry];
            self.make(entry, value);
        });
        if is_due {
            self.expect_visible(target, "GetCR2");
        }
    }

    fn before(&self, call: &Call) {
        let target = self.order.borrow().len();
        self.queue.before(self, call);
        self.expect_visible(target, call.name);
    }

    /// Whether an entry waits with a note that has one of these bits, and of which this holds.
    fn is_missed(&self, bits: u32, which: impl Fn(&Update) -> bool) -> bool {
        let order = self.order.borrow();
        let mut waiting = order[self.reached.get().min(order.len())..].iter();
        waiting.any(|update| {
            update.call == number::UpdatePxE && update.low & bits != 0 && which(update)
        })
    }

    /// Whether a guest bears a page fault that its tables do not have, by its flags for the entry.
    fn is_borne(flags: u32) -> bool {
        flags & EntryFlags::CURRENT_AS.bits() != 0 && flags < KERNEL
    }

    /// The machine that sees everything at once sees what was begun: at the latest when the call returns, and otherwise
    /// when it disables interrupts, since nobody can come in between from there.
    fn see(&self) -> Seen {
        let is_missed = self.scenario.quiet
            && self.is_missed(PRESENT as u32, |update| !Self::is_borne(update.high));
        let mut order = self.order.borrow_mut();
        let mode = self.mode.get();
        let settles = match self.begun.take() {
            None => return self.seen.get(),
            Some(Begun::SetLazyMode(new)) => {
                self.mode.set(new);
                let leaves = mode != 0 && mode != new;
                match self.scenario.late {
                    true => leaves && (mode == 2 || mode == 1 && is_missed),
                    false => new == 0 || leaves,
                }
            }
            Some(Begun::Change(entry, value, known, update)) => {
                let is_present = u64::from(known) & PRESENT != 0;
                let flags = update.high;
                let is_about_to = flags & EntryFlags::CURRENT_AS.bits() != 0
                    && page_address(entry) == self.fault.get();
                let is_used = is_about_to || self.scenario.quiet && !Self::is_borne(flags);
                let value = value.into();
                for state in [&self.reference, &self.processor] {
                    state.borrow_mut().entries[entry] = value;
                }
                self.possible.borrow_mut()[entry].push(value);
                order.push(update);
                is_used && is_present && mode != 1
            }
            Some(Begun::Update(update)) => {
                order.push(update);
                let mut reference = self.reference.borrow_mut();
                reference.apply(&update);
                if matches!(update.call, number::SetPxE | number::SetPxELong) {
                    let entry = entry_of(&update);
                    self.possible.borrow_mut()[entry].push(reference.entries[entry]);
                }
                let waiting = &order[self.reached.get().min(order.len() - 1)..order.len() - 1];
                !if self.scenario.late {
                    may_be_late(&update, mode, waiting)
                } else {
                    may_wait(&update, mode)
                }
            }
        };
        let seen = Seen { updates: order.len(), settles };
        self.seen.set(seen);
        seen
    }

    fn expect_visible(&self, target: usize, why: &str) {
        if self.is_stopped.get() {
            return;
        }
        let order = self.order.borrow();
        let mut reached = self.reached.get();
        while reached < target && reached > 0 && order[reached] == order[reached - 1] {
            reached += 1;
        }
        self.check(reached >= target, || {
            format!("{why}: {} is not visible, nor what follows", order[reached])
        });
        if reached >= order.len() {
            self.check(self.agrees(), || {
                format!("{why}: {:x?} instead of {:x?}", self.processor, self.reference)
            });
        }
    }

    /// The hypervisor makes something of an entry as it is in memory.
    fn make(&self, entry: usize, value: u64) {
        self.shadow.borrow_mut()[entry] = Some(value).filter(|value| value & PRESENT != 0);
        self.forgotten.set(self.forgotten.get() & !(1 << entry));
    }

    fn invalidate(&self, entry: usize) {
        self.tlb.borrow_mut()[entry] = None;
        if self.forgotten.get() & 1 << entry != 0 {
            // Nobody can know what was not told.
            return;
        }
        self.possible.borrow_mut()[entry] = Vec::from([self.reference.borrow().entries[entry]]);
    }

    fn access(&self, entry: usize) {
        // What was forgotten is found in the end. An interrupt may change the entry once more, or look at another fault.
        for _ in 0..24 {
            if self.translates(entry) {
                return;
            }
            let waiting = self.interrupts.borrow().len();
            self.look_at_fault(entry);
            let is_forgotten = self.forgotten.get() & 1 << entry != 0;
            if !is_forgotten && self.interrupts.borrow().len() == waiting {
                break;
            }
        }
        let is_there = self.translates(entry);
        let is_present = self.processor.borrow().entries[entry] & PRESENT != 0;
        let is_well = is_there || !is_present || self.is_stopped.get();
        self.check(!self.scenario.quiet || is_well, || {
            "the page fault of an entry that is present comes again".into()
        });
    }

    /// Whether the processor finds a translation, and remembers it.
    fn translates(&self, entry: usize) -> bool {
        let cached = self.tlb.borrow()[entry];
        let made = self.shadow.borrow()[entry];
        // Nobody but the guest sees a page fault that is quiet. An entry that waits may raise one, and then its update is due.
        let is_fault = self.scenario.quiet && cached.or(made).is_none();
        if is_fault {
            return false;
        }
        let used = cached.or(made).unwrap_or_else(|| self.processor.borrow().entries[entry]);
        let possible = &self.possible.borrow()[entry];
        self.check(self.is_stopped.get() || possible.contains(&used), || {
            format!("an access by {used:#x}, possible were {possible:x?}")
        });
        let is_present = used & PRESENT != 0;
        if is_present {
            if self.scenario.late {
                self.shadow.borrow_mut()[entry] = Some(used);
            }
            self.tlb.borrow_mut()[entry] = Some(used);
        }
        is_present
    }

    /// The machine behind the queue gets an update.
    fn receive(&self, update: &Update) {
        add(&self.received);
        let order = self.order.borrow();
        let place = self.place(update, &order);
        self.check(place.is_some(), || {
            format!(
                "{update} came out of order, or twice; due: {:?}",
                order.get(self.reached.get())
            )
        });
        self.reached.set(place.map_or(order.len(), |place| place + 1));
        self.processor.borrow_mut().apply(update);
        match update.call {
            number::UpdatePxE if self.scenario.late => {
                let entry = entry_of(update);
                let value = self.processor.borrow().entries[entry];
                self.make(entry, value);
                self.tlb.borrow_mut()[entry] = None;
            }
            number::SetCR3 if self.scenario.late => {
                (0..ENTRIES).for_each(|entry| self.invalidate(entry));
            }
            number::SetCR3 => *self.tlb.borrow_mut() = [None; ENTRIES],
            number::InvalPage => {
                let entry = ((update.address - PAGE_BASE) / (2 * PAGE)) as usize;
                if self.forgotten.get() & 1 << entry != 0 {
                    let value = self.processor.borrow().entries[entry];
                    self.make(entry, value);
                }
                self.invalidate(entry);
            }
            number::FlushTLB => (0..ENTRIES).for_each(|entry| self.invalidate(entry)),
            _ => {}
        }
    }

    /// Where an update stands in the order, if all before it were seen or are replaced by the next.
    fn place(&self, update: &Update, order: &[Update]) -> Option<usize> {
        let mut place = self.reached.get();
        loop {
            let due = order.get(place)?;
            if due == update {
                return Some(place);
            }
            let same = |other: &Update| due.call == other.call && due.address == other.address;
            let is_repeated = place > 0 && order[place - 1] == *due;
            if !is_repeated && !order.get(place + 1).is_some_and(same) {
                return None;
            }
            place += 1;
        }
    }

    /// Lets interrupts come that are due.
    fn deliver(&self) {
        let step = add(&self.steps);
        while self.interrupts_are_on.get() {
            let mut waiting = self.interrupts.borrow_mut();
            if waiting.front().is_none_or(|interrupt| interrupt.step > step) {
                break;
            }
            let Some(interrupt) = waiting.pop_front() else { break };
            drop(waiting);
            self.interrupts_are_on.set(interrupt.nests);
            self.perform(interrupt.operation);
            self.interrupts_are_on.set(true);
        }
    }

    fn refuse(&self, applied: usize, reason: Reason, status: i32) -> Result<(), Refusal> {
        add(&self.refusals);
        Err(Refusal { applied, reason, status })
    }
}

impl<const CAPACITY: usize> Backend for Machine<'_, CAPACITY> {
    fn recognise(_: &Hypervisor) -> Option<Self> {
        None
    }

    fn disable_interrupts(&self) -> InterruptMask {
        self.deliver();
        self.see();
        InterruptMask(u32::from(self.interrupts_are_on.replace(false)) << 9)
    }

    fn set_interrupt_mask(&self, mask: InterruptMask) {
        let seen = self.seen.get();
        self.interrupts_are_on.set(mask.0 & 1 << 9 != 0);
        self.deliver();
        self.seen.set(seen);
    }

    fn stop(&self, failure: &Failure) {
        add(&self.notes);
        let order = self.order.borrow();
        self.check(self.place(&failure.update, &order).is_some(), || {
            format!("{failure} is not what is due")
        });
        self.is_stopped.set(true);
    }

    fn apply(&self, batch: Batch<'_>) -> Result<(), Refusal> {
        self.check(!self.is_stopped.get(), || "a hypercall after the stop".into());
        self.check(!self.interrupts_are_on.get(), || "a hypercall with interrupts on".into());
        self.check((1..=CAPACITY).contains(&batch.len()), || format!("a batch of {}", batch.len()));
        let again = self.in_a_row.get() > 0;
        self.check(!again || batch.len() == 1, || "what was refused is not tried alone".into());
        let at = self.hypercalls.get();
        self.hypercalls.set(at + 1);
        let outcomes = &self.scenario.outcomes;
        let outcome =
            if outcomes.is_empty() { Outcome::Applied } else { outcomes[at % outcomes.len()] };
        let limit = match outcome {
            Outcome::Stopped(0) if self.in_a_row.get() + 1 >= ATTEMPTS => batch.len(),
            Outcome::Stopped(limit) => limit.min(batch.len()),
            Outcome::Applied | Outcome::Complains => batch.len(),
        };
        for (index, update) in batch.iter().take(limit).enumerate() {
            if self.scenario.refused.is_some_and(|refused| refused | 1 == update.low | 1) {
                return self.refuse(index, Reason::Permanent, -22);
            }
            self.receive(&update);
        }
        if limit < batch.len() {
            self.in_a_row.set(if limit > 0 { 1 } else { self.in_a_row.get() + 1 });
            return self.refuse(limit, Reason::Transient, -16);
        }
        self.in_a_row.set(0);
        if outcome == Outcome::Complains {
            add(&self.blameless);
            return self.refuse(usize::MAX, Reason::Transient, -1);
        }
        Ok(())
    }

    fn report(&self, _: &Failure) {
        add(&self.notes);
    }

    fn step(&self) {
        self.deliver();
    }
}
