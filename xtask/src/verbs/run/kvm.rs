//! `cargo xtask run --on kvm`.

use crate::build;
use crate::kvm::{Guest, Host, Hosted};
use crate::progress::Progress;
use crate::table::{Align, BAD, GOOD, HEAD, Table};
use crate::toolchain::Findings;
use crate::verbs::boots::shows;
use anyhow::Result;
use std::path::Path;
use std::process::ExitCode;

/// Runs.
///
/// # Errors
///
/// The build fails, a file is missing, or QEMU does not start.
pub(super) fn run(findings: &Findings, all: &super::Args, kernel: &Path) -> Result<ExitCode> {
    let options = &all.linux.guest;
    options.files_are_there(kernel)?;
    let initrd = options.initramfs(findings)?;
    let host = Host::build(findings)?;
    let guest = Guest::tests(kernel, &initrd, all.reference.paging);
    let guest = Guest {
        append: &options.append,
        limit: all.limit(),
        marker: guest.marker.filter(|_| options.initrd.is_none()),
        ..guest
    };
    let progress = Progress::start(format!("booting {} on KVM", build::shown(kernel)));
    let hosted = host.run(&guest, shows(all.verbose, &progress))?;
    drop(progress);
    if all.json {
        println!("{}", serde_json::to_string_pretty(&json(&hosted, kernel))?);
    } else {
        anstream::print!("{}", text(&hosted));
    }
    Ok(if hosted.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything for a reader.
fn text(hosted: &Hosted) -> String {
    let mut table = Table::new(&[Align::Left, Align::Right]);
    table.heading(&["counted by KVM", "in all"]);
    for (name, count) in hosted.statistics.iter().filter(|(_, count)| **count != 0) {
        table.row(vec![name.as_str().into(), count.to_string().into()]);
    }
    let seconds = hosted.run.duration.as_secs_f64();
    table.render()
        + &match hosted.exits() {
            Some(exits) if hosted.passed() => format!(
                "{}the guest passes{} with {}{exits} exits{}; {seconds:.1} s\n",
                GOOD.render(),
                GOOD.render_reset(),
                HEAD.render(),
                HEAD.render_reset()
            ),
            _ => format!(
                "{}the guest FAILS{}: {}; {seconds:.1} s\n{}\n{}{}\n",
                BAD.render(),
                BAD.render_reset(),
                hosted.run.outcome,
                hosted.run.last_lines(),
                hosted.run.host,
                hosted.run.command
            ),
        }
}

/// Everything for a program.
fn json(hosted: &Hosted, kernel: &Path) -> serde_json::Value {
    serde_json::json!({
        "kernel": kernel.display().to_string(),
        "passes": hosted.passed(),
        "outcome": hosted.run.outcome.to_string(),
        "seconds": hosted.run.duration.as_secs_f64(),
        "command": hosted.run.command,
        "exits": hosted.exits(),
        "statistics": hosted.statistics,
    })
}
