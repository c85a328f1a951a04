//! `cargo xtask compare`.

use super::boots::{self, GuestOptions, Order};
use crate::hypervisor::{Mode, Paging};
use crate::toolchain::Need;
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Boots a Linux kernel on the reference hypervisor, in each of its modes one after the other, and shows side by side what that took.
///
/// `trap` is without a ROM, `vmi` with each change of a page table told at once, `vmi-batched` with changes in batches. A mode that fails
/// is named with its reason, and the others are shown all the same.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The kernel, a 32-bit bzImage.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    #[command(flatten)]
    guest: GuestOptions,
    /// Use this ROM instead of ours, where the mode is by calls into one.
    #[arg(long, value_name = "FILE")]
    rom: Option<PathBuf>,
    /// The hypervisor's paging.
    #[arg(long, value_enum, default_value_t)]
    paging: Paging,
    /// Write what happened when, for Perfetto or speedscope: a process for each mode. If the name ends in `.svg`, draw it instead: a
    /// panel for each mode.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Seconds that each boot may take.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
    /// Print what the guest writes to its serial port, as it comes.
    #[arg(long)]
    verbose: bool,
}

/// Compares.
///
/// # Errors
///
/// As [`boots::boot_all`].
pub fn run(args: &Args) -> Result<ExitCode> {
    if let Some(rom) = &args.rom {
        boots::is_a_rom(rom)?;
    }
    let findings = super::setup::provide(Need::RUN)?;
    let order = Order {
        kernel: &args.kernel,
        guest: &args.guest,
        on: boots::in_modes(&Mode::ALL, args.rom.as_deref().into()),
        paging: args.paging,
        limit: Duration::from_secs(args.limit),
        trace: args.trace.as_deref(),
        json: args.json,
        verbose: args.verbose,
    };
    boots::boot_all(&findings, &order)
}
