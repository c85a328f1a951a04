//! A disc that boots: GRUB with a menu of kernels, for CDs as well as for USB sticks.
//!
//! One file is both: its first sector is a boot sector, the rest an ISO 9660 file system.

use crate::build::{self, Tools, shown};
use crate::examples;
use crate::link;
use crate::progress::Progress;
use crate::toolchain::{Findings, IsoMaker, output};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the menu needs of GRUB; what reads the disc is always there.
const MODULES: &str = "normal multiboot serial";

/// Every date on the disc: the same files are to give the same bytes at any time.
const DATE: &str = "2006030800000000";

/// Seconds that the menu waits.
const PATIENCE: u32 = 5;

/// A line of the menu.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What the menu says.
    pub title: &'static str,
    /// The kernel, a multiboot one.
    pub kernel: PathBuf,
    /// Its command line.
    pub command_line: &'static str,
}

/// Where the disc lands.
#[must_use]
pub fn path() -> PathBuf {
    crate::workspace().join("target/iso/vmi.iso")
}

/// The kernels of the menu.
#[derive(Clone, Debug)]
pub struct Kernels {
    /// The test guest.
    pub guest: PathBuf,
    /// The example in C.
    pub c: PathBuf,
    /// The example in Rust.
    pub rust: PathBuf,
}

impl Kernels {
    /// Builds them.
    ///
    /// # Errors
    ///
    /// One of them does not compile, or what it needs is missing.
    pub fn build(findings: &Findings) -> Result<Self> {
        let tools = Tools::from_findings(findings)?;
        let compilers = findings.gcc.as_ref().map_err(|reason| anyhow::anyhow!("{reason}"))?;
        let links = link::all(&tools, &[])?;
        let link = links.first().context("nothing to link")?;
        Ok(Self {
            guest: build::guest(&tools, &links)?,
            c: examples::c_kernel(&tools, compilers, link)?,
            rust: examples::rust_kernel(&tools, link)?,
        })
    }
}

/// The menu's lines; the first is booted where nobody chooses.
#[must_use]
pub fn entries(Kernels { guest, c, rust }: &Kernels) -> Vec<Entry> {
    let entry =
        |title, kernel: &Path, command_line| Entry { title, kernel: kernel.into(), command_line };
    vec![
        entry("Check the VMI ROM", guest, "no-reboot"),
        entry("Check the VMI ROM, and that it can reset the machine", guest, ""),
        entry("Check a ROM of revision 13.0", guest, "no-reboot client=13.0"),
        entry("Check a ROM of revision 13.3", guest, "no-reboot client=13.3"),
        entry("Example kernel in C", c, ""),
        entry("Example kernel in Rust", rust, ""),
    ]
}

/// Makes the disc.
///
/// # Errors
///
/// A kernel cannot be read, or the tool fails.
pub fn make(maker: &IsoMaker, entries: &[Entry], path: &Path) -> Result<()> {
    let _progress = Progress::start(format!("making {}", shown(path)));
    let target = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let target = target.unwrap_or(Path::new("."));
    fs::create_dir_all(target).with_context(|| format!("cannot make {}", target.display()))?;
    // Beside the file, so that it comes there in one step.
    let folder = tempfile::tempdir_in(target)?;
    let tree = folder.path().join("tree");
    let boot = tree.join("boot");
    fs::create_dir_all(boot.join("grub"))?;
    fs::write(boot.join("grub/grub.cfg"), menu(entries))?;
    for Entry { kernel, .. } in entries {
        fs::copy(kernel, boot.join(name(kernel)))
            .with_context(|| format!("cannot copy {}", kernel.display()))?;
    }
    let disc = folder.path().join("disc");
    let mut command = Command::new(&maker.path);
    command
        .arg(format!("--directory={}", maker.modules.display()))
        .args([&format!("--install-modules={MODULES}"), "--fonts=", "--locales=", "--themes="])
        .arg("--output")
        .args([&disc, &tree])
        .args(["--", "-volume_date", "uuid", DATE, "-volume_date", "all_file_dates", DATE]);
    log::debug!("{command:?}");
    output(&mut command).map_err(anyhow::Error::msg)?;
    fs::rename(&disc, path).with_context(|| format!("cannot write {}", path.display()))
}

/// The file's name on the disc.
fn name(kernel: &Path) -> String {
    kernel.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// GRUB's configuration.
fn menu(entries: &[Entry]) -> String {
    let mut text = format!(
        "if serial --unit=0 --speed=115200; then\n  \
           terminal_input console serial\n  \
           terminal_output console serial\n\
         fi\n\
         set timeout={PATIENCE}\n"
    );
    for Entry { title, kernel, command_line } in entries {
        let kernel = format!("/boot/{} {command_line}", name(kernel));
        text += &format!("menuentry \"{title}\" {{\n  multiboot {}\n}}\n", kernel.trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_may_stand_in_the_menu_with_words_and_without() {
        let [guest, c, rust] = ["guest/vmi-guest.elf", "c.elf", "rust.elf"].map(PathBuf::from);
        let text = menu(&entries(&Kernels { guest, c, rust })[..2]);
        let kernels: Vec<&str> =
            text.lines().filter_map(|line| line.trim().strip_prefix("multiboot ")).collect();
        assert_eq!(kernels, ["/boot/vmi-guest.elf no-reboot", "/boot/vmi-guest.elf"]);
    }
}
