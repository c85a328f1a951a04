//! Threads, futexes, sleep.

#![expect(unsafe_code, reason = "UNSAFETY: a thread's start on a stack of its own")]

use crate::suite::{Failure, Verdict, check};
use crate::system::{self, Memory, PAGE, PRIVATE, READABLE, WRITABLE, call, clock, number};
use core::arch::naked_asm;
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// What a thread shares with the one that starts it: memory, file system, files, handlers, the process. The kernel clears its word
/// at its end, and wakes who waits for that.
const FLAGS: u32 = 0x100 | 0x200 | 0x400 | 0x800 | 0x1_0000 | 0x20_0000;

const STACK_SIZE: usize = 16 * PAGE;
const THREADS: usize = 8;

/// Operations on futexes.
const WAIT: u32 = 0;
const WAKE: u32 = 1;

static SUM: AtomicU32 = AtomicU32::new(0);
static LOCK: AtomicU32 = AtomicU32::new(0);
static GUARDED: AtomicU32 = AtomicU32::new(0);
static TURN: AtomicU32 = AtomicU32::new(0);

fn word(value: &AtomicU32) -> u32 {
    value.as_ptr() as u32
}

fn wait_while(futex: &AtomicU32, value: u32) {
    call(number::FUTEX, &[word(futex), WAIT, value, 0]);
}

fn wake(futex: &AtomicU32, count: u32) {
    call(number::FUTEX, &[word(futex), WAKE, count]);
}

/// Starts a thread.
///
/// In: on the stack as in the C convention: flags, the thread's stack, the word that is cleared at its end. On the thread's stack lie its
/// function and that's argument. Out: EAX: the thread's number or an error. Changed: ECX, EDX, flags.
#[unsafe(naked)]
unsafe extern "C" fn start(flags: u32, stack: u32, word: u32) -> i32 {
    naked_asm!(
        "push ebx",
        "push esi",
        "push edi",
        "mov eax, {clone}",
        "mov ebx, [esp + 16]",
        "mov ecx, [esp + 20]",
        "xor edx, edx",
        "xor esi, esi",
        "mov edi, [esp + 24]",
        "int 0x80",
        "test eax, eax",
        "jz 2f",
        "pop edi",
        "pop esi",
        "pop ebx",
        "ret",
        // The thread: its function is on top of its stack, the argument below.
        "2:",
        "xor ebp, ebp",
        "pop eax",
        "call eax",
        "xor ebx, ebx",
        "mov eax, {exit}",
        "int 0x80",
        "ud2",
        clone = const number::CLONE,
        exit = const number::EXIT,
    )
}

/// A thread, until it is joined.
struct Thread<'a> {
    stack: Memory,
    ended: &'a AtomicU32,
}

impl<'a> Thread<'a> {
    fn start(
        work: extern "C" fn(u32),
        argument: u32,
        ended: &'a AtomicU32,
    ) -> Result<Self, Failure> {
        let stack = Memory::map(STACK_SIZE, READABLE | WRITABLE, PRIVATE)
            .ok_or(Failure("mmap fails", 0))?;
        // The stack is aligned to 16 bytes where the function is called.
        stack.set(STACK_SIZE - 20, work as *const () as u32);
        stack.set(STACK_SIZE - 16, argument);
        ended.store(1, SeqCst);
        // SAFETY: a stack of its own, as the routine wants it.
        let number = unsafe { start(FLAGS, (stack.start + STACK_SIZE - 20) as u32, word(ended)) };
        if number < 0 { Err(Failure("clone fails", number)) } else { Ok(Self { stack, ended }) }
    }

    fn join(self) {
        while self.ended.load(SeqCst) != 0 {
            wait_while(self.ended, 1);
        }
        self.stack.unmap();
    }
}

/// A lock that sleeps: 0 free, 1 taken, 2 taken and waited for.
fn locked(work: impl FnOnce()) {
    if LOCK.compare_exchange(0, 1, SeqCst, SeqCst).is_err() {
        while LOCK.swap(2, SeqCst) != 0 {
            wait_while(&LOCK, 2);
        }
    }
    work();
    if LOCK.swap(0, SeqCst) == 2 {
        wake(&LOCK, 1);
    }
}

extern "C" fn add(value: u32) {
    for _ in 0..100 {
        SUM.fetch_add(value, SeqCst);
        locked(|| {
            let before = GUARDED.load(SeqCst);
            system::give_way();
            GUARDED.store(before + 1, SeqCst);
        });
    }
}

/// Threads add to one number, and change another under a lock.
pub(crate) fn threads() -> Verdict {
    SUM.store(0, SeqCst);
    GUARDED.store(0, SeqCst);
    let ends = [const { AtomicU32::new(0) }; THREADS];
    let mut threads = [const { None }; THREADS];
    for (index, (thread, ended)) in threads.iter_mut().zip(&ends).enumerate() {
        *thread = Some(Thread::start(add, index as u32 + 1, ended)?);
    }
    threads.into_iter().flatten().for_each(Thread::join);
    let (sum, guarded) = (SUM.load(SeqCst), GUARDED.load(SeqCst));
    check!(sum == 100 * 36, "the sum is another", sum);
    check!(guarded == 100 * THREADS as u32, "the lock does not hold", guarded);
    Ok(())
}

/// Rounds of the game.
const ROUNDS: u32 = 200;

extern "C" fn odd_turns(_: u32) {
    for round in 0..ROUNDS {
        while TURN.load(SeqCst) != 2 * round + 1 {
            wait_while(&TURN, 2 * round);
        }
        TURN.store(2 * round + 2, SeqCst);
        wake(&TURN, 1);
    }
}

/// Two threads wake each other in turn.
pub(crate) fn futex() -> Verdict {
    TURN.store(0, SeqCst);
    let ended = AtomicU32::new(0);
    let thread = Thread::start(odd_turns, 0, &ended)?;
    for round in 0..ROUNDS {
        TURN.store(2 * round + 1, SeqCst);
        wake(&TURN, 1);
        while TURN.load(SeqCst) != 2 * round + 2 {
            wait_while(&TURN, 2 * round + 1);
        }
    }
    thread.join();
    Ok(())
}

/// Sleep takes as long as it should, and the clock goes on.
pub(crate) fn sleep() -> Verdict {
    for _ in 0..10 {
        let start = clock();
        let done = system::sleep(5_000_000);
        check!(done == 0, "nanosleep fails", done);
        let took = clock() - start;
        check!((5_000_000..2_000_000_000).contains(&took), "it took another time", took);
    }
    Ok(())
}
