//! The shadow against the guest's own translation.

mod late;
pub(crate) mod quiet;

use super::machine::*;
use super::*;
use crate::hypercall::Machine;
use crate::walk::{
    CR0_PAGING, CR0_WRITE_PROTECT, CR4_PAE, CR4_PAGE_SIZE, EFER_NO_EXECUTE, LARGE, PageFault,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError};
use std::collections::BTreeMap;
use std::format;
use std::string::ToString;
use std::vec::Vec;
use vmi_abi::number;
use vmi_hv_backend::Update;
use vmi_hv_backend::reference::interface::Counters;

/// Frames that are filled with tables, and those behind them that are filled with page-directory-pointer tables.
const TABLES: u64 = 10;
const POINTERS: u64 = TABLES + 2;

/// A small generator of numbers: the same for each seed.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    pub(crate) fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// An entry that may mean something.
fn entry(numbers: &mut Numbers, pae: bool) -> u64 {
    let mut value = numbers.below(0x1000) | PRESENT | WRITABLE | USER | ACCESSED;
    for (bit, odds) in [(PRESENT, 20), (WRITABLE, 5), (USER, 6), (ACCESSED, 4)] {
        value &= if numbers.one_in(odds) { !bit } else { !0 };
    }
    value &= if numbers.one_in(8) { !0 } else { !LARGE };
    let frame = match numbers.below(16) {
        0 => numbers.below(NOTHING + 4),
        1..4 => numbers.below(MEMORY),
        _ => numbers.below(TABLES),
    };
    value |= frame * FRAME;
    if value & LARGE != 0 && !numbers.one_in(8) {
        value &= !(0x3f_f000 ^ LARGE_ATTRIBUTE);
    }
    if numbers.one_in(40) {
        value |= 1 << (12 + numbers.below(20));
    }
    if pae {
        value |= if numbers.one_in(6) { NO_EXECUTE } else { 0 };
        value |= if numbers.one_in(40) { 1 << (32 + numbers.below(31)) } else { 0 };
    }
    value
}

fn pointer(numbers: &mut Numbers) -> u64 {
    let mut value = (numbers.below(TABLES) * FRAME) | PRESENT | numbers.below(4) << 3;
    if numbers.one_in(8) {
        value ^= 1 << numbers.below(64);
    }
    value
}

/// Memory full of tables, most of them PAE tables or most of them not.
fn tables(numbers: &mut Numbers, usual: bool) -> Ram {
    let ram = Ram::new();
    for frame in (0..TABLES).chain([ROM]) {
        let pae = if numbers.one_in(8) { !usual } else { usual };
        let size = if pae { 8 } else { 4 };
        for offset in (0..FRAME).step_by(size) {
            ram.put(frame * FRAME + offset, size, entry(numbers, pae));
        }
    }
    for address in (TABLES * FRAME..POINTERS * FRAME).step_by(8) {
        ram.put(address, 8, pointer(numbers));
    }
    ram
}

/// One of a few dozen pages, so that they meet.
fn linear(numbers: &mut Numbers) -> u32 {
    let quarter = numbers.one_of(&[0, 0, 1, 3]);
    let middle = numbers.one_of(&[0, 1, 2, 3, 511]);
    let low = numbers.one_of(&[0, 1, 2, 511]);
    let offset = numbers.one_of(&[0, 0, 8, 16, 0xff8, 0xffc, 0x7f8, 0x800]);
    quarter << 30 | middle << 21 | low << 12 | offset
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Accesses an address; a store has a size, as a power of two.
    Access { number: u64, access: Access },
    /// Stores an entry.
    Store { number: u64, size: u32 },
    /// Loads CR3, or changes a bit that decides on translation.
    Load { number: u64 },
    /// A batch of updates.
    Apply { number: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let access = (any::<u64>(), any::<[bool; 3]>()).prop_map(|(number, [write, user, fetch])| {
        Step::Access { number, access: Access { write, user, execute: fetch && !write } }
    });
    prop_oneof![
        8 => access,
        4 => (any::<u64>(), 0..4_u32).prop_map(|(number, size)| Step::Store { number, size }),
        1 => any::<u64>().prop_map(|number| Step::Load { number }),
        2 => any::<u64>().prop_map(|number| Step::Apply { number }),
    ]
}

/// A guest with a shadow.
struct World {
    ram: Ram,
    registers: Registers,
    shadow: Shadow<'static>,
    counters: Counters,
    /// What the processor's TLB holds: for a page and an access to it, the machine's address and the global bit. Entries stay until
    /// they fault or are flushed, so it is the largest TLB that there can be.
    tlb: BTreeMap<(u32, u32), (u64, bool)>,
    hits: u32,
    faults: u32,
    watched_stores: u32,
}

impl Drop for World {
    fn drop(&mut self) {
        give_back(&mut self.shadow);
    }
}

impl World {
    fn new(ram: Ram, registers: Registers, pool: usize) -> Self {
        let mut shadow = shadow(pool);
        shadow.load(&registers, &ram);
        let counters = Counters::ZERO;
        let tlb = BTreeMap::new();
        Self { ram, registers, shadow, counters, tlb, hits: 0, faults: 0, watched_stores: 0 }
    }

    fn pointers(&self) -> Option<Vec<u8>> {
        let root = self.registers.root();
        let is_used = self.registers.has_paging() && self.registers.mode().pae;
        let frame = is_used.then(|| self.ram.place(root / FRAME))?;
        let start = (root % FRAME) as usize;
        matches!(frame, Place::Memory(_))
            .then(|| self.ram.frame(root / FRAME)[start..start + 32].to_vec())
    }

    /// What the processor makes of an address, with its TLB.
    fn look_up(&mut self, linear: u32, access: Access) -> Result<(u64, bool), u32> {
        if self.shadow.take_flush() {
            self.tlb.clear();
        }
        let (page, offset) = (linear / FRAME as u32, u64::from(linear) % FRAME);
        let key = (page, error_of(access));
        if let Some(&(address, is_global)) = self.tlb.get(&key) {
            return Ok((address | offset, is_global));
        }
        let found = walk(&self.shadow, linear, access);
        match found {
            Ok((address, is_global)) => _ = self.tlb.insert(key, (address & ADDRESS, is_global)),
            Err(_) => self.tlb.retain(|&(cached, _), _| cached != page),
        }
        found
    }

    /// Makes an access on the processor and compares all that comes of it with the guest's own translation.
    /// Answers where a store has to go, if anywhere.
    fn access(&mut self, linear: u32, access: Access) -> Result<Option<u64>, TestCaseError> {
        let reference = self.ram.clone();
        let expected = translate(&self.registers, &reference, linear, access);
        let pointers = self.pointers();
        for _ in 0..8 {
            match self.look_up(linear, access) {
                Ok((address, is_global)) => {
                    let Ok(expected) = expected else {
                        return Err(TestCaseError::fail(format!("{expected:?}, but a hit")));
                    };
                    prop_assert_eq!(&self.ram, &reference, "accessed and dirty bits");
                    let frame = expected.physical / FRAME;
                    let place = match self.ram.place(frame) {
                        Place::Memory(place) | Place::Device(place) => place,
                        Place::ReadOnly(place) => {
                            prop_assert!(!access.write, "a store to the ROM");
                            place
                        }
                        Place::Nothing => {
                            prop_assert!(!access.write, "a store to nothing");
                            self.shadow.ones
                        }
                    };
                    prop_assert_eq!(address, place + expected.physical % FRAME);
                    let last = expected.steps().last();
                    prop_assert_eq!(is_global, last.is_some_and(|step| step.value & GLOBAL != 0));
                    self.hits += 1;
                    return Ok(access.write.then_some(expected.physical));
                }
                Err(error) => match self.shadow.fault(&self.registers, &self.ram, linear, error) {
                    Resolution::Filled => {}
                    Resolution::Guest { error } => {
                        prop_assert_eq!(expected, Err(PageFault { error }));
                        prop_assert_eq!(&self.ram, &reference, "a fault changes nothing");
                        self.faults += 1;
                        return Ok(None);
                    }
                    Resolution::TableWrite { physical } => {
                        prop_assert!(access.write && self.shadow.is_watched(physical / FRAME));
                        prop_assert_eq!(expected.map(|found| found.physical), Ok(physical));
                        prop_assert_eq!(&self.ram, &reference, "accessed and dirty bits");
                        self.watched_stores += 1;
                        return Ok(Some(physical));
                    }
                    Resolution::Dropped { physical } => {
                        prop_assert!(access.write && physical / FRAME >= MEMORY);
                        prop_assert_eq!(expected.map(|found| found.physical), Ok(physical));
                        prop_assert_eq!(&self.ram, &reference, "accessed and dirty bits");
                        return Ok(None);
                    }
                },
            }
            audit(&self.shadow);
            if pointers != self.pointers() {
                // An accessed bit was set in a table that is one of pointers too. They are read when CR3 is loaded.
                self.shadow.load(&self.registers, &self.ram);
                return Ok(None);
            }
        }
        Err(TestCaseError::fail("the same fault again and again"))
    }

    fn store(
        &mut self,
        linear: u32,
        access: Access,
        size: usize,
        value: u64,
    ) -> Result<(), TestCaseError> {
        let linear = linear & !(size as u32 - 1);
        let Some(physical) = self.access(linear, access)? else { return Ok(()) };
        let frame = physical / FRAME;
        let is_told = self.shadow.is_watched(frame) || self.shadow.is_announced(frame);
        if self.ram.write(physical, size, value) && is_told {
            self.shadow.written(&self.registers, &self.ram, physical, size);
        }
        Ok(())
    }

    fn apply(&mut self, updates: impl IntoIterator<Item = Update>) {
        let Self { ram, registers, shadow, counters, .. } = self;
        let mut machine = Machine {
            shadow: Some(shadow),
            registers,
            memory: &*ram,
            is_hidden,
            limit: 128,
            counters,
            quiet: None,
        };
        let _ = machine.apply(updates);
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        let pointers = self.pointers();
        match step {
            Step::Access { number, access } => {
                let linear = linear(&mut Numbers(number));
                self.access(linear, access)?;
            }
            Step::Store { number, size } => {
                let mut numbers = Numbers(number);
                let access = Access { write: true, user: numbers.one_in(2), execute: false };
                let (linear, pae) = (linear(&mut numbers), self.registers.mode().pae);
                self.store(linear, access, 1 << size, entry(&mut numbers, pae))?;
            }
            Step::Load { number } => {
                self.registers = any_registers(&mut Numbers(number), self.registers);
                self.shadow.load(&self.registers, &self.ram);
            }
            Step::Apply { number } => {
                let mut numbers = Numbers(number);
                let updates: Vec<Update> = (0..numbers.below(6))
                    .map(|_| update(&mut numbers, self.registers.mode().pae))
                    .collect();
                self.apply(updates);
            }
        }
        if pointers != self.pointers() {
            self.shadow.load(&self.registers, &self.ram);
        }
        audit(&self.shadow);
        Ok(())
    }
}

fn any_registers(numbers: &mut Numbers, old: Registers) -> Registers {
    let pae = if numbers.one_in(6) { numbers.one_in(2) } else { old.mode().pae };
    let root = if pae { TABLES + numbers.below(2) } else { numbers.below(3) };
    let mut new = registers(pae, root);
    new.width = old.width;
    if pae {
        new.cr3 |= numbers.one_of(&[0, 0x20, 0xfe0]);
    }
    new.cr0 ^= if numbers.one_in(4) { CR0_WRITE_PROTECT } else { 0 };
    new.cr0 ^= if numbers.one_in(24) { CR0_PAGING } else { 0 };
    new.cr4 ^= if numbers.one_in(8) { CR4_PAGE_SIZE } else { 0 };
    new.efer ^= if numbers.one_in(8) { EFER_NO_EXECUTE } else { 0 };
    if numbers.one_in(24) {
        new.cr3 = numbers.next() as u32 % (NOTHING * FRAME) as u32;
    }
    assert_eq!(CR4_PAE & new.cr4 != 0, pae);
    new
}

fn update(numbers: &mut Numbers, pae: bool) -> Update {
    let (linear, value) = (linear(numbers), entry(numbers, pae));
    match numbers.below(12) {
        0 => frame_update(number::AllocatePage, numbers.below(NOTHING) as u32),
        1 => frame_update(number::ReleasePage, numbers.below(NOTHING) as u32),
        2 => frame_update(number::InvalPage, linear),
        3 => frame_update(number::FlushTLB, 0),
        4 => Update::SetCR3(if pae { TABLES } else { numbers.below(3) } as u32 * FRAME as u32),
        5 => Update::UpdatePxE(linear, 0),
        6 if pae => Update::UpdatePxELong(linear & !7, 0),
        _ if pae => Update::SetPxELong(value, linear & !7, 0),
        _ => Update::SetPxE(value as u32, linear & !3, 0),
    }
}

pub(crate) fn frame_update(call: vmi_abi::CallNumber, address: u32) -> Update {
    Update { call, address, low: 0, high: 0, flags: 0 }
}

/// `SHADOW_CASES` makes it longer.
fn cases(usual: u32) -> u32 {
    std::env::var("SHADOW_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(usual)
}

proptest! {
    #![proptest_config(Config { cases: cases(256), ..Config::default() })]

    #[test]
    fn the_processor_sees_what_the_guest_s_tables_say(
        seed in any::<u64>(),
        pool in prop_oneof![3..8_usize, Just(100)],
        steps in vec(step(), 1..300),
    ) {
        let mut numbers = Numbers(seed);
        let pae = numbers.one_in(2);
        let ram = tables(&mut numbers, pae);
        let registers = Registers { width: numbers.one_of(&[36, 40]), ..registers(pae, 0) };
        let registers = any_registers(&mut numbers, registers);
        let mut world = World::new(ram, registers, pool);
        for step in steps {
            world.step(step)?;
        }
    }
}

#[test]
fn the_scenarios_are_not_all_faults() {
    let mut totals = [0; 4];
    for seed in 0..200 {
        let mut numbers = Numbers(seed);
        let pae = seed % 2 == 0;
        let ram = tables(&mut numbers, pae);
        let registers = any_registers(&mut numbers, registers(pae, 0));
        let mut world = World::new(ram, registers, 12);
        for _ in 0..100 {
            let access =
                Access { write: numbers.one_in(2), user: numbers.one_in(2), execute: false };
            let number = numbers.next();
            let step = match numbers.below(4) {
                0 => Step::Store { number, size: 3 },
                1 if numbers.one_in(4) => Step::Load { number },
                _ => Step::Access { number, access },
            };
            world
                .step(step)
                .unwrap_or_else(|failure| panic!("seed {seed}: {}", failure.to_string()));
        }
        let recycled = world.shadow.recycled as u32;
        for (total, count) in
            totals.iter_mut().zip([world.hits, world.faults, world.watched_stores, recycled])
        {
            *total += count;
        }
    }
    std::eprintln!("hits, faults, watched stores, recycled: {totals:?}");
    assert!(totals.iter().all(|&total| total > 200), "{totals:?}");
}

/// Memory full of what no guest in its senses has in its tables.
fn malformed(numbers: &mut Numbers) -> Ram {
    let ram = Ram::new();
    for frame in 0..DEVICE {
        let style = numbers.below(7);
        for address in (frame * FRAME..(frame + 1) * FRAME).step_by(8) {
            let flags =
                numbers.below(0x1000) | PRESENT | if numbers.one_in(2) { ACCESSED } else { 0 };
            let value = match style {
                0 => numbers.next(),
                1 => u64::MAX,
                2 => ((HIDDEN + numbers.below(4)) * FRAME) | flags,
                3 => (frame * FRAME) | flags,
                4 => numbers.next() << 12 | flags,
                5 => ((numbers.below(HIDDEN) * FRAME) | flags) * 0x1_0000_0001,
                _ => pointer(numbers),
            };
            ram.put(address, 8, value);
        }
    }
    ram
}

#[test]
fn malformed_tables_map_nothing_but_what_is_the_guest_s() {
    let (mut hits, mut ones) = (0, 0);
    for seed in 0..u64::from(cases(1500)) {
        let mut numbers = Numbers(seed ^ 0x5eed);
        let ram = malformed(&mut numbers);
        let pool = 3 + numbers.below(5) as usize;
        let first = any_registers(&mut numbers, registers(seed % 2 == 0, 0));
        let mut world = World::new(ram, first, pool);
        for _ in 0..40 {
            let linear =
                if numbers.one_in(2) { linear(&mut numbers) } else { numbers.next() as u32 };
            let access = Access {
                write: numbers.one_in(3),
                user: numbers.one_in(3),
                execute: numbers.one_in(4),
            };
            for round in 0.. {
                assert!(round < 8, "seed {seed}: the same fault again and again");
                match walk(&world.shadow, linear, access) {
                    Ok((address, _)) => {
                        hits += 1;
                        ones += u32::from(address & ADDRESS == world.shadow.ones);
                        break;
                    }
                    Err(error) => {
                        match world.shadow.fault(&world.registers, &world.ram, linear, error) {
                            Resolution::Filled => {}
                            Resolution::Guest { .. } | Resolution::Dropped { .. } => break,
                            Resolution::TableWrite { physical } => {
                                let physical = physical & !7;
                                world.ram.put(physical, 8, numbers.next());
                                world.shadow.written(&world.registers, &world.ram, physical, 8);
                                break;
                            }
                        }
                    }
                }
            }
            match numbers.below(8) {
                0 => {
                    let width = world.registers.width ^ 4;
                    let next = any_registers(&mut numbers, world.registers);
                    world.registers =
                        Registers { cr3: numbers.next() as u32 % 0x2_0000, width, ..next };
                    world.shadow.load(&world.registers, &world.ram);
                }
                1 => world.apply([update(&mut numbers, seed % 2 == 0)]),
                2 => {
                    let (physical, size) =
                        (numbers.next() >> numbers.below(64), 1 << numbers.below(4));
                    world.shadow.written(&world.registers, &world.ram, physical, size);
                }
                3 => {
                    let linear = numbers.next() as u32;
                    world.shadow.invalidate_page(&world.registers, &world.ram, linear);
                }
                _ => {}
            }
            audit(&world.shadow);
        }
    }
    std::eprintln!("hits: {hits}, of them pages of ones: {ones}");
    assert!(hits > 5000 && ones > 500, "{hits} {ones}");
}

const READ: Access = Access { write: false, user: false, execute: false };
const WRITE: Access = Access { write: true, ..READ };
const USER_READ: Access = Access { user: true, ..READ };
const USER_WRITE: Access = Access { user: true, ..WRITE };
const OPEN: u64 = PRESENT | WRITABLE | USER;
const USED: u64 = OPEN | ACCESSED | DIRTY;

/// PAE: pointers in frame 0, a directory in 1, a table in 2, and its first entries map frames 0 to 15 and so on. Two-level:
/// frame 1 is the root.
fn world(pae: bool) -> World {
    let ram = Ram::new();
    let size = if pae { 8 } else { 4 };
    ram.put(0, 8, FRAME | PRESENT);
    ram.put(FRAME, size, (2 * FRAME) | OPEN);
    for frame in 0..NOTHING {
        ram.put(2 * FRAME + frame * size as u64, size, (frame * FRAME) | OPEN);
    }
    World::new(ram, registers(pae, if pae { 0 } else { 1 }), 20)
}

/// The linear address of an entry of the page table in [`world`], and of the page that it maps.
fn entry_of(pae: bool, page: u64) -> (u32, u32) {
    (2 * FRAME as u32 + page as u32 * if pae { 8 } else { 4 }, page as u32 * FRAME as u32)
}

impl World {
    /// An access that is compared with the guest's tables. How many faults of the shadow it takes, 100 for one of the guest's.
    fn faults(&mut self, linear: u32, access: Access) -> u32 {
        let before = self.ram.clone();
        let mut shadow_faults = 0;
        while let Err(error) = walk(&self.shadow, linear, access) {
            match self.shadow.fault(&self.registers, &self.ram, linear, error) {
                Resolution::Filled => shadow_faults += 1,
                Resolution::Guest { .. } => shadow_faults = 100,
                Resolution::TableWrite { .. } | Resolution::Dropped { .. } => shadow_faults = 1000,
            }
            if shadow_faults >= 100 {
                break;
            }
        }
        let again = translate(&self.registers, &before, linear, access).is_ok();
        assert_eq!(again, shadow_faults != 100);
        audit(&self.shadow);
        shadow_faults
    }

    fn set(&mut self, pae: bool, linear: u32, value: u64) {
        let update = if pae {
            Update::SetPxELong(value, linear, 0)
        } else {
            Update::SetPxE(value as u32, linear, 0)
        };
        self.apply([update]);
        assert_eq!(self.counters.refusals, 0);
    }
}

#[test]
fn a_table_is_watched_until_it_is_announced_and_from_its_release_on() {
    for pae in [false, true] {
        let mut world = world(pae);
        let (entry, page) = entry_of(pae, 9);
        assert_eq!(world.faults(page, READ), 1);
        assert_eq!(world.faults(entry, READ), 1);
        assert_eq!(world.faults(entry, WRITE), 1000, "watched");
        world.apply([frame_update(number::AllocatePage, 2)]);
        assert_eq!(world.faults(entry, WRITE), 0, "announced, and read again: it is dirty already");
        world.apply([frame_update(number::ReleasePage, 2)]);
        assert_eq!(world.faults(page, READ), 1, "its shadow was forgotten");
        assert_eq!(world.faults(entry, WRITE), 1000, "watched again, in mappings that there were");
    }
}

#[test]
fn an_announced_table_that_changed_silently_is_read_at_inval_page() {
    for pae in [false, true] {
        let mut world = world(pae);
        let (_, page) = entry_of(pae, 9);
        world.apply([frame_update(number::AllocatePage, 2)]);
        assert_eq!(world.faults(page, READ), 1);
        let size = if pae { 8 } else { 4 };
        world.ram.put(2 * FRAME + 9 * size as u64, size, 0);
        assert!(walk(&world.shadow, page, READ).is_ok(), "seen old");
        let _ = world.shadow.take_flush();
        world.apply([frame_update(number::InvalPage, page)]);
        assert_eq!(world.faults(page, READ), 100);
        assert!(world.shadow.take_flush());
        world.ram.put(2 * FRAME + 9 * size as u64, size, (11 * FRAME) | USED);
        let (entry, _) = entry_of(pae, 9);
        world.apply([Update::UpdatePxE(entry, 0)]);
        assert_eq!(world.faults(page, WRITE), 0, "told");
    }
}

#[test]
fn an_announced_directory_that_changed_silently_is_read_at_inval_page() {
    for pae in [false, true] {
        let mut world = world(pae);
        world.apply([frame_update(number::AllocatePage, 1)]);
        assert_eq!(world.faults(0, READ), 1);
        world.ram.put(FRAME, 4, 0);
        assert!(walk(&world.shadow, 0, READ).is_ok(), "seen old");
        world.apply([frame_update(number::InvalPage, 0)]);
        assert_eq!(world.faults(0, READ), 100);
    }
}

#[test]
fn pointers_are_followed_when_they_are_told() {
    let mut world = world(true);
    // Another directory with the same table, in frame 3, and one without, in frame 4.
    world.ram.put(3 * FRAME + 8, 8, (2 * FRAME) | OPEN);
    assert_eq!(world.faults(0, READ), 1);
    world.set(true, 8, (3 * FRAME) | PRESENT);
    assert_eq!(world.faults((1 << 30) | (1 << 21), READ), 1);
    assert_eq!(world.faults(1 << 30, READ), 100);
    world.set(true, 8, FRAME | PRESENT);
    assert_eq!(world.faults(1 << 30, READ), 0, "filled in at once");
    assert_eq!(world.faults((1 << 30) | (1 << 21), READ), 100);
    world.set(true, 8, (4 * FRAME) | PRESENT);
    assert_eq!(world.faults(1 << 30, READ), 100);
}

#[test]
fn directories_are_those_that_the_processor_walks() {
    let shown = |world: &World| Shadow::directories(&world.registers, &world.ram);
    assert_eq!(shown(&world(false)), [FRAME as u32 | 1, 0, 0, 0]);
    let world = world(true);
    world.ram.put(3 * 8, 8, (3 * FRAME) | PRESENT);
    // Reserved bits, and beyond what a word holds.
    world.ram.put(8, 8, (4 * FRAME) | OPEN);
    world.ram.put(2 * 8, 8, (1 << 32) | PRESENT);
    assert_eq!(shown(&world), [FRAME as u32 | 1, 0, 0, (3 * FRAME) as u32 | 1]);
}

#[test]
fn a_told_entry_is_filled_in_if_it_was_accessed() {
    for pae in [false, true] {
        let mut world = world(pae);
        let (entry, page) = entry_of(pae, 9);
        assert_eq!(world.faults(page, READ), 1);
        world.set(pae, entry, (10 * FRAME) | USED);
        assert_eq!(world.faults(page, WRITE), 0, "filled in at once");
        world.set(pae, entry, (10 * FRAME) | USED & !DIRTY);
        assert_eq!(world.faults(page, READ), 0);
        assert_eq!(world.faults(page, WRITE), 1, "the dirty bit");
        world.set(pae, entry, (10 * FRAME) | USED & !ACCESSED);
        assert_eq!(world.faults(page, READ), 1, "the accessed bit");
        world.set(pae, entry, 0);
        assert_eq!(world.faults(page, READ), 100);
    }
}

#[test]
fn accessed_entries_are_filled_in_with_their_table() {
    for pae in [false, true] {
        let mut world = world(pae);
        let size = if pae { 8 } else { 4 };
        for (page, flags) in [(8, USED), (9, USED & !DIRTY), (10, OPEN)] {
            world.ram.put(2 * FRAME + page * size as u64, size, (page * FRAME) | flags);
        }
        assert_eq!(world.faults(entry_of(pae, 7).1, READ), 1);
        assert_eq!(world.faults(entry_of(pae, 8).1, WRITE), 0);
        assert_eq!(world.faults(entry_of(pae, 9).1, READ), 0);
        assert_eq!(world.faults(entry_of(pae, 9).1, WRITE), 1);
        assert_eq!(world.faults(entry_of(pae, 10).1, READ), 1);
    }
}

#[test]
fn address_spaces_stay() {
    let mut world = world(false);
    // A second root, in frame 3, with the same table and one of its own.
    world.ram.put(3 * FRAME, 4, (2 * FRAME) | OPEN);
    world.ram.put(3 * FRAME + 4, 4, (4 * FRAME) | OPEN);
    world.ram.put(4 * FRAME, 4, (12 * FRAME) | OPEN);
    assert_eq!(world.faults(0, READ), 1);
    world.apply([Update::SetCR3(3 * FRAME as u32)]);
    assert_eq!(world.faults(0, READ), 1, "the directory");
    assert_eq!(world.faults(1 << 22, READ), 1);
    let shadowed = world.shadow.shadowed;
    for _ in 0..10 {
        for root in [1, 3] {
            world.apply([Update::SetCR3(root * FRAME as u32)]);
            assert!(world.shadow.take_flush());
            assert_eq!(world.faults(0, READ), 0, "still there");
        }
    }
    world.apply([Update::SetCR3(3 * FRAME as u32)]);
    assert!(world.shadow.take_flush(), "the same again");
    assert_eq!(world.faults(1 << 22, READ), 0);
    assert_eq!(world.shadow.shadowed, shadowed);
    assert_eq!(world.shadow.recycled, 0);
}

#[test]
fn a_table_that_nothing_leads_to_is_not_watched() {
    for pae in [false, true] {
        let mut world = world(pae);
        // A second table, in frame 4, at 4 MiB or 2 MiB.
        let (size, linear) = if pae { (8, 1 << 21) } else { (4, 1 << 22) };
        world.ram.put(FRAME + size as u64, size, (4 * FRAME) | OPEN);
        world.ram.put(4 * FRAME, size, (12 * FRAME) | OPEN);
        assert_eq!(world.faults(linear, READ), 1);
        let page = 4 * FRAME as u32;
        assert_eq!(world.faults(page, WRITE), 1000);
        // The guest takes it out of its directory, and uses the frame for something else.
        assert_eq!(world.faults(FRAME as u32 + size as u32, WRITE), 1000);
        world.ram.put(FRAME + size as u64, size, 0);
        world.shadow.written(&world.registers, &world.ram, FRAME + size as u64, size);
        assert_eq!(world.faults(page, WRITE), 1, "not watched");
        assert_eq!(world.faults(page, WRITE), 0);
        assert_eq!(world.faults(linear, READ), 100);
    }
}

#[test]
fn tables_in_large_pages_are_watched_page_by_page() {
    for (pae, second) in [(false, false), (false, true), (true, false)] {
        let mut world = world(pae);
        let (size, bits) = if pae { (8, 21) } else { (4, 22) };
        // The second half of a page of 4 MiB has an entry of its own, but nothing in it.
        world.ram.put(FRAME + 3 * size as u64, size, OPEN | LARGE | GLOBAL);
        let linear = 3 << bits;
        if second {
            assert_eq!(world.faults(linear + (1 << 21), READ), 1);
            assert_eq!(
                walk(&world.shadow, linear + (1 << 21), READ),
                Ok((world.shadow.ones, true))
            );
            assert_eq!(world.faults(linear + (1 << 21), WRITE), 1000);
        }
        assert_eq!(world.faults(linear + 9 * FRAME as u32, WRITE), 1);
        assert_eq!(world.faults(linear + 10 * FRAME as u32, WRITE), 0, "the whole page");
        assert_eq!(world.faults(linear + FRAME as u32, WRITE), 1000, "but not the directory");
        assert_eq!(world.faults(linear + 2 * FRAME as u32, WRITE), 0, "no table yet");
        let _ = world.shadow.take_flush();
        assert_eq!(world.faults(0, READ), 1);
        assert!(world.shadow.take_flush(), "stores to frame 2 were in the TLB");
        assert_eq!(world.faults(linear + 2 * FRAME as u32, WRITE), 1000, "a table now");
        for (frame, write) in [(ROM, 1000), (DEVICE, 0), (HIDDEN, 1000), (NOTHING, 1000)] {
            assert_eq!(world.faults(linear + (frame * FRAME) as u32, READ), 0);
            assert_eq!(world.faults(linear + (frame * FRAME) as u32, WRITE), write);
        }
    }
}

#[test]
fn the_tlb_is_flushed_when_an_entry_is_taken_away_and_not_when_one_comes() {
    for pae in [false, true] {
        let mut world = world(pae);
        let (entry, page) = entry_of(pae, 9);
        assert!(world.shadow.take_flush());
        assert_eq!(world.faults(page, READ), 1);
        assert!(!world.shadow.take_flush());
        assert_eq!(world.faults(page, WRITE), 1);
        assert!(!world.shadow.take_flush(), "more is allowed");
        world.shadow.pool[ROOT].0[0] |= ACCESSED;
        assert_eq!(world.faults(entry_of(pae, 8).1, READ), 1);
        assert!(!world.shadow.take_flush(), "what the processor sets");
        world.set(pae, entry, (10 * FRAME) | USED);
        assert!(world.shadow.take_flush(), "another page");
        world.set(pae, entry, (10 * FRAME) | USED & !WRITABLE);
        assert!(world.shadow.take_flush(), "less is allowed");
        world.set(pae, entry, (10 * FRAME) | USED);
        assert!(!world.shadow.take_flush(), "more is allowed");
        world.set(pae, entry, 0);
        assert!(world.shadow.take_flush(), "none");
        world.set(pae, entry, (11 * FRAME) | USED);
        assert!(!world.shadow.take_flush(), "there was none");
        world.apply([frame_update(number::FlushTLB, 0)]);
        assert!(world.shadow.take_flush());
        assert!(!world.shadow.take_flush());
    }
}

#[test]
fn without_wp_a_page_is_ring_0_s_or_ring_3_s() {
    for pae in [false, true] {
        let mut world = world(pae);
        world.registers.cr0 &= !CR0_WRITE_PROTECT;
        world.shadow.load(&world.registers, &world.ram);
        let size = if pae { 8 } else { 4 };
        world.ram.put(2 * FRAME + 9 * size as u64, size, (9 * FRAME) | PRESENT | USER);
        let (_, page) = entry_of(pae, 9);
        for _ in 0..3 {
            assert_eq!(world.faults(page, WRITE), 1);
            assert_eq!(world.faults(page, USER_WRITE), 100);
            assert_eq!(world.faults(page, USER_READ), 1);
            assert_eq!(world.faults(page, READ), 0);
        }
    }
}

#[test]
fn nx_of_either_level_forbids_to_fetch() {
    let fetch = Access { execute: true, ..READ };
    let (directory, table) = (FRAME, 2 * FRAME + 9 * 8);
    for place in [directory, table] {
        let mut world = world(true);
        let (_, page) = entry_of(true, 9);
        let entry = world.ram.read(place, 8).expect("memory");
        world.ram.put(place, 8, entry | NO_EXECUTE);
        assert_eq!(world.faults(page, READ), 1);
        assert_eq!(world.faults(page, fetch), 100);
        world.set(true, place as u32, entry | ACCESSED);
        assert_eq!(world.faults(page, fetch), 0);
    }
}

#[test]
fn a_table_of_two_directories_is_released_from_both() {
    let mut world = world(false);
    world.ram.put(3 * FRAME, 4, (2 * FRAME) | OPEN);
    world.ram.put(3 * FRAME + 4, 4, (2 * FRAME) | OPEN);
    assert_eq!(world.faults(0, READ), 1);
    world.apply([Update::SetCR3(3 * FRAME as u32)]);
    assert_eq!(world.faults(0, READ), 1);
    assert_eq!(world.faults(1 << 22, READ), 1);
    world.apply([frame_update(number::ReleasePage, 2)]);
    audit(&world.shadow);
    assert_eq!(world.faults(0, READ), 1);
    world.apply([Update::SetCR3(FRAME as u32)]);
    assert_eq!(world.faults(0, READ), 1);
}

#[test]
fn a_full_pool_begins_anew() {
    let mut world = world(false);
    for i in 1..64 {
        world.ram.put(FRAME + i * 4, 4, ((3 + i % 12) * FRAME) | OPEN);
    }
    for i in 3..15 {
        world.ram.put(i * FRAME, 8, (12 * FRAME) | OPEN | ((13 * FRAME) | OPEN) << 32);
    }
    let root = world.shadow.root();
    for i in 0..64 {
        assert!(world.faults(i << 22, READ) <= 1);
        assert_eq!(world.faults(i << 22, READ), 0);
    }
    for i in 0..64 {
        assert!(world.faults((i << 22) + (1 << 21), READ) >= 100, "an empty half");
    }
    assert_eq!(world.shadow.root(), root);
    let mut tiny = World::new(world.ram.clone(), world.registers, 3);
    let _ = tiny.shadow.take_flush();
    for i in 0..64 {
        let recycled = tiny.shadow.recycled;
        assert!(tiny.faults(i << 22, READ) <= 1);
        assert_eq!(tiny.shadow.take_flush(), tiny.shadow.recycled != recycled);
    }
    assert!(tiny.shadow.recycled > 5);
    tiny.apply([frame_update(number::AllocatePage, 12)]);
    let recycled = tiny.shadow.recycled;
    for i in 0..8 {
        assert!(tiny.faults(i << 22, READ) <= 1);
    }
    assert!(tiny.shadow.recycled > recycled && tiny.shadow.is_announced(12));
}
