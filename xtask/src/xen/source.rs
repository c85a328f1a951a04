//! Xen, built from Debian's source package: its binaries are without 32-bit paravirtualized guests.
//!
//! Only the hypervisor is built, for nothing but such guests. apt's lists and the source lie below `target/`, and so does what comes
//! of it: nothing is installed.

use crate::build;
use crate::debian::{Apt, Kind};
use crate::progress::Progress;
use crate::toolchain::output;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
    let stamp = fs::read_to_string(folder.join("built-from")).ok()?;
    let (version, configuration) = stamp.split_once('\n')?;
    let path = folder.join("xen");
    (configuration == build.configuration() && path.is_file())
        .then(|| Xen { path, version: version.to_owned() })
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
    let (version, description) = fetch()?;
    let work = tempfile::tempdir_in(folder()).context("cannot make a folder for the build")?;
    let source = work.path().join("source");
    // apt has held it against Debian's signed lists.
    let mut unpack = Command::new("dpkg-source");
    unpack.args(["--no-check", "--extract"]).arg(&description).arg(&source);
    output(&mut unpack).map_err(anyhow::Error::msg).context("Xen's source cannot be unpacked")?;
    let built = work.path().join("built");
    fs::create_dir(&built).context("cannot make a folder for the build")?;
    let wanted = work.path().join("wanted");
    build::write(&wanted, build.configuration().as_bytes())?;

    let progress = Progress::start(format!("building Xen {version}, {}", build.name()));
    let log = folder().join(format!("{}.log", build.name()));
    let make = || {
        let mut make = Command::new("make");
        make.arg("-C").arg(source.join("xen"));
        make.arg(format!("O={}", built.display()));
        make.args(["XEN_TARGET_ARCH=x86_64", "PYTHON=python3"]);
        make.env("KCONFIG_ALLCONFIG", &wanted);
        // What is meant for other programs.
        for name in ["CFLAGS", "LDFLAGS", "MAKEFLAGS", "MFLAGS", "CC", "ARCH", "DEBUG"] {
            make.env_remove(name);
        }
        make
    };
    run(make().arg("alldefconfig"), &log, &progress)?;
    let chosen = fs::read_to_string(built.join(".config")).unwrap_or_default();
    if !chosen.lines().any(|line| line == "CONFIG_PV32=y") {
        bail!("Xen {version} cannot be built with 32-bit paravirtualized guests any more");
    }
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    run(make().arg(format!("-j{jobs}")).arg("build"), &log, &progress)?;
    build::write(&build.folder().join("xen"), &build::read(&built.join("xen"))?)?;
    let stamp = format!("{version}\n{}", build.configuration());
    build::write(&build.folder().join("built-from"), stamp.as_bytes())?;
    xen(build)
}

/// Runs a step of the build, with its last line as progress and all of them in a file.
fn run(make: &mut Command, log: &Path, progress: &Progress) -> Result<()> {
    log::debug!("{make:?}");
    let file = fs::File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
    let mut child = make
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(file)
        .spawn()
        .context("make does not start")?;
    let mut last = String::new();
    if let Some(pipe) = child.stdout.take() {
        for line in BufReader::new(pipe).lines() {
            last = line.context("cannot read what make says")?;
            progress.at(&last);
        }
    }
    let status = child.wait().context("cannot wait for make")?;
    if !status.success() {
        let said = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        let end = lines[lines.len().saturating_sub(20)..].join("\n");
        bail!("{} failed ({status}), at {last:?}:\n{end}", progress.title());
    }
    Ok(())
}

/// Gets the newest source that there is: its version, and the file that describes it.
fn fetch() -> Result<(String, PathBuf)> {
    let apt = Apt::new(&folder().join("apt"), Kind::Sources)
        .context("Xen is built from Debian's source package, which apt fetches")?;
    let _progress = Progress::start("fetching Xen's source from Debian");
    let updated = apt.update();
    let text = output(apt.command("apt-cache").args(["madison", "xen"])).unwrap_or_default();
    let versions = versions(&text);
    if versions.is_empty() {
        match updated {
            Err(reason) => bail!("Debian's lists of source packages cannot be read: {reason}"),
            Ok(()) => bail!("Debian's sources have no source package xen"),
        }
    }
    let mut refused = String::new();
    // Lists are at times ahead of what a mirror has.
    for version in versions {
        let package = format!("xen={version}");
        let words = ["--quiet", "--quiet", "source", "--download-only", &package];
        match output(apt.command("apt-get").args(words)) {
            Ok(_) => {
                let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
                let description = apt.folder().join(format!("xen_{upstream}.dsc"));
                if !description.is_file() {
                    bail!("apt-get source left no {}", description.display());
                }
                return Ok((version.to_owned(), description));
            }
            Err(reason) => refused.push_str(&format!("\n{version}: {reason}")),
        }
    }
    bail!("none of Debian's sources of Xen can be fetched:{refused}")
}

/// Versions of a source package, as `apt-cache madison` lists them: the newest first.
fn versions(text: &str) -> Vec<&str> {
    let mut versions: Vec<&str> = text
        .lines()
        .filter(|line| line.trim_end().ends_with("Sources"))
        .filter_map(|line| line.split('|').nth(1).map(str::trim))
        .collect();
    versions.dedup();
    versions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_listed_newest_first_and_packages_are_not_sources() {
        let text = "       xen | 4.17.7+13-1 | http://a bookworm-security/main Sources\n\
                    xen | 4.17.5+72-1 | http://a bookworm/main Sources\n\
                    xen | 4.17.5+72-1 | http://b bookworm/main Sources\n\
                    xen | 4.17.5+72-2 | http://b bookworm/main amd64 Packages\n";
        assert_eq!(versions(text), ["4.17.7+13-1", "4.17.5+72-1"]);
        assert!(versions("N: Unable to locate package xen\n").is_empty());
    }

    #[test]
    fn the_builds_differ_in_one_answer() {
        let [release, debug] = [Build::Release, Build::Debug].map(Build::configuration);
        assert!(
            release.contains("CONFIG_PV32=y\n") && release.contains("# CONFIG_DEBUG is not set\n")
        );
        assert_eq!(release.replace("# CONFIG_DEBUG is not set", "CONFIG_DEBUG=y"), debug);
    }
}
