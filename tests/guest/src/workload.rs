//! What a kernel does to page tables all day: five pieces of work, done as Linux 2.6 does them, through the
//! ROM's calls where it has some.
//!
//! Each looks at what came of it: the data that is seen, the frames that it landed in, the faults that there
//! had to be. Below the reference hypervisor each also says what it cost, from the hypervisor's own counters:
//!
//! ```text
//! # workload name="fork" mode=PAE operations=4 entries=12288 counters=0,12,...
//! ```
//!
//! `counters` are the fields of `Counters` in their order, summed over all operations; reading them is
//! subtracted. The first round of each work is not counted: a system that has run for a while is meant.
//!
//! - `kernel`: the steps, each by a call or by the kernel's own instructions,
//! - `process`: address spaces made of these steps,
//! - `program`: the pages of a small program, and the page faults by which it gets them.

#![expect(unsafe_code, reason = "UNSAFETY: routines in assembly that the harness runs")]

mod kernel;
mod process;
mod program;

use crate::boot::PAGE_OFFSET;
use crate::checks::read;
use crate::console::line;
use crate::harness::{self, Context, Demand, Entry, FLAT, Outcome, Registers};
use crate::hypervisor::Hypervisor;
use crate::paging::{Mode, PAGE, Space, has_no_execute};
use crate::report::{Problems, Report};
use crate::rom::Rom;
use crate::segments::{GDT, TASK_STATE, USER_DATA_DESCRIPTOR, descriptor, kernel_stack};
use crate::session::FIXED_FLAG;
use crate::{processor, site, suite, traps};
use core::arch::naked_asm;
use core::sync::atomic::{AtomicU32, Ordering};
use kernel::{Kernel, TASK_SWITCHED, take_changed};
use process::{Area, LIBRARIES, MAPPING, Memory, PROGRAM, Process, Sharing, mark, word};
use program::Shell;
use vmi_abi::flags::LazyMode;
use vmi_hv_backend::reference::interface::Counters;

/// How often each piece of work is done and counted.
const ROUNDS: u32 = 4;

/// A piece of work.
struct Workload {
    name: &'static str,
    /// What one round does so many times.
    operations: u32,
    round: fn(&mut Stage, &mut Problems) -> Sample,
}

const WORKLOADS: [Workload; 6] = [
    Workload { name: "fork", operations: 1, round: fork },
    Workload { name: "fork, exec, exit", operations: 1, round: start_program },
    Workload { name: "fork, exec, exit, 1 MiB", operations: 1, round: start_program_of_big_shell },
    Workload { name: "mmap, touch, munmap", operations: 1, round: map_and_unmap },
    Workload { name: "mprotect", operations: 2, round: protect },
    Workload { name: "context switch", operations: SWITCHES, round: switch_contexts },
];

/// Where the work is done.
struct Stage {
    hypervisor: Option<Hypervisor>,
    /// What reading the counters costs.
    reading: Counters,
    kernel: Kernel,
    /// The kernel's own space.
    swapper: Space,
    memory: Memory,
    /// The process that does most of the work; it is the current one between two rounds.
    process: Process,
    /// The first frames of its program, its libraries and its mapping.
    program: u32,
    libraries: u32,
    mapping: u32,
    /// Another process.
    other: Process,
    other_program: u32,
    /// Frames for copied pages.
    copies: u32,
    /// Processes that start programs.
    shell: Shell,
    big_shell: Shell,
    round: u32,
}

/// What a round cost.
struct Sample {
    counters: Counters,
    /// Entries that were changed.
    entries: u32,
}

/// Each counter of one minus that of the other; none is less than 0.
fn difference(a: Counters, b: Counters) -> Counters {
    let (a, b) = (a.values(), b.values());
    Counters::from_values(core::array::from_fn(|index| a[index].saturating_sub(b[index])))
}

fn sum(a: Counters, b: Counters) -> Counters {
    let (a, b) = (a.values(), b.values());
    Counters::from_values(core::array::from_fn(|index| a[index] + b[index]))
}

/// Does all of the work in the space of a mode, which is the current one.
pub(crate) fn run(report: &mut Report, space: Space, rom: Rom) {
    let mode = space.mode.name();
    space.open_rom_area();
    let kernel = match Kernel::bind(space.mode, rom) {
        Ok(kernel) => kernel,
        Err(reason) => {
            report.check(
                format_args!("{mode}: the ROM's calls are bound"),
                Err(format_args!("{reason}")),
            );
            return;
        }
    };
    let mut stage = Stage::new(kernel, space);
    for Workload { name, operations, round } in WORKLOADS {
        let mut problems = Problems::default();
        let mut total = Sample { counters: Counters::ZERO, entries: 0 };
        for index in 0..=ROUNDS {
            stage.round = index;
            let sample = round(&mut stage, &mut problems);
            if index > 0 {
                total.counters = sum(total.counters, sample.counters);
                total.entries += sample.entries;
            }
        }
        report.point(format_args!("{mode}: {name}"), &problems);
        if stage.hypervisor.is_some() {
            line!(
                "# workload name=\"{name}\" mode={mode} operations={} entries={} counters={}",
                operations * ROUNDS,
                total.entries,
                List(&total.counters.values())
            );
        }
    }
    if !rom.is_linked() {
        let mut problems = Problems::default();
        stores_to_the_rom(kernel, rom.physical, &mut problems);
        report.point(format_args!("{mode}: a store to the ROM goes nowhere"), &problems);
    }
    stage.end();
}

/// Stores to the ROM. A kernel has it mapped for that, so a page fault there has no cause that the kernel could find, and it goes
/// on: where the hypervisor leaves the guest its page faults, until it is asked to look.
fn stores_to_the_rom(kernel: Kernel, rom: u32, problems: &mut Problems) {
    let area = Area { start: PAGE_OFFSET + rom, pages: 1 };
    let before = word(rom, 1);
    ROM_FAULTS.store(0, Ordering::Relaxed);
    // Page faults become quiet behind what is told.
    kernel.flush();
    let demand: Demand = (area.start..area.start + PAGE, |_| {
        Kernel::fault_address();
        let faults = ROM_FAULTS.fetch_add(1, Ordering::Relaxed);
        assert!(faults < 8, "a store to the ROM is a page fault for ever");
    });
    writes(area, 1, !before, Some(demand), problems);
    line!("# stores-to-rom faults={}", ROM_FAULTS.load(Ordering::Relaxed));
    if word(rom, 1) != before {
        problems.add(format_args!("the store is seen"));
    }
}

/// Page faults of a store to the ROM.
static ROM_FAULTS: AtomicU32 = AtomicU32::new(0);

/// Numbers between commas.
struct List<'a>(&'a [u64]);

impl core::fmt::Display for List<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for (index, value) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{value}")?;
        }
        Ok(())
    }
}

impl Stage {
    fn new(kernel: Kernel, swapper: Space) -> Self {
        let mut memory = Memory::new();
        let (program, libraries) = (memory.take(PROGRAM.pages), memory.take(LIBRARIES.pages));
        let (mapping, copies) = (memory.take(MAPPING.pages), memory.take(WRITTEN));
        let other_program = memory.take(TOUCHED);
        let process = Process::new(kernel, swapper, &mut memory);
        let other = Process::new(kernel, swapper, &mut memory);
        kernel.enter(process.space);
        process.map(PROGRAM, program, &mut memory);
        process.map(LIBRARIES, libraries, &mut memory);
        other.map(Area { pages: TOUCHED, ..PROGRAM }, other_program, &mut memory);
        let shell = Shell::new(kernel, swapper, &mut memory, None);
        // Nobody uses both at once.
        let big_shell = Shell::new(kernel, swapper, &mut memory, Some(mapping));
        let hypervisor = Hypervisor::find();
        let reading = Counters::ZERO;
        let round = 0;
        let mut stage = Self {
            hypervisor,
            reading,
            kernel,
            swapper,
            memory,
            process,
            program,
            libraries,
            mapping,
            other,
            other_program,
            copies,
            shell,
            big_shell,
            round,
        };
        // The first time warms up.
        for _ in 0..2 {
            stage.reading = Counters::ZERO;
            stage.reading = stage.counted(|_| ()).counters;
        }
        stage
    }

    fn end(mut self) {
        self.kernel.enter(self.swapper);
        self.process.exit(&mut self.memory);
        self.other.exit(&mut self.memory);
        self.shell.exit(&mut self.memory);
        self.big_shell.exit(&mut self.memory);
    }

    /// Does something, and says what it cost.
    fn counted(&mut self, work: impl FnOnce(&mut Self)) -> Sample {
        let read = |stage: &Self| {
            stage.hypervisor.map_or(Counters::ZERO, |hypervisor| {
                hypervisor.counters().expect("the hypervisor reads its counters")
            })
        };
        let before = read(self);
        take_changed();
        work(self);
        let entries = take_changed();
        let counters = difference(difference(read(self), before), self.reading);
        Sample { counters, entries }
    }

    /// Makes a process the current one, of which nothing but the space matters.
    fn switch_to(&self, process: Process) {
        self.kernel.lazily(LazyMode::CPU, || self.kernel.enter(process.space));
    }
}

/// Pages of each area that a process reads after a change.
const TOUCHED: u32 = 8;

/// Shared pages that a process writes to.
const WRITTEN: u32 = 2;

/// A process is copied, the copy runs for a moment and ends, the first goes on.
fn fork(stage: &mut Stage, problems: &mut Problems) -> Sample {
    let parent = stage.process;
    let (program, libraries, copies) = (stage.program, stage.libraries, stage.copies);
    // Its pages are its own again, and written to, as if it had run for long.
    for (area, frame) in [(PROGRAM, program), (LIBRARIES, libraries)] {
        parent.map(area, frame, &mut stage.memory);
        stage.kernel.flush();
        writes(area, area.pages, 0, None, problems);
    }
    // The child writes to the last pages of the program, the parent to those before.
    let last = |pages: u32| {
        let offset = (PROGRAM.pages - pages) * PAGE;
        (Area { start: PROGRAM.start + offset, pages: WRITTEN }, program + offset)
    };
    let ((childs, childs_frame), (parents, parents_frame)) = (last(WRITTEN), last(2 * WRITTEN));
    let mut faults = [0; 2];
    let mut left = [0; WRITTEN as usize];
    let sample = stage.counted(|stage| {
        let child = parent.fork(&[PROGRAM, LIBRARIES], stage.swapper, &mut stage.memory);
        stage.switch_to(child);
        sees(PROGRAM, TOUCHED, program, problems);
        sees(LIBRARIES, TOUCHED, libraries, problems);
        let range = copies..copies + WRITTEN * PAGE;
        (_, faults[0]) = child.with_faults(Sharing::Shared, range, |demand| {
            writes(childs, WRITTEN, 0xc000, Some(demand), problems);
        });
        sees(childs, WRITTEN, childs_frame, problems);
        stage.switch_to(parent);
        child.exit(&mut stage.memory);
        left = core::array::from_fn(|index| word(childs_frame + index as u32 * PAGE, 1));
        (_, faults[1]) = parent.with_faults(Sharing::Alone, 0..0, |demand| {
            writes(parents, WRITTEN, 0xa000, Some(demand), problems);
        });
        sees(PROGRAM, TOUCHED, program, problems);
    });
    if faults.iter().any(|count| *count < WRITTEN) {
        problems.add(format_args!(
            "{} and {} writes to shared pages faulted, of {WRITTEN} each",
            faults[0], faults[1]
        ));
    }
    for index in 0..WRITTEN {
        let (child, parent) = (0xc000 + index, 0xa000 + index);
        let before = PROGRAM.pages - WRITTEN + index;
        let frames = [copies, parents_frame, childs_frame].map(|frame| frame + index * PAGE);
        let found = [word(frames[0], 1), word(frames[1], 1), left[index as usize]];
        // What the child wrote is in its copy; the parent never saw it.
        if found != [child, parent, before] {
            problems.add(format_args!("the frames hold {found:x?}"));
        }
    }
    sees(PROGRAM, PROGRAM.pages, program, problems);
    sees(LIBRARIES, LIBRARIES.pages, libraries, problems);
    sample
}

/// A shell starts a small program: the child of a fork becomes it, runs for a moment and ends.
fn start_program(stage: &mut Stage, problems: &mut Problems) -> Sample {
    start(stage, |stage| (&mut stage.shell, &mut stage.memory), problems)
}

/// The same for a shell with a MiB of its own, which the fork copies.
fn start_program_of_big_shell(stage: &mut Stage, problems: &mut Problems) -> Sample {
    start(stage, |stage| (&mut stage.big_shell, &mut stage.memory), problems)
}

fn start(
    stage: &mut Stage,
    parts: fn(&mut Stage) -> (&mut Shell, &mut Memory),
    problems: &mut Problems,
) -> Sample {
    let first = 0x1000_0000 * (stage.round + 1);
    let (process, swapper) = (stage.process, stage.swapper);
    let shells = parts(stage).0.process;
    stage.switch_to(shells);
    let (shell, memory) = parts(stage);
    shell.write_all(memory, problems);
    let sample = stage.counted(|stage| {
        let (shell, memory) = parts(stage);
        shell.start(first, swapper, memory, problems);
    });
    stage.switch_to(process);
    sample
}

/// Memory is mapped, written to and given back.
fn map_and_unmap(stage: &mut Stage, problems: &mut Problems) -> Sample {
    let (process, frame, first) = (stage.process, stage.mapping, 0x1_0000 * (stage.round + 1));
    let sample = stage.counted(|stage| {
        process.map(MAPPING, frame, &mut stage.memory);
        writes(MAPPING, MAPPING.pages, first, None, problems);
        sees(MAPPING, MAPPING.pages, frame, problems);
        process.unmap(MAPPING);
    });
    let landed = (0..MAPPING.pages).all(|page| word(frame + page * PAGE, 1) == first + page);
    if !landed {
        problems.add(format_args!("what was written is not in the frames that were mapped"));
    }
    for linear in MAPPING.addresses() {
        let fault = read(linear).err().map(|trap| (trap.frame.vector, trap.address));
        if fault != Some((traps::PAGE_FAULT, linear)) {
            problems.add(format_args!("after munmap {linear:#x} raises {fault:x?}"));
        }
    }
    // Where NX is in use, and only there, the error code says that it was a fetch.
    const FETCH: u32 = 1 << 4;
    let wanted = if process.kernel.mode == Mode::Pae && has_no_execute() { FETCH } else { 0 };
    let outcome = run_at(MAPPING.start, Registers::default(), None);
    let fault = outcome.trap.map(|trap| (trap.frame.vector, trap.frame.error));
    if fault != Some((traps::PAGE_FAULT, wanted)) {
        problems.add(format_args!("a fetch after munmap raises {fault:x?}, not {wanted:#x}"));
    }
    sample
}

/// Memory becomes read-only, as for a collector of garbage that wants to know what is written to, and writable again.
fn protect(stage: &mut Stage, problems: &mut Problems) -> Sample {
    let (process, frame, first) = (stage.process, stage.mapping, 0x100_0000 * (stage.round + 1));
    process.map(MAPPING, frame, &mut stage.memory);
    writes(MAPPING, MAPPING.pages, 0, None, problems);
    // A different page each time.
    let probe = MAPPING.start + stage.round * 61 % MAPPING.pages * PAGE;
    let mut outcome = None;
    let sample = stage.counted(|_| {
        process.protect(MAPPING, false);
        sees(MAPPING, MAPPING.pages, frame, problems);
        outcome = Some(write_pages(probe, 1, 0, None));
        process.protect(MAPPING, true);
        writes(MAPPING, MAPPING.pages, first, None, problems);
    });
    const WRITE_TO_PRESENT: u32 = 3;
    let fault = outcome.and_then(|outcome| outcome.trap);
    let fault = fault.map(|trap| (trap.frame.vector, trap.address & !(PAGE - 1), trap.frame.error));
    if fault != Some((traps::PAGE_FAULT, probe, WRITE_TO_PRESENT)) {
        problems.add(format_args!("a write to a read-only page raises {fault:x?}"));
    }
    let landed = (0..MAPPING.pages).all(|page| word(frame + page * PAGE, 1) == first + page);
    if !landed {
        problems.add(format_args!("what was written is not in the frames that were mapped"));
    }
    // All others, for which no round has time.
    process.protect(MAPPING, false);
    for linear in MAPPING.addresses().step_by(17) {
        if write_pages(linear, 1, 0, None).trap.is_none() {
            problems.add(format_args!("a write to the read-only page {linear:#x} is let through"));
        }
    }
    process.unmap(MAPPING);
    sample
}

/// Switches of a round.
const SWITCHES: u32 = 64;

/// Descriptors of thread-local storage: how many there are, and the first's place in the table.
const THREAD_DESCRIPTORS: u32 = 3;
const FIRST_THREAD_DESCRIPTOR: u32 = 6;

/// Two processes take turns.
fn switch_contexts(stage: &mut Stage, problems: &mut Problems) -> Sample {
    let kernel = stage.kernel;
    let turns = [(stage.other, stage.other_program), (stage.process, stage.program)];
    // A stack and a thread-local segment for each.
    let stacks = [suite::trap_stack_top() - PAGE, suite::trap_stack_top()];
    let threads = [1_u64, 2].map(|base| USER_DATA_DESCRIPTOR | base << 28);
    let switch_to = |side: usize| {
        kernel.lazily(LazyMode::CPU, || {
            kernel.enter(turns[side].0.space);
            // The one process has used floating point; the other is about to, and has its registers loaded at
            // once.
            if side == 0 {
                kernel.set_task_switched();
            }
            kernel.set_kernel_stack(stacks[side]);
            for index in 0..THREAD_DESCRIPTORS {
                kernel.set_descriptor(FIRST_THREAD_DESCRIPTOR + index, threads[side]);
            }
            if side == 1 {
                kernel.clear_task_switched();
            }
        });
    };
    let sample = stage.counted(|_| {
        for turn in 0..SWITCHES as usize {
            switch_to(turn % 2);
            sees(PROGRAM, TOUCHED, turns[turn % 2].1, problems);
        }
    });
    // Reading registers is no part of the work: two more turns, to look at them.
    for side in [0, 1] {
        switch_to(side);
        let descriptors = (0..THREAD_DESCRIPTORS).all(|index| {
            let place = (FIRST_THREAD_DESCRIPTOR + index) as usize;
            descriptor(&raw const GDT, place) == threads[side]
        });
        let stack = kernel_stack(&raw const TASK_STATE);
        let task_switched = processor::cr0() & TASK_SWITCHED != 0;
        let seen = (descriptors, stack, task_switched, processor::cr3());
        let wanted = (true, stacks[side], side == 0, turns[side].0.space.cr3());
        if seen != wanted {
            problems.add(format_args!(
                "descriptors, stack, TS and CR3 are {seen:x?}, must be {wanted:x?}"
            ));
        }
    }
    sample
}

/// Checks that pages show the frames from one on.
fn sees(area: Area, pages: u32, frame: u32, problems: &mut Problems) {
    reads(area, pages, mark(frame), None, problems);
}

/// Checks that pages begin with a number, one more in each.
fn reads(area: Area, pages: u32, first: u32, demand: Option<Demand>, problems: &mut Problems) {
    let outcome = run_over(compare_pages, area.start, pages, first, demand);
    judge("reading", area, pages, &outcome, problems);
}

/// Writes a number into the second word of each page, one more in each.
fn writes(area: Area, pages: u32, first: u32, demand: Option<Demand>, problems: &mut Problems) {
    let outcome = write_pages(area.start, pages, first, demand);
    judge("writing", area, pages, &outcome, problems);
}

/// Whether all pages were gone through.
fn judge(what: &str, area: Area, pages: u32, outcome: &Outcome, problems: &mut Problems) {
    if let Some(trap) = outcome.trap {
        problems.add(format_args!(
            "{what} page {:#x} of {:#x} raises {}, error {:#x}",
            trap.address, area.start, trap.frame.vector, trap.frame.error
        ));
    } else if outcome.after.registers.ecx != 0 {
        let page = pages - outcome.after.registers.ecx;
        problems.add(format_args!("page {page} of {:#x} shows another frame", area.start));
    }
}

fn write_pages(start: u32, pages: u32, first: u32, demand: Option<Demand>) -> Outcome {
    run_over(store_to_pages, start, pages, first, demand)
}

/// Runs one of the routines below.
fn run_over(
    routine: unsafe extern "C" fn(),
    start: u32,
    pages: u32,
    value: u32,
    demand: Option<Demand>,
) -> Outcome {
    let registers = Registers { eax: start, ecx: pages, edx: value, ..Registers::default() };
    run_at(routine as *const () as u32, registers, demand)
}

/// Runs what is at an address.
fn run_at(address: u32, registers: Registers, demand: Option<Demand>) -> Outcome {
    harness::run(&Entry {
        context: Context { registers, esp: 0, eflags: FIXED_FLAG, segments: FLAT },
        stack: &[],
        target: site::own_site(address),
        by_call: true,
        code: 0..0,
        watch: None,
        demand,
    })
}

/// EAX a page, ECX pages, EDX what the first begins with, the next with one more -> ECX pages that were not as
/// they should be, with all behind them. Changes EAX, EDX, flags.
#[unsafe(naked)]
unsafe extern "C" fn compare_pages() {
    naked_asm!(
        "2: cmp [eax], edx",
        "jne 3f",
        "add eax, {page}",
        "inc edx",
        "loop 2b",
        "3: ret",
        page = const PAGE,
    )
}

/// EAX a page, ECX pages, EDX what goes into the second word of the first, into the next one more -> ECX 0.
/// Changes EAX, EDX, flags.
#[unsafe(naked)]
unsafe extern "C" fn store_to_pages() {
    naked_asm!(
        "2: mov [eax + 4], edx",
        "add eax, {page}",
        "inc edx",
        "loop 2b",
        "ret",
        page = const PAGE,
    )
}
