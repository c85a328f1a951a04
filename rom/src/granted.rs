//! What backends in the image share: the memory that the image is granted, and how a call's registers reach a function.

#![expect(unsafe_code, reason = "UNSAFETY: the code's own place, from an instruction")]

use core::arch::asm;
use core::mem::offset_of;
use vmi_hv_backend::reference::interface::{GRANT_OFFSET, Grant};

/// Offset in the image of the granted memory's distance.
pub(crate) const DISTANCE: usize = GRANT_OFFSET + offset_of!(Grant, distance);

/// The granted memory, found by the code's own place: at every alias of the image an alias of the memory.
#[inline(always)]
pub(crate) fn granted<T>() -> *const T {
    let state;
    // SAFETY: the distance lies in the image.
    unsafe {
        asm!(
            "call 2f",
            "2: popl {0}",
            "addl (rom_start - 2b + {distance})({0}), {0}",
            "addl $(rom_start - 2b), {0}",
            out(reg) state,
            distance = const DISTANCE,
            options(att_syntax),
        );
    }
    state
}

/// Defines entries: what the naked routine does to call the function behind it, whose arguments are, in this order, ECX, EDX
/// and the stack, from which it takes them.
macro_rules! entries {
    ($(
        $(#[$attribute:meta])*
        $name:ident { $($assembly:literal),+ } $function:ident($($argument:ident),*) $(-> $result:ty)? $body:block
    )*) => { $(
        $(#[$attribute])*
        ///
        /// # Safety
        ///
        /// As for every call, and a backend is chosen.
        #[unsafe(naked)]
        unsafe extern "C" fn $name() {
            extern "fastcall" fn $function($($argument: u32),*) $(-> $result)? $body
            naked_asm!($($assembly,)+ function = sym $function, options(att_syntax))
        }
    )* };
}

/// Emits, for each call, the distance from its own place to the call's code; 0 where there is none. The module that uses it says where
/// the code begins, by a constant function `row`: bytes behind the entry, or -1; and, by a macro `table`, under which name the list lies.
macro_rules! emit_entries {
    (
        revision_3_0 { $( #[doc = $summary:literal] $name:ident = $number:literal => $contract:expr )* }
        only_13 { $($old:tt)* }
    ) => {
        core::arch::global_asm!(
            ".pushsection .rom.table, \"ax\", @progbits",
            ".balign 4",
            concat!(".globl ", table!()),
            concat!(".hidden ", table!()),
            concat!(table!(), ":"),
            concat!($(
                ".if {", stringify!($number), "} >= 0\n",
                ".long {", stringify!($name), "} - . + {", stringify!($number), "}\n",
                ".else\n",
                ".long 0\n",
                ".endif\n",
            )*),
            ".popsection",
            $( const row(number::$name), )*
            $( $name = sym $name, )*
            options(att_syntax),
        );
    };
}

pub(crate) use {emit_entries, entries};
