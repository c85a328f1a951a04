//! Page tables, written entry by entry through VMI.
//!
//! | linear        | what                                                         |
//! |---------------|--------------------------------------------------------------|
//! | below 4 MiB   | the kernel, the ROMs and the screen at their physical places |
//! | [`WINDOW`]    | one page at a time of memory that is mapped nowhere else     |
//! | [`USER_CODE`] | a process: a page of code, and one of data and stack         |

use super::{VMI, devices, process};
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use vmi_abi::flags::{EntryFlags, FlushFlags, PageFlags};
use vmi_abi::probe::SCAN_AREA;

/// Bytes of a page, and of what one table maps.
pub(super) const PAGE: u32 = 4096;
const TABLE_SPAN: u32 = 1024 * PAGE;

const WINDOW: u32 = TABLE_SPAN - PAGE;
pub(super) const USER_CODE: u32 = 0x4000_0000;
pub(super) const USER_DATA: u32 = USER_CODE + PAGE;

/// Bits of an entry: present, writable, open to processes.
const PRESENT: u32 = 1 << 0;
pub(super) const WRITE: u32 = 1 << 1;
pub(super) const USER: u32 = 1 << 2;

/// Bits of CR0.
const WRITE_PROTECT: u32 = 1 << 16;
const PAGING: u32 = 1 << 31;

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Table([u32; 1024]);

/// One for the kernel, and a directory with a table for it and for each process.
const POOL: usize = 1 + 2 * (1 + process::COUNT);
static mut TABLES: [Table; POOL] = [Table([0; 1024]); POOL];
static TABLES_USED: AtomicUsize = AtomicUsize::new(0);

/// The table below 4 MiB, which all address spaces have in common.
static KERNEL_TABLE: AtomicU32 = AtomicU32::new(0);

/// Memory that nobody has taken yet. It begins behind the kernel's, and is more than we need.
static FREE: AtomicU32 = AtomicU32::new(TABLE_SPAN);

unsafe extern "C" {
    static text_start: u8;
    static text_end: u8;
    static image_end: u8;
}

/// Takes a page of memory: its physical address.
pub(super) fn take_page() -> u32 {
    FREE.fetch_add(PAGE, Ordering::Relaxed)
}

/// Takes an empty table, and tells of it before its first entry is written.
fn take_table(level: PageFlags) -> u32 {
    let index = TABLES_USED.fetch_add(1, Ordering::Relaxed);
    assert!(index < POOL, "out of page tables");
    let table = (&raw const TABLES).cast::<Table>().wrapping_add(index) as u32;
    // SAFETY: nobody else has the table, and it is empty as all memory of the image is.
    unsafe { VMI.AllocatePage(table / PAGE, (level | PageFlags::ZEROED).bits(), 0, 0, 0) };
    table
}

/// Writes an entry of a table.
fn set(table: u32, index: u32, entry: u32, flags: u32) {
    // SAFETY: tables are seen at their physical addresses. What is mapped is memory of the caller's, in
    // a place where nothing was, or in the window.
    unsafe { VMI.SetPxE(entry | PRESENT, table + index * 4, flags) };
}

/// Makes an address space with these pages from [`USER_CODE`] on, each with its bits: what CR3 is to hold.
pub(super) fn new_space(pages: &[u32]) -> u32 {
    let (directory, table) = (take_table(PageFlags::PD), take_table(PageFlags::PT));
    for (page, entry) in (0..).zip(pages) {
        set(table, page, *entry, EntryFlags::PT.bits());
    }
    let kernel = KERNEL_TABLE.load(Ordering::Relaxed);
    set(directory, 0, kernel | WRITE, EntryFlags::PD.bits());
    set(directory, USER_CODE / TABLE_SPAN, table | WRITE | USER, EntryFlags::PD.bits());
    directory
}

/// Shows a page of memory in the window.
pub(super) fn see(page: u32) -> *mut u32 {
    let flags = (EntryFlags::PT | EntryFlags::CURRENT_AS).bits() | WINDOW;
    set(KERNEL_TABLE.load(Ordering::Relaxed), WINDOW / PAGE, page | WRITE, flags);
    // SAFETY: drops the translation of the page that was there before.
    unsafe { VMI.InvalPage(WINDOW) };
    WINDOW as *mut u32
}

/// Maps the kernel and switches paging on.
pub(super) fn initialize() {
    let table = take_table(PageFlags::PT);
    KERNEL_TABLE.store(table, Ordering::Relaxed);
    let [text, end, image] =
        [&raw const text_start, &raw const text_end, &raw const image_end].map(|at| at as u32);
    let screen = devices::SCREEN..devices::SCREEN + PAGE;
    for (range, bits) in [(screen, WRITE), (SCAN_AREA, 0), (text..end, 0), (end..image, WRITE)] {
        for page in range.step_by(PAGE as usize) {
            set(table, page / PAGE, page | bits, EntryFlags::PT.bits());
        }
    }
    // SAFETY: the kernel, its stack and the ROM are mapped where they are.
    unsafe {
        VMI.SetCR3(new_space(&[]));
        VMI.SetCR0(VMI.GetCR0() | PAGING | WRITE_PROTECT);
        VMI.FlushTLB(FlushFlags::GLOBAL.bits());
    }
}
