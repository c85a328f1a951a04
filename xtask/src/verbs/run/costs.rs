//! `cargo xtask run --costs`: what a kernel's operations cost, of the test guest or of a Linux with a client of VMI.

use super::{Args, boots};
use crate::artifacts;
use crate::build;
use crate::conformance::{self, Cost};
use crate::linux::{Below, Boot, Booted, costs};
use crate::progress::Progress;
use crate::table::{Align, Cell, GOOD, HEAD, PLAIN, Table};
use crate::toolchain::Findings;
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// One row for each operation, and for each ROM what it costs.
pub(super) fn table(roms: &[(&str, &[Cost])]) -> String {
    let mut columns = vec![Align::Left, Align::Right];
    let mut names: Vec<Cell> = vec!["".into(), "".into()];
    let mut titles = vec!["instructions of", "native"];
    for (name, _) in roms {
        columns.extend([Align::Right, Align::Right]);
        names.extend(["".into(), Cell::new(*name, HEAD)]);
        titles.extend(["with", "ratio"]);
    }
    let mut table = Table::new(&columns);
    table.titles(names);
    table.heading(&titles);
    let first = roms.first().map(|(_, costs)| *costs).unwrap_or_default();
    for (index, Cost { operation, native, .. }) in first.iter().enumerate() {
        let mut row: Vec<Cell> = vec![operation.as_str().into(), format!("{native:.0}").into()];
        for (_, costs) in roms {
            match costs.get(index) {
                Some(cost) => row.extend([format!("{:.0}", cost.rom).into(), ratio(cost.ratio())]),
                None => row.extend(["".into(), "".into()]),
            }
        }
        table.row(row);
    }
    let mut row: Vec<Cell> = vec!["geometric mean".into(), "".into()];
    for (_, costs) in roms {
        row.extend(["".into(), ratio(conformance::mean_ratio(costs))]);
    }
    table.row(row);
    table.render()
}

/// A ratio; what costs nothing is good.
fn ratio(ratio: f64) -> Cell {
    let style = if ratio < 1.005 { GOOD } else { PLAIN };
    Cell::new(format!("{ratio:.3}"), style)
}

/// A boot with a ROM, and what its operations cost against the boot without.
struct WithRom {
    name: String,
    rom: PathBuf,
    booted: Booted,
    costs: Vec<Cost>,
}

/// Boots a Linux without a ROM, and with each of our native images or the one that is given.
pub(super) fn of_linux(findings: &Findings, all: &Args, kernel: &Path) -> Result<ExitCode> {
    let guest = &all.linux.guest;
    guest.files_are_there(kernel)?;
    if guest.initrd.is_some() {
        bail!("--costs is for our own first program, which says them: leave --initrd out");
    }
    let built = artifacts::build_all(findings)?;
    let initrd = guest.initramfs(findings)?;
    let boot = |rom: Option<&Path>, name: &str| {
        let progress = Progress::start(format!("booting {}, {name}", build::shown(kernel)));
        let below = Below::Machine { rom, cpu: &all.cpu, processors: all.processors };
        let boot = costs::boot(Boot {
            append: guest.append.as_str().into(),
            limit: all.limit(),
            ..Boot::tests(&built.emulator, kernel, &initrd, below)
        });
        let booted = boot.run(boots::shows(all.verbose, &progress))?;
        if let Some(complaint) = booted.complaint() {
            let (lines, command) = (booted.last_lines(), &booted.run.command);
            bail!("{name}: {complaint}\n{lines}\n{command}");
        }
        Ok(booted)
    };
    let roms: Vec<&Path> = match all.rom_file() {
        Some(rom) => vec![rom],
        None => vec![&built.native, &built.fastest, &built.call],
    };
    let without = boot(None, "no ROM")?;
    let mut tried = Vec::new();
    for rom in roms {
        let name = rom.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let booted = boot(Some(rom), &name)?;
        let costs = costs::compare(&without, &booted)?;
        if !booted.run.serial.contains("VMI") {
            anstream::eprintln!("{name}: the kernel says nothing of VMI; it may have no client");
        }
        tried.push(WithRom { name, rom: rom.to_owned(), booted, costs });
    }
    if all.json {
        println!("{}", serde_json::to_string_pretty(&json(kernel, &without, &tried))?);
    } else {
        let columns: Vec<_> = tried.iter().map(|t| (t.name.as_str(), t.costs.as_slice())).collect();
        anstream::print!("{}", table(&columns));
        let (good, reset) = (GOOD.render(), GOOD.render_reset());
        let shown = build::shown(kernel);
        anstream::println!("\n{good}{shown} passes{reset}: without a ROM and with each");
    }
    Ok(ExitCode::SUCCESS)
}

/// Everything for a program.
fn json(kernel: &Path, without: &Booted, tried: &[WithRom]) -> serde_json::Value {
    let rom = |with: &WithRom| {
        serde_json::json!({
            "name": with.name,
            "path": with.rom,
            "costs": with.costs,
            "mean": conformance::mean_ratio(&with.costs),
            "command": with.booted.run.command,
        })
    };
    serde_json::json!({
        "kernel": kernel,
        "without": without.run.command,
        "roms": tried.iter().map(rom).collect::<Vec<_>>(),
    })
}
