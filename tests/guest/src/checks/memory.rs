//! Page tables and the translation caches.

#![expect(non_snake_case, reason = "the specification's names")]
#![expect(unsafe_code, reason = "UNSAFETY: memory that page tables map and calls write")]

use super::{read, run_own};
use crate::harness::{Outcome, Registers};
use crate::paging::{
    self, ACCESSED, DIRTY, GLOBAL, Mode, NO_EXECUTE, PAGE, PRESENT, Space, TEST_AREA, TEST_FRAMES,
    WRITE, has_global_pages, has_no_execute,
};
use crate::session::{Arguments, Session};
use crate::traps;
use crate::{host, processor};
use core::arch::naked_asm;
use spin::Mutex;
use vmi_abi::flags::{EntryFlags, FlushFlags, LazyMode, PageFlags};
use x86::controlregs::Cr4;

/// What the first word of each test frame holds.
const MARKS: [u32; 2] = [0x1234_5678, 0x9abc_def0];

/// Physical address of a test frame.
fn frame(index: usize) -> u32 {
    paging::physical((&raw const TEST_FRAMES).cast::<paging::Frame>().wrapping_add(index))
}

/// Writes a mark into each test frame.
pub(super) fn mark_frames() {
    for (index, mark) in MARKS.into_iter().enumerate() {
        let word = (&raw mut TEST_FRAMES).cast::<paging::Frame>().wrapping_add(index).cast::<u32>();
        // SAFETY: the frame belongs to the tests.
        unsafe { word.write_volatile(mark) };
    }
}

/// The entry that maps [`TEST_AREA`], emptied.
fn empty_entry(s: &Session) -> u32 {
    let entry = s.space.entry(TEST_AREA);
    s.space.store(entry, 0);
    processor::invlpg(TEST_AREA);
    entry
}

/// The call flags of an entry of the lowest level that maps [`TEST_AREA`] now.
const CURRENT: u32 = EntryFlags::PT.bits() | EntryFlags::CURRENT_AS.bits() | TEST_AREA;

/// Memory beside which nothing may change.
#[repr(C, align(64))]
struct Words([u32; 8]);

static mut WORDS: Words = Words([0; 8]);

pub(super) fn words() -> *mut u32 {
    (&raw mut WORDS).cast()
}

fn word(index: usize) -> u32 {
    // SAFETY: callers stay below eight.
    unsafe { words().add(index).read_volatile() }
}

pub(super) fn fill_words(s: &mut Session) -> [u32; 8] {
    core::array::from_fn(|index| {
        let value = s.random();
        // SAFETY: inside the array.
        unsafe { words().add(index).write_volatile(value) };
        value
    })
}

/// Checks that the words are what they were, but for some that were replaced.
pub(super) fn words_are(s: &mut Session, wanted: &[u32; 8]) {
    for (index, wanted) in wanted.iter().enumerate() {
        s.expect(
            word(index) == *wanted,
            format_args!(
                "word {index} around the entry is {:#x}, must be {wanted:#x}",
                word(index)
            ),
        );
    }
}

/// Checks what is seen at [`TEST_AREA`].
fn sees(s: &mut Session, index: usize, when: &str) {
    match read(TEST_AREA) {
        Ok(found) => s.expect(
            found == MARKS[index],
            format_args!("{when} the page shows {found:#x}, must show {:#x}", MARKS[index]),
        ),
        Err(trap) => s.expect(
            false,
            format_args!("{when} the page faults with error {:#x}", trap.frame.error),
        ),
    }
}

/// Checks that nothing is mapped at [`TEST_AREA`].
fn sees_nothing(s: &mut Session, when: &str) {
    let trap = read(TEST_AREA).err();
    let fault = trap.map(|trap| (trap.frame.vector, trap.address));
    s.expect(
        fault == Some((traps::PAGE_FAULT, TEST_AREA)),
        format_args!("{when} reading raised {fault:x?}, not a page fault"),
    );
}

/// The flags of calls that store or announce an entry.
const FLAGS: [u32; 4] = [
    EntryFlags::PT.bits(),
    CURRENT,
    EntryFlags::PT.bits() | EntryFlags::DEFER.bits(),
    // Linux passes a wrong level at times: nothing but the entry counts.
    EntryFlags::PD.bits(),
];

pub(crate) fn SetPxE(s: &mut Session) {
    stores_short(s, &FLAGS, |s, value, entry, flags| {
        s.call(Arguments::NONE.eax(value).edx(entry).ecx(flags));
    });
}

/// A call that stores a 32-bit entry: called with the value, the entry and each of these flags.
pub(super) fn stores_short(
    s: &mut Session,
    flags: &[u32],
    set: impl Fn(&mut Session, u32, u32, u32) + Copy,
) {
    mark_frames();
    s.each(|s| {
        for flags in flags {
            let mut wanted = fill_words(s);
            wanted[3] = s.random();
            let entry = words().wrapping_add(3) as u32;
            set(s, wanted[3], entry, *flags);
            words_are(s, &wanted);
        }
        if s.space.mode == Mode::NonPae {
            let entry = empty_entry(s);
            sees_nothing(s, "before the call");
            for index in [0, 1] {
                let value = s.space.make(frame(index), WRITE) as u32;
                set(s, value, entry, CURRENT);
                processor::invlpg(TEST_AREA);
                sees(s, index, "after the call");
            }
            set(s, 0, entry, CURRENT);
            processor::invlpg(TEST_AREA);
            sees_nothing(s, "after the entry was cleared");
        }
        faults_and_goes_on(s, |s, address, value| set(s, value, address, EntryFlags::PT.bits()));
    });
}

/// A call that touches a page that is not there yet: the fault is the guest's to serve, and the
/// call goes on where it was.
fn faults_and_goes_on(s: &mut Session, call: impl FnOnce(&mut Session, u32, u32)) {
    empty_entry(s);
    s.demand = Some((TEST_AREA..TEST_AREA + PAGE, map_test_page));
    let value = s.random();
    let address = TEST_AREA + 0x100;
    call(s, address, value);
    s.demand = None;
    let stored = read(address).ok();
    s.expect(
        stored == Some(value),
        format_args!(
            "after a page fault in the call memory holds {stored:x?}, must hold {value:#x}"
        ),
    );
    empty_entry(s);
}

/// Serves a page fault on [`TEST_AREA`].
fn map_test_page(_address: u32) {
    let pae = processor::cr4() & Cr4::CR4_ENABLE_PAE.bits() as u32 != 0;
    let space = Space::current(if pae { Mode::Pae } else { Mode::NonPae });
    space.store(space.entry(TEST_AREA), space.make(frame(0), WRITE));
}

/// A 64-bit entry that is looked at between any two instructions of a call.
struct Watched {
    address: u32,
    values: [u64; 2],
    torn: Option<u64>,
}

static WATCHED: Mutex<Watched> = Mutex::new(Watched { address: 0, values: [0; 2], torn: None });

fn look_at_entry() {
    let mut watched = WATCHED.lock();
    // SAFETY: the entry lies in mapped memory.
    let found = unsafe { (watched.address as *const u64).read_volatile() };
    if !watched.values.contains(&found) {
        watched.torn = Some(found);
    }
}

/// Calls, and in a traced run looks at a 64-bit entry meanwhile: nobody may see half of the new value.
fn not_torn(s: &mut Session, value: u64, entry: u32, call: impl FnOnce(&mut Session)) {
    // In a table that is in use a host has machine frames.
    let value = if paging::is_table(entry) { s.space.in_use(value) } else { value };
    // SAFETY: callers name mapped memory.
    let old = unsafe { (entry as *const u64).read_volatile() };
    *WATCHED.lock() = Watched { address: entry, values: [old, value], torn: None };
    s.watch = Some(look_at_entry);
    call(s);
    s.watch = None;
    let torn = WATCHED.lock().torn.take();
    s.expect(
        torn.is_none(),
        format_args!("between {old:#x} and {value:#x} the entry was {torn:x?}: torn"),
    );
}

/// A 64-bit value for a call that takes it in EDX:EAX and the entry in ECX.
pub(super) fn long_arguments(value: u64, entry: u32) -> Arguments {
    Arguments::NONE.eax(value as u32).edx((value >> 32) as u32).ecx(entry)
}

pub(crate) fn SetPxELong(s: &mut Session) {
    stores_long(s, &FLAGS, |s, value, entry, flags| {
        s.call(long_arguments(value, entry).stack(&[flags]));
    });
}

/// A call that stores a 64-bit entry: called with the value, the entry and each of these flags.
pub(super) fn stores_long(
    s: &mut Session,
    flags: &[u32],
    call: impl Fn(&mut Session, u64, u32, u32) + Copy,
) {
    if lacks_long_entries(s) {
        return;
    }
    let set = |s: &mut Session, value, entry, flags| {
        not_torn(s, value, entry, |s| call(s, value, entry, flags));
    };
    mark_frames();
    s.each(|s| {
        for flags in flags {
            let mut wanted = fill_words(s);
            (wanted[2], wanted[3]) = (s.random() | 1, s.random());
            let entry = words().wrapping_add(2) as u32;
            set(s, u64::from(wanted[3]) << 32 | u64::from(wanted[2]), entry, *flags);
            words_are(s, &wanted);
        }
        if s.space.mode == Mode::Pae {
            let entry = empty_entry(s);
            sees_nothing(s, "before the call");
            for index in [0, 1] {
                set(s, s.space.make(frame(index), WRITE | NO_EXECUTE), entry, CURRENT);
                processor::invlpg(TEST_AREA);
                sees(s, index, "after the call");
            }
            if has_no_execute() {
                is_not_executable(s);
            }
            set(s, 0, entry, CURRENT);
            processor::invlpg(TEST_AREA);
            sees_nothing(s, "after the entry was cleared");
        }
    });
}

/// Whether the processor has no way to store 64 bits at once; the call is not tried then.
pub(super) fn lacks_long_entries(s: &mut Session) -> bool {
    let lacks = !processor::has_cmpxchg8b();
    if lacks {
        s.skipped = Some("the processor has no CMPXCHG8B, and kernels do not use PAE on it");
    }
    lacks
}

/// Jumps to EAX.
#[unsafe(naked)]
unsafe extern "C" fn jump_to_eax() {
    naked_asm!("jmp eax")
}

fn is_not_executable(s: &mut Session) {
    const FETCH: u32 = 1 << 4;
    let outcome = run_own(jump_to_eax, Registers { eax: TEST_AREA, ..Registers::default() }, &[]);
    let fault = outcome.trap.map(|trap| (trap.frame.vector, trap.frame.error & FETCH));
    s.expect(
        fault == Some((traps::PAGE_FAULT, FETCH)),
        format_args!("executing a page that is not executable raised {fault:x?}"),
    );
}

/// The guest has written the entry; the call tells so, and changes nothing itself.
fn update(s: &mut Session, mode: Mode) {
    mark_frames();
    s.each(|s| {
        for flags in FLAGS {
            let wanted = fill_words(s);
            s.call(Arguments::NONE.eax(words().wrapping_add(2) as u32).edx(flags));
            words_are(s, &wanted);
        }
        if s.space.mode == mode {
            let entry = empty_entry(s);
            for index in [0, 1] {
                s.space.store(entry, s.space.make(frame(index), WRITE | ACCESSED | DIRTY));
                s.call(Arguments::NONE.eax(entry).edx(CURRENT));
                processor::invlpg(TEST_AREA);
                sees(s, index, "after the call");
            }
            empty_entry(s);
        }
    });
}

pub(crate) fn UpdatePxE(s: &mut Session) {
    update(s, Mode::NonPae);
}

pub(crate) fn UpdatePxELong(s: &mut Session) {
    update(s, Mode::Pae);
}

/// Frames all over the guest's memory, the ROM's among them.
const FRAMES: [u32; 4] = [0, 0x9f, 0xca, 0xfff];

/// On a host the tables themselves show which machine frame the guest has for one of its own: the call under test is to say the same, or the
/// reverse.
fn translate_on_a_host(s: &mut Session, to_machine: bool) {
    s.each(|s| {
        for frame in FRAMES {
            let machine = s.space.machine_frame(crate::boot::PAGE_OFFSET + frame * PAGE);
            let (given, wanted) = if to_machine { (frame, machine) } else { (machine, frame) };
            let Outcome { after, .. } = s.call(Arguments::NONE.eax(given));
            s.expect(
                after.registers.eax == wanted,
                format_args!("frame {given:#x} became {:#x}, not {wanted:#x}", after.registers.eax),
            );
        }
    });
}

/// The two translations undo each other; the call under test is one of them, the other is asked for too.
fn translate(s: &mut Session, other: vmi_abi::CallNumber) {
    if host::is_hosted() {
        return translate_on_a_host(s, other == vmi_abi::number::MachineToPhysical);
    }
    s.each(|s| {
        for frame in FRAMES {
            let Outcome { after, .. } = s.call(Arguments::NONE.eax(frame));
            let there = after.registers.eax;
            let answer = s.rom.answer(other.0);
            let back = if answer.kind == vmi_abi::RelocationType::CALL_REL {
                // SAFETY: the ROM's own code, called as its contract says.
                let routine = unsafe {
                    core::mem::transmute::<usize, unsafe extern "C" fn()>(answer.eip.get() as usize)
                };
                run_own(routine, Registers { eax: there, ..Registers::default() }, &[])
                    .after
                    .registers
                    .eax
            } else {
                there
            };
            s.expect(
                back == frame,
                format_args!("frame {frame:#x} became {there:#x} and then {back:#x}"),
            );
        }
    });
}

pub(crate) fn MachineToPhysical(s: &mut Session) {
    translate(s, vmi_abi::number::PhysicalToMachine);
}

pub(crate) fn PhysicalToMachine(s: &mut Session) {
    translate(s, vmi_abi::number::MachineToPhysical);
}

/// What a page is announced as.
fn page_flags(s: &Session) -> u32 {
    PageFlags::PT.bits() | if s.space.mode == Mode::Pae { pae_flag(s) } else { 0 }
}

/// What says in the client's revision that entries have 64 bits.
fn pae_flag(s: &Session) -> u32 {
    if s.rom.client.revision().has_slots() { PageFlags::PAE_13 } else { PageFlags::PAE.bits() }
}

/// Checks that a test frame was left alone.
fn frames_keep_their_marks(s: &mut Session) {
    for (index, mark) in MARKS.into_iter().enumerate() {
        let linear = (&raw const TEST_FRAMES) as u32 + index as u32 * PAGE;
        let found = read(linear).ok();
        s.expect(
            found == Some(mark),
            format_args!("the announced page holds {found:x?}, must hold {mark:#x}"),
        );
    }
}

pub(crate) fn AllocatePage(s: &mut Session) {
    mark_frames();
    s.each(|s| {
        let plain = page_flags(s);
        let clone = PageFlags::PD.bits() | PageFlags::CLONE.bits() | plain & pae_flag(s);
        for (flags, source, start, count) in [(plain, 0, 0, 0), (clone, frame(1) / PAGE, 768, 256)]
        {
            s.call(
                Arguments::NONE.eax(frame(0) / PAGE).edx(flags).ecx(source).stack(&[start, count]),
            );
            frames_keep_their_marks(s);
            if host::is_hosted() {
                is_read_only(s, true);
                host::release_page(frame(0) / PAGE, flags);
                is_read_only(s, false);
            }
        }
    });
}

/// Writes EDX to [EAX].
#[unsafe(naked)]
unsafe extern "C" fn write_word() {
    naked_asm!("mov [eax], edx", "ret")
}

/// Checks whether the announced page can be written to.
fn is_read_only(s: &mut Session, wanted: bool) {
    let eax = (&raw const TEST_FRAMES) as u32;
    let outcome =
        run_own(write_word, Registers { eax, edx: MARKS[0], ..Registers::default() }, &[]);
    let fault = outcome.trap.map(|trap| (trap.frame.vector, trap.address));
    let expected = wanted.then_some((traps::PAGE_FAULT, eax));
    s.expect(
        fault == expected,
        format_args!("a write to the page raised {fault:x?}, must raise {expected:x?}"),
    );
}

pub(crate) fn ReleasePage(s: &mut Session) {
    mark_frames();
    s.each(|s| {
        if host::is_hosted() {
            host::announce_page(frame(0) / PAGE, page_flags(s));
            is_read_only(s, true);
        }
        s.call(Arguments::NONE.eax(frame(0) / PAGE).edx(page_flags(s)));
        frames_keep_their_marks(s);
        is_read_only(s, false);
    });
}

/// Makes the processor remember a mapping that its tables no longer hold.
fn make_stale(s: &mut Session, bits: u64) {
    let entry = empty_entry(s);
    s.space.store(entry, s.space.make(frame(0), WRITE | bits));
    sees(s, 0, "before the change");
    s.space.store(entry, s.space.make(frame(1), WRITE | bits));
}

pub(crate) fn InvalPage(s: &mut Session) {
    mark_frames();
    s.each(|s| {
        for bits in [0, GLOBAL] {
            make_stale(s, bits);
            s.call(Arguments::NONE.eax(TEST_AREA));
            sees(s, 1, "after the call");
        }
        empty_entry(s);
    });
}

pub(crate) fn FlushTLB(s: &mut Session) {
    mark_frames();
    s.each(|s| {
        let (tlb, global) = (FlushFlags::TLB.bits(), FlushFlags::GLOBAL.bits());
        let global_bit = if has_global_pages() { GLOBAL } else { 0 };
        for (flags, bits) in
            [(tlb, 0), (global, 0), (global, global_bit), (tlb | global, global_bit)]
        {
            let (cr3, cr4) = (processor::cr3(), processor::cr4());
            make_stale(s, bits);
            s.call(Arguments::NONE.eax(flags));
            sees(s, 1, "after the call");
            s.equal("CR3", processor::cr3(), cr3);
            s.equal("CR4", processor::cr4(), cr4);
        }
        empty_entry(s);
    });
}

pub(crate) fn SetCR3(s: &mut Session) {
    mark_frames();
    let own = s.space.cr3();
    let other = s.space.other_root(s.rom.virtual_top());
    s.each(|s| {
        for root in [other, own] {
            make_stale(s, 0);
            s.call(Arguments::NONE.eax(root));
            s.equal("CR3", processor::cr3(), root);
            sees(s, 1, "after the call");
        }
        processor::set_cr3(own);
        empty_entry(s);
    });
}

pub(crate) fn SetLinearMapping(s: &mut Session) {
    s.each(|s| {
        let wanted = fill_words(s);
        s.call(Arguments::NONE.eax(0).edx(crate::boot::PAGE_OFFSET).ecx(4096).stack(&[0]));
        s.call(Arguments::NONE.eax(1).edx(TEST_AREA).ecx(1).stack(&[frame(0) / PAGE]));
        words_are(s, &wanted);
        // Who has named its memory tells of all that it changes in its tables, and these checks do not.
        s.call(Arguments::NONE.eax(0).edx(crate::boot::PAGE_OFFSET).ecx(0).stack(&[0]));
        words_are(s, &wanted);
    });
}

pub(crate) fn SetLazyMode(s: &mut Session) {
    mark_frames();
    s.each(|s| {
        // Lazy modes exclude each other, and 0 to 1 can come twice.
        for mode in [
            LazyMode::MMU,
            LazyMode::MMU,
            LazyMode::OFF,
            LazyMode::CPU,
            LazyMode::OFF,
            LazyMode::OFF,
        ] {
            s.call(Arguments::NONE.eax(mode.0));
        }
        s.call(Arguments::NONE.eax(LazyMode::MMU.0));
        ends_a_delay(s, LazyMode::OFF.0);
    });
}

/// A call after which everything is visible that was written before; `eax` is its argument.
pub(super) fn ends_a_delay(s: &mut Session, eax: u32) {
    let entry = empty_entry(s);
    s.space.store(entry, s.space.make(frame(1), WRITE));
    s.call(Arguments::NONE.eax(eax));
    sees(s, 1, "after the call");
    empty_entry(s);
}

/// Tries a call that changes whether [`TEST_AREA`] is mapped, on the entry that maps it.
pub(super) fn on_a_live_entry(
    s: &mut Session,
    mode: Mode,
    maps: bool,
    call: impl FnOnce(&mut Session, u32),
) {
    if s.space.mode != mode {
        return;
    }
    mark_frames();
    let entry = empty_entry(s);
    let present = s.space.make(frame(0), WRITE);
    s.space.store(entry, if maps { present & !PRESENT } else { present });
    call(s, entry);
    processor::invlpg(TEST_AREA);
    if maps {
        sees(s, 0, "after the call");
    } else {
        sees_nothing(s, "after the call");
    }
    empty_entry(s);
}
