//! The transport's instructions: VMMCALL, the interrupt flag, and the debug port.

#![expect(unsafe_code, reason = "UNSAFETY: instructions of ring 0")]

use super::interface::{Hypercall, SHOWN_BYTES, Status};
use super::{Reference, TEXT_LIMIT, describe, say};
use crate::{
    Backend, Batch, CallNumber, Failure, Hypervisor, InterruptMask, Reason, Refusal, Shown,
};
use core::arch::asm;
use core::arch::x86::__cpuid_count;
use core::ptr::with_exposed_provenance_mut;

/// The debug console of Bochs and of QEMU's `-debugcon`. Reading it answers its own number.
const DEBUG_PORT: u8 = 0xe9;

/// What each line of ours begins with.
const PREFIX: &str = "VMI ROM: ";

impl Backend for Reference {
    fn recognise(hypervisor: &Hypervisor) -> Option<Self> {
        match Self::of(hypervisor, cpuid) {
            Ok(reference) => Some(reference),
            Err(unfit) => {
                if has_debug_port() {
                    say(PREFIX, &mut put);
                    say(unfit.text(), &mut put);
                    say(", so native code runs", &mut put);
                    put(b'\n');
                }
                None
            }
        }
    }

    #[inline(always)]
    fn disable_interrupts(&self) -> InterruptMask {
        let flags;
        // SAFETY: the code runs in ring 0, and whoever calls puts the flag back.
        unsafe { asm!("pushfd", "pop {}", "cli", out(reg) flags) };
        InterruptMask(flags)
    }

    #[inline(always)]
    fn set_interrupt_mask(&self, mask: InterruptMask) {
        // SAFETY: these are the flags that `disable_interrupts` found.
        unsafe { asm!("push {}", "popfd", in(reg) mask.0) };
    }

    fn serves(&self, call: CallNumber) -> bool {
        Self::is_served(call)
    }

    fn apply(&self, batch: Batch<'_>) -> Result<(), Refusal> {
        let address = self.physical(batch.as_ptr());
        // SAFETY: the hypervisor reads the batch, which lies in the granted memory, and changes what its updates say.
        let (status, applied) = unsafe { hypercall(Hypercall::Apply, address, batch.len() as u32) };
        if status == Status::Done as i32 {
            return Ok(());
        }
        let reason =
            if status == Status::Busy as i32 { Reason::Transient } else { Reason::Permanent };
        Err(Refusal { applied: applied as usize, reason, status })
    }

    #[cold]
    fn stop(&self, failure: &Failure) {
        let page = (&raw const *self).expose_provenance() & !(Self::MEMORY as usize - 1);
        let text: *mut u8 = with_exposed_provenance_mut(page + Self::LIMIT as usize);
        let mut length = 0;
        let mut put = |byte| {
            if length < TEXT_LIMIT {
                // SAFETY: the granted memory's last bytes, which are for this.
                unsafe { text.add(length as usize).write(byte) };
                length += 1;
            }
        };
        say(PREFIX, &mut put);
        describe(failure, &mut put);
        // SAFETY: the hypervisor reads the text.
        unsafe { hypercall(Hypercall::Stop, self.physical(text), length) };
        // It did not want to. Interrupts are off; an NMI finds the processor halted again.
        loop {
            // SAFETY: nothing goes on from here.
            unsafe { asm!("hlt") };
        }
    }

    #[cold]
    fn report(&self, failure: &Failure) {
        if has_debug_port() {
            say(PREFIX, &mut put);
            describe(failure, &mut put);
            put(b'\n');
        }
    }
}

impl Reference {
    /// Asks that the guest's own page faults reach it without an exit from now on; whether they may. The map lies in the granted memory;
    /// nothing waits.
    #[must_use]
    pub fn be_quiet(&self, shown: &Shown) -> bool {
        // SAFETY: the hypervisor stores to what is shown, whose cells say so.
        let ask = || unsafe {
            hypercall(Hypercall::BeQuiet, self.physical(core::ptr::from_ref(shown)), SHOWN_BYTES)
        };
        self.quiet && ask().0 == Status::Done as i32
    }

    /// What [`Reference::be_quiet`] began ends.
    pub fn be_loud(&self) {
        if self.quiet {
            // SAFETY: nothing of the guest's memory is named.
            unsafe { hypercall(Hypercall::BeQuiet, 0, 0) };
        }
    }

    /// Has the hypervisor look at a page fault that came again.
    pub fn reconsider(&self, linear: u32) {
        // SAFETY: the hypervisor reads the guest's tables again.
        unsafe { hypercall(Hypercall::Reconsider, linear, 0) };
    }
}

/// CPUID: EAX, EBX, ECX, EDX.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let answer = __cpuid_count(leaf, subleaf);
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

/// EAX and EDX of a hypercall.
///
/// # Safety
///
/// What the hypervisor does for it is what the caller wants, and the memory that it names is the caller's.
unsafe fn hypercall(number: Hypercall, ebx: u32, ecx: u32) -> (i32, u32) {
    let (status, result);
    // SAFETY: the caller's; the hypervisor keeps all other registers and the flags.
    unsafe {
        asm!(
            "vmmcall",
            inlateout("eax") number as u32 => status,
            in("ebx") ebx,
            in("ecx") ecx,
            lateout("edx") result,
            options(nostack, preserves_flags),
        );
    }
    (status, result)
}

/// Whether somebody listens at the debug port.
fn has_debug_port() -> bool {
    let answer: u8;
    // SAFETY: reading the port changes nothing, whatever answers there.
    unsafe { asm!("in al, {port}", port = const DEBUG_PORT, out("al") answer) };
    answer == DEBUG_PORT
}

/// A byte at the debug port.
fn put(byte: u8) {
    // SAFETY: somebody said that it is there for this.
    unsafe { asm!("out {port}, al", port = const DEBUG_PORT, in("al") byte) };
}
