//! The reference hypervisor below the guest, where there is one: its signature, its hypercalls, its counters.

#![expect(unsafe_code, reason = "UNSAFETY: VMMCALL, and a buffer that the hypervisor writes")]

use crate::paging::physical;
use crate::processor::cpuid;
use core::arch::asm;
use vmi_hv_backend::reference::interface::{
    BASE, Counters, Hypercall, LEAF_INTERFACE, SIGNATURE, Status, is_understood,
};

/// A reference hypervisor whose version the guest understands.
#[derive(Clone, Copy)]
pub(crate) struct Hypervisor {
    /// The most updates that a batch may have.
    pub(crate) batch_limit: u32,
}

#[repr(C, align(8))]
struct Buffer([u64; Counters::EXITS.len() + Counters::OTHERS.len()]);

static mut BUFFER: Buffer = Buffer([0; Counters::EXITS.len() + Counters::OTHERS.len()]);

impl Hypervisor {
    /// Looks for it.
    pub(crate) fn find() -> Option<Self> {
        const HYPERVISOR: u32 = 1 << 31;
        if cpuid(1, 0)[2] & HYPERVISOR == 0 {
            return None;
        }
        let [last, ebx, ecx, edx] = cpuid(BASE, 0);
        let words = [ebx, ecx, edx].map(u32::to_le_bytes);
        if words.as_flattened() != SIGNATURE || last < LEAF_INTERFACE {
            return None;
        }
        let [version, _, batch_limit, _] = cpuid(LEAF_INTERFACE, 0);
        is_understood(version).then_some(Self { batch_limit })
    }

    /// Makes a hypercall, with any number and arguments: EAX and EDX.
    pub(crate) fn call(self, number: u32, ebx: u32, ecx: u32) -> (i32, u32) {
        let (status, result): (i32, u32);
        // SAFETY: the hypervisor keeps all other registers. What it writes, it writes where the
        // arguments say; callers that mean no buffer of the guest's expect it to refuse.
        unsafe {
            asm!(
                "vmmcall",
                inlateout("eax") number => status,
                in("ebx") ebx,
                in("ecx") ecx,
                lateout("edx") result,
                options(nostack, preserves_flags),
            );
        }
        (status, result)
    }

    /// What it has counted. `None` if it does not say.
    pub(crate) fn counters(self) -> Option<Counters> {
        let buffer = &raw mut BUFFER;
        let bytes = size_of::<Buffer>() as u32;
        let answer = self.call(Hypercall::ReadCounters as u32, physical(buffer), bytes);
        // SAFETY: the guest's own memory, which nobody writes now.
        let values = unsafe { buffer.read_volatile() }.0;
        (answer == (Status::Done as i32, bytes)).then(|| Counters::from_values(values))
    }
}
