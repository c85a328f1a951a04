//! What becomes of a page-table entry that Xen refuses: nothing else is lost, the refusal is counted, and the page is not present.

use super::{Expect, granted};
use crate::boot::PAGE_OFFSET;
use crate::host::CALLS;
use crate::paging::{ACCESSED, DIRTY, PAGE, PRESENT, Space, TEST_FRAMES, WRITE, physical};
use crate::rom::Rom;
use vmi_abi::flags::{EntryFlags, LazyMode};
use vmi_hv_backend::xen::Xen;
use vmi_hv_backend::xen::interface::Placement;

/// Pages that nothing else maps; below them is one table.
const AREA: u32 = 0xd820_0000;

/// Frames of the machine among which one is looked for that is not the domain's: behind those that the guest has by number, in
/// the memory of the machine that `xtask` runs, without the firmware's tables at its end.
const MACHINE_FRAMES: u32 = ((128 << 20) - (128 << 10)) / PAGE;

/// A machine frame that is not the domain's, as a frame of the guest's: what is beyond its memory is the machine's.
fn foreign_frame(placement: &Placement) -> Option<u32> {
    // SAFETY: changes nothing.
    let is_foreign = |frame: &u32| unsafe { CALLS.MachineToPhysical(*frame) } == *frame;
    (placement.pages..MACHINE_FRAMES).rev().find(is_foreign)
}

/// Tries it.
pub(super) fn run(space: Space, rom: &Rom, expect: &mut Expect<'_>) {
    let Some((memory, placement)) = granted(rom) else {
        return expect(false, format_args!("nobody has said where the ROM's memory is"));
    };
    let Some(foreign) = foreign_frame(&placement) else {
        return expect(false, format_args!("no frame is anybody else's: nothing can be tested"));
    };
    let refusals = || {
        let there = (memory as usize + Xen::REFUSALS_OFFSET) as *const u32;
        // SAFETY: the ROM's memory, which is mapped.
        unsafe { there.read_volatile() }
    };
    let frame = physical(&raw const TEST_FRAMES);
    space.map_writable(AREA, frame);
    let entry = |index: u32| space.entry(AREA) + 8 * index;
    let table = (entry(0) - PAGE_OFFSET) & !(PAGE - 1);
    let before = refusals();
    let bits = PRESENT | WRITE | ACCESSED | DIRTY;
    let frames = [frame, foreign * PAGE, frame + PAGE, table];
    // SAFETY: pages that nothing else maps.
    unsafe {
        CALLS.SetLazyMode(LazyMode::MMU.0);
        for (index, address) in (0..).zip(frames) {
            CALLS.SetPxELong(u64::from(address) | bits, entry(index), EntryFlags::PT.bits());
        }
        CALLS.SetLazyMode(LazyMode::OFF.0);
    }
    let wanted = [
        u64::from(frame) | bits,
        0,
        u64::from(frame + PAGE) | bits,
        u64::from(table) | bits & !WRITE,
    ];
    for (index, wanted) in (0..).zip(wanted) {
        let found = space.load(entry(index));
        let name = ["first", "refused", "next", "table's own"][index as usize];
        expect(found == wanted, format_args!("the {name} entry is {found:#x}, not {wanted:#x}"));
    }
    let refused = refusals().wrapping_sub(before);
    expect(refused == 1, format_args!("{refused} refusals are counted, of one"));
    (0..4).for_each(|index| space.store(entry(index), 0));
    expect(
        refusals().wrapping_sub(before) == 1,
        format_args!("taking the entries back is refused"),
    );
}
