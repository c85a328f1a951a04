//! Exceptions and interrupts.
//!
//! Every vector leads to one handler with the interrupted context in a [`Frame`]. While a call is
//! under test ([`crate::harness`]) an exception is an observation: the handler records it and
//! abandons the call. Outside of one it is a defect of the guest.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: entry code in assembly, and the frame it leaves on the stack"
)]

use crate::segments::{self, IDT, OTHER_IDT, USER_DATA};
use crate::{devices, harness, host, processor, report};
use core::arch::{global_asm, naked_asm};
use core::sync::atomic::{AtomicU32, Ordering};
use vmi_abi::{RelocationInfo, RelocationType};
use x86::bits32::eflags::EFlags;

/// Exceptions by their vectors.
pub(crate) const DEBUG: u32 = 1;
pub(crate) const NON_MASKABLE: u32 = 2;
pub(crate) const INVALID_OPCODE: u32 = 6;
pub(crate) const GENERAL_PROTECTION: u32 = 13;
pub(crate) const PAGE_FAULT: u32 = 14;

/// The vector with which ring 3 comes back.
pub(crate) const SYSTEM_CALL: u32 = 0x80;

/// A vector that no device uses, for the test that writes gates.
pub(crate) const SPARE_VECTOR: u32 = 0x81;

/// The interrupted context, in the order in which the entry code and the processor push it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Frame {
    pub(crate) gs: u32,
    pub(crate) fs: u32,
    pub(crate) es: u32,
    pub(crate) ds: u32,
    pub(crate) edi: u32,
    pub(crate) esi: u32,
    pub(crate) ebp: u32,
    /// ESP as PUSHAD saw it: not the interrupted one.
    esp_inside: u32,
    pub(crate) ebx: u32,
    pub(crate) edx: u32,
    pub(crate) ecx: u32,
    pub(crate) eax: u32,
    pub(crate) vector: u32,
    pub(crate) error: u32,
    pub(crate) eip: u32,
    pub(crate) cs: u32,
    pub(crate) eflags: u32,
    /// From here on only when the interrupted context was in another ring.
    pub(crate) esp: u32,
    pub(crate) ss: u32,
    /// From here on only when it was in virtual-8086 mode.
    pub(crate) vm_es: u32,
    pub(crate) vm_ds: u32,
    pub(crate) vm_fs: u32,
    pub(crate) vm_gs: u32,
}

impl Frame {
    /// Whether the context was in virtual-8086 mode.
    pub(crate) fn is_virtual_8086(&self) -> bool {
        self.eflags & EFlags::FLAGS_VM.bits() != 0
    }

    /// Whether the processor changed stacks on the way in.
    pub(crate) fn is_outer(&self) -> bool {
        // A host may use what is above the selector.
        (self.cs & 3) as u16 > host::ring() || self.is_virtual_8086()
    }
}

// One stub of 16 bytes for each vector: pushes what the processor left out, and the vector.
global_asm!(
    ".balign 16",
    "trap_stubs:",
    ".set vector, 0",
    ".rept 256",
    ".balign 16",
    // Exceptions with an error code: 8, 10 to 14, 17, 21, 29, 30.
    ".if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)",
    "push 0",
    ".endif",
    "push vector",
    "jmp {common}",
    ".set vector, vector + 1",
    ".endr",
    common = sym common,
);

/// Saves the context, calls [`handle`] with flat data segments, and goes back.
///
/// Segment registers travel through EAX: PUSH and POP of them have 16-bit forms, and the assembler
/// takes those.
#[unsafe(naked)]
unsafe extern "C" fn common() {
    naked_asm!(
        "pushad",
        "mov eax, ds",
        "push eax",
        "mov eax, es",
        "push eax",
        "mov eax, fs",
        "push eax",
        "mov eax, gs",
        "push eax",
        "cld",
        "mov eax, {data}",
        "mov ds, eax",
        "mov es, eax",
        "push esp",
        "call {handle}",
        "add esp, 4",
        "pop eax",
        "mov gs, eax",
        "pop eax",
        "mov fs, eax",
        "pop eax",
        "mov es, eax",
        "pop eax",
        "mov ds, eax",
        "popad",
        "add esp, 8",
        "call dword ptr ss:[{back}]",
        data = const USER_DATA,
        handle = sym handle,
        back = sym BACK,
    )
}

/// What goes back to the interrupted context: called, so that a return address lies above the frame.
static BACK: AtomicU32 = AtomicU32::new(0);

/// The ROM's code where IRET is to be jumped to.
static JUMP: AtomicU32 = AtomicU32::new(0);

/// Goes back by the guest's own IRET.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn return_natively() {
    naked_asm!("add esp, 4", "iretd")
}

/// Goes back by the ROM's code, which is jumped to.
#[unsafe(naked)]
unsafe extern "C" fn return_by_jump() {
    naked_asm!("add esp, 4", "jmp dword ptr ss:[{jump}]", jump = sym JUMP)
}

/// Goes back to an interrupted context. In: a return address, the frame above it.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn return_from_interrupt() {
    naked_asm!("jmp dword ptr ss:[{back}]", back = sym BACK)
}

/// From here on handlers return by the ROM's IRET.
pub(crate) fn return_by(iret: RelocationInfo) {
    JUMP.store(iret.eip.get(), Ordering::Relaxed);
    let by_jump = iret.kind == RelocationType::JUMP_REL;
    let back = if by_jump { return_by_jump as *const () as u32 } else { iret.eip.get() };
    BACK.store(back, Ordering::Relaxed);
}

/// Points every vector of both tables at its stub. Ring 3 may use [`SYSTEM_CALL`].
pub(crate) fn initialize() {
    if !host::is_hosted() {
        BACK.store(return_natively as *const () as u32, Ordering::Relaxed);
    }
    let first: u32;
    // SAFETY: takes an address.
    unsafe {
        core::arch::asm!("mov {}, offset trap_stubs", out(reg) first, options(nomem, nostack))
    };
    for vector in 0..256 {
        let ring = if vector == SYSTEM_CALL { 3 } else { 0 };
        let gate = segments::gate(first + vector * 16, ring);
        segments::set_descriptor(&raw mut IDT, vector as usize, gate);
        segments::set_descriptor(&raw mut OTHER_IDT, vector as usize, gate);
    }
    processor::set_idt(segments::table_of(&raw const IDT));
}

static INTERRUPTS: AtomicU32 = AtomicU32::new(0);
static LAST_INTERRUPTED: AtomicU32 = AtomicU32::new(0);
static LAST_LINE: AtomicU32 = AtomicU32::new(0);

/// Interrupts that arrived since the guest started.
pub(crate) fn interrupts() -> u32 {
    INTERRUPTS.load(Ordering::Relaxed)
}

/// EIP that the last of them interrupted.
pub(crate) fn last_interrupted() -> u32 {
    LAST_INTERRUPTED.load(Ordering::Relaxed)
}

/// The line at which it came.
pub(crate) fn last_line() -> u32 {
    LAST_LINE.load(Ordering::Relaxed)
}

extern "C" fn handle(frame: *mut Frame) {
    // SAFETY: the entry code passes the frame that it has just pushed; the words of another ring
    // lie above it, on the same stack, even where they are not part of this frame.
    let frame = unsafe { &mut *frame };
    let irq = frame.vector.wrapping_sub(u32::from(devices::IRQ_BASE));
    if irq < 16 {
        LAST_INTERRUPTED.store(frame.eip, Ordering::Relaxed);
        LAST_LINE.store(irq, Ordering::Relaxed);
        INTERRUPTS.fetch_add(1, Ordering::Relaxed);
        devices::end_of_interrupt(irq as u8);
        return;
    }
    if frame.vector == DEBUG && harness::step(frame) {
        return;
    }
    if frame.vector == NON_MASKABLE && !harness::is_active() {
        // The timer's line is wired as an NMI, and was faster than the call that is to be woken by
        // it: the next tick will do.
        devices::acknowledge_interrupt();
        return;
    }
    if harness::is_active() {
        if frame.vector == PAGE_FAULT && harness::serve_page_fault(processor::cr2()) {
            return;
        }
        harness::interrupted(frame);
    }
    unexpected(frame)
}

/// An exception that nobody waits for. Apart from [`handle`], which is to need little of an interrupted call's stack.
#[cold]
#[inline(never)]
fn unexpected(frame: &Frame) -> ! {
    report::abandon(format_args!(
        "exception {} outside of a call: error {:#x}, CR2 {:#010x}, {frame:#x?}",
        frame.vector,
        frame.error,
        processor::cr2(),
    ));
}
