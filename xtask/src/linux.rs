//! Linux as the guest: its first program, the initramfs around it, the runs; a Linux with a client of VMI, and what it costs.

pub mod costs;
pub mod vmi;

use crate::artifacts::Hosting;
use crate::build::{self, Tools};
use crate::hypervisor::{self, End, GuestRom, Mode, Paging, Watched};
use crate::qemu::{Attachment, Machine, Module, Outcome, Run};
use crate::trace::Record;
use anyhow::Result;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmi_hv_backend::reference::interface::Counters;

/// What the first program's last line starts with, if all went well.
pub(crate) const MARKER: &str = "linux: all ";

/// What the kernel is told before the words for its first program: its console, and not to test its own ciphers, which takes a third
/// of a boot.
pub(crate) const COMMAND_LINE: &str = "console=ttyS0 cryptomgr.notests";

/// Where everything lands that has to do with Linux.
pub(crate) fn folder() -> PathBuf {
    crate::workspace().join("target/linux")
}

/// Where the initramfs lands.
#[must_use]
pub fn initramfs_path() -> PathBuf {
    folder().join("initramfs.cpio")
}

/// Builds the first program, and packs it.
///
/// # Errors
///
/// It does not compile.
pub fn initramfs(tools: &Tools) -> Result<PathBuf> {
    let program = folder().join("init");
    build::kernel(tools, "vmi-linux-init", &program, &[])?;
    let path = initramfs_path();
    build::write(&path, &archive(&build::read(&program)?))?;
    Ok(path)
}

/// The initramfs of our first program: console and zeros as devices, an empty folder for /proc, the program.
#[must_use]
pub fn archive(program: &[u8]) -> Vec<u8> {
    let mut archive = Archive::default();
    archive.folder("dev");
    archive.device("dev/console", (5, 1));
    archive.device("dev/zero", (1, 5));
    archive.folder("proc");
    archive.program("init", program);
    archive.finish()
}

/// An archive in the "new ASCII" format of cpio, which Linux unpacks as its first file system.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// An empty folder.
    pub(crate) fn folder(&mut self, name: &str) {
        self.add(name, 0o040_755, (0, 0), &[]);
    }

    /// A character device.
    pub(crate) fn device(&mut self, name: &str, number: (u32, u32)) {
        self.add(name, 0o020_600, number, &[]);
    }

    /// A file that can be executed.
    pub(crate) fn program(&mut self, name: &str, bytes: &[u8]) {
        self.add(name, 0o100_755, (0, 0), bytes);
    }

    /// Any other file.
    pub(crate) fn file(&mut self, name: &str, bytes: &[u8]) {
        self.add(name, 0o100_644, (0, 0), bytes);
    }

    /// The archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), bytes: &[u8]) {
        self.entries += 1;
        let (number, length) = (self.entries, bytes.len() as u32);
        let archive = &mut self.bytes;
        archive.extend(b"070701");
        // The fields of a header: inode, mode, owner, group, links, time, bytes, the device it lies on, the device it is, bytes of the
        // name with its end, a sum that this format does not use.
        let fields =
            [number, mode, 0, 0, 1, 0, length, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
        for field in fields {
            archive.extend(format!("{field:08X}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(bytes);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
}

/// What lies below Linux.
#[derive(Clone, Copy, Debug)]
pub enum Below<'a> {
    /// The machine.
    Machine {
        /// An option ROM in it.
        rom: Option<&'a Path>,
        /// QEMU's model of its processors.
        cpu: &'a str,
        /// How many there are.
        processors: u32,
    },
    /// The reference hypervisor.
    Hypervisor {
        /// It and its ROM.
        built: &'a Hosting,
        /// The guest's.
        rom: GuestRom<'a>,
        /// How it comes to know of changes in page tables.
        mode: Mode,
        /// How memory is translated.
        paging: Paging,
    },
}

impl<'a> Below<'a> {
    /// A machine with one processor that can do all that QEMU's can, and this option ROM.
    #[must_use]
    pub const fn machine(rom: Option<&'a Path>) -> Self {
        Self::Machine { rom, cpu: "max", processors: 1 }
    }

    /// The same with so many processors, if it is a machine: the hypervisor has one.
    #[must_use]
    pub const fn with_processors(self, processors: u32) -> Self {
        match self {
            Self::Machine { rom, cpu, .. } => Self::Machine { rom, cpu, processors },
            Self::Hypervisor { .. } => self,
        }
    }
}

/// A boot of Linux.
#[derive(Clone, Debug)]
pub struct Boot<'a> {
    /// QEMU.
    pub emulator: &'a crate::toolchain::Emulator,
    /// The kernel, a bzImage.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initrd: &'a Path,
    /// More words for the kernel's command line; behind ` -- ` they are the first program's.
    pub append: Cow<'a, str>,
    /// What lies below.
    pub below: Below<'a>,
    /// What the last line starts with; none if only the exit status counts.
    pub marker: Option<&'a str>,
    /// How long it may take.
    pub limit: Duration,
    /// Whether the exits are wanted.
    pub traced: bool,
    /// Whether time passes by instructions. Processors that wait for each other wait for ever then: QEMU runs them by turns.
    pub steady_time: bool,
}

impl<'a> Boot<'a> {
    /// The tests of our first program.
    #[must_use]
    pub fn tests(
        emulator: &'a crate::toolchain::Emulator,
        kernel: &'a Path,
        initrd: &'a Path,
        below: Below<'a>,
    ) -> Self {
        let limit = Duration::from_secs(120);
        let (append, marker, traced) = ("".into(), Some(MARKER), false);
        let steady_time = !matches!(below, Below::Machine { processors: 2.., .. });
        Self { emulator, kernel, initrd, append, below, marker, limit, traced, steady_time }
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> Machine {
        let line = format!("{COMMAND_LINE} {}", self.append).trim_end().to_owned();
        let machine = match self.below {
            Below::Machine { rom, cpu, processors } => Machine {
                cpu: cpu.into(),
                processors,
                steady_time: self.steady_time,
                roms: rom.map(|rom| Attachment::OptionRom(rom.into())).into_iter().collect(),
                memory: 512,
                kernel: Some(self.kernel.into()),
                initrd: Some(self.initrd.into()),
                append: Some(line),
                // The kernel tells whether it found a ROM.
                banner: None,
                ..Machine::default()
            },
            Below::Hypervisor { built, rom, mode, paging } => {
                let guest = [Module::new(self.kernel, line), Module::new(self.initrd, "")];
                hypervisor::machine(built, rom, mode, paging, guest.into())
            }
        };
        Machine { limit: self.limit, marker: self.marker.unwrap_or_default().into(), ..machine }
    }

    /// Boots, and hands each line of the serial port to `progress`.
    ///
    /// # Errors
    ///
    /// The machine cannot be run at all.
    pub fn run(&self, progress: impl Fn(&str)) -> Result<Booted> {
        let (machine, may_power_off) = (self.machine(), self.marker.is_none());
        if matches!(self.below, Below::Machine { .. }) {
            let run = machine.follow(self.emulator, progress)?;
            return Ok(Booted { run, counters: None, record: None, end: None, may_power_off });
        }
        let Watched { run, counters, record, end } =
            Watched::follow(machine, self.emulator, self.traced, progress)?;
        Ok(Booted { run, counters, record, end: Some(end), may_power_off })
    }
}

/// What came of a boot.
#[derive(Clone, Debug)]
pub struct Booted {
    /// The run.
    pub run: Run,
    /// What the hypervisor counted.
    pub counters: Option<Counters>,
    /// The exits, if they were wanted.
    pub record: Option<Record>,
    /// How it ended on the hypervisor.
    pub end: Option<End>,
    /// Whether to switch the machine off is as good an end as the exit device.
    pub may_power_off: bool,
}

impl Booted {
    /// Whether it came to its end as it should.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.run.outcome == Outcome::Passed
            || (self.may_power_off && self.end == Some(End::PowerOff))
    }

    /// Why it did not; nothing if it did.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        let outcome = &self.run.outcome;
        let by_end = || self.end.and_then(|end| end.complaint(outcome));
        (!self.passed()).then(|| by_end().unwrap_or_else(|| outcome.to_string()))
    }

    /// How many tests of our first program's passed.
    #[must_use]
    pub fn tests(&self) -> usize {
        let is_one =
            |line: &&str| line.starts_with("linux: test ") && line.trim_end().ends_with(" ok");
        self.run.serial.lines().filter(is_one).count()
    }

    /// The last lines on the serial port, for whoever wants to know why not.
    #[must_use]
    pub fn last_lines(&self) -> String {
        let mut text = self.run.last_lines();
        if !self.run.host.is_empty() {
            text.push_str("\n  the hypervisor's last lines:\n");
            text.push_str(&hypervisor::last_words(&self.run.host));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_has_headers_of_110_bytes_and_everything_on_four() {
        let archive = archive(b"ELF!!");
        assert_eq!(archive.len() % 4, 0);
        let number = |offset: usize| {
            let text = std::str::from_utf8(&archive[offset..offset + 8]).unwrap_or_default();
            usize::from_str_radix(text, 16).unwrap_or(usize::MAX)
        };
        let (mut offset, mut names) = (0, Vec::new());
        while offset < archive.len() {
            assert_eq!(&archive[offset..offset + 6], b"070701");
            let (length, name) = (number(offset + 54), number(offset + 94));
            let bytes = &archive[offset + 110..offset + 110 + name - 1];
            names.push(String::from_utf8_lossy(bytes).into_owned());
            let start = (offset + 110 + name).next_multiple_of(4);
            if names.last().is_some_and(|name| name == "init") {
                assert_eq!(&archive[start..start + length], b"ELF!!");
            }
            offset = (start + length).next_multiple_of(4);
        }
        assert_eq!(names, ["dev", "dev/console", "dev/zero", "proc", "init", "TRAILER!!!"]);
    }
}
