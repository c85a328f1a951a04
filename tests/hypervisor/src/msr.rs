//! Model-specific registers: EFER is shared with the hypervisor, those of SVM do not exist for the guest, all others are its own.

#![expect(unsafe_code, reason = "UNSAFETY: WRMSR")]

use crate::exceptions::{read_msr, write_msr};
use crate::guest::{GENERAL_PROTECTION, Guest};
use crate::svm::{RAX, RCX, RDX, SVM_ENABLE, VM_CR, VM_HSAVE_PA};
use core::arch::x86_64::__cpuid;
use vmi_hypervisor::walk::EFER_NO_EXECUTE;
use x86::msr::IA32_EFER;

/// EFER: system-call extensions, fast FXSAVE.
const SYSTEM_CALLS: u64 = 1 << 0;
const FAST_SAVE: u64 = 1 << 14;

/// CPUID leaf 80000001h, EDX: what lets the guest set the bits.
const FEATURES: [(u32, u64); 3] =
    [(1 << 11, SYSTEM_CALLS), (1 << 20, EFER_NO_EXECUTE), (1 << 25, FAST_SAVE)];

impl Guest {
    /// RDMSR or WRMSR of a register that is not passed through.
    pub(crate) fn access_msr(&mut self) {
        let instruction = self.decode();
        let number = self.register(RCX);
        let done = if self.vmcb.control.exit_info_1 == 0 {
            self.read_msr(number).is_some_and(|value| {
                self.set_register(RAX, value as u32);
                self.set_register(RDX, (value >> 32) as u32);
                true
            })
        } else {
            let value = u64::from(self.register(RAX)) | u64::from(self.register(RDX)) << 32;
            self.write_msr(number, value)
        };
        if done {
            self.advance(&instruction);
        } else {
            self.inject(GENERAL_PROTECTION, Some(0));
        }
    }

    fn read_msr(&self, number: u32) -> Option<u64> {
        match number {
            IA32_EFER => Some(self.own.efer),
            VM_CR | VM_HSAVE_PA => None,
            // Beyond the maps.
            _ => read_msr(number),
        }
    }

    fn write_msr(&mut self, number: u32, value: u64) -> bool {
        match number {
            IA32_EFER => {
                let features = __cpuid(0x8000_0001).edx;
                let allowed = FEATURES
                    .iter()
                    .filter(|(feature, _)| features & feature != 0)
                    .fold(0, |bits, (_, bit)| bits | bit);
                if value & !allowed != 0 {
                    return false;
                }
                let is_new = (self.own.efer ^ value) & EFER_NO_EXECUTE != 0;
                self.own.efer = value;
                self.vmcb.state.efer = value | SVM_ENABLE;
                if is_new {
                    self.load();
                }
                self.follow_own();
                true
            }
            VM_CR | VM_HSAVE_PA => false,
            // SAFETY: beyond the maps, where the hypervisor uses none.
            _ => unsafe { write_msr(number, value) },
        }
    }
}
