//! `cargo xtask setup`.

use crate::toolchain::{Findings, Need};
use anyhow::{Result, bail};

/// Finds what `needs` asks for, and installs what is missing.
///
/// # Errors
///
/// Something is missing and cannot be installed here.
pub fn provide(needs: &[Need]) -> Result<Findings> {
    let findings = Findings::gather();
    if !findings.missing(needs).is_empty() {
        bail!("missing");
    }
    Ok(findings)
}
