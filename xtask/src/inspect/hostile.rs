//! What must hold for any input whatever: the targets of `fuzz/` and the test that runs its corpus
//! on a stable compiler share these, so that both ask for the same.
//!
//! Each function panics if a limit does not hold; it returns nothing, because for most inputs there
//! is nothing to say.

use super::machine::registers::FREE;
use super::machine::{Code, Machine, Memory, Region, Registers};
use super::random::Random;
use super::rules::{Rule, verify_within};
use super::source::{LONGEST_ROM, MOST_OTHERS, MOST_ROMS, SourceArgs};
use super::survey::survey_within;
use super::{HIGH_BASE, LOW_BASE, Rom, report};
use iced_x86::Register;
use vmi_abi::{REVISION_3_0, REVISION_13_0, RomHeader, probe};

/// Lines that `verify` may print. A place that breaks a rule is a line, and there are few of them
/// for each rule and call.
const MOST_LINES: usize = 40_000;

/// Bytes that `inspect` may print in JSON.
const MOST_JSON: usize = 256 << 20;

/// Budget of one look: a right image is judged to its end, one that loops is soon given up.
const FUEL: u64 = 600_000;

/// Instructions that [`machine`] grants.
const BUDGET: u64 = 20_000;

/// What a guest of the one or the other revision says of a ROM.
fn guest(bytes: &[u8]) -> Result<&RomHeader, probe::Refusal> {
    probe::probe(bytes, REVISION_3_0).or_else(|_| probe::probe(bytes, REVISION_13_0))
}

/// Header, structures and strings.
///
/// # Panics
///
/// A structure lies outside the bytes, or two readers do not agree.
pub fn parse(bytes: &[u8]) {
    let probed = guest(bytes);
    let _ = probe::scan(bytes, REVISION_3_0);
    let _ = probe::scan(bytes, REVISION_13_0);
    let Ok(rom) = Rom::parse(bytes) else {
        assert!(probed.is_err(), "a guest takes what the inspector refuses");
        return;
    };
    let image = rom.image();
    assert!(image.len() <= bytes.len());
    assert!(rom.used() <= image.len());
    if probed.is_ok() {
        assert!(rom.interface().is_ok() && rom.pci().is_some());
        assert_ne!(rom.license().is_some(), rom.revision().has_slots());
        assert_eq!(rom.claimed_length(), image.len());
    }
    assert!(rom.pnp_bytes().is_none_or(|pnp| pnp.len() <= image.len()));
    for offset in [0, 1, image.len() as u16, u16::MAX] {
        assert!(rom.string(offset).is_none_or(|text| text.len() < image.len()));
    }
    let _ = rom.sum();
}

/// `inspect`, as text and as JSON.
///
/// # Panics
///
/// A limit does not hold.
pub fn inspect(bytes: &[u8]) {
    let Ok(rom) = Rom::parse(bytes) else { return };
    for base in [HIGH_BASE, u32::MAX - 0x3ff] {
        let Ok(facts) = survey_within(&rom, base, FUEL) else { return };
        assert_eq!(facts.calls.len(), rom.revision().calls().count());
        assert!(!report::survey(&facts).is_empty());
        for call in &facts.calls {
            assert!(report::call(call).contains(call.name));
        }
        let json = serde_json::to_string(&facts).unwrap_or_default();
        assert!((1..MOST_JSON).contains(&json.len()), "{} bytes of JSON", json.len());
    }
}

/// `verify`, twice: the same bytes get the same verdict.
///
/// # Panics
///
/// A limit does not hold, or a ROM that no guest would take is called clean.
pub fn verify(bytes: &[u8]) {
    let Ok(rom) = Rom::parse(bytes) else { return };
    let verdict = verify_within(&rom, FUEL);
    let text = report::verdict(&verdict);
    let lines = text.lines().count();
    assert!((1..MOST_LINES).contains(&lines), "{lines} lines");
    let guest = guest(bytes);
    assert!(guest.is_ok() || !verdict.is_clean(), "clean, and a guest says {guest:?}");
    assert!(rom.sum() == 0 || verdict.violations.iter().any(|found| found.rule == Rule::Checksum));
    let inside = |offset: usize| offset <= rom.image().len().max(rom.file().len());
    assert!(verdict.violations.iter().filter_map(|found| found.offset).all(inside));
    if bytes.len() < 1024 {
        assert_eq!(
            text,
            report::verdict(&verify_within(&rom, FUEL)),
            "another verdict the second time"
        );
    }
}

/// The first bytes as registers, the others as code.
///
/// # Panics
///
/// The machine executes more than it was granted, or tells of places that are none.
pub fn machine(bytes: &[u8]) {
    let Some((state, image)) = bytes.split_at_checked(36) else { return };
    let mut words = state
        .chunks_exact(4)
        .map(|word| word.iter().rev().fold(0, |value, byte| (value << 8) | u32::from(*byte)));
    let mut registers = Registers::default();
    for register in FREE {
        registers.set(register, words.next().unwrap_or_default());
    }
    registers.eflags = words.next().unwrap_or_default();
    let choice = words.next().unwrap_or_default();
    let base = if choice & 1 == 0 { LOW_BASE } else { (image.len() as u32).wrapping_neg() };
    let stack_base = if choice & 2 == 0 { 0x10_0000 } else { 0 };
    registers.set(Register::ESP, stack_base + if choice & 4 == 0 { 0x200 } else { 0 });
    registers.eip = base;
    let stack = Region { name: "stack", base: stack_base, bytes: vec![0; 0x400], writable: true };
    let code = Code::new(image, BUDGET / 2);
    let mut memory = Memory::new(image, base, vec![stack]);
    memory.lenient = choice & 8 != 0;
    let mut machine = Machine::new(&code, memory, registers, Random::new(u64::from(choice)));
    machine.stack_top = stack_base + 0x300;
    machine.flat = vec![0];
    machine.watch = Some(stack_base + 0x100);
    machine.run(BUDGET);
    let trace = &machine.trace;
    assert!(trace.instructions <= BUDGET / 2, "{} instructions", trace.instructions);
    assert!(trace.offsets.len() as u64 <= trace.instructions);
    assert!(trace.offsets.iter().all(|offset| *offset < image.len()));
    assert!(trace.breaches.len() <= 512 && trace.events.len() <= 256);
    assert!(machine.stack_depth() <= 0x400);
    assert!(trace.breaches.iter().all(|(_, breach)| !breach.to_string().is_empty()));
}

/// Any bytes as a file: dump, object, library, core dump, kernel, compressed.
///
/// # Panics
///
/// More is kept than the limits allow, or a place is not where the ROM's bytes are.
pub fn sources(bytes: &[u8]) {
    for (base, rom, at) in [
        (None, None, None),
        (Some(0xc_0400), None, None),
        (None, Some(2), None),
        (Some(u64::MAX - 0xfff), None, Some(u64::MAX - 0x7ff)),
    ] {
        let args = SourceArgs { base, rom, at, ..SourceArgs::default() };
        let found = match args.find_in("file", bytes) {
            Ok(found) => found,
            Err(error) => {
                assert!(error.to_string().starts_with("file"), "{error}");
                continue;
            }
        };
        assert!((1..=MOST_ROMS).contains(&found.roms.len()) && found.others.len() <= MOST_OTHERS);
        assert!(rom.is_none() && at.is_none() || found.roms.len() == 1);
        for rom in &found.roms {
            let (image, origin) = (rom.rom.file(), &rom.origin);
            assert!(image.len() <= LONGEST_ROM);
            assert!(origin.to_string().starts_with("file"));
            // Lengths and checksums may have been set, but not the signature.
            if let Some(offset) = origin.file_offset {
                let there = bytes.get(offset as usize..).unwrap_or_default();
                assert!(there.starts_with(&image[..2]), "{origin}: another place");
            }
            assert!(origin.file_offset.is_some() || origin.unpacked.is_some());
        }
        assert!(found.others.iter().all(|other| !other.to_string().is_empty()));
    }
}
