//! Boots of Linux side by side: what `run --kernel` and `compare` share.

use crate::artifacts;
use crate::build::Tools;
use crate::hypervisor::{self, End, GuestRom, Mode, PREFIX, Paging};
use crate::inspect::Rom;
use crate::inspect::source::kernel::{HEAD, is_kernel};
use crate::linux::{self, Below, Boot, Booted};
use crate::progress::Progress;
use crate::table::{self, Align, BAD, Cell, DIM, GOOD, Table};
use crate::toolchain::Findings;
use crate::trace::{self, Record};
use crate::{build, tap};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use vmi_hv_backend::reference::interface::Counters;

/// What goes with a kernel.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct GuestOptions {
    /// Its initramfs, instead of ours with a program that tests the kernel. Then only the end counts: QEMU's exit device, or on the
    /// hypervisor that the machine is switched off.
    #[arg(long, value_name = "FILE")]
    pub(super) initrd: Option<PathBuf>,
    /// More words for its command line.
    #[arg(long, value_name = "WORDS", default_value = "", allow_hyphen_values = true)]
    pub(super) append: String,
}

impl GuestOptions {
    /// Fails if the kernel or its initramfs is not there, or the kernel is none.
    pub(super) fn files_are_there(&self, kernel: &Path) -> Result<()> {
        let mut files = [Some(kernel), self.initrd.as_deref()].into_iter().flatten();
        if let Some(file) = files.find(|file| !file.is_file()) {
            bail!("there is no file {}", file.display());
        }
        let mut head = Vec::new();
        let name = || kernel.display().to_string();
        let file = File::open(kernel).with_context(name)?;
        file.take(HEAD).read_to_end(&mut head).with_context(name)?;
        if !is_kernel(&head) {
            bail!("{}: no kernel for Linux's boot protocol, no HdrS at 202h", kernel.display());
        }
        Ok(())
    }

    /// The initramfs: the user's, or ours.
    pub(super) fn initramfs(&self, findings: &Findings) -> Result<PathBuf> {
        match &self.initrd {
            Some(initrd) => Ok(initrd.clone()),
            None => linux::initramfs(&Tools::from_findings(findings)?),
        }
    }
}

/// Fails if a file is not there, or has nothing of a ROM.
pub(super) fn is_a_rom(file: &Path) -> Result<()> {
    Rom::parse(&build::read(file)?).map(drop).with_context(|| file.display().to_string())
}

/// What a kernel is booted on.
#[derive(Clone, Copy)]
pub(super) enum On<'a> {
    /// The machine, with this ROM and these processors.
    Machine { rom: Option<&'a Path>, cpu: &'a str, processors: u32 },
    /// The reference hypervisor, which gives it this ROM.
    Hypervisor(Mode, GuestRom<'a>),
}

/// The hypervisor in several modes. `trap` beside others is what these are compared with, so a ROM is for it alone only.
pub(super) fn in_modes<'a>(modes: &[Mode], rom: GuestRom<'a>) -> Vec<On<'a>> {
    let on = |mode: &Mode| match rom {
        GuestRom::File(_) if *mode == Mode::Trap && modes.len() > 1 => {
            On::Hypervisor(*mode, GuestRom::None)
        }
        rom => On::Hypervisor(*mode, rom),
    };
    modes.iter().map(on).collect()
}

/// What is booted, and what is wanted of it.
pub(super) struct Order<'a> {
    pub(super) kernel: &'a Path,
    pub(super) guest: &'a GuestOptions,
    /// One boot on each.
    pub(super) on: Vec<On<'a>>,
    pub(super) paging: Paging,
    pub(super) limit: Duration,
    pub(super) trace: Option<&'a Path>,
    pub(super) json: bool,
    pub(super) verbose: bool,
}

/// What shows each line of the serial port as it comes, or the guest's last one as progress.
pub(super) fn shows(verbose: bool, progress: &Progress) -> impl Fn(&str) + use<'_> {
    move |line| {
        if verbose {
            anstream::eprintln!("{line}");
        } else if !line.starts_with(PREFIX) {
            progress.at(line);
        }
    }
}

/// The file of a trace, made before there is one: whoever cannot have it is told at once.
pub(super) struct TraceFile<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> TraceFile<'a> {
    pub(super) fn create(path: Option<&'a Path>) -> Result<Option<Self>> {
        let create = |path: &'a Path| {
            let file =
                File::create(path).with_context(|| format!("cannot write {}", path.display()));
            Ok(Self { path, file: file? })
        };
        path.map(create).transpose()
    }

    /// Writes what was recorded.
    pub(super) fn write<'r>(
        self,
        runs: impl IntoIterator<Item = (&'r str, Option<&'r Record>)>,
    ) -> Result<()> {
        let recorded = |(name, record): (&str, Option<&'r Record>)| {
            if record.is_none() {
                anstream::eprintln!("{name} is not in the trace: its guest did not start");
            }
            Some((name.to_owned(), record?))
        };
        let runs: Vec<(String, &Record)> = runs.into_iter().filter_map(recorded).collect();
        let mut to = BufWriter::new(self.file);
        let is_picture = self.path.extension().is_some_and(|extension| extension == "svg");
        let written = if is_picture {
            to.write_all(trace::picture(&runs).as_bytes()).map_err(Into::into)
        } else {
            trace::write(&mut to, &runs)
        };
        written
            .and_then(|()| Ok(to.flush()?))
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        for (name, record) in &runs {
            let (there, count) = (record.exits.len(), record.count);
            let lost = if record.lost() == 0 { "" } else { ", the last ones" };
            anstream::eprintln!(
                "{}: {there} of {count} exits of {name}{lost}",
                self.path.display()
            );
        }
        Ok(())
    }
}

/// A name, and what came of its boot.
type Named = (&'static str, Booted);

/// Boots, and shows what came of it.
///
/// # Errors
///
/// The build fails, a file is missing, or QEMU does not start.
pub(super) fn boot_all(findings: &Findings, order: &Order<'_>) -> Result<ExitCode> {
    let Order { kernel, guest, .. } = order;
    guest.files_are_there(kernel)?;
    let trace = TraceFile::create(order.trace)?;
    let built = artifacts::build_hosting(findings)?;
    let initrd = guest.initramfs(findings)?;
    let mut boots: Vec<Named> = Vec::new();
    for on in &order.on {
        let name = match on {
            On::Machine { .. } => "no hypervisor",
            On::Hypervisor(mode, _) => mode.name(),
        };
        let progress = Progress::start(format!("booting {}, {name}", build::shown(kernel)));
        let paging = order.paging;
        let below = match *on {
            On::Machine { rom, cpu, processors } => Below::Machine { rom, cpu, processors },
            On::Hypervisor(mode, rom) => Below::Hypervisor { built: &built, rom, mode, paging },
        };
        let mut boot = Boot::tests(&built.emulator, kernel, &initrd, below);
        boot.append = guest.append.as_str().into();
        boot.limit = order.limit;
        boot.traced = trace.is_some();
        if guest.initrd.is_some() {
            boot.marker = None;
        }
        boots.push((name, boot.run(shows(order.verbose, &progress))?));
    }
    if let Some(trace) = trace {
        trace.write(boots.iter().map(|(name, boot)| (*name, boot.record.as_ref())))?;
    }
    if order.json {
        println!("{}", serde_json::to_string_pretty(&json(order, &boots))?);
    } else {
        anstream::print!("{}", text(&boots));
    }
    let ends = boots.iter().map(|(_, boot)| (boot.passed(), boot.end.unwrap_or(End::Guest)));
    Ok(hypervisor::exit_code(ends))
}

/// Everything for a reader.
fn text(boots: &[Named]) -> String {
    let mut text = counters(boots);
    for (name, boot) in boots {
        let seconds = boot.run.duration.as_secs_f64();
        let tests = boot.tests();
        text.push_str(&match boot.complaint() {
            None => format!(
                "{}{name} passes{}: {tests} tests; {seconds:.1} s\n",
                GOOD.render(),
                GOOD.render_reset()
            ),
            Some(complaint) => format!(
                "{}{name} FAILS{}: {complaint}; {tests} tests passed; {seconds:.1} s\n{}\n{}\n",
                BAD.render(),
                BAD.render_reset(),
                boot.last_lines(),
                boot.run.command
            ),
        });
    }
    text
}

/// Rows of what the hypervisor counted: exits in all, and each counter.
fn rows() -> impl Iterator<Item = (&'static str, fn(&Counters, usize) -> u64, usize)> {
    let each = |(index, (name, _))| {
        let value: fn(&Counters, usize) -> u64 = |counters, index| counters.values()[index];
        (name, value, index)
    };
    let all: fn(&Counters, usize) -> u64 = |counters, _| counters.exits();
    std::iter::once(("exits", all, 0)).chain(tap::named(&Counters::ZERO).enumerate().map(each))
}

/// The modes' counters and how many times more traps take than batches, if both were counted.
fn ratio(boots: &[Named], value: impl Fn(&Counters) -> u64) -> Option<f64> {
    let of = |mode: Mode| {
        let (_, boot) = boots.iter().find(|(name, _)| *name == mode.name())?;
        boot.counters.as_ref().map(&value)
    };
    let (trap, batched) = (of(Mode::Trap)?, of(Mode::VmiBatched)?);
    (batched != 0).then(|| trap as f64 / batched as f64)
}

/// What the hypervisor counted: a row for each counter, a column for each boot.
fn counters(boots: &[Named]) -> String {
    if boots.iter().all(|(_, boot)| boot.counters.is_none()) {
        return String::new();
    }
    let mut columns = vec![Align::Left];
    columns.extend(boots.iter().map(|_| Align::Right));
    let mut titles = vec!["counter"];
    titles.extend(boots.iter().map(|(name, _)| *name));
    let is_compared = ratio(boots, Counters::exits).is_some();
    if is_compared {
        columns.push(Align::Right);
        titles.push("trap/batched");
    }
    let mut table = Table::new(&columns);
    table.heading(&titles);
    for (name, value, index) in rows() {
        let mut row: Vec<Cell> = vec![name.into()];
        row.extend(boots.iter().map(|(_, boot)| match &boot.counters {
            None => Cell::new("-", BAD),
            Some(counters) => match value(counters, index) {
                0 => Cell::new("0", DIM),
                value => value.to_string().into(),
            },
        }));
        if let Some(ratio) = ratio(boots, |counters| value(counters, index)) {
            row.push(Cell::new(format!("{ratio:.1}"), table::HEAD));
        }
        table.row(row);
    }
    table.render()
}

/// Everything for a program.
fn json(order: &Order<'_>, boots: &[Named]) -> serde_json::Value {
    let each: Vec<serde_json::Value> = boots
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
                "complaint": boot.complaint(),
                "outcome": boot.run.outcome.to_string(),
                "end": boot.end.map(End::name),
                "tests": boot.tests(),
                "seconds": boot.run.duration.as_secs_f64(),
                "command": boot.run.command,
                "exits": boot.counters.map(|counters| counters.exits()),
                "counters": counters,
            })
        })
        .collect();
    let ratios: serde_json::Map<String, serde_json::Value> = rows()
        .filter_map(|(name, value, index)| {
            Some((name.to_owned(), ratio(boots, |counters| value(counters, index))?.into()))
        })
        .collect();
    let kernel = order.kernel.display().to_string();
    serde_json::json!({ "kernel": kernel, "boots": each, "trap/batched": ratios })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::{Outcome, Run};
    use vmi_hv_backend::reference::record::Ending;

    fn boot(mode: Mode, counters: Option<Counters>, end: End) -> Named {
        let outcome = match end {
            End::Guest => Outcome::Passed,
            _ => Outcome::WrongExit { status: Some(end.status().into()), said: String::new() },
        };
        let run = Run {
            outcome,
            serial: "linux: test fork ok\n".into(),
            host: "the reason\n".into(),
            debug: String::new(),
            duration: Duration::from_millis(1500),
            command: "qemu".into(),
        };
        let end = Some(end);
        (mode.name(), Booted { run, counters, record: None, end, may_power_off: false })
    }

    #[test]
    fn modes_stand_side_by_side_with_the_ratio_of_first_and_last() {
        let counted = |table_writes, hypercalls, updates| Counters {
            table_writes,
            hypercalls,
            updates,
            ..Counters::ZERO
        };
        let boots = [
            boot(Mode::Trap, Some(counted(1000, 0, 0)), End::Guest),
            boot(Mode::Vmi, Some(counted(100, 900, 900)), End::Guest),
            boot(Mode::VmiBatched, Some(counted(100, 25, 900)), End::Guest),
        ];
        let shown = anstream::adapter::strip_str(&text(&boots)).to_string();
        let row = |name: &str| {
            let line = shown.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(row("counter"), ["trap", "vmi", "vmi-batched", "trap/batched"]);
        assert_eq!(row("exits"), ["1000", "1000", "125", "8.0"]);
        assert_eq!(row("page-table write"), ["1000", "100", "100", "10.0"]);
        assert_eq!(row("updates carried"), ["0", "900", "900", "0.0"]);
        // What there was none of has no ratio.
        assert_eq!(row("CPUID"), ["0", "0", "0"]);
        let rows: Vec<&str> = shown.lines().collect();
        let end = |line: &str, text: &str| line.find(text).map(|at| at + text.len());
        assert_eq!(end(rows[0], "trap"), end(rows[1], "1000"), "{shown}");
        assert!(shown.contains("vmi-batched passes: 1 tests; 1.5 s\n"), "{shown}");
    }

    #[test]
    fn a_mode_that_fails_keeps_its_column_and_says_why() {
        let boots = [
            boot(Mode::Trap, Some(Counters { cpuid: 7, ..Counters::ZERO }), End::Guest),
            boot(Mode::VmiBatched, None, End::Hypervisor(Ending::BadArguments)),
        ];
        let shown = anstream::adapter::strip_str(&text(&boots)).to_string();
        let mut rows = shown.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(rows.next().unwrap_or_default(), ["counter", "trap", "vmi-batched"]);
        assert_eq!(rows.next().unwrap_or_default(), ["exits", "7", "-"]);
        assert!(shown.contains("trap passes") && shown.contains("    the reason\n"), "{shown}");
        assert!(shown.contains("vmi-batched FAILS: bad-arguments: "), "{shown}");
        let ends = boots.iter().map(|(_, boot)| (boot.passed(), boot.end.unwrap_or(End::Guest)));
        assert_eq!(hypervisor::exit_code(ends), ExitCode::from(67));
    }
}
