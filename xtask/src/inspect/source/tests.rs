//! Sources that are right, that lie, and that do not answer.

use super::super::samples::Sample;
use super::*;
use object::write::{Object, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolScope};
use proptest::prelude::*;
use std::io::Write;
use std::net::TcpListener;
use std::thread;
use std::time::Instant;
use vmi_abi::header::checksum;

/// Bytes of a sample, which is a whole number of steps.
const STEP: usize = 2048;

pub(super) fn sample() -> Vec<u8> {
    Sample::new().build()
}

/// An option ROM without VMI.
fn other(units: u8) -> Vec<u8> {
    let mut bytes = vec![0; usize::from(units) * LENGTH_UNIT];
    bytes[..3].copy_from_slice(&[0x55, 0xaa, units]);
    let last = bytes.len() - 1;
    bytes[last] = bytes[last].wrapping_sub(checksum(&bytes));
    bytes
}

/// Three ROMs in 64 KiB, and 55 AA where no step is.
pub(super) fn memory() -> Vec<u8> {
    let mut bytes = vec![0xff; 0x1_0000];
    for (at, rom) in [(0x1000, sample()), (0x4800, other(4)), (0x8000, sample())] {
        bytes[at..at + rom.len()].copy_from_slice(&rom);
    }
    bytes[0x3400..0x3403].copy_from_slice(&[0x55, 0xaa, 1]);
    bytes
}

pub(super) fn find(bytes: &[u8], args: &SourceArgs) -> Result<Found, SourceError> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    std::fs::write(&path, bytes).expect("a file");
    SourceArgs { file: Some(path), ..args.clone() }.find()
}

pub(super) fn found(bytes: &[u8]) -> Found {
    find(bytes, &SourceArgs::default()).expect("a ROM")
}

#[test]
fn a_file_that_is_a_rom_is_taken_as_a_whole() {
    let mut bytes = sample();
    assert_eq!(found(&bytes).roms[0].rom.file(), bytes);
    bytes.truncate(bytes.len() - 7);
    assert_eq!(found(&bytes).roms[0].rom.file(), bytes, "too short");
    bytes.resize(3 * STEP, 0);
    assert_eq!(found(&bytes).roms[0].rom.file(), bytes, "too long");
    for signature in [0, 8] {
        let mut bytes = sample();
        bytes[signature] ^= 1;
        assert_eq!(found(&bytes).roms[0].rom.file(), bytes, "one signature is wrong");
    }
}

#[test]
fn a_dump_is_scanned_on_steps_of_physical_memory() {
    for base in [0, 0xc_0000, 0xc_0400] {
        let mut bytes = vec![0; (STEP - base as usize % STEP) % STEP];
        bytes.extend(memory());
        let args = SourceArgs { base: Some(base), ..SourceArgs::default() };
        let found = find(&bytes, &args).expect("two ROMs");
        let places: Vec<u64> = found.roms.iter().filter_map(|rom| rom.origin.physical).collect();
        let start = base.next_multiple_of(STEP as u64);
        assert_eq!(places, [start + 0x1000, start + 0x8000]);
        assert!(found.roms.iter().all(|rom| rom.rom.file() == sample() && rom.remarks.is_empty()));
        let [other] = found.others.as_slice() else { panic!("{:?}", found.others) };
        assert_eq!((other.physical, other.bytes), (Some(start + 0x4800), 2048));
        assert!(other.checksum_right && other.kind == Kind::Plain, "{other:?}");
    }
}

#[test]
fn one_rom_is_chosen_by_number_or_place() {
    let base = Some(0xc_0000);
    let choose = |rom, at| find(&memory(), &SourceArgs { base, rom, at, ..SourceArgs::default() });
    let place = |found: Result<Found, SourceError>| {
        let found = found.expect("a ROM");
        assert!(found.roms.len() == 1 && found.others.is_empty());
        found.roms[0].origin.physical
    };
    assert_eq!(place(choose(Some(2), None)), Some(0xc_8000));
    assert_eq!(place(choose(None, Some(0xc_1000))), Some(0xc_1000));
    for wanted in [0, 3, usize::MAX] {
        assert!(matches!(choose(Some(wanted), None), Err(SourceError::NoSuchRom { found: 2, .. })));
    }
    for at in [0, 0xb_ffff, 0xd_0000, u64::MAX] {
        assert!(matches!(choose(None, Some(at)), Err(SourceError::Outside { .. })), "{at:x}");
    }
    assert!(matches!(choose(None, Some(0xc_1001)), Err(SourceError::NotARom { .. })));
    assert!(matches!(choose(None, Some(0xc_ffff)), Err(SourceError::NotARom { .. })));
}

#[test]
fn roms_in_a_row_are_found_off_the_steps() {
    let row = [other(1), sample(), other(3), sample()].concat();
    let found = found(&row);
    let places: Vec<u64> = found.roms.iter().map(|rom| rom.origin.offset).collect();
    let second = LENGTH_UNIT + sample().len() + 3 * LENGTH_UNIT;
    assert_eq!(places, [LENGTH_UNIT as u64, second as u64]);
    assert_eq!(found.others.len(), 2);
}

#[test]
fn lengths_beyond_the_end_are_clipped_and_said() {
    let mut bytes = memory();
    bytes.truncate(0x8000 + 0x300);
    let found = found(&bytes);
    assert_eq!(found.roms[1].rom.file().len(), 0x300);
    assert!(found.roms[1].remarks[0].contains("768 are there"), "{:?}", found.roms[1].remarks);
    bytes.truncate(0x8000 + 0x20); // Less than a header.
    assert_eq!(super::tests::found(&bytes).roms.len(), 1);
}

#[test]
fn a_dump_full_of_overlapping_roms_is_cut_short() {
    let mut header = sample();
    header.truncate(STEP);
    header[2] = 0xff;
    let bytes = header.repeat(2000);
    let start = Instant::now();
    let found = found(&bytes);
    assert_eq!(found.roms.len(), MOST_ROMS);
    assert!(found.left_out > 1900, "{}", found.left_out);
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn windows_of_a_large_dump_fit_together() {
    // Around the end of the first window, which is 1 MiB.
    for at in [0xf_f800, 0x10_0000, 0x10_0800] {
        let mut bytes = vec![0; 0x20_0000];
        bytes[at..at + sample().len()].copy_from_slice(&sample());
        let found = found(&bytes);
        assert_eq!(found.roms.len(), 1);
        assert_eq!(
            (found.roms[0].origin.offset, found.roms[0].rom.file()),
            (at as u64, &*sample())
        );
    }
}

/// An object with the ROM in a section, behind 12 other bytes.
pub(super) fn object(format: Architecture) -> Vec<u8> {
    let mut object = Object::new(BinaryFormat::Elf, format, Endianness::Little);
    let section = object.add_section(Vec::new(), b".vmi".to_vec(), SectionKind::ReadOnlyData);
    let data = [vec![0x90; 12], sample(), vec![0x90; 100]].concat();
    object.append_section_data(section, &data, 4);
    object.add_symbol(Symbol {
        name: b"vendor_rom".to_vec(),
        value: 12,
        size: 0,
        kind: object::SymbolKind::Data,
        scope: SymbolScope::Linkage,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    });
    object.write().expect("an object")
}

/// A library as `ar` writes it.
pub(super) fn library(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = b"!<arch>\n".to_vec();
    for (name, data) in members {
        let name = format!("{name}/");
        writeln!(bytes, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, 644, data.len())
            .expect("a vector grows");
        bytes.extend(*data);
        bytes.resize(bytes.len().next_multiple_of(2), b'\n');
    }
    bytes
}

#[test]
fn an_object_names_section_and_symbol() {
    for architecture in [Architecture::I386, Architecture::X86_64] {
        let found = found(&object(architecture));
        let [rom] = found.roms.as_slice() else { panic!("{found:?}") };
        assert_eq!(rom.rom.file(), sample());
        assert_eq!(rom.origin.section.as_deref(), Some(".vmi"));
        assert_eq!(rom.origin.symbol.as_deref(), Some("vendor_rom"));
        assert_eq!(rom.origin.offset, 12);
        assert!(rom.remarks.is_empty(), "{:?}", rom.remarks);
    }
}

#[test]
fn a_library_names_the_member() {
    let object = object(Architecture::I386);
    let bytes =
        library(&[("empty.o", b""), ("text", b"hello"), ("rom.o", &object), ("raw", &sample())]);
    let found = found(&bytes);
    let names: Vec<String> = found.roms.iter().map(|rom| rom.origin.to_string()).collect();
    assert!(
        names[0].ends_with("file, member rom.o, section .vmi, offset Ch (vendor_rom)"),
        "{names:?}"
    );
    assert!(names[1].ends_with("file, member raw"), "{names:?}");
    assert!(found.roms[0].origin.file().ends_with("file(rom.o)"));
    let none = find(&library(&[("text", b"hello")]), &SourceArgs::default());
    assert!(matches!(none, Err(SourceError::Nothing { .. })));
    let thin = find(b"!<thin>\n", &SourceArgs::default());
    assert!(matches!(thin, Err(SourceError::Damaged { .. })), "{thin:?}");
    let mut lying = bytes;
    lying[8 + 48..8 + 58].copy_from_slice(b"9999999999");
    let error = find(&lying, &SourceArgs::default()).expect_err("a member too long");
    assert!(matches!(error, SourceError::Damaged { .. }), "{error}");
}

#[test]
fn a_damaged_object_still_gives_its_rom() {
    let mut bytes = object(Architecture::I386);
    bytes[32..36].copy_from_slice(&[0xff; 4]); // Offset of the section headers.
    let found = found(&bytes);
    assert!(found.roms[0].remarks[0].contains("damaged"), "{:?}", found.roms[0].remarks);
}

/// A core dump whose segments all claim the same bytes of the file.
fn core(segments: &[(u32, u32, u32)], memory: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x01\x01\x01".to_vec();
    bytes.resize(16, 0);
    for half in [4u16, 3] {
        bytes.extend(half.to_le_bytes()); // A core of an i386.
    }
    for word in [1u32, 0, 52, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    for half in [52u16, 32, segments.len() as u16, 40, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    for (offset, physical, length) in segments {
        for word in [1, *offset, 0, *physical, *length, *length, 7, 0] {
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes.resize(0x1000, 0);
    bytes.extend(memory);
    bytes
}

#[test]
fn a_core_dump_has_physical_addresses() {
    let memory = memory();
    let length = memory.len() as u32;
    let found = found(&core(&[(0x1000, 0xc_0000, length)], &memory));
    let places: Vec<_> = found.roms.iter().map(|rom| rom.origin.physical).collect();
    assert_eq!(places, [Some(0xc_1000), Some(0xc_8000)]);
    assert_eq!(found.roms[0].rom.file(), sample());
    // Segments that claim the same bytes, or some far beyond the end, cost no more than the file.
    let many = [(0x1000, 0xc_0000, u32::MAX), (0x1000, 0xc_0000, length), (u32::MAX, 0, 9)];
    assert_eq!(super::tests::found(&core(&many.repeat(30), &memory)).roms.len(), 2);
}

#[test]
fn what_holds_no_rom_says_so() {
    for bytes in [&b""[..], b"x", b"\x7fELF", b"!<arch>\n", &[0x55, 0xaa], &[0; 5000]] {
        assert!(find(bytes, &SourceArgs::default()).is_err(), "{bytes:?}");
    }
    let error = find(&[other(2), other(4)].concat(), &SourceArgs::default()).expect_err("no VMI");
    let text = error.to_string();
    assert!(text.contains("offset 400h: 2048 bytes, BIOS"), "{text}");
    let missing = SourceArgs::of_file(Path::new("/nonexistent/rom")).find();
    assert!(matches!(missing, Err(SourceError::Read { .. })));
    assert!(matches!(one(Path::new("/")), Err(SourceError::Read { .. })));
    let endless = SourceArgs::of_file(Path::new("/dev/full")).find();
    assert!(matches!(endless, Err(SourceError::TooLarge { .. })), "{endless:?}");
}

#[test]
fn endpoints_and_addresses() {
    let parse = |text: &str| text.parse::<qmp::Endpoint>().map(|endpoint| endpoint.to_string());
    for text in ["unix:/tmp/qmp", "tcp:localhost:4444"] {
        assert_eq!(parse(text).as_deref(), Ok(text));
    }
    for text in ["", "unix:", "tcp:4444", "/tmp/qmp", "udp:a:1"] {
        assert!(parse(text).is_err(), "{text}");
    }
    assert_eq!(address("C0000h"), Ok(0xc_0000));
    assert_eq!(address("0xC0000"), Ok(0xc_0000));
    assert!(address("-1").is_err() && address("10000000000000000h").is_err());
}

/// Something that takes one connection and says `words`, then waits for the other to go.
fn server(words: impl Into<Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its number").to_string();
    let words = words.into();
    thread::spawn(move || {
        if let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(&words);
            let _ = io::copy(&mut stream, &mut io::sink());
        }
    });
    address
}

fn said(text: &str) -> Vec<u8> {
    let sum = text.bytes().fold(0u8, |sum, byte| sum.wrapping_add(byte));
    format!("+${text}#{sum:02x}").into_bytes()
}

#[test]
fn a_gdb_stub_that_is_none_is_refused_in_time() {
    let limit = Duration::from_millis(300);
    let read = |words: Vec<u8>| gdb::read(&server(words), 0..0x10, limit, true);
    let ok = |answers: &[&str]| answers.iter().flat_map(|answer| said(answer)).collect::<Vec<u8>>();
    let digits = "ab".repeat(16);
    let right = ok(&["T05thread:01;", "O70617573", "OK", "OK", &digits, "OK"]);
    assert_eq!(read(right).expect("memory"), [0xab; 16]);
    assert!(matches!(read(ok(&[])), Err(WireError::TimedOut { .. })));
    assert!(matches!(read(ok(&["OK", ""])), Err(WireError::Refused { .. })));
    assert!(matches!(read(ok(&["OK", "OK", "E14"])), Err(WireError::Refused { .. })));
    for answer in ["ab", "zz", &"ab".repeat(17), "", "OK", "abc"] {
        assert!(
            matches!(read(ok(&["OK", "OK", answer])), Err(WireError::Protocol { .. })),
            "{answer}"
        );
    }
    assert!(matches!(read(b"$OK#00".to_vec()), Err(WireError::Protocol { .. })), "a wrong sum");
    assert!(matches!(read(b"-".to_vec()), Err(WireError::Protocol { .. })));
    assert!(matches!(read(vec![b'+'; 1 << 20]), Err(WireError::Protocol { .. })));
    assert!(matches!(read(vec![b'$'; 1 << 20]), Err(WireError::Protocol { .. })));
    assert!(matches!(read(said("O41").repeat(1000)), Err(WireError::Protocol { .. })));
    let nobody = gdb::read("127.0.0.1:1", 0..16, limit, false);
    assert!(matches!(nobody, Err(WireError::Connect(_))), "{nobody:?}");
}

#[test]
fn a_machine_protocol_that_is_none_is_refused_in_time() {
    let limit = Duration::from_millis(300);
    let read = |words: &str| qmp::read(&qmp::Endpoint::Tcp(server(words)), 0..16, limit);
    assert!(matches!(read(""), Err(WireError::TimedOut { .. })));
    assert!(matches!(read("SSH-2.0-hello\n"), Err(WireError::Protocol { .. })));
    assert!(matches!(read("\n{}\n"), Err(WireError::Protocol { .. })));
    let greeting = "{\"QMP\": {}}\r\n{\"event\": \"RESUME\"}\n{\"return\": {}}\n";
    assert!(matches!(read(greeting), Err(WireError::TimedOut { .. })));
    let refused = read(&format!("{greeting}{{\"error\": {{\"desc\": \"no such command\"}}}}\n"));
    assert!(
        matches!(refused, Err(WireError::Refused { ref reason, .. }) if reason == "no such command")
    );
    let elsewhere = read(&format!("{greeting}{{\"return\": {{}}}}\n"));
    assert!(matches!(elsewhere, Err(WireError::Refused { .. })), "no file was written");
    assert!(matches!(read(&format!("{greeting}[]\n")), Err(WireError::Protocol { .. })));
    assert!(matches!(read(&"x".repeat(2 << 20)), Err(WireError::Protocol { .. })));
    let missing = qmp::read(&qmp::Endpoint::Unix("/nonexistent/qmp".into()), 0..16, limit);
    assert!(matches!(missing, Err(WireError::Connect(_))));
}

/// Bytes of the right kind, with some of them changed and the end cut off.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let object = object(Architecture::I386);
    let whole = prop::sample::select(vec![
        sample(),
        memory(),
        library(&[("rom.o", &object), ("raw", &sample())]),
        object,
        core(&[(0x1000, 0xc_0000, 0x1_0000), (0x1000, 0xd_0000, 0x1_0000)], &memory()),
    ]);
    let change = (any::<prop::sample::Index>(), any::<u8>());
    // Most structures stand at the beginning.
    let head = (0usize..256, any::<u8>());
    (
        whole,
        prop::collection::vec(change, 0..20),
        prop::collection::vec(head, 0..8),
        any::<prop::sample::Index>(),
        any::<bool>(),
    )
        .prop_map(|(mut bytes, changes, heads, end, cut)| {
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            for (at, value) in heads {
                bytes[at] = value;
            }
            if cut {
                bytes.truncate(end.index(bytes.len()));
            }
            bytes
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_never_ends_in_a_panic(
        bytes in damaged(),
        base in prop::option::of(prop_oneof![Just(0xc_0000), any::<u64>()]),
        rom in prop::option::of(0usize..4),
        at in prop::option::of(prop_oneof![Just(0xc_1000), any::<u64>()]),
    ) {
        let args = SourceArgs { base, rom, at, ..SourceArgs::default() };
        if let Ok(found) = find(&bytes, &args) {
            prop_assert!((1..=MOST_ROMS).contains(&found.roms.len()));
            prop_assert!(found.others.len() <= MOST_OTHERS);
            prop_assert!(found.roms.iter().all(|rom| rom.rom.file().len() <= LONGEST_ROM));
        }
    }

    #[test]
    fn bytes_without_meaning_are_no_source(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let _ = find(&bytes, &SourceArgs::default());
        let _ = find(&[&b"!<arch>\n"[..], &bytes].concat(), &SourceArgs::default());
        let _ = find(&[&b"\x7fELF\x01\x01\x01"[..], &bytes].concat(), &SourceArgs::default());
        let _ = find(&[&b"\x7fELF\x02\x02\x01"[..], &bytes].concat(), &SourceArgs::default());
    }
}

#[test]
fn other_roms_are_listed_by_what_they_are() {
    // Each a card's ROM, with another type of code; then one with `$PnP` only, one with neither, and one that is
    // VMI's alone.
    let card = |code_type: u8| {
        let mut bytes = other(4);
        bytes[24] = 0x40;
        bytes[0x40..0x48].copy_from_slice(b"PCIR\x86\x80\x0e\x10");
        bytes[0x40 + 20] = code_type;
        bytes
    };
    let mut pnp = other(4);
    pnp[26] = 0x40;
    pnp[0x40..0x44].copy_from_slice(b"$PnP");
    let mut unsigned = vec![0; STEP];
    unsigned[8..12].copy_from_slice(b"cVmi");
    let row = [card(0), card(1), card(3), card(7), pnp, other(4), unsigned].concat();
    let wanted = [
        "BIOS, PCI device 8086:100e, checksum wrong",
        "Open Firmware, PCI device 8086:100e, checksum wrong",
        "EFI, PCI device 8086:100e, checksum wrong",
        "code type 7, PCI device 8086:100e, checksum wrong",
        "BIOS, Plug and Play, checksum wrong",
        "BIOS",
        "VMI header without 55 AA: no guest finds it",
    ];
    for (base, unit) in [(None, "offset "), (Some(0xd_0000), "physical D")] {
        let args = SourceArgs { base, ..SourceArgs::default() };
        let text = find(&[row.clone(), vec![0; LONGEST_ROM]].concat(), &args).expect_err("no VMI");
        let text = text.to_string();
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(lines.len(), wanted.len(), "{text}");
        for (line, words) in lines.iter().zip(wanted) {
            assert!(line.trim().starts_with(unit) && line.ends_with(words), "{line}: {words}");
        }
    }
}

#[test]
fn one_rom_is_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    std::fs::write(&path, sample()).expect("a file");
    assert_eq!(one(&path).expect("a ROM").file(), sample());
    std::fs::write(&path, memory()).expect("a file");
    let several = one(&path).expect_err("two").to_string();
    assert!(several.ends_with("file: 2 VMI ROMs instead of one"), "{several}");
}

#[test]
fn what_is_read_as_a_whole_has_a_limit() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    for magic in [&b"\x7fELF\x01\x01\x01"[..], b"!<arch>\n", b"\x1f\x8b\x08"] {
        std::fs::write(&path, magic).expect("a file");
        // A hole: nothing of it is on the disk.
        let file = File::options().write(true).open(&path).expect("a file");
        file.set_len(LARGEST_OBJECT + 1).expect("a hole");
        let error = SourceArgs::of_file(&path).find().expect_err("too large").to_string();
        assert!(
            error.contains("has 268435457 bytes; objects and libraries are read up to"),
            "{error}"
        );
    }
}

#[test]
fn an_object_says_what_a_verdict_on_it_is_worth() {
    let mut file = Object::new(BinaryFormat::Elf, Architecture::I386, Endianness::Little);
    let section = file.add_section(Vec::new(), b".vmi".to_vec(), SectionKind::ReadOnlyData);
    file.append_section_data(section, &sample(), 4);
    let symbol = file.section_symbol(section);
    let relocation = object::write::Relocation {
        offset: 0x800,
        symbol,
        addend: 0,
        flags: object::RelocationFlags::Elf { r_type: object::elf::R_386_32 },
    };
    file.add_relocation(section, relocation).expect("a relocation");
    let mut bytes = file.write().expect("an object");
    let remark = |bytes: &[u8]| found(bytes).roms[0].remarks.join("; ");
    assert_eq!(
        remark(&bytes),
        "1 relocations are still to be applied: link the object for a verdict"
    );
    // A name beyond the table of names: the section's number is as good.
    let word =
        |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("a word")) as usize;
    let name = word(32) + 40;
    bytes[name..name + 4].copy_from_slice(&[0xff; 4]);
    assert_eq!(found(&bytes).roms[0].origin.section.as_deref(), Some("number 1"));
    // Behind all sections.
    bytes.extend(sample());
    let outside = found(&bytes);
    assert_eq!(outside.roms.len(), 2);
    assert_eq!(outside.roms[1].remarks, ["the header lies outside of all sections"]);
    assert_eq!(outside.roms[1].origin.section, None);
    // More than are kept.
    bytes.extend(sample()[..STEP].repeat(40));
    let many = found(&bytes);
    assert_eq!((many.roms.len(), many.left_out), (MOST_ROMS, 42 - MOST_ROMS as u64));
}

#[test]
fn a_length_of_0_takes_what_a_rom_can_have() {
    let mut bytes = sample();
    bytes[2] = 0;
    bytes.resize(LONGEST_ROM + 5000, 0x90);
    let rom = &find(&bytes, &SourceArgs { base: Some(0xc_0000), ..SourceArgs::default() })
        .expect("a ROM")
        .roms[0];
    assert_eq!(rom.rom.file().len(), LONGEST_ROM);
    assert_eq!(rom.remarks, ["the length byte is 0: 130560 bytes are taken"]);
}
