//! `cargo xtask verify`: whether a ROM keeps the contract.

use super::inspect::read;
use crate::inspect::{report, verify};
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;

/// Holds a ROM against the contract: exit 0 if it is clean, 1 with every violation, 2 if it cannot be read
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A VMI ROM of revision 3.0
    file: PathBuf,
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
    anstream::print!("{}", report::verdict(&verdict));
    Ok(if verdict.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
