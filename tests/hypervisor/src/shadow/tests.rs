//! The shadow against the guest's own translation.

use super::machine::*;
use super::*;
use crate::hypercall::Machine;
use crate::walk::{
    CR0_PAGING, CR0_WRITE_PROTECT, CR4_PAE, CR4_PAGE_SIZE, EFER_NO_EXECUTE, LARGE, PageFault,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError};
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
    for (bit, odds) in [(PRESENT, 12), (WRITABLE, 4), (USER, 4), (ACCESSED, 4)] {
        value &= if numbers.one_in(odds) { !bit } else { !0 };
    }
    value &= if numbers.one_in(8) { !0 } else { !LARGE };
    let frame = if numbers.one_in(16) { numbers.below(NOTHING + 4) } else { numbers.below(MEMORY) };
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
    let mut value = numbers.below(TABLES) * FRAME | PRESENT | numbers.below(4) << 3;
    if numbers.one_in(8) {
        value ^= 1 << numbers.below(64);
    }
    value
}

/// Memory full of tables.
fn tables(numbers: &mut Numbers) -> Ram {
    let ram = Ram::new();
    for frame in (0..TABLES).chain([ROM]) {
        let pae = numbers.one_in(2);
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
    hits: u32,
    faults: u32,
    watched_stores: u32,
}

impl World {
    fn new(ram: Ram, registers: Registers, pool: usize) -> Self {
        let mut shadow = shadow(pool);
        shadow.load(&registers, &ram);
        let counters = Counters::ZERO;
        Self { ram, registers, shadow, counters, hits: 0, faults: 0, watched_stores: 0 }
    }

    fn pointers(&self) -> Option<Vec<u8>> {
        let root = self.registers.root();
        let is_used = self.registers.has_paging() && self.registers.mode().pae;
        let frame = is_used.then(|| self.ram.place(root / FRAME))?;
        let start = (root % FRAME) as usize;
        matches!(frame, Place::Memory(_))
            .then(|| self.ram.frame(root / FRAME)[start..start + 32].to_vec())
    }

    /// Makes an access on the processor and compares all that comes of it with the guest's own translation.
    /// Answers where a store has to go, if anywhere.
    fn access(&mut self, linear: u32, access: Access) -> Result<Option<u64>, TestCaseError> {
        let reference = self.ram.clone();
        let expected = translate(&self.registers, &reference, linear, access);
        let pointers = self.pointers();
        for _ in 0..8 {
            match walk(&self.shadow, linear, access) {
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
    let pae = if numbers.one_in(3) { numbers.one_in(2) } else { old.mode().pae };
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
        let ram = tables(&mut numbers);
        let registers = Registers { width: numbers.one_of(&[36, 40]), ..registers(numbers.one_in(2), 0) };
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
        let ram = tables(&mut numbers);
        let registers = any_registers(&mut numbers, registers(seed % 2 == 0, 0));
        let mut world = World::new(ram, registers, 30);
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
