//! Compiles and links the image and the test guest with a Cargo of their own.
//!
//! The image is for a machine that no installed target describes, so its core library is built
//! along with it. Flags that the user's environment holds for other programs are kept out: the
//! same source is to give the same bytes everywhere.

use crate::image::{self, Image};
use crate::link::Link;
use crate::progress::Progress;
use crate::toolchain::{Compiler, Findings, Linker, Need};
use anyhow::{Context, Result, bail};
use object::{Object, ObjectSegment};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use vmi_abi::header::SLOT_TABLE_SIZE;
use vmi_abi::{REVISION_3_0, REVISION_13_0, REVISION_13_3, Revision};
use vmi_native_backend::binding::Bind;

/// The target's description, from the top of the tree.
const TARGET: &str = "targets/i686-unknown-none.json";

/// The target's name as Cargo derives it from the description's.
const TARGET_NAME: &str = "i686-unknown-none";

/// The target of programs for a Linux host in QEMU.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// The hypervisor's target, one of the compiler's own: without SSE, whose registers belong to the guest.
const LONG_MODE_TARGET: &str = "x86_64-unknown-none";

/// What is compiled for the first.
const BARE_PACKAGES: [&str; 18] = [
    "--package",
    "vmi-abi",
    "--package",
    "vmi-rom",
    "--package",
    "vmi-native-backend",
    "--package",
    "vmi-hv-backend",
    "--package",
    "vmi-guest",
    "--package",
    "vmi-example-kernel",
    "--package",
    "vmi-linux-init",
    "--package",
    "vmi-xen-loader",
    "--features",
    "vmi-rom/xen",
];

/// Two addresses that have few bits in common: the second is where Linux sees an option ROM.
const LINK_BASES: [&str; 2] = ["0", "c00ca000"];

/// What a build uses.
#[derive(Clone, Debug)]
pub struct Tools {
    /// The compiler.
    pub compiler: Compiler,
    /// The linker.
    pub linker: Linker,
}

impl Tools {
    /// The tools among what was found.
    ///
    /// # Errors
    ///
    /// One of them is missing.
    pub fn from_findings(findings: &Findings) -> Result<Self> {
        let missing = || {
            let missing: Vec<String> =
                findings.missing(Need::BUILD).iter().map(ToString::to_string).collect();
            format!("missing: {}; `cargo xtask setup` says how to get it", missing.join(", "))
        };
        let compiler = findings.compiler().cloned().with_context(missing)?;
        let linker = findings.linker.clone().ok().with_context(missing)?;
        Ok(Self { compiler, linker })
    }
}

/// An image on disk.
#[derive(Clone, Debug)]
pub struct Rom {
    /// The finished image.
    pub path: PathBuf,
    /// The linked file that it was cut from, for its symbols.
    pub elf: PathBuf,
    /// What it is.
    pub form: Form,
    /// Its bytes.
    pub image: Image,
}

/// The images that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Revision 3.0, with these answers.
    Lookup(Bind),
    /// Revision 3.0 as [`Bind::Rewrite`], with the backend for the reference hypervisor beside the native one.
    Reference,
    /// The same, with the backend for Xen too: the image for every platform.
    Hypervisors,
    /// Revision 3.0 with every routine, for a kernel to link: see [`crate::link`].
    Linked,
    /// Revision 13.0: slots.
    Slots13_0,
    /// Revision 13.3: slots, and answers that say where they are.
    Slots13_3,
}

impl Form {
    /// The revision of the interface.
    #[must_use]
    pub const fn revision(self) -> Revision {
        match self {
            Self::Lookup(_) | Self::Reference | Self::Hypervisors | Self::Linked => REVISION_3_0,
            Self::Slots13_0 => REVISION_13_0,
            Self::Slots13_3 => REVISION_13_3,
        }
    }

    /// The file's name without its ending.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lookup(Bind::Rewrite) => "vmi-native",
            Self::Lookup(Bind::Fastest) => "vmi-native-fastest",
            Self::Lookup(Bind::Call) => "vmi-native-call",
            Self::Reference => "vmi-reference",
            Self::Hypervisors => "vmi",
            Self::Linked => "vmi-native-linked",
            Self::Slots13_0 => "vmi-13.0-native",
            Self::Slots13_3 => "vmi-13.3-native",
        }
    }

    /// The feature of the image's package that makes it this one.
    const fn feature(self) -> Option<&'static str> {
        match self {
            Self::Lookup(Bind::Rewrite) => Some("rewrite-sites"),
            Self::Lookup(Bind::Fastest) => None,
            Self::Lookup(Bind::Call) => Some("bind-call"),
            Self::Reference => Some("reference"),
            Self::Hypervisors => Some("xen"),
            Self::Linked => Some("linked"),
            Self::Slots13_0 => Some("revision-13-0"),
            Self::Slots13_3 => Some("revision-13-3"),
        }
    }

    /// The most bytes that it may have. Guests copy the slots, and run the copy: all must be in it.
    #[must_use]
    pub const fn limit(self) -> usize {
        match self {
            Self::Slots13_0 | Self::Slots13_3 => SLOT_TABLE_SIZE,
            Self::Reference => image::REFERENCE_LIMIT,
            Self::Hypervisors => image::HYPERVISORS_LIMIT,
            Self::Lookup(_) | Self::Linked => image::NATIVE_LIMIT,
        }
    }

    /// Where the image lands.
    #[must_use]
    pub fn path(self) -> PathBuf {
        crate::workspace().join("target/rom").join(format!("{}.rom", self.name()))
    }
}

/// Where the test guest lands.
#[must_use]
pub fn guest_path() -> PathBuf {
    crate::workspace().join("target/guest/vmi-guest.elf")
}

/// Builds an image.
///
/// # Errors
///
/// It does not compile, or [`image::make`] refuses it.
pub fn rom(tools: &Tools, form: Form) -> Result<Rom> {
    let path = form.path();
    let progress = Progress::start(format!("building {}", shown(&path)));
    let _lock = lock(FIRMWARE)?;
    let mut linked = Vec::new();
    for base in LINK_BASES {
        let mut cargo = inner_cargo(tools, "build");
        cargo.args(["--release", "--package", "vmi-rom"]).env("VMI_ROM_LINK_BASE", base);
        if let Some(feature) = form.feature() {
            cargo.args(["--features", &format!("vmi-rom/{feature}")]);
        }
        run(&mut cargo, &progress)?;
        linked.push(read(&output_path("vmi-rom"))?);
    }
    let [first, second] = &linked[..] else {
        bail!("two link bases were built, {} files are there", linked.len())
    };
    let image = image::make(first, second, form.limit())
        .with_context(|| format!("{} is refused", shown(&path)))?;
    let elf = path.with_extension("elf");
    write(&elf, first)?;
    write(&path, &image.bytes)?;
    Ok(Rom { path, elf, form, image })
}

/// Writes a copy of an image for the expansion ROM of a PCI card, beside the image.
///
/// # Errors
///
/// The file cannot be written.
pub fn write_for_card(rom: &Rom, vendor: u16, device: u16) -> Result<PathBuf> {
    let name = format!("{}-{vendor:04x}-{device:04x}.rom", rom.form.name());
    let path = rom.path.with_file_name(name);
    write(&path, &image::for_card(&rom.image.bytes, vendor, device))?;
    Ok(path)
}

/// Builds the test guest, with the native calls of every revision linked in.
///
/// # Errors
///
/// It does not compile.
pub fn guest(tools: &Tools, links: &[Link]) -> Result<PathBuf> {
    let path = guest_path();
    kernel(tools, "vmi-guest", &path, links)?;
    Ok(path)
}

/// Builds what starts the guest on Xen.
///
/// # Errors
///
/// It does not compile.
pub fn xen_loader(tools: &Tools) -> Result<PathBuf> {
    let path = crate::workspace().join("target/xen/vmi-xen-loader.elf");
    kernel(tools, "vmi-xen-loader", &path, &[])?;
    Ok(path)
}

/// Where the reference hypervisor lands.
#[must_use]
pub fn hypervisor_path() -> PathBuf {
    crate::workspace().join("target/hypervisor/vmi-hypervisor.bin")
}

/// Builds the reference hypervisor: a flat file for a multiboot loader, beside it the linked one for its symbols.
///
/// # Errors
///
/// It does not compile.
pub fn hypervisor(tools: &Tools) -> Result<PathBuf> {
    let path = hypervisor_path();
    let progress = Progress::start(format!("building {}", shown(&path)));
    let _lock = lock(FIRMWARE)?;
    let mut cargo = long_mode_cargo(tools, "build");
    cargo.args(["--release", "--package", "vmi-hypervisor"]);
    run(&mut cargo, &progress)?;
    let linked = read(&target_folder().join(LONG_MODE_TARGET).join("release/vmi-hypervisor"))?;
    write(&path.with_extension("elf"), &linked)?;
    write(&path, &flat(&linked).context("the linked hypervisor")?)?;
    Ok(path)
}

/// A program's bytes as they lie in memory, from its first address to the last that the file has bytes for.
fn flat(linked: &[u8]) -> Result<Vec<u8>> {
    let file = object::File::parse(linked)?;
    let segments: Vec<_> = file
        .segments()
        .map(|segment| Ok((segment.address(), segment.data()?)))
        .collect::<Result<_, object::Error>>()?;
    let segments = || segments.iter().filter(|(_, bytes)| !bytes.is_empty());
    let start = segments().map(|(address, _)| *address).min().context("no segment has bytes")?;
    let mut flat = Vec::new();
    for (address, bytes) in segments() {
        let offset = usize::try_from(address - start)?;
        flat.resize(flat.len().max(offset + bytes.len()), 0);
        flat[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    Ok(flat)
}

/// Builds a kernel for the bare machine, from a package whose build script hands the linker the objects that
/// `VMI_NATIVE_OBJECTS` names.
///
/// # Errors
///
/// It does not compile.
pub(crate) fn kernel(tools: &Tools, package: &str, path: &Path, links: &[Link]) -> Result<()> {
    let progress = Progress::start(format!("building {}", shown(path)));
    let _lock = lock(FIRMWARE)?;
    let objects = std::env::join_paths(links.iter().map(|link| &link.object));
    let mut cargo = inner_cargo(tools, "build");
    cargo.args(["--release", "--package", package]);
    cargo.env("VMI_NATIVE_OBJECTS", objects.context("a path with a colon")?);
    run(&mut cargo, &progress)?;
    write(path, &read(&output_path(package))?)
}

/// Builds a program for Linux on this machine's processor, without shared libraries: what is to be the first one of a host.
///
/// # Errors
///
/// It does not compile.
pub(crate) fn static_program(tools: &Tools, package: &str, path: &Path) -> Result<()> {
    let progress = Progress::start(format!("building {}", shown(path)));
    let _lock = lock(FIRMWARE)?;
    let mut cargo = own_cargo(tools, "build");
    cargo
        .args(["--locked", "--release", "--package", package])
        // With a target of its own the flags are the program's alone, and not those of build scripts.
        .args(["--target", STATIC_TARGET, "--target-dir"])
        .arg(target_folder())
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    run(&mut cargo, &progress)?;
    write(path, &read(&target_folder().join(STATIC_TARGET).join("release").join(package))?)
}

/// The lints of image, guest and hypervisor on their own targets, warnings denied. The compiler must have clippy.
pub(crate) fn bare_clippy(tools: &Tools) -> [Command; 2] {
    bare(tools, "clippy").map(|mut cargo| {
        prefer_own_subcommands(&mut cargo, tools);
        cargo.args(["--", "--deny", "warnings"]);
        cargo
    })
}

/// What checks all that runs on a bare machine, on its own target.
fn bare(tools: &Tools, verb: &str) -> [Command; 2] {
    let mut firmware = inner_cargo(tools, verb);
    firmware.args(BARE_PACKAGES);
    let mut hypervisor = long_mode_cargo(tools, verb);
    hypervisor.args(["--package", "vmi-hypervisor", "--bin", "vmi-hypervisor"]);
    [firmware, hypervisor].map(|mut cargo| {
        cargo.args(["--quiet", "--release"]);
        cargo
    })
}

/// Cargo looks for its subcommands on the path, where another toolchain's may come first.
fn prefer_own_subcommands(cargo: &mut Command, tools: &Tools) {
    let own = tools.compiler.cargo.parent().map(Path::to_owned);
    let path = std::env::var_os("PATH").unwrap_or_default();
    if let Ok(path) = std::env::join_paths(own.into_iter().chain(std::env::split_paths(&path))) {
        cargo.env("PATH", path);
    }
}

/// What the compiler alone warns of in image, guest and hypervisor; nothing if it has nothing to say.
///
/// # Errors
///
/// Cargo does not start.
pub(crate) fn bare_warnings(tools: &Tools) -> Result<Option<String>> {
    let mut warnings = String::new();
    for mut cargo in bare(tools, "check") {
        let done = cargo.output().context("cargo does not start")?;
        let said = String::from_utf8_lossy(&done.stderr);
        if !done.status.success() || said.contains("warning: ") {
            warnings.push_str(said.trim());
            warnings.push('\n');
        }
    }
    Ok((!warnings.is_empty()).then_some(warnings))
}

/// Bytes as digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A path as the user would type it from the top of the tree.
#[must_use]
pub fn shown(path: &Path) -> String {
    path.strip_prefix(crate::workspace()).unwrap_or(path).display().to_string()
}

/// Reads a file.
///
/// # Errors
///
/// Says which file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Writes a file in one step: whoever reads it sees the old one or the new one.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let step = || {
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let mut file = tempfile::Builder::new()
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.persist(path)?;
        std::io::Result::Ok(())
    };
    step().with_context(|| format!("cannot write {}", path.display()))
}

/// The inner Cargo's target directory: apart from the outer one's, which is locked while it runs us.
fn target_folder() -> PathBuf {
    crate::workspace().join("target/firmware")
}

fn output_path(name: &str) -> PathBuf {
    target_folder().join(TARGET_NAME).join("release").join(name)
}

/// One build at a time: both bases go through one file.
const FIRMWARE: &str = "target/firmware.lock";

/// Waits until nobody else has the lock, and has it as long as the file is open.
pub(crate) fn lock(name: &str) -> Result<fs::File> {
    let path = crate::workspace().join(name);
    let step = || {
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        let file = fs::File::create(&path)?;
        file.lock()?;
        std::io::Result::Ok(file)
    };
    step().with_context(|| format!("cannot lock {}", path.display()))
}

/// A Cargo that compiles for the bare 32-bit machine; the caller says what.
pub(crate) fn inner_cargo(tools: &Tools, verb: &str) -> Command {
    let mut flags = rust_flags(&tools.compiler, &crate::workspace());
    // A jump table is a table of addresses, and somebody would have to relocate it.
    flags.push("-Cjump-tables=no".to_owned());
    let target = crate::workspace().join(TARGET);
    let mut cargo =
        bare_cargo(tools, verb, target.as_os_str(), TARGET_NAME, "core,compiler_builtins", &flags);
    if tools.compiler.knows("json-target-spec") {
        cargo.arg("-Zjson-target-spec");
    }
    cargo
}

/// A Cargo that compiles for the bare machine in long mode: programs that lie below 2 GiB and stay there.
fn long_mode_cargo(tools: &Tools, verb: &str) -> Command {
    let mut flags = rust_flags(&tools.compiler, &crate::workspace());
    flags.extend(
        ["-Crelocation-model=static", "-Ccode-model=small", "-Clinker-flavor=ld"].map(String::from),
    );
    let target = LONG_MODE_TARGET;
    bare_cargo(tools, verb, target.as_ref(), target, "core,alloc,compiler_builtins", &flags)
}

/// The chosen compiler's Cargo, without what the user's environment says to another one.
fn own_cargo(tools: &Tools, verb: &str) -> Command {
    let mut cargo = Command::new(&tools.compiler.cargo);
    cargo.current_dir(crate::workspace());
    for (name, _) in std::env::vars_os() {
        if is_foreign(&name) {
            cargo.env_remove(name);
        }
    }
    cargo
        .arg(verb)
        .env("RUSTC", &tools.compiler.rustc)
        // Empty, not absent: a wrapper in the user's configuration is left out too.
        .env("RUSTC_WRAPPER", "")
        .env("RUSTC_WORKSPACE_WRAPPER", "");
    cargo
}

/// A Cargo for one target, with a library of its own.
fn bare_cargo(
    tools: &Tools,
    verb: &str,
    target: &OsStr,
    name: &str,
    library: &str,
    flags: &[String],
) -> Command {
    let linker = &tools.linker;
    let mut cargo = own_cargo(tools, verb);
    cargo
        .arg("--locked")
        .arg("--target")
        .arg(target)
        .arg("--target-dir")
        .arg(target_folder())
        .arg(format!("-Zbuild-std={library}"))
        // `-Z` on a stable compiler. The flags are few, and each is tested by the image's own checks.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env(
            format!("CARGO_TARGET_{}_LINKER", name.to_uppercase().replace('-', "_")),
            &linker.path,
        );
    cargo
}

/// Whether a variable would change what is built. Those that say how to reach the network stay.
fn is_foreign(name: &OsString) -> bool {
    let name = name.to_string_lossy();
    let stays = [
        "CARGO_HOME",
        "CARGO_NET_",
        "CARGO_HTTP_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
    ];
    let starts = |starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
    name == "RUSTUP_TOOLCHAIN"
        || (starts(&["CARGO", "RUSTC", "RUSTFLAGS", "RUSTDOC"]) && !starts(&stays))
}

/// The flags for every crate.
fn rust_flags(compiler: &Compiler, top: &Path) -> Vec<String> {
    let mut flags = Vec::new();
    // Where the trees lie on this machine is nobody's business, and must not change a byte.
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    let places = [
        (Some(compiler.source()), "/rust"),
        (cargo_home, "/cargo"),
        (Some(top.to_owned()), "/vmi-rom"),
    ];
    for (place, name) in places {
        if let Some(place) = place {
            flags.push(format!("--remap-path-prefix={}={name}", place.display()));
        }
    }
    flags
}

/// Runs Cargo, shows its last line as progress, and all of its lines if it fails.
fn run(command: &mut Command, progress: &Progress) -> Result<()> {
    log::debug!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} does not start", command.get_program().to_string_lossy()))?;
    let mut said = String::new();
    if let Some(pipe) = child.stderr.take() {
        for line in BufReader::new(pipe).lines() {
            let line = line.context("cannot read what cargo says")?;
            progress.at(&line);
            said.push_str(&line);
            said.push('\n');
        }
    }
    let status = child.wait().context("cannot wait for cargo")?;
    if !status.success() {
        bail!("{} failed ({status}):\n{}", progress.title(), said.trim_end());
    }
    // Warnings are for whoever changes the code.
    if said.contains("warning: ") {
        anstream::eprintln!("{}", said.trim_end());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_the_build_is_kept_out_and_the_network_stays() {
        for name in [
            "RUSTFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "RUSTC_WRAPPER",
            "CARGO_BUILD_TARGET",
            "RUSTUP_TOOLCHAIN",
            "CARGO_PROFILE_RELEASE_LTO",
            "CARGO",
        ] {
            assert!(is_foreign(&name.into()), "{name}");
        }
        for name in [
            "PATH",
            "HOME",
            "CARGO_HOME",
            "CARGO_HTTP_PROXY",
            "CARGO_NET_OFFLINE",
            "RUSTUP_HOME",
            "RUST_BACKTRACE",
        ] {
            assert!(!is_foreign(&name.into()), "{name}");
        }
    }
}
