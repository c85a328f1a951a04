//! The first serial port, polled, and the text screen. A PC may have both, either or neither.

#![expect(unsafe_code, reason = "UNSAFETY: the screen is memory")]

use crate::boot::PAGE_OFFSET;
use crate::processor::{inb, outb};
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

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

static HAS_PORT: AtomicBool = AtomicBool::new(false);

/// Whether there is a serial port. Where there is none, reading answers anything.
pub(crate) fn has_port() -> bool {
    HAS_PORT.load(Ordering::Relaxed)
}

/// Sets 115200 baud, 8 data bits, no parity, FIFOs on, no interrupts; clears the screen.
pub(crate) fn initialize() {
    let keeps = |value| {
        outb(COM1 + SCRATCH, value);
        inb(COM1 + SCRATCH) == value
    };
    HAS_PORT.store(keeps(0x5a) && keeps(0xa5), Ordering::Relaxed);
    clear(0..CELLS);
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
    while has_port() && inb(COM1 + LINE_STATUS) & IDLE == 0 {}
}

/// The screen's characters, each with its colour.
const SCREEN: *mut u16 = (PAGE_OFFSET + 0xb_8000) as *mut u16;
const COLUMNS: usize = 80;
const CELLS: usize = 25 * COLUMNS;

/// Grey on black.
const COLOUR: u16 = 0x0700;

/// Lines that a full screen moves up at once: its memory is slow.
const JUMP: usize = 8 * COLUMNS;

/// Where the next character goes.
static POSITION: AtomicUsize = AtomicUsize::new(0);

fn clear(cells: core::ops::Range<usize>) {
    for cell in cells {
        // SAFETY: a cell of the screen, mapped; volatile, as it is a device's.
        unsafe { SCREEN.add(cell).write_volatile(COLOUR | u16::from(b' ')) };
    }
}

/// Puts a character on the screen.
fn show(byte: u8) {
    let mut position = POSITION.load(Ordering::Relaxed);
    if byte == b'\n' {
        position = (position / COLUMNS + 1) * COLUMNS;
    } else {
        // SAFETY: as above; what is stored is always less than CELLS.
        unsafe { SCREEN.add(position).write_volatile(COLOUR | u16::from(byte)) };
        position += 1;
    }
    if position == CELLS {
        for cell in JUMP..CELLS {
            // SAFETY: as above.
            unsafe { SCREEN.add(cell - JUMP).write_volatile(SCREEN.add(cell).read_volatile()) };
        }
        clear(CELLS - JUMP..CELLS);
        position -= JUMP;
    }
    POSITION.store(position, Ordering::Relaxed);
}

/// The screen alone as a sink for `write!`: for who sits there, not for programs.
pub(crate) struct Screen;

impl fmt::Write for Screen {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(show);
        Ok(())
    }
}

/// Port and screen as a sink for `write!`.
pub(crate) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes().filter(|_| has_port()) {
            while inb(COM1 + LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
            outb(COM1, byte);
        }
        Screen.write_str(text)
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

/// Writes a line to the screen alone.
macro_rules! screen_line {
    ($($argument:tt)*) => {{
        use core::fmt::Write;
        // The screen never fails.
        let _ = writeln!($crate::console::Screen, $($argument)*);
    }};
}
pub(crate) use screen_line;
