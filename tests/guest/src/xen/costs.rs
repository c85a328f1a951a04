//! What page-table entries and context switches cost on Xen: by the ROM's calls, by hypercalls of the guest's own, and by stores
//! that Xen traps.
//!
//! Under QEMU's `-icount` the time-stamp counter counts instructions, Xen's too. Each line is one count, which came out the same each time:
//!
//! ```text
//! # xen-cost work="map" entries=32 rom=600 raw=590 trapped=3200
//! ```
//!
//! The counts of entries are for each of them. The guest's own hypercalls are what a kernel written for Xen would make: requests
//! put into an array, one `mmu_update`; one multicall.

use super::{UNUSED, USER_DATA, call};
use crate::console::line;
use crate::host::CALLS;
use crate::paging::{PAGE, PRESENT, Space, TEST_FRAMES, WRITE, physical};
use crate::segments::{GDT, TASK_STATE};
use crate::{processor, suite};
use core::arch::asm;
use core::arch::x86::_rdtsc;
use core::cell::Cell;
use vmi_abi::flags::{EntryFlags, LazyMode};
use vmi_hv_backend::xen::interface::{
    DOMID_SELF, HYPERCALL_VECTOR, MmuExtOp, MmuUpdate, MulticallEntry, hypercall, mmuext,
};

/// Pages that nothing else maps; below them is one table.
const AREA: u32 = 0xd800_0000;

/// In CR0.
const TASK_SWITCHED: u32 = 1 << 3;

/// Sizes of batches.
const SIZES: [u32; 5] = [1, 8, 32, 64, 128];

/// How often a count must come out the same before it is believed.
const STEADY: u32 = 4;

/// How often it is tried.
const PATIENCE: u32 = 64;

/// The guest's own requests.
static mut REQUESTS: [MmuUpdate; 128] = [MmuUpdate { ptr: 0, val: 0 }; 128];

/// Its own multicall.
static mut SWITCH: [MulticallEntry; 6] = [MulticallEntry { op: 0, result: 0, args: [0; 6] }; 6];
static mut BASE: MmuExtOp = MmuExtOp { cmd: 0, arg1: 0, arg2: 0 };

/// An `mmu_update` of the guest's own.
fn update(requests: *const MmuUpdate, count: u32) -> i32 {
    let result;
    // SAFETY: Xen reads the requests. ESI is the compiler's.
    unsafe {
        asm!(
            "xchg ebx, edi",
            "push esi",
            "mov esi, {domain}",
            "int {vector}",
            "pop esi",
            "xchg ebx, edi",
            vector = const HYPERCALL_VECTOR,
            domain = const DOMID_SELF,
            inlateout("eax") hypercall::MMU_UPDATE => result,
            inout("edi") requests => _,
            inout("ecx") count => _,
            inout("edx") 0 => _,
        );
    }
    result
}

/// Where the work is done.
struct Table {
    /// The linear address of the first entry.
    entries: u32,
    /// Its machine address.
    place: u64,
    /// What is mapped: as the guest says it, and as Xen has it.
    value: u64,
    machine_value: u64,
}

impl Table {
    fn by_rom(&self, value: u64, count: u32) {
        // SAFETY: pages that nothing else maps.
        unsafe {
            CALLS.SetLazyMode(LazyMode::MMU.0);
            for index in 0..count {
                CALLS.SetPxELong(value, self.entries + 8 * index, EntryFlags::PT.bits());
            }
            CALLS.SetLazyMode(LazyMode::OFF.0);
        }
    }

    fn raw(&self, value: u64, count: u32) {
        let requests = (&raw mut REQUESTS).cast::<MmuUpdate>();
        for index in 0..count {
            let ptr = self.place + u64::from(8 * index);
            // SAFETY: there are as many.
            unsafe { requests.add(index as usize).write(MmuUpdate { ptr, val: value }) };
        }
        assert!(update(requests, count) == 0);
    }

    /// Two stores of 32 bits each, as kernels with PAE make them: the upper half first.
    fn trapped(&self, value: u64, count: u32) {
        for index in 0..count {
            let entry = (self.entries + 8 * index) as *mut u32;
            // SAFETY: Xen traps them: the table is mapped read-only.
            unsafe {
                entry.add(1).write_volatile((value >> 32) as u32);
                entry.write_volatile(value as u32);
            }
        }
    }
}

/// Instructions of `work`, after `before` each time; nothing if it is never the same.
fn steady(before: impl Fn(), work: impl Fn()) -> Option<u32> {
    let mut last = 0;
    let mut same = 0;
    for _ in 0..PATIENCE {
        before();
        // SAFETY: reading the counter changes nothing.
        let start = unsafe { _rdtsc() };
        work();
        // SAFETY: as above.
        let took = (unsafe { _rdtsc() } - start) as u32;
        same = if took == last { same + 1 } else { 0 };
        last = took;
        if same == STEADY {
            return Some(took);
        }
    }
    None
}

/// Counts everything.
pub(super) fn count(space: Space) {
    let empty = steady(|| (), || ());
    let Some(empty) = empty else {
        line!("# not tried: costs on Xen, as the time-stamp counter does not count instructions");
        return;
    };
    let frame = physical(&raw const TEST_FRAMES);
    space.map_writable(AREA, frame);
    let entries = space.entry(AREA);
    // SAFETY: changes nothing.
    let place = |frame| u64::from(unsafe { CALLS.PhysicalToMachine(frame) }) * u64::from(PAGE);
    let table = (entries - crate::boot::PAGE_OFFSET) / PAGE;
    let table = Table {
        entries,
        place: place(table),
        value: u64::from(frame) | PRESENT,
        machine_value: place(frame / PAGE) | PRESENT,
    };
    for size in SIZES {
        // From nothing to a writable mapping, and from that to a read-only one.
        for (name, before, after) in [("map", None, WRITE), ("write-protect", Some(WRITE), 0)] {
            let prepare = || match before {
                Some(bits) => table.raw(table.machine_value | bits, size),
                None => table.raw(0, size),
            };
            let per_entry = |count: Option<u32>| (count.unwrap_or(0).max(empty) - empty) / size;
            let rom = steady(prepare, || table.by_rom(table.value | after, size));
            let raw = steady(prepare, || table.raw(table.machine_value | after, size));
            let trapped = steady(prepare, || table.trapped(table.machine_value | after, size));
            let [rom, raw, trapped] = [rom, raw, trapped].map(per_entry);
            line!(
                "# xen-cost work=\"{name}\" entries={size} rom={rom} raw={raw} trapped={trapped}"
            );
        }
    }
    table.raw(0, 128);
    processor::invlpg(AREA);
    count_switch(empty);
}

/// A context switch: three descriptors, stack, task-switched flag, CR3.
fn count_switch(empty: u32) {
    let cr3 = processor::cr3();
    let state = (&raw const TASK_STATE) as u32;
    let stack = suite::trap_stack_top();
    let gdt = (&raw const GDT) as u32;
    let by_rom = |low: u32| {
        // SAFETY: everything is set to what it is, but for the flag, which is set before.
        unsafe {
            CALLS.SetLazyMode(LazyMode::CPU.0);
            CALLS.WriteGDTEntry(gdt, UNUSED[0], low, USER_DATA);
            CALLS.WriteGDTEntry(gdt, UNUSED[1], low, USER_DATA);
            CALLS.WriteGDTEntry(gdt, UNUSED[2], low, USER_DATA);
            CALLS.UpdateKernelStack(state, stack);
            CALLS.CLTS();
            CALLS.SetCR3(cr3);
            CALLS.SetLazyMode(LazyMode::OFF.0);
        }
    };
    // SAFETY: changes nothing.
    let machine_frame = |frame| unsafe { CALLS.PhysicalToMachine(frame) };
    let root = machine_frame(cr3 / PAGE);
    let selector: u32;
    // SAFETY: reading it changes nothing.
    unsafe { asm!("mov {:e}, ss", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    // The copy of the GDT that the ROM gave Xen is nobody's to know: entries of a page of the guest's own cost the same.
    let own = machine_frame(physical(&raw const TEST_FRAMES) / PAGE) * PAGE;
    let raw = |low: u32| {
        let calls = (&raw mut SWITCH).cast::<MulticallEntry>();
        let base = &raw mut BASE;
        let entry = |op, args: [u32; 4]| {
            let [a, b, c, d] = args;
            MulticallEntry { op, result: 0, args: [a, b, c, d, 0, 0] }
        };
        let descriptor =
            |index| entry(hypercall::UPDATE_DESCRIPTOR, [own + 8 * index, 0, low, USER_DATA]);
        // SAFETY: as many as there are; Xen reads them.
        unsafe {
            base.write(MmuExtOp { cmd: mmuext::NEW_BASEPTR, arg1: root, arg2: 0 });
            calls.add(0).write(descriptor(UNUSED[0]));
            calls.add(1).write(descriptor(UNUSED[1]));
            calls.add(2).write(descriptor(UNUSED[2]));
            calls.add(3).write(entry(hypercall::STACK_SWITCH, [selector, stack, 0, 0]));
            calls.add(4).write(entry(hypercall::FPU_TASKSWITCH, [0; 4]));
            let arguments = [base as u32, 1, 0, DOMID_SELF];
            calls.add(5).write(entry(hypercall::MMUEXT_OP, arguments));
        }
        assert!(call(hypercall::MULTICALL, [calls as u32, 6, 0]) == 0);
        // SAFETY: as above; Xen has written the results.
        let result = |place| unsafe { (&raw const (*calls.add(place)).result).read_volatile() };
        assert!((0..6).all(|place| result(place) == 0));
    };
    let count = |count: Option<u32>| count.unwrap_or(0).max(empty) - empty;
    let cr0 = CALLS.GetCR0();
    // Every second time one limit, every other time another: a descriptor that is there already the ROM does not tell Xen.
    let limit = Cell::new(0x0fff);
    for (name, toggle) in [("context switch", 1), ("context switch, same descriptors", 0)] {
        let before = || {
            limit.set(limit.get() ^ toggle);
            // SAFETY: the work clears it again.
            unsafe { CALLS.SetCR0(cr0 | TASK_SWITCHED) };
        };
        let rom = count(steady(before, || by_rom(limit.get())));
        let raw = count(steady(before, || raw(limit.get())));
        line!("# xen-cost work=\"{name}\" entries=1 rom={rom} raw={raw} trapped=0");
    }
    for index in UNUSED {
        // SAFETY: they were empty.
        unsafe { CALLS.WriteGDTEntry(gdt, index, 0, 0) };
    }
    // SAFETY: what it was.
    unsafe { CALLS.SetCR0(cr0) };
}
