//! Verdicts as JSON of our own.

use super::Judged;
use crate::inspect::rules::{NotApplicable, Note, Rule, Violation};
use serde::Serialize;

/// The version of the form; it rises when a field changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize)]
struct Document<'a> {
    version: u32,
    clean: bool,
    roms: Vec<RomVerdict<'a>>,
}

#[derive(Serialize)]
struct RomVerdict<'a> {
    source: &'a str,
    start: u64,
    clean: bool,
    violations: Vec<Broken<'a>>,
    notes: &'a [Note],
    not_applicable: &'a [NotApplicable],
}

#[derive(Serialize)]
struct Broken<'a> {
    #[serde(flatten)]
    violation: &'a Violation,
    /// The name that all other forms print; `rule` is the name in the sources.
    name: &'static str,
    meaning: &'static str,
    remedy: &'static str,
}

fn broken(violation: &Violation) -> Broken<'_> {
    let rule: Rule = violation.rule;
    Broken { violation, name: rule.name(), meaning: rule.meaning(), remedy: rule.remedy() }
}

/// All verdicts in one document.
///
/// # Errors
///
/// None that is known: the types have no maps with other keys than strings.
pub fn json(verdicts: &[Judged<'_>]) -> serde_json::Result<String> {
    let roms: Vec<_> = verdicts
        .iter()
        .map(|judged| RomVerdict {
            source: judged.source,
            start: judged.start(),
            clean: judged.report.is_clean(),
            violations: judged.report.violations.iter().map(broken).collect(),
            notes: &judged.report.notes,
            not_applicable: &judged.report.not_applicable,
        })
        .collect();
    let clean = roms.iter().all(|rom| rom.clean);
    Ok(serde_json::to_string_pretty(&Document { version: SCHEMA_VERSION, clean, roms })? + "\n")
}
