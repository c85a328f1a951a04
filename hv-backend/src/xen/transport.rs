//! Xen itself: hypercalls as instructions, and memory.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: hypercalls, and memory at addresses that the guest or Xen named"
)]

use super::interface::{
    DOMID_SELF, FORCED_EMULATION, HYPERCALL_VECTOR, MmuExtOp, MmuUpdate, MulticallEntry, TrapInfo,
    console, hypercall, sched,
};
use super::machine::Machine;
use core::arch::asm;
use core::arch::x86::_rdtsc;
use core::cell::Cell;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

/// The virtual processor that runs this.
#[derive(Clone, Copy, Debug)]
pub struct Cpu;

/// A hypercall. Xen may change the registers of its arguments.
///
/// # Safety
///
/// What Xen does for it is what the caller wants, and the memory that it names is the caller's.
#[inline(always)]
unsafe fn call(number: u32, [a, b, c, d]: [u32; 4]) -> i32 {
    let result;
    // SAFETY: the caller's. ESI is the compiler's own, so it is kept here.
    unsafe {
        asm!(
            "pushl %esi",
            "movl %edi, %esi",
            "int ${vector}",
            "popl %esi",
            vector = const HYPERCALL_VECTOR,
            inlateout("eax") number => result,
            inlateout("ebx") a => _,
            inlateout("ecx") b => _,
            inlateout("edx") c => _,
            inlateout("edi") d => _,
            options(att_syntax),
        );
    }
    result
}

/// The linear address of something that Xen is to read or write.
#[inline(always)]
fn address<T: ?Sized>(there: *const T) -> u32 {
    there.expose_provenance() as u32
}

impl Machine for Cpu {
    #[inline(always)]
    fn load(&self, address: u32) -> u32 {
        // SAFETY: memory of the guest's or of Xen's, which the guest's mappings lead to.
        unsafe { with_exposed_provenance::<u32>(address as usize).read_volatile() }
    }

    #[inline(always)]
    fn store(&self, address: u32, value: u32) {
        // SAFETY: as above; what is there is the caller's to change.
        unsafe { with_exposed_provenance_mut::<u32>(address as usize).write_volatile(value) }
    }

    fn store_long(&self, address: u32, value: u64) {
        // SAFETY: as above. What it reads first is only guessed, and read by the instruction itself if the guess is wrong.
        unsafe {
            asm!(
                "2: lock cmpxchg8b ({there})",
                "jne 2b",
                there = in(reg) address,
                inout("eax") 0 => _,
                inout("edx") 0 => _,
                in("ebx") value as u32,
                in("ecx") (value >> 32) as u32,
                options(att_syntax, nostack),
            );
        }
    }

    fn clear_bits(&self, address: u32, bits: u32) -> u32 {
        let there: *mut u32 = with_exposed_provenance_mut(address as usize);
        // SAFETY: as above.
        let word = unsafe { core::sync::atomic::AtomicU32::from_ptr(there) };
        word.fetch_and(!bits, core::sync::atomic::Ordering::SeqCst)
    }

    fn set_bits(&self, address: u32, bits: u32) -> u32 {
        let there: *mut u32 = with_exposed_provenance_mut(address as usize);
        // SAFETY: as above.
        let word = unsafe { core::sync::atomic::AtomicU32::from_ptr(there) };
        word.fetch_or(bits, core::sync::atomic::Ordering::SeqCst)
    }

    #[inline(always)]
    fn hypercall(&self, number: u32, arguments: [u32; 4]) -> i32 {
        // SAFETY: the callers' arguments are numbers.
        unsafe { call(number, arguments) }
    }

    fn operate(&self, number: u32, command: u32, words: &mut [u32]) -> i32 {
        if number == hypercall::VCPU_OP {
            // SAFETY: of the first processor; Xen reads the words.
            return unsafe { call(number, [command, 0, address(words), 0]) };
        }
        // SAFETY: Xen reads and writes the words.
        unsafe { call(number, [command, address(words), 0, 0]) }
    }

    fn mmu_update(&self, updates: &[Cell<MmuUpdate>]) -> (i32, u32) {
        let mut done = 0_u32;
        let arguments =
            [address(updates), updates.len() as u32, address(&raw mut done), DOMID_SELF];
        // SAFETY: Xen reads the updates, and writes how many it applied.
        let status = unsafe { call(hypercall::MMU_UPDATE, arguments) };
        (status, done)
    }

    fn mmuext_op(&self, operation: MmuExtOp) -> i32 {
        let operation = Cell::new(operation);
        let [a, b, c, d, ..] = self.mmuext_arguments(&operation);
        // SAFETY: Xen reads the operation.
        unsafe { call(hypercall::MMUEXT_OP, [a, b, c, d]) }
    }

    fn multicall(&self, calls: &[Cell<MulticallEntry>]) -> i32 {
        // SAFETY: Xen reads the calls, and writes their results; each was built for what it does.
        unsafe { call(hypercall::MULTICALL, [address(calls), calls.len() as u32, 0, 0]) }
    }

    fn mmuext_arguments(&self, operation: &Cell<MmuExtOp>) -> [u32; 6] {
        [address(operation.as_ptr()), 1, 0, DOMID_SELF, 0, 0]
    }

    fn set_trap_table(&self, traps: Option<&[Cell<TrapInfo>]>) -> i32 {
        let traps = traps.map_or(0, |traps| address(traps));
        // SAFETY: Xen reads as far as the one that ends them.
        unsafe { call(hypercall::SET_TRAP_TABLE, [traps, 0, 0, 0]) }
    }

    fn set_gdt(&self, frame: u32, entries: u32) -> i32 {
        // SAFETY: Xen reads the list of one frame.
        unsafe { call(hypercall::SET_GDT, [address(&raw const frame), entries, 0, 0]) }
    }

    #[inline(always)]
    fn time_stamp(&self) -> u64 {
        // SAFETY: every processor that Xen runs on has it.
        unsafe { _rdtsc() }
    }

    #[inline(always)]
    fn stack_selector(&self) -> u32 {
        let selector;
        // SAFETY: reading it changes nothing.
        unsafe {
            asm!("movl %ss, {}", out(reg) selector, options(att_syntax, nomem, nostack, preserves_flags));
        }
        selector
    }

    fn control(&self) -> (u32, u32, u32) {
        let (cr0, cr3, cr4);
        // SAFETY: Xen emulates reading them, which changes nothing.
        unsafe {
            asm!(
                "movl %cr0, {}",
                "movl %cr3, {}",
                "movl %cr4, {}",
                out(reg) cr0,
                out(reg) cr3,
                out(reg) cr4,
                options(att_syntax, nomem, nostack, preserves_flags),
            );
        }
        (cr0, cr3, cr4)
    }

    fn say(&self, text: &[Cell<u8>]) {
        let arguments = [console::WRITE, text.len() as u32, address(text), 0];
        // SAFETY: Xen reads the text, and refuses if this domain has no console. Then nobody hears it.
        unsafe { call(hypercall::CONSOLE_IO, arguments) };
    }

    fn shut_down(&self, reason: u32) -> ! {
        loop {
            // SAFETY: Xen reads the reason. Nothing goes on from here.
            unsafe {
                call(hypercall::SCHED_OP, [sched::SHUTDOWN, address(&raw const reason), 0, 0])
            };
        }
    }
}

/// CPUID as Xen answers it: EAX, EBX, ECX, EDX. Where Xen is not below, it is an invalid instruction.
#[must_use]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let [mut eax, ebx, mut ecx, edx];
    eax = leaf;
    ecx = subleaf;
    // SAFETY: it changes nothing. The caller knows that Xen is there.
    unsafe {
        asm!(
            ".byte {0}, {1}, {2}, {3}, {4}",
            "cpuid",
            const FORCED_EMULATION[0],
            const FORCED_EMULATION[1],
            const FORCED_EMULATION[2],
            const FORCED_EMULATION[3],
            const FORCED_EMULATION[4],
            inlateout("eax") eax,
            lateout("ebx") ebx,
            inlateout("ecx") ecx,
            lateout("edx") edx,
            options(nostack, preserves_flags),
        );
    }
    [eax, ebx, ecx, edx]
}
