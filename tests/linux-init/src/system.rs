//! System calls: number in EAX, arguments in EBX, ECX, EDX, ESI, EDI and EBP, `int 80h`. A result from -4095 to -1 is an error.

#![expect(unsafe_code, reason = "UNSAFETY: system calls, and memory that the kernel maps")]

use core::arch::naked_asm;

/// Numbers of system calls.
pub(crate) mod number {
    pub(crate) const EXIT: u32 = 1;
    pub(crate) const FORK: u32 = 2;
    pub(crate) const READ: u32 = 3;
    pub(crate) const WRITE: u32 = 4;
    pub(crate) const OPEN: u32 = 5;
    pub(crate) const CLOSE: u32 = 6;
    pub(crate) const EXECVE: u32 = 11;
    pub(crate) const GETPID: u32 = 20;
    pub(crate) const MOUNT: u32 = 21;
    pub(crate) const PAUSE: u32 = 29;
    pub(crate) const KILL: u32 = 37;
    pub(crate) const PIPE: u32 = 42;
    pub(crate) const BRK: u32 = 45;
    pub(crate) const IOCTL: u32 = 54;
    pub(crate) const REBOOT: u32 = 88;
    pub(crate) const MUNMAP: u32 = 91;
    pub(crate) const SETITIMER: u32 = 104;
    pub(crate) const IOPL: u32 = 110;
    pub(crate) const WAIT4: u32 = 114;
    pub(crate) const CLONE: u32 = 120;
    pub(crate) const MODIFY_LDT: u32 = 123;
    pub(crate) const MPROTECT: u32 = 125;
    pub(crate) const SCHED_YIELD: u32 = 158;
    pub(crate) const NANOSLEEP: u32 = 162;
    pub(crate) const MREMAP: u32 = 163;
    pub(crate) const POLL: u32 = 168;
    pub(crate) const RT_SIGRETURN: u32 = 173;
    pub(crate) const RT_SIGACTION: u32 = 174;
    pub(crate) const SIGALTSTACK: u32 = 186;
    pub(crate) const MMAP2: u32 = 192;
    pub(crate) const FUTEX: u32 = 240;
    pub(crate) const SET_THREAD_AREA: u32 = 243;
    pub(crate) const CLOCK_GETTIME: u32 = 265;
}

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// Protections, flags of mappings.
pub(crate) const READABLE: u32 = 1;
pub(crate) const WRITABLE: u32 = 2;
pub(crate) const EXECUTABLE: u32 = 4;
pub(crate) const SHARED: u32 = 1;
pub(crate) const PRIVATE: u32 = 2;
const ANONYMOUS: u32 = 0x20;

/// A system call.
///
/// In: on the stack as in the C convention: its number, its six arguments. Out: EAX. Changed: ECX, EDX, flags.
#[unsafe(naked)]
unsafe extern "C" fn enter(
    number: u32,
    first: u32,
    second: u32,
    third: u32,
    fourth: u32,
    fifth: u32,
    sixth: u32,
) -> i32 {
    naked_asm!(
        "push ebx",
        "push esi",
        "push edi",
        "push ebp",
        "mov eax, [esp + 20]",
        "mov ebx, [esp + 24]",
        "mov ecx, [esp + 28]",
        "mov edx, [esp + 32]",
        "mov esi, [esp + 36]",
        "mov edi, [esp + 40]",
        "mov ebp, [esp + 44]",
        "int 0x80",
        "pop ebp",
        "pop edi",
        "pop esi",
        "pop ebx",
        "ret",
    )
}

/// A system call with so many arguments, six at most.
#[inline(never)]
pub(crate) fn call(number: u32, arguments: &[u32]) -> i32 {
    let argument = |index: usize| arguments.get(index).copied().unwrap_or_default();
    // SAFETY: the callers pass addresses of what the kernel may read or write, and unmap only what is theirs.
    unsafe {
        enter(number, argument(0), argument(1), argument(2), argument(3), argument(4), argument(5))
    }
}

/// The address of something that the kernel reads.
pub(crate) fn address<T: ?Sized>(value: &T) -> u32 {
    core::ptr::from_ref(value).cast::<u8>() as u32
}

/// The address of something that the kernel writes.
pub(crate) fn address_mut<T: ?Sized>(value: &mut T) -> u32 {
    core::ptr::from_mut(value).cast::<u8>() as u32
}

/// Lets the kernel end the machine with a command of `reboot`, behind the two numbers that it wants to see first.
pub(crate) fn reboot(command: u32) {
    call(number::REBOOT, &[0xfee1_dead, 672_274_793, command]);
}

/// Ends this process or thread.
pub(crate) fn exit(status: u32) -> ! {
    loop {
        call(number::EXIT, &[status]);
    }
}

/// Writes to a file.
pub(crate) fn write(file: u32, bytes: &[u8]) -> i32 {
    call(number::WRITE, &[file, address(bytes), bytes.len() as u32])
}

/// Reads from a file.
pub(crate) fn read(file: u32, bytes: &mut [u8]) -> i32 {
    call(number::READ, &[file, address_mut(bytes), bytes.len() as u32])
}

/// Closes a file.
pub(crate) fn close(file: u32) {
    call(number::CLOSE, &[file]);
}

/// Both ends of a pipe: for reading, for writing.
pub(crate) fn pipe() -> Option<[u32; 2]> {
    let mut ends = [0; 2];
    (call(number::PIPE, &[address_mut(&mut ends)]) == 0).then_some(ends)
}

/// Starts a copy of this process: 0 in the copy, its number in this one.
pub(crate) fn fork() -> i32 {
    call(number::FORK, &[])
}

/// Starts a copy of this process, which does some work and ends with its result as status.
pub(crate) fn child(work: impl FnOnce() -> u32) -> i32 {
    match fork() {
        0 => exit(work()),
        process => process,
    }
}

/// Waits for a process. Its status: the exit status times 256, or the number of the signal that ended it.
pub(crate) fn wait(process: i32) -> i32 {
    let mut status = 0_i32;
    loop {
        match call(number::WAIT4, &[process as u32, address_mut(&mut status), 0, 0]) {
            // Interrupted by a signal.
            -4 => {}
            error if error < 0 => return error,
            _ => return status,
        }
    }
}

/// Lets others run.
pub(crate) fn give_way() {
    call(number::SCHED_YIELD, &[]);
}

/// Nanoseconds of the monotonic clock.
pub(crate) fn clock() -> u64 {
    let mut time = [0_u32; 2];
    call(number::CLOCK_GETTIME, &[1, address_mut(&mut time)]);
    u64::from(time[0]) * 1_000_000_000 + u64::from(time[1])
}

/// Sleeps.
pub(crate) fn sleep(nanoseconds: u32) -> i32 {
    let time = [nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000];
    call(number::NANOSLEEP, &[address(&time), 0])
}

/// Memory that the kernel maps for us. Reached by volatile accesses: others may share it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub(crate) start: usize,
    pub(crate) length: usize,
}

impl Memory {
    /// Anonymous memory, private or shared with children.
    pub(crate) fn map(length: usize, protection: u32, sharing: u32) -> Option<Self> {
        Self::map_file(length, protection, sharing | ANONYMOUS, u32::MAX)
    }

    /// A file's first bytes.
    pub(crate) fn map_file(length: usize, protection: u32, flags: u32, file: u32) -> Option<Self> {
        let start = call(number::MMAP2, &[0, length as u32, protection, flags, file, 0]);
        let is_error = (-4095..0).contains(&start);
        (!is_error).then_some(Self { start: start as usize, length })
    }

    /// Its pages' first bytes.
    pub(crate) fn pages(self) -> impl Iterator<Item = usize> {
        (0..self.length).step_by(PAGE)
    }

    pub(crate) fn get(self, offset: usize) -> u32 {
        assert!(offset + 4 <= self.length && offset.is_multiple_of(4));
        // SAFETY: mapped by `map`, and aligned.
        unsafe { ((self.start + offset) as *const u32).read_volatile() }
    }

    pub(crate) fn set(self, offset: usize, value: u32) {
        assert!(offset + 4 <= self.length && offset.is_multiple_of(4));
        // SAFETY: as above.
        unsafe { ((self.start + offset) as *mut u32).write_volatile(value) };
    }

    /// Changes what may be done with it.
    pub(crate) fn protect(self, protection: u32) -> i32 {
        call(number::MPROTECT, &[self.start as u32, self.length as u32, protection])
    }

    /// Gives it back.
    pub(crate) fn unmap(self) -> i32 {
        call(number::MUNMAP, &[self.start as u32, self.length as u32])
    }
}
