//! Descriptor tables, their registers, and the task state segment.

use core::mem::offset_of;
use vmi_abi::state::DescriptorTable;

/// Bytes of a descriptor.
const DESCRIPTOR_SIZE: usize = 8;

/// Offset of a segment descriptor's base, bits 0 to 15.
const BASE_LOW: usize = 2;

/// Offset of a segment descriptor's base, bits 16 to 23.
const BASE_MIDDLE: usize = 4;

/// Offset of a segment descriptor's base, bits 24 to 31.
const BASE_HIGH: usize = 7;

/// Offset of the ring-0 stack pointer in a 32-bit task state segment.
const TASK_STATE_ESP0: usize = 4;

/// The part of a selector that is an offset into the table.
const SELECTOR_INDEX: u32 = 0xfff8;

short_routines! {
    /// EAX -> limit and base.
    SetGDT { "lgdt [eax]"; "ret" }

    /// EAX -> limit and base.
    SetIDT { "lidt [eax]"; "ret" }

    /// -> EAX.
    GetTR { "str eax"; "ret" }
}

routines! {
    /// EAX selector.
    SetLDT {
        "lldt ax",
        "ret",
    }

    /// EAX selector.
    SetTR {
        "ltr ax",
        "ret",
    }

    /// EAX -> buffer.
    GetGDT {
        "sgdt [eax]",
        "ret",
    }

    /// -> EAX.
    GetLDT {
        "sldt eax",
        "ret",
    }

    /// EAX -> buffer.
    GetIDT {
        "sidt [eax]",
        "ret",
    }

    /// EAX table, EDX index, ECX low word, stack high word; changes ECX.
    ///
    /// Native code for all three tables: memory is memory.
    WriteGDTEntry, WriteLDTEntry, WriteIDTEntry {
        "mov [eax + edx * {size}], ecx",
        "mov ecx, [esp + 4]",
        "mov [eax + edx * {size} + 4], ecx",
        "ret",
        size = const DESCRIPTOR_SIZE,
    }
}

long_routines! {
    /// EDX ring-0 stack pointer; changes EAX, ECX, flags.
    ///
    /// EAX should point to the task state segment, but Linux passes a data selector: the task
    /// register tells which segment is the current one. Without one there is nothing to set.
    UpdateKernelStack {
        "str ax",
        "and eax, {index}",
        "jz 2f",
        "sub esp, 8",
        "sgdt [esp]",
        "add eax, [esp + {base}]",
        "add esp, 8",
        "mov ecx, eax",
        "mov ah, [ecx + {base_high}]",
        "mov al, [ecx + {base_middle}]",
        "shl eax, 16",
        "mov ax, [ecx + {base_low}]",
        "mov [eax + {esp0}], edx",
        "2: ret",
        index = const SELECTOR_INDEX,
        base = const offset_of!(DescriptorTable, base),
        base_high = const BASE_HIGH,
        base_middle = const BASE_MIDDLE,
        base_low = const BASE_LOW,
        esp0 = const TASK_STATE_ESP0,
    }
}
