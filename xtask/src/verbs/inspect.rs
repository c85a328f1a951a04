//! `cargo xtask inspect`: what a ROM's call table does.

use crate::inspect::source::{Candidate, Found, Origin, Other, SourceArgs, address};
use crate::inspect::survey::{OneCall, SCHEMA_VERSION, Survey};
use crate::inspect::{HIGH_BASE, map, report, survey};
use crate::table::HEAD;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What Linux adds to a physical address.
const KERNEL_OFFSET: u64 = 0xc000_0000;

/// What stands behind a map's title if not all code could be followed.
const MAP_CUT_SHORT: &str =
    ": cut short, the budget did not suffice for all code, and more of the bytes may be in use";

/// Shows a ROM's header and call table, found by executing the ROM's own code
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,

    /// Show one call with its disassembly: a name (case does not matter) or a number
    #[arg(long, value_name = "NAME")]
    call: Option<String>,

    /// Print JSON; its `version` field rises when a field changes its meaning
    #[arg(long)]
    json: bool,

    /// Linear address at which the ROM is executed, such as 0xC00C8000; without it, the physical address + C0000000h
    #[arg(long, value_name = "ADDRESS", value_parser = linear)]
    linear: Option<u32>,

    /// Show where every byte goes, and what lies in the option-ROM area: an SVG picture to write, or `-` for text
    #[arg(long, value_name = "FILE", conflicts_with_all = ["call", "json"])]
    map: Option<PathBuf>,
}

/// Several ROMs, as JSON.
#[derive(serde::Serialize)]
struct Several<'a> {
    version: u32,
    roms: Vec<One<'a>>,
    others: &'a [Other],
    left_out: u64,
}

/// One of several ROMs.
#[derive(serde::Serialize)]
struct One<'a> {
    origin: &'a Origin,
    remarks: &'a [String],
    #[serde(flatten)]
    facts: Facts,
}

#[derive(serde::Serialize)]
#[serde(rename_all = "snake_case")]
enum Facts {
    Survey(Box<Survey>),
    Error(String),
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
    let found = args.source.find()?;
    if let Some(file) = &args.map {
        return draw(args, &found, file);
    }
    if let ([rom], []) = (found.roms.as_slice(), found.others.as_slice()) {
        let facts = facts(args, rom)?;
        return match &args.call {
            None if args.json => json(&facts),
            None => Ok(heading(&found, rom) + &report::survey(&facts)),
            Some(wanted) => one_call(args, &facts, wanted),
        };
    }
    if args.json {
        if args.call.is_some() {
            bail!("{} ROMs found: choose one with --rom or --at", found.roms.len());
        }
        let roms = found.roms.iter().map(|rom| One {
            origin: &rom.origin,
            remarks: &rom.remarks,
            facts: facts(args, rom).map_or_else(
                |error| Facts::Error(format!("{error:#}")),
                |facts| Facts::Survey(Box::new(facts)),
            ),
        });
        let roms = roms.collect();
        let (others, left_out) = (found.others.as_slice(), found.left_out);
        return json(&Several { version: SCHEMA_VERSION, roms, others, left_out });
    }
    let mut texts = Vec::new();
    for rom in &found.roms {
        // One that cannot be looked at says so in its place; the others are still of interest.
        let text = facts(args, rom).and_then(|facts| match &args.call {
            None => Ok(report::survey(&facts)),
            Some(wanted) => one_call(args, &facts, wanted),
        });
        texts.push(match text {
            Ok(text) => heading(&found, rom) + &text,
            Err(error) if found.roms.len() == 1 => return Err(error),
            Err(error) => heading(&found, rom) + &format!("error: {error:#}\n"),
        });
    }
    Ok(texts.join("\n") + &remainder(&found))
}

/// Where every byte of each ROM goes, as a picture in a file or as text.
fn draw(args: &Args, found: &Found, file: &Path) -> Result<String> {
    let mut maps = Vec::new();
    for rom in &found.roms {
        let map = map::map(&rom.rom, &facts(args, rom)?);
        let remark = if map.cut_short { MAP_CUT_SHORT } else { "" };
        maps.push((format!("{}{remark}", rom.origin), map.spans));
    }
    // A file has no addresses; what lies in the area is known of a dump or a machine.
    let placed = |physical: Option<u64>, length: usize, label: String| {
        let address = u32::try_from(physical?).ok()?;
        Some(map::Placed { address, length, label })
    };
    let ours = found.roms.iter().filter_map(|rom| {
        let revision = rom.rom.revision();
        let label = format!("VMI {}.{}", revision.major, revision.minor);
        placed(rom.origin.physical, rom.rom.claimed_length(), label)
    });
    let others = found
        .others
        .iter()
        .filter_map(|other| placed(other.physical, other.bytes, other.kind.to_string()));
    let area: Vec<map::Placed> = ours.chain(others).collect();
    if file == Path::new("-") {
        let mut text = String::new();
        for (title, spans) in &maps {
            text += &format!("{}{title}{}\n", HEAD.render(), HEAD.render_reset());
            text += &format!("{}\n", map::text(spans));
        }
        if !area.is_empty() {
            text += &map::area_text(&area);
        }
        return Ok(text);
    }
    std::fs::write(file, map::svg(&maps, &area))
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(format!("{} written\n", file.display()))
}

/// Executes a ROM where a guest would see it.
fn facts(args: &Args, rom: &Candidate) -> Result<Survey> {
    let seen = rom
        .origin
        .physical
        .and_then(|address| u32::try_from(address.checked_add(KERNEL_OFFSET)?).ok());
    survey(&rom.rom, args.linear.or(seen).unwrap_or(HIGH_BASE))
        .with_context(|| rom.origin.to_string())
}

fn one_call(args: &Args, facts: &Survey, wanted: &str) -> Result<String> {
    let found = facts
        .calls
        .iter()
        .find(|call| call.name.eq_ignore_ascii_case(wanted) || wanted.parse() == Ok(call.number));
    let Some(call) = found else { bail!("the ROM's revision has no call `{wanted}`") };
    if args.json {
        json(&OneCall { version: SCHEMA_VERSION, call })
    } else {
        Ok(report::call(call))
    }
}

/// Where a ROM was found, unless it is a file of its own.
pub(super) fn heading(found: &Found, rom: &Candidate) -> String {
    let Candidate { origin, remarks, .. } = rom;
    let alone = found.roms.len() == 1 && found.others.is_empty();
    if alone && origin.is_whole_file() && remarks.is_empty() {
        return String::new();
    }
    let mut text = format!("{}{origin}{}\n", HEAD.render(), HEAD.render_reset());
    for remark in remarks {
        text += &format!("note: {remark}\n");
    }
    text
}

/// What else was found.
pub(super) fn remainder(found: &Found) -> String {
    let mut text = String::new();
    if !found.others.is_empty() {
        text += "\nother option ROMs:\n";
    }
    for other in &found.others {
        text += &format!("  {other}\n");
    }
    if found.left_out != 0 {
        text += &format!("\n{} more places are not listed; --at looks at one\n", found.left_out);
    }
    text
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// A linear address.
fn linear(text: &str) -> Result<u32, String> {
    let address = address(text).map_err(|error| error.to_string())?;
    u32::try_from(address).map_err(|_| "a linear address has 32 bits".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_in_three_ways() {
        assert_eq!(linear("0xc00c8000"), Ok(0xc00c_8000));
        assert_eq!(linear("C8000h"), Ok(0xc_8000));
        assert_eq!(linear("819200"), Ok(0xc_8000));
        assert!(linear("here").is_err());
        assert!(linear("0x100000000").is_err());
    }
}
