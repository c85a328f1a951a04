//! `cargo xtask setup`.

use crate::build::{Tools, shown};
use crate::debian::{self, Flavour};
use crate::linux::vmi;
use crate::setup::{
    Archive, Facts, Family, Plan, Privilege, Rustup, Simulation, apt_command, by_rustup,
    os_release_field, plan, update_command,
};
use crate::table::{BAD, Cell, DIM, GOOD, PLAIN, Table};
use crate::toolchain::{Findings, Need, Refusal, find_program, output};
use crate::xen::source::{self, Build, Xen};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::process::{Command, ExitCode, Stdio};

/// Finds the compilers, the linker, QEMU and GRUB, and installs what is missing.
///
/// On Debian and Ubuntu, as root or with sudo, it installs packages; elsewhere it prints the
/// commands. It removes no package, edits no package source and lets rustup download nothing.
/// `build`, `run`, `iso` and `test` do the same by themselves.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show what would be installed, and install nothing.
    #[arg(long)]
    dry_run: bool,
    /// Only say what is there; fail if something is missing.
    #[arg(long, conflicts_with = "dry_run")]
    check: bool,
    /// Fetch Debian's 32-bit Linux kernels too, for guests: about 100 MB, into `target/linux`, with apt. They are not installed.
    #[arg(long, conflicts_with_all = ["dry_run", "check"])]
    linux: bool,
    /// Build a current Linux with a client of VMI too, from Debian's package of its source, into `target/linux`: in three flavours, each of
    /// them about four minutes on two processors. It is not installed.
    #[arg(long, conflicts_with_all = ["dry_run", "check"])]
    linux_vmi: bool,
    /// Fetch a 64-bit kernel of Debian's with KVM too, the host of `run --on kvm`: about 30 MB, into `target/linux`. It is not installed.
    #[arg(long, conflicts_with_all = ["dry_run", "check"])]
    kvm: bool,
    /// Build Xen too, with 32-bit guests, from Debian's source package, into `target/xen`: two to four minutes. It is not installed.
    #[arg(
        long,
        value_enum,
        value_name = "BUILD",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "release"
    )]
    #[arg(conflicts_with_all = ["dry_run", "check"])]
    xen: Option<Build>,
}

/// Sets up.
///
/// # Errors
///
/// Something is missing and cannot be installed here.
pub fn run(args: &Args) -> Result<ExitCode> {
    let findings = Findings::gather();
    anstream::print!("{}", table(&findings));
    let missing = findings.missing(Need::TEST);
    if missing.is_empty() {
        anstream::println!("nothing is missing");
        return guests_and_hosts(args);
    }
    let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
    anstream::println!("missing: {}", names.join("; "));
    if args.check {
        return Ok(ExitCode::FAILURE);
    }
    install(&findings, missing, args.dry_run)?;
    if !args.dry_run {
        anstream::print!("{}", table(&confirmed(Need::TEST)?));
    }
    guests_and_hosts(args)
}

/// Fetches and builds the kernels and Xen if they are wanted.
fn guests_and_hosts(args: &Args) -> Result<ExitCode> {
    let wanted = [(args.linux, &Flavour::GUESTS[..]), (args.kvm, &[Flavour::CloudAmd64])];
    for (_, flavours) in wanted.into_iter().filter(|(is_wanted, _)| *is_wanted) {
        debian::fetch(flavours)?;
        for flavour in flavours {
            anstream::println!("{}", shown(&debian::kernel(*flavour)?));
        }
    }
    if args.linux_vmi {
        linux_vmi()?;
        for flavour in vmi::Flavour::ALL {
            let kernel = flavour.kernel()?;
            anstream::println!("{}, Linux {}", shown(&kernel.path), kernel.version);
        }
    }
    if let Some(build) = args.xen {
        let xen = self::xen(build)?;
        anstream::println!("{}, Xen {}", shown(&xen.path), xen.version);
    }
    Ok(ExitCode::SUCCESS)
}

/// The Xen that was built, or else builds it, with all that is needed for that.
///
/// # Errors
///
/// It cannot be got or built here.
pub fn xen(build: Build) -> Result<Xen> {
    if let Some(xen) = source::built(build) {
        return Ok(xen);
    }
    provide(Need::XEN)?;
    source::provide(build)
}

/// Builds the kernels with a client of VMI that were not, with all that is needed for that.
///
/// # Errors
///
/// They cannot be got or built here.
pub fn linux_vmi() -> Result<()> {
    if vmi::Flavour::ALL.iter().any(|flavour| flavour.built().is_none()) {
        provide(Need::LINUX)?;
    }
    vmi::provide()
}

/// Finds what `needs` asks for, and installs what is missing.
///
/// # Errors
///
/// Something is missing and cannot be installed here.
pub fn provide(needs: &[Need]) -> Result<Findings> {
    let findings = Findings::gather();
    let missing = findings.missing(needs);
    if missing.is_empty() {
        return Ok(findings);
    }
    anstream::eprint!("{}", table(&findings));
    install(&findings, missing, false)?;
    confirmed(needs)
}

/// Looks again, now that everything was installed.
fn confirmed(needs: &[Need]) -> Result<Findings> {
    let findings = Findings::gather();
    let missing = findings.missing(needs);
    if !missing.is_empty() {
        let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
        bail!("installed, and still missing: {}\n{}", names.join("; "), table(&findings));
    }
    Ok(findings)
}

/// What was found, and what was looked at.
fn table(findings: &Findings) -> String {
    use crate::table::Align::Left;
    let mut table = Table::new(&[Left, Left, Left]);
    let mut chosen = Tools::from_findings(findings)
        .ok()
        .map(|tools| tools.compiler)
        .or(findings.compiler().cloned());
    for candidate in &findings.compilers {
        let what = format!("compiler: {}", candidate.origin);
        match &candidate.verdict {
            Ok(compiler) if chosen.as_ref() == Some(compiler) => {
                table.row([Cell::new("yes", GOOD), what.into(), compiler.to_string().into()]);
                chosen = None;
            }
            Ok(compiler) => {
                table.row([Cell::new("spare", DIM), what.into(), compiler.to_string().into()])
            }
            Err(reason) => {
                table.row([Cell::new("no", PLAIN), what.into(), reason.to_string().into()])
            }
        }
    }
    let mut single = |what: &str, found: Result<String, String>| match found {
        Ok(text) => table.row([Cell::new("yes", GOOD), what.into(), text.into()]),
        Err(reason) => table.row([Cell::new("no", BAD), what.into(), reason.into()]),
    };
    single("linker", findings.linker.as_ref().map(ToString::to_string).map_err(Clone::clone));
    single("emulator", findings.emulator.as_ref().map(ToString::to_string).map_err(Clone::clone));
    single("gcc", findings.gcc.as_ref().map(ToString::to_string).map_err(Clone::clone));
    single("clang", findings.clang.as_ref().map(ToString::to_string).map_err(Clone::clone));
    single("discs", findings.iso_maker.as_ref().map(ToString::to_string).map_err(Clone::clone));
    // Only their own builds want them.
    for (what, found) in
        [("Xen's tools", &findings.xen_tools), ("Linux's tools", &findings.linux_tools)]
    {
        if let Err(reason) = found {
            table.row([Cell::new("no", PLAIN), what.into(), reason.clone().into()]);
        }
    }
    table.render()
}

/// Installs what is missing, or says how.
fn install(findings: &Findings, missing: Vec<Need>, dry_run: bool) -> Result<()> {
    let mut facts = Facts {
        missing,
        family: family(),
        is_x86: cfg!(any(target_arch = "x86", target_arch = "x86_64")),
        privilege: privilege(),
        rustup: rustup(findings),
        archive: Archive::default(),
    };
    if facts.family == Family::Debian {
        // A new machine knows no package until it has asked. A dry run changes nothing, lists included.
        if !dry_run && facts.privilege != Privilege::None {
            update(facts.privilege);
        }
        facts.archive = archive();
    }
    if dry_run
        && facts.family == Family::Debian
        && facts.privilege != Privilege::None
        && !facts.archive.is_known()
    {
        anstream::println!(
            "apt has no package lists; this would be done first, and decide what is installed:\n  {}",
            update_command(facts.privilege)
        );
        return Ok(());
    }
    match plan(&facts) {
        Plan::Nothing => Ok(()),
        Plan::ByHand { reason, commands } => for_the_user(&reason, &[commands], dry_run),
        Plan::Apt(attempts) if facts.privilege == Privilege::None => {
            let commands = |attempts: &[Vec<String>]| -> Result<[String; 2]> {
                let (arguments, _) = choose(attempts, facts.privilege)?;
                Ok([update_command(facts.privilege), apt_command(arguments, facts.privilege)])
            };
            let mut ways = Vec::new();
            if let Some((mut way, rest)) = by_rustup(&facts) {
                if let Plan::Apt(attempts) = plan(&rest) {
                    way.extend(commands(&attempts)?);
                }
                ways.push(way);
            }
            ways.push(commands(&attempts)?.to_vec());
            for_the_user("neither root nor sudo is at hand", &ways, dry_run)
        }
        Plan::Apt(attempts) => apt(&attempts, facts.privilege, dry_run),
    }
}

/// Stops with what the user would have to type: one way or another.
fn for_the_user(reason: &str, ways: &[Vec<String>], dry_run: bool) -> Result<()> {
    let ways: Vec<String> = ways
        .iter()
        .map(|commands| commands.iter().map(|command| format!("\n  {command}")).collect())
        .collect();
    let ways = ways.join("\nor this:");
    if dry_run {
        anstream::println!("{reason}; this would be for you to do:{ways}");
        return Ok(());
    }
    bail!("{reason}; do this, then try again:{ways}");
}

/// The first list of arguments whose simulation removes nothing, and what it would do.
fn choose(attempts: &[Vec<String>], privilege: Privilege) -> Result<(&[String], Simulation)> {
    let mut refused = String::new();
    for arguments in attempts {
        let command = apt_command(arguments, privilege);
        let simulated = output(
            english("apt-get")
                .args(["--simulate", "--yes", "--no-install-recommends", "install"])
                .args(arguments),
        );
        let simulation = match simulated {
            Ok(text) => Simulation::parse(&text),
            Err(reason) => {
                refused.push_str(&format!("\n  {command}\n    {}", reason.replace('\n', "\n    ")));
                continue;
            }
        };
        if !simulation.removals.is_empty() {
            refused.push_str(&format!(
                "\n  {command}\n    would remove {}",
                simulation.removals.join(", ")
            ));
            continue;
        }
        return Ok((arguments, simulation));
    }
    bail!("no way was found that removes no package:{refused}");
}

/// Installs by the first list of arguments whose simulation removes nothing.
fn apt(attempts: &[Vec<String>], privilege: Privilege, dry_run: bool) -> Result<()> {
    let (arguments, simulation) = choose(attempts, privilege)?;
    let command = apt_command(arguments, privilege);
    anstream::eprintln!("{command}");
    for (verb, packages) in [("installs", &simulation.installs), ("replaces", &simulation.replaces)]
    {
        if !packages.is_empty() {
            anstream::eprintln!("  {verb} {}", packages.join(", "));
        }
    }
    if dry_run {
        return Ok(());
    }
    let mut install = privileged(privilege);
    // `--no-remove` makes apt itself stop, should anything have changed since the simulation.
    install
        .args(["apt-get", "--quiet", "--yes", "--no-install-recommends", "--no-remove", "install"])
        .args(arguments);
    let status = install
        .stdout(Stdio::from(std::io::stderr()))
        .status()
        .context("apt-get does not start")?;
    if !status.success() {
        bail!("`{command}` failed ({status})");
    }
    Ok(())
}

/// A command run as root.
fn privileged(privilege: Privilege) -> Command {
    let mut words = privilege.prefix().to_vec();
    // sudo clears the environment, so the variable travels as an argument.
    words.extend(["env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"]);
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
}

/// Reads the package lists anew. A source that does not answer is no reason to stop: the simulation will tell.
fn update(privilege: Privilege) {
    anstream::eprintln!("{}", update_command(privilege));
    let status = privileged(privilege)
        .args(["apt-get", "--quiet", "--quiet", "update"])
        .stdout(Stdio::from(std::io::stderr()))
        .status();
    if !status.is_ok_and(|status| status.success()) {
        anstream::eprintln!(
            "apt-get update did not go through; going on with the lists that are there"
        );
    }
}

/// A command whose output is in English, to be read by this program.
fn english(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C");
    command
}

/// What the package archive offers. What cannot be asked is not there.
fn archive() -> Archive {
    let ask = |arguments: &[&str]| output(english("apt-cache").args(arguments)).unwrap_or_default();
    let versioned = ask(&["pkgnames", "rustc-1"]);
    let mut names: Vec<String> = [
        "rustc-web",
        "cargo-web",
        "rust-web-src",
        "rust-web-clippy",
        "rustc",
        "cargo",
        "rust-src",
        "rust-clippy",
        "binutils",
        "gcc",
        "g++",
        "clang",
        "flex",
        "qemu-system-x86",
        "qemu-utils",
    ]
    .map(str::to_owned)
    .to_vec();
    for suffix in versioned.lines().filter_map(|name| name.strip_prefix("rustc-")) {
        names.extend([
            format!("rustc-{suffix}"),
            format!("cargo-{suffix}"),
            format!("rust-{suffix}-src"),
            format!("rust-{suffix}-clippy"),
        ]);
    }
    let mut policy = vec!["policy"];
    policy.extend(names.iter().map(String::as_str));
    let packages: BTreeMap<_, _> = Archive::packages_from_policy(&ask(&policy));
    let codename = os_release_field(&os_release(), "VERSION_CODENAME").concat();
    Archive {
        packages,
        emulator_pairs: Archive::pairs_from_madison(&ask(&[
            "madison",
            "qemu-system-x86",
            "qemu-utils",
        ])),
        backports: Archive::backports_from_policy(&ask(&["policy"]), &codename),
    }
}

fn os_release() -> String {
    ["/etc/os-release", "/usr/lib/os-release"]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok())
        .unwrap_or_default()
}

fn family() -> Family {
    if cfg!(target_os = "macos") { Family::Mac } else { Family::from_os_release(&os_release()) }
}

fn rustup(findings: &Findings) -> Rustup {
    if find_program("rustup").is_none() {
        return Rustup::None;
    }
    // The system's own compiler is not rustup's to extend.
    let lacks_source = findings.compilers.iter().any(|candidate| {
        matches!(&candidate.verdict, Err(Refusal::WithoutSource { sysroot, .. }) if !sysroot.starts_with("/usr"))
    });
    if lacks_source { Rustup::WithoutSource } else { Rustup::Old }
}

fn privilege() -> Privilege {
    if output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0") {
        return Privilege::Root;
    }
    if find_program("sudo").is_none() {
        return Privilege::None;
    }
    let is_free = Command::new("sudo")
        .args(["-n", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    match (is_free, std::io::stdin().is_terminal()) {
        (true, _) => Privilege::Sudo,
        (false, true) => Privilege::SudoAsks,
        (false, false) => Privilege::None,
    }
}
