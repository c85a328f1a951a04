//! What differs between the revisions of the interface: which calls there are, who says where their
//! code is, and where a guest enters it.

use super::answers::{Answer, Table};
use vmi_abi::{Call, Ending, RelocationType, Revision, RomHeader, slot};

/// A function that the ROM offers besides the calls' own work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// The specification's name.
    pub name: &'static str,
    /// Its number where it is a call of its own.
    pub number: Option<u32>,
    /// Offset of its code.
    pub offset: usize,
}

/// A revision as the inspector meets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// The revision.
    pub revision: Revision,
    /// What prepares the ROM.
    pub init: Function,
    /// What says where the calls are; `None` where they are in their slots and nobody can be asked.
    pub lookup: Option<Function>,
}

/// Where a guest enters a call's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Offset in the image.
    pub offset: usize,
    /// How it gets there.
    pub kind: RelocationType,
    /// Whether that is the call's slot.
    pub is_slot: bool,
    /// Whether a guest gets there that wants its call sites kept as they are.
    pub keeps_site: bool,
}

/// A call of 13.x that answers for the whole ROM.
const fn function(name: &'static str, slot: vmi_abi::Slot) -> Function {
    Function { name, number: Some(slot.number as u32), offset: slot.offset() }
}

impl Interface {
    /// The interface of a revision; `None` for one that the inspector does not know.
    #[must_use]
    pub fn of(revision: Revision) -> Option<Self> {
        revision.calls().next()?;
        if !revision.has_slots() {
            let entry = |name, offset| Function { name, number: None, offset };
            let init = entry("vmi_init", std::mem::offset_of!(RomHeader, vmi_init));
            let lookup = entry("get_reloc", std::mem::offset_of!(RomHeader, get_reloc));
            return Some(Self { revision, init, lookup: Some(lookup) });
        }
        let has_lookup = revision.minor >= slot::GetRelocationInfo.since_minor;
        Some(Self {
            revision,
            init: function("Init", slot::Init),
            lookup: has_lookup.then_some(function("GetRelocationInfo", slot::GetRelocationInfo)),
        })
    }

    /// The calls by their numbers.
    pub fn calls(&self) -> impl Iterator<Item = (u32, &'static Call)> + Clone {
        self.revision.calls()
    }

    /// Whether a number is that of a call that answers for the whole ROM, and is judged by itself.
    #[must_use]
    pub fn is_function(&self, number: u32) -> bool {
        [Some(self.init), self.lookup].iter().flatten().any(|f| f.number == Some(number))
    }

    /// Where guests enter a call's code: its slot, and where the answer points to if that is elsewhere.
    #[must_use]
    pub fn entries(&self, table: &Table, number: u32, call: &Call) -> Vec<Entry> {
        let answered = table.answer_at(number);
        let place = |answer: Answer| {
            Some(Entry {
                offset: answer.offset?,
                kind: answer.kind,
                is_slot: false,
                keeps_site: false,
            })
        };
        let Some(slot) = call.contract.slot.filter(|_| self.revision.has_slots()) else {
            return answered.and_then(place).into_iter().collect();
        };
        // Sanos jumps to IRET and SYSEXIT. No text says how Linux of 13.0 reaches them, so jumping it is.
        let kind = match call.contract.ending {
            Ending::Transfers => RelocationType::JUMP_REL,
            _ => RelocationType::CALL_REL,
        };
        let own = Entry { offset: slot.offset(), kind, is_slot: true, keeps_site: false };
        let other = answered.and_then(place).filter(|other| other.offset != own.offset);
        [own].into_iter().chain(other.map(|other| Entry { kind, ..other })).collect()
    }

    /// Where a guest enters a call's code that wants its call sites kept, if the ROM knows of that.
    ///
    /// A ROM that answers with the same code says that it keeps sites anyway.
    #[must_use]
    pub fn keep_site_entry(&self, table: &Table, number: u32) -> Option<Entry> {
        let answer = table.keep_site_at(number)?;
        Some(Entry { offset: answer.offset?, kind: answer.kind, is_slot: false, keeps_site: true })
    }
}
