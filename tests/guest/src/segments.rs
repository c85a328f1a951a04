//! Descriptor tables: selectors are those of a 32-bit Linux kernel, so that a ROM sees what it would see there.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: descriptor tables are memory that the processor reads and writes behind Rust's back"
)]

use crate::host::{self, CALLS, selector};
use crate::processor;
use core::sync::atomic::{AtomicBool, Ordering};
use vmi_abi::state::DescriptorTable;

/// Ring 0 code, flat.
pub(crate) const KERNEL_CODE: u16 = 0x60;
/// Ring 0 data, flat.
pub(crate) const KERNEL_DATA: u16 = 0x68;
/// Ring 3 code, flat.
pub(crate) const USER_CODE: u16 = 0x73;
/// Ring 3 data, flat; Linux leaves it in DS and ES.
pub(crate) const USER_DATA: u16 = 0x7b;
/// The task state segment.
pub(crate) const TASK: u16 = 0x80;
/// The local descriptor table.
pub(crate) const LOCAL_TABLE: u16 = 0x88;
/// A second task state segment, for SetTR.
pub(crate) const OTHER_TASK: u16 = 0x90;
/// A descriptor for WriteGDTEntry to write.
pub(crate) const SPARE: u16 = 0x98;

/// Data through which nothing can be reached.
///
/// The limit is 0, and the base moves whatever the guest has mapped to where it has nothing: QEMU's
/// translator checks no limits, and no null selectors either, but it adds the base.
pub(crate) const NOWHERE: u16 = 0xa3;

/// Code and data for ring 3 that are not present.
pub(crate) const ABSENT_CODE: u16 = 0xab;
/// See [`ABSENT_CODE`].
pub(crate) const ABSENT_DATA: u16 = 0xb3;

/// Selectors of the local descriptor table's first three entries, for ring 3.
pub(crate) const LOCAL_CODE: u16 = 0x07;
/// See [`LOCAL_CODE`].
pub(crate) const LOCAL_DATA: u16 = 0x0f;

/// A flat segment's descriptor: base 0, limit 4 GiB, 32-bit.
const fn flat(access: u64) -> u64 {
    0x00cf_0000_0000_ffff | access << 40
}

/// Access bytes: present, ring, kind, accessed already so that the processor need not write.
const CODE_0: u64 = 0x9b;
const DATA_0: u64 = 0x93;
const CODE_3: u64 = 0xfb;
const DATA_3: u64 = 0xf3;

/// The access byte's bit for a segment that is present.
const PRESENT: u64 = 0x80;

/// A ring 3 code descriptor, for a table entry that is written through the ROM.
pub(crate) const USER_CODE_DESCRIPTOR: u64 = flat(CODE_3);
/// A ring 3 data descriptor, for a table entry that is written through the ROM.
pub(crate) const USER_DATA_DESCRIPTOR: u64 = flat(DATA_3);
/// A ring 0 data descriptor, for a table entry that is written through the ROM.
pub(crate) const KERNEL_DATA_DESCRIPTOR: u64 = flat(DATA_0);

/// A writable segment of one byte for ring 3, at 60000000h.
const NOWHERE_DESCRIPTOR: u64 = 0x6040_f300_0000_0000;

/// The descriptor of a system segment: a task state segment or a local descriptor table.
const fn system(base: u32, limit: u32, access: u64) -> u64 {
    let base = base as u64;
    (limit as u64 & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit as u64 >> 16 & 0xf) << 48
        | (base >> 24) << 56
}

/// Available 32-bit task state segment.
const TASK_ACCESS: u64 = 0x89;

/// Local descriptor table.
const LOCAL_TABLE_ACCESS: u64 = 0x82;

/// Vectors of an interrupt descriptor table.
pub(crate) const IDT_SIZE: usize = 256;

/// Memory that the processor shares; aligned to a page as Linux aligns it.
#[repr(C, align(4096))]
pub(crate) struct Table<const N: usize>(pub(crate) [u64; N]);

pub(crate) static mut GDT: Table<32> = Table([0; 32]);
pub(crate) static mut OTHER_GDT: Table<32> = Table([0; 32]);
pub(crate) static mut LDT: Table<16> = Table([0; 16]);
pub(crate) static mut IDT: Table<IDT_SIZE> = Table([0; IDT_SIZE]);
pub(crate) static mut OTHER_IDT: Table<IDT_SIZE> = Table([0; IDT_SIZE]);

/// The hardware's 32-bit task state segment, as far as the guest uses it.
#[repr(C, align(128))]
pub(crate) struct TaskState {
    link: u32,
    /// Stack pointer for entries into ring 0.
    pub(crate) esp0: u32,
    ss0: u32,
    rest: [u32; 22],
    /// No port is open to ring 3: the bitmap begins behind the limit.
    bitmap: u32,
}

pub(crate) static mut TASK_STATE: TaskState = TaskState::new();
pub(crate) static mut OTHER_TASK_STATE: TaskState = TaskState::new();

impl TaskState {
    const fn new() -> Self {
        Self { link: 0, esp0: 0, ss0: KERNEL_DATA as u32, rest: [0; 22], bitmap: 0x68 << 16 }
    }
}

/// What LGDT or LIDT wants for a table.
pub(crate) fn table_of<const N: usize>(table: *const Table<N>) -> DescriptorTable {
    DescriptorTable { limit: (N as u16 * 8 - 1).into(), base: (table as u32).into() }
}

/// Reads a descriptor.
pub(crate) fn descriptor<const N: usize>(table: *const Table<N>, index: usize) -> u64 {
    assert!(index < N);
    // SAFETY: inside the table; volatile, since the processor may have set a bit.
    unsafe { (&raw const (*table).0).cast::<u64>().add(index).read_volatile() }
}

/// Writes a descriptor: into a table that a host knows of, by the ROM.
pub(crate) fn set_descriptor<const N: usize>(table: *mut Table<N>, index: usize, value: u64) {
    assert!(index < N);
    if LIVE.load(Ordering::Relaxed) {
        let (low, high) = (value as u32, (value >> 32) as u32);
        // SAFETY: inside the table; callers leave alone what the guest runs on.
        return unsafe { CALLS.WriteGDTEntry(table as u32, index as u32, low, high) };
    }
    // SAFETY: inside the table, which nothing but the processor reads meanwhile.
    unsafe { (&raw mut (*table).0).cast::<u64>().add(index).write_volatile(value) };
}

/// Whether the tables are a host's business: they are read-only then.
static LIVE: AtomicBool = AtomicBool::new(false);

/// From here on tables are written by the ROM, where there is a host.
pub(crate) fn are_complete() {
    LIVE.store(host::is_hosted(), Ordering::Relaxed);
}

/// Fills the tables and loads the registers.
pub(crate) fn initialize(esp0: u32) {
    let (task, other) = (&raw mut TASK_STATE, &raw mut OTHER_TASK_STATE);
    for state in [task, other] {
        // SAFETY: the processor reads the field at the next entry from ring 3; there is none yet.
        unsafe {
            (&raw mut (*state).esp0).write_volatile(esp0);
            (&raw mut (*state).ss0).write_volatile(selector(KERNEL_DATA).into());
        }
    }
    let limit = size_of::<TaskState>() as u32 - 1;
    for table in [&raw mut GDT, &raw mut OTHER_GDT] {
        for (selector, value) in [
            (KERNEL_CODE, flat(CODE_0)),
            (KERNEL_DATA, flat(DATA_0)),
            (USER_CODE, flat(CODE_3)),
            (USER_DATA, flat(DATA_3)),
            (NOWHERE, NOWHERE_DESCRIPTOR),
            (ABSENT_CODE, flat(CODE_3 & !PRESENT)),
            (ABSENT_DATA, flat(DATA_3 & !PRESENT)),
            (TASK, system(task as u32, limit, TASK_ACCESS)),
            (OTHER_TASK, system(other as u32, limit, TASK_ACCESS)),
            (LOCAL_TABLE, system(&raw const LDT as u32, 16 * 8 - 1, LOCAL_TABLE_ACCESS)),
        ] {
            set_descriptor(table, usize::from(selector >> 3), value);
        }
    }
    processor::set_gdt(table_of(&raw const GDT));
    // SAFETY: the new table's flat descriptors mean what the loader's meant.
    unsafe {
        core::arch::asm!(
            "push {code}",
            "call 2f",
            "jmp 3f",
            // The return address and the selector are a far pointer.
            "2: retf",
            "3: mov ss, {stack:x}",
            "mov ds, {data:x}",
            "mov es, {data:x}",
            code = in(reg) u32::from(selector(KERNEL_CODE)),
            stack = in(reg) u32::from(selector(KERNEL_DATA)),
            data = in(reg) u32::from(USER_DATA),
        );
    }
    processor::set_fs_gs(0, 0);
    processor::set_task(TASK);
    processor::set_ldt(0);
    set_kernel_stack(esp0);
}

/// Makes a task state segment available again, in both tables.
pub(crate) fn release_task(selector: u16) {
    if host::is_hosted() {
        return; // No processor ever had it.
    }
    for table in [&raw mut GDT, &raw mut OTHER_GDT] {
        let index = usize::from(selector >> 3);
        let busy = 0x02 << 40;
        set_descriptor(table, index, descriptor(table, index) & !busy);
    }
}

/// Sets the stack for entries from ring 3.
pub(crate) fn set_kernel_stack(esp0: u32) {
    let state = &raw mut TASK_STATE;
    if host::is_hosted() {
        // SAFETY: the top of a stack of the guest's.
        unsafe { CALLS.UpdateKernelStack(state as u32, esp0) };
    }
    // SAFETY: a word that the processor reads at the next entry.
    unsafe { (&raw mut (*state).esp0).write_volatile(esp0) };
}

/// The stack for entries from ring 3, of a task state segment.
pub(crate) fn kernel_stack(state: *const TaskState) -> u32 {
    // SAFETY: both states are statics of this module.
    unsafe { (&raw const (*state).esp0).read_volatile() }
}

/// An interrupt gate to a handler.
pub(crate) const fn gate(handler: u32, ring: u64) -> u64 {
    let handler = handler as u64;
    (handler & 0xffff)
        | (KERNEL_CODE as u64) << 16
        | (0x8e00 | ring << 13) << 32
        | (handler >> 16) << 48
}
