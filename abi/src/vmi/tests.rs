use super::*;
use crate::header::{PCI_SIGNATURE, PciHeader, ROM_SIGNATURE, VMI_SIGNATURE};
use crate::probe::SCAN_STEP;
use crate::{REVISION_3_0, REVISION_13_3, number};
use zerocopy::{FromZeros, IntoBytes};

/// Bytes of the fake ROM.
const LENGTH: usize = 2 * LENGTH_UNIT;

/// A ROM that is in order, as far as nobody runs it.
fn fake() -> [u8; LENGTH] {
    const LICENSE: usize = size_of::<RomHeader>();
    const PCI: usize = LICENSE + 4;
    let mut header = RomHeader::new_zeroed();
    header.rom_signature = ROM_SIGNATURE.into();
    header.rom_length = (LENGTH / LENGTH_UNIT) as u8;
    header.vrom_signature = VMI_SIGNATURE.into();
    header.api_version_maj = REVISION_3_0.major;
    header.license_offs = (LICENSE as u16).into();
    header.pci_header_offs = (PCI as u16).into();
    let mut bytes = [0; LENGTH];
    bytes[..LICENSE].copy_from_slice(header.as_bytes());
    bytes[LICENSE..PCI].copy_from_slice(b"GPL\0");
    let pci = PciHeader { signature: PCI_SIGNATURE, ..PciHeader::new_zeroed() };
    bytes[PCI..PCI + size_of::<PciHeader>()].copy_from_slice(pci.as_bytes());
    bytes
}

/// An answer.
fn answer(kind: RelocationType, eip: u32) -> RelocationInfo {
    RelocationInfo::from_registers(eip, kind.0.into())
}

/// A table that is bound to these answers.
fn bound(
    relocation: impl FnMut(CallNumber) -> RelocationInfo,
    native: impl Fn(CallNumber) -> Option<u32>,
) -> Result<Calls, Unusable> {
    let calls = Calls::new();
    // SAFETY: nobody makes calls of it.
    unsafe { calls.bind(relocation, native) }.map(|()| calls)
}

/// A `get_reloc` that answers one number, and NONE to all others.
fn only(wanted: CallNumber, there: RelocationInfo) -> impl Fn(CallNumber) -> RelocationInfo {
    move |number| if number == wanted { there } else { answer(RelocationType::NONE, 0) }
}

#[test]
fn the_first_rom_of_the_revision_is_found() {
    let mut area = [0; 4 * SCAN_STEP as usize];
    assert_eq!(Rom::find(&area, REVISION_3_0), None);
    let mut other = fake();
    other[offset_of!(RomHeader, api_version_maj)] = REVISION_13_3.major;
    area[SCAN_STEP as usize..][..LENGTH].copy_from_slice(&other);
    area[2 * SCAN_STEP as usize..][..LENGTH].copy_from_slice(&fake());
    area[3 * SCAN_STEP as usize..][..LENGTH].copy_from_slice(&fake());
    let rom = Rom::find(&area, REVISION_3_0).expect("the second ROM");
    assert_eq!(rom.image().len(), LENGTH);
    assert_eq!(rom.image().as_ptr(), &raw const area[2 * SCAN_STEP as usize]);
}

#[test]
fn a_linked_rom_is_judged_like_any_other() {
    let bytes = fake();
    // SAFETY: the array has as many bytes as it claims.
    let judge = |bytes: &[u8; LENGTH]| unsafe {
        Rom::linked(bytes.as_ptr().cast(), REVISION_3_0).map(|rom| rom.image().len())
    };
    assert_eq!(judge(&bytes), Ok(LENGTH));
    let mut nothing = fake();
    nothing[offset_of!(RomHeader, rom_length)] = 0;
    let present = size_of::<RomHeader>();
    assert_eq!(judge(&nothing), Err(Refusal::Length { claimed: 0, present }));
}

#[test]
fn nothing_is_bound_at_first() {
    let calls = Calls::new();
    assert!((0..).map(CallNumber).zip(CALLS_3_0).all(|(number, _)| !calls.is_bound(number)));
    assert!(!calls.is_bound(CallNumber(74)));
    assert!(!calls.is_bound(CallNumber(u32::MAX)));
}

#[test]
fn what_the_rom_leaves_to_the_kernel_is_the_kernels_own() {
    let native = |number: CallNumber| (number != number::SetAlarm).then_some(0x1000 + number.0);
    let calls = bound(|_| answer(RelocationType::NONE, 0), native).expect("no answer is wrong");
    for (number, call) in (0..).map(CallNumber).zip(CALLS_3_0) {
        let expected = match call.contract.ending {
            _ if number == number::SetAlarm => answer(RelocationType::NONE, 0),
            Ending::Transfers => answer(RelocationType::JUMP_REL, 0x1000 + number.0),
            _ => answer(RelocationType::CALL_REL, 0x1000 + number.0),
        };
        assert_eq!(calls.relocation(number), expected, "{}", call.name);
    }
}

#[test]
fn methods_get_code_that_keeps_sites_and_transfers_do_not() {
    let relocation = |number| match number {
        number::SetCallbacks => answer(RelocationType::NONE, 0),
        CallNumber(number) if number & KEEP_SITE == 0 => answer(RelocationType::CALL_REL, 0x1000),
        _ => answer(RelocationType::CALL_REL, 0x2000),
    };
    let calls = bound(relocation, |_| None).expect("no answer is wrong");
    let eip = |number| calls.relocation(number).eip.get();
    assert_eq!(
        [eip(number::CLTS), eip(number::IRET), eip(number::SYSEXIT)],
        [0x2000, 0x1000, 0x1000]
    );
}

#[test]
fn a_rom_that_does_not_know_the_bit_is_called_all_the_same() {
    let there = answer(RelocationType::CALL_REL, 0x1000);
    let calls = bound(only(number::CLTS, there), |_| Some(0x3000)).expect("no answer is wrong");
    assert_eq!(calls.relocation(number::CLTS), there);
    assert_eq!(calls.relocation(number::SetCR3).eip.get(), 0x3000);
}

#[test]
fn no_code_is_code_enough_for_a_notification() {
    let nothing = answer(RelocationType::NOP, 0x1000);
    let calls = bound(only(number::SetLazyMode, nothing), |_| Some(0x3000)).expect("as allowed");
    assert_eq!(calls.relocation(number::SetLazyMode), answer(RelocationType::NOP, 0));
    assert!(calls.is_bound(number::SetLazyMode));
}

#[test]
fn answers_against_the_contract_are_refused() {
    for (number, wrong) in [
        (number::RDTSC, answer(RelocationType::NOP, 0)), // It has a result.
        (number::SetCR3, answer(RelocationType::JUMP_REL, 0x1000)), // It returns.
        (number::IRET, answer(RelocationType::NOP, 0)),
        (number::CLTS, answer(RelocationType::CALL_REL, 0)),
        (number::CLTS, answer(RelocationType(4), 0x1000)),
        (number::SetCallbacks, answer(RelocationType::CALL_REL, 0x1000)),
    ] {
        let refused = bound(only(number, wrong), |_| Some(0x3000)).err();
        assert_eq!(refused, Some(Unusable::Answer(number, wrong)));
    }
}

#[test]
fn assembly_finds_an_entry_where_the_table_has_it() {
    let there = answer(RelocationType::JUMP_REL, 0x1234_5678);
    let calls = bound(only(number::SYSEXIT, there), |_| None).expect("as allowed");
    let word = |offset: usize| {
        // SAFETY: inside the table, whose words nobody writes.
        unsafe { (&raw const calls).byte_add(offset).cast::<u32>().read() }
    };
    assert_eq!(word(Calls::eip_offset(number::SYSEXIT)), 0x1234_5678);
    assert_eq!(word(Calls::kind_offset(number::SYSEXIT)), u32::from(RelocationType::JUMP_REL.0));
}
