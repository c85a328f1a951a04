//! What `get_reloc` answers on the bare machine, and why.

use core::fmt;
use vmi_abi::{Answers, Call, CallNumber, Group, RelocationType, Site};

/// Whether a guest calls what it could do itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// The guest calls what is no longer than the call itself, once from each site: the ROM then
    /// puts the native code there. Everything else is as in [`Bind::Fastest`].
    Rewrite,
    /// The guest is left with its own native code wherever that does the same.
    Fastest,
    /// The guest calls the ROM wherever the interface and the hardware let it.
    Call,
}

impl Bind {
    /// Each of them.
    pub const ALL: [Self; 3] = [Self::Rewrite, Self::Fastest, Self::Call];
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
    /// The call's instructions take the place of the call.
    NativeAtSite,
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
            Self::NativeAtSite => {
                "the first call puts the native instructions at its site, where Linux would leave a call otherwise"
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
        Bind::Rewrite if is_short(call) => (RelocationType::CALL_REL, Reason::NativeAtSite),
        Bind::Call => (RelocationType::CALL_REL, Reason::CallWanted),
        Bind::Rewrite | Bind::Fastest if !contract.answers.contains(Answers::NONE) => {
            (RelocationType::JUMP_REL, Reason::JumpAtSite)
        }
        Bind::Rewrite | Bind::Fastest if matches!(contract.site, Site::Patched) => {
            (RelocationType::CALL_REL, Reason::DirectCallAtSite)
        }
        Bind::Rewrite | Bind::Fastest => (RelocationType::NONE, Reason::GuestDoesTheSame),
    }
}

/// When a site may be rewritten: a byte in the image, which the 16-bit entry sets at POST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SiteRule {
    /// Never: the processor has no instruction that stores eight bytes at once.
    Never = 0,
    /// By one byte at a time: several processors, and an emulator may read code in pieces.
    OneByte = 1,
    /// If all bytes that change lie in one aligned word of eight: what no processor sees torn.
    InAWord = 2,
    /// Wherever it lies: there is one processor.
    Anywhere = 3,
}

/// Bytes between the entry of a short call that rewrites its site and the same call without that.
pub const SHORT_PLAIN: u8 = 2;

/// Whether a call's native code fits over the instruction that calls it, and a guest gains by that.
///
/// The calls that Linux patches, and those of which it binds the ROM's code straight to a pointer.
/// Where it has a function of its own in between, native code at the ROM's site would gain less
/// than answering NONE does.
#[must_use]
pub const fn is_short(call: &Call) -> bool {
    use vmi_abi::number as n;
    const SHORT: [CallNumber; 21] = [
        n::SetGDT,
        n::SetIDT,
        n::GetTR,
        n::SetCR0,
        n::SetCR2,
        n::SetCR3,
        n::SetCR4,
        n::GetCR0,
        n::GetCR2,
        n::GetCR3,
        n::GetCR4,
        n::WBINVD,
        n::RDTSC,
        n::CLTS,
        n::EnableInterrupts,
        n::DisableInterrupts,
        n::GetInterruptMask,
        n::SetInterruptMask,
        n::IRET,
        n::SYSEXIT,
        n::InvalPage,
    ];
    let Some(number) = call.number else { return false };
    let mut i = 0;
    while i < SHORT.len() {
        if SHORT[i].0 == number.0 {
            return true;
        }
        i += 1;
    }
    false
}

/// The least [`SiteRule`] with which a call is answered as [`answer`] says; NONE with a lesser one.
///
/// A call through a pointer that may not be rewritten would look at its site in vain each time. What
/// Linux patches can at least be led to the plain code.
#[must_use]
pub const fn least_rule(call: &Call, bind: Bind) -> SiteRule {
    let through_pointer = !matches!(call.contract.site, Site::Patched);
    if matches!(bind, Bind::Rewrite) && is_short(call) && through_pointer {
        SiteRule::Anywhere
    } else {
        SiteRule::Never
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
            for bind in Bind::ALL {
                let (kind, _) = answer(call, bind);
                let kind = kind.as_answers().expect("a type that the interface knows");
                assert!(call.contract.answers.contains(kind), "{} {bind:?}", call.name);
            }
        }
    }

    #[test]
    fn groups_are_answered_alike() {
        for bind in Bind::ALL {
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
