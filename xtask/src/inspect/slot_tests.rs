//! Revision 13.x: right images are called clean, and each fault is named.

use super::samples::{Sample, seal};
use super::slot_samples::{BEHIND, LOCK, Slots, asm, jump, offset};
use super::tests::{judged, rules_of};
use super::{HIGH_BASE, LOW_BASE, Report, Rom, Rule, answers, difference, map, report, survey};
use iced_x86::code_asm::*;
use proptest::prelude::*;
use vmi_abi::header::SLOT_TABLE_SIZE;
use vmi_abi::slot;

#[track_caller]
fn clean(sample: &Slots) -> Report {
    let report = judged(&sample.build());
    assert!(report.is_clean(), "{:#?}", report.violations);
    report
}

/// The image breaks this rule in this call, and no other anywhere.
#[track_caller]
fn only(sample: &Slots, rule: Rule, number: u32) -> Report {
    let report = judged(&sample.build());
    assert_eq!(rules_of(&report), [(rule, Some(number))], "{:#?}", report.violations);
    report
}

#[test]
fn right_images_are_clean() {
    for minor in [0, 2, 3, 7] {
        let report = clean(&Slots::new(minor));
        let executed = report.executed.iter().flatten().count();
        assert_eq!(executed, if minor < 3 { 81 } else { 84 });
    }
    clean(Slots::new(3).length(SLOT_TABLE_SIZE));
}

#[test]
fn code_may_leave_its_slot_by_a_jump() {
    clean(Slots::new(0).moved(24, 0xe00));
    // Slots that hold no call are free for code.
    let long = asm! { mov(eax, 1); nop_1(dword_ptr(eax + eax + 0x100)); nop_1(dword_ptr(eax + eax + 0x100));
    nop_1(dword_ptr(eax + eax + 0x100)); nop_1(dword_ptr(eax + eax + 0x100)); ret; };
    clean(Slots::new(0).slot(84, long));
    only(Slots::new(3).slot(84, long), Rule::Slot, 84);
}

#[test]
fn a_slot_that_runs_into_the_next_is_named() {
    let runs = [&[0x90; 29][..], &[0x0f, 0x20, 0xd8]].concat();
    let report = only(Slots::new(0).bytes(offset(26), &runs), Rule::Slot, 26);
    let found = &report.violations[0];
    assert_eq!(found.offset, Some(offset(27) - 3));
    assert!(found.detail.contains("the slot of GetCR4"), "{}", found.detail);
}

#[test]
fn the_contract_holds_in_slots() {
    let report =
        only(Slots::new(0).slot(36, asm! { cli; xor(ecx, ecx); ret; }), Rule::Register, 36);
    let found = &report.violations[0];
    assert_eq!((found.subject, found.offset), ("DisableInterrupts", Some(offset(36) + 1)));
    only(Slots::new(3).slot(35, asm! { ret; }), Rule::Flags, 35);
    only(Slots::new(0).slot(24, asm! { mov(eax, cr0); ret_1(4); }), Rule::StackBalance, 24);
    only(
        Slots::new(0).slot(20, asm! { mov(cr0, eax); db(&[0xe8, 0, 0, 0, 0]); pop(ecx); mov(dword_ptr(ecx), eax); ret; }),
        Rule::ImageStore,
        20,
    );
    // Sanos jumps: no return address lies above the frame.
    only(Slots::new(0).slot(39, asm! { add(esp, 4); iretd; }), Rule::Ending, 39);
    only(Slots::new(3).slot(40, asm! { sti; nop; sysexit; }), Rule::Flags, 40);
    only(Slots::new(3).slot(44, asm! { cli; ret; }), Rule::Ending, 44);
    let init = judged(&Slots::new(0).slot(4, asm! { mov(eax, 1); ret; }).build());
    assert_eq!(rules_of(&init), [(Rule::Init, Some(4))]);
    let init = judged(&Slots::new(3).slot(4, asm! { xor(eax, eax); xor(edi, edi); ret; }).build());
    assert_eq!(rules_of(&init), [(Rule::Init, Some(4))]);
}

#[test]
fn effects_of_calls_that_only_13_has_are_checked() {
    let wrong = |number: u8, code| {
        let report = judged(&Slots::new(0).slot(number, code).build());
        assert_eq!(
            rules_of(&report),
            [(Rule::Effect, Some(number.into()))],
            "{:#?}",
            report.violations
        );
    };
    wrong(45, asm! { ret; });
    wrong(45, asm! { mov(dword_ptr(edx + 4), eax); ret; });
    wrong(46, asm! { mov(eax, dword_ptr(eax + 4)); ret; });
    wrong(46, asm! { mov(ecx, dword_ptr(eax)); mov(dword_ptr(eax), edx); mov(eax, ecx); ret; });
    wrong(47, asm! { mov(dword_ptr(edx), eax); mov(eax, 0); ret; });
    wrong(48, asm! { mov(dword_ptr(ecx), eax); mov(dword_ptr(ecx + 4), edx); ret; });
    wrong(49, asm! { mov(eax, dword_ptr(eax)); xor(edx, edx); ret; });
    // Another processor can come between the halves.
    wrong(
        50,
        asm! {
            push(ebx); mov(ebx, dword_ptr(ecx)); mov(dword_ptr(ecx), eax); mov(eax, ebx);
            mov(ebx, edx); mov(edx, dword_ptr(ecx + 4)); mov(dword_ptr(ecx + 4), ebx); pop(ebx); ret;
        },
    );
    wrong(51, asm! { bts(dword_ptr(edx), eax); sbb(eax, eax); ret; });
    wrong(51, asm! { db(&[LOCK]); btr(dword_ptr(edx), eax); sbb(eax, eax); ret; });
    wrong(52, asm! { db(&[LOCK]); btr(dword_ptr(edx), eax); mov(eax, 0); ret; });
    wrong(73, asm! { and(eax, 31); db(&[LOCK]); bts(dword_ptr(edx), eax); sbb(eax, eax); ret; });
    wrong(74, asm! { btr(dword_ptr(edx), eax); sbb(eax, eax); ret; });
    wrong(
        72,
        asm! {
            mov(ecx, eax); mov(eax, dword_ptr(ecx)); mov(edx, dword_ptr(ecx + 4)); ret;
        },
    );
}

#[test]
fn a_slot_that_does_nothing_is_named_where_something_must_be_done() {
    let nothing = |number: u8| judged(&Slots::new(0).slot(number, asm! { ret; }).build());
    for number in [6, 8, 20, 22, 28, 29, 55, 56, 65] {
        assert_eq!(rules_of(&nothing(number)), [(Rule::Effect, Some(number.into()))], "{number}");
    }
    for number in [24, 79, 82, 84] {
        let report = nothing(number);
        assert_eq!(rules_of(&report), [(Rule::Effect, Some(number.into()))], "{number}");
        assert!(report.violations[0].detail.contains("no instruction writes"));
    }
    for number in [41, 53, 54, 57, 58, 75, 78] {
        assert!(nothing(number).is_clean(), "{number}");
    }
    let report = nothing(81);
    assert!(report.is_clean());
    assert!(report.notes.iter().any(|note| note.subject == "SetAlarm"));
}

#[test]
fn empty_slots_are_named() {
    for (filler, minor, number) in
        [(0x00, 0, 5), (0x90, 0, 84), (0xcc, 0, 45), (0xff, 3, 85), (0x00, 0, 4), (0xcc, 3, 87)]
    {
        let report =
            only(Slots::new(minor).bytes(offset(number), &[filler; 32]), Rule::Slot, number.into());
        assert!(report.violations[0].detail.contains("empty"), "{:?}", report.violations);
    }
    assert!(judged(&Slots::new(0).bytes(offset(57), &[0xc3; 32]).build()).is_clean());
    let short = judged(&Slots::new(0).length(1024).build());
    assert_eq!(rules_of(&short)[0], (Rule::Length, None));
    assert!(short.violations.iter().any(|v| v.rule == Rule::Slot && v.call == Some(84)));
}

#[test]
fn code_behind_what_guests_copy_is_named() {
    for minor in [0, 3] {
        let report = only(Slots::new(minor).moved(24, BEHIND), Rule::Copy, 24);
        let found = &report.violations[0];
        assert_eq!(found.offset, Some(offset(24)));
        assert!(found.instruction.as_deref().is_some_and(|text| text.starts_with("jmp")));
        only(Slots::new(minor).moved(4, BEHIND), Rule::Copy, 4);
    }
    only(Slots::new(3).lookup_at(BEHIND, 0, |_| Ok(())), Rule::Copy, 85);
    // Through a register, and data.
    let through = asm! {
        db(&[0xe8, 0, 0, 0, 0]); pop(ecx); add(ecx, (BEHIND - offset(24) - 5) as u32); jmp(ecx);
    };
    only(Slots::new(0).slot(24, through).bytes(BEHIND, &[0x0f, 0x20, 0xc0, 0xc3]), Rule::Copy, 24);
    let reads = asm! {
        db(&[0xe8, 0, 0, 0, 0]); pop(ecx); mov(eax, dword_ptr(ecx + (BEHIND - offset(79) - 5) as i32));
        xor(edx, edx); ret;
    };
    let report = only(Slots::new(0).slot(79, reads), Rule::Copy, 79);
    assert_eq!(report.violations[0].offset, Some(offset(79) + 6));
    // Never executed, and seen all the same.
    let hidden =
        [&[0x31, 0xd2, 0x0f, 0x85][..], &jump(offset(82) + 3, BEHIND)[1..], &[0x31, 0xc0, 0xc3]];
    only(
        Slots::new(0).bytes(offset(82), &hidden.concat()).bytes(BEHIND, &[0x31, 0xc0, 0xc3]),
        Rule::Copy,
        82,
    );
    // The last instruction lies in the copy in part only.
    only(
        Slots::new(0)
            .bytes(offset(24), &jump(offset(24), 0xffe))
            .bytes(0xffe, &[0x0f, 0x20, 0xc0, 0xc3]),
        Rule::Copy,
        24,
    );
}

#[test]
fn an_absolute_address_is_named() {
    let report = judged(
        &Slots::new(0)
            .slot(79, asm! { mov(eax, dword_ptr(HIGH_BASE)); xor(edx, edx); ret; })
            .build(),
    );
    assert!(report.names(Rule::Base, vmi_abi::CallNumber(79)), "{:#?}", report.violations);
}

#[test]
fn answers_of_13_3_are_checked() {
    clean(Slots::new(3).answer_type(24, 1));
    let report = only(Slots::new(3).answer_type(24, 0), Rule::Answer, 24);
    assert!(report.violations[0].detail.contains("NONE"));
    for kind in [2, 3, 9] {
        only(Slots::new(3).answer_type(39, kind), Rule::Answer, 39);
    }
    // Code at both places is held to the contract.
    let elsewhere = [0x0f, 0x20, 0xc0, 0xc3];
    clean(Slots::new(3).answer_place(24, BEHIND).bytes(BEHIND, &elsewhere));
    only(
        Slots::new(3).answer_place(24, BEHIND).bytes(BEHIND, &[0x31, 0xdb, 0x0f, 0x20, 0xc0, 0xc3]),
        Rule::Register,
        24,
    );
    only(
        Slots::new(3)
            .answer_place(24, BEHIND)
            .bytes(BEHIND, &elsewhere)
            .slot(24, asm! { mov(eax, cr0); inc(ebx); ret; }),
        Rule::Register,
        24,
    );
    only(Slots::new(3).answer_place(24, 0x5000), Rule::Answer, 24);
    let lookup = slot::GetRelocationInfo.number;
    let asked = |code, rule: Rule| {
        let report = judged(&Slots::new(3).slot(lookup, code).build());
        assert!(report.violations.iter().any(|v| v.rule == rule), "{:#?}", report.violations);
    };
    asked(asm! { xor(esi, esi); xor(edx, edx); ret; }, Rule::GetReloc);
    asked(asm! { mov(edx, ecx); and(edx, 1); ret; }, Rule::Constancy);
    asked(asm! { mov(edx, 1); ret; }, Rule::Answer);
    asked(asm! { hlt; }, Rule::GetReloc);
    // What nobody can ask for in 13.0 is not looked at.
    clean(Slots::new(0).bytes(offset(lookup), &[0xf4; 32]));
}

#[test]
fn structures_of_13_are_checked() {
    type Change = fn(&mut Vec<u8>);
    let changes: [(Rule, Change); 3] = [
        (Rule::Checksum, |i| i[0x1f00] ^= 1),
        (Rule::PciHeader, |i| {
            i[24] = 0;
            seal(i);
        }),
        (Rule::PostEntry, |i| {
            i[3..6].copy_from_slice(&[0xe9, 0xff, 0x7f]);
            seal(i);
        }),
    ];
    for (rule, change) in changes {
        let mut image = Slots::new(3).build();
        change(&mut image);
        assert_eq!(rules_of(&judged(&image)), [(rule, None)]);
    }
    // Reserved fields may hold anything.
    let mut image = Slots::new(3).build();
    image[14..24].fill(0x80);
    seal(&mut image);
    assert!(judged(&image).is_clean());
}

#[test]
fn what_does_not_apply_is_said() {
    let skipped = |report: &Report| -> Vec<&str> {
        report.not_applicable.iter().map(|skipped| skipped.rule.name()).collect()
    };
    let old = clean(&Slots::new(0));
    let all = ["licence", "virtual-top", "get-reloc", "answer", "constancy", "group"];
    assert_eq!(skipped(&old), all);
    assert_eq!(skipped(&clean(&Slots::new(3))), ["licence", "virtual-top", "group"]);
    assert_eq!(skipped(&judged(&Sample::new().build())), ["slot", "copy"]);
    let text = report::verdict(&old);
    for name in all {
        assert!(
            text.lines().any(|line| line.contains("not applicable") && line.contains(name)),
            "{text}"
        );
    }
    assert!(text.contains("81 slots, 81 of them"), "{text}");
    assert!(!report::verdict(&judged(&Sample::new().build())).contains("applicable"));
}

#[test]
fn a_survey_shows_slots() {
    let rom = Rom::parse(&Slots::new(0).build()).expect("a ROM");
    let facts = survey(&rom, HIGH_BASE).expect("revision 13.0");
    assert_eq!((facts.calls.len(), facts.vmi_init_result), (81, Some(0)));
    let call = &facts.calls[0];
    assert_eq!(
        (call.number, call.name, call.offset, call.slot),
        (4, "Init", Some(0x80), Some(0x80))
    );
    assert!(facts.calls.iter().all(|call| call.answer.is_none() && call.code.is_some()));
    let text = report::survey(&facts);
    assert!(text.contains("81 of 81 calls have code.") && !text.contains("licence"), "{text}");
    assert!(report::call(call).contains("slot: 80h"));

    let sample =
        Slots::new(3).answer_place(24, BEHIND).bytes(BEHIND, &[0x0f, 0x20, 0xc0, 0xc3]).build();
    let rom = Rom::parse(&sample).expect("a ROM");
    let facts = survey(&rom, LOW_BASE).expect("revision 13.3");
    assert_eq!(facts.calls.len(), 84);
    assert!(facts.calls.iter().all(|call| call.answer.as_deref() == Some("CALL_REL")));
    let moved: Vec<_> = facts
        .calls
        .iter()
        .filter_map(|call| Some((call.number, call.elsewhere.as_ref()?.offset)))
        .collect();
    assert_eq!(moved, [(24, BEHIND)]);
    assert!(report::survey(&facts).contains("GetRelocationInfo takes at most"));
    assert!(report::call(&facts.calls[20]).contains("1100h instead of the slot"));
    let table = answers(&rom, LOW_BASE);
    assert_eq!(table.answer_at(24).and_then(|answer| answer.offset), Some(BEHIND));
    assert_eq!(table.answer_at(3), None);
}

#[test]
fn revisions_are_compared_by_name() {
    let of = |image: &[u8], other: &[u8]| {
        let rom = |image: &[u8]| Rom::parse(image).expect("a ROM");
        difference::difference(&rom(image), &rom(other), HIGH_BASE).expect("known revisions")
    };
    let (old, new) = (Slots::new(0).build(), Slots::new(3).build());
    assert!(of(&old, &old).same && of(&new, &new).same);
    let found = of(&old, &new);
    let calls = |found: &difference::Difference| -> Vec<&'static str> {
        found
            .calls
            .iter()
            .filter(|call| call.code == difference::Likeness::OneSided)
            .map(|call| call.name)
            .collect()
    };
    assert_eq!(calls(&found), ["GetRelocationInfo", "SetPxE", "SetPxELong"]);
    let changed = found.calls.iter().filter(|call| !call.is_same()).count();
    assert_eq!((changed, found.header.len()), (3, 1), "{:#?}", found.header);
    let found = of(&Sample::new().build(), &new);
    let call = |name: &str| found.calls.iter().find(|call| call.name == name);
    assert_eq!(call("EnableInterrupts").map(|call| call.numbers), Some([Some(29), Some(35)]));
    assert!(call("vmi_init").is_some() && call("Init").is_none());
    let changed =
        Slots::new(3).answer_place(24, BEHIND).bytes(BEHIND, &[0x0f, 0x20, 0xc0, 0xc3]).build();
    assert!(!of(&new, &changed).same);
}

#[test]
fn a_map_shows_slots() {
    let image = Slots::new(3).build();
    let rom = Rom::parse(&image).expect("a ROM");
    let spans = map::map(&rom, &survey(&rom, HIGH_BASE).expect("revision 13.3")).spans;
    assert_eq!(spans.last().map(|span| span.end), Some(image.len()));
    let at = |offset: usize| spans.iter().find(|span| span.end > offset).expect("a span");
    assert_eq!((at(0x80).kind, at(0x80).label.as_str()), (map::Kind::Init, "Init"));
    assert_eq!(at(offset(35)).label, "35 EnableInterrupts");
    assert_eq!(at(offset(85)).kind, map::Kind::Lookup);
    assert_eq!(at(offset(30)).label, at(0xb00).label);
    assert!(spans.iter().all(|span| span.kind != map::Kind::Unknown), "{spans:#?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_images_are_survived(
        flips in proptest::collection::vec((0usize..0x1000, any::<u8>()), 1..12),
        minor in 0u8..5,
        length in 1usize..20,
        reseal in any::<bool>(),
    ) {
        let mut image = Slots::new(minor).build();
        for (place, value) in flips {
            image[place] = value;
        }
        image.truncate(length * 512);
        if reseal {
            seal(&mut image);
        }
        super::hostile::parse(&image);
        super::hostile::inspect(&image);
        super::hostile::verify(&image);
    }
}

/// The files of `fuzz/corpus/rom` that are of revision 13.x.
fn corpus() -> [(&'static str, Vec<u8>); 9] {
    let small = |sample: &mut Slots| sample.length(SLOT_TABLE_SIZE).build();
    let get_cr0 = [0x0f, 0x20, 0xc0, 0xc3];
    [
        ("good-13.0.rom", small(&mut Slots::new(0))),
        ("good-13.3.rom", small(&mut Slots::new(3))),
        (
            "slot-elsewhere.rom",
            Slots::new(3).answer_place(24, BEHIND).bytes(BEHIND, &get_cr0).build(),
        ),
        ("slot-none.rom", small(Slots::new(3).answer_type(24, 0))),
        ("slot-register.rom", small(Slots::new(0).slot(36, asm! { cli; xor(ecx, ecx); ret; }))),
        ("slot-empty.rom", small(Slots::new(0).bytes(offset(45), &[0xcc; 32][..]))),
        ("slot-runs-over.rom", small(Slots::new(0).bytes(offset(26), &[0x90; 31][..]))),
        ("slot-behind-copy.rom", Slots::new(0).moved(24, BEHIND).build()),
        ("slot-short.rom", Slots::new(3).length(1024).build()),
    ]
}

/// Whoever changes the samples writes the files anew: `UPDATE_CORPUS=1 cargo test -p xtask --lib corpus`.
#[test]
fn the_corpus_has_these_images() {
    let folder = crate::workspace().join("fuzz/corpus/rom");
    for (name, image) in corpus() {
        let path = folder.join(name);
        if std::env::var_os("UPDATE_CORPUS").is_some() {
            std::fs::write(&path, &image).expect("a file that can be written");
        }
        assert!(std::fs::read(&path).is_ok_and(|bytes| bytes == image), "{}", path.display());
    }
}
