//! `cargo xtask run --kernel`.

use super::RomChoice;
use crate::hypervisor::{GuestRom, Mode};
use crate::toolchain::Findings;
use crate::verbs::boots::{self, GuestOptions, On, Order};
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What concerns Linux.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct LinuxOptions {
    /// Boot this Linux kernel, a 32-bit bzImage, instead of the test guest: on the hypervisor given by `--on`, or without on the
    /// machine itself.
    #[arg(long, value_name = "FILE")]
    pub(super) kernel: Option<PathBuf>,
    #[command(flatten)]
    pub(super) guest: GuestOptions,
}

/// Runs.
///
/// # Errors
///
/// As [`boots::boot_all`].
pub(super) fn run(findings: &Findings, all: &super::Args, kernel: &Path) -> Result<ExitCode> {
    let (rom, cpu, processors) = (all.rom_file(), &*all.cpu, all.processors);
    let on = match (all.reference.on, &all.rom) {
        (Some(_), Some(RomChoice::None)) => boots::in_modes(&[Mode::Trap], GuestRom::None),
        (Some(_), _) => boots::in_modes(&all.reference.modes(), rom.into()),
        (None, _) => vec![On::Machine { rom, cpu, processors }],
    };
    let order = Order {
        kernel,
        guest: &all.linux.guest,
        on,
        paging: all.reference.paging,
        limit: all.limit(),
        trace: all.reference.trace.as_deref(),
        json: all.json,
        verbose: all.verbose,
    };
    boots::boot_all(findings, &order)
}
