//! What is Debian's: kernels for guests and for KVM, taken out of their packages and never installed, and sources of packages.
//!
//! apt's tools work on lists and a status of their own below `target/`: the system's sources and lists are read and not touched, and no
//! privilege is needed. What comes is checked by apt against Debian's signatures.

use crate::build;
use crate::linux::folder;
use crate::progress::Progress;
use crate::toolchain::{find_program, output};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A kernel of Debian's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Flavour {
    /// For 32-bit processors, with two levels of page tables.
    #[value(name = "686")]
    I686,
    /// For 32-bit processors, with three levels, the physical address extension.
    #[value(name = "686-pae")]
    I686Pae,
    /// For 64-bit virtual machines: the host of [`crate::kvm`].
    #[value(name = "cloud-amd64")]
    CloudAmd64,
}

/// What is taken of a package.
struct Member {
    /// How its path begins.
    start: &'static str,
    /// How its path ends.
    end: String,
    /// Its name from then on.
    name: &'static str,
}

/// A kernel's name from then on.
const KERNEL: &str = "bzImage";

/// KVM's modules, in the order in which they are loaded.
pub const KVM_MODULES: [&str; 3] = ["irqbypass.ko", "kvm.ko", "kvm-amd.ko"];

impl Flavour {
    /// Those for guests.
    pub const GUESTS: [Self; 2] = [Self::I686, Self::I686Pae];

    /// All that the tests boot.
    pub const ALL: [Self; 3] = [Self::I686, Self::I686Pae, Self::CloudAmd64];

    /// As in the names of packages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::I686 => "686",
            Self::I686Pae => "686-pae",
            Self::CloudAmd64 => "cloud-amd64",
        }
    }

    /// Debian's architecture.
    const fn architecture(self) -> &'static str {
        match self {
            Self::I686 | Self::I686Pae => "i386",
            Self::CloudAmd64 => "amd64",
        }
    }

    /// The option of `setup` that gets it.
    const fn option(self) -> &'static str {
        match self {
            Self::I686 | Self::I686Pae => "--linux",
            Self::CloudAmd64 => "--kvm",
        }
    }

    /// Where the kernel lands.
    #[must_use]
    pub fn path(self) -> PathBuf {
        self.file(KERNEL)
    }

    /// Where a file of the package lands.
    fn file(self, name: &str) -> PathBuf {
        folder().join(self.name()).join(name)
    }

    /// What is taken of its package.
    fn members(self) -> Vec<Member> {
        let modules: &[&str] = if self == Self::CloudAmd64 { &KVM_MODULES } else { &[] };
        let module =
            |name: &&'static str| Member { start: "lib/modules/", end: format!("/{name}"), name };
        let kernel = Member { start: "boot/vmlinuz-", end: String::new(), name: KERNEL };
        [kernel].into_iter().chain(modules.iter().map(module)).collect()
    }

    fn is_there(self) -> bool {
        self.members().iter().all(|member| self.file(member.name).is_file())
    }
}

/// A kernel, if it was fetched.
///
/// # Errors
///
/// It is missing; the error says how to get it.
pub fn kernel(flavour: Flavour) -> Result<PathBuf> {
    file(flavour, KERNEL)
}

/// A file of a kernel's package, if it was fetched.
///
/// # Errors
///
/// It is missing; the error says how to get it.
pub fn file(flavour: Flavour, name: &str) -> Result<PathBuf> {
    let path = flavour.file(name);
    if !path.is_file() {
        bail!(
            "{} is missing; `cargo xtask setup {}` gets it",
            build::shown(&path),
            flavour.option()
        );
    }
    Ok(path)
}

/// Gets the kernels that are not there yet.
///
/// # Errors
///
/// There is no apt, it knows no source of Debian's, or the network does not answer.
pub fn fetch(flavours: &[Flavour]) -> Result<()> {
    for flavour in flavours.iter().filter(|flavour| !flavour.is_there()) {
        flavour.fetch().with_context(|| {
            let names: Vec<String> = flavour
                .members()
                .iter()
                .map(|member| build::shown(&flavour.file(member.name)).to_string())
                .collect();
            format!(
                "Debian's kernel {name} cannot be fetched; by hand: out of the package linux-image-{name} of Debian bookworm for {}, put \
                 vmlinuz and what else is named here at {}",
                flavour.architecture(),
                names.join(", "),
                name = flavour.name(),
            )
        })?;
    }
    Ok(())
}

impl Flavour {
    /// Gets its package, and takes out what is wanted.
    fn fetch(self) -> Result<()> {
        if find_program("dpkg-deb").is_none() {
            bail!("there is no dpkg-deb");
        }
        let architecture = self.architecture();
        let apt = Apt::new(&folder().join("apt").join(architecture), Kind::Packages(architecture))?;
        let progress = Progress::start("reading Debian's package lists".to_owned());
        let updated = apt.update();
        drop(progress);
        let _progress = Progress::start(format!("fetching Debian's kernel {}", self.name()));
        let package = match (apt.package(self), &updated) {
            (Ok(package), _) => package,
            (Err(_), Err(reason)) => bail!("Debian's package lists cannot be read: {reason}"),
            (Err(error), Ok(())) => return Err(error),
        };
        let file = apt.download(&package)?;
        let members = self.members();
        let found =
            unpack(&file, &members).with_context(|| format!("cannot unpack {}", file.display()))?;
        for (member, bytes) in members.iter().zip(found) {
            build::write(&self.file(member.name), &bytes)?;
        }
        // A hundred megabytes of modules that nobody needs.
        fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))
    }
}

/// What apt is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Packages for an architecture.
    Packages(&'static str),
    /// Sources of packages.
    Sources,
}

impl Kind {
    /// As in the lists of sources.
    const fn name(self) -> &'static str {
        match self {
            Self::Packages(_) => "deb",
            Self::Sources => "deb-src",
        }
    }

    /// What lets `apt-get` leave a file in its folder.
    const fn words(self) -> &'static [&'static str] {
        match self {
            Self::Packages(_) => &["download"],
            Self::Sources => &["source", "--download-only"],
        }
    }

    /// Versions, as `apt-cache madison` lists them: the newest first.
    fn versions(self, text: &str) -> Vec<&str> {
        let end = match self {
            Self::Packages(_) => "Packages",
            Self::Sources => "Sources",
        };
        let mut versions: Vec<&str> = text
            .lines()
            .filter(|line| line.trim_end().ends_with(end))
            .filter_map(|line| line.split('|').nth(1).map(str::trim))
            .collect();
        versions.dedup();
        versions
    }
}

/// apt with lists and a status of its own.
pub(crate) struct Apt {
    folder: PathBuf,
    kind: Kind,
}

impl Apt {
    /// In a folder, with the system's sources that are Debian's.
    pub(crate) fn new(folder: &Path, kind: Kind) -> Result<Self> {
        for program in ["apt-get", "apt-cache"] {
            if find_program(program).is_none() {
                bail!("there is no {program}");
            }
        }
        let mut sources = sources(Path::new("/etc/apt"), kind);
        if Path::new(KEYRING).is_file() {
            sources = with_bookworm(sources, kind);
        } else if sources.is_empty() {
            bail!(
                "apt has no source of Debian's packages in /etc/apt, and {KEYRING} is not there to check others; the package \
                 debian-archive-keyring has it"
            );
        }
        for part in ["lists/partial", "cache/archives/partial", "sources.list.d"] {
            let part = folder.join(part);
            fs::create_dir_all(&part).with_context(|| format!("cannot make {}", part.display()))?;
        }
        let old = folder.join("sources.list.d");
        for entry in fs::read_dir(&old).with_context(|| format!("cannot read {}", old.display()))? {
            fs::remove_file(entry?.path())?;
        }
        for (name, text) in sources {
            build::write(&old.join(name), text.as_bytes())?;
        }
        build::write(&folder.join("status"), b"")?;
        build::write(&folder.join("apt.conf"), configuration(folder, kind).as_bytes())?;
        Ok(Self { folder: folder.to_owned(), kind })
    }

    /// Where files land.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// One of apt's programs.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("LC_ALL", "C")
            .env("APT_CONFIG", self.folder.join("apt.conf"))
            .current_dir(&self.folder)
            .stdin(Stdio::null());
        command
    }

    /// Reads the lists. A source that does not answer need not be the one that is wanted.
    pub(crate) fn update(&self) -> Result<(), String> {
        // Without the option apt is content with lists that are missing.
        let words = ["--quiet", "--quiet", "--option", "APT::Update::Error-Mode=any", "update"];
        output(self.command("apt-get").args(words)).map(|_| ())
    }

    /// The package that the flavour's newest kernel is in.
    fn package(&self, flavour: Flavour) -> Result<String> {
        let name = format!("linux-image-{}", flavour.name());
        let text = output(self.command("apt-cache").args(["depends", &name]))
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("Debian's sources have no package {name}"))?;
        dependency(&text).with_context(|| format!("the package {name} names no kernel:\n{text}"))
    }

    /// Its file.
    fn download(&self, package: &str) -> Result<PathBuf> {
        self.get(package).map_err(anyhow::Error::msg)?;
        self.file(&format!("{package}_"))
    }

    /// Lets apt leave a package, or a source, in the folder.
    fn get(&self, package: &str) -> Result<(), String> {
        let mut command = self.command("apt-get");
        command.args(["--quiet", "--quiet"]).args(self.kind.words()).arg(package);
        output(&mut command).map(|_| ()).map_err(|reason| format!("{package}: {reason}"))
    }

    /// The file of a package in the folder.
    pub(crate) fn file(&self, start: &str) -> Result<PathBuf> {
        let is_it = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(start) && name.ends_with(".deb")
        };
        fs::read_dir(&self.folder)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(is_it)
            .with_context(|| format!("apt-get left no file {start}*.deb"))
    }

    /// Reads the lists, and gets the newest version of a package, or of a source, that there is. Says which that is.
    pub(crate) fn newest(&self, package: &str) -> Result<String> {
        let updated = self.update();
        let text = output(self.command("apt-cache").args(["madison", package])).unwrap_or_default();
        let versions = self.kind.versions(&text);
        if versions.is_empty() {
            match updated {
                Err(reason) => bail!("Debian's package lists cannot be read: {reason}"),
                Ok(()) => bail!("Debian's sources have no {package}"),
            }
        }
        let mut refused = String::new();
        // Lists are at times ahead of what a mirror has.
        for version in versions {
            match self.get(&format!("{package}={version}")) {
                Ok(()) => return Ok(version.to_owned()),
                Err(reason) => refused.push_str(&format!("\n{reason}")),
            }
        }
        bail!("none of Debian's versions of {package} can be fetched:{refused}")
    }
}

/// Debian's keys, on systems that are not Debian's own too.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The sources, and one of bookworm if they are of other releases: none after it has 32-bit kernels or Linux 6.1.
fn with_bookworm(mut sources: Vec<(String, String)>, kind: Kind) -> Vec<(String, String)> {
    if !sources.iter().any(|(_, text)| text.contains("bookworm")) {
        sources.push(("with-bookworm.sources".into(), debian_source(kind)));
    }
    sources
}

/// A source of bookworm.
fn debian_source(kind: Kind) -> String {
    let kind = kind.name();
    format!(
        "Types: {kind}\nURIs: http://deb.debian.org/debian\nSuites: bookworm\nComponents: main\nSigned-By: {KEYRING}\n"
    )
}

/// What apt is told: nothing but the trusted keys is the system's.
fn configuration(folder: &Path, kind: Kind) -> String {
    let place = |name: &str| folder.join(name).display().to_string();
    let architecture = match kind {
        Kind::Packages(name) => {
            format!("APT::Architecture \"{name}\";\nAPT::Architectures {{ \"{name}\"; }};\n")
        }
        Kind::Sources => String::new(),
    };
    format!(
        "{architecture}\
         Dir::State \"{folder}\";\n\
         Dir::State::lists \"{lists}\";\n\
         Dir::State::status \"{status}\";\n\
         Dir::Cache \"{cache}\";\n\
         Dir::Etc::sourcelist \"/dev/null\";\n\
         Dir::Etc::sourceparts \"{sources}\";\n\
         Acquire::Languages \"none\";\n\
         APT::Sandbox::User \"\";\n",
        folder = folder.display(),
        lists = place("lists"),
        status = place("status"),
        cache = place("cache"),
        sources = place("sources.list.d"),
    )
}

/// The system's source files, each cut down to what is Debian's.
fn sources(etc: &Path, kind: Kind) -> Vec<(String, String)> {
    let mut files = vec![etc.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc.join("sources.list.d")) {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    let cut = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.to_owned();
        let text = fs::read_to_string(&path).ok()?;
        let text = match path.extension()?.to_str()? {
            "list" => lines_of_debian(&text, kind),
            "sources" => stanzas_of_debian(&text, kind),
            _ => return None,
        };
        (!text.is_empty()).then_some((name, text))
    };
    files.into_iter().filter_map(cut).collect()
}

/// Whether an address is of an archive of Debian's: every mirror has a folder of one of these names.
fn is_debian(address: &str) -> bool {
    let parts = || address.split('/').filter(|part| !part.is_empty()).skip(1);
    parts().any(|part| matches!(part, "debian" | "debian-security"))
}

/// The lines of the old format that are of Debian's archives, for what is wanted: whoever has packages has their sources too. An
/// architecture that they name would not be ours.
fn lines_of_debian(text: &str, kind: Kind) -> String {
    let wanted = |line: &&str| {
        let mut words = line.split_ascii_whitespace();
        words.next() == Some("deb") && words.any(is_debian) && !line.contains("arch=")
    };
    let line = |line: &str| format!("{}\n", line.trim_start().replacen("deb", kind.name(), 1));
    text.lines().filter(wanted).map(line).collect()
}

/// The stanzas of the new format that are of Debian's archives, for what is wanted, without their architectures.
fn stanzas_of_debian(text: &str, kind: Kind) -> String {
    let field = |stanza: &[&str], name: &str| {
        stanza.iter().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    let mut wanted = String::new();
    let lines: Vec<&str> = text.lines().collect();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let is_one = |name: &str, value: &str| {
            field(stanza, name)
                .is_some_and(|values| values.split_ascii_whitespace().any(|one| one == value))
        };
        let addresses = field(stanza, "URIs").unwrap_or_default();
        if !is_one("Types", "deb")
            || is_one("Enabled", "no")
            || !addresses.split_ascii_whitespace().any(is_debian)
        {
            continue;
        }
        wanted.push_str(&format!("Types: {}\n", kind.name()));
        let is_kept =
            |line: &&&str| !["Architectures:", "Types:"].iter().any(|key| line.starts_with(key));
        for line in stanza.iter().filter(is_kept) {
            wanted.push_str(line);
            wanted.push('\n');
        }
        wanted.push('\n');
    }
    wanted
}

/// The first package that `apt-cache depends` names.
fn dependency(text: &str) -> Option<String> {
    let name = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "))?;
    name.starts_with("linux-image-").then(|| name.to_owned())
}

/// What is wanted of a package, in that order.
fn unpack(package: &Path, wanted: &[Member]) -> Result<Vec<Vec<u8>>> {
    let mut unpack = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("dpkg-deb does not start")?;
    let found = match unpack.stdout.take() {
        Some(pipe) => members(pipe, wanted)?,
        None => Vec::new(),
    };
    let status = unpack.wait().context("cannot wait for dpkg-deb")?;
    if !status.success() {
        bail!("dpkg-deb: {status}");
    }
    let there = |(member, bytes): (&Member, Option<Vec<u8>>)| {
        bytes.with_context(|| format!("there is no {}...{} in it", member.start, member.end))
    };
    wanted.iter().zip(found).map(there).collect()
}

/// The files of a tar archive whose names start and end so, in the order in which they are wanted.
fn members(archive: impl Read, wanted: &[Member]) -> Result<Vec<Option<Vec<u8>>>> {
    let mut archive = tar::Archive::new(archive);
    let mut found = vec![None; wanted.len()];
    // All are read, so that their writer comes to its end.
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = path.trim_start_matches("./");
        let is_it = |member: &Member| path.starts_with(member.start) && path.ends_with(&member.end);
        if let Some(index) = wanted.iter().position(is_it)
            && found[index].is_none()
        {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            found[index] = Some(bytes);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debians_own_sources_are_taken() {
        let old = "deb http://deb.debian.org/debian bookworm main\n\
                   # deb http://deb.debian.org/debian bookworm contrib\n\
                   deb-src http://deb.debian.org/debian bookworm main\n\
                   deb [signed-by=/k.gpg] https://mirror.example/pub/debian-security bookworm-security main\n\
                   deb https://deb.nodesource.com/node_20.x nodistro main\n";
        let taken = lines_of_debian(old, Kind::Packages("i386"));
        assert_eq!(taken.lines().count(), 2);
        assert!(taken.contains("signed-by=/k.gpg") && !taken.contains("nodesource"));
        let taken = lines_of_debian(old, Kind::Sources);
        assert!(
            taken.lines().count() == 2 && taken.lines().all(|line| line.starts_with("deb-src ")),
            "{taken}"
        );
        let new = "Types: deb deb-src\nURIs: http://deb.debian.org/debian\nSuites: bookworm\nArchitectures: amd64\n\
                   Signed-By: /k.gpg\n\nTypes: deb\nURIs: https://apt.example/debian-tools\nSuites: x\n\n\
                   Enabled: no\nTypes: deb\nURIs: http://deb.debian.org/debian\nSuites: sid\n";
        let taken = stanzas_of_debian(new, Kind::Packages("i386"));
        assert!(taken.contains("Suites: bookworm\nSigned-By: /k.gpg\n"), "{taken}");
        assert_eq!(taken.matches("Types").count(), 1, "{taken}");
        for kind in [Kind::Packages("i386"), Kind::Sources] {
            let taken = stanzas_of_debian(new, kind);
            assert!(taken.starts_with(&format!("Types: {}\n", kind.name())), "{taken}");
            let own = debian_source(kind);
            assert_eq!(
                stanzas_of_debian(&debian_source(Kind::Packages("i386")), kind).trim(),
                own.trim()
            );
        }
    }

    #[test]
    fn bookworm_comes_to_other_releases() {
        let kind = Kind::Packages("i386");
        let of = |suite: &str| {
            vec![("a.sources".to_owned(), debian_source(kind).replace("bookworm", suite))]
        };
        assert_eq!(with_bookworm(of("bookworm"), kind), of("bookworm"));
        let [.., (_, added)] = &with_bookworm(of("trixie"), kind)[..] else { panic!("no source") };
        assert_eq!(*added, debian_source(kind));
        assert_eq!(with_bookworm(Vec::new(), kind).len(), 1);
    }

    #[test]
    fn versions_are_listed_newest_first_and_packages_are_not_sources() {
        let text = "       xen | 4.17.7+13-1 | http://a bookworm-security/main Sources\n\
                    xen | 4.17.5+72-1 | http://a bookworm/main Sources\n\
                    xen | 4.17.5+72-1 | http://b bookworm/main Sources\n\
                    xen | 4.17.5+72-2 | http://b bookworm/main amd64 Packages\n";
        assert_eq!(Kind::Sources.versions(text), ["4.17.7+13-1", "4.17.5+72-1"]);
        assert_eq!(Kind::Packages("amd64").versions(text), ["4.17.5+72-2"]);
        assert!(Kind::Sources.versions("N: Unable to locate package xen\n").is_empty());
    }

    #[test]
    fn the_metapackage_names_the_kernel() {
        let text = "linux-image-686\n  Depends: linux-image-6.1.0-50-686\n";
        assert_eq!(dependency(text).as_deref(), Some("linux-image-6.1.0-50-686"));
        assert_eq!(dependency("linux-image-686\n  Depends: libc6\n"), None);
    }

    #[test]
    fn a_file_is_found_in_an_archive_and_a_cut_one_is_an_error() -> Result<()> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, bytes) in [("./etc/boot/vmlinuz-1", "not this"), ("./boot/vmlinuz-2", "this")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_cksum();
            builder.append_data(&mut header, name, bytes.as_bytes())?;
        }
        let archive = builder.into_inner()?;
        let member = |archive: &[u8], start, end: &str| -> Result<Option<Vec<u8>>> {
            Ok(members(archive, &[Member { start, end: end.to_owned(), name: "" }])?.remove(0))
        };
        assert_eq!(member(&archive, "boot/vmlinuz-", "")?.as_deref(), Some(&b"this"[..]));
        assert_eq!(member(&archive, "etc/", "/vmlinuz-1")?.as_deref(), Some(&b"not this"[..]));
        assert_eq!(member(&archive, "boot/other", "")?, None);
        assert!(member(&archive[..1024 + 512 + 1], "boot/vmlinuz-", "").is_err());
        assert!(member(&archive[..100], "boot/vmlinuz-", "").is_err());
        Ok(())
    }
}
