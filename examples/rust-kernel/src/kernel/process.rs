//! Processes: two of them, and the switch from one to the other at each tick.

use super::devices::{self, line};
use super::memory::{self, PAGE, USER, WRITE};
use super::tables::{Frame, TASK_STATE, USER_CODE, USER_DATA, resume};
use super::{VMI, end};
use core::arch::naked_asm;
use vmi_abi::flags::LazyMode;

/// Processes, and ticks until the end.
pub(super) const COUNT: usize = 2;
const TICKS: u32 = 100;

/// EFLAGS of a process: interrupts enabled, and the bit that is always set.
const FLAGS: u32 = 0x202;

/// A process: its page directory, its context while it does not run, its page of data, how far it has counted
/// by its own account, its system calls, and the ticks that interrupted it.
struct Process {
    directory: u32,
    context: *mut Frame,
    data: u32,
    counted: u32,
    system_calls: u32,
    ticks: u32,
}

/// What interrupts have to do with. The kernel runs with interrupts disabled on the one processor that it knows,
/// so whoever has a reference to this is alone.
struct Scheduler {
    processes: [Process; COUNT],
    /// The process that runs; none before the first.
    current: Option<usize>,
    ticks: u32,
}

static mut SCHEDULER: Scheduler = Scheduler {
    processes: [const {
        let context = core::ptr::null_mut();
        Process { directory: 0, context, data: 0, counted: 0, system_calls: 0, ticks: 0 }
    }; COUNT],
    current: None,
    ticks: 0,
};

fn scheduler() -> &'static mut Scheduler {
    let scheduler = &raw mut SCHEDULER;
    // SAFETY: see `Scheduler`; each entry into this module takes it once.
    unsafe { &mut *scheduler }
}

#[repr(C, align(16))]
struct Stack([u8; 4096]);

/// The stacks on which processes are interrupted.
static mut STACKS: [Stack; COUNT] = [const { Stack([0; 4096]) }; COUNT];

/// Where the stack of a process begins.
fn stack_top(index: usize) -> u32 {
    (&raw mut STACKS).cast::<Stack>().wrapping_add(index + 1) as u32
}

/// What each process runs: it counts in a register and in memory, and tells of it now and then.
///
/// The first word of its page of data is its number, the second its count: at the same addresses in each.
#[unsafe(naked)]
#[unsafe(link_section = ".user")]
unsafe extern "C" fn program() {
    naked_asm!(
        "2: inc edi",
        "inc dword ptr [ebx + 4]",
        "test edi, 0xfff",
        "jnz 2b",
        "mov eax, [ebx]",
        "mov edx, [ebx + 4]",
        "int 0x80",
        "jmp 2b",
    )
}

/// Makes the processes, and leaves the processor to them.
pub(super) fn start() -> ! {
    let scheduler = scheduler();
    for (index, process) in scheduler.processes.iter_mut().enumerate() {
        process.data = memory::take_page();
        process.directory =
            memory::new_space(&[program as *const () as u32 | USER, process.data | USER | WRITE]);
        process.context = (stack_top(index) as *mut Frame).wrapping_sub(1);
        let page = memory::see(process.data);
        // SAFETY: the page is in the window, and nobody is on the stack yet.
        unsafe {
            page.write_bytes(0, PAGE as usize / 4);
            page.write(index as u32);
            process.context.write(Frame {
                ebx: memory::USER_DATA,
                eip: memory::USER_CODE,
                cs: USER_CODE.into(),
                eflags: FLAGS,
                esp: memory::USER_DATA + PAGE,
                ss: USER_DATA.into(),
                ..Frame::default()
            });
        }
    }
    let context = scheduler.switch_to(0);
    // SAFETY: made above.
    unsafe { resume(context) }
}

/// The timer's interrupt: the next process's turn. Answers its context.
pub(super) fn tick(context: *mut Frame) -> *mut Frame {
    devices::end_of_tick();
    let scheduler = scheduler();
    scheduler.ticks += 1;
    let Some(current) = scheduler.current else { return context };
    scheduler.processes[current].context = context;
    scheduler.processes[current].ticks += 1;
    if scheduler.ticks == TICKS {
        scheduler.finish();
    }
    scheduler.switch_to((current + 1) % COUNT)
}

/// A process tells its number (EAX) and how far it has come (in memory: EDX, in a register: EDI).
pub(super) fn system_call(context: &Frame) {
    let scheduler = scheduler();
    let current = scheduler.current.expect("only processes make system calls");
    let process = &mut scheduler.processes[current];
    assert_eq!(context.eax, current as u32, "a process has another's memory");
    assert_eq!(context.edx, context.edi, "a process has lost a register");
    assert!(context.edx > process.counted, "a process has gone back");
    process.counted = context.edx;
    process.system_calls += 1;
}

impl Scheduler {
    /// All that a switch changes but the registers: those come with the context that it answers.
    fn switch_to(&mut self, index: usize) -> *mut Frame {
        self.current = Some(index);
        let Process { directory, context, .. } = self.processes[index];
        // SAFETY: each space maps the kernel. Leaving the lazy mode makes both changes good before the
        // process runs.
        unsafe {
            VMI.SetLazyMode(LazyMode::CPU.0);
            VMI.UpdateKernelStack((&raw mut TASK_STATE) as u32, stack_top(index));
            VMI.SetCR3(directory);
            VMI.SetLazyMode(LazyMode::OFF.0);
        }
        context
    }

    /// Prints what has come of it, and ends.
    fn finish(&self) -> ! {
        let mut success = true;
        for (index, process) in self.processes.iter().enumerate() {
            // SAFETY: the second word of a page that is in the window.
            let counted = unsafe { memory::see(process.data).add(1).read_volatile() };
            let Process { system_calls, ticks, .. } = *process;
            line!(
                "process {index}: {ticks} ticks, {system_calls} system calls, counted to {counted}"
            );
            success &= ticks != 0 && system_calls != 0 && counted >= process.counted;
        }
        let verdict = if success { "done" } else { "failed" };
        line!("rust-kernel: {verdict}: {COUNT} processes, {} ticks", self.ticks);
        end(success)
    }
}
