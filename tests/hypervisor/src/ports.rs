//! The one port that is not passed through: the exit device's, so that the report comes before the end.

#![expect(unsafe_code, reason = "UNSAFETY: port I/O")]

use crate::console::drain;
use crate::guest::Guest;
use crate::report::Ending;
use crate::svm::RAX;
use x86::io::{inb, inl, inw, outb, outl, outw};

/// The exit's information: an input, a string instruction, the size.
const INPUT: u64 = 1 << 0;
const STRING: u64 = 1 << 2;
const BYTE: u64 = 1 << 4;
const WORD: u64 = 1 << 5;

impl Guest {
    /// IN or OUT of the exit device, or of ports that it is among.
    pub(crate) fn access_port(&mut self) {
        let information = self.vmcb.control.exit_info_1;
        let port = (information >> 16) as u16;
        let value = self.register(RAX);
        if information & STRING != 0 {
            self.fail(
                Ending::Unsupported,
                format_args!("a string instruction on the exit device's port"),
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
            self.conclude(format_args!("the guest ends itself with {:#x}", value as u8));
            drain();
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
