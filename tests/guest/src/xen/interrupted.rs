//! Entries that are made, and context switches, while interrupts come: whichever instruction of the ROM's one of them hits, everything is
//! what it was set to. The handler's IRET hands over what waits, in the middle of a call that lets another entry wait.

use super::{Expect, UNUSED, USER_DATA};
use crate::host::CALLS;
use crate::paging::{ACCESSED, DIRTY, PAGE, PRESENT, Space, TEST_FRAMES, WRITE, physical};
use crate::segments::{GDT, TASK_STATE};
use crate::{processor, suite, traps};
use core::arch::asm;
use vmi_abi::flags::{CycleCounter, EntryFlags, LazyMode};

/// Pages that nothing else maps; below them is one table.
const AREA: u32 = 0xd840_0000;

/// Entries of a round: one less than make the ROM's batch full.
const ENTRIES: u32 = 127;

/// Context switches of a pass, which takes about as long as the entries of one.
const SWITCHES: u32 = 16;

/// Rounds, each with an interrupt at another time.
const ROUNDS: u32 = 300;

/// How often the entries are set in a round: Xen's timer may be late by more than setting them once takes.
const PASSES: u32 = 4;

/// Cycles among which the interrupts are spread.
const SPAN: u32 = 250_000;

/// Calls the work again and again, in [`ROUNDS`] with an interrupt at another time each, and wants no complaint of it.
fn rounds(what: &str, expect: &mut Expect<'_>, work: impl Fn(u32) -> usize) {
    let before = traps::interrupts();
    let mut wrong = 0;
    for round in 0..ROUNDS {
        // SAFETY: handlers are there; the alarm comes once.
        unsafe {
            let now = CALLS.GetCycleCounter(CycleCounter::REAL.0);
            CALLS.SetAlarm(0, now + u64::from(round * 977 % SPAN), 0);
        }
        CALLS.EnableInterrupts();
        wrong += (0..PASSES).map(&work).sum::<usize>();
        CALLS.DisableInterrupts();
        // SAFETY: it may have come, or not.
        unsafe { CALLS.CancelAlarm(0) };
    }
    let came = traps::interrupts() - before;
    expect(wrong == 0, format_args!("{wrong} {what} are not what they were set to"));
    expect(came >= ROUNDS / 8, format_args!("only {came} interrupts came in {ROUNDS} rounds"));
}

/// Tries it with entries of page tables.
pub(super) fn entries(space: Space, expect: &mut Expect<'_>) {
    let frames = [0, 1].map(|index| physical(&raw const TEST_FRAMES) + index * PAGE);
    space.map_writable(AREA, frames[0]);
    let first = space.entry(AREA);
    let bits = PRESENT | WRITE | ACCESSED | DIRTY;
    let set = |index: u32, value: u64| {
        // SAFETY: pages that nothing else maps.
        unsafe { CALLS.SetPxELong(value, first + 8 * index, EntryFlags::PT.bits()) };
    };
    rounds("entries", expect, |pass| {
        let value = u64::from(frames[pass as usize % 2]) | bits;
        // SAFETY: pages that nothing else maps.
        unsafe { CALLS.SetLazyMode(LazyMode::MMU.0) };
        (0..ENTRIES).for_each(|index| set(index, value));
        // SAFETY: as above.
        unsafe { CALLS.SetLazyMode(LazyMode::OFF.0) };
        (0..ENTRIES).filter(|index| space.load(first + 8 * index) != value).count()
    });
    (0..ENTRIES).for_each(|index| set(index, 0));
}

/// Tries it with context switches: by what is loaded of three descriptors. Of each switch the stack, the flag and the address
/// space are what they were.
pub(super) fn switches(expect: &mut Expect<'_>) {
    let cr3 = processor::cr3();
    let state = (&raw const TASK_STATE) as u32;
    let gdt = (&raw const GDT) as u32;
    rounds("descriptors", expect, |pass| {
        for turn in 0..SWITCHES {
            let low = 0x0100 * (pass * SWITCHES + turn + 1);
            // SAFETY: entries that nothing else uses; all else stays what it is.
            unsafe {
                CALLS.SetLazyMode(LazyMode::CPU.0);
                for index in UNUSED {
                    CALLS.WriteGDTEntry(gdt, index, low | index, USER_DATA);
                }
                CALLS.UpdateKernelStack(state, suite::trap_stack_top());
                CALLS.CLTS();
                CALLS.SetCR3(cr3);
                CALLS.SetLazyMode(LazyMode::OFF.0);
            }
            let wrong = UNUSED.iter().filter(|index| limit(**index) != Some(low | **index)).count();
            if wrong > 0 {
                return wrong;
            }
        }
        0
    });
    for index in UNUSED {
        // SAFETY: they were empty.
        unsafe { CALLS.WriteGDTEntry(gdt, index, 0, 0) };
    }
}

/// The limit of a segment as the processor has it.
fn limit(index: u32) -> Option<u32> {
    let (limit, is_there): (u32, u8);
    // SAFETY: it only looks.
    unsafe {
        asm!(
            "lsl {limit:e}, {selector:e}",
            "setz {is_there}",
            limit = out(reg) limit,
            selector = in(reg) index << 3,
            is_there = out(reg_byte) is_there,
        );
    }
    (is_there != 0).then_some(limit)
}
