//! The corpus of `fuzz/` on a stable compiler: every file, some changed copies of it, and images
//! made to cost as much as they can. Nothing panics, nothing hangs, and the limits hold.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vmi_abi::header::{LENGTH_UNIT, checksum};
use xtask::inspect::random::Random;
use xtask::inspect::source::{Compression, SourceArgs};
use xtask::inspect::{HIGH_BASE, Rom, Rule, hostile, report, survey, verify};

/// Changed copies of each file for the parsers, which are quick.
const PARSED: u64 = 260;

/// Changed copies of each file that may carry a ROM; some are unpacked each time.
const SEARCHED: u64 = 240;

/// Changed copies of each file for the machine.
const EXECUTED: u64 = 100;

/// Changed copies of each file that are inspected and verified.
const JUDGED: u64 = 3;

/// Longest time for one image. A debug build needs 3 seconds for the worst; the rest is for a busy
/// machine.
const LIMIT: Duration = Duration::from_secs(30);

/// The files of a part of the corpus, in an order of their own.
fn corpus(part: &str) -> Vec<(String, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(part);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .expect("the corpus is part of the tree")
        .map(|entry| entry.expect("a file").path())
        .map(|path| (path.display().to_string(), fs::read(&path).expect("a file")))
        .collect();
    files.sort();
    assert!(files.len() > 10, "{} is nearly empty", folder.display());
    files
}

/// A copy with bytes changed, cut off, or repeated; usually with a right checksum again.
fn changed(bytes: &[u8], seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed ^ 0xc0_4b05);
    let mut copy = bytes.to_vec();
    let length = copy.len() as u32;
    for _ in 0..1 + random.below(8) {
        let place = random.below(length) as usize;
        let Some(byte) = copy.get_mut(place) else { break };
        *byte = match random.below(4) {
            0 => 0,
            1 => 0xff,
            2 => *byte ^ (1 << random.below(8)),
            _ => random.word() as u8,
        };
    }
    match random.below(8) {
        0 => copy.truncate(random.below(length) as usize),
        1 => copy.extend_from_within(random.below(length) as usize..),
        _ => {}
    }
    if random.below(8) != 0
        && let Some(last) = copy.last_mut()
    {
        *last = 0;
        let sum = checksum(&copy).wrapping_neg();
        if let Some(last) = copy.last_mut() {
            *last = sum;
        }
    }
    copy
}

/// Runs a target, and says on which input it panicked or took too long.
fn hold(name: &str, bytes: &[u8], target: impl Fn(&[u8]) + std::panic::RefUnwindSafe) {
    let start = Instant::now();
    let outcome = std::panic::catch_unwind(|| target(bytes));
    let took = start.elapsed();
    assert!(outcome.is_ok(), "{name} ({} bytes)", bytes.len());
    assert!(took < LIMIT, "{name} took {took:?}");
}

fn each(part: &str, copies: u64, target: impl Fn(&[u8]) + std::panic::RefUnwindSafe) {
    let files = corpus(part);
    for (name, bytes) in &files {
        hold(name, bytes, &target);
        for seed in 0..copies {
            hold(&format!("{name}, changed by seed {seed}"), &changed(bytes, seed), &target);
        }
    }
    let executions = files.len() as u64 * (1 + copies);
    println!(
        "{executions} executions: {} files of {part}, {copies} changed copies each",
        files.len()
    );
}

#[test]
fn structures_of_any_bytes() {
    each("rom", PARSED, hostile::parse);
}

#[test]
fn any_file_is_searched() {
    each("sources", SEARCHED, hostile::sources);
}

/// The seeds were made by the tools that make such files: `as`, `ar`, `gzip`, `xz` with its filter for x86, `lzma`,
/// `zstd`.
#[test]
fn every_kind_of_file_gives_the_image() {
    let files = corpus("sources");
    let image = fs::read(
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/rom/good-native.rom"),
    );
    let image = image.expect("one of the project's own images");
    let unpacked = |compression| (compression, None);
    let kinds = [
        ("dump", (None, Some(0x800)), 1),
        ("row", (None, Some(0x200)), 2),
        ("object-32.o", (None, Some(0x41)), 1),
        ("object-64.o", (None, Some(0x4d)), 1),
        ("library.a", (None, None), 1),
        ("program", (None, None), 1),
        ("unfinished.o", (None, None), 1),
        ("core-32", (None, Some(0x800)), 2),
        ("core-64", (None, Some(0x800)), 1),
        ("kernel-plain", (None, None), 1),
        ("kernel-gzip", unpacked(Some(Compression::Gzip)), 1),
        ("kernel-2.05", unpacked(Some(Compression::Gzip)), 1),
        ("kernel-xz", unpacked(Some(Compression::Xz)), 1),
        ("kernel-lzma", unpacked(Some(Compression::Lzma)), 1),
        ("kernel-zstd", unpacked(Some(Compression::Zstd)), 1),
        ("kernel.gz", unpacked(Some(Compression::Xz)), 1),
        ("rom.gz", unpacked(Some(Compression::Gzip)), 1),
        ("dump.zst", unpacked(Some(Compression::Zstd)), 1),
        ("object.o.xz", unpacked(Some(Compression::Xz)), 1),
    ];
    for (kind, (compression, place), count) in kinds {
        let ends = |path: &str| path.rsplit('/').next() == Some(kind);
        let (name, bytes) = files.iter().find(|(path, _)| ends(path)).expect(kind);
        let found = SourceArgs::default().find_in(name, bytes).expect(kind);
        assert_eq!(found.roms.len(), count, "{kind}");
        let rom = &found.roms[0];
        assert!(rom.rom.file() == image, "{kind}: other bytes");
        assert_eq!(rom.origin.unpacked, compression, "{kind}");
        if let Some(place) = place {
            assert_eq!(rom.origin.file_offset, Some(place), "{kind}");
        }
    }
    for (kind, words) in [("kernel-lz4", "with lz4"), ("kernel-bzip2", "with bzip2")] {
        let (name, bytes) = files.iter().find(|(path, _)| path.ends_with(kind)).expect(kind);
        let error = SourceArgs::default().find_in(name, bytes).expect_err(kind).to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn any_code() {
    each("machine", EXECUTED, hostile::machine);
    each("rom", EXECUTED, hostile::machine);
}

#[test]
fn any_rom_is_inspected() {
    each("rom", JUDGED, hostile::inspect);
}

#[test]
fn any_rom_is_verified() {
    each("rom", JUDGED, hostile::verify);
}

#[test]
fn right_images_are_judged_to_their_end() {
    for name in
        ["good-native.rom", "good-call.rom", "good-rewriting.rom", "good-13.0.rom", "good-13.3.rom"]
    {
        let (_, bytes) = corpus("rom")
            .into_iter()
            .find(|(path, _)| path.ends_with(name))
            .expect("a right image");
        let verdict = verify(&Rom::parse(&bytes).expect("a ROM"));
        assert!(verdict.is_clean(), "{name}: {:#?}", verdict.violations);
    }
}

/// Where the calls' code starts in [`filled`].
const BODY: usize = 0x1000;

/// An image of 63.5 KiB that answers every call with the same code: a pattern from end to end.
fn filled(pattern: &[u8]) -> Vec<u8> {
    const LENGTH: usize = 127 * LENGTH_UNIT;
    let mut image = vec![0x90; LENGTH];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0; 0x100]);
    put(0, &[0x55, 0xaa, 127, 0xcb]);
    put(8, b"cVmi\0\x03");
    put(22, &[0xd0, 0]);
    put(24, &[0x90, 0]);
    put(0x90, b"PCIR\xad\x15\x01\x08\0\0\x18\0\0\0\0\x08\x7f\0\0\0\0\x80");
    put(0xd0, b"GPL\0");
    // vmi_init: xor eax, eax; ret. get_reloc: the place of BODY, CALL_REL.
    put(0x80, b"\x31\xc0\xc3");
    put(0x88, b"\xe9\x73\0\0\0");
    put(0x100, b"\xe8\0\0\0\0\x59\x8d\x81\xfb\x0e\0\0\xba\x01\0\0\0\xc3");
    for place in (BODY..LENGTH - 2 - pattern.len()).step_by(pattern.len()) {
        put(place, pattern);
    }
    put(LENGTH - 2, &[0xc3]);
    image[LENGTH - 1] = checksum(&image).wrapping_neg();
    image
}

#[test]
fn the_most_costly_images_end_in_time() {
    let patterns: [(&str, &[u8]); 13] = [
        ("x87 and SSE", b"\x0f\x57\xc0"),
        ("reads outside", b"\xa1\0\0\0\x01"),
        ("writes outside", b"\xa3\0\0\0\x01"),
        ("a loop of one", b"\xeb\xfe"),
        ("nothing", b"\x90"),
        ("branches", b"\x70\x00"),
        ("overlapping instructions", b"\x70\x01"),
        ("no instructions", b"\x70\x02\x0f\xff"),
        ("branches that leave", b"\x0f\x80\xff\xff\xff\x7f"),
        ("branches through a register", b"\x70\x02\xff\xe0"),
        ("all memory filled", b"\xb9\xff\xff\xff\xff\xf3\xab"),
        ("all registers of the processor", b"\x41\x0f\x30\xeb\xfb"),
        ("system instructions", b"\x0f\x06\x0f\x20\xc0"),
    ];
    for (name, pattern) in patterns {
        let image = filled(pattern);
        hold(name, &image, |bytes| {
            let rom = Rom::parse(bytes).expect("a ROM");
            let verdict = verify(&rom);
            assert!(!verdict.is_clean());
            assert!(report::verdict(&verdict).lines().count() < 5_000);
            let facts = survey(&rom, HIGH_BASE).expect("revision 3.0");
            let lines: usize =
                facts.calls.iter().filter_map(|call| Some(call.code.as_ref()?.listing.len())).sum();
            assert!(lines < 500_000, "{lines} lines");
        });
    }
}

/// What the budget did not suffice for is said for each call.
#[test]
fn a_budget_that_runs_out_is_said() {
    let rom = Rom::parse(&filled(b"\x90")).expect("a ROM");
    let verdict = verify(&rom);
    let undecided = verdict.violations.iter().filter(|found| found.rule == Rule::Undecided);
    let calls: std::collections::BTreeSet<_> = undecided.filter_map(|found| found.call).collect();
    assert!(calls.len() > 60, "{calls:?}");
    let facts = survey(&rom, HIGH_BASE).expect("revision 3.0");
    assert!(facts.calls.iter().filter_map(|call| call.code.as_ref()).all(|code| code.cut_short));
}
