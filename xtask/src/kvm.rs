//! Linux under KVM, to compare with: KVM itself runs in QEMU's translator, which has AMD's SVM.
//!
//! The host is a 64-bit kernel of Debian's with `tests/kvm` as its only program. `/dev/kvm` of the machine at hand is not used.

use crate::artifacts;
use crate::build::{self, Tools};
use crate::debian::{self, Flavour, KVM_MODULES};
use crate::hypervisor::Paging;
use crate::linux::{Archive, COMMAND_LINE, MARKER};
use crate::qemu::{Machine, Outcome, Run};
use crate::toolchain::{Emulator, Findings};
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What each line of the host's begins with.
pub const PREFIX: &str = "kvm: ";

/// A processor with SVM.
const PROCESSOR: &str = "EPYC,+svm,+npt";

/// The host's memory in MiB: the guest has half of it.
const MEMORY: u32 = 1024;

/// The host, ready to be booted.
#[derive(Clone, Debug)]
pub struct Host {
    emulator: Emulator,
    kernel: PathBuf,
    modules: Vec<PathBuf>,
    program: PathBuf,
}

impl Host {
    /// Builds its program; `setup --kvm` has fetched the rest.
    ///
    /// # Errors
    ///
    /// Something is missing, or the program does not compile.
    pub fn build(findings: &Findings) -> Result<Self> {
        let emulator = artifacts::long_mode_emulator()?;
        let flavour = Flavour::CloudAmd64;
        let kernel = debian::kernel(flavour)?;
        let modules = KVM_MODULES.iter().map(|name| debian::file(flavour, name));
        let modules = modules.collect::<Result<_>>()?;
        let program = crate::linux::folder().join("kvm-host");
        build::static_program(&Tools::from_findings(findings)?, "vmi-kvm-host", &program)?;
        Ok(Self { emulator, kernel, modules, program })
    }

    /// Everything that the host has: its program, KVM's modules, the guest.
    fn initramfs(&self, guest: &Guest<'_>) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for folder in ["dev", "debug", "proc", "modules", "guest"] {
            archive.folder(folder);
        }
        archive.device("dev/console", (5, 1));
        archive.program("init", &build::read(&self.program)?);
        // The program loads them in the order of their names.
        for (number, (module, name)) in self.modules.iter().zip(KVM_MODULES).enumerate() {
            archive.file(&format!("modules/{number}-{name}"), &build::read(module)?);
        }
        archive.file("guest/kernel", &build::read(guest.kernel)?);
        archive.file("guest/initrd", &build::read(guest.initrd)?);
        let line = format!("{COMMAND_LINE} {}", guest.append);
        archive.file("guest/line", line.trim_end().as_bytes());
        Ok(archive.finish())
    }

    /// Boots it, and the guest on it, and hands each line of the guest's to `progress`.
    ///
    /// # Errors
    ///
    /// The machine cannot be run at all.
    pub fn run(&self, guest: &Guest<'_>, progress: impl Fn(&str)) -> Result<Hosted> {
        let folder = tempfile::tempdir()?;
        let initrd = folder.path().join("initramfs");
        build::write(&initrd, &self.initramfs(guest)?)?;
        let nested = u8::from(guest.paging == Paging::Nested);
        let machine = Machine {
            cpu: PROCESSOR.into(),
            memory: MEMORY,
            kernel: Some(self.kernel.clone()),
            initrd: Some(initrd),
            append: Some(format!("console=ttyS0 quiet -- parameters=kvm-amd:npt={nested}")),
            limit: guest.limit,
            marker: guest.marker.unwrap_or_default().into(),
            banner: None,
            host_prefix: Some(PREFIX.into()),
            ..Machine::default()
        };
        let run = machine.follow(&self.emulator, progress)?;
        let statistics = statistics(&run.host);
        Ok(Hosted { run, statistics })
    }
}

/// A Linux guest.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// The kernel, a bzImage.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initrd: &'a Path,
    /// More words for the kernel's command line.
    pub append: &'a str,
    /// KVM's paging.
    pub paging: Paging,
    /// What the last line starts with; none if only the exit status counts.
    pub marker: Option<&'a str>,
    /// How long host and guest may take.
    pub limit: Duration,
}

impl<'a> Guest<'a> {
    /// The tests of our first program.
    #[must_use]
    pub fn tests(kernel: &'a Path, initrd: &'a Path, paging: Paging) -> Self {
        let limit = Duration::from_secs(300);
        Self { kernel, initrd, append: "", paging, marker: Some(MARKER), limit }
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Hosted {
    /// The run.
    pub run: Run,
    /// What KVM counted, by its own names.
    pub statistics: BTreeMap<String, u64>,
}

impl Hosted {
    /// Whether the guest came to its end as it should, and KVM said what it counted.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.run.outcome == Outcome::Passed && self.exits().is_some()
    }

    /// Exits.
    #[must_use]
    pub fn exits(&self) -> Option<u64> {
        self.statistics.get("exits").copied()
    }
}

/// The lines of a name and a number.
fn statistics(host: &str) -> BTreeMap<String, u64> {
    let line = |line: &str| {
        let (name, count) = line.trim().split_once(' ')?;
        Some((name.to_owned(), count.parse().ok()?))
    };
    host.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_name_and_a_number_are_statistics() {
        let found = statistics("exits 12\r\nthe module kvm.ko does not load\npf_taken 3\nhalf\n");
        let wanted = [("exits".to_owned(), 12), ("pf_taken".to_owned(), 3)];
        assert_eq!(found, BTreeMap::from(wanted));
    }
}
