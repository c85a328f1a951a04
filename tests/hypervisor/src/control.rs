//! Control registers with shadow paging: what the guest has, and what the processor has instead.

use crate::guest::{GENERAL_PROTECTION, Guest};
use crate::report::Ending;
use crate::svm::SVM_ENABLE;
use core::arch::x86_64::{__cpuid, __cpuid_count};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use vmi_hypervisor::emulate;
use vmi_hypervisor::walk::{CR0_PAGING, CR0_WRITE_PROTECT, CR4_PAE};
use x86::controlregs::{Cr0, Cr4};

/// Bits of CR0 that the guest changes without an exit: MP and TS.
pub(crate) const FREE: u32 =
    (Cr0::CR0_MONITOR_COPROCESSOR.bits() | Cr0::CR0_TASK_SWITCHED.bits()) as u32;

/// Bits of CR0 that the processor has while the guest runs, whatever the guest has.
const FORCED_CR0: u32 = CR0_PAGING | CR0_WRITE_PROTECT;

const PROTECTED: u32 = Cr0::CR0_PROTECTED_MODE.bits() as u32;
const CACHE_DISABLE: u32 = Cr0::CR0_CACHE_DISABLE.bits() as u32;
const NOT_WRITE_THROUGH: u32 = Cr0::CR0_NOT_WRITE_THROUGH.bits() as u32;
const EXTENSION_TYPE: u32 = Cr0::CR0_EXTENSION_TYPE.bits() as u32;

/// The bits of CR0 that are kept; others are ignored, as processors do.
const CR0_BITS: u32 = 0xe005_003f;

/// What a mov to CR0 must set up again.
const CR0_TRANSLATION: u32 = CR0_PAGING | CR0_WRITE_PROTECT;

/// Bits of CR4 that change what translations mean.
const CR4_TRANSLATION: u32 =
    CR4_PAE | (Cr4::CR4_ENABLE_PSE.bits() | Cr4::CR4_ENABLE_GLOBAL_PAGES.bits()) as u32;

/// The bits of CR4 that the guest may set: those of every processor that has SVM, and of three more what this one has.
fn cr4_bits() -> u32 {
    let has = |register: u32, bit: u32| register >> bit & 1 != 0;
    let (basic, extended) = (__cpuid(1), __cpuid_count(7, 0));
    // VME to OSXMMEXCPT.
    let mut bits = 0x7ff;
    for (is_there, bit) in
        [(has(extended.ecx, 2), 11), (has(extended.ebx, 0), 16), (has(basic.ecx, 26), 18)]
    {
        if is_there {
            bits |= 1 << bit;
        }
    }
    bits
}

impl Guest {
    /// MOV from or to a control register, LMSW, SMSW.
    pub(crate) fn access_control_register(&mut self) {
        let instruction = self.decode();
        let mut state = self.state();
        let (first, second) = (instruction.op0_register(), instruction.op1_register());
        match instruction.mnemonic() {
            Mnemonic::Mov if first.is_cr() => {
                let value = emulate::get(&state, second).unwrap_or_default() as u32;
                self.write_control_register(&instruction, first, value);
            }
            Mnemonic::Mov if second.is_cr() => {
                self.count_read(second);
                let value = self.control_register(second);
                if emulate::set(&mut state, first, value).is_none() {
                    self.unsupported(&instruction);
                }
                self.set_state(&state);
                self.advance(&instruction);
            }
            Mnemonic::Smsw if instruction.op0_kind() == OpKind::Register => {
                self.count_read(Register::CR0);
                if emulate::set(&mut state, first, self.own.cr0).is_none() {
                    self.unsupported(&instruction);
                }
                self.set_state(&state);
                self.advance(&instruction);
            }
            Mnemonic::Lmsw if instruction.op0_kind() == OpKind::Register => {
                let value = emulate::get(&state, first).unwrap_or_default() as u32;
                // PE can be set and not cleared; only the lowest four bits are loaded.
                let value = self.own.cr0 & !0xe | value & 0xf;
                self.write_control_register(&instruction, Register::CR0, value);
            }
            _ => self.unsupported(&instruction),
        }
    }

    /// Counts a read as an exit, unless it is one only because of QEMU.
    fn count_read(&mut self, register: Register) {
        if self.reads_wanted() >> register.number() & 1 != 0 {
            self.counters.control_reads += 1;
        } else {
            self.counters.needless_reads += 1;
        }
    }

    fn unsupported(&self, instruction: &Instruction) -> ! {
        self.fail(
            Ending::Unsupported,
            format_args!(
                "an access to a control register that is not known: {:?}",
                instruction.code()
            ),
        )
    }

    /// What the guest reads.
    fn control_register(&self, register: Register) -> u32 {
        match register {
            Register::CR0 => self.own.cr0,
            Register::CR2 => self.vmcb.state.cr2 as u32,
            Register::CR3 => self.own.cr3,
            Register::CR4 => self.own.cr4,
            _ => 0,
        }
    }

    fn write_control_register(
        &mut self,
        instruction: &Instruction,
        register: Register,
        value: u32,
    ) {
        let before = self.own;
        self.record.set_detail(value);
        let valid = match register {
            Register::CR0 => {
                self.counters.control_writes += 1;
                self.own.cr0 = value & CR0_BITS | EXTENSION_TYPE;
                (value & CR0_PAGING == 0 || value & PROTECTED != 0)
                    && (value & NOT_WRITE_THROUGH == 0 || value & CACHE_DISABLE != 0)
            }
            Register::CR3 => {
                self.counters.cr3_writes += 1;
                self.own.cr3 = value;
                true
            }
            Register::CR4 => {
                self.counters.control_writes += 1;
                self.own.cr4 = value;
                value & !cr4_bits() == 0
            }
            _ => self.unsupported(instruction),
        };
        if !valid {
            self.own = before;
            self.inject(GENERAL_PROTECTION, Some(0));
            return;
        }
        let is_new = register == Register::CR3
            || (before.cr0 ^ self.own.cr0) & CR0_TRANSLATION != 0
            || (before.cr4 ^ self.own.cr4) & CR4_TRANSLATION != 0;
        if is_new {
            self.load();
        }
        self.follow_own();
        self.advance(instruction);
    }

    /// Lets the shadow follow the guest's registers.
    pub(crate) fn load(&mut self) {
        self.quiet.now = false;
        if let Some(shadow) = &mut self.shadow {
            shadow.load(&self.own, &self.machine);
        }
    }

    /// Sets what the processor has, and intercepts reads where that differs from what the guest has.
    pub(crate) fn follow_own(&mut self) {
        let Some(shadow) = &self.shadow else { return };
        let state = &mut self.vmcb.state;
        state.cr0 = (self.own.cr0 | FORCED_CR0).into();
        state.cr3 = shadow.root();
        state.cr4 = (self.own.cr4 | CR4_PAE).into();
        state.efer = self.own.efer | SVM_ENABLE;
        let wanted = self.reads_wanted();
        let control = &mut self.vmcb.control;
        control.cr_reads = wanted;
        control.cr_writes = 1 << 3 | 1 << 4;
        if wanted & 1 << 0 != 0 {
            // What the guest sets may be what the processor has already: no change to it.
            control.cr_writes |= 1 << 0;
        }
        if self.quirks.reads_share_cr0 {
            control.cr_reads |= 1 << 0;
        }
    }

    /// The control registers in which the processor has something else than the guest, one bit for each.
    fn reads_wanted(&self) -> u16 {
        let state = &self.vmcb.state;
        let differs = |real: u64, own: u32| u16::from(real != u64::from(own));
        1 << 3 | differs(state.cr0, self.own.cr0) | differs(state.cr4, self.own.cr4) << 4
    }
}
