//! The guest: its registers, its memory, and how it goes on after an exit.

#![expect(unsafe_code, reason = "UNSAFETY: entering the guest, its devices' memory")]

use crate::canary::Quirks;
use crate::console::{break_line, drain, line};
use crate::lend::Lent;
use crate::loader::Entry;
use crate::machine::{Machine, OWN, load, store};
use crate::options::{Options, Paging};
use crate::ports::KEYBOARD_PORT;
use crate::record::Record;
use crate::report::{self, Ending};
use crate::svm::{
    EVENT_EXCEPTION, EVENT_HAS_CODE, EVENT_INTERRUPT, EVENT_NMI, EVENT_VALID, FLUSH_ALL,
    Intercepts, NESTED_PAGING, RAX, RBX, RCX, RSI, RSP, Registers, SEGMENT_32_BIT, SVM_ENABLE,
    Vmcb, enter, exit as code,
};
use crate::{nested, vcpu};
use core::arch::x86_64::{__cpuid, _rdtsc};
use core::fmt;
use iced_x86::{Decoder, DecoderOptions, Instruction};
use vmi_hv_backend::reference::interface::Counters;
use vmi_hv_backend::reference::record::{DELIVERED, Exit, NEVER, START};
use vmi_hypervisor::emulate::{self, Bus};
use vmi_hypervisor::hypercall::Quiet;
use vmi_hypervisor::memory::{FRAME, Memory, Place};
use vmi_hypervisor::shadow::{Frame, Page, Shadow, Slot, Storage};
use vmi_hypervisor::walk::{self, Access};

/// Pages of the shadow's pool: 32 MiB.
const POOL: usize = 8192;

/// The longest instruction.
const LONGEST: usize = 15;

/// The most pieces of memory that one instruction stores to.
const STORES: usize = 16;

/// EFLAGS.
const TRAP: u64 = 1 << 8;
const RESUME: u64 = 1 << 16;

/// DR6: a single step.
const SINGLE_STEP: u64 = 1 << 14;

/// Vectors.
const DEBUG: u8 = 1;
pub(crate) const INVALID_OPCODE: u8 = 6;
const NON_MASKABLE: u8 = 2;
const BREAKPOINT: u8 = 3;
const OVERFLOW: u8 = 4;
const DOUBLE_FAULT: u8 = 8;
pub(crate) const GENERAL_PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;

/// The first vector that is no exception.
const FIRST_INTERRUPT: u8 = 32;

/// CPUID leaf 80000008h, EAX bits 0 to 7: the bits of a physical address.
const ADDRESS_SIZES: u32 = 0x8000_0008;

/// The guest.
pub(crate) struct Guest {
    pub(crate) vmcb: &'static mut Vmcb,
    registers: Registers,
    pub(crate) machine: Machine,
    /// What the guest has in its control registers. With nested paging the control block's are the guest's own.
    pub(crate) own: walk::Registers,
    /// With shadow paging.
    pub(crate) shadow: Option<Shadow<'static>>,
    pub(crate) options: Options,
    pub(crate) quirks: Quirks,
    pub(crate) counters: Counters,
    pub(crate) record: Record,
    /// The ACPI port that switches the machine off.
    pub(crate) power_port: Option<u16>,
    started: u64,
    exited: u64,
    /// Page tables that it may store to for a while.
    pub(crate) lent: Lent,
    /// Whether its page faults are its own affair.
    pub(crate) quiet: Quiet,
    /// The TLB is to be flushed before the guest goes on.
    pub(crate) flush: bool,
}

/// The clock.
fn ticks() -> u64 {
    // SAFETY: reads a counter.
    unsafe { _rdtsc() }
}

impl Guest {
    /// A guest on a machine.
    pub(crate) fn new(
        vmcb: &'static mut Vmcb,
        machine: Machine,
        options: Options,
        quirks: Quirks,
    ) -> Self {
        let width = (__cpuid(ADDRESS_SIZES).eax as u8).clamp(32, 52);
        vcpu::reset(vmcb);
        Self {
            vmcb,
            registers: Registers::default(),
            machine,
            own: walk::Registers { cr0: 0, cr3: 0, cr4: 0, efer: 0, width },
            shadow: None,
            options,
            quirks,
            counters: Counters::ZERO,
            record: Record::new(),
            power_port: None,
            started: ticks(),
            exited: ticks(),
            lent: Lent::default(),
            quiet: Quiet::default(),
            flush: true,
        }
    }

    /// Runs it from an entry to its end, with the CR0 that the boot loader left.
    pub(crate) fn run(mut self, entry: Entry, cr0: u32) -> ! {
        self.own = walk::Registers { cr0, cr3: 0, cr4: 0, efer: 0, ..self.own };
        self.vmcb.state.cr0 = cr0.into();
        self.vmcb.state.rip = entry.eip.into();
        match self.options.paging {
            Paging::Nested => self.nest(),
            Paging::Shadow => self.shade(),
        }
        self.registers = Registers::default();
        self.registers[RAX] = entry.eax.into();
        self.registers[RBX] = entry.ebx.into();
        self.registers[RSI] = entry.esi.into();
        if let Some(table) = entry.table {
            vcpu::use_table(self.vmcb, table);
        }
        let left = self.machine.left() >> 20;
        line!("{START}{:#x}; {left} MiB are left", entry.eip);
        self.counters = Counters::ZERO;
        self.power_port = crate::acpi::power_port();
        if let Some(port) = self.power_port {
            // What is written to switch it off is in the upper byte.
            vcpu::intercept_port(port);
            vcpu::intercept_port(port + 1);
        }
        vcpu::intercept_port(KEYBOARD_PORT);
        self.started = ticks();
        self.exited = self.started;
        self.record.start(self.started);
        loop {
            self.enter();
            self.handle();
            self.resume_event();
        }
    }

    /// Sets up nested paging, which needs next to no exits.
    pub(crate) fn nest(&mut self) {
        let control = &mut self.vmcb.control;
        control.nested_enable = NESTED_PAGING;
        control.nested_cr3 = nested::tables(&mut self.machine);
        control.set_intercepts(vcpu::ALWAYS);
        self.flush = true;
    }

    /// Sets up shadow paging.
    fn shade(&mut self) {
        self.vmcb.control.set_intercepts(
            vcpu::ALWAYS | Intercepts::CR0_SELECTIVE | Intercepts::INVLPG | Intercepts::TASK_SWITCH,
        );
        let machine = &mut self.machine;
        let pool = machine.take::<Page>(POOL);
        let base = pool.as_ptr() as u64;
        let frames = (machine.top() / FRAME) as usize;
        let mut shadow = Shadow::new(Storage {
            pool,
            base,
            slots: machine.take::<Slot>(POOL),
            frames: machine.take::<Frame>(frames),
            ones: machine.ones,
        });
        vcpu::page(self.vmcb, shadow.root());
        shadow.load(&self.own, machine);
        self.shadow = Some(shadow);
        self.follow_own();
    }

    /// Runs the guest up to its next exit.
    pub(crate) fn enter(&mut self) {
        let behind = self.shadow.as_mut().is_some_and(Shadow::take_flush);
        let flush = core::mem::take(&mut self.flush) || behind;
        self.vmcb.control.tlb_control = if flush { FLUSH_ALL } else { 0 };
        if self.shadow.is_some() {
            vcpu::keep_page_faults(self.vmcb, self.quiet.now, self.own.mode().no_execute);
        }
        self.vmcb.state.rax = self.registers[RAX];
        self.vmcb.state.rsp = self.registers[RSP];
        let spent = ticks().wrapping_sub(self.exited);
        self.counters.host_ticks += spent;
        let event = self.vmcb.control.event_injection;
        let delivered = if event & EVENT_VALID == 0 { 0 } else { event as u16 | DELIVERED };
        self.record.done(&self.counters, spent.min((NEVER - 1).into()) as u32, delivered);
        // SAFETY: the block is complete; what its tables lead to is the guest's.
        unsafe { enter(&mut self.registers, vcpu::address(self.vmcb), vcpu::host_area()) };
        self.exited = ticks();
        self.registers[RAX] = self.vmcb.state.rax;
        self.registers[RSP] = self.vmcb.state.rsp;
        self.vmcb.control.event_injection = 0;
        self.read_own();
        self.record.exited(self.exit(), &self.counters);
    }

    /// The last exit, as the processor tells of it.
    fn exit(&self) -> Exit {
        let control = &self.vmcb.control;
        let (detail, result) = match control.exit_code {
            code::PAGE_FAULT | code::NESTED_PAGE_FAULT => {
                (control.exit_info_2 as u32, control.exit_info_1 as u32)
            }
            code::CPUID | code::VMMCALL => (self.register(RAX), 0),
            code::MSR => (self.register(RCX), 0),
            code::PORT => (control.exit_info_1 as u32 >> 16, 0),
            code => (code as u32, 0),
        };
        let (exited, eip, cr3) = (self.exited, self.vmcb.state.rip as u32, self.own.cr3);
        Exit { exited, eip, cr3, detail, result, ..Exit::default() }
    }

    /// What the guest did to its control registers without an exit.
    fn read_own(&mut self) {
        let state = &self.vmcb.state;
        if let Some(shadow) = &self.shadow {
            if state.cr3 != shadow.root() {
                self.fail(
                    Ending::Unsupported,
                    format_args!("CR3 was loaded without an exit, as task switches by hardware do"),
                );
            }
            self.own.cr0 =
                self.own.cr0 & !crate::control::FREE | state.cr0 as u32 & crate::control::FREE;
        } else {
            self.own.cr0 = state.cr0 as u32;
            self.own.cr3 = state.cr3 as u32;
            self.own.cr4 = state.cr4 as u32;
            self.own.efer = state.efer & !SVM_ENABLE;
        }
    }

    /// Register number `index`, in the order of encodings.
    pub(crate) fn register(&self, index: usize) -> u32 {
        self.registers[index] as u32
    }

    /// Sets a register.
    pub(crate) fn set_register(&mut self, index: usize, value: u32) {
        self.registers[index] = value.into();
    }

    /// The registers, for an instruction that is carried out here.
    pub(crate) fn state(&self) -> emulate::State {
        let state = &self.vmcb.state;
        let bases = [&state.es, &state.cs, &state.ss, &state.ds, &state.fs, &state.gs];
        emulate::State {
            registers: self.registers.map(|register| register as u32),
            eflags: state.rflags as u32,
            bases: bases.map(|segment| segment.base as u32),
            user: state.cpl == 3,
        }
    }

    /// Takes over what an instruction did to them.
    pub(crate) fn set_state(&mut self, state: &emulate::State) {
        self.registers = state.registers.map(u64::from);
        self.vmcb.state.rflags = state.eflags.into();
    }

    /// The instruction that the exit happened at.
    pub(crate) fn decode(&self) -> Instruction {
        let state = &self.vmcb.state;
        let start = (state.cs.base as u32).wrapping_add(state.rip as u32);
        let mut bytes = [0; LONGEST];
        let mut count = 0;
        let mut page = None;
        for (offset, byte) in bytes.iter_mut().enumerate() {
            let linear = start.wrapping_add(offset as u32);
            if page.is_none() || u64::from(linear) % FRAME == 0 {
                page = walk::find(&self.own, &self.machine, linear)
                    .ok()
                    .map(|found| found.physical - u64::from(linear) % FRAME);
            }
            let Some(page) = page else { break };
            *byte = read(&self.machine, page + u64::from(linear) % FRAME, 1) as u8;
            count += 1;
        }
        let bits = if state.cs.attributes & SEGMENT_32_BIT != 0 { 32 } else { 16 };
        let mut decoder = Decoder::with_ip(bits, &bytes[..count], state.rip, DecoderOptions::AMD);
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            self.fail(
                Ending::Unsupported,
                format_args!("cannot decode the instruction {:02x?}", &bytes[..count]),
            );
        }
        instruction
    }

    /// Goes on behind an instruction.
    pub(crate) fn advance(&mut self, instruction: &Instruction) {
        self.go_to(instruction.next_ip32());
    }

    /// Goes on at an address, after an instruction that was carried out here.
    pub(crate) fn go_to(&mut self, eip: u32) {
        let state = &mut self.vmcb.state;
        state.rip = eip.into();
        state.rflags &= !RESUME;
        self.vmcb.control.interrupt_shadow = 0;
        if state.rflags & TRAP != 0 {
            state.dr6 |= SINGLE_STEP;
            self.inject(DEBUG, None);
        }
    }

    /// Raises an exception. One that comes while another is delivered may make a double fault of both.
    pub(crate) fn inject(&mut self, vector: u8, code: Option<u32>) {
        let pending = self.vmcb.control.exit_interrupt;
        let first = pending as u8;
        let serious = |vector: u8| matches!(vector, 0 | 10..=13);
        let mut event = (vector, code);
        if pending & EVENT_VALID != 0 && pending >> 8 & 7 == EVENT_EXCEPTION {
            if first == DOUBLE_FAULT && (serious(vector) || vector == PAGE_FAULT) {
                self.fail(
                    Ending::TripleFault,
                    format_args!("the guest's processor shut down: a triple fault"),
                );
            }
            if (serious(first) && serious(vector))
                || (first == PAGE_FAULT && (serious(vector) || vector == PAGE_FAULT))
            {
                event = (DOUBLE_FAULT, Some(0));
            }
        }
        let (vector, code) = event;
        self.vmcb.control.event_injection = EVENT_VALID
            | EVENT_EXCEPTION << 8
            | u64::from(vector)
            | code.map_or(0, |code| EVENT_HAS_CODE | u64::from(code) << 32);
    }

    /// What was being delivered when the exit came is delivered now, unless something else has to be.
    ///
    /// INT, INT3 and INTO are executed again instead. QEMU calls interrupts of devices exceptions, and NMIs too.
    pub(crate) fn resume_event(&mut self) {
        let event = self.vmcb.control.exit_interrupt;
        if event & EVENT_VALID == 0 || self.vmcb.control.event_injection != 0 {
            return;
        }
        let vector = event as u8;
        let kind = match event >> 8 & 7 {
            EVENT_EXCEPTION if vector >= FIRST_INTERRUPT => EVENT_INTERRUPT,
            EVENT_EXCEPTION if vector == NON_MASKABLE => EVENT_NMI,
            EVENT_EXCEPTION if vector == BREAKPOINT || vector == OVERFLOW => return,
            kind @ (EVENT_INTERRUPT | EVENT_NMI | EVENT_EXCEPTION) => kind,
            _ => return,
        };
        self.vmcb.control.event_injection = event & !(7 << 8) | kind << 8;
    }

    /// Carries out the instruction at which a store was caught, and lets the shadow follow. `table`: the watched page table that it
    /// would store to, if it is one.
    pub(crate) fn carry_out(&mut self, table: Option<u64>) {
        if self.vmcb.control.exit_interrupt & EVENT_VALID != 0 {
            // It is no instruction that stores.
            match table {
                Some(frame) => self.lend(frame),
                None => self.fail(
                    Ending::Unsupported,
                    format_args!("an interrupt or exception whose stack goes nowhere"),
                ),
            }
            return;
        }
        let instruction = self.decode();
        let mut state = self.state();
        let mut bus =
            GuestBus { machine: &self.machine, own: &self.own, stores: [(0, 0); STORES], count: 0 };
        let done = emulate::execute(&instruction, &mut state, &mut bus);
        let (stores, count) = (bus.stores, bus.count);
        if let Some(shadow) = &mut self.shadow {
            for (physical, size) in &stores[..count] {
                shadow.written(&self.own, &self.machine, *physical, *size);
            }
        }
        match done {
            Ok(next) => {
                self.set_state(&state);
                self.go_to(match next {
                    emulate::Next::Instruction => instruction.next_ip32(),
                    emulate::Next::Same => instruction.ip32(),
                });
            }
            Err(emulate::Stop::PageFault { linear, error }) => self.fault(linear, error),
            Err(emulate::Stop::Unknown) => match table {
                Some(frame) => self.lend(frame),
                None => self.fail(
                    Ending::Unsupported,
                    format_args!(
                        "a store that goes nowhere by an instruction that is not known: {:?}",
                        instruction.code()
                    ),
                ),
            },
        }
    }

    /// Raises a page fault.
    pub(crate) fn fault(&mut self, linear: u32, error: u32) {
        self.vmcb.state.cr2 = linear.into();
        self.inject(PAGE_FAULT, Some(error));
    }

    /// Whether a frame is the hypervisor's.
    pub(crate) fn is_hidden(frame: u64) -> bool {
        frame.checked_mul(FRAME).is_none_or(|address| OWN.contains(&address))
    }

    /// The counters as they are now.
    pub(crate) fn counters_now(&self) -> Counters {
        Counters {
            ticks: ticks().wrapping_sub(self.started),
            shadowed: self.shadow.as_ref().map_or(0, |shadow| shadow.shadowed),
            ..self.counters
        }
    }

    /// Says what the guest cost.
    pub(crate) fn conclude(&self, reason: fmt::Arguments<'_>) {
        self.record.done(&self.counters, NEVER, 0);
        break_line();
        line!("{reason}");
        report::counters(&self.counters_now());
        drain();
    }

    /// Ends the guest, which did not end itself.
    pub(crate) fn fail(&self, ending: Ending, reason: fmt::Arguments<'_>) -> ! {
        self.record.done(&self.counters, NEVER, 0);
        break_line();
        line!("{reason}");
        report::registers(&self.vmcb.state, &self.registers);
        if self.shadow.is_some() {
            let own = &self.own;
            line!(
                "the guest's own: cr0={:08x} cr3={:08x} cr4={:08x} efer={:x}",
                own.cr0,
                own.cr3,
                own.cr4,
                own.efer
            );
        }
        let control = &self.vmcb.control;
        line!(
            "exit {:#x} {:#x} {:#x} during {:#x}",
            control.exit_code,
            control.exit_info_1,
            control.exit_info_2,
            control.exit_interrupt
        );
        self.record.say();
        report::counters(&self.counters_now());
        report::exit(ending)
    }
}

/// The guest's memory as its instructions reach it.
struct GuestBus<'a> {
    machine: &'a Machine,
    own: &'a walk::Registers,
    stores: [(u64, usize); STORES],
    count: usize,
}

/// Reads what the guest would.
fn read(machine: &Machine, physical: u64, size: usize) -> u64 {
    let value = match machine.place(physical / FRAME) {
        // SAFETY: mapped, and a device's or the firmware's.
        Place::Device(base) => unsafe { load(base + physical % FRAME, size) },
        _ => machine.read(physical, size),
    };
    value.unwrap_or(u64::MAX >> (64 - 8 * size))
}

impl Bus for GuestBus<'_> {
    fn translate(&mut self, linear: u32, access: Access) -> Result<u64, u32> {
        walk::translate(self.own, self.machine, linear, access)
            .map(|found| found.physical)
            .map_err(|fault| fault.error)
    }

    fn read(&mut self, physical: u64, size: usize) -> u64 {
        read(self.machine, physical, size)
    }

    fn write(&mut self, physical: u64, size: usize, value: u64) {
        if let Place::Device(base) = self.machine.place(physical / FRAME) {
            // SAFETY: mapped, and a device's or the firmware's.
            unsafe { store(base + physical % FRAME, size, value) };
        } else if self.machine.write(physical, size, value) && self.count < STORES {
            self.stores[self.count] = (physical, size);
            self.count += 1;
        }
    }
}
