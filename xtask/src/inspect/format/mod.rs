//! Verdicts in the forms that other programs read.

mod json;
mod junit;
mod sarif;
#[cfg(test)]
mod tests;

pub use json::{SCHEMA_VERSION, json};
pub use junit::junit;
pub use sarif::sarif;

use super::rules::{Report, Rule, Violation};

/// A verdict and where the ROM was found.
#[derive(Clone, Copy, Debug)]
pub struct Judged<'a> {
    /// The file, or whatever the ROM came from.
    pub source: &'a str,
    /// Offset of the ROM in it.
    pub start: u64,
    /// The verdict.
    pub report: &'a Report,
}

/// What a violation is in, as a reader knows it: `call 30 DisableInterrupts`, `image`.
fn place(violation: &Violation) -> String {
    match violation.call {
        Some(number) => format!("call {number} {}", violation.subject),
        None => violation.subject.to_owned(),
    }
}

/// A violation in a sentence.
fn sentence(violation: &Violation) -> String {
    let at = match (violation.offset, &violation.instruction) {
        (Some(offset), Some(instruction)) => format!(" at {offset:X}h `{instruction}`"),
        (Some(offset), None) => format!(" at {offset:X}h"),
        _ => String::new(),
    };
    format!("{}{at}: {}", place(violation), violation.detail)
}

/// What was not decided is no fault yet, but no pass either.
fn is_undecided(violation: &Violation) -> bool {
    violation.rule == Rule::Undecided
}
