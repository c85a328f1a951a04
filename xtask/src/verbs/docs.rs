//! `cargo xtask docs`.

use crate::reference;
use crate::verbs::run::options::{self, PATH};
use anyhow::{Context, Result};
use std::process::ExitCode;

/// Writes what the docs have from the code: the calls, and the options of `run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Write nothing; fail if a page is stale.
    #[arg(long)]
    check: bool,
}

/// Writes the pages, or compares them.
///
/// # Errors
///
/// A page cannot be read or written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let there =
        |name: &str| std::fs::read_to_string(crate::workspace().join(name)).unwrap_or_default();
    let options = options::page(&there(PATH))
        .with_context(|| format!("{PATH} has no place for the options"))?;
    let mut code = ExitCode::SUCCESS;
    for (name, page) in [(reference::PATH, reference::page()), (PATH, options)] {
        match (there(name) == page, args.check) {
            (true, _) => anstream::println!("{name} is as the code has it"),
            (false, true) => {
                anstream::eprintln!("{name} is stale: `cargo xtask docs` writes it anew");
                code = ExitCode::FAILURE;
            }
            (false, false) => {
                std::fs::write(crate::workspace().join(name), page)
                    .with_context(|| format!("cannot write {name}"))?;
                anstream::println!("{name} written");
            }
        }
    }
    Ok(code)
}
