//! The slots of revision 13.x.
//!
//! Each routine of the backend lies in a section of its call's name. `build.rs` makes from the
//! declaration of the calls which section lies in which slot; here each routine is named, so that the
//! linker meets it, and the one call is added that speaks of the image.

#![expect(unsafe_code, reason = "UNSAFETY: `global_asm!` with symbols, and a naked routine")]
#![expect(non_snake_case, reason = "the specification's names")]

use core::arch::{global_asm, naked_asm};
use vmi_abi::calls::SLOTS_13;
use vmi_abi::header::SLOT_SIZE;
use vmi_abi::{RelocationType, for_each_call, slot};

/// Where each call's code is.
mod code {
    pub(super) use super::GetRelocationInfo;
    pub(super) use vmi_native_backend::calls::*;
}

/// EAX call -> EAX its slot's linear address, EDX type; both 0 for what is no call of this revision's.
/// Changes ECX, flags.
///
/// Every slot holds code, and may be called wherever the image, or a copy of its slots, is seen: the
/// address is that of the slot beside this one.
///
/// # Safety
///
/// As for every call: ring 0, and flat segments.
#[unsafe(naked)]
#[unsafe(link_section = ".text.call.GetRelocationInfo")]
unsafe extern "C" fn GetRelocationInfo() {
    naked_asm!(
        "8: xorl %edx, %edx",
        "subl ${first}, %eax",
        "cmpl ${last} - {first}, %eax",
        "ja 3f",
        "call 2f",
        "2: popl %ecx",
        "shll ${slot_shift}, %eax",
        "leal (8b - 2b + {distance})(%ecx, %eax), %eax",
        "movb ${call_rel}, %dl",
        "retl",
        "3: xorl %eax, %eax",
        "retl",
        first = const *SLOTS_13.start(),
        last = const *SLOTS_13.end(),
        slot_shift = const SLOT_SIZE.trailing_zeros(),
        distance = const slot::Init.offset() as i32 - slot::GetRelocationInfo.offset() as i32,
        call_rel = const RelocationType::CALL_REL.0,
        options(att_syntax),
    )
}

const _: () = assert!(SLOT_SIZE.is_power_of_two());
const _: () = assert!(slot::Init.number == *SLOTS_13.start());
const _: () = assert!(RelocationType::NONE.0 == 0, "what EDX holds for no call");

/// Names every routine. The ones that revision 13.x does not have are dropped by the linker.
macro_rules! name_routines {
    (
        revision_3_0 { $( #[doc = $summary:literal] $name:ident = $number:literal => $contract:expr )* }
        only_13 { $( #[doc = $old_summary:literal] $old_name:ident => $old_contract:expr )* }
    ) => {
        global_asm!(
            $( concat!("# {", stringify!($name), "}"), )*
            $( concat!("# {", stringify!($old_name), "}"), )*
            $( $name = sym code::$name, )*
            $( $old_name = sym code::$old_name, )*
            options(att_syntax),
        );
    };
}

for_each_call!(name_routines);
