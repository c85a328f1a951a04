//! Hypercalls that must be refused, each with the status that the interface names.

#![expect(unsafe_code, reason = "UNSAFETY: buffers that the hypervisor reads and writes")]

use super::{DEVICE, HIDDEN, NOTHING, Random, Trial};
use crate::boot::PAGE_OFFSET;
use crate::checks::{place_user_code, run_user};
use crate::harness::Registers;
use crate::paging::{Mode, PAGE, TEST_AREA, USER_CODE, USER_STACK_TOP, physical};
use crate::processor;
use crate::segments::{USER_CODE as USER_CODE_SELECTOR, USER_DATA};
use crate::session::FIXED_FLAG;
use vmi_abi::number;
use vmi_hv_backend::reference::interface::{Counters, Hypercall, PHYSICAL, SHOWN_BYTES, Status};
use vmi_hv_backend::{CallNumber, Update};

const APPLY: u32 = Hypercall::Apply as u32;
const READ_COUNTERS: u32 = Hypercall::ReadCounters as u32;
const STOP: u32 = Hypercall::Stop as u32;
const BE_QUIET: u32 = Hypercall::BeQuiet as u32;
const RECONSIDER: u32 = Hypercall::Reconsider as u32;

/// Bytes of an update.
const UPDATE: u32 = size_of::<Update>() as u32;

/// The most bytes of a text.
const TEXT_LIMIT: u32 = 1024;

/// More than any hypervisor's limit for a batch.
const MOST: usize = 160;

/// Updates for the hypervisor to read, and behind them what it may not touch.
#[repr(C, align(4096))]
struct Buffer {
    updates: [Update; MOST],
    guard: [u32; 64],
}

const GUARD: u32 = 0x7e57_9a4d;

static mut BUFFER: Buffer = Buffer { updates: [Update::InvalPage(0); MOST], guard: [GUARD; 64] };

fn buffer() -> u32 {
    physical(&raw const BUFFER)
}

/// Writes an update into the buffer.
fn put(index: usize, update: Update) {
    assert!(index < MOST);
    // SAFETY: inside the buffer, which nobody reads now.
    unsafe { (&raw mut BUFFER.updates).cast::<Update>().add(index).write_volatile(update) };
}

/// Whether nobody wrote behind the updates.
fn is_guarded() -> bool {
    // SAFETY: the buffer, which nobody writes now.
    let guard = unsafe { (&raw const BUFFER.guard).read_volatile() };
    guard == [GUARD; 64]
}

fn status(value: i32) -> Option<Status> {
    Status::ALL.iter().copied().find(|status| *status as i32 == value)
}

impl Trial<'_> {
    /// A hypercall that must come to one of these.
    fn refused(&mut self, number: u32, ebx: u32, ecx: u32, wanted: &[Status]) -> Option<Status> {
        self.attempts.hypercalls += 1;
        let (eax, edx) = self.hypervisor.call(number, ebx, ecx);
        let found = status(eax);
        if !found.is_some_and(|found| wanted.contains(&found)) {
            self.problems.add(format_args!(
                "hypercall {number:#x} of {ebx:#x}, {ecx:#x} answers {eax}, must be {wanted:?}"
            ));
        } else if edx != 0 && found != Some(Status::Done) {
            self.problems.add(format_args!(
                "hypercall {number:#x} of {ebx:#x}, {ecx:#x} is refused with EDX {edx:#x}"
            ));
        }
        found
    }

    /// What a batch of so many comes to: nothing if there may be as many.
    fn too_long(&self, count: u32) -> Option<Status> {
        (count > self.hypervisor.batch_limit).then_some(Status::TooLong)
    }

    /// The buffer's first update must be refused, behind some that are not; the guest goes on.
    fn update_refused(&mut self, update: Update, wanted: &[Status]) {
        self.attempts.updates += 1;
        let before = self.random.next() % self.hypervisor.batch_limit.clamp(1, 4);
        for index in 0..before {
            put(index as usize, Update::InvalPage(TEST_AREA + PAGE * index));
        }
        put(before as usize, update);
        let count = before + 1;
        let (eax, edx) = self.hypervisor.call(APPLY, buffer(), count);
        let found = status(eax);
        let wanted = if self.too_long(count).is_some() { &[Status::TooLong] } else { wanted };
        let applied = match found {
            Some(Status::Done) => count,
            Some(Status::TooLong) => 0,
            _ => before,
        };
        if !found.is_some_and(|found| wanted.contains(&found)) || edx != applied {
            self.problems.add(format_args!(
                "{update}, at {before}, answers {eax} and EDX {edx}, must be {wanted:?}"
            ));
        }
    }
}

/// Addresses that are nobody's, or nobody's to know.
fn foreign(random: &mut Random) -> u32 {
    let range = [HIDDEN, NOTHING, DEVICE][random.next() as usize % 3].clone();
    random.within(range)
}

/// Numbers, pointers and lengths.
pub(super) fn malformed(trial: &mut Trial<'_>) {
    // Numbers that do not exist.
    let powers = (2..32).flat_map(|bit| [1 << bit, (1 << bit) - 1, (1 << bit) + 1]);
    let edges = [0, u32::MAX, 0x8000_0001, 0x8000_0002, 0x8000_0003];
    for number in (4..64).chain(powers).chain(edges) {
        if Hypercall::of(number).is_none() {
            let (ebx, ecx) = (trial.random.next(), trial.random.next());
            trial.refused(number, ebx, ecx, &[Status::UnknownHypercall]);
        }
    }
    for _ in 0..100 {
        let number = trial.random.next() | 4;
        trial.refused(number, buffer(), 1, &[Status::UnknownHypercall]);
    }
    for index in 0..MOST {
        put(index, Update::InvalPage(TEST_AREA));
    }
    // Buffers that are not the guest's, or not aligned.
    let edges = [
        HIDDEN.start,
        HIDDEN.start - 4,
        HIDDEN.start - UPDATE + 4,
        HIDDEN.end - 4,
        HIDDEN.end - UPDATE,
        NOTHING.start,
        DEVICE.start,
        DEVICE.end - UPDATE,
        !3,
        !3 - UPDATE + 8,
        0xffff_f000,
        0xfee0_0000,
        0x8000_0000,
    ];
    let refused = |trial: &mut Trial<'_>, number: u32, ebx: u32, ecx: u32| {
        let limit = if number == APPLY { trial.hypervisor.batch_limit } else { TEXT_LIMIT };
        let too_long = number != READ_COUNTERS && ecx > limit;
        let wanted = if too_long { Status::TooLong } else { Status::BadBuffer };
        trial.refused(number, ebx, ecx, &[wanted]);
    };
    for address in edges {
        refused(trial, APPLY, address, 1);
        refused(trial, READ_COUNTERS, address & !7, size_of::<Counters>() as u32);
        refused(trial, READ_COUNTERS, address & !7, u32::MAX);
        refused(trial, STOP, address, UPDATE + 4);
    }
    for _ in 0..100 {
        let address = foreign(&mut trial.random);
        refused(trial, APPLY, address & !3, 1);
        refused(trial, READ_COUNTERS, address & !7, 8);
        refused(trial, STOP, address, 1);
    }
    for offset in [1, 2, 3, 5, 6, 7, 9, 4095] {
        refused(trial, APPLY, buffer() + offset, 1);
        refused(trial, READ_COUNTERS, buffer() + offset, 8);
    }
    // A map that is not the guest's memory, or in two pages, or of another size. With nested paging there is none.
    let no_map = [Status::BadBuffer, Status::UnknownHypercall];
    for address in edges.into_iter().chain([1, 2, PAGE - SHOWN_BYTES + 4].map(|by| buffer() + by)) {
        trial.refused(BE_QUIET, address, SHOWN_BYTES, &no_map);
    }
    for bytes in [1, SHOWN_BYTES - 4, SHOWN_BYTES + 4, PAGE, u32::MAX] {
        trial.refused(BE_QUIET, buffer(), bytes, &no_map);
    }
    // A range that begins in the guest's memory and runs into what is not, or round the end.
    for length in [0x200, 0x400] {
        refused(trial, STOP, HIDDEN.start - 0x100, length);
        refused(trial, STOP, u32::MAX - 0x10, length);
    }
    // Lengths.
    for bit in 0..32 {
        for count in [1_u32 << bit, (1_u32 << bit).wrapping_mul(3), u32::MAX >> bit] {
            if let Some(status) = trial.too_long(count) {
                trial.refused(APPLY, buffer(), count, &[status]);
            }
            if count > TEXT_LIMIT {
                trial.refused(STOP, buffer(), count, &[Status::TooLong]);
            }
        }
    }
    // So many updates that their bytes come round to few.
    for count in [u32::MAX / UPDATE + 1, u32::MAX / UPDATE + 2, 0x4000_0000, 0x8000_0000] {
        trial.refused(APPLY, buffer(), count, &[Status::TooLong]);
    }
    trial.refused(APPLY, buffer(), trial.hypervisor.batch_limit + 1, &[Status::TooLong]);
    // Counters that do not fit: no byte too many.
    let start = buffer();
    for bytes in (0..64).chain([159, 161, 4096, u32::MAX]) {
        trial.attempts.hypercalls += 1;
        let words = (&raw mut BUFFER).cast::<u64>();
        // SAFETY: the buffer's own words.
        (0..32).for_each(|index| unsafe { words.add(index).write_volatile(u64::MAX) });
        let (eax, edx) = trial.hypervisor.call(READ_COUNTERS, start, bytes);
        let fitting = bytes.min(size_of::<Counters>() as u32) / 8 * 8;
        // SAFETY: as above.
        let written =
            (0..32).filter(|index| unsafe { words.add(*index).read_volatile() } != u64::MAX);
        let end = written.max().map_or(0, |index| (index + 1) * 8) as u32;
        if eax != Status::Done as i32 || edx != fitting || end > fitting {
            trial.problems.add(format_args!(
                "ReadCounters into {bytes} bytes answers {eax}, EDX {edx}, writes {end}"
            ));
        }
    }
    // Any numbers at all, but those that would do what they say.
    for _ in 0..400 {
        let (number, ecx) =
            (trial.random.next() % 8, trial.random.next() >> (trial.random.next() % 32));
        let ebx = foreign(&mut trial.random);
        let all = [Status::UnknownHypercall, Status::BadBuffer, Status::TooLong];
        let nothing = ecx == 0 || number == READ_COUNTERS && ecx < 8;
        if number == RECONSIDER {
            // Any linear address will do.
            let _ = trial.hypervisor.call(number, ebx, ecx);
        } else if !nothing {
            trial.refused(number, ebx, ecx, &all);
        }
    }
    if !is_guarded() {
        trial.problems.add(format_args!("memory behind a buffer was written"));
    }
}

/// The same instruction outside of ring 0.
pub(super) fn from_ring_3(trial: &mut Trial<'_>) {
    const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
    const COME_BACK: [u8; 2] = crate::checks::COME_BACK;
    let frame = [
        USER_CODE,
        u32::from(USER_CODE_SELECTOR),
        FIXED_FLAG,
        USER_STACK_TOP,
        u32::from(USER_DATA),
    ];
    let mut code = [0; VMMCALL.len() + COME_BACK.len()];
    code[..VMMCALL.len()].copy_from_slice(&VMMCALL);
    code[VMMCALL.len()..].copy_from_slice(&COME_BACK);
    place_user_code(&code);
    put(0, Update::InvalPage(TEST_AREA));
    for index in 0..150 {
        // What ring 0 may do, and what nobody may.
        let (eax, ebx, ecx) = match index % 5 {
            0 => (APPLY, buffer(), 1),
            1 => (READ_COUNTERS, buffer(), 64),
            2 => (STOP, buffer(), 16),
            3 => (trial.random.next() % 4, foreign(&mut trial.random), 1),
            _ => (trial.random.next(), trial.random.next(), trial.random.next()),
        };
        trial.attempts.from_ring_3 += 1;
        let outcome = run_user(Registers { eax, ebx, ecx, ..Registers::default() }, &frame);
        let found = outcome.after.registers.eax as i32;
        if found != Status::NotPrivileged as i32 {
            trial.problems.add(format_args!(
                "in ring 3 hypercall {eax:#x} of {ebx:#x}, {ecx:#x} comes to {found}, {:?}",
                outcome.trap.map(|trap| trap.frame.vector)
            ));
        }
    }
}

/// Updates with each field hostile.
pub(super) fn updates(trial: &mut Trial<'_>) {
    let mode = trial.space.mode;
    let raw = |call: u32, address: u32, low: u32, high: u32, flags: u32| Update {
        call: CallNumber(call),
        address,
        low,
        high,
        flags,
    };
    let known = [
        number::SetPxE,
        number::SetPxELong,
        number::UpdatePxE,
        number::UpdatePxELong,
        number::AllocatePage,
        number::ReleasePage,
        number::InvalPage,
        number::FlushTLB,
        number::SetCR3,
    ];
    // Calls that are no updates.
    let random: [u32; 100] = core::array::from_fn(|_| trial.random.next());
    for call in (0..96).chain(random).chain([u32::MAX, 0x8000_0026, 0x8000_0000]) {
        if !known.contains(&CallNumber(call)) {
            let [address, low, high, flags] = [0; 4].map(|_| trial.random.next());
            trial.update_refused(raw(call, address, low, high, flags), &[Status::BadCall]);
        }
    }
    let stores = [number::SetPxE, number::SetPxELong, number::UpdatePxE, number::UpdatePxELong];
    // Two values, and flags by which an address is a linear one.
    let linear = |random: &mut Random| {
        let [low, high, flags] = [0; 3].map(|_| random.next());
        [low, high, flags & !PHYSICAL]
    };
    // Addresses without memory, or that are not aligned.
    let entry = trial.space.entry(TEST_AREA);
    let unmapped =
        [0, 0x1000, TEST_AREA + PAGE * 7, 0xffff_fff8, 0x8000_0000, HIDDEN.start, 0xf000_0000];
    for call in stores {
        let size = if [number::SetPxE, number::UpdatePxE].contains(&call) { 4 } else { 8 };
        for address in unmapped {
            let [low, high, flags] = linear(&mut trial.random);
            trial.update_refused(raw(call.0, address, low, high, flags), &[Status::BadAddress]);
        }
        for offset in 1..size {
            let flags = trial.random.next();
            trial.update_refused(raw(call.0, entry + offset, 0, 0, flags), &[Status::BadAddress]);
        }
        for _ in 0..30 {
            let address = trial.random.next();
            let [low, high, flags] = linear(&mut trial.random);
            // Nothing is mapped there: ring 3's pages are below, the kernel is above.
            let address = address % (PAGE_OFFSET - HIDDEN.start) + HIDDEN.start;
            trial
                .update_refused(raw(call.0, address & !7, low, high, flags), &[Status::BadAddress]);
        }
        // The screen is mapped, and no memory.
        let screen = PAGE_OFFSET + DEVICE.end - 0x8000;
        trial.update_refused(raw(call.0, screen, 0, 0, 0), &[Status::BadAddress]);
    }
    // Physical addresses that are not the guest's memory, and some that are: nothing is told of those.
    for call in [number::UpdatePxE, number::UpdatePxELong] {
        for index in 0..60 {
            let range = [HIDDEN, NOTHING, DEVICE][index % 3].clone();
            let address = trial.random.within(range) & !7;
            let [low, high, flags] = [0; 3].map(|_| trial.random.next());
            let update = raw(call.0, address, low, high, flags | PHYSICAL);
            trial.update_refused(update, &[Status::BadAddress]);
            let own = trial.random.within(0..0x9_0000) & !7;
            let update = raw(call.0, own, low, high, flags | PHYSICAL);
            trial.update_refused(update, &[Status::Done]);
            let misaligned = raw(call.0, own | 2, low, high, flags | PHYSICAL);
            trial.update_refused(misaligned, &[Status::BadAddress]);
        }
    }
    // Frames that are not the guest's memory.
    for call in [number::AllocatePage, number::ReleasePage] {
        let edges = [HIDDEN.start, HIDDEN.end - PAGE, NOTHING.start, DEVICE.start]
            .map(|address| address / PAGE);
        let random: [u32; 40] = core::array::from_fn(|index| match index % 3 {
            0 => trial.random.within(HIDDEN) / PAGE,
            1 => trial.random.within(NOTHING) / PAGE,
            // No processor of 32 bits knows such frames.
            _ => trial.random.next() | 0x8000_0000,
        });
        for frame in edges.into_iter().chain(random).chain([u32::MAX]) {
            let [low, high, flags] = [0; 3].map(|_| trial.random.next());
            trial.update_refused(raw(call.0, frame, low, high, flags), &[Status::BadAddress]);
        }
    }
    // Spaces whose top level is not the guest's.
    let own = processor::cr3();
    for _ in 0..60 {
        let root = foreign(&mut trial.random);
        let [address, high, flags] = [0; 3].map(|_| trial.random.next());
        let refused = [Status::BadValue, Status::BadAddress];
        trial.update_refused(raw(number::SetCR3.0, address, root, high, flags), &refused);
    }
    if processor::cr3() != own {
        trial.problems.add(format_args!("CR3 is {:#x}, must be {own:#x}", processor::cr3()));
    }
    // Values that lead to what is hidden: refused, or harmless.
    for _ in 0..150 {
        let bits = trial.random.next() & 0xe7f;
        let low = trial.random.frame(HIDDEN) | bits | 1;
        let update = match mode {
            Mode::NonPae => raw(number::SetPxE.0, entry, low, 0, 0),
            Mode::Pae => raw(number::SetPxELong.0, entry, low, 0, 0),
        };
        trial.update_refused(update, &[Status::BadValue, Status::Done]);
        super::tables::shows_nothing(trial, TEST_AREA, "an update leads");
    }
    // Reserved bits.
    if mode == Mode::Pae {
        for bit in 20..31 {
            trial.space.store(entry, 0);
            let update = raw(number::SetPxELong.0, entry, 0x10_0000 | 0x63, 1 << bit, 0);
            trial.update_refused(update, &[Status::BadValue, Status::Done]);
            processor::invlpg(TEST_AREA);
            if let Ok(word) = crate::checks::read(TEST_AREA) {
                trial
                    .problems
                    .add(format_args!("with bit {} set the page shows {word:#x}", bit + 32));
            }
        }
    }
    trial.space.store(entry, 0);
    processor::invlpg(TEST_AREA);
}
