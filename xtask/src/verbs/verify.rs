//! `cargo xtask verify`: whether a ROM keeps the contract.

use super::inspect::{heading, remainder};
use crate::inspect::format::{self, Judged};
use crate::inspect::source::{Found, SourceArgs};
use crate::inspect::{Report, report, verify};
use anyhow::Result;
use std::process::ExitCode;

/// Holds a ROM against the contract: exit 0 if it is clean, 1 with every violation, 2 if it cannot be read
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,

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

/// Prints every violation and a summary, for each ROM that is found.
///
/// # Errors
///
/// The output cannot be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let found = match args.source.find() {
        Ok(found) => found,
        Err(error) => {
            let error = anyhow::Error::new(error);
            anstream::eprintln!("error: {error:#}");
            return Ok(ExitCode::from(2));
        }
    };
    let reports: Vec<Report> = found.roms.iter().map(|rom| verify(&rom.rom)).collect();
    anstream::print!("{}", args.format.write(&found, &reports)?);
    let is_clean = reports.iter().all(Report::is_clean);
    Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Format {
    fn write(self, found: &Found, reports: &[Report]) -> Result<String> {
        let files: Vec<String> = found.roms.iter().map(|rom| rom.origin.file()).collect();
        let judged = files.iter().zip(&found.roms).zip(reports);
        let judged: Vec<Judged<'_>> = judged
            .map(|((source, rom), report)| Judged { source, origin: &rom.origin, report })
            .collect();
        Ok(match self {
            Self::Text => text(found, reports),
            Self::Json => format::json(&judged)?,
            Self::Sarif => format::sarif(&judged)?,
            Self::Junit => format::junit(&judged)?,
        })
    }
}

fn text(found: &Found, reports: &[Report]) -> String {
    let verdicts = found.roms.iter().zip(reports);
    let verdicts: Vec<String> =
        verdicts.map(|(rom, report)| heading(found, rom) + &report::verdict(report)).collect();
    verdicts.join("\n") + &remainder(found)
}
