//! Memory: what the kernel does with pages.

use crate::suite::{Failure, Verdict, check};
use crate::system::{Memory, PAGE, PRIVATE, READABLE, SHARED, WRITABLE, call, child, number, wait};

const READ_WRITE: u32 = READABLE | WRITABLE;

fn map(length: usize, sharing: u32) -> Result<Memory, Failure> {
    Memory::map(length, READ_WRITE, sharing).ok_or(Failure("mmap fails", 0))
}

/// A child writes to each page, and neither sees the other's.
pub(crate) fn copy_on_write() -> Verdict {
    let memory = map(256 * PAGE, PRIVATE)?;
    for page in memory.pages() {
        memory.set(page, page as u32);
    }
    let process = child(|| {
        let mut wrong = 0;
        for page in memory.pages() {
            wrong |= u32::from(memory.get(page) != page as u32);
            memory.set(page, !(page as u32));
        }
        for page in memory.pages() {
            wrong |= u32::from(memory.get(page) != !(page as u32)) << 1;
        }
        wrong
    });
    for page in memory.pages().step_by(2) {
        memory.set(page + 4, 7);
    }
    let status = wait(process);
    check!(status == 0, "the child saw other values", status);
    for page in memory.pages() {
        check!(memory.get(page) == page as u32, "the child's value came back", page);
    }
    check!(memory.unmap() == 0, "munmap fails");
    Ok(())
}

/// Memory that comes is zero, holds what is stored, and goes.
fn map_one(round: u32) -> Verdict {
    let memory = map(256 * PAGE, PRIVATE)?;
    for page in memory.pages() {
        check!(memory.get(page) == 0, "new memory is not zero", page);
        memory.set(page, round ^ page as u32);
    }
    for page in memory.pages() {
        check!(memory.get(page) == round ^ page as u32, "memory forgets", page);
    }
    check!(memory.unmap() == 0, "munmap fails");
    Ok(())
}

/// Memory comes and goes, many times.
pub(crate) fn map_many() -> Verdict {
    (1..=16).try_for_each(map_one)
}

/// Protections of 256 pages change and change back, three times in each round.
pub(crate) fn protects(rounds: u32) -> Verdict {
    let memory = map(256 * PAGE, PRIVATE)?;
    for page in memory.pages() {
        memory.set(page, page as u32 + 1);
    }
    for round in 0..rounds {
        check!(memory.protect(READABLE) == 0, "mprotect fails");
        for page in memory.pages() {
            check!(memory.get(page) == page as u32 + 1 + round, "memory forgets", page);
        }
        check!(memory.protect(0) == 0, "mprotect fails");
        check!(memory.protect(READ_WRITE) == 0, "mprotect fails");
        for page in memory.pages() {
            memory.set(page, page as u32 + 2 + round);
        }
    }
    // What is forbidden ends the one who does it, by SIGSEGV.
    check!(memory.protect(READABLE) == 0, "mprotect fails");
    let status = wait(child(|| {
        memory.set(PAGE, 0);
        0
    }));
    check!(status & 0x7f == 11, "a store to a read-only page does not end a process", status);
    check!(memory.unmap() == 0, "munmap fails");
    Ok(())
}

/// A mapping that grows and moves keeps what it holds.
pub(crate) fn remap() -> Verdict {
    const MAY_MOVE: u32 = 1;
    let mut memory = map(16 * PAGE, PRIVATE)?;
    for page in memory.pages() {
        memory.set(page, page as u32 ^ 0x5555);
    }
    for pages in [32, 64, 512, 1024, 64] {
        let length = pages * PAGE;
        // Whatever lies behind it makes it move.
        let obstacle = map(PAGE, PRIVATE)?;
        let start = call(
            number::MREMAP,
            &[memory.start as u32, memory.length as u32, length as u32, MAY_MOVE, 0],
        );
        check!(!(-4095..0).contains(&start), "mremap fails", start);
        memory = Memory { start: start as usize, length };
        for page in memory.pages().take(16) {
            check!(memory.get(page) == page as u32 ^ 0x5555, "moved memory forgets", page);
        }
        check!(memory.get(length - PAGE + 8) == 0, "new memory is not zero", pages);
        check!(obstacle.unmap() == 0, "munmap fails");
    }
    check!(memory.unmap() == 0, "munmap fails");
    Ok(())
}

/// The heap grows by 4 MiB, and shrinks.
pub(crate) fn heap() -> Verdict {
    const GROWTH: usize = 4 << 20;
    let start = call(number::BRK, &[0]) as u32 as usize;
    for round in 0..4_u32 {
        let end = call(number::BRK, &[(start + GROWTH) as u32]) as u32 as usize;
        check!(end == start + GROWTH, "brk does not grow", end);
        let first = start.next_multiple_of(PAGE);
        let memory = Memory { start: first, length: end - first };
        for page in memory.pages().filter(|page| page + PAGE <= memory.length) {
            check!(memory.get(page) == 0, "new memory is not zero", page);
            memory.set(page, round + 1);
        }
        let end = call(number::BRK, &[start as u32]) as u32 as usize;
        check!(end == start, "brk does not shrink", end);
    }
    Ok(())
}

/// Bytes of a level of recursion.
const LEVEL: usize = 1024;

#[inline(never)]
fn descend(depth: u32) -> u32 {
    let mut bytes = [depth as u8; LEVEL];
    core::hint::black_box(&mut bytes);
    if depth == 0 {
        return 0;
    }
    descend(depth - 1) + u32::from(bytes.iter().all(|byte| *byte == depth as u8))
}

/// The stack grows by 4 MiB.
pub(crate) fn stack() -> Verdict {
    let depth = 4 << 10;
    let whole = descend(depth);
    check!(whole == depth, "levels of the stack are damaged", whole);
    Ok(())
}

/// What a child stores in shared memory, its parent sees, and the other way round.
pub(crate) fn shared() -> Verdict {
    let memory = map(64 * PAGE, SHARED)?;
    for page in memory.pages() {
        memory.set(page, 1);
    }
    let process = child(|| {
        let mut sum = 0;
        for page in memory.pages() {
            sum += memory.get(page);
            memory.set(page + 4, page as u32 + 3);
        }
        u32::from(sum != 64)
    });
    let status = wait(process);
    check!(status == 0, "the child does not see what was stored", status);
    for page in memory.pages() {
        check!(memory.get(page + 4) == page as u32 + 3, "what the child stored is not there", page);
    }
    check!(memory.unmap() == 0, "munmap fails");
    Ok(())
}
