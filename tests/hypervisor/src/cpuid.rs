//! CPUID: the processor's own answers, without what the guest cannot use, and with the interface.

use crate::guest::Guest;
use crate::svm::{RAX, RBX, RCX, RDX};
use core::arch::x86_64::{__cpuid_count, CpuidResult};
use vmi_hv_backend::reference::interface::{
    BASE, BATCH_LIMIT, Features, LEAF_GRANT, LEAF_INTERFACE, SIGNATURE, VERSION,
};

/// All leaves that belong to hypervisors.
const HYPERVISOR_LEAVES: core::ops::RangeInclusive<u32> = BASE..=0x4fff_ffff;

const NOTHING: CpuidResult = CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 };

/// Leaf 1, ECX.
const VMX: u32 = 1 << 5;
const PCID: u32 = 1 << 17;
const OSXSAVE: u32 = 1 << 27;
const HYPERVISOR: u32 = 1 << 31;

/// Leaf 1, EDX.
const PSE_36: u32 = 1 << 17;

/// CR4.
const CR4_OSXSAVE: u32 = 1 << 18;

/// Leaf 7, EBX.
const SMEP: u32 = 1 << 7;
const INVPCID: u32 = 1 << 10;
const SMAP: u32 = 1 << 20;

/// Leaf 7, ECX.
const PKU: u32 = 1 << 3;
const OSPKE: u32 = 1 << 4;
const SHADOW_STACKS: u32 = 1 << 7;
const LA57: u32 = 1 << 16;
const PKS: u32 = 1 << 31;

/// Leaf 7, EDX.
const BRANCH_TRACKING: u32 = 1 << 20;

/// Leaf 80000001h, ECX.
const SVM: u32 = 1 << 2;

/// Leaf 80000001h, EDX; 1 GiB pages exist in long mode only.
const GIANT_PAGES: u32 = 1 << 26;
const LONG_MODE: u32 = 1 << 29;

/// Leaf 8000000Ah describes SVM.
const SVM_LEAF: u32 = 0x8000_000a;

impl Guest {
    /// Answers CPUID.
    pub(crate) fn cpuid(&mut self) {
        let instruction = self.decode();
        let answer = self.answer(self.register(RAX), self.register(RCX));
        self.set_register(RAX, answer.eax);
        self.set_register(RBX, answer.ebx);
        self.set_register(RCX, answer.ecx);
        self.set_register(RDX, answer.edx);
        self.advance(&instruction);
    }

    /// The most updates of one hypercall.
    pub(crate) fn limit(&self) -> u32 {
        if self.options.features().contains(Features::BATCH) { BATCH_LIMIT } else { 1 }
    }

    fn answer(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        let word = |index: usize| {
            SIGNATURE[index..index + 4]
                .iter()
                .rev()
                .fold(0, |word, byte| word << 8 | u32::from(*byte))
        };
        match leaf {
            BASE => CpuidResult { eax: LEAF_GRANT, ebx: word(0), ecx: word(4), edx: word(8) },
            LEAF_INTERFACE => CpuidResult {
                eax: VERSION,
                ebx: self.options.features().bits(),
                ecx: self.limit(),
                edx: 0,
            },
            LEAF_GRANT => CpuidResult {
                eax: self.machine.grant.guest as u32,
                ebx: self.machine.grant.length as u32,
                ecx: 0,
                edx: 0,
            },
            _ if HYPERVISOR_LEAVES.contains(&leaf) => NOTHING,
            SVM_LEAF => NOTHING,
            _ => {
                let mut answer = __cpuid_count(leaf, subleaf);
                self.hide(leaf, subleaf, &mut answer);
                answer
            }
        }
    }

    fn hide(&self, leaf: u32, subleaf: u32, answer: &mut CpuidResult) {
        match (leaf, subleaf) {
            (1, _) => {
                answer.ecx = answer.ecx & !(VMX | PCID | OSXSAVE) | HYPERVISOR;
                if self.own.cr4 & CR4_OSXSAVE != 0 {
                    answer.ecx |= OSXSAVE;
                }
                answer.edx &= !PSE_36;
            }
            (7, 0) => {
                answer.ebx &= !(SMEP | INVPCID | SMAP);
                answer.ecx &= !(PKU | OSPKE | SHADOW_STACKS | LA57 | PKS);
                answer.edx &= !BRANCH_TRACKING;
            }
            (0x8000_0001, _) => {
                answer.ecx &= !SVM;
                answer.edx &= !(PSE_36 | GIANT_PAGES | LONG_MODE);
            }
            _ => {}
        }
    }
}
