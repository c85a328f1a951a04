//! Right images are called clean, and each fault is named.

use super::samples::{Lookup, Sample, repair, seal};
use super::slot_samples::asm;
use super::{HIGH_BASE, LOW_BASE, ReadError, Report, Rom, Rule, answers, survey, verify};
use iced_x86::code_asm::*;
use proptest::prelude::*;
use vmi_abi::{CALLS_3_0, CallNumber, RelocationType, number};

pub(super) fn judged(image: &[u8]) -> Report {
    verify(&Rom::parse(image).expect("a ROM"))
}

pub(super) fn rules_of(report: &Report) -> Vec<(Rule, Option<u32>)> {
    let mut found: Vec<_> = report.violations.iter().map(|v| (v.rule, v.call)).collect();
    found.dedup();
    found
}

/// The image breaks this rule in this call, and no other anywhere.
#[track_caller]
fn only(sample: &Sample, rule: Rule, call: CallNumber) -> Report {
    let report = judged(&sample.build());
    assert_eq!(rules_of(&report), [(rule, Some(call.0))], "{:#?}", report.violations);
    report
}

#[track_caller]
fn clean(sample: &Sample) {
    let report = judged(&sample.build());
    assert!(report.is_clean(), "{:#?}", report.violations);
}

#[test]
fn right_images_are_clean() {
    clean(&Sample::new());
    clean(Sample::new().lookup(Lookup::Chain));
    clean(Sample::new().license(b"GPL v2\0"));
}

#[test]
fn right_code_in_other_styles_is_clean() {
    use number::*;
    clean(Sample::new().answer(IRET, RelocationType::JUMP_REL, asm! { iretd; }));
    clean(Sample::new().call(IRET, asm! { lea(esp, ptr(esp + 4)); iretd; }));
    clean(Sample::new().call(SYSEXIT, asm! { nop; sti; sysexit; }));
    // The flags come back by an interrupt return within the ring.
    clean(Sample::new().call(
        SetInterruptMask,
        asm! { push(cs); push(dword_ptr(esp + 4)); mov(dword_ptr(esp + 8), eax); iretd; },
    ));
    clean(Sample::new().call(
        DisableInterrupts,
        asm! {
            push(eax); push(ds); push(ss); pop(ds); mov(eax, esp); test(dword_ptr(eax), eax);
            pop(ds); pop(eax); cli; ret;
        },
    ));
    clean(Sample::new().call(GetInterruptMask, asm! { pushfd; pop(eax); and(eax, 0x200); ret; }));
    clean(Sample::new().call(
        SetPxELong,
        asm! {
            push(ebx); mov(ebx, 0); mov(dword_ptr(ecx), ebx); mov(dword_ptr(ecx + 4), edx);
            mov(dword_ptr(ecx), eax); pop(ebx); ret;
        },
    ));
    clean(Sample::new().call(
        WriteIDTEntry,
        asm! {
            lea(eax, ptr(eax + edx * 8)); mov(dword_ptr(eax), ecx); mov(edx, dword_ptr(esp + 4));
            and(edx, 0xffff_9fffu32); or(edx, 0x2000); mov(dword_ptr(eax + 4), edx); ret;
        },
    ));
    clean(Sample::new().call(Shutdown, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.cli()?;
        a.hlt()?;
        a.jmp(again)
    }));
    // Data behind a call that never comes back is not code.
    clean(Sample::new().call(GetCR0, |a| {
        let mut over = a.create_label();
        a.call(over)?;
        a.db(&[0x0f, 0x0b, 0x0f, 0x6f])?;
        a.set_label(&mut over)?;
        a.pop(ecx)?;
        a.mov(eax, dword_ptr(ecx))?;
        a.mov(eax, cr0)?;
        a.ret()
    }));
}

#[test]
fn a_lost_register_is_named() {
    let report = only(
        Sample::new().call(number::DisableInterrupts, asm! { cli; mov(eax, 1); ret; }),
        Rule::Register,
        number::DisableInterrupts,
    );
    let found = &report.violations[0];
    let sample = Sample::new();
    assert_eq!(found.offset, Some(sample.offset(number::DisableInterrupts) + 1));
    assert_eq!(found.instruction.as_deref(), Some("mov eax, 1"));
    for sample in [
        Sample::new().call(number::EnableInterrupts, asm! { sti; inc(ecx); ret; }),
        Sample::new().call(number::EnableInterrupts, asm! { sti; mov(ebp, esp); ret; }),
        Sample::new().call(number::EnableInterrupts, asm! { push(ss); pop(ds); sti; ret; }),
    ] {
        only(sample, Rule::Register, number::EnableInterrupts);
    }
    only(
        Sample::new().call(number::GetCR3, asm! { mov(ebx, cr3); mov(eax, ebx); ret; }),
        Rule::Register,
        number::GetCR3,
    );
    only(Sample::new().call(number::IRET, asm! { pop(eax); iretd; }), Rule::Register, number::IRET);
    only(
        Sample::new()
            .call(number::GetInterruptMask, asm! { pushfd; pop(eax); mov(edx, eax); ret; }),
        Rule::Register,
        number::GetInterruptMask,
    );
}

#[test]
fn wrong_flags_are_named() {
    use number::*;
    only(Sample::new().call(EnableInterrupts, asm! { ret; }), Rule::Flags, EnableInterrupts);
    only(Sample::new().call(DisableInterrupts, asm! { sti; ret; }), Rule::Flags, DisableInterrupts);
    only(
        Sample::new().call(DisableInterrupts, asm! { cli; std; ret; }),
        Rule::Flags,
        DisableInterrupts,
    );
    only(
        Sample::new()
            .call(SetInterruptMask, asm! { push(eax); or(dword_ptr(esp), 0x200); popfd; ret; }),
        Rule::Flags,
        SetInterruptMask,
    );
    only(Sample::new().call(INB, asm! { in_(al, dx); and(eax, 0xff); ret; }), Rule::Flags, INB);
    only(Sample::new().call(GetCR0, asm! { cli; mov(eax, cr0); ret; }), Rule::Flags, GetCR0);
    only(
        Sample::new().answer(SYSEXIT, RelocationType::JUMP_REL, asm! { sti; nop; sysexit; }),
        Rule::Flags,
        SYSEXIT,
    );
    only(Sample::new().call(SYSEXIT, asm! { sysexit; }), Rule::Flags, SYSEXIT);
    only(
        Sample::new().call(SetIOPLMask, asm! { push(eax); popfd; ret; }),
        Rule::Flags,
        SetIOPLMask,
    );
}

#[test]
fn effects_that_fail_are_named() {
    use number::*;
    only(
        Sample::new().call(GetInterruptMask, asm! { mov(eax, 0x200); ret; }),
        Rule::Effect,
        GetInterruptMask,
    );
    only(Sample::new().call(SetPxE, asm! { ret; }), Rule::Effect, SetPxE);
    only(
        Sample::new()
            .call(SetPxE, asm! { mov(dword_ptr(edx), eax); mov(dword_ptr(edx + 4), eax); ret; }),
        Rule::Effect,
        SetPxE,
    );
    // The low half first: for a moment the new mapping leads to the old frame.
    only(
        Sample::new().call(
            SetPxELong,
            asm! { mov(dword_ptr(ecx), eax); mov(dword_ptr(ecx + 4), edx); ret; },
        ),
        Rule::Effect,
        SetPxELong,
    );
    only(
        Sample::new().call(WriteGDTEntry, asm! { mov(dword_ptr(eax + edx * 8), ecx); ret; }),
        Rule::Effect,
        WriteGDTEntry,
    );
    only(Sample::new().call(UpdateKernelStack, asm! { ret; }), Rule::Effect, UpdateKernelStack);
}

#[test]
fn the_stack_is_watched() {
    use number::*;
    only(Sample::new().call(GetCR0, asm! { mov(eax, cr0); ret_1(4); }), Rule::StackBalance, GetCR0);
    only(
        Sample::new()
            .call(GetCR0, asm! { sub(esp, 512); mov(dword_ptr(esp), eax); add(esp, 512); ret; }),
        Rule::StackUse,
        GetCR0,
    );
    only(
        Sample::new().call(GetCR0, asm! { mov(dword_ptr(esp - 4), eax); ret; }),
        Rule::StackUse,
        GetCR0,
    );
    only(
        Sample::new().call(GetCR0, asm! { mov(dword_ptr(esp + 8), eax); ret; }),
        Rule::StackUse,
        GetCR0,
    );
}

#[test]
fn wrong_endings_are_named() {
    use number::*;
    only(Sample::new().call(IRET, asm! { iretd; }), Rule::Ending, IRET);
    only(
        Sample::new().answer(IRET, RelocationType::JUMP_REL, asm! { add(esp, 4); iretd; }),
        Rule::Ending,
        IRET,
    );
    only(Sample::new().call(IRET, asm! { ret; }), Rule::Ending, IRET);
    only(Sample::new().call(SYSEXIT, asm! { sti; ret; }), Rule::Ending, SYSEXIT);
    only(Sample::new().call(Shutdown, asm! { cli; ret; }), Rule::Ending, Shutdown);
    only(
        Sample::new().call(Reboot, asm! { mov(al, 0xfe); out(0x64, al); ret; }),
        Rule::Ending,
        Reboot,
    );
    only(Sample::new().call(Halt, asm! { cli; hlt; ret; }), Rule::Ending, Halt);
    only(Sample::new().call(GetCR0, asm! { ud2; }), Rule::Ending, GetCR0);
    only(
        Sample::new().call(GetCR0, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.jmp(again)
        }),
        Rule::Ending,
        GetCR0,
    );
}

#[test]
fn memory_is_watched() {
    use number::*;
    let into_image = |a: &mut CodeAssembler| {
        let mut here = a.create_label();
        a.call(here)?;
        a.set_label(&mut here)?;
        a.pop(ecx)?;
        a.mov(dword_ptr(ecx), eax)?;
        a.ret()
    };
    only(Sample::new().call(SetCR0, into_image), Rule::ImageStore, SetCR0);
    only(
        Sample::new().call(GetCR0, asm! { mov(eax, dword_ptr(0x1000)); ret; }),
        Rule::Memory,
        GetCR0,
    );
    only(Sample::new().call(SetCR3, asm! { mov(dword_ptr(eax), ecx); ret; }), Rule::Memory, SetCR3);
    only(
        Sample::new().call(
            DisableInterrupts,
            asm! {
                push(eax); mov(eax, esp); test(dword_ptr(eax), eax); pop(eax); cli; ret;
            },
        ),
        Rule::Segment,
        DisableInterrupts,
    );
    let report =
        judged(&Sample::new().call(GetCR0, asm! { mov(eax, dword_ptr(HIGH_BASE)); ret; }).build());
    assert!(report.names(Rule::Base, GetCR0), "{:#?}", report.violations);
}

#[test]
fn code_that_nobody_executed_is_seen() {
    use number::*;
    only(Sample::new().call(GetCR0, asm! { xorps(xmm0, xmm0); ret; }), Rule::Vector, GetCR0);
    only(Sample::new().call(GetCR0, asm! { fninit; ret; }), Rule::Vector, GetCR0);
    let hidden = |a: &mut CodeAssembler| {
        let mut out = a.create_label();
        a.xor(eax, eax)?;
        a.jz(out)?;
        a.emms()?;
        a.set_label(&mut out)?;
        a.ret()
    };
    only(Sample::new().call(GetCR0, hidden), Rule::Vector, GetCR0);
    let outside = |a: &mut CodeAssembler| {
        a.xor(eax, eax)?;
        a.db(&[0x0f, 0x85, 0, 0, 0x10, 0])?;
        a.ret()
    };
    only(Sample::new().call(GetCR0, outside), Rule::Code, GetCR0);
    only(Sample::new().call(GetCR0, asm! { vmcall; ret; }), Rule::Undecided, GetCR0);
}

#[test]
fn answers_are_checked() {
    use number::*;
    only(Sample::new().none(IRET), Rule::Answer, IRET);
    only(Sample::new().answer(GetCR0, RelocationType::NOP, asm! { ret; }), Rule::Answer, GetCR0);
    only(Sample::new().answer(GetCR0, RelocationType(7), asm! { ret; }), Rule::Answer, GetCR0);
    let jumped = asm! { mov(eax, cr0); ret; };
    only(Sample::new().answer(GetCR0, RelocationType::JUMP_REL, jumped), Rule::Answer, GetCR0);
    clean(Sample::new().answer(UpdatePxE, RelocationType::NOP, asm! { ret; }));
    let report = judged(&Sample::new().call(GetCycleFrequency, asm! { rdtsc; ret; }).build());
    assert_eq!(report.violations.len(), 5, "{:#?}", report.violations);
    assert!(report.names(Rule::Group, WallclockUpdated));
}

#[test]
fn an_address_outside_is_named() {
    let mut image = Sample::new().build();
    let row = 0x500 + 8 * number::EnableInterrupts.0 as usize;
    image[row + 2] = 0x40;
    repair(&mut image);
    let report = judged(&image);
    assert_eq!(rules_of(&report), [(Rule::Answer, Some(29))]);
}

#[test]
fn get_reloc_itself_is_checked() {
    let broken = |code: fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>, rule: Rule| {
        let mut sample = Sample::new();
        sample.custom_lookup(code);
        let report = judged(&sample.build());
        assert!(report.violations.iter().any(|v| v.rule == rule), "{:#?}", report.violations);
    };
    broken(asm! { xor(ebx, ebx); xor(edx, edx); ret; }, Rule::GetReloc);
    broken(asm! { hlt; }, Rule::GetReloc);
    broken(asm! { xor(edx, edx); ret_1(4); }, Rule::StackBalance);
    broken(asm! { mov(edx, ecx); and(edx, 1); ret; }, Rule::Constancy);
    broken(asm! { mov(edx, 3); ret; }, Rule::Answer);
    broken(asm! { mov(dword_ptr(HIGH_BASE), eax); xor(edx, edx); ret; }, Rule::ImageStore);
    broken(asm! { vmmcall; ret; }, Rule::Undecided);
}

#[test]
fn vmi_init_is_checked() {
    let broken = |code: fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>, rule: Rule| {
        let report = judged(&Sample::new().init(code).build());
        assert_eq!(rules_of(&report), [(rule, None)], "{:#?}", report.violations);
        assert_eq!(report.violations[0].subject, "vmi_init");
    };
    broken(asm! { mov(eax, 1); ret; }, Rule::Init);
    broken(asm! { xor(eax, eax); xor(esi, esi); ret; }, Rule::Init);
    broken(asm! { xor(eax, eax); sti; ret; }, Rule::Flags);
    broken(asm! { xor(eax, eax); push(eax); ret; }, Rule::Init);
    broken(asm! { xor(eax, eax); ret_1(8); }, Rule::StackBalance);
}

#[test]
fn structures_are_checked() {
    type Change = fn(&mut Vec<u8>);
    let changes: [(Rule, Change); 14] = [
        (Rule::Checksum, |i| i[0x700] ^= 1),
        (Rule::Signature, |i| {
            i[0] = 0x54;
            seal(i)
        }),
        (Rule::Signature, |i| {
            i[8] = b'C';
            seal(i)
        }),
        (Rule::Revision, |i| {
            i[13] = 4;
            seal(i)
        }),
        (Rule::License, |i| {
            i[0xd0..0xd4].copy_from_slice(b"BSD\0");
            seal(i)
        }),
        (Rule::License, |i| {
            i[22..24].copy_from_slice(&[0xff, 0xff]);
            seal(i)
        }),
        (Rule::PciHeader, |i| {
            i[24..26].copy_from_slice(&[0, 0]);
            seal(i)
        }),
        (Rule::PciHeader, |i| {
            i[0x90 + 16] = 1;
            seal(i)
        }),
        (Rule::PciHeader, |i| {
            i[0x90 + 10] = 4;
            seal(i)
        }),
        (Rule::PciHeader, |i| {
            i[0x90 + 20] = 3;
            seal(i)
        }),
        (Rule::PnpHeader, |i| {
            i[0xb0 + 9] ^= 1;
            seal(i)
        }),
        (Rule::PnpHeader, |i| {
            i[0xb0 + 15] = 0xff;
            repair(i)
        }),
        (Rule::VirtualTop, |i| {
            i[16..20].copy_from_slice(&0xf000_0000u32.to_le_bytes());
            seal(i)
        }),
        (Rule::PostEntry, |i| {
            i[3..6].copy_from_slice(&[0xe9, 0xff, 0x7f]);
            seal(i)
        }),
    ];
    for (rule, change) in changes {
        let mut image = Sample::new().build();
        change(&mut image);
        let report = judged(&image);
        assert_eq!(rules_of(&report), [(rule, None)], "{:#?}", report.violations);
    }
    let mut image = Sample::new().build();
    image.extend([0; 512]);
    assert_eq!(rules_of(&judged(&image)), [(Rule::Length, None)]);
    let mut image = Sample::new().build();
    image[2] = 0;
    assert!(judged(&image).violations.iter().any(|v| v.rule == Rule::Length));
}

#[test]
fn what_is_no_rom_is_refused() {
    assert_eq!(Rom::parse(&[]).err(), Some(ReadError::Truncated { present: 0 }));
    assert_eq!(Rom::parse(&[0; 4096]).err(), Some(ReadError::NotARom));
    let mut image = Sample::new().build();
    image[13] = 12;
    let rom = Rom::parse(&image).expect("a ROM");
    assert!(matches!(survey(&rom, HIGH_BASE), Err(ReadError::Revision(_))));
}

#[test]
fn answers_are_the_same_whoever_looks() {
    for lookup in [Lookup::Table, Lookup::Chain] {
        let mut sample = Sample::new();
        sample.lookup(lookup);
        let rom = Rom::parse(&sample.build()).expect("a ROM");
        for base in [HIGH_BASE, LOW_BASE, 0, 0xffff_f000] {
            let table = answers(&rom, base);
            assert_eq!(table.init, Some(0));
            let answer = table.answer_of(number::SYSEXIT).expect("an answer");
            assert_eq!(answer.kind, RelocationType::JUMP_REL);
            assert_eq!(answer.offset, Some(sample.offset(number::SYSEXIT)));
            assert_eq!(table.answer_of(CallNumber(74)), None);
        }
    }
}

#[test]
fn a_survey_tells_what_each_call_does() {
    let rom = Rom::parse(&Sample::new().build()).expect("a ROM");
    let facts = survey(&rom, HIGH_BASE).expect("revision 3.0");
    assert_eq!(facts.calls.len(), CALLS_3_0.len());
    let mask = facts.calls[31].code.as_ref().expect("code");
    assert_eq!((mask.bytes, mask.instructions, mask.executed, mask.stack_bytes), (3, 3, 3, 4));
    assert_eq!(mask.system, ["pushfd"]);
    assert_eq!(mask.written, ["EAX"]);
    assert_eq!(facts.pnp.as_ref().and_then(|pnp| pnp.product.as_deref()), Some("product"));
    assert!(super::report::survey(&facts).contains("GetInterruptMask"));
    assert!(super::report::call(&facts.calls[31]).contains("pop eax"));
    assert!(serde_json::to_string(&facts).expect("JSON").starts_with("{\"version\":1"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_survived(mut bytes in proptest::collection::vec(any::<u8>(), 0..3000), whole in any::<bool>()) {
        if whole && bytes.len() > 144 {
            bytes[..14].copy_from_slice(b"\x55\xaa\x04\0\0\0\0\0cVmi\0\x03");
        }
        if let Ok(rom) = Rom::parse(&bytes) {
            let report = verify(&rom);
            prop_assert!(!report.is_clean());
            prop_assert!(!super::report::verdict(&report).is_empty());
            if let Ok(facts) = survey(&rom, LOW_BASE) {
                prop_assert!(!super::report::survey(&facts).is_empty());
            }
        }
    }

    #[test]
    fn mutated_images_are_survived(
        flips in proptest::collection::vec((0usize..0x1000, any::<u8>()), 1..12),
        length in 0usize..0x1200,
        reseal in any::<bool>(),
    ) {
        let mut image = Sample::new().build();
        for (place, value) in flips {
            image[place] = value;
        }
        if length < image.len() / 4 {
            image.truncate(length * 4);
        }
        if reseal && !image.is_empty() {
            seal(&mut image);
        }
        if let Ok(rom) = Rom::parse(&image) {
            prop_assert!(!super::report::verdict(&verify(&rom)).is_empty());
            if let Ok(facts) = survey(&rom, HIGH_BASE) {
                prop_assert!(!super::report::survey(&facts).is_empty());
            }
        }
    }
}
