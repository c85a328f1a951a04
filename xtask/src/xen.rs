//! The test guest on Xen: the machine, the run, and what Xen says of it.

pub mod source;

use crate::build;
use crate::conformance::{Client, Conformance};
use crate::hypervisor::Supply;
use crate::qemu::{Attachment, BANNER, Machine, Module};
use anyhow::{Context, Result};
use source::Xen;
use std::path::Path;

/// Xen's words: its console is the second port, for the guest has the first; 32-bit guests are wanted; all is said.
const COMMAND_LINE: &str = "console=com2 com2=115200,8n1 pv=32 loglvl=all guest_loglvl=all";

/// What Xen says when a run has failed, however QEMU ends.
const COMPLAINTS: [&str; 4] = ["Panic on CPU", "Dom0 crashed", "domain_crash", "Assertion "];

/// The guest on Xen.
#[derive(Clone, Debug)]
pub struct Setup<'a> {
    /// What it is given.
    pub supply: Supply<'a>,
    /// The hypervisor.
    pub xen: &'a Xen,
    /// Count instructions, Xen's too, and have the guest say what changes cost; Reboot is left out then.
    pub costs: bool,
}

/// What came of a run on Xen.
#[derive(Clone, Debug)]
pub struct Hosted {
    /// What the guest said. [`crate::qemu::Run::host`] has Xen's console.
    pub conformance: Conformance,
    /// What Xen complains of.
    pub crash: Option<String>,
    /// Whether costs were wanted.
    costs: bool,
}

impl Hosted {
    /// Why it did not pass; nothing if it did.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        let crash = self.crash.as_ref().map(|line| format!("Xen says: {line}"));
        let counted = !self.conformance.report.xen_costs.is_empty();
        let silent = || {
            (self.costs && !counted).then(|| "the guest says nothing of what changes cost".into())
        };
        crash.or_else(|| self.conformance.complaint()).or_else(silent)
    }

    /// What Xen and the loader said last.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> Vec<&str> {
        let lines = self.conformance.run.host.lines();
        let lines: Vec<&str> = lines.filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }
}

impl Setup<'_> {
    /// The machine; Xen's console goes into a file.
    fn machine(&self, console: &Path) -> Result<Machine> {
        let Supply { built, rom, limit } = self.supply;
        let rom = rom.unwrap_or(&built.hypervisors);
        let has_banner =
            build::read(rom)?.windows(BANNER.len()).any(|part| part == BANNER.as_bytes());
        let mut port = std::ffi::OsString::from("file:");
        port.push(console);
        let mut extra = vec!["-serial".into(), port];
        let mut words = "client=3.0";
        if self.costs {
            // Each instruction takes a nanosecond, and so a tick of the time-stamp counter.
            extra.extend(["-icount".into(), "shift=0,sleep=off".into()]);
            words = "client=3.0 no-reboot costs";
        }
        Ok(Machine {
            // Others either hang or are refused by Xen, or by what it wants to know of idle processors.
            cpu: "qemu64".into(),
            roms: vec![Attachment::OptionRom(rom.to_owned())],
            kernel: Some(self.xen.path.clone()),
            // What follows the loader's name is the guest's command line.
            modules: vec![Module::new(&built.xen_loader, words), Module::new(&built.guest, "")],
            append: Some(COMMAND_LINE.into()),
            // An alarm comes after so many instructions, however busy the host is. Where costs are counted, time is steady too.
            steady_time: !self.costs,
            extra,
            // The guest tests Reboot, and after a crash says in which call it was.
            no_reboot: false,
            limit,
            banner: has_banner.then(|| BANNER.into()),
            ..Machine::default()
        })
    }

    /// Runs the guest, and hands each line of its serial port to `progress`.
    ///
    /// # Errors
    ///
    /// The machine cannot be run at all.
    pub fn run(&self, progress: impl Fn(&str)) -> Result<Hosted> {
        let folder = tempfile::tempdir().context("cannot make a folder for Xen's console")?;
        let console = folder.path().join("console");
        let machine = self.machine(&console)?;
        let mut run =
            machine.follow(&self.supply.built.emulator, progress).context("Xen was not run")?;
        // QEMU ended before it made the file.
        run.host = std::fs::read(&console)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default();
        let crash = crash(&run.host);
        let conformance = Conformance::of(run, Client::Lookup, false, machine.steady_time);
        Ok(Hosted { conformance, crash, costs: self.costs })
    }
}

/// The line in which Xen says that a run has failed.
fn crash(console: &str) -> Option<String> {
    let is_one = |line: &&str| COMPLAINTS.iter().any(|complaint| line.contains(complaint));
    console.lines().find(is_one).map(|line| line.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_xen_complains_of_is_found() {
        let console = "(XEN) Std. Loglevel: All\r\n(XEN) Hardware Dom0 crashed: rebooting machine in 5 seconds.\r\n";
        assert_eq!(
            crash(console).as_deref(),
            Some("(XEN) Hardware Dom0 crashed: rebooting machine in 5 seconds.")
        );
        assert_eq!(crash("(XEN) Freed 612kB init memory\n"), None);
        for line in [
            "(XEN) Panic on CPU 0:",
            "(XEN) domain_crash called from x.c:1",
            "(XEN) Assertion 'a' failed",
        ] {
            assert_eq!(crash(line).as_deref(), Some(line));
        }
    }
}
