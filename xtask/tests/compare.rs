//! What a user of `compare` sees: one column for each mode, each mode's own failure, a status, a trace.
//!
//! The kernel is Debian's, from `cargo xtask setup --linux`. It runs with nested paging, where a boot has few exits and takes the
//! least time; the figures are held against bounds in the tests of the hypervisor.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use xtask::debian::{self, Flavour};

/// Runs `compare`, with a kernel that runs one short test.
fn compare(more: &[&str]) -> Output {
    let kernel = debian::kernel(Flavour::I686).expect("the kernel that `setup --linux` fetches");
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["compare", "--paging", "nested", "--append", "-- only=fork", "--kernel"])
        .arg(kernel)
        .args(more)
        .output()
        .expect("the binary starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

#[test]
fn three_modes_stand_side_by_side() {
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("trace.json");
    let output = compare(&["--json", "--trace", &trace.to_string_lossy()]);
    assert!(output.status.success(), "{output:?}");
    let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let boots = json["boots"].as_array().expect("boots");
    let names: Vec<&str> = boots.iter().filter_map(|boot| boot["below"].as_str()).collect();
    assert_eq!(names, ["trap", "vmi", "vmi-batched"]);
    for boot in boots {
        assert_eq!(
            (&boot["passes"], &boot["end"], &boot["tests"]),
            (&true.into(), &"guest".into(), &1.into()),
            "{boot}"
        );
        // What the issue of a run is: causes, hypercalls, updates, tables.
        for name in ["CR3 write", "hypercall", "updates carried", "tables shadowed"] {
            assert!(boot["counters"][name].is_u64(), "{name}: {boot}");
        }
        assert!(boot["exits"].as_u64().is_some_and(|exits| exits > 0), "{boot}");
    }
    assert!(json["trap/batched"]["exits"].is_f64(), "{json}");

    // A process for each mode in the trace, with as many exits as were counted.
    let trace: Value =
        serde_json::from_slice(&std::fs::read(&trace).expect("a trace")).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("events");
    for (index, boot) in boots.iter().enumerate() {
        let is_exit =
            |event: &&Value| event["pid"] == index + 1 && event["args"]["counted"] == true;
        let exits = events.iter().filter(is_exit).count() as u64;
        assert_eq!(Some(exits), boot["exits"].as_u64(), "{}", names[index]);
    }
}

/// The modes that take no ROM are shown, those that do not take this one are named with the reason.
#[test]
fn a_mode_that_fails_is_named_beside_those_that_pass() {
    let folder = tempfile::tempdir().expect("a folder");
    let rom = folder.path().join("bad.rom");
    let good = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/rom/good-native.rom");
    let mut bytes = std::fs::read(good).expect("a file of the corpus");
    *bytes.last_mut().expect("a byte") ^= 1;
    std::fs::write(&rom, bytes).expect("a file");
    let output = compare(&["--rom", &rom.to_string_lossy()]);
    // What the hypervisor ends with when it cannot use a module.
    assert_eq!(output.status.code(), Some(67), "{output:?}");
    let shown = text(&output.stdout);
    let heading = shown.lines().next().expect("a heading");
    assert_eq!(
        heading.split_whitespace().collect::<Vec<_>>(),
        ["counter", "trap", "vmi", "vmi-batched"]
    );
    let exits: Vec<&str> = shown.lines().nth(1).expect("a row").split_whitespace().collect();
    assert!(
        matches!(exits[..], ["exits", count, "-", "-"] if count.parse::<u64>().is_ok()),
        "{exits:?}"
    );
    assert!(shown.contains("trap passes: 1 tests"), "{shown}");
    for mode in ["vmi", "vmi-batched"] {
        let line = format!("{mode} FAILS: bad-arguments: the hypervisor ended it");
        assert!(shown.contains(&line), "no `{line}`: {shown}");
    }
    assert!(shown.contains("the ROM: its bytes do not add up to 0"), "{shown}");
    // Signs of life go elsewhere.
    assert!(text(&output.stderr).contains("vmi-batched"), "{output:?}");
}
