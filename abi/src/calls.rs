//! Every call of the interface: the one list from which everything that must agree is made.
//!
//! The list is a macro so that code can be made from it as well as tables: [`for_each_call!`]
//! hands all rows to a macro of the caller's. The image makes its relocation table that way, this
//! module [`number`], [`CALLS_3_0`] and [`CALLS_13`].

use crate::header::{RomHeader, SLOT_COUNT};
use crate::{
    Answers, Argument, Call, Contract, Deferral, Ending, Group, Place, REVISION_3_0, REVISION_13_0,
    Registers, Revision, Segments, Site, Slot,
};
use core::mem::offset_of;
use static_assertions::const_assert;

/// A call's number in revision 3.0. A guest may ask for any 32-bit value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(transparent)]
pub struct CallNumber(pub u32);

/// Hands the declaration of every call to the macro `$then`.
///
/// Two groups of rows: `revision_3_0` in the order of its numbers, each `Name = number => contract`
/// below its summary, and `only_13` with the calls that 3.0 no longer has, `Name => contract`.
/// A contract is an expression that needs this module's imports; most callers skip it. Its fields stand in
/// the order of [`Contract`]'s, and arguments and sets of registers show their names, so that a macro can
/// read them: `vmi` makes functions of the rows.
#[macro_export]
macro_rules! for_each_call {
    ($then:ident) => {
        $then! {
            revision_3_0 {
                /// Executes CPUID; features that the ROM cannot serve are masked.
                CPUID = 0 => Contract {
                    slot: Slot::new(5),
                    arguments: args![leaf: Eax, subleaf: Ecx],
                    results: Registers::CPUID,
                    clobbers: Registers::FLAGS,
                    ..Contract::STANDARD
                }
                /// Writes a model-specific register.
                WRMSR = 1 => Contract {
                    slot: Slot::new(6),
                    arguments: args![value: EdxEax, index: Ecx],
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Reads a model-specific register.
                RDMSR = 2 => Contract {
                    slot: Slot::new(7),
                    arguments: args![index: Ecx],
                    results: Registers::EDX_EAX,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Loads the global descriptor table register.
                SetGDT = 3 => Contract {
                    slot: Slot::new(8),
                    arguments: args![table: Eax],
                    ..Contract::STANDARD
                }
                /// Loads the local descriptor table register.
                SetLDT = 4 => Contract {
                    slot: Slot::new(9),
                    arguments: args![selector: Eax],
                    ..Contract::STANDARD
                }
                /// Loads the interrupt descriptor table register.
                SetIDT = 5 => Contract {
                    slot: Slot::new(10),
                    arguments: args![table: Eax],
                    ..Contract::STANDARD
                }
                /// Loads the task register.
                SetTR = 6 => Contract {
                    slot: Slot::new(11),
                    arguments: args![selector: Eax],
                    ..Contract::STANDARD
                }
                /// Stores the global descriptor table register: the guest's, not a hypervisor's.
                GetGDT = 7 => Contract {
                    slot: Slot::new(12),
                    arguments: args![buffer: Eax],
                    ..Contract::STANDARD
                }
                /// Reads the local descriptor table register.
                GetLDT = 8 => Contract {
                    slot: Slot::new(13),
                    results: Registers::EAX,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Stores the interrupt descriptor table register: the guest's, not a hypervisor's.
                GetIDT = 9 => Contract {
                    slot: Slot::new(14),
                    arguments: args![buffer: Eax],
                    ..Contract::STANDARD
                }
                /// Reads the task register.
                GetTR = 10 => Contract {
                    slot: Slot::new(15),
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Stores a descriptor in a GDT. It may be altered on its way in (DPL, limit).
                WriteGDTEntry = 11 => Contract {
                    slot: Slot::new(16),
                    arguments: args![table: Eax, index: Edx, low: Ecx, high: Stack],
                    deferral: Deferral::LazyCpu,
                    ..Contract::STANDARD
                }
                /// Stores a descriptor in an LDT. It may be altered on its way in (DPL, limit).
                WriteLDTEntry = 12 => Contract {
                    slot: Slot::new(17),
                    arguments: args![table: Eax, index: Edx, low: Ecx, high: Stack],
                    deferral: Deferral::LazyCpu,
                    ..Contract::STANDARD
                }
                /// Stores a descriptor in an IDT. It may be altered on its way in (DPL, limit).
                WriteIDTEntry = 13 => Contract {
                    slot: Slot::new(18),
                    arguments: args![table: Eax, index: Edx, low: Ecx, high: Stack],
                    deferral: Deferral::LazyCpu,
                    ..Contract::STANDARD
                }
                /// Sets the stack for entries into ring 0. Linux passes a selector instead of the task state segment: the current one counts.
                UpdateKernelStack = 14 => Contract {
                    slot: Slot::new(19),
                    arguments: args![task_state: Eax, esp0: Edx],
                    ..Contract::STANDARD
                }
                /// Loads CR0.
                SetCR0 = 15 => Contract {
                    slot: Slot::new(20),
                    arguments: args![value: Eax],
                    ..Contract::STANDARD
                }
                /// Loads CR2.
                SetCR2 = 16 => Contract {
                    slot: Slot::new(21),
                    arguments: args![value: Eax],
                    ..Contract::STANDARD
                }
                /// Loads CR3: another address space, and no translation that is not global.
                SetCR3 = 17 => Contract {
                    slot: Slot::new(22),
                    arguments: args![value: Eax],
                    deferral: Deferral::LazyCpu,
                    ..Contract::STANDARD
                }
                /// Loads CR4.
                SetCR4 = 18 => Contract {
                    slot: Slot::new(23),
                    arguments: args![value: Eax],
                    ..Contract::STANDARD
                }
                /// Reads CR0 as the guest last set it.
                GetCR0 = 19 => Contract {
                    slot: Slot::new(24),
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Reads CR2, the linear address of the last page fault.
                GetCR2 = 20 => Contract {
                    slot: Slot::new(25),
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Reads CR3 as the guest last set it.
                GetCR3 = 21 => Contract {
                    slot: Slot::new(26),
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Reads CR4 as the guest last set it.
                GetCR4 = 22 => Contract {
                    slot: Slot::new(27),
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Writes back and invalidates the caches.
                WBINVD = 23 => Contract {
                    slot: Slot::new(29),
                    ..Contract::STANDARD
                }
                /// Loads a debug register.
                SetDR = 24 => Contract {
                    slot: Slot::new(30),
                    arguments: args![register: Eax, value: Edx],
                    ..Contract::STANDARD
                }
                /// Reads a debug register.
                GetDR = 25 => Contract {
                    slot: Slot::new(31),
                    arguments: args![register: Eax],
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Reads a performance-monitoring counter.
                RDPMC = 26 => Contract {
                    slot: Slot::new(32),
                    arguments: args![counter: Ecx],
                    results: Registers::EDX_EAX,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Reads the time-stamp counter.
                RDTSC = 27 => Contract {
                    slot: Slot::new(33),
                    results: Registers::EDX_EAX,
                    ..Contract::STANDARD
                }
                /// Clears the task-switched flag of CR0.
                CLTS = 28 => Contract {
                    slot: Slot::new(34),
                    deferral: Deferral::LazyCpu,
                    ..Contract::STANDARD
                }
                /// Sets the interrupt flag and delivers what is pending. The first thing on Linux's SYSENTER path, where every register is the user's.
                EnableInterrupts = 29 => Contract {
                    slot: Slot::new(35),
                    clobbers: Registers::FLAGS,
                    segments: Segments::StackOnly,
                    site: Site::Patched,
                    ..Contract::STANDARD
                }
                /// Clears the interrupt flag.
                DisableInterrupts = 30 => Contract {
                    slot: Slot::new(36),
                    clobbers: Registers::FLAGS,
                    segments: Segments::StackOnly,
                    site: Site::Patched,
                    ..Contract::STANDARD
                }
                /// Reads the interrupt flag, in bit 9 as in EFLAGS.
                GetInterruptMask = 31 => Contract {
                    slot: Slot::new(37),
                    results: Registers::EAX,
                    clobbers: Registers::FLAGS,
                    segments: Segments::StackOnly,
                    site: Site::Patched,
                    ..Contract::STANDARD
                }
                /// Sets the interrupt flag from bit 9 of an EFLAGS image, and delivers what is pending.
                SetInterruptMask = 32 => Contract {
                    slot: Slot::new(38),
                    arguments: args![mask: Eax],
                    clobbers: Registers::FLAGS,
                    segments: Segments::StackOnly,
                    site: Site::Patched,
                    ..Contract::STANDARD
                }
                /// Returns from an interrupt: pops EIP, CS, EFLAGS and, for another ring, ESP, SS and, for virtual-8086 mode, ES, DS, FS, GS. Reached by a call, a return address lies above the frame.
                IRET = 33 => Contract {
                    slot: Slot::new(39),
                    arguments: args![frame: Frame],
                    clobbers: Registers::NONE,
                    segments: Segments::StackOnly,
                    answers: Answers::TRANSFER,
                    site: Site::Patched,
                    ending: Ending::Transfers,
                    ..Contract::STANDARD
                }
                /// Returns from a fast system call and enables interrupts in one step.
                SYSEXIT = 34 => Contract {
                    slot: Slot::new(40),
                    arguments: args![eip: Edx, esp: Ecx],
                    clobbers: Registers::NONE,
                    segments: Segments::StackOnly,
                    answers: Answers::TRANSFER,
                    site: Site::Patched,
                    ending: Ending::Transfers,
                    ..Contract::STANDARD
                }
                /// Waits for an interrupt with interrupts enabled.
                Halt = 35 => Contract {
                    slot: Slot::new(42),
                    ..Contract::STANDARD
                }
                /// Restarts the machine: 0 soft, 1 hard.
                Reboot = 36 => Contract {
                    slot: Slot::new(43),
                    arguments: args![kind: Eax],
                    site: Site::Unused,
                    ending: Ending::Stops,
                    ..Contract::STANDARD
                }
                /// Waits with interrupts disabled: this processor is off.
                Shutdown = 37 => Contract {
                    slot: Slot::new(44),
                    site: Site::Unused,
                    ending: Ending::Stops,
                    ..Contract::STANDARD
                }
                /// Stores a 32-bit page-table entry.
                SetPxE = 38 => Contract {
                    slot: Slot::since_13_3(86),
                    arguments: args![value: Eax, entry: Edx, flags: Ecx],
                    deferral: Deferral::LazyMmu,
                    ..Contract::STANDARD
                }
                /// Stores a 64-bit page-table entry. No processor sees half of a present mapping.
                SetPxELong = 39 => Contract {
                    slot: Slot::since_13_3(87),
                    arguments: args![value: EdxEax, entry: Ecx, flags: Stack],
                    deferral: Deferral::LazyMmu,
                    ..Contract::STANDARD
                }
                /// Tells that the guest wrote a 32-bit page-table entry itself.
                UpdatePxE = 40 => Contract {
                    arguments: args![entry: Eax, flags: Edx],
                    deferral: Deferral::LazyMmu,
                    answers: Answers::NOTIFICATION,
                    ..Contract::STANDARD
                }
                /// Tells that the guest wrote a 64-bit page-table entry itself.
                UpdatePxELong = 41 => Contract {
                    arguments: args![entry: Eax, flags: Edx],
                    deferral: Deferral::LazyMmu,
                    answers: Answers::NOTIFICATION,
                    ..Contract::STANDARD
                }
                /// Translates a frame number of the machine into the guest's.
                MachineToPhysical = 42 => Contract {
                    arguments: args![frame: Eax],
                    results: Registers::EAX,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Translates the guest's frame number into the machine's.
                PhysicalToMachine = 43 => Contract {
                    arguments: args![frame: Eax],
                    results: Registers::EAX,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Tells that a page becomes a page table.
                AllocatePage = 44 => Contract {
                    slot: Slot::new(53),
                    arguments: args![frame: Eax, flags: Edx, clone_frame: Ecx, clone_start: Stack, clone_count: Stack],
                    answers: Answers::NOTIFICATION,
                    ..Contract::STANDARD
                }
                /// Tells that a page is no longer a page table.
                ReleasePage = 45 => Contract {
                    slot: Slot::new(54),
                    arguments: args![frame: Eax, flags: Edx],
                    answers: Answers::NOTIFICATION,
                    ..Contract::STANDARD
                }
                /// Drops the translation of one page, after all pending updates.
                InvalPage = 46 => Contract {
                    slot: Slot::new(55),
                    arguments: args![address: Eax],
                    ..Contract::STANDARD
                }
                /// Drops translations, after all pending updates: 1 those that are not global, 2 all.
                FlushTLB = 47 => Contract {
                    slot: Slot::new(56),
                    arguments: args![flags: Eax],
                    ..Contract::STANDARD
                }
                /// Tells where page tables are mapped, so that entry pointers can be translated.
                SetLinearMapping = 48 => Contract {
                    slot: Slot::new(58),
                    arguments: args![slot: Eax, start: Edx, pages: Ecx, frame: Stack],
                    answers: Answers::NOTIFICATION,
                    ..Contract::STANDARD
                }
                /// Reads 32 bits from a port.
                INL = 49 => Contract {
                    slot: Slot::new(59),
                    arguments: args![port: Edx],
                    results: Registers::EAX,
                    clobbers: Registers::NONE,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Reads 8 bits from a port.
                INB = 50 => Contract {
                    slot: Slot::new(60),
                    arguments: args![port: Edx],
                    results: Registers::EAX,
                    clobbers: Registers::NONE,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Reads 16 bits from a port.
                INW = 51 => Contract {
                    slot: Slot::new(61),
                    arguments: args![port: Edx],
                    results: Registers::EAX,
                    clobbers: Registers::NONE,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Reads 32 bits from a port into memory, ECX times.
                INSL = 52 => Contract {
                    slot: Slot::new(62),
                    arguments: args![port: Edx, destination: Edi, count: Ecx],
                    clobbers: Registers::EDI_ECX,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Reads 8 bits from a port into memory, ECX times.
                INSB = 53 => Contract {
                    slot: Slot::new(63),
                    arguments: args![port: Edx, destination: Edi, count: Ecx],
                    clobbers: Registers::EDI_ECX,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Reads 16 bits from a port into memory, ECX times.
                INSW = 54 => Contract {
                    slot: Slot::new(64),
                    arguments: args![port: Edx, destination: Edi, count: Ecx],
                    clobbers: Registers::EDI_ECX,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Writes 32 bits to a port.
                OUTL = 55 => Contract {
                    slot: Slot::new(65),
                    arguments: args![value: Eax, port: Edx],
                    clobbers: Registers::NONE,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Writes 8 bits to a port.
                OUTB = 56 => Contract {
                    slot: Slot::new(66),
                    arguments: args![value: Eax, port: Edx],
                    clobbers: Registers::NONE,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Writes 16 bits to a port.
                OUTW = 57 => Contract {
                    slot: Slot::new(67),
                    arguments: args![value: Eax, port: Edx],
                    clobbers: Registers::NONE,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Writes 32 bits from memory to a port, ECX times.
                OUTSL = 58 => Contract {
                    slot: Slot::new(68),
                    arguments: args![port: Edx, source: Esi, count: Ecx],
                    clobbers: Registers::ESI_ECX,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Writes 8 bits from memory to a port, ECX times.
                OUTSB = 59 => Contract {
                    slot: Slot::new(69),
                    arguments: args![port: Edx, source: Esi, count: Ecx],
                    clobbers: Registers::ESI_ECX,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Writes 16 bits from memory to a port, ECX times.
                OUTSW = 60 => Contract {
                    slot: Slot::new(70),
                    arguments: args![port: Edx, source: Esi, count: Ecx],
                    clobbers: Registers::ESI_ECX,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Sets the I/O privilege level from bits 12 and 13 of an EFLAGS image.
                SetIOPLMask = 61 => Contract {
                    slot: Slot::new(71),
                    arguments: args![mask: Eax],
                    ..Contract::STANDARD
                }
                /// Sets the state in which the next STARTUP IPI lets a processor begin.
                SetInitialAPState = 62 => Contract {
                    slot: Slot::new(75),
                    arguments: args![state: Eax, apic_id: Edx],
                    answers: Answers::NOTIFICATION,
                    ..Contract::STANDARD
                }
                /// Writes a local APIC register. The proposal passes its linear address, Linux its offset, 20h to 3F0h.
                APICWrite = 63 => Contract {
                    slot: Slot::new(76),
                    arguments: args![register: Eax, value: Edx],
                    group: Some(Group::Apic),
                    ..Contract::STANDARD
                }
                /// Reads a local APIC register, named as in APICWrite.
                APICRead = 64 => Contract {
                    slot: Slot::new(77),
                    arguments: args![register: Eax],
                    results: Registers::EAX,
                    group: Some(Group::Apic),
                    ..Contract::STANDARD
                }
                /// Gives a slow device time between two port accesses.
                IODelay = 65 => Contract {
                    slot: Slot::new(78),
                    answers: Answers::NOTIFICATION,
                    ..Contract::STANDARD
                }
                /// Cycles per second of the cycle counters.
                GetCycleFrequency = 66 => Contract {
                    slot: Slot::new(79),
                    results: Registers::EDX_EAX,
                    group: Some(Group::Timer),
                    ..Contract::STANDARD
                }
                /// Reads a cycle counter: 0 real, 1 available, 2 stolen; any other reads as 0.
                GetCycleCounter = 67 => Contract {
                    slot: Slot::new(80),
                    arguments: args![counter: Eax],
                    results: Registers::EDX_EAX,
                    group: Some(Group::Timer),
                    ..Contract::STANDARD
                }
                /// Arms the counter's alarm at an absolute expiry in cycles, replacing an armed one.
                SetAlarm = 68 => Contract {
                    slot: Slot::new(81),
                    arguments: args![flags: Eax, expiry: EcxEdx, period: StackPair],
                    group: Some(Group::Timer),
                    ..Contract::STANDARD
                }
                /// Disarms the counter's alarm; 1 if it was armed.
                CancelAlarm = 69 => Contract {
                    slot: Slot::new(82),
                    arguments: args![flags: Eax],
                    results: Registers::EAX,
                    group: Some(Group::Timer),
                    ..Contract::STANDARD
                }
                /// Nanoseconds since 1970.
                GetWallclockTime = 70 => Contract {
                    slot: Slot::new(83),
                    results: Registers::EDX_EAX,
                    group: Some(Group::Timer),
                    ..Contract::STANDARD
                }
                /// 1 if the wall clock was set since the last call.
                WallclockUpdated = 71 => Contract {
                    slot: Slot::new(84),
                    results: Registers::EAX,
                    group: Some(Group::Timer),
                    ..Contract::STANDARD
                }
                /// Undocumented; no client knows its arguments.
                SetCallbacks = 72 => Contract {
                    answers: Answers::NONE,
                    site: Site::Unused,
                    ..Contract::STANDARD
                }
                /// Enters or leaves a lazy mode: 0 off, 1 MMU, 2 CPU. Leaving makes everything deferred visible; 0 to 1 can come twice.
                SetLazyMode = 73 => Contract {
                    arguments: args![mode: Eax],
                    answers: Answers::NOTIFICATION,
                    ..Contract::STANDARD
                }
            }
            only_13 {
                /// Prepares the ROM; EAX = 0 on success.
                Init => Contract {
                    slot: Slot::new(4),
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Invalidates the caches without writing back.
                INVD => Contract {
                    slot: Slot::new(28),
                    ..Contract::STANDARD
                }
                /// Tells that the guest spins.
                Pause => Contract {
                    slot: Slot::new(41),
                    answers: Answers::NOTIFICATION,
                    ..Contract::STANDARD
                }
                /// SetPxE without flags.
                SetPxETwoArguments => Contract {
                    slot: Slot::new(45),
                    arguments: args![value: Eax, entry: Edx],
                    deferral: Deferral::LazyMmu,
                    ..Contract::STANDARD
                }
                /// Reads a 32-bit page-table entry.
                GetPxE => Contract {
                    slot: Slot::new(46),
                    arguments: args![entry: Eax],
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Exchanges a 32-bit page-table entry; the old one is the result.
                SwapPxE => Contract {
                    slot: Slot::new(47),
                    arguments: args![value: Eax, entry: Edx],
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// SetPxELong without flags.
                SetPxELongTwoArguments => Contract {
                    slot: Slot::new(48),
                    arguments: args![value: EdxEax, entry: Ecx],
                    deferral: Deferral::LazyMmu,
                    ..Contract::STANDARD
                }
                /// Reads a 64-bit page-table entry.
                GetPxELong => Contract {
                    slot: Slot::new(49),
                    arguments: args![entry: Eax],
                    results: Registers::EDX_EAX,
                    ..Contract::STANDARD
                }
                /// Exchanges a 64-bit page-table entry in one step; the old one is the result.
                SwapPxELongAtomic => Contract {
                    slot: Slot::new(50),
                    arguments: args![value: EdxEax, entry: Ecx],
                    results: Registers::EDX_EAX,
                    ..Contract::STANDARD
                }
                /// Sets a bit of a 32-bit page-table entry in one step; its old value is the result.
                TestAndSetPxEBit => Contract {
                    slot: Slot::new(51),
                    arguments: args![bit: Eax, entry: Edx],
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Clears a bit of a 32-bit page-table entry in one step; its old value is the result.
                TestAndClearPxEBit => Contract {
                    slot: Slot::new(52),
                    arguments: args![bit: Eax, entry: Edx],
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Makes deferred updates visible.
                FlushDeferredCalls => Contract {
                    slot: Slot::new(57),
                    arguments: args![flags: Eax],
                    answers: Answers::NOTIFICATION,
                    ..Contract::STANDARD
                }
                /// Clears a 64-bit page-table entry in one step; the old one is the result.
                DeactivatePxELongAtomic => Contract {
                    slot: Slot::new(72),
                    arguments: args![entry: Eax],
                    results: Registers::EDX_EAX,
                    ..Contract::STANDARD
                }
                /// Sets a bit of a 64-bit page-table entry in one step; its old value is the result.
                TestAndSetPxELongBit => Contract {
                    slot: Slot::new(73),
                    arguments: args![bit: Eax, entry: Edx],
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Clears a bit of a 64-bit page-table entry in one step; its old value is the result.
                TestAndClearPxELongBit => Contract {
                    slot: Slot::new(74),
                    arguments: args![bit: Eax, entry: Edx],
                    results: Registers::EAX,
                    ..Contract::STANDARD
                }
                /// Says how a call is reached. Sanos insists on CALL_REL for every call from 4 to 87.
                GetRelocationInfo => Contract {
                    slot: Slot::since_13_3(85),
                    arguments: args![call: Eax],
                    results: Registers::EDX_EAX,
                    ..Contract::STANDARD
                }
            }
        }
    };
}

/// The arguments of a contract.
macro_rules! args {
    ($( $name:ident: $place:ident ),*) => {
        &[ $( Argument { name: stringify!($name), place: Place::$place } ),* ]
    };
}

macro_rules! declare {
    (
        revision_3_0 { $( #[doc = $summary:literal] $name:ident = $number:literal => $contract:expr )* }
        only_13 { $( #[doc = $old_summary:literal] $old_name:ident => $old_contract:expr )* }
    ) => {
        /// The call numbers of revision 3.0, by the specification's names.
        #[expect(non_upper_case_globals, reason = "the specification's names")]
        pub mod number {
            use super::CallNumber;
            $( #[doc = $summary] pub const $name: CallNumber = CallNumber($number); )*
        }

        /// The calls of revision 3.0; the index is the number.
        pub const CALLS_3_0: &[Call] = &[ $( Call {
            name: stringify!($name),
            number: Some(number::$name),
            summary: $summary.trim_ascii(),
            contract: $contract,
        }, )* ];

        /// The slots of the calls that only revision 13.x has, by the specification's names.
        #[expect(non_upper_case_globals, reason = "the specification's names")]
        pub mod slot {
            use super::*;
            $( #[doc = $old_summary] pub const $old_name: Slot = match $old_contract.slot {
                Some(slot) => slot,
                None => panic!("a call that no revision has"),
            }; )*
        }

        /// The calls that only revision 13.x has.
        const ONLY_13: &[Call] = &[ $( Call {
            name: stringify!($old_name),
            number: None,
            summary: $old_summary.trim_ascii(),
            contract: $old_contract,
        }, )* ];
    };
}

for_each_call!(declare);

/// The calls of revision 13.x; the index is the slot. The header lies in the first four.
pub const CALLS_13: [Option<&Call>; SLOT_COUNT] = {
    let mut slots = [None; SLOT_COUNT];
    let mut i = 0;
    while i < CALLS_3_0.len() + ONLY_13.len() {
        let call = if i < CALLS_3_0.len() { &CALLS_3_0[i] } else { &ONLY_13[i - CALLS_3_0.len()] };
        if let Some(Slot { number, .. }) = call.contract.slot {
            assert!(slots[number as usize].is_none(), "two calls in one slot");
            slots[number as usize] = Some(call);
        }
        i += 1;
    }
    slots
};

/// The slots of revision 13.x that hold calls.
pub const SLOTS_13: core::ops::RangeInclusive<u8> = 4..=87;

const_assert!(numbers_are_indices());
const_assert!(slots_are_complete());
// Both kinds of guests find the code that prepares the ROM at the same place.
const_assert!(slot::Init.offset() == offset_of!(RomHeader, vmi_init));

const fn numbers_are_indices() -> bool {
    let mut i = 0;
    while i < CALLS_3_0.len() {
        match CALLS_3_0[i].number {
            Some(number) if number.0 as usize == i => i += 1,
            _ => return false,
        }
    }
    i == 74
}

const fn slots_are_complete() -> bool {
    let mut slot = 0;
    while slot < SLOT_COUNT {
        let inside = slot >= *SLOTS_13.start() as usize && slot <= *SLOTS_13.end() as usize;
        if CALLS_13[slot].is_some() != inside {
            return false;
        }
        slot += 1;
    }
    true
}

impl Revision {
    /// The calls by the revision's own numbers; none for a revision that this crate does not know.
    ///
    /// Of a minor revision beyond the known ones it gives the calls of the last known one.
    pub fn calls(self) -> impl Iterator<Item = (u32, &'static Call)> + Clone {
        (0..CALLS_3_0.len().max(SLOT_COUNT) as u32)
            .filter_map(move |number| Some((number, self.call(number)?)))
    }

    /// The call of this number in the revision.
    #[must_use]
    pub fn call(self, number: u32) -> Option<&'static Call> {
        if self.major == REVISION_3_0.major {
            return CallNumber(number).call();
        }
        let call = CALLS_13.get(usize::try_from(number).ok()?).copied().flatten()?;
        let since = call.contract.slot?.since_minor;
        (self.major == REVISION_13_0.major && self.minor >= since).then_some(call)
    }

    /// Whether the calls lie in slots, and are not looked up by `get_reloc`.
    #[must_use]
    pub const fn has_slots(self) -> bool {
        self.major == REVISION_13_0.major
    }
}

impl CallNumber {
    /// The call of this number in revision 3.0.
    #[must_use]
    pub fn call(self) -> Option<&'static Call> {
        CALLS_3_0.get(usize::try_from(self.0).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_never_dropped() {
        for call in CALLS_3_0 {
            if !call.contract.results.is_empty() {
                assert!(!call.contract.answers.contains(Answers::NOP), "{}", call.name);
            }
        }
    }

    #[test]
    fn only_transfers_are_jumped_to_and_they_have_no_native_code_left() {
        for call in CALLS_3_0 {
            let Contract { answers, ending, .. } = call.contract;
            assert_eq!(
                answers.contains(Answers::JUMP_REL),
                ending == Ending::Transfers,
                "{}",
                call.name
            );
            assert_eq!(
                !answers.contains(Answers::NONE),
                ending == Ending::Transfers,
                "{}",
                call.name
            );
        }
    }

    #[test]
    fn patched_sites_preserve_all_but_results_and_flags() {
        for call in CALLS_3_0.iter().filter(|call| call.contract.site == Site::Patched) {
            let spare = Registers::FLAGS.union(call.contract.results);
            assert!(spare.contains(call.contract.may_change()), "{}", call.name);
            assert_eq!(call.contract.segments, Segments::StackOnly, "{}", call.name);
        }
    }

    #[test]
    fn stack_arguments_are_counted() {
        let words =
            |number: CallNumber| number.call().expect("in the table").contract.stack_words();
        assert_eq!(words(number::WriteGDTEntry), 1);
        assert_eq!(words(number::AllocatePage), 2);
        assert_eq!(words(number::SetAlarm), 2);
        assert_eq!(words(number::SetPxE), 0);
    }

    #[test]
    fn a_revision_has_its_own_numbers() {
        let of = |major, minor| Revision { major, minor };
        let count = |revision: Revision| revision.calls().count();
        assert_eq!(
            [of(3, 0), of(13, 0), of(13, 2), of(13, 3), of(13, 9), of(4, 0)].map(count),
            [74, 81, 81, 84, 84, 0]
        );
        let name =
            |revision: Revision, number| revision.call(number).map_or("none", |call| call.name);
        assert_eq!(name(REVISION_3_0, 4), "SetLDT");
        assert_eq!(name(REVISION_13_0, 4), "Init");
        assert_eq!(name(REVISION_13_0, 85), "none");
        assert_eq!(name(of(13, 3), 85), "GetRelocationInfo");
        assert_eq!(name(of(13, 3), 3), "none");
        assert_eq!(name(of(13, 3), u32::MAX), "none");
        assert_eq!(slot::GetRelocationInfo, Slot { number: 85, since_minor: 3 });
    }

    #[test]
    fn a_number_beyond_the_table_names_no_call() {
        assert!(CallNumber(74).call().is_none());
        assert!(CallNumber(u32::MAX).call().is_none());
    }
}
