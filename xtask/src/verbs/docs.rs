//! `cargo xtask docs`.

use crate::reference::{PATH, page};
use anyhow::{Context, Result};
use std::process::ExitCode;

/// Writes docs/calls.md from the declaration of the calls.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Write nothing; fail if the page is stale.
    #[arg(long)]
    check: bool,
}

/// Writes the page, or compares it.
///
/// # Errors
///
/// The page cannot be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let path = crate::workspace().join(PATH);
    let page = page();
    let is_fresh = std::fs::read_to_string(&path).is_ok_and(|there| there == page);
    match (is_fresh, args.check) {
        (true, _) => anstream::println!("{PATH} is as the declaration has it"),
        (false, true) => {
            anstream::eprintln!("{PATH} is stale: `cargo xtask docs` writes it anew");
            return Ok(ExitCode::FAILURE);
        }
        (false, false) => {
            std::fs::write(&path, page)
                .with_context(|| format!("cannot write {}", path.display()))?;
            anstream::println!("{PATH} written");
        }
    }
    Ok(ExitCode::SUCCESS)
}
