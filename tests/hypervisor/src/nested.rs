//! Nested paging: guest-physical addresses are the machine's, but for the ROM's and the hypervisor's own.

use crate::machine::{END, Machine, OWN};
use vmi_hypervisor::memory::{FRAME, Memory, Place};

/// An entry's bits: present, writable; a nested walk counts as one in ring 3.
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;

const ENTRIES: usize = 512;

/// Bytes that an entry of a directory maps.
const LARGE_PAGE: u64 = 2 << 20;

/// What an ordinary entry says.
const FREE: u64 = PRESENT | WRITABLE | USER;

/// Makes the tables; the address of the highest.
pub(crate) fn tables(machine: &mut Machine) -> u64 {
    let directories = machine.take::<u64>((END / LARGE_PAGE) as usize);
    let pointers = machine.take::<u64>(ENTRIES);
    let root = machine.take::<u64>(ENTRIES);
    // All of the hypervisor's memory is one page of ones to the guest.
    let nothing = machine.take::<u64>(ENTRIES);
    nothing.fill(machine.ones | PRESENT | USER);
    let lowest = machine.take::<u64>(ENTRIES);
    for (frame, entry) in lowest.iter_mut().enumerate() {
        *entry = match machine.place(frame as u64) {
            Place::Memory(address) | Place::Device(address) => address | FREE,
            Place::ReadOnly(address) => address | PRESENT | USER,
            Place::Nothing => machine.ones | PRESENT | USER,
        };
    }
    for (index, entry) in directories.iter_mut().enumerate() {
        let address = index as u64 * LARGE_PAGE;
        *entry = if address == 0 {
            lowest.as_ptr() as u64 | FREE
        } else if OWN.contains(&address) {
            nothing.as_ptr() as u64 | FREE
        } else {
            address | FREE | LARGE
        };
    }
    for (index, entry) in pointers.iter_mut().take(directories.len() / ENTRIES).enumerate() {
        *entry = (directories.as_ptr() as u64 + index as u64 * FRAME) | FREE;
    }
    root[0] = pointers.as_ptr() as u64 | FREE;
    root.as_ptr() as u64
}
