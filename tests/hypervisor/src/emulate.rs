//! Carries out a single instruction for the guest: those that kernels change page tables with, whose stores are to be seen.
//!
//! Segments are taken to be flat but for their bases: their limits and types are not checked again.

#[cfg(test)]
mod tests;

use crate::walk::Access;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// The guest's memory, as an instruction reaches it.
pub trait Bus {
    /// Translates a linear address, with all that the processor does on the way.
    ///
    /// # Errors
    ///
    /// The page fault's error code.
    fn translate(&mut self, linear: u32, access: Access) -> Result<u64, u32>;

    /// Reads 1 to 8 bytes of one frame.
    fn read(&mut self, physical: u64, size: usize) -> u64;

    /// Stores 1 to 8 bytes to one frame.
    fn write(&mut self, physical: u64, size: usize, value: u64);
}

/// The guest's registers, as far as instructions here use them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI: the order of their encodings.
    pub registers: [u32; 8],
    /// EFLAGS.
    pub eflags: u32,
    /// The bases of ES, CS, SS, DS, FS and GS.
    pub bases: [u32; 6],
    /// In ring 3.
    pub user: bool,
}

/// Why an instruction was not carried out. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It raises a page fault.
    PageFault {
        /// For CR2.
        linear: u32,
        /// The error code.
        error: u32,
    },
    /// It is none of those that are known here.
    Unknown,
}

/// What comes after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The one behind it.
    Instruction,
    /// The same one again: a string instruction has more to do.
    Same,
}

/// Flags.
const CARRY: u32 = 1 << 0;
const PARITY: u32 = 1 << 2;
const AUXILIARY: u32 = 1 << 4;
const ZERO: u32 = 1 << 6;
const SIGN: u32 = 1 << 7;
const DIRECTION: u32 = 1 << 10;
const OVERFLOW: u32 = 1 << 11;
const ARITHMETIC: u32 = CARRY | PARITY | AUXILIARY | ZERO | SIGN | OVERFLOW;

const EAX: usize = 0;
const ECX: usize = 1;
const EDX: usize = 2;
const EBX: usize = 3;
const ESI: usize = 6;
const EDI: usize = 7;

const PAGE: u32 = 4096;

/// Carries out an instruction that was decoded for 32 or 16 bits.
///
/// # Errors
///
/// It raises a page fault, or is not known here.
pub fn execute(
    instruction: &Instruction,
    state: &mut State,
    bus: &mut impl Bus,
) -> Result<Next, Stop> {
    Execution { instruction, state, bus }.run()
}

struct Execution<'a, B> {
    instruction: &'a Instruction,
    state: &'a mut State,
    bus: &'a mut B,
}

/// An operand that can be read, and perhaps stored to.
#[derive(Clone, Copy)]
enum Operand {
    Register(Register),
    Memory(u32),
    Immediate(u64),
}

impl<B: Bus> Execution<'_, B> {
    fn run(&mut self) -> Result<Next, Stop> {
        use Mnemonic as M;
        let size = self.instruction.memory_size().size();
        match self.instruction.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd => return self.string(size, true),
            M::Stosb | M::Stosw | M::Stosd => return self.string(size, false),
            _ => {}
        }
        if !matches!(size, 1 | 2 | 4 | 8) || self.instruction.op0_kind() == OpKind::NearBranch32 {
            return Err(Stop::Unknown);
        }
        let count = self.instruction.op_count();
        let target = self.operand(0)?;
        let source = if count > 1 { self.operand(1)? } else { Operand::Immediate(1) };
        let flags = self.state.eflags;
        let carry = u64::from(flags & CARRY);
        match self.instruction.mnemonic() {
            M::Mov | M::Movnti => {
                let value = self.load(source, size)?;
                self.store(target, size, value)?;
            }
            M::Add => self.modify(target, source, size, |a, b| add(a, b, 0, size))?,
            M::Adc => self.modify(target, source, size, |a, b| add(a, b, carry, size))?,
            M::Sub => self.modify(target, source, size, |a, b| subtract(a, b, 0, size))?,
            M::Sbb => self.modify(target, source, size, |a, b| subtract(a, b, carry, size))?,
            M::And => self.modify(target, source, size, |a, b| logical(a & b, size))?,
            M::Or => self.modify(target, source, size, |a, b| logical(a | b, size))?,
            M::Xor => self.modify(target, source, size, |a, b| logical(a ^ b, size))?,
            M::Neg => self.modify(target, source, size, |a, _| subtract(0, a, 0, size))?,
            M::Not => self.modify(target, source, size, |a, _| (!a, flags))?,
            // These two leave CF alone.
            M::Inc => self.modify(target, Operand::Immediate(1), size, |a, b| {
                let (value, new) = add(a, b, 0, size);
                (value, new & !CARRY | flags & CARRY)
            })?,
            M::Dec => self.modify(target, Operand::Immediate(1), size, |a, b| {
                let (value, new) = subtract(a, b, 0, size);
                (value, new & !CARRY | flags & CARRY)
            })?,
            M::Bts => self.bit(target, source, size, |value, bit| value | bit)?,
            M::Btr => self.bit(target, source, size, |value, bit| value & !bit)?,
            M::Btc => self.bit(target, source, size, |value, bit| value ^ bit)?,
            M::Xchg => {
                let (a, b) =
                    (self.load_to_change(target, size)?, self.load_to_change(source, size)?);
                self.store(target, size, b)?;
                self.store(source, size, a)?;
            }
            M::Xadd => {
                let (a, b) = (self.load_to_change(target, size)?, self.load(source, size)?);
                let (sum, new) = add(a, b, 0, size);
                self.store(source, size, a)?;
                self.store(target, size, sum)?;
                self.set_flags(new);
            }
            M::Cmpxchg => {
                let old = self.load_to_change(target, size)?;
                let accumulator = Operand::Register(match size {
                    1 => Register::AL,
                    2 => Register::AX,
                    _ => Register::EAX,
                });
                let expected = self.load(accumulator, size)?;
                let value = self.load(source, size)?;
                let (_, new) = subtract(expected, old, 0, size);
                // The processor stores in either case.
                self.store(target, size, if old == expected { value } else { old })?;
                if old != expected {
                    self.store(accumulator, size, old)?;
                }
                self.set_flags(new);
            }
            M::Cmpxchg8b => {
                let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
                let registers = self.state.registers;
                let old = self.load_to_change(target, 8)?;
                let equal = old == pair(registers[EAX], registers[EDX]);
                let value = pair(registers[EBX], registers[ECX]);
                self.store(target, 8, if equal { value } else { old })?;
                if equal {
                    self.state.eflags |= ZERO;
                } else {
                    self.state.eflags &= !ZERO;
                    self.state.registers[EAX] = old as u32;
                    self.state.registers[EDX] = (old >> 32) as u32;
                }
            }
            _ => return Err(Stop::Unknown),
        }
        Ok(Next::Instruction)
    }

    /// One step of MOVS or STOS.
    fn string(&mut self, size: usize, moves: bool) -> Result<Next, Stop> {
        let repeated = self.instruction.has_rep_prefix() || self.instruction.has_repne_prefix();
        let (target, source) = (self.instruction.op0_kind(), self.instruction.op1_kind());
        // The address size: it is that of ECX too.
        let mask = match target {
            OpKind::MemoryESEDI => u32::MAX,
            OpKind::MemoryESDI => 0xffff,
            _ => return Err(Stop::Unknown),
        };
        let masked = |value: u32| value & mask;
        let merged = |old: u32, new: u32| old & !mask | new & mask;
        let registers = self.state.registers;
        if repeated && masked(registers[ECX]) == 0 {
            return Ok(Next::Instruction);
        }
        let value = if moves {
            if !matches!(source, OpKind::MemorySegESI | OpKind::MemorySegSI) {
                return Err(Stop::Unknown);
            }
            let base = self.segment_base(self.instruction.memory_segment());
            self.load(Operand::Memory(base.wrapping_add(masked(registers[ESI]))), size)?
        } else {
            registers[EAX].into()
        };
        let base = self.segment_base(Register::ES);
        self.store(Operand::Memory(base.wrapping_add(masked(registers[EDI]))), size, value)?;
        let step = if self.state.eflags & DIRECTION == 0 {
            size as u32
        } else {
            (size as u32).wrapping_neg()
        };
        let registers = &mut self.state.registers;
        registers[EDI] = merged(registers[EDI], registers[EDI].wrapping_add(step));
        if moves {
            registers[ESI] = merged(registers[ESI], registers[ESI].wrapping_add(step));
        }
        if !repeated {
            return Ok(Next::Instruction);
        }
        registers[ECX] = merged(registers[ECX], registers[ECX].wrapping_sub(1));
        Ok(if masked(registers[ECX]) == 0 { Next::Instruction } else { Next::Same })
    }

    fn operand(&self, index: u32) -> Result<Operand, Stop> {
        match self.instruction.op_kind(index) {
            OpKind::Register => Ok(Operand::Register(self.instruction.op_register(index))),
            OpKind::Memory => Ok(Operand::Memory(self.address())),
            OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32 => Ok(Operand::Immediate(self.instruction.immediate(index))),
            _ => Err(Stop::Unknown),
        }
    }

    fn segment_base(&self, segment: Register) -> u32 {
        segment_base(self.state, segment)
    }

    fn address(&self) -> u32 {
        address(self.instruction, self.state)
    }

    /// Reads an operand.
    fn load(&mut self, operand: Operand, size: usize) -> Result<u64, Stop> {
        self.load_for(operand, size, false)
    }

    /// Reads one that is stored to afterwards: the fault, if any, is that of a store.
    fn load_to_change(&mut self, operand: Operand, size: usize) -> Result<u64, Stop> {
        self.load_for(operand, size, true)
    }

    fn load_for(&mut self, operand: Operand, size: usize, write: bool) -> Result<u64, Stop> {
        let value = match operand {
            Operand::Register(register) => get(self.state, register).ok_or(Stop::Unknown)?,
            Operand::Immediate(value) => value,
            Operand::Memory(linear) => {
                let pieces = self.translate(linear, size, write)?;
                let mut value = 0;
                for (physical, offset, length) in pieces.into_iter().filter(|piece| piece.2 != 0) {
                    value |= self.read_bytes(physical, length) << (8 * offset);
                }
                value
            }
        };
        Ok(value & mask(size))
    }

    fn store(&mut self, operand: Operand, size: usize, value: u64) -> Result<(), Stop> {
        match operand {
            Operand::Register(register) => {
                set(self.state, register, value as u32).ok_or(Stop::Unknown)
            }
            Operand::Immediate(_) => Err(Stop::Unknown),
            Operand::Memory(linear) => {
                let pieces = self.translate(linear, size, true)?;
                for (physical, offset, length) in pieces.into_iter().filter(|piece| piece.2 != 0) {
                    let part = value >> (8 * offset);
                    if length.is_power_of_two() {
                        self.bus.write(physical, length, part & mask(length));
                    } else {
                        for byte in 0..length {
                            self.bus.write(physical + byte as u64, 1, part >> (8 * byte) & 0xff);
                        }
                    }
                }
                Ok(())
            }
        }
    }

    /// The parts of an operand in one page or two: physical address, offset, length.
    fn translate(
        &mut self,
        linear: u32,
        size: usize,
        write: bool,
    ) -> Result<[(u64, usize, usize); 2], Stop> {
        let access = Access { write, user: self.state.user, execute: false };
        let first = size.min((PAGE - linear % PAGE) as usize);
        let mut translate = |linear: u32| {
            self.bus.translate(linear, access).map_err(|error| Stop::PageFault { linear, error })
        };
        let start = translate(linear)?;
        let second = if first < size { translate(linear.wrapping_add(first as u32))? } else { 0 };
        Ok([(start, 0, first), (second, first, size - first)])
    }

    fn read_bytes(&mut self, physical: u64, length: usize) -> u64 {
        if length.is_power_of_two() {
            return self.bus.read(physical, length);
        }
        (0..length)
            .fold(0, |value, byte| value | self.bus.read(physical + byte as u64, 1) << (8 * byte))
    }

    fn modify(
        &mut self,
        target: Operand,
        source: Operand,
        size: usize,
        operation: impl Fn(u64, u64) -> (u64, u32),
    ) -> Result<(), Stop> {
        let (a, b) = match target {
            Operand::Memory(_) => (self.load_to_change(target, size)?, self.load(source, size)?),
            // The memory is only read: nothing that is watched.
            Operand::Register(_) | Operand::Immediate(_) => return Err(Stop::Unknown),
        };
        let (value, flags) = operation(a, b);
        self.store(target, size, value)?;
        self.set_flags(flags);
        Ok(())
    }

    fn bit(
        &mut self,
        target: Operand,
        source: Operand,
        size: usize,
        operation: impl Fn(u64, u64) -> u64,
    ) -> Result<(), Stop> {
        let bits = 8 * size as u32;
        let Operand::Memory(linear) = target else { return Err(Stop::Unknown) };
        let index = self.load(source, size)?;
        // A register's index reaches beyond the operand, an immediate's does not.
        let target = match source {
            Operand::Register(_) => {
                let signed = if size == 2 { i32::from(index as i16) } else { index as i32 };
                let units = signed >> bits.trailing_zeros();
                Operand::Memory(linear.wrapping_add((units * size as i32) as u32))
            }
            _ => target,
        };
        let bit = 1 << (index as u32 % bits);
        let old = self.load_to_change(target, size)?;
        self.store(target, size, operation(old, bit))?;
        self.state.eflags = self.state.eflags & !CARRY | u32::from(old & bit != 0);
        Ok(())
    }

    fn set_flags(&mut self, flags: u32) {
        self.state.eflags = self.state.eflags & !ARITHMETIC | flags & ARITHMETIC;
    }
}

/// The linear address of an instruction's memory operand.
#[must_use]
pub fn address(instruction: &Instruction, state: &State) -> u32 {
    let value = |register: Register, _, _| match register {
        Register::ES | Register::CS | Register::SS | Register::DS | Register::FS | Register::GS => {
            Some(segment_base(state, register).into())
        }
        other => get(state, other),
    };
    let operand = (0..instruction.op_count())
        .find(|index| instruction.op_kind(*index) == OpKind::Memory)
        .unwrap_or_default();
    instruction.virtual_address(operand, 0, value).unwrap_or_default() as u32
}

fn segment_base(state: &State, segment: Register) -> u32 {
    state.bases[match segment {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    }]
}

/// A register's value; None for one that is no general-purpose register of 32 bits.
#[must_use]
pub fn get(state: &State, register: Register) -> Option<u64> {
    let (index, shift, size) = part(register)?;
    Some(u64::from(state.registers[index] >> shift) & mask(size))
}

/// Sets a register.
#[must_use]
pub fn set(state: &mut State, register: Register, value: u32) -> Option<()> {
    let (index, shift, size) = part(register)?;
    let mask = (mask(size) as u32) << shift;
    state.registers[index] = state.registers[index] & !mask | value << shift & mask;
    Some(())
}

/// The index of the whole register, the first bit and the bytes.
fn part(register: Register) -> Option<(usize, u32, usize)> {
    let number = register.number();
    match register.size() {
        1 if register.is_gpr8() && number < 4 => Some((number, 0, 1)),
        // AH, CH, DH, BH.
        1 if register.is_gpr8() && number < 8 => Some((number - 4, 8, 1)),
        2 if register.is_gpr16() && number < 8 => Some((number, 0, 2)),
        4 if register.is_gpr32() && number < 8 => Some((number, 0, 4)),
        _ => None,
    }
}

/// The bits of a number of 1 to 8 bytes.
const fn mask(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

/// ZF, SF and PF of a result.
fn of_result(value: u64, size: usize) -> u32 {
    let mut flags = 0;
    if value & mask(size) == 0 {
        flags |= ZERO;
    }
    if value >> (8 * size - 1) & 1 != 0 {
        flags |= SIGN;
    }
    if (value as u8).count_ones().is_multiple_of(2) {
        flags |= PARITY;
    }
    flags
}

fn logical(value: u64, size: usize) -> (u64, u32) {
    (value, of_result(value, size))
}

/// The sum, and all six flags.
fn add(a: u64, b: u64, carry: u64, size: usize) -> (u64, u32) {
    let sum = (a & mask(size)) + (b & mask(size)) + carry;
    let flags = carries(a & b | (a | b) & !sum, (a ^ sum) & (b ^ sum), size);
    (sum & mask(size), flags | of_result(sum, size))
}

/// The difference, and all six flags.
fn subtract(a: u64, b: u64, borrow: u64, size: usize) -> (u64, u32) {
    let difference = a.wrapping_sub(b).wrapping_sub(borrow);
    let flags = carries(!a & b | (!a | b) & difference, (a ^ b) & (a ^ difference), size);
    (difference & mask(size), flags | of_result(difference & mask(size), size))
}

/// CF, AF and OF: of the carries out of each bit, and of where the signs tell an overflow.
fn carries(carries: u64, overflows: u64, size: usize) -> u32 {
    let top = 8 * size - 1;
    let mut flags = 0;
    if carries >> top & 1 != 0 {
        flags |= CARRY;
    }
    if carries >> 3 & 1 != 0 {
        flags |= AUXILIARY;
    }
    if overflows >> top & 1 != 0 {
        flags |= OVERFLOW;
    }
    flags
}
