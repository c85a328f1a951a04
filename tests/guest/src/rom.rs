//! The ROM: found, initialised and asked as Linux does it.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: reads the option-ROM area, and executes what it finds there"
)]

use crate::boot::PAGE_OFFSET;
use crate::harness::{self, Context, Entry, FLAT, Outcome, Registers};
use crate::paging::{self, ROM_AREA};
use crate::{processor, site};
use core::mem::offset_of;
use core::ops::Range;
use vmi_abi::header::{LENGTH_UNIT, RomHeader};
use vmi_abi::probe::{Refusal, SCAN_AREA, SCAN_STEP, probe};
use vmi_abi::{CallNumber, KEEP_SITE, REVISION_3_0, RelocationInfo};
use x86::controlregs::Cr0;

/// A ROM at one of the linear addresses at which it is mapped.
#[derive(Clone, Copy)]
pub(crate) struct Rom {
    /// Physical address of the image that was found.
    pub(crate) physical: u32,
    /// Linear address of the image that is used.
    pub(crate) base: u32,
    /// Bytes of the image.
    pub(crate) length: u32,
    /// Which of its places this is.
    pub(crate) place: &'static str,
}

/// The bytes of the option-ROM area from a physical address to the area's end.
fn area(physical: u32) -> &'static [u8] {
    let length = (ROM_AREA.end - physical) as usize;
    // SAFETY: the area is mapped, and read-only.
    unsafe { core::slice::from_raw_parts((PAGE_OFFSET + physical) as *const u8, length) }
}

impl Rom {
    /// Looks for a ROM of revision 3.0, and says what was passed over.
    pub(crate) fn find(mut passed_over: impl FnMut(u32, Refusal)) -> Option<Self> {
        for physical in SCAN_AREA.step_by(SCAN_STEP as usize) {
            match probe(area(physical), REVISION_3_0) {
                Ok(header) => {
                    let length = u32::from(header.rom_length) * LENGTH_UNIT as u32;
                    return Some(Self {
                        physical,
                        base: PAGE_OFFSET + physical,
                        length,
                        place: "direct",
                    });
                }
                Err(Refusal::NoRomSignature) => {}
                Err(refusal) => passed_over(physical, refusal),
            }
        }
        None
    }

    /// The image's bytes where they were found.
    pub(crate) fn bytes(&self) -> &'static [u8] {
        &area(self.physical)[..self.length as usize]
    }

    /// The same ROM through the second alias.
    pub(crate) fn through_alias(self) -> Self {
        Self { base: paging::ALIAS + self.physical - ROM_AREA.start, place: "alias", ..self }
    }

    /// A copy of the ROM in ordinary memory.
    pub(crate) fn copied(self) -> Self {
        let copy = &raw mut paging::ROM_COPY;
        assert!(self.length as usize <= paging::ROM_COPY_SIZE);
        let cr0 = processor::cr0();
        processor::set_cr0(cr0 & !(Cr0::CR0_WRITE_PROTECT.bits() as u32));
        // SAFETY: long enough, and executed by nobody yet. It is mapped read-only, as the ROM's
        // storage is, which is why write protection is off for the moment.
        unsafe {
            core::ptr::copy_nonoverlapping(self.bytes().as_ptr(), copy.cast(), self.length as usize)
        };
        processor::set_cr0(cr0);
        Self { base: copy as u32, place: "copy", ..self }
    }

    /// Where the image's code may be.
    pub(crate) fn code(&self) -> Range<u32> {
        self.base..self.base + self.length
    }

    /// Runs `vmi_init`: EAX = 0 on success.
    pub(crate) fn initialize(&self) -> Outcome {
        self.enter(offset_of!(RomHeader, vmi_init), 0, 0)
    }

    /// Runs `get_reloc`.
    pub(crate) fn ask(&self, number: CallNumber, flags: u32) -> (RelocationInfo, Outcome) {
        let outcome = self.enter(offset_of!(RomHeader, get_reloc), number.0, flags);
        let Registers { eax, edx, .. } = outcome.after.registers;
        (RelocationInfo::from_registers(eax, edx), outcome)
    }

    /// The code of a call that leaves its site alone, where that is not what `get_reloc` answers.
    pub(crate) fn plain(&self, number: CallNumber) -> Option<u32> {
        let (answer, _) = self.ask(number, 0);
        let (plain, _) = self.ask(CallNumber(number.0 | KEEP_SITE), 0);
        (plain.kind == answer.kind && plain.eip != answer.eip).then_some(plain.eip.get())
    }

    fn enter(&self, offset: usize, eax: u32, eflags: u32) -> Outcome {
        let pointer = self.base + offset as u32;
        harness::run(&Entry {
            context: Context {
                registers: Registers { eax, ecx: 0x1111_1111, edx: 0x2222_2222, ..KEPT },
                esp: 0,
                eflags: 2 | eflags,
                segments: FLAT,
            },
            stack: &[],
            target: site::own_site(pointer),
            by_call: true,
            code: self.code(),
            watch: None,
            demand: None,
        })
    }
}

/// Registers that no entry point may change.
pub(crate) const KEPT: Registers = Registers {
    eax: 0,
    ecx: 0,
    edx: 0,
    ebx: 0x3333_3333,
    ebp: 0x4444_4444,
    esi: 0x5555_5555,
    edi: 0x6666_6666,
};
