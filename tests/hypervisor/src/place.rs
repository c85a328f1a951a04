//! Puts the guest's ROM where it looks for one, with the memory that it is granted behind it. Both are the hypervisor's frames,
//! which the guest sees at other addresses.

use crate::machine::{Machine, Window};
use crate::multiboot::Module;
use crate::report::{Ending, give_up};
use core::mem::offset_of;
use core::ops::Range;
use vmi_abi::header::{LENGTH_UNIT, ROM_SIGNATURE, checksum};
use vmi_abi::probe::{SCAN_AREA, SCAN_STEP};
use vmi_hv_backend::reference::interface::{GRANT_OFFSET, GRANT_SIGNATURE, Grant};
use vmi_hypervisor::memory::FRAME;

/// The place that is tried first; QEMU's own ROMs begin at C0000h.
const PREFERRED: u32 = 0xd_0000;

/// Offsets of the grant's fields.
const WANTED: usize = GRANT_OFFSET + offset_of!(Grant, wanted);
const DISTANCE: usize = GRANT_OFFSET + offset_of!(Grant, distance);

/// Whether a file is a ROM.
pub(crate) fn is_rom(file: &[u8]) -> bool {
    file.starts_with(&ROM_SIGNATURE.to_le_bytes())
}

/// Ends: the ROM cannot be used.
fn refuse(reason: core::fmt::Arguments<'_>) -> ! {
    give_up(Ending::BadArguments, format_args!("the ROM: {reason}"))
}

fn word(image: &[u8], offset: usize) -> Option<u32> {
    let bytes = image.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// Places the image.
pub(crate) fn place(machine: &mut Machine, module: &Module) {
    let file = module.bytes;
    let length = file.get(2).map_or(0, |units| usize::from(*units) * LENGTH_UNIT);
    let Some(bytes) = file.get(..length).filter(|bytes| !bytes.is_empty()) else {
        refuse(format_args!("its header says {length} bytes, the file has {}", file.len()))
    };
    if checksum(bytes) != 0 {
        refuse(format_args!("its bytes do not add up to 0"));
    }
    let room = (length as u64).next_multiple_of(FRAME);
    let wanted = match word(bytes, GRANT_OFFSET) {
        Some(GRANT_SIGNATURE) => u64::from(word(bytes, WANTED).unwrap_or_default()),
        _ => 0,
    };
    let granted = wanted.next_multiple_of(FRAME);
    let Some(start) = free_place(room + granted) else {
        refuse(format_args!(
            "no room for its {room:#x} bytes and {granted:#x} of memory in {:#x} to {:#x}",
            SCAN_AREA.start, SCAN_AREA.end
        ))
    };
    // The frames behind the image's end read as ones, as where nothing is.
    let image = machine.take::<u8>(room as usize);
    image.fill(0xff);
    let image_address = image.as_ptr() as u64;
    let image = &mut image[..length];
    image.copy_from_slice(bytes);
    if granted != 0 {
        image[DISTANCE..DISTANCE + 4].copy_from_slice(&(room as u32).to_le_bytes());
        let sum = checksum(image);
        image[length - 1] = image[length - 1].wrapping_sub(sum);
        let memory = machine.take::<u8>(granted as usize).as_ptr() as u64;
        machine.grant = Window { guest: start + room, machine: memory, length: granted };
    }
    machine.rom_length = length as u64;
    machine.rom = Window { guest: start, machine: image_address, length: room };
}

/// A place for so many bytes, clear of all other ROMs.
fn free_place(length: u64) -> Option<u64> {
    let area = u64::from(SCAN_AREA.start)..u64::from(SCAN_AREA.end);
    let is_free = |start: u64| {
        let end = start + length;
        end <= area.end && !roms().any(|rom| rom.start < end && start < rom.end)
    };
    core::iter::once(PREFERRED.into())
        .chain(area.clone().step_by(FRAME as usize))
        .find(|start| is_free(*start))
}

/// The ROMs that are there.
fn roms() -> impl Iterator<Item = Range<u64>> {
    SCAN_AREA.step_by(SCAN_STEP as usize).filter_map(|start| {
        let signature = [Machine::byte(start), Machine::byte(start + 1)];
        (signature == ROM_SIGNATURE.to_le_bytes()).then(|| {
            let length = u64::from(Machine::byte(start + 2)) * LENGTH_UNIT as u64;
            u64::from(start)..u64::from(start) + length
        })
    })
}
