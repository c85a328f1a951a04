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

use crate::granted::{DISTANCE, emit_entries, entries, granted};
use core::arch::{asm, naked_asm};
use core::mem::{MaybeUninit, offset_of};
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use vmi_abi::flags::{EntryFlags, LazyMode};
use vmi_abi::{CALLS_3_0, CallNumber, for_each_call, number};
use vmi_hv_backend::reference::interface::{BATCH_LIMIT, GRANT_SIGNATURE, PHYSICAL};
use vmi_hv_backend::reference::{Reference, cpuid};
use vmi_hv_backend::{Backend, CHANGED, LinearMapping, Queue, Role, Update, detect};
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

/// What is at hand once a backend is chosen.
struct Chosen {
    transport: &'static Transport,
    queue: &'static Queue<{ BATCH_LIMIT as usize }>,
}

/// The state of a backend that is chosen.
///
/// # Safety
///
/// A backend is chosen.
#[inline(always)]
unsafe fn chosen() -> Chosen {
    let state: *const State = granted();
    // SAFETY: the state of a backend that is chosen.
    unsafe { Chosen { transport: (*state).transport.assume_init_ref(), queue: &(*state).queue } }
}

impl Chosen {
    /// Hands an update to the queue. Interrupts are off.
    #[inline(always)]
    fn submit(&self, update: Update) {
        // Before a call of its own the compiler would find the global offset table, of which there is none.
        // SAFETY: `flush` takes no arguments, and keeps what this declares.
        self.queue.submit_uninterrupted(self.transport, update, || unsafe {
            asm!("call {}", sym flush, clobber_abi("fastcall"));
        });
    }
}

/// Hands an update to the queue. Interrupts are off.
#[inline(always)]
fn submit(update: Update) {
    // SAFETY: `get_reloc` gives an entry away only when a backend is chosen.
    unsafe { chosen() }.submit(update);
}

/// Tells of a change of an entry. What may be told late is stored here, and else by the hypervisor. Interrupts are off.
///
/// `told`: the call that tells of one; `store`: stores the entry, and says what the queue notes, what became of the entry, and flags.
#[inline(always)]
fn change(update: Update, told: CallNumber, store: impl FnOnce() -> [u32; 3]) {
    // SAFETY: as in `submit`.
    let chosen = unsafe { chosen() };
    let Update { address, flags, .. } = update;
    if let Some(address) = chosen.queue.physical(address) {
        let [low, became, flags] = store();
        let update = Update { call: told, address, low, high: flags, flags: PHYSICAL };
        // SAFETY: as in `Chosen::submit`.
        let settle = || unsafe { asm!("call {}", sym settle, clobber_abi("fastcall")) };
        // SAFETY: as above.
        let flush = || unsafe { asm!("call {}", sym flush, clobber_abi("fastcall")) };
        chosen.queue.submit_late(chosen.transport, update, became, settle, flush);
    } else {
        chosen.submit(Update { flags: Reference::entry_flags(flags), ..update });
    }
}

/// Has everything that waits done, and then this, uninterrupted.
#[inline(always)]
fn flushed<R>(effect: impl FnOnce() -> R) -> R {
    // SAFETY: as above.
    let Chosen { transport, queue, .. } = unsafe { chosen() };
    queue.flushed(transport, effect)
}

/// Defines entries of calls that are updates: before the section with interrupts off what may fault, in it what brings the
/// arguments to their places, and the function that makes an update of them and submits it.
macro_rules! updates {
    ($(
        $(#[$attribute:meta])*
        $name:ident { $($before:literal)?; $($assembly:literal),+ } $function:ident($($argument:ident),*) $body:block
    )*) => { entries! { $(
        $(#[$attribute])*
        $name { $($before,)? "pushfl", "cli", $($assembly,)+ "call {function}", "popfl", "retl" }
        $function($($argument),*) $body
    )* } };
}

updates! {
    /// EAX value, EDX entry, ECX flags.
    ///
    /// An entry that is not mapped is a page fault of the guest's, here and not when the update's turn comes. So below.
    SetPxE { "testb %al, (%edx)"; "pushl %eax" }
    set_entry(flags, entry, value) {
        change(Update::SetPxE(value, entry, flags), number::UpdatePxE, || {
            // SAFETY: what the guest asks for. Nobody walks its tables now.
            unsafe { store(entry, value) };
            [value, value, flags]
        });
    }

    /// EDX:EAX value, ECX entry, stack flags.
    SetPxELong { "testb %al, (%ecx)"; "pushl 8(%esp)", "pushl %eax" }
    set_long_entry(entry, high, low, flags) {
        let value = u64::from(high) << 32 | u64::from(low);
        change(Update::SetPxELong(value, entry, flags), number::UpdatePxELong, || {
            // SAFETY: as above. The higher halves differ where NX does, or one is empty; else there is but one half to store.
            unsafe {
                if load(entry + 4) == high { store(entry, low) } else { store_long(entry, low, high) }
            }
            [low, low, flags]
        });
    }

    /// EAX entry, EDX flags.
    UpdatePxE { "testb %al, (%eax)"; "movl %eax, %ecx" }
    update_entry(entry, flags) {
        change(Update::UpdatePxE(entry, flags), number::UpdatePxE, || stored(entry, flags));
    }

    /// EAX entry, EDX flags.
    UpdatePxELong { "testb %al, (%eax)"; "movl %eax, %ecx" }
    update_long_entry(entry, flags) {
        change(Update::UpdatePxELong(entry, flags), number::UpdatePxELong, || stored(entry, flags));
    }

    /// EAX frame, EDX flags, ECX source of a clone, on the stack where and how many: the guest has copied them.
    AllocatePage { ; "movl %eax, %ecx" }
    allocate_page(frame, flags) { submit(Update::AllocatePage(frame, flags)) }

    /// EAX frame, EDX flags.
    ReleasePage { ; "movl %eax, %ecx" }
    release_page(frame, flags) { submit(Update::ReleasePage(frame, flags)) }

    /// EAX linear address.
    InvalPage { ; "movl %eax, %ecx" }
    invalidate(address) { submit(Update::InvalPage(address)) }

    /// EAX flags.
    FlushTLB { ; "movl %eax, %ecx" }
    flush_translations(flags) { submit(Update::FlushTLB(flags)) }

    /// EAX value.
    SetCR3 { ; "movl %eax, %ecx" }
    set_cr3(value) { submit(Update::SetCR3(value)) }
}

entries! {
    /// EAX mode.
    SetLazyMode { "movl %eax, %ecx", "jmp {function}" }
    set_lazy_mode(mode) {
        // SAFETY: as above.
        let Chosen { transport, queue, .. } = unsafe { chosen() };
        let Transport::Reference(reference) = transport;
        queue.set_lazy_mode(transport, reference.lazy_mode(LazyMode(mode)));
    }

    /// EAX slot, EDX linear address, ECX pages, on the stack the first page's frame.
    SetLinearMapping { "pushl 4(%esp)", "pushl %ecx", "movl %eax, %ecx", "call {function}", "retl" }
    set_linear_mapping(slot, linear, pages, frame) {
        // SAFETY: as above.
        let Chosen { transport, queue } = unsafe { chosen() };
        let Transport::Reference(reference) = transport;
        // Told late, nothing waits by its linear address. Kernels with page tables in high memory map each by another slot.
        if slot != 0 && queue.is_late() {
            return;
        }
        queue.flushed(transport, || {
            if slot == 0 && reference.may_be_late() {
                // A guest that names nothing promises nothing, or not any more.
                if pages == 0 {
                    queue.tell_promptly();
                    reference.be_loud();
                } else {
                    let memory = LinearMapping::of_pages(linear, pages, frame);
                    queue.tell_late(reference.be_quiet(queue.shown()), memory);
                }
            }
        });
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
        // SAFETY: as above.
        let Chosen { transport, queue, .. } = unsafe { chosen() };
        let Transport::Reference(reference) = transport;
        let value;
        // SAFETY: reading the register changes nothing.
        unsafe { asm!("movl %cr2, {}", out(reg) value, options(att_syntax)) };
        queue.fault(transport, value, || reference.reconsider(value));
        value
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

/// What is said of an entry that the guest stored. DEFER lets it wait. With CURRENT_AS kernels tell of entries that they changed and that
/// were present before, which therefore is no hurry; without it one may have become present.
#[inline(always)]
fn stored(entry: u32, flags: u32) -> [u32; 3] {
    const PRESENT: u32 = 1;
    let has = |flag: EntryFlags| flags & flag.bits() != 0;
    // SAFETY: the entry of a call has touched it.
    let value = unsafe { load(entry) };
    let came = if has(EntryFlags::CURRENT_AS) { 0 } else { value & PRESENT };
    [CHANGED | came, if has(EntryFlags::DEFER) { 0 } else { value }, 0]
}

/// Reads half of an entry.
///
/// # Safety
///
/// It is mapped.
#[inline(always)]
unsafe fn load(place: u32) -> u32 {
    // SAFETY: the caller's.
    unsafe { with_exposed_provenance::<u32>(place as usize).read_volatile() }
}

/// Stores half of an entry.
///
/// # Safety
///
/// It is mapped, and the value is what is to be there.
#[inline(always)]
unsafe fn store(place: u32, value: u32) {
    // SAFETY: the caller's.
    unsafe { with_exposed_provenance_mut::<u32>(place as usize).write_volatile(value) };
}

/// Stores an entry of 64 bits in one piece: an interrupt that cannot be masked sees the old one or the new one.
///
/// # Safety
///
/// As for [`store`].
#[inline(always)]
unsafe fn store_long(place: u32, low: u32, high: u32) {
    // SAFETY: the caller's. EBX is put back.
    unsafe {
        asm!(
            "pushl %ebx",
            "movl %eax, %ebx",
            "movl (%edi), %eax",
            "movl 4(%edi), %edx",
            "2: cmpxchg8b (%edi)",
            "jne 2b",
            "popl %ebx",
            inout("eax") low => _,
            out("edx") _,
            in("ecx") high,
            in("edi") place,
            options(att_syntax),
        );
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

extern "fastcall" fn settle() {
    // SAFETY: as above.
    let Chosen { transport, queue, .. } = unsafe { chosen() };
    queue.settle(transport);
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

/// Where the code of a call begins, if it has an entry here. Elsewhere the native answer holds.
const fn row(number: CallNumber) -> i32 {
    if Reference::is_served(number) { 0 } else { -1 }
}

macro_rules! table {
    () => {
        "entries"
    };
}

for_each_call!(emit_entries);
