//! The ROM's entry at POST: who brings a ROM into a machine enters it once, in real mode, while its memory can be written.

use crate::guest::Guest;
use crate::machine::Machine;
use crate::report::{Ending, give_up};
use crate::svm::{RSP, Segment, exit as code};
use crate::vcpu;
use vmi_hypervisor::memory::Memory;

/// Where the entry returns to: conventional memory that firmware has done with, and no kernel is loaded to yet.
const RETURN: u16 = 0x7000;

/// VMMCALL.
const BACK: [u8; 3] = [0x0f, 0x01, 0xd9];

/// Where the entry lies in an image.
const ENTRY: u64 = 3;

/// A segment of real mode: code or data that can be written, 64 KiB.
const fn real_mode(base: u64) -> Segment {
    Segment { selector: (base >> 4) as u16, attributes: 0x093, limit: 0xffff, base }
}

impl Guest {
    /// Enters the ROM as firmware does: far, with a stack and interrupts off. AX would say which card it is on.
    pub(crate) fn run_post(&mut self) {
        let start = self.machine.rom.guest;
        let address = u64::from(RETURN);
        let before: [u8; BACK.len()] =
            core::array::from_fn(|index| Machine::byte(u32::from(RETURN) + index as u32));
        self.machine.store(address, &BACK);
        // The far return's offset and segment.
        let stack = address - 4;
        self.machine.store(stack, &[RETURN as u8, (RETURN >> 8) as u8, 0, 0]);

        self.machine.rom_is_writable = true;
        self.nest();
        let state = &mut self.vmcb.state;
        state.cr0 = 0x10;
        (state.ss, state.ds, state.es, state.fs, state.gs) =
            (real_mode(0), real_mode(0), real_mode(0), real_mode(0), real_mode(0));
        state.cs = Segment { attributes: 0x09b, ..real_mode(start) };
        // The interrupt vectors of real mode.
        state.idtr = Segment { limit: 0x3ff, ..Segment::default() };
        state.rip = ENTRY;
        self.set_register(RSP, stack as u32);
        loop {
            self.enter();
            let state = &self.vmcb.state;
            let is_back = state.cs.base == 0 && state.rip == address;
            if self.vmcb.control.exit_code == code::VMMCALL && is_back {
                break;
            }
            self.handle();
            self.resume_event();
        }
        self.machine.rom_is_writable = false;
        self.machine.store(address, &before);
        let image = (0..self.machine.rom_length)
            .map(|offset| self.machine.read(start + offset, 1).unwrap_or_default() as u8);
        if image.fold(0, u8::wrapping_add) != 0 {
            give_up(
                Ending::BadArguments,
                format_args!("the ROM: after POST its bytes do not add up to 0"),
            );
        }
        vcpu::reset(self.vmcb);
    }
}
