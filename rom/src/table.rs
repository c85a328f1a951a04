//! `get_reloc` and the table that it answers from.
//!
//! The table holds, for each call, the distance from its own place to the call's code: the linker
//! knows it, so nothing is left to relocate, and it holds at every address the image is seen at.

#![expect(unsafe_code, reason = "UNSAFETY: `global_asm!` with symbols")]

use core::arch::global_asm;
use vmi_abi::{CALLS_3_0, CallNumber, RelocationInfo, RelocationType, for_each_call, number};
use vmi_native_backend::binding::{Bind, SHORT_PLAIN, SiteRule, answer, is_short, least_rule};

#[cfg(feature = "reference")]
use crate::{granted::DISTANCE, reference::CHOSEN};
#[cfg(not(feature = "reference"))]
use unplaced::{CHOSEN, DISTANCE};

#[cfg(feature = "xen")]
use crate::xen::XEN;
#[cfg(not(feature = "xen"))]
const XEN: u32 = 0;

/// An image without backends to choose from reads neither.
#[cfg(not(feature = "reference"))]
mod unplaced {
    pub(super) const CHOSEN: usize = 0;
    pub(super) const DISTANCE: usize = 0;
}

/// Which answers this image gives.
const BIND: Bind = if cfg!(feature = "bind-call") {
    Bind::Call
} else if cfg!(feature = "rewrite-sites") {
    Bind::Rewrite
} else {
    Bind::Fastest
};

/// The code that each call is answered with.
mod code {
    #[cfg(not(any(feature = "bind-call", feature = "rewrite-sites")))]
    pub(super) use vmi_native_backend::calls::IRET;
    /// A call leaves its return address above the frame.
    #[cfg(any(feature = "bind-call", feature = "rewrite-sites"))]
    pub(super) use vmi_native_backend::calls::IRET_by_call as IRET;
    pub(super) use vmi_native_backend::calls::*;
}

/// The answer for a call, as the number that travels in DL.
const fn kind(number: CallNumber) -> u8 {
    answer(&CALLS_3_0[number.0 as usize], BIND).0.0
}

/// The second half of a call's row: the type in its first byte, in the next the bytes between the
/// call's entry and its plain form, which leaves its site alone, then the least rule for sites with
/// which the answer holds.
const fn row(number: CallNumber) -> u32 {
    let call = &CALLS_3_0[number.0 as usize];
    let plain = matches!(BIND, Bind::Rewrite) && is_short(call);
    let rule = least_rule(call, BIND) as u8;
    u32::from_le_bytes([kind(number), if plain { SHORT_PLAIN } else { 0 }, rule, 0])
}

/// The rule for sites, in DH: a part of an instruction of `rewrite_site`.
#[cfg(feature = "rewrite-sites")]
macro_rules! load_site_rule {
    () => {
        "movb (site_rule - 1b)(%ecx), %dh"
    };
}

/// Sites are left alone.
#[cfg(not(feature = "rewrite-sites"))]
macro_rules! load_site_rule {
    () => {
        "movb ${never}, %dh"
    };
}

const _: () = assert!(RelocationType::NONE.0 == 0, "get_reloc compares with zero");

/// The bit of a call number that asks for the plain form, as a place for BTR.
const KEEP_SITE: u32 = vmi_abi::KEEP_SITE.trailing_zeros();

/// Emits `get_reloc`, and behind it a row for each call, laid out as a [`RelocationInfo`] with a
/// distance for the address. All in one piece: separate ones come in an order of the compiler's.
macro_rules! emit_table {
    (
        revision_3_0 { $( #[doc = $summary:literal] $name:ident = $number:literal => $contract:expr )* }
        only_13 { $($old:tt)* }
    ) => {
        global_asm!(
            ".pushsection .rom.table, \"ax\", @progbits",
            // In: EAX = call number. Out: EAX = linear address, EDX = type; both 0 for a call that
            // is answered NONE, and for a number beyond the table. Changes ECX, flags.
            ".type get_reloc, @function",
            "get_reloc:",
            "call 1f",
            "1: popl %ecx",
            "btrl ${keep_site}, %eax",
            "sbbb %dl, %dl", // All ones if the bit was set.
            load_site_rule!(),
            // A kernel that linked the image may leave it at no rewriting at all. The answer is then the
            // plain form: the other one would look at its site in vain each time.
            ".if {is_linked}",
            "cmpb ${never}, %dh",
            "jne 3f",
            "movb $-1, %dl",
            "3:",
            ".endif",
            "cmpl ${count}, %eax",
            "jae 2f",
            // On Xen no other backend's code runs: a call that its own does not serve is answered NONE.
            ".if {has_xen}",
            "pushl %edx",
            "movl (rom_start - 1b + {distance})(%ecx), %edx",
            "cmpl $1, %edx", // Not placed: neither equal nor above.
            "jb 6f",
            "cmpl ${xen}, (rom_start - 1b + {chosen})(%ecx, %edx)",
            "6: popl %edx",
            "jne 7f",
            "leal (xen_entries - 1b)(%ecx, %eax, 4), %ecx",
            "movl (%ecx), %eax",
            "testl %eax, %eax",
            "jz 2f",
            "addl %ecx, %eax",
            "movl ${call_rel}, %edx",
            "retl",
            "7:",
            ".endif",
            // A backend that was chosen has code of its own for some calls. Its page is there if the image was
            // placed, and begins with whether one was chosen.
            ".if {has_backends}",
            "cmpl $0, (entries - 1b)(%ecx, %eax, 4)",
            "je 5f",
            "pushl %edx",
            "movl (rom_start - 1b + {distance})(%ecx), %edx",
            "testl %edx, %edx",
            "jz 4f",
            "cmpl $0, (rom_start - 1b + {chosen})(%ecx, %edx)",
            "4: popl %edx",
            "je 5f",
            "leal (entries - 1b)(%ecx, %eax, 4), %ecx",
            "movl (%ecx), %eax",
            "addl %ecx, %eax",
            "movl ${call_rel}, %edx",
            "retl",
            "5:",
            ".endif",
            "leal (rows - 1b)(%ecx, %eax, {row_size}), %ecx",
            "cmpb $0, 4(%ecx)",
            "je 2f",
            "cmpb 6(%ecx), %dh",
            "jb 2f",
            "andb 5(%ecx), %dl",
            "movzbl %dl, %eax",
            "addl (%ecx), %eax",
            "addl %ecx, %eax",
            "movzbl 4(%ecx), %edx",
            "retl",
            "2: xorl %eax, %eax",
            "xorl %edx, %edx",
            "retl",
            ".size get_reloc, . - get_reloc",
            ".balign {row_size}",
            "rows:",
            concat!($(
                // Where the answer is NONE nobody may land: no distance, and no code kept for it.
                ".if {", stringify!($number), "}\n",
                ".long {", stringify!($name), "} - .\n",
                ".else\n",
                ".long 0\n",
                ".endif\n",
                ".long {", stringify!($number), "}\n",
            )*),
            ".popsection",
            $( const row(number::$name), )*
            $( $name = sym code::$name, )*
            count = const CALLS_3_0.len(),
            row_size = const size_of::<RelocationInfo>(),
            keep_site = const KEEP_SITE,
            is_linked = const cfg!(feature = "linked") as u8,
            never = const SiteRule::Never as u8,
            has_backends = const cfg!(feature = "reference") as u8,
            has_xen = const cfg!(feature = "xen") as u8,
            xen = const XEN,
            distance = const DISTANCE,
            chosen = const CHOSEN,
            call_rel = const RelocationType::CALL_REL.0,
            options(att_syntax),
        );
    };
}

for_each_call!(emit_table);
