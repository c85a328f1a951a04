//! The Xen backend in the image.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: naked routines, and memory at a distance that the image is told"
)]

use crate::reference::{self, DISTANCE};
use core::arch::{asm, global_asm, naked_asm};
use core::ptr::with_exposed_provenance;
use vmi_abi::{for_each_call, number};
use vmi_hv_backend::xen::interface::{
    FORCED_EMULATION, PLACEMENT_SIGNATURE, PLACEMENT_SIZE, PLACEMENT_VERSION, Placement,
};
use vmi_hv_backend::xen::{MEMORY, Xen};
use vmi_hv_backend::{Detection, Vendor, detect};

/// What the granted memory's first word says where this backend is chosen.
pub(crate) const XEN: u32 = 2;

/// `vmi_init`: EAX = 0 where the image can serve the guest. In ring 0 that is decided as without Xen. Changes ECX, EDX, flags.
///
/// # Safety
///
/// As for every call: flat segments. A distance that is not zero leads to the granted memory.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn vmi_init() {
    naked_asm!(
        "movl %cs, %eax",
        "andl $3, %eax",
        "jz {reference}",
        "call 1f",
        "1: popl %edx",
        "movl (rom_start - 1b + {distance})(%edx), %ecx",
        "jecxz 2f",
        "leal (rom_start - 1b)(%edx, %ecx), %ecx",
        "jmp {choose}",
        "2: retl",
        reference = sym reference::vmi_init,
        distance = const DISTANCE,
        choose = sym choose,
        options(att_syntax),
    )
}

/// Chooses Xen, if it is there. 0 if so.
extern "fastcall" fn choose(state: usize) -> u32 {
    let placement: *const Placement =
        with_exposed_provenance(state + (MEMORY - PLACEMENT_SIZE) as usize);
    // SAFETY: the granted memory, in which the loader left it, if it is one of Xen.
    let Placement { signature, version, .. } = unsafe { placement.read() };
    if signature != PLACEMENT_SIGNATURE || version != PLACEMENT_VERSION {
        return 1;
    }
    let found = matches!(detect(cpuid), Detection::Found(found) if found.vendor == Vendor::Xen);
    if !found {
        return 1;
    }
    // SAFETY: the granted memory's first word, which is for this.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(state).write(XEN) };
    0
}

/// CPUID as Xen answers it. Elsewhere it is an invalid instruction.
fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let [mut eax, ebx, mut ecx, edx] = [leaf, 0, subleaf, 0];
    let (mut b, mut d) = (ebx, edx);
    // SAFETY: the caller knows that Xen is there, which takes the first five bytes for a prefix.
    unsafe {
        asm!(
            ".byte {0}, {1}, {2}, {3}, {4}",
            "cpuid",
            const FORCED_EMULATION[0],
            const FORCED_EMULATION[1],
            const FORCED_EMULATION[2],
            const FORCED_EMULATION[3],
            const FORCED_EMULATION[4],
            inout("eax") eax,
            inout("ebx") b,
            inout("ecx") ecx,
            inout("edx") d,
        );
    }
    [eax, b, ecx, d]
}

/// Emits, for each call, the distance from its own place to the call's entry; 0 where it is answered NONE.
macro_rules! emit_entries {
    (
        revision_3_0 { $( #[doc = $summary:literal] $name:ident = $number:literal => $contract:expr )* }
        only_13 { $($old:tt)* }
    ) => {
        global_asm!(
            ".pushsection .rom.table, \"ax\", @progbits",
            ".balign 4",
            ".globl xen_entries",
            ".hidden xen_entries",
            "xen_entries:",
            $(
                concat!(".if {} # ", stringify!($name)),
                ".long 0",
                ".else",
                ".long 0",
                ".endif",
            )*
            ".popsection",
            $( const Xen::is_served(number::$name) as u8, )*
            options(att_syntax),
        );
    };
}

for_each_call!(emit_entries);
