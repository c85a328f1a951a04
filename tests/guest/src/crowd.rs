//! Several processors at one call site, while it is rewritten.
//!
//! The other processors are started, and all of them run one site after the other: each round the
//! first processor writes a site as a kernel has it, and everybody enters it at once, non-maskable
//! interrupts in between. Three sites are put back all the time, while the others run them: those of which
//! the last change is one of the first byte, so that both forms are right at every moment.

#![expect(unsafe_code, reason = "UNSAFETY: starts processors, and runs code that it writes")]

use crate::boot::PAGE_OFFSET;
use crate::devices;
use crate::paging::{LocalApic, PAGE, Space, VIRTUAL_8086};
use crate::processor;
use crate::report::Problems;
use crate::rom::Rom;
use crate::segments::{
    GDT, IDT_SIZE, KERNEL_CODE, KERNEL_DATA, Table, gate, set_descriptor, table_of,
};
use crate::session::INTERRUPT_FLAG;
use crate::site::{FILLERS, Place, Site};
use core::arch::{global_asm, naked_asm};
use core::hint::spin_loop;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, Ordering};
use vmi_abi::state::DescriptorTable;
use vmi_abi::{CallNumber, number};

/// Rounds, and how often each site is put back; more of both in a long run.
const ROUNDS: u32 = match option_env!("VMI_GUEST_ROUNDS") {
    Some(text) => match u32::from_str_radix(text, 10) {
        Ok(rounds) => rounds,
        Err(_) => panic!("VMI_GUEST_ROUNDS is not a number"),
    },
    None => 4096,
};

/// Most processors that take part.
const CROWD: usize = 16;

/// Calls of which every register survives, but the result of the third.
const CALLS: [CallNumber; 5] = [
    number::DisableInterrupts,
    number::EnableInterrupts,
    number::GetInterruptMask,
    number::SetInterruptMask,
    number::IRET,
];

/// Forms of a site: direct calls with each filler, and one through a pointer. Each is tried with all
/// calls at 64 places before the next one comes.
const FORMS: usize = FILLERS.len() + 1;
const ROUNDS_OF_A_FORM: usize = 64 * CALLS.len();

/// Times that a processor enters the site in a round.
const VISITS: u32 = 4;

/// What a processor is to do.
#[repr(C)]
struct Task {
    /// Rises with each round.
    round: AtomicU32,
    /// Where the site begins. For a call, a return stands behind it.
    site: AtomicU32,
    /// [`KEEPS_ALL`], [`TRANSFERS`], [`DISABLES`] or [`ENABLES`].
    kind: AtomicU32,
    /// How often to enter it.
    visits: AtomicU32,
    /// Processors that have done so.
    done: AtomicU32,
    /// Registers found changed.
    lost: AtomicU32,
    /// Non-maskable interrupts taken, and how many that must be before a round is over: one that comes
    /// later would run a site that is being written.
    interrupts: AtomicU32,
    awaited: AtomicU32,
    /// Processors that were stopped by an exception.
    dead: AtomicU32,
    /// What lay on the stack of the last one: the error code, if there is one, EIP, CS, EFLAGS.
    frame: [AtomicU32; 4],
    /// Processors started.
    started: AtomicU32,
}

static TASK: Task = Task {
    round: AtomicU32::new(0),
    site: AtomicU32::new(0),
    kind: AtomicU32::new(0),
    visits: AtomicU32::new(0),
    done: AtomicU32::new(0),
    lost: AtomicU32::new(0),
    interrupts: AtomicU32::new(0),
    awaited: AtomicU32::new(0),
    dead: AtomicU32::new(0),
    frame: [const { AtomicU32::new(0) }; 4],
    started: AtomicU32::new(0),
};

/// How the site is entered: by a call that keeps all registers or answers with the flags in EAX, with a
/// frame that it takes away, by a call with interrupts enabled or disabled that changes just that.
const KEEPS_ALL: u32 = 0;
const TRANSFERS: u32 = 1;
const DISABLES: u32 = 2;
const ENABLES: u32 = 3;

const STACK: usize = 4096;

#[repr(C, align(16))]
struct Stacks([[u8; STACK]; CROWD]);

static mut STACKS: Stacks = Stacks([[0; STACK]; CROWD]);

/// The other processors' interrupt table: they take nothing but non-maskable interrupts.
static mut CROWD_IDT: Table<IDT_SIZE> = Table([0; IDT_SIZE]);

/// What the start-up code finds behind itself: all that a processor needs to join the others.
#[repr(C)]
struct StartUp {
    cr3: u32,
    cr4: u32,
    efer: u32,
    cr0: u32,
    gdt: DescriptorTable,
    unused: u16,
}

unsafe extern "C" {
    static start_up: u8;
    static start_up_end: u8;
}

global_asm!(
    // Copied to VIRTUAL_8086, where the STARTUP message points. In: real mode, CS = that page.
    ".pushsection .rodata.start_up, \"a\", @progbits",
    ".balign 4",
    ".globl start_up",
    ".globl start_up_end",
    "start_up:",
    ".code16",
    "cli",
    "movw %cs, %ax",
    "movw %ax, %ds",
    "lgdtl start_up_end - start_up + {gdt}",
    "movl %cr0, %eax",
    "orb $1, %al",
    "movl %eax, %cr0",
    "ljmpl ${code}, $({place} + 2f - start_up)",
    ".code32",
    "2: movl ${data}, %eax",
    "movw %ax, %ds",
    "movw %ax, %es",
    "movw %ax, %ss",
    "movl $({place} + start_up_end - start_up), %ebx",
    "movl {cr4}(%ebx), %eax",
    "movl %eax, %cr4",
    "movl {cr3}(%ebx), %eax",
    "movl %eax, %cr3",
    "movl {efer}(%ebx), %eax",
    "testl %eax, %eax",
    "jz 3f",
    "movl ${efer_register}, %ecx",
    "xorl %edx, %edx",
    "wrmsr",
    "3: movl {cr0}(%ebx), %eax",
    "movl %eax, %cr0",
    // The identity mapping of this page is the one of virtual-8086 mode.
    "movl $1, %eax",
    "lock xaddl %eax, {task} + {started}",
    "movl %eax, %ecx",
    "incl %ecx",
    "imull ${stack}, %ecx",
    "leal {stacks}(%ecx), %esp",
    "pushl %eax",
    "pushl $0",
    "jmpl *4f - start_up + {place}",
    "4: .long {joined}",
    "start_up_end:",
    ".popsection",
    place = const VIRTUAL_8086,
    code = const KERNEL_CODE,
    data = const KERNEL_DATA,
    gdt = const offset_of!(StartUp, gdt),
    cr0 = const offset_of!(StartUp, cr0),
    cr3 = const offset_of!(StartUp, cr3),
    cr4 = const offset_of!(StartUp, cr4),
    efer = const offset_of!(StartUp, efer),
    efer_register = const x86::msr::IA32_EFER,
    task = sym TASK,
    started = const offset_of!(Task, started),
    stack = const STACK,
    stacks = sym STACKS,
    joined = sym joined,
    options(att_syntax),
);

/// A processor that was started: takes part in every round.
extern "C" fn joined(index: u32) -> ! {
    processor::set_gdt(table_of(&raw const GDT));
    processor::set_idt(table_of(&raw const CROWD_IDT));
    let mut round = 0;
    loop {
        while TASK.round.load(Ordering::Acquire) == round {
            spin_loop();
        }
        round = TASK.round.load(Ordering::Acquire);
        visit(index);
        while TASK.interrupts.load(Ordering::Acquire) < TASK.awaited.load(Ordering::Relaxed) {
            spin_loop();
        }
        TASK.done.fetch_add(1, Ordering::Release);
    }
}

/// Enters the site as often as the task says, and counts what is lost.
fn visit(index: u32) {
    for visit in 0..u32::MAX {
        if visit >= TASK.visits.load(Ordering::Relaxed) {
            break;
        }
        let pattern = (index << 24 | visit).wrapping_mul(0x9e37_79b9) | 1;
        // SAFETY: a site that the first processor has written, with what belongs behind it.
        let lost = unsafe {
            enter(TASK.site.load(Ordering::Relaxed), TASK.kind.load(Ordering::Relaxed), pattern)
        };
        if lost != 0 {
            TASK.lost.fetch_add(1, Ordering::Relaxed);
        }
        spin_loop(); // An emulator gives the others their turn.
    }
}

/// Enters a site with every register set, and says how many of them were changed.
///
/// C calling convention: where the site begins, its kind, a number to fill registers with.
#[unsafe(naked)]
unsafe extern "C" fn enter(site: u32, kind: u32, pattern: u32) -> u32 {
    naked_asm!(
        "push ebx",
        "push esi",
        "push edi",
        "push ebp",
        // The arguments are at [esp + 20], [esp + 24], [esp + 28].
        "mov esi, [esp + 20]",
        "mov ebp, [esp + 24]",
        "mov ecx, [esp + 28]",
        "push ecx",
        "push ebp",
        "push esi",
        // What SetInterruptMask is to load.
        "pushfd",
        "pop eax",
        "push eax",
        // What may not change is the flags with interrupts disabled, but for the two that change just that.
        "cmp ebp, {enables}",
        "jne 5f",
        "or dword ptr [esp], {interrupt_flag}",
        "mov eax, [esp]",
        "5:",
        // [esp] flags afterwards, [esp + 4] site, [esp + 8] kind, [esp + 12] pattern.
        "mov edx, ecx",
        "mov ebx, ecx",
        "mov esi, ecx",
        "mov edi, ecx",
        "cmp ebp, {transfers}",
        "mov ebp, ecx",
        "je 2f",
        // The flags as they were saved: what GetInterruptMask is to answer.
        "push eax",
        "cmp dword ptr [esp + 12], {disables}",
        "jb 6f",
        "xor dword ptr [esp], {interrupt_flag}",
        "6: popfd",
        "call dword ptr [esp + 4]",
        "jmp 3f",
        // A frame to come back with; then what the site takes for its own: the address is popped.
        "2: push eax",
        "push {code}",
        "call 4f",
        "jmp 3f",
        "4: push dword ptr [esp + 16]",
        "ret",
        // EAX holds the flags, as argument and as answer; of what is left of them IF must be right.
        "3: xor eax, [esp]",
        "pushfd",
        "cli",
        "xor ecx, [esp + 16]",
        "or eax, ecx",
        "pop ecx",
        "xor ecx, [esp]",
        "and ecx, {interrupt_flag}",
        "or ecx, eax",
        "xor edx, [esp + 12]",
        "or ecx, edx",
        "xor ebx, [esp + 12]",
        "or ecx, ebx",
        "xor esi, [esp + 12]",
        "or ecx, esi",
        "xor edi, [esp + 12]",
        "or ecx, edi",
        "xor ebp, [esp + 12]",
        "or ecx, ebp",
        "mov eax, ecx",
        "add esp, 16",
        "pop ebp",
        "pop edi",
        "pop esi",
        "pop ebx",
        "ret",
        code = const KERNEL_CODE,
        transfers = const TRANSFERS,
        disables = const DISABLES,
        enables = const ENABLES,
        interrupt_flag = const INTERRUPT_FLAG,
    )
}

/// A non-maskable interrupt on one of the other processors: it runs the site as well. A transfer
/// takes the interrupt's own frame away.
#[unsafe(naked)]
unsafe extern "C" fn interrupted() {
    naked_asm!(
        "lock inc dword ptr [{task} + {interrupts}]",
        "cmp dword ptr [{task} + {kind}], {transfers}",
        "je 2f",
        "pushad",
        "pushfd",
        "pop eax",
        "call dword ptr [{task} + {site}]",
        "popad",
        "iretd",
        "2: jmp dword ptr [{task} + {site}]",
        task = sym TASK,
        interrupts = const offset_of!(Task, interrupts),
        kind = const offset_of!(Task, kind),
        site = const offset_of!(Task, site),
        transfers = const TRANSFERS,
    )
}

/// Any other exception on one of the other processors.
#[unsafe(naked)]
unsafe extern "C" fn died() {
    naked_asm!(
        "pop dword ptr [{task} + {frame}]",
        "pop dword ptr [{task} + {frame} + 4]",
        "pop dword ptr [{task} + {frame} + 8]",
        "pop dword ptr [{task} + {frame} + 12]",
        "lock inc dword ptr [{task} + {dead}]",
        "lock inc dword ptr [{task} + {done}]",
        "2: cli",
        "hlt",
        "jmp 2b",
        task = sym TASK,
        dead = const offset_of!(Task, dead),
        frame = const offset_of!(Task, frame),
        done = const offset_of!(Task, done),
    )
}

/// Runs all rounds; the number of processors that took part, or why it could not be tried.
pub(crate) fn run(space: Space, rom: Rom, problems: &mut Problems) -> Result<u32, &'static str> {
    if CALLS.iter().any(|call| rom.plain(*call).is_none()) {
        return Err("the ROM rewrites no sites");
    }
    let expected = match devices::processors() {
        // All that there are would start, and come for a stack.
        Some(processors) if processors > CROWD as u32 => return Err("too many processors"),
        Some(processors) if processors > 1 => processors - 1,
        _ => return Err("one processor, or nobody knows how many"),
    };
    let apic = LocalApic::map(space).ok_or("no local APIC")?;
    start(space, apic, expected)?;
    for round in 0..ROUNDS {
        let call = CALLS[round as usize % CALLS.len()];
        let kind = kind_of(call);
        let site = write_site(rom, call, round);
        let interrupts = round.is_multiple_of(8);
        if interrupts {
            TASK.awaited.fetch_add(expected, Ordering::Relaxed);
        }
        begin(site, kind, VISITS);
        if interrupts {
            apic.interrupt_others();
        }
        visit(expected);
        finish(site, expected, problems)?;
    }
    for call in PUT_BACK {
        put_back(rom, call, expected, problems)?;
    }
    let lost = TASK.lost.load(Ordering::Relaxed);
    if lost != 0 {
        problems.add(format_args!("registers were changed in {lost} visits"));
    }
    if TASK.interrupts.load(Ordering::Relaxed) == 0 {
        problems.add(format_args!("no non-maskable interrupt arrived"));
    }
    Ok(expected + 1)
}

/// Calls whose site takes its last form by one byte, if there is a NOP behind it.
const PUT_BACK: [CallNumber; 3] =
    [number::IRET, number::DisableInterrupts, number::EnableInterrupts];

/// A place at which nothing but the first byte lies in one word.
const LAST_IN_WORD: u32 = 7;

/// A call's site is put back again and again while everybody else runs it all the time.
fn put_back(
    rom: Rom,
    call: CallNumber,
    others: u32,
    problems: &mut Problems,
) -> Result<(), &'static str> {
    let name = call.call().map_or("?", |call| call.name);
    let [filler, ..] = FILLERS;
    let site = Site::call(Place(LAST_IN_WORD), rom.answer(call.0).eip.get()).filled(filler);
    site.write_before_return();
    begin(site, kind_of(call), u32::MAX);
    let mut changes = 0;
    for _ in 0..PATIENCE {
        changes += u32::from(site.put_back_first());
        if changes == ROUNDS || TASK.dead.load(Ordering::Relaxed) != 0 {
            break;
        }
        spin_loop(); // An emulator gives the others their turn.
    }
    TASK.visits.store(0, Ordering::Relaxed);
    if changes < ROUNDS {
        problems.add(format_args!("the site of {name} was rewritten {changes} times only"));
    }
    crate::console::line!(
        "# the site of {name} was put back {changes} times while {others} processors ran it"
    );
    finish(site, others, problems)
}

fn kind_of(call: CallNumber) -> u32 {
    match call {
        number::IRET => TRANSFERS,
        number::DisableInterrupts => DISABLES,
        number::EnableInterrupts => ENABLES,
        _ => KEEPS_ALL,
    }
}

/// The round's site: called directly with each filler or through a pointer, at every place in a line of memory.
fn write_site(rom: Rom, call: CallNumber, round: u32) -> Site {
    let answer = rom.answer(call.0);
    let place = Place(round / CALLS.len() as u32 % 64);
    let site = match FILLERS.get(round as usize / ROUNDS_OF_A_FORM % FORMS) {
        Some(filler) => Site::call(place, answer.eip.get()).filled(filler),
        None => Site::pointer(place, answer.eip.get(), false),
    };
    site.write_before_return();
    site
}

/// Publishes a round.
fn begin(site: Site, kind: u32, visits: u32) {
    TASK.site.store(site.start, Ordering::Relaxed);
    TASK.kind.store(kind, Ordering::Relaxed);
    TASK.visits.store(visits, Ordering::Relaxed);
    TASK.done.store(0, Ordering::Relaxed);
    TASK.round.fetch_add(1, Ordering::Release);
}

/// How often the first processor looks at what the others do before it gives up.
const PATIENCE: u32 = 1 << 28;

/// Waits for everybody.
fn finish(site: Site, others: u32, problems: &mut Problems) -> Result<(), &'static str> {
    for _ in 0..PATIENCE {
        if TASK.done.load(Ordering::Acquire) >= others {
            break;
        }
        spin_loop();
    }
    let dead = TASK.dead.load(Ordering::Relaxed);
    if dead == 0 && TASK.done.load(Ordering::Acquire) >= others {
        return Ok(());
    }
    let frame = TASK.frame.each_ref().map(|word| word.load(Ordering::Relaxed));
    problems.add(format_args!(
        "{dead} of {others} processors died of an exception, or hang; the last one's stack is {frame:x?}, the site {site:x?} \
         became {:x?}",
        site.bytes()
    ));
    Err("the other processors are lost")
}

/// Starts the other processors.
fn start(space: Space, apic: LocalApic, expected: u32) -> Result<(), &'static str> {
    const NON_MASKABLE: usize = 2;
    for vector in 0..IDT_SIZE {
        let handler =
            if vector == NON_MASKABLE { interrupted as *const () } else { died as *const () };
        set_descriptor(&raw mut CROWD_IDT, vector, gate(handler as u32, 0));
    }
    let (first, last) = ((&raw const start_up) as usize, (&raw const start_up_end) as usize);
    let gdt = DescriptorTable {
        limit: (size_of::<Table<32>>() as u16 - 1).into(),
        base: ((&raw const GDT) as u32 - PAGE_OFFSET).into(),
    };
    let state = StartUp {
        cr3: space.cr3(),
        cr4: processor::cr4(),
        efer: if crate::paging::has_no_execute() {
            processor::rdmsr(x86::msr::IA32_EFER) as u32
        } else {
            0
        },
        cr0: processor::cr0(),
        gdt,
        unused: 0,
    };
    let place = (PAGE_OFFSET + VIRTUAL_8086) as *mut u8;
    // SAFETY: the page of virtual-8086 code is the guest's, mapped, and longer than both.
    unsafe {
        core::ptr::copy_nonoverlapping(first as *const u8, place, last - first);
        place.add(last - first).cast::<StartUp>().write_unaligned(state);
    }
    apic.start_others(VIRTUAL_8086 / PAGE);
    for _ in 0..1 << 24 {
        if TASK.started.load(Ordering::Acquire) >= expected {
            return Ok(());
        }
        spin_loop();
    }
    Err("the other processors do not start")
}
