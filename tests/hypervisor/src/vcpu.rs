//! The one virtual processor's control block, and the maps of what it may not touch.

#![expect(unsafe_code, reason = "UNSAFETY: statics that the processor reads and writes")]

use crate::exceptions::{read_msr, write_msr};
use crate::loader::Table;
use crate::report::{EXIT_PORT, Ending, give_up};
use crate::svm::{
    Intercepts, SEGMENT_32_BIT, SVM_DISABLED, SVM_ENABLE, Segment, VM_CR, VM_HSAVE_PA, Vmcb,
    Zeroed, clear_global_interrupt_flag, save_host,
};
use core::arch::x86_64::__cpuid;
use vmi_hypervisor::walk::{CR0_PAGING, CR4_PAE, EFER_NO_EXECUTE};
use x86::controlregs::Cr0;
use x86::msr::IA32_EFER;

/// What is intercepted in every mode. Interrupts, HLT and the clock are the guest's own; so are NMIs, but for the one that is to stop it.
pub(crate) const ALWAYS: Intercepts = Intercepts::CPUID
    .union(Intercepts::NMI)
    .union(Intercepts::PORTS)
    .union(Intercepts::MSRS)
    .union(Intercepts::SHUTDOWN)
    .union(Intercepts::INVLPGA)
    .union(Intercepts::VMRUN)
    .union(Intercepts::VMMCALL)
    .union(Intercepts::VMLOAD)
    .union(Intercepts::VMSAVE)
    .union(Intercepts::STGI)
    .union(Intercepts::CLGI)
    .union(Intercepts::SKINIT);

/// The selectors that a multiboot loader leaves are anybody's; these are those of the hypervisor's own table.
const CODE: Segment =
    Segment { selector: 8, attributes: 0x89b | SEGMENT_32_BIT, limit: u32::MAX, base: 0 };
const DATA: Segment =
    Segment { selector: 16, attributes: 0x893 | SEGMENT_32_BIT, limit: u32::MAX, base: 0 };
const NO_TABLE: Segment = Segment { selector: 0, attributes: 0x082, limit: 0, base: 0 };
const NO_TASK: Segment = Segment { selector: 0, attributes: 0x08b, limit: 0x67, base: 0 };

/// After a reset.
const DR6: u64 = 0xffff_0ff0;
const DR7: u64 = 0x400;
const PAT: u64 = 0x0007_0406_0007_0406;
pub(crate) const RFLAGS: u64 = 0x2;

/// 0 is the hypervisor's.
const ADDRESS_SPACE: u32 = 1;

/// Bytes of the maps: a bit for each port, two for each of three ranges of registers.
const PORT_MAP_SIZE: usize = 12 << 10;
const MSR_MAP_SIZE: usize = 8 << 10;

/// Bytes of a range in the map of registers, and where the ranges start.
const MSR_RANGE_SIZE: u32 = 0x800;
const MSR_RANGES: [u32; 3] = [0, 0xc000_0000, 0xc001_0000];

/// The registers that are not passed through. All others are the guest's, or nobody's.
const MSRS: [u32; 3] = [IA32_EFER, VM_CR, VM_HSAVE_PA];

static mut BLOCK: Zeroed<4096> = Zeroed([0; 4096]);
static mut HOST: Zeroed<4096> = Zeroed([0; 4096]);
static mut SAVED: Zeroed<4096> = Zeroed([0; 4096]);
static mut PORT_MAP: Zeroed<PORT_MAP_SIZE> = Zeroed([0; PORT_MAP_SIZE]);
static mut MSR_MAP: Zeroed<MSR_MAP_SIZE> = Zeroed([0; MSR_MAP_SIZE]);

/// Where VMSAVE puts the hypervisor's own state.
pub(crate) fn host_area() -> u64 {
    (&raw const HOST) as u64
}

/// The address of a control block: memory is mapped as it is.
pub(crate) fn address(vmcb: &Vmcb) -> u64 {
    core::ptr::from_ref(vmcb) as u64
}

/// Turns SVM on. Called once.
pub(crate) fn initialize() -> &'static mut Vmcb {
    /// CPUID leaf 80000001h, ECX.
    const HAS_SVM: u32 = 1 << 2;

    let unfit = |what: &str| give_up(Ending::UnfitMachine, format_args!("{what}"));
    if __cpuid(0x8000_0001).ecx & HAS_SVM == 0 {
        unfit("the processor has no SVM");
    }
    if read_msr(VM_CR).is_some_and(|control| control & SVM_DISABLED != 0) {
        unfit("the firmware has disabled SVM");
    }
    let efer = read_msr(IA32_EFER).unwrap_or_default();
    // SAFETY: SVM changes nothing but that its instructions exist; the area is a frame of its own.
    let accepted = unsafe {
        write_msr(IA32_EFER, efer | SVM_ENABLE) && write_msr(VM_HSAVE_PA, (&raw const SAVED) as u64)
    };
    if !accepted {
        unfit("the processor refuses to turn on SVM");
    }
    clear_global_interrupt_flag();
    // SAFETY: a frame of its own.
    unsafe { save_host(host_area()) };

    // SAFETY: one processor, and nobody else holds a reference to these statics. All zeros are a control block.
    let (vmcb, registers) = unsafe {
        (
            &mut *(&raw mut BLOCK).cast::<Vmcb>(),
            &mut *(&raw mut MSR_MAP).cast::<[u8; MSR_MAP_SIZE]>(),
        )
    };
    intercept_port(EXIT_PORT);
    for msr in MSRS {
        for (index, start) in MSR_RANGES.into_iter().enumerate() {
            let offset = msr.wrapping_sub(start) / 4;
            if offset < MSR_RANGE_SIZE {
                let byte = index as u32 * MSR_RANGE_SIZE + offset;
                registers[byte as usize] |= 3 << (2 * (msr % 4));
            }
        }
    }
    vmcb
}

/// From here on the port is not passed through.
pub(crate) fn intercept_port(port: u16) {
    // SAFETY: one processor, and nobody holds a reference to the map; the port's byte is in it.
    unsafe {
        let byte = (&raw mut PORT_MAP).cast::<u8>().add(usize::from(port / 8));
        *byte |= 1 << (port % 8);
    }
}

/// A processor in protected mode without paging, as a multiboot loader leaves it. Intercepts and RIP are for the caller.
pub(crate) fn reset(vmcb: &mut Vmcb) {
    // SAFETY: integers all through; zeros are values.
    *vmcb = unsafe { core::mem::zeroed() };
    vmcb.control.port_map = (&raw const PORT_MAP) as u64;
    vmcb.control.msr_map = (&raw const MSR_MAP) as u64;
    vmcb.control.address_space = ADDRESS_SPACE;
    vmcb.control.tlb_control = crate::svm::FLUSH_ALL;
    let state = &mut vmcb.state;
    (state.cs, state.ss, state.ds, state.es, state.fs, state.gs) =
        (CODE, DATA, DATA, DATA, DATA, DATA);
    (state.ldtr, state.tr) = (NO_TABLE, NO_TASK);
    state.efer = SVM_ENABLE;
    state.cr0 = (Cr0::CR0_PROTECTED_MODE | Cr0::CR0_EXTENSION_TYPE).bits() as u64;
    (state.dr6, state.dr7, state.guest_pat, state.rflags) = (DR6, DR7, PAT, RFLAGS);
}

/// Loads a flat descriptor table and its selectors.
pub(crate) fn use_table(vmcb: &mut Vmcb, table: Table) {
    let state = &mut vmcb.state;
    state.gdtr =
        Segment { base: table.base.into(), limit: table.limit.into(), ..Segment::default() };
    state.cs.selector = table.code;
    for segment in [&mut state.ds, &mut state.es, &mut state.fs, &mut state.gs, &mut state.ss] {
        segment.selector = table.data;
    }
}

/// Lets the processor walk PAE tables, and tells of each page fault.
pub(crate) fn page(vmcb: &mut Vmcb, root: u64) {
    keep_page_faults(vmcb, false, true);
    vmcb.state.cr0 |= u64::from(CR0_PAGING);
    vmcb.state.cr3 = root;
    vmcb.state.cr4 |= u64::from(CR4_PAE);
}

/// Whether the processor takes page faults to the guest's own handler, or tells of each. The error code that the guest sees then is the
/// processor's, in which bit 4 depends on NX: it is in use where it is in the guest's tables.
pub(crate) fn keep_page_faults(vmcb: &mut Vmcb, quiet: bool, no_execute: bool) {
    vmcb.control.exceptions = if quiet { 0 } else { 1 << 14 };
    if quiet && !no_execute {
        vmcb.state.efer &= !EFER_NO_EXECUTE;
    } else {
        vmcb.state.efer |= EFER_NO_EXECUTE;
    }
}
