//! Decides how to get what is missing.
//!
//! Everything here is a function of facts that the caller gathered, so every machine that we do not
//! have can be a test. The rules: no package is ever removed, the system's package sources are not
//! touched, and rustup is told to download nothing: it is the user who types that command.

use crate::toolchain::{Need, OLDEST, Version};
use std::collections::BTreeMap;

/// A family of systems with one way of installing packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Debian, Ubuntu and what is made from them.
    Debian,
    /// Fedora and its relatives.
    Fedora,
    /// Arch Linux and its relatives.
    Arch,
    /// openSUSE.
    Suse,
    /// macOS with Homebrew.
    Mac,
    /// Anything else.
    Other,
}

impl Family {
    /// The family from the text of `/etc/os-release`.
    #[must_use]
    pub fn from_os_release(text: &str) -> Self {
        let names = [os_release_field(text, "ID"), os_release_field(text, "ID_LIKE")].concat();
        let is_one_of = |wanted: &[&str]| names.iter().any(|name| wanted.contains(&name.as_str()));
        if is_one_of(&["debian", "ubuntu"]) {
            Self::Debian
        } else if is_one_of(&["fedora", "rhel", "centos"]) {
            Self::Fedora
        } else if is_one_of(&["arch"]) {
            Self::Arch
        } else if is_one_of(&["suse", "opensuse"]) {
            Self::Suse
        } else {
            Self::Other
        }
    }
}

/// The words of a field of `/etc/os-release`.
#[must_use]
pub fn os_release_field(text: &str, key: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .filter(|(name, _)| *name == key)
        .flat_map(|(_, value)| value.trim_matches(['"', '\'']).split_whitespace())
        .map(str::to_owned)
        .collect()
}

/// How this process may install packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// It is root.
    Root,
    /// By sudo, without a question.
    Sudo,
    /// By sudo, which asks for a password on the terminal.
    SudoAsks,
    /// Not at all.
    None,
}

impl Privilege {
    /// What goes in front of a command.
    #[must_use]
    pub const fn prefix(self) -> &'static [&'static str] {
        match self {
            Self::Root => &[],
            Self::Sudo => &["sudo", "-n"],
            Self::SudoAsks | Self::None => &["sudo"],
        }
    }
}

/// What rustup can do for a compiler with its library's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rustup {
    /// It is not there.
    None,
    /// Its compilers are too old.
    Old,
    /// Its compiler would do, if the source were there.
    WithoutSource,
}

/// What the package archive offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Archive {
    /// Packages by name, from `apt-cache policy NAME...`.
    pub packages: BTreeMap<String, Package>,
    /// Versions of qemu-system-x86 for which qemu-utils is there too, the best first.
    pub emulator_pairs: Vec<String>,
    /// The backports suite, if the system's sources have it.
    pub backports: Option<String>,
}

/// A package of the archive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Package {
    /// The installed version.
    pub installed: Option<String>,
    /// The version that an installation would take.
    pub candidate: Option<String>,
}

impl Archive {
    /// Reads the output of `apt-cache policy NAME...`.
    #[must_use]
    pub fn packages_from_policy(text: &str) -> BTreeMap<String, Package> {
        let mut packages = BTreeMap::new();
        let mut current: Option<&str> = None;
        for line in text.lines() {
            if let Some(name) = line.strip_suffix(':').filter(|name| !name.starts_with(' ')) {
                current = Some(name);
                packages.insert(name.to_owned(), Package::default());
            } else if let (Some((key, value)), Some(package)) =
                (line.trim().split_once(": "), current.and_then(|name| packages.get_mut(name)))
            {
                let value = Some(value.trim().to_owned()).filter(|value| value != "(none)");
                match key {
                    "Installed" => package.installed = value,
                    "Candidate" => package.candidate = value,
                    _ => {}
                }
            }
        }
        packages
    }

    /// Versions that both packages have, from the output of `apt-cache madison qemu-system-x86 qemu-utils`.
    #[must_use]
    pub fn pairs_from_madison(text: &str) -> Vec<String> {
        let versions = |wanted: &str| -> Vec<&str> {
            text.lines()
                .filter_map(|line| {
                    let mut fields = line.split('|').map(str::trim);
                    (fields.next() == Some(wanted)).then(|| fields.next()).flatten()
                })
                .collect()
        };
        let others = versions("qemu-utils");
        versions("qemu-system-x86")
            .into_iter()
            .filter(|version| others.contains(version))
            .map(str::to_owned)
            .collect()
    }

    /// The suite, if the output of `apt-cache policy` lists it among the sources.
    #[must_use]
    pub fn backports_from_policy(text: &str, codename: &str) -> Option<String> {
        let suite = format!("{codename}-backports");
        let names = |line: &str| {
            line.split([',', ' '])
                .any(|field| field.strip_prefix("n=").is_some_and(|name| name == suite))
        };
        text.lines().any(names).then_some(suite)
    }

    /// Whether the package lists are there: without them apt knows what is installed and nothing else.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.packages
            .values()
            .any(|package| package.candidate.is_some() && package.candidate != package.installed)
    }

    fn candidate(&self, name: &str) -> Option<&str> {
        self.packages.get(name)?.candidate.as_deref()
    }

    /// The packages that give a compiler with its source and its lints, each way of getting one.
    fn compilers(&self) -> Vec<[String; 4]> {
        let mut sets = vec![
            ["rustc-web", "cargo-web", "rust-web-src", "rust-web-clippy"].map(str::to_owned),
            ["rustc", "cargo", "rust-src", "rust-clippy"].map(str::to_owned),
        ];
        // Ubuntu's versioned packages: the newest that is whole.
        let mut versioned: Vec<(Version, &str)> = self
            .packages
            .keys()
            .filter_map(|name| name.strip_prefix("rustc-"))
            .filter_map(|suffix| Some((Version::parse(suffix)?, suffix)))
            .collect();
        versioned.sort();
        sets.extend(versioned.iter().rev().map(|(_, suffix)| {
            [
                format!("rustc-{suffix}"),
                format!("cargo-{suffix}"),
                format!("rust-{suffix}-src"),
                format!("rust-{suffix}-clippy"),
            ]
        }));
        let will_do = |name: &String| {
            self.candidate(name)
                .map(|version| version.split_once(':').map_or(version, |(_, version)| version))
                .and_then(Version::parse)
                .is_some_and(|version| version >= OLDEST)
        };
        sets.retain(|set| set.iter().all(will_do));
        sets.truncate(3);
        sets
    }
}

/// What decides how to get what is missing.
#[derive(Clone, Debug)]
pub struct Facts {
    /// What is missing.
    pub missing: Vec<Need>,
    /// The system.
    pub family: Family,
    /// Whether its processor is an x86, so that its own linker is the right one.
    pub is_x86: bool,
    /// How packages may be installed.
    pub privilege: Privilege,
    /// What rustup can do.
    pub rustup: Rustup,
    /// What the archive offers; empty but on Debian's family.
    pub archive: Archive,
}

/// How to get what is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing is.
    Nothing,
    /// By `apt-get install` with the first of these lists of arguments whose simulation removes nothing.
    Apt(Vec<Vec<String>>),
    /// Only the user can.
    ByHand {
        /// Why.
        reason: String,
        /// What to type.
        commands: Vec<String>,
    },
}

/// How to get what is missing.
#[must_use]
pub fn plan(facts: &Facts) -> Plan {
    if facts.missing.is_empty() {
        return Plan::Nothing;
    }
    if facts.family != Family::Debian {
        return by_hand(facts, "this system's packages are not installed by this program");
    }
    if !facts.archive.is_known() {
        return by_hand(facts, "apt has no package lists");
    }
    let compilers = facts.archive.compilers();
    if facts.missing.contains(&Need::Compiler) && compilers.is_empty() {
        return by_hand(
            facts,
            &format!("the package archive has no Rust compiler from {OLDEST} on with its source"),
        );
    }
    Plan::Apt(attempts(facts, &compilers))
}

/// What the user would tell rustup if a compiler is missing, and what is to be got besides.
#[must_use]
pub fn by_rustup(facts: &Facts) -> Option<(Vec<String>, Facts)> {
    if facts.rustup == Rustup::None || !facts.missing.contains(&Need::Compiler) {
        return None;
    }
    let mut rest = facts.clone();
    rest.missing.retain(|need| *need != Need::Compiler);
    Some((rustup_commands(facts.rustup), rest))
}

/// How a compiler gets its source from rustup. One that is new enough stays as it is.
fn rustup_commands(rustup: Rustup) -> Vec<String> {
    let update = (rustup != Rustup::WithoutSource).then_some("rustup update stable");
    update.into_iter().chain(["rustup component add rust-src"]).map(str::to_owned).collect()
}

/// Debian's packages for discs. None of them touches the machine's own boot loader: grub-pc would.
const ISO_PACKAGES: [&str; 3] = ["grub-common", "grub-pc-bin", "xorriso"];

/// The packages of what is missing of the programs that are wanted by their names, each of them once.
fn program_packages(facts: &Facts) -> Vec<&'static str> {
    let mut packages = Vec::new();
    for program in facts.missing.iter().flat_map(|need| need.programs()) {
        let package = match (*program, facts.family) {
            ("xz", Family::Debian | Family::Other) => "xz-utils",
            ("python3", Family::Arch) => "python",
            ("dpkg-source", Family::Debian | Family::Fedora | Family::Other) => "dpkg-dev",
            ("dpkg-source" | "dpkg-deb", _) => "dpkg",
            (program, _) => program,
        };
        if !packages.contains(&package) {
            packages.push(package);
        }
    }
    packages
}

/// Lists of arguments for `apt-get install`, the preferred one first; never empty.
fn attempts(facts: &Facts, compilers: &[[String; 4]]) -> Vec<Vec<String>> {
    let needs = |need| facts.missing.contains(&need);
    let no_compiler = [];
    let compilers: Vec<&[String]> = if needs(Need::Compiler) {
        compilers.iter().map(|set| &set[..]).collect()
    } else {
        vec![&no_compiler]
    };

    let mut emulators: Vec<Vec<String>> = vec![vec![]];
    if needs(Need::Emulator) {
        emulators = vec![vec!["qemu-system-x86".into()]];
        if let Some(suite) = &facts.archive.backports {
            emulators.push(vec!["-t".into(), suite.clone(), "qemu-system-x86".into()]);
        }
        // QEMU's packages want each other in one version. Where the installed one is gone from the
        // archive, the pair that is there takes its place.
        if facts
            .archive
            .packages
            .get("qemu-utils")
            .is_some_and(|package| package.installed.is_some())
        {
            emulators.extend(facts.archive.emulator_pairs.iter().map(|version| {
                vec![
                    "--allow-downgrades".into(),
                    format!("qemu-system-x86={version}"),
                    format!("qemu-utils={version}"),
                ]
            }));
        }
    }

    let mut attempts = Vec::new();
    for compiler in compilers {
        for emulator in &emulators {
            let mut arguments = emulator.clone();
            arguments.extend(compiler.iter().cloned());
            if needs(Need::Linker) {
                arguments.push(if facts.is_x86 {
                    "binutils".into()
                } else {
                    "binutils-x86-64-linux-gnu".into()
                });
            }
            if needs(Need::Gcc) {
                let names = if facts.is_x86 {
                    ["gcc", "g++"]
                } else {
                    ["gcc-x86-64-linux-gnu", "g++-x86-64-linux-gnu"]
                };
                arguments.extend(names.map(str::to_owned));
            }
            if needs(Need::Clang) {
                arguments.push("clang".into());
            }
            if needs(Need::IsoMaker) {
                arguments.extend(ISO_PACKAGES.map(str::to_owned));
            }
            arguments.extend(program_packages(facts).into_iter().map(str::to_owned));
            attempts.push(arguments);
        }
    }
    attempts
}

/// Reading the package lists as the user would type it.
#[must_use]
pub fn update_command(privilege: Privilege) -> String {
    [privilege.prefix(), &["apt-get", "update"]].concat().join(" ")
}

/// An installation as the user would type it.
#[must_use]
pub fn apt_command(arguments: &[String], privilege: Privilege) -> String {
    let mut words: Vec<&str> = privilege.prefix().to_vec();
    words.extend(["apt-get", "install", "--no-install-recommends", "--no-remove"]);
    words.extend(arguments.iter().map(String::as_str));
    words.join(" ")
}

/// The commands for systems whose packages we do not install.
fn by_hand(facts: &Facts, reason: &str) -> Plan {
    let has_rustup = facts.rustup != Rustup::None;
    let mut commands = Vec::new();
    let mut packages: Vec<&str> = Vec::new();
    for need in &facts.missing {
        match (need, facts.family) {
            (Need::Compiler, Family::Fedora) if !has_rustup => {
                packages.extend(["rust", "cargo", "rust-src"])
            }
            (Need::Compiler, Family::Arch) if !has_rustup => packages.extend(["rust", "rust-src"]),
            // What the archive has shows when the lists are read.
            (Need::Compiler, Family::Debian) if !has_rustup && !facts.archive.is_known() => {}
            (Need::Compiler, family) => {
                if !has_rustup {
                    commands.push(match family {
                        Family::Mac => "brew install rustup".to_owned(),
                        _ => "(install rustup: https://rustup.rs)".to_owned(),
                    });
                }
                commands.extend(rustup_commands(facts.rustup));
            }
            (Need::Linker, Family::Mac) => packages.push("x86_64-elf-binutils"),
            (Need::Linker, Family::Debian | Family::Fedora) if !facts.is_x86 => {
                packages.push(match facts.family {
                    Family::Debian => "binutils-x86-64-linux-gnu",
                    _ => "binutils-x86_64-linux-gnu",
                })
            }
            (Need::Linker, _) => packages.push("binutils"),
            (Need::Emulator, Family::Mac) => packages.push("qemu"),
            (Need::Emulator, Family::Suse) => packages.push("qemu-x86"),
            (Need::Emulator, _) => packages.push("qemu-system-x86"),
            (Need::Gcc, Family::Mac) => packages.push("x86_64-elf-gcc"),
            (Need::Gcc, Family::Debian) if !facts.is_x86 => {
                packages.extend(["gcc-x86-64-linux-gnu", "g++-x86-64-linux-gnu"])
            }
            (Need::Gcc, Family::Fedora) if !facts.is_x86 => {
                packages.extend(["gcc-x86_64-linux-gnu", "gcc-c++-x86_64-linux-gnu"])
            }
            (Need::Gcc, Family::Debian | Family::Other) => packages.extend(["gcc", "g++"]),
            (Need::Gcc, Family::Fedora | Family::Suse) => packages.extend(["gcc", "gcc-c++"]),
            (Need::Gcc, Family::Arch) => packages.push("gcc"),
            (Need::Clang, Family::Mac) => packages.push("llvm"),
            (Need::Clang, _) => packages.push("clang"),
            (Need::IsoMaker, Family::Fedora) => {
                packages.extend(["grub2-tools-extra", "grub2-pc-modules", "xorriso"])
            }
            (Need::IsoMaker, Family::Arch) => packages.extend(["grub", "libisoburn"]),
            (Need::IsoMaker, Family::Suse) => {
                packages.extend(["grub2", "grub2-i386-pc", "xorriso"])
            }
            (Need::IsoMaker, Family::Mac) => packages.extend(["i686-elf-grub", "xorriso"]),
            (Need::IsoMaker, _) => packages.extend(ISO_PACKAGES),
            (Need::XenTools | Need::LinuxTools, _) => {}
        }
    }
    packages.extend(program_packages(facts));
    if facts.family == Family::Debian {
        if !packages.is_empty() || !facts.archive.is_known() {
            commands.push(update_command(facts.privilege));
        }
        if !packages.is_empty() {
            let packages: Vec<String> = packages.into_iter().map(str::to_owned).collect();
            commands.push(apt_command(&packages, facts.privilege));
        }
    } else if !packages.is_empty() {
        let installer = match facts.family {
            Family::Fedora => "sudo dnf install",
            Family::Arch => "sudo pacman -S --needed",
            Family::Suse => "sudo zypper install",
            Family::Mac => "brew install",
            Family::Debian | Family::Other => "(with your system's package manager) install",
        };
        commands.push(format!("{installer} {}", packages.join(" ")));
    }
    Plan::ByHand { reason: reason.into(), commands }
}

/// What an installation would do, from the output of `apt-get -s install`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Simulation {
    /// Packages that would come, with their versions.
    pub installs: Vec<String>,
    /// Packages that are there and would get another version, with both.
    pub replaces: Vec<String>,
    /// Packages that would go.
    pub removals: Vec<String>,
}

impl Simulation {
    /// Reads the output.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut simulation = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("Inst"), Some(name)) => {
                    let version = line
                        .split_once('(')
                        .and_then(|(_, rest)| rest.split_whitespace().next())
                        .unwrap_or_default();
                    match words.next().and_then(|word| word.strip_prefix('[')) {
                        Some(old) => simulation
                            .replaces
                            .push(format!("{name} {} by {version}", old.trim_end_matches(']'))),
                        None => simulation
                            .installs
                            .push(format!("{name} {version}").trim_end().to_owned()),
                    }
                }
                (Some("Remv" | "Purg"), Some(name)) => simulation.removals.push(name.to_owned()),
                _ => {}
            }
        }
        simulation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(missing: &[Need], archive: Archive) -> Facts {
        Facts {
            missing: missing.to_vec(),
            family: Family::Debian,
            is_x86: true,
            privilege: Privilege::Root,
            rustup: Rustup::None,
            archive,
        }
    }

    fn archive(packages: &[(&str, &str)]) -> Archive {
        let package =
            |version: &&str| Package { installed: None, candidate: Some((*version).to_owned()) };
        Archive {
            packages: packages
                .iter()
                .map(|(name, version)| ((*name).to_owned(), package(version)))
                .collect(),
            ..Archive::default()
        }
    }

    fn lines(plan: &Plan) -> Vec<String> {
        match plan {
            Plan::Apt(attempts) => attempts.iter().map(|attempt| attempt.join(" ")).collect(),
            other => panic!("{other:?}"),
        }
    }

    const WEB: &[(&str, &str)] = &[
        ("rustc-web", "1.96.0+dfsg1-1~deb12u2"),
        ("cargo-web", "1.96.0+dfsg1-1~deb12u2"),
        ("rust-web-src", "1.96.0+dfsg1-1~deb12u2"),
        ("rust-web-clippy", "1.96.0+dfsg1-1~deb12u2"),
    ];

    #[test]
    fn nothing_missing_is_nothing_to_do() {
        assert_eq!(plan(&facts(&[], Archive::default())), Plan::Nothing);
    }

    #[test]
    fn debian_gets_the_web_pair_and_the_rest_in_one_go() {
        let plan = plan(&facts(Need::RUN, archive(WEB)));
        assert_eq!(
            lines(&plan),
            ["qemu-system-x86 rustc-web cargo-web rust-web-src rust-web-clippy binutils"]
        );
    }

    #[test]
    fn the_tests_need_a_maker_of_discs_too() {
        let plan = plan(&facts(&[Need::Linker, Need::IsoMaker], archive(WEB)));
        assert_eq!(lines(&plan), ["binutils grub-common grub-pc-bin xorriso"]);
    }

    #[test]
    fn an_old_compiler_in_the_archive_is_not_taken() {
        let old =
            [("rustc-web", "1.85.0+dfsg3-1"), ("cargo-web", "1.96.0"), ("rust-web-src", "1.96.0")];
        match plan(&facts(&[Need::Compiler], archive(&old))) {
            Plan::ByHand { reason, commands } => {
                assert!(reason.contains("1.90"), "{reason}");
                assert!(
                    commands.contains(&"rustup component add rust-src".to_owned()),
                    "{commands:?}"
                );
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ubuntu_gets_its_newest_versioned_compiler_that_is_whole() {
        let mut packages =
            vec![("rustc", "1.75.0+dfsg0ubuntu1"), ("cargo", "1.75.0"), ("rust-src", "1.75.0")];
        for (rustc, cargo, source, clippy, version) in [
            ("rustc-1.89", "cargo-1.89", "rust-1.89-src", "rust-1.89-clippy", "1.89.0"),
            (
                "rustc-1.91",
                "cargo-1.91",
                "rust-1.91-src",
                "rust-1.91-clippy",
                "1.91.1+dfsg-0ubuntu1",
            ),
            ("rustc-1.100", "cargo-1.100", "rust-1.100-src", "rust-1.100-clippy", "1.100.0"),
        ] {
            packages.extend([rustc, cargo, source, clippy].map(|name| (name, version)));
        }
        packages.push(("rustc-1.101", "1.101.0"));
        let plan = plan(&facts(&[Need::Compiler], archive(&packages)));
        assert_eq!(
            lines(&plan),
            [
                "rustc-1.100 cargo-1.100 rust-1.100-src rust-1.100-clippy",
                "rustc-1.91 cargo-1.91 rust-1.91-src rust-1.91-clippy"
            ]
        );
    }

    #[test]
    fn an_emulator_out_of_step_with_the_archive_is_tried_three_ways() {
        let mut archive = archive(&[("qemu-system-x86", "1:7.2")]);
        archive.backports = Some("bookworm-backports".into());
        archive.emulator_pairs = vec!["1:7.2+dfsg-7+deb12u18+b3".into()];
        archive.packages.insert(
            "qemu-utils".into(),
            Package { installed: Some("1:10.0.2".into()), candidate: None },
        );
        let plan = plan(&facts(&[Need::Emulator], archive));
        assert_eq!(
            lines(&plan),
            [
                "qemu-system-x86",
                "-t bookworm-backports qemu-system-x86",
                "--allow-downgrades qemu-system-x86=1:7.2+dfsg-7+deb12u18+b3 qemu-utils=1:7.2+dfsg-7+deb12u18+b3",
            ]
        );
    }

    #[test]
    fn packages_that_are_not_installed_are_never_downgraded() {
        let mut archive = archive(&[("qemu-system-x86", "1:7.2")]);
        archive.emulator_pairs = vec!["1:7.2".into()];
        assert_eq!(lines(&plan(&facts(&[Need::Emulator], archive))), ["qemu-system-x86"]);
    }

    #[test]
    fn without_package_lists_they_come_first() {
        let mut archive = Archive::default();
        // What apt then knows of an installed package is the package itself.
        let utils =
            Package { installed: Some("1:10.0.2".into()), candidate: Some("1:10.0.2".into()) };
        archive.packages.insert("qemu-utils".into(), utils);
        archive.packages.insert("rustc-web".into(), Package::default());
        for (rustup, wanted) in [
            (
                Rustup::WithoutSource,
                &[
                    "rustup component add rust-src",
                    "sudo apt-get update",
                    "sudo apt-get install --no-install-recommends --no-remove qemu-system-x86",
                ][..],
            ),
            (Rustup::None, &["sudo apt-get update"]),
        ] {
            let missing = if rustup == Rustup::None {
                vec![Need::Compiler]
            } else {
                vec![Need::Compiler, Need::Emulator]
            };
            let facts =
                Facts { privilege: Privilege::None, rustup, ..facts(&missing, archive.clone()) };
            match plan(&facts) {
                Plan::ByHand { reason, commands } => {
                    assert_eq!(commands, wanted);
                    assert!(reason.contains("lists"), "{reason}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn what_builds_xen_comes_when_it_is_asked_for() {
        let facts = facts(&[Need::XenTools], archive(WEB));
        assert_eq!(lines(&plan(&facts)), ["make flex bison python3 xz-utils dpkg-dev"]);
        assert!(!Need::TEST.contains(&Need::XenTools), "`setup` alone is not to want it");
        match plan(&Facts { family: Family::Fedora, ..facts }) {
            Plan::ByHand { commands, .. } => {
                assert_eq!(commands, ["sudo dnf install make flex bison python3 xz dpkg-dev"]);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_builds_linux_and_xen_comes_once() {
        let linux = facts(&[Need::LinuxTools], archive(WEB));
        assert_eq!(lines(&plan(&linux)), ["make flex bison bc patch xz-utils dpkg"]);
        assert!(!Need::TEST.contains(&Need::LinuxTools), "`setup` alone is not to want it");
        let both = facts(&[Need::XenTools, Need::LinuxTools], archive(WEB));
        match plan(&Facts { family: Family::Arch, ..both }) {
            Plan::ByHand { commands, .. } => {
                assert_eq!(
                    commands,
                    ["sudo pacman -S --needed make flex bison python xz dpkg bc patch"]
                );
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_user_may_ask_rustup_for_the_compiler() {
        let of = |rustup| Facts { rustup, ..facts(Need::RUN, archive(WEB)) };
        assert!(by_rustup(&of(Rustup::None)).is_none());
        let (commands, rest) = by_rustup(&of(Rustup::Old)).unwrap();
        assert_eq!(commands, ["rustup update stable", "rustup component add rust-src"]);
        assert_eq!(lines(&plan(&rest)), ["qemu-system-x86 binutils"]);
        let (commands, _) = by_rustup(&of(Rustup::WithoutSource)).unwrap();
        assert_eq!(commands, ["rustup component add rust-src"]);
    }

    #[test]
    fn other_systems_get_their_own_commands() {
        for (family, rustup, wanted) in [
            (
                Family::Fedora,
                Rustup::None,
                vec![
                    "sudo dnf install rust cargo rust-src binutils qemu-system-x86 gcc gcc-c++ clang grub2-tools-extra grub2-pc-modules xorriso",
                ],
            ),
            (
                Family::Arch,
                Rustup::None,
                vec![
                    "sudo pacman -S --needed rust rust-src binutils qemu-system-x86 gcc clang grub libisoburn",
                ],
            ),
            (
                Family::Suse,
                Rustup::Old,
                vec![
                    "rustup update stable",
                    "rustup component add rust-src",
                    "sudo zypper install binutils qemu-x86 gcc gcc-c++ clang grub2 grub2-i386-pc xorriso",
                ],
            ),
            (
                Family::Mac,
                Rustup::Old,
                vec![
                    "rustup update stable",
                    "rustup component add rust-src",
                    "brew install x86_64-elf-binutils qemu x86_64-elf-gcc llvm i686-elf-grub xorriso",
                ],
            ),
        ] {
            match plan(&Facts { family, rustup, ..facts(Need::TEST, Archive::default()) }) {
                Plan::ByHand { commands, .. } => assert_eq!(commands, wanted),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn another_processor_needs_a_cross_linker_and_a_cross_compiler() {
        let needs = [Need::Linker, Need::Gcc, Need::Clang];
        let facts = Facts { is_x86: false, ..facts(&needs, archive(WEB)) };
        assert_eq!(
            lines(&plan(&facts)),
            ["binutils-x86-64-linux-gnu gcc-x86-64-linux-gnu g++-x86-64-linux-gnu clang"]
        );
    }

    #[test]
    fn every_family_has_names_for_the_compilers_of_c() {
        let needs = [Need::Gcc, Need::Clang];
        assert_eq!(lines(&plan(&facts(&needs, archive(WEB)))), ["gcc g++ clang"]);
        for (family, wanted) in [
            (Family::Fedora, "sudo dnf install gcc gcc-c++ clang"),
            (Family::Arch, "sudo pacman -S --needed gcc clang"),
            (Family::Suse, "sudo zypper install gcc gcc-c++ clang"),
            (Family::Mac, "brew install x86_64-elf-gcc llvm"),
            (Family::Other, "(with your system's package manager) install gcc g++ clang"),
        ] {
            match plan(&Facts { family, ..facts(&needs, Archive::default()) }) {
                Plan::ByHand { commands, .. } => assert_eq!(commands, [wanted]),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn families_are_told_by_name_and_by_kinship() {
        for (text, family) in [
            ("ID=debian\n", Family::Debian),
            ("NAME=x\nID=linuxmint\nID_LIKE=\"ubuntu debian\"\n", Family::Debian),
            ("ID=\"opensuse-tumbleweed\"\nID_LIKE=\"opensuse suse\"\n", Family::Suse),
            ("ID=fedora\n", Family::Fedora),
            ("ID=manjaro\nID_LIKE=arch\n", Family::Arch),
            ("ID=nixos\n", Family::Other),
            ("", Family::Other),
        ] {
            assert_eq!(Family::from_os_release(text), family, "{text}");
        }
    }

    #[test]
    fn what_apt_says_is_understood() {
        let policy = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1\n  Version table:\n     1.96.0+dfsg1-1 500\nqemu-utils:\n  Installed: 1:10.0.2\n  Candidate: 1:10.0.2\n";
        let packages = Archive::packages_from_policy(policy);
        assert_eq!(
            packages["rustc-web"],
            Package { installed: None, candidate: Some("1.96.0+dfsg1-1".into()) }
        );
        assert_eq!(packages["qemu-utils"].installed.as_deref(), Some("1:10.0.2"));

        let madison = "qemu-system-x86 | 1:7.2+b3 | http://a bookworm/main amd64 Packages\nqemu-system-x86 | 1:7.1 | http://b\nqemu-utils | 1:7.2+b3 | http://a\n";
        assert_eq!(Archive::pairs_from_madison(madison), ["1:7.2+b3"]);

        let sources = " 500 http://a bookworm/main\n     release v=12,o=Debian,a=oldstable,n=bookworm,l=Debian\n";
        assert_eq!(Archive::backports_from_policy(sources, "bookworm"), None);
        let sources =
            "     release o=Debian Backports,a=stable-backports,n=bookworm-backports,l=x\n";
        assert_eq!(
            Archive::backports_from_policy(sources, "bookworm").as_deref(),
            Some("bookworm-backports")
        );
    }

    #[test]
    fn a_simulation_shows_what_would_come_and_go() {
        let text = "Remv qemu-utils [1:10.0.2]\nInst seabios (1.16.2-1 Debian:12.5/oldstable [all])\nInst qemu-system-x86 [1:6] (1:7.2 Debian:12 [amd64])\nConf seabios (1.16.2-1)\n";
        let simulation = Simulation::parse(text);
        assert_eq!(simulation.removals, ["qemu-utils"]);
        assert_eq!(simulation.installs, ["seabios 1.16.2-1"]);
        assert_eq!(simulation.replaces, ["qemu-system-x86 1:6 by 1:7.2"]);
    }
}
