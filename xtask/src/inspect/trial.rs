//! One execution of ROM code as a guest would start it, from an arbitrary state.

use super::COPY_BASE;
use super::machine::registers::FREE;
use super::machine::{Code, Machine, Memory, Region, Registers, Stop, WRITE_PROTECT, flags};
use super::random::Random;
use super::site::Site;
use iced_x86::Register;
use vmi_abi::flags::DeferredFlags;
use vmi_abi::header::{SLOT_COUNT, SLOT_TABLE_SIZE};
use vmi_abi::{
    Answers, Call, Ending, Group, Place, RelocationType, STACK_LIMIT, Segments, number, slot,
};

/// Selector of the kernel's code segment, as Linux has it.
pub const KERNEL_CS: u16 = 0x60;
/// Selector of the kernel's stack segment, as Linux has it.
pub const KERNEL_DS: u16 = 0x68;
/// Selector of the user's code segment, as Linux has it.
pub const USER_CS: u16 = 0x73;
/// Selector of the flat data segment that Linux keeps in DS and ES.
pub const USER_DS: u16 = 0x7b;
/// A selector whose segment nobody knows.
pub const UNKNOWN_SELECTOR: u16 = 0x33;
/// Selector of the task state segment.
pub const TASK_SELECTOR: u16 = 0x80;
/// Selector of the local descriptor table.
pub const LOCAL_SELECTOR: u16 = 0x88;

/// Where `vmi_init` and `get_reloc` return to.
pub const RETURN_ADDRESS: u32 = 0xc010_4567;
/// Where an interrupted kernel goes on.
pub const INTERRUPTED_KERNEL: u32 = 0xc017_7654;
/// Where a program goes on.
pub const INTERRUPTED_USER: u32 = 0x0804_8cba;

/// The stack: four times what a call may use lies below ESP, so that a deeper one is seen.
const STACK_BASE: u32 = 0xc12f_e000;
const STACK_SIZE: usize = 2048;
const STACK_ENTRY: u32 = STACK_BASE + 4 * STACK_LIMIT;

/// Memory that pointer arguments point to; each has a page of its own.
const ARGUMENT_BASE: u32 = 0xc220_0000;
const ARGUMENT_STEP: u32 = 0x1_0000;
const PAGE: usize = 4096;

const GDT_BASE: u32 = 0xc330_0000;
const IDT_BASE: u32 = 0xc331_0000;
/// Linear address of the task state segment.
pub const TASK_STATE: u32 = 0xc332_0460;

/// A ready machine, and what was put into it.
#[derive(Clone, Debug)]
pub struct Trial<'a> {
    /// The machine.
    pub machine: Machine<'a>,
    /// The registers on entry.
    pub entry: Registers,
    /// The arguments' values, in the order of the declaration; of a pair the low half.
    pub arguments: Vec<u64>,
    /// The pages that arguments point to, as they were.
    pub pages: Vec<(usize, Region)>,
    /// The frame of IRET, as the processor would pop it.
    pub frame: Vec<u32>,
    /// Linear address of that frame.
    pub frame_at: u32,
    /// Where the call comes from; `None` for what is reached by a jump or asks for no site.
    pub site: Option<Site>,
    /// CR0 on entry.
    pub control: u32,
}

/// What of the image lies in memory, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Linear address of the first byte.
    pub base: u32,
    /// Bytes, if the image has as many.
    pub length: usize,
}

impl Placement {
    /// What guests of 13.0 make: a copy of the slots alone.
    pub const COPY: Self = Self { base: COPY_BASE, length: SLOT_TABLE_SIZE };

    /// The whole image.
    #[must_use]
    pub const fn whole(base: u32) -> Self {
        Self { base, length: usize::MAX }
    }

    fn memory<'a>(self, code: &Code<'a>, regions: Vec<Region>) -> Memory<'a> {
        let image = code.image();
        Memory::new(image.get(..self.length).unwrap_or(image), self.base, regions)
    }
}

/// A machine that is about to call the code at `offset`: `vmi_init` and `get_reloc` start so.
#[must_use]
pub fn plain<'a>(code: &'a Code<'a>, placement: Placement, offset: usize, seed: u64) -> Trial<'a> {
    let base = placement.base;
    let mut random = Random::new(seed);
    let registers = arbitrary(&mut random, base.wrapping_add(offset as u32));
    let mut stack = stack(&mut random);
    poke(&mut stack, STACK_ENTRY, RETURN_ADDRESS);
    let memory = placement.memory(code, vec![stack]);
    let mut machine = Machine::new(code, memory, registers.clone(), random);
    machine.flat = vec![KERNEL_CS, KERNEL_DS, USER_DS, USER_CS];
    machine.stack_top = STACK_ENTRY + 4;
    let control = machine.system.control[0];
    Trial {
        machine,
        entry: registers,
        arguments: vec![],
        pages: vec![],
        frame: vec![],
        frame_at: 0,
        site: None,
        control,
    }
}

/// A machine that is about to execute a call, in the way that the answer asks for.
#[must_use]
pub fn call<'a>(
    code: &'a Code<'a>,
    placement: Placement,
    offset: usize,
    call: &Call,
    kind: RelocationType,
    seed: u64,
) -> Trial<'a> {
    let base = placement.base;
    let contract = &call.contract;
    let mut random = Random::new(seed ^ (u64::from(call.number.map_or(0, |n| n.0)) << 32));
    let mut registers = arbitrary(&mut random, base.wrapping_add(offset as u32));
    let transfers = contract.ending == Ending::Transfers;
    if transfers {
        registers.eflags &= !flags::INTERRUPT;
    }
    if contract.segments == Segments::StackOnly {
        for segment in [Register::DS, Register::ES] {
            registers.set(segment, u32::from(UNKNOWN_SELECTOR));
        }
    }

    let mut stack = stack(&mut random);
    let mut top = STACK_ENTRY;
    let called = !(transfers && kind.as_answers() == Some(Answers::JUMP_REL));
    // A source of its own: with and without a site the rest of the state is the same.
    let mut surroundings = Random::new(!seed);
    let through_cs = contract.segments == Segments::StackOnly;
    let site = called.then(|| Site::new(registers.eip, through_cs, seed, &mut surroundings));
    if let Some(site) = &site {
        poke(&mut stack, top, site.end);
        top += 4;
    }
    let frame_at = top;
    let mut values = Vec::new();
    let mut pages = Vec::new();
    let mut frame = Vec::new();
    for (index, argument) in contract.arguments.iter().enumerate() {
        let page_base = ARGUMENT_BASE + ARGUMENT_STEP * index as u32;
        let value = match pointer(call, argument.name, &mut random) {
            Some(place) => {
                let mut bytes = vec![0; PAGE];
                random.fill(&mut bytes);
                let name = argument.name;
                pages.push((index, Region { name, base: page_base, bytes, writable: true }));
                u64::from(page_base + place)
            }
            None => number_for(call, argument.name, &registers, &mut random),
        };
        let (low, high) = (value as u32, (value >> 32) as u32);
        match argument.place {
            Place::Eax => registers.set(Register::EAX, low),
            Place::Edx => registers.set(Register::EDX, low),
            Place::Ecx => registers.set(Register::ECX, low),
            Place::Esi => registers.set(Register::ESI, low),
            Place::Edi => registers.set(Register::EDI, low),
            Place::EdxEax => {
                registers.set(Register::EAX, low);
                registers.set(Register::EDX, high);
            }
            Place::EcxEdx => {
                registers.set(Register::EDX, low);
                registers.set(Register::ECX, high);
            }
            Place::Stack => {
                poke(&mut stack, top, low);
                top += 4;
            }
            Place::StackPair => {
                poke(&mut stack, top, low);
                poke(&mut stack, top + 4, high);
                top += 8;
            }
            Place::Frame => {
                frame = interrupt_frame(&mut random);
                for word in &frame {
                    poke(&mut stack, top, *word);
                    top += 4;
                }
            }
        }
        values.push(value);
    }

    let mut regions = vec![stack];
    regions.extend(pages.iter().map(|(_, page)| page.clone()));
    regions.extend(system_tables(call));
    regions.extend(site.as_ref().and_then(|site| site.pointer.clone()));
    let mut memory = placement.memory(code, regions);
    memory.lenient = contract.group == Some(Group::Apic) || contract.ending == Ending::Stops;
    memory.text = site.as_ref().map(|site| site.text(&mut surroundings));
    let mut machine = Machine::new(code, memory, registers.clone(), random);
    machine.flat = vec![KERNEL_CS, KERNEL_DS, USER_DS, USER_CS];
    machine.stack_top = top;
    machine.system.gdtr = ((PAGE - 1) as u16, GDT_BASE);
    machine.system.idtr = (256 * 8 - 1, IDT_BASE);
    machine.system.task_register = TASK_SELECTOR;
    machine.system.ldtr = LOCAL_SELECTOR;
    machine.system.control[3] = machine.system.random.word() & 0xffff_f000;
    machine.system.control[2] = machine.system.random.word();
    // CR0.TS and CR4.PGE: code takes other ways with and without them.
    machine.system.control[0] |= machine.system.random.word() & 0x08;
    machine.system.control[4] ^= machine.system.random.word() & 0x80;
    machine.watch = contract
        .arguments
        .iter()
        .position(|argument| argument.name == "entry")
        .and_then(|index| values.get(index))
        .map(|value| *value as u32);
    // Most kernels protect their text, but not all.
    if surroundings.below(8) == 0 {
        machine.system.control[0] &= !WRITE_PROTECT;
    }
    let control = machine.system.control[0];
    Trial { machine, entry: registers, arguments: values, pages, frame, frame_at, site, control }
}

/// A machine that is about to make the same call from the site that `before` came from, as it was
/// left, in a new state; `None` if the site is as it was, so that there would be nothing new to see.
#[must_use]
pub fn again<'a>(
    code: &'a Code<'a>,
    placement: Placement,
    offset: usize,
    declared: &Call,
    kind: RelocationType,
    seed: u64,
    before: &Trial<'_>,
) -> Option<Trial<'a>> {
    let site = before.site.as_ref().filter(|_| before.rewrote())?;
    let mut next = call(code, placement, offset, declared, kind, seed);
    let regions = &mut next.machine.memory.regions;
    regions
        .retain(|region| next.site.as_ref().and_then(|site| site.pointer.as_ref()) != Some(region));
    regions.extend(site.pointer.clone());
    next.machine.memory.text.clone_from(&before.machine.memory.text);
    next.machine.registers.eip = site.start;
    // The return address is not on the stack yet.
    next.machine.registers.set(Register::ESP, STACK_ENTRY + 4);
    next.site = Some(Site { bytes: next.text_at_site(), ..site.clone() });
    Some(next)
}

impl Trial<'_> {
    /// Where the caller goes on.
    #[must_use]
    pub fn return_address(&self) -> u32 {
        self.site.as_ref().map_or(RETURN_ADDRESS, |site| site.resume)
    }

    /// Whether the site holds other bytes than before.
    #[must_use]
    pub fn rewrote(&self) -> bool {
        self.site.as_ref().is_some_and(|site| site.bytes != self.text_at_site())
    }

    fn text_at_site(&self) -> Vec<u8> {
        self.machine.memory.text.as_ref().map_or(Vec::new(), |text| text.site_bytes().to_vec())
    }

    /// The value of an argument, by its name.
    #[must_use]
    pub fn argument(&self, call: &Call, name: &str) -> Option<u64> {
        let index = call.contract.arguments.iter().position(|argument| argument.name == name)?;
        self.arguments.get(index).copied()
    }

    /// Whether the run ended where a call returns to, with the stack as a caller expects it.
    #[must_use]
    pub fn returned(&self, stop: Stop) -> bool {
        stop == Stop::Left
            && self.machine.registers.eip == self.return_address()
            && self.machine.registers.ring() == 0
    }
}

/// General registers, flags and selectors as they may be in a kernel.
fn arbitrary(random: &mut Random, eip: u32) -> Registers {
    let mut registers = Registers::default();
    registers.eip = eip;
    for register in FREE {
        registers.set(register, random.word());
    }
    registers.set(Register::ESP, STACK_ENTRY);
    for (segment, selector) in [
        (Register::CS, KERNEL_CS),
        (Register::SS, KERNEL_DS),
        (Register::DS, USER_DS),
        (Register::ES, USER_DS),
        (Register::FS, 0),
        (Register::GS, UNKNOWN_SELECTOR),
    ] {
        registers.set(segment, u32::from(selector));
    }
    let free = flags::ARITHMETIC
        | flags::INTERRUPT
        | flags::IOPL
        | flags::ALIGNMENT
        | flags::IDENTIFICATION;
    registers.eflags = (random.word() & free) | flags::FIXED;
    registers
}

/// A stack with something on it; only what lies around ESP differs from word to word.
fn stack(random: &mut Random) -> Region {
    let mut bytes = vec![random.word() as u8; STACK_SIZE];
    let entry = (STACK_ENTRY - STACK_BASE) as usize;
    if let Some(near) = bytes.get_mut(entry - 64..entry + 128) {
        random.fill(near);
    }
    Region { name: "stack", base: STACK_BASE, bytes, writable: true }
}

/// Puts a word into a region that has room for it.
fn poke(region: &mut Region, address: u32, value: u32) {
    let start = (address - region.base) as usize;
    if let Some(place) = region.bytes.get_mut(start..start + 4) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

/// Where in its page an argument that is a pointer points to; `None` for one that is none.
fn pointer(call: &Call, name: &str, random: &mut Random) -> Option<u32> {
    match name {
        "table" if call.contract.arguments.len() > 1 => Some(0),
        "entry" => Some(random.below(PAGE as u32 / 8) * 8),
        "table" | "buffer" | "destination" | "source" | "state" => {
            Some(64 + random.below(PAGE as u32 / 16) * 4)
        }
        "register" if call.contract.group == Some(Group::Apic) => {
            Some((2 + random.below(0x3e)) * 16)
        }
        _ => None,
    }
}

/// A value that a guest might pass.
fn number_for(call: &Call, name: &str, registers: &Registers, random: &mut Random) -> u64 {
    let number = call.number.unwrap_or(number::SetCallbacks);
    let value = match name {
        "value" | "expiry" | "period" => return random.bits(),
        "index" if call.contract.arguments.iter().any(|other| other.name == "table") => {
            random.below(PAGE as u32 / 8)
        }
        "count" => random.below(17),
        "selector" if number == number::SetTR => u32::from(TASK_SELECTOR),
        "selector" => u32::from(LOCAL_SELECTOR),
        "task_state" if random.below(2) == 0 => TASK_STATE,
        "task_state" => u32::from(KERNEL_DS),
        // Debug registers; now and then a number beyond them.
        "register" if random.below(8) == 0 => 8 + random.below(100),
        "register" => random.below(8),
        "kind" => random.below(2),
        "bit" => random.below(entry_bits(call)),
        "call" => random.below(SLOT_COUNT as u32),
        "flags" if call.contract.slot == Some(slot::FlushDeferredCalls) => {
            random.word() & DeferredFlags::all().bits()
        }
        "counter" if number == number::GetCycleCounter => random.below(5),
        "counter" => random.below(2),
        "mode" => random.below(3),
        "slot" => random.below(4),
        "frame" if number == number::IRET => 0,
        "mask" if number == number::SetInterruptMask => {
            // What GetInterruptMask gave some time before: the system's flags are the same.
            let changing = flags::ARITHMETIC | flags::INTERRUPT;
            (registers.eflags & !changing) | (random.word() & changing)
        }
        "mask" => random.word() & flags::IOPL,
        "eip" => INTERRUPTED_USER,
        "esp" => 0xbfff_0000 | (random.word() & 0xfffc),
        "flags" => match number {
            number::FlushTLB => 1 + random.below(3),
            number::SetAlarm | number::CancelAlarm => (random.word() & 0x1_0100) | random.below(2),
            number::AllocatePage | number::ReleasePage => random.word() & 0x7f,
            _ => random.word() & 0xffff_f01f,
        },
        _ => random.word(),
    };
    u64::from(value)
}

/// Bits of the page-table entry that a call is about.
#[must_use]
pub fn entry_bits(call: &Call) -> u32 {
    match call.contract.slot {
        Some(slot::TestAndSetPxELongBit | slot::TestAndClearPxELongBit) => 64,
        _ => 32,
    }
}

/// What IRET pops: of an interrupted kernel, of a program, of a virtual-8086 program.
fn interrupt_frame(random: &mut Random) -> Vec<u32> {
    let loadable = flags::ARITHMETIC | flags::INTERRUPT | flags::DIRECTION | flags::IOPL;
    let eflags = (random.word() & loadable) | flags::FIXED;
    match random.below(3) {
        0 => vec![INTERRUPTED_KERNEL, u32::from(KERNEL_CS), eflags],
        1 => {
            let esp = 0xbfff_0000 | (random.word() & 0xffff);
            vec![INTERRUPTED_USER, u32::from(USER_CS), eflags, esp, u32::from(USER_DS)]
        }
        _ => vec![
            random.word() & 0xffff,
            0x1000,
            eflags | flags::VIRTUAL_8086,
            random.word() & 0xffff,
            0x2000,
            0x3000,
            0x4000,
            0x5000,
            0x6000,
        ],
    }
}

/// The tables that the system's registers point to.
fn system_tables(call: &Call) -> Vec<Region> {
    let tables_matter = !matches!(call.contract.segments, Segments::StackOnly);
    if !tables_matter {
        return Vec::new();
    }
    let mut gdt = Region { name: "GDT", base: GDT_BASE, bytes: vec![0; PAGE], writable: false };
    let descriptor = |base: u32, limit: u32, access: u32| {
        let low = (limit & 0xffff) | (base << 16);
        let high =
            (base & 0xff00_0000) | (limit & 0xf_0000) | (access << 8) | ((base >> 16) & 0xff);
        [low, high]
    };
    let flat = |access: u32| {
        let [low, high] = descriptor(0, 0xf_ffff, access);
        [low, high | 0x00c0_0000]
    };
    for (selector, words) in [
        (KERNEL_CS, flat(0x9a)),
        (KERNEL_DS, flat(0x92)),
        (USER_CS & !3, flat(0xfa)),
        (USER_DS & !3, flat(0xf2)),
        (TASK_SELECTOR, descriptor(TASK_STATE, 0x67, 0x8b)),
        (LOCAL_SELECTOR, descriptor(IDT_BASE + 0x800, 0x27, 0x82)),
    ] {
        for (place, word) in (0..).step_by(4).zip(words) {
            poke(&mut gdt, GDT_BASE + u32::from(selector) + place, word);
        }
    }
    let idt = Region { name: "IDT", base: IDT_BASE, bytes: vec![0; PAGE], writable: false };
    let writable = call.number == Some(number::UpdateKernelStack);
    let base = TASK_STATE & !0xfff;
    vec![gdt, idt, Region { name: "TSS", base, bytes: vec![0; PAGE], writable }]
}
