//! `cargo xtask run --kernel`.

use crate::hypervisor::{self, Mode};
use crate::linux::{self, Below, Boot, Booted};
use crate::progress::Progress;
use crate::table::{Align, BAD, Cell, GOOD, Table};
use crate::tap;
use crate::toolchain::Findings;
use crate::{build, build::Tools};
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vmi_hv_backend::reference::interface::Counters;

/// What concerns Linux.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct LinuxOptions {
    /// Boot this Linux kernel, a 32-bit bzImage, instead of the test guest: on the hypervisor given by `--on`, or without on the
    /// machine itself.
    #[arg(long, value_name = "FILE")]
    #[arg(conflicts_with_all = ["no_rom", "bar", "client", "machine", "cpu", "processors", "memory", "costs", "workload", "hostile"])]
    pub(super) kernel: Option<PathBuf>,
    /// Its initramfs, instead of ours with a program that tests the kernel. Then only QEMU's exit status counts.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// More words for its command line.
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        requires = "kernel",
        allow_hyphen_values = true
    )]
    append: String,
}

/// Runs.
///
/// # Errors
///
/// The build fails, a file is missing, or QEMU does not start.
pub(super) fn run(findings: &Findings, all: &super::Args, kernel: &Path) -> Result<ExitCode> {
    let args = &all.linux;
    for file in [Some(kernel), args.initrd.as_deref()].into_iter().flatten() {
        if !file.is_file() {
            bail!("there is no file {}", file.display());
        }
    }
    let built = hypervisor::build_all(findings)?;
    let initrd = match &args.initrd {
        Some(initrd) => initrd.clone(),
        None => linux::initramfs(&Tools::from_findings(findings)?)?,
    };
    let modes = match all.reference.on {
        Some(_) => all.reference.modes().into_iter().map(Some).collect(),
        None => vec![None],
    };
    let mut boots = Vec::new();
    for mode in modes {
        let name = mode.map_or("no hypervisor", Mode::name);
        let progress = Progress::start(format!("booting {}, {name}", build::shown(kernel)));
        let below = match mode {
            None => Below::Nothing,
            Some(mode) => Below::Hypervisor {
                built: &built,
                rom: all.rom.as_deref(),
                mode,
                paging: all.reference.paging,
            },
        };
        let mut boot = Boot::tests(&built.emulator, kernel, &initrd, below);
        boot.append = &args.append;
        boot.limit = all.limit();
        if args.initrd.is_some() {
            boot.marker = None;
        }
        boots.push((name, boot.run(all.shows(&progress))?));
    }
    if all.json {
        println!("{}", serde_json::to_string_pretty(&json(&boots))?);
    } else {
        anstream::print!("{}", text(&boots));
    }
    let passes = boots.iter().all(|(_, boot)| boot.passed());
    Ok(if passes { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything for a reader.
fn text(boots: &[(&str, Booted)]) -> String {
    let mut text = counters(boots);
    for (name, boot) in boots {
        let seconds = boot.run.duration.as_secs_f64();
        let tests = boot.tests();
        text.push_str(&if boot.passed() {
            format!(
                "{}{name} passes{}: {tests} tests; {seconds:.1} s\n",
                GOOD.render(),
                GOOD.render_reset()
            )
        } else {
            format!(
                "{}{name} FAILS{}: {}; {tests} tests passed; {seconds:.1} s\n{}\n{}\n",
                BAD.render(),
                BAD.render_reset(),
                boot.run.outcome,
                boot.last_lines(),
                boot.run.command
            )
        });
    }
    text
}

/// What the hypervisor counted: a row for each counter, a column for each boot.
fn counters(boots: &[(&str, Booted)]) -> String {
    let counted: Vec<(&str, Counters)> =
        boots.iter().filter_map(|(name, boot)| Some((*name, boot.counters?))).collect();
    if counted.is_empty() {
        return String::new();
    }
    let mut columns = vec![Align::Left];
    columns.extend(counted.iter().map(|_| Align::Right));
    let mut table = Table::new(&columns);
    let titles: Vec<&str> =
        ["counter"].into_iter().chain(counted.iter().map(|(name, _)| *name)).collect();
    table.heading(&titles);
    let mut row: Vec<Cell> = vec!["exits".into()];
    row.extend(counted.iter().map(|(_, counters)| Cell::from(counters.exits().to_string())));
    table.row(row);
    for (index, (name, _)) in tap::named(&Counters::ZERO).enumerate() {
        let mut row: Vec<Cell> = vec![name.into()];
        row.extend(
            counted.iter().map(|(_, counters)| Cell::from(counters.values()[index].to_string())),
        );
        table.row(row);
    }
    table.render()
}

/// Everything for a program.
fn json(boots: &[(&str, Booted)]) -> serde_json::Value {
    let boots: Vec<serde_json::Value> = boots
        .iter()
        .map(|(name, boot)| {
            let counters: Option<serde_json::Map<String, serde_json::Value>> =
                boot.counters.map(|counters| {
                    tap::named(&counters)
                        .map(|(name, value)| (name.to_owned(), value.into()))
                        .collect()
                });
            serde_json::json!({
                "below": name,
                "passes": boot.passed(),
                "outcome": boot.run.outcome.to_string(),
                "tests": boot.tests(),
                "seconds": boot.run.duration.as_secs_f64(),
                "command": boot.run.command,
                "counters": counters,
            })
        })
        .collect();
    serde_json::json!({ "boots": boots })
}
