//! The first serial port, polled.

use crate::processor::{inb, outb};
use core::fmt;

/// COM1's first port.
pub(crate) const COM1: u16 = 0x3f8;

/// Offsets of the UART's registers.
pub(crate) const INTERRUPT_ENABLE: u16 = 1;
pub(crate) const FIFO_CONTROL: u16 = 2;
pub(crate) const LINE_CONTROL: u16 = 3;
pub(crate) const MODEM_CONTROL: u16 = 4;
pub(crate) const LINE_STATUS: u16 = 5;
pub(crate) const SCRATCH: u16 = 7;

/// In the line status: a byte was received.
pub(crate) const DATA_READY: u8 = 0x01;

/// In the line status: the transmitter takes another byte.
const TRANSMITTER_EMPTY: u8 = 0x20;

/// In the modem control: what is sent is received.
pub(crate) const LOOPBACK: u8 = 0x10;

/// In the modem control: data terminal ready, request to send.
pub(crate) const READY: u8 = 0x03;

/// Sets 115200 baud, 8 data bits, no parity, FIFOs on, no interrupts.
pub(crate) fn initialize() {
    for (register, value) in [
        (INTERRUPT_ENABLE, 0),
        (LINE_CONTROL, 0x80), // The divisor latch takes the place of registers 0 and 1.
        (0, 1),
        (1, 0),
        (LINE_CONTROL, 0x03),
        (FIFO_CONTROL, 0x07),
        (MODEM_CONTROL, READY),
    ] {
        outb(COM1 + register, value);
    }
}

/// Waits until all that was written has left the port.
pub(crate) fn drain() {
    const IDLE: u8 = 0x40;
    while inb(COM1 + LINE_STATUS) & IDLE == 0 {}
}

/// The port as a sink for `write!`.
pub(crate) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while inb(COM1 + LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
            outb(COM1, byte);
        }
        Ok(())
    }
}

/// Writes a line to the console.
macro_rules! line {
    ($($argument:tt)*) => {{
        use core::fmt::Write;
        // The console never fails.
        let _ = writeln!($crate::console::Console, $($argument)*);
    }};
}
pub(crate) use line;
