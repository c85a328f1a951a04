//! The processor's rules, case by case.

use super::*;
use crate::shadow::machine::{DEVICE, HIDDEN, ROM, Ram, registers};
use std::vec::Vec;

const READ: Access = Access { write: false, user: false, execute: false };
const WRITE: Access = Access { write: true, ..READ };
const FETCH: Access = Access { execute: true, ..READ };
const USER_READ: Access = Access { user: true, ..READ };
const USER_WRITE: Access = Access { user: true, ..WRITE };
const USER_FETCH: Access = Access { user: true, ..FETCH };
const ALL: [Access; 6] = [READ, WRITE, FETCH, USER_READ, USER_WRITE, USER_FETCH];

/// Everything that an entry may allow, with nothing accessed yet.
const OPEN: u64 = PRESENT | WRITABLE | USER;

const POINTERS: u64 = 0;
const DIRECTORY: u64 = 1;
const TABLE: u64 = 2;
const PAGE: u64 = 5;

/// The linear address whose indices are 1, 2 and 3 in PAE tables, with an offset.
const LINEAR: u32 = 1 << 30 | 2 << 21 | 3 << 12 | 0x456;

struct Guest {
    registers: Registers,
    ram: Ram,
}

/// Two-level: indices 257 and 3 of frames 1 and 2; PAE: indices 1, 2 and 3 of frames 0, 1 and 2. Both lead to frame 5.
fn guest(pae: bool) -> Guest {
    let guest = Guest {
        registers: registers(pae, if pae { POINTERS } else { DIRECTORY }),
        ram: Ram::new(),
    };
    guest.ram.put(POINTERS * FRAME + 8, 8, (DIRECTORY * FRAME) | PRESENT);
    guest.set(Level::Directory, (TABLE * FRAME) | OPEN);
    guest.set(Level::Table, (PAGE * FRAME) | OPEN);
    guest
}

impl Guest {
    fn address(&self, level: Level) -> u64 {
        match (level, self.registers.mode().pae) {
            (Level::Pointers, _) => POINTERS * FRAME + 8,
            (Level::Directory, true) => DIRECTORY * FRAME + 2 * 8,
            (Level::Directory, false) => DIRECTORY * FRAME + 257 * 4,
            (Level::Table, true) => TABLE * FRAME + 3 * 8,
            (Level::Table, false) => TABLE * FRAME + 3 * 4,
        }
    }

    fn set(&self, level: Level, entry: u64) {
        self.ram.put(self.address(level), self.registers.mode().entry_size(), entry);
    }

    fn get(&self, level: Level) -> u64 {
        self.registers.mode().read(&self.ram, self.address(level))
    }

    /// The physical address, or the error code.
    fn access(&self, access: Access) -> Result<u64, u32> {
        let found = translate(&self.registers, &self.ram, LINEAR, access);
        found.map(|found| found.physical).map_err(|fault| fault.error)
    }

    /// Each access's error code, with `None` for success.
    fn errors(&self) -> [Option<u32>; 6] {
        ALL.map(|access| {
            let before = self.ram.clone();
            let error = self.access(access).err();
            assert!(error.is_none() || self.ram == before, "a fault changes nothing");
            error
        })
    }
}

#[test]
fn without_paging_addresses_are_physical() {
    let mut guest = guest(true);
    guest.registers.cr0 &= !CR0_PAGING;
    assert_eq!(ALL.map(|access| guest.access(access)), [Ok(LINEAR.into()); 6]);
}

#[test]
fn an_open_page_is_open() {
    for pae in [false, true] {
        assert_eq!(ALL.map(|access| guest(pae).access(access)), [Ok(PAGE * FRAME + 0x456); 6]);
    }
}

#[test]
fn what_is_not_present_faults_whatever_else_it_says() {
    for (pae, level) in [
        (false, Level::Directory),
        (false, Level::Table),
        (true, Level::Pointers),
        (true, Level::Directory),
        (true, Level::Table),
    ] {
        let guest = guest(pae);
        guest.set(level, !PRESENT);
        // The bit of a fetch is there with NX only.
        let fetch = if pae { 0x10 } else { 0 };
        let expected = [0, 2, fetch, 4, 6, 4 | fetch].map(Some);
        assert_eq!(guest.errors(), expected, "{pae} {level:?}");
    }
}

#[test]
fn permissions_are_those_of_all_levels() {
    for pae in [false, true] {
        let fetch = if pae { 0x10 } else { 0 };
        for level in [Level::Directory, Level::Table] {
            let open = guest(pae).get(level);
            let guest = guest(pae);
            guest.set(level, open & !USER);
            let denied = [None, None, None, Some(5), Some(7), Some(5 | fetch)];
            assert_eq!(guest.errors(), denied, "supervisor, {level:?}");
            guest.set(level, open & !WRITABLE);
            assert_eq!(
                guest.errors(),
                [None, Some(3), None, None, Some(7), None],
                "read only, {level:?}"
            );
        }
    }
}

#[test]
fn without_wp_ring_0_stores_anywhere_and_ring_3_does_not() {
    for pae in [false, true] {
        let mut guest = guest(pae);
        guest.registers.cr0 &= !CR0_WRITE_PROTECT;
        guest.set(Level::Table, (PAGE * FRAME) | OPEN & !WRITABLE);
        assert_eq!(guest.errors(), [None, None, None, None, Some(7), None]);
        assert_eq!(guest.get(Level::Table) & DIRTY, DIRTY);
    }
}

#[test]
fn nx_is_a_permission_with_nxe_and_reserved_without() {
    for level in [Level::Directory, Level::Table] {
        let mut guest = guest(true);
        guest.set(level, guest.get(level) | NO_EXECUTE);
        assert_eq!(guest.errors(), [None, None, Some(0x11), None, None, Some(0x15)]);
        guest.registers.efer = 0;
        assert_eq!(guest.errors(), [9, 0xb, 9, 0xd, 0xf, 0xd].map(Some));
    }
}

#[test]
fn reserved_bits_come_before_permissions() {
    let pointers = [1, 2, 6, 7, 8];
    for width in [36, 40] {
        for (level, others) in
            [(Level::Pointers, &pointers[..]), (Level::Directory, &[]), (Level::Table, &[])]
        {
            for bit in (0..12).chain(width.into()..63) {
                if bit == 7 && level == Level::Directory {
                    // A large page.
                    continue;
                }
                let mut guest = guest(true);
                guest.registers.width = width;
                // No permission, so that there is a fault in any case.
                guest.set(Level::Table, (PAGE * FRAME) | PRESENT);
                guest.set(level, guest.get(level) | 1 << bit);
                let is_reserved = bit >= u32::from(width) || others.contains(&bit);
                let expected = if is_reserved { 0xf } else { 7 };
                assert_eq!(guest.access(USER_WRITE), Err(expected), "{level:?} bit {bit}");
            }
        }
    }
}

#[test]
fn a_pointer_s_nx_bit_is_reserved() {
    let guest = guest(true);
    guest.set(Level::Pointers, guest.get(Level::Pointers) | NO_EXECUTE);
    assert_eq!(guest.access(READ), Err(9));
}

#[test]
fn large_pages_have_their_own_offset_and_reserved_bits() {
    for (pae, bits) in [(false, 22), (true, 21)] {
        for bit in 12..bits {
            let guest = guest(pae);
            guest.set(Level::Directory, 3 << bits | OPEN | LARGE | 1 << bit);
            // Bit 12 is PAT.
            let expected = if bit == 12 {
                Ok(3 << bits | u64::from(LINEAR) & ((1 << bits) - 1))
            } else {
                Err(ERROR_PRESENT | ERROR_RESERVED)
            };
            assert_eq!(guest.access(READ), expected, "{pae} bit {bit}");
        }
    }
}

#[test]
fn cr4_pse_is_for_two_level_tables_alone() {
    for pae in [false, true] {
        let mut guest = guest(pae);
        guest.set(Level::Directory, (TABLE * FRAME) | OPEN | LARGE);
        // Frame 2 is no beginning of a large page.
        assert_eq!(guest.access(READ), Err(9));
        guest.registers.cr4 &= !CR4_PAGE_SIZE;
        let expected = if pae { Err(9) } else { Ok(PAGE * FRAME + 0x456) };
        assert_eq!(guest.access(READ), expected);
    }
}

#[test]
fn accessed_and_dirty_bits_are_set_where_they_belong() {
    for pae in [false, true] {
        let (pointer, directory, table) = (
            guest(pae).get(Level::Pointers),
            guest(pae).get(Level::Directory),
            guest(pae).get(Level::Table),
        );
        for access in ALL {
            let guest = guest(pae);
            guest.access(access).expect("open");
            let dirty = if access.write { DIRTY } else { 0 };
            assert_eq!(guest.get(Level::Pointers), pointer, "no bits in a pointer");
            assert_eq!(guest.get(Level::Directory), directory | ACCESSED, "never dirty");
            assert_eq!(guest.get(Level::Table), table | ACCESSED | dirty);
            let expected = guest.ram.clone();
            assert_eq!(guest.access(READ), Ok(PAGE * FRAME + 0x456));
            assert!(guest.ram == expected, "bits stay");
        }
        let guest = guest(pae);
        guest.set(Level::Directory, OPEN | LARGE);
        guest.access(WRITE).expect("open");
        assert_eq!(guest.get(Level::Directory), OPEN | LARGE | ACCESSED | DIRTY);
    }
}

#[test]
fn the_bits_of_cr3_that_are_ignored_are_ignored() {
    let mut two_level = guest(false);
    two_level.registers.cr3 |= 0xfff;
    assert_eq!(two_level.access(READ), Ok(PAGE * FRAME + 0x456));
    let mut pae = guest(true);
    pae.registers.cr3 |= 0x1f;
    assert_eq!(pae.access(READ), Ok(PAGE * FRAME + 0x456));
    // The next 32 bytes are another table.
    pae.registers.cr3 |= 0x20;
    assert_eq!(pae.access(READ), Err(0));
}

#[test]
fn tables_outside_of_memory_read_as_ones() {
    for frame in [DEVICE, HIDDEN, 0xf_ffff] {
        let guest = guest(true);
        guest.set(Level::Directory, (frame * FRAME) | OPEN);
        assert_eq!(guest.access(READ), Err(9), "all ones have reserved bits");
        let guest = self::guest(false);
        guest.set(Level::Directory, (frame * FRAME) | OPEN);
        assert_eq!(guest.access(WRITE), Ok(0xffff_f456), "all ones are an entry");
    }
}

#[test]
fn a_table_in_a_rom_translates_without_its_bits() {
    for pae in [false, true] {
        let guest = guest(pae);
        guest.set(Level::Directory, (ROM * FRAME) | OPEN);
        let entry = ROM * FRAME + 3 * guest.registers.mode().entry_size() as u64;
        guest.ram.put(entry, 4, (PAGE * FRAME) | OPEN);
        let found = translate(&guest.registers, &guest.ram, LINEAR, WRITE)
            .expect("a ROM's table is a table");
        assert_eq!(found.physical, PAGE * FRAME + 0x456);
        let steps: Vec<u64> =
            found.steps().iter().map(|step| step.value & (ACCESSED | DIRTY)).collect();
        assert!(steps.ends_with(&[ACCESSED, ACCESSED | DIRTY]), "{steps:?}");
        assert_eq!(guest.registers.mode().read(&guest.ram, entry), (PAGE * FRAME) | OPEN);
        assert_eq!(guest.get(Level::Directory) & ACCESSED, ACCESSED, "that one is in memory");
    }
}

#[test]
fn finding_changes_nothing_and_asks_no_permission() {
    for pae in [false, true] {
        let guest = guest(pae);
        guest.set(Level::Table, (PAGE * FRAME) | PRESENT);
        let before = guest.ram.clone();
        let found = find(&guest.registers, &guest.ram, LINEAR).map(|found| found.physical);
        assert_eq!(found, Ok(PAGE * FRAME + 0x456));
        assert!(guest.ram == before);
    }
}
