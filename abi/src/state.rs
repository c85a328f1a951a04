//! Structures in memory that a call's arguments point to.

use core::mem::{offset_of, size_of};
use static_assertions::const_assert_eq;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What LGDT, LIDT, SGDT and SIDT read and write: the argument of SetGDT, SetIDT, GetGDT and GetIDT.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct DescriptorTable {
    /// Bytes in the table, less one.
    pub limit: U16,
    /// Linear address of the table.
    pub base: U32,
}

impl DescriptorTable {
    /// The table of so many descriptors, at an address that is linear.
    #[must_use]
    pub fn of<const N: usize>(table: *const [u64; N]) -> Self {
        const { assert!(N > 0 && N <= 0x2000, "from 8 bytes to 64 KiB") };
        Self { limit: U16::new((N * 8 - 1) as u16), base: U32::new(table.addr() as u32) }
    }
}

const_assert_eq!(size_of::<DescriptorTable>(), 6);
const_assert_eq!(offset_of!(DescriptorTable, base), 2);

/// The state in which SetInitialAPState lets a processor start.
///
/// Linux passes a pointer into its stack, not the page that the proposal asks for.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
#[expect(missing_docs, reason = "each field is the register of its name")]
pub struct ApState {
    pub cr0: U32,
    pub cr2: U32,
    pub cr3: U32,
    pub cr4: U32,
    pub efer: U64,
    pub eip: U32,
    pub eflags: U32,
    pub eax: U32,
    pub ebx: U32,
    pub ecx: U32,
    pub edx: U32,
    pub esp: U32,
    pub ebp: U32,
    pub esi: U32,
    pub edi: U32,
    pub cs: U16,
    pub ss: U16,
    pub ds: U16,
    pub es: U16,
    pub fs: U16,
    pub gs: U16,
    pub ldtr: U16,
    pub gdtr_limit: U16,
    pub gdtr_base: U32,
    pub idtr_base: U32,
    pub idtr_limit: U16,
    pub padding: [u8; 2],
}

const_assert_eq!(size_of::<ApState>(), 92);
const_assert_eq!(offset_of!(ApState, cr3), 8);
const_assert_eq!(offset_of!(ApState, efer), 16);
const_assert_eq!(offset_of!(ApState, eip), 24);
const_assert_eq!(offset_of!(ApState, eax), 32);
const_assert_eq!(offset_of!(ApState, edi), 60);
const_assert_eq!(offset_of!(ApState, cs), 64);
const_assert_eq!(offset_of!(ApState, ldtr), 76);
const_assert_eq!(offset_of!(ApState, gdtr_limit), 78);
const_assert_eq!(offset_of!(ApState, gdtr_base), 80);
const_assert_eq!(offset_of!(ApState, idtr_base), 84);
const_assert_eq!(offset_of!(ApState, idtr_limit), 88);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_table_is_named_by_its_last_byte() {
        let named = DescriptorTable::of(core::ptr::without_provenance::<[u64; 6]>(0x1234_5678));
        assert_eq!(named.as_bytes(), [47, 0, 0x78, 0x56, 0x34, 0x12]);
        let largest = DescriptorTable::of(core::ptr::null::<[u64; 0x2000]>());
        assert_eq!((largest.limit.get(), largest.base.get()), (0xffff, 0));
    }
}
