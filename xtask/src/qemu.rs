//! One run of a machine in QEMU: its command line, its time limit, what it said, and the verdict.
//!
//! A run passes only if the guest ends it by the exit device with the agreed status AND says the
//! line that it says at its very end AND, where one is expected, the ROM's own banner came out of
//! the debug port. A machine that resets, hangs, or never gets as far as the ROM passes no test.

use crate::image;
use crate::inspect::source::store_by_gdb;
use crate::toolchain::Emulator;
use std::ffi::OsString;
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The exit status of QEMU after the guest wrote [`EXIT_VALUE`] to the exit device.
pub const PASS_STATUS: i32 = ((EXIT_VALUE as i32) << 1) | 1;

/// What a guest writes to the exit device when all went well.
pub const EXIT_VALUE: u8 = 0x10;

/// What every image of ours writes to the debug port at POST.
pub const BANNER: &str = "VMI ROM ";

/// With `-icount` an instruction takes two to this power nanoseconds: eight.
const ICOUNT_SHIFT: u32 = 3;

/// Ticks of the guest's time-stamp counter for each instruction, in a machine with steady time.
pub const TICKS_PER_INSTRUCTION: u32 = 1 << ICOUNT_SHIFT;

/// Vendor and device of the card that carries a ROM in its BAR, QEMU's e1000.
const CARD: (u16, u16) = (0x8086, 0x100e);

/// QEMU cuts longer paths off to name a ROM, and refuses two ROMs of one name.
const LONGEST_PATH: usize = 40;

/// A machine model of QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Model {
    /// A PC with an i440FX.
    Pc,
    /// A PC with a Q35.
    Q35,
    /// A PC without PCI.
    Isapc,
    /// A small machine for virtual guests.
    Microvm,
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pc => "pc",
            Self::Q35 => "q35",
            Self::Isapc => "isapc",
            Self::Microvm => "microvm",
        })
    }
}

/// How a ROM gets into the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// By `-option-rom`.
    OptionRom(PathBuf),
    /// In the expansion ROM of a network card, as a copy with the card's numbers; the machine needs PCI.
    PciRomBar(PathBuf),
}

impl Attachment {
    /// The image's file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::OptionRom(path) | Self::PciRomBar(path) => path,
        }
    }
}

/// A machine to run.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The model.
    pub model: Model,
    /// The processor's model.
    pub cpu: String,
    /// Memory in MiB.
    pub memory: u32,
    /// Processors.
    pub processors: u32,
    /// ROMs, in the order in which they are added.
    pub roms: Vec<Attachment>,
    /// The kernel to boot.
    pub kernel: Option<PathBuf>,
    /// A file that the kernel gets along.
    pub initrd: Option<PathBuf>,
    /// Files that a multiboot kernel gets along, instead of `initrd`.
    pub modules: Vec<Module>,
    /// The kernel's command line.
    pub append: Option<String>,
    /// End when the guest resets the machine.
    pub no_reboot: bool,
    /// Let the machine's time pass by instructions instead of the host's clock: timers then come at
    /// the same instructions however busy the host is.
    pub steady_time: bool,
    /// Further arguments.
    pub extra: Vec<OsString>,
    /// How long the run may take.
    pub limit: Duration,
    /// The line that the guest says at its very end: what the last one that is not blank starts with.
    pub marker: String,
    /// What must come out of the debug port.
    pub banner: Option<String>,
    /// What the lines of a hypervisor below the guest start with: they are none of the guest's.
    pub host_prefix: Option<String>,
    /// The file that is the machine's memory, and can be read when the machine is gone.
    pub memory_file: Option<PathBuf>,
    /// What is stored to the machine's physical memory when its time is over, for it to end itself: addresses and words. Empty: it
    /// is ended from outside.
    pub last_stores: Vec<(u32, u32)>,
}

/// How long a machine has to end itself when it was told to.
const GRACE: Duration = Duration::from_secs(30);

/// How often it is told.
const REMINDER: Duration = Duration::from_secs(3);

/// A file for a multiboot kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The file.
    pub path: PathBuf,
    /// The words behind its name on its command line.
    pub words: String,
}

impl Module {
    /// A file with its words.
    pub fn new(path: impl Into<PathBuf>, words: impl Into<String>) -> Self {
        Self { path: path.into(), words: words.into() }
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            model: Model::Pc,
            cpu: "max".into(),
            memory: 128,
            processors: 1,
            roms: Vec::new(),
            kernel: None,
            initrd: None,
            modules: Vec::new(),
            append: None,
            no_reboot: true,
            steady_time: true,
            extra: Vec::new(),
            limit: Duration::from_secs(60),
            marker: "# vmi-guest: all ".into(),
            banner: Some(BANNER.into()),
            host_prefix: None,
            memory_file: None,
            last_stores: Vec::new(),
        }
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Passed,
    /// The guest ended it, but something is missing.
    Failed {
        /// What.
        what: String,
    },
    /// It took too long.
    TimedOut {
        /// How long it had.
        limit: Duration,
    },
    /// QEMU ended with another status: the guest's own verdict, a reset, or a refusal to start.
    WrongExit {
        /// The status; none if a signal ended it.
        status: Option<i32>,
        /// What QEMU said about it.
        said: String,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => write!(f, "passed"),
            Self::Failed { what } => write!(f, "{what}"),
            Self::TimedOut { limit } => write!(f, "no end within {} seconds", limit.as_secs()),
            Self::WrongExit { status, said } => {
                match status {
                    Some(0) => {
                        write!(f, "the machine reset or went off instead of ending the run")?
                    }
                    Some(status) => {
                        write!(f, "QEMU ended with status {status} instead of {PASS_STATUS}")?
                    }
                    None => write!(f, "QEMU was ended by a signal")?,
                }
                if said.is_empty() { Ok(()) } else { write!(f, ": {said}") }
            }
        }
    }
}

/// A finished run.
#[derive(Clone, Debug)]
pub struct Run {
    /// How it ended.
    pub outcome: Outcome,
    /// What the guest wrote to its serial port.
    pub serial: String,
    /// What a hypervisor below it wrote there, without the prefix of its lines.
    pub host: String,
    /// What came out of the debug port.
    pub debug: String,
    /// How long it took.
    pub duration: Duration,
    /// The command line, for whoever wants to see it again.
    pub command: String,
}

impl Run {
    /// The last lines on the serial port, for whoever wants to know why not.
    #[must_use]
    pub fn last_lines(&self) -> String {
        const LINES: usize = 24;
        let lines: Vec<&str> = self.serial.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }
}

/// A line of a guest's, without what would control the terminal.
pub(crate) fn printable(line: &str) -> String {
    line.trim_end().chars().filter(|letter| !letter.is_control()).collect()
}

/// A machine could not be run at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU does not start.
    #[error("{program} does not start: {source}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: std::io::Error,
    },
    /// Its files or pipes give trouble.
    #[error("cannot follow the machine: {0}")]
    Follow(#[from] std::io::Error),
    /// The machine has no such place for a ROM.
    #[error("the machine {0} has no PCI, so no ROM BAR")]
    NoPci(Model),
}

/// A machine that runs beside us.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// The copies of its ROMs.
    _folder: tempfile::TempDir,
}

impl Running {
    /// Whether QEMU is there.
    ///
    /// # Errors
    ///
    /// The system does not say.
    pub fn is_alive(&mut self) -> Result<bool, Error> {
        Ok(self.child.try_wait()?.is_none())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Machine {
    /// QEMU's arguments.
    ///
    /// # Errors
    ///
    /// A ROM BAR on a machine without PCI.
    pub fn arguments(&self) -> Result<Vec<OsString>, Error> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(OsString::from));
        let backend = if self.memory_file.is_some() { ",memory-backend=ram" } else { "" };
        add(&["-M", &format!("{}{backend}", self.model), "-accel", "tcg", "-cpu", &self.cpu]);
        if let Some(file) = &self.memory_file {
            let file = escaped(&file.to_string_lossy());
            let size = self.memory;
            add(&["-object"]);
            add(&[&format!("memory-backend-file,id=ram,size={size}M,share=on,mem-path={file}")]);
        }
        add(&["-m", &self.memory.to_string(), "-smp", &self.processors.to_string()]);
        add(&["-display", "none", "-monitor", "none", "-nic", "none"]);
        add(&["-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        // QEMU's own option ROM patches guest code; a test wants one patcher at a time.
        add(&["-global", "apic-common.vapic=off"]);
        if self.model == Model::Microvm {
            // This machine's own firmware leaves option ROMs alone; the smaller of the PC's does not.
            add(&["-bios", "bios.bin"]);
        }
        if self.steady_time {
            // A halted processor skips to the next timer.
            add(&["-icount", &format!("shift={ICOUNT_SHIFT},sleep=off")]);
        }
        if self.no_reboot {
            add(&["-no-reboot"]);
        }
        for rom in &self.roms {
            let (option, value) = match rom {
                Attachment::OptionRom(path) => ("-option-rom", path.clone().into_os_string()),
                Attachment::PciRomBar(_) if !matches!(self.model, Model::Pc | Model::Q35) => {
                    return Err(Error::NoPci(self.model));
                }
                Attachment::PciRomBar(path) => {
                    let mut value = OsString::from("e1000,romfile=");
                    value.push(escaped(&path.as_os_str().to_string_lossy()));
                    ("-device", value)
                }
            };
            arguments.extend([option.into(), value]);
        }
        for (option, file) in [("-kernel", &self.kernel), ("-initrd", &self.initrd)] {
            if let Some(file) = file {
                arguments.extend([option.into(), file.clone().into_os_string()]);
            }
        }
        if !self.modules.is_empty() {
            let module = |Module { path, words }: &Module| {
                let line = format!("{} {words}", path.display());
                escaped(line.trim_end())
            };
            let modules: Vec<String> = self.modules.iter().map(module).collect();
            arguments.extend(["-initrd".into(), modules.join(",").into()]);
        }
        if let Some(append) = &self.append {
            arguments.extend(["-append".into(), append.into()]);
        }
        arguments.extend(self.extra.iter().cloned());
        Ok(arguments)
    }

    /// Starts the machine and leaves it to itself; it ends when the answer is dropped.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start(&self, emulator: &Emulator) -> Result<Running, Error> {
        let folder = tempfile::tempdir()?;
        let arguments = self.with_copies(folder.path())?.arguments()?;
        let child = Command::new(&emulator.path)
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|source| Error::Start {
                program: emulator.path.display().to_string(),
                source,
            })?;
        Ok(Running { child, _folder: folder })
    }

    /// Runs the machine to its end or to the limit.
    ///
    /// # Errors
    ///
    /// It cannot be run at all; everything that happens after the start is an [`Outcome`].
    pub fn run(&self, emulator: &Emulator) -> Result<Run, Error> {
        self.follow(emulator, |_| {})
    }

    /// As [`Machine::run`], and hands each line of the serial port to `line` as it comes.
    ///
    /// # Errors
    ///
    /// As [`Machine::run`].
    pub fn follow(&self, emulator: &Emulator, mut line: impl FnMut(&str)) -> Result<Run, Error> {
        let folder = tempfile::tempdir()?;
        let debug_path = folder.path().join("debug");
        let mut arguments = self.with_copies(folder.path())?.arguments()?;
        let mut debug_option = OsString::from("file:");
        debug_option.push(&debug_path);
        arguments.extend(["-debugcon".into(), debug_option]);
        let socket = folder.path().join("gdb");
        if !self.last_stores.is_empty() {
            let mut gdb_option = OsString::from("unix:");
            gdb_option.push(escaped(&socket.to_string_lossy()));
            gdb_option.push(",server=on,wait=off");
            arguments.extend(["-gdb".into(), gdb_option]);
        }

        log::debug!("{} {arguments:?}", emulator.path.display());
        let start = Instant::now();
        let mut child = Command::new(&emulator.path)
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Error::Start {
                program: emulator.path.display().to_string(),
                source,
            })?;
        let (sender, lines) = std::sync::mpsc::channel();
        let reader = child.stdout.take().map(|pipe| {
            thread::spawn(move || {
                let mut pipe = BufReader::new(pipe);
                let mut bytes = Vec::new();
                while pipe.read_until(b'\n', &mut bytes).is_ok_and(|count| count != 0) {
                    // The receiver is gone only when nobody wants the rest.
                    let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
                    bytes.clear();
                }
            })
        });
        let complainer = child.stderr.take().map(|mut pipe| {
            thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = pipe.read_to_end(&mut bytes);
                String::from_utf8_lossy(&bytes).into_owned()
            })
        });

        let mut serial = String::new();
        let mut take = |text: String| {
            line(text.trim_end());
            serial.push_str(&text);
        };
        let mut end = start + self.limit;
        let mut is_over = false;
        let mut reminded = None;
        let ended = loop {
            match lines.recv_timeout(Duration::from_millis(20)) {
                Ok(text) => take(text),
                // The pipe is closed a moment before the process is gone.
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                    thread::sleep(Duration::from_millis(2))
                }
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            }
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            let now = Instant::now();
            if now >= end && !is_over && !self.last_stores.is_empty() {
                is_over = true;
                end = now + GRACE;
            }
            if is_over && reminded.is_none_or(|last| now >= last + REMINDER) {
                reminded = Some(now);
                // A machine that does not listen is ended soon.
                if let Err(error) = store_by_gdb(&socket, &self.last_stores, REMINDER) {
                    log::debug!("the machine is not told to end itself: {error}");
                }
            }
            if now >= end {
                child.kill()?;
                child.wait()?;
                break None;
            }
        };
        if let Some(reader) = reader {
            let _ = reader.join();
        }
        lines.try_iter().for_each(&mut take);
        let said = complainer.and_then(|thread| thread.join().ok()).unwrap_or_default();
        let (serial, host) = self.parted(&serial);
        let debug = match std::fs::read(&debug_path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(_) => String::new(), // QEMU ended before it made the file.
        };

        let outcome = match ended {
            _ if is_over => Outcome::TimedOut { limit: self.limit },
            None => Outcome::TimedOut { limit: self.limit },
            Some(status) if status.code() != Some(PASS_STATUS) => {
                Outcome::WrongExit { status: status.code(), said: complaint(&said) }
            }
            Some(_) => self.judge(&serial, &debug),
        };
        let mut words = vec![emulator.path.as_os_str().to_string_lossy().into_owned()];
        words.extend(arguments.iter().map(|word| word.to_string_lossy().into_owned()));
        Ok(Run {
            outcome,
            serial,
            host,
            debug,
            duration: start.elapsed(),
            command: words.join(" "),
        })
    }

    /// The same machine with a copy of each ROM that goes into a card, or whose path is too long.
    fn with_copies(&self, folder: &Path) -> Result<Self, Error> {
        let mut machine = self.clone();
        for (index, rom) in machine.roms.iter_mut().enumerate() {
            let copy = folder.join(format!("{index}.rom"));
            match rom {
                Attachment::PciRomBar(path) => {
                    std::fs::write(&copy, image::for_card(&std::fs::read(&path)?, CARD.0, CARD.1))?;
                    *path = copy;
                }
                Attachment::OptionRom(path) if path.as_os_str().len() > LONGEST_PATH => {
                    std::fs::copy(&path, &copy)?;
                    *path = copy;
                }
                Attachment::OptionRom(_) => {}
            }
        }
        // QEMU takes the first word for the name.
        let is_awkward = |path: &Path| path.to_string_lossy().contains(char::is_whitespace);
        for (index, module) in machine.modules.iter_mut().enumerate() {
            if is_awkward(&module.path) {
                let copy = folder.join(format!("{index}.module"));
                std::fs::copy(&module.path, &copy)?;
                module.path = copy;
            }
        }
        Ok(machine)
    }

    /// The guest's lines, and those of a hypervisor below it.
    fn parted(&self, serial: &str) -> (String, String) {
        let Some(prefix) = &self.host_prefix else { return (serial.to_owned(), String::new()) };
        let (mut guest, mut host) = (String::new(), String::new());
        for line in serial.split_inclusive('\n') {
            match line.strip_prefix(prefix.as_str()) {
                Some(line) => host.push_str(line),
                None => guest.push_str(line),
            }
        }
        (guest, host)
    }

    /// Whether a run that ended by the right status passed.
    fn judge(&self, serial: &str, debug: &str) -> Outcome {
        let last = serial.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        if !last.starts_with(&self.marker) {
            return Outcome::Failed {
                what: format!(
                    "the last line on the serial port is not `{}...`: {last:?}",
                    self.marker
                ),
            };
        }
        match &self.banner {
            Some(banner) if !debug.contains(banner.as_str()) => Outcome::Failed {
                what: format!("the ROM's banner `{banner}...` did not come out of the debug port"),
            },
            _ => Outcome::Passed,
        }
    }
}

/// A value within an option, where QEMU takes two commas for one.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

/// What QEMU said, without its warnings.
fn complaint(said: &str) -> String {
    said.lines().filter(|line| !line.contains("warning: ")).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(machine: &Machine) -> Vec<String> {
        let arguments = machine.arguments().expect("a possible machine");
        arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn software_emulation_is_named_and_a_reset_ends_the_run() {
        let text = words(&Machine::default()).join(" ");
        assert!(text.contains("-accel tcg") && text.contains("-no-reboot"), "{text}");
        let text = words(&Machine { no_reboot: false, ..Machine::default() }).join(" ");
        assert!(!text.contains("-no-reboot"), "{text}");
    }

    #[test]
    fn roms_are_attached_in_order_and_commas_survive() {
        let roms = vec![Attachment::OptionRom("a,b".into()), Attachment::PciRomBar("c,d".into())];
        let words = words(&Machine { roms, ..Machine::default() });
        let at = |word: &str| words.iter().position(|other| other == word);
        assert!(at("a,b").expect("an option ROM") < at("e1000,romfile=c,,d").expect("a ROM BAR"));
    }

    #[test]
    fn a_rom_bar_needs_pci() {
        for model in [Model::Isapc, Model::Microvm] {
            let machine = Machine {
                model,
                roms: vec![Attachment::PciRomBar("a".into())],
                ..Machine::default()
            };
            assert!(matches!(machine.arguments(), Err(Error::NoPci(found)) if found == model));
        }
    }

    #[test]
    fn modules_have_words_and_commas_survive() {
        let modules = vec![Module::new("guest", "client=3.0 a,b"), Module::new("rom", "")];
        let words = words(&Machine { modules, ..Machine::default() });
        let at = words.iter().position(|word| word == "-initrd").expect("modules");
        assert_eq!(words[at + 1], "guest client=3.0 a,,b,rom");
    }

    #[test]
    fn a_hypervisors_lines_are_not_the_guests() {
        let machine = Machine { host_prefix: Some("hypervisor: ".into()), ..Machine::default() };
        let parted = machine.parted("a\nhypervisor: b\nc\nhypervisor: d");
        assert_eq!(parted, ("a\nc\n".into(), "b\nd".into()));
        assert_eq!(Machine::default().parted("hypervisor: b\n").1, "");
    }

    #[test]
    fn status_alone_is_no_pass() {
        let machine = Machine::default();
        let marker = "x\n# vmi-guest: all 3 checks hold\n";
        assert_eq!(machine.judge(marker, "VMI ROM 0.1.0"), Outcome::Passed);
        assert!(matches!(machine.judge(marker, ""), Outcome::Failed { .. }));
        assert!(matches!(machine.judge("", "VMI ROM 0.1.0"), Outcome::Failed { .. }));
        assert!(matches!(
            machine.judge("# vmi-guest: 1 of 3 checks fail\n", "VMI ROM "),
            Outcome::Failed { .. }
        ));
        assert!(matches!(
            machine.judge("# vmi-guest: all 3 checks hold\nmore\n", "VMI ROM "),
            Outcome::Failed { .. }
        ));
    }

    #[test]
    fn a_program_that_never_ends_is_stopped_and_one_that_fails_is_said_to() {
        let run = |script: &str| {
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("emulator");
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a script");
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
                .expect("permissions");
            let emulator = Emulator { path, version: String::new() };
            let machine =
                Machine { limit: Duration::from_millis(300), banner: None, ..Machine::default() };
            machine.run(&emulator).expect("a run")
        };
        assert!(matches!(run("echo hello; exec sleep 60").outcome, Outcome::TimedOut { .. }));
        let ended = run("echo no such machine >&2; exit 1");
        assert_eq!(
            ended.outcome,
            Outcome::WrongExit { status: Some(1), said: "no such machine".into() }
        );
        let passed = run("echo '# vmi-guest: all 1 checks hold'; exit 33");
        assert_eq!(passed.outcome, Outcome::Passed);
        assert_eq!(passed.serial, "# vmi-guest: all 1 checks hold\n");
    }
}
