//! AMD64 Architecture Programmer's Manual, volume 2, chapter 15 and appendix B: the virtual machine control block, and the way
//! into the guest and back.

#![expect(unsafe_code, reason = "UNSAFETY: VMRUN and what belongs to it")]

use bitflags::bitflags;
use core::arch::{asm, naked_asm};
use core::mem::{offset_of, size_of};
use static_assertions::const_assert_eq;

/// MSRs.
pub(crate) const VM_CR: u32 = 0xc001_0114;
pub(crate) const VM_HSAVE_PA: u32 = 0xc001_0117;

/// In EFER: SVM is on.
pub(crate) const SVM_ENABLE: u64 = 1 << 12;

/// In VM_CR: SVM cannot be turned on.
pub(crate) const SVM_DISABLED: u64 = 1 << 4;

/// In [`Control::tlb_control`]: forget everything at VMRUN.
pub(crate) const FLUSH_ALL: u8 = 1;

/// In [`Control::nested_enable`].
pub(crate) const NESTED_PAGING: u64 = 1;

/// In [`Control::exit_interrupt`] and [`Control::event_injection`].
pub(crate) const EVENT_VALID: u64 = 1 << 31;
pub(crate) const EVENT_HAS_CODE: u64 = 1 << 11;

/// The types of an event, in bits 8 to 10.
pub(crate) const EVENT_INTERRUPT: u64 = 0;
pub(crate) const EVENT_NMI: u64 = 2;
pub(crate) const EVENT_EXCEPTION: u64 = 3;

bitflags! {
    /// The intercepts at 00Ch and, from bit 32 on, at 010h.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Intercepts: u64 {
        const NMI = 1 << 1;
        const CR0_SELECTIVE = 1 << 5;
        const CPUID = 1 << 18;
        const INVLPG = 1 << 25;
        const INVLPGA = 1 << 26;
        const PORTS = 1 << 27;
        const MSRS = 1 << 28;
        const TASK_SWITCH = 1 << 29;
        const SHUTDOWN = 1 << 31;
        const VMRUN = 1 << 32;
        const VMMCALL = 1 << 33;
        const VMLOAD = 1 << 34;
        const VMSAVE = 1 << 35;
        const STGI = 1 << 36;
        const CLGI = 1 << 37;
        const SKINIT = 1 << 38;
    }
}

/// Exit codes. An exception's is [`exit::EXCEPTION`] and its vector.
pub(crate) mod exit {
    pub(crate) const CR_READ: u64 = 0x00;
    pub(crate) const CR_WRITE: u64 = 0x10;
    pub(crate) const EXCEPTION: u64 = 0x40;
    pub(crate) const PAGE_FAULT: u64 = EXCEPTION + 14;
    pub(crate) const NMI: u64 = 0x61;
    pub(crate) const CR0_SELECTIVE: u64 = 0x65;
    pub(crate) const CPUID: u64 = 0x72;
    pub(crate) const INVLPG: u64 = 0x79;
    pub(crate) const INVLPGA: u64 = 0x7a;
    pub(crate) const PORT: u64 = 0x7b;
    pub(crate) const MSR: u64 = 0x7c;
    pub(crate) const TASK_SWITCH: u64 = 0x7d;
    pub(crate) const SHUTDOWN: u64 = 0x7f;
    pub(crate) const VMRUN: u64 = 0x80;
    pub(crate) const VMMCALL: u64 = 0x81;
    pub(crate) const SKINIT: u64 = 0x86;
    pub(crate) const NESTED_PAGE_FAULT: u64 = 0x400;
    pub(crate) const INVALID: u64 = u64::MAX;
    /// The same from QEMU, which writes the lower half.
    pub(crate) const INVALID_LOW: u64 = u32::MAX as u64;
}

/// The control area.
#[repr(C)]
pub(crate) struct Control {
    pub(crate) cr_reads: u16,
    pub(crate) cr_writes: u16,
    dr_accesses: u32,
    pub(crate) exceptions: u32,
    intercepts_low: u32,
    intercepts_high: u32,
    reserved_014: [u8; 0x2c],
    pub(crate) port_map: u64,
    pub(crate) msr_map: u64,
    tsc_offset: u64,
    pub(crate) address_space: u32,
    pub(crate) tlb_control: u8,
    reserved_05d: [u8; 3],
    virtual_interrupt: u64,
    pub(crate) interrupt_shadow: u64,
    pub(crate) exit_code: u64,
    pub(crate) exit_info_1: u64,
    pub(crate) exit_info_2: u64,
    pub(crate) exit_interrupt: u64,
    pub(crate) nested_enable: u64,
    reserved_098: [u8; 0x10],
    pub(crate) event_injection: u64,
    pub(crate) nested_cr3: u64,
    last_branch: u64,
    clean: u64,
    reserved_0c8: [u8; 0x338],
}

impl Control {
    pub(crate) fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.intercepts_low = intercepts.bits() as u32;
        self.intercepts_high = (intercepts.bits() >> 32) as u32;
    }

    pub(crate) fn intercepts(&self) -> Intercepts {
        let bits = u64::from(self.intercepts_high) << 32 | u64::from(self.intercepts_low);
        Intercepts::from_bits_retain(bits)
    }
}

/// A segment register: the attributes are bits 40 to 47 and 52 to 55 of a descriptor.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Segment {
    pub(crate) selector: u16,
    pub(crate) attributes: u16,
    pub(crate) limit: u32,
    pub(crate) base: u64,
}

/// In a segment's attributes: code and stack of 32 bits.
pub(crate) const SEGMENT_32_BIT: u16 = 1 << 10;

/// The state save area.
#[repr(C)]
pub(crate) struct State {
    pub(crate) es: Segment,
    pub(crate) cs: Segment,
    pub(crate) ss: Segment,
    pub(crate) ds: Segment,
    pub(crate) fs: Segment,
    pub(crate) gs: Segment,
    pub(crate) gdtr: Segment,
    pub(crate) ldtr: Segment,
    pub(crate) idtr: Segment,
    pub(crate) tr: Segment,
    reserved_4a0: [u8; 0x2b],
    pub(crate) cpl: u8,
    reserved_4cc: [u8; 4],
    pub(crate) efer: u64,
    reserved_4d8: [u8; 0x70],
    pub(crate) cr4: u64,
    pub(crate) cr3: u64,
    pub(crate) cr0: u64,
    pub(crate) dr7: u64,
    pub(crate) dr6: u64,
    pub(crate) rflags: u64,
    pub(crate) rip: u64,
    reserved_580: [u8; 0x58],
    pub(crate) rsp: u64,
    reserved_5e0: [u8; 0x18],
    pub(crate) rax: u64,
    star: u64,
    lstar: u64,
    cstar: u64,
    sfmask: u64,
    kernel_gs_base: u64,
    sysenter_cs: u64,
    sysenter_esp: u64,
    sysenter_eip: u64,
    pub(crate) cr2: u64,
    reserved_648: [u8; 0x20],
    pub(crate) guest_pat: u64,
    reserved_670: [u8; 0x990],
}

/// A virtual machine control block.
#[repr(C, align(4096))]
pub(crate) struct Vmcb {
    pub(crate) control: Control,
    pub(crate) state: State,
}

const_assert_eq!(offset_of!(Control, exceptions), 0x008);
const_assert_eq!(offset_of!(Control, intercepts_low), 0x00c);
const_assert_eq!(offset_of!(Control, port_map), 0x040);
const_assert_eq!(offset_of!(Control, address_space), 0x058);
const_assert_eq!(offset_of!(Control, interrupt_shadow), 0x068);
const_assert_eq!(offset_of!(Control, exit_code), 0x070);
const_assert_eq!(offset_of!(Control, exit_interrupt), 0x088);
const_assert_eq!(offset_of!(Control, nested_enable), 0x090);
const_assert_eq!(offset_of!(Control, event_injection), 0x0a8);
const_assert_eq!(offset_of!(Control, nested_cr3), 0x0b0);
const_assert_eq!(offset_of!(Control, reserved_0c8), 0x0c8);
const_assert_eq!(offset_of!(Vmcb, state), 0x400);
const_assert_eq!(offset_of!(State, tr), 0x490 - 0x400);
const_assert_eq!(offset_of!(State, cpl), 0x4cb - 0x400);
const_assert_eq!(offset_of!(State, efer), 0x4d0 - 0x400);
const_assert_eq!(offset_of!(State, cr4), 0x548 - 0x400);
const_assert_eq!(offset_of!(State, rip), 0x578 - 0x400);
const_assert_eq!(offset_of!(State, rsp), 0x5d8 - 0x400);
const_assert_eq!(offset_of!(State, rax), 0x5f8 - 0x400);
const_assert_eq!(offset_of!(State, cr2), 0x640 - 0x400);
const_assert_eq!(offset_of!(State, guest_pat), 0x668 - 0x400);
const_assert_eq!(size_of::<Vmcb>(), 4096);

/// A frame that is all zeros, or the structure that it becomes.
#[repr(C, align(4096))]
pub(crate) struct Zeroed<const SIZE: usize>(pub(crate) [u8; SIZE]);

/// The guest's registers that VMRUN leaves to the hypervisor, in the order of their encodings. RAX and RSP pass through the
/// control block.
pub(crate) type Registers = [u64; 8];

/// Their indices.
pub(crate) const RAX: usize = 0;
pub(crate) const RCX: usize = 1;
pub(crate) const RDX: usize = 2;
pub(crate) const RBX: usize = 3;
pub(crate) const RSP: usize = 4;
pub(crate) const RBP: usize = 5;
pub(crate) const RSI: usize = 6;
pub(crate) const RDI: usize = 7;

/// Runs the guest until its next exit.
///
/// In: RDI: the guest's registers, RSI: its control block, RDX: what [`save_host`] filled, physical addresses; GIF clear. Out: GIF clear, the
/// registers and the guest's control block as the guest left them. Changed: what the System V convention allows.
///
/// # Safety
///
/// The blocks are complete, and what the guest can reach is the guest's.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn enter(registers: *mut Registers, guest: u64, host: u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdx",
        "push rsi",
        "push rdi",
        "mov rax, rsi",
        "mov rcx, [rdi + 8 * {rcx}]",
        "mov rdx, [rdi + 8 * {rdx}]",
        "mov rbx, [rdi + 8 * {rbx}]",
        "mov rbp, [rdi + 8 * {rbp}]",
        "mov rsi, [rdi + 8 * {rsi}]",
        "mov rdi, [rdi + 8 * {rdi}]",
        "vmload rax",
        "vmrun rax",
        "xchg rdi, [rsp]",
        "mov [rdi + 8 * {rcx}], rcx",
        "mov [rdi + 8 * {rdx}], rdx",
        "mov [rdi + 8 * {rbx}], rbx",
        "mov [rdi + 8 * {rbp}], rbp",
        "mov [rdi + 8 * {rsi}], rsi",
        "pop rcx",
        "mov [rdi + 8 * {rdi}], rcx",
        "pop rax",
        "vmsave rax",
        "pop rax",
        "vmload rax",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "cld",
        "ret",
        rcx = const RCX,
        rdx = const RDX,
        rbx = const RBX,
        rbp = const RBP,
        rsi = const RSI,
        rdi = const RDI,
    )
}

/// Holds back everything that could interrupt the hypervisor.
pub(crate) fn clear_global_interrupt_flag() {
    // SAFETY: SVM is on; nothing the hypervisor does waits for an interrupt.
    unsafe { asm!("clgi", options(nomem, nostack)) }
}

/// Saves the hypervisor's state that VMLOAD brings back.
///
/// # Safety
///
/// `area` is the physical address of a frame for it.
pub(crate) unsafe fn save_host(area: u64) {
    // SAFETY: the caller's promise; SVM is on.
    unsafe { asm!("vmsave rax", in("rax") area, options(nostack)) }
}
