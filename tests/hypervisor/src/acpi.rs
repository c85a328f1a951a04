//! ACPI specification 1.0: the port that switches the machine off, as the firmware's tables name it.

use crate::machine::Machine;
use core::ops::Range;

/// Section 5.2.4: where the root pointer lies, on which boundaries, and how much of it is summed up.
const AREA: Range<u32> = 0xe_0000..0x10_0000;
const STEP: usize = 16;
const POINTER: &[u8] = b"RSD PTR ";
const POINTER_SIZE: u32 = 20;

/// In the pointer: the address of the root table.
const ROOT: u32 = 16;

/// Of each table: its length, and the bytes of its header.
const LENGTH: u32 = 4;
const HEADER_SIZE: u32 = 36;

/// Section 5.2.5: the fixed description table, and in it the port of the first control register.
const FIXED: &[u8] = b"FACP";
const CONTROL: u32 = 64;

/// The most tables that are looked at.
const TABLES: u32 = 64;

fn word(address: u32) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|offset| Machine::byte(address.wrapping_add(offset))))
}

fn has(address: u32, text: &[u8]) -> bool {
    (address..).zip(text).all(|(address, wanted)| Machine::byte(address) == *wanted)
}

/// The port; none where the machine has no ACPI.
pub(crate) fn power_port() -> Option<u16> {
    let is_pointer = |address: &u32| {
        let bytes = *address..address + POINTER_SIZE;
        has(*address, POINTER) && bytes.map(Machine::byte).fold(0, u8::wrapping_add) == 0
    };
    let root = word(AREA.step_by(STEP).find(is_pointer)? + ROOT);
    let tables = (word(root.checked_add(LENGTH)?).saturating_sub(HEADER_SIZE) / 4).min(TABLES);
    let first = root.checked_add(HEADER_SIZE)?;
    let fixed =
        (0..tables).map(|index| word(first + 4 * index)).find(|table| has(*table, FIXED))?;
    u16::try_from(word(fixed.checked_add(CONTROL)?)).ok().filter(|port| *port != 0)
}
