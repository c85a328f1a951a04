//! The calls that come often and wait: in assembly what is usual of them, in the backend's functions all of it.
//!
//! Each puts what it is for behind what waits, in Xen's own form. That part needs interrupts neither off nor on: it is
//! [restartable], so one that is interrupted in it begins it again.

use super::{find_own, own, routines, uninterrupted};
use crate::granted::DISTANCE;
use core::arch::naked_asm;
use core::mem::offset_of;
use vmi_abi::flags::LazyMode;
use vmi_abi::number;
use vmi_hv_backend::xen::interface::{
    DOMID_SELF, Entry, HYPERCALL_VECTOR, MmuUpdate, MulticallEntry, PAGE_SHIFT, PAGE_SIZE,
    hypercall, mmuext,
};
use vmi_hv_backend::xen::{Cpu, Xen};
use x86::controlregs::Cr0;

/// What of an entry is the guest's, and not the frame's or of no use to Xen.
const KEPT_BITS: u64 = !(Entry::FRAME.bits() | Entry::GLOBAL.bits());

/// Where the arguments of the first call that waits are.
const ARGUMENTS: usize = Xen::CALLS_OFFSET + offset_of!(MulticallEntry, args);

/// Bytes of what is known of a restartable section: its distance, its length, and room to a boundary that the linker keeps.
pub(super) const RESTART_SIZE: usize = 16;

/// A section that begins again if an event comes in it: until its last instruction is done, it has changed nothing that
/// its first ones read, no register that it needs, and nothing that others look at.
macro_rules! restartable {
    ($($line:expr,)+) => {
        concat!(
            "77:\n",
            $($line, "\n",)+
            "78:\n",
            ".pushsection .rom.restarts, \"a\", @progbits\n",
            ".long 77b - ., 78b - 77b, 0, 0\n",
            ".popsection\n",
        )
    };
}

/// Finds room for one call more behind those that wait, in `$offset` from the state in `$own`. Where there is none: 6, in front.
macro_rules! find_room {
    ($own:literal, $offset:literal) => {
        concat!(
            own!["movzwl 2 + ", waiting, "(%"],
            $own,
            "), %e",
            $offset,
            "\n",
            own!["cmpw 2 + ", most, "(%"],
            $own,
            "), %",
            $offset,
            "\n",
            "jae 6f",
        )
    };
}

routines! {
    /// EDX:EAX value, ECX entry, stack flags.
    ///
    /// The usual case: an entry of the same table as the last one, which leads to memory that is no table, or nowhere.
    SetPxELong {
        "pushl %ebx",
        "pushl %esi",
        "pushl %edi",
        find_own!("ebx"),
        own!["xorl ", last_table, "(%ebx), %ecx"], // The offset in the table, if it is the same.
        "cmpl ${page}, %ecx",
        "jae 4f",
        "testb ${present}, %al",
        "jz 2f",
        "movl %eax, %esi",
        "shrdl ${page_shift}, %edx, %esi",
        own!["cmpl ", pages, "(%ebx), %esi"],
        "jae 4f",
        own!["movl ", tables, "(%ebx), %edi"],
        "btl %esi, (%edi)",
        "jc 4f",
        own!["movl ", p2m, "(%ebx), %edi"],
        "movl (%edi, %esi, 4), %esi",
        "andl ${low_bits}, %eax",
        "andl ${high_bits}, %edx",
        "movl %esi, %edi",
        "shll ${page_shift}, %esi",
        "shrl $32 - {page_shift}, %edi",
        "orl %esi, %eax",
        "orl %edi, %edx",
        own!["2: addl ", last_place, "(%ebx), %ecx"],
        restartable! {
            own!["movzwl ", waiting, "(%ebx), %esi"],
            own!["cmpw ", most, "(%ebx), %si"],
            "jae 3f",
            own!["movl ", last_place, " + 4(%ebx), %edi"],
            own!["movl %ecx, ", updates, "(%ebx, %esi)"],
            own!["movl %edi, ", updates, " + 4(%ebx, %esi)"],
            own!["movl %eax, ", updates, " + 8(%ebx, %esi)"],
            own!["movl %edx, ", updates, " + 12(%ebx, %esi)"],
            own!["addl ${one}, ", waiting, "(%ebx)"],
        },
        "popl %edi",
        "popl %esi",
        "popl %ebx",
        "retl",
        // It is the last, or does not wait.
        "3: pushl %edx",
        "pushl %eax",
        own!["movl ", last_place, " + 4(%ebx), %edx"],
        "call {take}",
        "popl %edi",
        "popl %esi",
        "popl %ebx",
        "retl",
        // Any other.
        own!["4: xorl ", last_table, "(%ebx), %ecx"],
        "popl %edi",
        "popl %esi",
        "popl %ebx",
        "pushl %eax",
        "call {function}",
        "retl",
        distance = const DISTANCE,
        last_table = const Xen::LAST_TABLE_OFFSET,
        last_place = const Xen::LAST_PLACE_OFFSET,
        waiting = const Xen::WAITING_OFFSET,
        most = const Xen::MOST_OFFSET,
        pages = const Xen::PAGES_OFFSET,
        p2m = const Xen::P2M_OFFSET,
        tables = const Xen::TABLES_OFFSET,
        updates = const Xen::UPDATES_OFFSET,
        one = const Xen::ONE_UPDATE,
        page = const PAGE_SIZE,
        page_shift = const PAGE_SHIFT,
        present = const Entry::PRESENT.bits(),
        low_bits = const KEPT_BITS as u32,
        high_bits = const (KEPT_BITS >> 32) as u32,
        take = sym take_update,
        function = sym set_entry,
    }

    /// EAX mode; changes EAX, ECX, EDX, flags.
    ///
    /// The usual cases: nothing waits, or the end of a context switch, with interrupts off.
    SetLazyMode {
        find_own!("edx"),
        "testl %eax, %eax",
        "jz 2f",
        restartable! {
            own!["cmpl $0, ", waiting, "(%edx)"],
            "jne 6f",
            "cmpl ${cpu}, %eax",
            "jne 6f",
            own!["movl ${most_calls}, ", most, "(%edx)"],
        },
        "retl",
        "2:",
        restartable! {
            own!["movl ", waiting, "(%edx), %ecx"],
            "testl %ecx, %ecx",
            "jnz 3f",
            own!["movl %ecx, ", most, "(%edx)"],
        },
        "retl",
        "3: testw %cx, %cx",
        "jnz 6f",
        own!["cmpb $0, ", mask, "(%edx)"],
        "je 6f",
        "pushl %ebx",
        "shrl ${call_shift}, %ecx",
        own!["leal ", calls, "(%edx), %ebx"],
        "movl ${multicall}, %eax",
        "int ${hypercall}",
        "movl %eax, %ebx",
        own!["movzwl 2 + ", waiting, "(%edx), %ecx"],
        // One that is negative makes all so. There is no harm in one more in front, which is none.
        own!["5: orl ", result, " - {one}(%edx, %ecx), %eax"],
        own!["orl ", result, " - 2 * {one}(%edx, %ecx), %eax"],
        "subl $2 * {one}, %ecx",
        "ja 5b",
        "testl %eax, %eax",
        "js 7f",
        "xorl %ecx, %ecx",
        own!["movl %ecx, ", waiting, "(%edx)"],
        own!["movl %ecx, ", changing, "(%edx)"],
        own!["movl %ecx, ", most, "(%edx)"],
        "popl %ebx",
        "retl",
        "6: movl %eax, %ecx",
        "jmp {function}",
        "7: movl %ebx, %ecx",
        "call {refused}",
        "popl %ebx",
        "retl",
        distance = const DISTANCE,
        waiting = const Xen::WAITING_OFFSET,
        most = const Xen::MOST_OFFSET,
        changing = const Xen::CHANGING_OFFSET,
        mask = const Xen::MASK_OFFSET,
        calls = const Xen::CALLS_OFFSET,
        result = const Xen::CALLS_OFFSET + offset_of!(MulticallEntry, result),
        one = const size_of::<MulticallEntry>(),
        call_shift = const Xen::ONE_CALL.trailing_zeros(),
        cpu = const LazyMode::CPU.0,
        most_calls = const Xen::most(LazyMode::CPU),
        multicall = const hypercall::MULTICALL,
        hypercall = const HYPERCALL_VECTOR,
        refused = sym refused,
        function = sym set_lazy_mode,
    }
}

/// Defines routines that put a call behind those that wait: all of them know where that is.
macro_rules! calls_that_wait {
    ($( $(#[$attribute:meta])* $name:ident { $($assembly:tt)+ } )*) => { routines! { $(
        $(#[$attribute])*
        $name {
            $($assembly)+
            distance = const DISTANCE,
            waiting = const Xen::WAITING_OFFSET,
            most = const Xen::MOST_OFFSET,
            calls = const Xen::CALLS_OFFSET,
            arguments = const ARGUMENTS,
            numbers = const Xen::NUMBERS_OFFSET,
            one = const Xen::ONE_CALL,
        }
    )* } };
}

calls_that_wait! {
    /// EAX table, EDX index, ECX low word, stack high word; changes EAX, ECX, EDX, flags.
    ///
    /// The usual cases: a program's segment, or nothing where nothing was, among the first of the GDT. What Xen has already it is not told,
    /// unless something else is to come in that place before.
    WriteGDTEntry {
        "pushl %ebx",
        "pushl %esi",
        find_own!("ebx"),
        own!["cmpl ", base, "(%ebx), %eax"],
        "jne 7f",
        own!["cmpl ", first, "(%ebx), %edx"],
        "jae 7f",
        "movl 12(%esp), %esi",
        "movl %ecx, (%eax, %edx, 8)",
        "movl %esi, 4(%eax, %edx, 8)",
        "cmpb ${program}, 13(%esp)",
        "jb 4f",
        own!["cmpl ", copy, "(%ebx, %edx, 8), %ecx"],
        "je 3f",
        "2:",
        restartable! {
            find_room!("ebx", "si"),
            own!["movl ${update_descriptor}, ", calls, "(%ebx, %esi)"],
            own!["movl ", place, "(%ebx), %eax"],
            "leal (%eax, %edx, 8), %eax",
            own!["movl %eax, ", arguments, "(%ebx, %esi)"],
            own!["movl ", place, " + 4(%ebx), %eax"],
            own!["movl %eax, 4 + ", arguments, "(%ebx, %esi)"],
            own!["movl %ecx, 8 + ", arguments, "(%ebx, %esi)"],
            "movl 12(%esp), %eax",
            own!["movl %eax, 12 + ", arguments, "(%ebx, %esi)"],
            own!["btsl %edx, ", changing, "(%ebx)"],
            own!["movl ${number}, ", numbers, "(%ebx, %esi)"],
            own!["addl ${one}, ", waiting, "(%ebx)"],
        },
        "popl %esi",
        "popl %ebx",
        "retl",
        // Its lower half is as it was.
        own!["3: xorl 4 + ", copy, "(%ebx, %edx, 8), %esi"],
        "testl $~{accessed}, %esi",
        "jnz 2b",
        "jmp 5f",
        // No program's segment.
        "4: andl ${segment}, %esi",
        "cmpl ${segment}, %esi",
        "je 6f",
        own!["movl ", copy, "(%ebx, %edx, 8), %eax"],
        own!["orl 4 + ", copy, "(%ebx, %edx, 8), %eax"],
        "jnz 6f",
        // As it was.
        own!["5: btl %edx, ", changing, "(%ebx)"],
        "jc 6f",
        "popl %esi",
        "popl %ebx",
        "retl",
        // Any other.
        own!["6: movl ", base, "(%ebx), %eax"],
        "7: popl %esi",
        "popl %ebx",
        "pushl 4(%esp)",
        "pushl %ecx",
        "movl %eax, %ecx",
        "call {function}",
        "retl",
        base = const Xen::GDT_BASE_OFFSET,
        first = const Xen::GDT_FIRST_OFFSET,
        copy = const Xen::GDT_COPY_OFFSET,
        place = const Xen::GDT_PLACE_OFFSET,
        changing = const Xen::CHANGING_OFFSET,
        update_descriptor = const hypercall::UPDATE_DESCRIPTOR,
        number = const number::WriteGDTEntry.0,
        program = const Xen::PROGRAM >> 8,
        segment = const Xen::SEGMENT,
        accessed = const Xen::ACCESSED,
        function = sym write_gdt_entry,
    }

    /// EDX the kernel's stack pointer; changes EAX, ECX, flags. EAX should be the task state segment: the current one counts.
    UpdateKernelStack {
        find_own!("ecx"),
        own!["movl ", task_state, "(%ecx), %eax"],
        "testl %eax, %eax",
        "jz 2f",
        "movl %edx, {esp0}(%eax)",
        "2:",
        restartable! {
            find_room!("ecx", "ax"),
            own!["movl ${stack_switch}, ", calls, "(%ecx, %eax)"],
            own!["movl $0, ", arguments, "(%ecx, %eax)"],
            own!["movw %ss, ", arguments, "(%ecx, %eax)"],
            own!["movl %edx, 4 + ", arguments, "(%ecx, %eax)"],
            own!["movl ${number}, ", numbers, "(%ecx, %eax)"],
            own!["addl ${one}, ", waiting, "(%ecx)"],
        },
        "retl",
        "6: movl %edx, %ecx",
        "jmp {function}",
        task_state = const Xen::TASK_STATE_OFFSET,
        esp0 = const Xen::ESP0,
        stack_switch = const hypercall::STACK_SWITCH,
        number = const number::UpdateKernelStack.0,
        function = sym update_kernel_stack,
    }

    /// Nothing in, nothing out; changes EAX, ECX, flags.
    CLTS {
        find_own!("ecx"),
        own!["andl $~{task_switched}, ", cr0, "(%ecx)"],
        restartable! {
            find_room!("ecx", "ax"),
            own!["movl ${fpu_taskswitch}, ", calls, "(%ecx, %eax)"],
            own!["movl $0, ", arguments, "(%ecx, %eax)"],
            own!["movl ${number}, ", numbers, "(%ecx, %eax)"],
            own!["addl ${one}, ", waiting, "(%ecx)"],
        },
        "retl",
        "6: jmp {function}",
        task_switched = const Cr0::CR0_TASK_SWITCHED.bits(),
        cr0 = const Xen::CR0_OFFSET,
        fpu_taskswitch = const hypercall::FPU_TASKSWITCH,
        number = const number::CLTS.0,
        function = sym clear_task_switched,
    }

    /// EAX value; changes EAX, ECX, EDX, flags.
    ///
    /// The usual case: tables that were announced.
    SetCR3 {
        find_own!("ecx"),
        "movl %eax, %edx",
        "shrl ${page_shift}, %edx",
        own!["cmpl ", pages, "(%ecx), %edx"],
        "jae 7f",
        own!["movl %eax, ", cr3, "(%ecx)"],
        own!["movl ", tables, "(%ecx), %eax"],
        "btl %edx, (%eax)",
        "jnc 6f",
        own!["movl ", p2m, "(%ecx), %eax"],
        "movl (%eax, %edx, 4), %edx",
        restartable! {
            find_room!("ecx", "ax"),
            "leal (%ecx, %eax), %eax",
            own!["movl ${new_root}, ", operations, "(%eax)"],
            own!["movl %edx, 4 + ", operations, "(%eax)"],
            own!["movl ${mmuext_op}, ", calls, "(%eax)"],
            own!["movl %eax, ", arguments, "(%eax)"],
            concat!(own!["addl $", operations, ", "], own!["", arguments, "(%eax)"]),
            own!["movl $1, 4 + ", arguments, "(%eax)"],
            own!["movl $0, 8 + ", arguments, "(%eax)"],
            own!["movl ${own_domain}, 12 + ", arguments, "(%eax)"],
            own!["movl ${number}, ", numbers, "(%eax)"],
            own!["addl ${one}, ", waiting, "(%ecx)"],
        },
        "retl",
        own!["6: movl ", cr3, "(%ecx), %eax"],
        "7: movl %eax, %ecx",
        "jmp {function}",
        cr3 = const Xen::CR3_OFFSET,
        pages = const Xen::PAGES_OFFSET,
        tables = const Xen::TABLES_OFFSET,
        p2m = const Xen::P2M_OFFSET,
        operations = const Xen::OPERATIONS_OFFSET,
        page_shift = const PAGE_SHIFT,
        new_root = const mmuext::NEW_BASEPTR,
        mmuext_op = const hypercall::MMUEXT_OP,
        own_domain = const DOMID_SELF,
        number = const number::SetCR3.0,
        function = sym set_cr3,
    }
}

/// SetPxELong in all its cases.
extern "fastcall" fn set_entry(entry: u32, high: u32, low: u32) {
    let value = u64::from(high) << 32 | u64::from(low);
    uninterrupted(|xen| xen.set_entry(&Cpu, value, entry));
}

/// Takes an update that is Xen's already.
extern "fastcall" fn take_update(ptr_low: u32, ptr_high: u32, val_low: u32, val_high: u32) {
    let long = |low, high| u64::from(high) << 32 | u64::from(low);
    let (ptr, val): (u64, u64) = (long(ptr_low, ptr_high), long(val_low, val_high));
    uninterrupted(|xen| xen.take_update(&Cpu, MmuUpdate { ptr, val }));
}

/// WriteGDTEntry in all its cases.
extern "fastcall" fn write_gdt_entry(table: u32, index: u32, low: u32, high: u32) {
    uninterrupted(|xen| xen.write_gdt_entry(&Cpu, table, index, low, high));
}

/// UpdateKernelStack in all its cases.
extern "fastcall" fn update_kernel_stack(esp0: u32) {
    uninterrupted(|xen| xen.update_kernel_stack(&Cpu, esp0));
}

/// CLTS in all its cases.
extern "fastcall" fn clear_task_switched() {
    uninterrupted(|xen| xen.clear_task_switched(&Cpu));
}

/// SetCR3 in all its cases.
extern "fastcall" fn set_cr3(value: u32) {
    uninterrupted(|xen| xen.set_cr3(&Cpu, value));
}

/// SetLazyMode in all its cases.
extern "fastcall" fn set_lazy_mode(mode: u32) {
    uninterrupted(|xen| xen.set_lazy_mode(&Cpu, LazyMode(mode)));
}

/// A multicall at the end of a context switch came out not as it should. Interrupts are off.
#[cold]
extern "fastcall" fn refused(status: u32) {
    uninterrupted(|xen| {
        xen.made_all(&Cpu, status.cast_signed());
        xen.set_lazy_mode(&Cpu, LazyMode::OFF);
    });
}
