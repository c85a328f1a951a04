//! `cargo xtask diff`: two ROMs compared by what they mean.

use crate::inspect::difference::{difference, text};
use crate::inspect::{HIGH_BASE, Rom};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Compares two ROMs by meaning: header, answers, each call's code. Exit 0 if they mean the same, 1 if not, 2 if one cannot be read
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A VMI ROM
    a: PathBuf,

    /// Another
    b: PathBuf,

    /// Print JSON; its `version` field rises when a field changes its meaning
    #[arg(long)]
    json: bool,
}

/// Shows the difference.
///
/// # Errors
///
/// None that is not shown.
pub fn run(args: &Args) -> Result<ExitCode> {
    match compare(args) {
        Ok((text, same)) => {
            anstream::print!("{text}");
            Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Err(error) => {
            anstream::eprintln!("error: {error:#}");
            Ok(ExitCode::from(2))
        }
    }
}

fn compare(args: &Args) -> Result<(String, bool)> {
    let (a, b) = (read(&args.a)?, read(&args.b)?);
    let found = difference(&a, &b, HIGH_BASE)?;
    let names = [args.a.to_string_lossy(), args.b.to_string_lossy()];
    let text = if args.json {
        serde_json::to_string_pretty(&found)? + "\n"
    } else {
        text(&found, [&names[0], &names[1]])
    };
    Ok((text, found.same))
}

fn read(file: &Path) -> Result<Rom> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    Rom::parse(&bytes).with_context(|| file.display().to_string())
}
