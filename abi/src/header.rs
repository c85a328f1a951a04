//! The image's headers, as they lie in memory: little-endian and without alignment.

use core::mem::{offset_of, size_of};
use static_assertions::const_assert_eq;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The bytes `55 AA` with which every option ROM starts.
pub const ROM_SIGNATURE: u16 = 0xaa55;

/// The unit of [`RomHeader::rom_length`] and of [`PciHeader::image_length`], in bytes.
pub const LENGTH_UNIT: usize = 512;

/// The bytes `cVmi`.
pub const VMI_SIGNATURE: u32 = 0x696d_5663;

/// Bytes of a code slot in revision 13.x.
pub const SLOT_SIZE: usize = 32;

/// Slots in revision 13.x; the first four lie under the header.
pub const SLOT_COUNT: usize = 128;

/// Bytes of revision 13.x's slot table, from the ROM's first byte on: what guests of 13.0 copy elsewhere,
/// change there and run.
pub const SLOT_TABLE_SIZE: usize = SLOT_SIZE * SLOT_COUNT;

/// Bytes of an entry point in revision 3.0's header.
pub const ENTRY_SIZE: usize = 8;

/// The header of revision 3.0. Revision 13.x uses the first 32 bytes alike, save that `jump_slots` to
/// `license_offs` are reserved, and puts code slots from 80h.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RomHeader {
    /// [`ROM_SIGNATURE`].
    pub rom_signature: U16,
    /// Bytes of the image in units of [`LENGTH_UNIT`].
    pub rom_length: u8,
    /// 16-bit code; the BIOS calls it far, once, at POST.
    pub rom_entry: [u8; 4],
    /// Zero.
    pub padding_1: u8,
    /// [`VMI_SIGNATURE`].
    pub vrom_signature: U32,
    /// The interface's minor revision.
    pub api_version_min: u8,
    /// The interface's major revision.
    pub api_version_maj: u8,
    /// Slots in the table of revision 13.x.
    pub jump_slots: u8,
    /// Zero.
    pub reserved_1: u8,
    /// The guest reserves `-virtual_top` bytes at the top of its linear space; 0 for none.
    pub virtual_top: U32,
    /// Zero.
    pub reserved_2: U16,
    /// Offset of the licence, a NUL-ended string.
    pub license_offs: U16,
    /// Offset of the [`PciHeader`]; Linux refuses 0.
    pub pci_header_offs: U16,
    /// Offset of the [`PnpHeader`]; 0 for none.
    pub pnp_header_offs: U16,
    /// Zero.
    pub padding_2: U32,
    /// Zero.
    pub reserved_3: [u8; 96],
    /// 32-bit code: EAX = 0 on success.
    pub vmi_init: [u8; ENTRY_SIZE],
    /// 32-bit code: EAX is a call number; answers a [`crate::RelocationInfo`] in EDX:EAX.
    pub get_reloc: [u8; ENTRY_SIZE],
}

const_assert_eq!(size_of::<RomHeader>(), 144);
const_assert_eq!(offset_of!(RomHeader, rom_length), 2);
const_assert_eq!(offset_of!(RomHeader, rom_entry), 3);
const_assert_eq!(offset_of!(RomHeader, vrom_signature), 8);
const_assert_eq!(offset_of!(RomHeader, api_version_min), 12);
const_assert_eq!(offset_of!(RomHeader, api_version_maj), 13);
const_assert_eq!(offset_of!(RomHeader, virtual_top), 16);
const_assert_eq!(offset_of!(RomHeader, license_offs), 22);
const_assert_eq!(offset_of!(RomHeader, pci_header_offs), 24);
const_assert_eq!(offset_of!(RomHeader, pnp_header_offs), 26);
const_assert_eq!(offset_of!(RomHeader, vmi_init), 128);
const_assert_eq!(offset_of!(RomHeader, get_reloc), 136);

/// The bytes `PCIR`.
pub const PCI_SIGNATURE: [u8; 4] = *b"PCIR";

/// The vendor that a VMI ROM carries. Other ids only make Linux print a warning.
pub const PCI_VENDOR: u16 = 0x15ad;

/// The device that a VMI ROM carries.
pub const PCI_DEVICE: u16 = 0x0801;

/// The PCI data structure, as the PCI firmware specification 3.0 has it in section 5.1.2.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PciHeader {
    /// [`PCI_SIGNATURE`].
    pub signature: [u8; 4],
    /// Vendor of the device.
    pub vendor: U16,
    /// Device of that vendor.
    pub device: U16,
    /// Offset of a list of further devices; 0 for none.
    pub device_list: U16,
    /// Bytes of this structure.
    pub length: U16,
    /// Revision of this structure.
    pub revision: u8,
    /// Class code of the device: interface, subclass, base class.
    pub class_code: [u8; 3],
    /// Bytes of the image in units of [`LENGTH_UNIT`].
    pub image_length: U16,
    /// Linux prints it as the ROM's version, behind the major part.
    pub version_minor: u8,
    /// Linux prints it as the ROM's version.
    pub version_major: u8,
    /// 0 for code that a PC's BIOS runs.
    pub code_type: u8,
    /// Bit 7: no further image follows.
    pub indicator: u8,
    /// Most bytes that the image needs at run time, in units of [`LENGTH_UNIT`].
    pub runtime_length: U16,
}

const_assert_eq!(size_of::<PciHeader>(), 24);
const_assert_eq!(offset_of!(PciHeader, vendor), 4);
const_assert_eq!(offset_of!(PciHeader, device), 6);
const_assert_eq!(offset_of!(PciHeader, image_length), 16);
const_assert_eq!(offset_of!(PciHeader, version_minor), 18);
const_assert_eq!(offset_of!(PciHeader, version_major), 19);

/// The indicator of an image that no other follows.
pub const PCI_LAST_IMAGE: u8 = 0x80;

/// The bytes `$PnP`.
pub const PNP_SIGNATURE: [u8; 4] = *b"$PnP";

/// The expansion header, as the Plug and Play BIOS specification 1.0A has it in section 3.2.
///
/// With it SeaBIOS runs the 16-bit entry at POST, without it late, just before boot.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PnpHeader {
    /// [`PNP_SIGNATURE`].
    pub signature: [u8; 4],
    /// Revision of this structure.
    pub revision: u8,
    /// Bytes of this structure in units of 16.
    pub length: u8,
    /// Offset of the next expansion header; 0 for none.
    pub next: U16,
    /// Zero.
    pub reserved: u8,
    /// Makes the sum of the structure's bytes 0 modulo 256.
    pub checksum: u8,
    /// EISA identifier of the device; 0 for none.
    pub device_id: U32,
    /// Offset of the manufacturer's name; Linux prints it.
    pub manufacturer: U16,
    /// Offset of the product's name; Linux prints it.
    pub product: U16,
    /// Class code of the device.
    pub class_code: [u8; 3],
    /// What the device can do; 0: nothing that a BIOS would boot from.
    pub indicators: u8,
    /// Offset of the boot connection vector; 0 for none.
    pub boot_connection_vector: U16,
    /// Offset of the disconnect vector; 0 for none.
    pub disconnect_vector: U16,
    /// Offset of the bootstrap entry vector; 0 for none.
    pub bootstrap_entry_vector: U16,
    /// Zero.
    pub reserved_2: U16,
    /// Offset of the static resource information; 0 for none.
    pub static_resources: U16,
}

const_assert_eq!(size_of::<PnpHeader>(), 32);
const_assert_eq!(offset_of!(PnpHeader, manufacturer), 14);
const_assert_eq!(offset_of!(PnpHeader, product), 16);

/// The licence strings with which Linux uses a ROM.
pub const ACCEPTED_LICENSES: [&str; 2] = ["GPL", "GPL v2"];

/// The sum of all bytes modulo 256; 0 for a valid image.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}
