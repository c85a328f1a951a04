//! The ports that are not passed through: those that end QEMU, so that the report comes before the end.

#![expect(unsafe_code, reason = "UNSAFETY: port I/O")]

use crate::guest::Guest;
use crate::report::{EXIT_PORT, Ending};
use crate::svm::RAX;
use vmi_hv_backend::reference::record::{OWN_END, POWER_OFF, RESET};
use x86::io::{inb, inl, inw, outb, outl, outw};

/// The exit's information: an input, a string instruction, the size.
const INPUT: u64 = 1 << 0;
const STRING: u64 = 1 << 2;
const BYTE: u64 = 1 << 4;
const WORD: u64 = 1 << 5;

/// In the upper byte of ACPI's control register: sleep.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The keyboard controller's command port. Commands that pulse its lowest output reset the machine.
pub(crate) const KEYBOARD_PORT: u16 = 0x64;
const PULSE: u8 = 0xf0;
const PULSE_MASK: u8 = 0xf1;

impl Guest {
    /// IN or OUT of such a port, or of ports that it is among.
    pub(crate) fn access_port(&mut self) {
        let information = self.vmcb.control.exit_info_1;
        let port = (information >> 16) as u16;
        let value = self.register(RAX);
        if information & STRING != 0 {
            self.fail(
                Ending::Unsupported,
                format_args!("a string instruction on port {port:#x}, which ends the machine"),
            );
        }
        if information & INPUT != 0 {
            // SAFETY: the guest's own devices.
            let value = unsafe {
                match information & (BYTE | WORD) {
                    BYTE => value & !0xff | u32::from(inb(port)),
                    WORD => value & !0xffff | u32::from(inw(port)),
                    _ => inl(port),
                }
            };
            self.set_register(RAX, value);
        } else {
            let size = information >> 4 & 7;
            let written = |port_wanted: u16| {
                let offset = port_wanted.wrapping_sub(port);
                (u64::from(offset) < size).then(|| (value >> (8 * offset)) as u8)
            };
            if let Some(value) = written(EXIT_PORT) {
                self.conclude(format_args!("{OWN_END}{value:#x}"));
            }
            let sleeps = self.power_port.and_then(|port| written(port + 1));
            if sleeps.is_some_and(|value| value & SLEEP_ENABLE != 0) {
                self.conclude(format_args!("{POWER_OFF}"));
            }
            if written(KEYBOARD_PORT).is_some_and(|value| value & PULSE_MASK == PULSE) {
                self.conclude(format_args!("{RESET}"));
            }
            // SAFETY: as above. Without an exit device nothing happens, and the guest goes on.
            unsafe {
                match information & (BYTE | WORD) {
                    BYTE => outb(port, value as u8),
                    WORD => outw(port, value as u16),
                    _ => outl(port, value),
                }
            }
        }
        self.go_to(self.vmcb.control.exit_info_2 as u32);
    }
}
