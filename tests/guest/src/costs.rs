//! What an operation of a kernel costs, in instructions: with the ROM's answers, and with native
//! code in the sites, as a kernel without a ROM patches it.
//!
//! Under QEMU's `-icount` the time-stamp counter counts instructions; elsewhere nothing is counted. Each operation is a piece of
//! code made for it, with the sites that a kernel has: a patched one for the calls that Linux
//! patches, a call through a pointer for all others. What a ROM makes of its sites happens before
//! anything is counted.

#![expect(unsafe_code, reason = "UNSAFETY: runs code that it writes")]

use crate::checks::{own_code, place_user_code, run_user};
use crate::console::line;
use crate::harness::Registers;
use crate::paging::{Space, TEST_AREA, USER_CODE, USER_STACK_TOP};
use crate::rom::Rom;
use crate::segments::{
    self, IDT, KERNEL_CODE, TASK_STATE, USER_CODE as USER_CODE_SELECTOR, USER_DATA,
};
use crate::session::FIXED_FLAG;
use crate::site::{Area, Native};
use crate::{processor, suite};
use core::arch::naked_asm;
use vmi_abi::flags::{FlushFlags, LazyMode};
use vmi_abi::{Call, CallNumber, Ending, RelocationType, Site, number};
use x86::msr::{IA32_SYSENTER_CS, IA32_SYSENTER_EIP, IA32_SYSENTER_ESP};

/// How often an operation is done for each count.
const TIMES: u32 = 100;

/// How often a count must come out the same before it is believed.
const STEADY: u32 = 4;

/// Bytes of a site: the call through a pointer that the compiler made, over which all else is
/// patched.
const SITE: usize = 6;

/// The vector of the operations that begin with an interrupt.
const VECTOR: u8 = 0x90;

/// A call, and what is in EAX, EDX and ECX before it.
#[derive(Clone, Copy)]
struct Step {
    call: CallNumber,
    arguments: [u32; 3],
}

const fn step(call: CallNumber) -> Step {
    step_with(call, [0; 3])
}

const fn step_with(call: CallNumber, arguments: [u32; 3]) -> Step {
    Step { call, arguments }
}

/// How the code of an operation is reached.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Entrance {
    /// Called by the kernel.
    Kernel,
    /// By a software interrupt; it ends in IRET.
    Interrupt,
    /// From ring 3 by SYSENTER; it ends in SYSEXIT.
    Program,
}

/// What stands at a site.
#[derive(Clone, Copy)]
enum Target {
    /// Native code, filled up with a NOP.
    Native(Native),
    /// A direct call.
    Call(u32),
    /// A call through a pointer.
    Pointer(u32),
    /// A direct jump.
    Jump(u32),
    /// Nothing but a NOP.
    Nothing,
}

/// Counts every operation, natively and with the ROM.
pub(crate) fn count(space: Space, rom: Rom) {
    let entry = space.entry(TEST_AREA);
    let cr3 = processor::cr3();
    let cr0 = processor::cr0();
    let state = (&raw const TASK_STATE) as u32;
    let kernel_stack = suite::trap_stack_top();
    let set_entry = step_with(number::SetPxE, [0, entry, 0]);
    let disable = step(number::DisableInterrupts);
    let enable = step(number::EnableInterrupts);
    let restore = step_with(number::SetInterruptMask, [FIXED_FLAG, 0, 0]);
    let to_fpu = step(number::CLTS);
    let from_fpu = [step(number::GetCR0), step_with(number::SetCR0, [cr0, 0, 0])];
    let switch = step_with(number::SetCR3, [cr3, 0, 0]);
    let stack = step_with(number::UpdateKernelStack, [state, kernel_stack, 0]);
    let flush = step_with(number::FlushTLB, [FlushFlags::TLB.bits(), 0, 0]);
    let invalidate = step_with(number::InvalPage, [TEST_AREA, 0, 0]);
    let lazy = |mode: LazyMode| step_with(number::SetLazyMode, [mode.0, 0, 0]);
    let cr2 = step(number::GetCR2);
    let operations: [(&str, Entrance, &[Step]); 12] = [
        ("cli and sti", Entrance::Kernel, &[disable, enable]),
        (
            "save flags, cli, restore",
            Entrance::Kernel,
            &[step(number::GetInterruptMask), disable, restore],
        ),
        ("interrupt", Entrance::Interrupt, &[step(number::IRET)]),
        ("page fault", Entrance::Interrupt, &[cr2, enable, disable, step(number::IRET)]),
        ("system call", Entrance::Program, &[enable, disable, step(number::SYSEXIT)]),
        ("address-space switch", Entrance::Kernel, &[switch]),
        ("FPU taken and given back", Entrance::Kernel, &[to_fpu, from_fpu[0], from_fpu[1]]),
        (
            "context switch",
            Entrance::Kernel,
            &[disable, stack, switch, to_fpu, from_fpu[0], from_fpu[1], enable],
        ),
        ("one page mapped", Entrance::Kernel, &[set_entry, invalidate]),
        (
            "eight entries, lazily",
            Entrance::Kernel,
            &[
                lazy(LazyMode::MMU),
                set_entry,
                set_entry,
                set_entry,
                set_entry,
                set_entry,
                set_entry,
                set_entry,
                set_entry,
                lazy(LazyMode::OFF),
            ],
        ),
        ("all translations flushed", Entrance::Kernel, &[flush]),
        ("time-stamp counter", Entrance::Kernel, &[step(number::RDTSC)]),
    ];
    // Counting instructions gives the same number each time, measuring time hardly ever.
    let first = measure(Entrance::Interrupt, &[step(number::IRET)], native);
    if (0..STEADY).any(|_| measure(Entrance::Interrupt, &[step(number::IRET)], native) != first) {
        line!("# not tried: costs, as the time-stamp counter does not count instructions");
        return;
    }
    for (name, entrance, steps) in operations {
        if entrance == Entrance::Program && processor::cpuid(1, 0)[3] & 1 << 11 == 0 {
            continue;
        }
        let native = measure(entrance, steps, native);
        let bound = measure(entrance, steps, |call| bound(rom, call));
        line!("# cost operation=\"{name}\" times={TIMES} native={native} rom={bound}");
    }
    space.store(entry, 0);
    processor::invlpg(TEST_AREA);
}

/// The site of a kernel that has no ROM.
fn native(call: &Call) -> Target {
    let own = own_code(call.number.unwrap_or(number::SetCallbacks)).unwrap_or(0);
    Native::of(call, own).map_or(Target::Call(own), Target::Native)
}

/// The site that the ROM's answer leads to.
fn bound(rom: Rom, call: &Call) -> Target {
    let number = call.number.unwrap_or(number::SetCallbacks);
    let answer = rom.answer(number.0);
    let eip = answer.eip.get();
    match answer.kind {
        RelocationType::CALL_REL if call.contract.site == Site::Patched => Target::Call(eip),
        RelocationType::CALL_REL => Target::Pointer(eip),
        RelocationType::JUMP_REL => Target::Jump(eip),
        RelocationType::NOP => Target::Nothing,
        _ => Target::Pointer(own_code(number).unwrap_or(0)),
    }
}

/// Instructions of the operation, [`TIMES`] times over, beyond what it takes to get there.
fn measure(entrance: Entrance, steps: &[Step], site: impl Fn(&Call) -> Target) -> u32 {
    let mut area = Area::new();
    let code = area.here();
    for Step { call, arguments: [eax, edx, ecx] } in steps {
        let Some(call) = call.call() else { continue };
        let returns = call.contract.ending == Ending::Returns;
        if returns {
            // MOV to EAX, EDX and ECX.
            for (opcode, value) in [(0xb8, *eax), (0xba, *edx), (0xb9, *ecx)] {
                area.append(&[opcode]);
                area.append(&value.to_le_bytes());
            }
        } else if call.number == Some(number::SYSEXIT) {
            area.append(&[0xba]);
            area.append(&(USER_CODE + RESUME).to_le_bytes());
            area.append(&[0xb9]);
            area.append(&USER_STACK_TOP.to_le_bytes());
        }
        let words = call.contract.stack_words();
        for _ in 0..words {
            area.append(&[0x6a, 0]); // PUSH 0
        }
        match site(call) {
            Target::Native(native) => {
                let code = native.bytes();
                area.append(code);
                if returns {
                    for _ in code.len() + 1..SITE {
                        area.append(&[0x66]);
                    }
                    area.append(&[0x90]);
                }
            }
            Target::Call(target) => {
                area.append_branch(0xe8, target);
                // What is left of the call that the compiler made.
                if returns && call.contract.site == Site::Patched {
                    area.append(&[0x90]);
                }
            }
            Target::Jump(target) => area.append_branch(0xe9, target),
            Target::Pointer(target) => area.append_pointer_call(target),
            Target::Nothing => area.append(&[0x66, 0x66, 0x66, 0x66, 0x90]),
        }
        if words > 0 {
            area.append(&[0x83, 0xc4, (words * 4) as u8]); // ADD ESP
        }
    }
    area.append(&[0xc3]);
    let once = match entrance {
        Entrance::Kernel => code,
        Entrance::Interrupt => {
            segments::set_descriptor(&raw mut IDT, usize::from(VECTOR), segments::gate(code, 0));
            let start = area.here();
            area.append(&[0xcd, VECTOR, 0xc3]);
            start
        }
        Entrance::Program => return measure_program(code),
    };
    let empty = area.here();
    area.append(&[0xc3]);
    // SAFETY: code that was just written, which keeps what a C function keeps; all interrupt lines
    // are masked.
    let count = |code: u32| unsafe {
        repeat(code, 1);
        let before = processor::rdtsc();
        repeat(code, TIMES);
        (processor::rdtsc() - before) as u32
    };
    count(once).wrapping_sub(count(empty))
}

/// Offset in ring 3's code of what follows SYSENTER.
const RESUME: u32 = 7;

/// Instructions of [`TIMES`] system calls; the loop around them is ring 3's.
fn measure_program(entry: u32) -> u32 {
    for (register, value) in [
        (IA32_SYSENTER_CS, u32::from(KERNEL_CODE)),
        (IA32_SYSENTER_ESP, suite::trap_stack_top()),
        (IA32_SYSENTER_EIP, entry),
    ] {
        processor::wrmsr(register, u64::from(value));
    }
    let frame = [
        USER_CODE,
        u32::from(USER_CODE_SELECTOR),
        FIXED_FLAG,
        USER_STACK_TOP,
        u32::from(USER_DATA),
    ];
    let run = |times: u32| {
        let [a, b, c, d] = times.to_le_bytes();
        // MOV ESI; SYSENTER; DEC ESI; JNZ to SYSENTER; INT 80h.
        place_user_code(&[0xbe, a, b, c, d, 0x0f, 0x34, 0x4e, 0x75, 0xfb, 0xcd, 0x80]);
        let before = processor::rdtsc();
        run_user(Registers::default(), &frame);
        (processor::rdtsc() - before) as u32
    };
    run(1);
    run(2 * TIMES).wrapping_sub(run(TIMES))
}

/// Calls code a number of times.
///
/// C calling convention; the code keeps what a C function keeps.
#[unsafe(naked)]
unsafe extern "C" fn repeat(code: u32, times: u32) {
    naked_asm!(
        "push ebx",
        "push esi",
        "pushfd",
        "mov ebx, [esp + 16]",
        "mov esi, [esp + 20]",
        "2: call ebx",
        "dec esi",
        "jnz 2b",
        "popfd",
        "pop esi",
        "pop ebx",
        "ret",
    )
}
