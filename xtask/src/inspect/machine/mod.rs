//! A flat 32-bit processor in ring 0 that executes the image's code and watches what it does.
//!
//! It has what a call's stub can need: general registers, arithmetic, the flags, memory with an
//! owner for every byte, the instructions of the system (whose effect on registers, memory and
//! flags is modelled) and nothing else. What it does not know it refuses: [`Stop::Undecided`].

mod execute;
pub mod flags;
pub mod memory;
pub mod registers;
mod strings;
mod system;
#[cfg(test)]
mod tests;

pub use memory::{Denied, Memory, Region, Text};
pub use registers::Registers;
pub use system::System;

use super::random::Random;
use iced_x86::{
    CpuidFeature, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register,
};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::Range;

/// The image's code, decoded at most once.
///
/// Instructions carry their offset in the image as their address, so that they serve every base.
#[derive(Debug)]
pub struct Code<'a> {
    image: &'a [u8],
    decoded: RefCell<Vec<Option<Decoded>>>,
    /// What may still be spent in all, against programs made to take for ever: one for each
    /// instruction executed, [`REACH_COST`] for each one followed without being executed.
    fuel: Cell<u64>,
}

/// An instruction and what the machine wants to know about it each time.
#[derive(Clone, Copy, Debug)]
struct Decoded {
    instruction: Instruction,
    vector: bool,
    system: bool,
    /// General registers written, as places in [`registers::GENERAL`].
    writes: u8,
}

/// What it costs to follow an instruction without executing it. It is kept, and perhaps shown.
const REACH_COST: u64 = 8;

/// CR0.WP: while it is set, nothing is stored into pages that are read-only.
pub const WRITE_PROTECT: u32 = 1 << 16;

impl<'a> Code<'a> {
    /// An image's code.
    #[must_use]
    pub fn new(image: &'a [u8], fuel: u64) -> Self {
        let decoded = RefCell::new(vec![None; image.len()]);
        Self { image, decoded, fuel: Cell::new(fuel) }
    }

    /// The bytes.
    #[must_use]
    pub fn image(&self) -> &'a [u8] {
        self.image
    }

    /// The instruction at an offset; `None` beyond the image, an invalid one where none can be read.
    #[must_use]
    pub fn at(&self, offset: usize) -> Option<Instruction> {
        self.lookup(offset).map(|decoded| decoded.instruction)
    }

    /// Whether the instruction at an offset is one of [`is_vector`].
    #[must_use]
    pub fn vector_at(&self, offset: usize) -> bool {
        self.lookup(offset).is_some_and(|decoded| decoded.vector)
    }

    /// Pays for following one more instruction; `false` if there is nothing left to pay with.
    #[must_use]
    pub fn follow(&self) -> bool {
        self.spend(REACH_COST)
    }

    fn spend(&self, cost: u64) -> bool {
        let left = self.fuel.get().checked_sub(cost);
        self.fuel.set(left.unwrap_or(0));
        left.is_some()
    }

    fn lookup(&self, offset: usize) -> Option<Decoded> {
        let mut cache = self.decoded.borrow_mut();
        let place = cache.get_mut(offset)?;
        if place.is_none() {
            let bytes = self.image.get(offset..)?;
            let mut decoder = Decoder::with_ip(32, bytes, offset as u64, DecoderOptions::NONE);
            let instruction = decoder.decode();
            *place = Some(Decoded::new(instruction));
        }
        *place
    }
}

impl Decoded {
    fn new(instruction: Instruction) -> Self {
        Self {
            instruction,
            vector: is_vector(&instruction),
            system: is_system(&instruction),
            writes: written(&instruction),
        }
    }
}

/// General registers that an instruction writes, as bits in the order of [`registers::GENERAL`].
#[must_use]
pub fn written(instruction: &Instruction) -> u8 {
    let mut factory = InstructionInfoFactory::new();
    let mut places = 0;
    for used in factory.info(instruction).used_registers() {
        let changes = matches!(
            used.access(),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        if changes && used.register().is_gpr() {
            places |= 1 << (used.register().full_register32().number() & 7);
        }
    }
    places
}

/// Whether an instruction belongs to x87, MMX, SSE or what came after: state that no call may touch.
#[must_use]
pub fn is_vector(instruction: &Instruction) -> bool {
    use CpuidFeature as F;
    if matches!(instruction.mnemonic(), Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence) {
        return false;
    }
    let registers = (0..instruction.op_count()).map(|operand| instruction.op_register(operand));
    let mut registers = registers.filter(|register| *register != Register::None);
    if registers
        .any(|register| register.is_vector_register() || register.is_mm() || register.is_st())
    {
        return true;
    }
    instruction.cpuid_features().iter().any(|feature| {
        matches!(
            feature,
            F::FPU
                | F::FPU287
                | F::FPU287XL_ONLY
                | F::FPU387
                | F::FPU387SL_ONLY
                | F::MMX
                | F::FXSR
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::SSE4A
                | F::D3NOW
                | F::D3NOWEXT
                | F::AVX
                | F::AVX2
                | F::XSAVE
                | F::XSAVEOPT
                | F::XSAVEC
                | F::XSAVES
        )
    })
}

/// Whether an instruction reaches beyond the program: the ones a hypervisor would want to see.
#[must_use]
pub fn is_system(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    instruction.is_privileged()
        || matches!(
            instruction.mnemonic(),
            M::Cpuid
                | M::Rdtsc
                | M::Rdtscp
                | M::Rdpmc
                | M::Pushf
                | M::Pushfd
                | M::Popf
                | M::Popfd
                | M::Iret
                | M::Iretd
                | M::Sgdt
                | M::Sidt
                | M::Sldt
                | M::Str
                | M::Smsw
                | M::Sysenter
                | M::Sysexit
                | M::Int
                | M::Int3
                | M::Into
                | M::Vmcall
                | M::Vmmcall
        )
}

/// Something that the code did and must not do; execution goes on behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breach {
    /// A store into the image.
    StoreIntoImage {
        /// Linear address.
        address: u32,
    },
    /// A read of memory that the call was not given.
    Read {
        /// Linear address.
        address: u32,
    },
    /// A store into memory that the call was not given.
    Write {
        /// Linear address.
        address: u32,
    },
    /// An access through a segment register that is not known to be flat.
    Segment {
        /// The register.
        segment: Register,
    },
    /// An access below ESP, where any interrupt writes.
    BelowStack {
        /// Bytes below ESP.
        distance: u32,
    },
    /// A store into the caller's part of the stack.
    CallerStack {
        /// Bytes above ESP on entry.
        distance: u32,
    },
    /// An instruction of x87, MMX, SSE or later extensions; it was skipped.
    Vector,
    /// A read of kernel text in another page than the one the call came from.
    OtherText {
        /// Linear address.
        address: u32,
    },
    /// A store into kernel text that write protection keeps out, or beside the granted page.
    ProtectedText {
        /// Linear address.
        address: u32,
    },
}

impl Breach {
    /// A number for each kind.
    const fn kind(&self) -> usize {
        match self {
            Self::StoreIntoImage { .. } => 0,
            Self::Read { .. } => 1,
            Self::Write { .. } => 2,
            Self::Segment { .. } => 3,
            Self::BelowStack { .. } | Self::CallerStack { .. } => 4,
            Self::Vector => 5,
            Self::OtherText { .. } | Self::ProtectedText { .. } => 6,
        }
    }
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StoreIntoImage { address } => {
                write!(
                    f,
                    "stores into the image (linear {address:08X}h), whose memory is read-only after POST"
                )
            }
            Self::Read { address } => {
                write!(
                    f,
                    "reads linear {address:08X}h, which is neither the image, the stack nor an argument"
                )
            }
            Self::Write { address } => {
                write!(
                    f,
                    "writes linear {address:08X}h, which is neither the stack nor an argument"
                )
            }
            Self::Segment { segment } => {
                write!(f, "accesses memory through {segment:?}, which is not known to be flat here")
            }
            Self::BelowStack { distance } => {
                write!(
                    f,
                    "uses memory {distance} bytes below ESP, where an interrupt may write at any time"
                )
            }
            Self::CallerStack { distance } => {
                write!(f, "writes into the caller's stack, {distance} bytes above ESP on entry")
            }
            Self::Vector => {
                write!(f, "uses x87, MMX or SSE state, which belongs to the interrupted program")
            }
            Self::OtherText { address } => {
                write!(
                    f,
                    "reads kernel text at linear {address:08X}h, in another page than the call's last byte: it may not be mapped"
                )
            }
            Self::ProtectedText { address } => {
                write!(
                    f,
                    "stores into kernel text at linear {address:08X}h, which is read-only while CR0.WP is set"
                )
            }
        }
    }
}

/// Why execution ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The instruction pointer left the image, or the ring: the state says where to.
    Left,
    /// HLT with interrupts disabled.
    Halted,
    /// The processor shut down, which a PC answers with a reset.
    Reset,
    /// An exception or a software interrupt.
    Interrupt(u8),
    /// The instruction budget of the run is used up.
    Budget,
    /// A budget of the whole inspection is used up: of instructions, or of memory to remember with.
    Fuel,
    /// An instruction that the machine does not know.
    Undecided,
}

/// What the code did on its way.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Instructions executed.
    pub instructions: u64,
    /// Instructions executed at the call site, in order.
    pub site: Vec<Instruction>,
    /// Stores that changed kernel text, in order.
    pub text_stores: Vec<TextStore>,
    /// Offsets executed, in order of first execution.
    pub offsets: Vec<usize>,
    /// What it must not do, with the instruction's offset; `None` at the call site.
    pub breaches: Vec<(Option<usize>, Breach)>,
    /// Mnemonics of instructions that reach beyond the program, in order.
    pub events: Vec<(Option<usize>, Mnemonic)>,
    /// The last instruction's offset; `None` at the call site.
    pub last: Option<usize>,
    /// The last instruction's mnemonic.
    pub mnemonic: Mnemonic,
    /// Whether the last instruction stood in the shadow of STI.
    pub shadowed: bool,
    /// For each general register the offset of the last instruction that wrote it.
    pub writers: [Option<usize>; 8],
    /// The last instruction that wrote flags.
    pub flags_writer: Option<usize>,
    /// Values that the watched place took, with the instruction's offset.
    pub watched: Vec<(Option<usize>, u64)>,
    /// For each offset [`EXECUTED`] and the kinds of breaches that are known of it; the call site comes last.
    seen: Vec<u8>,
    /// Breaches kept, by kind.
    kept: [usize; 7],
}

/// A store that changed kernel text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextStore {
    /// The instruction's offset; `None` at the call site.
    pub offset: Option<usize>,
    /// Addresses that it covered.
    pub covered: Range<u32>,
    /// From the first to the last byte that it changed.
    pub changed: Range<u32>,
    /// Whether no other processor could come between its read and its store.
    pub locked: bool,
    /// Whether an interrupt could come while write protection was off.
    pub interruptible: bool,
    /// What the site is after it.
    pub left: Vec<u8>,
}

/// Marks an offset that was executed, beside the bits of [`Breach::kind`].
const EXECUTED: u8 = 0x80;

/// Places kept of each kind of breach in a run; a hostile image may have one at every instruction.
const BREACHES_KEPT: usize = 64;

/// Events kept of a run; loops may make any number.
const EVENTS_KEPT: usize = 256;

/// Instructions of the call site, and stores into text, that are kept of a run.
const TEXT_KEPT: usize = 16;

/// The machine.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    code: &'a Code<'a>,
    /// Registers.
    pub registers: Registers,
    /// Memory.
    pub memory: Memory<'a>,
    /// What lies behind the privileged instructions.
    pub system: System,
    /// What the code did.
    pub trace: Trace,
    /// An 8-byte place whose values are recorded.
    pub watch: Option<u32>,
    /// Linear address of the first byte above what the code may write of the stack.
    pub stack_top: u32,
    /// Selectors that stand for flat segments.
    pub flat: Vec<u16>,
    /// The ring that the code runs in. What is privileged it may do there as in ring 0: somebody else does it.
    pub ring: u32,
    entry_esp: u32,
    lowest: u32,
    shadow: bool,
    locked: bool,
}

impl<'a> Machine<'a> {
    /// A machine that is about to execute the code at `registers.eip`. The first region of memory
    /// is the stack.
    #[must_use]
    pub fn new(
        code: &'a Code<'a>,
        memory: Memory<'a>,
        registers: Registers,
        random: Random,
    ) -> Self {
        let esp = registers.get(Register::ESP);
        let trace = Trace { seen: vec![0; code.image.len() + 1], ..Trace::default() };
        Self {
            code,
            registers,
            memory,
            system: System::new(random),
            trace,
            watch: None,
            stack_top: u32::MAX,
            flat: Vec::new(),
            ring: 0,
            entry_esp: esp,
            lowest: esp,
            shadow: false,
            locked: false,
        }
    }

    /// Executes until something ends it, at most `budget` instructions.
    pub fn run(&mut self, budget: u64) -> Stop {
        let limit = self.trace.instructions.saturating_add(budget);
        loop {
            if self.trace.instructions >= limit {
                return Stop::Budget;
            }
            if let Err(stop) = self.step() {
                return stop;
            }
        }
    }

    /// The offset that execution left for, or stands at without all of the instruction, where only a
    /// part of the image lies in memory and the whole would go on.
    #[must_use]
    pub fn missed(&self) -> Option<usize> {
        let offset = self.registers.eip.checked_sub(self.memory.image_base())? as usize;
        let end = offset + self.code.at(offset)?.len();
        (end > self.memory.image_length()).then_some(offset)
    }

    /// Bytes of the stack used below ESP on entry.
    #[must_use]
    pub fn stack_depth(&self) -> u32 {
        self.entry_esp - self.lowest
    }

    /// The selector that CS, SS, DS, ES, FS or GS holds is one of a flat segment.
    fn is_flat(&self, segment: Register) -> bool {
        let selector = self.registers.get(segment) as u16;
        matches!(segment, Register::CS | Register::SS) || self.flat.contains(&selector)
    }

    fn step(&mut self) -> Result<(), Stop> {
        if self.registers.ring() != self.ring {
            return Err(Stop::Left);
        }
        let offset = self.memory.offset_of(self.registers.eip);
        let decoded = match offset {
            Some(offset) => self.code.lookup(offset),
            None => self.at_site(),
        };
        let Some(decoded) = decoded else { return Err(Stop::Left) };
        // What stands at a site is decoded each time: it may have changed.
        let cost = if offset.is_some() { 1 } else { REACH_COST };
        if !self.code.spend(cost) || self.memory.is_full() {
            return Err(Stop::Fuel);
        }

        let instruction = decoded.instruction;
        // Where only a part of the image lies in memory, its last instruction may be cut off.
        if offset.is_some_and(|offset| offset + instruction.len() > self.memory.image_length()) {
            return Err(Stop::Left);
        }
        self.trace.instructions += 1;
        self.trace.last = offset;
        self.trace.mnemonic = instruction.mnemonic();
        self.trace.shadowed = std::mem::take(&mut self.shadow);
        self.locked = instruction.has_lock_prefix();
        match offset {
            Some(offset) => {
                let seen = self.trace.seen.get_mut(offset);
                if let Some(seen) = seen.filter(|seen| **seen & EXECUTED == 0) {
                    *seen |= EXECUTED;
                    self.trace.offsets.push(offset);
                }
            }
            None if self.trace.site.len() < TEXT_KEPT => self.trace.site.push(instruction),
            None => {}
        }
        if instruction.is_invalid() {
            return Err(Stop::Interrupt(6));
        }
        self.registers.eip = self.registers.eip.wrapping_add(instruction.len() as u32);
        if decoded.vector {
            self.breach(Breach::Vector);
            return Ok(());
        }
        if decoded.system && self.trace.events.len() < EVENTS_KEPT {
            self.trace.events.push((offset, instruction.mnemonic()));
        }
        let flags = self.registers.eflags;
        self.execute(&instruction)?;
        if flags != self.registers.eflags {
            self.trace.flags_writer = offset;
        }
        let mut writes = decoded.writes;
        while writes != 0 {
            self.trace.writers[writes.trailing_zeros() as usize & 7] = offset;
            writes &= writes - 1;
        }
        self.note_depth(self.registers.get(Register::ESP));
        Ok(())
    }

    /// The instruction at the call site that is to be executed next.
    fn at_site(&self) -> Option<Decoded> {
        let eip = self.registers.eip;
        let bytes = self.memory.text.as_ref()?.code_at(eip)?;
        // Like the image's instructions it counts from the image's first byte.
        let place = eip.wrapping_sub(self.memory.image_base());
        let mut decoder = Decoder::with_ip(32, bytes, u64::from(place), DecoderOptions::NONE);
        Some(Decoded::new(decoder.decode()))
    }

    fn breach(&mut self, breach: Breach) {
        let kind = breach.kind();
        let place = self.trace.last.unwrap_or(self.code.image.len());
        let (Some(seen), Some(kept)) =
            (self.trace.seen.get_mut(place), self.trace.kept.get_mut(kind))
        else {
            return;
        };
        if *seen & (1 << kind) == 0 && *kept < BREACHES_KEPT {
            *seen |= 1 << kind;
            *kept += 1;
            self.trace.breaches.push((self.trace.last, breach));
        }
    }

    /// Whether an address belongs to the stack, the first region.
    fn on_stack(&self, address: u32) -> bool {
        self.memory.regions.first().is_some_and(|stack| stack.number(address, 1).is_some())
    }

    fn note_depth(&mut self, address: u32) {
        if address < self.lowest && self.on_stack(address) {
            self.lowest = address;
        }
    }

    fn check_access(&mut self, segment: Register, address: u32) {
        if !self.is_flat(segment) {
            self.breach(Breach::Segment { segment });
        }
        let esp = self.registers.get(Register::ESP);
        if address < esp && self.on_stack(address) && self.on_stack(esp) {
            self.breach(Breach::BelowStack { distance: esp - address });
        }
    }

    /// Reads memory as an instruction's operand.
    fn load(&mut self, segment: Register, address: u32, size: usize) -> u64 {
        self.check_access(segment, address);
        self.read(address, size)
    }

    fn read(&mut self, address: u32, size: usize) -> u64 {
        if self.memory.reaches_text(address, size)
            && let Some(text) = &mut self.memory.text
        {
            text.about_to_be_read();
        }
        match self.memory.read(address, size) {
            Ok(value) => value,
            Err(denied) => {
                self.breach(match denied {
                    Denied::OtherText => Breach::OtherText { address },
                    _ => Breach::Read { address },
                });
                self.system.random.bits() & (u64::MAX >> (64 - 8 * size.clamp(1, 8)))
            }
        }
    }

    /// Writes memory as an instruction's operand.
    fn store(
        &mut self,
        segment: Register,
        address: u32,
        size: usize,
        value: u64,
    ) -> Result<(), Stop> {
        // A store through CS faults on every processor.
        if segment == Register::CS {
            return Err(Stop::Interrupt(13));
        }
        self.check_access(segment, address);
        self.write(address, size, value);
        Ok(())
    }

    fn write(&mut self, address: u32, size: usize, value: u64) {
        if self.memory.reaches_text(address, size) {
            return self.write_text(address, size, value);
        }
        match self.memory.write(address, size, value) {
            Ok(()) => {}
            Err(Denied::Image) => self.breach(Breach::StoreIntoImage { address }),
            Err(Denied::NotGranted | Denied::OtherText) => self.breach(Breach::Write { address }),
            // The next instruction is not executed any more.
            Err(Denied::Full) => {}
        }
        if self.on_stack(address) {
            self.note_depth(address);
            if address >= self.stack_top {
                self.breach(Breach::CallerStack { distance: address - self.entry_esp });
            }
        }
        if let Some(place) = self.watch
            && let Ok(value) = self.memory.read(place, 8)
            && self.trace.watched.last().is_none_or(|(_, last)| *last != value)
        {
            self.trace.watched.push((self.trace.last, value));
        }
    }

    fn write_text(&mut self, address: u32, size: usize, value: u64) {
        let is_protected = self.system.control[0] & WRITE_PROTECT != 0;
        let before = self.memory.read(address, size).ok().filter(|_| !is_protected);
        let (Some(before), Ok(())) = (before, self.memory.write(address, size, value)) else {
            return self.breach(Breach::ProtectedText { address });
        };
        let mask = u64::MAX >> (64 - 8 * size.clamp(1, 8));
        let changed = (before ^ value) & mask;
        if changed == 0 || self.trace.text_stores.len() >= TEXT_KEPT {
            return;
        }
        let first = address + changed.trailing_zeros() / 8;
        let end = address + 8 - changed.leading_zeros() / 8;
        let left = self.memory.text.as_ref().map_or(Vec::new(), |text| text.site_bytes().to_vec());
        self.trace.text_stores.push(TextStore {
            offset: self.trace.last,
            covered: address..address + size as u32,
            changed: first..end,
            locked: self.locked,
            interruptible: self.registers.eflags & flags::INTERRUPT != 0,
            left,
        });
    }

    fn push(&mut self, value: u32, size: usize) {
        let esp = self.registers.get(Register::ESP).wrapping_sub(size as u32);
        self.registers.set(Register::ESP, esp);
        self.write(esp, size, u64::from(value));
    }

    fn pop(&mut self, size: usize) -> u32 {
        let esp = self.registers.get(Register::ESP);
        let value = self.read(esp, size) as u32;
        self.registers.set(Register::ESP, esp.wrapping_add(size as u32));
        value
    }
}
