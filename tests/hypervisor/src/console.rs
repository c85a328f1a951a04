//! What the hypervisor says: lines with a prefix of its own, on the serial port that the guest uses too, and on the debug port.

#![expect(unsafe_code, reason = "UNSAFETY: port I/O")]

use core::fmt::{self, Write};
use x86::io::{inb, outb};

/// COM1's first port.
const COM1: u16 = 0x3f8;

/// Offsets of the UART's registers.
const LINE_CONTROL: u16 = 3;
const LINE_STATUS: u16 = 5;
const SCRATCH: u16 = 7;

/// In the line control: the divisor latch takes the place of registers 0 and 1.
const DIVISOR_LATCH: u8 = 0x80;

/// In the line status: the transmitter takes another byte; it is idle.
const TRANSMITTER_EMPTY: u8 = 0x20;
const TRANSMITTER_IDLE: u8 = 0x40;

/// The debug port, which answers its own number where there is one.
const DEBUG: u16 = 0xe9;

/// What each line begins with.
pub(crate) const PREFIX: &str = "hypervisor: ";

/// The port that is read.
fn input(port: u16) -> u8 {
    // SAFETY: ports of the UART and the debug port; reading them changes no memory.
    unsafe { inb(port) }
}

fn output(port: u16, value: u8) {
    // SAFETY: as above.
    unsafe { outb(port, value) }
}

/// Whether there is a serial port. The guest may have its own value in the scratch register.
fn has_serial() -> bool {
    let before = input(COM1 + SCRATCH);
    output(COM1 + SCRATCH, !before);
    let keeps = input(COM1 + SCRATCH) == !before;
    output(COM1 + SCRATCH, before);
    keeps
}

/// A line that is being written. The state of the UART is the guest's as soon as that runs: only bytes are added to it.
struct Line {
    serial: bool,
    debug: bool,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.serial {
                while input(COM1 + LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
                output(COM1, byte);
            }
            if self.debug {
                output(DEBUG, byte);
            }
        }
        Ok(())
    }
}

/// Sets 115200 baud, 8 data bits, no parity.
pub(crate) fn initialize() {
    if has_serial() {
        for (register, value) in
            [(1, 0), (LINE_CONTROL, DIVISOR_LATCH), (0, 1), (1, 0), (LINE_CONTROL, 0x03), (2, 0x07)]
        {
            output(COM1 + register, value);
        }
    }
}

/// Writes one line.
pub(crate) fn write(arguments: fmt::Arguments<'_>) {
    let serial = has_serial();
    let control = if serial { input(COM1 + LINE_CONTROL) } else { 0 };
    if serial {
        output(COM1 + LINE_CONTROL, control & !DIVISOR_LATCH);
    }
    let mut line = Line { serial, debug: input(DEBUG) == DEBUG as u8 };
    // A console never fails.
    let _ = writeln!(line, "{PREFIX}{arguments}");
    if serial {
        output(COM1 + LINE_CONTROL, control);
    }
}

/// Ends the line that the guest may be in the middle of.
pub(crate) fn break_line() {
    if has_serial() {
        while input(COM1 + LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
        output(COM1, b'\n');
    }
}

/// Waits until all that was written has left the port.
pub(crate) fn drain() {
    while has_serial() && input(COM1 + LINE_STATUS) & TRANSMITTER_IDLE == 0 {}
}

/// Writes a line.
macro_rules! line {
    ($($argument:tt)*) => { $crate::console::write(format_args!($($argument)*)) };
}
pub(crate) use line;
