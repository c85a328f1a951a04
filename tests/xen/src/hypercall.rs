//! Hypercalls.

#![expect(unsafe_code, reason = "UNSAFETY: asks Xen to change what the loader runs on")]

use core::arch::asm;
use vmi_hv_backend::xen::interface::{
    self as xen, Entry, HYPERCALL_VECTOR, MachphysMapping, VIRTUAL_TOP, hypercall, uvmf,
};

/// Makes a hypercall.
///
/// # Safety
///
/// Pointers among the arguments lead to what the call reads and writes, and what it does leaves the loader's own memory as it is.
unsafe fn make(number: u32, arguments: [u32; 4]) -> i32 {
    let result;
    // SAFETY: by the caller's word. Xen changes no register but EAX. EBX and ESI are the compiler's own, so they are saved.
    unsafe {
        asm!(
            "push ebx",
            "push esi",
            "mov ebx, [edi]",
            "mov ecx, [edi + 4]",
            "mov edx, [edi + 8]",
            "mov esi, [edi + 12]",
            "int {vector}",
            "pop esi",
            "pop ebx",
            vector = const HYPERCALL_VECTOR,
            inlateout("eax") number => result,
            in("edi") arguments.as_ptr(),
            out("ecx") _,
            out("edx") _,
        );
    }
    result
}

/// Writes to Xen's console.
pub(crate) fn write(text: &str) {
    let arguments = [xen::console::WRITE, text.len() as u32, text.as_ptr() as u32, 0];
    // SAFETY: Xen reads the text. Who could be told that it did not?
    unsafe { make(hypercall::CONSOLE_IO, arguments) };
}

/// Lets this domain use ports.
pub(crate) fn grant_ports() {
    let level: u32 = xen::KERNEL_RING.into();
    // SAFETY: Xen reads a word.
    let result = unsafe {
        make(hypercall::PHYSDEV_OP, [xen::physdev::SET_IOPL, &raw const level as u32, 0, 0])
    };
    assert!(result == 0, "Xen grants no ports: {result}");
}

/// Where Xen's part of the linear address space begins.
pub(crate) fn virtual_top() -> u32 {
    let mut mapping = MachphysMapping::default();
    let arguments = [xen::memory::MACHPHYS_MAPPING, &raw mut mapping as u32, 0, 0];
    // SAFETY: Xen writes the structure.
    match unsafe { make(hypercall::MEMORY_OP, arguments) } {
        0 => mapping.v_start,
        _ => VIRTUAL_TOP,
    }
}

/// Maps a machine frame at a linear address that has a page table.
///
/// # Safety
///
/// Nothing of the loader's own lies there.
pub(crate) unsafe fn map(linear: u32, frame: u32, bits: Entry) {
    let value = u64::from(frame) << xen::PAGE_SHIFT | bits.bits();
    let arguments = [linear, value as u32, (value >> 32) as u32, uvmf::INVLPG | uvmf::ALL];
    // SAFETY: by the caller's word.
    let result = unsafe { make(hypercall::UPDATE_VA_MAPPING, arguments) };
    assert!(result == 0, "Xen maps no frame {frame:#x} at {linear:#x}: {result}");
}

/// Ends the run as a failure: QEMU, where it is below, or else the domain, which Xen says on its console.
pub(crate) fn crash() -> ! {
    // What a debug console answers, and what its machine's exit device takes for a failure: as the guest has it.
    const DEBUG_PORT: u16 = 0xe9;
    const EXIT_PORT: u16 = 0xf4;
    const FAILURE: u32 = 0x12;
    let answer: u8;
    // SAFETY: the domain may use the ports, and nothing is at them but what QEMU has there.
    unsafe {
        asm!("in al, dx", in("dx") DEBUG_PORT, out("al") answer, options(nomem, nostack));
        if answer == DEBUG_PORT as u8 {
            asm!("out dx, eax", in("dx") EXIT_PORT, in("eax") FAILURE, options(nomem, nostack));
        }
    }
    let reason = xen::sched::SHUTDOWN_CRASH;
    loop {
        let arguments = [xen::sched::SHUTDOWN, &raw const reason as u32, 0, 0];
        // SAFETY: Xen reads a word, and ends us.
        unsafe { make(hypercall::SCHED_OP, arguments) };
    }
}
