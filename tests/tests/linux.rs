//! Linux on the reference hypervisor, with a first program that tries what kernels do for programs: Debian's own kernels, and a current
//! one with a client of VMI.
//!
//! The kernels come from `cargo xtask setup --linux` and `--linux-vmi`.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;
use vmi_hv_backend::reference::interface::Counters;
use xtask::artifacts;
use xtask::build::Tools;
use xtask::conformance::{Cost, mean_ratio};
use xtask::debian::{self, Flavour};
use xtask::hypervisor::{End, GuestRom, Mode, Paging};
use xtask::kvm;
use xtask::linux::{self, Below, Boot, Booted, costs, vmi};
use xtask::qemu::Outcome;
use xtask::toolchain::Findings;

/// The tests of our first program.
const TESTS: usize = 25;

/// What a healthy kernel does not say.
const COMPLAINTS: [&str; 8] = [
    "BUG:",
    "kernel BUG",
    "WARNING:",
    "Bad page",
    "Oops",
    "Call Trace",
    "unchecked MSR",
    "general protection fault",
];

/// Pieces of a kernel's work, by the words that have our first program do more of them, and how many times as many exits `trap` has of
/// each, at least, as `vmi-batched`.
const PIECES: [(&str, f64); 3] = [("forks", 2.5), ("execs", 2.5), ("protects", 20.0)];

/// How many times as many instructions an operation of a kernel may take with a ROM as without, and the geometric mean of all.
const COST: f64 = 1.02;
const MEAN_COST: f64 = 1.01;

/// QEMU's status when the hypervisor refuses its guest.
const REFUSED: i32 = 67;

/// The initramfs, built once.
fn initramfs() -> Result<&'static Path> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let build = || linux::initramfs(&Tools::from_findings(&Findings::gather())?);
    BUILT
        .get_or_init(|| build().map_err(|error| format!("{error:#}")))
        .as_deref()
        .map_err(|error| anyhow::anyhow!("{error}"))
}

/// Boots a kernel that gets these words besides, and wants it to pass its tests and to complain of nothing.
fn pass(kernel: &Path, below: Below<'_>, append: &str) -> Result<Booted> {
    let emulator = &artifacts::ensure_hosting()?.emulator;
    pass_boot(&Boot { append: append.into(), ..Boot::tests(emulator, kernel, initramfs()?, below) })
}

/// The same, of any boot with our first program.
fn pass_boot(boot: &Boot<'_>) -> Result<Booted> {
    let boot = Boot { limit: Duration::from_secs(200), ..boot.clone() };
    let booted = boot.run(|_| {})?;
    let outcome = &booted.run.outcome;
    ensure!(
        *outcome == Outcome::Passed,
        "{outcome}\n{}\n{}",
        booted.run.command,
        booted.last_lines()
    );
    let wanted = if boot.append.is_empty() { TESTS } else { 1 };
    ensure!(
        booted.tests() == wanted,
        "{} of {wanted} tests\n{}",
        booted.tests(),
        booted.run.serial
    );
    let complaint =
        booted.run.serial.lines().find(|line| COMPLAINTS.iter().any(|text| line.contains(text)));
    ensure!(
        complaint.is_none(),
        "the kernel complains: {}\n{}",
        complaint.unwrap_or_default(),
        booted.run.serial
    );
    Ok(booted)
}

/// The hypervisor.
fn hypervisor(mode: Mode, paging: Paging) -> Result<Below<'static>> {
    Ok(Below::Hypervisor { built: artifacts::ensure_hosting()?, rom: GuestRom::Ours, mode, paging })
}

/// What the hypervisor counted.
fn counters(booted: &Booted) -> Result<Counters> {
    booted.counters.context("the hypervisor does not say what it counted")
}

/// What all tests take of one of Debian's kernels on the hypervisor.
fn debians(flavour: Flavour, mode: Mode, paging: Paging) -> Result<Counters> {
    counters(&pass(&debian::kernel(flavour)?, hypervisor(mode, paging)?, "")?)
}

#[test]
fn the_kernel_with_two_levels_runs_on_shadow_tables() -> Result<()> {
    let counters = debians(Flavour::I686, Mode::Trap, Paging::Shadow)?;
    ensure!(counters.table_writes > 0 && counters.cr3_writes > 0, "{counters:?}");
    Ok(())
}

#[test]
fn the_kernel_with_three_levels_runs_on_shadow_tables() -> Result<()> {
    let counters = debians(Flavour::I686Pae, Mode::Trap, Paging::Shadow)?;
    ensure!(counters.table_writes > 0 && counters.cr3_writes > 0, "{counters:?}");
    Ok(())
}

#[test]
fn a_kernel_runs_on_nested_tables_and_hardly_exits() -> Result<()> {
    let counters = debians(Flavour::I686Pae, Mode::Trap, Paging::Nested)?;
    ensure!(counters.exits() < 5000 && counters.table_writes == 0, "{counters:?}");
    Ok(())
}

/// As kernels with VMI come: boot protocol 2.07 of Linux 2.6.24, a file that ends within its last 16 bytes, and no ` -- ` in
/// front of the first program's words, which therefore are in its environment.
#[test]
fn a_kernel_starts_by_an_old_header() -> Result<()> {
    let mut file = fs::read(debian::kernel(Flavour::I686)?)?;
    let paragraphs = u32::from_le_bytes(*file[0x1f4..].first_chunk().context("a short file")?);
    let whole = (usize::from(file[0x1f1]) + 1) * 512 + paragraphs as usize * 16;
    ensure!(whole <= file.len(), "{whole} bytes");
    file.truncate(whole - 9);
    for (offset, value) in [(0x206, &[7, 2][..]), (0x238, &255_u32.to_le_bytes())] {
        let field = file.get_mut(offset..offset + value.len()).context("a short file")?;
        field.copy_from_slice(value);
    }
    let folder = tempfile::tempdir()?;
    let kernel = folder.path().join("bzImage");
    fs::write(&kernel, file)?;
    pass(&kernel, hypervisor(Mode::Trap, Paging::Nested)?, "only=pipe").map(drop)
}

/// Linux 6 knows no VMI: the image is there, and nobody calls it.
#[test]
fn a_kernel_without_vmi_leaves_the_image_alone() -> Result<()> {
    let counters = debians(Flavour::I686, Mode::VmiBatched, Paging::Nested)?;
    ensure!(counters.hypercalls == 0, "{counters:?}");
    Ok(())
}

/// What the reference hypervisor is compared with: KVM, with shadow paging too, in QEMU's translator.
#[test]
fn the_same_kernel_runs_under_kvm_and_its_exits_are_counted() -> Result<()> {
    let host = kvm::Host::build(&Findings::gather())?;
    let kernel = debian::kernel(Flavour::I686)?;
    let guest = kvm::Guest::tests(&kernel, initramfs()?, Paging::Shadow);
    let limit = Duration::from_secs(150);
    let guest = kvm::Guest { append: "-- only=fork", limit, ..guest };
    let mut hosted = host.run(&guest, |_| {})?;
    // A few boots in a hundred come to no end: docs/on-the-reference-hypervisor.md. Nothing of that is ours, so they are tried again.
    for _ in 0..2 {
        if matches!(hosted.run.outcome, Outcome::TimedOut { .. }) {
            println!("once more: {}\n{}", hosted.run.outcome, hosted.run.last_lines());
            hosted = host.run(&guest, |_| {})?;
        }
    }
    let run = &hosted.run;
    ensure!(
        hosted.passed(),
        "{}\n{}\n{}\n{}",
        run.outcome,
        run.command,
        run.last_lines(),
        run.host
    );
    let counted = |name: &str| hosted.statistics.get(name).copied().unwrap_or_default();
    // With nested paging there would be neither.
    ensure!(counted("mmu_pte_write") > 0 && counted("pf_guest") > 0, "{:?}", hosted.statistics);
    Ok(())
}

/// Boots each kernel with a client of VMI, and wants it to say that it found a ROM, or not to; on a machine with all the processors
/// that it is for.
fn clients(below: Below<'_>, append: &str, finds_rom: bool) -> Result<()> {
    for flavour in vmi::Flavour::ALL {
        let below = below.with_processors(flavour.processors());
        let booted = pass(&flavour.kernel()?.path, below, append)?;
        if let Below::Machine { processors: processors @ 2.., .. } = below {
            let line = format!("smp: Brought up 1 node, {processors} CPUs");
            ensure!(booted.run.serial.contains(&line), "not so: {line}\n{}", booted.run.serial);
        }
        let says = |line: &str| {
            line.contains("VMI: the ROM at ") && line.trim_end().ends_with(" serves revision 3.0")
        };
        ensure!(
            booted.run.serial.lines().any(says) == finds_rom,
            "{}: not so: the kernel finds a ROM, {finds_rom}\n{}",
            flavour.name(),
            booted.run.serial
        );
    }
    Ok(())
}

#[test]
fn a_client_without_a_rom_runs_natively() -> Result<()> {
    clients(Below::machine(None), "", false)
}

#[test]
fn a_client_runs_on_the_native_image() -> Result<()> {
    clients(Below::machine(Some(&artifacts::ensure()?.native)), "", true)
}

/// The same frames that are nothing to the kernel where the IRET stands at its own site. It knows no fix-up of the ROM's.
#[test]
fn a_bad_frame_is_an_oops_where_sites_stay_calls() -> Result<()> {
    let built = artifacts::ensure()?;
    let is_oops = |image| -> Result<bool> {
        let below = Below::machine(Some(image));
        let kernel = vmi::Flavour::I686.kernel()?.path;
        let boot = Boot {
            append: "-- only=frames".into(),
            ..Boot::tests(&built.emulator, &kernel, initramfs()?, below)
        };
        let booted = boot.run(|_| {})?;
        let text = "linux: test frames FAILED: a bad frame ends otherwise";
        let is_oops = booted.run.serial.contains(text);
        ensure!(is_oops != booted.passed(), "{}", booted.run.serial);
        ensure!(is_oops == booted.run.serial.contains("Call Trace:"), "{}", booted.run.serial);
        Ok(is_oops)
    };
    ensure!(!is_oops(&built.native)?, "the IRET does not stand at the kernel's site");
    ensure!(is_oops(&built.call)?, "the ROM's IRET does not fault");
    Ok(())
}

/// What the operations of a kernel cost with each of these images, against none, on a machine with so many processors.
fn costs_of<const N: usize>(
    flavour: vmi::Flavour,
    (cpu, processors): (&str, u32),
    images: [&Path; N],
) -> Result<[Vec<Cost>; N]> {
    let kernel = flavour.kernel()?.path;
    let (emulator, initrd) = (&artifacts::ensure()?.emulator, initramfs()?);
    let boot = |rom| {
        let below = Below::Machine { rom, cpu, processors };
        pass_boot(&costs::boot(Boot::tests(emulator, &kernel, initrd, below)))
    };
    let without = boot(None)?;
    let mut each = [const { Vec::new() }; N];
    for (costs, image) in each.iter_mut().zip(images) {
        *costs = costs::compare(&without, &boot(Some(image))?)?;
    }
    Ok(each)
}

/// The ROM's calls become native code where they are called, in a kernel whose text is read-only.
fn costs_nothing(flavour: vmi::Flavour, processors: (&str, u32)) -> Result<()> {
    let built = artifacts::ensure()?;
    let [native, call] = costs_of(flavour, processors, [&built.native, &built.call])?;
    for cost in &native {
        println!("{}: {:.0}, {:.0} with", cost.operation, cost.native, cost.rom);
        ensure!(cost.ratio() <= COST, "{cost:?}");
    }
    let (native, call) = (mean_ratio(&native), mean_ratio(&call));
    println!("mean: {native:.4}; where sites stay calls {call:.4}");
    ensure!(native <= MEAN_COST, "{native}");
    ensure!(call > native, "calls cost nothing either, so none was made: {call}");
    Ok(())
}

#[test]
fn a_client_with_two_levels_costs_nothing_on_bare_hardware() -> Result<()> {
    costs_nothing(vmi::Flavour::I686, ("max", 1))
}

#[test]
fn a_client_with_three_levels_costs_nothing_on_bare_hardware() -> Result<()> {
    costs_nothing(vmi::Flavour::I686Pae, ("max", 1))
}

/// Where several processors are an emulator's, only one byte of a site changes at a time.
#[test]
fn a_client_for_several_processors_costs_nothing_on_an_emulator() -> Result<()> {
    costs_nothing(vmi::Flavour::I686Smp, ("max", 2))
}

/// Otherwise a word does.
#[test]
fn a_client_for_several_processors_costs_nothing_on_bare_hardware() -> Result<()> {
    costs_nothing(vmi::Flavour::I686Smp, ("max,-hypervisor", 2))
}

#[test]
fn a_client_that_is_told_to_look_for_no_rom_finds_none() -> Result<()> {
    let below = Below::machine(Some(&artifacts::ensure()?.native));
    clients(below, "vmi=off -- only=pipe", false)
}

#[test]
fn a_client_runs_on_the_hypervisor_without_a_rom() -> Result<()> {
    clients(hypervisor(Mode::Trap, Paging::Shadow)?, "", false)
}

/// An image in the guest's machine serves a kernel there as on bare hardware, with a hypervisor below that knows nothing of it.
#[test]
fn a_client_runs_on_the_native_image_where_each_change_traps() -> Result<()> {
    let rom = GuestRom::File(&artifacts::ensure()?.native);
    let (built, mode, paging) = (artifacts::ensure_hosting()?, Mode::Trap, Paging::Shadow);
    clients(Below::Hypervisor { built, rom, mode, paging }, "", true)
}

#[test]
fn a_client_tells_of_each_change() -> Result<()> {
    clients(hypervisor(Mode::Vmi, Paging::Shadow)?, "", true)
}

#[test]
fn a_client_tells_of_changes_in_batches() -> Result<()> {
    clients(hypervisor(Mode::VmiBatched, Paging::Shadow)?, "", true)
}

#[test]
fn a_client_tells_of_changes_where_nobody_needs_to_know() -> Result<()> {
    clients(hypervisor(Mode::VmiBatched, Paging::Nested)?, "", true)
}

/// Exits of one of each of [`PIECES`], from boots with more of them and from one without.
fn exits_of_one(flavour: vmi::Flavour, mode: Mode) -> Result<[f64; PIECES.len()]> {
    const MORE: u32 = 100;
    let (kernel, below) = (flavour.kernel()?, hypervisor(mode, Paging::Shadow)?);
    let exits = |more: &str| -> Result<f64> {
        let booted = pass(&kernel.path, below, &format!("-- only=pipe{more}"))?;
        Ok(counters(&booted)?.exits() as f64)
    };
    let without = exits("")?;
    let mut each = [0.0; PIECES.len()];
    for (cost, (word, _)) in each.iter_mut().zip(PIECES) {
        *cost = (exits(&format!(" {word}={MORE}"))? - without) / f64::from(MORE);
    }
    Ok(each)
}

/// What VMI is for.
fn batches_save_exits(flavour: vmi::Flavour) -> Result<()> {
    let trap = exits_of_one(flavour, Mode::Trap)?;
    let batched = exits_of_one(flavour, Mode::VmiBatched)?;
    let mut said = String::new();
    let mut is_saved = true;
    for ((word, bound), (trap, batched)) in PIECES.into_iter().zip(trap.into_iter().zip(batched)) {
        said.push_str(&format!(
            "{word}: {trap:.1} exits in trap, {batched:.1} in vmi-batched, {:.2} times as many\n",
            trap / batched
        ));
        is_saved &= trap > bound * batched;
    }
    print!("{said}");
    ensure!(is_saved, "{}:\n{said}", flavour.name());
    Ok(())
}

#[test]
fn a_client_with_two_levels_saves_exits() -> Result<()> {
    batches_save_exits(vmi::Flavour::I686)
}

#[test]
fn a_client_with_three_levels_saves_exits() -> Result<()> {
    batches_save_exits(vmi::Flavour::I686Pae)
}

/// What becomes of a boot whose first program lets the kernel end the machine.
fn ended_by_kernel(word: &str) -> Result<Booted> {
    let built = artifacts::ensure_hosting()?;
    let (mode, paging) = (Mode::Trap, Paging::Nested);
    let below = Below::Hypervisor { built, rom: GuestRom::Ours, mode, paging };
    let kernel = debian::kernel(Flavour::I686)?;
    let mut boot = Boot::tests(&built.emulator, &kernel, initramfs()?, below);
    (boot.append, boot.marker) = (format!("-- only=fork end={word}").into(), None);
    let booted = boot.run(|_| {})?;
    ensure!(
        booted.counters.is_some_and(|counters| counters.exits() > 0),
        "{}",
        booted.last_lines()
    );
    Ok(booted)
}

/// Whoever brings an initramfs of his own ends with the machine off.
#[test]
fn a_machine_that_is_switched_off_has_been_counted() -> Result<()> {
    let booted = ended_by_kernel("power-off")?;
    ensure!(booted.end == Some(End::PowerOff), "{:?}\n{}", booted.end, booted.last_lines());
    ensure!(booted.passed() && booted.complaint().is_none(), "{}", booted.run.outcome);
    Ok(())
}

/// A kernel that panics restarts, too.
#[test]
fn a_machine_that_is_reset_has_been_counted_and_is_no_pass() -> Result<()> {
    let booted = ended_by_kernel("restart")?;
    ensure!(booted.end == Some(End::Reset), "{:?}\n{}", booted.end, booted.last_lines());
    ensure!(!booted.passed() && booted.complaint().is_some(), "{}", booted.run.outcome);
    Ok(())
}

#[test]
fn a_first_program_that_does_not_run_is_no_pass() -> Result<()> {
    let built = artifacts::ensure_hosting()?;
    let folder = tempfile::tempdir()?;
    let initrd = folder.path().join("initramfs");
    fs::write(&initrd, linux::archive(b"not a program"))?;
    let kernel = debian::kernel(Flavour::I686)?;
    let mut boot = Boot::tests(&built.emulator, &kernel, &initrd, Below::machine(None));
    boot.append = "panic=-1".into();
    let booted = boot.run(|_| {})?;
    ensure!(booted.run.serial.contains("Kernel panic"), "{}", booted.last_lines());
    ensure!(!booted.passed(), "a kernel that panicked passes");
    Ok(())
}

#[test]
fn a_kernel_that_is_cut_off_is_refused() -> Result<()> {
    let built = artifacts::ensure_hosting()?;
    let folder = tempfile::tempdir()?;
    let kernel = folder.path().join("bzImage");
    let bytes = fs::read(debian::kernel(Flavour::I686)?)?;
    fs::write(&kernel, &bytes[..bytes.len() / 2])?;
    let below = Below::Hypervisor {
        built,
        rom: GuestRom::Ours,
        mode: Mode::Trap,
        paging: Paging::default(),
    };
    let booted = Boot::tests(&built.emulator, &kernel, initramfs()?, below).run(|_| {})?;
    let is_refused = matches!(booted.run.outcome, Outcome::WrongExit { status: Some(REFUSED), .. });
    ensure!(is_refused, "{}\n{}", booted.run.outcome, booted.last_lines());
    ensure!(booted.run.host.contains("the guest: the file is cut off"), "{}", booted.run.host);
    Ok(())
}
