//! The reference backend in the image.
//!
//! Whoever places the image grants it a page of memory, and writes into the image how far behind the image's first byte that
//! lies. `vmi_init` looks who is there and notes its choice in the page; `get_reloc` then answers some calls with the entries
//! below. A file that nobody placed has no distance, so it never looks: it is the native image.
//!
//! Each entry takes the registers of its call's contract to a function in Rust, and keeps all that the contract does not give
//! away: EBX, ESI, EDI and EBP are C's to keep, too. The page is found by the code's own place, so every alias of the image
//! finds it at an alias of the page.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: naked routines, and memory at a distance that the image is told"
)]
#![expect(non_snake_case, reason = "the specification's names")]

use crate::granted::{DISTANCE, entries, granted};
use core::arch::{asm, global_asm, naked_asm};
use core::mem::{MaybeUninit, offset_of};
use vmi_abi::flags::LazyMode;
use vmi_abi::{CALLS_3_0, for_each_call, number};
use vmi_hv_backend::reference::interface::{BATCH_LIMIT, GRANT_SIGNATURE};
use vmi_hv_backend::reference::{Reference, cpuid};
use vmi_hv_backend::{Backend, Queue, Role, Update, detect};
use vmi_native_backend::calls as native;
/// Names for the calls that have no entry here; where there is one, its name comes first.
use vmi_native_backend::calls::*;

vmi_hv_backend::backends! {
    /// The backends besides the native one.
    enum Transport {
        Reference(Reference),
    }
}

/// What the granted page holds. Zeroes are a page in which nothing is chosen.
#[repr(C)]
struct State {
    /// Which backend is chosen; 0: none yet.
    chosen: u32,
    /// What waits for it.
    queue: Queue<{ BATCH_LIMIT as usize }>,
    /// The backend, if one is chosen.
    transport: MaybeUninit<Transport>,
}

const _: () = assert!(
    offset_of!(State, queue) + Queue::<{ BATCH_LIMIT as usize }>::FAILURES_OFFSET
        == Reference::REFUSALS as usize
);
const _: () = assert!(size_of::<State>() <= Reference::LIMIT as usize);

/// Bytes of memory that the backends of this image want, of which one will be chosen.
#[cfg(not(feature = "xen"))]
const MEMORY: u32 = Reference::MEMORY;
#[cfg(feature = "xen")]
use vmi_hv_backend::xen::MEMORY;

const _: () = assert!(MEMORY >= Reference::MEMORY);

/// The image's [`Grant`], without the distance.
pub(crate) const GRANT: [u32; 2] = [GRANT_SIGNATURE, MEMORY];

/// What [`State::chosen`] says where this backend is chosen.
const REFERENCE: u32 = 1;

/// Offset in the page of the word that says whether a backend is chosen.
pub(crate) const CHOSEN: usize = offset_of!(State, chosen);

/// `vmi_init`: EAX = 0 where the image can serve the guest, which is where native code can run. Changes ECX, EDX, flags.
///
/// # Safety
///
/// As for every call: ring 0, and flat segments. A distance that is not zero leads to the granted memory.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn vmi_init() {
    naked_asm!(
        "call {initialize}",
        "testl %eax, %eax",
        "jnz 2f",
        "call 1f",
        "1: popl %edx",
        "movl (rom_start - 1b + {distance})(%edx), %ecx",
        "jecxz 2f",
        "leal (rom_start - 1b)(%edx, %ecx), %ecx",
        "call {choose}",
        "xorl %eax, %eax",
        "2: retl",
        initialize = sym initialize,
        distance = const DISTANCE,
        choose = sym choose,
        options(att_syntax),
    )
}

/// Chooses a backend for this hypervisor, or none. Chosen once, it stays as it is, and so does what waits.
extern "fastcall" fn choose(state: *mut State) {
    // The page has to be where its physical address says, as far as a guest can tell.
    if !state.addr().is_multiple_of(Reference::MEMORY as usize) {
        return;
    }
    // SAFETY: the granted memory, zeroed at first. Nobody else uses it.
    let state = unsafe { &mut *state };
    if state.chosen != 0 {
        return;
    }
    if let Some(transport) = Transport::choose(&detect(cpuid)) {
        state.transport.write(transport);
        state.chosen = REFERENCE;
    }
}

/// The state of a backend that is chosen.
///
/// # Safety
///
/// A backend is chosen.
#[inline(always)]
unsafe fn chosen() -> (&'static Transport, &'static Queue<{ BATCH_LIMIT as usize }>) {
    let state: *const State = granted();
    // SAFETY: the state of a backend that is chosen.
    unsafe { ((*state).transport.assume_init_ref(), &(*state).queue) }
}

/// Hands an update to the queue. Interrupts are off.
#[inline(always)]
fn submit(update: Update) {
    // SAFETY: `get_reloc` gives an entry away only when a backend is chosen.
    let (transport, queue) = unsafe { chosen() };
    // Before a call of its own the compiler would find the global offset table, of which there is none.
    // SAFETY: `flush` takes no arguments, and keeps what this declares.
    queue.submit_uninterrupted(transport, update, || unsafe {
        asm!("call {}", sym flush, clobber_abi("fastcall"));
    });
}

/// Has everything that waits done, and then this, uninterrupted.
#[inline(always)]
fn flushed<R>(effect: impl FnOnce() -> R) -> R {
    // SAFETY: as above.
    let (transport, queue) = unsafe { chosen() };
    queue.flushed(transport, effect)
}

/// Defines entries of calls that are updates: before the section with interrupts off what may fault, in it what brings the
/// arguments to their places, and the function that makes an update of them.
macro_rules! updates {
    ($(
        $(#[$attribute:meta])*
        $name:ident { $($before:literal)?; $($assembly:literal),+ } $function:ident($($argument:ident),*) $update:block
    )*) => { entries! { $(
        $(#[$attribute])*
        $name { $($before,)? "pushfl", "cli", $($assembly,)+ "call {function}", "popfl", "retl" }
        $function($($argument),*) { submit($update) }
    )* } };
}

updates! {
    /// EAX value, EDX entry, ECX flags.
    ///
    /// An entry that is not mapped is a page fault of the guest's, here and not when the update's turn comes. So below.
    SetPxE { "testb %al, (%edx)"; "pushl %eax" }
    set_entry(flags, entry, value) { Update::SetPxE(value, entry, Reference::entry_flags(flags)) }

    /// EDX:EAX value, ECX entry, stack flags.
    SetPxELong { "testb %al, (%ecx)"; "pushl 8(%esp)", "pushl %eax" }
    set_long_entry(entry, high, low, flags) {
        let value = u64::from(high) << 32 | u64::from(low);
        Update::SetPxELong(value, entry, Reference::entry_flags(flags))
    }

    /// EAX entry, EDX flags.
    UpdatePxE { "testb %al, (%eax)"; "movl %eax, %ecx" }
    update_entry(entry, flags) { Update::UpdatePxE(entry, Reference::entry_flags(flags)) }

    /// EAX entry, EDX flags.
    UpdatePxELong { "testb %al, (%eax)"; "movl %eax, %ecx" }
    update_long_entry(entry, flags) { Update::UpdatePxELong(entry, Reference::entry_flags(flags)) }

    /// EAX frame, EDX flags, ECX source of a clone, on the stack where and how many: the guest has copied them.
    AllocatePage { ; "movl %eax, %ecx" }
    allocate_page(frame, flags) { Update::AllocatePage(frame, flags) }

    /// EAX frame, EDX flags.
    ReleasePage { ; "movl %eax, %ecx" }
    release_page(frame, flags) { Update::ReleasePage(frame, flags) }

    /// EAX linear address.
    InvalPage { ; "movl %eax, %ecx" }
    invalidate(address) { Update::InvalPage(address) }

    /// EAX flags.
    FlushTLB { ; "movl %eax, %ecx" }
    flush_translations(flags) { Update::FlushTLB(flags) }

    /// EAX value.
    SetCR3 { ; "movl %eax, %ecx" }
    set_cr3(value) { Update::SetCR3(value) }
}

entries! {
    /// EAX mode.
    SetLazyMode { "movl %eax, %ecx", "jmp {function}" }
    set_lazy_mode(mode) {
        // SAFETY: as above.
        let (transport, queue) = unsafe { chosen() };
        let Transport::Reference(reference) = transport;
        queue.set_lazy_mode(transport, reference.lazy_mode(LazyMode(mode)));
    }

    /// EAX value.
    SetCR0 { "movl %eax, %ecx", "jmp {function}" }
    set_cr0(value) {
        // SAFETY: the guest's own value for its own register.
        flushed(|| unsafe { asm!("movl {}, %cr0", in(reg) value, options(att_syntax)) });
    }

    /// EAX value.
    SetCR4 { "movl %eax, %ecx", "jmp {function}" }
    set_cr4(value) {
        // SAFETY: as above.
        flushed(|| unsafe { asm!("movl {}, %cr4", in(reg) value, options(att_syntax)) });
    }

    /// Does not return: what cannot be masked (an NMI) finds the processor halted again.
    Shutdown { "call {function}", "cli", "2: hlt", "jmp 2b" }
    before_shutdown() {
        flushed(|| ());
    }

    /// -> EAX.
    GetCR2 { "jmp {function}" }
    get_cr2() -> u32 {
        flushed(|| {
            let value;
            // SAFETY: reading the register changes nothing.
            unsafe { asm!("movl %cr2, {}", out(reg) value, options(att_syntax)) };
            value
        })
    }

    /// -> EAX.
    GetCR3 { "jmp {function}" }
    get_cr3() -> u32 {
        flushed(|| {
            let value;
            // SAFETY: as above.
            unsafe { asm!("movl %cr3, {}", out(reg) value, options(att_syntax)) };
            value
        })
    }
}

/// Defines entries after which the native call goes on, with the registers of its contract.
macro_rules! endings {
    ($($name:ident)*) => { $(
        /// Hands over what waits, and goes on as the native call.
        ///
        /// # Safety
        ///
        /// As for every call, and a backend is chosen.
        #[unsafe(naked)]
        unsafe extern "C" fn $name() {
            naked_asm!(
                "pushl %eax",
                "call {flush}",
                "popl %eax",
                "jmp {native}",
                flush = sym flush,
                native = sym native::$name,
                options(att_syntax),
            )
        }
    )* };
}

endings! { Halt Reboot }

extern "fastcall" fn flush() {
    flushed(|| ());
}

/// What is no update goes through [`flushed`], as [`Role`] says it has to.
const _: () = {
    let mut i = 0;
    while i < Reference::SERVED.len() {
        let call = &CALLS_3_0[Reference::SERVED[i].0 as usize];
        assert!(matches!(Role::of(call), Role::Update | Role::Flush));
        i += 1;
    }
};

/// Emits, for each call, the distance from its own place to the call's entry; 0 where the native answer holds.
macro_rules! emit_entries {
    (
        revision_3_0 { $( #[doc = $summary:literal] $name:ident = $number:literal => $contract:expr )* }
        only_13 { $($old:tt)* }
    ) => {
        global_asm!(
            ".pushsection .rom.table, \"ax\", @progbits",
            ".balign 4",
            ".globl entries",
            ".hidden entries",
            "entries:",
            $(
                concat!(".if {} # ", stringify!($name)),
                ".long {} - .",
                ".else",
                ".long 0",
                ".endif",
            )*
            ".popsection",
            $( const Reference::is_served(number::$name) as u8, sym $name, )*
            options(att_syntax),
        );
    };
}

for_each_call!(emit_entries);
