//! The image with the reference backend: placed by a hypervisor that exists only here, and executed instruction by instruction.

use anyhow::{Context, Result, bail, ensure};
use iced_x86::{Mnemonic, Register};
use std::collections::BTreeMap;
use std::mem::offset_of;
use vmi_abi::flags::{EntryFlags, LazyMode};
use vmi_abi::header::{RomHeader, checksum};
use vmi_abi::{CALLS_3_0, CallNumber, REVISION_3_0, RelocationType, STACK_LIMIT, number, probe};
use vmi_hv_backend::reference::interface::{
    BASE, BATCH_LIMIT, Features, GRANT_OFFSET, GRANT_SIGNATURE, Hypercall, LEAF_GRANT,
    LEAF_INTERFACE, PHYSICAL, SHOWN_BYTES, SIGNATURE, Status, VERSION,
};
use vmi_hv_backend::reference::{Reference, Unfit};
use vmi_hv_backend::{ATTEMPTS, CHANGED, Update};
use vmi_native_backend::binding::{Bind, SiteRule, answer, least_rule};
use vmi_tests::{KEPT, placed};
use xtask::artifacts;
use xtask::inspect::machine::{Code, Machine, Memory, Region, Registers, Stop};
use xtask::inspect::random::Random;
use xtask::inspect::{self, HIGH_BASE, Rom, verify};

/// Bytes that the image may have.
const LIMIT: usize = 16 * 1024;

/// Instructions that SetPxE may take in the ROM, from its entry to its return, where it waits, in a lazy mode or told late there.
const SHORT_LIMIT: u64 = 40;

/// The same for every update that waits.
const WAITING_LIMIT: u64 = 43;

/// The same for one that is told late: it is stored as well, 64 bits of it as one.
const LATE_LIMIT: u64 = 58;

/// The same where it is looked up that it may, because page faults are quiet: outside of the lazy mode.
const QUIET_LIMIT: u64 = 110;

/// Instructions that `get_reloc` may take: ten more than in the native image.
const GET_RELOC_LIMIT: u64 = 34;

/// Where the image lies, and two linear addresses of physical address 0: identity, and as Linux has it.
const IMAGE: u32 = 0xc_a000;
const ALIASES: [u32; 2] = [0, 0xc000_0000];

/// The granted memory.
const PAGE: u32 = 0xd_4000;

/// A page table: the entries that are set lie in it.
const TABLE: u32 = 0xc000_1000;

/// The debug console of Bochs and of QEMU's `-debugcon`.
const DEBUG_PORT: u16 = 0xe9;

/// Where calls return to.
const RETURN_ADDRESS: u32 = 0xc010_4567;

const STACK_BASE: u32 = 0xc12f_e000;
const STACK_SIZE: usize = 2048;
const STACK_ENTRY: u32 = STACK_BASE + 4 * STACK_LIMIT;

fn image() -> Result<Vec<u8>> {
    Ok(std::fs::read(&artifacts::ensure()?.reference)?)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// CPUID of the hypervisor that the image is for.
fn leaves(features: Features) -> BTreeMap<u32, [u32; 4]> {
    BTreeMap::from([
        (1, [0x633, 0x800, 1 << 31, 0x0383_fbff]),
        (BASE, [LEAF_GRANT, word(&SIGNATURE, 0), word(&SIGNATURE, 4), word(&SIGNATURE, 8)]),
        (LEAF_INTERFACE, [VERSION, features.bits(), BATCH_LIMIT, 0]),
        (LEAF_GRANT, [PAGE, Reference::MEMORY, 0, 0]),
    ])
}

/// What came of an execution.
#[derive(Debug)]
struct Outcome {
    stop: Stop,
    registers: Registers,
    instructions: u64,
    stack: u32,
    events: Vec<Mnemonic>,
    /// CR2, CR3 and CR4 as they are then.
    control: [u32; 8],
}

/// What a hypercall said, and what the updates of a batch were.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Made {
    number: u32,
    address: u32,
    count: u32,
    updates: Vec<Update>,
    text: String,
}

/// How a hypercall is answered: EAX and EDX, from its number among all.
type Answers = fn(usize, &Made) -> (i32, u32);

const DONE: Answers = |_, made| (Status::Done as i32, made.count);

/// A guest with a placed image.
struct Guest {
    image: Vec<u8>,
    page: Vec<u8>,
    /// The page at [`TABLE`].
    table: Vec<u8>,
    leaves: BTreeMap<u32, [u32; 4]>,
    answers: Answers,
    made: Vec<Made>,
    /// What was said at the debug port.
    said: String,
    seed: u64,
}

impl Guest {
    /// A guest that has called `vmi_init` by the first alias.
    fn new(features: Features) -> Result<Self> {
        let mut guest = Self::placed(leaves(features))?;
        let outcome = guest.init(ALIASES[0])?;
        ensure!(outcome.registers.get(Register::EAX) == 0, "vmi_init refuses");
        ensure!(guest.made.is_empty(), "hypercalls in vmi_init: {:?}", guest.made);
        Ok(guest)
    }

    fn placed(leaves: BTreeMap<u32, [u32; 4]>) -> Result<Self> {
        Ok(Self {
            image: placed(&image()?, PAGE - IMAGE),
            page: vec![0; Reference::MEMORY as usize],
            table: vec![0; 4096],
            leaves,
            answers: DONE,
            made: Vec::new(),
            said: String::new(),
            seed: 1,
        })
    }

    fn is_chosen(&self) -> bool {
        word(&self.page, 0) != 0
    }

    fn init(&mut self, alias: u32) -> Result<Outcome> {
        let entry = alias + IMAGE + offset_of!(RomHeader, vmi_init) as u32;
        let outcome = self.run(alias, entry, &[], &[])?.returned()?;
        ensure!(outcome.stack < STACK_LIMIT, "vmi_init: {} bytes of stack", outcome.stack);
        Ok(outcome)
    }

    /// Type and address of `get_reloc`'s answer, and instructions.
    fn ask(&mut self, alias: u32, call: CallNumber) -> Result<(RelocationType, u32, u64)> {
        let entry = alias + IMAGE + offset_of!(RomHeader, get_reloc) as u32;
        let outcome = self.run(alias, entry, &[(Register::EAX, call.0)], &[])?.returned()?;
        let [eax, edx] =
            [Register::EAX, Register::EDX].map(|register| outcome.registers.get(register));
        Ok((RelocationType(u8::try_from(edx)?), eax, outcome.instructions))
    }

    /// Calls what `get_reloc` answers, with EAX, EDX and ECX, and words of the stack.
    fn call(
        &mut self,
        alias: u32,
        call: CallNumber,
        [eax, edx, ecx]: [u32; 3],
        words: &[u32],
    ) -> Result<Outcome> {
        let (kind, entry, _) = self.ask(alias, call)?;
        ensure!(kind == RelocationType::CALL_REL, "call {} is answered {kind:?}", call.0);
        let arguments = [(Register::EAX, eax), (Register::EDX, edx), (Register::ECX, ecx)];
        let outcome = self.run(alias, entry, &arguments, words)?;
        ensure!(outcome.stack < STACK_LIMIT, "call {}: {} bytes of stack", call.0, outcome.stack);
        Ok(outcome)
    }

    /// The same for a call that has to return.
    fn done(&mut self, call: CallNumber, arguments: [u32; 3], words: &[u32]) -> Result<Outcome> {
        self.call(ALIASES[1], call, arguments, words)?.returned()
    }

    fn set_entry(&mut self, place: u32) -> Result<Outcome> {
        self.done(number::SetPxE, [0x1067 + place, TABLE + 4 * place, 1], &[])
    }

    fn lazy(&mut self, mode: LazyMode) -> Result<Outcome> {
        self.done(number::SetLazyMode, [mode.0, 0, 0], &[])
    }

    fn run(
        &mut self,
        alias: u32,
        entry: u32,
        arguments: &[(Register, u32)],
        words: &[u32],
    ) -> Result<Outcome> {
        self.seed += 1;
        let mut random = Random::new(self.seed);
        let mut registers = Registers::default();
        (registers.eip, registers.eflags) = (entry, 0x202);
        for register in KEPT.into_iter().chain([Register::EAX, Register::ECX, Register::EDX]) {
            registers.set(register, random.word());
        }
        for (register, selector) in [
            (Register::CS, 0x60),
            (Register::SS, 0x68),
            (Register::DS, 0x7b),
            (Register::ES, 0x7b),
            (Register::ESP, STACK_ENTRY),
        ] {
            registers.set(register, selector);
        }
        for (register, value) in arguments {
            registers.set(*register, *value);
        }
        let before = registers.clone();

        let mut stack = Region {
            name: "stack",
            base: STACK_BASE,
            bytes: vec![0xa5; STACK_SIZE],
            writable: true,
        };
        for (i, value) in [RETURN_ADDRESS].iter().chain(words).enumerate() {
            let at = (STACK_ENTRY - STACK_BASE) as usize + 4 * i;
            stack.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let page =
            Region { name: "grant", base: alias + PAGE, bytes: self.page.clone(), writable: true };
        let table =
            Region { name: "table", base: TABLE, bytes: self.table.clone(), writable: true };
        let code = Code::new(&self.image, 10_000_000);
        let memory = Memory::new(&self.image, alias + IMAGE, vec![stack, page, table]);
        let mut machine = Machine::new(&code, memory, registers, random);
        machine.flat = vec![0x60, 0x68, 0x7b];
        machine.stack_top = STACK_ENTRY + 4 + 4 * words.len() as u32;
        machine.system.leaves = self.leaves.clone();
        machine.system.console = Some((DEBUG_PORT, Vec::new()));
        machine.system.idtr = (256 * 8 - 1, 0xc331_0000);
        let stop = loop {
            let stop = machine.run(1_000_000);
            if !(stop == Stop::Undecided && machine.trace.mnemonic == Mnemonic::Vmmcall) {
                break stop;
            }
            let [number, count, _, address, ..] = machine.registers.general();
            let interrupts_are_on = machine.registers.eflags & 1 << 9 != 0;
            ensure!(!interrupts_are_on, "a hypercall with interrupts on");
            let made = self.hypercall(&machine.memory.regions[1].bytes, number, address, count)?;
            let (status, result) = (self.answers)(self.made.len(), &made);
            self.made.push(made);
            machine.registers.set(Register::EAX, status as u32);
            machine.registers.set(Register::EDX, result);
        };
        let Machine { registers, trace, memory, system, .. } = &machine;
        ensure!(trace.breaches.is_empty(), "{:?}", trace.breaches);
        let outcome = Outcome {
            stop,
            registers: registers.clone(),
            instructions: trace.instructions,
            stack: machine.stack_depth(),
            events: trace.events.iter().map(|(_, mnemonic)| *mnemonic).collect(),
            control: system.control,
        };
        self.page = memory.regions[1].bytes.clone();
        self.table = memory.regions[2].bytes.clone();
        let said = system.console.as_ref().context("no console")?.1.clone();
        self.said.push_str(&String::from_utf8(said)?);
        if stop == Stop::Left {
            for register in KEPT {
                let [is, was] = [registers, &before].map(|set| set.get(register));
                ensure!(is == was, "{register:?} is {is:#x}, and was {was:#x}");
            }
            ensure!(registers.get(Register::ESP) == STACK_ENTRY + 4, "the caller pops its words");
            ensure!(registers.eflags & 0x600 == before.eflags & 0x600, "IF or DF is lost");
        }
        Ok(outcome)
    }

    /// What a hypercall says, as the hypervisor reads it: by physical addresses, of the granted page only.
    fn hypercall(&self, page: &[u8], number: u32, address: u32, count: u32) -> Result<Made> {
        let start = address.checked_sub(PAGE).context("not the granted page")? as usize;
        let bytes =
            |length: usize| page.get(start..start + length).context("beyond the granted page");
        let mut made = Made { number, address, count, updates: Vec::new(), text: String::new() };
        match Hypercall::of(number) {
            Some(Hypercall::Apply) => {
                ensure!(
                    address.is_multiple_of(4) && (1..=BATCH_LIMIT).contains(&count),
                    "{made:?}"
                );
                let batch = bytes(count as usize * size_of::<Update>())?;
                made.updates = batch.chunks_exact(size_of::<Update>()).map(update).collect();
            }
            Some(Hypercall::Stop) => {
                made.text = String::from_utf8(bytes(count as usize)?.to_vec())?;
            }
            Some(Hypercall::BeQuiet) => {
                ensure!(address.is_multiple_of(4) && count == SHOWN_BYTES, "{made:?}");
                bytes(count as usize)?;
            }
            _ => bail!("hypercall {number}"),
        }
        Ok(made)
    }

    /// The batches since this was asked last.
    fn batches(&mut self) -> Vec<Vec<Update>> {
        self.made.drain(..).map(|made| made.updates).collect()
    }
}

impl Outcome {
    fn returned(self) -> Result<Self> {
        let Self { stop, ref registers, .. } = self;
        ensure!(
            stop == Stop::Left && registers.eip == RETURN_ADDRESS,
            "ends with {stop:?} at {:#x}",
            registers.eip
        );
        Ok(self)
    }
}

fn update(bytes: &[u8]) -> Update {
    let [call, address, low, high, flags] = [0, 4, 8, 12, 16].map(|at| word(bytes, at));
    Update { call: CallNumber(call), address, low, high, flags }
}

const BOTH: Features = Features::PAGE_TABLES.union(Features::BATCH);

#[test]
fn the_file_is_clean_and_wants_a_page() -> Result<()> {
    let bytes = image()?;
    let report = verify(&Rom::parse(&bytes)?);
    assert!(report.is_clean(), "{:#?}", report.violations);
    assert!(bytes.len() <= LIMIT, "{} bytes", bytes.len());
    assert_eq!(checksum(&bytes), 0);
    assert!(probe::probe(&bytes, REVISION_3_0).is_ok());
    let grant = [0, 4, 8].map(|at| word(&bytes, GRANT_OFFSET + at));
    assert_eq!(grant, [GRANT_SIGNATURE, Reference::MEMORY, 0]);
    Ok(())
}

/// On the bare machine the image is the native one: its answers, its calls' bytes, and no look at the processor.
#[test]
fn a_file_that_nobody_placed_is_the_native_image() -> Result<()> {
    let [bytes, native] = [image()?, std::fs::read(&artifacts::ensure()?.native)?];
    let table = |bytes| Ok::<_, anyhow::Error>(inspect::answers(&Rom::parse(bytes)?, HIGH_BASE));
    let (ours, natives) = (table(&bytes)?, table(&native)?);
    assert_eq!(ours.init, Some(0));
    assert!(ours.most_instructions() <= GET_RELOC_LIMIT, "{}", ours.most_instructions());
    for call in CALLS_3_0 {
        let number = call.number.context("a number of 3.0")?;
        let [is, was] = [&ours, &natives].map(|table| table.answer_of(number));
        let (is, was) = (is.context(call.name)?, was.context(call.name)?);
        assert_eq!(is.kind, was.kind, "{}", call.name);
        if let (Some(is), Some(was)) = (is.offset, was.offset) {
            // But for the distance to what they share, in a CALL behind PUSHFD and CLI; behind it are TEST, POPFD and a short jump.
            let shown = |bytes: &[u8], at: usize| {
                let tries = at + 2 + usize::from(bytes[at + 1]);
                [bytes[at..tries + 3].to_vec(), bytes[tries + 7..tries + 7 + 5 + 1 + 2].to_vec()]
            };
            assert_eq!(shown(&bytes, is), shown(&native, was), "{}", call.name);
        }
    }
    let mut guest = Guest::placed(leaves(BOTH))?;
    guest.image = bytes;
    assert!(!guest.init(ALIASES[1])?.events.contains(&Mnemonic::Cpuid));
    assert!(!guest.is_chosen());
    Ok(())
}

#[test]
fn a_placed_image_takes_its_calls_over_at_every_alias() -> Result<()> {
    let mut guest = Guest::new(BOTH)?;
    assert!(guest.is_chosen());
    let mut plain = Guest::placed(leaves(BOTH))?;
    plain.image = image()?;
    for alias in ALIASES {
        for call in CALLS_3_0 {
            let number = call.number.context("a number of 3.0")?;
            let (kind, eip, instructions) = guest.ask(alias, number)?;
            let (native_kind, native_eip, _) = plain.ask(alias, number)?;
            assert!(instructions <= GET_RELOC_LIMIT, "{}: {instructions}", call.name);
            if Reference::SERVED.contains(&number) {
                assert_eq!(kind, RelocationType::CALL_REL, "{}", call.name);
                assert_ne!(eip, native_eip, "{}", call.name);
            } else {
                let holds = SiteRule::InAWord as u8 >= least_rule(call, Bind::Rewrite) as u8;
                let wanted =
                    if holds { answer(call, Bind::Rewrite).0 } else { RelocationType::NONE };
                assert_eq!((kind, kind), (native_kind, wanted), "{}", call.name);
                assert_eq!(eip, native_eip, "{}", call.name);
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_leaves_the_guest_to_native_code() -> Result<()> {
    let with = |leaf: u32, register: usize, value: u32| {
        let mut leaves = leaves(BOTH);
        leaves.entry(leaf).or_default()[register] = value;
        leaves
    };
    let misfits = [
        (with(1, 2, 0), None),
        (with(BASE, 0, LEAF_INTERFACE), Some(Unfit::FewLeaves)),
        (with(BASE, 1, 0x2020_2020), Some(Unfit::Stranger)),
        (with(LEAF_INTERFACE, 0, VERSION + (1 << 16)), Some(Unfit::Version)),
        (with(LEAF_INTERFACE, 1, Features::BATCH.bits()), Some(Unfit::NoPageTables)),
        (with(LEAF_GRANT, 0, PAGE + 4), Some(Unfit::Grant)),
        (with(LEAF_GRANT, 1, Reference::MEMORY - 4), Some(Unfit::Grant)),
    ];
    for (leaves, why) in misfits {
        let mut guest = Guest::placed(leaves.clone())?;
        let outcome = guest.init(ALIASES[1])?;
        assert_eq!(outcome.registers.get(Register::EAX), 0, "native code serves the guest");
        assert!(!guest.is_chosen(), "{leaves:x?}");
        let line = why.map(|why| format!("VMI ROM: {why}, so native code runs\n"));
        assert_eq!(guest.said, line.unwrap_or_default());
        assert!(guest.page.iter().all(|byte| *byte == 0), "{leaves:x?}");
        assert_eq!(guest.ask(ALIASES[1], number::SetPxE)?.0, RelocationType::NONE);
    }
    Ok(())
}

#[test]
fn an_update_that_waits_is_short() -> Result<()> {
    let mut guest = Guest::new(BOTH)?;
    guest.lazy(LazyMode::MMU)?;
    guest.made.clear();
    let mut most = 0;
    for place in 0..BATCH_LIMIT - 1 {
        let outcome = guest.set_entry(place)?;
        most = most.max(outcome.instructions);
        assert!(guest.made.is_empty(), "update {place} did not wait");
    }
    println!("SetPxE that waits: {most} instructions");
    assert!(most <= SHORT_LIMIT, "{most}");

    // They lie in the page in their order, and the last one that fits takes all along.
    let wanted: Vec<Update> = (0..BATCH_LIMIT)
        .map(|place| Update::SetPxE(0x1067 + place, TABLE + 4 * place, 1))
        .collect();
    let first: Vec<u8> =
        [38, TABLE, 0x1067, 0, 1_u32].iter().flat_map(|word| word.to_le_bytes()).collect();
    let at = guest.page.windows(20).position(|bytes| bytes == first).context("not in the page")?;
    let queue: Vec<Update> = guest.page[at..].chunks_exact(20).map(update).collect();
    assert_eq!(queue[..127], wanted[..127]);
    guest.set_entry(BATCH_LIMIT - 1)?;
    let made = guest.made.pop().context("no hypercall")?;
    assert_eq!((made.number, made.address, made.count), (1, PAGE + at as u32, BATCH_LIMIT));
    assert_eq!(made.updates, wanted);
    assert!(guest.made.is_empty());

    // The long form, and notifications.
    for (call, arguments, words, wanted) in [
        (
            number::SetPxELong,
            [0x1067, 7, TABLE + 0x08],
            &[1][..],
            Update::SetPxELong(0x7_0000_1067, TABLE + 0x08, 1),
        ),
        (number::UpdatePxE, [TABLE + 0x10, 1, 9], &[], Update::UpdatePxE(TABLE + 0x10, 1)),
        (number::UpdatePxELong, [TABLE + 0x18, 2, 9], &[], Update::UpdatePxELong(TABLE + 0x18, 2)),
    ] {
        let outcome = guest.done(call, arguments, words)?;
        println!("call {} that waits: {} instructions", call.0, outcome.instructions);
        assert!(outcome.instructions <= WAITING_LIMIT, "call {}: {}", call.0, outcome.instructions);
        assert!(guest.made.is_empty());
        guest.done(number::GetCR2, [0; 3], &[])?;
        assert_eq!(guest.batches(), [[wanted]]);
    }
    Ok(())
}

#[test]
fn what_may_not_wait_goes_over_with_what_waits() -> Result<()> {
    for (call, [eax, edx, ecx], words, wanted) in [
        (
            number::AllocatePage,
            [0x123, 0x11, 0],
            &[0, 0][..],
            Some(Update::AllocatePage(0x123, 0x11)),
        ),
        (number::ReleasePage, [0x123, 1, 0], &[], Some(Update::ReleasePage(0x123, 1))),
        (number::InvalPage, [0xc123_4000, 0, 0], &[], Some(Update::InvalPage(0xc123_4000))),
        (number::FlushTLB, [3, 0, 0], &[], Some(Update::FlushTLB(3))),
        (number::SetCR3, [0x5000, 0, 0], &[], Some(Update::SetCR3(0x5000))),
        (number::SetLazyMode, [0, 0, 0], &[], None),
        (number::SetLazyMode, [2, 0, 0], &[], None),
        (number::GetCR2, [0, 0, 0], &[], None),
        (number::GetCR3, [0, 0, 0], &[], None),
        (number::SetCR0, [0x8005_003b, 0, 0], &[], None),
        (number::SetCR4, [0x690, 0, 0], &[], None),
    ] {
        let mut guest = Guest::new(BOTH)?;
        guest.lazy(LazyMode::MMU)?;
        guest.set_entry(0)?;
        guest.set_entry(1)?;
        assert!(guest.batches().is_empty());
        let outcome = guest.done(call, [eax, edx, ecx], words)?;
        let waiting = (0..2).map(|place| Update::SetPxE(0x1067 + place, TABLE + 4 * place, 1));
        assert_eq!(guest.batches(), [waiting.chain(wanted).collect::<Vec<_>>()], "call {}", call.0);
        let result = outcome.registers.get(Register::EAX);
        match call {
            number::GetCR2 => assert_eq!(result, outcome.control[2]),
            number::GetCR3 => assert_eq!(result, outcome.control[3]),
            number::SetCR0 => assert_eq!(outcome.control[0], eax),
            number::SetCR4 => assert_eq!(outcome.control[4], eax),
            _ => {}
        }
        // And nothing a second time.
        guest.done(number::GetCR2, [0; 3], &[])?;
        assert!(guest.batches().is_empty());
    }
    Ok(())
}

#[test]
fn nobody_stops_with_work_undone() -> Result<()> {
    for (call, stop) in [
        (number::Halt, Stop::Left),
        (number::Shutdown, Stop::Halted),
        (number::Reboot, Stop::Reset),
    ] {
        let mut guest = Guest::new(BOTH)?;
        guest.lazy(LazyMode::MMU)?;
        guest.set_entry(0)?;
        let outcome = guest.call(ALIASES[1], call, [1, 0, 0], &[])?;
        assert_eq!(outcome.stop, stop, "call {}", call.0);
        assert_eq!(guest.batches().len(), 1, "call {}", call.0);
    }
    Ok(())
}

#[test]
fn outside_of_the_lazy_modes_and_without_batches_nothing_waits() -> Result<()> {
    let defer = EntryFlags::DEFER.bits() | 1;
    for (features, mode) in
        [(BOTH, LazyMode::OFF), (BOTH, LazyMode::CPU), (Features::PAGE_TABLES, LazyMode::MMU)]
    {
        let mut guest = Guest::new(features)?;
        guest.lazy(mode)?;
        guest.done(number::SetPxE, [0x1067, TABLE, defer], &[])?;
        assert_eq!(guest.batches(), [[Update::SetPxE(0x1067, TABLE, 1)]], "{features:?}");
    }
    Ok(())
}

/// A guest that has told where its memory is mapped, on a hypervisor that may be told late.
fn told_late(start: u32) -> Result<Guest> {
    let mut guest = Guest::new(BOTH | Features::LATE)?;
    guest.done(number::SetLinearMapping, [0, start, 0x3_8000], &[0])?;
    Ok(guest)
}

/// What tells of the entry at [`TABLE`], with the queue's notes.
fn told(call: CallNumber, low: u32, high: u32) -> Update {
    Update { call, address: TABLE - ALIASES[1], low, high, flags: PHYSICAL }
}

#[test]
fn what_is_told_late_is_in_memory_at_once() -> Result<()> {
    let mut guest = told_late(ALIASES[1])?;
    let mut most = 0;
    for (call, arguments, words, stored) in [
        (number::SetPxE, [0x1067, TABLE, 1], &[][..], [0x1067, 0]),
        (number::SetPxE, [0, TABLE, 0x11], &[], [0, 0]),
        (number::SetPxELong, [0x1067, 7, TABLE], &[1], [0x1067, 7]),
        (number::SetPxELong, [0x2067, 7, TABLE], &[1], [0x2067, 7]),
        (number::SetPxELong, [0, 0, TABLE], &[0x11], [0, 0]),
        (number::UpdatePxE, [TABLE, 0x11, 9], &[], [0, 0]),
        (number::UpdatePxELong, [TABLE, 0x11, 9], &[], [0, 0]),
    ] {
        for mode in [LazyMode::MMU, LazyMode::OFF] {
            guest.lazy(mode)?;
            let outcome = guest.done(call, arguments, words)?;
            println!("call {} told late: {} instructions", call.0, outcome.instructions);
            most = most.max(outcome.instructions);
            let is_short = outcome.instructions <= SHORT_LIMIT;
            assert!(is_short || (call, mode) != (number::SetPxE, LazyMode::MMU));
            assert_eq!([0, 4].map(|at| word(&guest.table, at)), stored, "call {}", call.0);
        }
        guest.done(number::GetCR2, [0; 3], &[])?;
        assert!(guest.made.is_empty(), "call {} does not wait", call.0);
        guest.done(number::FlushTLB, [1, 0, 0], &[])?;
        let told = match call {
            number::SetPxE => told(number::UpdatePxE, arguments[0], arguments[2]),
            number::SetPxELong => told(number::UpdatePxELong, arguments[0], words[0]),
            call => told(call, CHANGED, 0),
        };
        // Twice in a row is once.
        assert_eq!(guest.batches(), [[told, Update::FlushTLB(1)]], "call {}", call.0);
    }
    assert!(most <= LATE_LIMIT, "{most}");
    Ok(())
}

#[test]
fn frames_become_tables_late_and_not_before_they_stopped_being_some() -> Result<()> {
    let mut guest = told_late(ALIASES[1])?;
    let pages = |guest: &mut Guest, frames: &[(CallNumber, u32)]| {
        frames
            .iter()
            .try_for_each(|(call, frame)| guest.done(*call, [*frame, 1, 0], &[0, 0]).map(drop))
    };
    let (allocate, release) = (number::AllocatePage, number::ReleasePage);
    pages(&mut guest, &[(allocate, 5), (release, 6), (release, 5), (allocate, 7)])?;
    assert!(guest.batches().is_empty());
    pages(&mut guest, &[(allocate, 5)])?;
    let told = [
        Update::AllocatePage(5, 1),
        Update::ReleasePage(6, 1),
        Update::ReleasePage(5, 1),
        Update::AllocatePage(7, 1),
        Update::AllocatePage(5, 1),
    ];
    assert_eq!(guest.batches(), [told]);
    pages(&mut guest, &[(allocate, 6)])?;
    assert!(guest.batches().is_empty());
    Ok(())
}

#[test]
fn a_page_that_is_about_to_be_used_is_told_at_once() -> Result<()> {
    let used_now = EntryFlags::CURRENT_AS.bits() | 1;
    let mut guest = told_late(ALIASES[1])?;
    guest.done(number::AllocatePage, [5, 1, 0], &[0, 0])?;
    // Another page than that of the last page fault.
    guest.done(number::SetPxE, [0x1067, TABLE, used_now | PAGE], &[])?;
    assert!(guest.batches().is_empty());
    guest.done(number::SetPxE, [0x1067, TABLE, used_now], &[])?;
    // Of two in a row for one entry the last one is left.
    let told = told(number::UpdatePxE, 0x1067, used_now);
    assert_eq!(guest.batches(), [[Update::AllocatePage(5, 1), told]]);
    // In a lazy mode it waits.
    guest.lazy(LazyMode::MMU)?;
    guest.done(number::SetPxE, [0x1067, TABLE, used_now], &[])?;
    guest.lazy(LazyMode::OFF)?;
    assert!(guest.batches().is_empty());
    Ok(())
}

/// A guest that has asked for quiet page faults, and whose map the hypervisor has filled with this for each of its words.
fn quiet(map: u32) -> Result<Guest> {
    let mut guest = Guest::new(BOTH | Features::LATE | Features::QUIET)?;
    guest.done(number::SetLinearMapping, [0, ALIASES[1], 0x3_8000], &[0])?;
    let asked = guest.made.pop().context("no hypercall")?;
    ensure!(asked.number == Hypercall::BeQuiet as u32 && guest.made.is_empty(), "{asked:?}");
    let start = (asked.address - PAGE) as usize;
    for word in guest.page[start..start + asked.count as usize].chunks_exact_mut(4) {
        ensure!(word == [0; 4], "the map is not clear");
        word.copy_from_slice(&map.to_le_bytes());
    }
    Ok(guest)
}

/// The bit of [`TABLE`]'s frame, which is 1.
const TABLE_BIT: u32 = 1 << 1;

#[test]
fn where_page_faults_are_quiet_what_becomes_present_is_told() -> Result<()> {
    let (defer, current) = (EntryFlags::DEFER.bits(), EntryFlags::CURRENT_AS.bits());
    let (short, long) = (number::UpdatePxE, number::UpdatePxELong);
    let mut most = [0; 2];
    for (call, arguments, words, before, told, at_once, at_end, at_fault) in [
        (number::SetPxE, [0x1067, TABLE, 1], &[][..], 0, told(short, 0x1067, 1), true, true, true),
        (number::SetPxE, [0, TABLE, 1], &[], 0x1067, told(short, 0, 1), false, false, false),
        (number::SetPxE, [0x80, TABLE, 1], &[], 0x1067, told(short, 0x80, 1), false, false, true),
        (number::SetPxELong, [0x1067, 7, TABLE], &[1], 0, told(long, 0x1067, 1), true, true, true),
        (number::SetPxELong, [0, 0, TABLE], &[1], 0, told(long, 0, 1), false, false, false),
        (short, [TABLE, 1, 9], &[], 0x1067, told(short, CHANGED | 1, 0), true, true, true),
        (short, [TABLE, 1 | defer, 9], &[], 0x1067, told(short, CHANGED | 1, 0), false, true, true),
        (short, [TABLE, 1 | current, 9], &[], 0x1067, told(short, CHANGED, 0), true, false, true),
        (short, [TABLE, 1, 9], &[], 0, told(short, CHANGED, 0), false, false, true),
        (long, [TABLE, 1, 9], &[], 0x1067, told(long, CHANGED | 1, 0), true, true, true),
        (long, [TABLE, 1 | current, 9], &[], 0, told(long, CHANGED, 0), false, false, true),
    ] {
        for map in [TABLE_BIT, !TABLE_BIT] {
            let here = map == TABLE_BIT;
            let case = || format!("call {} of {arguments:x?}, map {map:x}", call.0);
            let mut guest = quiet(map)?;
            guest.table[..4].copy_from_slice(&u32::to_le_bytes(before));
            let outcome = guest.done(call, arguments, words)?;
            assert_eq!(guest.batches().len(), usize::from(here && at_once), "{}", case());
            if guest.made.is_empty() && !(here && at_once) {
                most[0] = most[0].max(outcome.instructions);
                guest.done(number::GetCR2, [0; 3], &[])?;
                let seen: Vec<Vec<Update>> = guest.batches();
                let wanted = if here && at_fault { vec![vec![told]] } else { vec![] };
                assert_eq!(seen, wanted, "{}", case());
            }

            let mut guest = quiet(map)?;
            guest.table[..4].copy_from_slice(&u32::to_le_bytes(before));
            guest.lazy(LazyMode::MMU)?;
            let outcome = guest.done(call, arguments, words)?;
            if call == number::SetPxE {
                most[1] = most[1].max(outcome.instructions);
            }
            guest.lazy(LazyMode::MMU)?;
            assert!(guest.batches().is_empty(), "{}", case());
            guest.lazy(LazyMode::OFF)?;
            let wanted = if here && at_end { vec![vec![told]] } else { vec![] };
            assert_eq!(guest.batches(), wanted, "{}", case());
        }
    }
    println!("what waits: {} instructions; SetPxE in its mode: {}", most[0], most[1]);
    assert!(most[0] <= QUIET_LIMIT && most[1] <= SHORT_LIMIT, "{most:?}");
    Ok(())
}

#[test]
fn told_late_the_load_of_cr3_takes_all_along() -> Result<()> {
    let mut guest = told_late(ALIASES[1])?;
    guest.set_entry(0)?;
    guest.lazy(LazyMode::CPU)?;
    guest.done(number::SetCR3, [0x5000, 0, 0], &[])?;
    assert!(guest.batches().is_empty());
    let mut other = told_late(ALIASES[1])?;
    (other.page, other.table) = (guest.page.clone(), guest.table.clone());
    let told = [told(number::UpdatePxE, 0x1067, 1), Update::SetCR3(0x5000)];
    // Leaving the mode loads it, and so does a look at a page fault.
    guest.lazy(LazyMode::OFF)?;
    assert_eq!(guest.batches(), [told]);
    other.done(number::GetCR2, [0; 3], &[])?;
    assert_eq!(other.batches(), [told]);
    Ok(())
}

#[test]
fn what_is_not_known_to_be_memory_is_told_at_once() -> Result<()> {
    let set = [Update::SetPxE(0x1067, TABLE, 1)];
    for (features, slot, start, pages) in [
        (BOTH | Features::LATE, 0, TABLE + 0x1000, 0x100),
        (BOTH | Features::LATE, 0, ALIASES[1], 0),
        (BOTH | Features::LATE, 1, ALIASES[1], 0x100),
        (BOTH, 0, ALIASES[1], 0x100),
    ] {
        let mut guest = Guest::new(features)?;
        guest.done(number::SetLinearMapping, [slot, start, pages], &[0])?;
        guest.set_entry(0)?;
        assert_eq!(guest.batches(), [set]);
        // Where nothing is told late the lazy mode holds it back.
        guest.lazy(LazyMode::MMU)?;
        guest.set_entry(0)?;
        let is_late = features.contains(Features::LATE) && slot == 0 && pages != 0;
        assert_eq!(guest.batches().is_empty(), !is_late);
        guest.lazy(LazyMode::OFF)?;
        assert_eq!(guest.batches().is_empty(), is_late);
        assert_eq!(word(&guest.table, 0), 0, "stored by the hypervisor");
    }
    Ok(())
}

#[test]
fn what_waits_by_its_linear_address_goes_over_before_that_leads_elsewhere() -> Result<()> {
    for (features, is_told) in [(BOTH, true), (BOTH | Features::LATE, false)] {
        let mut guest = Guest::new(features)?;
        guest.done(number::SetLinearMapping, [0, ALIASES[1], 0x3_8000], &[0])?;
        guest.lazy(LazyMode::MMU)?;
        guest.set_entry(0)?;
        guest.done(number::SetLinearMapping, [1, 0xfff8_0000, 1], &[0x3_9000])?;
        assert_eq!(!guest.batches().is_empty(), is_told);
    }
    Ok(())
}

#[test]
fn a_refusal_is_tried_again_or_stops_the_guest() -> Result<()> {
    // Busy once: the refused update goes alone, then the rest.
    let mut guest = Guest::new(BOTH)?;
    guest.lazy(LazyMode::MMU)?;
    (0..3).try_for_each(|place| guest.set_entry(place).map(drop))?;
    guest.answers = |nth, made| if nth == 0 { (Status::Busy as i32, 1) } else { DONE(nth, made) };
    guest.lazy(LazyMode::OFF)?;
    assert_eq!(guest.batches().iter().map(Vec::len).collect::<Vec<_>>(), [3, 1, 1]);
    assert_eq!(guest.said, "VMI ROM: SetPxE at C0001004: busy\n");
    assert_eq!(word(&guest.page, Reference::REFUSALS as usize), 1);

    // Refused for good, or busy for ever: the last words, and the end.
    for (status, batches) in [(Status::BadAddress, 1), (Status::Busy, ATTEMPTS as usize)] {
        let mut guest = Guest::new(BOTH)?;
        guest.answers = match status {
            Status::Busy => |_, _| (Status::Busy as i32, 0),
            _ => |_, _| (Status::BadAddress as i32, 0),
        };
        let outcome = guest.call(ALIASES[1], number::SetPxE, [0x1067, TABLE + 0x18, 1], &[])?;
        assert_eq!(outcome.stop, Stop::Halted);
        let last = guest.made.pop().context("no last words")?;
        let text = format!("VMI ROM: SetPxE at C0001018: {}", status.text());
        assert_eq!((last.number, last.text), (Hypercall::Stop as u32, text));
        assert_eq!(guest.made.len(), batches);
        assert!(guest.made.iter().all(|made| made.number == Hypercall::Apply as u32));
    }
    Ok(())
}

#[test]
fn a_second_vmi_init_changes_nothing() -> Result<()> {
    let mut guest = Guest::new(BOTH)?;
    guest.lazy(LazyMode::MMU)?;
    guest.set_entry(0)?;
    let page = guest.page.clone();
    for alias in ALIASES {
        assert_eq!(guest.init(alias)?.registers.get(Register::EAX), 0);
    }
    assert!(guest.page == page && guest.made.is_empty());
    Ok(())
}
