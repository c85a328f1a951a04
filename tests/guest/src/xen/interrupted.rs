//! Entries that are made while interrupts come: whichever instruction of the ROM's one of them hits, every entry is what it was
//! set to. The handler's IRET hands over what waits, in the middle of a call that lets another entry wait.

use crate::host::CALLS;
use crate::paging::{ACCESSED, DIRTY, PAGE, PRESENT, Space, TEST_FRAMES, WRITE, physical};
use crate::traps;
use core::fmt::Arguments;
use vmi_abi::flags::{CycleCounter, EntryFlags, LazyMode};

/// Pages that nothing else maps; below them is one table.
const AREA: u32 = 0xd840_0000;

/// Entries of a round: one less than make the ROM's batch full.
const ENTRIES: u32 = 127;

/// Rounds, each with an interrupt at another time.
const ROUNDS: u32 = 300;

/// How often the entries are set in a round: Xen's timer may be late by more than setting them once takes.
const PASSES: u32 = 4;

/// Cycles among which the interrupts are spread.
const SPAN: u32 = 250_000;

/// Tries it.
pub(super) fn run(space: Space, expect: &mut impl FnMut(bool, Arguments<'_>)) {
    let frames = [0, 1].map(|index| physical(&raw const TEST_FRAMES) + index * PAGE);
    space.map_writable(AREA, frames[0]);
    let first = space.entry(AREA);
    let bits = PRESENT | WRITE | ACCESSED | DIRTY;
    let set = |index: u32, value: u64| {
        // SAFETY: pages that nothing else maps.
        unsafe { CALLS.SetPxELong(value, first + 8 * index, EntryFlags::PT.bits()) };
    };
    let before = traps::interrupts();
    let mut wrong = 0;
    for round in 0..ROUNDS {
        // SAFETY: handlers are there; the alarm comes once.
        unsafe {
            let now = CALLS.GetCycleCounter(CycleCounter::REAL.0);
            CALLS.SetAlarm(0, now + u64::from(round * 977 % SPAN), 0);
        }
        CALLS.EnableInterrupts();
        for pass in 0..PASSES {
            let value = u64::from(frames[pass as usize % 2]) | bits;
            // SAFETY: pages that nothing else maps.
            unsafe { CALLS.SetLazyMode(LazyMode::MMU.0) };
            (0..ENTRIES).for_each(|index| set(index, value));
            // SAFETY: as above.
            unsafe { CALLS.SetLazyMode(LazyMode::OFF.0) };
            wrong += (0..ENTRIES).filter(|index| space.load(first + 8 * index) != value).count();
        }
        CALLS.DisableInterrupts();
        // SAFETY: it may have come, or not.
        unsafe { CALLS.CancelAlarm(0) };
    }
    (0..ENTRIES).for_each(|index| set(index, 0));
    let came = traps::interrupts() - before;
    expect(wrong == 0, format_args!("{wrong} entries are not what they were set to"));
    expect(came >= ROUNDS / 8, format_args!("only {came} interrupts came in {ROUNDS} rounds"));
}
