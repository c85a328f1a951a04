//! Hypercalls that are wrong, and what comes of those that are right.

use super::*;
use crate::shadow::machine::{
    DEVICE, HIDDEN, MEMORY, NOTHING, ROM, Ram, is_hidden, registers, shadow,
};
use crate::shadow::tests::{Numbers, frame_update};
use crate::walk::{ACCESSED, CR0_PAGING, DIRTY, LARGE, NO_EXECUTE, USER, WRITABLE};
use std::vec::Vec;
use vmi_hv_backend::reference::interface::{BATCH_LIMIT, DIRECTORIES, MAP_WORDS, PHYSICAL};

/// Linear is physical for the first 64 pages, with the tables in frames 0 (pointers), 1 and 2.
const OPEN: u64 = PRESENT | WRITABLE | USER | ACCESSED;
const MAPPED: u64 = 64;

/// The first byte of memory that nothing is in yet.
const FREE: u32 = 4 * FRAME as u32;

struct Guest {
    ram: Ram,
    registers: Registers,
    shadow: Shadow<'static>,
    counters: Counters,
    pae: bool,
    nested: bool,
}

impl Drop for Guest {
    fn drop(&mut self) {
        crate::shadow::machine::give_back(&mut self.shadow);
    }
}

impl Guest {
    fn new(pae: bool, nested: bool) -> Self {
        let ram = Ram::new();
        let size = if pae { 8 } else { 4 };
        ram.put(0, 8, FRAME | PRESENT);
        ram.put(FRAME, size, (2 * FRAME) | OPEN);
        for frame in 0..MAPPED {
            ram.put(2 * FRAME + frame * size as u64, size, (frame * FRAME) | OPEN);
        }
        let registers = registers(pae, if pae { 0 } else { 1 });
        let mut shadow = shadow(12);
        shadow.load(&registers, &ram);
        let _ = shadow.fault(&registers, &ram, 0, 0);
        Self { ram, registers, shadow, counters: Counters::ZERO, pae, nested }
    }

    fn machine(&mut self) -> Machine<'_, 'static, Ram, fn(u64) -> bool> {
        Machine {
            shadow: (!self.nested).then_some(&mut self.shadow),
            registers: &mut self.registers,
            memory: &self.ram,
            is_hidden,
            limit: BATCH_LIMIT,
            counters: &mut self.counters,
            quiet: None,
        }
    }

    fn call(&mut self, eax: u32, ebx: u32, ecx: u32) -> Outcome {
        self.machine().call(Call { eax, ebx, ecx, cpl: 0 })
    }

    fn put(&self, address: u32, updates: &[Update]) {
        for (i, update) in updates.iter().enumerate() {
            let words = [update.call.0, update.address, update.low, update.high, update.flags];
            for (j, word) in words.into_iter().enumerate() {
                self.ram.put(u64::from(address) + (i * 20 + j * 4) as u64, 4, word.into());
            }
        }
    }

    fn set(&self, linear: u32, value: u64) -> Update {
        if self.pae {
            Update::SetPxELong(value, linear, 0)
        } else {
            Update::SetPxE(value as u32, linear, 0)
        }
    }

    fn size(&self) -> u32 {
        if self.pae { 8 } else { 4 }
    }

    /// An update that is right, in any order with others: of an entry that nothing here uses, or of what is no table. The tables stay in use.
    fn good(&self, numbers: &mut Numbers) -> Update {
        let index = 200 + numbers.below(300) as u32;
        let linear = 2 * FRAME as u32 + index * self.size();
        let value = numbers.one_of(&[5, 12, ROM, DEVICE, NOTHING]) * FRAME;
        let value = value | numbers.one_of(&[OPEN, PRESENT, 0]) | numbers.one_of(&[0, 0x100, 0x18]);
        match numbers.below(13) {
            // Linear addresses are physical ones here.
            12 => Update::UpdatePxELong(linear & !7, PHYSICAL),
            0 => frame_update(number::AllocatePage, (3 + numbers.below(DEVICE - 3)) as u32),
            1 => frame_update(number::ReleasePage, (3 + numbers.below(DEVICE - 3)) as u32),
            2 => frame_update(number::InvalPage, numbers.next() as u32),
            3 => Update { flags: numbers.next() as u32, ..frame_update(number::FlushTLB, 0) },
            4 => Update::SetCR3(self.registers.cr3 | 0x18),
            5 => Update::UpdatePxE(linear, 0),
            6 => Update::UpdatePxELong(linear & !7, 0),
            // Not present: anything goes.
            7 => self.set(linear, numbers.next() & !PRESENT),
            // No table: anything goes.
            8 => Update::SetPxE(numbers.next() as u32, 10 * FRAME as u32 + index * 4, 0),
            _ => self.set(linear, value),
        }
    }

    /// One that is wrong, and what is said to it.
    fn bad(&self, numbers: &mut Numbers) -> (Update, Status) {
        let index = 200 + numbers.below(300) as u32;
        let entry = 2 * FRAME as u32 + index * self.size();
        let directory_entry = FRAME as u32 + index * self.size();
        let hidden = (HIDDEN + numbers.below(NOTHING - HIDDEN)) * FRAME;
        let good = (5 * FRAME) | OPEN;
        let size = self.size();
        let unmapped = (MAPPED as u32 + numbers.below(100) as u32) << 12;
        let outside = numbers.one_of(&[DEVICE, HIDDEN, NOTHING]) as u32;
        loop {
            return match numbers.below(16) {
                14 => (Update::UpdatePxE(outside << 12, PHYSICAL), Status::BadAddress),
                15 => (Update::UpdatePxELong(entry | 2, PHYSICAL), Status::BadAddress),
                0 => {
                    let call = numbers.one_of(&[0, 1, 16, 18, 37, 42, 43, 48, 49, 73, 0xffff_ffff]);
                    (frame_update(CallNumber(call), entry), Status::BadCall)
                }
                1 => (self.set(entry + 1 + numbers.below(3) as u32, good), Status::BadAddress),
                2 => (Update::SetPxELong(good, (entry & !7) + 4, 0), Status::BadAddress),
                3 => (self.set(unmapped, good), Status::BadAddress),
                4 => (Update::UpdatePxE(unmapped, 0), Status::BadAddress),
                5 => (Update::UpdatePxELong(entry | 2, 0), Status::BadAddress),
                6 => (self.set(outside << 12, 0), Status::BadAddress),
                7 => (self.set((ROM as u32) << 12, 0), Status::BadAddress),
                8 => {
                    let call = numbers.one_of(&[number::AllocatePage, number::ReleasePage]);
                    (
                        frame_update(call, numbers.one_of(&[outside, 0xf_ffff, !0])),
                        Status::BadAddress,
                    )
                }
                9 => {
                    let frame = numbers.one_of(&[outside, 0xf_ffff]);
                    (Update::SetCR3(frame << 12 | numbers.below(0x1000) as u32), Status::BadValue)
                }
                10 if !self.nested => (self.set(entry, hidden | OPEN), Status::BadValue),
                11 if !self.nested => {
                    // A large page from 0 on has the hypervisor's frames in it.
                    (self.set(directory_entry, OPEN | LARGE), Status::BadValue)
                }
                12 if !self.nested && self.pae => {
                    let bit = 40 + numbers.below(23);
                    (self.set(entry, good | 1 << bit), Status::BadValue)
                }
                13 if !self.nested => {
                    let bit = 13 + numbers.below(8);
                    let large = (1 << 22) | 1 << bit | OPEN | LARGE;
                    (self.set(directory_entry & !(size - 1), large), Status::BadValue)
                }
                _ => continue,
            };
        }
    }
}

#[test]
fn a_malformed_batch_is_applied_up_to_what_is_wrong() {
    let mut refused = Vec::new();
    for seed in 0..3000 {
        let mut numbers = Numbers(seed);
        let (pae, nested) = (seed % 2 == 0, seed % 7 == 0);
        let mut guest = Guest::new(pae, nested);
        let index = numbers.below(8);
        let mut updates: Vec<Update> = (0..index).map(|_| guest.good(&mut numbers)).collect();
        let mut expected = Guest::new(pae, nested);
        let (status, applied) = expected.machine().apply(updates.iter().copied());
        assert_eq!((status, u64::from(applied)), (Status::Done, index), "seed {seed}: {updates:?}");
        let (bad, status) = guest.bad(&mut numbers);
        updates.push(bad);
        updates.extend((0..numbers.below(4)).map(|_| guest.good(&mut numbers)));

        guest.put(FREE, &updates);
        expected.put(FREE, &updates);
        let outcome = guest.call(1, FREE, updates.len() as u32);
        assert_eq!(outcome, Outcome::Return(status, index as u32), "seed {seed}: {bad}");
        assert!(guest.ram == expected.ram, "seed {seed}: nothing from the index on");
        assert_eq!(guest.registers, expected.registers);
        let announced = |guest: &Guest| -> Vec<bool> {
            (0..MEMORY).map(|frame| guest.shadow.is_announced(frame)).collect()
        };
        assert_eq!(announced(&guest), announced(&expected));
        assert_eq!((guest.counters.updates, guest.counters.refusals), (index, 1));
        refused.push(status);
    }
    for status in [Status::BadCall, Status::BadAddress, Status::BadValue] {
        assert!(refused.iter().filter(|&&refused| refused == status).count() > 100, "{status:?}");
    }
}

#[test]
fn what_each_update_does() {
    for (pae, nested) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut guest = Guest::new(pae, nested);
        let size = guest.size() as usize;
        let entry = 2 * FRAME as u32 + 20 * guest.size();
        let updates = [
            guest.set(entry, (7 * FRAME) | OPEN),
            frame_update(number::AllocatePage, 2),
            // The page that was mapped a moment ago.
            Update::SetPxE(0x1234_5678, 20 * FRAME as u32 + 8, 0),
            Update::SetPxELong(0x1122_3344_5566_7788, 20 * FRAME as u32 + 16, 0),
            Update::SetCR3(guest.registers.cr3 | 8),
        ];
        let (status, applied) = guest.machine().apply(updates);
        assert_eq!((status, applied), (Status::Done, 5));
        assert_eq!(guest.ram.read(entry.into(), size), Some((7 * FRAME) | OPEN));
        assert_eq!(guest.ram.read(7 * FRAME + 8, 4), Some(0x1234_5678));
        assert_eq!(guest.ram.read(7 * FRAME + 16, 8), Some(0x1122_3344_5566_7788));
        assert_eq!(guest.registers.cr3 & 8, 8);
        assert_eq!(guest.shadow.is_announced(2), !nested);
        let _ = guest.machine().apply([frame_update(number::ReleasePage, 2)]);
        assert!(!guest.shadow.is_announced(2));
        assert_eq!((guest.counters.updates, guest.counters.refusals), (6, 0));
    }
}

#[test]
fn write_protection_binds_the_guest_alone_and_bits_of_use_stay() {
    let mut guest = Guest::new(true, false);
    let entry = 2 * FRAME + 12 * 8;
    guest.ram.put(entry, 8, (12 * FRAME) | PRESENT);
    let (status, _) = guest.machine().apply([Update::SetPxE(5, 12 * FRAME as u32, 0)]);
    assert_eq!(status, Status::Done);
    assert_eq!(guest.ram.read(12 * FRAME, 4), Some(5));
    assert_eq!(guest.ram.read(entry, 8), Some((12 * FRAME) | PRESENT), "not accessed by the guest");
}

#[test]
fn after_cr3_addresses_are_those_of_the_new_space() {
    let mut guest = Guest::new(false, false);
    // Frame 3 as a root: its first table is frame 5, which maps page 0 to frame 6.
    guest.ram.put(3 * FRAME, 4, (5 * FRAME) | OPEN);
    guest.ram.put(5 * FRAME, 4, (6 * FRAME) | OPEN);
    let updates = [
        Update::SetPxE(1, 6 * FRAME as u32, 0),
        Update::SetCR3(3 * FRAME as u32),
        Update::SetPxE(2, 4, 0),
        Update::SetPxE(3, FRAME as u32, 0),
    ];
    assert_eq!(guest.machine().apply(updates), (Status::BadAddress, 3));
    assert_eq!(guest.ram.read(6 * FRAME, 8), Some(2 << 32 | 1));
}

#[test]
fn a_table_that_is_announced_and_not_in_use_is_checked_as_a_page_table() {
    let mut guest = Guest::new(true, false);
    let linear = 10 * FRAME as u32;
    let hidden = (HIDDEN * FRAME) | OPEN;
    let set =
        |guest: &mut Guest, value| guest.machine().apply([Update::SetPxELong(value, linear, 0)]).0;
    assert_eq!(set(&mut guest, hidden), Status::Done, "no table");
    let _ = guest.machine().apply([frame_update(number::AllocatePage, 10)]);
    assert_eq!(set(&mut guest, hidden), Status::BadValue);
    assert_eq!(set(&mut guest, hidden & !PRESENT), Status::Done);
    assert_eq!(set(&mut guest, OPEN | 1 << 52), Status::BadValue);
    assert_eq!(set(&mut guest, OPEN | NO_EXECUTE), Status::Done);
    guest.registers.efer = 0;
    assert_eq!(set(&mut guest, OPEN | NO_EXECUTE), Status::BadValue);
    // Half an entry counts with its other half.
    let half = guest.machine().apply([Update::SetPxE(1 << 20, linear + 4, 0)]).0;
    assert_eq!(half, Status::BadValue);
    let half = guest.machine().apply([Update::SetPxE(0, linear + 4, 0)]).0;
    assert_eq!(half, Status::Done);
}

#[test]
fn pointers_are_checked_as_pointers() {
    let mut guest = Guest::new(true, false);
    let set = |guest: &mut Guest, linear, value| {
        guest.machine().apply([Update::SetPxELong(value, linear, 0)]).0
    };
    assert_eq!(set(&mut guest, 8, (3 * FRAME) | OPEN), Status::BadValue);
    assert_eq!(set(&mut guest, 8, (HIDDEN * FRAME) | PRESENT), Status::BadValue);
    assert_eq!(set(&mut guest, 8, (3 * FRAME) | PRESENT), Status::Done);
    assert_eq!(set(&mut guest, 32, (3 * FRAME) | OPEN), Status::Done, "behind them");
}

#[test]
fn what_is_no_hypercall_is_refused_at_once() {
    let mut guest = Guest::new(true, false);
    let before = guest.ram.clone();
    let mut numbers = Numbers(1);
    for _ in 0..1000 {
        let (ebx, ecx) = (numbers.next() as u32, numbers.next() as u32);
        let eax = numbers.next() as u32;
        if eax > 4 {
            let outcome = guest.call(eax, ebx, ecx);
            assert_eq!(outcome, Outcome::Return(Status::UnknownHypercall, 0));
        }
        let call = Call { eax: eax % 5, ebx, ecx, cpl: 1 + (eax >> 8) as u8 % 3 };
        assert_eq!(guest.machine().call(call), Outcome::Return(Status::NotPrivileged, 0));
        let outcome = guest.call(1, ebx, BATCH_LIMIT + 1 + ecx % 1000);
        assert_eq!(outcome, Outcome::Return(Status::TooLong, 0));
        let outcome = guest.call(3, ebx, TEXT_LIMIT + 1 + ecx % 1000);
        assert_eq!(outcome, Outcome::Return(Status::TooLong, 0));
        // Not aligned, or behind the memory.
        for ebx in [
            (ebx % (FREE * 2)) | 1,
            (ebx % (FREE * 2)) | 2,
            ebx | (DEVICE * FRAME) as u32 | 1 << 20,
        ] {
            let bad = Outcome::Return(Status::BadBuffer, 0);
            assert_eq!(guest.call(1, ebx, 1 + ecx % BATCH_LIMIT), bad, "{ebx:#x}");
            assert_eq!(guest.call(2, ebx, 8 + ecx % 1000), bad, "{ebx:#x}");
        }
    }
    assert!(guest.ram == before);
    assert_eq!(guest.counters, Counters { shadowed: guest.counters.shadowed, ..Counters::ZERO });
}

#[test]
fn a_buffer_lies_in_memory_with_all_its_bytes() {
    let mut guest = Guest::new(false, false);
    let bad = Outcome::Return(Status::BadBuffer, 0);
    let end = (DEVICE * FRAME) as u32;
    for count in 1..=BATCH_LIMIT {
        let fits = end - count * 20;
        assert_ne!(guest.call(1, fits, count), bad, "in the ROM: BadCall, but read");
        assert_eq!(guest.call(1, fits + 4, count), bad);
        assert_eq!(guest.call(1, 0_u32.wrapping_sub(count * 20), count), bad, "up to 4 GiB");
        assert_eq!(guest.call(1, 0_u32.wrapping_sub(4), count), bad, "around 4 GiB");
    }
    assert_eq!(guest.call(1, FREE, 0), Outcome::Return(Status::Done, 0));
    assert_eq!(guest.call(1, 0xffff_fffc, 0), Outcome::Return(Status::Done, 0));
    assert_eq!(guest.call(1, FREE + 2, 0), bad);
    guest.machine().limit = 1;
    let end = (MEMORY * FRAME) as u32;
    let size = size_of::<Counters>() as u32;
    assert_eq!(guest.call(2, end - size, size), Outcome::Return(Status::Done, size));
    assert_eq!(guest.call(2, end - size + 8, size), bad, "a ROM is not written");
    assert_eq!(guest.call(2, end - size + 8, size - 1), Outcome::Return(Status::Done, size - 8));
    assert_eq!(guest.call(2, 0xffff_fff8, 16), bad);
    assert_eq!(guest.call(3, (DEVICE * FRAME) as u32 - 7, 8), bad);
    let stop = Outcome::Stop { address: (DEVICE * FRAME) as u32 - 8, bytes: 8 };
    assert_eq!(guest.call(3, (DEVICE * FRAME) as u32 - 8, 8), stop);
}

#[test]
fn page_faults_are_quiet_behind_a_batch_that_is_all_there_is() {
    const MAP: u32 = FREE + 8;
    let done = Outcome::Return(Status::Done, 0);
    for pae in [false, true] {
        let mut guest = Guest::new(pae, false);
        let call = |guest: &mut Guest, quiet: &mut Quiet, eax, ebx, ecx| {
            let mut machine = Machine { quiet: Some(quiet), ..guest.machine() };
            machine.call(Call { eax, ebx, ecx, cpl: 0 })
        };
        let none = Outcome::Return(Status::UnknownHypercall, 0);
        assert_eq!(guest.call(4, MAP, SHOWN_BYTES), none, "not offered");

        let mut quiet = Quiet::default();
        let bad = Outcome::Return(Status::BadBuffer, 0);
        for (address, bytes) in [
            (MAP + 1, SHOWN_BYTES),
            (MAP, SHOWN_BYTES + 4),
            (FREE + FRAME as u32 - SHOWN_BYTES + 4, SHOWN_BYTES),
            ((ROM * FRAME) as u32, SHOWN_BYTES),
            ((DEVICE * FRAME) as u32, SHOWN_BYTES),
            (0xffff_ff80, SHOWN_BYTES),
        ] {
            assert_eq!(call(&mut guest, &mut quiet, 4, address, bytes), bad, "{address:#x}");
            assert_eq!(quiet, Quiet::default());
        }
        for frame in 0..MAPPED {
            let value = if frame < MEMORY { (frame * FRAME) | OPEN | DIRTY } else { 0 };
            let size = guest.size();
            guest.ram.put(2 * FRAME + frame * u64::from(size), size as usize, value);
        }
        guest.ram.put(MAP.into(), 8, u64::MAX);
        assert_eq!(call(&mut guest, &mut quiet, 4, MAP, SHOWN_BYTES), done);
        assert_eq!(guest.ram.read(MAP.into(), 8), Some(0));

        // In the page of the map, and elsewhere.
        let (all, some) = (FREE + 0x200, FREE + FRAME as u32);
        let map = |guest: &Guest| guest.ram.read(MAP.into(), 8).unwrap_or(0);
        let announce = [1, 2].map(|frame| frame_update(number::AllocatePage, frame));
        let flush = [frame_update(number::FlushTLB, 0)];
        let cr3 = Update::SetCR3(guest.registers.cr3);
        let end = [frame_update(number::ReleasePage, 2)];
        let lost = [guest.set(2 * FRAME as u32, OPEN)];
        let found = [guest.set(2 * FRAME as u32, 0)];
        let wrong = [frame_update(CallNumber(0), 0)];
        for (what, place, updates, is_quiet) in [
            ("there before", all, &[cr3][..], true),
            ("released", all, &end, false),
            ("not announced", all, &flush, false),
            ("announced", some, &announce, false),
            ("loaded elsewhere", some, &[cr3], false),
            ("loaded", all, &[cr3], true),
            ("again elsewhere", some, &flush, false),
            ("again", all, &flush, true),
            ("something missing", all, &lost, false),
            ("nothing missing", all, &found, true),
            ("refused", all, &wrong, false),
            ("refused before", all, &flush, false),
        ] {
            guest.put(place, updates);
            let _ = call(&mut guest, &mut quiet, 1, place, updates.len() as u32);
            assert_eq!(
                (quiet.now, map(&guest) & 6),
                (is_quiet, if is_quiet { 6 } else { 0 }),
                "{what}"
            );
            assert_eq!(map(&guest) & !6, 0, "{what}");
            let place = u64::from(MAP) + 4 * MAP_WORDS as u64;
            let directories = (place..).step_by(4).map(|place| guest.ram.read(place, 4));
            let shown = if is_quiet { [FRAME | PRESENT, 0, 0, 0] } else { [0; DIRECTORIES] };
            assert!(directories.take(DIRECTORIES).eq(shown.map(Some)), "{what}");
        }
    }
}

#[test]
fn what_was_there_before_is_told_until_the_guest_takes_it_back() {
    const MAP: u32 = FREE + 8;
    const PAGE: u32 = 8;
    let done = Outcome::Return(Status::Done, 0);
    for pae in [false, true] {
        let mut guest = Guest::new(pae, false);
        let mut quiet = Quiet::default();
        let call = |guest: &mut Guest, quiet: &mut Quiet, eax, ebx, ecx| {
            let mut machine = Machine { quiet: Some(quiet), ..guest.machine() };
            machine.call(Call { eax, ebx, ecx, cpl: 0 })
        };
        let read = crate::walk::Access::of_error(0);
        let linear = PAGE * FRAME as u32;
        let leads_to = |guest: &Guest| {
            let found = crate::shadow::machine::walk(&guest.shadow, linear, read);
            found.ok().map(|(address, _)| MEMORY - 1 - address / FRAME)
        };
        // A store without a word to a table that nobody announced.
        let store = |guest: &Guest, frame: u64| {
            let size = guest.size() as usize;
            let place = 2 * FRAME + u64::from(PAGE) * size as u64;
            guest.ram.put(place, size, (frame * FRAME) | OPEN | DIRTY);
        };
        assert!(!guest.shadow.is_announced(2));
        assert_eq!(call(&mut guest, &mut quiet, 4, MAP, SHOWN_BYTES), done);
        assert!(guest.shadow.is_announced(1) && guest.shadow.is_announced(2));
        let registers = guest.registers;
        let _ = guest.shadow.fault(&registers, &guest.ram, linear, 0);
        assert_eq!(leads_to(&guest), Some(u64::from(PAGE)));

        store(&guest, 9);
        assert_eq!(leads_to(&guest), Some(u64::from(PAGE)), "not told");
        quiet.now = true;
        assert_eq!(call(&mut guest, &mut quiet, 5, linear, 0), done);
        assert_eq!((leads_to(&guest), quiet.now), (Some(9), false), "asked about again");

        assert_eq!(call(&mut guest, &mut quiet, 4, MAP, 0), done);
        assert_eq!((quiet, leads_to(&guest)), (Quiet::default(), None));
        store(&guest, 10);
        let _ = guest.shadow.fault(&registers, &guest.ram, linear, 0);
        assert!(!guest.shadow.is_announced(2), "it is not told of any more");
        assert_eq!(leads_to(&guest), Some(10));
        let none = Outcome::Return(Status::UnknownHypercall, 0);
        assert_eq!(guest.call(5, linear, 0), none, "not offered");
    }
}

/// Memory at each address, full of zeroes.
struct Everywhere;

impl Memory for Everywhere {
    fn place(&self, frame: u64) -> Place {
        Place::Memory(frame * FRAME)
    }

    fn read(&self, _: u64, _: usize) -> Option<u64> {
        Some(0)
    }

    fn write(&self, _: u64, _: usize, _: u64) -> bool {
        true
    }
}

#[test]
fn a_buffer_ends_at_4_gib_even_where_memory_does_not() {
    let mut machine = Machine {
        shadow: None,
        registers: &mut registers(true, 0),
        memory: &Everywhere,
        is_hidden,
        limit: BATCH_LIMIT,
        counters: &mut { Counters::ZERO },
        quiet: None,
    };
    let mut call = |eax, ebx, ecx| machine.call(Call { eax, ebx, ecx, cpl: 0 });
    let bad = Outcome::Return(Status::BadBuffer, 0);
    let end = 0_u32.wrapping_sub(40);
    assert_eq!(call(1, end, 2), Outcome::Return(Status::BadCall, 0), "read");
    assert_eq!(call(1, end + 4, 2), bad);
    assert_eq!(call(2, end, 40), Outcome::Return(Status::Done, 40));
    assert_eq!(call(2, end, 48), bad);
    assert_eq!(call(3, end, 40), Outcome::Stop { address: end, bytes: 40 });
    assert_eq!(call(3, end, 41), bad);
}

#[test]
fn a_limit_of_one_is_one() {
    let mut guest = Guest::new(false, false);
    guest.put(FREE, &[frame_update(number::FlushTLB, 0); 2]);
    let mut machine = Machine { limit: 1, ..guest.machine() };
    let call = Call { eax: 1, ebx: FREE, ecx: 2, cpl: 0 };
    assert_eq!(machine.call(call), Outcome::Return(Status::TooLong, 0));
    assert_eq!(machine.call(Call { ecx: 1, ..call }), Outcome::Return(Status::Done, 1));
}

#[test]
fn counters_are_written_in_their_order_as_far_as_they_fit() {
    let values = std::array::from_fn(|i| 0x1111_1111_1111 * (i as u64 + 1));
    for bytes in 0..=size_of::<Counters>() as u32 + 16 {
        let mut guest = Guest::new(true, true);
        guest.counters = Counters::from_values(values);
        let fitting = bytes.min(size_of::<Counters>() as u32) / 8 * 8;
        assert_eq!(guest.call(2, FREE, bytes), Outcome::Return(Status::Done, fitting));
        let written = (0..40).map(|i| guest.ram.read(u64::from(FREE) + i * 8, 8).unwrap_or(0));
        let written: Vec<u64> = written.take_while(|&value| value != 0).collect();
        assert_eq!(written, values[..fitting as usize / 8]);
    }
}

#[test]
fn counters_that_are_written_over_a_page_table_are_followed() {
    let mut guest = Guest::new(true, false);
    let (registers, page) = (guest.registers, 40 * FRAME as u32);
    assert_eq!(
        guest.shadow.fault(&registers, &guest.ram, page, 0),
        crate::shadow::Resolution::Filled
    );
    assert!(
        crate::shadow::machine::walk(&guest.shadow, page, crate::walk::Access::of_error(0)).is_ok()
    );
    // Counters of 0 are entries that are not present.
    let entries = (2 * FRAME + 40 * 8) as u32;
    assert_eq!(guest.call(2, entries, 8), Outcome::Return(Status::Done, 8));
    assert!(
        crate::shadow::machine::walk(&guest.shadow, page, crate::walk::Access::of_error(0))
            .is_err()
    );
}

#[test]
fn without_paging_addresses_are_physical() {
    let mut guest = Guest::new(false, false);
    guest.registers.cr0 &= !CR0_PAGING;
    guest.shadow.load(&guest.registers, &guest.ram);
    let last = (MEMORY * FRAME) as u32 - 4;
    let updates = [Update::SetPxE(7, last, 0), Update::SetPxE(7, last + 4, 0)];
    assert_eq!(guest.machine().apply(updates), (Status::BadAddress, 1), "the ROM is not written");
    assert_eq!(guest.ram.read(last.into(), 4), Some(7));
}
