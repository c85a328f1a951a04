//! The image with the Xen backend: placed by a Xen that exists only here, and executed instruction by instruction.
//!
//! Above all its assembly: calls at random, with events between any two instructions of them whose handlers make calls
//! themselves. Whatever is handed over together, in the end Xen must have what the guest has set.

use anyhow::{Context, Result, bail, ensure};
use iced_x86::Register;
use std::collections::{BTreeMap, BTreeSet};
use std::mem::{offset_of, size_of};
use vmi_abi::flags::{EntryFlags, LazyMode, PageFlags};
use vmi_abi::header::RomHeader;
use vmi_abi::{CallNumber, number};
use vmi_hv_backend::xen::interface::{
    FORCED_EMULATION, HYPERCALL_VECTOR, KERNEL_RING, MmuUpdate, MulticallEntry, PAGE_SHIFT,
    PLACEMENT_SIGNATURE, PLACEMENT_SIZE, PLACEMENT_VERSION, Placement, error, hypercall, mmuext,
    selector, vcpu,
};
use vmi_hv_backend::xen::{MEMORY, Xen};
use vmi_tests::{KEPT, placed};
use xtask::artifacts;
use xtask::inspect::machine::{Code, Machine, Memory, Region, Registers, Stop};
use xtask::inspect::random::Random;

/// Where the guest's memory is mapped, and its frames.
const LINEAR: u32 = 0xc000_0000;
const FRAMES: u32 = 256;
const GDT: u32 = 0x10;
const TASK_STATE: u32 = 0x11;
const TABLE: u32 = 0x20;
const ROOTS: [u32; 2] = [0x30, 0x31];
const IMAGE: u32 = 0xd0;
const OWN: u32 = 0xd8;
const LISTS: u32 = 0xf0;
const SHARED: u32 = 0xf2;

/// Where Xen's part begins, with its list of the guest's frames.
const TOP: u32 = 0xf580_0000;

/// Machine frames above 4 GiB: the last comes first.
const MACHINE: u32 = 0x10_1000;

/// The stack that calls find, and where they return to.
const STACK: u32 = 0xd000_0000;
const STACK_SIZE: u32 = 4096;
const RETURN: u32 = 0xc100_4567;

/// Entries of the GDT, and the task state segment's.
const DESCRIPTORS: u32 = 64;
const TASK: u32 = 7;

const INTERRUPTS: u32 = 1 << 9;
const TASK_SWITCHED: u32 = 1 << 3;

const fn address(frame: u32) -> u32 {
    LINEAR + (frame << PAGE_SHIFT)
}

const fn machine_frame(frame: u32) -> u32 {
    MACHINE + FRAMES - frame
}

/// The linear address of what lies at a machine address.
fn linear(machine: u64) -> Result<u32> {
    let frame = (machine >> PAGE_SHIFT) as u32;
    let own = (MACHINE + FRAMES).checked_sub(frame).filter(|own| *own < FRAMES);
    Ok(address(own.with_context(|| format!("{machine:#x} is not the guest's"))?)
        + (machine as u32 & 0xfff))
}

/// A descriptor as Xen takes it.
const fn segment(low: u32, high: u32) -> (u32, u32) {
    match (high >> 12 & 1, high >> 15 & 1, high >> 13 & 3) {
        (1, 1, 0) => (low, high | 1 << 13),
        (1, 1, _) => (low, high),
        _ => (0, 0),
    }
}

/// What the processor is asked to do, as far as the guest can see it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    descriptors: BTreeMap<u32, (u32, u32)>,
    /// The same in the guest's own table, as it was written.
    written: BTreeMap<u32, (u32, u32)>,
    stack: u32,
    /// The same in the task state segment.
    esp0: u32,
    task_switched: bool,
    root: u32,
    entries: BTreeMap<u32, u64>,
}

struct Guest<'a> {
    machine: Machine<'a>,
    random: Random,
    entries: BTreeMap<u32, u32>,
    /// Where Xen enters for events.
    event: u32,
    /// Where the byte lies that says that there are none to be, and before it the one that says that there is one.
    mask: u32,
    /// The copy of the GDT that Xen has.
    copy: u32,
    stack: u32,
    task_switched: bool,
    root: u32,
    /// Descriptors that are to be refused, of those to come, and which were.
    refuse: u32,
    refused: BTreeSet<u32>,
    refusals: u32,
    multicalls: u32,
    said: String,
}

impl<'a> Guest<'a> {
    fn new(image: &'a [u8], code: &'a Code<'a>, seed: u64) -> Result<Self> {
        let mut random = Random::new(seed);
        let region = |name, base, length: u32, writable| Region {
            name,
            base,
            bytes: vec![0; length as usize],
            writable,
        };
        let regions = vec![
            region("stack", STACK - STACK_SIZE, STACK_SIZE + 64, true),
            region("memory", LINEAR, FRAMES << PAGE_SHIFT, true),
            region("list", TOP, (MACHINE + FRAMES + 1) * 4, true),
        ];
        let memory = Memory::new(image, address(IMAGE), regions);
        let mut registers = Registers::default();
        registers.set(Register::ESP, STACK);
        let mut machine = Machine::new(code, memory, registers, Random::new(random.bits()));
        machine.ring = KERNEL_RING.into();
        machine.flat = vec![selector::KERNEL_DATA];
        machine.system.idtr = (256 * 8 - 1, 0);
        let mut guest = Self {
            machine,
            random,
            entries: BTreeMap::new(),
            event: 0,
            mask: 0,
            copy: 0,
            stack: 0,
            task_switched: false,
            root: 0,
            refuse: 0,
            refused: BTreeSet::new(),
            refusals: 0,
            multicalls: 0,
            said: String::new(),
        };
        for frame in 0..FRAMES {
            guest.store(address(LISTS) + 4 * frame, machine_frame(frame))?;
            guest.store(TOP + 4 * machine_frame(frame), frame)?;
        }
        for (offset, value) in [
            (offset_of!(Placement, signature), PLACEMENT_SIGNATURE),
            (offset_of!(Placement, version), PLACEMENT_VERSION),
            (offset_of!(Placement, image), IMAGE << PAGE_SHIFT),
            (offset_of!(Placement, shared_info), SHARED << PAGE_SHIFT),
            (offset_of!(Placement, p2m), LISTS << PAGE_SHIFT),
            (offset_of!(Placement, pages), FRAMES),
            (offset_of!(Placement, tables), (LISTS + 1) << PAGE_SHIFT),
            (offset_of!(Placement, virtual_top), TOP),
        ] {
            guest.store(address(OWN) + MEMORY - PLACEMENT_SIZE + offset as u32, value)?;
        }
        guest.machine.system.control[3] = machine_frame(ROOTS[0]).rotate_left(PAGE_SHIFT);
        let (status, _) =
            guest.enter(address(IMAGE) + offset_of!(RomHeader, vmi_init) as u32, [0; 3], &[])?;
        ensure!(status == 0, "vmi_init refuses: {status:#x}");
        ensure!(guest.mask != 0 && guest.event != 0, "vmi_init does not find Xen");
        guest.set_up()?;
        Ok(guest)
    }

    /// Descriptor table, task state, tables: as a kernel does.
    fn set_up(&mut self) -> Result<()> {
        let base = address(GDT);
        let state = address(TASK_STATE);
        self.store(base + 8 * TASK, state << 16 | 0x67)?;
        self.store(base + 8 * TASK + 4, state & 0xff00_0000 | 0x8900 | state >> 16 & 0xff)?;
        self.store(STACK + 16, base << 16 | (8 * DESCRIPTORS - 1))?;
        self.store(STACK + 20, base >> 16)?;
        self.call(number::SetGDT, [STACK + 16, 0, 0], &[])?;
        self.call(number::SetTR, [TASK << 3, 0, 0], &[])?;
        self.call(number::AllocatePage, [TABLE, PageFlags::PT.bits(), 0], &[0, 0])?;
        for root in ROOTS {
            self.call(number::AllocatePage, [root, PageFlags::PDP.bits(), 0], &[0, 0])?;
        }
        self.call(number::SetCR3, [ROOTS[0] << PAGE_SHIFT, 0, 0], &[])?;
        Ok(())
    }

    fn load(&self, address: u32) -> Result<u32> {
        let value = self.machine.memory.read(address, 4);
        Ok(value.map_err(|why| anyhow::anyhow!("{address:#x}: {why:?}"))? as u32)
    }

    fn load_all<const N: usize>(&self, address: u32) -> Result<[u32; N]> {
        let mut words = [0; N];
        for (place, word) in (0..).zip(&mut words) {
            *word = self.load(address + 4 * place)?;
        }
        Ok(words)
    }

    fn store(&mut self, address: u32, value: u32) -> Result<()> {
        let stored = self.machine.memory.write(address, 4, value.into());
        stored.map_err(|why| anyhow::anyhow!("{address:#x}: {why:?}"))
    }

    fn store_all(&mut self, address: u32, words: &[u32]) -> Result<()> {
        (0..).zip(words).try_for_each(|(place, word)| self.store(address + 4 * place, *word))
    }

    /// Whether interrupts are on.
    fn is_open(&self) -> Result<bool> {
        Ok(self.machine.memory.read(self.mask, 1).ok().context("no mask")? == 0)
    }

    fn set_open(&mut self, open: bool) -> Result<()> {
        self.machine.memory.write(self.mask, 1, (!open).into()).ok().context("no mask")
    }

    /// Makes a call, with EAX, EDX, ECX and words of the stack: EAX, and how many instructions it took.
    fn call(&mut self, call: CallNumber, arguments: [u32; 3], words: &[u32]) -> Result<(u32, u64)> {
        let entry = self.entry(call)?;
        self.enter(entry, arguments, words).with_context(|| format!("call {}", call.0))
    }

    fn entry(&mut self, call: CallNumber) -> Result<u32> {
        if let Some(entry) = self.entries.get(&call.0) {
            return Ok(*entry);
        }
        let ask = address(IMAGE) + offset_of!(RomHeader, get_reloc) as u32;
        let (entry, _) = self.enter(ask, [call.0, 0, 0], &[])?;
        ensure!(entry != 0, "call {} is answered NONE", call.0);
        self.entries.insert(call.0, entry);
        Ok(entry)
    }

    fn enter(&mut self, entry: u32, arguments: [u32; 3], words: &[u32]) -> Result<(u32, u64)> {
        self.begin(entry, arguments, words)?;
        self.finish()
    }

    fn begin(&mut self, entry: u32, [eax, edx, ecx]: [u32; 3], words: &[u32]) -> Result<()> {
        let mut registers = Registers::default();
        registers.eip = entry;
        registers.eflags = INTERRUPTS | 2;
        for register in KEPT {
            registers.set(register, self.random.word());
        }
        for (register, value) in [
            (Register::CS, selector::KERNEL_CODE.into()),
            (Register::SS, selector::KERNEL_DATA.into()),
            (Register::DS, selector::KERNEL_DATA.into()),
            (Register::ES, selector::KERNEL_DATA.into()),
            (Register::EAX, eax),
            (Register::EDX, edx),
            (Register::ECX, ecx),
        ] {
            registers.set(register, value);
        }
        let top = self.machine.registers.get(Register::ESP) - 4 * (words.len() as u32 + 1);
        registers.set(Register::ESP, top);
        self.store(top, RETURN)?;
        self.store_all(top + 4, words)?;
        self.machine.registers = registers;
        Ok(())
    }

    /// Goes on to the return: EAX, and instructions.
    fn finish(&mut self) -> Result<(u32, u64)> {
        let before = self.machine.trace.instructions;
        loop {
            match self.machine.run(1_000_000) {
                Stop::Left if self.machine.registers.eip == RETURN => break,
                stop => self.serve(stop)?,
            }
        }
        let took = self.machine.trace.instructions - before;
        ensure!(self.machine.trace.breaches.is_empty(), "{:?}", self.machine.trace.breaches);
        Ok((self.machine.registers.get(Register::EAX), took))
    }

    /// A call, with an event after so many of its instructions if interrupts are on then, whose handler does something.
    fn interrupted(
        &mut self,
        call: CallNumber,
        arguments: [u32; 3],
        words: &[u32],
        after: u64,
        handler: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<bool> {
        let entry = self.entry(call)?;
        let outside = self.machine.registers.get(Register::ESP);
        self.begin(entry, arguments, words)?;
        let before = self.machine.registers.clone();
        let limit = self.machine.trace.instructions + after;
        let mut came = false;
        loop {
            let left = limit.saturating_sub(self.machine.trace.instructions);
            match self.machine.run(left) {
                Stop::Left if self.machine.registers.eip == RETURN => break,
                Stop::Budget => {
                    came = self.is_open()?;
                    if came {
                        self.happen(handler)?;
                    }
                    self.finish()?;
                    break;
                }
                stop => self.serve(stop)?,
            }
        }
        let now = &self.machine.registers;
        for register in KEPT {
            let [is, was] = [now, &before].map(|registers| registers.get(register));
            ensure!(is == was, "call {}: {register:?} is {is:#x}, and was {was:#x}", call.0);
        }
        let esp = now.get(Register::ESP);
        ensure!(esp == outside - 4 * words.len() as u32, "call {}: ESP {esp:#x}", call.0);
        self.machine.registers.set(Register::ESP, outside);
        Ok(came)
    }

    /// An event: Xen pushes a frame and enters the image, which enters no handler, since nothing is pending that it knows, and returns.
    fn happen(&mut self, handler: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.set_open(false)?;
        let interrupted = self.machine.registers.clone();
        let esp = interrupted.get(Register::ESP);
        self.machine.registers.set(Register::ESP, esp - 64);
        handler(self)?;
        self.machine.registers = interrupted.clone();
        let frame = [interrupted.eip, interrupted.get(Register::CS), interrupted.eflags];
        self.store_all(esp - 12, &frame)?;
        self.machine.registers.set(Register::ESP, esp - 12);
        self.machine.registers.eip = self.event;
        while self.machine.registers.get(Register::ESP) != esp {
            let stop = self.machine.run(100_000);
            ensure!(stop != Stop::Budget, "the event does not end");
            self.serve(stop)?;
        }
        Ok(())
    }

    /// What the image cannot do by itself: CPUID of Xen's, and hypercalls.
    fn serve(&mut self, stop: Stop) -> Result<()> {
        match stop {
            Stop::Interrupt(6) => {
                let eip = self.machine.registers.eip;
                // Behind UD2 the rest of the prefix, and CPUID.
                let wanted = [&FORCED_EMULATION[2..], &[0x0f, 0xa2]].concat();
                let rest = (eip..).zip(&wanted).map(|(at, _)| self.machine.memory.read(at, 1));
                let rest: Vec<_> = rest.map_while(|byte| Some(byte.ok()? as u8)).collect();
                ensure!(rest == wanted, "UD2 at {eip:#x}");
                self.machine.registers.eip = eip + 5;
                let leaf = self.machine.registers.get(Register::EAX);
                let signature =
                    [(Register::EBX, b"XenV"), (Register::ECX, b"MMXe"), (Register::EDX, b"nVMM")];
                self.machine.registers.set(Register::EAX, 0x4000_0002);
                for (register, name) in signature {
                    let value = if leaf == 0x4000_0000 { u32::from_le_bytes(*name) } else { 0 };
                    self.machine.registers.set(register, value);
                }
                Ok(())
            }
            Stop::Interrupt(HYPERCALL_VECTOR) => {
                let [number, c, d, b, _, _, s, i] = self.machine.registers.general();
                if number == hypercall::IRET {
                    return self.interrupt_return();
                }
                let status = self.hypercall(number, [b, c, d, s, i])?;
                self.machine.registers.set(Register::EAX, status.cast_unsigned());
                Ok(())
            }
            _ => bail!("ends with {stop:?} at {:#x}", self.machine.registers.eip),
        }
    }

    /// Xen's IRET: EAX and a frame for the same ring.
    fn interrupt_return(&mut self) -> Result<()> {
        let esp = self.machine.registers.get(Register::ESP);
        let [eax, eip, cs, eflags] = self.load_all(esp)?;
        ensure!(cs & 3 == self.machine.ring, "to another ring");
        let registers = &mut self.machine.registers;
        registers.set(Register::EAX, eax);
        registers.set(Register::CS, cs);
        registers.set(Register::ESP, esp + 16);
        (registers.eip, registers.eflags) = (eip, eflags);
        self.set_open(eflags & INTERRUPTS != 0)
    }

    fn hypercall(&mut self, number: u32, [a, b, c, d, e]: [u32; 5]) -> Result<i32> {
        let wide = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        match number {
            hypercall::MEMORY_OP => return Ok((MACHINE + FRAMES).cast_signed()),
            hypercall::SET_CALLBACKS => self.event = b,
            hypercall::VCPU_OP if a == vcpu::REGISTER_VCPU_INFO => {
                let [frame, _, offset, _] = self.load_all(c)?;
                self.mask = linear(u64::from(frame) << PAGE_SHIFT)? + offset + 1;
            }
            hypercall::SET_GDT => {
                self.copy = linear(u64::from(self.load(a)?) << PAGE_SHIFT)?;
            }
            hypercall::UPDATE_DESCRIPTOR => {
                let place = linear(wide(a, b))?;
                let index = place.checked_sub(self.copy).context("not the copy")? / 8;
                if self.refuse > 0 {
                    self.refuse -= 1;
                    self.refusals += 1;
                    self.refused.insert(index);
                    return Ok(error::EINVAL);
                }
                self.store_all(place, &[c, d])?;
            }
            hypercall::STACK_SWITCH => {
                ensure!(a == u32::from(selector::KERNEL_DATA), "a stack in segment {a:#x}");
                self.stack = b;
            }
            hypercall::FPU_TASKSWITCH => {
                self.task_switched = a != 0;
                self.machine.system.control[0] &= !TASK_SWITCHED;
                self.machine.system.control[0] |= if a != 0 { TASK_SWITCHED } else { 0 };
            }
            hypercall::MMUEXT_OP => {
                let [command, frame, _] = self.load_all(a)?;
                if command == mmuext::NEW_BASEPTR {
                    self.root = frame;
                }
            }
            hypercall::MMU_UPDATE => {
                for place in 0..b {
                    let at = a + place * size_of::<MmuUpdate>() as u32;
                    let [there, upper, low, high] = self.load_all(at)?;
                    self.store_all(linear(wide(there, upper))?, &[low, high])?;
                }
                self.store(c, b)?;
            }
            hypercall::MULTICALL => {
                self.multicalls += 1;
                for place in 0..b {
                    let at = a + place * size_of::<MulticallEntry>() as u32;
                    let [op, _, arguments @ ..]: [u32; 7] = self.load_all(at)?;
                    let result = self.hypercall(op, arguments)?;
                    // All but the result is overwritten, as by a Xen for debugging.
                    self.store_all(at, &[0xaaaa_aaaa; 8])?;
                    self.store(at + 4, result.cast_unsigned())?;
                }
            }
            hypercall::CONSOLE_IO => {
                for place in 0..b {
                    let byte = self.machine.memory.read(c + place, 1).ok().context("no text")?;
                    self.said.push(char::from(byte as u8));
                }
            }
            hypercall::VCPU_OP
            | hypercall::EVENT_CHANNEL_OP
            | hypercall::UPDATE_VA_MAPPING
            | hypercall::XEN_VERSION => {}
            _ => bail!("hypercall {number} with {a:#x}, {b:#x}, {c:#x}, {d:#x}, {e:#x}"),
        }
        Ok(0)
    }

    /// What Xen has.
    fn state(&self, wanted: &State) -> Result<State> {
        let mut state = State {
            stack: self.stack,
            esp0: self.load(address(TASK_STATE) + Xen::ESP0)?,
            task_switched: self.task_switched,
            root: self.root,
            ..State::default()
        };
        for index in wanted.descriptors.keys() {
            let [low, high] = self.load_all(self.copy + 8 * index)?;
            state.descriptors.insert(*index, (low, high));
            let [low, high] = self.load_all(address(GDT) + 8 * index)?;
            state.written.insert(*index, (low, high));
        }
        for index in wanted.entries.keys() {
            let [low, high] = self.load_all(address(TABLE) + 8 * index)?;
            state.entries.insert(*index, u64::from(high) << 32 | u64::from(low));
        }
        Ok(state)
    }
}

/// One call of the guest's, at random among what comes often. `half` are the indices that it may use: a handler's are others.
fn choose(random: &mut Random, wanted: &mut State, half: u32) -> (CallNumber, [u32; 3], Vec<u32>) {
    match random.below(10) {
        0..4 => {
            let index = 8 + half + 2 * random.below(28);
            let [low, high] = [random.word(), random.word()];
            let kept = wanted.descriptors.get(&index).copied();
            let (low, high) = match random.below(7) {
                0 => kept.unwrap_or((0, 0)),
                // Only its upper half is another.
                4 => (kept.map_or(low, |(low, _)| low), high | 0xf000),
                1 => (0, 0),
                2 => (low, high & !0xf000 | 0x9000),
                3 => (low, high & !0xf000 | 0x8000),
                _ => (low, high | 0xf000),
            };
            wanted.descriptors.insert(index, segment(low, high));
            wanted.written.insert(index, (low, high));
            (number::WriteGDTEntry, [address(GDT), index, low], vec![high])
        }
        _ => {
            let index = half + 2 * random.below(256);
            let frame = [0, random.below(FRAMES)][random.below(2) as usize];
            let is_table = frame == TABLE || ROOTS.contains(&frame) || frame == GDT;
            let (value, entry) = if frame == 0 || is_table {
                (0, 0)
            } else {
                (frame << PAGE_SHIFT | 0x163, u64::from(machine_frame(frame)) << PAGE_SHIFT | 0x63)
            };
            wanted.entries.insert(index, entry);
            (
                number::SetPxELong,
                [value, 0, address(TABLE) + 8 * index],
                vec![EntryFlags::PT.bits()],
            )
        }
    }
}

/// Random calls of one guest.
fn play(image: &[u8], seed: u64, steps: u32) -> Result<(u32, u32)> {
    let code = Code::new(image, u64::MAX);
    let mut guest = Guest::new(image, &code, seed)?;
    let mut random = Random::new(seed ^ 0x5eed);
    let mut wanted =
        State { root: machine_frame(ROOTS[0]), stack: guest.stack, ..State::default() };
    let mut mode = LazyMode::OFF;
    let mut events = 0;
    for step in 0..steps {
        let (call, arguments, words) = match random.below(12) {
            0 => {
                mode = [LazyMode::OFF, LazyMode::OFF, LazyMode::MMU, LazyMode::CPU]
                    [random.below(4) as usize];
                (number::SetLazyMode, [mode.0, 0, 0], vec![])
            }
            1 => {
                wanted.stack = random.word();
                wanted.esp0 = wanted.stack;
                (number::UpdateKernelStack, [address(TASK_STATE), wanted.stack, 0], vec![])
            }
            2 => {
                wanted.task_switched = false;
                (number::CLTS, [0; 3], vec![])
            }
            3 => {
                wanted.task_switched = true;
                (number::SetCR0, [0x8005_0033 | TASK_SWITCHED, 0, 0], vec![])
            }
            4 => {
                let root = ROOTS[random.below(2) as usize];
                wanted.root = machine_frame(root);
                (number::SetCR3, [root << PAGE_SHIFT, 0, 0], vec![])
            }
            5 => (number::GetCR2, [0; 3], vec![]),
            _ => choose(&mut random, &mut wanted, 0),
        };
        if random.below(12) == 0 {
            guest.refuse = 1;
        }
        let open = random.below(2) == 0;
        guest.set_open(open)?;
        let after = u64::from(random.below(70));
        let mut handled = State::default();
        let came = guest
            .interrupted(call, arguments, &words, after, |guest| {
                let mut inner = Random::new(seed ^ u64::from(step) << 20);
                for _ in 0..inner.below(3) {
                    let (call, arguments, words) = choose(&mut inner, &mut handled, 1);
                    guest.call(call, arguments, &words)?;
                }
                if inner.below(2) == 0 {
                    guest.call(number::GetCR2, [0; 3], &[])?;
                }
                Ok(())
            })
            .with_context(|| format!("seed {seed}, step {step}: call {} {arguments:x?}", call.0))?;
        if came {
            events += 1;
            wanted.descriptors.extend(handled.descriptors);
            wanted.written.extend(handled.written);
            wanted.entries.extend(handled.entries);
        }
        ensure!(guest.is_open()? == open, "seed {seed}, step {step}: the interrupt flag is lost");
        // In no lazy mode nothing waits, and this call waits for nothing.
        if mode == LazyMode::OFF || call == number::GetCR2 {
            let mut is = guest.state(&wanted)?;
            for index in std::mem::take(&mut guest.refused) {
                // What was refused is as it was, or as something later made it.
                let there = is.descriptors.get(&index).copied();
                wanted.descriptors.extend(there.map(|there| (index, there)));
            }
            is.descriptors.retain(|index, _| wanted.descriptors.contains_key(index));
            ensure!(
                is == wanted,
                "seed {seed}, step {step}, call {}: Xen has {is:#x?}, and the guest wants {wanted:#x?}",
                call.0
            );
            let refusals = guest.load(address(OWN) + Xen::REFUSALS_OFFSET as u32)?;
            ensure!(refusals == guest.refusals, "seed {seed}: {refusals} of {}", guest.refusals);
        }
    }
    ensure!(guest.refusals == guest.said.matches("VMI ROM: call").count() as u32, "{}", guest.said);
    ensure!(guest.multicalls > 0, "no multicall");
    Ok((events, guest.refusals))
}

fn image() -> Result<Vec<u8>> {
    let bytes = std::fs::read(&artifacts::ensure_hosting()?.hypervisors)?;
    Ok(placed(&bytes, (OWN - IMAGE) << PAGE_SHIFT))
}

#[test]
fn whenever_events_come_xen_has_what_was_set() -> Result<()> {
    let image = image()?;
    let (mut events, mut refusals) = (0, 0);
    for seed in 1..=8 {
        let (came, refused) = play(&image, seed, 1000)?;
        events += came;
        refusals += refused;
    }
    assert!(events > 800 && refusals > 20, "{events} events, {refusals} refusals");
    Ok(())
}

/// Instructions of a call that waits, from its entry to its return.
#[test]
fn what_waits_is_short() -> Result<()> {
    let image = image()?;
    let code = Code::new(&image, u64::MAX);
    let mut guest = Guest::new(&image, &code, 1)?;
    let table = address(TABLE);
    let pt = EntryFlags::PT.bits();
    guest.call(number::SetPxELong, [0, 0, table], &[pt])?;
    let waits = [
        (LazyMode::MMU, number::SetPxELong, [0x1063, 0, table + 8], vec![pt], 41),
        (LazyMode::CPU, number::WriteGDTEntry, [address(GDT), 9, 0xffff], vec![0x0040_f200], 36),
        (LazyMode::CPU, number::UpdateKernelStack, [0, 0xc000_8000, 0], vec![], 18),
        (LazyMode::CPU, number::CLTS, [0; 3], vec![], 12),
        (LazyMode::CPU, number::SetCR3, [ROOTS[1] << PAGE_SHIFT, 0, 0], vec![], 30),
    ];
    for (mode, call, arguments, words, limit) in waits {
        guest.call(number::SetLazyMode, [mode.0, 0, 0], &[])?;
        let multicalls = guest.multicalls;
        let (_, instructions) = guest.call(call, arguments, &words)?;
        println!("call {} that waits: {instructions} instructions", call.0);
        assert!(instructions <= limit, "call {}: {instructions}", call.0);
        assert_eq!(guest.multicalls, multicalls, "call {}", call.0);
        guest.call(number::SetLazyMode, [LazyMode::OFF.0, 0, 0], &[])?;
        assert_eq!(guest.multicalls - multicalls, u32::from(mode == LazyMode::CPU));
    }
    Ok(())
}
