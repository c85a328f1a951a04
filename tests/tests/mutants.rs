//! ROMs with one broken call each: the guest must fail them, and name the call and the rule.
//!
//! A suite that cannot fail proves nothing. Each mutant is the image that answers CALL_REL wherever
//! it can (or, for the two that are jumped to, the one with the fastest answers) with other code for
//! one call. The code that rewrites call sites serves many calls: it is broken one instruction after
//! the other.

use anyhow::{Context, Result, ensure};
use iced_x86::IcedError;
use iced_x86::code_asm::registers::gpr32::*;
use iced_x86::code_asm::*;
use std::time::Duration;
use vmi_abi::{Answers, CALLS_3_0, CallNumber, RelocationType, number};
use vmi_tests::{Specimen, all_are_caught, names_the_fault};
use xtask::artifacts;
use xtask::conformance::{self, Subject};
use xtask::qemu::Machine;

type Code = fn(&mut CodeAssembler, u64) -> Result<(), IcedError>;

/// How a call is broken.
enum Change {
    /// Other code.
    Code(Code),
    /// Another answer of `get_reloc`.
    Answer(RelocationType),
}

use Change::{Answer, Code as With};

/// A broken call.
struct Mutant {
    call: CallNumber,
    /// What is wrong with it.
    fault: &'static str,
    change: Change,
    /// Words that the guest's complaint must contain.
    complaint: &'static str,
    /// Made from the image with the fastest answers.
    fastest: bool,
}

/// A mutant of the image that answers CALL_REL.
const fn mutant(
    call: CallNumber,
    fault: &'static str,
    change: Change,
    complaint: &'static str,
) -> Mutant {
    Mutant { call, fault, change, complaint, fastest: false }
}

/// A mutant of the image with the fastest answers.
const fn fastest(
    call: CallNumber,
    fault: &'static str,
    change: Change,
    complaint: &'static str,
) -> Mutant {
    Mutant { call, fault, change, complaint, fastest: true }
}

/// Does nothing.
const NOTHING: Code = |a, _| a.ret();

/// Ends in the original code.
fn original(a: &mut CodeAssembler, code: u64) -> Result<(), IcedError> {
    a.jmp(code)
}

const MUTANTS: &[Mutant] = &[
    mutant(
        number::CPUID,
        "forgets the subleaf",
        With(|a, code| {
            a.xor(ecx, ecx)?;
            original(a, code)
        }),
        "leaf 0x",
    ),
    mutant(
        number::CPUID,
        "invents a feature",
        With(|a, _| {
            a.cpuid()?;
            a.or(edx, 1 << 30)?;
            a.ret()
        }),
        "the processor's",
    ),
    mutant(
        number::WRMSR,
        "drops the high half",
        With(|a, code| {
            a.xor(edx, edx)?;
            original(a, code)
        }),
        "register 0x277",
    ),
    mutant(
        number::RDMSR,
        "drops the high half",
        With(|a, _| {
            a.rdmsr()?;
            a.xor(edx, edx)?;
            a.ret()
        }),
        "EDX",
    ),
    mutant(number::SetGDT, "loads nothing", With(NOTHING), "the register holds"),
    mutant(number::SetIDT, "loads nothing", With(NOTHING), "the register holds"),
    mutant(
        number::GetGDT,
        "writes two bytes too many",
        With(|a, _| {
            a.sgdt(ptr(eax))?;
            a.mov(word_ptr(eax + 6), 0)?;
            a.ret()
        }),
        "memory beside the buffer",
    ),
    mutant(number::SetLDT, "loads nothing", With(NOTHING), "LDTR"),
    mutant(number::SetTR, "loads nothing", With(NOTHING), "TR"),
    mutant(
        number::GetTR,
        "answers 0",
        With(|a, _| {
            a.xor(eax, eax)?;
            a.ret()
        }),
        "selector",
    ),
    mutant(
        number::WriteGDTEntry,
        "drops the high word",
        With(|a, _| {
            a.mov(dword_ptr(eax + edx * 8), ecx)?;
            a.ret()
        }),
        "entry",
    ),
    mutant(
        number::WriteIDTEntry,
        "writes one entry too far",
        With(|a, code| {
            a.inc(edx)?;
            original(a, code)
        }),
        "entry",
    ),
    mutant(
        number::WriteLDTEntry,
        "pops its argument",
        With(|a, _| {
            a.mov(dword_ptr(eax + edx * 8), ecx)?;
            a.mov(ecx, dword_ptr(esp + 4))?;
            a.mov(dword_ptr(eax + edx * 8 + 4), ecx)?;
            a.ret_1(4)
        }),
        "ESP",
    ),
    mutant(
        number::UpdateKernelStack,
        "believes that EAX is the task state segment",
        With(|a, _| {
            a.mov(dword_ptr(eax + 4), edx)?;
            a.ret()
        }),
        "exception 14",
    ),
    mutant(
        number::SetCR0,
        "ignores the task-switched flag",
        With(|a, code| {
            a.and(eax, !8)?;
            original(a, code)
        }),
        "CR0",
    ),
    mutant(
        number::SetCR3,
        "keeps the translations",
        With(NOTHING),
        "after the call the page shows",
    ),
    mutant(
        number::GetCR2,
        "destroys EBX",
        With(|a, code| {
            a.xor(ebx, ebx)?;
            original(a, code)
        }),
        "EBX",
    ),
    mutant(
        number::SetDR,
        "confuses two registers",
        With(|a, code| {
            a.xor(eax, 1)?;
            original(a, code)
        }),
        "DR0",
    ),
    mutant(
        number::RDTSC,
        "stands still",
        With(|a, _| {
            a.xor(eax, eax)?;
            a.xor(edx, edx)?;
            a.ret()
        }),
        "is not between",
    ),
    mutant(number::CLTS, "does nothing", With(NOTHING), "CR0"),
    mutant(
        number::EnableInterrupts,
        "destroys EAX",
        With(|a, code| {
            a.xor(eax, eax)?;
            original(a, code)
        }),
        "EAX",
    ),
    mutant(
        number::EnableInterrupts,
        "reads through DS",
        With(|a, code| {
            a.cmp(byte_ptr(0xc00f_0000_u32), 0)?;
            original(a, code)
        }),
        "exception 14",
    ),
    mutant(
        number::DisableInterrupts,
        "destroys ECX",
        With(|a, code| {
            a.xor(ecx, ecx)?;
            original(a, code)
        }),
        "ECX",
    ),
    mutant(number::DisableInterrupts, "does nothing", With(NOTHING), "IF"),
    mutant(
        number::GetInterruptMask,
        "destroys EDX",
        With(|a, code| {
            a.xor(edx, edx)?;
            original(a, code)
        }),
        "EDX",
    ),
    mutant(
        number::SetInterruptMask,
        "only ever enables",
        With(|a, _| {
            a.sti()?;
            a.ret()
        }),
        "IF",
    ),
    mutant(
        number::IRET,
        "leaves the return address on the stack",
        With(|a, _| a.iretd()),
        "33 IRET",
    ),
    fastest(
        number::IRET,
        "destroys EAX",
        With(|a, _| {
            a.xor(eax, eax)?;
            a.iretd()
        }),
        "EAX",
    ),
    fastest(
        number::SYSEXIT,
        "forgets to enable interrupts",
        With(|a, _| a.sysexit()),
        "EFLAGS in ring 3",
    ),
    fastest(
        number::SYSEXIT,
        "enables interrupts too early",
        With(|a, _| {
            a.sti()?;
            a.nop()?;
            a.nop()?;
            a.sysexit()
        }),
        "EIP at the interrupt",
    ),
    fastest(
        number::IRET,
        "is left to the guest",
        Answer(RelocationType::NONE),
        "answers that a guest can live with",
    ),
    mutant(
        number::Halt,
        "does not wait",
        With(|a, _| {
            a.sti()?;
            a.ret()
        }),
        "without an interrupt",
    ),
    mutant(
        number::Shutdown,
        "lets interrupts in",
        With(|a, _| {
            a.sti()?;
            a.hlt()?;
            a.ret()
        }),
        "IF while waiting",
    ),
    mutant(
        number::SetPxE,
        "stores the flags",
        With(|a, _| {
            a.mov(dword_ptr(edx), ecx)?;
            a.ret()
        }),
        "word 3",
    ),
    mutant(
        number::SetPxELong,
        "stores one half after the other",
        With(|a, _| {
            a.mov(dword_ptr(ecx + 4), edx)?;
            a.mov(dword_ptr(ecx), eax)?;
            a.ret()
        }),
        "torn",
    ),
    mutant(
        number::UpdatePxE,
        "clears the entry",
        With(|a, _| {
            a.mov(dword_ptr(eax), 0)?;
            a.ret()
        }),
        "word 2",
    ),
    mutant(
        number::AllocatePage,
        "uses 512 bytes of stack",
        With(|a, _| {
            a.lea(esp, esp - 512)?;
            a.push(eax)?;
            a.lea(esp, esp + 516)?;
            a.ret()
        }),
        "bytes of stack used",
    ),
    mutant(
        number::InvalPage,
        "keeps the translation",
        With(NOTHING),
        "after the call the page shows",
    ),
    mutant(
        number::FlushTLB,
        "keeps the translations",
        With(NOTHING),
        "after the call the page shows",
    ),
    mutant(
        number::INB,
        "leaves the rest of EAX",
        With(|a, _| {
            a.in_(al, dx)?;
            a.ret()
        }),
        "EAX above",
    ),
    mutant(
        number::INW,
        "changes the flags",
        With(|a, code| {
            a.xor(eax, eax)?;
            original(a, code)
        }),
        "EFLAGS",
    ),
    mutant(
        number::INSB,
        "reads one byte too many",
        With(|a, code| {
            a.inc(ecx)?;
            original(a, code)
        }),
        "EDI",
    ),
    mutant(
        number::OUTSW,
        "moves bytes",
        With(|a, _| {
            a.rep().outsb()?;
            a.ret()
        }),
        "ESI",
    ),
    mutant(
        number::OUTL,
        "writes a byte",
        With(|a, _| {
            a.out(dx, al)?;
            a.ret()
        }),
        "the byte that arrived",
    ),
    mutant(number::SetIOPLMask, "does nothing", With(NOTHING), "IOPL"),
    mutant(
        number::SetIOPLMask,
        "loads its argument whole",
        With(|a, _| {
            a.push(eax)?;
            a.popfd()?;
            a.ret()
        }),
        "must be kept",
    ),
    mutant(
        number::SetLazyMode,
        "turns the direction flag around",
        With(|a, _| {
            a.std()?;
            a.ret()
        }),
        "EFLAGS",
    ),
    mutant(
        number::SetLazyMode,
        "loads ES",
        With(|a, _| {
            a.xor(eax, eax)?;
            a.mov(es, eax)?;
            a.ret()
        }),
        "data segments",
    ),
    mutant(
        number::WBINVD,
        "writes into the ROM",
        With(|a, _| {
            let mut here = a.create_label();
            a.call(here)?;
            a.set_label(&mut here)?;
            a.pop(eax)?;
            a.mov(byte_ptr(eax), 0)?;
            a.ret()
        }),
        "exception 14",
    ),
    mutant(
        number::GetCR0,
        "is answered NOP",
        Answer(RelocationType::NOP),
        "answers that a guest can live with",
    ),
    mutant(
        number::CLTS,
        "is answered JUMP_REL",
        Answer(RelocationType::JUMP_REL),
        "answers that a guest can live with",
    ),
    mutant(
        number::GetCR3,
        "is answered by a type that does not exist",
        Answer(RelocationType(9)),
        "does not exist",
    ),
    mutant(
        number::IODelay,
        "never returns",
        With(|a, _| {
            let mut here = a.create_label();
            a.set_label(&mut here)?;
            a.jmp(here)
        }),
        "IODelay",
    ),
    mutant(
        number::ReleasePage,
        "resets the machine",
        With(|a, _| {
            a.push(0)?;
            a.push(0)?;
            a.lidt(ptr(esp))?;
            a.int3()
        }),
        "the machine was reset",
    ),
    mutant(number::Reboot, "returns", With(NOTHING), "did not reset the machine"),
];

#[test]
fn the_guest_names_every_broken_call() -> Result<()> {
    let built = artifacts::ensure()?;
    let call = Specimen::read(&built.call, &built.call_elf)?;
    let fastest = Specimen::read(&built.fastest, &built.fastest_elf)?;
    let folder = tempfile::tempdir()?;
    let name = |mutant: &Mutant| {
        format!("{} {}", mutant.call.call().map_or("?", |call| call.name), mutant.fault)
    };
    all_are_caught(MUTANTS, name, |mutant| {
        let specimen = if mutant.fastest { &fastest } else { &call };
        caught(built, specimen, mutant, folder.path())
    })
}

/// A fault in the code that rewrites call sites.
struct BrokenRewriting {
    fault: &'static str,
    /// The instructions, and what stands there instead.
    old: &'static [u8],
    new: &'static [u8],
    processors: u32,
    cpu: &'static str,
    complaint: &'static str,
}

/// As on bare hardware, and as an emulator's, where one byte changes at a time.
const HARDWARE: &str = "max,-hypervisor";
const EMULATOR: &str = "max";

const BROKEN_REWRITING: [BrokenRewriting; 14] = [
    BrokenRewriting {
        fault: "leaves the kernel's text writable",
        old: &[0x0f, 0x22, 0xc6, 0x84, 0xdb], // mov cr0, esi; test bl, bl
        new: &[0x90, 0x90, 0x90, 0x84, 0xdb],
        processors: 1,
        cpu: HARDWARE,
        complaint: "CR0.WP is lost",
    },
    BrokenRewriting {
        fault: "does not go back to the site",
        old: &[0x89, 0x75, 0x28], // mov [ebp + 40], esi
        new: &[0x90, 0x90, 0x90],
        processors: 1,
        cpu: HARDWARE,
        complaint: "IF is",
    },
    BrokenRewriting {
        fault: "believes every site",
        old: &[0x39, 0xf8], // cmp eax, edi
        new: &[0x39, 0xc0],
        processors: 1,
        cpu: HARDWARE,
        complaint: "the site became",
    },
    BrokenRewriting {
        fault: "reads what lies before the page",
        old: &[0x83, 0xf8, 0x04], // cmp eax, 4
        new: &[0x83, 0xf8, 0x00],
        processors: 1,
        cpu: HARDWARE,
        complaint: "the site became",
    },
    BrokenRewriting {
        fault: "forgets the NOP",
        old: &[0xb2, 0x90, 0x80], // mov dl, 90h; cmp byte ptr
        new: &[0xb2, 0x66, 0x80],
        processors: 1,
        cpu: HARDWARE,
        complaint: "the site became",
    },
    BrokenRewriting {
        fault: "writes across two words before other processors' eyes",
        old: &[0x80, 0xfa, 0x03], // cmp dl, 3
        new: &[0x38, 0xd2, 0x90],
        processors: 4,
        cpu: HARDWARE,
        complaint: "the site became",
    },
    BrokenRewriting {
        fault: "leads a direct call to a wrong place",
        old: &[0x80, 0xc2, 0x02], // add dl, 2
        new: &[0x80, 0xc2, 0x01],
        processors: 4,
        cpu: HARDWARE,
        complaint: "the site became",
    },
    BrokenRewriting {
        fault: "leaves a NOP behind a NOP",
        old: &[0xb2, 0x66], // mov dl, 66h
        new: &[0xb2, 0x90],
        processors: 1,
        cpu: HARDWARE,
        complaint: "the site became",
    },
    BrokenRewriting {
        fault: "takes a MOV for a NOP",
        old: &[0x66, 0x3d, 0x66, 0x66], // cmp ax, 6666h
        new: &[0x66, 0x3d, 0x66, 0x89],
        processors: 4,
        cpu: HARDWARE,
        complaint: "the site became",
    },
    BrokenRewriting {
        fault: "reads what lies behind the page",
        old: &[0x66, 0xa9, 0xfe, 0x0f], // test ax, 0ffeh
        new: &[0x66, 0xa9, 0xff, 0xff],
        processors: 4,
        cpu: HARDWARE,
        complaint: "the site became",
    },
    BrokenRewriting {
        fault: "changes two words for the sake of a MOV",
        old: &[0xf6, 0xc3, 0x07], // test bl, 7
        new: &[0xf6, 0xc3, 0xff],
        processors: 4,
        cpu: EMULATOR,
        complaint: "the site became",
    },
    BrokenRewriting {
        fault: "forgets the second byte of a MOV",
        old: &[0x30, 0xe6], // xor dh, ah
        new: &[0xb6, 0x00], // mov dh, 0
        processors: 4,
        cpu: HARDWARE,
        complaint: "the site became",
    },
    BrokenRewriting {
        fault: "makes the call a NOP before CLI stands behind it",
        old: &[0x38, 0xd0, 0x74], // cmp al, dl; je
        new: &[0x38, 0xd0, 0x75],
        processors: 4,
        cpu: HARDWARE,
        complaint: "IF is",
    },
    BrokenRewriting {
        fault: "makes another instruction of the call",
        old: &[0xb0, 0xe8, 0xb2, 0x41], // mov al, 0e8h; mov dl, 0e8h ^ 0a9h
        new: &[0xb0, 0xe8, 0xb2, 0x40],
        processors: 4,
        cpu: HARDWARE,
        complaint: "IF is",
    },
];

#[test]
fn the_guest_names_broken_rewriting() -> Result<()> {
    let built = artifacts::ensure()?;
    let native = Specimen::read(&built.native, &built.native_elf)?;
    let folder = tempfile::tempdir()?;
    for BrokenRewriting { fault, old, new, processors, cpu, complaint } in BROKEN_REWRITING {
        let rom = folder.path().join(format!("{}.rom", fault.replace(' ', "-")));
        std::fs::write(&rom, native.with_instructions(old, new).context(fault)?)?;
        let machine = Machine {
            processors,
            cpu: cpu.into(),
            limit: Duration::from_secs(180),
            ..Machine::default()
        };
        let subject = Subject::option_rom(&rom)?;
        let result = conformance::check(&built.emulator, &built.guest, &subject, &machine, |_| ())?;
        let said: Vec<String> =
            result.report.failures().map(|check| format!("{:?}", check.details)).collect();
        ensure!(
            said.iter().any(|text| text.contains(complaint)),
            "{fault}: `{complaint}` is not said: {said:#?}"
        );
        println!("caught: {fault}");
    }
    Ok(())
}

/// What the interface allows must pass: NOP for all that only tells a hypervisor something.
#[test]
fn a_rom_that_answers_notifications_with_nop_passes() -> Result<()> {
    let built = artifacts::ensure()?;
    let specimen = Specimen::read(&built.call, &built.call_elf)?;
    let notifications = CALLS_3_0
        .iter()
        .filter(|call| call.contract.answers.contains(Answers::NOP))
        .filter_map(|call| call.number);
    let folder = tempfile::tempdir()?;
    let rom = folder.path().join("nop.rom");
    std::fs::write(&rom, specimen.with_nop(notifications)?)?;
    let machine = Machine::default();
    let subject = Subject::option_rom(&rom)?;
    let result = conformance::check(&built.emulator, &built.guest, &subject, &machine, |_| ())?;
    assert_eq!(result.complaint(), None, "{}", result.run.serial);
    Ok(())
}

/// Whether the guest fails a mutant and says why.
fn caught(
    built: &artifacts::Artifacts,
    specimen: &Specimen,
    mutant: &Mutant,
    folder: &std::path::Path,
) -> Result<()> {
    let bytes = match mutant.change {
        With(code) => specimen.with_code(mutant.call, code)?,
        Answer(kind) => specimen.with_type(mutant.call, kind)?,
    };
    let call = mutant.call.call().context("a call of the table")?;
    let rom = folder.join(format!("{}-{}.rom", call.name, mutant.fault.replace(' ', "-")));
    std::fs::write(&rom, bytes)?;
    let machine = Machine { limit: Duration::from_secs(20), ..Machine::default() };
    let subject = Subject::option_rom(&rom)?;
    let result = conformance::check(&built.emulator, &built.guest, &subject, &machine, |_| ())?;
    names_the_fault(&result, call.name, mutant.complaint)
}
