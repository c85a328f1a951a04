//! `cargo xtask run --on reference`.

use super::options::Host;
use super::{Tried, failures};
use crate::artifacts;
use crate::conformance::Client;
use crate::hypervisor::{
    self, Comparison, Fate, Hosted, Mode, Paging, Setup, Supply, Task, last_words,
};
use crate::progress::Progress;
use crate::table::{Align, BAD, Cell, DIM, GOOD, HEAD, Table};
use crate::tap::{self, WorkloadLine};
use crate::toolchain::Findings;
use crate::verbs::boots::{TraceFile, shows};
use crate::xen::source::Build;
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;

/// The hypervisor's modes that are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Modes {
    /// Without a ROM: every change of a page table traps.
    Trap,
    /// The ROM tells of each change at once.
    Vmi,
    /// The ROM collects changes.
    VmiBatched,
    /// One after the other.
    All,
}

/// What concerns the hypervisor.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Options {
    /// Run the guest on a hypervisor.
    #[arg(long, value_enum, value_name = "HYPERVISOR")]
    pub(super) on: Option<Host>,
    /// Which Xen, built by `setup --xen`.
    #[arg(long, value_enum, value_name = "BUILD", default_value_t)]
    pub(super) xen: Build,
    /// The reference hypervisor's mode.
    #[arg(long, value_enum, default_value_t = Modes::All)]
    mode: Modes,
    /// The hypervisor's paging.
    #[arg(long, value_enum, default_value_t)]
    pub(super) paging: Paging,
    /// Let the guest work as a kernel does, and show what that costs.
    #[arg(long)]
    workload: bool,
    /// Let the guest try what no guest should.
    #[arg(long, conflicts_with = "workload")]
    hostile: bool,
    /// Let the guest come to a bad end, and show what the hypervisor says of it.
    #[arg(long, value_enum, value_name = "FATE")]
    #[arg(conflicts_with_all = ["workload", "hostile"])]
    end: Option<Fate>,
    /// Write what happened when, for Perfetto or speedscope: a process for each mode. If the name ends in `.svg`, draw it instead: a
    /// panel for each mode.
    #[arg(long, value_name = "FILE")]
    pub(super) trace: Option<PathBuf>,
}

impl Options {
    pub(super) fn modes(&self) -> Vec<Mode> {
        match self.mode {
            Modes::Trap => vec![Mode::Trap],
            Modes::Vmi => vec![Mode::Vmi],
            Modes::VmiBatched => vec![Mode::VmiBatched],
            Modes::All => Mode::ALL.to_vec(),
        }
    }

    pub(super) fn task(&self) -> Task {
        match (self.workload, self.hostile, self.end) {
            (true, ..) => Task::Workload,
            (_, true, _) => Task::Hostile,
            (.., Some(fate)) => Task::End(fate),
            _ => Task::Conformance,
        }
    }
}

/// Runs.
///
/// # Errors
///
/// The ROM cannot be read, the build fails, or QEMU does not start.
pub(super) fn run(findings: &Findings, all: &super::Args) -> Result<ExitCode> {
    let args = &all.reference;
    let trace = TraceFile::create(args.trace.as_deref())?;
    let built = artifacts::build_hosting(findings)?;
    let supply = Supply { built: &built, rom: all.rom_file(), limit: all.limit() };
    let mut runs = Vec::new();
    for mode in args.modes() {
        let progress = Progress::start(format!("running the guest, mode {}", mode.name()));
        let setup = Setup { supply, mode, paging: args.paging, traced: trace.is_some() };
        runs.push(setup.run(args.task(), shows(all.verbose, &progress))?);
    }
    if let Some(trace) = trace {
        trace.write(runs.iter().map(|run| (run.mode.name(), run.record.as_ref())))?;
    }
    let ends = runs.iter().map(|run| (run.complaint().is_none(), run.end));
    let code = hypervisor::exit_code(ends);
    if all.json {
        println!("{}", serde_json::to_string_pretty(&json(&runs))?);
    } else {
        anstream::print!("{}", text(args.task(), runs));
    }
    Ok(code)
}

/// Everything for a reader.
fn text(task: Task, runs: Vec<Hosted>) -> String {
    let mut text = match task {
        Task::Conformance => return conformance_text(runs),
        Task::Workload => {
            let comparisons = Comparison::of(&runs);
            exits(&comparisons) + "\n" + &causes(&comparisons)
        }
        Task::Hostile => attempts(&runs),
        Task::End(_) => String::new(),
    };
    for run in &runs {
        text.push_str(&failures(run.mode.name(), &run.conformance));
    }
    text.push('\n');
    for run in &runs {
        let name = run.mode.name();
        let seconds = run.run().duration.as_secs_f64();
        let checks = run.report().checks.len();
        let holding = run.report().checks.iter().filter(|check| check.ok).count();
        let figures = format!("{holding} of {checks} checks hold; {seconds:.1} s");
        text.push_str(&match run.complaint() {
            None => format!("{}{name} passes{}: {figures}\n", GOOD.render(), GOOD.render_reset()),
            Some(complaint) => {
                format!(
                    "{}{name} FAILS{}: {complaint}; {figures}\n",
                    BAD.render(),
                    BAD.render_reset()
                )
            }
        });
        if run.complaint().is_some() {
            text.push_str(&words(run));
        }
    }
    text
}

/// The calls, as without a hypervisor: a column for each mode.
fn conformance_text(runs: Vec<Hosted>) -> String {
    let complaints: String =
        runs.iter().filter(|run| run.complaint().is_some()).map(words).collect();
    let tried: Vec<Tried> = runs
        .into_iter()
        .map(|run| Tried {
            name: run.mode.name().into(),
            rom: None,
            client: Client::Lookup,
            complaint: run.complaint(),
            result: run.conformance,
        })
        .collect();
    super::text(&tried, false) + &complaints
}

/// How a run that failed ended, and what the hypervisor said last.
fn words(run: &Hosted) -> String {
    let (name, end) = (run.mode.name(), run.end.name());
    format!("  {name}: ended: {end}; the hypervisor's last lines:\n{}", last_words(&run.run().host))
}

/// One row for each piece of work: exits for each operation, by mode.
fn exits(comparisons: &[Comparison<'_>]) -> String {
    let modes = modes(comparisons);
    let mut columns = vec![Align::Left, Align::Left];
    columns.extend(modes.iter().map(|_| Align::Right));
    columns.extend([Align::Right, Align::Right]);
    let mut table = Table::new(&columns);
    let mut titles = vec!["exits of one", "paging"];
    titles.extend(modes.iter().map(|mode| mode.name()));
    titles.extend(["trap/batched", "entries/exit"]);
    table.heading(&titles);
    for comparison in comparisons {
        let mut row: Vec<Cell> = vec![comparison.name.into(), comparison.guest_mode.into()];
        for mode in &modes {
            let exits = comparison.cost(*mode).map(|line| format!("{:.1}", line.exits_each()));
            row.push(exits.unwrap_or_default().into());
        }
        let is_number = |value: &f64| value.is_finite();
        let ratio = comparison.ratio().filter(is_number);
        let ratio = ratio.map(|ratio| Cell::new(format!("{ratio:.1}"), HEAD));
        row.push(ratio.unwrap_or_else(|| "".into()));
        let batched = comparison.cost(Mode::VmiBatched);
        let entries = batched.map(WorkloadLine::entries_per_exit).filter(is_number);
        let entries = entries.map(|entries| format!("{entries:.1}"));
        row.push(entries.unwrap_or_default().into());
        table.row(row);
    }
    table.render()
}

/// One row for each cause of exits that there were, and for what came with hypercalls: for each operation, by mode.
fn causes(comparisons: &[Comparison<'_>]) -> String {
    let modes = modes(comparisons);
    let mut columns = vec![Align::Left, Align::Left, Align::Left];
    columns.extend(modes.iter().map(|_| Align::Right));
    let mut table = Table::new(&columns);
    let mut titles = vec!["of one", "paging", "cause"];
    titles.extend(modes.iter().map(|mode| mode.name()));
    table.heading(&titles);
    // Ticks are no counts.
    let names: Vec<&str> = tap::named(&Default::default())
        .map(|(name, _)| name)
        .filter(|name| !name.contains("ticks"))
        .collect();
    for comparison in comparisons {
        let mut is_first = true;
        for (index, name) in names.iter().enumerate() {
            let value = |mode: &Mode| {
                let line = comparison.cost(*mode)?;
                Some(line.counters.values()[index] as f64 / f64::from(line.operations))
            };
            let values: Vec<Option<f64>> = modes.iter().map(value).collect();
            if values.iter().flatten().all(|value| *value == 0.0) {
                continue;
            }
            let mut row: Vec<Cell> = match is_first {
                true => vec![comparison.name.into(), comparison.guest_mode.into()],
                false => vec!["".into(), "".into()],
            };
            is_first = false;
            row.push((*name).into());
            row.extend(values.into_iter().map(|value| match value {
                Some(0.0) => Cell::new("0", DIM),
                Some(value) => format!("{value:.1}").into(),
                None => "".into(),
            }));
            table.row(row);
        }
    }
    let faults = |comparison: &Comparison<'_>, mode| {
        comparison.cost(mode).map_or(0, |line| line.counters.guest_page_faults)
    };
    let is_quiet = comparisons.iter().any(|comparison| {
        comparison.cost(Mode::VmiBatched).is_some()
            && faults(comparison, Mode::VmiBatched) == 0
            && faults(comparison, Mode::Trap) > 0
    });
    let note = "vmi-batched: page faults of the guest's own are quiet, so they are no exits and nobody counts them\n";
    table.render() + if is_quiet { note } else { "" }
}

/// The modes that were compared.
fn modes(comparisons: &[Comparison<'_>]) -> Vec<Mode> {
    let has = |mode: &Mode| comparisons.iter().any(|comparison| comparison.cost(*mode).is_some());
    Mode::ALL.into_iter().filter(has).collect()
}

/// One row for each kind of attempt: how many there were in each mode.
fn attempts(runs: &[Hosted]) -> String {
    let mut columns = vec![Align::Left];
    columns.extend(runs.iter().map(|_| Align::Right));
    let mut table = Table::new(&columns);
    let mut titles = vec!["attempts"];
    titles.extend(runs.iter().map(|run| run.mode.name()));
    table.heading(&titles);
    let first = runs.first().map(|run| run.report().attempts.as_slice()).unwrap_or_default();
    for attempt in first {
        let mut row: Vec<Cell> = vec![attempt.what.as_str().into()];
        for run in runs {
            let found = run.report().attempts.iter().find(|other| other.what == attempt.what);
            row.push(found.map(|found| found.count.to_string()).unwrap_or_default().into());
        }
        table.row(row);
    }
    table.render()
}

/// Everything for a program.
fn json(runs: &[Hosted]) -> serde_json::Value {
    let runs: Vec<serde_json::Value> = runs
        .iter()
        .map(|run| {
            let counters = run.counters.as_ref().map(|counters| {
                let named = tap::named(counters).map(|(name, value)| (name.to_owned(), value.into()));
                serde_json::Value::Object(named.collect())
            });
            let exits = run.counters.as_ref().map(|counters| counters.exits());
            serde_json::json!({
                "mode": run.mode,
                "paging": run.paging,
                "passes": run.complaint().is_none(),
                "complaint": run.complaint(),
                "end": run.end.name(),
                "seconds": run.run().duration.as_secs_f64(),
                "command": run.run().command,
                "exits": exits,
                "counters": counters,
                "calls": if run.task == Task::Conformance { serde_json::json!(run.conformance.calls) } else { serde_json::Value::Null },
                "report": run.report(),
            })
        })
        .collect();
    serde_json::json!({ "hypervisor": "reference", "runs": runs })
}
