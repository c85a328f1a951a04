//! `cargo xtask inspect`: what a ROM's call table does.

use crate::inspect::survey::{OneCall, SCHEMA_VERSION};
use crate::inspect::{Rom, report, survey};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Shows a ROM's header and call table, found by executing the ROM's own code
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A VMI ROM of revision 3.0
    file: PathBuf,

    /// Show one call with its disassembly: a name (case does not matter) or a number
    #[arg(long, value_name = "NAME")]
    call: Option<String>,

    /// Print JSON; its `version` field rises when a field changes its meaning
    #[arg(long)]
    json: bool,

    /// Linear address at which the ROM is executed, such as 0xC00C8000 or C8000h
    #[arg(long, value_name = "ADDRESS", value_parser = address, default_value = "0xC00C8000")]
    base: u32,
}

/// Shows the facts.
///
/// # Errors
///
/// The output cannot be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    match look(args) {
        Ok(text) => {
            anstream::print!("{text}");
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            anstream::eprintln!("error: {error:#}");
            Ok(ExitCode::from(2))
        }
    }
}

fn look(args: &Args) -> Result<String> {
    let rom = read(&args.file)?;
    let facts = survey(&rom, args.base).with_context(|| args.file.display().to_string())?;
    let Some(wanted) = &args.call else {
        return if args.json { json(&facts) } else { Ok(report::survey(&facts)) };
    };
    let found = facts
        .calls
        .iter()
        .find(|call| call.name.eq_ignore_ascii_case(wanted) || wanted.parse() == Ok(call.number));
    let Some(call) = found else { bail!("revision 3.0 has no call `{wanted}`") };
    if args.json {
        json(&OneCall { version: SCHEMA_VERSION, call })
    } else {
        Ok(report::call(call))
    }
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// Reads a file that should hold a ROM.
pub(super) fn read(file: &Path) -> Result<Rom> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    Rom::parse(&bytes).with_context(|| file.display().to_string())
}

/// A linear address: hexadecimal with `0x` in front or `h` behind, or decimal.
fn address(text: &str) -> Result<u32, std::num::ParseIntError> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_suffix(['h', 'H'])) {
        u32::from_str_radix(digits, 16)
    } else {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_in_three_ways() {
        assert_eq!(address("0xc00c8000"), Ok(0xc00c_8000));
        assert_eq!(address("C8000h"), Ok(0xc_8000));
        assert_eq!(address("819200"), Ok(0xc_8000));
        assert!(address("here").is_err());
    }
}
