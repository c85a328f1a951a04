//! The machine around the processor: interrupt controller, timer, local APIC, QEMU's exit.

use crate::processor::{halt_forever, inb, outb, outl};

/// QEMU's `isa-debug-exit`: value v ends QEMU with status 2 v + 1.
const EXIT_PORT: u16 = 0xf4;

/// The 8259s' command and mask ports.
const MASTER_COMMAND: u16 = 0x20;
const MASTER_MASK: u16 = 0x21;
const SLAVE_COMMAND: u16 = 0xa0;
const SLAVE_MASK: u16 = 0xa1;

/// The 8254's first counter and its command port.
const TIMER_COUNTER: u16 = 0x40;
const TIMER_COMMAND: u16 = 0x43;

/// The vector of IRQ 0.
pub(crate) const IRQ_BASE: u8 = 0x20;

/// Ends QEMU.
pub(crate) fn exit(success: bool) -> ! {
    crate::console::drain();
    outl(EXIT_PORT, if success { 0x10 } else { 0x11 });
    halt_forever()
}

/// Sets the 8259s to vectors [`IRQ_BASE`] and up, every line masked.
fn initialize_interrupts() {
    for (command, mask, vector, cascade) in
        [(MASTER_COMMAND, MASTER_MASK, IRQ_BASE, 4), (SLAVE_COMMAND, SLAVE_MASK, IRQ_BASE + 8, 2)]
    {
        outb(command, 0x11); // Edge-triggered, cascaded, a fourth word follows.
        outb(mask, vector);
        outb(mask, cascade);
        outb(mask, 0x01);
        outb(mask, 0xff);
    }
}

/// Lets only IRQ 0 through, or nothing.
pub(crate) fn enable_timer_line(enabled: bool) {
    outb(MASTER_MASK, if enabled { 0xfe } else { 0xff });
}

/// Whether IRQ 0 waits to be delivered.
pub(crate) fn timer_pending() -> bool {
    outb(MASTER_COMMAND, 0x0a); // The next read answers the request register.
    inb(MASTER_COMMAND) & 1 != 0
}

/// Tells the controller that an interrupt was handled.
pub(crate) fn end_of_interrupt(line: u8) {
    if line >= 8 {
        outb(SLAVE_COMMAND, 0x20);
    }
    outb(MASTER_COMMAND, 0x20);
}

/// Takes a pending interrupt from the controller, as the processor would.
pub(crate) fn acknowledge_interrupt() {
    outb(MASTER_COMMAND, 0x0c); // Poll: the next read acknowledges.
    inb(MASTER_COMMAND);
    end_of_interrupt(0);
}

/// Raises IRQ 0 once, after so many cycles of the 8254.
fn start_timer(cycles: u16) {
    let [low, high] = cycles.to_le_bytes();
    outb(TIMER_COMMAND, 0x30); // Counter 0, both bytes, interrupt on terminal count.
    outb(TIMER_COUNTER, low);
    outb(TIMER_COUNTER, high);
}

/// Raises IRQ 0 every few milliseconds.
pub(crate) fn start_ticking() {
    let [low, high] = 5000_u16.to_le_bytes();
    outb(TIMER_COMMAND, 0x34); // Counter 0, both bytes, rate generator.
    outb(TIMER_COUNTER, low);
    outb(TIMER_COUNTER, high);
}

/// Raises IRQ 0 and waits until the controller has it. Without interrupts it stays pending.
///
/// `false` when the machine has no such timer.
pub(crate) fn make_timer_pending() -> bool {
    discard_interrupts();
    start_timer(100);
    (0..1_000_000).any(|_| timer_pending())
}

/// Stops the timer, masks all lines and forgets what is pending: the state to start from.
pub(crate) fn discard_interrupts() {
    outb(TIMER_COMMAND, 0x30); // Without a count the counter stands, and its line is low.
    initialize_interrupts(); // The first command word clears the request register.
}
