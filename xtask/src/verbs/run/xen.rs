//! `cargo xtask run --on xen`.

use super::{Tried, closing, failures, json, table};
use crate::artifacts;
use crate::conformance::{Client, Subject};
use crate::hypervisor::Supply;
use crate::progress::Progress;
use crate::qemu::Attachment;
use crate::table::{Align, Cell, GOOD, PLAIN, Table};
use crate::tap::XenCostLine;
use crate::toolchain::Findings;
use crate::verbs::boots::shows;
use crate::xen::Setup;
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
    let xen = crate::verbs::setup::xen(all.reference.xen)?;
    let built = artifacts::build_hosting(findings)?;
    let supply = Supply { built: &built, rom: all.rom_file(), limit: all.limit() };
    let setup = Setup { supply, xen: &xen, costs: all.costs };
    let progress = Progress::start(format!("running the guest on Xen {}", xen.version));
    let hosted = setup.run(shows(all.verbose, &progress))?;
    drop(progress);

    let complaint = hosted.complaint();
    let rom = all.rom_file().unwrap_or(&built.hypervisors).to_owned();
    let subject = Subject { rom: Some(Attachment::OptionRom(rom)), client: Client::Lookup };
    let last = hosted.last_lines(LAST_LINES).join("\n    ");
    let tried = [Tried { complaint, ..Tried::of(&subject, hosted.conformance) }];
    let [Tried { name, result, complaint, .. }] = &tried;
    if all.json {
        println!("{}", serde_json::to_string_pretty(&json(&tried))?);
    } else {
        let name = format!("{name} on Xen {}, {}", xen.version, all.reference.xen.name());
        anstream::print!(
            "{}{}{}\n{}",
            table(&tried),
            costs(&result.report.xen_costs),
            failures(&name, result),
            closing(&name, result, complaint.as_deref())
        );
        if complaint.is_some() {
            anstream::println!("  the last lines of Xen's console:\n    {last}");
        }
    }
    Ok(if complaint.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One row for each piece of work: instructions of the guest, the ROM and Xen.
fn costs(lines: &[XenCostLine]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let mut columns = vec![Align::Left];
    columns.extend([Align::Right; 6]);
    let mut table = Table::new(&columns);
    let titles = ["instructions of one", "at once", "trapped", "hypercall", "rom", "rom/hypercall"];
    table.heading(&[&titles[..], &["trapped/rom"]].concat());
    for line in lines {
        let style = if line.ratio() <= 1.10 { GOOD } else { PLAIN };
        let trapped = |text: Option<String>| text.unwrap_or_default();
        table.row([
            line.work.as_str().into(),
            line.entries.to_string().into(),
            trapped(line.saving().map(|_| line.trapped.to_string())).into(),
            line.raw.to_string().into(),
            line.rom.to_string().into(),
            Cell::new(format!("{:.3}", line.ratio()), style),
            trapped(line.saving().map(|saving| format!("{saving:.1}"))).into(),
        ]);
    }
    format!("\n{}", table.render())
}
