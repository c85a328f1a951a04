//! Segments, and what interrupts.

use super::{VMI, devices, process};
use core::arch::{asm, global_asm, naked_asm};
use vmi_abi::state::DescriptorTable;
use vmi_abi::vmi::Calls;
use vmi_abi::{RelocationType, number};

/// Selectors. To the kernel's own its ring is added: a hypervisor's ROM may run it in another than 0.
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
pub(super) const USER_CODE: u16 = 0x1b;
pub(super) const USER_DATA: u16 = 0x23;
const TASK: u16 = 0x28;

/// Vectors: the timer's, and that of processes.
const TICK: u32 = devices::IRQ_BASE as u32;
const SYSTEM_CALL: u32 = 0x80;

/// A table that the processor reads, on pages of its own as VMI wants it.
#[repr(C, align(4096))]
struct Table<const N: usize>([u64; N]);

static mut SEGMENTS: Table<6> = Table([0; 6]);
static mut INTERRUPTS: Table<{ SYSTEM_CALL as usize + 1 }> = Table([0; SYSTEM_CALL as usize + 1]);

/// The task state segment in words. No port is open to processes: the bitmap begins behind the limit.
pub(super) static mut TASK_STATE: [u32; TASK_WORDS] = {
    let mut words = [0; TASK_WORDS];
    words[BITMAP] = (TASK_WORDS as u32 * 4) << 16;
    words
};
const TASK_WORDS: usize = 26;
/// Words for SS of the stack on which processes are interrupted, and for the place of the bitmap.
const SS0: usize = 2;
const BITMAP: usize = 25;

/// An interrupted context, as the entry code and the processor push it. DS and ES are the same for all
/// processes, and set anew at each interrupt; FS and GS are nobody's.
#[derive(Default)]
#[repr(C)]
pub(super) struct Frame {
    pub(super) edi: u32,
    pub(super) esi: u32,
    pub(super) ebp: u32,
    /// ESP as PUSHAD saw it: not the interrupted one.
    pub(super) esp_inside: u32,
    pub(super) ebx: u32,
    pub(super) edx: u32,
    pub(super) ecx: u32,
    pub(super) eax: u32,
    pub(super) vector: u32,
    pub(super) error: u32,
    pub(super) eip: u32,
    pub(super) cs: u32,
    pub(super) eflags: u32,
    /// From here on only when a process was interrupted.
    pub(super) esp: u32,
    pub(super) ss: u32,
}

/// A table as SetGDT and SetIDT want it named.
fn named<const N: usize>(table: *const Table<N>) -> DescriptorTable {
    DescriptorTable { limit: (N as u16 * 8 - 1).into(), base: (table as u32).into() }
}

/// Fills the tables and has the processor use them.
pub(super) fn initialize() {
    let (code, stubs): (u32, u32);
    // SAFETY: takes a selector and an address.
    unsafe { asm!("mov {}, cs", "mov {}, offset stubs", out(reg) code, out(reg) stubs) };
    let ring = code as u16 & 3;
    let (code, data) = (u32::from(KERNEL_CODE | ring), u32::from(KERNEL_DATA | ring));
    let (segments, interrupts) = (&raw mut SEGMENTS, &raw mut INTERRUPTS);
    let (task, limit) = ((&raw const TASK_STATE) as u32, TASK_WORDS as u32 * 4 - 1);
    // SAFETY: the tables are statics to which nothing but calls write. The new segments mean what the
    // loader's meant, and each vector leads to its stub.
    unsafe {
        for (selector, low, high) in [
            // Flat segments, accessed already, so that the processor need not write to the table.
            (KERNEL_CODE, 0x0000_ffff, 0x00cf_9b00),
            (KERNEL_DATA, 0x0000_ffff, 0x00cf_9300),
            (USER_CODE, 0x0000_ffff, 0x00cf_fb00),
            (USER_DATA, 0x0000_ffff, 0x00cf_f300),
            (TASK, task << 16 | limit, task & 0xff00_0000 | 0x8900 | task >> 16 & 0xff),
        ] {
            VMI.WriteGDTEntry(segments as u32, u32::from(selector >> 3), low, high);
        }
        for vector in 0..=SYSTEM_CALL {
            let handler = stubs + vector * STUB_SIZE;
            let gate = if vector == SYSTEM_CALL { 0xee00 } else { 0x8e00 };
            let (low, high) = (code << 16 | handler & 0xffff, handler & 0xffff_0000 | gate);
            VMI.WriteIDTEntry(interrupts as u32, vector, low, high);
        }
        TASK_STATE[SS0] = data;
        let (segments, interrupts) = (named(segments), named(interrupts));
        VMI.SetGDT((&raw const segments) as u32);
        VMI.SetIDT((&raw const interrupts) as u32);
        asm!(
            "push {code}",
            "call 2f",
            "jmp 3f",
            "2: retf", // The return address and the selector are a far pointer.
            "3: mov ss, {data:x}",
            "mov ds, {user_data:x}",
            "mov es, {user_data:x}",
            code = in(reg) code,
            data = in(reg) data,
            user_data = in(reg) u32::from(USER_DATA),
        );
        VMI.SetTR(TASK.into());
    }
}

/// Bytes of a stub.
const STUB_SIZE: u32 = 16;

// A stub for each vector pushes what the processor leaves out, an error code for all but exceptions 8, 10 to
// 14, 17, 21, 29 and 30, and the vector.
global_asm!(
    ".set vector, 0",
    ".balign {size}",
    "stubs: .rept {count}",
    ".balign {size}",
    ".if vector > 31 || !((1 << vector) & 0x60227d00)",
    "push 0",
    ".endif",
    "push vector",
    "jmp {interrupted}",
    ".set vector, vector + 1",
    ".endr",
    size = const STUB_SIZE,
    count = const SYSTEM_CALL + 1,
    interrupted = sym interrupted,
);

/// Saves the context in a [`Frame`], calls [`handle`], and goes on with the context that it answers.
#[unsafe(naked)]
unsafe extern "C" fn interrupted() {
    naked_asm!(
        "pushad",
        "mov eax, {data}",
        "mov ds, eax",
        "mov es, eax",
        "cld",
        "push esp",
        "call {handle}",
        "push eax",
        "call {resume}",
        data = const USER_DATA,
        handle = sym handle,
        resume = sym resume,
    )
}

/// Goes on with an interrupted context. The last instruction is VMI's IRET, reached in the way in which it is
/// bound. Every register is the context's by then, so the table is read through SS, which is always flat.
///
/// # Safety
///
/// The frame is that of a sound context, and the last thing on its stack.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn resume(frame: *mut Frame) -> ! {
    naked_asm!(
        "mov esp, [esp + 4]",
        "popad",
        "add esp, 8", // The vector and the error.
        "cmp byte ptr ss:[{vmi} + {kind}], {jump}",
        "je 2f",
        "call dword ptr ss:[{vmi} + {eip}]",
        "2: jmp dword ptr ss:[{vmi} + {eip}]",
        vmi = sym VMI,
        kind = const Calls::kind_offset(number::IRET),
        eip = const Calls::eip_offset(number::IRET),
        jump = const RelocationType::JUMP_REL.0,
    )
}

/// What interrupts mean. Answers the context that the processor goes on with.
extern "C" fn handle(frame: *mut Frame) -> *mut Frame {
    // SAFETY: the entry code has just pushed it.
    let context = unsafe { &mut *frame };
    let Frame { vector, error, eip, .. } = *context;
    match vector {
        TICK => return process::tick(frame),
        SYSTEM_CALL => process::system_call(context),
        _ => panic!("exception {vector} at {eip:#x}, error {error:#x}, CR2 {:#x}", VMI.GetCR2()),
    }
    frame
}
