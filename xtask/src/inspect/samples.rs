//! Small images assembled by hand, right ones and ones with a single fault, in styles that are not
//! those of our own image.

use iced_x86::code_asm::*;
use std::collections::BTreeMap;
use std::mem::offset_of;
use vmi_abi::RomHeader;
use vmi_abi::header::{LENGTH_UNIT, checksum};
use vmi_abi::{CALLS_3_0, CallNumber, RelocationType, number};

const VMI_INIT: usize = offset_of!(RomHeader, vmi_init);
const GET_RELOC: usize = offset_of!(RomHeader, get_reloc);

/// Where things lie in a sample.
const PCI: usize = 0x90;
const PNP: usize = 0xb0;
const STRINGS: usize = 0xd0;
const INIT: usize = 0x130;
const LOOKUP: usize = 0x180;
const STUBS: usize = 0x800;
const STUB_SIZE: usize = 64;
const ROWS: usize = 0x500;
const LENGTH: usize = 0x1000;

/// Where the code lies that calls share.
pub(super) const HELPER: usize = 0xd00;

/// `push imm32`.
const PUSH: u8 = 0x68;

/// How `get_reloc` finds its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lookup {
    /// A table of distances.
    Table,
    /// A chain of comparisons that ends in a jump through a register.
    Chain,
    /// A table that knows of KEEP_SITE: behind the type it has the distance to the plain code.
    Sites,
}

/// An image to be built.
pub(super) struct Sample {
    stubs: BTreeMap<u32, (u8, Vec<u8>)>,
    lookup: Lookup,
    custom_lookup: Option<Vec<u8>>,
    init: Vec<u8>,
    license: &'static [u8],
    helper: Vec<u8>,
    plain: u8,
}

/// Assembles code for a place of its own choice; it must not depend on the place.
pub(super) fn assemble(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(32).expect("32-bit code");
    write(&mut assembler).expect("instructions that exist");
    assembler.assemble(0).expect("code that can be encoded")
}

use iced_x86::IcedError;

impl Sample {
    /// A right image with the least that a guest needs.
    pub(super) fn new() -> Self {
        let mut sample = Self {
            stubs: BTreeMap::new(),
            lookup: Lookup::Table,
            custom_lookup: None,
            init: assemble(|a| {
                a.xor(eax, eax)?;
                a.ret()
            }),
            license: b"GPL\0",
            helper: Vec::new(),
            plain: 0,
        };
        sample.call(number::EnableInterrupts, |a| {
            a.sti()?;
            a.ret()
        });
        sample.call(number::DisableInterrupts, |a| {
            a.cli()?;
            a.ret()
        });
        sample.call(number::GetInterruptMask, |a| {
            a.pushfd()?;
            a.pop(eax)?;
            a.ret()
        });
        sample.call(number::SetInterruptMask, |a| {
            a.push(eax)?;
            a.popfd()?;
            a.ret()
        });
        sample.call(number::IRET, |a| {
            a.add(esp, 4)?;
            a.iretd()
        });
        sample.answer(number::SYSEXIT, RelocationType::JUMP_REL, |a| {
            a.sti()?;
            a.sysexit()
        });
        sample
    }

    /// Answers a call with CALL_REL and this code.
    pub(super) fn call(
        &mut self,
        number: CallNumber,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> &mut Self {
        self.answer(number, RelocationType::CALL_REL, write)
    }

    /// Answers a call with a type and this code.
    pub(super) fn answer(
        &mut self,
        number: CallNumber,
        kind: RelocationType,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> &mut Self {
        self.stubs.insert(number.0, (kind.0, assemble(write)));
        self
    }

    /// Answers a call NONE.
    pub(super) fn none(&mut self, number: CallNumber) -> &mut Self {
        self.stubs.remove(&number.0);
        self
    }

    pub(super) fn lookup(&mut self, lookup: Lookup) -> &mut Self {
        self.lookup = lookup;
        self
    }

    pub(super) fn custom_lookup(
        &mut self,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> &mut Self {
        self.custom_lookup = Some(assemble(write));
        self
    }

    pub(super) fn init(
        &mut self,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> &mut Self {
        self.init = assemble(write);
        self
    }

    pub(super) fn license(&mut self, license: &'static [u8]) -> &mut Self {
        self.license = license;
        self
    }

    /// Code that calls share, at [`HELPER`].
    pub(super) fn helper(
        &mut self,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> &mut Self {
        self.helper = assemble(write);
        self
    }

    /// How far behind their entry calls that begin with PUSH have their plain code.
    pub(super) fn plain(&mut self, distance: u8) -> &mut Self {
        self.plain = distance;
        self
    }

    /// Where a call's code lies.
    pub(super) fn offset(&self, number: CallNumber) -> usize {
        STUBS + STUB_SIZE * self.stubs.range(..number.0).count()
    }

    /// The finished image.
    pub(super) fn build(&self) -> Vec<u8> {
        let mut image = vec![0; LENGTH];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let word = |value: usize| (value as u16).to_le_bytes();
        put(0, &[0x55, 0xaa, (LENGTH / LENGTH_UNIT) as u8, 0xcb]);
        put(8, b"cVmi\0\x03");
        put(22, &word(STRINGS));
        put(24, &word(PCI));
        put(26, &word(PNP));
        put(VMI_INIT, &jump(VMI_INIT, INIT));
        put(GET_RELOC, &jump(GET_RELOC, LOOKUP));
        put(PCI, b"PCIR\xad\x15\x01\x08\0\0\x18\0\0\0\0\x08");
        put(PCI + 16, &word(LENGTH / LENGTH_UNIT));
        put(PCI + 21, &[0x80]);
        put(STRINGS, self.license);
        put(STRINGS + 32, b"maker\0product\0");
        put(PNP, b"$PnP\x01\x02");
        put(PNP + 14, &word(STRINGS + 32));
        put(PNP + 16, &word(STRINGS + 38));
        put(INIT, &self.init);
        put(HELPER, &self.helper);
        put(LOOKUP, &self.custom_lookup.clone().unwrap_or_else(|| self.lookup_code()));
        for number in 0..CALLS_3_0.len() as u32 {
            let Some((kind, code)) = self.stubs.get(&number) else { continue };
            let (row, offset) = (ROWS + 8 * number as usize, self.offset(CallNumber(number)));
            assert!(code.len() <= STUB_SIZE);
            put(offset, code);
            put(row, &((offset - row) as u32).to_le_bytes());
            let rewrites = code.first() == Some(&PUSH);
            put(row + 4, &[*kind, if rewrites { self.plain } else { 0 }]);
        }
        repair(&mut image);
        image
    }

    fn lookup_code(&self) -> Vec<u8> {
        match self.lookup {
            Lookup::Table => assemble(|a| {
                let (mut here, mut none) = (a.create_label(), a.create_label());
                a.call(here)?;
                a.set_label(&mut here)?;
                a.pop(ecx)?;
                a.cmp(eax, CALLS_3_0.len() as u32)?;
                a.jae(none)?;
                a.lea(ecx, ptr(ecx + eax * 8 + (ROWS - LOOKUP - 5) as i32))?;
                a.movzx(edx, byte_ptr(ecx + 4))?;
                a.mov(eax, ptr(ecx))?;
                a.add(eax, ecx)?;
                a.ret()?;
                a.set_label(&mut none)?;
                a.xor(edx, edx)?;
                a.ret()
            }),
            Lookup::Sites => assemble(|a| {
                let (mut here, mut none, mut out) =
                    (a.create_label(), a.create_label(), a.create_label());
                a.call(here)?;
                a.set_label(&mut here)?;
                a.pop(ecx)?;
                a.btr(eax, 31)?;
                a.setc(dl)?;
                a.cmp(eax, CALLS_3_0.len() as u32)?;
                a.jae(none)?;
                a.lea(ecx, ptr(ecx + eax * 8 + (ROWS - LOOKUP - 5) as i32))?;
                a.mov(eax, ptr(ecx))?;
                a.add(eax, ecx)?;
                a.test(dl, dl)?;
                a.movzx(edx, byte_ptr(ecx + 5))?;
                a.jz(out)?;
                a.add(eax, edx)?;
                a.set_label(&mut out)?;
                a.movzx(edx, byte_ptr(ecx + 4))?;
                a.ret()?;
                a.set_label(&mut none)?;
                a.xor(edx, edx)?;
                a.ret()
            }),
            Lookup::Chain => assemble(|a| {
                let (mut here, mut out) = (a.create_label(), a.create_label());
                a.push(ebx)?;
                a.call(here)?;
                a.set_label(&mut here)?;
                a.pop(ebx)?;
                a.sub(ebx, (LOOKUP + 6) as u32)?;
                a.mov(ecx, eax)?;
                a.xor(edx, edx)?;
                for (number, (kind, _)) in &self.stubs {
                    let mut next = a.create_label();
                    a.cmp(ecx, *number)?;
                    a.jne(next)?;
                    a.lea(eax, ptr(ebx + self.offset(CallNumber(*number)) as i32))?;
                    a.mov(edx, u32::from(*kind))?;
                    a.jmp(out)?;
                    a.set_label(&mut next)?;
                    a.nop()?;
                }
                a.set_label(&mut out)?;
                a.pop(ebx)?;
                a.pop(ecx)?;
                a.jmp(ecx)
            }),
        }
    }
}

/// A near jump.
fn jump(from: usize, to: usize) -> [u8; 5] {
    let [a, b, c, d] = (to.wrapping_sub(from + 5) as u32).to_le_bytes();
    [0xe9, a, b, c, d]
}

/// Sets the checksums of the `$PnP` structure and of the image.
pub(super) fn repair(image: &mut [u8]) {
    image[PNP + 9] = 0;
    image[PNP + 9] = checksum(&image[PNP..PNP + 32]).wrapping_neg();
    seal(image);
}

/// Sets the image's checksum alone.
pub(super) fn seal(image: &mut [u8]) {
    let last = image.len() - 1;
    image[last] = 0;
    image[last] = checksum(image).wrapping_neg();
}
