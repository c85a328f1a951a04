//! Page tables that lead where nothing of the guest's is, in the running address space, and touched there.
//!
//! The kernel's own mappings stay, so the guest goes on. Where a hidden frame is behind an address, or was
//! walked as a table, all that may come of a touch is a fault, or ones.

#![expect(unsafe_code, reason = "UNSAFETY: page tables are memory that the processor walks")]

use super::{DEVICE, HIDDEN, NOTHING, Trial};
use crate::boot::PAGE_OFFSET;
use crate::checks::{read, run_own};
use crate::harness::Registers;
use crate::paging::{
    Mode, PAGE, PRESENT, ROM_AREA, Space, TEST_AREA, TEST_TABLES, USER, WRITE, physical,
};
use crate::processor;
use core::arch::naked_asm;
use core::ops::Range;
use vmi_hv_backend::Update;
use vmi_hv_backend::reference::interface::Hypercall;
use x86::controlregs::Cr4;

/// Linear addresses that nothing is mapped at, a table's worth: their directory entry is free.
const FREE_AREA: u32 = 0xd800_0000;

/// The bit that makes an entry of a directory a large page.
const LARGE: u64 = 1 << 7;

/// Memory that nothing is in but what the workload puts there, each time anew.
const FREE_MEMORY: Range<u32> = 0xa0_0000..0xe0_0000;

/// Behind the direct mapping nothing is looked at.
const DIRECT: u32 = 16 << 20;

/// What a touch may come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Allowed {
    /// A fault, or ones.
    Nothing,
    /// As [`Allowed::Nothing`], or what is in the last frame below 4 GiB: a table of ones leads there.
    TableOfOnes,
    /// Anything: it is the guest's own, or a device's.
    Anything,
}

/// Where a linear address leads, by the guest's own tables.
fn allowed(space: Space, linear: u32) -> Allowed {
    let directory_entry = space.directory_entry(linear);
    let directory = space.load(directory_entry);
    if directory & PRESENT == 0 {
        return Allowed::Nothing;
    }
    if directory & LARGE != 0 {
        let span = space.mode.table_span();
        return of_frame((directory as u32 & !(span - 1)) + (linear & (span - 1)));
    }
    let table = directory as u32 & !(PAGE - 1);
    let ones = if space.mode == Mode::NonPae { Allowed::TableOfOnes } else { Allowed::Nothing };
    if table >= DIRECT {
        let is_foreign = HIDDEN.contains(&table) || NOTHING.contains(&table);
        return if is_foreign { ones } else { Allowed::Anything };
    }
    let entry = space.load(space.entry(linear));
    let own =
        if entry & PRESENT == 0 { Allowed::Nothing } else { of_frame(entry as u32 & !(PAGE - 1)) };
    // A processor walks what a device or a ROM holds; a hypervisor need not look there, and finds ones.
    if (DEVICE.start..ROM_AREA.end).contains(&table) && own == Allowed::Nothing {
        ones
    } else {
        own
    }
}

/// What a read of memory may show.
fn of_frame(address: u32) -> Allowed {
    if HIDDEN.contains(&address) { Allowed::Nothing } else { Allowed::Anything }
}

/// Stores to an address that may not be mapped: EAX address, EDX value; changes nothing else.
#[unsafe(naked)]
unsafe extern "C" fn store_word() {
    naked_asm!("mov [eax], edx", "ret")
}

/// Checks that an address shows nothing.
pub(super) fn shows_nothing(trial: &mut Trial<'_>, linear: u32, what: &str) {
    processor::invlpg(linear);
    for offset in [0, 8, 0x7fc, PAGE - 4] {
        let found = read(linear + offset).unwrap_or(u32::MAX);
        if found != u32::MAX {
            trial.problems.add(format_args!("{what} to a hidden frame that shows {found:#x}"));
        }
    }
}

/// What is at the end of the firmware, where a table of ones leads.
fn end_of_firmware(space: Space, offset: u32) -> Option<u32> {
    let linear = TEST_AREA + PAGE;
    space.store(space.entry(linear), space.make(0u32.wrapping_sub(PAGE), 0));
    processor::invlpg(linear);
    let found = read(linear + offset).ok();
    space.store(space.entry(linear), 0);
    processor::invlpg(linear);
    found
}

/// A way to change an entry.
#[derive(Clone, Copy)]
enum Way {
    /// The guest stores, as without VMI.
    Store,
    /// The hypervisor is asked to.
    Update,
    /// The guest stores into a table that was announced, and tells so.
    Tell,
}

const WAYS: [Way; 3] = [Way::Store, Way::Update, Way::Tell];

impl Trial<'_> {
    /// Applies an update, which may be refused.
    fn apply(&mut self, update: Update) {
        if self.hypervisor.batch_limit == 0 {
            return;
        }
        let update = [update];
        let address = physical(&raw const update);
        // The stack is the guest's own memory: what is refused is the update.
        let _ = self.hypervisor.call(Hypercall::Apply as u32, address, 1);
    }

    /// Changes an entry of a table.
    fn change(&mut self, way: Way, entry: u32, value: u64) {
        let frame = (entry - PAGE_OFFSET) / PAGE;
        let long = self.space.mode == Mode::Pae;
        let way = if self.hypervisor.batch_limit == 0 { Way::Store } else { way };
        match way {
            Way::Store => {
                // An announced table would be left alone.
                self.apply(Update::ReleasePage(frame, 0));
                self.space.store(entry, value);
            }
            Way::Update if long => self.apply(Update::SetPxELong(value, entry, 0)),
            Way::Update => self.apply(Update::SetPxE(value as u32, entry, 0)),
            Way::Tell => {
                self.apply(Update::AllocatePage(frame, 0));
                self.space.store(entry, value);
                self.apply(match long {
                    true => Update::UpdatePxELong(entry, 0),
                    false => Update::UpdatePxE(entry, 0),
                });
            }
        }
        processor::set_cr3(processor::cr3());
    }

    /// Touches an address, and holds what comes of it against the tables.
    fn touch(&mut self, linear: u32, writes: bool) {
        processor::invlpg(linear);
        let allowed = allowed(self.space, linear);
        let found = read(linear).unwrap_or(u32::MAX);
        let is_good = match allowed {
            Allowed::Anything => true,
            Allowed::Nothing => found == u32::MAX,
            Allowed::TableOfOnes => {
                found == u32::MAX || Some(found) == end_of_firmware(self.space, linear & (PAGE - 1))
            }
        };
        if !is_good {
            self.problems
                .add(format_args!("{linear:#x} shows {found:#x}, where nothing may be seen"));
        }
        if writes && allowed == Allowed::Nothing {
            let registers = Registers { eax: linear, edx: 0x0bad_cafe, ..Registers::default() };
            // A store to nothing goes nowhere, or faults.
            let _ = run_own(store_word, registers, &[]);
            let again = read(linear).unwrap_or(u32::MAX);
            if again != u32::MAX {
                self.problems
                    .add(format_args!("{linear:#x} keeps what is stored where nothing is"));
            }
        }
    }

    /// A frame of one of the kinds that tables should not lead to, and some that they may.
    fn any_frame(&mut self) -> u32 {
        match self.random.next() % 8 {
            0..=3 => self.random.frame(HIDDEN),
            4 => self.random.frame(NOTHING),
            5 => self.random.frame(DEVICE),
            6 => self.random.frame(ROM_AREA),
            // Walked as a table it gets accessed bits: none of the guest's own.
            _ => self.random.frame(FREE_MEMORY),
        }
    }
}

/// Linear address of one of the test's own tables.
fn table(index: usize) -> u32 {
    (&raw mut TEST_TABLES).cast::<u8>() as u32 + index as u32 * PAGE
}

/// Fills a table.
fn fill(space: Space, table: u32, mut value: impl FnMut(u32) -> u64) {
    for index in 0..PAGE / space.mode.entry_size() {
        space.store(table + index * space.mode.entry_size(), value(index));
    }
}

/// Tables of every kind.
pub(super) fn malformed(trial: &mut Trial<'_>) {
    let space = trial.space;
    let entry = space.entry(TEST_AREA);
    let directory_entry = space.directory_entry(FREE_AREA);
    let bits = PRESENT | WRITE;

    let cr4 = processor::cr4();
    // Large pages of 4 MiB; there are always those of 2.
    processor::set_cr4(cr4 | Cr4::CR4_ENABLE_PSE.bits() as u32);

    // An entry of a good table.
    for index in 0..400 {
        trial.attempts.tables += 1;
        let flags = u64::from(trial.random.next() & 0xe7e);
        let frame = u64::from(trial.any_frame());
        trial.change(WAYS[index % 3], entry, frame | flags | bits);
        let linear = TEST_AREA + (trial.random.next() & 0xffc);
        trial.touch(linear, true);
    }
    // Reserved bits, in each level: a fault says so.
    if space.mode == Mode::Pae {
        const RESERVED: u32 = 1 << 3;
        for (place, address, value) in [
            (entry, TEST_AREA, u64::from(physical(&raw const TEST_TABLES)) | bits),
            (directory_entry, FREE_AREA, u64::from(table(0) - PAGE_OFFSET) | bits | USER),
            (directory_entry, FREE_AREA, 0x20_0000 | bits | LARGE),
        ] {
            for index in 0..33 {
                trial.attempts.tables += 1;
                let bit = 52 + index as u32 % 11;
                trial.change(WAYS[index / 11], place, value | 1 << bit);
                let error = read(address).map_err(|trap| trap.frame.error);
                // What the hypervisor refuses is not there.
                let refused = matches!(WAYS[index / 11], Way::Update);
                let is_good = match error {
                    Err(error) => error & RESERVED != 0 || refused,
                    Ok(_) => refused,
                };
                if !is_good {
                    trial.problems.add(format_args!(
                        "reserved bit {bit} in the entry at {place:#x} comes to {error:x?}"
                    ));
                }
                trial.change(Way::Store, place, 0);
            }
        }
    }
    trial.change(Way::Store, entry, 0);
    // A table where there is none, or nobody's.
    for index in 0..200 {
        trial.attempts.tables += 1;
        let frame = u64::from(trial.any_frame());
        trial.change(WAYS[index % 3], directory_entry, frame | bits);
        let page = trial.random.next() % (space.mode.table_span() / PAGE);
        let linear = FREE_AREA + page * PAGE + (trial.random.next() & 0xffc);
        trial.touch(linear, index % 2 == 0);
    }
    // Large pages over what is hidden.
    for index in 0..100 {
        trial.attempts.tables += 1;
        let span = space.mode.table_span();
        let frame = u64::from(trial.any_frame() & !(span - 1));
        trial.change(WAYS[index % 3], directory_entry, frame | bits | LARGE);
        let linear = FREE_AREA + (trial.random.next() & (space.mode.table_span() - 4));
        trial.touch(linear, true);
    }
    // A directory that is its own table, and a table that maps itself.
    let root = space.directory_entry(FREE_AREA) & !(PAGE - 1);
    for index in 0..48 {
        trial.attempts.tables += 1;
        trial.change(WAYS[index % 3], directory_entry, u64::from(root - PAGE_OFFSET) | bits);
        let page = trial.random.next() % (space.mode.table_span() / PAGE);
        trial.touch(FREE_AREA + page * PAGE, false);
        trial.change(Way::Store, directory_entry, 0);
        let own = u64::from(table(0) - PAGE_OFFSET) | bits;
        fill(space, table(0), |_| own);
        trial.change(WAYS[index % 3], directory_entry, own);
        let found = read(FREE_AREA + page * PAGE).ok();
        const USED: u32 = 0x60;
        if found.map(|word| word & !USED) != Some(own as u32 & !USED) {
            trial.problems.add(format_args!("a table that maps itself shows {found:x?}"));
        }
        // Changed through itself: the entry of the page that is touched goes.
        let size = space.mode.entry_size();
        let registers = Registers { eax: FREE_AREA + page * size, ..Registers::default() };
        let _ = run_own(store_word, registers, &[]);
        processor::invlpg(FREE_AREA + page * PAGE);
        if read(FREE_AREA + page * PAGE).is_ok() {
            trial.problems.add(format_args!("an entry that was cleared through itself still maps"));
        }
        trial.change(Way::Store, directory_entry, 0);
    }
    // Whole tables of anything.
    for index in 0..250 {
        trial.attempts.tables += 1;
        let place = table(index % 2);
        fill(space, place, |_| {
            let flags = u64::from(trial.random.next() & 0xe7f);
            let high = match (space.mode, trial.random.next() % 4) {
                (Mode::Pae, 0) => u64::from(trial.random.next() & 0x8000_0000) << 32,
                _ => 0,
            };
            u64::from(trial.any_frame()) | flags | high
        });
        let value = u64::from(place - PAGE_OFFSET) | bits;
        trial.change(WAYS[index % 3], directory_entry, value);
        for _ in 0..4 {
            let page = trial.random.next() % (space.mode.table_span() / PAGE);
            let linear = FREE_AREA + page * PAGE + (trial.random.next() & 0xffc);
            trial.touch(linear, true);
        }
        trial.change(Way::Store, directory_entry, 0);
    }
    // Nothing of it is left, and nobody is told of it any more.
    trial.change(Way::Store, directory_entry, 0);
    trial.change(Way::Store, entry, 0);
    for place in [entry, directory_entry, table(0), table(1)] {
        trial.apply(Update::ReleasePage((place - PAGE_OFFSET) / PAGE, 0));
    }
    trial.apply(Update::FlushTLB(2));
    processor::set_cr4(cr4);
    for linear in [TEST_AREA, FREE_AREA] {
        processor::invlpg(linear);
        if read(linear).is_ok() {
            trial.problems.add(format_args!("{linear:#x} is mapped in the end"));
        }
    }
}
