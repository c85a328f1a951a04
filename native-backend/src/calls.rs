//! The code of the calls, one naked routine each, under the specification's names.
//!
//! The arguments, results and clobbers of each are its contract in [`vmi_abi::calls`]; a line above
//! each routine repeats the registers for the reader. CS and SS are flat always, DS and ES wherever
//! the contract says so. A routine that needs more than its registers uses the caller's stack.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: a naked routine is an `unsafe` attribute and body by nature"
)]
#![expect(non_snake_case, reason = "the specification's names")]

/// Defines naked routines from their instructions. One routine may serve several calls.
///
/// Each lies in a section that is named after its call, so that an image of revision 13.x can put it
/// into the call's slot. There each call has a copy of its own; elsewhere the further names stand for
/// the first.
macro_rules! routines {
    ($( $(#[$attribute:meta])* $name:ident $(, $other:ident)* { $($assembly:tt)* } )*) => { $(
        $(#[$attribute])*
        ///
        /// # Safety
        ///
        /// Ring 0, with the registers and segments that the call's contract asks for.
        #[unsafe(naked)]
        #[unsafe(link_section = concat!(".text.call.", stringify!($name)))]
        pub unsafe extern "C" fn $name() {
            core::arch::naked_asm!($($assembly)*)
        }
        also! { $name [$($other)*] { $($assembly)* } }
    )* };
}

/// The further names of a routine.
#[cfg(not(feature = "slots"))]
macro_rules! also {
    ($name:ident [$($other:ident)*] $assembly:tt) => { $( pub use self::$name as $other; )* };
}

/// The further names of a routine, with code of their own.
#[cfg(feature = "slots")]
macro_rules! also {
    ($name:ident [] $assembly:tt) => {};
    ($name:ident [$other:ident $($others:ident)*] $assembly:tt) => {
        routines! {
            #[doc = concat!("As [`", stringify!($name), "`].")]
            $other $assembly
        }
        also! { $name [$($others)*] $assembly }
    };
}

/// Defines naked routines that are too long for a slot of revision 13.x.
#[cfg(not(feature = "slots"))]
macro_rules! long_routines {
    ($($routines:tt)*) => { routines! { $($routines)* } };
}

/// Defines naked routines that are too long for their slots: a slot jumps to its routine, which lies
/// behind the last call. A jump is relative, so it arrives in a copy too.
#[cfg(feature = "slots")]
macro_rules! long_routines {
    ($(
        $(#[$attribute:meta])*
        $name:ident { $($code:literal,)+ $($operand:ident = const $value:expr,)* }
    )*) => { routines! { $(
        $(#[$attribute])*
        $name {
            "jmp 99f",
            concat!(".pushsection .text.long.", stringify!($name), ", \"ax\", @progbits"),
            concat!(".type long_", stringify!($name), ", @function"),
            concat!("long_", stringify!($name), ": 99:"),
            $($code,)+
            concat!(".size long_", stringify!($name), ", . - long_", stringify!($name)),
            ".popsection",
            $($operand = const $value,)*
        }
    )* } };
}

/// Defines naked routines for calls whose native code is no longer than the instruction that calls
/// them: in brackets what only a call needs, the code, behind a semicolon what brings a call back.
///
/// In an image that rewrites sites each begins with a jump to what tries that, behind the call itself. So the call lies only
/// [`SHORT_PLAIN`] bytes behind its entry, and hardly a distance to the entry needs a carry to become one to the call.
///
/// [`SHORT_PLAIN`]: crate::binding::SHORT_PLAIN
#[cfg(feature = "rewrite-sites")]
macro_rules! short_routines {
    ($(
        $(#[$attribute:meta])*
        $name:ident { $([$before:literal])? $($code:literal),+ $(; $end:literal)? }
    )*) => { routines! { $(
        $(#[$attribute])*
        $name {
            "jmp 6f",
            "2:",
            $($before,)?
            "3:",
            $($code,)+
            "4:",
            $($end,)?
            "5: .skip {room} - (5b - 2b), 0xcc",
            "6: pushfd",
            "cli",
            "call {rewrite_site}",
            ".byte {holder}, 4b - 3b, 4b - 3b + {jump}, 3b - 2b, 0", // With a site::Record.
            "popfd",
            "jmp 2b",
            room = const crate::calls::site::ROOM,
            rewrite_site = sym crate::calls::site::rewrite_site,
            holder = const crate::calls::site::HOLDER,
            jump = const short_routines!(@jump $($end)?),
        }
    )* } };
    // Bytes of a jump over what is left of the site; nothing comes back to it where nothing returns.
    (@jump) => { 0 };
    (@jump $end:literal) => { 2 };
}

/// The same without rewriting: the code alone.
#[cfg(not(feature = "rewrite-sites"))]
macro_rules! short_routines {
    ($(
        $(#[$attribute:meta])*
        $name:ident { $([$before:literal])? $($code:literal),+ $(; $end:literal)? }
    )*) => { routines! { $(
        $(#[$attribute])*
        $name { $($before,)? $($code,)+ $($end,)? }
    )* } };
}

mod descriptor;
mod interrupt;
mod memory;
mod port;
mod power;
mod processor;
#[cfg(feature = "rewrite-sites")]
mod site;
#[cfg(feature = "slots")]
mod slots;

pub use descriptor::*;
pub use interrupt::*;
pub use memory::*;
pub use port::*;
pub use power::*;
pub use processor::*;
#[cfg(feature = "rewrite-sites")]
pub use site::rewrite_site;
pub use slots::*;

routines! {
    /// Whether the native backend can run here: EAX = 0 in ring 0, the ring elsewhere.
    ///
    /// `vmi_init` of the native image. Changes EAX and flags.
    initialize, Init {
        "mov eax, cs",
        "and eax, 3",
        "ret",
    }

    /// Stands for a call that is answered NONE: it has no code, and whoever gets here took a wrong turn.
    not_served {
        "ud2",
    }
}

pub use not_served as SetCallbacks;
#[cfg(not(feature = "slots"))]
mod slots {
    pub use super::not_served as APICRead;
    pub use super::not_served as APICWrite;
    pub use super::not_served as CancelAlarm;
    pub use super::not_served as GetCycleCounter;
    pub use super::not_served as GetCycleFrequency;
    pub use super::not_served as GetWallclockTime;
    pub use super::not_served as SetAlarm;
    pub use super::not_served as WallclockUpdated;
}
