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
use super::source::Origin;

/// A verdict and where the ROM was found.
#[derive(Clone, Copy, Debug)]
pub struct Judged<'a> {
    /// The file with the member of a library, or whatever the ROM came from.
    pub source: &'a str,
    /// Where in it the ROM was found.
    pub origin: &'a Origin,
    /// The verdict.
    pub report: &'a Report,
}

impl Judged<'_> {
    /// Offset of the ROM in the file; in what was read or unpacked, if there is none in the file.
    fn start(&self) -> u64 {
        self.origin.file_offset.unwrap_or(self.origin.offset)
    }
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
