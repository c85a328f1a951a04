//! The registers that a program sees.

use iced_x86::Register;

/// Places of the general registers, in the processor's own order.
pub const GENERAL: [(&str, vmi_abi::Registers); 8] = [
    ("EAX", vmi_abi::Registers::EAX),
    ("ECX", vmi_abi::Registers::ECX),
    ("EDX", vmi_abi::Registers::EDX),
    ("EBX", vmi_abi::Registers::EBX),
    ("ESP", vmi_abi::Registers::ESP),
    ("EBP", vmi_abi::Registers::EBP),
    ("ESI", vmi_abi::Registers::ESI),
    ("EDI", vmi_abi::Registers::EDI),
];

/// The general registers that hold any value on entry: all but ESP.
pub const FREE: [Register; 7] = [
    Register::EAX,
    Register::ECX,
    Register::EDX,
    Register::EBX,
    Register::EBP,
    Register::ESI,
    Register::EDI,
];

/// The segment registers, in the processor's own order.
pub const SEGMENTS: [Register; 6] =
    [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS];

/// General registers, instruction pointer, flags and selectors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    general: [u32; 8],
    selectors: [u16; 6],
    /// The next instruction's linear address.
    pub eip: u32,
    /// EFLAGS.
    pub eflags: u32,
}

impl Registers {
    /// A general or segment register, or a part of one; 0 for a register of another kind.
    #[must_use]
    pub fn get(&self, register: Register) -> u32 {
        let number = register.number();
        let full = |number: usize| self.general.get(number).copied().unwrap_or(0);
        if register.is_gpr32() {
            full(number)
        } else if register.is_gpr16() {
            full(number) & 0xffff
        } else if register.is_gpr8() {
            if number < 4 { full(number) & 0xff } else { (full(number & 3) >> 8) & 0xff }
        } else if register.is_segment_register() {
            self.selectors.get(number).copied().map_or(0, u32::from)
        } else {
            0
        }
    }

    /// Changes a general or segment register, or a part of one; nothing for another kind.
    pub fn set(&mut self, register: Register, value: u32) {
        let number = register.number();
        let (place, shift, mask) = if register.is_gpr32() {
            (number, 0, u32::MAX)
        } else if register.is_gpr16() {
            (number, 0, 0xffff)
        } else if register.is_gpr8() {
            (number & 3, if number < 4 { 0 } else { 8 }, 0xff)
        } else {
            if let Some(selector) =
                self.selectors.get_mut(number).filter(|_| register.is_segment_register())
            {
                *selector = value as u16;
            }
            return;
        };
        if let Some(full) = self.general.get_mut(place) {
            *full = (*full & !(mask << shift)) | ((value & mask) << shift);
        }
    }

    /// The general registers, in the order of [`GENERAL`].
    #[must_use]
    pub fn general(&self) -> [u32; 8] {
        self.general
    }

    /// The current privilege level.
    #[must_use]
    pub fn ring(&self) -> u32 {
        self.get(Register::CS) & 3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_register() {
        let mut registers = Registers::default();
        registers.set(Register::EBX, 0x1122_3344);
        registers.set(Register::BH, 0x55);
        registers.set(Register::BL, 0x1_66);
        assert_eq!(registers.get(Register::EBX), 0x1122_5566);
        registers.set(Register::BX, 0x7788);
        assert_eq!(registers.get(Register::BH), 0x77);
        assert_eq!(registers.general()[3], 0x1122_7788);
        registers.set(Register::DS, 0x7b);
        assert_eq!(registers.get(Register::DS), 0x7b);
        registers.set(Register::XMM0, 1);
        assert_eq!(registers.get(Register::XMM0), 0);
    }
}
