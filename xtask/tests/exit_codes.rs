//! What a script sees of `inspect`, `verify`, `diff`, and of a `run` that is refused: status, the two streams, no colour.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The forms of a verdict.
const FORMATS: [&str; 4] = ["text", "json", "sarif", "junit"];

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/rom").join(name)
}

fn good() -> PathBuf {
    corpus("good-native.rom")
}

/// The same with one fault.
fn bad() -> PathBuf {
    corpus("lost-register.rom")
}

fn run(words: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    for name in ["RUST_LOG", "CLICOLOR_FORCE", "FORCE_COLOR"] {
        command.env_remove(name);
    }
    let output = command.args(words).output().expect("the binary starts");
    for stream in [&output.stdout, &output.stderr] {
        assert!(!stream.contains(&0x1b), "colour in a pipe: {output:?}");
    }
    output
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

#[track_caller]
fn ends(output: &Output, status: i32) -> String {
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    // A verdict is on one stream, and that there is none on the other.
    assert_eq!(output.stdout.is_empty(), status == 2, "{output:?}");
    assert_eq!(output.stderr.is_empty(), status != 2, "{output:?}");
    text(if status == 2 { &output.stderr } else { &output.stdout }).to_owned()
}

/// A folder with files that cannot be read as a ROM, and what has to be said of each.
fn unreadable() -> (tempfile::TempDir, Vec<(PathBuf, &'static str)>) {
    let folder = tempfile::tempdir().expect("a folder");
    let image = std::fs::read(good()).expect("a file of the corpus");
    let mut core = b"\x7fELF\x01\x01\x01".to_vec();
    core.resize(52, 0xff);
    core[16..18].copy_from_slice(&[4, 0]);
    core[18..24].copy_from_slice(&[3, 0, 1, 0, 0, 0]);
    core[40..42].copy_from_slice(&[52, 0]);
    let files: [(&str, &[u8], &str); 10] = [
        ("empty", b"", "0 bytes are fewer than the 144"),
        ("short", &image[..100], "100 bytes are fewer than the 144"),
        ("text", &b"no ROM ".repeat(100), "neither `55 AA` at offset 0 nor `cVmi` at offset 8"),
        ("elf", b"\x7fELF\x01\x01\x01", "no VMI ROM found"),
        ("core", &core, "a core dump without a list of segments"),
        ("thin", b"!<thin>\n", "a thin library"),
        ("library", b"!<arch>\nx", "Invalid archive member header"),
        ("gz", b"\x1f\x8b\x08", "damaged gzip data"),
        ("bz2", b"BZh9", "compressed with bzip2"),
        ("zeros", &[0; 1 << 18], "no VMI ROM found"),
    ];
    let mut list = vec![(folder.path().join("missing"), "cannot read")];
    for (name, bytes, words) in files {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("a file");
        list.push((path, words));
    }
    list.push((folder.path().to_owned(), "cannot read"));
    (folder, list)
}

#[test]
fn verify_is_0_1_or_2_in_every_form() {
    let (_folder, unreadable) = unreadable();
    for format in FORMATS {
        let verdict = |file: &Path| run(&[&"verify", &"--format", &format, &file]);
        let (right, wrong) = (ends(&verdict(&good()), 0), ends(&verdict(&bad()), 1));
        let fault = "changes ECX, which the call must keep";
        assert!(wrong.contains(fault) && !right.contains(fault), "{format}: {wrong}");
        match format {
            "text" => assert!(right.contains("\nclean: ") && wrong.contains("\n1 violation: ")),
            "json" | "sarif" => {
                for text in [&right, &wrong] {
                    serde_json::from_str::<Value>(text).expect("JSON");
                }
            }
            _ => {
                for (text, failures) in [(&right, 0), (&wrong, 1)] {
                    let report = quick_junit::Report::deserialize_from_str(text).expect("JUnit");
                    assert_eq!(report.failures, failures);
                }
            }
        }
        for (file, words) in &unreadable {
            let said = ends(&verdict(file), 2);
            assert!(said.starts_with("error: ") && said.contains(words), "{words}: {said}");
            assert!(said.contains(&*file.to_string_lossy()), "the file is not named: {said}");
        }
    }
    let said = ends(&run(&[&"verify", &"--format", &"html", &good()]), 2);
    assert!(said.contains("possible values: text, json, sarif, junit"), "{said}");
}

#[test]
fn inspect_is_0_or_2() {
    let (_folder, unreadable) = unreadable();
    for more in
        [&["--json"][..], &[], &["--map", "-"], &["--call", "29"], &["--call", "29", "--json"]]
    {
        let look = |file: &Path| {
            let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"inspect"];
            words.extend(more.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
            words.push(&file);
            run(&words)
        };
        for file in [good(), bad()] {
            let shown = ends(&look(&file), 0);
            assert_eq!(serde_json::from_str::<Value>(&shown).is_ok(), more.contains(&"--json"));
        }
        for (file, words) in &unreadable {
            let said = ends(&look(file), 2);
            assert!(said.starts_with("error: ") && said.contains(words), "{words}: {said}");
        }
    }
    let said = ends(&run(&[&"inspect", &good(), &"--call", &"Fly"]), 2);
    assert!(said.contains("no call `Fly`"), "{said}");
    let folder = tempfile::tempdir().expect("a folder");
    let said = ends(&run(&[&"inspect", &good(), &"--map", &folder.path().join("no/such.svg")]), 2);
    assert!(said.contains("cannot write"), "{said}");
    ends(&run(&[&"inspect", &good(), &"--map", &folder.path().join("map.svg")]), 0);
    // A revision that cannot be looked at.
    let mut other = std::fs::read(good()).expect("a file of the corpus");
    other[13] = 7;
    let path = folder.path().join("seven.rom");
    std::fs::write(&path, other).expect("a file");
    let said = ends(&run(&[&"inspect", &path]), 2);
    assert!(said.contains("interface revision 7."), "{said}");
}

#[test]
fn diff_is_0_1_or_2() {
    let (_folder, unreadable) = unreadable();
    for more in [&["--json"][..], &[]] {
        let compare = |a: &Path, b: &Path| {
            let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"diff", &a, &b];
            words.extend(more.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
            run(&words)
        };
        ends(&compare(&good(), &good()), 0);
        let shown = ends(&compare(&good(), &bad()), 1);
        assert!(shown.contains("DisableInterrupts"), "{shown}");
        for (file, words) in &unreadable {
            for (a, b) in [(file, &good()), (&good(), file)] {
                let said = ends(&compare(a, b), 2);
                assert!(said.starts_with("error: ") && said.contains(words), "{words}: {said}");
            }
        }
    }
}

/// Both images in a dump, the right one first.
fn dump() -> Vec<u8> {
    let mut bytes = vec![0; 0x2_0000];
    for (at, file) in [(0x8000, good()), (0x1_0800, bad())] {
        let image = std::fs::read(file).expect("a file of the corpus");
        bytes[at..at + image.len()].copy_from_slice(&image);
    }
    bytes
}

#[test]
fn diff_takes_what_inspect_takes_with_options_for_each_side() {
    let folder = tempfile::tempdir().expect("a folder");
    let (dump_file, packed) = (folder.path().join("dump"), folder.path().join("dump.gz"));
    std::fs::write(&dump_file, dump()).expect("a file");
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, &dump()).expect("a vector grows");
    std::fs::write(&packed, encoder.finish().expect("a vector grows")).expect("a file");

    for file in [&dump_file, &packed] {
        ends(&run(&[&"diff", file, &"--rom", &"1", &"--", &good()]), 0);
        ends(&run(&[&"diff", file, &"--at", &"0x8000", &"--", &good()]), 0);
        ends(&run(&[&"diff", &good(), &"--", file, &"--rom", &"2"]), 1);
        ends(&run(&[&"diff", &bad(), &"--", file, &"--rom", &"2"]), 0);
        let based = ["--base", "C0000h", "--at"];
        let [base, address, at] = based;
        let first: [&dyn AsRef<std::ffi::OsStr>; 6] =
            [&"diff", file, &base, &address, &at, &"C8000h"];
        let second: [&dyn AsRef<std::ffi::OsStr>; 6] =
            [&"--", file, &base, &address, &at, &"0xD0800"];
        let shown = ends(&run(&[&first[..], &second].concat()), 1);
        assert!(shown.contains("physical C8000h") && shown.contains("physical D0800h"), "{shown}");
        let said = ends(&run(&[&"diff", file, &good()]), 2);
        assert!(said.contains("2 VMI ROMs instead of one: choose with --rom or --at"), "{said}");
        assert!(said.contains("offset 8000h") && said.contains("offset 10800h"), "{said}");
    }
    // It must be plain whose option it is, and there must be a second side.
    ends(&run(&[&"diff", &dump_file, &good(), &"--rom", &"1"]), 2);
    ends(&run(&[&"diff", &good()]), 2);
    ends(&run(&[&"diff", &good(), &bad(), &"--", &bad()]), 2);
    ends(&run(&[&"diff", &good(), &"--", &bad(), &"--rom", &"first"]), 2);
    ends(&run(&[&"diff", &good(), &"--"]), 2);
    let said = ends(&run(&[&"diff", &good(), &"--", &"--qmp", &"unix:/nonexistent"]), 2);
    assert!(said.contains("QEMU at unix:/nonexistent: cannot connect"), "{said}");
    let said = ends(&run(&[&"diff", &"--gdb", &"127.0.0.1:1", &"--", &good()]), 2);
    assert!(said.contains("gdb stub at 127.0.0.1:1: cannot connect"), "{said}");
}

#[test]
fn one_fault_among_several_roms_is_a_fault() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("dump");
    std::fs::write(&file, dump()).expect("a file");
    let place = |based: bool| {
        let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> =
            vec![&"verify", &file, &"--format", &"sarif"];
        if based {
            words.extend([&"--base" as &dyn AsRef<std::ffi::OsStr>, &"0xC0000"]);
        }
        let sarif: Value = serde_json::from_str(&ends(&run(&words), 1)).expect("JSON");
        let results = sarif.pointer("/runs/0/results").and_then(Value::as_array).expect("results");
        assert_eq!(results.len(), 1);
        results[0].pointer("/locations/0/physicalLocation").expect("a place").clone()
    };
    // The fault is at 491h of the second image.
    let in_file = place(false);
    assert_eq!(in_file.pointer("/region/byteOffset"), Some(&Value::from(0x1_0800 + 0x491)));
    assert_eq!(in_file.get("address"), None);
    let in_memory = place(true);
    assert_eq!(in_memory.pointer("/region/byteOffset"), Some(&Value::from(0x1_0800 + 0x491)));
    let address = in_memory.pointer("/address/absoluteAddress");
    assert_eq!(address, Some(&Value::from(0xd_0800 + 0x491)));
    ends(&run(&[&"verify", &file, &"--rom", &"1"]), 0);
    ends(&run(&[&"verify", &file, &"--rom", &"2"]), 1);
    let said = ends(&run(&[&"verify", &file, &"--rom", &"3"]), 2);
    assert!(said.contains("there is no ROM 3: 2 found"), "{said}");
    let said = ends(&run(&[&"verify", &file, &"--at", &"0x20000"]), 2);
    assert!(said.contains("address 20000h is not in what was read"), "{said}");
    let said = ends(&run(&[&"verify", &file, &"--at", &"0x1000"]), 2);
    assert!(said.contains("address 1000h: not a VMI ROM"), "{said}");
}

#[test]
fn run_refuses_what_its_host_does_not_take() {
    for (option, value, host) in [
        ("--mode", "trap", "run --on xen"),
        ("--xen", "debug", "run --on reference"),
        ("--rom", "FILE", "run --on kvm --kernel FILE"),
        ("--trace", "FILE", "run"),
        ("--paging", "nested", "run --on all"),
    ] {
        let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> = Vec::new();
        let host_words: Vec<&str> = host.split(' ').collect();
        words.extend(host_words.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
        words.extend([&option as &dyn AsRef<std::ffi::OsStr>, &value]);
        let said = ends(&run(&words), 2);
        let wanted = format!("error: {option} does not go with `{host}`, but with `run");
        assert!(said.starts_with(&wanted), "{said}");
    }
}

#[test]
fn run_and_compare_refuse_what_is_no_kernel() {
    let missing = std::path::PathBuf::from("no-such-file");
    for (file, words) in [(good(), "no HdrS at 202h"), (missing, "there is no file")] {
        for verb in [&["compare"][..], &["run"], &["run", "--on", "reference"]] {
            let mut line: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![];
            line.extend(verb.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
            line.extend([&"--kernel" as &dyn AsRef<std::ffi::OsStr>, &file]);
            let output = run(&line);
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            let said = text(&output.stderr);
            assert!(said.contains(words) && said.contains(&*file.to_string_lossy()), "{said}");
        }
    }
}

#[test]
fn run_refuses_to_leave_the_rom_out_where_it_is_wanted() {
    for (words, why) in [
        ("run --rom none", "--no-rom"),
        ("run --on reference --rom none", "--no-rom"),
        ("run --costs --kernel FILE --rom none", "nothing to compare"),
        ("run --on reference --mode vmi-batched --kernel FILE --rom none", "--mode trap"),
    ] {
        let line: Vec<&str> = words.split(' ').collect();
        let line: Vec<_> = line.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>).collect();
        let output = run(&line);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = text(&output.stderr);
        assert!(said.starts_with("error: --rom none") && said.contains(why), "{words}: {said}");
    }
}

#[test]
fn run_and_compare_refuse_what_is_no_rom() {
    let (_folder, unreadable) = unreadable();
    let is_plain = |words: &str| {
        ["cannot", "0 bytes", "100 bytes", "neither"].iter().any(|start| words.starts_with(start))
    };
    for (file, words) in unreadable.iter().filter(|(_, words)| is_plain(words)) {
        for more in [&[][..], &["--on", "reference"], &["--on", "xen"], &["--on", "all"]] {
            let mut line: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"run", &"--rom", file];
            line.extend(more.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
            let output = run(&line);
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            let said = text(&output.stderr);
            assert!(said.starts_with("error: ") && said.contains(words), "{words}: {said}");
        }
        let output = run(&[&"compare", &"--kernel", &good(), &"--rom", file]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains(words), "{output:?}");
    }
}
