//! The hypervisor's own exceptions: each ends in a report, but the one that [`read_msr`] and [`write_msr`] expect.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: descriptor tables, handlers in assembly, RDMSR and WRMSR"
)]

use crate::boot::{CODE, TASK};
use crate::console::line;
use crate::report::{Ending, exit};
use core::arch::{asm, global_asm, naked_asm};
use core::mem::size_of;

/// Vectors that have a handler.
const VECTORS: usize = 32;

/// Vectors whose exception pushes an error code: 8, 10 to 14, 17, 21, 29 and 30.
const WITH_ERROR_CODE: u32 = 0x6022_7d00;

/// Bytes of a handler's entry.
const ENTRY_SIZE: u64 = 16;

const DOUBLE_FAULT: usize = 8;

/// A double fault may come of a bad stack, so it has one of its own.
const EMERGENCY_STACK: u8 = 1;
const EMERGENCY_STACK_SIZE: usize = 8 << 10;

/// What `exception_entry` leaves on the stack.
#[repr(C)]
struct Frame {
    registers: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

global_asm!(
    ".pushsection .text.exceptions, \"ax\", @progbits",
    // In: what the processor pushes. Each entry adds a zero where there is no error code, and its vector.
    ".balign {entry_size}",
    "exception_entries:",
    ".set exception_vector, 0",
    ".rept {vectors}",
    ".balign {entry_size}",
    ".if !(({with_error_code} >> exception_vector) & 1)",
    "push 0",
    ".endif",
    "push exception_vector",
    "jmp exception_entry",
    ".set exception_vector, exception_vector + 1",
    ".endr",
    "exception_entry:",
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rbp",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov rdi, rsp",
    "cld",
    "call {report}",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rbp",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    ".popsection",
    entry_size = const ENTRY_SIZE,
    vectors = const VECTORS,
    with_error_code = const WITH_ERROR_CODE,
    report = sym report,
);

unsafe extern "C" {
    static exception_entries: u8;
    static mut boot_descriptors: [u64; 5];
}

/// Called by `exception_entry`; returns only for what [`read_msr`] and [`write_msr`] expect.
extern "sysv64" fn report(frame: &mut Frame) {
    if frame.rip == msr_instruction as *const () as u64
        || frame.rip == msr_store_instruction as *const () as u64
    {
        frame.rip = msr_refused as *const () as u64;
        return;
    }
    let cr2: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack)) };
    line!(
        "exception {} of the hypervisor itself, error code {:#x}, cr2={cr2:#x}",
        frame.vector,
        frame.error
    );
    line!("rip={:#x} rflags={:#x} rsp={:#x}", frame.rip, frame.rflags, frame.rsp);
    const NAMES: [&str; 15] = [
        "r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "rbp", "rdi", "rsi", "rdx", "rcx",
        "rbx", "rax",
    ];
    for (name, value) in NAMES.iter().zip(frame.registers) {
        line!("{name:3}={value:#018x}");
    }
    exit(Ending::OwnFault)
}

#[panic_handler]
fn panic(information: &core::panic::PanicInfo<'_>) -> ! {
    line!("the hypervisor itself panicked: {information}");
    exit(Ending::OwnFault)
}

/// An interrupt gate.
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    offset_low: u16,
    selector: u16,
    stack: u8,
    kind: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

const EMPTY_GATE: Gate = Gate {
    offset_low: 0,
    selector: 0,
    stack: 0,
    kind: 0,
    offset_middle: 0,
    offset_high: 0,
    reserved: 0,
};

/// Present, an interrupt gate.
const INTERRUPT_GATE: u8 = 0x8e;

/// A task of 64 bits, present; bits 40 to 47 of its descriptor.
const AVAILABLE_TASK: u64 = 0x89 << 40;

static mut GATES: [Gate; VECTORS] = [EMPTY_GATE; VECTORS];
static mut STACK: [u8; EMERGENCY_STACK_SIZE] = [0; EMERGENCY_STACK_SIZE];
static mut TASK_STATE: [u32; 26] = [0; 26];

/// The pointer that LIDT takes.
#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// Makes every exception end in a report.
pub(crate) fn initialize() {
    let entries = (&raw const exception_entries) as u64;
    for vector in 0..VECTORS {
        let entry = entries + vector as u64 * ENTRY_SIZE;
        let gate = Gate {
            offset_low: entry as u16,
            selector: CODE,
            stack: if vector == DOUBLE_FAULT { EMERGENCY_STACK } else { 0 },
            kind: INTERRUPT_GATE,
            offset_middle: (entry >> 16) as u16,
            offset_high: (entry >> 32) as u32,
            reserved: 0,
        };
        // SAFETY: one processor, and the table is not in use yet.
        unsafe { (&raw mut GATES).cast::<Gate>().add(vector).write(gate) };
    }
    let stack = (&raw const STACK) as u64 + EMERGENCY_STACK_SIZE as u64;
    let task = (&raw const TASK_STATE) as u64;
    let limit = size_of::<[u32; 26]>() as u64 - 1;
    let low = limit | (task & 0xff_ffff) << 16 | AVAILABLE_TASK | (task >> 24 & 0xff) << 56;
    let pointer = Pointer {
        limit: (size_of::<[Gate; VECTORS]>() - 1) as u16,
        base: (&raw const GATES) as u64,
    };
    // SAFETY: one processor; the tables are complete before they are loaded, and static. IST 1 is at 24h of the task state.
    unsafe {
        let words = (&raw mut TASK_STATE).cast::<u32>();
        words.add(9).write(stack as u32);
        words.add(10).write((stack >> 32) as u32);
        words.add(25).write(limit as u32 + 1);
        let descriptors = (&raw mut boot_descriptors).cast::<u64>();
        descriptors.add(3).write(low);
        descriptors.add(4).write(task >> 32);
        asm!("lidt [{}]", in(reg) &pointer, options(readonly, nostack));
        asm!("ltr {:x}", in(reg) TASK, options(nostack));
    }
}

/// RDMSR; None where the processor refuses.
///
/// In: EDI: the number. Out: RAX: the value, RDX: 1 if there is none.
#[unsafe(naked)]
unsafe extern "sysv64" fn try_read_msr(number: u32) -> Answer {
    naked_asm!(
        "mov ecx, edi",
        ".globl msr_instruction",
        "msr_instruction: rdmsr",
        "shl rdx, 32",
        "or rax, rdx",
        "xor edx, edx",
        "ret",
        ".globl msr_refused",
        "msr_refused:",
        "xor eax, eax",
        "mov edx, 1",
        "ret",
    )
}

/// WRMSR.
///
/// In: EDI: the number, RSI: the value. Out: RDX: 1 if the processor refuses.
#[unsafe(naked)]
unsafe extern "sysv64" fn try_write_msr(number: u32, value: u64) -> Answer {
    naked_asm!(
        "mov ecx, edi",
        "mov eax, esi",
        "mov rdx, rsi",
        "shr rdx, 32",
        ".globl msr_store_instruction",
        "msr_store_instruction: wrmsr",
        "xor eax, eax",
        "xor edx, edx",
        "ret",
    )
}

unsafe extern "sysv64" {
    fn msr_instruction();
    fn msr_store_instruction();
    fn msr_refused();
}

#[repr(C)]
struct Answer {
    value: u64,
    refused: u64,
}

/// A model-specific register; None where the processor has none of that number.
pub(crate) fn read_msr(number: u32) -> Option<u64> {
    // SAFETY: reading one has no effect on memory, and its exception is expected.
    let answer = unsafe { try_read_msr(number) };
    (answer.refused == 0).then_some(answer.value)
}

/// Sets a model-specific register; false where the processor refuses.
///
/// # Safety
///
/// The hypervisor must not depend on what the register was.
pub(crate) unsafe fn write_msr(number: u32, value: u64) -> bool {
    // SAFETY: the caller's promise; its exception is expected.
    let answer = unsafe { try_write_msr(number, value) };
    answer.refused == 0
}
