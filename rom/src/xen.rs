//! The Xen backend in the image.
//!
//! Whoever places the image on Xen grants it memory as the reference hypervisor does, and leaves in the last page of it where Xen's
//! structures are. `vmi_init` looks for Xen only where it does not run in ring 0: there native code could not run
//! either. From then on `get_reloc` answers every call from the table below.
//!
//! The kernel runs in ring 1, on segments that are as flat as its own. Its interrupt flag is a byte in the granted memory. Entries of
//! calls whose registers or segments belong to somebody else are assembly, all others lead to functions of the backend.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: naked routines, and memory at a distance that the image is told"
)]
#![expect(non_snake_case, reason = "the specification's names")]

mod waiting;

use crate::granted::{DISTANCE, emit_entries, entries, granted};
use crate::reference;
use core::arch::{asm, naked_asm};
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use vmi_abi::state::DescriptorTable;
use vmi_abi::{CALLS_3_0, for_each_call, number};
use vmi_hv_backend::xen::interface::{
    FORCED_EMULATION, HYPERCALL_VECTOR, PLACEMENT_SIZE, Placement, hypercall, physdev, sched,
};
use vmi_hv_backend::xen::{Cpu, Delivery, MEMORY, Machine, Xen, cpuid};
use vmi_native_backend::binding::{SHORT_PLAIN, is_short};
/// Names for the calls that have no entry here; where there is one, its name comes first.
use vmi_native_backend::calls::*;
use waiting::{CLTS, SetCR3, SetLazyMode, SetPxELong, UpdateKernelStack, WriteGDTEntry};
use x86::bits32::eflags::EFlags;

/// What the granted memory's first word says where this backend is chosen.
pub(crate) const XEN: u32 = Xen::CHOSEN;

/// IF in EFLAGS.
const INTERRUPTS: u32 = EFlags::FLAGS_IF.bits();

/// The vector of a general-protection fault.
const GENERAL_PROTECTION: u32 = 13;

/// What Xen pushes before a frame that its IRET could not load: DS, ES, FS and GS.
const FAILED_SEGMENTS: u32 = 16;

/// Bytes from the stack pointer to what was pushed last, behind all general registers, DS and ES.
const SAVED: u32 = 40;

/// `vmi_init`: EAX = 0 where the image can serve the guest. In ring 0 that is decided as without Xen. Changes ECX, EDX, flags.
///
/// # Safety
///
/// As for every call: flat segments. A distance that is not zero leads to the granted memory.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn vmi_init() {
    naked_asm!(
        "movl %cs, %eax",
        "andl $3, %eax",
        "jz {reference}",
        "call 1f",
        "1: popl %edx",
        "movl (rom_start - 1b + {distance})(%edx), %ecx",
        "jecxz 2f",
        "leal (rom_start - 1b)(%edx), %edx",
        "addl %edx, %ecx",
        "jmp {choose}",
        "2: retl",
        reference = sym reference::vmi_init,
        distance = const DISTANCE,
        choose = sym choose,
        options(att_syntax),
    )
}

/// The linear address of a routine.
macro_rules! address_of {
    ($routine:ident) => {{
        let address: u32;
        // SAFETY: it finds its own place, and from that the routine's.
        unsafe {
            asm!(
                "call 2f",
                "2: popl {0}",
                "addl $({routine} - 2b), {0}",
                out(reg) address,
                routine = sym $routine,
                options(att_syntax),
            );
        }
        address
    }};
}

/// Chooses Xen, if it is there. Not 0: it is not, or not as it is needed.
extern "fastcall" fn choose(own: u32, image: u32) -> u32 {
    let placement: *const Placement =
        with_exposed_provenance((own + MEMORY - PLACEMENT_SIZE) as usize);
    // SAFETY: the granted memory, zeroed at first. On Xen the loader left something in its last page.
    let (xen, placement) = unsafe { (&*with_exposed_provenance::<Xen>(own as usize), &*placement) };
    if !placement.is_valid() || !Xen::is_there(cpuid) {
        return 1;
    }
    let code: u32;
    // SAFETY: reading it changes nothing.
    unsafe { asm!("movl %cs, {}", out(reg) code, options(att_syntax)) };
    let callbacks = [address_of!(event_callback), address_of!(failsafe_callback)];
    xen.start(&Cpu, placement, image, own, code, callbacks).is_err().into()
}

/// The state of the backend, which is chosen: `get_reloc` gives an entry away only then.
#[inline(always)]
fn xen() -> &'static Xen {
    // SAFETY: the granted memory begins with it.
    unsafe { &*granted::<Xen>() }
}

/// Does this uninterrupted.
#[inline(always)]
fn uninterrupted<R>(section: impl FnOnce(&Xen) -> R) -> R {
    let xen = xen();
    xen.uninterrupted(&Cpu, || section(xen))
}

/// Base and limit of a descriptor table, from where a guest put them for a call.
fn table(there: u32) -> (u32, u32) {
    // SAFETY: the guest passes a pointer to six bytes.
    let table = unsafe { with_exposed_provenance::<DescriptorTable>(there as usize).read() };
    (table.base.get(), table.limit.get().into())
}

/// Stores base and limit where a guest wants them.
fn set_table(there: u32, (base, limit): (u32, u32)) {
    let table = DescriptorTable { base: base.into(), limit: (limit as u16).into() };
    // SAFETY: as above.
    unsafe { with_exposed_provenance_mut::<DescriptorTable>(there as usize).write(table) };
}

entries! {
    /// EAX -> limit and base.
    SetGDT { "movl %eax, %ecx", "jmp {function}" }
    set_gdt(there) {
        let (base, limit) = table(there);
        uninterrupted(|xen| xen.set_gdt(&Cpu, base, limit));
    }

    /// EAX -> limit and base.
    SetIDT { "movl %eax, %ecx", "jmp {function}" }
    set_idt(there) {
        let (base, limit) = table(there);
        uninterrupted(|xen| xen.set_idt(&Cpu, base, limit));
    }

    /// EAX selector.
    SetLDT { "movl %eax, %ecx", "jmp {function}" }
    set_ldt(selector) { uninterrupted(|xen| xen.set_ldt(&Cpu, selector)); }

    /// EAX selector.
    SetTR { "movl %eax, %ecx", "jmp {function}" }
    set_task(selector) { uninterrupted(|xen| xen.set_task(&Cpu, selector)); }

    /// EAX -> buffer.
    GetGDT { "movl %eax, %ecx", "jmp {function}" }
    get_gdt(there) { set_table(there, xen().gdt()); }

    /// EAX -> buffer.
    GetIDT { "movl %eax, %ecx", "jmp {function}" }
    get_idt(there) { set_table(there, xen().idt()); }

    /// -> EAX.
    GetLDT { "jmp {function}" }
    get_ldt() -> u32 { xen().ldt() }

    /// -> EAX.
    GetTR { "jmp {function}" }
    get_task() -> u32 { xen().task() }

    /// EAX table, EDX index, ECX low word, stack high word.
    WriteLDTEntry { "pushl 4(%esp)", "pushl %ecx", "movl %eax, %ecx", "call {function}", "retl" }
    write_ldt_entry(table, index, low, high) {
        uninterrupted(|xen| xen.write_ldt_entry(&Cpu, table, index, low, high));
    }

    /// EAX table, EDX index, ECX low word, stack high word.
    WriteIDTEntry { "pushl 4(%esp)", "pushl %ecx", "movl %eax, %ecx", "call {function}", "retl" }
    write_idt_entry(table, index, low, high) {
        uninterrupted(|xen| xen.write_idt_entry(&Cpu, table, index, low, high));
    }

    /// EAX value.
    SetCR0 { "movl %eax, %ecx", "jmp {function}" }
    set_cr0(value) { uninterrupted(|xen| xen.set_cr0(&Cpu, value)); }

    /// EAX value.
    SetCR2 { "movl %eax, %ecx", "jmp {function}" }
    set_cr2(value) { xen().set_cr2(value); }

    /// EAX value. Xen takes of it what its guests may have.
    SetCR4 { "movl %eax, %ecx", "pushl %eax", "call {function}", "popl %eax", "movl %eax, %cr4", "retl" }
    set_cr4(value) { uninterrupted(|xen| xen.set_cr4(&Cpu, value)); }

    /// -> EAX.
    GetCR0 { "jmp {function}" }
    get_cr0() -> u32 { uninterrupted(|xen| xen.cr0(&Cpu)) }

    /// -> EAX.
    GetCR2 { "jmp {function}" }
    get_cr2() -> u32 { uninterrupted(|xen| xen.cr2(&Cpu)) }

    /// -> EAX.
    GetCR3 { "jmp {function}" }
    get_cr3() -> u32 { uninterrupted(|xen| xen.cr3(&Cpu)) }

    /// -> EAX.
    GetCR4 { "jmp {function}" }
    get_cr4() -> u32 { xen().cr4() }

    /// EAX register, EDX value.
    SetDR { "movl %eax, %ecx", "jmp {function}" }
    set_debug_register(register, value) {
        uninterrupted(|xen| xen.set_debug_register(&Cpu, register, value));
    }

    /// EAX register -> EAX.
    GetDR { "movl %eax, %ecx", "jmp {function}" }
    get_debug_register(register) -> u32 { xen().debug_register(&Cpu, register) }

    /// Waits with interrupts enabled: Xen unmasks and blocks in one step.
    Halt { "jmp {function}" }
    halt() { xen().halt(&Cpu); }

    /// Does not return.
    Reboot { "jmp {function}" }
    reboot() { Cpu.shut_down(sched::SHUTDOWN_REBOOT); }

    /// Does not return.
    Shutdown { "jmp {function}" }
    shutdown() { Cpu.shut_down(sched::SHUTDOWN_POWEROFF); }

    /// EAX frame -> EAX.
    MachineToPhysical { "movl %eax, %ecx", "jmp {function}" }
    machine_to_physical(frame) -> u32 { xen().machine_to_physical(&Cpu, frame) }

    /// EAX frame -> EAX.
    PhysicalToMachine { "movl %eax, %ecx", "jmp {function}" }
    physical_to_machine(frame) -> u32 { xen().physical_to_machine(&Cpu, frame) }

    /// EAX frame, EDX flags, ECX source of a clone, on the stack where and how many.
    AllocatePage { "pushl 8(%esp)", "pushl 8(%esp)", "pushl %ecx", "movl %eax, %ecx", "call {function}", "retl" }
    allocate_page(frame, flags, source, start, count) {
        uninterrupted(|xen| xen.allocate_page(&Cpu, frame, flags, (source, start, count)));
    }

    /// EAX frame, EDX flags.
    ReleasePage { "movl %eax, %ecx", "jmp {function}" }
    release_page(frame, flags) { uninterrupted(|xen| xen.release_page(&Cpu, frame, flags)); }

    /// EAX linear address.
    InvalPage { "movl %eax, %ecx", "jmp {function}" }
    invalidate(address) { uninterrupted(|xen| xen.invalidate(&Cpu, address)); }

    /// EAX flags.
    FlushTLB { "movl %eax, %ecx", "jmp {function}" }
    flush_translations(flags) { uninterrupted(|xen| xen.flush_translations(&Cpu, flags)); }

    /// EAX slot, EDX linear address, ECX pages, stack frame.
    SetLinearMapping { "pushl 4(%esp)", "pushl %ecx", "movl %eax, %ecx", "call {function}", "retl" }
    set_linear_mapping(slot, start, pages, frame) {
        uninterrupted(|xen| xen.set_linear_mapping(slot, start, pages, frame));
    }

    /// EAX, an EFLAGS image. Without a level of its own ring the kernel could reach no port: 0 is 1.
    SetIOPLMask { "movl %eax, %ecx", "jmp {function}" }
    set_port_privilege(mask) {
        let level = (mask & EFlags::FLAGS_IOPL3.bits()) >> EFlags::FLAGS_IOPL1.bits().trailing_zeros();
        Cpu.operate(hypercall::PHYSDEV_OP, physdev::SET_IOPL, &mut [if level == 0 { 1 } else { level }]);
    }

    /// EAX register, EDX value.
    APICWrite { "movl %eax, %ecx", "jmp {function}" }
    write_apic(register, value) {
        uninterrupted(|xen| xen.write_apic(&Cpu, register, value));
    }

    /// EAX register -> EAX.
    APICRead { "movl %eax, %ecx", "jmp {function}" }
    read_apic(register) -> u32 { xen().read_apic(register) }

    /// -> EDX:EAX.
    GetCycleFrequency { "jmp {function}" }
    frequency() -> u64 { xen().frequency() }

    /// EAX counter -> EDX:EAX.
    GetCycleCounter { "movl %eax, %ecx", "jmp {function}" }
    counter(counter) -> u64 { uninterrupted(|xen| xen.counter(&Cpu, counter)) }

    /// EAX flags, ECX:EDX expiry, stack period.
    SetAlarm { "pushl 8(%esp)", "pushl 8(%esp)", "pushl %ecx", "movl %eax, %ecx", "call {function}", "retl" }
    set_alarm(flags, low, high, period_low, period_high) {
        let long = |low, high| u64::from(high) << 32 | u64::from(low);
        let (expiry, period): (u64, u64) = (long(low, high), long(period_low, period_high));
        uninterrupted(|xen| xen.set_alarm(&Cpu, flags, expiry, period));
    }

    /// EAX flags -> EAX.
    CancelAlarm { "movl %eax, %ecx", "jmp {function}" }
    cancel_alarm(flags) -> u32 { uninterrupted(|xen| xen.cancel_alarm(&Cpu, flags)) }

    /// -> EDX:EAX.
    GetWallclockTime { "jmp {function}" }
    wall_clock() -> u64 { xen().wall_clock(&Cpu) }

    /// -> EAX.
    WallclockUpdated { "jmp {function}" }
    wall_clock_updated() -> u32 { xen().wall_clock_updated(&Cpu) }

}

/// Hands over what waits.
extern "fastcall" fn flush() {
    uninterrupted(|xen| xen.flush(&Cpu));
}

/// Where what Xen left to the ROM goes to: a vector, or 0 for what its events say.
extern "fastcall" fn next_delivery(vector: u32) -> u64 {
    let xen = xen();
    let Delivery { address, selector } = if vector == 0 {
        xen.next_event(&Cpu)
    } else {
        xen.disable();
        xen.delivery(&Cpu, vector).unwrap_or_default()
    };
    u64::from(selector) << 32 | u64::from(address)
}

/// Features that Xen's 32-bit guests cannot use, or that the ROM has no part of: leaf 1, EDX. Virtual-8086 extensions, large pages,
/// the local APIC, SYSENTER, global pages, large pages again.
const WITHHELD: u32 = 1 << 1 | 1 << 3 | 1 << 9 | 1 << 11 | 1 << 13 | 1 << 17;

/// The same in leaf 80000001h, EDX: those again, and SYSCALL and long mode.
const WITHHELD_EXTENDED: u32 = 1 << 1 | 1 << 3 | 1 << 9 | 1 << 11 | 1 << 13 | 1 << 17 | 1 << 29;

/// Code that finds the granted memory: in a register, the distance to it from an instruction of the routine. [`own`] has the rest.
/// Memory only through CS.
macro_rules! find_own {
    ($register:literal) => {
        concat!(
            "call 99f\n",
            "99: popl %",
            $register,
            "\n",
            "addl %cs:(rom_start - 99b + {distance})(%",
            $register,
            "), %",
            $register,
        )
    };
}

/// An instruction on what lies at an operand's offset in the granted memory.
macro_rules! own {
    [$before:literal, $offset:ident, $after:literal] => {
        concat!($before, "rom_start - 99b + {", stringify!($offset), "}", $after)
    };
}

/// Defines routines whose registers are all somebody else's.
macro_rules! routines {
    ($( $(#[$attribute:meta])* $name:ident { $($assembly:tt)+ } )*) => { $(
        $(#[$attribute])*
        ///
        /// # Safety
        ///
        /// As for every call, and Xen is chosen.
        #[unsafe(naked)]
        pub(super) unsafe extern "C" fn $name() {
            naked_asm!($($assembly)+ options(att_syntax))
        }
    )* };
}

pub(crate) use {find_own, own, routines};

routines! {
    /// EAX leaf, ECX subleaf -> EAX, EBX, ECX, EDX; changes flags.
    CPUID {
        "pushl %eax",
        ".byte {0}, {1}, {2}, {3}, {4}",
        "cpuid",
        "cmpl $1, (%esp)",
        "jne 2f",
        "andl $~{withheld}, %edx",
        "2: cmpl $0x80000001, (%esp)",
        "jne 3f",
        "andl $~{extended}, %edx",
        "3: leal 4(%esp), %esp",
        "retl",
        const FORCED_EMULATION[0],
        const FORCED_EMULATION[1],
        const FORCED_EMULATION[2],
        const FORCED_EMULATION[3],
        const FORCED_EMULATION[4],
        withheld = const WITHHELD,
        extended = const WITHHELD_EXTENDED,
    }

    /// Changes flags. What is pending is delivered before it returns.
    EnableInterrupts {
        "pushl %eax",
        find_own!("eax"),
        own!["movb $0, %ss:", mask, "(%eax)"],
        own!["cmpb $0, %ss:", pending, "(%eax)"],
        "jne 2f",
        "popl %eax",
        "retl",
        // Xen looks for events on the way back from every hypercall; this one does nothing else.
        "2: pushal",
        "movl ${version}, %eax",
        "xorl %ebx, %ebx",
        "xorl %ecx, %ecx",
        "int ${hypercall}",
        "popal",
        "popl %eax",
        "retl",
        distance = const DISTANCE,
        mask = const Xen::MASK_OFFSET,
        pending = const Xen::PENDING_OFFSET,
        version = const hypercall::XEN_VERSION,
        hypercall = const HYPERCALL_VECTOR,
    }

    /// Changes flags.
    DisableInterrupts {
        "pushl %eax",
        find_own!("eax"),
        own!["movb $1, %ss:", mask, "(%eax)"],
        "popl %eax",
        "retl",
        distance = const DISTANCE,
        mask = const Xen::MASK_OFFSET,
    }

    /// -> EAX; changes flags.
    GetInterruptMask {
        find_own!("eax"),
        own!["cmpb $1, %ss:", mask, "(%eax)"],
        "sbbl %eax, %eax",
        "andl ${interrupts}, %eax",
        "retl",
        distance = const DISTANCE,
        mask = const Xen::MASK_OFFSET,
        interrupts = const INTERRUPTS,
    }

    /// EAX, an EFLAGS image; changes flags.
    SetInterruptMask {
        "testl ${interrupts}, %eax",
        "jnz {enable}",
        "jmp {disable}",
        interrupts = const INTERRUPTS,
        enable = sym EnableInterrupts,
        disable = sym DisableInterrupts,
    }

    /// The frame lies behind the return address. Xen's own IRET enables interrupts as the frame says.
    IRET {
        "leal 4(%esp), %esp",
        "pushl %eax",
        "jmp {iret}",
        iret = sym iret,
    }

    /// EDX EIP, ECX ESP. The program's segments follow the kernel's: code 16 bytes behind, stack 24 bytes.
    SYSEXIT {
        "leal -20(%esp), %esp",
        "pushfl",
        "popl 8(%esp)",
        "orl ${interrupts}, 8(%esp)",
        "movl %edx, (%esp)",
        "movl %ecx, 12(%esp)",
        "movl %cs, %edx",
        "andl $~3, %edx",
        "leal 24 + 3(%edx), %ecx",
        "movl %ecx, 16(%esp)",
        "leal 16 + 3(%edx), %ecx",
        "movl %ecx, 4(%esp)",
        "movl (%esp), %edx",
        "movl 12(%esp), %ecx",
        "pushl %eax",
        "jmp {iret}",
        interrupts = const INTERRUPTS,
        iret = sym iret,
    }

    /// On the stack EAX, and above it the frame. What waits goes over first.
    iret {
        find_own!("eax"),
        own!["cmpl $0, %ss:", waiting, "(%eax)"],
        "jne 3f",
        // Xen's IRET ends a domain that returns into ring 0, or into virtual-8086 mode. The instruction only faults.
        "2: testb $3, 8(%esp)",
        "jz 4f",
        "testl ${virtual_8086}, 12(%esp)",
        "jnz 4f",
        "movl ${number}, %eax",
        "int ${hypercall}",
        "4: popl %eax",
        "iretl",
        "3: pushal",
        "pushl %ds",
        "pushl %es",
        "movl %ss, %eax",
        "movl %eax, %ds",
        "movl %eax, %es",
        "cld",
        "call {flush}",
        "popl %es",
        "popl %ds",
        "popal",
        "jmp 2b",
        distance = const DISTANCE,
        waiting = const Xen::WAITING_OFFSET,
        virtual_8086 = const EFlags::FLAGS_VM.bits(),
        number = const hypercall::IRET,
        hypercall = const HYPERCALL_VECTOR,
        flush = sym flush,
    }

    /// Xen enters here with events masked, and on the stack an interrupt's frame.
    event_callback {
        "pushl %eax",
        "pushl %ecx",
        "pushl %edx",
        "call 99f",
        "99: popl %eax",
        "leal (rom_restarts_end - 99b)(%eax), %ecx",
        "leal (rom_restarts - 99b)(%eax), %eax",
        "2: cmpl %ecx, %eax",
        "jae 4f",
        "movl 12(%esp), %edx", // EIP, then how far it is in the section.
        "subl %eax, %edx",
        "subl %cs:(%eax), %edx",
        "cmpl %cs:4(%eax), %edx",
        "jae 3f",
        "subl %edx, 12(%esp)",
        "3: leal {restart_size}(%eax), %eax",
        "jmp 2b",
        "4: popl %edx",
        "popl %ecx",
        "popl %eax",
        "pushl $0", // Where the handler's selector comes,
        "pushl $0", // and its address. Till then, a vector.
        "jmp {deliver}",
        restart_size = const waiting::RESTART_SIZE,
        deliver = sym deliver,
    }

    /// Xen enters here if it cannot load the frame of an IRET, with its segments before that frame: a fault that the kernel sees as one
    /// of the program's.
    failsafe_callback {
        "leal {segments}(%esp), %esp",
        "pushl $0", // The error code.
        "pushl $0",
        "pushl ${vector}",
        "jmp {deliver}",
        segments = const FAILED_SEGMENTS,
        vector = const GENERAL_PROTECTION,
        deliver = sym deliver,
    }

    /// On the stack a vector, or 0 for events, a free word, and what the handler is to find. All registers are somebody else's.
    deliver {
        "pushal",
        "pushl %ds",
        "pushl %es",
        "movl %ss, %eax",
        "movl %eax, %ds",
        "movl %eax, %es",
        "cld",
        "movl {saved}(%esp), %ecx",
        "call {next}",
        "movl %eax, {saved}(%esp)",
        "movl %edx, {saved} + 4(%esp)",
        "testl %eax, %eax",
        "popl %es",
        "popl %ds",
        "popal",
        "jz 2f",
        "lretl",
        "2: leal 8(%esp), %esp",
        "pushl %eax",
        "jmp {iret}",
        saved = const SAVED,
        next = sym next_delivery,
        iret = sym iret,
    }
}

/// Where the code of a call begins, behind its entry or its native code: that is where it leaves its site alone. A call without either is
/// answered NONE.
const fn row(number: vmi_abi::CallNumber) -> i32 {
    if Xen::is_served(number) {
        0
    } else if Xen::is_native(number) {
        let is_short = is_short(&CALLS_3_0[number.0 as usize]);
        if is_short { SHORT_PLAIN as i32 } else { 0 }
    } else {
        -1
    }
}

macro_rules! table {
    () => {
        "xen_entries"
    };
}

for_each_call!(emit_entries);
