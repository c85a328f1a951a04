//! Images of revision 13.x assembled by hand: a right one, and what a test changes in it.

use super::samples::{assemble, seal};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::collections::BTreeMap;
use vmi_abi::header::{LENGTH_UNIT, SLOT_SIZE, SLOT_TABLE_SIZE, checksum};
use vmi_abi::{REVISION_13_0, Revision, Slot, slot};

/// Where things lie: all structures under the slots, code that is too long for its slot behind the last call.
const PCI: usize = 0x20;
const PNP: usize = 0x40;
const STRINGS: usize = 0x60;
const SPARE: usize = 88 * SLOT_SIZE;
const SPARE_SIZE: usize = 0x80;
const LENGTH: usize = 0x2000;

/// The prefixes, for [`asm`].
pub(super) const LOCK: u8 = 0xf0;
const REP: u8 = 0xf3;

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// An image to be built.
pub(super) struct Slots {
    revision: Revision,
    code: BTreeMap<usize, Vec<u8>>,
    length: usize,
}

/// Where a call's slot is.
pub(super) fn offset(number: u8) -> usize {
    Slot { number, since_minor: 0 }.offset()
}

impl Slots {
    /// A right image that does on bare hardware what can be done there.
    pub(super) fn new(minor: u8) -> Self {
        let revision = Revision { minor, ..REVISION_13_0 };
        let mut sample = Self { revision, code: BTreeMap::new(), length: LENGTH };
        for (number, call) in revision.calls() {
            let at = number as usize * SLOT_SIZE;
            match call.name {
                "SetDR" | "GetDR" => {
                    let spare = SPARE + if call.name == "SetDR" { 0 } else { SPARE_SIZE };
                    sample.code.insert(at, jump(at, spare));
                    sample.code.insert(spare, debug_register(call.name == "SetDR"));
                }
                name => sample.at(at, native(name)),
            }
        }
        sample
    }

    /// Puts code at an offset.
    fn at(&mut self, offset: usize, write: Write) {
        self.code.insert(offset, assemble(write));
    }

    /// Puts other code into a slot.
    pub(super) fn slot(&mut self, number: u8, write: Write) -> &mut Self {
        self.bytes(offset(number), &assemble(write))
    }

    /// Puts bytes at an offset.
    pub(super) fn bytes(&mut self, offset: usize, bytes: &[u8]) -> &mut Self {
        self.code.insert(offset, bytes.to_vec());
        self
    }

    /// Lets a slot jump to code somewhere else.
    pub(super) fn moved(&mut self, number: u8, to: usize) -> &mut Self {
        let from = offset(number);
        let old = self.code.insert(from, jump(from, to)).unwrap_or_default();
        self.bytes(to, &old)
    }

    /// Lets GetRelocationInfo answer a type for one call, and for all others what is right.
    pub(super) fn answer_type(&mut self, number: u8, kind: u32) -> &mut Self {
        self.lookup_at(SPARE + 2 * SPARE_SIZE, number, |a| a.mov(edx, kind))
    }

    /// Lets GetRelocationInfo answer another place for one call.
    pub(super) fn answer_place(&mut self, number: u8, place: usize) -> &mut Self {
        self.lookup_at(SPARE + 2 * SPARE_SIZE, number, |a| a.lea(eax, ptr(ecx + place as i32)))
    }

    /// Lets GetRelocationInfo jump to code that answers for one call as `exception` says: the image's base is in ECX,
    /// EDX:EAX is what would be right.
    pub(super) fn lookup_at(
        &mut self,
        to: usize,
        number: u8,
        exception: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> &mut Self {
        let from = slot::GetRelocationInfo.offset();
        self.code.insert(from, jump(from, to));
        let lookup = assemble(|a| {
            let (mut here, mut out) = (a.create_label(), a.create_label());
            a.xor(edx, edx)?;
            a.lea(ecx, ptr(eax - 4))?;
            a.cmp(ecx, 83)?;
            a.ja(out)?;
            a.call(here)?;
            a.set_label(&mut here)?;
            a.pop(ecx)?;
            a.sub(ecx, (to + 15) as u32)?;
            a.shl(eax, 5)?;
            a.inc(edx)?;
            a.cmp(eax, offset(number) as u32)?;
            a.lea(eax, ptr(eax + ecx))?;
            a.jne(out)?;
            exception(a)?;
            a.set_label(&mut out)?;
            a.ret()
        });
        self.bytes(to, &lookup)
    }

    /// Makes the image as long as this.
    pub(super) fn length(&mut self, length: usize) -> &mut Self {
        self.length = length;
        self
    }

    /// The finished image.
    pub(super) fn build(&self) -> Vec<u8> {
        let units = LENGTH / LENGTH_UNIT;
        let mut image = vec![0; LENGTH];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let word = |value: usize| (value as u16).to_le_bytes();
        put(0, &[0x55, 0xaa, units as u8, 0xcb]);
        put(8, b"cVmi");
        put(12, &[self.revision.minor, self.revision.major]);
        put(24, &word(PCI));
        put(26, &word(PNP));
        put(PCI, b"PCIR\xad\x15\x01\x08\0\0\x18\0\0\0\0\x08");
        put(PCI + 16, &word(units));
        put(PCI + 21, &[0x80]);
        put(STRINGS, b"maker\0slots\0");
        put(PNP, b"$PnP\x01\x02");
        put(PNP + 14, &word(STRINGS));
        put(PNP + 16, &word(STRINGS + 6));
        for (at, code) in &self.code {
            put(*at, code);
        }
        image.truncate(self.length);
        let units = self.length / LENGTH_UNIT;
        image[2] = units as u8;
        image[PCI + 16] = units as u8;
        image[PNP + 9] = checksum(&image[PNP..PNP + 32]).wrapping_neg();
        seal(&mut image);
        image
    }
}

/// A jump from one offset to another.
pub(super) fn jump(from: usize, to: usize) -> Vec<u8> {
    let distance = (to as u32).wrapping_sub(from as u32 + 5);
    [0xe9].into_iter().chain(distance.to_le_bytes()).collect()
}

/// SetDR or GetDR, for the registers that exist.
fn debug_register(set: bool) -> Vec<u8> {
    let registers = [(0, dr0), (1, dr1), (2, dr2), (3, dr3), (6, dr6), (7, dr7)];
    assemble(|a| {
        for (number, register) in registers {
            let mut next = a.create_label();
            a.cmp(eax, number)?;
            a.jne(next)?;
            if set {
                a.mov(register, edx)?;
            } else {
                a.mov(eax, register)?;
            }
            a.ret()?;
            a.set_label(&mut next)?;
            a.nop()?;
        }
        a.ret()
    })
}

macro_rules! asm {
    ($( $name:ident $( ( $($argument:expr),* ) )? ;)*) => {
        |a: &mut CodeAssembler| { $( a.$name($($($argument),*)?)?; )* Ok(()) }
    };
}
pub(super) use asm;

/// The code of a call on bare hardware.
fn native(name: &str) -> Write {
    match name {
        "Init" => asm! { xor(eax, eax); ret; },
        "CPUID" => asm! { cpuid; ret; },
        "WRMSR" => asm! { wrmsr; ret; },
        "RDMSR" => asm! { rdmsr; ret; },
        "SetGDT" => asm! { lgdt(ptr(eax)); ret; },
        "SetLDT" => asm! { lldt(ax); ret; },
        "SetIDT" => asm! { lidt(ptr(eax)); ret; },
        "SetTR" => asm! { ltr(ax); ret; },
        "GetGDT" => asm! { sgdt(ptr(eax)); ret; },
        "GetLDT" => asm! { sldt(eax); ret; },
        "GetIDT" => asm! { sidt(ptr(eax)); ret; },
        "GetTR" => asm! { str(eax); ret; },
        "WriteGDTEntry" | "WriteLDTEntry" | "WriteIDTEntry" => asm! {
            mov(dword_ptr(eax + edx * 8), ecx); mov(ecx, dword_ptr(esp + 4));
            mov(dword_ptr(eax + edx * 8 + 4), ecx); ret;
        },
        // Limit and base of the GDT, then the descriptor of the task state segment.
        "UpdateKernelStack" => asm! {
            push(eax); push(eax); sgdt(ptr(esp)); pop(ax); pop(ecx); pop(ax); str(eax); add(ecx, eax);
            mov(eax, dword_ptr(ecx + 2)); shl(eax, 8); mov(al, byte_ptr(ecx + 7)); ror(eax, 8);
            mov(dword_ptr(eax + 4), edx); ret;
        },
        "SetCR0" => asm! { mov(cr0, eax); ret; },
        "SetCR2" => asm! { mov(cr2, eax); ret; },
        "SetCR3" => asm! { mov(cr3, eax); ret; },
        "SetCR4" => asm! { mov(cr4, eax); ret; },
        "GetCR0" => asm! { mov(eax, cr0); ret; },
        "GetCR2" => asm! { mov(eax, cr2); ret; },
        "GetCR3" => asm! { mov(eax, cr3); ret; },
        "GetCR4" => asm! { mov(eax, cr4); ret; },
        "INVD" => asm! { invd; ret; },
        "WBINVD" => asm! { wbinvd; ret; },
        "RDPMC" => asm! { rdpmc; ret; },
        "RDTSC" | "GetCycleCounter" => asm! { rdtsc; ret; },
        "CLTS" => asm! { clts; ret; },
        "EnableInterrupts" => asm! { sti; ret; },
        "DisableInterrupts" => asm! { cli; ret; },
        "GetInterruptMask" => asm! { pushfd; pop(eax); ret; },
        "SetInterruptMask" => asm! { push(eax); popfd; ret; },
        "IRET" => asm! { iretd; },
        "SYSEXIT" => asm! { sti; sysexit; },
        "Pause" => asm! { pause; ret; },
        "Halt" => asm! { sti; hlt; ret; },
        "Reboot" => asm! { mov(al, 0xfe); out(0x64, al); cli; hlt; db(&[0xeb, 0xfc]); },
        "Shutdown" => asm! { cli; hlt; db(&[0xeb, 0xfc]); },
        "SetPxETwoArguments" | "SetPxE" => asm! { mov(dword_ptr(edx), eax); ret; },
        "GetPxE" | "APICRead" => asm! { mov(eax, dword_ptr(eax)); ret; },
        "SwapPxE" => asm! { xchg(dword_ptr(edx), eax); ret; },
        "SetPxELongTwoArguments" | "SetPxELong" => asm! {
            mov(dword_ptr(ecx), 0); mov(dword_ptr(ecx + 4), edx); mov(dword_ptr(ecx), eax); ret;
        },
        "GetPxELong" => asm! { mov(edx, dword_ptr(eax + 4)); mov(eax, dword_ptr(eax)); ret; },
        "SwapPxELongAtomic" => |a| {
            a.push(ebx)?;
            a.push(esi)?;
            a.mov(ebx, eax)?;
            a.mov(esi, ecx)?;
            a.mov(ecx, edx)?;
            exchange_long(a)
        },
        "DeactivatePxELongAtomic" => |a| {
            a.push(ebx)?;
            a.push(esi)?;
            a.mov(esi, eax)?;
            a.xor(ebx, ebx)?;
            a.xor(ecx, ecx)?;
            exchange_long(a)
        },
        "TestAndSetPxEBit" | "TestAndSetPxELongBit" => {
            asm! { db(&[LOCK]); bts(dword_ptr(edx), eax); sbb(eax, eax); ret; }
        }
        "TestAndClearPxEBit" | "TestAndClearPxELongBit" => {
            asm! { db(&[LOCK]); btr(dword_ptr(edx), eax); sbb(eax, eax); ret; }
        }
        "InvalPage" => asm! { invlpg(ptr(eax)); ret; },
        "FlushTLB" => asm! { mov(eax, cr3); mov(cr3, eax); ret; },
        "INL" => asm! { in_(eax, dx); ret; },
        "INB" => asm! { in_(al, dx); ret; },
        "INW" => asm! { in_(ax, dx); ret; },
        "INSL" => asm! { db(&[REP]); insd; ret; },
        "INSB" => asm! { db(&[REP]); insb; ret; },
        "INSW" => asm! { db(&[REP]); insw; ret; },
        "OUTL" => asm! { out(dx, eax); ret; },
        "OUTB" => asm! { out(dx, al); ret; },
        "OUTW" => asm! { out(dx, ax); ret; },
        "OUTSL" => asm! { db(&[REP]); outsd; ret; },
        "OUTSB" => asm! { db(&[REP]); outsb; ret; },
        "OUTSW" => asm! { db(&[REP]); outsw; ret; },
        "SetIOPLMask" => asm! {
            pushfd; and(dword_ptr(esp), !0x3000); and(eax, 0x3000); or(dword_ptr(esp), eax); popfd; ret;
        },
        "APICWrite" => asm! { mov(dword_ptr(eax), edx); ret; },
        "IODelay" => asm! { out(0x80, al); ret; },
        "GetCycleFrequency" => asm! { mov(eax, 1_000_000_000); xor(edx, edx); ret; },
        "CancelAlarm" | "WallclockUpdated" => asm! { xor(eax, eax); ret; },
        "GetWallclockTime" => asm! { xor(eax, eax); xor(edx, edx); ret; },
        "GetRelocationInfo" => |a| {
            let (mut here, mut out) = (a.create_label(), a.create_label());
            a.xor(edx, edx)?;
            a.lea(ecx, ptr(eax - 4))?;
            a.cmp(ecx, 83)?;
            a.ja(out)?;
            a.call(here)?;
            a.set_label(&mut here)?;
            a.pop(ecx)?;
            a.shl(eax, 5)?;
            a.lea(eax, ptr(ecx + eax - (slot::GetRelocationInfo.offset() + 15) as i32))?;
            a.inc(edx)?;
            a.set_label(&mut out)?;
            a.ret()
        },
        "SetAlarm" | "AllocatePage" | "ReleasePage" | "SetLinearMapping" | "SetInitialAPState"
        | "FlushDeferredCalls" => asm! { ret; },
        other => panic!("no code for {other}"),
    }
}

/// Exchanges the 64 bits at ESI for ECX:EBX, and restores what [`native`] pushed.
fn exchange_long(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(eax, dword_ptr(esi))?;
    a.mov(edx, dword_ptr(esi + 4))?;
    a.set_label(&mut again)?;
    a.lock().cmpxchg8b(qword_ptr(esi))?;
    a.jne(again)?;
    a.pop(esi)?;
    a.pop(ebx)?;
    a.ret()
}

/// Behind what guests copy.
pub(super) const BEHIND: usize = SLOT_TABLE_SIZE + 0x100;
