//! String instructions, with and without repetition. Each iteration counts as an instruction.

use super::flags::{self, ARITHMETIC, DIRECTION, ZERO};
use super::{Machine, Stop};
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

impl Machine<'_> {
    pub(super) fn execute_string(&mut self, i: &Instruction) -> Result<(), Stop> {
        let narrow = (0..i.op_count()).any(|operand| {
            matches!(
                i.op_kind(operand),
                OpKind::MemorySegSI | OpKind::MemoryESDI | OpKind::MemorySegDI
            )
        });
        if narrow {
            return Err(Stop::Undecided);
        }
        if !(i.has_rep_prefix() || i.has_repne_prefix()) {
            return self.iterate(i).map(|_| ());
        }
        let left = self.registers.get(Register::ECX);
        if left == 0 {
            return Ok(());
        }
        let equal = self.iterate(i)?;
        self.registers.set(Register::ECX, left - 1);
        let compares =
            matches!(i.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Scasb | M::Scasw | M::Scasd);
        let goes_on = left > 1 && (!compares || equal == i.has_rep_prefix());
        if goes_on {
            // Once more: the run's budget counts each iteration.
            self.registers.eip = self.registers.eip.wrapping_sub(i.len() as u32);
        }
        Ok(())
    }

    /// One iteration; whether ZF is set behind it.
    fn iterate(&mut self, i: &Instruction) -> Result<bool, Stop> {
        match i.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd => {
                let size = width(i.mnemonic());
                let value = self.source(i, size);
                self.destination(size, value)?;
            }
            M::Stosb | M::Stosw | M::Stosd => {
                let size = width(i.mnemonic());
                let value = u64::from(self.registers.get(Register::EAX) & flags::mask(size));
                self.destination(size, value)?;
            }
            M::Lodsb | M::Lodsw | M::Lodsd => {
                let size = width(i.mnemonic());
                let value = self.source(i, size) as u32;
                self.registers.set(accumulator(size), value);
            }
            M::Insb | M::Insw | M::Insd => {
                let size = width(i.mnemonic());
                let value = u64::from(self.system.random.word() & flags::mask(size));
                self.destination(size, value)?;
            }
            M::Outsb | M::Outsw | M::Outsd => {
                self.source(i, width(i.mnemonic()));
            }
            M::Cmpsb | M::Cmpsw | M::Cmpsd => {
                let size = width(i.mnemonic());
                let a = self.source(i, size) as u32;
                let b = self.compared(size);
                self.set_flags(ARITHMETIC, flags::subtract(a, b, false, size).1);
            }
            M::Scasb | M::Scasw | M::Scasd => {
                let size = width(i.mnemonic());
                let a = self.registers.get(accumulator(size));
                let b = self.compared(size);
                self.set_flags(ARITHMETIC, flags::subtract(a, b, false, size).1);
            }
            _ => return Err(Stop::Undecided),
        }
        Ok(self.flag(ZERO))
    }

    fn advance(&mut self, register: Register, size: usize) -> u32 {
        let address = self.registers.get(register);
        let step = if self.flag(DIRECTION) { (size as u32).wrapping_neg() } else { size as u32 };
        self.registers.set(register, address.wrapping_add(step));
        address
    }

    fn source(&mut self, i: &Instruction, size: usize) -> u64 {
        let address = self.advance(Register::ESI, size);
        self.load(i.memory_segment(), address, size)
    }

    fn compared(&mut self, size: usize) -> u32 {
        let address = self.advance(Register::EDI, size);
        self.load(Register::ES, address, size) as u32
    }

    fn destination(&mut self, size: usize, value: u64) -> Result<(), Stop> {
        let address = self.advance(Register::EDI, size);
        self.store(Register::ES, address, size, value)
    }
}

fn accumulator(size: usize) -> Register {
    match size {
        1 => Register::AL,
        2 => Register::AX,
        _ => Register::EAX,
    }
}

fn width(mnemonic: M) -> usize {
    match mnemonic {
        M::Movsb | M::Stosb | M::Lodsb | M::Insb | M::Outsb | M::Cmpsb | M::Scasb => 1,
        M::Movsw | M::Stosw | M::Lodsw | M::Insw | M::Outsw | M::Cmpsw | M::Scasw => 2,
        _ => 4,
    }
}
