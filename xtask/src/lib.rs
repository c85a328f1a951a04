//! The project's one script, as a library: `cargo xtask` is a thin command line on top of it, and
//! the tests call the same code.
//!
//! - [`toolchain`]: finds the compilers, the linker and QEMU,
//! - [`setup`]: decides how to get what is missing,
//! - [`build`]: compiles and links image and guest,
//! - [`examples`]: the example kernels,
//! - [`image`]: makes the finished image from the linked file, or refuses,
//! - [`link`]: the form that a kernel links,
//! - [`c_header`]: the interface for C,
//! - [`examples`]: the example kernels,
//! - [`artifacts`]: what a build leaves behind, built once,
//! - [`qemu`]: one run of a machine,
//! - [`tap`]: what the test guest reports,
//! - [`conformance`]: one ROM under the test guest,
//! - [`hypervisor`]: the guest on the reference hypervisor,
//! - [`trace`]: its exits, as a trace that viewers open,
//! - [`linux`], [`debian`]: Linux as the guest, and where it comes from,
//! - [`xen`]: the guest on Xen, and where Xen comes from,
//! - `kbuild`: builds of Linux and of Xen,
//! - [`iso`]: a disc that boots the guest,
//! - [`inspect`]: what is in an image, and whether it keeps the contract,
//! - [`reference`]: the page of calls in `docs/`,
//! - [`table`], [`progress`]: how results are shown.

pub mod artifacts;
pub mod build;
pub mod c_header;
pub mod conformance;
pub mod debian;
pub mod examples;
pub mod hypervisor;
pub mod image;
pub mod inspect;
pub mod iso;
mod kbuild;
pub mod kvm;
pub mod link;
pub mod linux;
pub mod progress;
pub mod qemu;
pub mod reference;
pub mod setup;
pub mod table;
pub mod tap;
pub mod toolchain;
pub mod trace;
pub mod verbs;
pub mod xen;

use std::path::{Path, PathBuf};

/// The top of the source tree.
///
/// Cargo says at run time where the package lies. What was compiled in is the fallback: a target
/// directory that two trees share may hold the other tree's binary.
#[must_use]
pub fn workspace() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    let top = |start: &Path| {
        let is_top =
            |folder: &&Path| folder.join("linker.ld").is_file() && folder.join("rom").is_dir();
        start.ancestors().find(is_top).map(Path::to_owned)
    };
    top(&package).or_else(|| top(Path::new(env!("CARGO_MANIFEST_DIR")))).unwrap_or(package)
}
