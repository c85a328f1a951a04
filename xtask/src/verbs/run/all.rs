//! `cargo xtask run --on all`.

use super::{Tried, json, text};
use crate::artifacts;
use crate::build;
use crate::conformance::{self, Client, Conformance, Subject};
use crate::hypervisor::{self, Mode, Paging, Supply, Task};
use crate::progress::Progress;
use crate::qemu::{Attachment, Machine};
use crate::toolchain::Findings;
use crate::verbs::boots::shows;
use crate::xen;
use anyhow::Result;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::process::ExitCode;

/// One guest and one image, on bare hardware, on the reference hypervisor and on Xen.
///
/// # Errors
///
/// Something is missing, the build fails, or QEMU does not start.
pub(super) fn run(findings: &Findings, all: &super::Args) -> Result<ExitCode> {
    let xen = crate::verbs::setup::xen(all.reference.xen)?;
    let built = artifacts::build_hosting(findings)?;
    let rom = all.rom_file().unwrap_or(&built.hypervisors);
    let limit = all.limit();
    let supply = Supply { built: &built, rom: Some(rom), limit };
    let mut tried = Vec::new();
    let mut add = |name: &str, result: Conformance, complaint: Option<String>| {
        let (name, rom) = (name.to_owned(), Some(rom.to_owned()));
        tried.push(Tried { name, rom, client: Client::Lookup, result, complaint });
    };

    let progress = Progress::start("running the guest on bare hardware");
    let subject =
        Subject { rom: Some(Attachment::OptionRom(rom.to_owned())), client: Client::Lookup };
    let machine = Machine { limit, ..Machine::default() };
    let show = shows(all.verbose, &progress);
    let result = conformance::check(&built.emulator, &built.guest, &subject, &machine, show)?;
    drop(progress);
    let complaint = result.complaint();
    add("bare", result, complaint);

    let progress = Progress::start("running the guest on the reference hypervisor");
    let (mode, paging) = (Mode::VmiBatched, Paging::Shadow);
    let setup = hypervisor::Setup { supply, mode, paging, traced: false };
    let hosted = setup.run(Task::Conformance, shows(all.verbose, &progress))?;
    drop(progress);
    let complaint = hosted.complaint();
    add("reference", hosted.conformance, complaint);

    let progress = Progress::start(format!("running the guest on Xen {}", xen.version));
    let setup = xen::Setup { supply, xen: &xen, costs: false };
    let hosted = setup.run(shows(all.verbose, &progress))?;
    drop(progress);
    let complaint = hosted.complaint();
    add("xen", hosted.conformance, complaint);

    let passes = tried.iter().all(|tried| tried.complaint.is_none());
    if all.json {
        println!("{}", serde_json::to_string_pretty(&json(&tried))?);
    } else {
        let mut text = text(&tried, false);
        for path in [built.guest.as_path(), rom] {
            text.push_str(&format!("{} has the sha-256 {}\n", build::shown(path), sum(path)?));
        }
        anstream::print!("{text}");
    }
    Ok(if passes { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The sum of a file.
fn sum(path: &Path) -> Result<String> {
    Ok(build::hex(&Sha256::digest(build::read(path)?)))
}
