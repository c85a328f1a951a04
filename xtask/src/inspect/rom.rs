//! The ROM's bytes and the structures in them. Every access is checked: the bytes may be anything.

use super::interface::Interface;
use std::fmt;
use vmi_abi::header::{
    LENGTH_UNIT, PNP_SIGNATURE, PciHeader, PnpHeader, ROM_SIGNATURE, RomHeader, VMI_SIGNATURE,
    checksum,
};
use vmi_abi::{Revision, probe};
use zerocopy::FromBytes;

/// Why bytes cannot be looked at as a ROM at all. Whatever is wrong beyond that is a violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadError {
    /// Fewer bytes than a header.
    Truncated {
        /// Bytes that there are.
        present: usize,
    },
    /// Neither an option ROM's signature nor VMI's.
    NotARom,
    /// A revision whose calls this version cannot look at.
    Revision(Revision),
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { present } => {
                write!(
                    f,
                    "{present} bytes are fewer than the {} of a VMI ROM header",
                    size_of::<RomHeader>()
                )
            }
            Self::NotARom => {
                write!(f, "not a VMI ROM: neither `55 AA` at offset 0 nor `cVmi` at offset 8")
            }
            Self::Revision(Revision { major, minor }) => {
                write!(f, "interface revision {major}.{minor}: only 3.0 and 13.x can be looked at")
            }
        }
    }
}

impl std::error::Error for ReadError {}

/// The instruction that is none: filler that traps whoever gets there.
pub(super) const UD2: [u8; 2] = [0x0f, 0x0b];

/// A file that holds a ROM.
#[derive(Clone, Debug)]
pub struct Rom {
    file: Vec<u8>,
    header: RomHeader,
}

impl Rom {
    /// Takes a file's bytes for a ROM.
    ///
    /// # Errors
    ///
    /// There is no header, or nothing about it says that it is one of a ROM.
    pub fn parse(file: &[u8]) -> Result<Self, ReadError> {
        let (header, _) = RomHeader::read_from_prefix(file)
            .map_err(|_| ReadError::Truncated { present: file.len() })?;
        if header.rom_signature.get() != ROM_SIGNATURE
            && header.vrom_signature.get() != VMI_SIGNATURE
        {
            return Err(ReadError::NotARom);
        }
        Ok(Self { file: file.to_vec(), header })
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &RomHeader {
        &self.header
    }

    /// The interface revision that the header claims.
    #[must_use]
    pub fn revision(&self) -> Revision {
        Revision { major: self.header.api_version_maj, minor: self.header.api_version_min }
    }

    /// The interface of that revision.
    ///
    /// # Errors
    ///
    /// The inspector does not know the revision.
    pub fn interface(&self) -> Result<Interface, ReadError> {
        Interface::of(self.revision()).ok_or(ReadError::Revision(self.revision()))
    }

    /// All bytes of the file.
    #[must_use]
    pub fn file(&self) -> &[u8] {
        &self.file
    }

    /// Bytes that the length byte claims.
    #[must_use]
    pub fn claimed_length(&self) -> usize {
        usize::from(self.header.rom_length) * LENGTH_UNIT
    }

    /// The image: what the length byte claims, as far as the file has it, and at least a header.
    #[must_use]
    pub fn image(&self) -> &[u8] {
        let length = self.claimed_length().clamp(size_of::<RomHeader>(), self.file.len());
        self.file.get(..length).unwrap_or(&self.file)
    }

    /// The sum of the image's bytes; 0 is right.
    #[must_use]
    pub fn sum(&self) -> u8 {
        checksum(self.image())
    }

    /// The `PCIR` structure.
    #[must_use]
    pub fn pci(&self) -> Option<&PciHeader> {
        probe::pci_header(self.image())
    }

    /// The `$PnP` structure.
    #[must_use]
    pub fn pnp(&self) -> Option<&PnpHeader> {
        let offset = usize::from(self.header.pnp_header_offs.get());
        let (pnp, _) = PnpHeader::ref_from_prefix(self.image().get(offset..)?).ok()?;
        (offset != 0 && pnp.signature == PNP_SIGNATURE).then_some(pnp)
    }

    /// The bytes that the `$PnP` structure's checksum covers.
    #[must_use]
    pub fn pnp_bytes(&self) -> Option<&[u8]> {
        let length = usize::from(self.pnp()?.length) * 16;
        self.image().get(usize::from(self.header.pnp_header_offs.get())..)?.get(..length)
    }

    /// The licence string; revision 13.x has no field for one.
    #[must_use]
    pub fn license(&self) -> Option<&[u8]> {
        probe::license(self.image()).filter(|_| !self.revision().has_slots())
    }

    /// A NUL-ended string of the image.
    #[must_use]
    pub fn string(&self, offset: u16) -> Option<&[u8]> {
        probe::string(self.image(), offset)
    }

    /// Bytes without the padding at the end. The checksum byte stands behind the padding.
    ///
    /// Padding is one byte over and over, or UD2, of which the checksum may take the last half.
    #[must_use]
    pub fn used(&self) -> usize {
        let Some((_, body)) = self.image().split_last() else { return 0 };
        let whole = body.strip_suffix(&UD2[..1]).unwrap_or(body);
        if whole.ends_with(&UD2) {
            return whole
                .rchunks(2)
                .position(|pair| pair != UD2)
                .map_or(whole.len() % 2, |pairs| whole.len() - 2 * pairs);
        }
        let Some(filler) = body.last().filter(|byte| matches!(byte, 0 | 0xff | 0xcc)) else {
            return self.image().len();
        };
        body.iter().rposition(|byte| byte != filler).map_or(0, |last| last + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(tail: &[u8]) -> usize {
        let mut file = vec![0; LENGTH_UNIT];
        file[..2].copy_from_slice(&ROM_SIGNATURE.to_le_bytes());
        file[2] = 1;
        let start = file.len() - tail.len();
        file[start - 1] = 7;
        file[start..].copy_from_slice(tail);
        Rom::parse(&file).expect("a ROM").used()
    }

    #[test]
    fn padding_ends_where_something_else_begins() {
        assert_eq!(used(&[0xcc, 0xcc, 0xcc, 9]), LENGTH_UNIT - 4);
        assert_eq!(used(&[0x0f, 0x0b, 0x0f, 0x0b, 9]), LENGTH_UNIT - 5);
        assert_eq!(used(&[0x0f, 0x0b, 0x0f, 0x0b, 0x0f, 9]), LENGTH_UNIT - 6);
        assert_eq!(used(&[0x0b, 0x0f, 0x0b, 9]), LENGTH_UNIT - 3);
        assert_eq!(used(&[0x12, 9]), LENGTH_UNIT);
    }
}
