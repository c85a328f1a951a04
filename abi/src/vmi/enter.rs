//! The calls themselves, on 32-bit x86: a method for each, made from the declaration.

#![expect(non_snake_case, reason = "the specification's names")]

use super::{Calls, Rom, Unusable};
use crate::{CallNumber, RelocationInfo, RelocationType, RomHeader, for_each_call, number};
use core::arch::asm;
use core::mem::offset_of;
use core::sync::atomic::Ordering;

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
    /// The address of a call's code; `None` where nothing is to be done.
    fn entry(&self, number: CallNumber) -> Option<u32> {
        match self.entries[number.0 as usize].eip.load(Ordering::Relaxed) {
            0 => self.without_code(number),
            eip => Some(eip),
        }
    }

    #[cold]
    fn without_code(&self, number: CallNumber) -> Option<u32> {
        assert!(self.is_bound(number), "VMI call {} has no code", number.0);
        None
    }

    /// The address of the code of a call that goes on in another context, and whether it is called.
    fn transfer(&self, number: CallNumber) -> (u32, bool) {
        let RelocationInfo { eip, kind, .. } = self.relocation(number);
        assert!(kind.has_address(), "VMI call {} has no code", number.0);
        (eip.get(), kind == RelocationType::CALL_REL)
    }
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
            let Some(entry) = self.entry(number::$name) else { return Default::default() };
            // SAFETY: by the word of the one who bound the call. It acts on nothing but what the
            // kernel has set up.
            unsafe { enter!(entry [] [] [] [$($results)?] $clobbers) }
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
            let Some(entry) = self.entry(number::$name) else { return Default::default() };
            // SAFETY: by the caller's word, and by the word of the one who bound the call.
            unsafe { enter!(entry [] [] $arguments [$($results)?] $clobbers) }
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

/// Enters a call's code: its address, operands so far, words on the stack so far, arguments that are left,
/// results, clobbers.
///
/// The address is in one of EAX, EBX, ECX, EDX: no argument needs EBX, and ESI is not the compiler's to give.
macro_rules! enter {
    ($entry:ident [$($in:tt)*] $more:tt [$argument:ident: Eax $($left:tt)*] $($out:tt)*) => {
        enter!($entry [$($in)* in("eax") $argument,] $more [$($left)*] $($out)*)
    };
    ($entry:ident [$($in:tt)*] $more:tt [$argument:ident: Edx $($left:tt)*] $($out:tt)*) => {
        enter!($entry [$($in)* in("edx") $argument,] $more [$($left)*] $($out)*)
    };
    ($entry:ident [$($in:tt)*] $more:tt [$argument:ident: Ecx $($left:tt)*] $($out:tt)*) => {
        enter!($entry [$($in)* in("ecx") $argument,] $more [$($left)*] $($out)*)
    };
    ($entry:ident [$($in:tt)*] $more:tt [$argument:ident: Edi $($left:tt)*] $($out:tt)*) => {
        enter!($entry [$($in)* in("edi") $argument,] $more [$($left)*] $($out)*)
    };
    ($entry:ident [$($in:tt)*] $more:tt [$argument:ident: EdxEax $($left:tt)*] $($out:tt)*) => {
        enter!(
            $entry
            [$($in)* in("eax") $argument as u32, in("edx") ($argument >> 32) as u32,]
            $more [$($left)*] $($out)*
        )
    };
    ($entry:ident [$($in:tt)*] $more:tt [$argument:ident: EcxEdx $($left:tt)*] $($out:tt)*) => {
        enter!(
            $entry
            [$($in)* in("edx") $argument as u32, in("ecx") ($argument >> 32) as u32,]
            $more [$($left)*] $($out)*
        )
    };
    ($entry:ident $in:tt [$($word:expr,)*] [$argument:ident: Stack $($left:tt)*] $($out:tt)*) => {
        enter!($entry $in [$($word,)* $argument,] [$($left)*] $($out)*)
    };
    ($entry:ident $in:tt [$($word:expr,)*] [$argument:ident: StackPair $($left:tt)*] $($out:tt)*) => {
        enter!(
            $entry $in
            [$($word,)* $argument as u32, ($argument >> 32) as u32,]
            [$($left)*] $($out)*
        )
    };
    ($entry:ident $in:tt [] [$argument:ident: Esi $($left:tt)*] $($out:tt)*) => {
        enter!($entry $in ($argument) [$($left)*] $($out)*)
    };

    // What comes back, and what is lost.
    ($entry:ident $in:tt $more:tt [] [] []) => {
        enter!(@asm $entry $in $more [lateout("eax") _, lateout("edx") _, lateout("ecx") _])
    };
    ($entry:ident $in:tt $more:tt [] [EAX] []) => {{
        let eax: u32;
        enter!(@asm $entry $in $more [lateout("eax") eax, lateout("edx") _, lateout("ecx") _]);
        eax
    }};
    ($entry:ident $in:tt $more:tt [] [EDX_EAX] []) => {{
        let (eax, edx): (u32, u32);
        enter!(@asm $entry $in $more [lateout("eax") eax, lateout("edx") edx, lateout("ecx") _]);
        u64::from(edx) << 32 | u64::from(eax)
    }};
    ($entry:ident $in:tt $more:tt [] [CPUID] [FLAGS]) => {{
        let (eax, ebx, ecx, edx): (u32, u32, u32, u32);
        enter!(@asm $entry $in $more [
            lateout("eax") eax, lateout("ebx") ebx, lateout("ecx") ecx, lateout("edx") edx
        ]);
        Cpuid { eax, ebx, ecx, edx }
    }};
    ($entry:ident $in:tt $more:tt [] [] [FLAGS]) => {
        enter!(@asm $entry $in $more [])
    };
    ($entry:ident $in:tt $more:tt [] [EAX] [FLAGS]) => {{
        let eax: u32;
        enter!(@asm $entry $in $more [lateout("eax") eax]);
        eax
    }};
    ($entry:ident $in:tt $more:tt [] [] [NONE]) => {
        enter!(@asm $entry $in $more [options(preserves_flags)])
    };
    ($entry:ident $in:tt $more:tt [] [EAX] [NONE]) => {{
        let eax: u32;
        enter!(@asm $entry $in $more [lateout("eax") eax, options(preserves_flags)]);
        eax
    }};
    ($entry:ident $in:tt $more:tt [] [] [EDI_ECX]) => {
        enter!(@asm $entry $in $more [
            lateout("edi") _, lateout("ecx") _, options(preserves_flags)
        ])
    };
    // ESI is put back.
    ($entry:ident $in:tt $more:tt [] [] [ESI_ECX]) => {
        enter!(@asm $entry $in $more [lateout("ecx") _, options(preserves_flags)])
    };

    // The instructions.
    (@asm $entry:ident [$($in:tt)*] [] [$($out:tt)*]) => {
        asm!("call {entry}", entry = in(reg_abcd) $entry, $($in)* $($out)*)
    };
    (@asm $entry:ident [$($in:tt)*] [$first:expr,] [$($out:tt)*]) => {
        asm!(
            "push {first}",
            "call {entry}",
            "add esp, 4",
            entry = in(reg_abcd) $entry,
            first = in(reg) $first,
            $($in)* $($out)*
        )
    };
    // Two words and their address: registers would not do for all.
    (@asm $entry:ident [$($in:tt)*] [$first:expr, $second:expr,] [$($out:tt)*]) => {{
        let words: [u32; 2] = [$first, $second];
        asm!(
            "push dword ptr [{words} + 4]",
            "push dword ptr [{words}]",
            "call {entry}",
            "add esp, 8",
            entry = in(reg_abcd) $entry,
            words = in(reg) words.as_ptr(),
            $($in)* $($out)*
        )
    }};
    (@asm $entry:ident [$($in:tt)*] ($source:ident) [$($out:tt)*]) => {
        asm!(
            "push esi",
            "mov esi, {source}",
            "call {entry}",
            "pop esi",
            entry = in(reg_abcd) $entry,
            source = in(reg) $source,
            $($in)* $($out)*
        )
    };
}

for_each_call!(methods);
