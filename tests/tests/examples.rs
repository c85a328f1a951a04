//! The example kernels: one binary, with the platform's ROM and without.

use anyhow::{Context, Result, anyhow, ensure};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};
use object::{Object, ObjectSection, ObjectSymbol};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use vmi_abi::{REVISION_3_0, number};
use vmi_tests::Specimen;
use xtask::build::Tools;
use xtask::qemu::{Attachment, BANNER, Machine, Model, Outcome, Run};
use xtask::toolchain::Findings;
use xtask::{artifacts, examples, link};

/// A kernel, with the name that its lines begin with.
struct Kernel {
    name: &'static str,
    path: PathBuf,
}

/// The kernels, built once: the one in Rust, and the one in C by each compiler.
fn kernels() -> Result<&'static [Kernel]> {
    static BUILT: OnceLock<Result<Vec<Kernel>, String>> = OnceLock::new();
    let build = || -> Result<Vec<Kernel>> {
        let findings = Findings::gather();
        let tools = Tools::from_findings(&findings)?;
        let link = link::build(&tools, REVISION_3_0)?;
        let rust = Kernel { name: "rust-kernel", path: examples::rust_kernel(&tools, &link)? };
        let mut kernels = vec![rust];
        // GCC's comes last, and stays where users find it.
        for (compilers, name) in [(&findings.clang, "clang"), (&findings.gcc, "gcc")] {
            let compilers = compilers.as_ref().map_err(|error| anyhow!("{error}"))?;
            let built = examples::c_kernel(&tools, compilers, &link)?;
            let path = built.with_file_name(format!("c-kernel-{name}.elf"));
            std::fs::copy(built, &path)?;
            kernels.push(Kernel { name: "c-kernel", path });
        }
        Ok(kernels)
    };
    let built = BUILT.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    built.as_deref().map_err(|error| anyhow!("{error}"))
}

/// Boots a kernel.
fn boot(kernel: &Kernel, rom: Option<&Path>, model: Model) -> Result<Run> {
    let machine = Machine {
        model,
        roms: rom.into_iter().map(|rom| Attachment::OptionRom(rom.to_owned())).collect(),
        kernel: Some(kernel.path.clone()),
        marker: format!("{}: done: ", kernel.name),
        banner: rom.map(|_| BANNER.into()),
        ..Machine::default()
    };
    Ok(machine.run(&artifacts::ensure()?.emulator)?)
}

/// Boots each kernel, and wants it to come to its end by a ROM at the place that its first line names.
fn pass(rom: Option<&Path>, model: Model, place: &str) -> Result<()> {
    for kernel in kernels()? {
        let Run { outcome, serial, command, .. } = boot(kernel, rom, model)?;
        ensure!(outcome == Outcome::Passed, "{outcome}\n{command}\n{serial}");
        let first = serial.lines().find(|line| line.starts_with(kernel.name)).unwrap_or_default();
        let wanted = format!("{}: VMI 3.0, {place}, at 0x", kernel.name);
        ensure!(first.starts_with(&wanted), "{serial}");
    }
    Ok(())
}

const PLATFORM: &str = "platform ROM";
const LINKED: &str = "linked in";

#[test]
fn one_binary_runs_with_each_rom_and_without() -> Result<()> {
    let built = artifacts::ensure()?;
    for model in [Model::Pc, Model::Q35] {
        for rom in [&built.native, &built.fastest, &built.call] {
            pass(Some(rom), model, PLATFORM)?;
        }
        pass(None, model, LINKED)?;
    }
    Ok(())
}

/// Another revision, and an answer that the contract does not allow.
#[test]
fn a_rom_that_is_no_use_is_left_alone() -> Result<()> {
    let built = artifacts::ensure()?;
    pass(Some(&built.slots_13_3), Model::Pc, LINKED)?;
    let specimen = Specimen::read(&built.call, &built.call_elf)?;
    let folder = tempfile::tempdir()?;
    let rom = folder.path().join("nop.rom");
    std::fs::write(&rom, specimen.with_nop([number::SetCR3])?)?;
    pass(Some(&rom), Model::Pc, LINKED)
}

/// NOP is all that a call needs by which a kernel only tells something.
#[test]
fn a_rom_may_do_nothing_where_it_is_only_told() -> Result<()> {
    let built = artifacts::ensure()?;
    let specimen = Specimen::read(&built.call, &built.call_elf)?;
    let folder = tempfile::tempdir()?;
    let rom = folder.path().join("nop.rom");
    let told = [number::AllocatePage, number::IODelay, number::SetLazyMode];
    std::fs::write(&rom, specimen.with_nop(told)?)?;
    pass(Some(&rom), Model::Pc, PLATFORM)
}

/// The kernels depend on the calls: none comes to its end with a ROM that leaves out what one of them does.
#[test]
fn a_rom_that_does_not_do_its_work_fails() -> Result<()> {
    let built = artifacts::ensure()?;
    let specimen = Specimen::read(&built.call, &built.call_elf)?;
    let folder = tempfile::tempdir()?;
    let rom = folder.path().join("lazy.rom");
    for call in [number::SetPxE, number::InvalPage, number::UpdateKernelStack, number::SetCR3] {
        std::fs::write(&rom, specimen.with_code(call, |assembler, _| assembler.ret())?)?;
        for kernel in kernels()? {
            let run = boot(kernel, Some(&rom), Model::Pc)?;
            ensure!(run.outcome != Outcome::Passed, "call {}: {}", call.0, run.serial);
        }
    }
    Ok(())
}

/// Whether an instruction needs ring 0, or shows or changes what a hypervisor keeps for itself.
fn is_sensitive(instruction: &Instruction) -> bool {
    use Mnemonic::{
        Iret, Iretd, Popf, Popfd, Pushf, Pushfd, Sgdt, Sidt, Sldt, Smsw, Str, Sysenter,
    };
    let sensitive =
        [Iret, Iretd, Popf, Popfd, Pushf, Pushfd, Sgdt, Sidt, Sldt, Smsw, Str, Sysenter];
    instruction.is_privileged() || sensitive.contains(&instruction.mnemonic())
}

/// The sensitive instructions of the kernel's code within and outside of the ROM that is linked in.
fn sensitive_instructions(kernel: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let bytes = std::fs::read(kernel)?;
    let file = object::File::parse(&*bytes)?;
    let text = file.section_by_name(".text").context("no .text")?;
    let (start, code) = (text.address(), text.data()?);
    let symbol = |name| file.symbol_by_name(name).with_context(|| format!("no symbol {name}"));
    // Before `boot` lies the multiboot header.
    let boot = symbol("boot")?.address();
    let rom = symbol("vmi_native_rom")?;
    let rom = rom.address()..rom.address() + rom.size();
    // Decoding starts anew at each symbol, so that padding puts nothing out of step.
    let end = start + code.len() as u64;
    let mut places: Vec<u64> = file.symbols().map(|symbol| symbol.address()).collect();
    places.extend([rom.end, end]);
    places.retain(|place| (boot..=end).contains(place));
    places.sort_unstable();
    places.dedup();

    let (mut inside, mut outside) = (Vec::new(), Vec::new());
    for piece in places.windows(2) {
        let Range { start: from, end: to } = piece[0]..piece[1];
        let piece = &code[(from - start) as usize..(to - start) as usize];
        for instruction in Decoder::with_ip(32, piece, from, DecoderOptions::NONE) {
            if is_sensitive(&instruction) {
                let found = format!("{:#x}: {:?}", instruction.ip(), instruction.code());
                if rom.contains(&from) { inside.push(found) } else { outside.push(found) }
            }
        }
    }
    Ok((inside, outside))
}

#[test]
fn whatever_needs_ring_0_is_a_call() -> Result<()> {
    for Kernel { path, .. } in kernels()? {
        let (inside, outside) = sensitive_instructions(path)?;
        ensure!(outside.is_empty(), "{outside:#?}");
        // They are found where they are: the ROM that is linked in has nothing else to do.
        ensure!(inside.len() > 40, "{inside:#?}");
    }
    Ok(())
}

/// Who learns from an example reads all of it: less than 500 lines in all its sources.
#[test]
fn an_example_is_short() -> Result<()> {
    fn lines(path: &Path) -> Result<usize> {
        if path.is_dir() {
            return std::fs::read_dir(path)?.map(|entry| lines(&entry?.path())).sum();
        }
        let is_source = path.file_name().is_some_and(|name| name != "Cargo.toml");
        Ok(if is_source { std::fs::read_to_string(path)?.lines().count() } else { 0 })
    }
    for example in ["examples/rust-kernel", "examples/c-kernel"] {
        let lines = lines(&xtask::workspace().join(example))?;
        ensure!((300..500).contains(&lines), "{example} has {lines} lines");
    }
    Ok(())
}
