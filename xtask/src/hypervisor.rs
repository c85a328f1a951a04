//! Guests on the reference hypervisor: the machine, the run, how it ended, and what the hypervisor counted.

use crate::artifacts::Hosting;
use crate::conformance::{Client, Conformance};
use crate::qemu::{Machine, Module, Outcome, Run, printable};
use crate::tap::{self, Report, WorkloadLine};
use crate::toolchain::Emulator;
use crate::trace::Record;
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use vmi_hv_backend::reference::interface::Counters;
use vmi_hv_backend::reference::record::{Ending, OWN_END, POWER_OFF, RESET, START, STOP};

/// What each line of the hypervisor's begins with.
pub const PREFIX: &str = "hypervisor: ";

/// How the hypervisor comes to know of changes in page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Without a ROM: what it watches traps.
    Trap,
    /// The ROM tells of each change at once.
    Vmi,
    /// The ROM collects changes.
    VmiBatched,
}

impl Mode {
    /// Each of them.
    pub const ALL: [Self; 3] = [Self::Trap, Self::Vmi, Self::VmiBatched];

    /// Its name on command lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Vmi => "vmi",
            Self::VmiBatched => "vmi-batched",
        }
    }
}

/// How the guest's memory is translated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Paging {
    /// By tables that the hypervisor makes from the guest's.
    #[default]
    Shadow,
    /// By the processor, which walks the guest's tables and then the hypervisor's.
    Nested,
}

impl Paging {
    /// Its name on command lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Shadow => "shadow",
            Self::Nested => "nested",
        }
    }
}

/// What the guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// To hold each call against its contract.
    Conformance,
    /// To work on page tables as a kernel does.
    Workload,
    /// To try what no guest should.
    Hostile,
    /// To come to a bad end.
    End(Fate),
}

impl Task {
    /// The guest's words for it.
    fn words(self) -> String {
        let more = match self {
            Self::Conformance => String::new(),
            Self::Workload => " workload".to_owned(),
            Self::Hostile => " hostile".to_owned(),
            Self::End(fate) => format!(" end={}", fate.name()),
        };
        format!("client=3.0{more}")
    }
}

/// An end that the guest can come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Fate {
    /// An exception that nothing handles.
    TripleFault,
    /// A loop, with interrupts on.
    Loop,
    /// A loop, with interrupts off.
    LoopMasked,
    /// A halt, with interrupts off.
    HaltMasked,
    /// A loop of instructions that exit.
    LoopOfExits,
    /// Page tables in a device's memory.
    DeviceTables,
    /// An NMI that the guest sends itself, which must not end it, and then a triple fault.
    OwnNmi,
    /// Hypercalls that do not exist, and then the one that ends the guest.
    Garbage,
}

impl Fate {
    /// Its name on command lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TripleFault => "triple-fault",
            Self::Loop => "loop",
            Self::LoopMasked => "loop-masked",
            Self::HaltMasked => "halt-masked",
            Self::LoopOfExits => "loop-of-exits",
            Self::DeviceTables => "device-tables",
            Self::OwnNmi => "own-nmi",
            Self::Garbage => "garbage",
        }
    }
}

/// What every run of the test guest on a hypervisor is given.
#[derive(Clone, Copy, Debug)]
pub struct Supply<'a> {
    /// What is run.
    pub built: &'a Hosting,
    /// Another image instead of ours.
    pub rom: Option<&'a Path>,
    /// How long the run may take.
    pub limit: Duration,
}

/// The ROM of a guest on the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestRom<'a> {
    /// Ours, but none in [`Mode::Trap`].
    Ours,
    /// None. The hypervisor refuses that in modes that are by calls into one.
    None,
    /// This image.
    File(&'a Path),
}

impl<'a> From<Option<&'a Path>> for GuestRom<'a> {
    /// An image that is wanted instead of ours.
    fn from(file: Option<&'a Path>) -> Self {
        file.map_or(Self::Ours, Self::File)
    }
}

/// A machine that starts the hypervisor: the guest's modules, and behind them the ROM, if there is one.
pub(crate) fn machine(
    built: &Hosting,
    rom: GuestRom<'_>,
    mode: Mode,
    paging: Paging,
    mut modules: Vec<Module>,
) -> Machine {
    let rom = match (rom, mode) {
        (GuestRom::None, _) | (GuestRom::Ours, Mode::Trap) => None,
        (GuestRom::Ours, _) => Some(built.reference.as_path()),
        (GuestRom::File(file), _) => Some(file),
    };
    modules.extend(rom.map(|rom| Module::new(rom, "")));
    Machine {
        memory: 512,
        kernel: Some(built.hypervisor.clone()),
        modules,
        append: Some(format!("mode={} paging={}", mode.name(), paging.name())),
        // What the guest says tells whether it found a ROM.
        banner: None,
        ..Machine::default()
    }
}

/// The guest under the hypervisor.
#[derive(Clone, Debug)]
pub struct Setup<'a> {
    /// What it is given.
    pub supply: Supply<'a>,
    /// The hypervisor's mode. In [`Mode::Trap`] there is no ROM.
    pub mode: Mode,
    /// The hypervisor's paging.
    pub paging: Paging,
    /// Whether the exits are wanted.
    pub traced: bool,
}

impl Setup<'_> {
    /// The machine.
    #[must_use]
    pub fn machine(&self, task: Task) -> Machine {
        let Supply { built, rom, limit } = self.supply;
        let guest = Module::new(&built.guest, task.words());
        // In that mode the guest is to try what is linked into it.
        let rom = rom.filter(|_| self.mode != Mode::Trap);
        Machine {
            // The guest tests Reboot.
            no_reboot: task != Task::Conformance,
            // Where time is steady, QEMU gives up on a page table that lies on a device.
            steady_time: !matches!(task, Task::Hostile | Task::End(Fate::DeviceTables)),
            limit,
            ..machine(built, rom.into(), self.mode, self.paging, vec![guest])
        }
    }

    /// Runs the guest, and hands each line of the serial port to `progress`.
    ///
    /// # Errors
    ///
    /// The machine cannot be run at all.
    pub fn run(&self, task: Task, progress: impl Fn(&str)) -> Result<Hosted> {
        let machine = self.machine(task);
        let steady_time = machine.steady_time;
        let Watched { run, counters, record, end } =
            Watched::follow(machine, &self.supply.built.emulator, self.traced, progress)
                .context("the hypervisor was not run")?;
        let wants_linked = self.mode == Mode::Trap;
        let conformance = Conformance::of(run, Client::Lookup, wants_linked, steady_time);
        Ok(Hosted {
            task,
            mode: self.mode,
            paging: self.paging,
            conformance,
            counters,
            record,
            end,
        })
    }
}

/// What came of a run under the hypervisor.
#[derive(Clone, Debug)]
pub struct Hosted {
    /// What the guest was to do.
    pub task: Task,
    /// The hypervisor's mode.
    pub mode: Mode,
    /// The hypervisor's paging.
    pub paging: Paging,
    /// What the guest said. The summaries of calls are empty but for [`Task::Conformance`].
    pub conformance: Conformance,
    /// What the hypervisor counted in all, from the guest's start to its end.
    pub counters: Option<Counters>,
    /// The exits, if they were wanted.
    pub record: Option<Record>,
    /// How it ended.
    pub end: End,
}

impl Hosted {
    /// The run.
    #[must_use]
    pub fn run(&self) -> &Run {
        &self.conformance.run
    }

    /// The guest's report.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.conformance.report
    }

    /// Why it did not pass; nothing if it did.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        let report = self.report();
        if let Some(complaint) = self.end.complaint(&self.run().outcome) {
            return Some(complaint);
        }
        let missing = match self.task {
            Task::Conformance => return self.conformance.complaint(),
            Task::End(_) => Some("why it did not end as it should"),
            Task::Workload => report.workloads.is_empty().then_some("what its work costs"),
            Task::Hostile => report.attempts.is_empty().then_some("what it tried"),
        };
        if report.failures().next().is_some() {
            return report.complaint();
        }
        if self.run().outcome != Outcome::Passed {
            return Some(self.run().outcome.to_string());
        }
        if self.counters.is_none() {
            return Some("the hypervisor does not say what it counted".to_owned());
        }
        report.complaint().or_else(|| Some(format!("the guest does not say {}", missing?)))
    }
}

/// How a guest's run on the hypervisor ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest ended it, with a verdict of its own.
    Guest,
    /// The guest switched the machine off.
    PowerOff,
    /// The hypervisor ended it.
    Hypervisor(Ending),
    /// The guest reset the machine.
    Reset,
    /// QEMU ended, and nobody says why.
    Silent,
    /// The time was over, and the hypervisor did not answer.
    NoAnswer,
}

impl End {
    /// Of a run.
    #[must_use]
    pub fn of(run: &Run) -> Self {
        let named = |line: &str| {
            let name = line.strip_prefix("ending ")?;
            Ending::ALL.iter().copied().find(|ending| ending.name() == name)
        };
        let told = run.host.lines().rev().map(str::trim_end).find_map(|line| match line {
            POWER_OFF => Some(Self::PowerOff),
            RESET => Some(Self::Reset),
            _ if line.starts_with(OWN_END) => Some(Self::Guest),
            // A guest that starts again has not ended yet.
            _ if line.starts_with(START) => Some(Self::Silent),
            _ => named(line).map(Self::Hypervisor),
        });
        match told.unwrap_or(Self::Silent) {
            Self::Hypervisor(ending) => Self::Hypervisor(ending),
            _ if matches!(run.outcome, Outcome::TimedOut { .. }) => Self::NoAnswer,
            end => end,
        }
    }

    /// Its name for programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::PowerOff => "power-off",
            Self::Hypervisor(ending) => ending.name(),
            Self::Reset => "reset",
            Self::Silent => "silent",
            Self::NoAnswer => "no-answer",
        }
    }

    /// The exit status of `cargo xtask` when such a run fails.
    #[must_use]
    pub const fn status(self) -> u8 {
        match self {
            Self::Guest | Self::PowerOff => 1,
            Self::Hypervisor(ending) => ending.status(),
            Self::NoAnswer => 79,
            Self::Silent => 81,
            Self::Reset => 83,
        }
    }

    /// What there is to say against it, if the guest did not end by itself.
    #[must_use]
    pub fn complaint(self, outcome: &Outcome) -> Option<String> {
        match self {
            Self::Guest | Self::PowerOff => None,
            Self::Hypervisor(Ending::TimeLimit) => Some(format!("time-limit: {outcome}")),
            Self::Hypervisor(ending) => Some(format!("{}: the hypervisor ended it", ending.name())),
            Self::NoAnswer => Some(format!("{outcome}, and the hypervisor did not answer")),
            Self::Reset => Some("the guest reset the machine".to_owned()),
            Self::Silent => Some(outcome.to_string()),
        }
    }
}

/// The exit status for what came of several runs: that of the first one that failed.
#[must_use]
pub fn exit_code(runs: impl IntoIterator<Item = (bool, End)>) -> ExitCode {
    let failed = runs.into_iter().find(|(passes, _)| !passes);
    failed.map_or(ExitCode::SUCCESS, |(_, end)| end.status().into())
}

/// A run on the hypervisor, and what that left.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) run: Run,
    pub(crate) counters: Option<Counters>,
    /// None if nobody wanted it, or the hypervisor did not come to its guest.
    pub(crate) record: Option<Record>,
    pub(crate) end: End,
}

impl Watched {
    /// Runs a machine that has the hypervisor for its kernel. When its time is over, the hypervisor is told to end it.
    pub(crate) fn follow(
        mut machine: Machine,
        emulator: &Emulator,
        traced: bool,
        progress: impl Fn(&str),
    ) -> Result<Self> {
        machine.host_prefix = Some(PREFIX.into());
        machine.last_stores = vec![(STOP, 1), SEND_NMI];
        // The machine's memory is a file: QEMU leaves the exits in it.
        let memory = traced.then(tempfile::NamedTempFile::new).transpose()?;
        machine.memory_file = memory.as_ref().map(|file| file.path().into());
        let run = machine.follow(emulator, progress)?;
        let read = |file: tempfile::NamedTempFile| {
            let record = Record::read(file.path());
            record.inspect_err(|error| log::debug!("{error:#}")).ok()
        };
        let record = memory.and_then(read);
        Ok(Self { counters: counters(&run.host), end: End::of(&run), run, record })
    }
}

/// Where devices store to for an interrupt, here to every processor, and the word for an NMI: it comes through whatever a guest has done to
/// its interrupt controllers.
const SEND_NMI: (u32, u32) = (0xfeef_f000, 4 << 8);

/// What the hypervisor said last of a run that failed, but for its table of counters.
#[must_use]
pub fn last_words(host: &str) -> String {
    const LINES: usize = 48;
    let names: Vec<&str> = tap::named(&Counters::ZERO).map(|(name, _)| name).collect();
    let is_counter = |line: &&str| {
        line.starts_with("counters ")
            || line.starts_with("exits ")
            || names.iter().any(|name| line.starts_with(name))
    };
    let lines: Vec<&str> = host.lines().filter(|line| !is_counter(line)).collect();
    let mut text = String::new();
    for line in &lines[lines.len().saturating_sub(LINES)..] {
        text.push_str(&format!("    {}\n", printable(line)));
    }
    text
}

/// The last line of the hypervisor's with all counters.
pub(crate) fn counters(host: &str) -> Option<Counters> {
    let json = host.lines().rev().find_map(|line| line.strip_prefix("counters "))?;
    let object: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(json.trim()).ok()?;
    let values: Option<Vec<u64>> =
        tap::named(&Counters::ZERO).map(|(name, _)| object.get(name)?.as_u64()).collect();
    Some(Counters::from_values(values?.try_into().ok()?))
}

/// What one piece of a kernel's work costs in each mode.
#[derive(Clone, Debug)]
pub struct Comparison<'a> {
    /// What is done.
    pub name: &'a str,
    /// The guest's paging mode.
    pub guest_mode: &'a str,
    /// What it costs, by the hypervisor's mode.
    pub costs: Vec<(Mode, &'a WorkloadLine)>,
}

impl<'a> Comparison<'a> {
    /// One for each piece of work that the first run reports.
    #[must_use]
    pub fn of(runs: &'a [Hosted]) -> Vec<Self> {
        let lines = runs.first().map(|run| run.report().workloads.as_slice()).unwrap_or_default();
        let find = |run: &'a Hosted, wanted: &WorkloadLine| {
            let is_it =
                |line: &&WorkloadLine| (&line.name, &line.mode) == (&wanted.name, &wanted.mode);
            Some((run.mode, run.report().workloads.iter().find(is_it)?))
        };
        let comparison = |line: &'a WorkloadLine| Self {
            name: &line.name,
            guest_mode: &line.mode,
            costs: runs.iter().filter_map(|run| find(run, line)).collect(),
        };
        lines.iter().map(comparison).collect()
    }

    /// What it costs in a mode.
    #[must_use]
    pub fn cost(&self, mode: Mode) -> Option<&'a WorkloadLine> {
        self.costs.iter().find(|(other, _)| *other == mode).map(|(_, line)| *line)
    }

    /// How many times more exits there are with traps than with batches.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        let exits = |mode| self.cost(mode).map(|line| line.counters.exits() as f64);
        Some(exits(Mode::Trap)? / exits(Mode::VmiBatched)?)
    }
}

impl WorkloadLine {
    /// Exits for each operation.
    #[must_use]
    pub fn exits_each(&self) -> f64 {
        self.counters.exits() as f64 / f64::from(self.operations)
    }

    /// Entries that were changed for each exit.
    #[must_use]
    pub fn entries_per_exit(&self) -> f64 {
        self.entries as f64 / self.counters.exits() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_counters_counts_and_has_to_be_whole() {
        let wanted = Counters { cpuid: 3, ticks: 1 << 40, ..Counters::ZERO };
        let fields: Vec<String> =
            tap::named(&wanted).map(|(name, value)| format!("\"{name}\":{value}")).collect();
        let line = |fields: &[String]| format!("counters {{{}}}\n", fields.join(","));
        let log = format!("counters {{}}\nexits 5\n{}CPUID 3\n", line(&fields));
        assert_eq!(counters(&log), Some(wanted));
        assert_eq!(counters(&line(&fields[1..])), None);
        assert_eq!(counters("exits 5\n"), None);
    }

    #[test]
    fn ends_are_told_apart_by_what_the_hypervisor_says() {
        let run = |host: &str, outcome: Outcome| Run {
            outcome,
            serial: String::new(),
            host: host.into(),
            debug: String::new(),
            duration: Duration::ZERO,
            command: String::new(),
        };
        let wrong = |status| Outcome::WrongExit { status: Some(status), said: String::new() };
        let over = || Outcome::TimedOut { limit: Duration::from_secs(1) };
        for (host, outcome, name, status) in [
            ("the guest ends itself with 0x10\n", Outcome::Passed, "guest", 1),
            ("the guest powers off\n", wrong(0), "power-off", 1),
            ("a\nending triple-fault\n", wrong(69), "triple-fault", 69),
            ("ending time-limit\r\n", over(), "time-limit", 77),
            ("ending\n", over(), "no-answer", 79),
            ("the guest ends itself with 0x10\n", over(), "no-answer", 79),
            ("the guest resets the machine\nthe guest starts at 5\n", wrong(0), "silent", 81),
            ("", wrong(1), "silent", 81),
            ("the guest starts at 5\nthe guest resets the machine\n", wrong(0), "reset", 83),
        ] {
            let run = run(host, outcome);
            let end = End::of(&run);
            assert_eq!((end.name(), end.status()), (name, status));
            assert_eq!(end.complaint(&run.outcome).is_none(), status == 1, "{name}");
        }
        let codes = [(true, End::Guest), (false, End::NoAnswer), (false, End::Silent)];
        assert_eq!(exit_code(codes), ExitCode::from(79));
        assert_eq!(exit_code([(true, End::Silent)]), ExitCode::SUCCESS);
    }

    #[test]
    fn modes_are_compared_by_exits() {
        let line = |hypercalls| WorkloadLine {
            name: "fork".into(),
            mode: "PAE".into(),
            operations: 4,
            entries: 400,
            counters: Counters { hypercalls, updates: 77, ..Counters::ZERO },
        };
        let (trap, batched) = (line(80), line(4));
        let costs = vec![(Mode::Trap, &trap), (Mode::VmiBatched, &batched)];
        let comparison = Comparison { name: "fork", guest_mode: "PAE", costs };
        assert_eq!(comparison.ratio(), Some(20.0));
        assert!(comparison.cost(Mode::Vmi).is_none());
        assert_eq!((batched.exits_each(), batched.entries_per_exit()), (1.0, 100.0));
    }
}
