//! The names under which a kernel links to the calls.
//!
//! A kernel with the image linked in has every call, whatever a ROM answers: a call that is answered NONE
//! is still to be had here, under its name. The name is that of the code that leaves call sites alone;
//! `get_reloc` answers with the code that rewrites them. `xtask` takes the names over into the
//! object that the kernel links.

#![expect(unsafe_code, reason = "UNSAFETY: `global_asm!` with symbols")]

use core::arch::global_asm;
use vmi_abi::{CALLS_3_0, CallNumber, for_each_call, number};
use vmi_native_backend::binding::{Bind, SHORT_PLAIN, answer, is_short};
use vmi_native_backend::calls;

/// Whether the native backend has code for a call.
const fn is_served(number: CallNumber) -> u8 {
    answer(&CALLS_3_0[number.0 as usize], Bind::Call).0.has_address() as u8
}

/// Bytes between a routine's entry and the code that leaves its site alone. IRET of that name is jumped
/// to, so it has no site to look at.
const fn plain(number: CallNumber) -> u8 {
    let rewrites = is_short(&CALLS_3_0[number.0 as usize]) && number.0 != number::IRET.0;
    if rewrites { SHORT_PLAIN } else { 0 }
}

/// Emits a name for each call that has code, and one for IRET as a site needs it that calls.
macro_rules! emit_names {
    (
        revision_3_0 { $( #[doc = $summary:literal] $name:ident = $number:literal => $contract:expr )* }
        only_13 { $($old:tt)* }
    ) => {
        global_asm!(
            $(
                ".if {}\n",
                concat!(".globl vmi_native_", stringify!($name)),
                concat!(".set vmi_native_", stringify!($name), ", {} + {}"),
                // Or it gets the size of the whole routine, however far behind its start it lies.
                concat!(".size vmi_native_", stringify!($name), ", 0"),
                ".endif",
            )*
            ".globl vmi_native_IRET_by_call",
            ".set vmi_native_IRET_by_call, {} + {}",
            ".size vmi_native_IRET_by_call, 0",
            $( const is_served(number::$name), sym calls::$name, const plain(number::$name), )*
            sym calls::IRET_by_call,
            const SHORT_PLAIN,
            options(att_syntax),
        );
    };
}

for_each_call!(emit_names);
