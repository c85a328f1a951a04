//! A guest whose changes are told late, through the queue of the ROM: what its processor sees must be what one with a TLB may see.
//!
//! The guest is a small kernel. It has two address spaces, makes tables and takes them away, uses each frame as a table, as a
//! root and for data in turn, and accesses pages at any moment, also between a change and the flush that it owes. Such an access
//! must find what a page was at some time since the last flush, or what it is now; and a page fault must be one by the tables as they
//! are now.
//!
//! In every second run page faults are quiet where the shadow is complete. Then the kernel gets what the processor finds. It has to be a
//! page fault by the tables as they are, or were since the last flush if a store was forbidden; in the mode MMU also that of a page
//! that was changed there, and always that of a program's page. And once the kernel has asked for its address, it may not come again.

use super::super::machine::*;
use super::super::*;
use super::{Numbers, READ, USED, WRITE, World, cases};
use crate::hypercall::{Call, Machine, Outcome, Quiet};
use crate::walk::{ERROR_PRESENT, PageFault, find};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::format;
use std::rc::Rc;
use std::string::String;
use std::vec::Vec;
use vmi_abi::CallNumber;
use vmi_abi::flags::{EntryFlags, LazyMode};
use vmi_abi::number;
use vmi_hv_backend::reference::interface::{Hypercall, PHYSICAL, SHOWN_BYTES, Status};
use vmi_hv_backend::{
    Backend, Batch, CHANGED, Failure, Hypervisor, InterruptMask, LinearMapping, Queue, Reason,
    Refusal, Update,
};

/// Ways to get it wrong, each of which must be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// None.
    Nothing,
    /// AllocatePage waits, although the frame's ReleasePage does.
    BeginsAnewUntold,
    /// ReleasePage is not told.
    KeepsTables,
    /// InvalPage drops what is known of the page, and tells nothing.
    InvalPageTellsNothing,
    /// FlushTLB flushes the TLB, and tells nothing.
    FlushTellsNothing,
    /// SetCR3 is told before what waits.
    SetCr3Overtakes,
    /// An entry is changed and nobody is told.
    ChangesUntold,
    /// The map stays clear although page faults are quiet.
    MapStaysClear,
    /// Page faults become quiet while something waits.
    QuietTooEarly,
    /// Page faults are quiet whatever is missing.
    QuietForAll,
}

const FAULTS: [Fault; 9] = [
    Fault::BeginsAnewUntold,
    Fault::KeepsTables,
    Fault::InvalPageTellsNothing,
    Fault::FlushTellsNothing,
    Fault::SetCr3Overtakes,
    Fault::ChangesUntold,
    Fault::MapStaysClear,
    Fault::QuietTooEarly,
    Fault::QuietForAll,
];

/// A bit by which the queue does not know a frame again.
const DISGUISE: u32 = 1 << 31;

/// The hypervisor, as the queue sees it; whether page faults are quiet, and the queue's map.
struct Host(RefCell<World>, Cell<Quiet>, Rc<Queue<128>>, Fault);

impl Backend for Host {
    fn recognise(_: &Hypervisor) -> Option<Self> {
        None
    }
    fn disable_interrupts(&self) -> InterruptMask {
        InterruptMask(0)
    }
    fn set_interrupt_mask(&self, _: InterruptMask) {}
    fn stop(&self, failure: &Failure) {
        std::panic!("{failure}");
    }
    fn apply(&self, batch: Batch<'_>) -> Result<(), Refusal> {
        match self.told(batch.iter(), true) {
            (0, _) => Ok(()),
            (status, applied) => {
                Err(Refusal { applied: applied as usize, reason: Reason::Permanent, status })
            }
        }
    }
}

impl Host {
    /// Makes a hypercall, and takes over what it does to the map.
    fn with<R>(
        &self,
        work: impl FnOnce(&mut Machine<'_, 'static, Ram, fn(u64) -> bool>) -> R,
    ) -> R {
        let World { ram, registers, shadow, counters, .. } = &mut *self.0.borrow_mut();
        let mut quiet = self.1.get();
        let result = work(&mut Machine {
            shadow: Some(shadow),
            registers,
            memory: &*ram,
            is_hidden,
            limit: 128,
            counters,
            quiet: Some(&mut quiet),
        });
        quiet.now |= self.3 == Fault::QuietForAll;
        self.1.set(quiet);
        let shown = self.2.shown();
        for (word, address) in
            shown.map.iter().chain(&shown.directories).zip((MAP * FRAME..).step_by(4))
        {
            let value = ram.read(address, 4).unwrap_or_default() as u32;
            word.set(if self.3 == Fault::MapStaysClear { 0 } else { value });
        }
        result
    }

    /// Tells of updates, which are all that wait or come from elsewhere.
    fn told(&self, updates: impl IntoIterator<Item = Update>, are_all: bool) -> (i32, u32) {
        let undisguised = |update: Update| match update.call {
            number::AllocatePage => Update { address: update.address & !DISGUISE, ..update },
            _ => update,
        };
        let place = if are_all || self.3 == Fault::QuietTooEarly { MAP } else { 0 };
        self.with(|machine| {
            let (status, applied) = machine.apply(updates.into_iter().map(undisguised));
            machine.settle((place * FRAME) as u32, status);
            (status as i32, applied)
        })
    }
}

/// Frames for data only, and the one that has the map; all others are used in turn.
const DATA: u64 = MEMORY - 4;
const MAP: u64 = MEMORY - 1;

/// Where tables are: the first linear address that each maps, and the pages that are used of it.
const REGIONS: [u32; 2] = [0, 1 << 22];
const PAGES: u32 = 4;

/// From here on pages are the kernel's own. It bears page faults of programs' pages that its tables do not have.
const KERNEL: u32 = REGIONS[1];

/// An address space: its highest table, its directory, and the tables of its regions.
struct Space {
    root: u64,
    directory: u64,
    tables: [Option<u64>; REGIONS.len()],
}

/// What a page leads to: a frame, and whether stores may go there.
type Page = Option<(u64, bool)>;

struct Kernel {
    host: Host,
    queue: Rc<Queue<128>>,
    pae: bool,
    free: Vec<u64>,
    spaces: Vec<Space>,
    current: usize,
    /// What each page of the current space was since the last flush, the newest last.
    possible: BTreeMap<u32, Vec<Page>>,
    fault: Fault,
    /// The mode MMU is on, and something was changed in it.
    mode: LazyMode,
    is_unsettled: bool,
    /// Accesses that found what is no longer, those while page faults were quiet, and such page faults.
    stale: u32,
    quiet: u32,
    quiet_faults: u32,
}

/// Pages of a space that are used.
fn pages() -> impl Iterator<Item = u32> {
    REGIONS.into_iter().flat_map(|region| (0..PAGES).map(move |page| region + page * FRAME as u32))
}

impl Kernel {
    fn new(pae: bool, quiet: bool, pool: usize, fault: Fault) -> Self {
        let world = World::new(Ram::new(), registers(pae, 0), pool);
        let queue = Rc::new(Queue::new());
        let mut kernel = Self {
            host: Host(RefCell::new(world), Cell::default(), Rc::clone(&queue), fault),
            queue,
            pae,
            free: (0..DATA).collect(),
            spaces: Vec::new(),
            current: 0,
            possible: BTreeMap::new(),
            fault,
            mode: LazyMode::OFF,
            is_unsettled: false,
            stale: 0,
            quiet: 0,
            quiet_faults: 0,
        };
        kernel.queue.tell_late(quiet, LinearMapping::of_pages(KERNEL, 0, 0));
        if quiet {
            let (eax, ebx) = (Hypercall::BeQuiet as u32, (MAP * FRAME) as u32);
            let call = Call { eax, ebx, ecx: SHOWN_BYTES, cpl: 0 };
            let outcome = kernel.host.with(|machine| machine.call(call));
            assert_eq!(outcome, Outcome::Return(Status::Done, 0));
        }
        for _ in 0..2 {
            kernel.make_space(&mut Numbers(0));
        }
        kernel.enter(0);
        kernel
    }

    fn submit(&self, update: Update) {
        self.queue.submit(&self.host, update);
    }

    /// A frame of zeroes, often the one that became free last. Nobody is told of those.
    fn take(&mut self, numbers: &mut Numbers) -> u64 {
        let last = self.free.len() - 1;
        let index = if numbers.one_in(2) { last } else { numbers.below(last as u64) as usize };
        let frame = self.free.remove(index);
        for address in (frame * FRAME..(frame + 1) * FRAME).step_by(8) {
            self.store(address, 8, 0);
        }
        frame
    }

    /// A store, which is emulated where it is to a table that is watched.
    fn store(&self, address: u64, size: usize, value: u64) {
        let world = &mut *self.host.0.borrow_mut();
        world.ram.put(address, size, value);
        if world.shadow.is_watched(address / FRAME) {
            let mut quiet = self.host.1.get();
            quiet.now = false;
            self.host.1.set(quiet);
            world.shadow.written(&world.registers, &world.ram, address, size);
        }
    }

    /// As the ROM does it: stored at once, told late.
    fn set(&mut self, address: u64, value: u64, flags: u32) {
        self.change(address, value, [value as u32, flags], value as u32);
    }

    /// The same with the ROM's notes, and what the queue is to know.
    fn change(&mut self, address: u64, value: u64, [low, high]: [u32; 2], known: u32) {
        let (size, call) =
            if self.pae { (8, number::UpdatePxELong) } else { (4, number::UpdatePxE) };
        self.store(address, size, value);
        self.note();
        self.is_unsettled |= self.mode == LazyMode::MMU;
        if self.fault != Fault::ChangesUntold {
            let update = Update { call, address: address as u32, low, high, flags: PHYSICAL };
            let (settle, flush) =
                (|| self.queue.settle(&self.host), || self.queue.flush(&self.host));
            self.queue.submit_late(&self.host, update, known, settle, flush);
        }
    }

    fn set_mode(&mut self, mode: LazyMode) {
        self.queue.set_lazy_mode(&self.host, mode);
        self.mode = mode;
        self.is_unsettled &= mode == LazyMode::MMU;
    }

    fn page_call(&self, call: CallNumber, frame: u64) {
        let update = Update { call, address: frame as u32, low: 0, high: 0, flags: 0 };
        match self.fault {
            Fault::KeepsTables if call == number::ReleasePage => {}
            Fault::BeginsAnewUntold if call == number::AllocatePage => {
                self.submit(Update { address: update.address | DISGUISE, ..update });
            }
            _ => self.submit(update),
        }
    }

    fn make_space(&mut self, numbers: &mut Numbers) {
        let root = self.take(numbers);
        let directory = if self.pae { self.take(numbers) } else { root };
        self.page_call(number::AllocatePage, directory);
        if self.pae {
            self.set(root * FRAME, (directory * FRAME) | PRESENT, EntryFlags::PDP.bits());
        }
        self.spaces.push(Space { root, directory, tables: [None; 2] });
    }

    /// A space that is not the current one is taken down. Roots of two levels may end without a word, as Linux's do.
    fn end_space(&mut self, numbers: &mut Numbers) {
        let index = 1 - self.current;
        for region in 0..REGIONS.len() {
            self.take_table_away(index, region);
        }
        let Space { root, directory, .. } = self.spaces.remove(index);
        self.current = 0;
        if self.pae {
            self.set(root * FRAME, 0, EntryFlags::PDP.bits());
            self.free.push(root);
        }
        if self.pae || numbers.one_in(2) {
            self.page_call(number::ReleasePage, directory);
        }
        self.free.push(directory);
    }

    fn size(&self) -> u64 {
        if self.pae { 8 } else { 4 }
    }

    fn directory_entry(&self, space: usize, region: usize) -> u64 {
        let index = REGIONS[region] >> if self.pae { 21 } else { 22 };
        self.spaces[space].directory * FRAME + u64::from(index) * self.size()
    }

    fn provide_table(&mut self, numbers: &mut Numbers, space: usize, region: usize) {
        if self.spaces[space].tables[region].is_none() {
            let table = self.take(numbers);
            self.page_call(number::AllocatePage, table);
            let entry = self.directory_entry(space, region);
            self.set(entry, (table * FRAME) | USED, EntryFlags::PD.bits());
            self.spaces[space].tables[region] = Some(table);
        }
    }

    /// Entries go without a word, the table with one, and its frame is free at once.
    fn take_table_away(&mut self, space: usize, region: usize) {
        if let Some(table) = self.spaces[space].tables[region].take() {
            for page in 0..u64::from(PAGES) {
                self.store(table * FRAME + page * self.size(), self.size() as usize, 0);
            }
            self.note();
            let entry = self.directory_entry(space, region);
            self.set(entry, 0, EntryFlags::PD.bits());
            self.page_call(number::ReleasePage, table);
            self.free.push(table);
        }
    }

    fn set_page(&mut self, numbers: &mut Numbers, space: usize) {
        let region = numbers.below(2) as usize;
        self.provide_table(numbers, space, region);
        let Some(table) = self.spaces[space].tables[region] else { return };
        let page = numbers.below(PAGES.into());
        let frame = match numbers.below(4) {
            // A frame that may be a table next.
            0 if !self.free.is_empty() => numbers.one_of(&self.free),
            _ => DATA + numbers.below(MAP - DATA),
        };
        let mut value = (frame * FRAME) | USED;
        value &= if numbers.one_in(3) { !WRITABLE } else { !0 };
        value &= if numbers.one_in(4) { !DIRTY } else { !0 };
        value &= if numbers.one_in(6) { !(ACCESSED | DIRTY) } else { !0 };
        value = if numbers.one_in(4) { 0 } else { value };
        let linear = REGIONS[region] + page as u32 * FRAME as u32;
        let current =
            if space == self.current { EntryFlags::CURRENT_AS.bits() | linear } else { 0 };
        let flags = EntryFlags::PT.bits() | current;
        let address = table * FRAME + page * self.size();
        if numbers.one_in(3) {
            // The guest's own store. It may wait, or be said to be of the current space, if the page was there before.
            let old = self.host.0.borrow().ram.read(address, self.size() as usize);
            let was_there = old.is_some_and(|old| old & PRESENT != 0);
            let (is_deferred, is_current) = (numbers.one_in(2), numbers.one_in(2));
            let value_told = if was_there && is_deferred { 0 } else { value as u32 };
            let came = if was_there && is_current { 0 } else { value as u32 & 1 };
            self.change(address, value, [CHANGED | came, 0], value_told);
        } else {
            self.set(address, value, flags);
        }
    }

    /// What a page of the current space is now.
    fn page(&self, linear: u32) -> Page {
        let world = self.host.0.borrow();
        let registers = self.registers();
        let found = find(&registers, &world.ram, linear).ok()?;
        Some((found.physical / FRAME, found.steps().last()?.value & WRITABLE != 0))
    }

    fn registers(&self) -> Registers {
        registers(self.pae, self.spaces[self.current].root)
    }

    /// Remembers what pages are now.
    fn note(&mut self) {
        if self.spaces.len() < 2 {
            return;
        }
        for linear in pages() {
            let now = self.page(linear);
            let all = self.possible.entry(linear).or_default();
            if all.last() != Some(&now) {
                all.push(now);
            }
        }
    }

    /// Nothing but what pages are now is possible.
    fn forget(&mut self, which: impl Fn(u32) -> bool) {
        for linear in pages().filter(|linear| which(*linear)) {
            let now = self.page(linear);
            self.possible.insert(linear, Vec::from([now]));
        }
    }

    fn enter(&mut self, space: usize) {
        self.current = space;
        let update = Update::SetCR3((self.spaces[space].root * FRAME) as u32);
        if self.fault == Fault::SetCr3Overtakes {
            self.host.told([update], false);
        } else {
            self.submit(update);
        }
    }

    fn access(&mut self, linear: u32, access: Access) -> Result<(), String> {
        let now = self.page(linear);
        let possible = self.possible[&linear].clone();
        let mut was_asked = false;
        for _ in 0..8 {
            let is_quiet = self.host.1.get().now;
            self.quiet += u32::from(is_quiet);
            let mut world = self.host.0.borrow_mut();
            let frame = match world.look_up(linear, access) {
                Ok((address, _)) => MEMORY - 1 - address / FRAME,
                Err(error) if is_quiet => {
                    let expected = translate(&world.registers, &world.ram.clone(), linear, access);
                    let is_old = error & ERROR_PRESENT != 0
                        && access.write
                        && possible.iter().flatten().any(|(_, writable)| !writable);
                    let is_excused = is_old || self.is_unsettled || linear < KERNEL;
                    match expected {
                        Err(PageFault { error: own }) if own == error || is_excused => {
                            self.quiet_faults += 1;
                            return Ok(());
                        }
                        Ok(_) if is_excused && !was_asked => {
                            drop(world);
                            self.queue.fault(&self.host, linear, || ());
                            was_asked = true;
                            continue;
                        }
                        _ => return Err(format!("a page fault, error {error}, but {expected:?}")),
                    }
                }
                Err(error) => {
                    let World { ram, registers, shadow, .. } = &mut *world;
                    let expected = translate(registers, &ram.clone(), linear, access);
                    match shadow.fault(registers, ram, linear, error) {
                        Resolution::Filled => {
                            audit(shadow);
                            continue;
                        }
                        Resolution::Guest { error } => {
                            let same = expected == Err(PageFault { error });
                            return same.then_some(()).ok_or_else(|| {
                                format!("a page fault, error {error}, but {expected:?}")
                            });
                        }
                        Resolution::TableWrite { physical } => physical / FRAME,
                        other => return Err(format!("{other:?}")),
                    }
                }
            };
            let is_it = |page: &Page| {
                page.is_some_and(|(there, writable)| there == frame && (writable || !access.write))
            };
            self.stale += u32::from(!is_it(&now));
            let found = possible.iter().any(is_it);
            return found.then_some(()).ok_or_else(|| {
                format!("{access:?} of {linear:#x} leads to frame {frame}, possible: {possible:?}")
            });
        }
        Err("the same fault again and again".into())
    }

    fn step(&mut self, numbers: &mut Numbers) -> Result<(), String> {
        let other = 1 - self.current;
        match numbers.below(32) {
            0..6 => self.set_page(numbers, self.current),
            6..9 => self.set_page(numbers, other),
            9 | 10 => {
                let (space, region) = (numbers.below(2) as usize, numbers.below(2) as usize);
                self.take_table_away(space, region);
                if numbers.one_in(2) {
                    self.take_table_away(self.current, 1 - region);
                    self.set_page(numbers, self.current);
                }
            }
            11 => {
                self.end_space(numbers);
                self.make_space(numbers);
            }
            12 => {
                self.enter(other);
                self.forget(|_| true);
            }
            13 => {
                // A context switch: the load of CR3 comes when the mode is left.
                self.set_mode(LazyMode::CPU);
                self.enter(other);
                self.set_mode(LazyMode::OFF);
                self.forget(|_| true);
            }
            14 | 15 => self.set_mode(LazyMode::MMU),
            16 | 17 => self.set_mode(LazyMode::OFF),
            18 => {
                if self.fault == Fault::FlushTellsNothing {
                    self.host.0.borrow_mut().shadow.flush();
                } else {
                    self.submit(Update::FlushTLB(1));
                }
                self.forget(|_| true);
            }
            19 | 20 => {
                let linear = numbers.one_of(&pages().collect::<Vec<_>>());
                if self.fault == Fault::InvalPageTellsNothing {
                    self.host.0.borrow_mut().shadow.flush();
                } else {
                    self.submit(Update::InvalPage(linear));
                }
                self.forget(|page| page == linear);
            }
            21 | 22 => {
                // A hypercall of the guest's own, beside VMI.
                self.host.told([Update::FlushTLB(1)], false);
            }
            _ => {
                let linear = numbers.one_of(&pages().collect::<Vec<_>>());
                self.access(linear, if numbers.one_in(3) { WRITE } else { READ })?;
                // The dirty bit is no part of what a page is, but the accessed bit may be in a table.
                self.note();
            }
        }
        audit(&self.host.0.borrow().shadow);
        Ok(())
    }
}

fn run(seed: u64, fault: Fault) -> Result<[u32; 4], String> {
    let mut numbers = Numbers(seed ^ 0x1a7e);
    let pool = if numbers.one_in(4) { 4 + numbers.below(6) as usize } else { 24 };
    let (pae, quiet) = (numbers.one_in(2), numbers.one_in(2));
    let mut kernel = Kernel::new(pae, quiet, pool, fault);
    kernel.forget(|_| true);
    for step in 0..300 {
        kernel.step(&mut numbers).map_err(|why| format!("seed {seed}, step {step}: {why}"))?;
    }
    let recycled = kernel.host.0.borrow().shadow.recycled as u32;
    Ok([kernel.stale, recycled, kernel.quiet, kernel.quiet_faults])
}

#[test]
fn told_late_the_processor_sees_what_one_with_a_tlb_may_see() {
    let mut totals = [0; 4];
    for seed in 0..u64::from(cases(600)) {
        let counts = run(seed, Fault::Nothing).unwrap_or_else(|why| panic!("{why}"));
        totals.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
    }
    std::eprintln!("found what is no longer, pools recycled, quiet, quiet faults: {totals:?}");
    assert!(totals.iter().all(|total| *total > 100), "{totals:?}");
}

#[test]
fn told_wrongly_it_does_not() {
    for fault in FAULTS {
        let found = (0..4000).find_map(|seed| run(seed, fault).err());
        std::eprintln!("{fault:?}: {}", found.unwrap_or_else(|| panic!("{fault:?} is not found")));
    }
}
