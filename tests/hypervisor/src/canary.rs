//! Whether this machine intercepts what the hypervisor relies on. Each probe is a few instructions that run as a guest, up to a
//! VMMCALL; the exit they end in tells.

#![expect(unsafe_code, reason = "UNSAFETY: `global_asm!`, a guest of its own")]

use crate::report::{EXIT_PORT, Ending, give_up};
use crate::svm::{Intercepts, RSP, Registers, Vmcb, enter, exit};
use crate::vcpu;
use core::arch::global_asm;
use x86::controlregs::Cr0;
use x86::msr::IA32_EFER;

global_asm!(
    ".pushsection .text.canary, \"ax\", @progbits",
    ".code32",
    // In: protected mode, paging off. Out: VMMCALL, unless something is intercepted before. Changed: EAX, ECX, EDX.
    "canary_call: vmmcall",
    "canary_read_cr0: mov eax, cr0",
    "vmmcall",
    "canary_read_cr3: mov eax, cr3",
    "vmmcall",
    "canary_read_cr4: mov eax, cr4",
    "vmmcall",
    "canary_write_cr3: mov eax, cr3",
    "canary_write_cr3_store: mov cr3, eax",
    "vmmcall",
    "canary_write_cr4: mov eax, cr4",
    "canary_write_cr4_store: mov cr4, eax",
    "vmmcall",
    // A change of TS alone is none of the hypervisor's business.
    "canary_select: mov eax, cr0",
    "xor eax, {task_switched}",
    "mov cr0, eax",
    "xor eax, {numeric_error}",
    "canary_selected: mov cr0, eax",
    "vmmcall",
    "canary_invalidate: invlpg [eax]",
    "vmmcall",
    "canary_cpuid: cpuid",
    "vmmcall",
    "canary_port: mov al, {unfit}",
    "canary_port_instruction: out {port}, al",
    "vmmcall",
    "canary_msr: mov ecx, {efer}",
    "canary_msr_instruction: rdmsr",
    "vmmcall",
    // Nothing is mapped.
    "canary_fault: mov eax, [0x12345678]",
    "vmmcall",
    // There is no interrupt descriptor table.
    "canary_shutdown: ud2",
    "vmmcall",
    ".code64",
    ".popsection",
    task_switched = const Cr0::CR0_TASK_SWITCHED.bits(),
    numeric_error = const Cr0::CR0_NUMERIC_ERROR.bits(),
    unfit = const Ending::UnfitMachine as u8,
    port = const EXIT_PORT as u8,
    efer = const IA32_EFER,
);

macro_rules! labels {
    ($( $label:ident )*) => {
        unsafe extern "C" {
            $( static $label: u8; )*
        }
    };
}

labels! {
    canary_call canary_read_cr0 canary_read_cr3 canary_read_cr4 canary_write_cr3 canary_write_cr4 canary_select canary_selected
    canary_invalidate canary_cpuid canary_port canary_port_instruction canary_msr canary_msr_instruction canary_fault
    canary_shutdown canary_write_cr3_store canary_write_cr4_store
}

/// What differs between versions of QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Quirks {
    /// Reads of every control register are intercepted by the bit of CR0, and by it alone.
    pub(crate) reads_share_cr0: bool,
}

/// Where the processor finds no translation at all.
static NOTHING: crate::svm::Zeroed<4096> = crate::svm::Zeroed([0; 4096]);

/// Runs a probe; the exit's code, and where it happened.
fn run(vmcb: &mut Vmcb, start: *const u8, prepare: impl FnOnce(&mut Vmcb)) -> (u64, u64) {
    vcpu::reset(vmcb);
    vmcb.control.set_intercepts(vcpu::ALWAYS);
    vmcb.state.rip = start as u64;
    prepare(vmcb);
    let mut registers: Registers = [0; 8];
    registers[RSP] = 0;
    // SAFETY: the block is complete; the probes touch nothing.
    unsafe { enter(&mut registers, vcpu::address(vmcb), vcpu::host_area()) };
    (vmcb.control.exit_code, vmcb.state.rip)
}

/// Tries them all. Ends where one fails that there is no way around.
pub(crate) fn check(vmcb: &mut Vmcb) -> Quirks {
    let mut probe = |name: &str,
                     start: *const u8,
                     at: *const u8,
                     code: u64,
                     prepare: fn(&mut Vmcb)| {
        let (found, rip) = run(vmcb, start, prepare);
        if (found, rip) != (code, at as u64) {
            give_up(
                Ending::UnfitMachine,
                format_args!(
                    "this machine does not intercept {name}: exit {found:#x} at {rip:#x} instead of {code:#x} at {at:p}"
                ),
            );
        }
    };
    macro_rules! probe {
        ($name:literal, $start:ident at $at:ident, $code:expr, $prepare:expr) => {
            probe($name, &raw const $start, &raw const $at, $code, $prepare)
        };
        ($name:literal, $start:ident, $code:expr, $prepare:expr) => {
            probe!($name, $start at $start, $code, $prepare)
        };
    }
    probe!("VMMCALL", canary_call, exit::VMMCALL, |_| {});
    probe!("CPUID", canary_cpuid, exit::CPUID, |_| {});
    probe!("ports", canary_port at canary_port_instruction, exit::PORT, |_| {});
    probe!("RDMSR", canary_msr at canary_msr_instruction, exit::MSR, |_| {});
    probe!("shutdown", canary_shutdown, exit::SHUTDOWN, |_| {});
    probe!("reads of CR0", canary_read_cr0, exit::CR_READ, |vmcb| vmcb.control.cr_reads = 1);
    probe!("writes of CR3", canary_write_cr3 at canary_write_cr3_store, exit::CR_WRITE + 3, |vmcb| vmcb.control.cr_writes = 1 << 3);
    probe!("writes of CR4", canary_write_cr4 at canary_write_cr4_store, exit::CR_WRITE + 4, |vmcb| vmcb.control.cr_writes = 1 << 4);
    probe!("changes of CR0", canary_select at canary_selected, exit::CR0_SELECTIVE, |vmcb| {
        vmcb.control.set_intercepts(vcpu::ALWAYS | Intercepts::CR0_SELECTIVE);
    });
    probe!("INVLPG", canary_invalidate, exit::INVLPG, |vmcb| {
        vmcb.control.set_intercepts(vcpu::ALWAYS | Intercepts::INVLPG);
    });
    probe!("page faults", canary_fault, exit::PAGE_FAULT, |vmcb| {
        vcpu::page(vmcb, (&raw const NOTHING) as u64);
    });
    let reads = |vmcb: &mut Vmcb, bit: u16| {
        let at = |vmcb: &mut Vmcb, start: *const u8| {
            let (code, rip) = run(vmcb, start, |vmcb| vmcb.control.cr_reads = bit);
            (code < exit::CR_WRITE) && rip == start as u64
        };
        at(vmcb, &raw const canary_read_cr3) && at(vmcb, &raw const canary_read_cr4)
    };
    if reads(vmcb, 1 << 3 | 1 << 4) {
        Quirks { reads_share_cr0: false }
    } else if reads(vmcb, 1) {
        Quirks { reads_share_cr0: true }
    } else {
        give_up(
            Ending::UnfitMachine,
            format_args!("this machine does not intercept reads of control registers"),
        )
    }
}
