//! What a kernel does to page tables, each step through the ROM's call where the ROM has one, and else by
//! the kernel's own instructions.
//!
//! With a ROM the calls are made where Linux 2.6 makes them, with its flags; without one the stores are
//! those of its native code: an entry of 64 bits is two of them, the half with the present bit last.

#![expect(unsafe_code, reason = "UNSAFETY: page tables are memory that the processor walks")]

use crate::boot::PAGE_OFFSET;
use crate::checks::own_code;
use crate::paging::{Mode, PAGE, Space, WRITE};
use crate::rom::Rom;
use crate::segments::{GDT, TASK_STATE};
use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};
use vmi_abi::flags::{EntryFlags, FlushFlags, LazyMode, PageFlags};
use vmi_abi::vmi::{Calls, Unusable};
use vmi_abi::{CallNumber, RelocationType, number};

static CALLS: Calls = Calls::new();

/// What CR3 holds.
static CURRENT: AtomicU32 = AtomicU32::new(0);

/// Entries that were changed since the count was last taken.
static CHANGED: AtomicU32 = AtomicU32::new(0);

/// Entries that were changed since the last time that this was asked.
pub(super) fn take_changed() -> u32 {
    CHANGED.swap(0, Ordering::Relaxed)
}

/// The kernel, bound to a ROM.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub(super) mode: Mode,
    /// The ROM has a call for storing entries.
    stores_by_call: bool,
}

impl Kernel {
    /// Binds the calls.
    pub(super) fn bind(mode: Mode, rom: Rom) -> Result<Self, Unusable> {
        let initialized = rom.initialize();
        if initialized.trap.is_some() || initialized.after.registers.eax != 0 {
            return Err(Unusable::Initialization(initialized.after.registers.eax));
        }
        let relocation = |number: CallNumber| rom.answer(number.0);
        // SAFETY: the ROM's word for its code, and the native calls keep the same contracts. Nobody
        // makes calls now, and none is made before the ROM is bound for the mode that is current.
        unsafe { CALLS.bind(relocation, own_code) }?;
        let store = if mode == Mode::Pae { number::SetPxELong } else { number::SetPxE };
        let kernel = Self { mode, stores_by_call: relocation(store).kind != RelocationType::NONE };
        if CALLS.is_bound(number::SetLinearMapping) {
            const DIRECT_PAGES: u32 = (16 << 20) / PAGE;
            // The tables of the kernel's own space were there before the ROM, and are never announced: so it is with Linux.
            // SAFETY: physical memory from 0 is mapped there for good.
            unsafe { CALLS.SetLinearMapping(0, PAGE_OFFSET, DIRECT_PAGES, 0) };
        }
        Ok(kernel)
    }

    /// Stores an entry.
    pub(super) fn set(self, entry: u32, value: u64, flags: u32) {
        CHANGED.fetch_add(1, Ordering::Relaxed);
        let (low, high) = (value as u32, (value >> 32) as u32);
        // SAFETY: the entry is one of a table of this module's callers; what the processor makes of
        // it is their intention.
        unsafe {
            match (self.mode, self.stores_by_call) {
                (Mode::NonPae, true) => CALLS.SetPxE(low, entry, flags),
                (Mode::Pae, true) => CALLS.SetPxELong(value, entry, flags),
                (Mode::NonPae, false) => store(entry, low),
                (Mode::Pae, false) if value == 0 => {
                    store(entry, 0);
                    store(entry + 4, 0);
                }
                (Mode::Pae, false) => {
                    store(entry + 4, high);
                    store(entry, low);
                }
            }
        }
    }

    /// Empties an entry that the processor may be setting bits in, and tells so: its old value.
    pub(super) fn get_and_clear(self, entry: u32, flags: u32) -> u64 {
        CHANGED.fetch_add(1, Ordering::Relaxed);
        let mut low = 0_u32;
        // SAFETY: as for `set`; the half with the present bit goes first.
        let high = unsafe {
            asm!("xchg [{}], {}", in(reg) entry, inout(reg) low, options(nostack, preserves_flags));
            match self.mode {
                Mode::NonPae => 0,
                Mode::Pae => {
                    let high = ((entry + 4) as *const u32).read_volatile();
                    store(entry + 4, 0);
                    high
                }
            }
        };
        self.tell(entry, flags);
        u64::from(high) << 32 | u64::from(low)
    }

    /// Makes an entry read-only that the processor may be setting bits in, and tells so.
    pub(super) fn write_protect(self, entry: u32, flags: u32) {
        const WRITE_BIT: u32 = WRITE.trailing_zeros();
        CHANGED.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as for `set`.
        unsafe {
            asm!("lock btr dword ptr [{}], {bit}", in(reg) entry, bit = const WRITE_BIT, options(nostack))
        };
        self.tell(entry, flags);
    }

    /// Stores an entry that only becomes more permissive, by the kernel's own hand, and tells so.
    pub(super) fn relax(self, entry: u32, value: u64, flags: u32) {
        CHANGED.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as for `set`.
        unsafe {
            store(entry, value as u32);
            if self.mode == Mode::Pae {
                store(entry + 4, (value >> 32) as u32);
            }
        }
        self.tell(entry, flags | EntryFlags::DEFER.bits());
    }

    /// Empties an entry of a space that nobody will enter again. Nobody is told.
    pub(super) fn drop_entry(self, entry: u32) {
        CHANGED.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as for `set`.
        unsafe {
            store(entry, 0);
            if self.mode == Mode::Pae {
                store(entry + 4, 0);
            }
        }
    }

    /// Tells that an entry was written.
    fn tell(self, entry: u32, flags: u32) {
        // SAFETY: the entry is one of a table.
        unsafe {
            match self.mode {
                Mode::NonPae if CALLS.is_bound(number::UpdatePxE) => CALLS.UpdatePxE(entry, flags),
                Mode::Pae if CALLS.is_bound(number::UpdatePxELong) => {
                    CALLS.UpdatePxELong(entry, flags)
                }
                _ => {}
            }
        }
    }

    /// Tells that a page becomes a table.
    pub(super) fn announce(self, table: u32, level: PageFlags) {
        if CALLS.is_bound(number::AllocatePage) {
            // SAFETY: the frame is a table of the caller's.
            unsafe { CALLS.AllocatePage(table / PAGE, self.page_flags(level), 0, 0, 0) };
        }
    }

    /// Tells that a page becomes a directory with some entries of another one.
    pub(super) fn announce_clone(self, directory: u32, source: u32, start: u32, count: u32) {
        if CALLS.is_bound(number::AllocatePage) {
            let flags = self.page_flags(PageFlags::PD | PageFlags::CLONE);
            // SAFETY: as above.
            unsafe { CALLS.AllocatePage(directory / PAGE, flags, source / PAGE, start, count) };
        }
    }

    /// Tells that a page is a table no longer.
    pub(super) fn release(self, table: u32, level: PageFlags) {
        if CALLS.is_bound(number::ReleasePage) {
            // SAFETY: nothing leads to the table any more.
            unsafe { CALLS.ReleasePage(table / PAGE, self.page_flags(level)) };
        }
    }

    fn page_flags(self, level: PageFlags) -> u32 {
        let pae = if self.mode == Mode::Pae { PageFlags::PAE } else { PageFlags::empty() };
        (level | pae).bits()
    }

    /// Does something with page-table updates delayed.
    pub(super) fn lazily<T>(self, mode: LazyMode, work: impl FnOnce() -> T) -> T {
        // SAFETY: no lazy mode is active, and none is entered inside.
        unsafe { CALLS.SetLazyMode(mode.0) };
        let result = work();
        // SAFETY: as above.
        unsafe { CALLS.SetLazyMode(LazyMode::OFF.0) };
        result
    }

    /// Drops all translations that are not global.
    pub(super) fn flush(self) {
        // SAFETY: costs table walks, nothing else.
        unsafe { CALLS.FlushTLB(FlushFlags::TLB.bits()) };
    }

    /// Drops the translation of one page.
    pub(super) fn flush_page(self, linear: u32) {
        // SAFETY: as above.
        unsafe { CALLS.InvalPage(linear) };
    }

    /// The address of the last page fault, as a handler of page faults asks for it.
    pub(super) fn fault_address() -> u32 {
        CALLS.GetCR2()
    }

    /// Goes into a space.
    pub(super) fn enter(self, space: Space) {
        CURRENT.store(space.cr3(), Ordering::Relaxed);
        // SAFETY: every space has the kernel's half.
        unsafe { CALLS.SetCR3(space.cr3()) };
    }

    /// Whether the processor is in a space: a kernel knows, and does not ask the processor.
    pub(super) fn is_current(self, space: Space) -> bool {
        CURRENT.load(Ordering::Relaxed) == space.cr3()
    }

    /// Sets the stack for entries from ring 3.
    pub(super) fn set_kernel_stack(self, esp0: u32) {
        // SAFETY: the task state that the task register names, and a stack of the kernel's.
        unsafe { CALLS.UpdateKernelStack((&raw mut TASK_STATE) as u32, esp0) };
    }

    /// Stores a descriptor of thread-local storage.
    pub(super) fn set_descriptor(self, index: u32, descriptor: u64) {
        let (low, high) = (descriptor as u32, (descriptor >> 32) as u32);
        // SAFETY: an entry of the current table that no segment register names.
        unsafe { CALLS.WriteGDTEntry((&raw mut GDT) as u32, index, low, high) };
    }

    /// Sets CR0.TS, if it is not set.
    pub(super) fn set_task_switched(self) {
        let cr0 = CALLS.GetCR0();
        // SAFETY: the guest uses no floating-point register.
        unsafe { CALLS.SetCR0(cr0 | TASK_SWITCHED) };
    }

    /// Clears CR0.TS.
    pub(super) fn clear_task_switched(self) {
        CALLS.CLTS();
    }
}

/// CR0.TS.
pub(super) const TASK_SWITCHED: u32 = 1 << 3;

/// Stores half an entry, or all of a short one.
///
/// # Safety
///
/// The word is one of a table of the caller's.
unsafe fn store(entry: u32, value: u32) {
    // SAFETY: by the caller's word. Written as an instruction: what a hypervisor without VMI has to emulate is
    // the kernel's affair, and not the compiler's.
    unsafe {
        asm!("mov [{}], {}", in(reg) entry, in(reg) value, options(nostack, preserves_flags))
    };
}
