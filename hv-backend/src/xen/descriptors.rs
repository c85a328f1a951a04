//! Descriptor tables, the task state, and what else a processor keeps for its kernel.
//!
//! Xen takes no system descriptors, wants the pages of its tables read-only, and checks all that is in such a page. So it gets a
//! copy, in a page of the granted memory for each of the two tables. The guest's tables stay the guest's, as it wrote
//! them: reads match writes, and the task state segment is found there.

use super::interface::{
    DESCRIPTORS_IN_A_PAGE, MmuExtOp, PAGE_SHIFT, PAGE_SIZE, TRAP_DISABLES_EVENTS, TrapInfo,
    hypercall, mmuext,
};
use super::machine::Machine;
use super::{GDT_OFFSET, LDT_OFFSET, TRAPS, Xen};
use crate::CallNumber;
use core::cell::Cell;
use core::mem::offset_of;
use vmi_abi::number;

/// What the guest set.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Tables {
    gdt: Cell<Table>,
    ldt: Cell<Table>,
    idt: Cell<Table>,
    ldt_selector: Cell<u32>,
    task_selector: Cell<u32>,
    /// The task state segment of that selector, when it was loaded. 0: none.
    task_state: Cell<u32>,
    /// A bit for each entry of the GDT, by its number mod 32: a change of it waits.
    pub(super) changing: Cell<u32>,
    /// How many entries of the GDT there are, of those that have a bit for themselves alone.
    gdt_first: Cell<u32>,
    /// The machine address of the copy of the GDT.
    gdt_place: Cell<u64>,
    gdt_copy: Copied,
    ldt_copy: Copied,
    /// A bit for each vector: Xen knows a handler of it.
    handled: [Cell<u32>; VECTORS / 32],
}

/// For [`Xen::MOST_OFFSET`] and its like.
impl Tables {
    pub(super) const GDT_BASE_OFFSET: usize = offset_of!(Self, gdt) + offset_of!(Table, base);
    pub(super) const GDT_FIRST_OFFSET: usize = offset_of!(Self, gdt_first);
    pub(super) const GDT_PLACE_OFFSET: usize = offset_of!(Self, gdt_place);
    pub(super) const CHANGING_OFFSET: usize = offset_of!(Self, changing);
    pub(super) const TASK_STATE_OFFSET: usize = offset_of!(Self, task_state);
}

/// What is known of a copy.
#[derive(Debug, Default)]
#[repr(C)]
struct Copied {
    /// Whether it is a table of Xen's already, and may be changed by hypercalls only.
    is_xens: Cell<u32>,
    /// How many of its entries may be something.
    entries: Cell<u32>,
}

/// Vectors that there are.
const VECTORS: usize = 256;

/// A table's place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct Table {
    base: u32,
    limit: u32,
}

/// Bytes of a descriptor.
const SIZE: u32 = 8;

/// In a descriptor's upper half.
const PRESENT: u32 = 1 << 15;
const PRIVILEGE: u32 = 3 << 13;
const IS_SEGMENT: u32 = 1 << 12;
const TYPE: u32 = 0xf << 8;

/// The ring of the guest's kernel, as a descriptor's privilege.
const KERNEL: u32 = 1 << 13;

/// [`TYPE`] of the gates that 32-bit handlers have.
const INTERRUPT_GATE: u32 = 0xe << 8;
const TRAP_GATE: u32 = 0xf << 8;

/// The part of a selector that is an offset into the table.
const SELECTOR_INDEX: u32 = 0xfff8;

/// Offset of the kernel's stack pointer in a task state segment.
const ESP0: u32 = 4;

/// In a segment descriptor's upper half: it was loaded.
const ACCESSED: u32 = 1 << 8;

/// In CR0.
pub(super) const TASK_SWITCHED: u32 = 1 << 3;

/// A descriptor as Xen takes it: of a segment, for the kernel's ring or a program's. All else is nothing.
const fn segment(low: u32, high: u32) -> (u32, u32) {
    if high & (PRESENT | IS_SEGMENT) != PRESENT | IS_SEGMENT {
        return (0, 0);
    }
    (low, if high & PRIVILEGE == 0 { high | KERNEL } else { high })
}

/// The base of a segment.
const fn base(low: u32, high: u32) -> u32 {
    low >> 16 | (high & 0xff) << 16 | high & 0xff00_0000
}

/// The limit of a segment, in bytes.
const fn limit(low: u32, high: u32) -> u32 {
    let limit = low & 0xffff | high & 0x000f_0000;
    if high & 1 << 23 != 0 { limit << 12 | 0xfff } else { limit }
}

/// The handler of a gate, as Xen takes it.
const fn trap(vector: u8, low: u32, high: u32) -> Option<TrapInfo> {
    let kind = high & (PRESENT | IS_SEGMENT | TYPE);
    let flags = if kind == PRESENT | INTERRUPT_GATE {
        TRAP_DISABLES_EVENTS
    } else if kind == PRESENT | TRAP_GATE {
        0
    } else {
        return None;
    };
    // What ring 0 alone may make with INT, the kernel's ring may.
    let privilege = (high >> 13 & 3) as u8;
    Some(TrapInfo {
        vector,
        flags: flags | if privilege == 0 { 1 } else { privilege },
        cs: (low >> 16) as u16,
        address: low & 0xffff | high & 0xffff_0000,
    })
}

impl Xen {
    /// In a descriptor's upper half: what says that it is a segment, and what says that it is a program's.
    pub const SEGMENT: u32 = PRESENT | IS_SEGMENT;
    /// See [`Self::SEGMENT`].
    pub const PROGRAM: u32 = PRESENT | IS_SEGMENT | PRIVILEGE;
    /// Where the kernel's stack pointer is in a task state segment.
    pub const ESP0: u32 = ESP0;
    /// In a descriptor's upper half: what the processor adds.
    pub const ACCESSED: u32 = ACCESSED;

    /// SetGDT.
    pub fn set_gdt(&self, machine: &impl Machine, base: u32, limit: u32) {
        self.flush(machine);
        let table = Table { base, limit };
        self.tables.gdt.set(table);
        self.copy(machine, table, GDT_OFFSET, &self.tables.gdt_copy, number::SetGDT);
        let first = self.tables.gdt_copy.entries.get().min(u32::BITS);
        self.tables.gdt_first.set(first);
        let frame = self.copy_frame(machine, GDT_OFFSET);
        self.tables.gdt_place.set(u64::from(frame) << PAGE_SHIFT);
        let status = machine.set_gdt(frame, DESCRIPTORS_IN_A_PAGE);
        self.expect(machine, number::SetGDT, table.base, status);
    }

    /// SetLDT.
    pub fn set_ldt(&self, machine: &impl Machine, selector: u32) {
        self.flush(machine);
        let (low, high) = self.descriptor(machine, selector);
        let selector = selector & 0xffff;
        self.tables.ldt_selector.set(selector);
        let is_there = selector & SELECTOR_INDEX != 0 && high & PRESENT != 0;
        let table = if is_there {
            Table { base: base(low, high), limit: limit(low, high) }
        } else {
            Table::default()
        };
        self.tables.ldt.set(table);
        let mut entries = 0;
        if is_there {
            self.copy(machine, table, LDT_OFFSET, &self.tables.ldt_copy, number::SetLDT);
            entries = DESCRIPTORS_IN_A_PAGE;
        }
        let copy = self.copy_address(LDT_OFFSET);
        let arg1 = if is_there { copy } else { 0 };
        let operation = MmuExtOp { cmd: mmuext::SET_LDT, arg1, arg2: entries };
        self.expect(machine, number::SetLDT, selector, machine.mmuext_op(operation));
    }

    /// SetTR. The stack in the task state segment counts from now on.
    pub fn set_task(&self, machine: &impl Machine, selector: u32) {
        self.tables.task_selector.set(selector & 0xffff);
        let (low, high) = self.descriptor(machine, selector);
        let state = if high & PRESENT != 0 { base(low, high) } else { 0 };
        self.tables.task_state.set(state);
        if state != 0 {
            self.switch_stack(machine, machine.load(state.wrapping_add(ESP0)));
        }
    }

    /// GetGDT: base and limit.
    pub fn gdt(&self) -> (u32, u32) {
        let Table { base, limit } = self.tables.gdt.get();
        (base, limit)
    }

    /// GetIDT: base and limit.
    pub fn idt(&self) -> (u32, u32) {
        let Table { base, limit } = self.tables.idt.get();
        (base, limit)
    }

    /// GetLDT.
    pub fn ldt(&self) -> u32 {
        self.tables.ldt_selector.get()
    }

    /// GetTR.
    pub fn task(&self) -> u32 {
        self.tables.task_selector.get()
    }

    /// WriteGDTEntry.
    pub fn write_gdt_entry(
        &self,
        machine: &impl Machine,
        table: u32,
        index: u32,
        low: u32,
        high: u32,
    ) {
        store(machine, table, index, low, high);
        // Beyond the limit no processor would see it.
        let Tables { gdt, gdt_copy, changing, .. } = &self.tables;
        if table != gdt.get().base || index >= gdt_copy.entries.get() {
            return;
        }
        // Most switches write the descriptors that are there: nothing to tell Xen, unless a change waits.
        let bit = 1 << (index % 32);
        let there = self.copy_address(GDT_OFFSET).wrapping_add(index * SIZE);
        let (old_low, old_high) = (machine.load(there), machine.load(there.wrapping_add(4)));
        let (wanted_low, wanted_high) = segment(low, high);
        let is_same = old_low == wanted_low && (old_high ^ wanted_high) & !ACCESSED == 0;
        if is_same && changing.get() & bit == 0 {
            return;
        }
        changing.set(changing.get() | bit);
        self.write_copy(machine, GDT_OFFSET, index, low, high, number::WriteGDTEntry);
    }

    /// WriteLDTEntry.
    pub fn write_ldt_entry(
        &self,
        machine: &impl Machine,
        table: u32,
        index: u32,
        low: u32,
        high: u32,
    ) {
        store(machine, table, index, low, high);
        if table == self.tables.ldt.get().base && index < self.tables.ldt_copy.entries.get() {
            self.write_copy(machine, LDT_OFFSET, index, low, high, number::WriteLDTEntry);
        }
    }

    /// WriteIDTEntry.
    pub fn write_idt_entry(
        &self,
        machine: &impl Machine,
        table: u32,
        index: u32,
        low: u32,
        high: u32,
    ) {
        self.flush(machine);
        store(machine, table, index, low, high);
        if table != self.tables.idt.get().base || index > u8::MAX.into() {
            return;
        }
        let vector = index as u8;
        // One whose address is 0 ends the list, so a handler cannot be taken back.
        if let (Some(found), [first, last, ..]) = (trap(vector, low, high), &self.traps) {
            first.set(found);
            last.set(TrapInfo::default());
            if let Some(handled) = self.tables.handled.get(index as usize / 32) {
                handled.set(handled.get() | 1 << (index % 32));
            }
            self.announce_traps(machine);
        }
    }

    /// SetIDT. Handlers take the place of others one by one, for there is no moment without exceptions: a kernel that is stepped
    /// through has one in this call. Only if Xen is to forget one does it forget all first.
    pub fn set_idt(&self, machine: &impl Machine, base: u32, limit: u32) {
        self.flush(machine);
        let table = Table { base, limit };
        self.tables.idt.set(table);
        let trap_at = |vector: u32| {
            let (low, high) = table.entry(machine, vector);
            trap(vector as u8, low, high)
        };
        let mut is_one_gone = false;
        for (first, handled) in (0..).step_by(32).zip(&self.tables.handled) {
            let wanted = (0..32).filter(|bit| trap_at(first + bit).is_some());
            let wanted = wanted.fold(0, |bits, bit| bits | 1 << bit);
            is_one_gone |= handled.replace(wanted) & !wanted != 0;
        }
        if is_one_gone {
            self.expect(machine, number::SetIDT, base, machine.set_trap_table(None));
        }
        let mut count = 0;
        for found in (0..VECTORS as u32).filter_map(trap_at) {
            if let Some(place) = self.traps.get(count) {
                place.set(found);
                count += 1;
            }
            if count == TRAPS {
                self.end_traps(machine, count);
                count = 0;
            }
        }
        if count > 0 {
            self.end_traps(machine, count);
        }
    }

    fn end_traps(&self, machine: &impl Machine, count: usize) {
        if let Some(place) = self.traps.get(count) {
            place.set(TrapInfo::default());
        }
        self.announce_traps(machine);
    }

    fn announce_traps(&self, machine: &impl Machine) {
        let status = machine.set_trap_table(Some(&self.traps));
        self.expect(machine, number::SetIDT, self.tables.idt.get().base, status);
    }

    /// The guest's handler of a vector: selector and address. None where the gate leads nowhere.
    pub(super) fn handler(&self, machine: &impl Machine, vector: u32) -> Option<(u16, u32)> {
        let (low, high) = self.tables.idt.get().entry(machine, vector);
        trap(vector as u8, low, high).map(|found| (found.cs, found.address))
    }

    /// UpdateKernelStack. Xen looks at it on the way from a program, and what waits goes over before that.
    pub fn update_kernel_stack(&self, machine: &impl Machine, esp0: u32) {
        let state = self.tables.task_state.get();
        if state != 0 {
            machine.store(state.wrapping_add(ESP0), esp0);
        }
        self.switch_stack(machine, esp0);
    }

    #[inline(always)]
    fn switch_stack(&self, machine: &impl Machine, esp0: u32) {
        let arguments = [machine.stack_selector(), esp0, 0, 0];
        self.call(machine, hypercall::STACK_SWITCH, arguments, number::UpdateKernelStack);
    }

    /// CLTS.
    pub fn clear_task_switched(&self, machine: &impl Machine) {
        self.cr0.set(self.cr0.get() & !TASK_SWITCHED);
        self.call(machine, hypercall::FPU_TASKSWITCH, [0; 4], number::CLTS);
    }

    /// SetCR0. Of all its bits only the task-switched flag can change what the processor does; the others are remembered.
    pub fn set_cr0(&self, machine: &impl Machine, value: u32) {
        self.cr0.set(value);
        let is_set = u32::from(value & TASK_SWITCHED != 0);
        self.flush(machine);
        let status = machine.hypercall(hypercall::FPU_TASKSWITCH, [is_set, 0, 0, 0]);
        self.expect(machine, number::SetCR0, value, status);
    }

    /// GetCR0. Xen clears the task-switched flag when it tells the guest that somebody needs the coprocessor.
    pub fn cr0(&self, machine: &impl Machine) -> u32 {
        self.flush(machine);
        let known = self.cr0.get();
        if known & TASK_SWITCHED == 0 {
            known
        } else {
            known & (machine.control().0 | !TASK_SWITCHED)
        }
    }

    /// SetCR4, but for the register itself.
    pub fn set_cr4(&self, machine: &impl Machine, value: u32) {
        self.flush(machine);
        self.cr4.set(value);
    }

    /// GetCR4.
    pub fn cr4(&self) -> u32 {
        self.cr4.get()
    }

    /// SetDR.
    pub fn set_debug_register(&self, machine: &impl Machine, register: u32, value: u32) {
        let status = machine.hypercall(hypercall::SET_DEBUGREG, [register, value, 0, 0]);
        self.expect(machine, number::SetDR, register, status);
    }

    /// GetDR.
    pub fn debug_register(&self, machine: &impl Machine, register: u32) -> u32 {
        machine.hypercall(hypercall::GET_DEBUGREG, [register, 0, 0, 0]).cast_unsigned()
    }

    /// A descriptor of the guest's GDT.
    fn descriptor(&self, machine: &impl Machine, selector: u32) -> (u32, u32) {
        let index = (selector & SELECTOR_INDEX) / SIZE;
        if index == 0 { (0, 0) } else { self.tables.gdt.get().entry(machine, index) }
    }

    /// Makes a copy the same as the guest's table. Before the copy is Xen's it is written, afterwards Xen changes it.
    fn copy(
        &self,
        machine: &impl Machine,
        table: Table,
        offset: u32,
        copied: &Copied,
        call: CallNumber,
    ) {
        let Copied { is_xens, entries } = copied;
        let copy = Table { base: self.copy_address(offset), limit: PAGE_SIZE - 1 };
        let wanted = (table.limit / SIZE + 1).min(DESCRIPTORS_IN_A_PAGE);
        for index in 0..wanted.max(entries.replace(wanted)) {
            let (low, high) = table.entry(machine, index);
            let wanted = segment(low, high);
            let old = copy.entry(machine, index);
            // Xen may have noted that a segment was used.
            if wanted == (old.0, old.1 & !ACCESSED) || wanted == old {
                continue;
            }
            if is_xens.get() == 0 {
                store(machine, copy.base, index, wanted.0, wanted.1);
            } else {
                self.write_copy(machine, offset, index, low, high, call);
                self.flush(machine);
            }
        }
        if is_xens.get() == 0 {
            let frame = self.copy_own_frame(offset);
            is_xens.set(u32::from(self.map(machine, frame, 0, call)));
        }
    }

    /// Has Xen change an entry of a copy.
    #[inline(always)]
    fn write_copy(
        &self,
        machine: &impl Machine,
        offset: u32,
        index: u32,
        low: u32,
        high: u32,
        call: CallNumber,
    ) {
        let (low, high) = segment(low, high);
        let frame = self.copy_frame(machine, offset);
        let address = (frame << PAGE_SHIFT) + index * SIZE;
        let upper = frame >> (32 - PAGE_SHIFT);
        self.call(machine, hypercall::UPDATE_DESCRIPTOR, [address, upper, low, high], call);
    }

    fn copy_address(&self, offset: u32) -> u32 {
        self.frames.own.get().wrapping_add(offset)
    }

    fn copy_own_frame(&self, offset: u32) -> u32 {
        self.copy_address(offset).wrapping_sub(self.frames.linear.get()) / PAGE_SIZE
    }

    fn copy_frame(&self, machine: &impl Machine, offset: u32) -> u32 {
        self.frames.machine_frame(machine, self.copy_own_frame(offset))
    }
}

impl Table {
    /// An entry, zeroes beyond the limit.
    fn entry(self, machine: &impl Machine, index: u32) -> (u32, u32) {
        if index * SIZE + SIZE - 1 > self.limit {
            return (0, 0);
        }
        let address = self.base.wrapping_add(index * SIZE);
        (machine.load(address), machine.load(address.wrapping_add(4)))
    }
}

/// Writes an entry of a table in the guest's memory.
#[inline(always)]
fn store(machine: &impl Machine, table: u32, index: u32, low: u32, high: u32) {
    let address = table.wrapping_add(index.wrapping_mul(SIZE));
    machine.store(address, low);
    machine.store(address.wrapping_add(4), high);
}
