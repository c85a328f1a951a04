//! Lines on the console, and the end of the machine.

#![expect(unsafe_code, reason = "UNSAFETY: port I/O")]

use crate::system::{self, number};
use core::arch::asm;
use core::fmt::{self, Write};

/// What each line begins with.
const PREFIX: &str = "linux: ";

/// The exit device's port, and what is written to it.
const EXIT_PORT: u16 = 0xf4;
const PASSED: u8 = 0x10;
const FAILED: u8 = 0x11;

/// `ioctl` on a terminal: with argument 1 it waits until all is sent.
const TCSBRK: u32 = 0x5409;

const STANDARD_OUTPUT: u32 = 1;

/// A line, written at once.
pub(crate) struct Line {
    bytes: [u8; 240],
    used: usize,
}

impl Line {
    /// Writes it.
    pub(crate) fn say(arguments: fmt::Arguments<'_>) {
        let mut line = Self { bytes: [0; 240], used: 0 };
        // What does not fit is cut off.
        let _ = write!(line, "{PREFIX}{arguments}");
        line.bytes[line.used] = b'\n';
        system::write(STANDARD_OUTPUT, &line.bytes[..=line.used]);
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.used == self.bytes.len() - 1 {
                return Err(fmt::Error);
            }
            self.bytes[self.used] = byte;
            self.used += 1;
        }
        Ok(())
    }
}

/// Says a line.
macro_rules! line {
    ($($argument:tt)*) => { $crate::console::Line::say(format_args!($($argument)*)) };
}
pub(crate) use line;

/// Commands of `reboot`.
const POWER_OFF: u32 = 0x4321_fedc;
const RESTART: u32 = 0x0123_4567;

/// Ends the machine as a system does that is done, if the word is one for that.
pub(crate) fn end_by_kernel(word: &str) {
    let command = match word {
        "power-off" => POWER_OFF,
        "restart" => RESTART,
        _ => return,
    };
    system::call(number::IOCTL, &[STANDARD_OUTPUT, TCSBRK, 1]);
    system::reboot(command);
    line!("the kernel refuses to {word}");
}

/// Ends the machine by QEMU's exit device, and without one stops this processor.
pub(crate) fn end(passed: bool) -> ! {
    system::call(number::IOCTL, &[STANDARD_OUTPUT, TCSBRK, 1]);
    let allowed = system::call(number::IOPL, &[3]);
    if allowed == 0 {
        let value = if passed { PASSED } else { FAILED };
        // SAFETY: the exit device. Where there is none nothing happens.
        unsafe { asm!("out dx, al", in("dx") EXIT_PORT, in("al") value) };
        // QEMU 10 lets the processor run on for a moment.
        for _ in 0..10 {
            system::sleep(500_000_000);
        }
    }
    line!("there is no exit device (iopl: {allowed})");
    loop {
        system::call(number::PAUSE, &[]);
    }
}
