//! What a build leaves behind, for those who need it without asking how it came about.

use crate::build::{self, Form, Tools};
use crate::link;
use crate::toolchain::{self, Emulator, Findings};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::sync::OnceLock;
use vmi_native_backend::binding::Bind;

/// Files that the tests run on, and what runs them.
#[derive(Clone, Debug)]
pub struct Artifacts {
    /// The default image: short calls become native code where they are called.
    pub native: PathBuf,
    /// The image with the fastest answers that leave the guest's code alone.
    pub fastest: PathBuf,
    /// The image that answers CALL_REL wherever it can.
    pub call: PathBuf,
    /// The image with the reference backend beside the native one.
    pub reference: PathBuf,
    /// The linked file of `native`.
    pub native_elf: PathBuf,
    /// The linked file of `fastest`.
    pub fastest_elf: PathBuf,
    /// The linked file of `call`.
    pub call_elf: PathBuf,
    /// The image of revision 13.0.
    pub slots_13_0: PathBuf,
    /// The image of revision 13.3.
    pub slots_13_3: PathBuf,
    /// The test guest.
    pub guest: PathBuf,
    /// QEMU.
    pub emulator: Emulator,
}

/// What runs on hypervisors need.
#[derive(Clone, Debug)]
pub struct Hosting {
    /// The reference hypervisor.
    pub hypervisor: PathBuf,
    /// What starts the guest on Xen.
    pub xen_loader: PathBuf,
    /// The image that knows the reference hypervisor.
    pub reference: PathBuf,
    /// The image for every platform.
    pub hypervisors: PathBuf,
    /// The test guest.
    pub guest: PathBuf,
    /// QEMU with long mode.
    pub emulator: Emulator,
}

/// Builds images and guest, once in this process.
///
/// # Errors
///
/// As [`build_all`]; the same answer each time.
pub fn ensure() -> Result<&'static Artifacts> {
    static BUILT: Once<Artifacts> = Once::new();
    once(&BUILT, build_all)
}

/// Builds what runs on hypervisors need, once in this process.
///
/// # Errors
///
/// As [`build_hosting`]; the same answer each time.
pub fn ensure_hosting() -> Result<&'static Hosting> {
    static BUILT: Once<Hosting> = Once::new();
    once(&BUILT, build_hosting)
}

/// What is built once, or why it cannot be.
type Once<T> = OnceLock<Result<T, String>>;

fn once<T>(built: &'static Once<T>, build: fn(&Findings) -> Result<T>) -> Result<&'static T> {
    built
        .get_or_init(|| build(&Findings::gather()).map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow::anyhow!("{error}"))
}

/// Builds images and guest.
///
/// # Errors
///
/// Something that the build needs is missing, or the build fails.
pub fn build_all(findings: &Findings) -> Result<Artifacts> {
    let tools = Tools::from_findings(findings)?;
    let emulator = findings
        .emulator
        .clone()
        .map_err(anyhow::Error::msg)
        .context("no QEMU; `cargo xtask setup` says how to get it")?;
    let native = build::rom(&tools, Form::Lookup(Bind::Rewrite))?;
    let fastest = build::rom(&tools, Form::Lookup(Bind::Fastest))?;
    let call = build::rom(&tools, Form::Lookup(Bind::Call))?;
    let reference = build::rom(&tools, Form::Reference)?;
    let slots_13_0 = build::rom(&tools, Form::Slots13_0)?;
    let slots_13_3 = build::rom(&tools, Form::Slots13_3)?;
    let links = link::all(&tools, &[slots_13_0.clone(), slots_13_3.clone()])?;
    let guest = build::guest(&tools, &links)?;
    Ok(Artifacts {
        native: native.path,
        fastest: fastest.path,
        call: call.path,
        reference: reference.path,
        native_elf: native.elf,
        fastest_elf: fastest.elf,
        call_elf: call.elf,
        slots_13_0: slots_13_0.path,
        slots_13_3: slots_13_3.path,
        guest,
        emulator,
    })
}

/// Builds hypervisor, loader, guest, and the images that know hypervisors.
///
/// # Errors
///
/// Something that the build needs is missing, or the build fails.
pub fn build_hosting(findings: &Findings) -> Result<Hosting> {
    let tools = Tools::from_findings(findings)?;
    let emulator = long_mode_emulator()?;
    let links = link::all(&tools, &[])?;
    Ok(Hosting {
        hypervisor: build::hypervisor(&tools)?,
        xen_loader: build::xen_loader(&tools)?,
        reference: build::rom(&tools, Form::Reference)?.path,
        hypervisors: build::rom(&tools, Form::Hypervisors)?.path,
        guest: build::guest(&tools, &links)?,
        emulator,
    })
}

/// The QEMU for 64-bit programs.
pub(crate) fn long_mode_emulator() -> Result<Emulator> {
    toolchain::long_mode_emulator()
        .map_err(anyhow::Error::msg)
        .context("no QEMU with long mode; `cargo xtask setup` says how to get it")
}
