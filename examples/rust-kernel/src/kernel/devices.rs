//! The machine around the processor: serial port, screen, interrupt controller, timer, QEMU's exit.

use super::VMI;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

/// COM1's first port, its line status, and in that: the transmitter takes another byte; it has sent all.
const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
const IDLE: u8 = 0x40;

/// The screen: 25 rows of 80 characters, each with a byte of colours. Ours are few enough for one screen.
pub(super) const SCREEN: u32 = 0xb_8000;
const COLUMNS: usize = 80;
const CELLS: usize = 25 * COLUMNS;
const GREY: u16 = 0x0700;

/// The 8259s' command ports; each has another port behind it.
const MASTER: u16 = 0x20;
const SLAVE: u16 = 0xa0;

/// The 8254's first counter and its command port; cycles from one tick to the next, a millisecond.
const TIMER_COUNTER: u16 = 0x40;
const TIMER_COMMAND: u16 = 0x43;
const TICK: u16 = 1193;

/// The vector of IRQ 0.
pub(super) const IRQ_BASE: u8 = 0x20;

/// QEMU's `isa-debug-exit`: value v ends QEMU with status 2 v + 1.
const EXIT_PORT: u16 = 0xf4;

fn outb(port: u16, value: u8) {
    // SAFETY: the kernel owns its machine's ports, and has no device write to memory.
    unsafe { VMI.OUTB(value.into(), port.into()) };
}

fn inb(port: u16) -> u8 {
    // SAFETY: as above. The call answers in AL.
    unsafe { VMI.INB(port.into()) as u8 }
}

/// Sets 115200 baud, 8 data bits, no parity, FIFOs on, no interrupts; clears the screen.
pub(super) fn initialize_console() {
    // The divisor latch takes the place of registers 0 and 1 while it is open.
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 0x03), (2, 0x07), (4, 0x03)] {
        outb(COM1 + register, value);
    }
    (0..CELLS).for_each(|cell| show(cell, b' '));
}

fn show(cell: usize, byte: u8) {
    let cell = (SCREEN as *mut u16).wrapping_add(cell % CELLS);
    // SAFETY: the screen's memory, of which every value is a character.
    unsafe { cell.write_volatile(GREY | u16::from(byte)) };
}

/// Serial port and screen as a sink for `write!`.
pub(super) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        static CURSOR: AtomicUsize = AtomicUsize::new(0);
        for byte in text.bytes() {
            while inb(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
            outb(COM1, byte);
            let mut cursor = CURSOR.load(Ordering::Relaxed);
            if byte == b'\n' {
                cursor = (cursor / COLUMNS + 1) * COLUMNS;
            } else {
                show(cursor, byte);
                cursor += 1;
            }
            CURSOR.store(cursor, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Writes a line to the console.
macro_rules! line {
    ($($argument:tt)*) => {{
        use core::fmt::Write;
        // The console never fails.
        let _ = writeln!($crate::kernel::devices::Console, $($argument)*);
    }};
}
pub(super) use line;

/// Interrupts from [`IRQ_BASE`] on, of all lines only the timer's; the timer ticks.
pub(super) fn initialize_timer() {
    for (command, vector, cascade, mask) in
        [(MASTER, IRQ_BASE, 4, 0xfe), (SLAVE, IRQ_BASE + 8, 2, 0xff)]
    {
        outb(command, 0x11); // Edge-triggered, cascaded, a fourth word follows.
        for value in [vector, cascade, 0x01, mask] {
            outb(command + 1, value);
            VMI.IODelay();
        }
    }
    outb(TIMER_COMMAND, 0x34); // Counter 0, both bytes, rate generator.
    TICK.to_le_bytes().into_iter().for_each(|byte| outb(TIMER_COUNTER, byte));
}

/// Tells the controller that the timer's interrupt was handled.
pub(super) fn end_of_tick() {
    outb(MASTER, 0x20);
}

/// Ends QEMU, if it has the device, when the serial port has sent everything.
pub(super) fn exit(success: bool) {
    while inb(LINE_STATUS) & IDLE == 0 {}
    outb(EXIT_PORT, if success { 0x10 } else { 0x11 });
}
