//! The inspector's inputs with our own image: linked, as a machine sees it, and read from a machine
//! that runs.

use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use vmi_native_backend::binding::SiteRule;
use vmi_tests::Specimen;
use xtask::artifacts;
use xtask::inspect::source::{Found, SourceArgs};
use xtask::inspect::verify;
use xtask::qemu::{Attachment, Machine, Running};

/// How long the firmware may take to come to our image.
const LIMIT: Duration = Duration::from_secs(60);

/// A machine without a kernel, and the ways into it.
struct Visited {
    running: Running,
    qmp: SourceArgs,
    gdb: SourceArgs,
    folder: tempfile::TempDir,
}

impl Visited {
    fn start(more: &[&str]) -> Result<Self> {
        let built = artifacts::ensure()?;
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("qmp");
        // The port is free again when QEMU takes it; nobody else is likely to want it meanwhile.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut extra: Vec<OsString> = more.iter().map(OsString::from).collect();
        extra.extend([
            "-qmp".into(),
            format!("unix:{},server=on,wait=off", socket.display()).into(),
        ]);
        extra.extend(["-gdb".into(), format!("tcp:127.0.0.1:{port}").into()]);
        let machine = Machine {
            roms: vec![Attachment::OptionRom(built.native.clone())],
            memory: 32,
            no_reboot: false,
            steady_time: false,
            extra,
            ..Machine::default()
        };
        let running = machine.start(&built.emulator)?;
        let wait = 10;
        let endpoint = format!("unix:{}", socket.display());
        let qmp = endpoint.parse().map_err(anyhow::Error::msg)?;
        let qmp = SourceArgs { qmp: Some(qmp), wait, ..SourceArgs::default() };
        let gdb =
            SourceArgs { gdb: Some(format!("127.0.0.1:{port}")), wait, ..SourceArgs::default() };
        Ok(Self { running, qmp, gdb, folder })
    }

    /// Reads until the firmware has copied our image, and the image's POST has noted in it what the machine allows.
    fn rom_over_qmp(&mut self) -> Result<Found> {
        let image = std::fs::read(&artifacts::ensure()?.native)?;
        let (start, mut is_late) = (Instant::now(), false);
        loop {
            match self.qmp.find() {
                Ok(found) if is_late || found.roms.iter().all(|rom| rom.rom.file() != image) => {
                    return Ok(found);
                }
                Err(error) if is_late => return Err(error.into()),
                Ok(_) | Err(_) => ensure!(self.running.is_alive()?, "QEMU does not start"),
            }
            is_late = start.elapsed() > LIMIT;
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// What QEMU says of the machine, as soon as it listens.
    fn status(&mut self) -> Result<String> {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(self.folder.path().join("qmp")) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > LIMIT => return Err(error.into()),
                Err(_) => ensure!(self.running.is_alive()?, "QEMU does not start"),
            }
            thread::sleep(Duration::from_millis(50));
        };
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let mut stream = stream;
        stream
            .write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"query-status\"}\n")?;
        for _ in 0..20 {
            let line = lines.next().context("the end of the connection")??;
            if let Some((_, status)) = line.split_once("\"status\": \"") {
                return Ok(status.split('"').next().unwrap_or_default().to_owned());
            }
        }
        bail!("QEMU does not say the machine's status")
    }
}

/// What POST finds on a machine with one processor.
const RULE: SiteRule = SiteRule::Anywhere;

/// Whether exactly our image was found, as a file or as POST leaves it.
fn assert_is_our_image(found: &Found, rule: SiteRule) -> Result<()> {
    let [rom] = found.roms.as_slice() else { bail!("{} VMI ROMs", found.roms.len()) };
    let built = artifacts::ensure()?;
    let file = Specimen::read(&built.native, &built.native_elf)?;
    assert!(rom.rom.file() == file.with_rule(rule)?, "not our image");
    let physical = rom.origin.physical.context("a physical address")?;
    assert!((0xc_0000..0xe_0000).contains(&physical) && physical % 2048 == 0, "{physical:x}");
    assert!(rom.remarks.is_empty(), "{:?}", rom.remarks);
    let report = verify(&rom.rom);
    assert!(report.is_clean(), "{:#?}", report.violations);
    Ok(())
}

#[test]
fn the_image_comes_back_from_a_running_machine_that_goes_on_running() -> Result<()> {
    let mut machine = Visited::start(&[])?;
    assert_is_our_image(&machine.rom_over_qmp()?, RULE)?;
    assert_eq!(machine.status()?, "running", "after the machine protocol");
    // Twice: the first visit leaves nothing behind.
    for _ in 0..2 {
        assert_is_our_image(&machine.gdb.find()?, RULE)?;
        assert_eq!(machine.status()?, "running", "after the gdb stub");
    }
    machine.gdb.keep_stopped = true;
    assert_is_our_image(&machine.gdb.find()?, RULE)?;
    assert_eq!(machine.status()?, "paused");
    // Reading does not need a machine that runs, and does not make it run.
    assert_is_our_image(&machine.qmp.find()?, RULE)?;
    assert_eq!(machine.status()?, "paused");
    Ok(())
}

#[test]
fn a_machine_that_waits_for_its_start_goes_on_waiting() -> Result<()> {
    let mut machine = Visited::start(&["-S"])?;
    assert_eq!(machine.status()?, "prelaunch");
    assert!(machine.gdb.find().is_err(), "no firmware ran, so no ROM is in memory");
    assert!(machine.qmp.find().is_err());
    assert_eq!(machine.status()?, "prelaunch");
    Ok(())
}

#[test]
fn the_linked_files_carry_the_images() -> Result<()> {
    let built = artifacts::ensure()?;
    for (linked, image) in [(&built.native_elf, &built.native), (&built.call_elf, &built.call)] {
        let found = SourceArgs::of_file(linked).find()?;
        let [rom] = found.roms.as_slice() else { bail!("{} ROMs", found.roms.len()) };
        assert_eq!(rom.origin.section.as_deref(), Some(".rom"));
        assert_eq!(rom.origin.symbol.as_deref(), Some("rom_start"));
        // The linked file has no lengths and checksums, and the reader is told.
        assert!(
            rom.remarks.iter().any(|remark| remark.contains("length byte")),
            "{:?}",
            rom.remarks
        );
        assert_eq!(rom.rom.file(), std::fs::read(image)?, "{}", linked.display());
    }
    Ok(())
}

#[test]
fn both_images_in_one_dump_are_clean() -> Result<()> {
    let built = artifacts::ensure()?;
    let mut dump = vec![0; 0x3_0000];
    for (at, image) in [(0x8000, &built.native), (0x1_0800, &built.call)] {
        let image = std::fs::read(image)?;
        dump[at..at + image.len()].copy_from_slice(&image);
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("dump");
    std::fs::write(&path, dump)?;
    let read = |path: &Path, rom| {
        SourceArgs { base: Some(0xc_0000), rom, ..SourceArgs::of_file(path) }.find()
    };
    let found = read(&path, None)?;
    let places: Vec<_> = found.roms.iter().filter_map(|rom| rom.origin.physical).collect();
    assert_eq!(places, [0xc_8000, 0xd_0800]);
    assert!(found.roms.iter().all(|rom| verify(&rom.rom).is_clean()));
    assert_is_our_image(&read(&path, Some(1))?, SiteRule::InAWord)
}
