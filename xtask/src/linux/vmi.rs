//! A current Linux with a client of VMI: Debian's source, patched and built here. Linux itself has had none since 2.6.37.
//!
//! apt's lists lie below `target/`, the source lies there while it is built, and nothing is installed.

use super::folder;
use crate::build;
use crate::debian::{Apt, Kind};
use crate::kbuild::{self, Kbuild};
use crate::progress::Progress;
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Debian's package with the source.
const PACKAGE: &str = "linux-source-6.1";

/// Our files, and where they go.
const CLIENT: [(&str, &str); 4] = [
    ("arch/x86/kernel/vmi.c", include_str!("../../../tests/linux-vmi/vmi.c")),
    ("arch/x86/include/asm/vmi.h", include_str!("../../../tests/linux-vmi/vmi.h")),
    (
        "arch/x86/include/asm/vmi_registers.h",
        include_str!("../../../tests/linux-vmi/vmi_registers.h"),
    ),
    ("arch/x86/include/asm/vmi_sites.h", include_str!("../../../tests/linux-vmi/vmi_sites.h")),
];

/// Where Linux calls them.
const HOOKS: &str = include_str!("../../../tests/linux-vmi/hooks.patch");

/// What the kernels have in common.
const CONFIGURATION: &str = include_str!("../../../tests/linux-vmi/config");

/// A kernel, named like Debian's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// For one processor, with two levels of page tables.
    I686,
    /// For one processor, with three levels, the physical address extension.
    I686Pae,
    /// For several processors, with two levels.
    I686Smp,
}

impl Flavour {
    /// Each of them.
    pub const ALL: [Self; 3] = [Self::I686, Self::I686Pae, Self::I686Smp];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::I686 => "vmi-686",
            Self::I686Pae => "vmi-686-pae",
            Self::I686Smp => "vmi-686-smp",
        }
    }

    /// How many processors of a machine it uses in our tests.
    #[must_use]
    pub const fn processors(self) -> u32 {
        match self {
            Self::I686 | Self::I686Pae => 1,
            Self::I686Smp => 4,
        }
    }

    /// The answers to the questions of Linux's configuration; to all others it is no.
    fn configuration(self) -> String {
        let levels = match self {
            Self::I686 | Self::I686Smp => "CONFIG_NOHIGHMEM=y",
            Self::I686Pae => "CONFIG_HIGHMEM64G=y",
        };
        let processors = match self {
            Self::I686 | Self::I686Pae => "CONFIG_X86_UP_APIC=y\nCONFIG_X86_UP_IOAPIC=y",
            Self::I686Smp => "CONFIG_SMP=y",
        };
        format!("{CONFIGURATION}\n# Its own.\n{levels}\n{processors}\n")
    }

    /// What of ours goes into it, in short.
    fn ours(self) -> String {
        let mut hash = Sha256::new();
        for part in CLIENT.iter().flat_map(|(path, text)| [*path, *text]).chain([HOOKS]) {
            hash.update(part);
        }
        hash.update(self.configuration());
        build::hex(&hash.finalize())
    }

    /// Where it lands.
    fn folder(self) -> PathBuf {
        folder().join(self.name())
    }

    /// The kernel, if what is there was made of what is ours now.
    #[must_use]
    pub fn built(self) -> Option<Kernel> {
        let version = kbuild::noted(&self.folder(), &self.ours())?;
        let path = self.folder().join("bzImage");
        path.is_file().then_some(Kernel { path, version })
    }

    /// The kernel that was built.
    ///
    /// # Errors
    ///
    /// It was not, or of other files than ours are now; the error says how to get it.
    pub fn kernel(self) -> Result<Kernel> {
        self.built().with_context(|| {
            format!(
                "the kernel {} was not built; `cargo xtask setup --linux-vmi` does that",
                self.name()
            )
        })
    }
}

/// A kernel that was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The file, a bzImage.
    pub path: PathBuf,
    /// The version of Debian's package.
    pub version: String,
}

/// Builds the kernels that were not.
///
/// # Errors
///
/// There is no apt, its sources have no such source, the network does not answer, a hook does not fit, or a build fails.
pub fn provide() -> Result<()> {
    // Another process may be at it, in the same folder.
    let _lock = build::lock("target/linux.lock")?;
    let missing: Vec<Flavour> =
        Flavour::ALL.into_iter().filter(|flavour| flavour.built().is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    // The package is for every architecture, so whichever's lists name it.
    let apt = Apt::new(&folder().join("apt/amd64"), Kind::Packages("amd64"))
        .context("Linux is built from Debian's package of its source, which apt fetches")?;
    let progress = Progress::start("fetching Linux's source from Debian");
    let version = apt.newest(PACKAGE)?;
    let package = apt.file(&format!("{PACKAGE}_{}_", version.replace(':', "%3a")))?;
    drop(progress);

    let work = work_folder().context("cannot make a folder for the build")?;
    let progress = Progress::start(format!("unpacking Linux {version}"));
    let source = work.path().join("source");
    unpack(&package, work.path(), &source)
        .with_context(|| format!("cannot unpack {}", package.display()))?;
    for (path, text) in CLIENT {
        build::write(&source.join(path), text.as_bytes())?;
    }
    patch(&source).with_context(|| format!("hooks.patch does not fit Linux {version}"))?;
    drop(progress);

    for flavour in missing {
        let name = flavour.name();
        let progress = Progress::start(format!("building Linux {version}, {name}"));
        let built = work.path().join(name);
        let log = folder().join(format!("{name}.log"));
        let kbuild =
            Kbuild { source: &source, built: &built, variables: &["ARCH=i386"], log: &log };
        kbuild.configure(&flavour.configuration(), "allnoconfig", &progress)?;
        kbuild.make("bzImage", &progress)?;
        let image = build::read(&built.join("arch/x86/boot/bzImage"))?;
        build::write(&flavour.folder().join("bzImage"), &image)?;
        kbuild::note(&flavour.folder(), &version, &flavour.ours())?;
    }
    // More than a hundred megabytes that nobody needs any more.
    fs::remove_file(&package).with_context(|| format!("cannot remove {}", package.display()))
}

/// Where the source lies while it is built: 600 MB that go when the build has ended, and if it was interrupted when the next one starts.
fn work_folder() -> std::io::Result<tempfile::TempDir> {
    const NAME: &str = "build";
    let left = folder().join(NAME);
    if left.exists() {
        fs::remove_dir_all(left)?;
    }
    tempfile::Builder::new().prefix(NAME).rand_bytes(0).tempdir_in(folder())
}

/// What no build of ours reads, two thirds of the source.
const LEFT_OUT: [&str; 10] = [
    "Documentation/",
    "drivers/gpu/",
    "drivers/media/",
    "drivers/net/",
    "drivers/scsi/",
    "drivers/staging/",
    "samples/",
    "sound/",
    "tools/perf/",
    "tools/testing/",
];

/// Whether a file of the source is unpacked: the questions of the configuration are asked everywhere, and make looks in everywhere.
fn is_wanted(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    let is_asked = ["Kconfig", "Kbuild", "Makefile"].iter().any(|start| name.starts_with(start));
    let is_foreign = path.starts_with("arch/") && !path.starts_with("arch/x86/");
    is_asked || !(is_foreign || LEFT_OUT.iter().any(|start| path.starts_with(start)))
}

/// Unpacks the source out of its package.
fn unpack(package: &Path, work: &Path, to: &Path) -> Result<()> {
    let contents = work.join("package");
    let mut extract = Command::new("dpkg-deb");
    extract.arg("--extract").arg(package).arg(&contents);
    crate::toolchain::output(&mut extract).map_err(anyhow::Error::msg)?;
    let mut decompress = Command::new("xz")
        .args(["--decompress", "--stdout", "--threads=0"])
        .arg(contents.join(format!("usr/src/{PACKAGE}.tar.xz")))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("xz does not start")?;
    if let Some(pipe) = decompress.stdout.take() {
        unpack_wanted(pipe, to)?;
    }
    let status = decompress.wait().context("cannot wait for xz")?;
    if !status.success() {
        bail!("xz: {status}");
    }
    fs::remove_dir_all(&contents).with_context(|| format!("cannot remove {}", contents.display()))
}

/// Unpacks what is wanted of an archive with one folder.
fn unpack_wanted(archive: impl std::io::Read, to: &Path) -> Result<()> {
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some((_, path)) = path.split_once('/') else { continue };
        let kind = entry.header().entry_type();
        if kind.is_dir() || !is_wanted(path) {
            continue;
        }
        let file = to.join(path);
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder)?;
        }
        entry.unpack(&file).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// Puts the hooks in. A hunk may have moved in its file, and must otherwise be as it is.
fn patch(source: &Path) -> Result<()> {
    let file = source.join("hooks.patch");
    build::write(&file, HOOKS.as_bytes())?;
    let mut patch = Command::new("patch");
    patch.args(["--strip=1", "--fuzz=0", "--forward", "--batch", "--reject-file=-"]);
    patch.arg("--input").arg(&file).current_dir(source).env("LC_ALL", "C").stdin(Stdio::null());
    let done = patch.output().context("patch does not start")?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stdout);
        bail!("{}\n{}", done.status, refusals(&said));
    }
    Ok(())
}

/// Of what patch says, which hunks of which files it did not take.
fn refusals(said: &str) -> String {
    let mut file = "";
    let mut text = String::new();
    for line in said.lines() {
        if let Some(name) = line.strip_prefix("patching file ") {
            file = name;
        } else if line.contains("FAILED at") || line.starts_with("can't find file") {
            // A string takes everything.
            let _ = writeln!(text, "{file}: {line}");
        }
    }
    if text.is_empty() { said.to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flavours_differ_in_levels_and_processors() {
        let [two, three, several] = Flavour::ALL.map(Flavour::configuration);
        assert!(two.contains("\nCONFIG_VMI=y\n") && two.contains("\nCONFIG_NOHIGHMEM=y\n"));
        assert_eq!(two.replace("NOHIGHMEM", "HIGHMEM64G"), three);
        assert_eq!(two.replace("X86_UP_APIC=y\nCONFIG_X86_UP_IOAPIC", "SMP"), several);
        let [two, three, several] = Flavour::ALL.map(Flavour::ours);
        assert!(two != three && two != several && three != several, "{two} {three} {several}");
        assert_eq!(two.len(), 64);
    }

    #[test]
    fn what_is_asked_or_built_is_unpacked() -> Result<()> {
        let wanted = [
            "Makefile",
            "arch/x86/mm/pgtable.c",
            "arch/arm/Kconfig.debug",
            "drivers/gpu/Makefile",
            "drivers/acpi/bus.c",
            "sound/Kconfig",
        ];
        let others = ["arch/arm/mm/mmu.c", "drivers/gpu/drm/drm_drv.c", "Documentation/index.rst"];
        let mut builder = tar::Builder::new(Vec::new());
        for path in wanted.iter().chain(&others) {
            let mut header = tar::Header::new_gnu();
            header.set_size(path.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append_data(&mut header, format!("linux-source/{path}"), path.as_bytes())?;
        }
        let (archive, folder) = (builder.into_inner()?, tempfile::tempdir()?);
        unpack_wanted(&*archive, folder.path())?;
        for path in wanted {
            assert_eq!(fs::read_to_string(folder.path().join(path))?, path);
        }
        assert!(others.iter().all(|path| !folder.path().join(path).exists()));
        assert!(unpack_wanted(&archive[..512 + 8], folder.path()).is_err(), "it was cut off");
        Ok(())
    }

    #[test]
    fn hunks_that_do_not_fit_are_named() {
        let said = "patching file arch/x86/Kconfig\n\
                    patching file arch/x86/include/asm/pgtable.h\n\
                    Hunk #2 FAILED at 76.\n\
                    1 out of 7 hunks FAILED\n\
                    patching file arch/x86/mm/pgtable.c\n";
        assert_eq!(refusals(said), "arch/x86/include/asm/pgtable.h: Hunk #2 FAILED at 76.\n");
        assert_eq!(refusals("patch: **** Out of memory\n"), "patch: **** Out of memory\n");
    }
}
