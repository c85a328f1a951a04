//! What is written can be read back, and says the same.

use super::*;
use crate::inspect::samples::Sample;
use crate::inspect::slot_samples::Slots;
use crate::inspect::source::Compression;
use crate::inspect::{Rom, verify};
use iced_x86::code_asm::*;
use serde_json::Value;
use vmi_abi::number;

/// A verdict with a fault in a call, one in the image, one that is undecided, and a note.
fn broken() -> Report {
    let mut sample = Sample::new();
    sample.license(b"<BSD> & \"co\"\0");
    sample.call(number::DisableInterrupts, |a| {
        a.cli()?;
        a.mov(ecx, 1)?;
        a.ret()
    });
    sample.call(number::GetCR0, |a| {
        a.vmcall()?;
        a.ret()
    });
    let report = verify(&Rom::parse(&sample.build()).expect("a ROM"));
    assert_eq!(report.violations.len(), 3, "{:#?}", report.violations);
    report
}

/// A place in a file.
fn at(offset: u64) -> Origin {
    Origin { file_offset: Some(offset), ..Origin::default() }
}

fn clean() -> Report {
    verify(&Rom::parse(&Sample::new().build()).expect("a ROM"))
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("{pointer}: {value:#}"))
}

#[test]
fn sarif_can_be_read_back() {
    let (broken, clean) = (broken(), clean());
    let verdicts = [
        Judged { source: "a b.rom", origin: &at(0x1000), report: &broken },
        Judged { source: "good.rom", origin: &at(0), report: &clean },
    ];
    let document: Value = serde_json::from_str(&sarif(&verdicts).expect("text")).expect("JSON");
    assert_eq!(text(&document, "/version"), "2.1.0");
    let rules = document.pointer("/runs/0/tool/driver/rules").and_then(Value::as_array);
    let rules = rules.expect("rules");
    assert_eq!(rules.len(), Rule::ALL.len());
    for rule in rules {
        for pointer in ["/id", "/shortDescription/text", "/fullDescription/text", "/help/text"] {
            assert!(!text(rule, pointer).is_empty());
        }
    }
    let results = document.pointer("/runs/0/results").and_then(Value::as_array).expect("results");
    assert_eq!(results.len(), 3);
    for (result, violation) in results.iter().zip(&broken.violations) {
        let index = result["ruleIndex"].as_u64().expect("an index") as usize;
        assert_eq!(rules[index]["id"], result["ruleId"]);
        assert_eq!(text(result, "/ruleId"), violation.rule.name());
        assert!(text(result, "/message/text").contains(&violation.detail));
        let location = result.pointer("/locations/0").expect("a location");
        assert_eq!(text(location, "/physicalLocation/artifactLocation/uri"), "a%20b.rom");
        assert_eq!(text(location, "/logicalLocations/0/name"), violation.subject);
        let offset = location.pointer("/physicalLocation/region/byteOffset");
        let wanted = violation.offset.map(|offset| 0x1000 + offset as u64);
        assert_eq!(offset.and_then(Value::as_u64), wanted);
    }
    let elsewhere = [
        Origin { offset: 0x40, physical: Some(0xc_8000), ..Origin::default() },
        Origin { offset: 12, section: Some(".vmi".into()), ..at(0x2000) },
        Origin { offset: 12, unpacked: Some(Compression::Gzip), ..Origin::default() },
    ];
    let wanted = [(None, Some(0xc_8000)), (Some(0x2000), None), (None, None)];
    for (origin, (in_file, physical)) in elsewhere.iter().zip(wanted) {
        let verdicts = [Judged { source: "x", origin, report: &broken }];
        let document: Value = serde_json::from_str(&sarif(&verdicts).expect("text")).expect("JSON");
        let number = |place: &str| {
            let path = format!("/runs/0/results/1/locations/0/physicalLocation/{place}");
            document.pointer(&path).and_then(Value::as_u64)
        };
        let offset = broken.violations[1].offset.map(|offset| offset as u64);
        let sum = |start: Option<u64>| start.zip(offset).map(|(start, offset)| start + offset);
        assert!(offset.is_some());
        assert_eq!(number("region/byteOffset"), sum(in_file), "{origin}");
        assert_eq!(number("address/absoluteAddress"), sum(physical), "{origin}");
    }
    let levels: Vec<_> = results.iter().map(|result| text(result, "/level")).collect();
    assert_eq!(levels, ["error", "warning", "error"]);
    let prints: std::collections::BTreeSet<_> = results
        .iter()
        .map(|result| text(result, "/partialFingerprints/primaryLocationLineHash"))
        .collect();
    assert_eq!(prints.len(), 3);
    let notes = document.pointer("/runs/0/invocations/0/toolExecutionNotifications");
    assert_eq!(
        notes.and_then(Value::as_array).map(Vec::len),
        Some([&broken, &clean].iter().map(|r| r.notes.len() + r.not_applicable.len()).sum())
    );
}

#[test]
fn junit_can_be_read_back() {
    let (broken, clean) = (broken(), clean());
    let verdicts = [
        Judged { source: "a <b>.rom", origin: &at(0x1000), report: &broken },
        Judged { source: "good.rom", origin: &at(0), report: &clean },
    ];
    let document = quick_junit::Report::deserialize_from_str(&junit(&verdicts).expect("text"))
        .expect("JUnit XML");
    assert_eq!((document.failures, document.errors), (2, 1));
    let [bad, good] = &document.test_suites[..] else { panic!("{document:#?}") };
    assert_eq!(bad.name.as_str(), "a <b>.rom at 1000h");
    // A case for each rule, and one for each of the 7 calls with code.
    assert_eq!((bad.tests, good.tests), (Rule::ALL.len() + 7, Rule::ALL.len() + 6));
    assert_eq!((good.failures, good.errors), (0, 0));
    let case = bad.test_cases.iter().find(|case| case.name.as_str() == "30 DisableInterrupts");
    let quick_junit::TestCaseStatus::NonSuccess { message, ty, .. } =
        &case.expect("the call's case").status
    else {
        panic!("a failure")
    };
    assert_eq!(ty.as_ref().map(quick_junit::XmlString::as_str), Some("register"));
    assert!(message.as_ref().is_some_and(|text| text.as_str().contains("changes ECX")));
    let license = bad.test_cases.iter().find(|case| case.name.as_str() == "licence");
    assert!(format!("{:?}", license.map(|case| &case.status)).contains("<BSD> &"));
}

#[test]
fn json_can_be_read_back() {
    let (broken, clean) = (broken(), clean());
    let verdicts = [
        Judged { source: "bad.rom", origin: &at(0), report: &broken },
        Judged { source: "good.rom", origin: &at(0), report: &clean },
    ];
    let document: Value = serde_json::from_str(&json(&verdicts).expect("text")).expect("JSON");
    assert_eq!(document["version"], SCHEMA_VERSION);
    assert_eq!(document["clean"], false);
    assert_eq!(document.pointer("/roms/1/clean"), Some(&Value::Bool(true)));
    for (place, violation) in broken.violations.iter().enumerate() {
        let found = &document["roms"][0]["violations"][place];
        assert_eq!(found["name"], violation.rule.name());
        assert_eq!(found["detail"], violation.detail);
        assert_eq!(found["offset"].as_u64(), violation.offset.map(|offset| offset as u64));
    }
}

#[test]
fn what_does_not_apply_is_told_in_each_form() {
    let report = verify(&Rom::parse(&Slots::new(0).build()).expect("a ROM"));
    let skipped: Vec<&str> = report.not_applicable.iter().map(|s| s.rule.name()).collect();
    assert_eq!(skipped.len(), 6);
    let verdicts = [Judged { source: "slots.rom", origin: &at(0), report: &report }];

    let document: Value = serde_json::from_str(&json(&verdicts).expect("text")).expect("JSON");
    let told = document.pointer("/roms/0/not_applicable").and_then(Value::as_array);
    let told = told.expect("a list");
    assert_eq!(told.iter().map(|one| text(one, "/rule")).collect::<Vec<_>>(), skipped);
    assert!(told.iter().all(|one| !text(one, "/reason").is_empty()));

    let document: Value = serde_json::from_str(&sarif(&verdicts).expect("text")).expect("JSON");
    let notes = document.pointer("/runs/0/invocations/0/toolExecutionNotifications");
    let notes = notes.and_then(Value::as_array).expect("notifications").iter();
    let rules: Vec<_> = notes.filter_map(|note| note.pointer("/associatedRule")).collect();
    assert_eq!(rules.iter().map(|rule| text(rule, "/id")).collect::<Vec<_>>(), skipped);
    for rule in rules {
        let index = rule["index"].as_u64().expect("an index") as usize;
        assert_eq!(Rule::ALL[index].name(), text(rule, "/id"));
    }

    let document = quick_junit::Report::deserialize_from_str(&junit(&verdicts).expect("text"))
        .expect("JUnit XML");
    let cases = document.test_suites[0].test_cases.iter();
    let cases: Vec<&str> = cases
        .filter(|case| matches!(case.status, quick_junit::TestCaseStatus::Skipped { .. }))
        .map(|case| case.name.as_str())
        .collect();
    assert_eq!(cases, skipped);
}

#[test]
fn nothing_to_tell_is_told_in_each_form() {
    let empty = Report::default();
    let verdicts = [Judged { source: "", origin: &at(0), report: &empty }];
    for verdicts in [&verdicts[..], &[]] {
        assert!(serde_json::from_str::<Value>(&sarif(verdicts).expect("text")).is_ok());
        assert!(serde_json::from_str::<Value>(&json(verdicts).expect("text")).is_ok());
        let text = junit(verdicts).expect("text");
        assert!(quick_junit::Report::deserialize_from_str(&text).is_ok(), "{text}");
    }
}
