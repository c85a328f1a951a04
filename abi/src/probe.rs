//! How a guest recognises a ROM.
//!
//! [`probe`] judges one candidate by what Linux 2.6.21 to 2.6.36 looks at: signatures, revision, a
//! `PCIR` structure, the licence, for which revision 13.x has no field. Linux believes the length byte and whatever the offsets point to;
//! here they must hold, so that a reader may follow them. [`scan`] walks the option-ROM area as
//! Linux does. The firmware verifies the checksum; no guest does, so neither do these.

use crate::Revision;
use crate::header::{
    ACCEPTED_LICENSES, LENGTH_UNIT, PCI_SIGNATURE, PciHeader, ROM_SIGNATURE, RomHeader,
    VMI_SIGNATURE,
};
use core::fmt;
use core::ops::Range;
use zerocopy::FromBytes;

/// Physical addresses at which Linux looks for a ROM.
pub const SCAN_AREA: Range<u32> = 0xc_0000..0xe_0000;

/// The boundary on which option ROMs lie, in bytes.
pub const SCAN_STEP: u32 = 2048;

/// Why a candidate is not the ROM that the guest looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Fewer bytes than a header.
    Truncated,
    /// No `55 AA`.
    NoRomSignature,
    /// An option ROM, but not a VMI one.
    NoVmiSignature,
    /// Another major revision, or too low a minor one.
    Revision(Revision),
    /// The length byte claims more than there is, or less than a header.
    Length {
        /// Bytes that the length byte claims.
        claimed: usize,
        /// Bytes that there are.
        present: usize,
    },
    /// No `PCIR` structure.
    NoPciHeader,
    /// No licence string, or one without an end.
    NoLicense,
    /// A licence with which Linux does not use the ROM.
    License,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => write!(f, "fewer bytes than a ROM header has"),
            Self::NoRomSignature => write!(f, "no option-ROM signature 55 AA at offset 0"),
            Self::NoVmiSignature => write!(f, "no signature `cVmi` at offset 8"),
            Self::Revision(Revision { major, minor }) => {
                write!(f, "interface revision {major}.{minor} at offset 12 is not the one wanted")
            }
            Self::Length { claimed, present } => {
                write!(f, "the length byte at offset 2 claims {claimed} bytes, {present} are there")
            }
            Self::NoPciHeader => write!(f, "no PCIR structure where offset 24 points to"),
            Self::NoLicense => write!(f, "no licence string where offset 22 points to"),
            Self::License => write!(f, "the licence is neither `GPL` nor `GPL v2`"),
        }
    }
}

impl core::error::Error for Refusal {}

/// Whether the bytes start with a ROM that a guest of revision `wanted` uses.
///
/// # Errors
///
/// The first reason for which a guest passes the candidate over.
pub fn probe(bytes: &[u8], wanted: Revision) -> Result<&RomHeader, Refusal> {
    let (header, _) = RomHeader::ref_from_prefix(bytes).map_err(|_| Refusal::Truncated)?;
    if header.rom_signature.get() != ROM_SIGNATURE {
        return Err(Refusal::NoRomSignature);
    }
    if header.vrom_signature.get() != VMI_SIGNATURE {
        return Err(Refusal::NoVmiSignature);
    }
    let revision = Revision { major: header.api_version_maj, minor: header.api_version_min };
    if revision.major != wanted.major || revision.minor < wanted.minor {
        return Err(Refusal::Revision(revision));
    }
    let claimed = usize::from(header.rom_length) * LENGTH_UNIT;
    let image = bytes
        .get(..claimed)
        .filter(|_| claimed >= size_of::<RomHeader>())
        .ok_or(Refusal::Length { claimed, present: bytes.len() })?;
    pci_header(image).ok_or(Refusal::NoPciHeader)?;
    if wanted.has_slots() {
        return Ok(header);
    }
    let license = license(image).ok_or(Refusal::NoLicense)?;
    if !ACCEPTED_LICENSES.iter().any(|accepted| accepted.as_bytes() == license) {
        return Err(Refusal::License);
    }
    Ok(header)
}

/// The image's `PCIR` structure, if its header points to one.
#[must_use]
pub fn pci_header(image: &[u8]) -> Option<&PciHeader> {
    let (header, _) = RomHeader::ref_from_prefix(image).ok()?;
    let offset = usize::from(header.pci_header_offs.get());
    let (pci, _) = PciHeader::ref_from_prefix(image.get(offset..)?).ok()?;
    (offset != 0 && pci.signature == PCI_SIGNATURE).then_some(pci)
}

/// The image's licence string without its NUL, if its header points to one.
#[must_use]
pub fn license(image: &[u8]) -> Option<&[u8]> {
    let (header, _) = RomHeader::ref_from_prefix(image).ok()?;
    string(image, header.license_offs.get())
}

/// The NUL-ended string at an offset of the image, without its NUL; offset 0 stands for none.
#[must_use]
pub fn string(image: &[u8], offset: u16) -> Option<&[u8]> {
    let tail = image.get(usize::from(offset)..).filter(|_| offset != 0)?;
    let end = tail.iter().position(|byte| *byte == 0)?;
    tail.get(..end)
}

/// Offset of the first ROM of revision `wanted` in a copy of memory that starts on a 2 KiB boundary.
#[must_use]
pub fn scan(memory: &[u8], wanted: Revision) -> Option<usize> {
    (0..memory.len())
        .step_by(SCAN_STEP as usize)
        .find(|offset| probe(&memory[*offset..], wanted).is_ok())
}
