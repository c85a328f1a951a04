//! Header, `PCIR`, `$PnP`, strings and checksum.

use super::{Report, Rule};
use crate::inspect::rom::Rom;
use iced_x86::{Decoder, DecoderOptions, OpKind};
use std::mem::{offset_of, size_of};
use vmi_abi::header::{
    ACCEPTED_LICENSES, LENGTH_UNIT, PCI_DEVICE, PCI_LAST_IMAGE, PCI_VENDOR, PciHeader, PnpHeader,
    ROM_SIGNATURE, RomHeader, SLOT_TABLE_SIZE, VMI_SIGNATURE, checksum,
};
use vmi_abi::{REVISION_3_0, REVISION_13_3, Revision};

/// What is free for option ROMs behind the video BIOS: C8000h to DFFFFh.
const AREA_LENGTH: usize = 0x1_8000;

/// A hole that starts lower collides with the memory of a machine that has 896 MB or more.
const LOWEST_TOP: u32 = 0xf880_0000;

pub(super) fn check(rom: &Rom, report: &mut Report) {
    check_length(rom, report);
    check_header(rom, report);
    if !rom.revision().has_slots() {
        check_license(rom, report);
        check_virtual_top(rom, report);
    }
    check_pci(rom, report);
    check_pnp(rom, report);
    check_post_entry(rom, report);
}

fn check_length(rom: &Rom, report: &mut Report) {
    let (claimed, present) = (rom.claimed_length(), rom.file().len());
    let at = Some(offset_of!(RomHeader, rom_length));
    if claimed < size_of::<RomHeader>() {
        report.image(
            Rule::Length,
            at,
            format!("the length byte claims {claimed} bytes, less than a header"),
        );
    } else if claimed != present {
        report.image(
            Rule::Length,
            at,
            format!("the length byte claims {claimed} bytes, the file has {present}"),
        );
    }
    if rom.revision().has_slots() && claimed < SLOT_TABLE_SIZE {
        report.image(
            Rule::Length,
            at,
            format!("{claimed} bytes do not hold all slots, of which guests copy {SLOT_TABLE_SIZE} bytes"),
        );
    }
    if claimed > AREA_LENGTH {
        report.image(
            Rule::Length,
            at,
            format!("{claimed} bytes do not fit between C8000h and DFFFFh, where Linux looks: {AREA_LENGTH} are there"),
        );
    }
    let sum = rom.sum();
    if sum != 0 {
        report.image(
            Rule::Checksum,
            None,
            format!("the image's bytes add up to {sum:02X}h modulo 256, not 0: the firmware ignores the ROM"),
        );
    }
}

fn check_header(rom: &Rom, report: &mut Report) {
    let header = rom.header();
    if header.rom_signature.get() != ROM_SIGNATURE {
        let detail = "no option-ROM signature `55 AA`: the firmware ignores the ROM";
        report.image(Rule::Signature, Some(0), detail);
    }
    if header.vrom_signature.get() != VMI_SIGNATURE {
        let at = offset_of!(RomHeader, vrom_signature);
        report.image(
            Rule::Signature,
            Some(at),
            "no signature `cVmi`: a guest does not see a VMI ROM",
        );
    }
    let Revision { major, minor } = rom.revision();
    let at = offset_of!(RomHeader, api_version_maj);
    let known = if rom.revision().has_slots() { REVISION_13_3 } else { REVISION_3_0 };
    if rom.interface().is_err() {
        let detail =
            format!("interface revision {major}.{minor}: guests of 3.0 and 13.x pass the ROM over");
        report.image(Rule::Revision, Some(at), detail);
    } else if minor > known.minor {
        let Revision { major: known_major, minor: known_minor } = known;
        report.note(
            "image",
            format!(
                "interface revision {major}.{minor}: only what {known_major}.{known_minor} has was looked at"
            ),
        );
    }
}

fn check_virtual_top(rom: &Rom, report: &mut Report) {
    let header = rom.header();
    let top = header.virtual_top.get();
    if top != 0 && top < LOWEST_TOP {
        let at = offset_of!(RomHeader, virtual_top);
        let detail = format!(
            "virtual_top {top:08X}h reserves {} MB; below {LOWEST_TOP:08X}h the hole collides with the kernel's memory",
            top.wrapping_neg() >> 20
        );
        report.image(Rule::VirtualTop, Some(at), detail);
    }
}

fn check_license(rom: &Rom, report: &mut Report) {
    let at = Some(offset_of!(RomHeader, license_offs));
    match rom.license() {
        None => {
            report.image(Rule::License, at, "no NUL-ended licence string where offset 22 points to")
        }
        Some(text) if !ACCEPTED_LICENSES.iter().any(|accepted| accepted.as_bytes() == text) => {
            let detail = format!(
                "the licence is `{}`; Linux uses the ROM only with `GPL` or `GPL v2`",
                shown(text)
            );
            report.image(Rule::License, Some(usize::from(rom.header().license_offs.get())), detail);
        }
        Some(_) => {}
    }
}

fn check_pci(rom: &Rom, report: &mut Report) {
    let start = usize::from(rom.header().pci_header_offs.get());
    let Some(pci) = rom.pci() else {
        let at = offset_of!(RomHeader, pci_header_offs);
        let detail = "no PCIR structure where offset 24 points to: Linux refuses the ROM";
        return report.image(Rule::PciHeader, Some(at), detail);
    };
    let length = usize::from(pci.image_length.get()) * LENGTH_UNIT;
    if length != rom.claimed_length() {
        report.image(
            Rule::PciHeader,
            Some(start + offset_of!(PciHeader, image_length)),
            format!(
                "PCIR claims an image of {length} bytes, the header one of {}",
                rom.claimed_length()
            ),
        );
    }
    if usize::from(pci.length.get()) < size_of::<PciHeader>() {
        let at = start + offset_of!(PciHeader, length);
        let detail = format!("PCIR claims {} bytes for itself, less than it has", pci.length.get());
        report.image(Rule::PciHeader, Some(at), detail);
    }
    if pci.code_type != 0 {
        let at = start + offset_of!(PciHeader, code_type);
        let detail = format!("code type {}: a PC's BIOS runs only type 0", pci.code_type);
        report.image(Rule::PciHeader, Some(at), detail);
    }
    let (vendor, device) = (pci.vendor.get(), pci.device.get());
    if (vendor, device) != (PCI_VENDOR, PCI_DEVICE) {
        let wanted = format!("{PCI_VENDOR:04x}:{PCI_DEVICE:04x}");
        report.note(
            "PCIR",
            format!("device {vendor:04x}:{device:04x} is not {wanted}: Linux prints a warning"),
        );
    }
    if pci.indicator & PCI_LAST_IMAGE == 0 {
        report.note("PCIR", "the indicator says that another image follows");
    }
    if !start.is_multiple_of(4) {
        report.note(
            "PCIR",
            "the structure does not lie on a 4-byte boundary, as the PCI specification asks",
        );
    }
}

fn check_pnp(rom: &Rom, report: &mut Report) {
    let start = usize::from(rom.header().pnp_header_offs.get());
    if start == 0 {
        return;
    }
    let Some(pnp) = rom.pnp() else {
        let at = offset_of!(RomHeader, pnp_header_offs);
        return report.image(
            Rule::PnpHeader,
            Some(at),
            "no $PnP structure where offset 26 points to",
        );
    };
    match rom.pnp_bytes() {
        Some(bytes) if bytes.len() >= size_of::<PnpHeader>() => {
            let sum = checksum(bytes);
            if sum != 0 {
                let at = start + offset_of!(PnpHeader, checksum);
                let detail =
                    format!("the structure's bytes add up to {sum:02X}h modulo 256, not 0");
                report.image(Rule::PnpHeader, Some(at), detail);
            }
        }
        _ => {
            let at = start + offset_of!(PnpHeader, length);
            let detail = format!(
                "the structure claims {} bytes for itself: fewer than it has, or more than the image",
                usize::from(pnp.length) * 16
            );
            report.image(Rule::PnpHeader, Some(at), detail);
        }
    }
    for (name, offset, field) in [
        ("manufacturer", pnp.manufacturer.get(), offset_of!(PnpHeader, manufacturer)),
        ("product", pnp.product.get(), offset_of!(PnpHeader, product)),
    ] {
        if offset != 0 && rom.string(offset).is_none() {
            let detail =
                format!("no NUL-ended string where the {name} offset {offset:X}h points to");
            report.image(Rule::PnpHeader, Some(start + field), detail);
        }
    }
}

fn check_post_entry(rom: &Rom, report: &mut Report) {
    let at = offset_of!(RomHeader, rom_entry);
    let Some(bytes) = rom.image().get(at..) else { return };
    let mut decoder = Decoder::with_ip(16, bytes, at as u64, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        report.image(
            Rule::PostEntry,
            Some(at),
            "the BIOS calls this place, and no instruction can be read here",
        );
    } else if instruction.op0_kind() == OpKind::NearBranch16
        && usize::from(instruction.near_branch16()) >= rom.image().len()
    {
        let target = instruction.near_branch16();
        let detail =
            format!("the BIOS calls this place, and it branches out of the image, to {target:X}h");
        report.image(Rule::PostEntry, Some(at), detail);
    }
}

/// Bytes as text that a terminal can bear.
#[must_use]
pub fn shown(text: &[u8]) -> String {
    text.iter()
        .take(80)
        .flat_map(|byte| std::ascii::escape_default(*byte))
        .map(char::from)
        .collect()
}
