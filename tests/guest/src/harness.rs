//! Enters a call with every register, flag and segment known, and looks at what is left.
//!
//! [`run`] switches to a stack painted with a pattern, loads all registers and jumps to a call site.
//! The site ends in a jump to the point of return, which stores all registers and comes back. What
//! the pattern no longer shows is the stack that the call used. With the trap flag set every
//! instruction is an observation too: the harness counts those inside the ROM and lets a test look
//! at memory between any two of them.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: the switch is assembly; call sites are memory that the processor executes"
)]

use crate::host;
use crate::processor;
use crate::segments::{NOWHERE, USER_DATA};
use crate::traps::Frame;
use core::arch::naked_asm;
use core::mem::offset_of;
use core::ops::Range;
use spin::Mutex;
use x86::bits32::eflags::EFlags;

/// General registers but ESP, in the order of their numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Registers {
    pub(crate) eax: u32,
    pub(crate) ecx: u32,
    pub(crate) edx: u32,
    pub(crate) ebx: u32,
    pub(crate) ebp: u32,
    pub(crate) esi: u32,
    pub(crate) edi: u32,
}

/// DS, ES, FS and GS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct DataSegments {
    pub(crate) ds: u32,
    pub(crate) es: u32,
    pub(crate) fs: u32,
    pub(crate) gs: u32,
}

/// A context: what a call starts from, and what it leaves.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Context {
    pub(crate) registers: Registers,
    pub(crate) esp: u32,
    pub(crate) eflags: u32,
    pub(crate) segments: DataSegments,
}

/// An exception, or the software interrupt with which ring 3 comes back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trap {
    pub(crate) frame: Frame,
    /// CR2 at that time.
    pub(crate) address: u32,
}

/// What a call left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    /// Registers at the point of return; at the exception when there was one.
    pub(crate) after: Context,
    /// The exception that ended the call.
    pub(crate) trap: Option<Trap>,
    /// Bytes of stack used below the return address (below the frame, where none is pushed).
    pub(crate) stack_used: u32,
    /// The caller's own words above its arguments were changed.
    pub(crate) caller_stack_changed: bool,
    /// Instructions executed inside the ROM; counted only in a traced run.
    pub(crate) instructions: u32,
}

/// What the assembly reads and writes.
#[repr(C)]
struct Shared {
    enter: Context,
    leave: Context,
    /// Where to jump.
    target: u32,
    /// The guest's own stack while the call runs.
    saved_esp: u32,
    saved_ss: u32,
}

static mut SHARED: Shared =
    Shared { enter: EMPTY, leave: EMPTY, target: 0, saved_esp: 0, saved_ss: 0 };

const EMPTY: Context = Context {
    registers: Registers { eax: 0, ecx: 0, edx: 0, ebx: 0, ebp: 0, esi: 0, edi: 0 },
    esp: 0,
    eflags: 0,
    segments: DataSegments { ds: 0, es: 0, fs: 0, gs: 0 },
};

/// Addresses, and what maps the page when a call faults on one of them.
pub(crate) type Demand = (Range<u32>, fn(u32));

/// What the handlers may look at while a call runs.
struct Observer {
    active: bool,
    trap: Option<Trap>,
    /// The ROM's code, in the linear space in which the call was bound.
    code: Range<u32>,
    /// Instructions seen inside the ROM.
    instructions: u32,
    last_eip: u32,
    /// The instruction at `last_eip` is STI.
    behind_sti: bool,
    /// Called before each instruction of a traced call.
    watch: Option<fn()>,
    /// Maps the page when a call faults on an address inside.
    demand: Option<Demand>,
}

/// The guest lets go of it before a call, and each handler before it returns or abandons the call.
static OBSERVER: Mutex<Observer> = Mutex::new(Observer {
    active: false,
    trap: None,
    code: 0..0,
    instructions: 0,
    last_eip: 0,
    behind_sti: false,
    watch: None,
    demand: None,
});

fn shared() -> &'static mut Shared {
    let shared = &raw mut SHARED;
    // SAFETY: one processor, and no handler keeps a reference beyond its own use. The assembly uses
    // it between the guest's uses.
    unsafe { &mut *shared }
}

const STACK_WORDS: usize = 2048;

/// The words of a painted stack. No call has a reason to store this one.
const PAINT: u32 = 0x5aa5_c33c;

/// Bytes of a return address. The switch pushes the flags into the same word on its way.
const RETURN_ADDRESS: u32 = 4;

/// Words above the arguments that belong to the caller.
const CALLER_WORDS: usize = 16;

#[repr(C, align(4096))]
struct CallStack([u32; STACK_WORDS]);

static mut CALL_STACK: CallStack = CallStack([PAINT; STACK_WORDS]);

/// The call stack as words that a call may have changed.
fn call_stack() -> *mut u32 {
    (&raw mut CALL_STACK).cast()
}

/// The linear address just above the painted stack.
pub(crate) fn stack_top() -> u32 {
    call_stack() as u32 + (STACK_WORDS * 4) as u32
}

/// How to enter the call, and what to watch.
pub(crate) struct Entry<'a> {
    /// Registers and flags on entry; ESP is the harness's to choose.
    pub(crate) context: Context,
    /// Words on top of the stack: arguments, or the frame of a transfer.
    pub(crate) stack: &'a [u32],
    /// The code to jump to.
    pub(crate) target: u32,
    /// Whether the target pushes a return address.
    pub(crate) by_call: bool,
    /// The ROM's code, for counting instructions.
    pub(crate) code: Range<u32>,
    /// Called before each instruction of a traced call.
    pub(crate) watch: Option<fn()>,
    /// Maps the page when a call faults on an address inside.
    pub(crate) demand: Option<Demand>,
}

/// ESP when a call with so many words on the stack is entered.
pub(crate) fn entry_esp(words: usize) -> u32 {
    stack_top() - ((words + CALLER_WORDS) * 4) as u32
}

/// Runs a call.
pub(crate) fn run(entry: &Entry<'_>) -> Outcome {
    let stack = call_stack();
    let first = STACK_WORDS - CALLER_WORDS - entry.stack.len();
    for index in 0..STACK_WORDS {
        let word = entry.stack.get(index.wrapping_sub(first)).copied().unwrap_or(PAINT);
        // SAFETY: inside the call stack.
        unsafe { stack.add(index).write_volatile(word) };
    }
    let esp = entry_esp(entry.stack.len());
    *OBSERVER.lock() = Observer {
        active: true,
        trap: None,
        code: entry.code.clone(),
        instructions: 0,
        last_eip: 0,
        behind_sti: false,
        watch: entry.watch,
        demand: entry.demand.clone(),
    };
    let state = shared();
    state.enter = Context { esp, ..entry.context };
    state.target = entry.target;
    host::set_interrupt_flag(entry.context.eflags);
    // SAFETY: the state is complete; the routine keeps the guest's registers and comes back by its
    // point of return or by `abandon_call`.
    unsafe { switch() };
    let state = shared();
    let mut observer = OBSERVER.lock();
    observer.active = false;
    if observer.trap.is_none() {
        state.leave.eflags = host::with_interrupt_flag(state.leave.eflags);
    }
    host::set_interrupt_flag(0);

    let word = |index: usize| {
        // SAFETY: inside the call stack.
        unsafe { stack.add(index).read_volatile() }
    };
    let used = (0..first)
        .find(|index| word(*index) != PAINT)
        .map_or(0, |lowest| (first - lowest) * 4) as u32;
    let stack_used = match (entry.by_call, used) {
        (true, _) => used.saturating_sub(RETURN_ADDRESS),
        // Only the switch's own flags, which it pushed and popped.
        (false, RETURN_ADDRESS) => 0,
        (false, _) => used,
    };
    Outcome {
        after: state.leave,
        trap: observer.trap,
        stack_used,
        caller_stack_changed: (STACK_WORDS - CALLER_WORDS..STACK_WORDS)
            .any(|index| word(index) != PAINT),
        instructions: observer.instructions,
    }
}

/// Whether a call is under test.
pub(crate) fn is_active() -> bool {
    OBSERVER.lock().active
}

/// A debug exception: `true` when it was the trap flag's, and the traced call goes on.
pub(crate) fn step(frame: &mut Frame) -> bool {
    const SINGLE_STEP: u32 = 1 << 14;
    let mut observer = OBSERVER.lock();
    if !observer.active || processor::dr6() & SINGLE_STEP == 0 {
        return false;
    }
    processor::set_dr6(0);
    // Some processors let the instruction behind STI pass without an exception.
    if observer.behind_sti && frame.eip != observer.last_eip + 1 {
        observer.instructions += 1;
    }
    let inside = observer.code.contains(&frame.eip);
    observer.behind_sti = inside && is_sti(frame.eip);
    if inside && frame.eip != observer.last_eip {
        observer.instructions += 1;
    }
    if inside && let Some(watch) = observer.watch {
        watch();
    }
    observer.last_eip = frame.eip;
    if frame.is_outer() || frame.eip == return_point as *const () as u32 {
        frame.eflags &= !EFlags::FLAGS_TF.bits();
    }
    true
}

/// Whether the instruction at an address in the ROM is STI.
fn is_sti(eip: u32) -> bool {
    const STI: u8 = 0xfb;
    // SAFETY: the processor is about to fetch from there, and the ROM's pages are readable.
    unsafe { (eip as *const u8).read_volatile() == STI }
}

/// A page fault: `true` when the test has mapped the page.
pub(crate) fn serve_page_fault(address: u32) -> bool {
    let demand = OBSERVER.lock().demand.clone();
    match demand {
        Some((range, map)) if range.contains(&address) => {
            map(address);
            true
        }
        _ => false,
    }
}

/// An exception ends the call: what it interrupted is the outcome.
pub(crate) fn interrupted(frame: &Frame) -> ! {
    let trap = Trap { frame: *frame, address: processor::cr2() };
    OBSERVER.lock().trap = Some(trap);
    let leave = &mut shared().leave;
    leave.registers = Registers {
        eax: frame.eax,
        ecx: frame.ecx,
        edx: frame.edx,
        ebx: frame.ebx,
        ebp: frame.ebp,
        esi: frame.esi,
        edi: frame.edi,
    };
    let inner_esp = (&raw const frame.esp) as u32;
    leave.esp = if frame.is_outer() { frame.esp } else { inner_esp };
    leave.eflags = frame.eflags;
    // In virtual-8086 mode the processor pushed them, and may leave the upper halves alone.
    leave.segments = if frame.is_virtual_8086() {
        DataSegments { ds: frame.vm_ds, es: frame.vm_es, fs: frame.vm_fs, gs: frame.vm_gs }
    } else {
        DataSegments { ds: frame.ds, es: frame.es, fs: frame.fs, gs: frame.gs }
    };
    for segment in [
        &mut leave.segments.ds,
        &mut leave.segments.es,
        &mut leave.segments.fs,
        &mut leave.segments.gs,
    ] {
        *segment &= 0xffff;
    }
    // SAFETY: a call is active, so the saved stack is that of its `switch`.
    unsafe { abandon_call() }
}

const REGISTERS: usize = offset_of!(Context, registers);

/// Assembly that walks a [`Context`] of [`Shared`], whose fields it knows by name.
macro_rules! context_assembly {
    ($($line:literal,)* ; $($operand:tt)*) => {
        naked_asm!(
            $($line,)*
            $($operand)*
            shared = sym SHARED,
            saved_esp = const offset_of!(Shared, saved_esp),
            esp = const offset_of!(Context, esp),
            eflags = const offset_of!(Context, eflags),
            ds = const offset_of!(Context, segments.ds),
            es = const offset_of!(Context, segments.es),
            fs = const offset_of!(Context, segments.fs),
            gs = const offset_of!(Context, segments.gs),
            eax = const REGISTERS + offset_of!(Registers, eax),
            ecx = const REGISTERS + offset_of!(Registers, ecx),
            edx = const REGISTERS + offset_of!(Registers, edx),
            ebx_ = const REGISTERS + offset_of!(Registers, ebx),
            ebp = const REGISTERS + offset_of!(Registers, ebp),
            esi = const REGISTERS + offset_of!(Registers, esi),
            edi = const REGISTERS + offset_of!(Registers, edi),
        )
    };
}

/// Loads the context in `SHARED.enter` and jumps to the target; comes back by [`return_point`].
///
/// C calling convention, no arguments; keeps all registers and flags. Data goes through SS only:
/// DS and ES may be null.
#[unsafe(naked)]
unsafe extern "C" fn switch() {
    context_assembly!(
        "pushfd",
        "pushad",
        "mov eax, ds",
        "push eax",
        "mov eax, es",
        "push eax",
        "mov eax, fs",
        "push eax",
        "mov eax, gs",
        "push eax",
        "mov ebx, offset {shared}",
        "mov ss:[ebx + {saved_esp}], esp",
        "mov eax, ss",
        "mov ss:[ebx + {saved_ss}], eax",
        "mov esp, ss:[ebx + {enter} + {esp}]",
        "mov es, ss:[ebx + {enter} + {es}]",
        "mov fs, ss:[ebx + {enter} + {fs}]",
        "mov gs, ss:[ebx + {enter} + {gs}]",
        "mov ds, ss:[ebx + {enter} + {ds}]",
        "push dword ptr ss:[ebx + {enter} + {eflags}]",
        // From here on the trap flag may be set.
        "popfd",
        "mov eax, ss:[ebx + {enter} + {eax}]",
        "mov ecx, ss:[ebx + {enter} + {ecx}]",
        "mov edx, ss:[ebx + {enter} + {edx}]",
        "mov ebp, ss:[ebx + {enter} + {ebp}]",
        "mov esi, ss:[ebx + {enter} + {esi}]",
        "mov edi, ss:[ebx + {enter} + {edi}]",
        "mov ebx, ss:[ebx + {enter} + {ebx_}]",
        "jmp dword ptr ss:[{shared} + {target}]",
        ;
        target = const offset_of!(Shared, target),
        saved_ss = const offset_of!(Shared, saved_ss),
        enter = const offset_of!(Shared, enter),
    )
}

/// Where a call comes back to: stores everything and returns from [`switch`].
///
/// Not called: reached by the jump that ends each call site, with any registers and segments.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn return_point() {
    context_assembly!(
        // MOV keeps the flags until they are stored.
        "mov ss:[{shared} + {leave} + {ebx_}], ebx",
        "mov ebx, offset {shared}",
        "mov ss:[ebx + {leave} + {eax}], eax",
        "mov ss:[ebx + {leave} + {ecx}], ecx",
        "mov ss:[ebx + {leave} + {edx}], edx",
        "mov ss:[ebx + {leave} + {ebp}], ebp",
        "mov ss:[ebx + {leave} + {esi}], esi",
        "mov ss:[ebx + {leave} + {edi}], edi",
        "mov ss:[ebx + {leave} + {esp}], esp",
        "mov eax, ds",
        "mov ss:[ebx + {leave} + {ds}], eax",
        "mov eax, es",
        "mov ss:[ebx + {leave} + {es}], eax",
        "mov eax, fs",
        "mov ss:[ebx + {leave} + {fs}], eax",
        "mov eax, gs",
        "mov ss:[ebx + {leave} + {gs}], eax",
        "mov esp, ss:[ebx + {saved_esp}]",
        "pushfd",
        "pop dword ptr ss:[ebx + {leave} + {eflags}]",
        "jmp {abandon_call}",
        ;
        abandon_call = sym abandon_call,
        leave = const offset_of!(Shared, leave),
    )
}

/// Returns from [`switch`] without the call: drops whatever stack is current.
#[unsafe(naked)]
unsafe extern "C" fn abandon_call() -> ! {
    naked_asm!(
        "cli",
        "cld",
        // Any context may have been left here, but SS is always flat.
        "mov eax, ss:[{shared} + {saved_ss}]",
        "mov ss, eax",
        "mov esp, ss:[{shared} + {saved_esp}]",
        "pop eax",
        "mov gs, eax",
        "pop eax",
        "mov fs, eax",
        "pop eax",
        "mov es, eax",
        "pop eax",
        "mov ds, eax",
        "popad",
        "popfd",
        "ret",
        shared = sym SHARED,
        saved_esp = const offset_of!(Shared, saved_esp),
        saved_ss = const offset_of!(Shared, saved_ss),
    )
}

/// The segments of a kernel that runs: DS and ES flat, the user's; FS and GS its own business.
pub(crate) const FLAT: DataSegments = DataSegments {
    ds: USER_DATA as u32,
    es: USER_DATA as u32,
    fs: NOWHERE as u32,
    gs: NOWHERE as u32,
};

/// The segments of an interrupted context: nothing there to be used.
pub(crate) const NOT_OURS: DataSegments =
    DataSegments { ds: NOWHERE as u32, es: NOWHERE as u32, fs: NOWHERE as u32, gs: NOWHERE as u32 };
