//! The ROM: found, initialised and asked as the kernels do that exist.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: reads the option-ROM area, and executes what it finds there"
)]

use crate::boot::PAGE_OFFSET;
use crate::client::Client;
use crate::harness::{self, Context, Entry, FLAT, Outcome, Registers};
use crate::paging::{self, PAGE, ROM_AREA, Space};
use crate::{devices, processor, site};
use core::mem::offset_of;
use core::ops::Range;
use vmi_abi::calls::SLOTS_13;
use vmi_abi::header::{LENGTH_UNIT, RomHeader, SLOT_SIZE, SLOT_TABLE_SIZE};
use vmi_abi::probe::{Refusal, SCAN_AREA, SCAN_STEP, probe};
use vmi_abi::{CallNumber, KEEP_SITE, RelocationInfo, RelocationType, Revision, slot};
use vmi_hv_backend::reference::interface::{GRANT_OFFSET, GRANT_SIGNATURE, Grant};
use x86::controlregs::Cr0;

/// Where the image that is used lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Where it was found.
    Direct,
    /// The same memory at another linear address.
    Alias,
    /// A copy in ordinary memory; of an image with slots, no more than those.
    Copy,
    /// A copy that the guest has changed: only the slot of the call that is tested is left.
    Patched,
}

impl Place {
    /// Each of them.
    pub(crate) const ALL: [Self; 4] = [Self::Direct, Self::Alias, Self::Copy, Self::Patched];

    /// Its name in the report.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Alias => "alias",
            Self::Copy => "copy",
            Self::Patched => "patched",
        }
    }
}

/// A ROM at one of its places.
#[derive(Clone, Copy)]
pub(crate) struct Rom {
    /// How the guest reaches its calls.
    pub(crate) client: Client,
    /// Physical address of the image that was found.
    pub(crate) physical: u32,
    /// Linear address of the image that is used.
    pub(crate) base: u32,
    /// Bytes of the image.
    pub(crate) length: u32,
    /// Which of its places this is.
    pub(crate) place: Place,
}

// One object for each revision; `xtask` makes them.
unsafe extern "C" {
    static vmi_native_rom: RomHeader;
    static mut vmi_native_site_rule: u8;
    static vmi_13_0_native_rom: RomHeader;
    static vmi_13_3_native_rom: RomHeader;
}

/// Writes where the page tables say that nobody does.
fn without_write_protection(write: impl FnOnce()) {
    let cr0 = processor::cr0();
    processor::set_cr0(cr0 & !(Cr0::CR0_WRITE_PROTECT.bits() as u32));
    write();
    processor::set_cr0(cr0);
}

/// The bytes of the option-ROM area from a physical address to the area's end.
fn area(physical: u32) -> &'static [u8] {
    let length = (ROM_AREA.end - physical) as usize;
    // SAFETY: the area is mapped, and read-only.
    unsafe { core::slice::from_raw_parts((PAGE_OFFSET + physical) as *const u8, length) }
}

impl Rom {
    /// Looks for a ROM of the client's revision, and says what was passed over.
    pub(crate) fn find(client: Client, mut passed_over: impl FnMut(u32, Refusal)) -> Option<Self> {
        for physical in SCAN_AREA.step_by(SCAN_STEP as usize) {
            match probe(area(physical), client.revision()) {
                Ok(header) => return Some(Self::found(client, header)),
                Err(Refusal::NoRomSignature) => {}
                Err(refusal) => passed_over(physical, refusal),
            }
        }
        None
    }

    /// The native backend that is linked in, for machines without a ROM.
    pub(crate) fn linked(client: Client) -> Self {
        let image = match client {
            Client::Lookup => &raw const vmi_native_rom,
            Client::CopiedSlots => &raw const vmi_13_0_native_rom,
            Client::PointerTable => &raw const vmi_13_3_native_rom,
        };
        // SAFETY: the objects begin with the header of an image.
        Self::found(client, unsafe { &*image })
    }

    /// The image that begins with this header, where it is.
    fn found(client: Client, header: &'static RomHeader) -> Self {
        let base = (&raw const *header) as u32;
        let length = u32::from(header.rom_length) * LENGTH_UNIT as u32;
        Self { client, physical: base - PAGE_OFFSET, base, length, place: Place::Direct }
    }

    /// Lets what is linked in rewrite call sites, as far as the machine allows; a kernel decides that for
    /// itself. No ROM of the machine's is touched, and only Linux's client has such calls.
    pub(crate) fn allow_rewriting(&self) {
        if !self.is_linked() || self.client != Client::Lookup {
            return;
        }
        // SAFETY: the byte is part of an instruction that nobody executes now, and no other processor runs.
        without_write_protection(|| unsafe {
            (&raw mut vmi_native_site_rule).write_volatile(devices::site_rule() as u8);
        });
    }

    /// Whether it is linked in.
    pub(crate) fn is_linked(&self) -> bool {
        !ROM_AREA.contains(&self.physical)
    }

    /// The image's bytes where they were found.
    pub(crate) fn bytes(&self) -> &'static [u8] {
        let start = (PAGE_OFFSET + self.physical) as *const u8;
        // SAFETY: the image was found there, so it is mapped, and nobody writes to it.
        unsafe { core::slice::from_raw_parts(start, self.length as usize) }
    }

    /// Maps the memory that the ROM was granted, at the same distance behind each of the places where the image
    /// is used. All other storage of the option-ROM area is read-only.
    pub(crate) fn map_grant(&self, space: Space) {
        let Some(grant) = self.grant() else { return };
        let images =
            [PAGE_OFFSET + self.physical, self.alias(), (&raw const paging::ROM_COPY) as u32];
        for address in grant.step_by(PAGE as usize) {
            let offset = address - self.physical;
            for image in images {
                space.map_writable(image + offset, address);
            }
        }
    }

    /// The memory that the ROM was granted, by its physical addresses; `None` if it wants none or has got none.
    pub(crate) fn grant(&self) -> Option<Range<u32>> {
        let word = |offset: usize| {
            let bytes = self.bytes().get(GRANT_OFFSET + offset..)?.first_chunk()?;
            Some(u32::from_le_bytes(*bytes))
        };
        let [signature, wanted, distance] =
            [offset_of!(Grant, signature), offset_of!(Grant, wanted), offset_of!(Grant, distance)]
                .map(|offset| word(offset).unwrap_or(0));
        let start = self.physical + distance;
        let is_there = signature == GRANT_SIGNATURE && distance != 0 && !self.is_linked();
        is_there.then(|| start..start + wanted.next_multiple_of(PAGE))
    }

    /// Where the image is seen a second time.
    fn alias(&self) -> u32 {
        paging::ALIAS + self.physical - ROM_AREA.start
    }

    /// Where the linear address space ends for the guest; 0 if it has all of it.
    pub(crate) fn virtual_top(&self) -> u32 {
        let field = self.bytes().get(offset_of!(RomHeader, virtual_top)..);
        field.and_then(<[u8]>::first_chunk).map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    /// The revision in its header.
    pub(crate) fn revision(&self) -> Revision {
        let header = |offset: usize| self.bytes()[offset];
        Revision {
            major: header(offset_of!(RomHeader, api_version_maj)),
            minor: header(offset_of!(RomHeader, api_version_min)),
        }
    }

    /// The same ROM at another of its places; `None` if it cannot be there.
    ///
    /// There is one copy at a time.
    pub(crate) fn at(self, place: Place) -> Option<Self> {
        match place {
            Place::Direct => Some(Self { base: PAGE_OFFSET + self.physical, place, ..self }),
            Place::Alias => (!self.is_linked()).then(|| Self { base: self.alias(), place, ..self }),
            // Who has a table of pointers into the image does not copy it.
            Place::Patched if self.client != Client::CopiedSlots => None,
            Place::Copy | Place::Patched => {
                let has_slots = self.client.revision().has_slots();
                let longest = if has_slots { SLOT_TABLE_SIZE as u32 } else { self.length };
                let length = self.length.min(longest);
                let copy = Self { base: (&raw mut paging::ROM_COPY) as u32, length, place, ..self };
                copy.write(0, &self.bytes()[..length as usize]);
                Some(copy)
            }
        }
    }

    /// Puts UD2 into all slots but one of a patched copy: what the others hold is the guest's own now.
    pub(crate) fn patch_all_but(&self, number: u32) {
        // UD2, over and over.
        const DEAD: [u8; SLOT_SIZE] = {
            let mut bytes = [0x0f; SLOT_SIZE];
            let mut place = 1;
            while place < SLOT_SIZE {
                bytes[place] = 0x0b;
                place += 2;
            }
            bytes
        };
        if self.place != Place::Patched {
            return;
        }
        for slot in SLOTS_13.map(usize::from) {
            let offset = slot * SLOT_SIZE;
            let original = &self.bytes()[offset..offset + SLOT_SIZE];
            self.write(offset, if slot as u32 == number { original } else { &DEAD });
        }
    }

    /// Writes into a copy, which is mapped read-only, as the ROM's storage is.
    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= paging::ROM_COPY_SIZE);
        let to = (&raw mut paging::ROM_COPY).cast::<u8>();
        // SAFETY: inside the copy, and executed by nobody now.
        without_write_protection(|| unsafe {
            core::ptr::copy_nonoverlapping(bytes.as_ptr(), to.add(offset), bytes.len());
        });
    }

    /// Where the image's code may be.
    pub(crate) fn code(&self) -> Range<u32> {
        self.base..self.base + self.length
    }

    /// Runs `vmi_init`, which is Init where there are slots: EAX = 0 on success.
    pub(crate) fn initialize(&self) -> Outcome {
        self.enter(offset_of!(RomHeader, vmi_init), 0, 0)
    }

    /// The answer for a call, by the client's own numbers.
    pub(crate) fn answer(&self, number: u32) -> RelocationInfo {
        self.ask(number, 0).0
    }

    /// Asks for a call, as the client does; nothing is run for a client that knows where its slots are.
    pub(crate) fn ask(&self, number: u32, flags: u32) -> (RelocationInfo, Option<Outcome>) {
        let offset = match self.client {
            Client::Lookup => offset_of!(RomHeader, get_reloc),
            Client::PointerTable => slot::GetRelocationInfo.offset(),
            Client::CopiedSlots => {
                let slot = self.base + number * SLOT_SIZE as u32;
                let kind = u32::from(RelocationType::CALL_REL.0);
                return (RelocationInfo::from_registers(slot, kind), None);
            }
        };
        let outcome = self.enter(offset, number, flags);
        let Registers { eax, edx, .. } = outcome.after.registers;
        (RelocationInfo::from_registers(eax, edx), Some(outcome))
    }

    /// The code of a call that leaves its site alone, where that is not what `get_reloc` answers.
    pub(crate) fn plain(&self, number: CallNumber) -> Option<u32> {
        let answer = self.answer(number.0);
        let plain = self.answer(number.0 | KEEP_SITE);
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
