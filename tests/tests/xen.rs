//! The test guest on Xen: every call, by the image that is also for bare hardware and the reference hypervisor.
//!
//! Xen comes from `cargo xtask setup --xen`.

use anyhow::{Context, Result};
use object::{Object, ObjectSection, ObjectSymbol};
use std::path::Path;
use std::time::Duration;
use vmi_abi::CALLS_3_0;
use vmi_abi::entry::{NOTE_ENTRY, NOTE_NAME};
use xtask::artifacts;
use xtask::build::read;
use xtask::hypervisor::Supply;
use xtask::qemu::Outcome;
use xtask::tap::Verdict;
use xtask::xen::source::{self, Build};
use xtask::xen::{Hosted, Setup};

/// Calls that Xen gives a guest no way to try, each with a reason that the guest says.
const SKIPPED: [&str; 3] = ["WRMSR", "Shutdown", "SetCallbacks"];

/// Calls that the ROM leaves to the guest's own code on Xen.
const NATIVE: [&str; 5] = ["RDPMC", "SetPxE", "UpdatePxE", "SetInitialAPState", "SetCallbacks"];

/// The line that the guest writes to Xen's console without the ROM.
const PAST_THE_ROM: &str = "vmi-guest: this line went past the ROM";

/// Runs the guest; `rom` instead of our image.
fn run(build: Build, rom: Option<&Path>, costs: bool) -> Result<Hosted> {
    let xen = source::xen(build)?;
    let (built, limit) = (artifacts::ensure_hosting()?, Duration::from_secs(300));
    Setup { supply: Supply { built, rom, limit }, xen: &xen, costs }.run(|_| ())
}

/// All calls, Reboot included, and Xen's own console and events beside them.
fn calls_hold(build: Build) -> Result<()> {
    let mut hosted = run(build, None, false)?;
    let result = &hosted.conformance;
    let said = format!("{}\n{}\n{}", result.run.command, result.run.host, result.run.serial);
    assert_eq!(hosted.complaint(), None, "{said}");
    // One for each call, the entry points, the image's sum before and its bytes after, Xen's own interface, what Xen refuses, entries and switches while interrupts come.
    assert_eq!(result.report.checks.len(), CALLS_3_0.len() + 7, "{said}");
    let with = |wanted: &dyn Fn(&xtask::conformance::CallSummary) -> bool| -> Vec<&str> {
        result.calls.iter().filter(|call| wanted(call)).map(|call| call.name).collect()
    };
    assert_eq!(with(&|call| call.verdict == Some(Verdict::Skip)), SKIPPED, "{said}");
    assert_eq!(with(&|call| call.is_native()), NATIVE, "{said}");
    assert!(result.run.host.contains(PAST_THE_ROM), "{said}");
    // Whatever the guest has said: what Xen complains of is no pass.
    hosted.crash = Some("(XEN) domain_crash called".into());
    assert!(hosted.complaint().is_some_and(|complaint| complaint.contains("domain_crash")));
    Ok(())
}

#[test]
fn calls_on_xen() -> Result<()> {
    calls_hold(Build::Release)
}

/// Where somebody has built that Xen too: CI does not.
#[test]
fn calls_on_xen_with_its_assertions() -> Result<()> {
    if source::built(Build::Debug).is_none() {
        eprintln!("left out: `cargo xtask setup --xen=debug` builds that Xen");
        return Ok(());
    }
    calls_hold(Build::Debug)
}

/// A tenth more than hypercalls of the guest's own where entries change in bulk, and a quarter of what stores cost that trap.
/// Instructions are counted, Xen's too: they are the same each time.
#[test]
fn the_rom_costs_little_more_than_hypercalls() -> Result<()> {
    const BULK: u32 = 32;
    let hosted = run(Build::Release, None, true)?;
    let costs = &hosted.conformance.report.xen_costs;
    assert_eq!(hosted.complaint(), None, "{}", hosted.conformance.run.serial);
    let bulk: Vec<_> =
        costs.iter().filter(|cost| cost.entries >= BULK && cost.trapped != 0).collect();
    assert_eq!(bulk.len(), 6, "{costs:#?}");
    for cost in bulk {
        assert!(cost.ratio() <= 1.10, "{cost:?}");
        assert!(cost.saving().is_some_and(|saving| saving >= 4.0), "{cost:?}");
    }
    // Eight calls against one multicall.
    let switch = costs.iter().find(|cost| cost.work == "context switch").context("no switch")?;
    assert!(switch.ratio() <= 1.05, "{switch:?}");
    Ok(())
}

/// A ROM that does not know Xen refuses to work in another ring than 0, and the guest says so.
#[test]
fn a_rom_for_bare_hardware_is_no_pass() -> Result<()> {
    let hosted = run(Build::Release, Some(&artifacts::ensure()?.call), false)?;
    let serial = &hosted.conformance.run.serial;
    assert!(hosted.complaint().is_some(), "{serial}");
    assert!(serial.contains("Bail out! the ROM: vmi_init returns"), "{serial}");
    Ok(())
}

/// Without a ROM the loader does not start the guest.
#[test]
fn no_rom_is_no_pass() -> Result<()> {
    let hosted = run(Build::Release, Some(&artifacts::ensure()?.slots_13_0), false)?;
    let run = &hosted.conformance.run;
    assert!(matches!(run.outcome, Outcome::WrongExit { status: Some(_), .. }), "{:?}", run.outcome);
    assert!(run.host.contains("loader: no ROM of revision 3.0"), "{}", run.host);
    assert!(!run.serial.contains("TAP version"), "{}", run.serial);
    Ok(())
}

/// The guest's file says where its VMI entry is: in its code, at the symbol.
#[test]
fn the_guest_has_a_vmi_entry() -> Result<()> {
    let file = read(&artifacts::ensure_hosting()?.guest)?;
    let file = object::File::parse(&file[..])?;
    let note = file.section_by_name(".notes").context("no notes")?.data()?;
    let words: Vec<u32> = note
        .chunks_exact(4)
        .map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap_or_default()))
        .collect();
    let name = [NOTE_NAME.as_bytes(), &[0]].concat();
    assert_eq!(words[..3], [name.len() as u32, 4, NOTE_ENTRY]);
    assert_eq!(note[12..12 + name.len()], name);
    let entry = file.symbol_by_name("vmi_entry").context("no symbol vmi_entry")?.address();
    assert_eq!(u64::from(words[4]), entry);
    Ok(())
}
