//! Verdicts as SARIF 2.1.0, in the way that GitHub's code scanning reads it.

use super::{Judged, is_undecided, place, sentence};
use crate::inspect::rules::{NotApplicable, Note, Rule, Violation};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fmt::Write;

/// Where the form is described.
const SCHEMA: &str = "https://json.schemastore.org/sarif-2.1.0.json";

/// All verdicts as one run.
///
/// # Errors
///
/// None that is known.
pub fn sarif(verdicts: &[Judged<'_>]) -> serde_json::Result<String> {
    let results: Vec<Value> = verdicts
        .iter()
        .flat_map(|judged| judged.report.violations.iter().map(|found| result(judged, found)))
        .collect();
    let notes: Vec<Value> = verdicts
        .iter()
        .flat_map(|judged| {
            let notes = judged.report.notes.iter().map(|note| notification(judged, note));
            let skipped = judged.report.not_applicable.iter();
            notes.chain(skipped.map(|skipped| not_applicable(judged, skipped)))
        })
        .collect();
    let document = json!({
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "vmi-verify",
                "semanticVersion": env!("CARGO_PKG_VERSION"),
                "rules": Rule::ALL.iter().map(|rule| descriptor(*rule)).collect::<Vec<_>>(),
            }},
            // The verdict was reached, whatever it is.
            "invocations": [{ "executionSuccessful": true, "toolExecutionNotifications": notes }],
            "artifacts": verdicts.iter().map(|judged| json!({
                "location": { "uri": uri(judged.source) },
            })).collect::<Vec<_>>(),
            "results": results,
        }],
    });
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

fn descriptor(rule: Rule) -> Value {
    let help = format!("{}\n\n{}", rule.reason(), rule.remedy());
    json!({
        "id": rule.name(),
        "name": format!("{rule:?}"),
        "shortDescription": { "text": rule.meaning() },
        "fullDescription": { "text": format!("{} {}", rule.meaning(), rule.reason()) },
        "help": {
            "text": help,
            "markdown": format!("**Why it matters.** {}\n\n**How to fix it.** {}", rule.reason(), rule.remedy()),
        },
        "defaultConfiguration": { "level": if rule == Rule::Undecided { "warning" } else { "error" } },
        "properties": { "tags": ["firmware", "vmi"] },
    })
}

fn result(judged: &Judged<'_>, found: &Violation) -> Value {
    let rule_index = Rule::ALL.iter().position(|rule| *rule == found.rule).unwrap_or_default();
    // GitHub shows nothing without a line; a binary has one, as it were. Text and binary properties
    // of a region are independent of each other (SARIF 3.30.4).
    let mut region = json!({ "startLine": 1 });
    // Bytes that were unpacked, or read from a machine, have no offset in the file.
    if let (Some(start), Some(offset)) = (judged.origin.file_offset, found.offset) {
        region["byteOffset"] = json!(start + offset as u64);
        region["byteLength"] = json!(1);
    }
    if let Some(instruction) = &found.instruction {
        region["snippet"] = json!({ "text": instruction });
    }
    let kind = if found.call.is_some() { "function" } else { "module" };
    let mut physical_location = json!({
        "artifactLocation": { "uri": uri(judged.source) },
        "region": region,
    });
    if let (Some(start), Some(offset)) = (judged.origin.physical, found.offset) {
        physical_location["address"] =
            json!({ "absoluteAddress": start.wrapping_add(offset as u64) });
    }
    json!({
        "ruleId": found.rule.name(),
        "ruleIndex": rule_index,
        "level": if is_undecided(found) { "warning" } else { "error" },
        "message": { "text": sentence(found) },
        "locations": [{
            "physicalLocation": physical_location,
            "logicalLocations": [{
                "name": found.subject,
                "fullyQualifiedName": place(found),
                "kind": kind,
            }],
        }],
        "partialFingerprints": { "primaryLocationLineHash": fingerprint(found) },
    })
}

/// What makes a violation the same one in the next build, where the code lies elsewhere.
fn fingerprint(found: &Violation) -> String {
    let mut hash = Sha256::new();
    let instruction = found.instruction.as_deref().unwrap_or_default();
    for part in [found.rule.name(), found.subject, instruction] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let mut text = String::new();
    for byte in hash.finalize().iter().take(8) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn notification(judged: &Judged<'_>, note: &Note) -> Value {
    told(judged, &format!("{}: {}", note.subject, note.detail))
}

fn told(judged: &Judged<'_>, text: &str) -> Value {
    json!({
        "level": "note",
        "message": { "text": text },
        "locations": [{ "physicalLocation": { "artifactLocation": { "uri": uri(judged.source) } } }],
    })
}

/// GitHub takes every result for an alert, so that a rule without a say is told of beside them.
fn not_applicable(judged: &Judged<'_>, skipped: &NotApplicable) -> Value {
    let NotApplicable { rule, reason } = skipped;
    let mut value = told(judged, &format!("{rule}: not applicable: {reason}"));
    let index = Rule::ALL.iter().position(|known| known == rule).unwrap_or_default();
    value["associatedRule"] = json!({ "id": rule.name(), "index": index });
    value
}

/// A path as a URI reference: relative ones stay relative to the repository.
fn uri(source: &str) -> String {
    let mut text = if source.starts_with('/') { "file://".to_owned() } else { String::new() };
    // A colon in the first part of a relative reference would make it a scheme (RFC 3986, 4.2).
    for byte in source.trim_start_matches("./").bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            text.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_references() {
        assert_eq!(uri("./target/rom/a b.rom"), "target/rom/a%20b.rom");
        assert_eq!(uri("/tmp/x:1#2"), "file:///tmp/x%3A1%232");
    }
}
