//! The example kernels.

use crate::build::{self, Tools};
use crate::link;
use anyhow::Result;
use std::path::PathBuf;
use vmi_abi::REVISION_3_0;

/// Builds the kernel in Rust, with the native calls linked in.
///
/// # Errors
///
/// It does not compile, or the object with the calls cannot be built.
pub fn rust_kernel(tools: &Tools) -> Result<PathBuf> {
    let object = link::build(tools, REVISION_3_0)?.object;
    let path = crate::workspace().join("target/examples/rust-kernel.elf");
    build::kernel(tools, "vmi-example-kernel", &path, &[("VMI_NATIVE_OBJECT", &object)])?;
    Ok(path)
}
