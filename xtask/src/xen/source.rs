//! Xen, built from Debian's source package: its binaries are without 32-bit paravirtualized guests.
//!
//! Only the hypervisor is built, for nothing but such guests. apt's lists and the source lie below `target/`, and so does what comes
//! of it: nothing is installed.

use crate::build;
use crate::debian::{Apt, Kind};
use crate::kbuild::{self, Kbuild};
use crate::progress::Progress;
use crate::toolchain::output;
use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::process::Command;

/// How Xen is built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Build {
    /// As distributions do.
    #[default]
    Release,
    /// With its assertions, and with what it overwrites on purpose.
    Debug,
}

impl Build {
    /// Its name in paths.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Debug => "debug",
        }
    }

    /// The answers to the questions of Xen's configuration; it has defaults for all others.
    fn configuration(self) -> String {
        const YES: [&str; 4] = ["EXPERT", "UNSUPPORTED", "PV", "PV32"];
        // What needs hardware, other sources or time, and serves no guest of ours.
        const NO: [&str; 10] = [
            "HVM",
            "SHADOW_PAGING",
            "XEN_SHSTK",
            "XEN_IBT",
            "HYPFS",
            "KEXEC",
            "XSM",
            "LIVEPATCH",
            "TBOOT",
            "XENOPROF",
        ];
        let yes = |name: &str| format!("CONFIG_{name}=y\n");
        let no = |name: &str| format!("# CONFIG_{name} is not set\n");
        let debug = if self == Self::Debug { yes("DEBUG") } else { no("DEBUG") };
        YES.into_iter().map(yes).chain(NO.into_iter().map(no)).chain([debug]).collect()
    }

    /// Where it lands.
    fn folder(self) -> PathBuf {
        folder().join(self.name())
    }
}

/// Everything that has to do with Xen.
fn folder() -> PathBuf {
    crate::workspace().join("target/xen")
}

/// A Xen that was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xen {
    /// The hypervisor, a multiboot kernel.
    pub path: PathBuf,
    /// The version of Debian's source package.
    pub version: String,
}

/// The Xen that was built, if it was built so.
#[must_use]
pub fn built(build: Build) -> Option<Xen> {
    let folder = build.folder();
    let version = kbuild::noted(&folder, &build.configuration())?;
    let path = folder.join("xen");
    path.is_file().then_some(Xen { path, version })
}

/// The Xen that was built.
///
/// # Errors
///
/// It was not; the error says how to get it.
pub fn xen(build: Build) -> Result<Xen> {
    let words = if build == Build::Release { "" } else { "=debug" };
    built(build).with_context(|| {
        format!(
            "Xen was not built; `cargo xtask setup --xen{words}` does that, in two to four minutes"
        )
    })
}

/// Builds Xen, unless it was.
///
/// # Errors
///
/// There is no apt, its sources have no Xen, the network does not answer, or the build fails.
pub fn provide(build: Build) -> Result<Xen> {
    if let Some(xen) = built(build) {
        return Ok(xen);
    }
    let apt = Apt::new(&folder().join("apt"), Kind::Sources)
        .context("Xen is built from Debian's source package, which apt fetches")?;
    let progress = Progress::start("fetching Xen's source from Debian");
    let version = apt.newest("xen")?;
    drop(progress);
    let upstream = version.split_once(':').map_or(&*version, |(_, rest)| rest);
    let description = apt.folder().join(format!("xen_{upstream}.dsc"));
    if !description.is_file() {
        bail!("apt-get source left no {}", description.display());
    }
    let work = tempfile::tempdir_in(folder()).context("cannot make a folder for the build")?;
    let source = work.path().join("source");
    // apt has held it against Debian's signed lists.
    let mut unpack = Command::new("dpkg-source");
    unpack.args(["--no-check", "--extract"]).arg(&description).arg(&source);
    output(&mut unpack).map_err(anyhow::Error::msg).context("Xen's source cannot be unpacked")?;

    let progress = Progress::start(format!("building Xen {version}, {}", build.name()));
    let (source, built) = (source.join("xen"), work.path().join("built"));
    let kbuild = Kbuild {
        source: &source,
        built: &built,
        variables: &["XEN_TARGET_ARCH=x86_64", "PYTHON=python3"],
        log: &folder().join(format!("{}.log", build.name())),
    };
    let configuration = build.configuration();
    kbuild.configure(&configuration, "alldefconfig", &progress)?;
    kbuild.make("build", &progress)?;
    build::write(&build.folder().join("xen"), &build::read(&built.join("xen"))?)?;
    kbuild::note(&build.folder(), &version, &configuration)?;
    xen(build)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builds_differ_in_one_answer() {
        let [release, debug] = [Build::Release, Build::Debug].map(Build::configuration);
        assert!(
            release.contains("CONFIG_PV32=y\n") && release.contains("# CONFIG_DEBUG is not set\n")
        );
        assert_eq!(release.replace("# CONFIG_DEBUG is not set", "CONFIG_DEBUG=y"), debug);
    }
}
