//! The test guest on both images: every machine, processor and place for a ROM that is supported.

use anyhow::Result;
use std::path::PathBuf;
use vmi_abi::CallNumber;
use vmi_native_backend::binding::SiteRule;
use vmi_tests::Specimen;
use xtask::artifacts::{self, Artifacts};
use xtask::conformance::{self, Conformance, mean_ratio};
use xtask::inspect::{HIGH_BASE, Rom, answers};
use xtask::qemu::{Attachment, Machine, Model};

/// Runs the guest on an option ROM.
fn boot(rom: impl Fn(&Artifacts) -> &PathBuf, machine: &Machine) -> Result<Conformance> {
    boot_by(rom, Attachment::OptionRom, machine)
}

fn boot_by(
    rom: impl Fn(&Artifacts) -> &PathBuf,
    way: fn(PathBuf) -> Attachment,
    machine: &Machine,
) -> Result<Conformance> {
    let built = artifacts::ensure()?;
    conformance::check(&built.emulator, &built.guest, rom(built), way, machine, |_| ())
}

/// Runs the guest, and wants every check to hold.
fn passes(
    rom: impl Fn(&Artifacts) -> &PathBuf,
    way: fn(PathBuf) -> Attachment,
    machine: &Machine,
) -> Result<()> {
    let result = boot_by(rom, way, machine)?;
    assert_eq!(result.complaint(), None, "{}\n{}", result.run.command, result.run.serial);
    // Both paging modes and all three places of the ROM, every call but Reboot in each.
    assert_eq!(result.report.checks.len(), 2 * 3 * (73 + 1) + 4, "{}", result.run.command);
    Ok(())
}

/// One test for each line: its name, the machine, the processor, the way in which the ROM gets there.
macro_rules! machines {
    ($( $name:ident: $model:ident, $cpu:literal, $way:ident; )*) => { $(
        #[test]
        fn $name() -> Result<()> {
            let machine = Machine { model: Model::$model, cpu: $cpu.into(), ..Machine::default() };
            passes(|built| &built.native, Attachment::$way, &machine)?;
            passes(|built| &built.call, Attachment::$way, &machine)
        }
    )* };
}

machines! {
    pc_max: Pc, "max", OptionRom;
    pc_qemu64: Pc, "qemu64", OptionRom;
    pc_qemu32: Pc, "qemu32", OptionRom;
    pc_in_a_card: Pc, "max", PciRomBar;
    q35_max: Q35, "max", OptionRom;
    q35_qemu64: Q35, "qemu64", OptionRom;
    q35_qemu32: Q35, "qemu32", OptionRom;
    q35_in_a_card: Q35, "max", PciRomBar;
    isapc_max: Isapc, "max", OptionRom;
    isapc_qemu64: Isapc, "qemu64", OptionRom;
    isapc_qemu32: Isapc, "qemu32", OptionRom;
    microvm_max: Microvm, "max", OptionRom;
    microvm_qemu64: Microvm, "qemu64", OptionRom;
    microvm_qemu32: Microvm, "qemu32", OptionRom;
}

/// QEMU's own option ROM, and a VMI ROM of another revision, both before ours: the guest passes
/// them over, as Linux does.
#[test]
fn beside_other_option_roms() -> Result<()> {
    let built = artifacts::ensure()?;
    let folder = tempfile::tempdir()?;
    let older = folder.path().join("revision-13.rom");
    let mut bytes = std::fs::read(&built.native)?;
    bytes[std::mem::offset_of!(vmi_abi::RomHeader, api_version_maj)] = vmi_abi::REVISION_13_3.major;
    let last = bytes.len() - 1;
    bytes[last] =
        bytes[last].wrapping_sub(vmi_abi::REVISION_13_3.major - vmi_abi::REVISION_3_0.major);
    std::fs::write(&older, bytes)?;

    let machine = Machine {
        roms: vec![Attachment::OptionRom(older)],
        extra: vec!["-device".into(), "e1000".into()],
        ..Machine::default()
    };
    // The harness puts the ROM under test first; the older one must still be passed over wherever
    // SeaBIOS puts it.
    passes(|built| &built.native, Attachment::OptionRom, &machine)
}

/// A machine with little memory, and one with several processors.
#[test]
fn in_small_and_in_large_machines() -> Result<()> {
    for (memory, processors) in [(16, 1), (1024, 4)] {
        let machine = Machine { memory, processors, ..Machine::default() };
        passes(|built| &built.call, Attachment::OptionRom, &machine)?;
        passes(|built| &built.native, Attachment::OptionRom, &machine)?;
    }
    Ok(())
}

/// The image that leaves the guest's code alone.
#[test]
fn without_rewriting() -> Result<()> {
    passes(|built| &built.fastest, Attachment::OptionRom, &Machine::default())
}

/// A processor that cannot store eight bytes at once: no site is touched.
#[test]
fn without_the_instruction_that_rewrites() -> Result<()> {
    let machine = Machine { cpu: "max,-cx8".into(), ..Machine::default() };
    passes(|built| &built.native, Attachment::OptionRom, &machine)
}

/// Several processors that are no hypervisor's, as on bare hardware: sites within a word.
#[test]
fn several_processors_of_hardware() -> Result<()> {
    let cpu = "max,-hypervisor".into();
    let machine = Machine { processors: 4, cpu, ..Machine::default() };
    passes(|built| &built.native, Attachment::OptionRom, &machine)
}

/// All processors run one site while it is rewritten; the other tests would pass without that.
#[test]
fn four_processors_at_one_site() -> Result<()> {
    let machine = Machine { processors: 4, ..Machine::default() };
    let serial = boot(|built| &built.native, &machine)?.run.serial;
    assert!(serial.contains("# 4 processors took part"), "{serial}");
    assert!(serial.contains("while 3 processors ran it"), "{serial}");
    Ok(())
}

/// Natively the interface costs nothing where it is called, and nothing by much elsewhere. Without
/// rewriting it does cost something: the figures are not made of ones.
#[test]
fn a_rom_costs_nothing_on_bare_hardware() -> Result<()> {
    let machine = Machine::default();
    let costs = boot(|built| &built.native, &machine)?.costs;
    assert_eq!(costs.len(), 12, "{costs:#?}");
    assert!(costs.iter().all(|cost| cost.ratio() <= 1.02), "{costs:#?}");
    assert!(mean_ratio(&costs) <= 1.01, "{costs:#?}");
    let fastest = boot(|built| &built.fastest, &machine)?.costs;
    let call = boot(|built| &built.call, &machine)?.costs;
    assert!(1.1 < mean_ratio(&fastest), "{fastest:#?}");
    assert!(mean_ratio(&fastest) < mean_ratio(&call), "{call:#?}");
    Ok(())
}

/// What the inspector finds by executing the ROM is what a guest is told: the image that POST leaves
/// on this machine, in the inspector's own machine and in QEMU's.
#[test]
fn the_inspector_and_the_guest_get_the_same_answers() -> Result<()> {
    let built = artifacts::ensure()?;
    let specimen = Specimen::read(&built.native, &built.native_elf)?;
    for (processors, rule) in [(1, SiteRule::Anywhere), (2, SiteRule::OneByte)] {
        let machine = Machine { processors, ..Machine::default() };
        let guest = boot(|built| &built.native, &machine)?.calls;
        let inspected = answers(&Rom::parse(&specimen.with_rule(rule)?)?, HIGH_BASE);
        for call in guest {
            let found = inspected.answer_of(CallNumber(call.number)).and_then(|a| a.kind.name());
            assert_eq!(found, Some(call.answer.as_str()), "{} {rule:?}", call.name);
        }
    }
    Ok(())
}

/// Without a ROM there is nothing to pass.
#[test]
fn a_machine_without_a_rom_fails() -> Result<()> {
    let built = artifacts::ensure()?;
    let machine = Machine { kernel: Some(built.guest.clone()), banner: None, ..Machine::default() };
    let run = machine.run(&built.emulator)?;
    assert_ne!(run.outcome, xtask::qemu::Outcome::Passed);
    assert!(run.serial.contains("Bail out! no VMI ROM of revision 3.0"), "{}", run.serial);
    Ok(())
}
