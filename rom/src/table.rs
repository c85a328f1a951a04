//! `get_reloc` and the table that it answers from.
//!
//! The table holds, for each call, the distance from its own place to the call's code: the linker
//! knows it, so nothing is left to relocate, and it holds at every address the image is seen at.

#![expect(unsafe_code, reason = "UNSAFETY: `global_asm!` with symbols")]

use core::arch::global_asm;
use vmi_abi::{CALLS_3_0, CallNumber, RelocationInfo, for_each_call, number};
use vmi_native_backend::binding::{Bind, answer};

/// Which answers this image gives.
const BIND: Bind = if cfg!(feature = "bind-call") { Bind::Call } else { Bind::Fastest };

/// The code that each call is answered with.
mod code {
    #[cfg(not(feature = "bind-call"))]
    pub(super) use vmi_native_backend::calls::IRET;
    /// A call leaves its return address above the frame.
    #[cfg(feature = "bind-call")]
    pub(super) use vmi_native_backend::calls::IRET_by_call as IRET;
    pub(super) use vmi_native_backend::calls::*;
}

/// The answer for a call, as the number that travels in DL.
const fn kind(number: CallNumber) -> u8 {
    answer(&CALLS_3_0[number.0 as usize], BIND).0.0
}

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
            "cmpl ${count}, %eax",
            "jae 2f",
            "leal (rows - 1b)(%ecx, %eax, {row}), %ecx",
            "movl 4(%ecx), %edx",
            "testl %edx, %edx",
            "jz 2f",
            "movl (%ecx), %eax",
            "addl %ecx, %eax",
            "retl",
            "2: xorl %eax, %eax",
            "xorl %edx, %edx",
            "retl",
            ".size get_reloc, . - get_reloc",
            ".balign {row}",
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
            $( const kind(number::$name), )*
            $( $name = sym code::$name, )*
            count = const CALLS_3_0.len(),
            row = const size_of::<RelocationInfo>(),
            options(att_syntax),
        );
    };
}

for_each_call!(emit_table);
