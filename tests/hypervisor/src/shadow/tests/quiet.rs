//! What the shadow says of itself: where it is complete, each access ends as by the guest's own tables.
//!
//! The tables are those of a tidy kernel, all of them announced, or there before it could announce any; everything accessed and what is writable dirty, but for a defect here and there.
//! Whatever is done to them, a claim to be complete is compared with the guest's tables at each address that is used, for each kind of access.

use super::super::machine::*;
use super::super::*;
use super::{Numbers, World, cases, frame_update};
use crate::walk::{CR0_WRITE_PROTECT, ERROR_EXECUTE, LARGE, PageFault, find};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::format;
use std::string::String;
use std::vec::Vec;
use vmi_abi::number;
use vmi_hv_backend::Update;

/// Reasons for something to be missing. Each must be needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// None.
    Nothing,
    /// The entry has reserved bits.
    Reserved,
    /// It was not accessed.
    NotAccessed,
    /// It allows stores, and is not dirty.
    NotDirty,
    /// The table that it leads to has no shadow.
    NoTable,
    /// Stores to the page have to be seen.
    NoStores,
    /// That became so later.
    Protected,
    /// The shadow that it led to is gone.
    Forgotten,
    /// The kernel may store where no entry allows it.
    OnlyKernels,
    /// The directory has no shadow.
    NoDirectory,
    /// The pointer leads to another directory by now.
    OtherDirectory,
    /// The pointer has reserved bits.
    ReservedPointer,
    /// The entry leads to another table by now.
    OtherTable,
}

const REASONS: [Reason; 12] = [
    Reason::Reserved,
    Reason::NotAccessed,
    Reason::NotDirty,
    Reason::NoTable,
    Reason::NoStores,
    Reason::Protected,
    Reason::Forgotten,
    Reason::OnlyKernels,
    Reason::NoDirectory,
    Reason::OtherDirectory,
    Reason::ReservedPointer,
    Reason::OtherTable,
];

std::thread_local! {
    static LEFT_OUT: Cell<Reason> = const { Cell::new(Reason::Nothing) };
}

impl Reason {
    pub(crate) fn is_left_out(self) -> bool {
        LEFT_OUT.get() == self
    }
}

/// The page-directory-pointer table or the directory of two levels, directories of PAE, page tables, and data.
const ROOTS: [u64; 2] = [0, 1];
const DIRECTORIES: [u64; 3] = [2, 3, 4];
const TABLES: [u64; 5] = [5, 6, 7, 8, 9];
const DATA: u64 = 12;

/// Where entries are, in directories and in tables.
const INDICES: [u64; 6] = [0, 1, 2, 3, 510, 511];

/// An entry that a tidy kernel makes, or one with a defect.
fn entry(numbers: &mut Numbers, pae: bool, level: Level, odds: u64) -> u64 {
    if numbers.one_in(3) {
        return numbers.one_of(&[0, ACCESSED, (DATA * FRAME) | DIRTY]);
    }
    let mut value = PRESENT | ACCESSED | numbers.one_of(&[0, USER]) | numbers.one_of(&[0, GLOBAL]);
    value |= numbers.one_of(&[0, WRITABLE | DIRTY]);
    value |= if pae && numbers.one_in(6) { NO_EXECUTE } else { 0 };
    let frame = match level {
        Level::Directory if numbers.one_in(8) => {
            // Its first frames are memory, the others are not: read-only, or there is something missing.
            value |= LARGE;
            value &= if numbers.one_in(2) { !(WRITABLE | DIRTY) } else { !0 };
            0
        }
        Level::Directory => numbers.one_of(&TABLES),
        _ => numbers.one_of(&[DATA, DATA + 1, 5, 2, DEVICE, DEVICE + 1]),
    };
    value |= frame * FRAME;
    if !numbers.one_in(odds) {
        return value;
    }
    match numbers.below(6) {
        0 => value & !ACCESSED,
        1 => (value | WRITABLE) & !DIRTY,
        2 if pae => value | 1 << 50,
        2 => value | LARGE | 1 << 21,
        3 if level == Level::Table => (value & !ADDRESS) | WRITABLE | DIRTY | (ROM * FRAME),
        4 if level == Level::Table => (value & !ADDRESS) | WRITABLE | DIRTY | (NOTHING * FRAME),
        // A frame that is a root, or was.
        5 if level == Level::Table => {
            (value & !ADDRESS) | WRITABLE | DIRTY | (numbers.one_of(&ROOTS) * FRAME)
        }
        _ => value & !PRESENT,
    }
}

fn pointer(numbers: &mut Numbers, odds: u64) -> u64 {
    match numbers.below(odds) {
        0 => (2 * FRAME) | PRESENT | WRITABLE,
        1 | 2 => 0,
        _ => (numbers.one_of(&DIRECTORIES) * FRAME) | PRESENT,
    }
}

/// The linear addresses whose entries are used.
fn addresses(pae: bool) -> impl Iterator<Item = u32> {
    let entries = if pae { 512 } else { 1024 };
    let (shift, quarters) = if pae { (21, 0..4) } else { (22, 0..1) };
    quarters.flat_map(move |quarter: u64| {
        INDICES.into_iter().flat_map(move |middle| {
            INDICES.into_iter().flat_map(move |low| {
                [low, low + entries - 512].map(|low| {
                    let linear = quarter << 30 | middle << shift | low << 12;
                    linear as u32
                })
            })
        })
    })
}

/// The guest's memory, which nobody stores to, but it is noted who would.
struct Kept<'a>(&'a Ram, Cell<bool>);

impl Memory for Kept<'_> {
    fn place(&self, frame: u64) -> Place {
        self.0.place(frame)
    }
    fn read(&self, address: u64, size: usize) -> Option<u64> {
        self.0.read(address, size)
    }
    fn write(&self, _: u64, _: usize, _: u64) -> bool {
        self.1.set(true);
        true
    }
}

/// Why nothing is wanted of a store that goes nowhere: to a ROM, or where nothing is.
const DROPPED: &str = "a store is dropped";

/// What an access comes to by the guest's tables: the machine's address, or the error code; and nothing to be set in them.
fn wanted(world: &World, linear: u32, access: Access) -> Result<Result<u64, u32>, &'static str> {
    let memory = Kept(&world.ram, Cell::new(false));
    let found = match translate(&world.registers, &memory, linear, access) {
        Ok(found) => found,
        Err(PageFault { error }) => return Ok(Err(error)),
    };
    if memory.1.get() {
        return Err("bits have to be set");
    }
    let base = match world.ram.place(found.physical / FRAME) {
        Place::Memory(base) | Place::Device(base) => base,
        Place::ReadOnly(_) | Place::Nothing if access.write => return Err(DROPPED),
        Place::ReadOnly(base) => base,
        Place::Nothing => world.shadow.ones,
    };
    Ok(Ok(base + found.physical % FRAME))
}

/// Compares a shadow that says it is complete.
pub(super) fn check(world: &World, addresses: impl Iterator<Item = u32>) -> Result<(), String> {
    for linear in addresses {
        for kind in 0..6 {
            let access = Access { write: kind % 3 == 1, execute: kind % 3 == 2, user: kind >= 3 };
            let mut is = walk(&world.shadow, linear, access).map(|(address, _)| address);
            if !world.registers.mode().no_execute {
                // Nor is NX then in use in the processor.
                is = is.map_err(|error| error & !ERROR_EXECUTE);
            }
            let wanted = wanted(world, linear, access);
            if wanted == Err(DROPPED) && is.is_err() {
                // Nobody stores there. Whoever does is heard at the third page fault.
                continue;
            }
            if wanted != Ok(is) {
                return Err(format!("{access:?} of {linear:#x}: {is:x?} instead of {wanted:x?}"));
            }
        }
    }
    Ok(())
}

struct Scene {
    world: World,
    pae: bool,
    odds: u64,
    claims: u32,
}

impl Scene {
    fn new(numbers: &mut Numbers) -> Self {
        let (pae, odds) = (numbers.one_in(2), numbers.one_of(&[40, 200, 1000]));
        let ram = Ram::new();
        let pool = numbers.one_of(&[8, 30, 60, 60]);
        let world = World::new(ram, registers(pae, 0), pool);
        let mut scene = Self { world, pae, odds, claims: 0 };
        for root in ROOTS {
            if pae {
                for quarter in 0..4 {
                    let value = pointer(numbers, odds);
                    scene.world.ram.put(root * FRAME + quarter * 8, 8, value);
                }
            } else {
                scene.fill(numbers, root, Level::Directory);
            }
        }
        if pae {
            for frame in DIRECTORIES {
                scene.fill(numbers, frame, Level::Directory);
            }
        }
        for frame in TABLES {
            scene.fill(numbers, frame, Level::Table);
        }
        // What the tables are that nobody announced, and which were there before.
        let were_there = numbers.one_in(3);
        for frame in 0..DATA {
            let is_pointers = pae && ROOTS.contains(&frame);
            if !were_there && !is_pointers && !numbers.one_in(odds) {
                scene.world.apply([frame_update(number::AllocatePage, frame as u32)]);
            }
        }
        let World { ram, registers, shadow, .. } = &mut scene.world;
        shadow.load(registers, ram);
        if were_there {
            shadow.adopt(registers, ram);
        }
        scene
    }

    fn place(&self, frame: u64, index: u64) -> (u64, usize) {
        let size = if self.pae { 8 } else { 4 };
        (frame * FRAME + index * size, size as usize)
    }

    fn fill(&mut self, numbers: &mut Numbers, frame: u64, level: Level) {
        for index in INDICES {
            let (place, size) = self.place(frame, index);
            self.world.ram.put(place, size, entry(numbers, self.pae, level, self.odds));
            if !self.pae && level == Level::Table {
                let (place, size) = self.place(frame, index + 512);
                self.world.ram.put(place, size, entry(numbers, false, level, self.odds));
            }
        }
    }

    fn physical(&self, address: u64) -> Update {
        let told = if self.pae { Update::UpdatePxELong } else { Update::UpdatePxE };
        told(address as u32, vmi_hv_backend::reference::interface::PHYSICAL)
    }

    /// An entry is stored, and told of.
    fn change(&mut self, numbers: &mut Numbers) {
        let index = numbers.one_of(&INDICES);
        let (frame, level) = match numbers.below(4) {
            0 if self.pae => (numbers.one_of(&DIRECTORIES), Level::Directory),
            0 => (numbers.one_of(&ROOTS), Level::Directory),
            1 if self.pae && numbers.one_in(4) => {
                let (root, quarter) = (numbers.one_of(&ROOTS), numbers.below(4));
                let value = pointer(numbers, self.odds);
                let place = root * FRAME + quarter * 8;
                self.world.ram.put(place, 8, value);
                // The processor need not see it before CR3 is loaded; nor is it always told.
                let loaded = [self.physical(place), Update::SetCR3(self.world.registers.cr3)];
                return match numbers.below(3) {
                    0 => self.world.apply([frame_update(number::AllocatePage, DATA as u32)]),
                    _ => self.world.apply(loaded),
                };
            }
            _ => (numbers.one_of(&TABLES), Level::Table),
        };
        let (place, size) = self.place(frame, index);
        let value = entry(numbers, self.pae, level, self.odds);
        self.world.ram.put(place, size, value);
        self.world.apply([self.physical(place)]);
    }

    /// An access with the exits that it takes while faults are not quiet.
    fn access(&mut self, numbers: &mut Numbers) {
        let all: Vec<u32> = addresses(self.pae).collect();
        let linear = numbers.one_of(&all);
        let access = Access { write: numbers.one_in(2), user: numbers.one_in(2), execute: false };
        for _ in 0..8 {
            let World { ram, registers, shadow, .. } = &mut self.world;
            let Err(error) = walk(shadow, linear, access) else { return };
            match shadow.fault(registers, ram, linear, error) {
                Resolution::Filled => {}
                _ => return,
            }
        }
    }

    fn step(&mut self, numbers: &mut Numbers) -> Result<(), String> {
        let frame = numbers.below(DATA) as u32;
        match numbers.below(16) {
            0..6 => self.change(numbers),
            6..11 => self.access(numbers),
            11 => {
                let root = (numbers.one_of(&ROOTS) * FRAME) as u32;
                self.world.apply([Update::SetCR3(root)]);
            }
            12 if numbers.one_in(4) => {
                self.world.registers.cr0 ^= CR0_WRITE_PROTECT;
                self.world.shadow.load(&self.world.registers, &self.world.ram);
            }
            13 if numbers.one_in(4) => self.world.apply([frame_update(number::ReleasePage, frame)]),
            14 => self.world.apply([frame_update(number::AllocatePage, frame)]),
            15 if numbers.one_in(8) => {
                // Linear addresses are anything here.
                self.world.apply([frame_update(number::InvalPage, numbers.next() as u32)]);
            }
            _ => {}
        }
        let before = self.world.ram.clone();
        let World { ram, registers, shadow, .. } = &mut self.world;
        let is_complete = shadow.complete(registers, ram);
        if before != *ram {
            self.only_accessed(&before)?;
        }
        audit(&self.world.shadow);
        let counted: Vec<u32> = self.world.shadow.slots.iter().map(|slot| slot.missing).collect();
        let missing = |(slot, page): (usize, &Page)| match self.world.shadow.slots[slot].key.role {
            Role::Other => 0,
            _ => page.0.iter().filter(|&entry| entry & MISSING != 0).count() as u32,
        };
        let found = self.world.shadow.pool.iter().enumerate().map(missing);
        assert!(counted.into_iter().eq(found), "what is missing is counted");
        if is_complete {
            self.claims += 1;
            check(&self.world, addresses(self.pae))?;
        }
        Ok(())
    }
}

impl Scene {
    /// Wants nothing changed in memory but accessed bits of entries that are in use.
    fn only_accessed(&self, before: &Ram) -> Result<(), String> {
        let size = if self.pae { 8 } else { 4 };
        let used: BTreeSet<u64> = addresses(self.pae)
            .filter_map(|linear| find(&self.world.registers, before, linear).ok())
            .flat_map(|found| found.steps().iter().map(|step| step.address).collect::<Vec<_>>())
            .collect();
        for place in (0..MEMORY * FRAME).step_by(size) {
            let [old, new] = [before, &self.world.ram].map(|ram| ram.read(place, size));
            let is_bit = new == old.map(|old| old | ACCESSED);
            if old != new && !(is_bit && used.contains(&place)) {
                return Err(format!("{old:x?} at {place:#x} becomes {new:x?}"));
            }
        }
        Ok(())
    }

    /// A table becomes data without a word: entries that look as if nobody had accessed them.
    fn abandon(&mut self, numbers: &mut Numbers) -> Result<(), String> {
        let size = if self.pae { 8 } else { 4 };
        for frame in if self.pae { &DIRECTORIES[..] } else { &ROOTS[..] } {
            for index in INDICES {
                self.world.ram.put(frame * FRAME + index * size, size as usize, 0);
            }
        }
        for frame in TABLES {
            for place in (frame * FRAME..(frame + 1) * FRAME).step_by(8) {
                self.world.ram.put(place, 8, (DATA * FRAME) | PRESENT);
            }
            // As after a store that is told late of.
            self.world.apply([self.physical(frame * FRAME + numbers.one_of(&INDICES) * size)]);
        }
        let before = self.world.ram.clone();
        let World { ram, registers, shadow, .. } = &mut self.world;
        let _ = shadow.complete(registers, ram);
        self.only_accessed(&before)
    }
}

/// How often the shadow said that it is complete.
fn run(seed: u64) -> Result<(bool, u32), String> {
    let mut numbers = Numbers(seed ^ 0x9_1e7);
    let mut scene = Scene::new(&mut numbers);
    for step in 0..60 {
        scene.step(&mut numbers).map_err(|why| format!("seed {seed}, step {step}: {why}"))?;
    }
    scene.abandon(&mut numbers).map_err(|why| format!("seed {seed}, in the end: {why}"))?;
    Ok((scene.pae, scene.claims))
}

#[test]
fn what_is_complete_is_as_the_guest_s_tables() {
    let mut claims = [0; 2];
    for seed in 0..u64::from(cases(500)) {
        let (pae, count) = run(seed).unwrap_or_else(|why| panic!("{why}"));
        claims[usize::from(pae)] += count;
    }
    std::eprintln!(
        "complete, and compared: {} times without PAE, {} with it",
        claims[0],
        claims[1]
    );
    assert!(claims.iter().all(|count| *count > 1000), "{claims:?}");
}

#[test]
fn each_reason_to_be_incomplete_is_needed() {
    for reason in REASONS {
        LEFT_OUT.set(reason);
        let found = (0..4000).find_map(|seed| run(seed).err());
        LEFT_OUT.set(Reason::Nothing);
        std::eprintln!(
            "{reason:?}: {}",
            found.unwrap_or_else(|| panic!("{reason:?} is not needed"))
        );
    }
}
