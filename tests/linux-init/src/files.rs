//! Files, pipes and what else has a number.

use crate::suite::{Failure, Verdict, check};
use crate::system::{
    Memory, PAGE, PRIVATE, READABLE, SHARED, WRITABLE, address, address_mut, call, child, close,
    number, pipe as new_pipe, read, sleep, wait, write,
};

/// Flags of `open`.
const READ_WRITE: u32 = 2;
const CREATE: u32 = 0o100;

/// Opens a file; the path ends in a zero.
pub(crate) fn open(path: &'static str, flags: u32) -> Result<u32, Failure> {
    let file = call(number::OPEN, &[address(path), flags, 0o600]);
    if file < 0 { Err(Failure("open fails", file)) } else { Ok(file as u32) }
}

/// Mounts /proc, which the initramfs has as an empty folder.
pub(crate) fn mount() {
    let (kind, place) = ("proc\0", "/proc\0");
    // Without it the test `proc` fails, and says so.
    call(number::MOUNT, &[address(kind), address(place), address(kind), 0, 0]);
}

/// A child sends a mebibyte.
pub(crate) fn pipe() -> Verdict {
    const SIZE: usize = 1 << 20;
    let [reader, writer] = new_pipe().ok_or(Failure("pipe fails", 0))?;
    let value = |offset: usize| (offset ^ offset >> 8) as u8;
    let process = child(|| {
        close(reader);
        let mut offset = 0;
        while offset < SIZE {
            let bytes: [u8; 1000] = core::array::from_fn(|index| value(offset + index));
            let count = write(writer, &bytes[..bytes.len().min(SIZE - offset)]);
            if count <= 0 {
                return 1;
            }
            offset += count as usize;
        }
        0
    });
    close(writer);
    let (mut offset, mut bytes) = (0, [0; 4000]);
    loop {
        let count = read(reader, &mut bytes);
        check!(count >= 0, "read fails", count);
        if count == 0 {
            break;
        }
        for byte in &bytes[..count as usize] {
            check!(*byte == value(offset), "a byte is another", offset);
            offset += 1;
        }
    }
    close(reader);
    let status = wait(process);
    check!(status == 0, "the child fails", status);
    check!(offset == SIZE, "there are more or fewer bytes", offset);
    Ok(())
}

/// A file that is mapped: shared stores reach it, private ones do not.
pub(crate) fn mapping() -> Verdict {
    const PAGES: usize = 32;
    let file = open("/file\0", READ_WRITE | CREATE)?;
    for page in 0..PAGES {
        let count = write(file, &[page as u8 + 1; PAGE]);
        check!(count == PAGE as i32, "write fails", count);
    }
    let map = |sharing| {
        Memory::map_file(PAGES * PAGE, READABLE | WRITABLE, sharing, file)
            .ok_or(Failure("mmap fails", 0))
    };
    let (shared, private) = (map(SHARED)?, map(PRIVATE)?);
    close(file);
    for page in shared.pages() {
        let wanted = u32::from_ne_bytes([(page / PAGE) as u8 + 1; 4]);
        check!(shared.get(page) == wanted && private.get(page) == wanted, "not the file's", page);
        private.set(page, 1);
        shared.set(page + 4, 2);
    }
    let again = open("/file\0", 0)?;
    let mut bytes = [0; 8];
    check!(read(again, &mut bytes) == 8, "read fails");
    close(again);
    check!(bytes == [1, 1, 1, 1, 2, 0, 0, 0], "stores went elsewhere", bytes[0]);
    check!(shared.unmap() == 0 && private.unmap() == 0, "munmap fails");
    Ok(())
}

/// Whether some bytes are in others.
fn contains(bytes: &[u8], wanted: &str) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted.as_bytes())
}

/// What the kernel says of processor and process; endless zeros.
pub(crate) fn proc() -> Verdict {
    for (path, wanted) in [
        ("/proc/cpuinfo\0", "processor"),
        ("/proc/self/maps\0", "/init"),
        ("/proc/meminfo\0", "MemTotal"),
    ] {
        let file = open(path, 0)?;
        let mut bytes = [0; 4000];
        let count = read(file, &mut bytes);
        check!(count > 0, "read fails", count);
        check!(contains(&bytes[..count as usize], wanted), "a word is missing", count);
        close(file);
    }
    let file = open("/dev/zero\0", 0)?;
    let mut bytes = [1; 4000];
    for _ in 0..64 {
        let count = read(file, &mut bytes);
        check!(count == 4000 && bytes.iter().all(|byte| *byte == 0), "not zeros", count);
        bytes.fill(1);
    }
    close(file);
    Ok(())
}

/// A wait for one of two pipes ends by time, and when something comes.
pub(crate) fn poll() -> Verdict {
    const INPUT: u32 = 1;
    let first = new_pipe().ok_or(Failure("pipe fails", 0))?;
    let second = new_pipe().ok_or(Failure("pipe fails", 0))?;
    let mut wanted = [first[0], INPUT, second[0], INPUT];
    let ready = call(number::POLL, &[address_mut(&mut wanted), 2, 20]);
    check!(ready == 0, "something is there", ready);
    let process = child(|| {
        sleep(10_000_000);
        u32::from(write(second[1], &[1]) != 1)
    });
    let ready = call(number::POLL, &[address_mut(&mut wanted), 2, 10_000]);
    check!(ready == 1, "nothing is there", ready);
    check!(wanted[1] == INPUT && wanted[3] == INPUT | INPUT << 16, "the wrong one", wanted[3]);
    let status = wait(process);
    check!(status == 0, "the child fails", status);
    first.into_iter().chain(second).for_each(close);
    Ok(())
}
