//! Signals: from others, from the processor, from the clock.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: handlers, faults on purpose, statics that handlers write"
)]

use crate::suite::{Failure, Verdict, check};
use crate::system::{
    Memory, PAGE, PRIVATE, READABLE, WRITABLE, address, call, child, clock, give_way, number, wait,
};
use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// The signal that others send.
pub(crate) const USER: u32 = 10;

/// Numbers of the other signals.
const ILLEGAL: u32 = 4;
const TRAP: u32 = 5;
const ARITHMETIC: u32 = 8;
const SEGMENT: u32 = 11;
const ALARM: u32 = 14;

/// Flags of an action: with information, on the other stack, and with a routine for the way back.
const WITH_INFORMATION: u32 = 4;
const RESTORER: u32 = 0x0400_0000;
const OTHER_STACK: u32 = 0x0800_0000;

/// Words of the context that a handler gets: the flags of the C library's start, then the registers as of `sigcontext`.
const VECTOR: usize = 17;
const EIP: usize = 19;
const CS: usize = 20;
const EFLAGS: usize = 21;
const SS: usize = 23;

/// EFLAGS: a single step.
const SINGLE_STEP: u32 = 1 << 8;

/// Words of the information: the address of a fault.
const FAULT_ADDRESS: usize = 3;

static COUNT: AtomicU32 = AtomicU32::new(0);
static SEEN: AtomicU32 = AtomicU32::new(0);
static SKIP: AtomicU32 = AtomicU32::new(0);

/// Segments that a handler puts into its frame, if it does.
const KEPT: u32 = u32::MAX;
static CODE: AtomicU32 = AtomicU32::new(KEPT);
static STACK: AtomicU32 = AtomicU32::new(KEPT);

type Handler = extern "C" fn(u32, *const u32, *mut u32);

/// The way back from a handler.
///
/// In: ESP: behind the return address of the frame that the kernel made. Out: never, the interrupted program goes on.
#[unsafe(naked)]
unsafe extern "C" fn restorer() {
    naked_asm!("mov eax, {number}", "int 0x80", number = const number::RT_SIGRETURN)
}

/// Sets what is done at a signal.
pub(crate) fn handle(signal: u32, handler: Handler, flags: u32) -> Verdict {
    let action = [
        handler as *const () as u32,
        WITH_INFORMATION | RESTORER | flags,
        restorer as *const () as u32,
        0,
        0,
    ];
    act(signal, action)
}

/// Lets the kernel do what it does by itself.
fn handle_no_more(signal: u32) -> Verdict {
    act(signal, [0; 5])
}

/// Sets an action, in the kernel's words.
fn act(signal: u32, action: [u32; 5]) -> Verdict {
    let done = call(number::RT_SIGACTION, &[signal, address(&action), 0, 8]);
    check!(done == 0, "rt_sigaction fails", done);
    Ok(())
}

pub(crate) extern "C" fn count(_: u32, _: *const u32, _: *mut u32) {
    COUNT.fetch_add(1, SeqCst);
}

/// Signals of its own, and of a child.
pub(crate) fn handlers() -> Verdict {
    handle(USER, count, 0)?;
    COUNT.store(0, SeqCst);
    let own = call(number::GETPID, &[]) as u32;
    for round in 1..=200 {
        let done = call(number::KILL, &[own, USER]);
        check!(done == 0, "kill fails", done);
        check!(COUNT.load(SeqCst) == round, "a handler did not run", round);
    }
    let process = child(|| u32::from(call(number::KILL, &[own, USER]) != 0));
    let status = wait(process);
    check!(status == 0, "the child fails", status);
    check!(COUNT.load(SeqCst) == 201, "the child's signal did not come", COUNT.load(SeqCst));
    let process = child(|| {
        loop {
            call(number::PAUSE, &[]);
        }
    });
    check!(call(number::KILL, &[process as u32, 9]) == 0, "kill fails");
    let status = wait(process);
    check!(status == 9, "a killed process ends otherwise", status);
    Ok(())
}

/// Lets the faulting page be written.
extern "C" fn allow(_: u32, information: *const u32, _: *mut u32) {
    // SAFETY: the kernel's promise.
    let fault = unsafe { information.add(FAULT_ADDRESS).read() };
    COUNT.fetch_add(1, SeqCst);
    SEEN.store(fault, SeqCst);
    call(number::MPROTECT, &[fault & !(PAGE as u32 - 1), PAGE as u32, READABLE | WRITABLE]);
}

/// Stores to read-only pages: the handler makes each writable, and the store is done.
pub(crate) fn write_fault() -> Verdict {
    handle(SEGMENT, allow, 0)?;
    COUNT.store(0, SeqCst);
    let memory = Memory::map(64 * PAGE, READABLE, PRIVATE).ok_or(Failure("mmap fails", 0))?;
    for (index, page) in memory.pages().enumerate() {
        check!(memory.get(page) == 0, "new memory is not zero", page);
        memory.set(page + 8, 5);
        check!(memory.get(page + 8) == 5, "the store is not done", page);
        check!(SEEN.load(SeqCst) as usize == memory.start + page + 8, "another address", page);
        check!(COUNT.load(SeqCst) as usize == index + 1, "not one fault for each page", page);
    }
    check!(memory.unmap() == 0, "munmap fails");
    Ok(())
}

/// Counts, remembers the vector, goes on behind the instruction.
extern "C" fn skip(_: u32, _: *const u32, context: *mut u32) {
    COUNT.fetch_add(1, SeqCst);
    // SAFETY: the kernel's promise; the instruction has as many bytes as the test says.
    unsafe {
        SEEN.store(context.add(VECTOR).read(), SeqCst);
        *context.add(EIP) += SKIP.load(SeqCst);
        *context.add(EFLAGS) &= !SINGLE_STEP;
    }
}

/// Each exception of a program comes to its handler, on the other stack.
pub(crate) fn exceptions() -> Verdict {
    const OTHER_SIZE: usize = 16 * PAGE;
    let other =
        Memory::map(OTHER_SIZE, READABLE | WRITABLE, PRIVATE).ok_or(Failure("mmap fails", 0))?;
    let stack = [other.start as u32, 0, OTHER_SIZE as u32];
    check!(call(number::SIGALTSTACK, &[address(&stack), 0]) == 0, "sigaltstack fails");
    for signal in [ILLEGAL, TRAP, ARITHMETIC, SEGMENT] {
        handle(signal, skip, OTHER_STACK)?;
    }
    let expect = |vector: u32, bytes: u32, raise: fn()| {
        COUNT.store(0, SeqCst);
        SKIP.store(bytes, SeqCst);
        raise();
        check!(COUNT.load(SeqCst) == 1, "not one signal", COUNT.load(SeqCst));
        check!(SEEN.load(SeqCst) == vector, "another vector", SEEN.load(SeqCst));
        Ok(())
    };
    // In each the handler goes on behind the instruction, or the processor does.
    expect(0, 2, || {
        // SAFETY: the handler skips the instruction.
        unsafe { asm!("div ecx", in("ecx") 0, inout("eax") 1 => _, inout("edx") 0 => _) }
    })?;
    expect(1, 0, || {
        // SAFETY: the handler ends the single step.
        unsafe {
            asm!("pushfd", "or dword ptr [esp], {step}", "popfd", "nop", step = const SINGLE_STEP)
        }
    })?;
    expect(3, 0, || {
        // SAFETY: a breakpoint lies behind its instruction.
        unsafe { asm!("int3") }
    })?;
    expect(6, 2, || {
        // SAFETY: the handler skips the instruction.
        unsafe { asm!("ud2") }
    })?;
    expect(13, 1, || {
        // SAFETY: the handler skips the instruction.
        unsafe { asm!("hlt") }
    })?;
    expect(14, 2, || {
        // SAFETY: the handler skips the instruction.
        unsafe { asm!("mov eax, [ecx]", in("ecx") 16, out("eax") _) }
    })?;
    check!(other.unmap() == 0, "munmap fails");
    Ok(())
}

/// Changes what the program comes back to.
extern "C" fn spoil(_: u32, _: *const u32, context: *mut u32) {
    for (word, value) in [(CS, &CODE), (SS, &STACK)] {
        let value = value.load(SeqCst);
        if value != KEPT {
            // SAFETY: the kernel's promise.
            unsafe { *context.add(word) = value };
        }
    }
}

/// A handler changes the segments in its frame, so that the kernel's IRET faults: that ends the process, and nothing else.
pub(crate) fn frames() -> Verdict {
    /// A table of one's own: its selectors, by the places of its entries.
    const fn local(entry: u32) -> u32 {
        entry << 3 | 7
    }
    /// What an entry is: 32 bits, all of memory, usable; and what makes it code, or not present.
    const FLAT: u32 = 1 | 1 << 4 | 1 << 6;
    const EXECUTABLE: u32 = 2 << 1;
    const NOT_PRESENT: u32 = 1 << 5;
    let entries = [FLAT, FLAT | NOT_PRESENT, FLAT | EXECUTABLE | NOT_PRESENT];
    let (own_code, own_stack): (u32, u32);
    // SAFETY: reads two registers.
    unsafe { asm!("mov {0:e}, cs", "mov {1:e}, ss", out(reg) own_code, out(reg) own_stack) };
    // Code, stack, whether that is something to come back to.
    let frames = [
        (KEPT, KEPT, true),
        (KEPT, local(0), true),
        // None, outside of each table, one that is not there.
        (0, KEPT, false),
        (KEPT, 0, false),
        (0xfff8, KEPT, false),
        (KEPT, 0xfff8, false),
        (local(100), KEPT, false),
        (KEPT, local(100), false),
        // Of the wrong kind.
        (own_stack, KEPT, false),
        (KEPT, own_code, false),
        (local(0), KEPT, false),
        // Not present. One whose limit is too low would fault as well, but QEMU's translator does not look at limits.
        (KEPT, local(1), false),
        (local(2), KEPT, false),
        (local(2), local(1), false),
    ];
    let own = || call(number::GETPID, &[]) as u32;
    for (index, (code, stack, is_right)) in frames.into_iter().enumerate() {
        let process = child(|| {
            for (place, flags) in entries.into_iter().enumerate() {
                let entry = [place as u32, 0, 0xf_ffff, flags];
                if call(number::MODIFY_LDT, &[0x11, address(&entry), 16]) != 0 {
                    return 1;
                }
            }
            CODE.store(code, SeqCst);
            STACK.store(stack, SeqCst);
            // A test before this one has a handler for it.
            if handle_no_more(ILLEGAL).and(handle(USER, spoil, 0)).is_err() {
                return 2;
            }
            u32::from(call(number::KILL, &[own(), USER]) != 0) * 3
        });
        let status = wait(process);
        if is_right {
            check!(status == 0, "a right frame ends the process", status);
        } else {
            // An oops would end it by another signal.
            let number = (index as i32) << 16 | status;
            check!(status as u32 & 0x7f == ILLEGAL, "a bad frame ends otherwise", number);
        }
    }
    Ok(())
}

/// A timer interrupts a busy program.
pub(crate) fn timer() -> Verdict {
    handle(ALARM, count, 0)?;
    COUNT.store(0, SeqCst);
    let every = |microseconds: u32| {
        let times = [0, microseconds, 0, microseconds];
        call(number::SETITIMER, &[0, address(&times), 0])
    };
    check!(every(10_000) == 0, "setitimer fails");
    let start = clock();
    while COUNT.load(SeqCst) < 10 && clock() - start < 10_000_000_000 {
        core::hint::spin_loop();
    }
    check!(every(0) == 0, "setitimer fails");
    check!(COUNT.load(SeqCst) >= 10, "the timer does not come", COUNT.load(SeqCst));
    let took = clock() - start;
    check!(took >= 90_000_000, "ten ticks came too early", took);
    give_way();
    Ok(())
}
