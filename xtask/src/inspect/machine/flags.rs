//! EFLAGS, and the arithmetic that sets it.

/// CF.
pub const CARRY: u32 = 1 << 0;
/// PF.
pub const PARITY: u32 = 1 << 2;
/// AF.
pub const ADJUST: u32 = 1 << 4;
/// ZF.
pub const ZERO: u32 = 1 << 6;
/// SF.
pub const SIGN: u32 = 1 << 7;
/// TF.
pub const TRAP: u32 = 1 << 8;
/// IF.
pub const INTERRUPT: u32 = 1 << 9;
/// DF.
pub const DIRECTION: u32 = 1 << 10;
/// OF.
pub const OVERFLOW: u32 = 1 << 11;
/// IOPL.
pub const IOPL: u32 = 3 << 12;
/// NT.
pub const NESTED: u32 = 1 << 14;
/// RF.
pub const RESUME: u32 = 1 << 16;
/// VM.
pub const VIRTUAL_8086: u32 = 1 << 17;
/// AC.
pub const ALIGNMENT: u32 = 1 << 18;
/// VIF.
pub const VIRTUAL_INTERRUPT: u32 = 1 << 19;
/// VIP.
pub const VIRTUAL_PENDING: u32 = 1 << 20;
/// ID.
pub const IDENTIFICATION: u32 = 1 << 21;
/// The bit that is always set.
pub const FIXED: u32 = 1 << 1;

/// What arithmetic changes.
pub const ARITHMETIC: u32 = CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW;

/// Every flag that can be loaded, besides [`FIXED`].
pub const LOADABLE: u32 =
    ARITHMETIC | TRAP | INTERRUPT | DIRECTION | IOPL | NESTED | ALIGNMENT | IDENTIFICATION;

/// A value and the arithmetic flags that go with it.
pub(super) type Result = (u32, u32);

/// The bits of an operand.
pub(super) const fn mask(size: usize) -> u32 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        _ => u32::MAX,
    }
}

/// An operand's highest bit.
pub(super) const fn sign_bit(size: usize) -> u32 {
    mask(size) ^ (mask(size) >> 1)
}

/// An operand widened with its sign.
pub(super) const fn sign_extend(value: u32, size: usize) -> i32 {
    match size {
        1 => value as u8 as i8 as i32,
        2 => value as u16 as i16 as i32,
        _ => value as i32,
    }
}

const fn when(condition: bool, flag: u32) -> u32 {
    if condition { flag } else { 0 }
}

/// ZF, SF and PF of a result; CF, OF and AF clear.
pub(super) const fn of_result(value: u32, size: usize) -> u32 {
    when(value & mask(size) == 0, ZERO)
        | when(value & sign_bit(size) != 0, SIGN)
        | when((value & 0xff).count_ones().is_multiple_of(2), PARITY)
}

/// ADD and ADC.
pub(super) const fn add(a: u32, b: u32, carry: bool, size: usize) -> Result {
    let wide = a as u64 + b as u64 + carry as u64;
    let value = wide as u32 & mask(size);
    let flags = of_result(value, size)
        | when(wide > mask(size) as u64, CARRY)
        | when((a ^ value) & (b ^ value) & sign_bit(size) != 0, OVERFLOW)
        | ((a ^ b ^ value) & ADJUST);
    (value, flags)
}

/// SUB, SBB and CMP.
pub(super) const fn subtract(a: u32, b: u32, borrow: bool, size: usize) -> Result {
    let value = a.wrapping_sub(b).wrapping_sub(borrow as u32) & mask(size);
    let flags = of_result(value, size)
        | when(b as u64 + borrow as u64 > a as u64, CARRY)
        | when((a ^ b) & (a ^ value) & sign_bit(size) != 0, OVERFLOW)
        | ((a ^ b ^ value) & ADJUST);
    (value, flags)
}

/// SHL by 1 to 31.
pub(super) const fn shift_left(a: u32, count: u32, size: usize) -> Result {
    let wide = (a as u64) << count;
    let value = wide as u32 & mask(size);
    let carry = (wide >> (size * 8)) & 1 != 0;
    let overflow = carry != (value & sign_bit(size) != 0);
    (value, of_result(value, size) | when(carry, CARRY) | when(overflow, OVERFLOW))
}

/// SHR by 1 to 31.
pub(super) const fn shift_right(a: u32, count: u32, size: usize) -> Result {
    let value = a >> count;
    let carry = (a >> (count - 1)) & 1 != 0;
    let overflow = a & sign_bit(size) != 0;
    (value, of_result(value, size) | when(carry, CARRY) | when(overflow, OVERFLOW))
}

/// SAR by 1 to 31.
pub(super) const fn shift_arithmetic(a: u32, count: u32, size: usize) -> Result {
    let signed = sign_extend(a, size);
    let value = (signed >> count) as u32 & mask(size);
    let carry = (signed >> (count - 1)) & 1 != 0;
    (value, of_result(value, size) | when(carry, CARRY))
}

/// ROL by 1 to 31; only CF and OF of the flags mean anything.
pub(super) const fn rotate_left(a: u32, count: u32, size: usize) -> Result {
    let bits = size as u32 * 8;
    let count = count % bits;
    let value = if count == 0 { a } else { ((a << count) | (a >> (bits - count))) & mask(size) };
    let carry = value & 1 != 0;
    (value, when(carry, CARRY) | when(carry != (value & sign_bit(size) != 0), OVERFLOW))
}

/// ROR by 1 to 31; only CF and OF of the flags mean anything.
pub(super) const fn rotate_right(a: u32, count: u32, size: usize) -> Result {
    let bits = size as u32 * 8;
    let (value, _) = rotate_left(a, bits - count % bits, size);
    let top = value & sign_bit(size) != 0;
    let next = value & (sign_bit(size) >> 1) != 0;
    (value, when(top, CARRY) | when(top != next, OVERFLOW))
}

/// RCL by 1 to 31; only CF and OF of the flags mean anything.
pub(super) const fn rotate_carry_left(a: u32, count: u32, carry: bool, size: usize) -> Result {
    let (mut value, mut carry, mut left) = (a, carry, count);
    while left > 0 {
        let out = value & sign_bit(size) != 0;
        value = ((value << 1) | carry as u32) & mask(size);
        carry = out;
        left -= 1;
    }
    (value, when(carry, CARRY) | when(carry != (value & sign_bit(size) != 0), OVERFLOW))
}

/// RCR by 1 to 31; only CF and OF of the flags mean anything.
pub(super) const fn rotate_carry_right(a: u32, count: u32, carry: bool, size: usize) -> Result {
    let (mut value, mut carry, mut left) = (a, carry, count);
    while left > 0 {
        let out = value & 1 != 0;
        value = (value >> 1) | when(carry, sign_bit(size));
        carry = out;
        left -= 1;
    }
    let top = value & sign_bit(size) != 0;
    let next = value & (sign_bit(size) >> 1) != 0;
    (value, when(carry, CARRY) | when(top != next, OVERFLOW))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_differences() {
        assert_eq!(add(0xff, 1, false, 1), (0, ZERO | PARITY | CARRY | ADJUST));
        assert_eq!(add(0x7fff_ffff, 1, false, 4), (0x8000_0000, SIGN | PARITY | OVERFLOW | ADJUST));
        assert_eq!(subtract(0, 1, false, 2), (0xffff, SIGN | PARITY | CARRY | ADJUST));
        assert_eq!(subtract(5, 4, true, 4), (0, ZERO | PARITY));
    }

    #[test]
    fn shifts_and_rotations() {
        assert_eq!(shift_left(0x81, 1, 1), (2, CARRY | OVERFLOW));
        assert_eq!(shift_right(3, 1, 4), (1, CARRY));
        assert_eq!(shift_arithmetic(0xf0, 4, 1), (0xff, SIGN | PARITY));
        assert_eq!(rotate_left(0x8000_0001, 1, 4), (3, CARRY | OVERFLOW));
        assert_eq!(rotate_right(1, 1, 2), (0x8000, CARRY | OVERFLOW));
        assert_eq!(rotate_right(1, 8, 1).0, 1);
        assert_eq!(rotate_carry_left(0x80, 1, false, 1), (0, CARRY | OVERFLOW));
        assert_eq!(rotate_carry_right(1, 1, true, 4), (0x8000_0000, CARRY | OVERFLOW));
    }
}
