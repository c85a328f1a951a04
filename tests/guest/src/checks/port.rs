//! Port input and output, on a device that nearly every machine has: the serial port itself.
//!
//! Its scratch register keeps a byte, and in loopback mode it receives what it sends. Wider accesses
//! reach it byte by byte on consecutive ports, as on the ISA bus.

#![expect(non_snake_case, reason = "the specification's names")]
#![expect(
    unsafe_code,
    reason = "UNSAFETY: a buffer that the processor's string instructions read and write"
)]

use crate::console::{
    COM1, DATA_READY, LINE_STATUS, LOOPBACK, MODEM_CONTROL, READY, SCRATCH, drain, has_port,
};
use crate::processor::{inb, outb};
use crate::session::{Arguments, Session};

/// The port of the widest access whose last byte is the scratch register.
const LAST_BYTE: [(u32, u16); 3] = [(1, SCRATCH), (2, SCRATCH - 1), (4, SCRATCH - 3)];

fn port(size: u32) -> u16 {
    COM1 + LAST_BYTE.iter().find(|(bytes, _)| *bytes == size).map_or(0, |(_, offset)| *offset)
}

/// EAX that writes a byte to the scratch register, and to the ports below what they hold already.
fn value(size: u32, byte: u8) -> u32 {
    let mut value = u32::from(byte) << ((size - 1) * 8);
    if size == 4 {
        value |= u32::from(READY); // The modem control register is the lowest.
    }
    value
}

/// Whether there is nothing to try it on.
fn lacks_port(s: &mut Session) -> bool {
    if !has_port() {
        s.skipped = Some("there is no serial port to try it on");
    }
    !has_port()
}

fn input(s: &mut Session, size: u32) {
    if lacks_port(s) {
        return;
    }
    s.each(|s| {
        for byte in [s.random() as u8, 0x00, 0xff] {
            outb(COM1 + SCRATCH, byte);
            let outcome = s.call(Arguments::NONE.edx(u32::from(port(size))));
            let eax = outcome.after.registers.eax;
            s.equal("the last byte read", eax >> ((size - 1) * 8) & 0xff, u32::from(byte));
            if size < 4 {
                s.equal("EAX above what was read", eax >> (size * 8), 0);
            }
            if size == 4 {
                s.equal(
                    "the first byte read, of the modem control register",
                    eax & 0xff,
                    u32::from(READY),
                );
            }
        }
    });
}

fn output(s: &mut Session, size: u32) {
    if lacks_port(s) {
        return;
    }
    s.each(|s| {
        for byte in [s.random() as u8, 0x00, 0xff] {
            // Bits of EAX above the access do not count.
            let above = if size == 4 { 0 } else { s.random() << (size * 8) };
            s.call(Arguments::NONE.eax(value(size, byte) | above).edx(u32::from(port(size))));
            s.equal("the byte that arrived", u32::from(inb(COM1 + SCRATCH)), u32::from(byte));
        }
    });
}

const COUNT: u32 = 6;
const BUFFER: usize = 64;

#[repr(C, align(16))]
struct Buffer([u8; BUFFER]);

static mut MEMORY: Buffer = Buffer([0; BUFFER]);

fn buffer() -> *mut u8 {
    (&raw mut MEMORY).cast()
}

fn byte(index: u32) -> u8 {
    // SAFETY: callers stay inside the buffer.
    unsafe { buffer().add(index as usize).read_volatile() }
}

fn set_byte(index: u32, value: u8) {
    // SAFETY: callers stay inside the buffer.
    unsafe { buffer().add(index as usize).write_volatile(value) };
}

const UNTOUCHED: u8 = 0xa5;

fn string_input(s: &mut Session, size: u32) {
    if lacks_port(s) {
        return;
    }
    s.each(|s| {
        for count in [COUNT, 1, 0] {
            (0..BUFFER as u32).for_each(|index| set_byte(index, UNTOUCHED));
            let mark = s.random() as u8;
            outb(COM1 + SCRATCH, mark);
            let start = buffer() as u32 + 8;
            let arguments = Arguments::NONE.edx(u32::from(port(size))).edi(start).ecx(count);
            let outcome = s.call(arguments);
            s.equal("EDI", outcome.after.registers.edi, start + count * size);
            s.equal("ECX", outcome.after.registers.ecx, 0);
            for item in 0..count {
                let last = 8 + item * size + size - 1;
                s.expect(
                    byte(last) == mark,
                    format_args!("item {item} ends in {:#x}, must end in {mark:#x}", byte(last)),
                );
            }
            s.equal("the byte before the buffer", u32::from(byte(7)), u32::from(UNTOUCHED));
            s.equal(
                "the byte behind the buffer",
                u32::from(byte(8 + count * size)),
                u32::from(UNTOUCHED),
            );
        }
    });
}

fn string_output(s: &mut Session, size: u32) {
    if lacks_port(s) {
        return;
    }
    s.each(|s| {
        for count in [COUNT, 1] {
            for item in 0..count {
                let value = value(size, (item + 1) as u8 * 16).to_le_bytes();
                (0..size).for_each(|index| set_byte(item * size + index, value[index as usize]));
            }
            outb(COM1 + SCRATCH, 0);
            let start = buffer() as u32;
            let arguments = Arguments::NONE.edx(u32::from(port(size))).esi(start).ecx(count);
            let outcome = s.call(arguments);
            s.equal("ESI", outcome.after.registers.esi, start + count * size);
            s.equal("ECX", outcome.after.registers.ecx, 0);
            s.equal("the byte that arrived last", u32::from(inb(COM1 + SCRATCH)), count * 16);
        }
    });
}

pub(crate) fn INL(s: &mut Session) {
    input(s, 4);
}

pub(crate) fn INB(s: &mut Session) {
    input(s, 1);
}

pub(crate) fn INW(s: &mut Session) {
    input(s, 2);
}

pub(crate) fn INSL(s: &mut Session) {
    string_input(s, 4);
}

pub(crate) fn INSB(s: &mut Session) {
    string_input(s, 1);
    if lacks_port(s) {
        return;
    }
    s.each(|s| {
        with_loopback(|| {
            (1..=COUNT).for_each(|item| outb(COM1, item as u8));
            (0..BUFFER as u32).for_each(|index| set_byte(index, UNTOUCHED));
            s.call(Arguments::NONE.edx(u32::from(COM1)).edi(buffer() as u32).ecx(COUNT));
        });
        for item in 0..COUNT {
            s.expect(
                byte(item) == item as u8 + 1,
                format_args!("byte {item} received is {:#x}", byte(item)),
            );
        }
    });
}

pub(crate) fn INSW(s: &mut Session) {
    string_input(s, 2);
}

pub(crate) fn OUTL(s: &mut Session) {
    output(s, 4);
}

pub(crate) fn OUTB(s: &mut Session) {
    output(s, 1);
}

pub(crate) fn OUTW(s: &mut Session) {
    output(s, 2);
}

pub(crate) fn OUTSL(s: &mut Session) {
    string_output(s, 4);
}

pub(crate) fn OUTSB(s: &mut Session) {
    string_output(s, 1);
    if lacks_port(s) {
        return;
    }
    s.each(|s| {
        (0..COUNT).for_each(|item| set_byte(item, item as u8 + 1));
        let mut received = [0; COUNT as usize];
        let mut count = 0;
        with_loopback(|| {
            s.call(Arguments::NONE.edx(u32::from(COM1)).esi(buffer() as u32).ecx(COUNT));
            while count < received.len() && inb(COM1 + LINE_STATUS) & DATA_READY != 0 {
                received[count] = inb(COM1);
                count += 1;
            }
        });
        let wanted = core::array::from_fn(|index| index as u8 + 1);
        s.expect(
            received == wanted,
            format_args!("the port sent {received:?}, must send {wanted:?}"),
        );
    });
}

pub(crate) fn OUTSW(s: &mut Session) {
    string_output(s, 2);
}

/// Lets the port hear itself for a while; its peer hears nothing.
fn with_loopback(test: impl FnOnce()) {
    drain();
    while inb(COM1 + LINE_STATUS) & DATA_READY != 0 {
        inb(COM1);
    }
    outb(COM1 + MODEM_CONTROL, READY | LOOPBACK);
    test();
    outb(COM1 + MODEM_CONTROL, READY);
}

pub(crate) fn IODelay(s: &mut Session) {
    s.each(|s| {
        s.call(Arguments::NONE);
    });
}
