//! Page tables, with 32-bit entries and with 64-bit ones (PAE).
//!
//! | linear            | what                                                              |
//! |-------------------|-------------------------------------------------------------------|
//! | 00008000          | a page for virtual-8086 code                                      |
//! | 08048000          | ring 3: a page of code, a page of stack                           |
//! | C0000000, 16 MiB  | physical memory from 0, the ROM area read-only                    |
//! | D0000000          | pages that tests map and unmap                                    |
//! | E0000000, 256 KiB | physical C0000h to FFFFFh once more, read-only: a second alias    |
//!
//! As in Linux the identity mapping is gone once the kernel runs. Under PAE nothing but code is
//! executable, where the processor knows NX.

#![expect(unsafe_code, reason = "UNSAFETY: page tables are memory that the processor walks")]

use crate::boot::PAGE_OFFSET;
use crate::host::{self, CALLS};
use crate::processor;
use core::arch::naked_asm;
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};
use vmi_abi::flags::{EntryFlags, PageFlags};
use x86::controlregs::{Cr0, Cr4};

/// Bytes of a page.
pub(crate) const PAGE: u32 = 4096;

/// Physical memory that is mapped at [`PAGE_OFFSET`].
const DIRECT: u32 = 16 << 20;

/// The option-ROM area.
pub(crate) const ROM_AREA: Range<u32> = 0xc_0000..0x10_0000;

/// Where the firmware keeps its tables, up to the end of [`ROM_AREA`].
pub(crate) const FIRMWARE: u32 = 0xf_0000;

/// The second alias of [`ROM_AREA`].
pub(crate) const ALIAS: u32 = 0xe000_0000;

/// Pages that tests map and unmap.
pub(crate) const TEST_AREA: u32 = 0xd000_0000;

/// Code for virtual-8086 mode, at the same physical address.
pub(crate) const VIRTUAL_8086: u32 = 0x8000;

/// Ring 3's code.
pub(crate) const USER_CODE: u32 = 0x0804_8000;

/// Ring 3's stack grows down from here; never quite empty.
pub(crate) const USER_STACK_TOP: u32 = USER_CODE + 2 * PAGE - 64;

/// Bits of an entry.
pub(crate) const PRESENT: u64 = 1 << 0;
pub(crate) const WRITE: u64 = 1 << 1;
pub(crate) const USER: u64 = 1 << 2;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
pub(crate) const GLOBAL: u64 = 1 << 8;
pub(crate) const NO_EXECUTE: u64 = 1 << 63;

/// The frame's address in an entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// The format of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Two levels of 32-bit entries.
    NonPae,
    /// Three levels of 64-bit entries.
    Pae,
}

impl Mode {
    /// The name in reports.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::NonPae => "non-PAE",
            Self::Pae => "PAE",
        }
    }

    /// Bytes of an entry.
    pub(crate) const fn entry_size(self) -> u32 {
        match self {
            Self::NonPae => 4,
            Self::Pae => 8,
        }
    }

    /// Bits of a linear address that one table of the lowest level resolves, the page's included.
    const fn table_shift(self) -> u32 {
        match self {
            Self::NonPae => 22,
            Self::Pae => 21,
        }
    }

    /// Bytes that one table of the lowest level maps.
    pub(crate) const fn table_span(self) -> u32 {
        1 << self.table_shift()
    }
}

/// A page of memory for tables, code or data.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
pub(crate) struct Frame([u8; PAGE as usize]);

const POOL: usize = 40;

static mut TABLES: [Frame; POOL] = [Frame([0; PAGE as usize]); POOL];
static TABLES_USED: AtomicUsize = AtomicUsize::new(0);

pub(crate) static mut USER_CODE_FRAME: Frame = Frame([0; PAGE as usize]);
static mut USER_STACK_FRAME: Frame = Frame([0; PAGE as usize]);

static mut OTHER_ROOT: Frame = Frame([0; PAGE as usize]);

/// The directory of the highest gigabyte for it, on a host that lets no two top levels share that.
static mut OTHER_DIRECTORY: Frame = Frame([0; PAGE as usize]);

/// Two frames for tests to map.
pub(crate) static mut TEST_FRAMES: [Frame; 2] = [Frame([0; PAGE as usize]); 2];

/// Tables for tests to fill.
pub(crate) static mut TEST_TABLES: [Frame; 2] = [Frame([0; PAGE as usize]); 2];

/// Call sites: written and executed. Two pages, for sites that lie in both.
pub(crate) static mut SITE_FRAMES: [Frame; 2] = [Frame([0; PAGE as usize]); 2];

/// A copy of the ROM: read-only, executable.
pub(crate) static mut ROM_COPY: [Frame; ROM_COPY_SIZE / PAGE as usize] =
    [Frame([0; PAGE as usize]); ROM_COPY_SIZE / PAGE as usize];

/// Bytes of the longest ROM: its length byte allows no more.
pub(crate) const ROM_COPY_SIZE: usize = 128 * 1024;

unsafe extern "C" {
    static text_start: u8;
    static text_end: u8;
}

/// The guest's code, linear.
fn text() -> Range<u32> {
    (&raw const text_start) as u32..(&raw const text_end) as u32
}

/// The physical address of something in the guest's image.
pub(crate) fn physical<T>(object: *const T) -> u32 {
    object as u32 - PAGE_OFFSET
}

/// Whether the processor has PAE.
pub(crate) fn has_pae() -> bool {
    processor::cpuid(1, 0)[3] & 1 << 6 != 0
}

/// Whether the processor has NX.
pub(crate) fn has_no_execute() -> bool {
    processor::cpuid(0x8000_0000, 0)[0] >= 0x8000_0001
        && processor::cpuid(0x8000_0001, 0)[3] & 1 << 20 != 0
}

/// Whether the processor has global pages.
pub(crate) fn has_global_pages() -> bool {
    processor::cpuid(1, 0)[3] & 1 << 13 != 0
}

/// The firmware's tables.
pub(crate) fn firmware() -> &'static [u8] {
    let start = (PAGE_OFFSET + FIRMWARE) as *const u8;
    // SAFETY: mapped, read-only, and written by nobody.
    unsafe { core::slice::from_raw_parts(start, (ROM_AREA.end - FIRMWARE) as usize) }
}

/// A set of page tables.
#[derive(Clone, Copy)]
pub(crate) struct Space {
    pub(crate) mode: Mode,
    /// Linear address of the top level.
    root: u32,
}

impl Space {
    /// The space that a kernel of this mode runs in.
    pub(crate) fn new(mode: Mode) -> Self {
        // The processor still runs on the other mode's tables while this mode's are built: each has
        // a half of the pool, and a mode's earlier space is dead when its half is used again.
        TABLES_USED.store(if mode == Mode::NonPae { 0 } else { POOL / 2 }, Ordering::Relaxed);
        let root = take_table();
        let space = Self { mode, root };
        if mode == Mode::Pae {
            // The four entries of the top level hold nothing but the present bit.
            for index in 0..4 {
                space.store(root + index * 8, u64::from(take_table() - PAGE_OFFSET) | PRESENT);
            }
        }
        let global = if has_global_pages() { GLOBAL } else { 0 };
        for address in (0..DIRECT).step_by(PAGE as usize) {
            let linear = PAGE_OFFSET + address;
            let in_rom = ROM_AREA.contains(&address);
            let executable = in_rom
                || text().contains(&linear)
                || is_in(&raw const SITE_FRAMES, linear)
                || is_in(&raw const ROM_COPY, linear);
            let writable =
                !(in_rom || text().contains(&linear) || is_in(&raw const ROM_COPY, linear));
            space.map(
                linear,
                address,
                global | if writable { WRITE } else { 0 } | if executable { 0 } else { NO_EXECUTE },
            );
        }
        for address in ROM_AREA.step_by(PAGE as usize) {
            space.map(ALIAS + address - ROM_AREA.start, address, 0);
        }
        space.map(VIRTUAL_8086, VIRTUAL_8086, WRITE | USER);
        space.map_own();
        space
    }

    /// Has the ROM area mapped for stores too, with all other memory, as kernels have it. The stores go nowhere.
    pub(crate) fn open_rom_area(self) {
        for address in ROM_AREA.step_by(PAGE as usize) {
            let entry = self.entry(PAGE_OFFSET + address);
            self.store(entry, self.load(entry) | WRITE | DIRTY);
        }
    }

    /// The space that a host has made, with the guest's own mappings besides. It has no 4 KiB of memory that nobody executes, for
    /// the host's tables know nothing of that.
    pub(crate) fn adopt() -> Self {
        let space = Self::current(Mode::Pae);
        for linear in text().step_by(PAGE as usize) {
            space.store(space.entry(linear), space.make(physical(linear as *const u8), 0));
        }
        space.map_own();
        space
    }

    /// Maps what each space has: code and stack of a process, and a table for the pages that tests map.
    fn map_own(self) {
        self.map(USER_CODE, physical(&raw const USER_CODE_FRAME), USER);
        self.map(
            USER_CODE + PAGE,
            physical(&raw const USER_STACK_FRAME),
            WRITE | USER | NO_EXECUTE,
        );
        self.map(TEST_AREA, 0, 0);
        self.store(self.entry(TEST_AREA), 0);
    }

    /// The space that the processor is in.
    pub(crate) fn current(mode: Mode) -> Self {
        Self { mode, root: processor::cr3() + PAGE_OFFSET }
    }

    /// The space whose top level is at a physical address in the direct mapping.
    pub(crate) fn at(mode: Mode, root: u32) -> Self {
        Self { mode, root: root + PAGE_OFFSET }
    }

    /// Linear address of an entry of the top level.
    pub(crate) fn top_entry(self, index: u32) -> u32 {
        self.root + index * self.mode.entry_size()
    }

    /// Maps a page, and makes the table for it where there is none. Accessed and dirty bits are set, as kernels do with their own pages.
    fn map(self, linear: u32, address: u32, bits: u64) {
        let directory_entry = self.directory_entry(linear);
        if self.load(directory_entry) & PRESENT == 0 {
            let table = take_table() - PAGE_OFFSET;
            if host::is_hosted() {
                let flags = PageFlags::PT | PageFlags::PAE | PageFlags::ZEROED;
                host::announce_page(table / PAGE, flags.bits());
            }
            let bits = PRESENT | WRITE | USER | ACCESSED;
            self.store(directory_entry, u64::from(table) | bits);
        }
        let used = ACCESSED | if bits & WRITE != 0 { DIRTY } else { 0 };
        self.store(self.entry(linear), self.make(address, bits | used));
    }

    /// Maps a page of memory that nobody executes.
    pub(crate) fn map_writable(self, linear: u32, address: u32) {
        self.map(linear, address, WRITE | NO_EXECUTE);
        processor::invlpg(linear);
    }

    /// A present entry for a frame, as far as this mode and processor know the bits.
    pub(crate) fn make(self, address: u32, bits: u64) -> u64 {
        let known = match self.mode {
            Mode::Pae if has_no_execute() => bits,
            _ => bits & !NO_EXECUTE,
        };
        u64::from(address) | known | PRESENT
    }

    /// Linear address of the entry that leads to a page's table.
    pub(crate) fn directory_entry(self, linear: u32) -> u32 {
        match self.mode {
            Mode::NonPae => self.root + (linear >> 22) * 4,
            Mode::Pae => {
                let directory = self.load(self.root + (linear >> 30) * 8) as u32 & !(PAGE - 1);
                PAGE_OFFSET + directory + (linear >> 21 & 0x1ff) * 8
            }
        }
    }

    /// Linear address of the entry that maps a page.
    pub(crate) fn entry(self, linear: u32) -> u32 {
        let table = self.load(self.directory_entry(linear)) as u32 & !(PAGE - 1);
        let index = (linear & (self.mode.table_span() - 1)) / PAGE;
        PAGE_OFFSET + table + index * self.mode.entry_size()
    }

    /// Reads an entry of a table that is in use.
    pub(crate) fn load(self, entry: u32) -> u64 {
        let value = self.read(entry);
        if !host::is_hosted() || value & PRESENT == 0 {
            return value;
        }
        let frame = (value & FRAME) / u64::from(PAGE);
        // SAFETY: changes nothing.
        let frame = unsafe { CALLS.MachineToPhysical(frame as u32) };
        (value & !FRAME) | (u64::from(frame) * u64::from(PAGE))
    }

    /// The machine frame that a page is mapped to.
    pub(crate) fn machine_frame(self, linear: u32) -> u32 {
        ((self.read(self.entry(linear)) & FRAME) / u64::from(PAGE)) as u32
    }

    /// An entry as it is read from a table that is in use.
    pub(crate) fn in_use(self, value: u64) -> u64 {
        if !host::is_hosted() || value & PRESENT == 0 {
            return value;
        }
        // SAFETY: changes nothing.
        let frame = unsafe { CALLS.PhysicalToMachine(((value & FRAME) / u64::from(PAGE)) as u32) };
        (value & !FRAME) | (u64::from(frame) * u64::from(PAGE))
    }

    fn read(self, entry: u32) -> u64 {
        // SAFETY: the tables lie in the direct mapping; volatile, as the processor sets bits.
        unsafe {
            match self.mode {
                Mode::NonPae => u64::from((entry as *const u32).read_volatile()),
                Mode::Pae => (entry as *const u64).read_volatile(),
            }
        }
    }

    /// Writes an entry whose mapping nobody uses meanwhile.
    pub(crate) fn store(self, entry: u32, value: u64) {
        if host::is_hosted() {
            // SAFETY: as below.
            return unsafe { CALLS.SetPxELong(value, entry, EntryFlags::PT.bits()) };
        }
        // SAFETY: the tables lie in the direct mapping; callers leave the guest's own pages alone.
        unsafe {
            match self.mode {
                Mode::NonPae => (entry as *mut u32).write_volatile(value as u32),
                Mode::Pae => (entry as *mut u64).write_volatile(value),
            }
        }
    }

    /// What CR3 holds for this space.
    pub(crate) fn cr3(self) -> u32 {
        self.root - PAGE_OFFSET
    }

    /// Physical address of a second top level with the same tables below.
    pub(crate) fn other_root(self, virtual_top: u32) -> u32 {
        if host::is_hosted() {
            return self.other_root_on_a_host(virtual_top);
        }
        let root = (&raw mut OTHER_ROOT) as u32;
        let entries = if self.mode == Mode::Pae { 4 } else { PAGE / 4 };
        for index in 0..entries {
            let offset = index * self.mode.entry_size();
            self.store(root + offset, self.load(self.root + offset));
        }
        root - PAGE_OFFSET
    }

    /// The same where pages are announced before they are tables, and what is from `virtual_top` on is the host's.
    fn other_root_on_a_host(self, virtual_top: u32) -> u32 {
        const HIGHEST: u32 = 3;
        let (root, directory) = (&raw mut OTHER_ROOT, &raw mut OTHER_DIRECTORY);
        let fill = |table: *mut Frame, index: u32, value: u64| {
            // SAFETY: a page of ordinary memory still.
            unsafe { table.cast::<u64>().add(index as usize).write_volatile(value) };
        };
        let own = self.directory_entry(PAGE_OFFSET);
        for index in 0..(virtual_top - PAGE_OFFSET) >> self.mode.table_shift() {
            fill(directory, index, self.load(own + index * 8));
        }
        for index in 0..HIGHEST {
            fill(root, index, self.load(self.root + index * 8));
        }
        fill(root, HIGHEST, u64::from(physical(directory)) | PRESENT);
        for (page, level) in [(directory, PageFlags::PD), (root, PageFlags::PDP)] {
            host::announce_page(physical(page) / PAGE, (level | PageFlags::PAE).bits());
        }
        physical(root)
    }

    /// Makes the processor use this space.
    pub(crate) fn activate(self) {
        let features =
            match self.mode {
                Mode::NonPae => 0,
                Mode::Pae => Cr4::CR4_ENABLE_PAE.bits() as u32,
            } | if has_global_pages() { Cr4::CR4_ENABLE_GLOBAL_PAGES.bits() as u32 } else { 0 };
        if self.mode == Mode::Pae && has_no_execute() {
            const NO_EXECUTE_ENABLE: u64 = 1 << 11;
            let efer = processor::rdmsr(x86::msr::IA32_EFER);
            processor::wrmsr(x86::msr::IA32_EFER, efer | NO_EXECUTE_ENABLE);
        }
        // Paging is off for a moment: the code that does it must be where it is in physical memory.
        self.prepare_to_switch();
        // SAFETY: both the old tables and the new ones map the routine at its physical address and
        // the kernel where it is linked; interrupts are off.
        unsafe { switch_tables(self.cr3(), features) };
        for linear in text().step_by(PAGE as usize) {
            self.store(self.entry(linear - PAGE_OFFSET), 0);
        }
        processor::set_cr3(self.cr3());
    }

    /// Maps the code at its physical address too, for the moment in which this space comes or goes.
    pub(crate) fn prepare_to_switch(self) {
        for linear in text().step_by(PAGE as usize) {
            self.map(linear - PAGE_OFFSET, linear - PAGE_OFFSET, 0);
        }
    }
}

/// Whether an entry lies in a table that the guest has taken from its pool.
pub(crate) fn is_table(entry: u32) -> bool {
    is_in(&raw const TABLES, entry)
}

/// Whether a linear address lies in an object.
fn is_in<T>(object: *const T, linear: u32) -> bool {
    (object as u32..object as u32 + size_of::<T>() as u32).contains(&linear)
}

/// Linear address of an empty table.
fn take_table() -> u32 {
    let index = TABLES_USED.fetch_add(1, Ordering::Relaxed);
    assert!(index < POOL, "out of page tables");
    let table = (&raw mut TABLES).cast::<Frame>().wrapping_add(index);
    // SAFETY: inside the pool, and no table that is in use.
    unsafe { table.write_bytes(0, 1) };
    table as u32
}

/// Loads CR3 and CR4 with paging off.
///
/// C calling convention: physical address of the top level, CR4. Changes EAX, ECX, EDX, flags.
#[unsafe(naked)]
unsafe extern "C" fn switch_tables(root: u32, features: u32) {
    naked_asm!(
        "mov ecx, [esp + 4]",
        "mov edx, [esp + 8]",
        "call 2f",
        // Here the code runs at its physical address.
        "mov eax, cr0",
        "and eax, {not_paging}",
        "mov cr0, eax",
        "mov cr4, edx",
        "mov cr3, ecx",
        "or eax, {paging}",
        "mov cr0, eax",
        // The return address is high, where the kernel is linked.
        "ret",
        "2: sub dword ptr [esp], {page_offset}",
        "ret",
        page_offset = const PAGE_OFFSET,
        paging = const Cr0::CR0_ENABLE_PAGING.bits() as u32,
        not_paging = const !(Cr0::CR0_ENABLE_PAGING.bits() as u32),
    )
}

/// A message that is a non-maskable interrupt, and whom a message is for: this processor, or all others.
const NMI: u32 = 0x400;
const ITSELF: u32 = 1 << 18;
const OTHERS: u32 = 3 << 18;

/// The local APIC, mapped behind the test page.
#[derive(Clone, Copy)]
pub(crate) struct LocalApic {
    base: u32,
}

impl LocalApic {
    /// Maps it; `None` where the processor has none.
    pub(crate) fn map(space: Space) -> Option<Self> {
        const DISABLE_CACHE: u64 = 1 << 4;
        const ENABLED: u64 = 1 << 11;
        const NOT_IN_MEMORY: u64 = 1 << 10; // x2APIC
        if processor::cpuid(1, 0)[3] & 1 << 9 == 0 {
            return None;
        }
        let base = processor::rdmsr(x86::msr::IA32_APIC_BASE);
        if base & (ENABLED | NOT_IN_MEMORY) != ENABLED {
            return None;
        }
        let linear = TEST_AREA + PAGE;
        space.map(linear, base as u32 & !(PAGE - 1), WRITE | DISABLE_CACHE | NO_EXECUTE);
        processor::invlpg(linear);
        Some(Self { base: linear })
    }

    /// The linear address of a register.
    pub(crate) fn linear(self, offset: u32) -> u32 {
        self.base + offset
    }

    /// Reads a register.
    pub(crate) fn read(self, offset: u32) -> u32 {
        // SAFETY: the APIC's page is mapped; registers are read as aligned words.
        unsafe { ((self.base + offset) as *const u32).read_volatile() }
    }

    fn write(self, offset: u32, value: u32) {
        // SAFETY: as above.
        unsafe { ((self.base + offset) as *mut u32).write_volatile(value) };
    }

    /// Sends INIT and STARTUP to all other processors: they start in real mode at a page.
    pub(crate) fn start_others(self, page: u32) {
        const INIT: u32 = 0x500;
        const STARTUP: u32 = 0x600;
        // Hardware wants 10 milliseconds after the first message, and the second one twice.
        self.send(OTHERS, INIT);
        crate::devices::wait(10_000);
        for _ in 0..2 {
            self.send(OTHERS, STARTUP | page);
            crate::devices::wait(200);
        }
    }

    /// Sends a non-maskable interrupt to all other processors.
    pub(crate) fn interrupt_others(self) {
        self.send(OTHERS, NMI);
    }

    /// Sends one to this processor.
    pub(crate) fn interrupt_itself(self) {
        self.send(ITSELF, NMI);
    }

    /// A message to the processors that are meant.
    fn send(self, whom: u32, message: u32) {
        const COMMAND: u32 = 0x300;
        const PENDING: u32 = 1 << 12;
        const ASSERT: u32 = 1 << 14;
        while self.read(COMMAND) & PENDING != 0 {
            core::hint::spin_loop();
        }
        self.write(COMMAND, whom | ASSERT | message);
    }

    /// Lets the 8259's line arrive as an NMI, or as the interrupt that the 8259 names.
    pub(crate) fn wire_timer_as_nmi(self, nmi: bool) {
        const LOCAL_LINE_0: u32 = 0x350;
        const EXTERNAL: u32 = 0x700;
        // The line is masked while its kind changes: a pending tick would be delivered as both.
        crate::devices::enable_timer_line(false);
        self.write(LOCAL_LINE_0, if nmi { NMI } else { EXTERNAL });
        crate::devices::enable_timer_line(nmi);
    }
}
