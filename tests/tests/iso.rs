//! The disc, booted as a machine boots a CD or a USB stick: firmware, GRUB, the guest. And what the
//! guest does where no emulator waits for its exit.

use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use xtask::artifacts::{self, Artifacts};
use xtask::iso::{self, Entry, Kernels};
use xtask::qemu::{Attachment, Machine, Model, Outcome};
use xtask::tap::Report;
use xtask::toolchain::{Findings, IsoMaker};

fn findings() -> &'static Findings {
    static FINDINGS: OnceLock<Findings> = OnceLock::new();
    FINDINGS.get_or_init(Findings::gather)
}

fn maker() -> Result<&'static IsoMaker> {
    let maker = findings().iso_maker.as_ref();
    maker.map_err(|error| anyhow::anyhow!("{error}; `cargo xtask setup` says how to get it"))
}

/// The menu's lines, with their kernels.
fn menu() -> Result<Vec<Entry>> {
    static KERNELS: OnceLock<Result<Kernels, String>> = OnceLock::new();
    artifacts::ensure()?;
    let built = KERNELS
        .get_or_init(|| Kernels::build(findings()).map_err(|error| format!("{error:#}")))
        .as_ref();
    Ok(iso::entries(built.map_err(|error| anyhow::anyhow!("{error}"))?))
}

/// A disc with these lines of the menu, in a folder that goes with it.
fn disc(entries: &[Entry]) -> Result<(tempfile::TempDir, PathBuf)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("vmi.iso");
    iso::make(maker()?, entries, &path)?;
    Ok((folder, path))
}

/// How the disc gets into the machine.
#[derive(Clone, Copy)]
enum Medium {
    Cd,
    /// A hard disk, as which a BIOS shows a USB stick.
    Disk,
}

/// The machine's option ROM, if it has one.
type OptionRom = Option<fn(&Artifacts) -> &PathBuf>;

/// Boots the disc's first line, wants every check to hold, and gives what the serial port said.
fn passes(disc: &Path, medium: Medium, rom: OptionRom, machine: &Machine) -> Result<String> {
    let built = artifacts::ensure()?;
    let disc = disc.display().to_string().replace(',', ",,");
    let drive = match medium {
        Medium::Cd => format!("file={disc},format=raw,media=cdrom"),
        Medium::Disk => format!("file={disc},format=raw"),
    };
    let mut machine = Machine {
        extra: vec!["-drive".into(), drive.into()],
        // GRUB waits by the machine's clock, and a person is not there to press a key.
        steady_time: false,
        limit: Duration::from_secs(120),
        ..machine.clone()
    };
    match rom {
        Some(rom) => machine.roms.push(Attachment::OptionRom(rom(built).clone())),
        None => machine.banner = None,
    }
    let run = machine.run(&built.emulator)?;
    assert_eq!(run.outcome, Outcome::Passed, "{}\n{}", run.command, run.serial);
    Ok(run.serial)
}

/// One test for each line: its name, the machine, the medium, the option ROM, the menu's line.
macro_rules! discs {
    ($( $name:ident: $model:ident, $medium:ident, $rom:expr, $title:literal; )*) => { $(
        #[test]
        fn $name() -> Result<()> {
            check_disc(Model::$model, Medium::$medium, $rom, $title)
        }
    )* };
}

discs! {
    pc_cd: Pc, Cd, Some(|built| &built.native), "Check the VMI ROM";
    pc_cd_without_a_rom: Pc, Cd, None, "Check the VMI ROM";
    pc_disk: Pc, Disk, Some(|built| &built.call), "Check the VMI ROM";
    q35_cd: Q35, Cd, Some(|built| &built.call), "Check the VMI ROM";
    q35_disk: Q35, Disk, Some(|built| &built.native), "Check the VMI ROM";
    q35_disk_without_a_rom: Q35, Disk, None, "Check the VMI ROM";
    revision_13_0: Pc, Disk, Some(|built| &built.slots_13_0), "Check a ROM of revision 13.0";
    revision_13_3: Pc, Cd, None, "Check a ROM of revision 13.3";
    kernel_in_c: Pc, Cd, Some(|built| &built.native), "Example kernel in C";
    kernel_in_c_without_a_rom: Q35, Disk, None, "Example kernel in C";
    kernel_in_rust: Q35, Disk, Some(|built| &built.native), "Example kernel in Rust";
    kernel_in_rust_without_a_rom: Pc, Cd, None, "Example kernel in Rust";
}

/// Boots a line of the menu: the first of the disc as users have it, or of one that begins with another.
fn check_disc(model: Model, medium: Medium, rom: OptionRom, title: &str) -> Result<()> {
    let menu = menu()?;
    let first = menu.iter().position(|entry| entry.title == title).context("no such line")?;
    let (_folder, disc) = disc(&menu[first..])?;
    let is_guest = menu[first].kernel == menu[0].kernel;
    let default = Machine::default();
    let example = menu[first].kernel.file_stem().unwrap_or_default().to_string_lossy();
    let marker = if is_guest { default.marker.clone() } else { format!("{example}: done: ") };
    let machine = Machine { model, marker, ..default };
    let serial = passes(&disc, medium, rom, &machine)?;
    assert!(serial.contains("GNU GRUB"), "the menu is not on the serial port: {serial}");
    if is_guest {
        let report = Report::parse(&serial);
        assert_eq!(report.complaint(), None, "{serial}");
        assert_eq!(report.rom.map(|found| found.linked), Some(rom.is_none()), "{serial}");
        assert!(!serial.contains("# cost "), "time was taken for instructions: {serial}");
    } else {
        let place = if rom.is_some() { "platform ROM" } else { "linked in" };
        assert!(serial.contains(&format!("{example}: VMI 3.0, {place}, at ")), "{serial}");
    }
    Ok(())
}

/// The line with resets: GRUB starts the guest again, and leaves alone what it remembers.
#[test]
fn the_guest_goes_on_after_a_reset() -> Result<()> {
    let entries = menu()?;
    let (_folder, disc) = disc(&entries[1..])?;
    let machine = Machine { no_reboot: false, ..Machine::default() };
    let serial = passes(&disc, Medium::Cd, Some(|built| &built.native), &machine)?;
    assert_eq!(serial.matches("GNU GRUB").count(), 3, "{serial}");
    let reboot = "number=36 name=Reboot answer=NONE verdict=ok";
    assert!(serial.contains(reboot), "{serial}");
    Ok(())
}

/// The same files give the same disc, whenever and wherever it is made.
#[test]
fn two_discs_have_the_same_bytes() -> Result<()> {
    let entries = menu()?;
    let (_first_folder, first) = disc(&entries)?;
    std::thread::sleep(Duration::from_millis(1100));
    let (_second_folder, second) = disc(&entries)?;
    assert!(std::fs::read(first)? == std::fs::read(second)?, "the discs differ");
    Ok(())
}

/// What the text screen shows, read by QEMU's machine protocol.
fn screen(folder: &Path) -> Result<String> {
    let memory = folder.join("screen");
    let stream = UnixStream::connect(folder.join("qmp"))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let mut answers = 0;
    let save = format!(
        "{{\"execute\":\"pmemsave\",\"arguments\":{{\"val\":{},\"size\":4000,\"filename\":\"{}\"}}}}",
        0xb_8000,
        memory.display()
    );
    writeln!(&stream, "{{\"execute\":\"qmp_capabilities\"}}\n{save}")?;
    while answers < 2 {
        let line = lines.next().context("the end of the connection")??;
        ensure!(!line.contains("\"error\""), "{line}");
        answers += usize::from(line.contains("\"return\""));
    }
    let cells = std::fs::read(memory)?;
    Ok(cells.iter().step_by(2).map(|byte| char::from(*byte)).collect())
}

/// Without a debug console a machine looks like a PC: the verdict is on the screen, the exit port
/// is left alone, although there is an exit, and the machine stands still.
#[test]
fn a_pc_shows_the_verdict_and_stands_still() -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(60);
    let built = artifacts::ensure()?;
    let folder = tempfile::tempdir()?;
    let qmp = format!("unix:{},server=on,wait=off", folder.path().join("qmp").display());
    let machine = Machine {
        kernel: Some(built.guest.clone()),
        append: Some("no-reboot".into()),
        roms: vec![Attachment::OptionRom(built.native.clone())],
        extra: vec!["-qmp".into(), qmp.into()],
        ..Machine::default()
    };
    let mut running = machine.start(&built.emulator)?;
    let start = Instant::now();
    let shown = loop {
        std::thread::sleep(Duration::from_millis(500));
        ensure!(running.is_alive()?, "QEMU ended");
        match screen(folder.path()) {
            Ok(shown) if shown.contains("PASSED: ") => break shown,
            Ok(shown) => ensure!(start.elapsed() < LIMIT, "no verdict: {shown}"),
            Err(error) => ensure!(start.elapsed() < LIMIT, "no screen: {error:#}"),
        }
    };
    assert!(shown.contains(" checks hold"), "{shown}");
    std::thread::sleep(Duration::from_secs(1));
    assert!(running.is_alive()?, "the guest wrote to the exit port");
    Ok(())
}
