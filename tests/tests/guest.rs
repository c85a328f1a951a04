//! The test guest on both images: every machine, processor and place for a ROM that is supported.

use anyhow::{Context, Result};
use iced_x86::Register;
use object::{Object, ObjectSection, ObjectSymbol};
use std::path::PathBuf;
use vmi_abi::{CALLS_3_0, CallNumber};
use vmi_native_backend::binding::SiteRule;
use vmi_tests::Specimen;
use xtask::artifacts::{self, Artifacts};
use xtask::conformance::{self, Client, Conformance, Subject, mean_ratio};
use xtask::inspect::machine::{Code, Machine as Processor, Memory, Region, Registers, Stop};
use xtask::inspect::random::Random;
use xtask::inspect::{HIGH_BASE, Rom, answers};
use xtask::qemu::{Attachment, Machine, Model};

/// Runs the guest on an option ROM.
fn boot(rom: impl Fn(&Artifacts) -> &PathBuf, machine: &Machine) -> Result<Conformance> {
    try_out(&Subject::option_rom(rom(artifacts::ensure()?))?, machine)
}

fn try_out(subject: &Subject, machine: &Machine) -> Result<Conformance> {
    let built = artifacts::ensure()?;
    conformance::check(&built.emulator, &built.guest, subject, machine, |_| ())
}

/// Runs the guest, and wants every check to hold.
fn passes(
    rom: impl Fn(&Artifacts) -> &PathBuf,
    way: fn(PathBuf) -> Attachment,
    machine: &Machine,
) -> Result<()> {
    let rom = rom(artifacts::ensure()?);
    let client = Client::of_rom(rom)?;
    all_holds(&Subject { rom: Some(way(rom.clone())), client }, machine)
}

fn all_holds(subject: &Subject, machine: &Machine) -> Result<()> {
    let result = try_out(subject, machine)?;
    assert_eq!(result.complaint(), None, "{}\n{}", result.run.command, result.run.serial);
    // Both paging modes and all places of the ROM, in each the entry points and every call but Reboot.
    let places = match subject.client {
        Client::Lookup | Client::PointerTable => ["direct", "alias", "copy"].as_slice(),
        Client::CopiedSlots => &["direct", "alias", "copy", "patched"],
    };
    // What is linked in is mapped once.
    let places = places.len() - usize::from(subject.rom.is_none());
    // Two sums over the image, Reboot, and several processors at one site where sites are rewritten.
    let others = 3 + usize::from(subject.client == Client::Lookup);
    let calls = subject.client.revision().calls().count();
    assert_eq!(result.report.checks.len(), 2 * places * calls + others, "{}", result.run.command);
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

/// One test for each line: its name, the machine, the client, its ROM.
macro_rules! older_revisions {
    ($( $name:ident: $model:ident, $client:ident, $rom:ident; )*) => { $(
        #[test]
        fn $name() -> Result<()> {
            let rom = artifacts::ensure()?.$rom.clone();
            let client = Client::$client;
            let subject = Subject { rom: Some(Attachment::OptionRom(rom)), client };
            all_holds(&subject, &Machine { model: Model::$model, ..Machine::default() })
        }
    )* };
}

older_revisions! {
    copied_slots_on_pc: Pc, CopiedSlots, slots_13_0;
    copied_slots_on_q35: Q35, CopiedSlots, slots_13_0;
    copied_slots_of_a_later_minor: Pc, CopiedSlots, slots_13_3;
    pointer_table_on_pc: Pc, PointerTable, slots_13_3;
    pointer_table_on_q35: Q35, PointerTable, slots_13_3;
    pointer_table_on_isapc: Isapc, PointerTable, slots_13_3;
}

/// Slots in small and in old machines.
#[test]
fn slots_on_other_processors() -> Result<()> {
    for cpu in ["qemu32", "qemu64", "max,-cx8"] {
        let machine = Machine { cpu: cpu.into(), memory: 16, ..Machine::default() };
        passes(|built| &built.slots_13_3, Attachment::OptionRom, &machine)?;
    }
    Ok(())
}

/// ROMs of all revisions in one machine: each client finds one of its own, and passes the others over.
#[test]
fn each_client_finds_its_own_rom() -> Result<()> {
    let built = artifacts::ensure()?;
    for (client, roms, wanted) in [
        (Client::Lookup, [&built.slots_13_0, &built.slots_13_3, &built.native], "3.0"),
        (Client::PointerTable, [&built.native, &built.slots_13_0, &built.slots_13_3], "13.3"),
        (Client::CopiedSlots, [&built.native, &built.slots_13_3, &built.slots_13_0], "13."),
    ] {
        let mut roms = roms.map(|rom| Attachment::OptionRom(rom.clone())).into_iter();
        let subject = Subject { rom: roms.next(), client };
        let machine = Machine { roms: roms.collect(), ..Machine::default() };
        let result = try_out(&subject, &machine)?;
        assert_eq!(result.complaint(), None, "{}\n{}", result.run.command, result.run.serial);
        // A client of 13.0 takes either of 13.x; QEMU chooses the order.
        let found = result.report.rom.map(|rom| rom.revision).unwrap_or_default();
        assert!(found.starts_with(wanted), "{client:?} found {found}");
    }
    Ok(())
}

/// QEMU's own option ROM, and a VMI ROM of another revision, both before ours: the guest passes
/// them over, as Linux does.
#[test]
fn beside_other_option_roms() -> Result<()> {
    let machine = Machine {
        roms: vec![Attachment::OptionRom(artifacts::ensure()?.slots_13_3.clone())],
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

/// Without a ROM the same guest runs on what is linked into it, whichever client it is.
#[test]
fn without_a_rom() -> Result<()> {
    for client in [Client::Lookup, Client::CopiedSlots, Client::PointerTable] {
        for model in [Model::Pc, Model::Q35] {
            let machine = Machine { model, ..Machine::default() };
            all_holds(&Subject { rom: None, client }, &machine)?;
        }
    }
    Ok(())
}

/// What is linked in rewrites call sites as soon as the kernel lets it, and not before.
#[test]
fn a_kernel_decides_about_its_own_sites() -> Result<()> {
    let linked = Subject { rom: None, client: Client::Lookup };
    for (processors, cpu, words) in
        [(1, "max", "rewrite-sites"), (4, "max,-hypervisor", "rewrite-sites"), (1, "max", "")]
    {
        let append = Some(words.to_owned());
        let machine = Machine { processors, cpu: cpu.into(), append, ..Machine::default() };
        all_holds(&linked, &machine)?;
        let cost = mean_ratio(&try_out(&linked, &machine)?.costs);
        let native = processors == 1 && !words.is_empty();
        assert_eq!(cost < 1.005, native, "{processors} {words}: {cost}");
    }
    Ok(())
}

/// A ROM that the guest passes over is no pass, although what is linked in would do.
#[test]
fn a_rom_of_another_revision_fails() -> Result<()> {
    let rom = Some(Attachment::OptionRom(artifacts::ensure()?.native.clone()));
    let result = try_out(&Subject { rom, client: Client::PointerTable }, &Machine::default())?;
    let complaint = result.complaint().unwrap_or_default();
    assert!(complaint.contains("passed the ROM over"), "{complaint}");
    assert!(result.run.serial.contains("revision 3.0 at offset 12"), "{}", result.run.serial);
    Ok(())
}

/// What a kernel in Rust enters where a call has no code: what does nothing gives zeroes for results and keeps all else; what panics
/// knows the call.
#[test]
fn calls_without_code_do_nothing_or_panic() -> Result<()> {
    const RETURN: u32 = 0x1000;
    const STACK: u32 = 0x8000;
    let file = std::fs::read(&artifacts::ensure()?.guest)?;
    let file = object::File::parse(&*file)?;
    let symbols: Vec<(String, u32)> = file
        .symbols()
        .filter_map(|symbol| Some((symbol.name().ok()?.into(), symbol.address() as u32)))
        .collect();
    let place = |end: &str| {
        let found =
            symbols.iter().find(|(name, _)| name.contains("3vmi5enter") && name.ends_with(end));
        found.map(|(_, address)| *address).with_context(|| format!("no {end}"))
    };
    let text = file.section_by_name(".text").context("no .text")?;
    let (bytes, base) = (text.data()?, text.address() as u32);
    let code = Code::new(bytes, 1_000_000);
    let run = |entry: u32, budget: u64| {
        let mut stack =
            Region { name: "stack", base: STACK - 64, bytes: vec![0; 128], writable: true };
        stack.bytes[64..68].copy_from_slice(&RETURN.to_le_bytes());
        let mut registers = Registers::default();
        (registers.eip, registers.eflags) = (entry, 0x8d7);
        for (value, register) in (1..).zip(xtask::inspect::machine::registers::FREE) {
            registers.set(register, 0x0101_0101 * value);
        }
        registers.set(Register::ESP, STACK);
        let memory = Memory::new(bytes, base, vec![stack]);
        let mut processor = Processor::new(&code, memory, registers.clone(), Random::new(1));
        let stop = processor.run(budget);
        (stop, registers, processor.registers)
    };
    const CPUID: [Register; 4] = [Register::EAX, Register::EBX, Register::ECX, Register::EDX];
    for (name, results) in [
        ("nothing_at_all", &CPUID[..0]),
        ("nothing_in_eax", &CPUID[..1]),
        ("nothing_in_edx_eax", &[Register::EAX, Register::EDX]),
        ("nothing_of_cpuid", &CPUID),
    ] {
        let (stop, mut wanted, is) = run(place(name)?, 10);
        results.iter().for_each(|register| wanted.set(*register, 0));
        wanted.set(Register::ESP, STACK + 4);
        wanted.eip = RETURN;
        assert_eq!((stop, is), (Stop::Left, wanted), "{name}");
    }
    let panics = place("without_code")?;
    let entries = symbols.iter().filter(|(name, _)| name.contains("3vmi5enter7unbound"));
    let mut numbers: Vec<u32> = entries
        .map(|(name, entry)| {
            let (stop, _, is) = run(*entry, 2);
            assert_eq!((stop, is.eip), (Stop::Budget, panics), "{name}");
            is.get(Register::ECX)
        })
        .collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..CALLS_3_0.len() as u32).collect::<Vec<_>>());
    Ok(())
}
