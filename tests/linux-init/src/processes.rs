//! Processes: they start, become others, and end.

use crate::start::Arguments;
use crate::suite::{Failure, Verdict, check};
use crate::system::{address, call, child, close, number, pipe, read, wait, write};

/// The program's own path, and the word that makes it a child of [`execs`]; both end in a zero.
const PATH: &str = "/init\0";
const WORD: &str = "child\0";

/// What such a child ends with.
const CHILD_STATUS: u32 = 42;

/// Processes that live at once.
const CROWD: usize = 64;

/// If the program was started as a child: the status that it ends with.
pub(crate) fn as_child(arguments: &Arguments) -> Option<u32> {
    (arguments.get(1) == WORD.strip_suffix('\0')).then_some(CHILD_STATUS)
}

/// Processes start and end, one after the other.
pub(crate) fn forks(count: u32) -> Verdict {
    for round in 0..count {
        let process = child(|| round & 0x7f);
        check!(process > 0, "fork fails", process);
        let status = wait(process);
        check!(status == ((round & 0x7f) << 8) as i32, "a child ends with another status", status);
    }
    Ok(())
}

/// Processes start, become another program, and end.
pub(crate) fn execs(count: u32) -> Verdict {
    for _ in 0..count {
        let process = child(|| {
            let arguments = [address(PATH), address(WORD), 0];
            let environment = [0_u32];
            call(number::EXECVE, &[address(PATH), address(&arguments), address(&environment)]);
            1
        });
        check!(process > 0, "fork fails", process);
        let status = wait(process);
        check!(status == (CHILD_STATUS << 8) as i32, "a program ends with another status", status);
    }
    Ok(())
}

/// Many processes live at once, each blocked until all are there.
pub(crate) fn crowd() -> Verdict {
    let [start_reader, start_writer] = pipe().ok_or(Failure("pipe fails", 0))?;
    let [sum_reader, sum_writer] = pipe().ok_or(Failure("pipe fails", 0))?;
    let mut processes = [0; CROWD];
    for (index, process) in processes.iter_mut().enumerate() {
        *process = child(|| {
            let mut byte = [0];
            if read(start_reader, &mut byte) != 1 {
                return 1;
            }
            u32::from(write(sum_writer, &[index as u8]) != 1)
        });
        check!(*process > 0, "fork fails", *process);
    }
    check!(write(start_writer, &[0; CROWD]) == CROWD as i32, "a pipe takes too little");
    let mut sum = 0;
    for _ in 0..CROWD {
        let mut byte = [0];
        check!(read(sum_reader, &mut byte) == 1, "a pipe ends early");
        sum += usize::from(byte[0]);
    }
    for process in processes {
        let status = wait(process);
        check!(status == 0, "a child fails", status);
    }
    check!(sum == CROWD * (CROWD - 1) / 2, "children said something else", sum);
    [start_reader, start_writer, sum_reader, sum_writer].into_iter().for_each(close);
    Ok(())
}
