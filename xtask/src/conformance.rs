//! One ROM under the test guest: the run, the report and the verdict on each call.

use crate::qemu::{Attachment, BANNER, Machine, Outcome, Run, TICKS_PER_INSTRUCTION};
use crate::tap::{Report, Verdict};
use crate::toolchain::Emulator;
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::Path;
use vmi_abi::header::RomHeader;
use vmi_abi::{REVISION_3_0, REVISION_13_0, REVISION_13_3, RelocationType, Revision};
use zerocopy::FromBytes;

/// A kind of guest: it reaches its calls as the kernels of a revision do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
pub enum Client {
    /// Asks for each call, as Linux 2.6.21 to 2.6.36 does.
    #[value(name = "3.0")]
    #[serde(rename = "3.0")]
    Lookup,
    /// Copies the slots and changes the copy, as the Linux patches of March 2006 did.
    #[value(name = "13.0")]
    #[serde(rename = "13.0")]
    CopiedSlots,
    /// Makes a table of pointers to the slots, as Sanos does.
    #[value(name = "13.3")]
    #[serde(rename = "13.3")]
    PointerTable,
}

impl Client {
    /// The client for a ROM, by the revision in its header. What is no ROM is left to Linux to refuse.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn of_rom(rom: &Path) -> Result<Self> {
        let bytes = crate::build::read(rom)?;
        let header = RomHeader::ref_from_prefix(&bytes).ok().map(|(header, _)| header);
        let found = header.map(|header| (header.api_version_maj, header.api_version_min));
        Ok(match found {
            Some((major, minor)) if major == REVISION_13_3.major => {
                if minor >= REVISION_13_3.minor { Self::PointerTable } else { Self::CopiedSlots }
            }
            _ => Self::Lookup,
        })
    }

    /// The revision that it asks for.
    #[must_use]
    pub const fn revision(self) -> Revision {
        match self {
            Self::Lookup => REVISION_3_0,
            Self::CopiedSlots => REVISION_13_0,
            Self::PointerTable => REVISION_13_3,
        }
    }
}

/// What the test guest is to try.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The ROM that is added to the machine; without one the guest takes what is linked into it.
    pub rom: Option<Attachment>,
    /// As which kind of guest.
    pub client: Client,
}

impl Subject {
    /// An option ROM, for its own client.
    ///
    /// # Errors
    ///
    /// See [`Client::of_rom`].
    pub fn option_rom(rom: &Path) -> Result<Self> {
        Ok(Self { rom: Some(Attachment::OptionRom(rom.to_owned())), client: Client::of_rom(rom)? })
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.rom {
            Some(rom) => {
                let path = rom.path();
                path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
            }
            None => "linked into the guest".to_owned(),
        }
    }
}

/// What came of a ROM under the test guest.
#[derive(Clone, Debug)]
pub struct Conformance {
    /// The run.
    pub run: Run,
    /// What the guest said.
    pub report: Report,
    /// One summary for each call of the client's revision, in the order of their numbers.
    pub calls: Vec<CallSummary>,
    /// No ROM was added: the guest is to take what is linked into it.
    wants_linked: bool,
    /// What the operations of a kernel cost; nothing on a machine whose time is not steady.
    pub costs: Vec<Cost>,
}

/// What an operation of a kernel costs, in instructions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cost {
    /// What is done.
    pub operation: String,
    /// With native code at the sites, as a kernel without a ROM has it.
    pub native: f64,
    /// With the ROM's answers.
    pub rom: f64,
}

impl Cost {
    /// How much more it costs with the ROM: 1.0 is nothing.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        self.rom / self.native
    }
}

/// The geometric mean of the ratios; 1.0 of nothing.
#[must_use]
pub fn mean_ratio(costs: &[Cost]) -> f64 {
    let sum: f64 = costs.iter().map(|cost| cost.ratio().ln()).sum();
    (sum / costs.len().max(1) as f64).exp()
}

/// What came of one call in all the ways in which it was reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CallSummary {
    /// The call's number.
    pub number: u32,
    /// The call's name.
    pub name: &'static str,
    /// What `get_reloc` answered; several answers are joined by a stroke.
    pub answer: String,
    /// The worst verdict; none if the guest said nothing about the call.
    pub verdict: Option<Verdict>,
    /// The most bytes of stack that it used.
    pub stack: Option<u32>,
    /// The most instructions that it took.
    pub instructions: Option<u32>,
    /// All checks that were made.
    pub checks: u32,
}

impl CallSummary {
    /// Whether the guest was left with its own native code.
    #[must_use]
    pub fn is_native(&self) -> bool {
        Some(self.answer.as_str()) == RelocationType::NONE.name()
    }
}

/// Runs the test guest.
///
/// # Errors
///
/// The machine cannot be run at all, or the ROM cannot be read.
pub fn check(
    emulator: &Emulator,
    guest: &Path,
    subject: &Subject,
    machine: &Machine,
    progress: impl Fn(&str),
) -> Result<Conformance> {
    let mut machine = machine.clone();
    machine.kernel = Some(guest.to_owned());
    let Revision { major, minor } = subject.client.revision();
    let words = format!("client={major}.{minor}");
    machine.append = Some(machine.append.into_iter().chain([words]).collect::<Vec<_>>().join(" "));
    // The guest tests Reboot: it has itself reset, finds its record in memory and goes on.
    machine.no_reboot = false;
    let mut has_banner = false;
    if let Some(rom) = &subject.rom {
        let bytes = crate::build::read(rom.path())?;
        // A ROM of somebody else's may come up in silence.
        has_banner = bytes.windows(BANNER.len()).any(|window| window == BANNER.as_bytes());
        machine.roms.insert(0, rom.clone());
    }
    machine.banner = machine.banner.filter(|_| has_banner);
    let run = machine
        .follow(emulator, progress)
        .with_context(|| format!("{} was not run", subject.name()))?;
    Ok(Conformance::of(run, subject.client, subject.rom.is_none(), machine.steady_time))
}

impl Conformance {
    /// What came of a run. The guest is to take what is linked into it, or a ROM; without steady time it says
    /// nothing about costs.
    #[must_use]
    pub fn of(run: Run, client: Client, wants_linked: bool, steady_time: bool) -> Self {
        let report = Report::parse(&run.serial);
        let calls = summaries(&report, client.revision());
        let costs = if steady_time { costs(&report) } else { Vec::new() };
        Self { run, report, calls, wants_linked, costs }
    }

    /// Why the ROM did not pass; nothing if it did.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        if self.report.failures().next().is_some() {
            return self.report.complaint();
        }
        if self.run.outcome != Outcome::Passed {
            return Some(self.run.outcome.to_string());
        }
        let found = self.report.rom.as_ref();
        if found.is_some_and(|found| found.linked != self.wants_linked) {
            return Some(match self.wants_linked {
                true => "the guest found a ROM where none was to be".to_owned(),
                false => {
                    "the guest passed the ROM over, and took what is linked into it".to_owned()
                }
            });
        }
        let silent: Vec<&str> =
            self.calls.iter().filter(|call| call.verdict.is_none()).map(|call| call.name).collect();
        self.report.complaint().or_else(|| {
            (!silent.is_empty()).then(|| {
                format!(
                    "the guest says nothing about {} calls: {}",
                    silent.len(),
                    silent.join(", ")
                )
            })
        })
    }
}

/// The report's ticks as instructions.
fn costs(report: &Report) -> Vec<Cost> {
    report
        .costs
        .iter()
        .map(|line| {
            let each = f64::from(line.times) * f64::from(TICKS_PER_INSTRUCTION);
            Cost {
                operation: line.operation.clone(),
                native: line.native as f64 / each,
                rom: line.rom as f64 / each,
            }
        })
        .collect()
}

/// One summary for each call.
fn summaries(report: &Report, revision: Revision) -> Vec<CallSummary> {
    revision
        .calls()
        .map(|(number, call)| {
            let mut summary = CallSummary { number, name: call.name, ..CallSummary::default() };
            let mut answers: Vec<&str> = Vec::new();
            for line in report.calls.iter().filter(|line| line.number == number) {
                if !answers.contains(&line.answer.as_str()) {
                    answers.push(&line.answer);
                }
                summary.verdict = summary.verdict.max(Some(line.verdict));
                summary.stack = summary.stack.max(line.stack);
                summary.instructions = summary.instructions.max(line.instructions);
                summary.checks = summary.checks.saturating_add(line.checks.unwrap_or(0));
            }
            summary.answer = answers.join("/");
            summary
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use vmi_abi::CALLS_3_0;

    /// A log of the test guest's shape: every call in two modes, `line` may change the lines of each.
    pub(crate) fn log(line: impl Fn(u32, &str, String) -> String) -> String {
        let mut log = String::from(
            "SeaBIOS (version 1.16)\r\nTAP version 14\n# rom base=0xca000 length=1536 revision=3.0 linked=false license=\"GPL v2\"\n",
        );
        let mut checks = 0;
        for mode in ["non-PAE", "PAE"] {
            for (call, number) in CALLS_3_0.iter().zip(0u32..) {
                checks += 1;
                let name = call.name;
                log += &line(
                    number,
                    mode,
                    format!(
                        "ok {checks} - {name}\n# call mode={mode} alias=direct number={number} name={name} answer=CALL_REL verdict=ok stack=4 instructions=2 checks=1\n"
                    ),
                );
            }
        }
        log + &format!("1..{checks}\n# vmi-guest: all {checks} checks hold\n")
    }

    fn conformance(log: &str) -> Conformance {
        let report = Report::parse(log);
        let calls = summaries(&report, REVISION_3_0);
        let run = Run {
            outcome: Outcome::Passed,
            serial: log.into(),
            host: String::new(),
            debug: String::new(),
            duration: Duration::ZERO,
            command: String::new(),
        };
        let costs = costs(&report);
        Conformance { run, report, calls, wants_linked: false, costs }
    }

    #[test]
    fn a_full_report_passes_and_the_worst_figures_count() {
        let result = conformance(&log(|number, mode, line| {
            if number == 29 && mode == "PAE" {
                line.replace("stack=4", "stack=8").replace("CALL_REL", "JUMP_REL")
            } else {
                line
            }
        }));
        assert_eq!(result.complaint(), None);
        assert_eq!(result.calls.len(), 74);
        assert_eq!(result.calls[29].stack, Some(8));
        assert_eq!(result.calls[29].checks, 2);
        assert_eq!(result.calls[29].answer, "CALL_REL/JUMP_REL");
    }

    #[test]
    fn a_call_without_a_word_about_it_is_no_pass() {
        let result = conformance(&log(|number, _, line| {
            if number == 5 {
                line.lines().take(1).map(|line| format!("{line}\n")).collect()
            } else {
                line
            }
        }));
        let complaint = result.complaint().expect("a complaint");
        assert!(complaint.contains("SetIDT"), "{complaint}");
    }

    #[test]
    fn one_failure_in_one_mode_is_the_verdict() {
        let broken = log(|number, mode, line| {
            if number == 5 && mode == "PAE" {
                format!("not {}", line.replace("verdict=ok", "verdict=FAIL"))
            } else {
                line
            }
        });
        let result = conformance(&broken.replace("all 148 checks hold", "1 of 148 checks fail"));
        assert_eq!(result.calls[5].verdict, Some(Verdict::Fail));
        assert_eq!(result.complaint().as_deref(), Some("1 of 148 checks fail"));
    }
}
