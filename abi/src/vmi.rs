//! VMI for kernels in Rust: find a ROM, bind its calls, make them.
//!
//! [`Rom`] is a ROM that was looked at, in the option-ROM area or linked into the kernel. [`Calls`] is the
//! table of its calls. On 32-bit x86 it has a method for each call, under the specification's name, made
//! from the declaration in [`crate::calls`].
//!
//! ```
//! use vmi_abi::vmi::{Calls, Rom, Unusable};
//! use vmi_abi::{CallNumber, REVISION_3_0};
//!
//! static VMI: Calls = Calls::new();
//!
//! /// `area` is the option-ROM area, as far as the kernel maps it; `native` has the kernel's own code.
//! fn bind(area: &[u8], native: fn(CallNumber) -> Option<u32>) -> Result<bool, Unusable> {
//!     let Some(rom) = Rom::find(area, REVISION_3_0) else { return Ok(false) };
//!     #[cfg(target_arch = "x86")] // Elsewhere there is nobody to ask.
//!     // SAFETY: ring 0, flat segments, and the area stays mapped where it is.
//!     unsafe {
//!         rom.initialize()?;
//!         VMI.bind(|number| rom.relocation(number), native)?;
//!         VMI.SetLazyMode(vmi_abi::flags::LazyMode::OFF.0);
//!     }
//!     Ok(rom.image().len() > 0)
//! }
//!
//! assert_eq!(bind(&[0; 4096], |_| None), Ok(false));
//! ```

#![expect(
    unsafe_code,
    reason = "UNSAFETY: a ROM is code that the compiler does not know; binding and calling it rest on its word"
)]

#[cfg(target_arch = "x86")]
mod enter;

#[cfg(target_arch = "x86")]
pub use enter::Cpuid;
#[cfg(target_arch = "x86")]
use enter::{UNBOUND, nothing};

use crate::header::LENGTH_UNIT;
use crate::probe::{Refusal, probe, scan};
use crate::{
    CALLS_3_0, CallNumber, Ending, KEEP_SITE, RelocationInfo, RelocationType, Revision, RomHeader,
};
use core::fmt;
use core::mem::offset_of;
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// A ROM whose header is in order, where the kernel sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rom<'a> {
    image: &'a [u8],
}

impl<'a> Rom<'a> {
    /// The first ROM of revision `wanted` in a view of the option-ROM area that starts on a 2 KiB boundary.
    #[must_use]
    pub fn find(view: &'a [u8], wanted: Revision) -> Option<Self> {
        Self::judge(&view[scan(view, wanted)?..], wanted).ok()
    }

    /// The ROM that starts with the first of these bytes.
    ///
    /// # Errors
    ///
    /// What [`probe`] says against it.
    pub fn judge(bytes: &'a [u8], wanted: Revision) -> Result<Self, Refusal> {
        let length = usize::from(probe(bytes, wanted)?.rom_length) * LENGTH_UNIT;
        Ok(Self { image: &bytes[..length] })
    }

    /// The ROM that is linked into the kernel.
    ///
    /// # Errors
    ///
    /// What [`probe`] says against it.
    ///
    /// # Safety
    ///
    /// At `header` lie as many bytes as its length byte says, and nothing but the ROM itself writes to them.
    pub unsafe fn linked(header: *const RomHeader, wanted: Revision) -> Result<Self, Refusal> {
        // SAFETY: by the caller's word; a length that is less than a header is refused below.
        let bytes = unsafe {
            let length = usize::from((*header).rom_length) * LENGTH_UNIT;
            core::slice::from_raw_parts(header.cast(), length.max(size_of::<RomHeader>()))
        };
        Self::judge(bytes, wanted)
    }

    /// All its bytes.
    #[must_use]
    pub const fn image(self) -> &'a [u8] {
        self.image
    }
}

/// A ROM breaks the interface's rules, or refuses to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// `vmi_init` did not return 0.
    Initialization(u32),
    /// An answer that the call's contract does not allow, or an address that cannot be one.
    Answer(CallNumber, RelocationInfo),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Initialization(status) => write!(f, "vmi_init returns {status:#x}"),
            Self::Answer(number, RelocationInfo { eip, kind, .. }) => {
                let name = number.call().map_or("?", |call| call.name);
                write!(f, "{name} is answered by type {} and address {eip:#x}", kind.0)
            }
        }
    }
}

impl core::error::Error for Unusable {}

/// The calls of revision 3.0, bound to code.
///
/// Meant for a `static`: it starts empty and is bound once, before interrupts are enabled and before other
/// processors start. From then on everybody only reads it. Its words are atomic so that no program can
/// tear them; they order nothing, which starting a processor does anyway.
///
/// On 32-bit x86 it has a method for each call. It loads the registers of the call's contract, and gives the
/// compiler back all that the contract does not take. A call that is answered NOP does nothing. A call
/// without code panics: [`Calls::is_bound`] tells beforehand, where a kernel can do without.
///
/// A method is safe exactly if its call takes no argument. Such a call acts on what the kernel has set up
/// before, by calls that take some, and those are `unsafe`: whoever passes an address, a register's value or a
/// port answers for what the machine makes of it.
///
/// The methods are not call sites that a ROM could put native code over, so [`Calls::bind`] asks for code
/// that does not try ([`KEEP_SITE`]). IRET and SYSEXIT are the exception: a kernel enters them with all registers
/// given back, which no method can do, and therefore at sites of its own. [`Calls::eip_offset`] and
/// [`Calls::kind_offset`] are for those.
#[derive(Debug)]
#[repr(C)]
pub struct Calls {
    entries: [Entry; CALLS_3_0.len()],
}

/// How a call is reached: what `get_reloc` answers, save that NONE is replaced by the kernel's own code.
#[derive(Debug)]
#[repr(C)]
struct Entry {
    /// Its code. Where there is none: code that does nothing, or that panics. So nobody has to look before a call.
    code: AtomicPtr<()>,
    /// A [`RelocationType`].
    kind: AtomicU32,
}

/// Defines `fn native_call(CallNumber) -> Option<u32>`, for [`Calls::bind`]: the native calls that are linked
/// in as `vmi_native_` and the call's name. Written `for_each_call!(native_calls)`, in a kernel for x86.
///
/// Their symbols are weak: a call that is not linked in has no code.
#[macro_export]
macro_rules! native_calls {
    (
        revision_3_0 { $( #[doc = $summary:literal] $name:ident = $number:literal => $contract:expr )* }
        only_13 { $($old:tt)* }
    ) => {
        core::arch::global_asm!(
            ".pushsection .rodata.vmi_native_calls, \"a\", @progbits",
            ".balign 4",
            ".globl vmi_native_calls",
            "vmi_native_calls:",
            $(
                concat!(".weak vmi_native_", stringify!($name)),
                concat!(".long vmi_native_", stringify!($name)),
            )*
            ".popsection",
        );

        /// The native code for a call, if it is linked in.
        fn native_call(number: $crate::CallNumber) -> Option<u32> {
            unsafe extern "C" {
                static vmi_native_calls: [u32; $crate::CALLS_3_0.len()];
            }
            // SAFETY: the table above, with a word for each call.
            let calls = unsafe { &vmi_native_calls };
            calls.get(number.0 as usize).copied().filter(|address| *address != 0)
        }
    };
}

impl Entry {
    const fn unbound(number: usize) -> Self {
        let kind = AtomicU32::new(RelocationType::NONE.0 as u32);
        Self { code: AtomicPtr::new(UNBOUND[number]), kind }
    }
}

/// Elsewhere there are no methods, so nobody gets there.
#[cfg(not(target_arch = "x86"))]
const UNBOUND: [*mut (); CALLS_3_0.len()] = [core::ptr::null_mut(); CALLS_3_0.len()];

#[cfg(not(target_arch = "x86"))]
const fn nothing(_: crate::Registers) -> *mut () {
    core::ptr::null_mut()
}

impl Default for Calls {
    fn default() -> Self {
        Self::new()
    }
}

impl Calls {
    /// The table before anything is bound.
    #[must_use]
    pub const fn new() -> Self {
        let mut entries = [const { Entry::unbound(0) }; CALLS_3_0.len()];
        let mut number = 1;
        while number < entries.len() {
            entries[number] = Entry::unbound(number);
            number += 1;
        }
        Self { entries }
    }

    /// Binds each call to what `relocation` answers, the ROM's `get_reloc`, or, where that is NONE, to the
    /// kernel's own code, `native`. That code keeps the same contract; IRET's and SYSEXIT's is jumped to.
    /// A call without either stays without code.
    ///
    /// # Errors
    ///
    /// An answer that the interface does not allow. The table is then not to be used.
    ///
    /// # Safety
    ///
    /// Each address is that of code that keeps its call's contract, and stays where it is as long as calls are
    /// made. Nobody makes calls meanwhile, and calls are only made in the ring for which the ROM was initialised, with
    /// the segments that it was promised.
    pub unsafe fn bind(
        &self,
        mut relocation: impl FnMut(CallNumber) -> RelocationInfo,
        native: impl Fn(CallNumber) -> Option<u32>,
    ) -> Result<(), Unusable> {
        for (number, call) in (0..).map(CallNumber).zip(CALLS_3_0) {
            let mut answer = relocation(number);
            if answer.kind == RelocationType::CALL_REL && call.contract.ending != Ending::Transfers
            {
                let plain = relocation(CallNumber(number.0 | KEEP_SITE));
                // A ROM that does not know the bit, and no site either.
                if plain.kind != RelocationType::NONE {
                    answer = plain;
                }
            }
            let (kind, eip) = (answer.kind, answer.eip.get());
            let (kind, eip) = match native(number) {
                Some(eip) if kind == RelocationType::NONE => {
                    let transfers = call.contract.ending == Ending::Transfers;
                    let jump = RelocationType::JUMP_REL;
                    (if transfers { jump } else { RelocationType::CALL_REL }, eip)
                }
                _ if kind == RelocationType::NONE => (kind, 0),
                _ if kind.as_answers().is_none_or(|kind| !call.contract.answers.contains(kind))
                    || kind.has_address() && eip == 0 =>
                {
                    return Err(Unusable::Answer(number, answer));
                }
                _ if kind == RelocationType::NOP => (kind, 0),
                _ => (kind, eip),
            };
            let code = match kind {
                RelocationType::NONE => UNBOUND[number.0 as usize],
                RelocationType::NOP => nothing(call.contract.results),
                _ => with_exposed_provenance_mut(eip as usize),
            };
            let entry = &self.entries[number.0 as usize];
            entry.code.store(code, Ordering::Relaxed);
            entry.kind.store(kind.0.into(), Ordering::Relaxed);
        }
        Ok(())
    }

    /// How a call is reached; a call beyond the table like one that is not bound.
    #[must_use]
    pub fn relocation(&self, number: CallNumber) -> RelocationInfo {
        let Some(entry) = self.entries.get(number.0 as usize) else {
            return RelocationInfo::from_registers(0, RelocationType::NONE.0.into());
        };
        let kind = entry.kind.load(Ordering::Relaxed);
        let code = entry.code.load(Ordering::Relaxed).expose_provenance() as u32;
        let has_code = RelocationType(kind as u8).has_address();
        RelocationInfo::from_registers(if has_code { code } else { 0 }, kind)
    }

    /// Whether a call can be made.
    #[must_use]
    pub fn is_bound(&self, number: CallNumber) -> bool {
        self.relocation(number).kind != RelocationType::NONE
    }

    /// Where in the table the address of a call's code is, for call sites in assembly. There is always some.
    #[must_use]
    pub const fn eip_offset(number: CallNumber) -> usize {
        assert!((number.0 as usize) < CALLS_3_0.len());
        number.0 as usize * size_of::<Entry>() + offset_of!(Entry, code)
    }

    /// Where in the table the call's [`RelocationType`] is, in a byte.
    #[must_use]
    pub const fn kind_offset(number: CallNumber) -> usize {
        Self::eip_offset(number) + offset_of!(Entry, kind) - offset_of!(Entry, code)
    }
}

#[cfg(test)]
mod tests;
