//! What `get_reloc` answers.

use crate::Answers;
use core::mem::{offset_of, size_of};
use static_assertions::const_assert_eq;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Added to a call's number, asks `get_reloc` for code that never changes the site it is called from.
///
/// An extension of this project: a ROM may put a call's native instructions over the site, and a
/// guest that does not want it asks in this way. A ROM that does not know the bit answers NONE, as
/// to any number beyond the last.
pub const KEEP_SITE: u32 = 1 << 31;

/// How the guest is to reach a call.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct RelocationType(pub u8);

impl RelocationType {
    /// The guest keeps its own native code.
    pub const NONE: Self = Self(0);
    /// A call to the address: through a pointer, or `E8 rel32` written over the site.
    pub const CALL_REL: Self = Self(1);
    /// A jump to the address: `E9 rel32` written over the site.
    pub const JUMP_REL: Self = Self(2);
    /// Nothing is to be done (revision 3.0 only).
    pub const NOP: Self = Self(3);

    /// The name that the specification gives it.
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        match self {
            Self::NONE => Some("NONE"),
            Self::CALL_REL => Some("CALL_REL"),
            Self::JUMP_REL => Some("JUMP_REL"),
            Self::NOP => Some("NOP"),
            _ => None,
        }
    }

    /// The type as a set of one; `None` for a value that no revision defines.
    #[must_use]
    pub const fn as_answers(self) -> Option<Answers> {
        match self {
            Self::NONE => Some(Answers::NONE),
            Self::CALL_REL => Some(Answers::CALL_REL),
            Self::JUMP_REL => Some(Answers::JUMP_REL),
            Self::NOP => Some(Answers::NOP),
            _ => None,
        }
    }

    /// Whether the answer carries an address.
    #[must_use]
    pub const fn has_address(self) -> bool {
        matches!(self, Self::CALL_REL | Self::JUMP_REL)
    }
}

/// `get_reloc`'s answer. In registers it is EDX:EAX: the address in EAX, the type in DL.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RelocationInfo {
    /// Where the call's code is in the guest's current linear space.
    pub eip: U32,
    /// How to get there.
    pub kind: RelocationType,
    /// Zero.
    pub reserved: [u8; 3],
}

const_assert_eq!(size_of::<RelocationInfo>(), 8);
const_assert_eq!(offset_of!(RelocationInfo, kind), 4);

impl RelocationInfo {
    /// The answer that `get_reloc` returned in EDX:EAX.
    #[must_use]
    pub const fn from_registers(eax: u32, edx: u32) -> Self {
        let [kind, reserved @ ..] = edx.to_le_bytes();
        Self { eip: U32::new(eax), kind: RelocationType(kind), reserved }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_carry_address_and_type() {
        let info = RelocationInfo::from_registers(0xc00c_a123, 0x0000_0002);
        assert_eq!(info.eip.get(), 0xc00c_a123);
        assert_eq!(info.kind, RelocationType::JUMP_REL);
        assert_eq!(info.as_bytes(), [0x23, 0xa1, 0x0c, 0xc0, 2, 0, 0, 0]);
    }

    #[test]
    fn a_type_that_no_revision_defines_has_no_name() {
        for value in 0..=u8::MAX {
            let kind = RelocationType(value);
            assert_eq!(kind.name().is_some(), value < 4);
            assert_eq!(kind.as_answers().is_some(), value < 4);
        }
    }
}
