//! `cargo xtask run --on xen`.

use super::{Tried, closing, failures, json, table};
use crate::build;
use crate::conformance::{Client, Subject};
use crate::progress::Progress;
use crate::qemu::Attachment;
use crate::toolchain::Findings;
use crate::verbs::boots::shows;
use crate::xen::{self, Setup};
use anyhow::Result;
use std::process::ExitCode;

/// Lines of Xen's console that are shown of a run that failed.
const LAST_LINES: usize = 24;

/// Runs.
///
/// # Errors
///
/// Xen or the ROM is not there, the build fails, or QEMU does not start.
pub(super) fn run(findings: &Findings, all: &super::Args) -> Result<ExitCode> {
    if let Some(rom) = &all.rom {
        build::read(rom)?;
    }
    let xen = crate::verbs::setup::xen(all.reference.xen)?;
    let built = xen::build_all(findings)?;
    let setup = Setup { built: &built, xen: &xen, rom: all.rom.as_deref(), limit: all.limit() };
    let progress = Progress::start(format!("running the guest on Xen {}", xen.version));
    let hosted = setup.run(shows(all.verbose, &progress))?;
    drop(progress);

    let complaint = hosted.complaint();
    let rom = all.rom.clone().unwrap_or_else(|| built.rom.clone());
    let subject = Subject { rom: Some(Attachment::OptionRom(rom)), client: Client::Lookup };
    let last = hosted.last_lines(LAST_LINES).join("\n    ");
    let tried = [Tried { subject, result: hosted.conformance }];
    if all.json {
        println!("{}", serde_json::to_string_pretty(&json(&tried))?);
    } else {
        let [Tried { subject, result }] = &tried;
        let name =
            format!("{} on Xen {}, {}", subject.name(), xen.version, all.reference.xen.name());
        anstream::print!(
            "{}{}\n{}",
            table(&tried),
            failures(&name, result),
            closing(&name, result)
        );
        if let Some(complaint) = &complaint {
            anstream::println!("{complaint}\n  the last lines of Xen's console:\n    {last}");
        }
    }
    Ok(if complaint.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
