//! A kernel that uses the platform's VMI ROM where there is one of revision 3.0, and otherwise the
//! native calls that are linked into it. Two processes share the processor by a timer's ticks. Here
//! are the start and the choice of a ROM; devices; segments and gates; page tables; processes, and
//! the switch from one to the other; interrupts, and how they end by VMI's IRET.
//!
//! No instruction of the kernel is privileged: whatever needs ring 0 is a call of [`VMI`]. Even the
//! start gets by without, since a multiboot loader leaves the processor in protected mode, in flat
//! segments, without paging, interrupts disabled.

#![expect(unsafe_code, reason = "UNSAFETY: assembly, the processor's tables, and a ROM's code")]

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicUsize, Ordering};
use vmi_abi::flags::{EntryFlags, LazyMode, PageFlags};
use vmi_abi::probe::SCAN_AREA;
use vmi_abi::state::DescriptorTable;
use vmi_abi::vmi::{Calls, Rom, Unusable};
use vmi_abi::{REVISION_3_0, RelocationType, RomHeader, for_each_call, native_calls, number};

/// The calls, once [`main`] has bound them.
static VMI: Calls = Calls::new();

// Defines `native_call`: the kernel's own code for a call that a ROM leaves to it.
for_each_call!(native_calls);

/// Writes a line to the console, which never fails.
macro_rules! line {
    ($($argument:tt)*) => { let _ = writeln!(Console, $($argument)*); };
}

unsafe extern "C" {
    static vmi_native_rom: RomHeader;
    static stubs: [u8; STUB_SIZE];
    static program: u8;
}

global_asm!(
    ".pushsection .multiboot, \"ax\", @progbits",
    ".balign 4",
    ".long {magic}, 0, -{magic}", // Multiboot specification 0.6.96, section 3.1.1.
    ".globl boot",
    "boot: mov esp, offset boot_stack + {stack}",
    "cld",
    "call {main}",
    ".popsection",
    ".comm boot_stack, {stack}, 16",
    magic = const 0x1bad_b002_u32,
    stack = const 16384,
    main = sym main,
);

extern "C" fn main() -> ! {
    let (start, length) = (SCAN_AREA.start as *const u8, SCAN_AREA.len());
    // SAFETY: memory to which nobody writes, or none, which reads as ones.
    let area = unsafe { core::slice::from_raw_parts(start, length) };
    // SAFETY: the object that defines the symbol has the whole image behind it.
    let linked = unsafe { Rom::linked(&raw const vmi_native_rom, REVISION_3_0) };
    let (rom, place) = match Rom::find(area, REVISION_3_0) {
        Some(rom) if bind(&rom).is_ok() => (rom, "platform ROM"),
        _ => {
            let rom = linked.expect("the linker had the right object");
            bind(&rom).expect("the native calls are in order");
            (rom, "linked in")
        }
    };
    prepare_devices();
    line!("rust-kernel: VMI 3.0, {place}, at {:p}", rom.image().as_ptr());
    load_tables();
    enable_paging();
    start_processes()
}

/// Prepares a ROM and binds its calls.
fn bind(rom: &Rom<'_>) -> Result<(), Unusable> {
    // SAFETY: ring 0, flat segments, interrupts disabled. Memory is seen at its physical addresses,
    // with page tables too, so the ROM stays where it is. What the platform trusts we trust.
    unsafe {
        rom.initialize()?;
        VMI.bind(|number| rom.relocation(number), native_call)
    }
}

#[panic_handler]
fn panic(information: &core::panic::PanicInfo<'_>) -> ! {
    while !VMI.is_bound(number::OUTB) {
        core::hint::spin_loop(); // Without calls there is nothing else to do.
    }
    line!("rust-kernel: failed: {}", information.message());
    end(false)
}

/// The serial port; the screen, 25 rows of 80 characters, each with a byte of colours.
const COM1: u16 = 0x3f8;
const SCREEN: *mut u16 = 0xb_8000 as *mut u16;
const COLUMNS: usize = 80;
const CELLS: usize = 25 * COLUMNS;

/// The first 8259's command port, with its data port behind it, and the vector of its IRQ 0.
const CONTROLLER: u16 = 0x20;
const TICK: u32 = 0x20;

fn outb(port: u16, value: u8) {
    // SAFETY: the kernel owns its machine's ports, and has no device write to memory.
    unsafe { VMI.OUTB(value.into(), port.into()) };
}

fn inb(port: u16) -> u8 {
    // SAFETY: as above. The call answers in AL.
    unsafe { VMI.INB(port.into()) as u8 }
}

/// Prepares all of them. Ticks wait until the first process enables interrupts.
fn prepare_devices() {
    // 115200 baud, 8 data bits, no parity. 80h puts the divisor in the place of registers 0 and 1.
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 0x03), (2, 0x07), (4, 0x03)] {
        outb(COM1 + register, value);
    }
    (0..CELLS).for_each(|cell| show(cell, b' '));
    outb(CONTROLLER, 0x11); // Edge-triggered, cascaded, a fourth word follows.
    for value in [TICK as u8, 4, 0x01, 0xfe] {
        outb(CONTROLLER + 1, value); // The last one masks all lines but the timer's.
        VMI.IODelay();
    }
    outb(0x43, 0x34); // The 8254's counter 0: both bytes, rate generator; a tick is a millisecond.
    1193_u16.to_le_bytes().into_iter().for_each(|byte| outb(0x40, byte));
}

fn show(cell: usize, byte: u8) {
    // SAFETY: the screen's memory, of which every value is a character.
    unsafe { SCREEN.add(cell % CELLS).write_volatile(0x0700 | u16::from(byte)) };
}

/// Serial port and screen as a sink for `writeln!`.
struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        static CURSOR: AtomicUsize = AtomicUsize::new(0);
        let mut cursor = CURSOR.load(Ordering::Relaxed);
        for byte in text.bytes() {
            outb(COM1, byte);
            while inb(COM1 + 5) & 0x40 == 0 {} // Until everything is sent.
            if byte == b'\n' {
                cursor = cursor.next_multiple_of(COLUMNS);
            } else {
                show(cursor, byte);
                cursor += 1;
            }
        }
        CURSOR.store(cursor, Ordering::Relaxed);
        Ok(())
    }
}

/// The end: QEMU's by `isa-debug-exit`, or else the processor's. Who knows what a PC has at that
/// port? Only where an emulator's debug console answers its own number an exit may be.
fn end(success: bool) -> ! {
    if inb(0xe9) == 0xe9 {
        outb(0xf4, if success { 0x10 } else { 0x11 });
    }
    loop {
        VMI.Shutdown();
    }
}

/// Selectors. To the kernel's its ring is added: a hypervisor's ROM may run it in another than 0.
const KERNEL_CODE: u32 = 0x08;
const KERNEL_DATA: u32 = 0x10;
const USER_CODE: u32 = 0x1b;
const USER_DATA: u32 = 0x23;
const TASK: u32 = 0x28;

/// The vector by which processes call the kernel. It is the last; the timer has [`TICK`].
const SYSTEM_CALL: u32 = 0x80;

/// What the processor or VMI wants on pages of its own.
#[repr(C, align(4096))]
struct Aligned<T>(T);

/// Flat segments, accessed already, so that the processor writes nothing there; last the task's.
static mut SEGMENTS: Aligned<[u64; 6]> = {
    const FLAT: u64 = 0x00cf_0000_0000_ffff;
    Aligned([0, FLAT | 0x9b << 40, FLAT | 0x93 << 40, FLAT | 0xfb << 40, FLAT | 0xf3 << 40, 0])
};
static mut GATES: Aligned<[u64; SYSTEM_CALL as usize + 1]> = Aligned([0; SYSTEM_CALL as usize + 1]);

/// Bytes of the task state segment; it is written in words.
const TASK_SIZE: u32 = 104;
static mut TASK_STATE: [u32; TASK_SIZE as usize / 4] = [0; TASK_SIZE as usize / 4];

/// Fills the tables and has the processor use them.
fn load_tables() {
    let cs: u32;
    // SAFETY: takes a selector.
    unsafe { asm!("mov {}, cs", out(reg) cs) };
    let (code, data) = (KERNEL_CODE | cs & 3, KERNEL_DATA | cs & 3);
    let (task, limit) = ((&raw const TASK_STATE) as u32, TASK_SIZE - 1);
    // SAFETY: the tables are statics to which nobody else writes. The new segments mean what the
    // loader's meant, and each vector leads to its stub.
    unsafe {
        let (segments, gates) = (&raw const SEGMENTS.0, &raw const GATES.0);
        let tables = [DescriptorTable::of(segments), DescriptorTable::of(gates)];
        TASK_STATE[2] = data; // SS for entries into the kernel; ESP comes by UpdateKernelStack.
        TASK_STATE[25] = TASK_SIZE << 16; // No port is open to processes: the bitmap is behind it.
        let (low, high) = (task << 16 | limit, task & 0xff00_0000 | 0x8900 | task >> 16 & 0xff);
        VMI.WriteGDTEntry(segments as u32, TASK / 8, low, high);
        for vector in 0..=SYSTEM_CALL {
            let stub = (&raw const stubs).wrapping_add(vector as usize) as u32;
            let gate = if vector == SYSTEM_CALL { 0xee00 } else { 0x8e00 };
            let (low, high) = (code << 16 | stub & 0xffff, stub & 0xffff_0000 | gate);
            VMI.WriteIDTEntry(gates as u32, vector, low, high);
        }
        VMI.SetGDT((&raw const tables[0]) as u32);
        VMI.SetIDT((&raw const tables[1]) as u32);
        asm!(
            "push {code}",
            "call 2f",
            "jmp 3f",
            "2: retf", // The return address and the selector are a far pointer.
            "3: mov ss, {data:x}",
            "mov ds, {user_data:x}",
            "mov es, {user_data:x}",
            code = in(reg) code,
            data = in(reg) data,
            user_data = in(reg) USER_DATA,
        );
        VMI.SetTR(TASK);
    }
}

/// The kernel, the ROMs and the screen are below 4 MiB, and mapped where they are. Of the memory
/// behind, which is the processes', the kernel sees a page at a time in a window: the last below.
const PAGE: u32 = 4096;
const TABLE_SPAN: u32 = 1024 * PAGE;
const WINDOW: u32 = TABLE_SPAN - PAGE;

/// Where a process has its code, and behind it a page for data and stack.
const USER: u32 = 0x4000_0000;
const USER_PAGE: u32 = USER + PAGE;

/// Bits of entries: present and writable, present and open to processes, all three. One of CR0.
const KERNEL_ENTRY: u32 = 0b011;
const USER_TEXT_ENTRY: u32 = 0b101;
const USER_ENTRY: u32 = 0b111;
const PAGING: u32 = 1 << 31;

/// The table below 4 MiB, which all address spaces have in common, and two for each process.
static mut TABLES: Aligned<[[u32; 1024]; 1 + 2 * COUNT]> = Aligned([[0; 1024]; 1 + 2 * COUNT]);

/// Where the table of all, a process's directory and table, and its page of data are.
fn places(process: usize) -> [u32; 4] {
    let (kernel, process) = ((&raw const TABLES) as u32, process as u32);
    let directory = kernel + PAGE + process * 2 * PAGE;
    [kernel, directory, directory + PAGE, TABLE_SPAN + process * PAGE]
}

/// Writes an entry of a table.
fn set(table: u32, index: u32, entry: u32, level: EntryFlags) {
    // SAFETY: tables are seen at their physical addresses. What is mapped is the caller's, where
    // nothing was, or in the window.
    unsafe { VMI.SetPxE(entry, table + index * 4, level.bits()) };
}

/// Tells of a table before its first entry is written: who shadows page tables must know.
fn announce(table: u32, level: PageFlags) {
    // SAFETY: one of ours, and empty as all memory of the image is.
    unsafe { VMI.AllocatePage(table / PAGE, (level | PageFlags::ZEROED).bits(), 0, 0, 0) };
}

/// Makes the address spaces, and switches paging on in the first.
fn enable_paging() {
    let [kernel, first, ..] = places(0);
    announce(kernel, PageFlags::PT);
    for page in 0..WINDOW / PAGE {
        set(kernel, page, page * PAGE + KERNEL_ENTRY, EntryFlags::PT);
    }
    for process in 0..COUNT {
        let [_, directory, table, data] = places(process);
        announce(directory, PageFlags::PD);
        announce(table, PageFlags::PT);
        set(directory, 0, kernel | KERNEL_ENTRY, EntryFlags::PD);
        set(directory, USER / TABLE_SPAN, table | USER_ENTRY, EntryFlags::PD);
        set(table, 0, (&raw const program) as u32 | USER_TEXT_ENTRY, EntryFlags::PT);
        set(table, 1, data | USER_ENTRY, EntryFlags::PT);
    }
    // SAFETY: each space maps the kernel, its stack and the ROM where they are.
    unsafe {
        VMI.SetCR3(first);
        VMI.SetCR0(VMI.GetCR0() | PAGING);
    }
}

/// Processes, ticks until the end, and how far a process counts from one system call to the next.
const COUNT: usize = 2;
const TICKS: u32 = 100;
const ROUND: u32 = 4096;

/// A process's context: what the entry code pushes, and what the processor does. DS and ES are the
/// same for all, and set anew at each interrupt; FS and GS are nobody's.
#[repr(C)]
struct Frame {
    registers: [u32; 8], // EDI, ESI, EBP, the kernel's ESP, EBX, EDX, ECX, EAX.
    vector: u32,
    interrupted: [u32; 5], // EIP, CS, EFLAGS, ESP, SS.
}

/// The stacks on which processes are interrupted. On top of each is its process's context.
static mut STACKS: [Aligned<[u8; 4096]>; COUNT] = [const { Aligned([0; 4096]) }; COUNT];

fn context(process: usize) -> *mut Frame {
    let top = (&raw mut STACKS).cast::<Aligned<[u8; 4096]>>().wrapping_add(process + 1);
    top.cast::<Frame>().wrapping_sub(1)
}

/// The process that runs; of each, the ticks that interrupted it, and its system calls.
struct Scheduler {
    current: usize,
    ticks: [u32; COUNT],
    calls: [u32; COUNT],
}
static mut SCHEDULER: Scheduler = Scheduler { current: 0, ticks: [0; COUNT], calls: [0; COUNT] };

// What each process runs: it counts in a register and in memory, and tells of it now and then. The
// first word of its page is its number, the second its count: at the same addresses in each.
global_asm!(
    ".pushsection .user, \"ax\", @progbits",
    "program: inc edi",
    "inc dword ptr [{page} + 4]",
    "test edi, {round} - 1",
    "jnz program",
    "mov eax, [{page}]",
    "mov edx, [{page} + 4]",
    "int {call}",
    "jmp program",
    ".popsection",
    page = const USER_PAGE,
    round = const ROUND,
    call = const SYSTEM_CALL,
);

/// Makes the processes, and leaves the processor to the first.
fn start_processes() -> ! {
    for process in 0..COUNT {
        let [kernel, _, _, data] = places(process);
        set(kernel, WINDOW / PAGE, data | KERNEL_ENTRY, EntryFlags::PT);
        // SAFETY: the window shows the process's page when the one that was there is forgotten.
        // Nobody is on the stack yet.
        unsafe {
            VMI.InvalPage(WINDOW);
            (WINDOW as *mut [u32; 2]).write_volatile([process as u32, 0]);
            context(process).write(Frame {
                registers: [0; 8],
                vector: 0,
                // 200h in EFLAGS lets interrupts in, and the stack begins at the end of the page.
                interrupted: [USER, USER_CODE, 0x202, USER_PAGE + PAGE, USER_DATA],
            });
        }
    }
    // SAFETY: made above.
    unsafe { asm!("jmp resume", in("eax") switch_to(0), options(noreturn)) }
}

/// All that a switch changes but the registers: those come with the context that it answers.
fn switch_to(process: usize) -> *const Frame {
    let (context, [_, directory, ..]) = (context(process), places(process));
    // SAFETY: each space maps the kernel. Both changes are good when the lazy mode is left.
    unsafe {
        VMI.SetLazyMode(LazyMode::CPU.0);
        VMI.UpdateKernelStack((&raw mut TASK_STATE) as u32, context.wrapping_add(1) as u32);
        VMI.SetCR3(directory);
        VMI.SetLazyMode(LazyMode::OFF.0);
    }
    context
}

// A stub for each vector pushes it. Exceptions are the end, so the error code of some does no harm.
// VMI's IRET is reached in the way in which it is bound. Every register is the process's by then,
// so the table is read through SS, which is always flat.
global_asm!(
    ".set vector, 0",
    ".balign {size}",
    "stubs: .rept {last} + 1",
    ".balign {size}",
    "push vector",
    "jmp interrupted",
    ".set vector, vector + 1",
    ".endr",
    "interrupted: pushad",
    "mov eax, {data}",
    "mov ds, eax",
    "mov es, eax",
    "cld",
    "push esp",
    "call {handle}",
    "resume: mov esp, eax", // In: EAX = the context to go on with.
    "popad",
    "add esp, 4", // The vector.
    "cmp byte ptr ss:[{vmi} + {kind}], {jump}",
    "je 2f",
    "call dword ptr ss:[{vmi} + {eip}]",
    "2: jmp dword ptr ss:[{vmi} + {eip}]",
    size = const STUB_SIZE,
    last = const SYSTEM_CALL,
    data = const USER_DATA,
    handle = sym handle,
    vmi = sym VMI,
    kind = const Calls::kind_offset(number::IRET),
    eip = const Calls::eip_offset(number::IRET),
    jump = const RelocationType::JUMP_REL.0,
);
const STUB_SIZE: usize = 16;

/// What interrupts mean. Answers the context that the processor goes on with.
extern "C" fn handle(frame: &Frame) -> *const Frame {
    let scheduler = &raw mut SCHEDULER;
    // SAFETY: interrupts are disabled in the kernel, and there is one processor.
    let Scheduler { current, ticks, calls } = unsafe { &mut *scheduler };
    match frame.vector {
        TICK => {
            outb(CONTROLLER, 0x20); // The end of the interrupt.
            ticks[*current] += 1;
            if ticks.iter().sum::<u32>() == TICKS {
                finish(ticks, calls);
            }
            *current = (*current + 1) % COUNT;
            switch_to(*current)
        }
        SYSTEM_CALL => {
            calls[*current] += 1;
            // Its number and its count in memory, and its count in a register.
            let [count, .., counted, _, process] = frame.registers;
            assert_eq!(process, *current as u32, "a process has another's memory");
            assert_eq!([count, counted], [calls[*current] * ROUND; 2], "a count is lost");
            frame
        }
        vector => panic!("exception {vector} in process {current}, CR2 {:#x}", VMI.GetCR2()),
    }
}

/// Prints what has come of it, and ends.
fn finish(ticks: &[u32], calls: &[u32]) -> ! {
    for (process, (ticks, calls)) in ticks.iter().zip(calls).enumerate() {
        let count = calls * ROUND;
        line!("process {process}: {ticks} ticks, {calls} system calls, counted to {count}");
        assert!(*ticks != 0 && *calls != 0, "a process did nothing");
    }
    line!("rust-kernel: done: {COUNT} processes, {TICKS} ticks");
    end(true)
}
