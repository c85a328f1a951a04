//! The kernels that exist, by the way in which each reaches the calls of a ROM.

use crate::command_line;
use crate::session::Form;
use vmi_abi::{REVISION_3_0, REVISION_13_0, REVISION_13_3, Revision};

/// A kind of kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Client {
    /// As Linux 2.6.21 to 2.6.36 does it: asks for each call and binds it as the answer says, by a
    /// pointer or over its site.
    Lookup,
    /// As the Linux patches of March 2006 did it: copies the slots, changes the copy, and calls the
    /// slots there directly. It jumps to what does not return.
    CopiedSlots,
    /// As Sanos does it: asks the ROM where each slot is, and keeps a table of pointers through which it
    /// calls, or jumps to what does not return.
    PointerTable,
}

impl Client {
    /// The client that the command line asks for by its revision, `client=13.3`; without that Linux.
    pub(crate) fn wanted() -> Option<Self> {
        let Some(revision) = command_line::value("client") else { return Some(Self::Lookup) };
        let (major, minor) = revision.split_once('.')?;
        let wanted = Revision { major: major.parse().ok()?, minor: minor.parse().ok()? };
        let all = [Self::Lookup, Self::CopiedSlots, Self::PointerTable];
        all.into_iter().find(|client| client.revision() == wanted)
    }

    /// The revision that it asks for.
    pub(crate) const fn revision(self) -> Revision {
        match self {
            Self::Lookup => REVISION_3_0,
            Self::CopiedSlots => REVISION_13_0,
            Self::PointerTable => REVISION_13_3,
        }
    }

    /// The only form of its call sites; `None` where it has both.
    pub(crate) const fn form(self) -> Option<Form> {
        match self {
            Self::Lookup => None,
            Self::CopiedSlots => Some(Form::Patched),
            Self::PointerTable => Some(Form::Pointer),
        }
    }
}
