//! `cargo xtask run`.

mod all;
mod costs;
mod kvm;
mod linux;
pub mod options;
mod reference;
mod xen;

use crate::artifacts::{self, Artifacts};
use crate::conformance::{self, CallSummary, Client, Conformance, Subject};
use crate::hypervisor::Mode;
use crate::progress::Progress;
use crate::qemu::{Attachment, Machine, Model, printable};
use crate::table::{Align, BAD, Cell, DIM, GOOD, HEAD, Table};
use crate::tap::Verdict;
use crate::toolchain::Need;
use crate::verbs::boots::{self, shows};
use anyhow::{Result, bail};
use options::Host;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Boots the test guest on the ROM in QEMU and shows what came of each call.
///
/// Without `--rom` it builds everything and boots twice: with the default image, whose short calls
/// become native code where they are called, and with the one that answers CALL_REL wherever it may.
/// Succeeds only if every check holds.
#[derive(Debug, clap::Args)]
#[command(after_help = options::help())]
pub struct Args {
    /// Try this ROM instead of ours, of any revision that there are kernels for. For Linux `none` is no ROM.
    #[arg(long, value_name = "FILE")]
    rom: Option<RomChoice>,
    /// Try no ROM but the native backend that is linked into the guest.
    #[arg(long, conflicts_with_all = ["rom", "bar"])]
    no_rom: bool,
    /// The kind of kernel that the guest behaves like, by its revision of the interface: 3.0 as Linux
    /// 2.6.21 to 2.6.36 does, 13.0 as the patches of March 2006 did, 13.3 as Sanos does. Left out, it
    /// is the one that suits the ROM.
    #[arg(long, value_enum)]
    client: Option<Client>,
    /// QEMU's machine model.
    #[arg(long, value_enum, default_value_t = Model::Pc)]
    machine: Model,
    /// QEMU's processor model.
    #[arg(long, default_value = "max")]
    cpu: String,
    /// Show what a kernel's operations cost, in instructions: natively and with each of our images,
    /// or with the ROM given, of the test guest or of a Linux; on Xen what changes cost there, its own
    /// work included.
    #[arg(long)]
    costs: bool,
    /// Put the ROM behind a PCI card instead of giving it to the firmware.
    #[arg(long)]
    bar: bool,
    /// Processors; the test guest runs on the first.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=255))]
    processors: u32,
    /// Memory in MiB.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(16..=2047))]
    memory: u32,
    /// Seconds that each boot may take: 60, or 300 on a hypervisor and for Linux, if not given.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
    /// Print what the guest writes to its serial port, as it comes.
    #[arg(long)]
    verbose: bool,

    #[command(flatten)]
    reference: reference::Options,
    #[command(flatten)]
    linux: linux::LinuxOptions,
}

impl Args {
    /// The file that `--rom` names.
    fn rom_file(&self) -> Option<&Path> {
        match &self.rom {
            Some(RomChoice::File(file)) => Some(file),
            Some(RomChoice::None) | None => None,
        }
    }

    /// Whether there is a run with `--rom none`.
    fn may_have_no_rom(&self) -> Result<()> {
        if self.linux.kernel.is_none() {
            bail!("--rom none is for Linux; the test guest takes --no-rom");
        }
        if self.costs {
            bail!("--rom none leaves nothing to compare: --costs boots without a ROM anyway");
        }
        if self.reference.on.is_some() && !self.reference.modes().contains(&Mode::Trap) {
            bail!("--rom none goes with --mode trap: the other modes are by calls into a ROM");
        }
        Ok(())
    }

    /// How long each boot may take.
    fn limit(&self) -> Duration {
        let is_long = self.reference.on.is_some() || self.linux.kernel.is_some();
        Duration::from_secs(self.limit.unwrap_or(if is_long { 300 } else { 60 }))
    }
}

/// What `--rom` says.
#[derive(Clone, Debug)]
enum RomChoice {
    None,
    File(PathBuf),
}

impl From<OsString> for RomChoice {
    fn from(word: OsString) -> Self {
        if word == "none" { Self::None } else { Self::File(word.into()) }
    }
}

/// What was tried, and what came of it.
struct Tried {
    /// What it is called: the ROM, or where it was tried.
    name: String,
    /// The ROM; none if it is what is linked into the guest.
    rom: Option<PathBuf>,
    /// As which kind of guest.
    client: Client,
    /// What the guest said.
    result: Conformance,
    /// Why it did not pass, by what the guest or its host said; nothing if it did.
    complaint: Option<String>,
}

impl Tried {
    /// A ROM, or what is linked into the guest, under its own name.
    fn of(subject: &Subject, result: Conformance) -> Self {
        let rom = subject.rom.as_ref().map(|rom| rom.path().to_owned());
        let complaint = result.complaint();
        Self { name: subject.name(), rom, client: subject.client, result, complaint }
    }
}

/// What the user wants to have tried.
fn subjects(args: &Args, built: &Artifacts) -> Result<Vec<Subject>> {
    let client = args.client.unwrap_or(Client::Lookup);
    if args.no_rom {
        return Ok(vec![Subject { rom: None, client }]);
    }
    let roms: Vec<&Path> = match (args.rom_file(), client) {
        (Some(rom), _) => vec![rom],
        (None, Client::CopiedSlots) => vec![&built.slots_13_0],
        (None, Client::PointerTable) => vec![&built.slots_13_3],
        (None, Client::Lookup) if args.costs => vec![&built.native, &built.fastest, &built.call],
        (None, Client::Lookup) => vec![&built.native, &built.call],
    };
    let way = if args.bar { Attachment::PciRomBar } else { Attachment::OptionRom };
    let subject = |rom: &Path| {
        let client = args.client.map_or_else(|| Client::of_rom(rom), Ok)?;
        Ok(Subject { rom: Some(way(rom.to_owned())), client })
    };
    roms.into_iter().map(subject).collect()
}

/// Runs.
///
/// # Errors
///
/// Something is missing, the build fails, or QEMU does not start.
pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.rom {
        Some(RomChoice::File(rom)) => boots::is_a_rom(rom)?,
        Some(RomChoice::None) => args.may_have_no_rom()?,
        None => {}
    }
    let findings = super::setup::provide(Need::RUN)?;
    match (args.reference.on, &args.linux.kernel) {
        (Some(Host::Kvm), Some(kernel)) => return kvm::run(&findings, args, kernel),
        // Options were checked.
        (Some(Host::Kvm), None) | (Some(Host::Xen | Host::All), Some(_)) => {
            bail!("there is no such run")
        }
        (Some(Host::Xen), None) => return xen::run(&findings, args),
        (Some(Host::All), None) => return all::run(&findings, args),
        (None, Some(kernel)) if args.costs => return costs::of_linux(&findings, args, kernel),
        (None | Some(Host::Reference), Some(kernel)) => return linux::run(&findings, args, kernel),
        (Some(Host::Reference), None) => return reference::run(&findings, args),
        (None, None) => {}
    }
    let built = artifacts::build_all(&findings)?;
    let subjects = subjects(args, &built)?;
    let machine = Machine {
        model: args.machine,
        cpu: args.cpu.clone(),
        memory: args.memory,
        processors: args.processors,
        limit: args.limit(),
        ..Machine::default()
    };

    let mut tried = Vec::new();
    for subject in subjects {
        let progress = Progress::start(format!(
            "running {} on {}, processor {}",
            subject.name(),
            machine.model,
            machine.cpu
        ));
        let show = shows(args.verbose, &progress);
        let result = conformance::check(&built.emulator, &built.guest, &subject, &machine, show)?;
        drop(progress);
        tried.push(Tried::of(&subject, result));
    }

    let passes = tried.iter().all(|tried| tried.complaint.is_none());
    if args.json {
        println!("{}", serde_json::to_string_pretty(&json(&tried))?);
    } else {
        anstream::print!("{}", text(&tried, args.costs));
    }
    Ok(if passes { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything for a reader.
fn text(tried: &[Tried], costs_wanted: bool) -> String {
    let columns: Vec<_> =
        tried.iter().map(|t| (t.name.as_str(), t.result.costs.as_slice())).collect();
    let mut text = if costs_wanted { costs::table(&columns) } else { table(tried) };
    for Tried { name, result, .. } in tried {
        text.push_str(&failures(name, result));
    }
    text.push('\n');
    for Tried { name, result, complaint, .. } in tried {
        text.push_str(&closing(name, result, complaint.as_deref()));
    }
    text
}

/// One row for each call, and for each ROM what came of it.
fn table(tried: &[Tried]) -> String {
    let mut columns = vec![Align::Right, Align::Left];
    let mut roms: Vec<Cell> = vec!["".into(), "".into()];
    let mut titles = vec!["nr", "call"];
    for tried in tried {
        columns.extend([Align::Left, Align::Left, Align::Right, Align::Right]);
        roms.extend([Cell::new(&tried.name, HEAD), "".into(), "".into(), "".into()]);
        titles.extend(["answer", "verdict", "stack", "instructions"]);
    }
    let mut table = Table::new(&columns);
    table.titles(roms);
    table.heading(&titles);
    // All that is tried at once is tried by one client.
    let calls = tried.first().map(|tried| tried.client.revision().calls());
    for (index, (number, call)) in calls.into_iter().flatten().enumerate() {
        let mut row: Vec<Cell> = vec![number.to_string().into(), call.name.into()];
        for tried in tried {
            match tried.result.calls.get(index) {
                Some(summary) => row.extend(call_cells(summary)),
                None => row.extend(std::iter::repeat_n("".into(), 4)),
            }
        }
        table.row(row);
    }
    table.render()
}

/// Answer, verdict, stack and instructions. The guest's own code is not the ROM's, so it stays in the background.
fn call_cells(call: &CallSummary) -> [Cell; 4] {
    let look = |style| if call.is_native() { DIM } else { style };
    let verdict = match call.verdict {
        Some(Verdict::Ok) => Cell::new("ok", look(GOOD)),
        Some(Verdict::Fail) => Cell::new("FAIL", BAD),
        Some(Verdict::Skip) => Cell::new("skip", DIM),
        None => Cell::new("-", BAD),
    };
    let figure = |figure: Option<u32>| {
        Cell::new(figure.map(|figure| figure.to_string()).unwrap_or_default(), DIM)
    };
    let (stack, instructions) =
        if call.is_native() { (None, None) } else { (call.stack, call.instructions) };
    [
        Cell::new(call.answer.clone(), look(crate::table::PLAIN)),
        verdict,
        figure(stack),
        figure(instructions),
    ]
}

/// Every failing check in full.
fn failures(name: &str, result: &Conformance) -> String {
    let mut text = String::new();
    let bad = |line: String| format!("{}{line}{}\n", BAD.render(), BAD.render_reset());
    for check in result.report.failures() {
        text.push('\n');
        text.push_str(&bad(format!("{name}: check {} fails: {}", check.number, check.description)));
        for (key, values) in &check.details {
            for value in values {
                text.push_str(&format!("  {key}: {value}\n"));
            }
        }
    }
    for fault in &result.report.faults {
        text.push('\n');
        text.push_str(&bad(format!("{name}: {fault}")));
    }
    // A guest that did not come to its end has said something last.
    if result.report.closing.is_none() {
        let lines: Vec<&str> =
            result.run.serial.lines().filter(|line| !line.trim().is_empty()).collect();
        if !lines.is_empty() {
            text.push_str("  the last lines on the serial port:\n");
        }
        for line in &lines[lines.len().saturating_sub(10)..] {
            text.push_str(&format!("    {}\n", printable(line)));
        }
        text.push_str(&format!("  {}\n", result.run.command));
    }
    text
}

/// The last word on a ROM.
fn closing(name: &str, result: &Conformance, complaint: Option<&str>) -> String {
    let count = |verdict| {
        result.calls.iter().filter(|call| call.verdict == verdict && !call.is_native()).count()
    };
    let native = result.calls.iter().filter(|call| call.is_native()).count();
    let seconds = result.run.duration.as_secs_f64();
    let holding = result.report.checks.iter().filter(|check| check.ok).count();
    let figures = format!(
        "{holding} of {} checks hold; {} calls bound, {native} left to the guest, {} failing; {seconds:.1} s",
        result.report.checks.len(),
        count(Some(Verdict::Ok)) + count(Some(Verdict::Fail)),
        result.calls.iter().filter(|call| call.verdict == Some(Verdict::Fail)).count(),
    );
    match complaint {
        None => format!("{}{name} passes{}: {figures}\n", GOOD.render(), GOOD.render_reset()),
        Some(complaint) => {
            format!("{}{name} FAILS{}: {complaint}; {figures}\n", BAD.render(), BAD.render_reset())
        }
    }
}

/// Everything for a program.
fn json(tried: &[Tried]) -> serde_json::Value {
    let roms: Vec<serde_json::Value> = tried
        .iter()
        .map(|Tried { name, rom, client, result, complaint }| {
            serde_json::json!({
                "name": name,
                "path": rom,
                "client": client,
                "passes": complaint.is_none(),
                "complaint": complaint,
                "seconds": result.run.duration.as_secs_f64(),
                "command": result.run.command,
                "calls": result.calls,
                "costs": result.costs,
                "report": result.report,
            })
        })
        .collect();
    serde_json::json!({ "roms": roms })
}
