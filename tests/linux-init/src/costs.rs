//! What a kernel's operations take, by the time-stamp counter: in a machine where each instruction takes the same, instructions.

#![expect(unsafe_code, reason = "UNSAFETY: the time-stamp counter, the kernel's own way into it")]

use crate::console::line;
use crate::files::open;
use crate::processes::{execs, forks};
use crate::signals::{USER, count, handle};
use crate::start::Arguments;
use crate::suite::{Failure, Verdict, check};
use crate::system::{
    Memory, PAGE, PRIVATE, READABLE, WRITABLE, address_mut, call, child, close, number,
    pipe as new_pipe, read, wait, write,
};
use core::arch::asm;
use core::arch::x86::_rdtsc;

/// Each operation is timed in so many rounds, of which the fastest counts: no clock's interrupt came into it.
const ROUNDS: u32 = 24;

/// The number in the kernel's vector under which it says where its own way for system calls begins.
const SYSINFO: u32 = 32;

/// So many ticks for doing something so many times.
struct Took {
    ticks: u64,
    times: u32,
}

type Operation = fn(&Arguments) -> Result<Took, Failure>;

/// The operations.
const OPERATIONS: [(&str, Operation); 12] = [
    ("getpid by int 80h", by_interrupt),
    ("getpid by sysenter", by_sysenter),
    ("read a byte", read_byte),
    ("write a byte", write_byte),
    ("open and close", open_and_close),
    ("poll two pipes", poll),
    ("page fault", page_fault),
    ("mprotect", mprotect),
    ("signal", signal),
    ("pipe round trip", pipe),
    ("fork, exit", |_| time(4, || forks(1))),
    ("fork, exec, exit", |_| time(2, || execs(1))),
];

/// Says what each takes, and counts those that fail.
pub(crate) fn say(arguments: &Arguments) -> u32 {
    let mut failed = 0;
    for (name, operation) in OPERATIONS {
        match operation(arguments) {
            Ok(Took { ticks, times }) => line!("cost {name}: {ticks} ticks for {times}"),
            Err(Failure(reason, number)) => {
                line!("cost {name} FAILED: {reason} ({number})");
                failed += 1;
            }
        }
    }
    failed
}

fn ticks() -> u64 {
    // SAFETY: programs may read the counter.
    unsafe { _rdtsc() }
}

/// Does something so many times in each round.
fn time(times: u32, mut once: impl FnMut() -> Verdict) -> Result<Took, Failure> {
    let mut fastest = u64::MAX;
    for _ in 0..ROUNDS {
        let start = ticks();
        for _ in 0..times {
            once()?;
        }
        fastest = fastest.min(ticks() - start);
    }
    Ok(Took { ticks: fastest, times })
}

fn by_interrupt(_: &Arguments) -> Result<Took, Failure> {
    time(64, || {
        call(number::GETPID, &[]);
        Ok(())
    })
}

fn by_sysenter(arguments: &Arguments) -> Result<Took, Failure> {
    let way = arguments.auxiliary(SYSINFO).ok_or(Failure("the kernel has no way of its own", 0))?;
    let own = call(number::GETPID, &[]);
    time(64, || {
        let seen: i32;
        // SAFETY: the kernel's code there takes what `int 80h` takes, and changes nothing but EAX.
        unsafe { asm!("call {way}", way = in(reg) way, inout("eax") number::GETPID => seen) };
        check!(seen == own, "another number", seen);
        Ok(())
    })
}

fn read_byte(_: &Arguments) -> Result<Took, Failure> {
    let file = open("/dev/zero\0", 0)?;
    let took = time(64, || {
        check!(read(file, &mut [0]) == 1, "read fails");
        Ok(())
    });
    close(file);
    took
}

fn write_byte(_: &Arguments) -> Result<Took, Failure> {
    const WRITE_ONLY: u32 = 1;
    let file = open("/dev/zero\0", WRITE_ONLY)?;
    let took = time(64, || {
        check!(write(file, &[0]) == 1, "write fails");
        Ok(())
    });
    close(file);
    took
}

fn open_and_close(_: &Arguments) -> Result<Took, Failure> {
    time(16, || {
        close(open("/dev/zero\0", 0)?);
        Ok(())
    })
}

fn poll(_: &Arguments) -> Result<Took, Failure> {
    const INPUT: u32 = 1;
    let pipes = [0; 2].map(|_| new_pipe());
    let [Some(first), Some(second)] = pipes else { return Err(Failure("pipe fails", 0)) };
    let mut wanted = [first[0], INPUT, second[0], INPUT];
    let took = time(32, || {
        let ready = call(number::POLL, &[address_mut(&mut wanted), 2, 0]);
        check!(ready == 0, "something is there", ready);
        Ok(())
    });
    first.into_iter().chain(second).for_each(close);
    took
}

fn page_fault(_: &Arguments) -> Result<Took, Failure> {
    const PAGES: usize = 16;
    let took = time(1, || {
        let memory = Memory::map(PAGES * PAGE, READABLE | WRITABLE, PRIVATE)
            .ok_or(Failure("mmap fails", 0))?;
        memory.pages().for_each(|page| memory.set(page, 1));
        check!(memory.unmap() == 0, "munmap fails");
        Ok(())
    })?;
    Ok(Took { times: PAGES as u32, ..took })
}

fn mprotect(_: &Arguments) -> Result<Took, Failure> {
    let memory = Memory::map(PAGE, READABLE | WRITABLE, PRIVATE).ok_or(Failure("mmap fails", 0))?;
    memory.set(0, 1);
    let took = time(16, || {
        check!(memory.protect(READABLE) == 0, "mprotect fails");
        check!(memory.protect(READABLE | WRITABLE) == 0, "mprotect fails");
        memory.set(0, 2);
        Ok(())
    });
    check!(memory.unmap() == 0, "munmap fails");
    took
}

fn signal(_: &Arguments) -> Result<Took, Failure> {
    handle(USER, count, 0)?;
    let own = call(number::GETPID, &[]) as u32;
    time(16, || {
        check!(call(number::KILL, &[own, USER]) == 0, "kill fails");
        Ok(())
    })
}

/// A child sends each byte back.
fn pipe(_: &Arguments) -> Result<Took, Failure> {
    let pipes = [0; 2].map(|_| new_pipe());
    let [Some(to), Some(from)] = pipes else { return Err(Failure("pipe fails", 0)) };
    let process = child(|| {
        close(to[1]);
        let mut byte = [0];
        while read(to[0], &mut byte) == 1 {
            write(from[1], &byte);
        }
        0
    });
    let took = time(8, || {
        let mut byte = [7];
        check!(write(to[1], &byte) == 1 && read(from[0], &mut byte) == 1, "a byte is lost");
        Ok(())
    });
    to.into_iter().chain(from).for_each(close);
    let status = wait(process);
    check!(status == 0, "the child fails", status);
    took
}
