//! `cargo xtask diff`: two ROMs compared by what they mean.

use crate::inspect::difference::{difference, text};
use crate::inspect::source::{Candidate, SourceArgs};
use crate::inspect::{HIGH_BASE, Rom};
use anyhow::{Context, Result, bail};
use clap::{Args as _, FromArgMatches};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// Compares two ROMs by meaning: header, answers, each call's code. Exit 0 if they mean the same, 1 if not, 2 if one cannot be read
///
/// The first ROM is named as for `inspect`. The second is a file, or stands behind ` -- ` with options of its own:
/// `diff A B`, `diff dump --base C0000h --rom 1 -- dump --base C0000h --rom 2`, `diff A -- --qmp unix:SOCKET`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    a: SourceArgs,

    /// The other file, if neither has options
    #[arg(required_unless_present = "other", conflicts_with_all = ["base", "rom", "at", "machine"])]
    b: Option<PathBuf>,

    /// The other file or machine, with its own options as the first one has them
    #[arg(last = true, value_name = "OTHER", conflicts_with = "b")]
    other: Vec<OsString>,

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
    let other = match &args.b {
        Some(file) => SourceArgs::of_file(file),
        None => parsed(&args.other)?,
    };
    let ((first, a), (second, b)) = (read(&args.a)?, read(&other)?);
    let found = difference(&a, &b, HIGH_BASE)?;
    let text = if args.json {
        serde_json::to_string_pretty(&found)? + "\n"
    } else {
        text(&found, [&first, &second])
    };
    Ok((text, found.same))
}

/// What stands behind ` -- `, read as in front of it.
fn parsed(words: &[OsString]) -> Result<SourceArgs> {
    let command = SourceArgs::augment_args(clap::Command::new("OTHER").no_binary_name(true));
    let matches = command.try_get_matches_from(words).context("behind ` -- `")?;
    Ok(SourceArgs::from_arg_matches(&matches)?)
}

/// The one ROM that is meant, and how to call it.
fn read(source: &SourceArgs) -> Result<(String, Rom)> {
    let mut found = source.find()?;
    let count = found.roms.len();
    if count > 1 {
        let places: Vec<String> =
            found.roms.iter().map(|rom| format!("\n  {}", rom.origin)).collect();
        bail!("{count} VMI ROMs instead of one: choose with --rom or --at{}", places.concat());
    }
    let Candidate { rom, origin, .. } = found.roms.swap_remove(0);
    Ok((origin.to_string(), rom))
}
