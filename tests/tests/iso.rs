//! The disc, booted as a machine boots a CD or a USB stick: firmware, GRUB, the guest. And what the
//! guest does where no emulator waits for its exit.

use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use xtask::artifacts::{self, Artifacts};
use xtask::iso::{self, Entry};
use xtask::qemu::{Attachment, Machine, Model, Outcome};
use xtask::tap::Report;
use xtask::toolchain::{Findings, IsoMaker};

fn maker() -> Result<&'static IsoMaker> {
    static MAKER: OnceLock<Result<IsoMaker, String>> = OnceLock::new();
    MAKER
        .get_or_init(|| Findings::gather().iso_maker)
        .as_ref()
        .map_err(|error| anyhow::anyhow!("{error}; `cargo xtask setup` says how to get it"))
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

/// One test for each line: its name, the machine, the medium, the option ROM.
macro_rules! discs {
    ($( $name:ident: $model:ident, $medium:ident, $rom:expr; )*) => { $(
        #[test]
        fn $name() -> Result<()> {
            let (_folder, disc) = disc(&iso::entries(&artifacts::ensure()?.guest))?;
            let machine = Machine { model: Model::$model, ..Machine::default() };
            let serial = passes(&disc, Medium::$medium, $rom, &machine)?;
            assert_eq!(Report::parse(&serial).complaint(), None, "{serial}");
            assert!(!serial.contains("# cost "), "time was taken for instructions: {serial}");
            assert!(serial.contains("GNU GRUB"), "the menu is not on the serial port: {serial}");
            Ok(())
        }
    )* };
}

discs! {
    pc_cd: Pc, Cd, Some(|built| &built.native);
    pc_disk: Pc, Disk, Some(|built| &built.call);
    q35_cd: Q35, Cd, Some(|built| &built.call);
    q35_disk: Q35, Disk, Some(|built| &built.native);
}

/// The line with resets: GRUB starts the guest again, and leaves alone what it remembers.
#[test]
fn the_guest_goes_on_after_a_reset() -> Result<()> {
    let entries = iso::entries(&artifacts::ensure()?.guest);
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
    let entries = iso::entries(&artifacts::ensure()?.guest);
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
