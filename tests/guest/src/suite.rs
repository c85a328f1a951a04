//! The order of things: both paging modes, the ROM's three places, every call.
//!
//! Memory outlives a reset. A record in it tells a guest that starts again what went before: a
//! reset that was asked for is Reboot's test, any other is the failure of the call that was under
//! test.

#![expect(unsafe_code, reason = "UNSAFETY: the record lies at a fixed place in memory")]

use crate::boot::PAGE_OFFSET;
use crate::client::Client;
use crate::console::line;
use crate::hostile::{self, Attempts};
use crate::paging::{self, Mode, Space};
use crate::report::{self, Problems, Report};
use crate::rom::{self, Rom};
use crate::session::Session;
use crate::site::{self, FILLERS, Place, Rewriting};
use crate::traps;
use crate::{
    checks, command_line, console, costs, crowd, devices, fate, functions, host, segments,
    workload, xen,
};
use vmi_abi::flags::RebootKind;
use vmi_abi::header::checksum;
use vmi_abi::probe::{Refusal, license};
use vmi_abi::{Call, CallNumber, RelocationType, Revision, number};

/// What is remembered across a reset.
#[derive(Clone, Copy)]
#[repr(C)]
struct Record {
    magic: u32,
    phase: u32,
    points: u32,
    failures: u32,
    number: u32,
    mode: u32,
    place: u32,
    check: u32,
}

const MAGIC: u32 = u32::from_le_bytes(*b"vmi?");

/// Phases: calls under test; a soft and a hard reset asked for.
const TESTING: u32 = 0;
const SOFT_RESET: u32 = 1;
const HARD_RESET: u32 = 2;

/// The record's physical address: above the guest's image, and below what a BIOS keeps at the end of
/// memory, even of 16 MiB.
const RECORD: u32 = 0x80_0000;

impl Record {
    fn new(phase: u32, report: &Report, number: u32, mode: usize, place: rom::Place) -> Self {
        let (points, failures) = (report.points(), report.failures());
        let place = rom::Place::ALL.iter().position(|known| *known == place).unwrap_or(0);
        let (mode, place) = (mode as u32, place as u32);
        Self { magic: MAGIC, phase, points, failures, number, mode, place, check: 0 }
    }

    /// The ROM's place.
    fn place(&self) -> rom::Place {
        rom::Place::ALL.get(self.place as usize).copied().unwrap_or(rom::Place::Direct)
    }

    fn pointer() -> *mut Self {
        (PAGE_OFFSET + RECORD) as *mut Self
    }

    /// The record that an earlier start left, taken away.
    fn take() -> Option<Self> {
        // SAFETY: mapped memory that nothing else uses.
        let record = unsafe { Self::pointer().read_volatile() };
        Self::clear();
        (record.magic == MAGIC && record.check == record.sum()).then_some(record)
    }

    fn clear() {
        // SAFETY: as above.
        unsafe { Self::pointer().cast::<u32>().write_volatile(0) };
    }

    fn store(mut self) {
        self.check = self.sum();
        // SAFETY: as above.
        unsafe { Self::pointer().write_volatile(self) };
    }

    fn sum(&self) -> u32 {
        [self.phase, self.points, self.failures, self.number, self.mode, self.place]
            .iter()
            .fold(!MAGIC, |sum, word| sum.rotate_left(5) ^ word)
    }
}

const MODES: [Mode; 2] = [Mode::NonPae, Mode::Pae];

/// Runs the suite.
pub(crate) extern "C" fn main() -> ! {
    console::initialize();
    segments::initialize(trap_stack_top());
    traps::initialize();
    devices::discard_interrupts();
    let Some(client) = Client::wanted() else {
        report::abandon(format_args!("the command line asks for a client that there is not"))
    };
    match Record::take() {
        None => first_start(client),
        Some(record) => started_again(client, record),
    }
}

/// Runs the suite as a guest that was started at its VMI entry: in the host's own space, and in the ring that it gives.
pub(crate) extern "C" fn main_on_a_host() -> ! {
    console::initialize();
    let record = Record::take();
    let rom = match record {
        Some(_) => find_again(Client::Lookup),
        None => {
            line!("TAP version 14");
            find(Client::Lookup)
        }
    };
    host::start(&rom);
    segments::initialize(trap_stack_top());
    traps::initialize();
    segments::are_complete();
    let space = Space::adopt();
    if let Some(record) = record {
        go_on(record, rom);
    }
    line!("# started at the VMI entry, in ring {}", host::ring());
    let mut report = Report::default();
    let fingerprint = fingerprint(rom.bytes());
    check_sum(&mut report, rom);
    functions::check();
    test_rom(&mut report, space, 1, rom);
    xen::run(&mut report, space, rom);
    check_fingerprint(&mut report, rom, fingerprint);
    end_with_reboot(report, rom)
}

/// The machine's ROM, or else what is linked into the guest; says what it is.
fn find(client: Client) -> Rom {
    let passed_over = |physical: u32, refusal: Refusal| {
        line!("# passed over: {physical:#x}: {refusal}");
    };
    let rom = Rom::find(client, passed_over).unwrap_or_else(|| Rom::linked(client));
    let name = license(rom.bytes()).and_then(|text| core::str::from_utf8(text).ok()).unwrap_or("?");
    let Revision { major, minor } = rom.revision();
    line!(
        "# rom base={:#x} length={} revision={major}.{minor} linked={} license=\"{name}\"",
        rom.physical,
        rom.length,
        rom.is_linked()
    );
    rom
}

/// The same after a reset, without a word.
fn find_again(client: Client) -> Rom {
    Rom::find(client, |_, _| ()).unwrap_or_else(|| Rom::linked(client))
}

/// Holds the image's bytes against their sum.
fn check_sum(report: &mut Report, rom: Rom) {
    report.check(
        format_args!("the image's bytes add up to 0"),
        match checksum(rom.bytes()) {
            0 => Ok(()),
            _ => Err(format_args!("the sum of all bytes is not 0 modulo 256")),
        },
    );
}

/// Holds the image's bytes against what they were.
fn check_fingerprint(report: &mut Report, rom: Rom, fingerprint: u32) {
    report.check(
        format_args!("the image's bytes are what they were"),
        if fingerprint == self::fingerprint(rom.bytes()) {
            Ok(())
        } else {
            Err(format_args!("the image was changed"))
        },
    );
}

fn first_start(client: Client) -> ! {
    line!("TAP version 14");
    functions::check();
    let mut report = Report::default();
    let space = Space::new(Mode::NonPae);
    space.activate();
    let rom = find(client);
    rom.map_grant(space);
    check_sum(&mut report, rom);
    if command_line::has("rewrite-sites") {
        rom.allow_rewriting();
    }
    if let Some(name) = command_line::value("end") {
        fate::meet(name, space)
    }
    if command_line::has("workload") {
        run_in_each_mode(report, space, rom, workload::run)
    }
    if command_line::has("hostile") {
        let mut attempts = Attempts::default();
        let run = |report: &mut Report, space, rom| {
            hostile::run(report, &mut attempts, space, rom);
            if space.mode == MODES[usize::from(paging::has_pae())] {
                attempts.say();
            }
        };
        run_in_each_mode(report, space, rom, run)
    }
    let fingerprint = fingerprint(rom.bytes());
    for (index, mode) in MODES.into_iter().enumerate() {
        if mode == Mode::Pae && !paging::has_pae() {
            line!("# the processor has no PAE");
            continue;
        }
        let space = enter_mode(mode, space, rom);
        for rom in rom::Place::ALL.into_iter().filter_map(|place| rom.at(place)) {
            test_rom(&mut report, space, index, rom);
        }
    }
    check_fingerprint(&mut report, rom, fingerprint);
    let space = Space::current(MODES[usize::from(paging::has_pae())]);
    // Slots are called where they are: nothing is rewritten.
    if client == Client::Lookup {
        // A ROM that breaks rules may take the guest down with it here, where no call is under test.
        if report.is_clean() {
            costs::count(space, rom);
        }
        test_crowd(&mut report, space, rom);
    }
    end_with_reboot(report, rom)
}

/// Tests Reboot, the last call of all.
fn end_with_reboot(mut report: Report, rom: Rom) -> ! {
    if command_line::has("no-reboot") {
        let mut session = open_reboot(rom);
        session.judge_answer();
        session.skipped = Some("the command line says no-reboot");
        conclude(&mut report, &session);
        report.finish()
    }
    test_reset(&report, rom, SOFT_RESET)
}

/// The space of a mode, the current one; `space` is that of [`Mode::NonPae`].
fn enter_mode(mode: Mode, space: Space, rom: Rom) -> Space {
    if mode == Mode::NonPae {
        return space;
    }
    space.prepare_to_switch();
    let space = Space::new(mode);
    space.activate();
    rom.map_grant(space);
    space
}

/// Something else than the calls one by one.
fn run_in_each_mode(
    mut report: Report,
    space: Space,
    rom: Rom,
    mut run: impl FnMut(&mut Report, Space, Rom),
) -> ! {
    if rom.client != Client::Lookup {
        report::abandon(format_args!("only a kernel of revision 3.0 does this"))
    }
    for mode in MODES.into_iter().filter(|mode| *mode == Mode::NonPae || paging::has_pae()) {
        run(&mut report, enter_mode(mode, space, rom), rom);
    }
    report.finish()
}

/// The other processors, where there are some.
fn test_crowd(report: &mut Report, space: Space, rom: Rom) {
    let mut problems = Problems::default();
    let tried = if report.is_clean() {
        crowd::run(space, rom, &mut problems)
    } else {
        Err("the ROM breaks rules")
    };
    report.point(format_args!("all processors at one site while it is rewritten"), &problems);
    match tried {
        Ok(processors) => line!("# {processors} processors took part"),
        Err(reason) => line!("# not tried: {reason}"),
    }
}

/// All calls of a ROM at one of its places.
fn test_rom(report: &mut Report, space: Space, mode: usize, rom: Rom) {
    let mut problems = Problems::default();
    checks::entry_points(&rom, &mut problems);
    report.point(
        format_args!("{} {}: vmi_init and get_reloc", space.mode.name(), rom.place.name()),
        &problems,
    );
    for (number, call) in rom.client.revision().calls() {
        if call.number == Some(number::Reboot) {
            continue; // The last test of all.
        }
        let record = Record::new(TESTING, report, number, mode, rom.place);
        record.store();
        begin(space, rom, number, call);
        rom.patch_all_but(number);
        let mut session = open(space, rom, (number, call));
        session.judge_answer();
        if session.is_testable() {
            checks::check(&mut session);
            check_sites(&mut session);
        } else {
            session.skipped = Some("the ROM leaves it to the guest, which has no code for it");
        }
        conclude(report, &session);
        Record::clear();
    }
}

/// Says which call comes next: the guest may not come back from it.
fn begin(space: Space, rom: Rom, number: u32, call: &Call) {
    let (mode, place, name) = (space.mode.name(), rom.place.name(), call.name);
    line!("# begin mode={mode} alias={place} number={number} name={name}");
}

/// The same checks on sites that a ROM rewrites: where it did so before, where it must not, at every
/// place that makes a difference, in read-only memory; and for the plain code that leaves sites alone.
fn check_sites(session: &mut Session) {
    const WORST_ALIGNMENT: u32 = 64;
    let Some(rewriting) = session.rewriting else { return };
    session.reuse = true;
    checks::check(session);
    session.by_jump = true;
    checks::check(session);
    session.by_jump = false;
    let last_mode = session.space.mode == Mode::Pae || !paging::has_pae();
    if session.rom.place == rom::Place::Direct && last_mode {
        site::protect(session.space, true);
        let places = || {
            let around_border = (1..=8).map(Place::before_border);
            (1..=WORST_ALIGNMENT).map(Place).chain(around_border)
        };
        for place in places() {
            session.place = place;
            checks::check(session);
        }
        // What is behind a site matters to those of one byte at each place, to the others hardly.
        let (fillers, step) =
            if rewriting.is_one_byte() { (&FILLERS[..], 1) } else { (&FILLERS[..2], 16) };
        for filler in fillers {
            session.filler = filler;
            for place in places().step_by(step) {
                session.place = place;
                checks::check(session);
            }
        }
        session.filler = &[];
        site::protect(session.space, false);
        session.place = Place::default();
    }
    session.use_plain(rewriting.plain);
    checks::check(session);
}

/// Binds a call: to the ROM's code, or to the guest's own where the ROM leaves it to the guest.
fn open(space: Space, rom: Rom, (number, call): (u32, &'static Call)) -> Session {
    let answer = rom.answer(number);
    let own = call.number.and_then(checks::own_code);
    let target = match answer.kind {
        RelocationType::CALL_REL | RelocationType::JUMP_REL => Some(answer.eip.get()),
        RelocationType::NOP => Some(checks::do_nothing as *const () as u32),
        _ => own,
    };
    let mut session = Session::new(space, rom, (number, call), answer.kind, target);
    if rom.client == Client::Lookup && answer.kind.has_address() {
        session.rewriting = rom
            .plain(CallNumber(number))
            .zip(own)
            .and_then(|(plain, own)| Rewriting::new(call, plain, own, devices::site_rule()));
    }
    session
}

/// Writes what was found of a call.
fn conclude(report: &mut Report, session: &Session) {
    let Session { call, space, rom, number, .. } = session;
    let (mode, place) = (space.mode.name(), rom.place.name());
    report.point(format_args!("{mode} {place}: {number} {}", call.name), &session.problems);
    if let Some(reason) = session.skipped {
        line!("# not tried: {reason}");
    }
    line!(
        "# call mode={mode} alias={place} number={number} name={} answer={} verdict={} stack={} instructions={} checks={}",
        call.name,
        session.answer.name().unwrap_or("unknown"),
        match (session.problems.is_empty(), session.skipped) {
            (false, _) => "FAIL",
            (true, None) => "ok",
            (true, Some(_)) => "skip",
        },
        session.stack,
        session.instructions,
        session.checks,
    );
}

/// Binds Reboot, in the mode in which the suite ends.
fn open_reboot(rom: Rom) -> Session {
    let mut calls = rom.client.revision().calls();
    let reboot = calls.find(|(_, call)| call.number == Some(number::Reboot));
    let space = Space::current(MODES[usize::from(paging::has_pae())]);
    open(space, rom, reboot.expect("every revision has it"))
}

/// Asks for a reset; the guest that starts again goes on in [`started_again`].
fn test_reset(report: &Report, rom: Rom, phase: u32) -> ! {
    let mut session = open_reboot(rom);
    let mode = usize::from(paging::has_pae());
    let record = Record::new(phase, report, session.number, mode, rom.place);
    session.judge_answer();
    let kind = if phase == SOFT_RESET { RebootKind::SOFT } else { RebootKind::HARD };
    begin(session.space, rom, session.number, session.call);
    if session.problems.is_empty() {
        console::drain();
        record.store();
        checks::reboot(&mut session, kind);
        Record::clear();
    }
    let mut report = Report::resumed(report.points(), report.failures());
    conclude(&mut report, &session);
    report.finish()
}

/// The guest was started again by a reset.
fn started_again(client: Client, record: Record) -> ! {
    let space = Space::new(Mode::NonPae);
    space.activate();
    let rom = find_again(client);
    rom.map_grant(space);
    if record.phase == SOFT_RESET {
        return_to_mode(record.mode, space, rom);
    }
    go_on(record, rom)
}

/// Goes on after a reset.
fn go_on(record: Record, rom: Rom) -> ! {
    let mut report = Report::resumed(record.points, record.failures);
    let Some(call) = rom.client.revision().call(record.number) else {
        report::abandon(format_args!("a call is recorded that there is not"))
    };
    if record.phase == SOFT_RESET {
        test_reset(&report, rom, HARD_RESET);
    }
    let mode = MODES[(record.mode as usize).min(1)];
    let answer = rom.answer(record.number);
    let rom = Rom { place: record.place(), ..rom };
    let mut session =
        Session::new(Space::current(mode), rom, (record.number, call), answer.kind, None);
    session.expect(record.phase == HARD_RESET, format_args!("the machine was reset"));
    conclude(&mut report, &session);
    report.finish()
}

/// Reboot is asked for in the mode in which the suite ended.
fn return_to_mode(mode: u32, space: Space, rom: Rom) {
    if MODES[(mode as usize).min(1)] == Mode::Pae {
        enter_mode(Mode::Pae, space, rom);
    }
}

/// Tells images apart: a byte that changes and changes back is caught by the mapping.
fn fingerprint(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

const TRAP_STACK_SIZE: usize = 16 * 1024;

#[repr(C, align(16))]
struct TrapStack([u8; TRAP_STACK_SIZE]);

static mut TRAP_STACK: TrapStack = TrapStack([0; TRAP_STACK_SIZE]);

/// The stack for entries from ring 3.
pub(crate) fn trap_stack_top() -> u32 {
    (&raw const TRAP_STACK) as u32 + TRAP_STACK_SIZE as u32
}
