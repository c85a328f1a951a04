//! Descriptor tables, their registers, and the task state segment.

#![expect(non_snake_case, reason = "the specification's names")]
#![expect(unsafe_code, reason = "UNSAFETY: small routines in assembly that the harness runs")]

use super::{COME_BACK, place_user_code, read, run_own, run_user};
use crate::harness::{Outcome, Registers};
use crate::paging::{USER_CODE, USER_STACK_TOP};
use crate::segments::{
    self, GDT, IDT, KERNEL_DATA, KERNEL_DATA_DESCRIPTOR, LDT, LOCAL_CODE, LOCAL_DATA, LOCAL_TABLE,
    OTHER_GDT, OTHER_IDT, OTHER_TASK, OTHER_TASK_STATE, SPARE, TASK, TASK_STATE, Table,
    USER_CODE_DESCRIPTOR, USER_DATA, USER_DATA_DESCRIPTOR,
};
use crate::session::{Arguments, FIXED_FLAG, INTERRUPT_FLAG, Session};
use crate::{host, processor};
use crate::{suite, traps};
use core::arch::naked_asm;
use vmi_abi::state::DescriptorTable;

pub(crate) fn SetGDT(s: &mut Session) {
    set_table(s, segments::table_of(&raw const OTHER_GDT), processor::gdt, processor::set_gdt);
}

pub(crate) fn SetIDT(s: &mut Session) {
    set_table(s, segments::table_of(&raw const OTHER_IDT), processor::idt, processor::set_idt);
}

/// Loads another table; the register must name it, and the argument must stay what it was.
fn set_table(
    s: &mut Session,
    other: DescriptorTable,
    get: fn() -> DescriptorTable,
    set: fn(DescriptorTable),
) {
    s.each(|s| {
        let own = get();
        let argument = other;
        s.call(Arguments::NONE.eax((&raw const argument) as u32));
        let found = get();
        s.expect(
            found == other,
            format_args!("the register holds {found:x?}, must hold {other:x?}"),
        );
        s.expect(argument == other, format_args!("the argument in memory was changed"));
        set(own);
    });
}

pub(crate) fn GetGDT(s: &mut Session) {
    get_table(s, processor::gdt);
}

pub(crate) fn GetIDT(s: &mut Session) {
    get_table(s, processor::idt);
}

/// Stores the register in six bytes, and no more.
fn get_table(s: &mut Session, get: fn() -> DescriptorTable) {
    #[repr(C)]
    struct Buffer {
        before: [u8; 6],
        table: DescriptorTable,
        after: [u8; 4],
    }
    s.each(|s| {
        let mut buffer =
            Buffer { before: [0xa5; 6], table: DescriptorTable::default(), after: [0xa5; 4] };
        let address = (&raw mut buffer.table) as u32;
        s.call(Arguments::NONE.eax(address));
        let buffer = core::hint::black_box(&buffer);
        s.expect(
            buffer.table == get(),
            format_args!("the buffer holds {:x?}, must hold {:x?}", buffer.table, get()),
        );
        s.expect(
            buffer.before == [0xa5; 6] && buffer.after == [0xa5; 4],
            format_args!("memory beside the buffer was changed"),
        );
    });
}

pub(crate) fn SetLDT(s: &mut Session) {
    s.each(|s| {
        for selector in [LOCAL_TABLE, 0] {
            s.call(Arguments::NONE.eax(u32::from(selector)));
            s.equal("LDTR", u32::from(processor::ldt()), u32::from(selector));
        }
    });
}

pub(crate) fn GetLDT(s: &mut Session) {
    s.each(|s| {
        for selector in [LOCAL_TABLE, 0] {
            processor::set_ldt(selector);
            let Outcome { after, .. } = s.call(Arguments::NONE);
            s.equal("the selector in EAX", after.registers.eax & 0xffff, u32::from(selector));
        }
    });
}

pub(crate) fn SetTR(s: &mut Session) {
    s.each(|s| {
        segments::release_task(OTHER_TASK);
        s.call(Arguments::NONE.eax(u32::from(OTHER_TASK)));
        s.equal("TR", u32::from(processor::task()), u32::from(OTHER_TASK));
        segments::release_task(TASK);
        processor::set_task(TASK);
    });
}

pub(crate) fn GetTR(s: &mut Session) {
    s.each(|s| {
        let Outcome { after, .. } = s.call(Arguments::NONE);
        s.equal("the selector in EAX", after.registers.eax & 0xffff, u32::from(TASK));
    });
}

/// Bits that a hypervisor may alter in a segment descriptor on its way in: privilege level, limit.
const ALTERABLE: u64 = 0x0000_6000_0000_0000 | 0x000f_0000_0000_ffff;

/// Writes descriptors into a table, and looks at them and at their neighbours.
fn write_entries<const N: usize>(
    s: &mut Session,
    table: *mut Table<N>,
    index: usize,
    values: &[u64],
    alterable: u64,
) {
    let neighbours =
        [segments::descriptor(table, index - 1), segments::descriptor(table, index + 1)];
    for value in values {
        s.call(
            Arguments::NONE
                .eax(table as u32)
                .edx(index as u32)
                .ecx(*value as u32)
                .stack(&[(*value >> 32) as u32]),
        );
        let found = segments::descriptor(table, index);
        s.expect(
            (found ^ value) & !alterable == 0,
            format_args!("entry {index} is {found:#x}, must be {value:#x}"),
        );
    }
    let now = [segments::descriptor(table, index - 1), segments::descriptor(table, index + 1)];
    s.expect(now == neighbours, format_args!("entries beside {index} were changed"));
}

/// Loads ES from EAX and keeps it for a moment.
#[unsafe(naked)]
unsafe extern "C" fn load_es() {
    naked_asm!("mov ecx, es", "mov es, eax", "mov edx, es:[esp]", "mov es, ecx", "ret")
}

pub(crate) fn WriteGDTEntry(s: &mut Session) {
    s.each(|s| {
        let index = usize::from(SPARE >> 3);
        write_entries(
            s,
            &raw mut GDT,
            index,
            &[0, KERNEL_DATA_DESCRIPTOR, USER_DATA_DESCRIPTOR],
            ALTERABLE,
        );
        let outcome =
            run_own(load_es, Registers { eax: u32::from(SPARE | 3), ..Registers::default() }, &[]);
        s.expect(
            outcome.trap.is_none(),
            format_args!("the written descriptor cannot be loaded and used"),
        );
        write_entries(s, &raw mut GDT, index, &[0], 0);
        let outcome =
            run_own(load_es, Registers { eax: u32::from(SPARE | 3), ..Registers::default() }, &[]);
        s.expect(
            outcome.trap.is_some(),
            format_args!("the cleared descriptor can still be loaded"),
        );
    });
}

/// A process with a local descriptor table: its code and data run through the written entries.
pub(crate) fn WriteLDTEntry(s: &mut Session) {
    place_user_code(&COME_BACK);
    s.each(|s| {
        let (code, data) = (usize::from(LOCAL_CODE >> 3), usize::from(LOCAL_DATA >> 3));
        s.call(entry_arguments((&raw mut LDT) as u32, code, USER_CODE_DESCRIPTOR));
        write_entries(s, &raw mut LDT, data, &[0, USER_DATA_DESCRIPTOR], ALTERABLE);
        s.expect(
            (segments::descriptor(&raw const LDT, code) ^ USER_CODE_DESCRIPTOR) & !ALTERABLE == 0,
            format_args!("entry 0 does not hold what was written"),
        );
        processor::set_ldt(LOCAL_TABLE);
        let frame = [
            USER_CODE,
            u32::from(LOCAL_CODE),
            FIXED_FLAG | INTERRUPT_FLAG,
            USER_STACK_TOP,
            u32::from(LOCAL_DATA),
        ];
        let outcome = run_user(Registers::default(), &frame);
        let arrived = outcome
            .trap
            .map(|trap| (trap.frame.vector, trap.frame.cs & 0xffff, trap.frame.ss & 0xffff));
        let wanted = (traps::SYSTEM_CALL, u32::from(LOCAL_CODE), u32::from(LOCAL_DATA));
        s.expect(
            arrived == Some(wanted),
            format_args!("a process in the LDT came back with {arrived:x?}, not {wanted:x?}"),
        );
        processor::set_ldt(0);
        for index in [code, data] {
            s.call(entry_arguments((&raw mut LDT) as u32, index, 0));
        }
    });
}

fn entry_arguments(table: u32, index: usize, value: u64) -> Arguments {
    Arguments::NONE.eax(table).edx(index as u32).ecx(value as u32).stack(&[(value >> 32) as u32])
}

/// Raises the vector of the written gate.
#[unsafe(naked)]
unsafe extern "C" fn raise_spare() {
    naked_asm!("int {vector}", "ret", vector = const traps::SPARE_VECTOR)
}

/// Raises an exception: an instruction that there is not.
#[unsafe(naked)]
unsafe extern "C" fn raise_invalid_opcode() {
    naked_asm!("ud2", "ret")
}

pub(crate) fn WriteIDTEntry(s: &mut Session) {
    // The gate of another vector: its handler says by which it was reached.
    const ANOTHER: usize = 0x90;
    // In long mode QEMU tells a host another vector than INT has named, so an exception's must do there.
    let (index, raise) = if host::is_hosted() {
        (traps::INVALID_OPCODE as usize, raise_invalid_opcode as unsafe extern "C" fn())
    } else {
        (traps::SPARE_VECTOR as usize, raise_spare as unsafe extern "C" fn())
    };
    s.each(|s| {
        let own = segments::descriptor(&raw const IDT, index);
        let another = segments::descriptor(&raw const IDT, ANOTHER);
        write_entries(s, &raw mut IDT, index, &[0, another], 0);
        let outcome = run_own(raise, Registers::default(), &[]);
        let vector = outcome.trap.map(|trap| trap.frame.vector);
        s.expect(
            vector == Some(ANOTHER as u32),
            format_args!("the written gate led to {vector:x?}, not to the new handler"),
        );
        write_entries(s, &raw mut IDT, index, &[own], 0);
    });
}

pub(crate) fn UpdateKernelStack(s: &mut Session) {
    place_user_code(&COME_BACK);
    let own = suite::trap_stack_top();
    s.each(|s| {
        for (passed, esp0) in
            [((&raw const TASK_STATE) as u32, own - 4096), (u32::from(KERNEL_DATA), own - 8192)]
        {
            s.call(Arguments::NONE.eax(passed).edx(esp0));
            s.equal(
                "esp0 of the current task state segment",
                segments::kernel_stack(&raw const TASK_STATE),
                esp0,
            );
            s.equal(
                "esp0 of another task state segment",
                segments::kernel_stack(&raw const OTHER_TASK_STATE),
                own,
            );
            // The frame of an entry from ring 3 is the top of that stack: SS is its last word.
            let frame = [
                USER_CODE,
                0x73,
                FIXED_FLAG | INTERRUPT_FLAG,
                USER_STACK_TOP,
                u32::from(USER_DATA),
            ];
            run_user(Registers::default(), &frame);
            let pushed = read(esp0 - 4).unwrap_or(0);
            s.equal(
                "SS on the new stack after an entry from ring 3",
                pushed & 0xffff,
                u32::from(USER_DATA),
            );
        }
        segments::set_kernel_stack(own);
    });
}
