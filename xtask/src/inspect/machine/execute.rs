//! The instructions of ordinary programs.

use super::flags::{self, ADJUST, ARITHMETIC, CARRY, DIRECTION, OVERFLOW, PARITY, SIGN, ZERO};
use super::{Machine, Stop};
use iced_x86::{Code, ConditionCode, Instruction, Mnemonic as M, OpKind, Register};

impl Machine<'_> {
    /// Executes one instruction; the instruction pointer already stands behind it.
    pub(super) fn execute(&mut self, i: &Instruction) -> Result<(), Stop> {
        if i.is_string_instruction() {
            return self.execute_string(i);
        }
        if i.is_jcc_short_or_near() {
            if self.condition(i.condition_code()) {
                self.branch(i)?;
            }
            return Ok(());
        }
        match i.mnemonic() {
            M::Nop | M::Pause | M::Lfence | M::Mfence | M::Sfence | M::Endbr32 => {}
            M::Mov if self.is_system_move(i) => self.execute_system_move(i)?,
            M::Mov => {
                let value = self.operand(i, 1)?;
                self.set_operand(i, 0, value)?;
                if i.op0_register() == Register::SS {
                    self.shadow = true;
                }
            }
            M::Movzx => {
                let value = self.operand(i, 1)?;
                self.set_operand(i, 0, value)?;
            }
            M::Movsx => {
                let size = size(i, 1);
                let value = self.operand(i, 1)?;
                self.set_operand(i, 0, flags::sign_extend(value, size) as u32)?;
            }
            M::Lea => {
                let address = self.address(i);
                self.set_operand(i, 0, address)?;
            }
            M::Add | M::Adc | M::Sub | M::Sbb | M::Cmp | M::And | M::Or | M::Xor | M::Test => {
                self.binary(i)?;
            }
            M::Inc | M::Dec | M::Not | M::Neg | M::Bswap => self.unary(i)?,
            M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr => {
                self.shift(i)?
            }
            M::Shld | M::Shrd => self.double_shift(i)?,
            M::Mul | M::Imul | M::Div | M::Idiv => self.multiply_or_divide(i)?,
            M::Bt | M::Bts | M::Btr | M::Btc => self.bit_test(i)?,
            M::Bsf | M::Bsr => self.bit_scan(i)?,
            M::Xchg | M::Xadd | M::Cmpxchg | M::Cmpxchg8b => self.exchange(i)?,
            M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets => {
                let value = u32::from(self.condition(i.condition_code()));
                self.set_operand(i, 0, value)?;
            }
            M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs => {
                let value = self.operand(i, 1)?;
                if self.condition(i.condition_code()) {
                    self.set_operand(i, 0, value)?;
                }
            }
            M::Cdq => {
                let sign = (self.registers.get(Register::EAX) as i32 >> 31) as u32;
                self.registers.set(Register::EDX, sign);
            }
            M::Cwd => {
                let sign = flags::sign_extend(self.registers.get(Register::AX), 2) >> 31;
                self.registers.set(Register::DX, sign as u32);
            }
            M::Cwde => {
                let value = flags::sign_extend(self.registers.get(Register::AX), 2);
                self.registers.set(Register::EAX, value as u32);
            }
            M::Cbw => {
                let value = flags::sign_extend(self.registers.get(Register::AL), 1);
                self.registers.set(Register::AX, value as u32);
            }
            M::Lahf => {
                let low = self.registers.eflags & 0xd5 | flags::FIXED;
                self.registers.set(Register::AH, low);
            }
            M::Sahf => {
                let mask = CARRY | PARITY | ADJUST | ZERO | SIGN;
                let value = self.registers.get(Register::AH);
                self.set_flags(mask, value);
            }
            M::Clc => self.set_flags(CARRY, 0),
            M::Stc => self.set_flags(CARRY, CARRY),
            M::Cmc => self.set_flags(CARRY, !self.registers.eflags),
            M::Cld => self.set_flags(DIRECTION, 0),
            M::Std => self.set_flags(DIRECTION, DIRECTION),
            M::Salc => {
                let value = if self.flag(CARRY) { 0xff } else { 0 };
                self.registers.set(Register::AL, value);
            }
            M::Xlatb => {
                let address = self
                    .registers
                    .get(Register::EBX)
                    .wrapping_add(self.registers.get(Register::AL));
                let value = self.load(i.memory_segment(), address, 1) as u32;
                self.registers.set(Register::AL, value);
            }
            _ => return self.execute_flow(i),
        }
        Ok(())
    }

    /// The stack and the instruction pointer.
    fn execute_flow(&mut self, i: &Instruction) -> Result<(), Stop> {
        match i.mnemonic() {
            M::Jmp => self.branch(i)?,
            M::Jecxz => {
                if self.registers.get(Register::ECX) == 0 {
                    self.branch(i)?;
                }
            }
            M::Jcxz => {
                if self.registers.get(Register::CX) == 0 {
                    self.branch(i)?;
                }
            }
            M::Loop | M::Loope | M::Loopne => {
                let counter = match i.code() {
                    Code::Loop_rel8_32_CX | Code::Loope_rel8_32_CX | Code::Loopne_rel8_32_CX => {
                        Register::CX
                    }
                    _ => Register::ECX,
                };
                let left =
                    self.registers.get(counter).wrapping_sub(1) & flags::mask(counter.size());
                self.registers.set(counter, left);
                let goes_on = match i.mnemonic() {
                    M::Loope => self.flag(ZERO),
                    M::Loopne => !self.flag(ZERO),
                    _ => true,
                };
                if left != 0 && goes_on {
                    self.branch(i)?;
                }
            }
            M::Call => {
                let behind = self.registers.eip;
                let target = self.branch_target(i)?;
                self.push(behind, 4);
                self.registers.eip = target;
            }
            M::Ret if i.stack_pointer_increment() >= 4 => {
                self.registers.eip = self.pop(4);
                self.drop_arguments(i);
            }
            M::Push => {
                let size = i.stack_pointer_increment().unsigned_abs() as usize;
                let value = self.operand(i, 0)?;
                self.push(value, size);
            }
            M::Pop => {
                let value = self.pop(i.stack_pointer_increment().unsigned_abs() as usize);
                self.set_operand(i, 0, value)?;
                if i.op0_register() == Register::SS {
                    self.shadow = true;
                }
            }
            M::Pushad => {
                // ESP is pushed as it was before: all eight are read first.
                for value in self.registers.general() {
                    self.push(value, 4);
                }
            }
            M::Popad => {
                for register in [
                    Register::EDI,
                    Register::ESI,
                    Register::EBP,
                    Register::None,
                    Register::EBX,
                    Register::EDX,
                    Register::ECX,
                    Register::EAX,
                ] {
                    let value = self.pop(4);
                    self.registers.set(register, value);
                }
            }
            M::Leave if i.stack_pointer_increment() >= 0 => {
                let frame = self.registers.get(Register::EBP);
                self.registers.set(Register::ESP, frame);
                let value = self.pop(4);
                self.registers.set(Register::EBP, value);
            }
            M::Enter if i.immediate8_2nd() == 0 => {
                let frame = self.registers.get(Register::EBP);
                self.push(frame, 4);
                let esp = self.registers.get(Register::ESP);
                self.registers.set(Register::EBP, esp);
                self.registers.set(Register::ESP, esp.wrapping_sub(u32::from(i.immediate16())));
            }
            _ => return self.execute_system(i),
        }
        Ok(())
    }

    fn drop_arguments(&mut self, i: &Instruction) {
        if i.op_count() == 1 {
            let esp = self.registers.get(Register::ESP);
            self.registers.set(Register::ESP, esp.wrapping_add(u32::from(i.immediate16())));
        }
    }

    fn branch(&mut self, i: &Instruction) -> Result<(), Stop> {
        self.registers.eip = self.branch_target(i)?;
        Ok(())
    }

    fn branch_target(&mut self, i: &Instruction) -> Result<u32, Stop> {
        match i.op0_kind() {
            OpKind::NearBranch32 => Ok(self.memory.image_base().wrapping_add(i.near_branch32())),
            OpKind::Register | OpKind::Memory if size(i, 0) == 4 => self.operand(i, 0),
            _ => Err(Stop::Undecided),
        }
    }

    /// An operand's value, zero-extended.
    pub(super) fn operand(&mut self, i: &Instruction, operand: u32) -> Result<u32, Stop> {
        let size = size(i, operand);
        match i.op_kind(operand) {
            OpKind::Register => {
                let register = i.op_register(operand);
                if register.is_gpr() || register.is_segment_register() {
                    Ok(self.registers.get(register))
                } else {
                    Err(Stop::Undecided)
                }
            }
            OpKind::Memory if matches!(size, 1 | 2 | 4) => {
                let address = self.address(i);
                Ok(self.load(i.memory_segment(), address, size) as u32)
            }
            OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32 => Ok(i.immediate(operand) as u32 & flags::mask(size)),
            _ => Err(Stop::Undecided),
        }
    }

    /// Changes an operand.
    pub(super) fn set_operand(
        &mut self,
        i: &Instruction,
        operand: u32,
        value: u32,
    ) -> Result<(), Stop> {
        let size = size(i, operand);
        match i.op_kind(operand) {
            OpKind::Register => {
                let register = i.op_register(operand);
                if register == Register::CS
                    || !(register.is_gpr() || register.is_segment_register())
                {
                    return Err(Stop::Undecided);
                }
                self.registers.set(register, value);
                Ok(())
            }
            OpKind::Memory if matches!(size, 1 | 2 | 4) => {
                let address = self.address(i);
                self.store(i.memory_segment(), address, size, u64::from(value & flags::mask(size)))
            }
            _ => Err(Stop::Undecided),
        }
    }

    /// The linear address of a memory operand; every segment has base 0.
    pub(super) fn address(&self, i: &Instruction) -> u32 {
        let base = self.registers.get(i.memory_base());
        let index = self.registers.get(i.memory_index()).wrapping_mul(i.memory_index_scale());
        let address = base.wrapping_add(index).wrapping_add(i.memory_displacement32());
        let narrow = i.memory_base().is_gpr16()
            || i.memory_index().is_gpr16()
            || (i.memory_base() == Register::None
                && i.memory_index() == Register::None
                && i.memory_displ_size() == 2);
        if narrow { address & 0xffff } else { address }
    }

    pub(super) fn flag(&self, flag: u32) -> bool {
        self.registers.eflags & flag != 0
    }

    /// Changes the flags of `mask` to those of `value`.
    pub(super) fn set_flags(&mut self, mask: u32, value: u32) {
        self.registers.eflags = (self.registers.eflags & !mask) | (value & mask);
    }

    fn condition(&self, code: ConditionCode) -> bool {
        use ConditionCode as C;
        let less = self.flag(SIGN) != self.flag(OVERFLOW);
        match code {
            C::o => self.flag(OVERFLOW),
            C::no => !self.flag(OVERFLOW),
            C::b => self.flag(CARRY),
            C::ae => !self.flag(CARRY),
            C::e => self.flag(ZERO),
            C::ne => !self.flag(ZERO),
            C::be => self.flag(CARRY | ZERO),
            C::a => !self.flag(CARRY | ZERO),
            C::s => self.flag(SIGN),
            C::ns => !self.flag(SIGN),
            C::p => self.flag(PARITY),
            C::np => !self.flag(PARITY),
            C::l => less,
            C::ge => !less,
            C::le => less || self.flag(ZERO),
            C::g => !less && !self.flag(ZERO),
            C::None => true,
        }
    }

    fn binary(&mut self, i: &Instruction) -> Result<(), Stop> {
        let size = size(i, 0);
        let a = self.operand(i, 0)?;
        let b = self.operand(i, 1)?;
        let carry = self.flag(CARRY);
        let logic = |value: u32| (value, flags::of_result(value, size));
        let (value, flags) = match i.mnemonic() {
            M::Add => flags::add(a, b, false, size),
            M::Adc => flags::add(a, b, carry, size),
            M::Sub | M::Cmp => flags::subtract(a, b, false, size),
            M::Sbb => flags::subtract(a, b, carry, size),
            M::And | M::Test => logic(a & b),
            M::Or => logic(a | b),
            _ => logic(a ^ b),
        };
        self.set_flags(ARITHMETIC, flags);
        if matches!(i.mnemonic(), M::Cmp | M::Test) {
            Ok(())
        } else {
            self.set_operand(i, 0, value)
        }
    }

    fn unary(&mut self, i: &Instruction) -> Result<(), Stop> {
        let size = size(i, 0);
        let a = self.operand(i, 0)?;
        let (value, (mask, flags)) = match i.mnemonic() {
            M::Inc => {
                let (value, flags) = flags::add(a, 1, false, size);
                (value, (ARITHMETIC & !CARRY, flags))
            }
            M::Dec => {
                let (value, flags) = flags::subtract(a, 1, false, size);
                (value, (ARITHMETIC & !CARRY, flags))
            }
            M::Neg => {
                let (value, flags) = flags::subtract(0, a, false, size);
                (value, (ARITHMETIC, flags))
            }
            M::Not => (!a, (0, 0)),
            _ if size == 4 => (a.swap_bytes(), (0, 0)),
            _ => return Err(Stop::Undecided),
        };
        self.set_flags(mask, flags);
        self.set_operand(i, 0, value)
    }

    fn shift(&mut self, i: &Instruction) -> Result<(), Stop> {
        let size = size(i, 0);
        let a = self.operand(i, 0)?;
        let count = self.operand(i, 1)? & 31;
        if count == 0 {
            return Ok(());
        }
        let rotation = CARRY | OVERFLOW;
        let carry = self.flag(CARRY);
        let ((value, flags), mask) = match i.mnemonic() {
            M::Shl | M::Sal => (flags::shift_left(a, count, size), ARITHMETIC),
            M::Shr => (flags::shift_right(a, count, size), ARITHMETIC),
            M::Sar => (flags::shift_arithmetic(a, count, size), ARITHMETIC),
            M::Rol => (flags::rotate_left(a, count, size), rotation),
            M::Ror => (flags::rotate_right(a, count, size), rotation),
            M::Rcl => (flags::rotate_carry_left(a, count, carry, size), rotation),
            _ => (flags::rotate_carry_right(a, count, carry, size), rotation),
        };
        self.set_flags(mask, flags);
        self.set_operand(i, 0, value)
    }

    fn double_shift(&mut self, i: &Instruction) -> Result<(), Stop> {
        // The 16-bit forms are undefined for counts above 16.
        if size(i, 0) != 4 {
            return Err(Stop::Undecided);
        }
        let a = self.operand(i, 0)?;
        let b = self.operand(i, 1)?;
        let count = self.operand(i, 2)? & 31;
        if count == 0 {
            return Ok(());
        }
        let (value, carry) = if i.mnemonic() == M::Shld {
            ((a << count) | (b >> (32 - count)), (a >> (32 - count)) & 1)
        } else {
            ((a >> count) | (b << (32 - count)), (a >> (count - 1)) & 1)
        };
        let overflow = if (a ^ value) >> 31 != 0 { OVERFLOW } else { 0 };
        self.set_flags(ARITHMETIC, flags::of_result(value, 4) | carry | overflow);
        self.set_operand(i, 0, value)
    }

    fn multiply_or_divide(&mut self, i: &Instruction) -> Result<(), Stop> {
        let size = size(i, 0);
        let signed = matches!(i.mnemonic(), M::Imul | M::Idiv);
        if i.op_count() > 1 {
            let (a, b) = if i.op_count() == 2 { (0, 1) } else { (1, 2) };
            let a = i64::from(flags::sign_extend(self.operand(i, a)?, size));
            let b = i64::from(flags::sign_extend(self.operand(i, b)?, size));
            let value = (a * b) as u32;
            let fits = i64::from(flags::sign_extend(value, size)) == a * b;
            self.set_product_flags(value, size, !fits);
            return self.set_operand(i, 0, value);
        }
        let b = self.operand(i, 0)?;
        if matches!(i.mnemonic(), M::Mul | M::Imul) {
            let (low, _) = halves(size);
            let a = self.registers.get(if size == 1 { Register::AL } else { low });
            let (wide, fits) = if signed {
                let wide =
                    i64::from(flags::sign_extend(a, size)) * i64::from(flags::sign_extend(b, size));
                (wide as u64, i64::from(flags::sign_extend(wide as u32, size)) == wide)
            } else {
                let wide = u64::from(a) * u64::from(b);
                (wide, wide <= u64::from(flags::mask(size)))
            };
            self.set_halves(size, wide as u32, (wide >> (8 * size)) as u32);
            self.set_product_flags(wide as u32, size, !fits);
            return Ok(());
        }
        self.divide(b, size, signed)
    }

    fn set_product_flags(&mut self, value: u32, size: usize, overflow: bool) {
        let both = if overflow { CARRY | OVERFLOW } else { 0 };
        self.set_flags(ARITHMETIC, flags::of_result(value, size) | both);
    }

    fn divide(&mut self, divisor: u32, size: usize, signed: bool) -> Result<(), Stop> {
        let (low, high) = halves(size);
        let (low, high) = (self.registers.get(low), self.registers.get(high));
        let dividend = match size {
            1 => u64::from(low & 0xffff),
            2 => u64::from(low & 0xffff) | (u64::from(high & 0xffff) << 16),
            _ => u64::from(low) | (u64::from(high) << 32),
        };
        let fault = Stop::Interrupt(0);
        let (quotient, remainder) = if signed {
            let unused = 64 - 16 * size as u32;
            let dividend = ((dividend << unused) as i64) >> unused;
            let divisor = i64::from(flags::sign_extend(divisor, size));
            let quotient = dividend.checked_div(divisor).ok_or(fault)?;
            let remainder = dividend.checked_rem(divisor).ok_or(fault)?;
            if i64::from(flags::sign_extend(quotient as u32, size)) != quotient {
                return Err(fault);
            }
            (quotient as u32, remainder as u32)
        } else {
            let divisor = u64::from(divisor);
            let quotient = dividend.checked_div(divisor).ok_or(fault)?;
            if quotient > u64::from(flags::mask(size)) {
                return Err(fault);
            }
            (quotient as u32, (dividend % divisor) as u32)
        };
        self.set_halves(size, quotient, remainder);
        Ok(())
    }

    fn set_halves(&mut self, size: usize, low: u32, high: u32) {
        if size == 1 {
            self.registers.set(Register::AL, low);
            self.registers.set(Register::AH, high);
        } else {
            let (low_register, high_register) = halves(size);
            self.registers.set(low_register, low);
            self.registers.set(high_register, high);
        }
    }

    fn bit_test(&mut self, i: &Instruction) -> Result<(), Stop> {
        let size = size(i, 0);
        let bits = size as u32 * 8;
        let index = self.operand(i, 1)?;
        let in_memory = i.op0_kind() == OpKind::Memory;
        // A register may index beyond the operand, an immediate may not.
        let word = if in_memory && i.op1_kind() == OpKind::Register {
            let signed = flags::sign_extend(index, size);
            (signed.div_euclid(bits as i32) * size as i32) as u32
        } else {
            0
        };
        let address = if in_memory { self.address(i).wrapping_add(word) } else { 0 };
        let old = if in_memory {
            self.load(i.memory_segment(), address, size) as u32
        } else {
            self.operand(i, 0)?
        };
        let bit = 1 << (index % bits);
        self.set_flags(CARRY, if old & bit != 0 { CARRY } else { 0 });
        let new = match i.mnemonic() {
            M::Bts => old | bit,
            M::Btr => old & !bit,
            M::Btc => old ^ bit,
            _ => return Ok(()),
        };
        if in_memory {
            self.store(i.memory_segment(), address, size, u64::from(new))
        } else {
            self.set_operand(i, 0, new)
        }
    }

    fn bit_scan(&mut self, i: &Instruction) -> Result<(), Stop> {
        let value = self.operand(i, 1)?;
        self.set_flags(ZERO, if value == 0 { ZERO } else { 0 });
        if value == 0 {
            return Ok(());
        }
        let place = if i.mnemonic() == M::Bsf {
            value.trailing_zeros()
        } else {
            31 - value.leading_zeros()
        };
        self.set_operand(i, 0, place)
    }

    fn exchange(&mut self, i: &Instruction) -> Result<(), Stop> {
        if i.mnemonic() == M::Cmpxchg8b {
            return self.compare_exchange_64(i);
        }
        let size = size(i, 0);
        let a = self.operand(i, 0)?;
        let b = self.operand(i, 1)?;
        match i.mnemonic() {
            M::Xchg => {
                // The address of a memory operand may depend on the register operand.
                if i.op0_kind() == OpKind::Memory {
                    self.set_operand(i, 0, b)?;
                    self.set_operand(i, 1, a)
                } else {
                    self.set_operand(i, 1, a)?;
                    self.set_operand(i, 0, b)
                }
            }
            M::Xadd => {
                let (sum, flags) = flags::add(a, b, false, size);
                self.set_flags(ARITHMETIC, flags);
                if i.op0_kind() == OpKind::Memory {
                    self.set_operand(i, 0, sum)?;
                    self.set_operand(i, 1, a)
                } else {
                    self.set_operand(i, 1, a)?;
                    self.set_operand(i, 0, sum)
                }
            }
            _ => {
                let accumulator = match size {
                    1 => Register::AL,
                    2 => Register::AX,
                    _ => Register::EAX,
                };
                let (_, flags) = flags::subtract(self.registers.get(accumulator), a, false, size);
                self.set_flags(ARITHMETIC, flags);
                if flags & ZERO != 0 {
                    self.set_operand(i, 0, b)
                } else {
                    self.registers.set(accumulator, a);
                    Ok(())
                }
            }
        }
    }

    fn compare_exchange_64(&mut self, i: &Instruction) -> Result<(), Stop> {
        let pair = |high: u32, low: u32| (u64::from(high) << 32) | u64::from(low);
        let address = self.address(i);
        let old = self.load(i.memory_segment(), address, 8);
        let [eax, ecx, edx, ebx, ..] = self.registers.general();
        if old == pair(edx, eax) {
            self.set_flags(ZERO, ZERO);
            self.store(i.memory_segment(), address, 8, pair(ecx, ebx))
        } else {
            self.set_flags(ZERO, 0);
            self.registers.set(Register::EAX, old as u32);
            self.registers.set(Register::EDX, (old >> 32) as u32);
            Ok(())
        }
    }
}

/// The registers that hold a double-width number's halves.
fn halves(size: usize) -> (Register, Register) {
    if size == 4 { (Register::EAX, Register::EDX) } else { (Register::AX, Register::DX) }
}

/// Bytes of an operand.
pub(super) fn size(i: &Instruction, operand: u32) -> usize {
    match i.op_kind(operand) {
        OpKind::Register => i.op_register(operand).size(),
        OpKind::Memory => i.memory_size().size(),
        OpKind::Immediate8 if i.mnemonic() != M::Push && operand > 0 => size(i, 0),
        OpKind::Immediate16 => 2,
        OpKind::Immediate8to16 => 2,
        OpKind::Immediate8 => 1,
        _ => 4,
    }
}
