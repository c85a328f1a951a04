//! What firmware and guest read at the start of the image.
//!
//! Revision 13.x has slots from 80h on, so all of this lies below 80h there, without the licence,
//! for which it has no field.
//! Every offset comes from the structures of [`vmi_abi::header`]. Length and checksum bytes stay
//! zero here: `xtask` sets them when it knows the size.

#![expect(unsafe_code, reason = "UNSAFETY: `global_asm!` with symbols")]

use crate::REVISION;
use core::arch::global_asm;
use core::mem::{offset_of, size_of};
use vmi_abi::header::{
    PCI_DEVICE, PCI_LAST_IMAGE, PCI_SIGNATURE, PCI_VENDOR, PNP_SIGNATURE, PciHeader, PnpHeader,
    ROM_SIGNATURE, RomHeader, VMI_SIGNATURE,
};

#[cfg(feature = "reference")]
use crate::reference::GRANT;
#[cfg(all(feature = "reference", not(feature = "xen")))]
use crate::reference::vmi_init;
#[cfg(feature = "xen")]
use crate::xen::vmi_init;
#[cfg(not(feature = "reference"))]
use vmi_native_backend::calls::initialize as vmi_init;

/// What the image wants of whoever places it: nothing.
#[cfg(not(feature = "reference"))]
const GRANT: [u32; 2] = [0, 0];

/// No backend needs a hole at the top of the guest's linear space.
const VIRTUAL_TOP: u32 = 0;

/// Class code of the image: a system peripheral of no particular kind.
const CLASS_BASE: u8 = 0x08;

/// Subclass within [`CLASS_BASE`].
const CLASS_SUB: u8 = 0x80;

/// Bytes of the header: revision 13.x has only the part before the reserved bytes.
const HEADER_SIZE: usize =
    if REVISION.has_slots() { offset_of!(RomHeader, reserved_3) } else { size_of::<RomHeader>() };

/// A decimal number of one of the package's version parts.
const fn version_part(text: &str) -> u8 {
    match u8::from_str_radix(text, 10) {
        Ok(number) => number,
        Err(_) => panic!("a part of the package's version does not fit into a byte"),
    }
}

global_asm!(
    ".pushsection .rom.header, \"ax\", @progbits",
    ".globl rom_start",
    ".hidden rom_start",
    "rom_start:",
    ".word {rom_signature}",
    ".org rom_start + {entry_at}",
    ".code16",
    "jmp post_entry",
    ".code32",
    ".org rom_start + {vrom_signature_at}",
    ".long {vrom_signature}",
    ".byte {minor}, {major}",
    ".org rom_start + {virtual_top_at}",
    ".long {virtual_top}",
    ".if {has_lookup}",
    ".org rom_start + {license_at}",
    ".word license - rom_start",
    ".endif",
    ".org rom_start + {pci_header_at}",
    ".word pci_header - rom_start",
    ".word pnp_header - rom_start",
    ".if {has_lookup}",
    ".org rom_start + {vmi_init_at}",
    "jmp {vmi_init}",
    ".org rom_start + {get_reloc_at}",
    "jmp get_reloc",
    ".endif",
    ".org rom_start + {header_size}, 0",
    ".if {memory_wanted}",
    ".long {grant_signature}, {memory_wanted}, 0", // The distance is whoever's who grants it.
    ".endif",

    ".balign 16",
    "pnp_header:",
    ".long {pnp_signature}",
    ".byte 1, {pnp_size} / 16",
    ".org pnp_header + {manufacturer_at}",
    ".word manufacturer - rom_start",
    ".word product - rom_start",
    ".byte 0, {class_sub}, {class_base}",
    ".org pnp_header + {pnp_size}",

    ".balign 4",
    "pci_header:",
    ".long {pci_signature}",
    ".word {vendor}, {device}",
    ".org pci_header + {pci_length_at}",
    ".word {pci_size}",
    ".org pci_header + {class_at}",
    ".byte 0, {class_sub}, {class_base}",
    ".org pci_header + {version_at}",
    ".byte {version_minor}, {version_major}",
    ".byte 0, {last_image}",
    ".org pci_header + {pci_size}",

    "manufacturer: .asciz \"open VMI ROM\"",
    concat!("product: .asciz \"", backends!(), " ", env!("CARGO_PKG_VERSION"), "\""),
    ".if {has_lookup}",
    "license: .asciz \"GPL v2\"",
    "copyright: .asciz \"Copyright the open VMI ROM authors, MIT OR GPL-2.0-only\"",
    ".endif",
    ".popsection",

    rom_signature = const ROM_SIGNATURE,
    entry_at = const offset_of!(RomHeader, rom_entry),
    vrom_signature_at = const offset_of!(RomHeader, vrom_signature),
    vrom_signature = const VMI_SIGNATURE,
    minor = const REVISION.minor,
    major = const REVISION.major,
    has_lookup = const !REVISION.has_slots() as u8,
    virtual_top_at = const offset_of!(RomHeader, virtual_top),
    virtual_top = const VIRTUAL_TOP,
    license_at = const offset_of!(RomHeader, license_offs),
    pci_header_at = const offset_of!(RomHeader, pci_header_offs),
    vmi_init_at = const offset_of!(RomHeader, vmi_init),
    vmi_init = sym vmi_init,
    get_reloc_at = const offset_of!(RomHeader, get_reloc),
    header_size = const HEADER_SIZE,
    grant_signature = const GRANT[0],
    memory_wanted = const GRANT[1],
    pci_signature = const u32::from_le_bytes(PCI_SIGNATURE),
    vendor = const PCI_VENDOR,
    device = const PCI_DEVICE,
    pci_length_at = const offset_of!(PciHeader, length),
    pci_size = const size_of::<PciHeader>(),
    class_at = const offset_of!(PciHeader, class_code),
    class_sub = const CLASS_SUB,
    class_base = const CLASS_BASE,
    version_at = const offset_of!(PciHeader, version_minor),
    version_minor = const version_part(env!("CARGO_PKG_VERSION_MINOR")),
    version_major = const version_part(env!("CARGO_PKG_VERSION_MAJOR")),
    last_image = const PCI_LAST_IMAGE,
    pnp_signature = const u32::from_le_bytes(PNP_SIGNATURE),
    pnp_size = const size_of::<PnpHeader>(),
    manufacturer_at = const offset_of!(PnpHeader, manufacturer),
);
