//! Finds what builds, runs, discs and tests need: a compiler with its library's source, GNU ld, QEMU, GRUB,
//! and compilers for C and C++.
//!
//! Nothing is downloaded here, and nothing installed: [`crate::verbs::setup`] does that. rustup in
//! particular is asked only for the names of its toolchains, whose programs are then called by
//! their path: its proxies might fetch a toolchain that is missing.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The oldest compiler that builds the image: naked functions and `unsafe` attributes.
pub const OLDEST: Version = Version { major: 1, minor: 90, patch: 0 };

/// Where the core library's source lies under a compiler's sysroot.
const SOURCE: &str = "lib/rustlib/src/rust";

/// A compiler's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First part.
    pub major: u32,
    /// Second part.
    pub minor: u32,
    /// Third part.
    pub patch: u32,
}

impl Version {
    /// Reads `1.95.0`, `1.97.0-nightly` or `1.96.0+dfsg1-1`; missing parts are 0.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text
            .split(|c: char| !c.is_ascii_digit() && c != '.')
            .next()?
            .split('.')
            .map(str::parse);
        let mut part = || parts.next().transpose().ok();
        let major = part()??;
        Some(Self { major, minor: part()?.unwrap_or(0), patch: part()?.unwrap_or(0) })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// A compiler that can build the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiler {
    /// The `rustc` program.
    pub rustc: PathBuf,
    /// The `cargo` program that belongs to it.
    pub cargo: PathBuf,
    /// Its version.
    pub version: Version,
    /// Its sysroot.
    pub sysroot: PathBuf,
}

impl Compiler {
    /// Where its library's source lies.
    #[must_use]
    pub fn source(&self) -> PathBuf {
        self.sysroot.join(SOURCE)
    }

    /// Whether its cargo knows an unstable flag, as named in `cargo -Z help`.
    #[must_use]
    pub fn knows(&self, flag: &str) -> bool {
        output(Command::new(&self.cargo).args(["-Z", "help"]).env("RUSTC_BOOTSTRAP", "1"))
            .is_ok_and(|help| help.lines().any(|line| line.split_whitespace().nth(1) == Some(flag)))
    }

    /// Whether it brings clippy.
    #[must_use]
    pub fn has_clippy(&self) -> bool {
        self.cargo.with_file_name("cargo-clippy").is_file()
            && self.cargo.with_file_name("clippy-driver").is_file()
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rustc {} ({})", self.version, self.rustc.display())
    }
}

/// A compiler that was looked at.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Where the search came across it.
    pub origin: String,
    /// The compiler, or why it will not do.
    pub verdict: Result<Compiler, Refusal>,
}

/// Why a compiler will not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It would, if its library's source were there.
    WithoutSource {
        /// Its version.
        version: Version,
        /// Where the source should be.
        sysroot: PathBuf,
    },
    /// Anything else.
    Other(String),
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self::Other(reason)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WithoutSource { version, sysroot } => write!(
                f,
                "rustc {version} in {} is without its library's source",
                sysroot.display()
            ),
            Self::Other(reason) => f.write_str(reason),
        }
    }
}

/// A linker that can link the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linker {
    /// The program.
    pub path: PathBuf,
    /// The first line that it says about itself.
    pub version: String,
}

impl fmt::Display for Linker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.version, self.path.display())
    }
}

/// A machine emulator that can run the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emulator {
    /// The program.
    pub path: PathBuf,
    /// The first line that it says about itself.
    pub version: String,
}

impl fmt::Display for Emulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.version, self.path.display())
    }
}

/// A pair of compilers, for C and for C++, that compile for the bare 32-bit machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CCompilers {
    /// The compiler for C.
    pub c: PathBuf,
    /// The compiler for C++.
    pub cxx: PathBuf,
    /// What makes them compile for 32-bit x86.
    pub target: &'static str,
    /// The first line that the one for C says about itself.
    pub version: String,
}

impl CCompilers {
    /// A compiler of C for a machine without a library; the caller says what.
    #[must_use]
    pub fn c(&self) -> Command {
        self.command(&self.c)
    }

    /// The same of C++.
    #[must_use]
    pub fn cxx(&self) -> Command {
        self.command(&self.cxx)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.args([self.target, "-ffreestanding"]);
        command
    }
}

impl fmt::Display for CCompilers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {})", self.version, self.c.display(), self.cxx.display())
    }
}

/// What makes discs that boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IsoMaker {
    /// GRUB's program.
    pub path: PathBuf,
    /// GRUB's modules for PCs with a BIOS.
    pub modules: PathBuf,
    /// GRUB's name and version.
    pub version: String,
}

impl fmt::Display for IsoMaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.version, self.path.display())
    }
}

/// Everything that was found.
#[derive(Clone, Debug)]
pub struct Findings {
    /// Every compiler that was looked at, the preferred one first.
    pub compilers: Vec<Candidate>,
    /// The linker, or why there is none.
    pub linker: Result<Linker, String>,
    /// The emulator, or why there is none.
    pub emulator: Result<Emulator, String>,
    /// GCC, or why there is none.
    pub gcc: Result<CCompilers, String>,
    /// Clang, or why there is none.
    pub clang: Result<CCompilers, String>,
    /// What makes discs, or why there is nothing.
    pub iso_maker: Result<IsoMaker, String>,
    /// What builds Xen, or what is not there of it.
    pub xen_tools: Result<(), String>,
    /// What builds Linux, or what is not there of it.
    pub linux_tools: Result<(), String>,
}

/// Something that the work at hand needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A compiler with its library's source.
    Compiler,
    /// GNU ld with `elf_i386`.
    Linker,
    /// QEMU for 32-bit x86.
    Emulator,
    /// GCC for C and C++.
    Gcc,
    /// Clang for C and C++.
    Clang,
    /// GRUB for PCs with a BIOS, and xorriso.
    IsoMaker,
    /// What builds Xen besides GCC and binutils.
    XenTools,
    /// What builds Linux besides them.
    LinuxTools,
}

impl Need {
    /// What a build needs.
    pub const BUILD: &'static [Self] = &[Self::Compiler, Self::Linker];
    /// What a run needs.
    pub const RUN: &'static [Self] = &[Self::Compiler, Self::Linker, Self::Emulator];
    /// What the example kernels need.
    pub const EXAMPLES: &'static [Self] = &[Self::Compiler, Self::Linker, Self::Gcc];
    /// What a disc needs.
    pub const ISO: &'static [Self] = &[Self::Compiler, Self::Linker, Self::Gcc, Self::IsoMaker];
    /// What Xen's own build needs.
    pub const XEN: &'static [Self] = &[Self::Linker, Self::Gcc, Self::XenTools];
    /// What Linux's own build needs.
    pub const LINUX: &'static [Self] = &[Self::Linker, Self::Gcc, Self::LinuxTools];
    /// What the tests need: everything but what builds Xen and Linux.
    pub const TEST: &'static [Self] =
        &[Self::Compiler, Self::Linker, Self::Emulator, Self::Gcc, Self::Clang, Self::IsoMaker];

    /// The programs that are wanted by their names.
    #[must_use]
    pub const fn programs(self) -> &'static [&'static str] {
        match self {
            // The last unpacks Debian's source.
            Self::XenTools => &["make", "flex", "bison", "python3", "xz", "dpkg-source"],
            // The last unpacks Debian's package.
            Self::LinuxTools => &["make", "flex", "bison", "bc", "patch", "xz", "dpkg-deb"],
            _ => &[],
        }
    }

    /// Whether they are there.
    fn find_programs(self) -> Result<(), String> {
        let is_missing = |name: &&&str| find_program(name).is_none();
        let missing: Vec<&str> = self.programs().iter().filter(is_missing).copied().collect();
        if missing.is_empty() { Ok(()) } else { Err(format!("no {} on PATH", missing.join(", "))) }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compiler => {
                write!(f, "a Rust compiler, {OLDEST} or newer, with its library's source")
            }
            Self::Linker => write!(f, "GNU ld with the emulation elf_i386"),
            Self::Emulator => write!(f, "qemu-system-i386 or qemu-system-x86_64"),
            Self::Gcc => write!(f, "gcc and g++ for 32-bit x86"),
            Self::Clang => write!(f, "clang and clang++ for 32-bit x86"),
            Self::IsoMaker => write!(f, "grub-mkrescue with GRUB's modules i386-pc, and xorriso"),
            Self::XenTools | Self::LinuxTools => write!(f, "{}", self.programs().join(", ")),
        }
    }
}

impl Findings {
    /// Looks at this machine.
    #[must_use]
    pub fn gather() -> Self {
        Self {
            compilers: compilers(),
            linker: linker(),
            emulator: emulator(),
            gcc: gcc(),
            clang: clang(),
            iso_maker: iso_maker(),
            xen_tools: Need::XenTools.find_programs(),
            linux_tools: Need::LinuxTools.find_programs(),
        }
    }

    /// The compiler to use.
    #[must_use]
    pub fn compiler(&self) -> Option<&Compiler> {
        self.compilers.iter().find_map(|candidate| candidate.verdict.as_ref().ok())
    }

    /// Which of `needs` are not there.
    #[must_use]
    pub fn missing(&self, needs: &[Need]) -> Vec<Need> {
        let is_there = |need: &Need| match need {
            Need::Compiler => self.compiler().is_some(),
            Need::Linker => self.linker.is_ok(),
            Need::Emulator => self.emulator.is_ok(),
            Need::Gcc => self.gcc.is_ok(),
            Need::Clang => self.clang.is_ok(),
            Need::IsoMaker => self.iso_maker.is_ok(),
            Need::XenTools => self.xen_tools.is_ok(),
            Need::LinuxTools => self.linux_tools.is_ok(),
        };
        needs.iter().filter(|need| !is_there(need)).copied().collect()
    }
}

/// Every compiler on this machine, in the order of preference.
fn compilers() -> Vec<Candidate> {
    let mut programs: Vec<(String, PathBuf, PathBuf)> = Vec::new();
    let mut add = |origin: String, cargo: PathBuf, rustc: PathBuf| {
        if !programs
            .iter()
            .any(|(_, known_cargo, known_rustc)| (known_cargo, known_rustc) == (&cargo, &rustc))
        {
            programs.push((origin, cargo, rustc));
        }
    };

    // Cargo tells its children where it is; under rustup that is the toolchain's, not the proxy.
    if let Some(cargo) =
        std::env::var_os("CARGO").map(PathBuf::from).filter(|cargo| !is_proxy(cargo))
    {
        let rustc = cargo.with_file_name("rustc");
        add("the compiler in use".into(), cargo, rustc);
    }
    for (name, folder) in rustup_toolchains() {
        add(format!("rustup toolchain {name}"), folder.join("bin/cargo"), folder.join("bin/rustc"));
    }
    add("the system's compiler".into(), "/usr/bin/cargo".into(), "/usr/bin/rustc".into());
    // Ubuntu's versioned packages install beside each other here.
    let mut versioned: Vec<PathBuf> = std::fs::read_dir("/usr/lib")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("rust-1."))
        })
        .collect();
    versioned.sort();
    for folder in versioned.into_iter().rev() {
        add(format!("{}", folder.display()), folder.join("bin/cargo"), folder.join("bin/rustc"));
    }

    programs
        .into_iter()
        .map(|(origin, cargo, rustc)| Candidate { origin, verdict: judge(cargo, rustc) })
        .collect()
}

/// Whether a program is one of rustup's proxies, which might download.
fn is_proxy(program: &Path) -> bool {
    std::fs::canonicalize(program)
        .is_ok_and(|path| path.file_stem().is_some_and(|stem| stem == "rustup"))
}

/// Names and folders of the toolchains that rustup has installed.
fn rustup_toolchains() -> Vec<(String, PathBuf)> {
    let Some(rustup) = find_program("rustup") else { return Vec::new() };
    let ask = |arguments: &[&str]| {
        let mut command = Command::new(&rustup);
        command.args(arguments).env("RUSTUP_AUTO_INSTALL", "0").env_remove("RUSTUP_TOOLCHAIN");
        output(&mut command).unwrap_or_default()
    };
    let home = std::env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(ask(&["show", "home"]).trim()));
    ask(&["toolchain", "list"])
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(|name| (name.to_owned(), home.join("toolchains").join(name)))
        .collect()
}

/// Whether a cargo and a rustc can build the image.
fn judge(cargo: PathBuf, rustc: PathBuf) -> Result<Compiler, Refusal> {
    for program in [&rustc, &cargo] {
        if !program.is_file() {
            return Err(format!("{} is not there", program.display()).into());
        }
    }
    let said = output(Command::new(&rustc).arg("--version").env("RUSTUP_AUTO_INSTALL", "0"))?;
    let version = said
        .split_whitespace()
        .nth(1)
        .and_then(Version::parse)
        .ok_or_else(|| format!("{} --version says {:?}", rustc.display(), said.trim()))?;
    if version < OLDEST {
        return Err(format!("rustc {version} is older than {OLDEST}").into());
    }
    let sysroot = PathBuf::from(output(Command::new(&rustc).args(["--print", "sysroot"]))?.trim());
    let lock = sysroot.join(SOURCE).join("library/Cargo.lock");
    if !lock.is_file() {
        return Err(Refusal::WithoutSource { version, sysroot });
    }
    Ok(Compiler { rustc, cargo, version, sysroot })
}

/// GNU ld with the emulation for 32-bit x86.
///
/// Other linkers lay the image out differently, and the bytes are to be the same everywhere.
fn linker() -> Result<Linker, String> {
    let mut refused = Vec::new();
    for name in ["ld", "i686-linux-gnu-ld", "x86_64-linux-gnu-ld", "i686-elf-ld", "x86_64-elf-ld"] {
        let Some(path) = find_program(name) else { continue };
        match output(Command::new(&path).arg("-V")) {
            Ok(said) => match linker_version(&said) {
                Some(version) => return Ok(Linker { path, version }),
                None => refused.push(format!("{} is not GNU ld with elf_i386", path.display())),
            },
            Err(error) => refused.push(error),
        }
    }
    if refused.is_empty() { Err("no ld on PATH".into()) } else { Err(refused.join("; ")) }
}

/// The linker's first line, if `ld -V` describes one that will do.
fn linker_version(said: &str) -> Option<String> {
    let first = said.lines().next()?.trim();
    let is_gnu = first.starts_with("GNU ld");
    let links_i386 = said.lines().any(|line| line.trim() == "elf_i386");
    (is_gnu && links_i386).then(|| first.to_owned())
}

/// QEMU.
fn emulator() -> Result<Emulator, String> {
    emulator_of(&["qemu-system-i386", "qemu-system-x86_64"])
}

/// The QEMU whose processors have long mode, which the reference hypervisor runs in.
///
/// # Errors
///
/// What was looked for, or what is wrong with it.
pub fn long_mode_emulator() -> Result<Emulator, String> {
    emulator_of(&["qemu-system-x86_64"])
}

/// The first of these programs that works.
fn emulator_of(names: &[&str]) -> Result<Emulator, String> {
    let mut refused = Vec::new();
    for name in names {
        let Some(path) = find_program(name) else { continue };
        match output(Command::new(&path).arg("--version")) {
            Ok(said) => {
                let version = said.lines().next().unwrap_or_default().trim().to_owned();
                return Ok(Emulator { path, version });
            }
            Err(error) => refused.push(error),
        }
    }
    if refused.is_empty() {
        Err(format!("no {} on PATH", names[0]))
    } else {
        Err(refused.join("; "))
    }
}

/// GCC, the system's own or one for 32-bit x86 beside it.
fn gcc() -> Result<CCompilers, String> {
    let mut refused = Vec::new();
    for prefix in ["", "i686-linux-gnu-", "x86_64-linux-gnu-", "i686-elf-", "x86_64-elf-"] {
        match c_compilers(&format!("{prefix}gcc"), &format!("{prefix}g++"), "-m32") {
            // On some systems the name is an alias.
            Ok(found) if found.version.contains("clang") => {
                refused.push(format!("{} is clang", found.c.display()));
            }
            Ok(found) => return Ok(found),
            Err(error) => refused.push(error),
        }
    }
    Err(refused.swap_remove(0))
}

/// Clang, which compiles for every machine that it was built for.
fn clang() -> Result<CCompilers, String> {
    c_compilers("clang", "clang++", "--target=i686-unknown-none-elf")
}

/// Two compilers, if both of them compile.
fn c_compilers(c: &str, cxx: &str, target: &'static str) -> Result<CCompilers, String> {
    let find = |name| find_program(name).ok_or_else(|| format!("no {name} on PATH"));
    let (c, cxx) = (find(c)?, find(cxx)?);
    let said = output(Command::new(&c).arg("--version"))?;
    let version = said.lines().next().unwrap_or_default().trim().to_owned();
    let found = CCompilers { c, cxx, target, version };
    for (mut command, language) in [(found.c(), "c"), (found.cxx(), "c++")] {
        command.args(["-x", language, "-c", "-o", "/dev/null", "-"]).stdin(Stdio::null());
        output(&mut command)?;
    }
    Ok(found)
}

/// GRUB's program for discs, with what it uses.
fn iso_maker() -> Result<IsoMaker, String> {
    let path = ["grub-mkrescue", "grub2-mkrescue", "i686-elf-grub-mkrescue"]
        .into_iter()
        .find_map(find_program)
        .ok_or("no grub-mkrescue on PATH")?;
    find_program("xorriso").ok_or("no xorriso on PATH")?;
    let top = path.parent().and_then(Path::parent).unwrap_or(Path::new("/usr"));
    let modules = ["lib/grub", "lib/grub2", "share/grub2", "lib/i686-elf/grub"]
        .into_iter()
        .map(|folder| top.join(folder).join("i386-pc"))
        .find(|folder| folder.join("multiboot.mod").is_file())
        .ok_or("GRUB is without its modules for PCs with a BIOS")?;
    let said = output(Command::new(&path).arg("--version"))?;
    let version = format!("GRUB {}", said.split_whitespace().last().unwrap_or_default());
    Ok(IsoMaker { path, modules, version })
}

/// The first executable of this name on `PATH`.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path: OsString = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path)
        .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// What a command writes to its standard output; its error output where it fails.
pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done = command.output().map_err(|error| format!("{name} does not start: {error}"))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        return Err(format!("{name}: {}; {}", done.status, said.trim()));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_compilers_and_distributions_write_them() {
        let version = |major, minor, patch| Some(Version { major, minor, patch });
        assert_eq!(Version::parse("1.95.0"), version(1, 95, 0));
        assert_eq!(Version::parse("1.97.0-nightly"), version(1, 97, 0));
        assert_eq!(Version::parse("1.96.0+dfsg1-1~deb12u2"), version(1, 96, 0));
        assert_eq!(Version::parse("1.90"), version(1, 90, 0));
        assert_eq!(Version::parse(""), None);
        assert_eq!(Version::parse("none"), None);
        assert_eq!(Version::parse("99999999999.1"), None);
        assert!(Version::parse("1.100.0") > Version::parse("1.90.0"));
    }

    #[test]
    fn only_gnu_ld_with_the_emulation_will_do() {
        let said = "GNU ld (GNU Binutils for Debian) 2.40\n  Supported emulations:\n   elf_x86_64\n   elf_i386\n";
        assert_eq!(linker_version(said).as_deref(), Some("GNU ld (GNU Binutils for Debian) 2.40"));
        assert_eq!(linker_version("GNU ld 2.40\n  Supported emulations:\n   aarch64linux\n"), None);
        assert_eq!(linker_version("LLD 19.1\n  elf_i386\n"), None);
        assert_eq!(linker_version(""), None);
    }
}
