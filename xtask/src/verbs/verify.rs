//! `cargo xtask verify`: whether a ROM keeps the contract.

use super::inspect::read;
use crate::inspect::format::{self, Judged};
use crate::inspect::{report, verify};
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;

/// Holds a ROM against the contract: exit 0 if it is clean, 1 with every violation, 2 if it cannot be read
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A VMI ROM of revision 3.0
    file: PathBuf,

    /// Form of the verdict: for a reader, of our own, for code scanning, for test reports
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// Who is to read the verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Lines for a reader
    Text,
    /// JSON of our own; its `version` field rises when a field changes its meaning
    Json,
    /// SARIF 2.1.0, as code scanning on GitHub takes it
    Sarif,
    /// JUnit XML, with a test case for each rule and each call
    Junit,
}

impl Format {
    fn write(self, judged: &Judged<'_>) -> Result<String> {
        let verdicts = std::slice::from_ref(judged);
        Ok(match self {
            Self::Text => report::verdict(judged.report),
            Self::Json => format::json(verdicts)?,
            Self::Sarif => format::sarif(verdicts)?,
            Self::Junit => format::junit(verdicts)?,
        })
    }
}

/// Prints every violation and a summary.
///
/// # Errors
///
/// The output cannot be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let rom = match read(&args.file) {
        Ok(rom) => rom,
        Err(error) => {
            anstream::eprintln!("error: {error:#}");
            return Ok(ExitCode::from(2));
        }
    };
    let verdict = verify(&rom);
    let source = args.file.to_string_lossy();
    let judged = Judged { source: &source, start: 0, report: &verdict };
    anstream::print!("{}", args.format.write(&judged)?);
    Ok(if verdict.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
