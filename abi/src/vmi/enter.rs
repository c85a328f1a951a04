//! The calls themselves, on 32-bit x86: a method for each, made from the declaration.

#![expect(non_snake_case, reason = "the specification's names")]

use super::{Calls, Rom, Unusable};
use crate::{
    CALLS_3_0, CallNumber, Registers, RelocationInfo, RelocationType, RomHeader, for_each_call,
    number,
};
use core::arch::{asm, naked_asm};
use core::mem::offset_of;

/// What CPUID answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each field is the register of its name")]
pub struct Cpuid {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl Rom<'_> {
    /// Runs `vmi_init`. The kernel may be in another ring afterwards: CS says so.
    ///
    /// # Errors
    ///
    /// The ROM refuses to work.
    ///
    /// # Safety
    ///
    /// Ring 0, flat segments, interrupts disabled, and the ROM is one that the kernel trusts.
    pub unsafe fn initialize(&self) -> Result<(), Unusable> {
        // SAFETY: by the caller's word.
        match unsafe { self.run(offset_of!(RomHeader, vmi_init), 0) } {
            (0, _) => Ok(()),
            (status, _) => Err(Unusable::Initialization(status)),
        }
    }

    /// Runs `get_reloc`: how the kernel is to reach a call.
    ///
    /// # Safety
    ///
    /// As for [`Rom::initialize`], which came before; interrupts may be enabled.
    pub unsafe fn relocation(&self, number: CallNumber) -> RelocationInfo {
        // SAFETY: by the caller's word.
        let (eax, edx) = unsafe { self.run(offset_of!(RomHeader, get_reloc), number.0) };
        RelocationInfo::from_registers(eax, edx)
    }

    /// Runs one of the header's entry points: EAX in, EDX:EAX out.
    unsafe fn run(&self, offset: usize, argument: u32) -> (u32, u32) {
        let entry = &self.image()[offset];
        let (eax, edx);
        // SAFETY: the header's entry points change what a `regparm(3)` function may.
        unsafe {
            asm!(
                "call {entry}",
                entry = in(reg) entry,
                in("eax") argument,
                lateout("eax") eax,
                lateout("edx") edx,
                lateout("ecx") _,
            );
        }
        (eax, edx)
    }
}

impl Calls {
    /// The address of the code of a call that goes on in another context, and whether it is called.
    fn transfer(&self, number: CallNumber) -> (u32, bool) {
        let RelocationInfo { eip, kind, .. } = self.relocation(number);
        assert!(kind.has_address(), "VMI call {} has no code", number.0);
        (eip.get(), kind == RelocationType::CALL_REL)
    }
}

/// The code of a call that has none.
extern "fastcall" fn without_code(number: u32) -> ! {
    panic!("VMI call {number} has no code");
}

#[unsafe(naked)]
extern "C" fn unbound<const NUMBER: u32>() {
    naked_asm!("mov ecx, {number}", "jmp {panic}", number = const NUMBER, panic = sym without_code)
}

/// Defines the code of calls that have none.
macro_rules! unbound {
    (
        revision_3_0 { $( #[doc = $summary:literal] $name:ident = $number:literal => $contract:expr )* }
        only_13 { $($old:tt)* }
    ) => {
        /// What is entered where a call has no code: it panics.
        pub(super) const UNBOUND: [*mut (); CALLS_3_0.len()] =
            [$( unbound::<$number> as extern "C" fn() as *mut () ),*];
    };
}

for_each_call!(unbound);

#[unsafe(naked)]
extern "C" fn nothing_at_all() {
    naked_asm!("ret")
}

#[unsafe(naked)]
extern "C" fn nothing_in_eax() {
    naked_asm!("mov eax, 0", "ret")
}

#[unsafe(naked)]
extern "C" fn nothing_in_edx_eax() {
    naked_asm!("mov eax, 0", "mov edx, 0", "ret")
}

#[unsafe(naked)]
extern "C" fn nothing_of_cpuid() {
    naked_asm!("mov eax, 0", "mov ebx, 0", "mov ecx, 0", "mov edx, 0", "ret")
}

/// What is entered where a call is to do nothing: its results are 0, and all else is kept.
pub(super) const fn nothing(results: Registers) -> *mut () {
    let code: extern "C" fn() = match results {
        Registers::CPUID => nothing_of_cpuid,
        Registers::EDX_EAX => nothing_in_edx_eax,
        Registers::EAX => nothing_in_eax,
        _ => nothing_at_all,
    };
    code as *mut ()
}

/// The type of an argument by its place.
macro_rules! word {
    (EdxEax) => {
        u64
    };
    (EcxEdx) => {
        u64
    };
    (StackPair) => {
        u64
    };
    ($place:ident) => {
        u32
    };
}

/// The type of a result by its registers.
macro_rules! result {
    () => {
        ()
    };
    (EAX) => {
        u32
    };
    (EDX_EAX) => {
        u64
    };
    (CPUID) => {
        Cpuid
    };
}

/// A method for each call: first the rows are reduced to what a method needs.
macro_rules! methods {
    (
        revision_3_0 { $(
            #[doc = $summary:literal]
            $name:ident = $number:literal => Contract {
                $(slot: $slot:expr,)?
                $(arguments: args![$($argument:ident: $place:ident),*],)?
                $(results: Registers::$results:ident,)?
                $(clobbers: Registers::$clobbers:ident,)?
                $(segments: $segments:expr,)?
                $(deferral: $deferral:expr,)?
                $(answers: $answers:expr,)?
                $(site: $site:expr,)?
                $(ending: Ending::$ending:ident,)?
                $(group: $group:expr,)?
                ..Contract::STANDARD
            }
        )* }
        only_13 { $($old:tt)* }
    ) => {
        impl Calls { $(
            method! {
                #[doc = $summary]
                $name [$($($argument: $place)*)?] [$($results)?] [$($clobbers)?] $($ending)?
            }
        )* }
    };
}

macro_rules! method {
    (
        $(#[$attribute:meta])*
        $name:ident [$($argument:ident: $place:ident)*] [] [NONE] Transfers
    ) => {
        $(#[$attribute])*
        ///
        /// # Safety
        ///
        /// The context that is entered is sound, and nothing of this one is needed any more.
        #[inline]
        pub unsafe fn $name(&self, $($argument: word!($place)),*) -> ! {
            let (entry, by_call) = self.transfer(number::$name);
            // SAFETY: by the caller's word, and by the word of the one who bound the call.
            unsafe {
                if by_call {
                    transfer!("call {entry}" entry [$($argument: $place)*])
                } else {
                    transfer!("jmp {entry}" entry [$($argument: $place)*])
                }
            }
        }
    };
    ($(#[$attribute:meta])* $name:ident [] [$($results:ident)?] $clobbers:tt $($ending:ident)?) => {
        $(#[$attribute])*
        #[inline]
        pub fn $name(&self) -> result!($($results)?) {
            let calls = self;
            const EIP: usize = Calls::eip_offset(number::$name);
            // SAFETY: by the word of the one who bound the call. It acts on nothing but what the
            // kernel has set up.
            unsafe { enter!((calls EIP) [] [] [] [$($results)?] $clobbers) }
        }
    };
    (
        $(#[$attribute:meta])*
        $name:ident $arguments:tt [$($results:ident)?] $clobbers:tt $($ending:ident)?
    ) => {
        method! { @arguments $(#[$attribute])* $name $arguments $arguments [$($results)?] $clobbers }
    };
    (
        @arguments $(#[$attribute:meta])*
        $name:ident [$($argument:ident: $place:ident)*] $arguments:tt [$($results:ident)?] $clobbers:tt
    ) => {
        $(#[$attribute])*
        ///
        /// # Safety
        ///
        /// The arguments are what the call's contract wants, and what the machine makes of them is sound.
        #[inline]
        pub unsafe fn $name(&self, $($argument: word!($place)),*) -> result!($($results)?) {
            let calls = self;
            const EIP: usize = Calls::eip_offset(number::$name);
            // SAFETY: by the caller's word, and by the word of the one who bound the call.
            unsafe { enter!((calls EIP) [] [] $arguments [$($results)?] $clobbers) }
        }
    };
}

/// Leaves for another context.
macro_rules! transfer {
    ($instruction:literal $entry:ident [$frame:ident: Frame]) => {
        asm!(
            "mov esp, {frame}",
            $instruction,
            entry = in(reg) $entry,
            frame = in(reg) $frame,
            options(noreturn),
        )
    };
    ($instruction:literal $entry:ident [$eip:ident: Edx $esp:ident: Ecx]) => {
        asm!(
            $instruction,
            entry = in(reg) $entry,
            in("edx") $eip,
            in("ecx") $esp,
            options(noreturn),
        )
    };
}

/// Enters a call's code: where its address is, operands so far, words on the stack so far, arguments that are left,
/// results, clobbers.
macro_rules! enter {
    // The instructions.
    (@asm ($calls:ident $eip:ident) [$($in:tt)*] [] [$($out:tt)*]) => {
        asm!("call dword ptr [{calls} + {eip}]", calls = in(reg) $calls, eip = const $eip, $($in)* $($out)*)
    };
    (@asm ($calls:ident $eip:ident) [$($in:tt)*] [$first:expr,] [$($out:tt)*]) => {
        asm!(
            "push {first}",
            "call dword ptr [{calls} + {eip}]",
            "add esp, 4",
            calls = in(reg) $calls,
            eip = const $eip,
            first = in(reg) $first,
            $($in)* $($out)*
        )
    };
    // Two words and their address: registers would not do for all.
    (@asm ($calls:ident $eip:ident) [$($in:tt)*] [$first:expr, $second:expr,] [$($out:tt)*]) => {{
        let words: [u32; 2] = [$first, $second];
        asm!(
            "push dword ptr [{words} + 4]",
            "push dword ptr [{words}]",
            "call dword ptr [{calls} + {eip}]",
            "add esp, 8",
            calls = in(reg) $calls,
            eip = const $eip,
            words = in(reg) words.as_ptr(),
            $($in)* $($out)*
        )
    }};
    (@asm ($calls:ident $eip:ident) [$($in:tt)*] ($source:ident) [$($out:tt)*]) => {
        asm!(
            "push esi",
            "mov esi, {source}",
            "call dword ptr [{calls} + {eip}]",
            "pop esi",
            calls = in(reg) $calls,
            eip = const $eip,
            source = in(reg) $source,
            $($in)* $($out)*
        )
    };

    // Registers and words of the arguments.
    ($entry:tt [$($in:tt)*] $more:tt [$argument:ident: Eax $($left:tt)*] $($out:tt)*) => {
        enter!($entry [$($in)* in("eax") $argument,] $more [$($left)*] $($out)*)
    };
    ($entry:tt [$($in:tt)*] $more:tt [$argument:ident: Edx $($left:tt)*] $($out:tt)*) => {
        enter!($entry [$($in)* in("edx") $argument,] $more [$($left)*] $($out)*)
    };
    ($entry:tt [$($in:tt)*] $more:tt [$argument:ident: Ecx $($left:tt)*] $($out:tt)*) => {
        enter!($entry [$($in)* in("ecx") $argument,] $more [$($left)*] $($out)*)
    };
    ($entry:tt [$($in:tt)*] $more:tt [$argument:ident: Edi $($left:tt)*] $($out:tt)*) => {
        enter!($entry [$($in)* in("edi") $argument,] $more [$($left)*] $($out)*)
    };
    ($entry:tt [$($in:tt)*] $more:tt [$argument:ident: EdxEax $($left:tt)*] $($out:tt)*) => {
        enter!(
            $entry
            [$($in)* in("eax") $argument as u32, in("edx") ($argument >> 32) as u32,]
            $more [$($left)*] $($out)*
        )
    };
    ($entry:tt [$($in:tt)*] $more:tt [$argument:ident: EcxEdx $($left:tt)*] $($out:tt)*) => {
        enter!(
            $entry
            [$($in)* in("edx") $argument as u32, in("ecx") ($argument >> 32) as u32,]
            $more [$($left)*] $($out)*
        )
    };
    ($entry:tt $in:tt [$($word:expr,)*] [$argument:ident: Stack $($left:tt)*] $($out:tt)*) => {
        enter!($entry $in [$($word,)* $argument,] [$($left)*] $($out)*)
    };
    ($entry:tt $in:tt [$($word:expr,)*] [$argument:ident: StackPair $($left:tt)*] $($out:tt)*) => {
        enter!(
            $entry $in
            [$($word,)* $argument as u32, ($argument >> 32) as u32,]
            [$($left)*] $($out)*
        )
    };
    ($entry:tt $in:tt [] [$argument:ident: Esi $($left:tt)*] $($out:tt)*) => {
        enter!($entry $in ($argument) [$($left)*] $($out)*)
    };

    // What comes back, and what is lost.
    ($entry:tt $in:tt $more:tt [] [] []) => {
        enter!(@asm $entry $in $more [lateout("eax") _, lateout("edx") _, lateout("ecx") _])
    };
    ($entry:tt $in:tt $more:tt [] [EAX] []) => {{
        let eax: u32;
        enter!(@asm $entry $in $more [lateout("eax") eax, lateout("edx") _, lateout("ecx") _]);
        eax
    }};
    ($entry:tt $in:tt $more:tt [] [EDX_EAX] []) => {{
        let (eax, edx): (u32, u32);
        enter!(@asm $entry $in $more [lateout("eax") eax, lateout("edx") edx, lateout("ecx") _]);
        u64::from(edx) << 32 | u64::from(eax)
    }};
    ($entry:tt $in:tt $more:tt [] [CPUID] [FLAGS]) => {{
        let (eax, ebx, ecx, edx): (u32, u32, u32, u32);
        enter!(@asm $entry $in $more [
            lateout("eax") eax, lateout("ebx") ebx, lateout("ecx") ecx, lateout("edx") edx
        ]);
        Cpuid { eax, ebx, ecx, edx }
    }};
    ($entry:tt $in:tt $more:tt [] [] [FLAGS]) => {
        enter!(@asm $entry $in $more [])
    };
    ($entry:tt $in:tt $more:tt [] [EAX] [FLAGS]) => {{
        let eax: u32;
        enter!(@asm $entry $in $more [lateout("eax") eax]);
        eax
    }};
    ($entry:tt $in:tt $more:tt [] [] [NONE]) => {
        enter!(@asm $entry $in $more [options(preserves_flags)])
    };
    ($entry:tt $in:tt $more:tt [] [EAX] [NONE]) => {{
        let eax: u32;
        enter!(@asm $entry $in $more [lateout("eax") eax, options(preserves_flags)]);
        eax
    }};
    ($entry:tt $in:tt $more:tt [] [] [EDI_ECX]) => {
        enter!(@asm $entry $in $more [
            lateout("edi") _, lateout("ecx") _, options(preserves_flags)
        ])
    };
    // ESI is put back.
    ($entry:tt $in:tt $more:tt [] [] [ESI_ECX]) => {
        enter!(@asm $entry $in $more [lateout("ecx") _, options(preserves_flags)])
    };
}

for_each_call!(methods);
