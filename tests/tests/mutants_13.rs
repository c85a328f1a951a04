//! ROMs of revision 13.3 with one broken slot each: the guest must fail them, and name the call and the rule.
//!
//! The calls that 3.0 has too are broken in `mutants.rs`, and checked by the same code.

use anyhow::{Result, ensure};
use iced_x86::IcedError;
use iced_x86::code_asm::registers::gpr8::{al, dl};
use iced_x86::code_asm::registers::gpr16::ax;
use iced_x86::code_asm::registers::gpr32::*;
use iced_x86::code_asm::*;
use std::time::Duration;
use vmi_abi::header::SLOT_SIZE;
use vmi_abi::{REVISION_13_3, Slot};
use vmi_tests::{all_are_caught, names_the_fault};
use xtask::artifacts;
use xtask::conformance::{self, Client, Subject};
use xtask::image;
use xtask::qemu::{Attachment, Machine};

type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A broken slot.
struct Mutant {
    call: &'static str,
    /// What is wrong with it.
    fault: &'static str,
    /// What is in the slot instead.
    code: Code,
    /// Words that the guest's complaint must contain.
    complaint: &'static str,
    /// The client that must notice.
    client: Client,
}

const fn mutant(
    call: &'static str,
    fault: &'static str,
    code: Code,
    complaint: &'static str,
) -> Mutant {
    Mutant { call, fault, code, complaint, client: Client::PointerTable }
}

/// Does nothing.
const NOTHING: Code = |a| a.ret();

/// Offset of a call's slot.
fn slot_of(name: &str) -> usize {
    let call = REVISION_13_3.calls().find(|(_, call)| call.name == name);
    call.and_then(|(_, call)| call.contract.slot).map_or(0, Slot::offset)
}

const MUTANTS: &[Mutant] = &[
    mutant(
        "Init",
        "does not succeed",
        |a| {
            a.mov(eax, 1)?;
            a.ret()
        },
        "EAX",
    ),
    mutant(
        "GetRelocationInfo",
        "knows slots that there are not",
        |a| {
            let mut here = a.create_label();
            a.call(here)?;
            a.set_label(&mut here)?;
            a.pop(ecx)?;
            a.shl(eax, 5)?;
            a.lea(eax, dword_ptr(ecx + eax - (slot_of("GetRelocationInfo") as i32 + 5)))?;
            a.mov(edx, 1)?;
            a.ret()
        },
        "what is no call",
    ),
    mutant(
        "INVD",
        "loses a register",
        |a| {
            a.xor(ebx, ebx)?;
            a.ret()
        },
        "EBX",
    ),
    mutant(
        "Pause",
        "loses a register",
        |a| {
            a.xor(esi, esi)?;
            a.ret()
        },
        "ESI",
    ),
    mutant(
        "FlushDeferredCalls",
        "loses a flag",
        |a| {
            a.std()?;
            a.ret()
        },
        "EFLAGS",
    ),
    mutant("SetPxETwoArguments", "stores nothing", NOTHING, "word 3 around the entry"),
    mutant(
        "SetPxETwoArguments",
        "stores half of it",
        |a| {
            a.mov(word_ptr(edx), ax)?;
            a.ret()
        },
        "word 3 around the entry",
    ),
    mutant(
        "SetPxELongTwoArguments",
        "stores one half after the other",
        |a| {
            a.mov(dword_ptr(ecx), eax)?;
            a.mov(dword_ptr(ecx + 4), edx)?;
            a.ret()
        },
        "torn",
    ),
    mutant("GetPxE", "reads nothing", NOTHING, "the result is"),
    mutant(
        "GetPxELong",
        "reads one half after the other",
        |a| {
            a.mov(edx, dword_ptr(eax + 4))?;
            a.mov(eax, dword_ptr(eax))?;
            a.ret()
        },
        "another processor changed it: true",
    ),
    mutant(
        "SwapPxE",
        "reads, then stores",
        |a| {
            a.mov(ecx, dword_ptr(edx))?;
            a.mov(dword_ptr(edx), eax)?;
            a.mov(eax, ecx)?;
            a.ret()
        },
        "another processor changed it: true",
    ),
    mutant(
        "SwapPxE",
        "forgets the old value",
        |a| {
            a.mov(dword_ptr(edx), eax)?;
            a.ret()
        },
        "another processor changed it: false",
    ),
    mutant(
        "SwapPxELongAtomic",
        "reads, then stores",
        |a| {
            a.push(dword_ptr(ecx))?;
            a.push(dword_ptr(ecx + 4))?;
            a.mov(dword_ptr(ecx), eax)?;
            a.mov(dword_ptr(ecx + 4), edx)?;
            a.pop(edx)?;
            a.pop(eax)?;
            a.ret()
        },
        "another processor changed it: true",
    ),
    mutant(
        "DeactivatePxELongAtomic",
        "reads, then stores",
        |a| {
            a.mov(ecx, eax)?;
            a.mov(eax, dword_ptr(ecx))?;
            a.mov(edx, dword_ptr(ecx + 4))?;
            a.and(dword_ptr(ecx), 0)?;
            a.and(dword_ptr(ecx + 4), 0)?;
            a.ret()
        },
        "another processor changed it: true",
    ),
    mutant(
        "TestAndSetPxEBit",
        "reads, then stores",
        |a| {
            a.mov(ecx, dword_ptr(edx))?;
            a.bts(ecx, eax)?;
            a.mov(dword_ptr(edx), ecx)?;
            a.setc(al)?;
            a.movzx(eax, al)?;
            a.ret()
        },
        "another processor changed it: true",
    ),
    mutant(
        "TestAndClearPxEBit",
        "sets it",
        |a| {
            a.lock().bts(dword_ptr(edx), eax)?;
            a.setc(al)?;
            a.movzx(eax, al)?;
            a.ret()
        },
        "another processor changed it: false",
    ),
    mutant(
        "TestAndSetPxELongBit",
        "knows 32 bits",
        |a| {
            a.and(eax, 31)?;
            a.lock().bts(dword_ptr(edx), eax)?;
            a.setc(al)?;
            a.movzx(eax, al)?;
            a.ret()
        },
        "another processor changed it: false",
    ),
    mutant(
        "TestAndClearPxELongBit",
        "answers the opposite",
        |a| {
            a.lock().btr(dword_ptr(edx), eax)?;
            a.setnc(al)?;
            a.movzx(eax, al)?;
            a.ret()
        },
        "another processor changed it: false",
    ),
    mutant(
        "IRET",
        "drops a return address that nobody pushed",
        |a| {
            a.add(esp, 4)?;
            a.iretd()
        },
        "IRET",
    ),
    mutant("SYSEXIT", "leaves interrupts off", |a| a.sysexit(), "EFLAGS in ring 3"),
    mutant(
        "APICRead",
        "takes an offset",
        |a| {
            a.mov(eax, 0)?;
            a.ret()
        },
        "the version register",
    ),
    mutant(
        "GetCycleCounter",
        "invents a counter",
        |a| {
            a.rdtsc()?;
            a.ret()
        },
        "counter 3",
    ),
    Mutant {
        call: "TestAndSetPxELongBit",
        fault: "lives in another slot",
        code: |a| a.jmp(slot_of("TestAndSetPxEBit") as u64),
        complaint: "exception 6",
        client: Client::CopiedSlots,
    },
    Mutant {
        call: "SetPxETwoArguments",
        fault: "finds its way by an absolute address",
        code: |a| {
            a.cmp(dl, 0)?;
            a.mov(dword_ptr(edx), eax)?;
            a.mov(ecx, 0xc00c_0000_u32)?;
            a.add(ecx, slot_of("Pause") as u32)?;
            a.jmp(ecx)
        },
        complaint: "exception",
        client: Client::CopiedSlots,
    },
];

#[test]
fn the_guest_names_every_broken_slot() -> Result<()> {
    let built = artifacts::ensure()?;
    let bytes = std::fs::read(&built.slots_13_3)?;
    let folder = tempfile::tempdir()?;
    let name = |mutant: &Mutant| format!("{} {}", mutant.call, mutant.fault);
    all_are_caught(MUTANTS, name, |mutant| {
        let path = folder.path().join(format!("{}.rom", name(mutant).replace(' ', "-")));
        std::fs::write(&path, broken(&bytes, mutant)?)?;
        let machine = Machine { limit: Duration::from_secs(30), ..Machine::default() };
        let rom = Some(Attachment::OptionRom(path));
        let subject = Subject { rom, client: mutant.client };
        let result = conformance::check(&built.emulator, &built.guest, &subject, &machine, |_| ())?;
        names_the_fault(&result, mutant.call, mutant.complaint)
    })
}

/// The image with other code in one slot.
fn broken(image: &[u8], mutant: &Mutant) -> Result<Vec<u8>> {
    let start = slot_of(mutant.call);
    ensure!(start != 0, "no call {}", mutant.call);
    let mut assembler = CodeAssembler::new(32)?;
    (mutant.code)(&mut assembler)?;
    let code = assembler.assemble(start as u64)?;
    ensure!(code.len() <= SLOT_SIZE, "the code does not fit");
    let mut bytes = image.to_vec();
    bytes[start..start + code.len()].copy_from_slice(&code);
    Ok(image::finish(&bytes, bytes.len())?)
}
