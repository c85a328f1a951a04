//! A guest that was started at its VMI entry, by a hypervisor that it need not know.
//!
//! Such a guest is not in ring 0. What it cannot do itself there it does by the ROM's calls, from its first moment on: they are
//! bound here once, before anything else. Elsewhere the guest needs none of them, for it tests them.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: binds the calls of a ROM, which is code that the compiler does not know"
)]

use crate::report;
use crate::rom::Rom;
use crate::{checks, traps};
use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use vmi_abi::vmi::{self, Calls};
use vmi_abi::{CallNumber, REVISION_3_0, RelocationType, number};

/// The ROM's calls, for what the guest itself has to do.
pub(crate) static CALLS: Calls = Calls::new();

static IS_HOSTED: AtomicBool = AtomicBool::new(false);
static RING: AtomicU32 = AtomicU32::new(0);

/// Whether the guest was started at its VMI entry.
pub(crate) fn is_hosted() -> bool {
    IS_HOSTED.load(Ordering::Relaxed)
}

/// The ring of the guest's kernel.
pub(crate) fn ring() -> u16 {
    RING.load(Ordering::Relaxed) as u16
}

/// A selector of the guest's kernel, as this ring loads it.
pub(crate) fn selector(of_ring_0: u16) -> u16 {
    of_ring_0 | ring()
}

/// What cannot be done in another ring than 0 without the ROM.
const NEEDED: [CallNumber; 13] = [
    number::SetGDT,
    number::SetIDT,
    number::WriteGDTEntry,
    number::WriteIDTEntry,
    number::UpdateKernelStack,
    number::GetCR3,
    number::SetCR3,
    number::GetInterruptMask,
    number::SetInterruptMask,
    number::IRET,
    number::SetPxELong,
    number::AllocatePage,
    number::ReleasePage,
];

/// Prepares the ROM and binds its calls; from here on the guest can do what a kernel does.
pub(crate) fn start(rom: &Rom) {
    if rom.is_linked() {
        report::abandon(format_args!("no ROM, and without one nothing can be done in this ring"))
    }
    let image = match vmi::Rom::judge(rom.bytes(), REVISION_3_0) {
        Ok(image) => image,
        Err(refusal) => report::abandon(format_args!("the ROM: {refusal}")),
    };
    // SAFETY: the platform's flat segments, interrupts off; the image stays where it is.
    let bound = unsafe {
        image
            .initialize()
            .and_then(|()| CALLS.bind(|number| image.relocation(number), checks::own_code))
    };
    if let Err(error) = bound {
        report::abandon(format_args!("the ROM: {error}"))
    }
    // SAFETY: as above, and it was initialised.
    let is_left_out =
        |number: &CallNumber| unsafe { image.relocation(*number) }.kind == RelocationType::NONE;
    if let Some(number) = NEEDED.into_iter().find(is_left_out) {
        let name = number.call().map_or("?", |call| call.name);
        report::abandon(format_args!(
            "the ROM leaves {name} to the guest, which cannot do it in this ring"
        ))
    }
    let code: u16;
    // SAFETY: reading changes nothing.
    unsafe { asm!("mov {:x}, cs", out(reg) code, options(nomem, nostack, preserves_flags)) };
    RING.store(u32::from(code & 3), Ordering::Relaxed);
    IS_HOSTED.store(true, Ordering::Relaxed);
    traps::return_by(CALLS.relocation(number::IRET));
}

/// Announces a page that is to be a page table.
pub(crate) fn announce_page(frame: u32, flags: u32) {
    // SAFETY: callers name a page that nothing of the guest's depends on.
    unsafe { CALLS.AllocatePage(frame, flags, 0, 0, 0) };
}

/// Takes it back.
pub(crate) fn release_page(frame: u32, flags: u32) {
    // SAFETY: as above.
    unsafe { CALLS.ReleasePage(frame, flags) };
}

/// Writes a register of the local APIC, if the ROM has one.
pub(crate) fn write_apic(register: u32, value: u32) {
    // SAFETY: callers name the vector of an alarm that is not armed.
    unsafe { CALLS.APICWrite(register, value) };
}

/// IF, as calls pass it.
const INTERRUPT_FLAG: u32 = 1 << 9;

/// Sets the interrupt flag as in EFLAGS, where POPF does not.
pub(crate) fn set_interrupt_flag(eflags: u32) {
    if is_hosted() {
        // SAFETY: handlers are there for all that may come.
        unsafe { CALLS.SetInterruptMask(eflags & INTERRUPT_FLAG) };
    }
}

/// EFLAGS with the interrupt flag, which PUSHF does not show in another ring.
pub(crate) fn with_interrupt_flag(eflags: u32) -> u32 {
    if is_hosted() {
        eflags & !INTERRUPT_FLAG | CALLS.GetInterruptMask() & INTERRUPT_FLAG
    } else {
        eflags
    }
}
