//! ROMs that rewrite their call sites: a right one in a style of its own, and single faults.

use super::samples::{HELPER, Lookup, Sample, seal};
use super::{HIGH_BASE, Report, Rom, Rule, difference, report, survey, verify};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmi_abi::{CallNumber, KEEP_SITE, number};

/// What the sample does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// A register is lost where the site was rewritten, and only there.
    LostRegister,
    WriteProtectionLeftOff,
    InterruptsLeftOff,
    InterruptsLeftOn,
    ProtectedStore,
    ByteBefore,
    Unproven,
    UnprovenPointer,
    TwoStores,
    NoLock,
    /// Compares with what it has just read, not with what it has judged.
    LateComparison,
    /// Reads the pointer of an indirect call when it may be one no more.
    LatePointer,
    /// Takes the call for done if another processor was faster.
    LostRace,
    /// By one store of four bytes, which leaves the last one of a direct site.
    AcrossWords,
    /// By one locked store: right where there is one processor.
    AcrossWordsLocked,
    PageBefore,
    /// Goes on behind the site, not at it.
    NotRewound,
}

/// Bytes of a stub before its plain code: PUSH of the native code, CALL of the helper.
const PLAIN: u8 = 10;

/// CR0.WP.
const WRITE_PROTECT: i32 = 1 << 16;

/// Where the helper's arguments lie above what it has pushed: flags and seven registers.
const SAVED: i32 = 32;
const STUB: i32 = SAVED;
const NATIVE: i32 = SAVED + 4;
const SITE: i32 = SAVED + 8;

/// In: the stub's return address, four bytes of native code, the site's return address.
fn helper(a: &mut CodeAssembler, fault: Fault) -> Result<(), IcedError> {
    let (mut indirect, mut found, mut fail) =
        (a.create_label(), a.create_label(), a.create_label());
    let (mut fits, mut direct) = (a.create_label(), a.create_label());
    let saved = [eax, ebx, ecx, edx, esi, edi, ebp];
    a.pushfd()?;
    if fault != Fault::InterruptsLeftOn {
        a.cli()?;
    }
    for register in saved {
        a.push(register)?;
    }
    a.mov(esi, dword_ptr(esp + SITE))?;
    a.mov(edi, dword_ptr(esp + STUB))?;
    a.sub(edi, i32::from(PLAIN))?;
    a.lea(eax, dword_ptr(esi - 1))?;
    a.and(eax, 0xfff)?;
    if fault != Fault::PageBefore {
        a.cmp(eax, 4)?;
        a.jb(fail)?;
    }
    a.cmp(byte_ptr(esi - 5).ss(), 0xe8u32)?;
    a.jne(indirect)?;
    if fault != Fault::Unproven {
        a.mov(ebx, dword_ptr(esi - 4).ss())?;
        a.add(ebx, esi)?;
        a.cmp(ebx, edi)?;
        a.jne(fail)?;
    }
    a.mov(ecx, 5)?;
    a.jmp(found)?;
    a.set_label(&mut indirect)?;
    if fault != Fault::PageBefore {
        a.cmp(eax, 5)?;
        a.jb(fail)?;
    }
    // First the pointer: it is one if the opcode is still there afterwards.
    a.mov(ebx, dword_ptr(esi - 4).ss())?;
    a.cmp(word_ptr(esi - 6).ss(), 0x15ffu32)?;
    a.jne(fail)?;
    // Not the end of a shorter call.
    for place in [2, 3, 4] {
        a.cmp(byte_ptr(esi - place).ss(), 0xffu32)?;
        a.je(fail)?;
    }
    if fault == Fault::LatePointer {
        a.mov(ebx, dword_ptr(esi - 4).ss())?;
    }
    if fault != Fault::UnprovenPointer {
        a.cmp(dword_ptr(ebx).ss(), edi)?;
        a.jne(fail)?;
    }
    a.mov(ecx, 6)?;
    a.set_label(&mut found)?;
    if fault == Fault::AcrossWords {
        a.cmp(ecx, 6)?;
        a.je(fail)?;
    }
    // ESI: the word. EDI: the site's place in it.
    a.sub(esi, ecx)?;
    a.mov(edi, esi)?;
    a.and(edi, 7)?;
    a.lea(eax, dword_ptr(edi + ecx))?;
    a.cmp(eax, 8)?;
    match fault {
        Fault::AcrossWords | Fault::AcrossWordsLocked => {
            a.jbe(fits)?;
            a.mov(edi, 8)?;
            a.sub(edi, ecx)?;
        }
        _ => a.ja(fail)?,
    }
    a.set_label(&mut fits)?;
    a.sub(esi, edi)?;
    a.push(dword_ptr(esi + 4).ss())?;
    a.push(dword_ptr(esi).ss())?;
    a.mov(edx, dword_ptr(esp + 4))?;
    a.mov(ebp, dword_ptr(esp))?;
    a.mov(eax, dword_ptr(esp + 8 + NATIVE))?;
    a.mov(dword_ptr(esp + edi), eax)?;
    a.mov(byte_ptr(esp + edi + 4), 0x90)?;
    a.cmp(ecx, 6)?;
    a.jne(direct)?;
    a.mov(byte_ptr(esp + edi + 5), 0x90)?;
    a.set_label(&mut direct)?;
    if fault == Fault::ByteBefore {
        let mut first = a.create_label();
        a.test(edi, edi)?;
        a.jz(first)?;
        a.mov(byte_ptr(esp + edi - 1), 0x90)?;
        a.set_label(&mut first)?;
        a.nop()?;
    }
    a.mov(eax, ebp)?;
    a.add(edi, esi)?;
    a.pop(ebx)?;
    a.pop(ecx)?;
    a.mov(ebp, cr0)?;
    a.push(ebp)?;
    if fault != Fault::ProtectedStore {
        a.and(ebp, !WRITE_PROTECT)?;
    }
    a.mov(cr0, ebp)?;
    match fault {
        Fault::TwoStores => {
            a.mov(dword_ptr(esi).ss(), ebx)?;
            a.mov(dword_ptr(esi + 4).ss(), ecx)?;
            a.cmp(eax, eax)?;
        }
        Fault::AcrossWords => {
            a.mov(eax, dword_ptr(esp + 4 + NATIVE))?;
            a.mov(dword_ptr(edi).ss(), eax)?;
            a.cmp(eax, eax)?;
        }
        Fault::NoLock => a.cmpxchg8b(qword_ptr(esi).ss())?,
        Fault::LateComparison => {
            a.mov(eax, dword_ptr(esi).ss())?;
            a.mov(edx, dword_ptr(esi + 4).ss())?;
            a.lock().cmpxchg8b(qword_ptr(esi).ss())?;
        }
        _ => a.lock().cmpxchg8b(qword_ptr(esi).ss())?,
    }
    a.sete(bl)?;
    a.pop(ebp)?;
    if fault != Fault::WriteProtectionLeftOff {
        a.mov(cr0, ebp)?;
    }
    a.test(bl, bl)?;
    if fault == Fault::LostRace {
        let mut done = a.create_label();
        a.jz(done)?;
        a.mov(dword_ptr(esp + SITE), edi)?;
        a.set_label(&mut done)?;
        a.nop()?;
    } else {
        a.jz(fail)?;
    }
    if !matches!(fault, Fault::NotRewound | Fault::LostRace) {
        a.mov(dword_ptr(esp + SITE), edi)?;
    }
    for register in saved.into_iter().rev() {
        a.pop(register)?;
    }
    if fault == Fault::LostRegister {
        a.mov(ebp, esp)?;
    }
    a.popfd()?;
    if fault == Fault::InterruptsLeftOff {
        a.cli()?;
    }
    a.lea(esp, dword_ptr(esp + 8))?;
    a.ret()?;
    a.set_label(&mut fail)?;
    for register in saved.into_iter().rev() {
        a.pop(register)?;
    }
    a.popfd()?;
    a.ret_1(4)
}

/// The calls that rewrite, with four bytes of native code, and the plain code.
const CALLS: [(CallNumber, [u8; 4], &[u8]); 5] = [
    (number::GetCR3, [0x0f, 0x20, 0xd8, 0x90], b"\x0f\x20\xd8\xc3"),
    (number::DisableInterrupts, [0xfa, 0x90, 0x90, 0x90], b"\xfa\xc3"),
    (number::SetInterruptMask, [0x50, 0x9d, 0x66, 0x90], b"\x50\x9d\xc3"),
    (number::IRET, [0xcf, 0x90, 0x90, 0x90], b"\x83\xc4\x04\xcf"),
    (number::SYSEXIT, [0xfb, 0x0f, 0x35, 0x90], b"\xfb\x0f\x35"),
];

fn rewriting_call(sample: &mut Sample, number: CallNumber, native: [u8; 4], plain: &[u8]) {
    let distance = HELPER - sample.offset(number);
    sample.call(number, |a| {
        a.push(i32::from_le_bytes(native))?;
        a.call(distance as u64)?;
        a.db(plain)
    });
}

fn sample(fault: Fault) -> Sample {
    let mut sample = Sample::new();
    sample.lookup(Lookup::Sites).plain(PLAIN).helper(|a| helper(a, fault));
    for (number, ..) in CALLS {
        sample.call(number, |a| a.ret());
    }
    // Only now all places are known.
    for (number, native, plain) in CALLS {
        let native = match native {
            // What makes nothing of the byte behind: CMP AL with it, jumps over it.
            [0x0f, 0x20, 0xd8, _] if fault == Fault::AcrossWords => [0x0f, 0x20, 0xd8, 0x3c],
            [0xfa, ..] if fault == Fault::AcrossWords => [0xfa, 0xeb, 0x02, 0x90],
            [0x50, ..] if fault == Fault::AcrossWords => [0x50, 0x9d, 0xeb, 0x01],
            native => native,
        };
        rewriting_call(&mut sample, number, native, plain);
    }
    sample
}

fn rom(sample: &Sample) -> Rom {
    Rom::parse(&sample.build()).expect("a ROM")
}

fn judged(sample: &Sample) -> Report {
    verify(&rom(sample))
}

/// Each call breaks this rule, and none another.
#[track_caller]
fn each(fault: Fault, rule: Rule, calls: &[CallNumber]) -> Report {
    let report = judged(&sample(fault));
    let mut found: Vec<_> = report.violations.iter().map(|v| (v.rule, v.call)).collect();
    found.dedup();
    let wanted: Vec<_> = calls.iter().map(|call| (rule, Some(call.0))).collect();
    assert_eq!(found, wanted, "{fault:?} {:#?}", report.violations);
    report
}

const ALL: [CallNumber; 5] = [
    number::GetCR3,
    number::DisableInterrupts,
    number::SetInterruptMask,
    number::IRET,
    number::SYSEXIT,
];

#[test]
fn a_right_image_that_rewrites_is_clean() {
    for lookup in [Lookup::Sites, Lookup::Table, Lookup::Chain] {
        let report = judged(sample(Fault::None).lookup(lookup));
        assert!(report.is_clean(), "{lookup:?} {:#?}", report.violations);
        let unsure = report.notes.iter().any(|note| note.detail.contains("one processor"));
        assert!(!unsure, "{:#?}", report.notes);
    }
}

#[test]
fn native_code_that_is_another_is_named() {
    for (native, rule) in [
        ([0xfb, 0x90, 0x90, 0x90], Rule::Flags),    // STI for CLI.
        ([0x90, 0x90, 0x90, 0x90], Rule::Flags),    // Nothing at all.
        ([0xfa, 0x40, 0x90, 0x90], Rule::Register), // CLI; INC EAX.
        ([0xfa, 0x50, 0x90, 0x90], Rule::StackBalance),
        ([0xfa, 0xeb, 0x10, 0x90], Rule::Ending), // A jump beyond the site.
        ([0xfa, 0xf1, 0x0f, 0x0b], Rule::Undecided),
        ([0xfa, 0x90, 0x0f, 0x0b], Rule::Ending), // UD2.
        ([0xfa, 0x0f, 0x6f, 0xc0], Rule::Vector),
    ] {
        let mut sample = sample(Fault::None);
        rewriting_call(&mut sample, number::DisableInterrupts, native, b"\xfa\xc3");
        let report = judged(&sample);
        let found: Vec<_> = report.violations.iter().map(|v| (v.rule, v.call)).collect();
        let call = Some(number::DisableInterrupts.0);
        assert!(
            !found.is_empty() && found.iter().all(|found| *found == (rule, call)),
            "{native:02X?} {:#?}",
            report.violations
        );
    }
    // What the site reads through DS is another's where DS is.
    let mut sample = sample(Fault::None);
    rewriting_call(&mut sample, number::DisableInterrupts, [0xfa, 0x85, 0x04, 0x24], b"\xfa\xc3");
    assert!(judged(&sample).is_clean(), "TEST of what ESP points to");
    rewriting_call(&mut sample, number::DisableInterrupts, [0xfa, 0x3e, 0x85, 0x00], b"\xfa\xc3");
    let report = judged(&sample);
    assert!(report.names(Rule::Segment, number::DisableInterrupts), "{:#?}", report.violations);
}

#[test]
fn what_the_rewriting_loses_is_named() {
    let report = each(Fault::LostRegister, Rule::Register, &ALL);
    assert!(report.violations[0].detail.contains("EBP"), "{:#?}", report.violations);
    each(Fault::InterruptsLeftOff, Rule::Flags, &[number::GetCR3]);
    // SetCR0 is not among them: all must leave it.
    let report = each(Fault::WriteProtectionLeftOff, Rule::Site, &ALL);
    assert!(report.violations[0].detail.contains("leaves CR0.WP clear"));
}

#[test]
fn what_another_processor_may_see_is_named() {
    for fault in [Fault::TwoStores, Fault::NoLock, Fault::AcrossWords] {
        each(fault, Rule::Site, &ALL);
    }
    let report = each(Fault::AcrossWords, Rule::Site, &ALL);
    assert!(report.violations.iter().any(|v| v.detail.contains("two aligned words")));
}

/// Changes a direct site of DisableInterrupts that a NOP stands behind by two stores of one byte: the
/// NOP becomes CLI, the call a TEST with its distance.
fn changes_twice(call_first: bool) -> Sample {
    let mut sample = Sample::new();
    let call = sample.lookup(Lookup::Table).call(number::DisableInterrupts, |a| a.ret());
    let (distance, entry) = (HELPER - call.offset(number::DisableInterrupts), 5);
    call.call(number::DisableInterrupts, |a| a.call(distance as u64));
    call.helper(|a| {
        let mut fail = a.create_label();
        a.pushfd()?;
        a.cli()?;
        a.pushad()?;
        a.mov(edi, dword_ptr(esp + STUB + 4))?;
        a.sub(edi, entry)?;
        a.mov(esi, dword_ptr(esp + STUB + 8))?;
        a.lea(eax, dword_ptr(esi - 1))?;
        a.and(eax, 0xfff)?;
        a.cmp(eax, 4)?;
        a.jb(fail)?;
        a.cmp(eax, 0xfff)?;
        a.je(fail)?;
        a.cmp(byte_ptr(esi - 5).ss(), 0xe8u32)?;
        a.jne(fail)?;
        a.mov(ebx, dword_ptr(esi - 4).ss())?;
        a.add(ebx, esi)?;
        a.cmp(ebx, edi)?;
        a.jne(fail)?;
        a.cmp(byte_ptr(esi).ss(), 0x90u32)?;
        a.jne(fail)?;
        a.mov(ebp, cr0)?;
        a.mov(ecx, ebp)?;
        a.and(ecx, !WRITE_PROTECT)?;
        a.mov(cr0, ecx)?;
        for call in [call_first, !call_first] {
            let (place, old, new) = if call { (-5, 0xe8u32, 0xa9u32) } else { (0, 0x90, 0xfa) };
            a.mov(al, old)?;
            a.mov(dl, new)?;
            a.lock().cmpxchg(byte_ptr(esi + place).ss(), dl)?;
        }
        a.mov(cr0, ebp)?;
        a.sub(esi, 5)?;
        a.mov(dword_ptr(esp + STUB + 8), esi)?;
        a.popad()?;
        a.popfd()?;
        a.lea(esp, dword_ptr(esp + 4))?;
        a.ret()?;
        a.set_label(&mut fail)?;
        a.popad()?;
        a.popfd()?;
        a.lea(esp, dword_ptr(esp + 4))?;
        a.cli()?;
        a.ret()
    });
    sample
}

#[test]
fn two_stores_are_right_if_all_that_is_half_done_is_right() {
    let report = judged(&changes_twice(false));
    assert!(report.is_clean(), "{:#?}", report.violations);
    let report = judged(&changes_twice(true));
    assert_eq!(report.violations.len(), 1, "{:#?}", report.violations);
    assert!(report.names(Rule::Site, number::DisableInterrupts), "{:#?}", report.violations);
    assert!(report.violations[0].detail.contains("half done"), "{:#?}", report.violations);
}

#[test]
fn what_is_lost_to_another_processor_is_named() {
    let report = each(Fault::LateComparison, Rule::Site, &ALL);
    assert!(report.violations.iter().all(|v| v.detail.ends_with("what it put there is lost")));
    each(Fault::LatePointer, Rule::Memory, &ALL);
    let report = judged(&sample(Fault::LostRace));
    assert!(report.names(Rule::Flags, number::DisableInterrupts), "{:#?}", report.violations);
    assert!(report.names(Rule::Ending, number::IRET), "{:#?}", report.violations);
    assert!(
        report.violations.iter().all(|v| v.detail.starts_with("while another processor")),
        "{:#?}",
        report.violations
    );
}

#[test]
fn what_is_right_with_one_processor_is_not_decided() {
    let report = judged(&sample(Fault::AcrossWordsLocked));
    assert!(report.is_clean(), "{:#?}", report.violations);
    let notes = || report.notes.iter().filter(|note| note.detail.contains("one processor"));
    assert_eq!(notes().count(), 1, "{:#?}", report.notes);
    assert!(notes().all(|note| note.detail.starts_with("not decided: 5 calls")));
}

#[test]
fn what_a_rom_may_not_touch_is_named() {
    for (fault, text) in [
        (Fault::ByteBefore, "beside the instruction"),
        (Fault::Unproven, "do not prove"),
        (Fault::UnprovenPointer, "do not prove"),
        (Fault::ProtectedStore, "read-only"),
        (Fault::InterruptsLeftOn, "with interrupts enabled"),
        (Fault::PageBefore, "in another page"),
    ] {
        let calls: &[CallNumber] = match fault {
            // The guest has disabled interrupts before these.
            Fault::InterruptsLeftOn => &ALL[..3],
            _ => &ALL,
        };
        let report = each(fault, Rule::Site, calls);
        let found = report.violations.iter().all(|v| v.detail.contains(text));
        assert!(found || fault == Fault::PageBefore, "{fault:?} {:#?}", report.violations);
    }
}

#[test]
fn a_site_that_is_not_executed_is_named() {
    // The call is lost this once: flags stay as they are, results are missing.
    let report = judged(&sample(Fault::NotRewound));
    assert!(report.names(Rule::Flags, number::DisableInterrupts), "{:#?}", report.violations);
    assert!(report.names(Rule::Ending, number::IRET));
    assert!(report.names(Rule::Ending, number::SYSEXIT));
}

#[test]
fn a_guest_that_wants_its_sites_kept_gets_what_keeps_them() {
    let mut ignores = sample(Fault::None);
    let report = judged(ignores.plain(0));
    for call in ALL {
        assert!(report.names(Rule::Site, call), "{:#?}", report.violations);
    }
    assert!(report.violations.iter().all(|v| v.detail.contains("asked for code that does not")));
    // The plain code is held to the contract as well: this one comes out within an instruction.
    let report = judged(sample(Fault::None).plain(PLAIN + 1));
    assert!(report.names(Rule::Flags, number::DisableInterrupts), "{:#?}", report.violations);
    // A ROM that does not rewrite may answer the same.
    let report = judged(Sample::new().lookup(Lookup::Sites));
    assert!(report.is_clean(), "{:#?}", report.violations);
    // Another type for the same call.
    let mut sample = Sample::new();
    sample.custom_lookup(|a| {
        let (mut none, mut out) = (a.create_label(), a.create_label());
        a.xor(edx, edx)?;
        a.cmp(eax, number::SYSEXIT.0 | KEEP_SITE)?;
        a.je(out)?;
        a.cmp(eax, number::SYSEXIT.0)?;
        a.jne(none)?;
        a.inc(edx)?;
        a.set_label(&mut out)?;
        a.inc(edx)?;
        a.call(none)?;
        a.set_label(&mut none)?;
        a.nop()?;
        a.ret()
    });
    let report = judged(&sample);
    assert!(report.names(Rule::Answer, number::SYSEXIT), "{:#?}", report.violations);
    let wanted = "answered JUMP_REL, and CALL_REL where";
    let found = report.violations.iter().any(|v| v.detail.starts_with(wanted));
    assert!(found, "{:#?}", report.violations);
}

#[test]
fn a_reader_sees_what_becomes_of_a_site() {
    let rom = rom(&sample(Fault::None));
    let facts = survey(&rom, HIGH_BASE).expect("revision 3.0");
    let of = |name: &str| facts.calls.iter().find(|call| call.name == name).expect("a call");
    for (name, text, bytes) in [
        ("DisableInterrupts", "cli", "FA"),
        ("SetInterruptMask", "push eax; popfd", "50 9D"),
        ("GetCR3", "mov eax, cr3", "0F 20 D8"),
        ("IRET", "iretd", "CF"),
        ("SYSEXIT", "sti; sysexit", "FB 0F 35"),
    ] {
        let call = of(name);
        let site = call.code.as_ref().and_then(|code| code.site.as_ref()).expect("rewritten");
        assert_eq!((site.text().as_str(), site.bytes.as_str()), (text, bytes));
        let plain = call.keep_site.as_ref().expect("plain code");
        assert_eq!(Some(plain.offset), call.offset.map(|offset| offset + usize::from(PLAIN)));
        assert!(plain.code.executed < 4 && plain.code.site.is_none());
        let shown = report::call(call);
        assert!(shown.contains(&format!("at its call site: {text} ({bytes})")), "{shown}");
        assert!(shown.contains("with KEEP_SITE: code at"), "{shown}");
    }
    assert!(of("EnableInterrupts").code.as_ref().is_some_and(|code| code.site.is_none()));
    let table = report::survey(&facts);
    assert!(table.contains("at the site"), "{table}");
    let plain = survey(&self::rom(&Sample::new()), HIGH_BASE).expect("revision 3.0");
    assert!(!report::survey(&plain).contains("at the site"));
}

#[test]
fn other_native_code_is_another_meaning() {
    let right = rom(&sample(Fault::None));
    let mut other = sample(Fault::None);
    rewriting_call(&mut other, number::DisableInterrupts, [0xfb, 0x90, 0x90, 0x90], b"\xfa\xc3");
    let found = difference::difference(&right, &rom(&other), HIGH_BASE).expect("revision 3.0");
    let calls: Vec<_> = found.calls.iter().filter(|call| !call.is_same()).collect();
    assert_eq!(calls.len(), 1);
    let fields: Vec<_> = calls[0].fields.iter().map(|f| (f.name, &*f.a, &*f.b)).collect();
    assert_eq!(fields[0], ("at the call site", "cli", "sti"));
}

/// What a site is told to execute may be anything: that ends, and in the same way each time.
#[test]
fn hostile_native_code_ends() {
    for native in [[0xeb, 0xfe, 0x90, 0x90], [0xff, 0xd4, 0x90, 0x90], [0xf4, 0xeb, 0xfd, 0x90]] {
        let mut sample = sample(Fault::None);
        rewriting_call(&mut sample, number::GetCR3, native, b"\x0f\x20\xd8\xc3");
        let mut image = sample.build();
        seal(&mut image);
        super::hostile::verify(&image);
        super::hostile::inspect(&image);
        assert!(!verify(&Rom::parse(&image).expect("a ROM")).is_clean());
    }
}

/// The fuzzer's corpus, and the page about the JSON, have the right image.
#[test]
fn the_corpus_has_such_an_image() {
    let file = crate::workspace().join("fuzz/corpus/rom/good-rewriting.rom");
    let bytes = std::fs::read(&file).expect("the corpus is part of the tree");
    assert!(bytes == sample(Fault::None).build(), "{} is another image", file.display());
}
