//! `cargo xtask iso`.

use crate::build;
use crate::iso::{self, Kernels};
use crate::toolchain::Need;
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;

/// Makes a disc that boots the test kernel and the examples on a PC with a BIOS: target/iso/vmi.iso.
///
/// The file can be burnt on a CD or written to a USB stick as it is; docs/bare-metal.md tells more.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to put the disc. [default: target/iso/vmi.iso]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Makes the disc.
///
/// # Errors
///
/// Something that it needs is missing, or a build fails.
pub fn run(args: &Args) -> Result<ExitCode> {
    let findings = super::setup::provide(Need::ISO)?;
    let maker = findings.iso_maker.clone().map_err(anyhow::Error::msg)?;
    let kernels = Kernels::build(&findings)?;
    let path = args.output.clone().unwrap_or_else(iso::path);
    iso::make(&maker, &iso::entries(&kernels), &path)?;
    anstream::println!("{}", build::shown(&path));
    Ok(ExitCode::SUCCESS)
}
