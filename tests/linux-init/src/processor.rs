//! The processor's state: each process has its own.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: registers of the floating-point unit, segments, code that is made here"
)]

use crate::suite::{Failure, Verdict, check};
use crate::system::{
    EXECUTABLE, Memory, PAGE, PRIVATE, READABLE, WRITABLE, address, address_mut, call, child,
    give_way, number, wait,
};
use core::arch::asm;

/// Processes that compute at once.
const CROWD: usize = 6;

/// Loads numbers into the floating-point unit's and the vector unit's registers, gives way to others many times, and looks whether
/// they are still there.
fn compute(seed: u32) -> u32 {
    let vector = [seed, !seed, seed ^ 0x5555_5555, seed.wrapping_mul(3)];
    let (mut integer, mut after) = (seed, [0_u32; 4]);
    for _ in 0..200 {
        // SAFETY: the registers are nobody else's: the program is compiled without them.
        unsafe {
            asm!("fild dword ptr [{0}]", "movups xmm5, [{1}]", in(reg) &integer, in(reg) &vector);
        }
        give_way();
        // SAFETY: as above.
        unsafe {
            asm!(
                "fistp dword ptr [{0}]",
                "movups [{1}], xmm5",
                in(reg) &mut integer,
                in(reg) &mut after,
            );
        }
        if integer != seed || after != vector {
            return 1;
        }
    }
    0
}

/// Floating-point state over switches of processes.
pub(crate) fn floating_point() -> Verdict {
    let mut processes = [0; CROWD];
    for (index, process) in processes.iter_mut().enumerate() {
        *process = child(|| compute(index as u32 * 1000 + 7));
    }
    let own = compute(99);
    for process in processes {
        let status = wait(process);
        check!(status == 0, "a child's registers are damaged", status);
    }
    check!(own == 0, "the registers are damaged");
    Ok(())
}

/// A segment's description, as `set_thread_area` and `modify_ldt` take it; flags: 32 bits, usable.
fn description(entry: u32, base: usize) -> [u32; 4] {
    [entry, base as u32, PAGE as u32 - 1, 1 | 1 << 6]
}

/// Reads the first word of a segment by a selector.
fn first_word(selector: u32) -> u32 {
    let value;
    // SAFETY: nothing else uses FS.
    unsafe { asm!("mov fs, {0:x}", "mov {1}, fs:[0]", in(reg) selector, out(reg) value) };
    value
}

/// Segments of each process: in its thread area and in its local table, kept over switches.
pub(crate) fn segments() -> Verdict {
    let memory =
        Memory::map(2 * PAGE, READABLE | WRITABLE, PRIVATE).ok_or(Failure("mmap fails", 0))?;
    let work = |value: u32| -> Verdict {
        memory.set(0, value);
        memory.set(PAGE, value + 1);
        let mut thread = description(u32::MAX, memory.start);
        let done = call(number::SET_THREAD_AREA, &[address_mut(&mut thread)]);
        check!(done == 0, "set_thread_area fails", done);
        let local = description(2, memory.start + PAGE);
        let done = call(number::MODIFY_LDT, &[0x11, address(&local), 16]);
        check!(done == 0, "modify_ldt fails", done);
        let (global, local) = (thread[0] << 3 | 3, 2 << 3 | 7);
        for _ in 0..100 {
            let seen = first_word(global);
            check!(seen == value, "another thread area", seen);
            give_way();
            let again: u32;
            // SAFETY: FS holds the selector still, or a null one, which would fault.
            unsafe { asm!("mov {0}, fs:[0]", out(reg) again) };
            check!(again == value, "another thread area after a switch", again);
            let seen = first_word(local);
            check!(seen == value + 1, "another local table", seen);
            give_way();
        }
        Ok(())
    };
    let mut processes = [0; 4];
    for (index, process) in processes.iter_mut().enumerate() {
        *process = child(|| u32::from(work(index as u32 * 16 + 16).is_err()));
    }
    for process in processes {
        let status = wait(process);
        check!(status == 0, "a child sees other segments", status);
    }
    Ok(())
}

/// Code that is written while the program runs, and written again.
pub(crate) fn code() -> Verdict {
    /// MOV EAX, value; RET.
    const MOVE: u8 = 0xb8;
    const RETURN: u8 = 0xc3;
    let memory = Memory::map(PAGE, READABLE | WRITABLE | EXECUTABLE, PRIVATE)
        .ok_or(Failure("mmap fails", 0))?;
    for value in 0..100_u32 {
        let [first, second, third, fourth] = (value * 0x0101).to_le_bytes();
        memory.set(0, u32::from_le_bytes([MOVE, first, second, third]));
        memory.set(4, u32::from_le_bytes([fourth, RETURN, 0, 0]));
        let seen: u32;
        // SAFETY: the two instructions that were just written.
        unsafe { asm!("call {0}", in(reg) memory.start, lateout("eax") seen, clobber_abi("C")) };
        check!(seen == value * 0x0101, "old code runs", seen);
    }
    check!(memory.protect(READABLE | EXECUTABLE) == 0, "mprotect fails");
    check!(memory.unmap() == 0, "munmap fails");
    Ok(())
}
