//! The images as bytes: sizes, lengths of paths, and what `verify` says of them and of broken ones.

use anyhow::{Context, Result};
use iced_x86::code_asm::registers::gpr32::*;
use iced_x86::code_asm::*;
use std::mem::offset_of;
use vmi_abi::header::{LENGTH_UNIT, RomHeader, checksum};
use vmi_abi::{CALLS_3_0, CallNumber, RelocationType, Site, number, probe};
use vmi_native_backend::binding::{Bind, SHORT_PLAIN, SiteRule, answer, is_short, least_rule};
use vmi_tests::Specimen;
use xtask::artifacts;
use xtask::inspect::{self, HIGH_BASE, Report, Rom, Rule, verify};

/// Bytes that the native image may have.
const LIMIT: usize = 8 * 1024;

/// Instructions that `get_reloc` may take: a kernel asks some 4,460 times in a boot.
const GET_RELOC_LIMIT: u64 = 24;

/// An image, with the answers and the rule for call sites that it is to have.
struct Image {
    bind: Bind,
    rule: SiteRule,
    bytes: Vec<u8>,
}

/// Every image; the one that rewrites call sites as a file, and as POST leaves it on other machines
/// than the file is for.
fn images() -> Result<Vec<Image>> {
    let built = artifacts::ensure()?;
    let read = |bind, path| -> Result<Image> {
        Ok(Image { bind, rule: SiteRule::InAWord, bytes: std::fs::read(path)? })
    };
    let after_post = |rule| -> Result<Image> {
        let bytes = native_specimen()?.with_rule(rule)?;
        Ok(Image { bind: Bind::Rewrite, rule, bytes })
    };
    Ok(vec![
        read(Bind::Rewrite, &built.native)?,
        after_post(SiteRule::Never)?,
        after_post(SiteRule::OneByte)?,
        after_post(SiteRule::Anywhere)?,
        read(Bind::Fastest, &built.fastest)?,
        read(Bind::Call, &built.call)?,
    ])
}

fn default_image() -> Result<Vec<u8>> {
    Ok(std::fs::read(&artifacts::ensure()?.native)?)
}

fn native_specimen() -> Result<Specimen> {
    let built = artifacts::ensure()?;
    Specimen::read(&built.native, &built.native_elf)
}

fn call_specimen() -> Result<Specimen> {
    let built = artifacts::ensure()?;
    Specimen::read(&built.call, &built.call_elf)
}

fn verified(bytes: &[u8]) -> Result<Report> {
    Ok(verify(&Rom::parse(bytes)?))
}

#[test]
fn our_images_are_clean_and_small() -> Result<()> {
    for Image { bind, bytes, .. } in images()? {
        let report = verified(&bytes)?;
        assert!(report.is_clean(), "{bind:?}: {:#?}", report.violations);
        assert!(bytes.len() <= LIMIT, "{bind:?}: {} bytes", bytes.len());
        assert_eq!(bytes.len() % LENGTH_UNIT, 0);
        assert_eq!(checksum(&bytes), 0);
        assert!(probe::probe(&bytes, vmi_abi::REVISION_3_0).is_ok());
    }
    Ok(())
}

#[test]
fn the_answers_are_those_of_the_binding_policy() -> Result<()> {
    for Image { bind, rule, bytes } in images()? {
        let table = inspect::answers(&Rom::parse(&bytes)?, HIGH_BASE);
        assert!(table.most_instructions() <= GET_RELOC_LIMIT, "{}", table.most_instructions());
        for call in CALLS_3_0 {
            let number = call.number.context("a number of 3.0")?;
            let found = table.answer_of(number).context(call.name)?;
            let holds = rule as u8 >= least_rule(call, bind) as u8;
            let wanted = if holds { answer(call, bind).0 } else { RelocationType::NONE };
            assert_eq!(found.kind, wanted, "{} {bind:?} {rule:?}", call.name);
        }
    }
    Ok(())
}

/// Instructions of the calls that are their instruction and a return.
const FAST: [(CallNumber, u64); 33] = [
    (number::WRMSR, 2),
    (number::RDMSR, 2),
    (number::SetGDT, 2),
    (number::SetLDT, 2),
    (number::SetIDT, 2),
    (number::SetTR, 2),
    (number::GetGDT, 2),
    (number::GetLDT, 2),
    (number::GetIDT, 2),
    (number::GetTR, 2),
    (number::SetCR0, 2),
    (number::SetCR2, 2),
    (number::SetCR3, 2),
    (number::SetCR4, 2),
    (number::GetCR0, 2),
    (number::GetCR2, 2),
    (number::GetCR3, 2),
    (number::GetCR4, 2),
    (number::WBINVD, 2),
    (number::RDTSC, 2),
    (number::CLTS, 2),
    (number::EnableInterrupts, 2),
    (number::DisableInterrupts, 2),
    (number::GetInterruptMask, 3), // No single instruction reads the flags into a register,
    (number::SetInterruptMask, 3), // and none loads them from one.
    (number::SYSEXIT, 2),
    (number::SetPxE, 2),
    (number::UpdatePxE, 1),
    (number::AllocatePage, 1),
    (number::ReleasePage, 1),
    (number::InvalPage, 2),
    (number::SetLinearMapping, 1),
    (number::SetLazyMode, 1),
];

#[test]
fn a_fast_call_is_its_instruction_and_a_return() -> Result<()> {
    for Image { bind, bytes, .. } in images()? {
        if bind == Bind::Rewrite {
            continue; // See below.
        }
        let survey = inspect::survey(&Rom::parse(&bytes)?, HIGH_BASE)?;
        for (number, instructions) in FAST {
            let call = survey
                .calls
                .iter()
                .find(|call| call.number == number.0)
                .context("in the survey")?;
            if let Some(code) = &call.code {
                assert_eq!(code.instructions as u64, instructions, "{} {bind:?}", call.name);
            }
        }
    }
    Ok(())
}

/// A short call that rewrites its site begins with a jump to what tries that, and then is what it is in
/// the other images, byte for byte. Nothing else is answered with a plain form beside it.
#[test]
fn a_short_call_has_a_plain_form_behind_its_entry() -> Result<()> {
    let (native, call) = (native_specimen()?, call_specimen()?);
    for declared in CALLS_3_0 {
        let number = declared.number.context("a number of 3.0")?;
        if is_short(declared) {
            let rewriting = &native.bytes[native.code(number)?..];
            let plain = &call.bytes[call.code(number)?..];
            let native_code = plain.iter().take_while(|byte| !matches!(byte, 0xc3 | 0xcc)).count();
            assert!((1..8).contains(&native_code), "{}", declared.name);
            let behind = &rewriting[usize::from(SHORT_PLAIN)..][..native_code];
            assert_eq!(behind, &plain[..native_code], "{}", declared.name);
            let [0xeb, distance] = rewriting[..2] else {
                anyhow::bail!("{}: no jump", declared.name)
            };
            let tries = &rewriting[2 + usize::from(distance)..];
            assert_eq!(tries[..3], [0x9c, 0xfa, 0xe8], "{}: PUSHFD, CLI, CALL", declared.name);
        }
        assert_eq!(native.plain_distance(number), if is_short(declared) { SHORT_PLAIN } else { 0 });
    }
    Ok(())
}

/// What Linux patches over is what every interrupt and system call runs through.
#[test]
fn patched_sites_are_bound_in_the_default_image() -> Result<()> {
    let table = inspect::answers(&Rom::parse(&default_image()?)?, HIGH_BASE);
    for call in CALLS_3_0.iter().filter(|call| call.contract.site == Site::Patched) {
        let found = call.number.and_then(|number| table.answer_of(number)).context(call.name)?;
        assert!(found.kind.has_address(), "{}", call.name);
    }
    Ok(())
}

/// Changes a byte and makes the checksum right again by the last one.
fn with_byte(offset: usize, value: u8) -> Result<Vec<u8>> {
    let mut bytes = default_image()?;
    bytes[offset] = value;
    let last = bytes.len() - 1;
    bytes[last] = bytes[last].wrapping_sub(checksum(&bytes));
    Ok(bytes)
}

/// One fault, and the rule that it breaks.
fn breaks(bytes: &[u8], rule: Rule, call: Option<CallNumber>) -> Result<()> {
    let report = verified(bytes)?;
    let found = report.violations.iter().any(|found| {
        found.rule == rule && (call.is_none() || found.call == call.map(|call| call.0))
    });
    assert!(found, "{rule:?} {call:?} is not among {:#?}", report.violations);
    Ok(())
}

#[test]
fn every_flipped_byte_is_found() -> Result<()> {
    let bytes = default_image()?;
    for offset in (0..bytes.len()).step_by(37) {
        let mut broken = bytes.clone();
        broken[offset] ^= 0x40;
        // A byte of a signature may leave nothing that could be read as a ROM.
        let clean = Rom::parse(&broken).is_ok_and(|rom| verify(&rom).is_clean());
        assert!(!clean, "a flipped byte at {offset:#x} passes");
    }
    Ok(())
}

#[test]
fn broken_headers_are_named() -> Result<()> {
    let header = default_image()?;
    let license = usize::from(u16::from_le_bytes([header[22], header[23]]));
    breaks(&with_byte(offset_of!(RomHeader, rom_length), 1)?, Rule::Length, None)?;
    breaks(&with_byte(offset_of!(RomHeader, rom_length), 0xff)?, Rule::Length, None)?;
    breaks(&with_byte(offset_of!(RomHeader, api_version_maj), 4)?, Rule::Revision, None)?;
    breaks(&with_byte(offset_of!(RomHeader, pci_header_offs), 0)?, Rule::PciHeader, None)?;
    breaks(&with_byte(license, b'X')?, Rule::License, None)
}

#[test]
fn broken_calls_are_named() -> Result<()> {
    let specimen = call_specimen()?;
    let none = specimen.with_type(number::IRET, RelocationType::NONE)?;
    breaks(&none, Rule::Answer, Some(number::IRET))?;
    let register = specimen.with_code(number::DisableInterrupts, |a, code| {
        a.xor(ecx, ecx)?;
        a.jmp(code)
    })?;
    breaks(&register, Rule::Register, Some(number::DisableInterrupts))?;
    let vector = specimen.with_code(number::SetPxE, |a, code| {
        a.xorps(xmm0, xmm0)?;
        a.jmp(code)
    })?;
    breaks(&vector, Rule::Vector, Some(number::SetPxE))
}

#[test]
fn the_page_of_calls_is_fresh() -> Result<()> {
    let path = xtask::workspace().join(xtask::reference::PATH);
    assert!(
        std::fs::read_to_string(path)? == xtask::reference::page(),
        "`cargo xtask docs` writes it anew"
    );
    Ok(())
}
