//! What `get_reloc` answers on the bare machine, and why.

use core::fmt;
use vmi_abi::{Answers, Call, Group, RelocationType, Site};

/// Whether a guest calls what it could do itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// The guest is left with its own native code wherever that does the same.
    Fastest,
    /// The guest calls the ROM wherever the interface and the hardware let it.
    Call,
}

/// Why a call is answered as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The guest's own native code does the same without leaving the kernel.
    GuestDoesTheSame,
    /// With NONE Linux would keep an indirect call at the site; a direct one is shorter.
    DirectCallAtSite,
    /// The guest has no native code left to keep, and a jump drops no return address.
    JumpAtSite,
    /// Asked for by the build option.
    CallWanted,
    /// Nobody knows the call's arguments.
    Undocumented,
    /// Linux passes a register's offset, and the ROM cannot know where the local APIC is mapped.
    ApicMappingUnknown,
    /// The group is answered all or not at all, and the native backend has no timer yet.
    NoTimer,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GuestDoesTheSame => "the guest's own native code does the same without leaving the kernel",
            Self::DirectCallAtSite => {
                "with NONE an indirect call to the kernel's own function would stay at the site; a direct call is shorter"
            }
            Self::JumpAtSite => {
                "the kernel has no native code left to keep here, and a jump leaves no return address to drop"
            }
            Self::CallWanted => "built with `--bind call`",
            Self::Undocumented => "nobody knows its arguments",
            Self::ApicMappingUnknown => {
                "Linux passes a register's offset, and the ROM cannot know where the local APIC is mapped"
            }
            Self::NoTimer => "the timer calls are answered all or not at all, and the native backend has none yet",
        })
    }
}

/// The answer to `get_reloc` for a call of revision 3.0.
#[must_use]
pub const fn answer(call: &Call, bind: Bind) -> (RelocationType, Reason) {
    let contract = &call.contract;
    if let Some(reason) = not_served(call) {
        return (RelocationType::NONE, reason);
    }
    match bind {
        Bind::Call => (RelocationType::CALL_REL, Reason::CallWanted),
        Bind::Fastest if !contract.answers.contains(Answers::NONE) => {
            (RelocationType::JUMP_REL, Reason::JumpAtSite)
        }
        Bind::Fastest if matches!(contract.site, Site::Patched) => {
            (RelocationType::CALL_REL, Reason::DirectCallAtSite)
        }
        Bind::Fastest => (RelocationType::NONE, Reason::GuestDoesTheSame),
    }
}

/// Why the native backend cannot serve a call honestly; `None` where it can.
const fn not_served(call: &Call) -> Option<Reason> {
    match call.contract.group {
        Some(Group::Timer) => Some(Reason::NoTimer),
        Some(Group::Apic) => Some(Reason::ApicMappingUnknown),
        None if !call.contract.answers.contains(Answers::CALL_REL) => Some(Reason::Undocumented),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmi_abi::{CALLS_3_0, CallNumber, number};

    #[test]
    fn every_answer_is_one_that_the_interface_allows() {
        for call in CALLS_3_0 {
            for bind in [Bind::Fastest, Bind::Call] {
                let (kind, _) = answer(call, bind);
                let kind = kind.as_answers().expect("a type that the interface knows");
                assert!(call.contract.answers.contains(kind), "{} {bind:?}", call.name);
            }
        }
    }

    #[test]
    fn groups_are_answered_alike() {
        for bind in [Bind::Fastest, Bind::Call] {
            for group in [Group::Timer, Group::Apic] {
                let mut kinds = CALLS_3_0
                    .iter()
                    .filter(|call| call.contract.group == Some(group))
                    .map(|call| answer(call, bind).0);
                let first = kinds.next().expect("a group has members");
                assert!(kinds.all(|kind| kind == first), "{group:?} {bind:?}");
            }
        }
    }

    #[test]
    fn a_guest_calls_only_where_that_is_faster_than_its_own_code() {
        let bound: [CallNumber; 6] = [
            number::EnableInterrupts,
            number::DisableInterrupts,
            number::GetInterruptMask,
            number::SetInterruptMask,
            number::IRET,
            number::SYSEXIT,
        ];
        for call in CALLS_3_0 {
            let (kind, _) = answer(call, Bind::Fastest);
            let is_bound = call.number.is_some_and(|number| bound.contains(&number));
            assert_eq!(kind != RelocationType::NONE, is_bound, "{}", call.name);
        }
    }
}
