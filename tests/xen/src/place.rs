//! Puts the ROM where the guest looks for one, with the memory that it is granted behind it, and what it has to know of Xen.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: keeps the image in memory of its own, for a stack is too small"
)]

use crate::boot::refuse;
use crate::console::line;
use crate::hypercall;
use crate::memory::{Memory, physical};
use core::mem::offset_of;
use vmi_abi::REVISION_3_0;
use vmi_abi::header::{LENGTH_UNIT, RomHeader, checksum};
use vmi_abi::probe::{SCAN_AREA, scan};
use vmi_hv_backend::reference::interface::{GRANT_OFFSET, GRANT_SIGNATURE, Grant};
use vmi_hv_backend::xen::interface::{
    PAGE_SIZE, PLACEMENT_SIGNATURE, PLACEMENT_SIZE, PLACEMENT_VERSION, Placement, StartInfo,
};

/// The place that is tried first.
const PREFERRED: u32 = 0xd_0000;

/// The longest ROM.
const LONGEST: usize = 128 * 1024;

/// The image, while it has no place.
static mut IMAGE: [u8; LONGEST] = [0; LONGEST];

/// A word of the image.
fn word(image: &[u8], offset: usize) -> Option<u32> {
    let bytes = image.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// Stores a word in the image.
fn set_word(image: &mut [u8], offset: usize, value: u32) {
    image[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// Places the first ROM of revision 3.0 that the machine's firmware has found.
pub(crate) fn place(memory: &mut Memory, start: &StartInfo) {
    let image = &raw mut IMAGE;
    // SAFETY: the loader is alone, and this is the only reference.
    let image = unsafe { &mut *image };
    let length = memory.with_machine_roms(|roms| {
        let found = scan(roms, REVISION_3_0)?;
        let rom = &roms[found..];
        let length = usize::from(rom[2]) * LENGTH_UNIT;
        image[..length].copy_from_slice(&rom[..length]);
        line!("the ROM: {length} bytes at {:#x}", SCAN_AREA.start as usize + found);
        Some(length)
    });
    let Some(length) = length else { refuse!("no ROM of revision 3.0 among the machine's") };
    let image = &mut image[..length];

    let room = (length as u32).next_multiple_of(PAGE_SIZE);
    let wanted = match word(image, GRANT_OFFSET) {
        Some(GRANT_SIGNATURE) => word(image, GRANT_OFFSET + offset_of!(Grant, wanted)),
        _ => None,
    };
    let granted = wanted.unwrap_or(0).next_multiple_of(PAGE_SIZE);
    let places = [PREFERRED, SCAN_AREA.start];
    let fits = |start: &u32| start + room + granted <= SCAN_AREA.end;
    let Some(place) = places.into_iter().find(fits) else {
        refuse!("no room for the ROM's {room:#x} bytes and {granted:#x} of memory")
    };
    let virtual_top = hypercall::virtual_top();
    set_word(image, offset_of!(RomHeader, virtual_top), virtual_top);
    if granted != 0 {
        set_word(image, GRANT_OFFSET + offset_of!(Grant, distance), room);
    }
    let sum = checksum(image);
    image[length - 1] = image[length - 1].wrapping_sub(sum);

    // What a PC has where nothing is.
    memory.fill(SCAN_AREA, 0xff);
    memory.store(place, image);
    memory.protect(place..place + room);
    if granted != 0 {
        let grant = place + room..place + room + granted;
        memory.fill(grant.clone(), 0);
        let [shared_info, p2m, tables] = memory.lists();
        let placement = Placement {
            signature: PLACEMENT_SIGNATURE,
            image: place,
            version: PLACEMENT_VERSION,
            start_info: physical(start),
            shared_info,
            p2m,
            pages: memory.pages(),
            tables,
            virtual_top,
        };
        memory.store_placement(grant.end - PLACEMENT_SIZE, placement);
    }
    line!("placed at {place:#x}, with {granted:#x} bytes of memory");
}
