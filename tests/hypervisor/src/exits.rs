//! What each exit needs. Each is counted once, by whoever knows what it was.

use crate::console::{break_line, line};
use crate::guest::{Guest, INVALID_OPCODE};
use crate::report::Ending;
use crate::svm::{Intercepts, RAX, RBX, RCX, RDX, exit as code};
use vmi_hv_backend::reference::interface::Features;
use vmi_hypervisor::emulate;
use vmi_hypervisor::hypercall::{Call, Machine, Outcome};
use vmi_hypervisor::memory::{FRAME, Memory, Place};
use vmi_hypervisor::shadow::Resolution;

/// The first and the last code of accesses to control registers.
const CONTROL: core::ops::Range<u64> = code::CR_READ..0x20;

/// In a nested page fault's error code: a store.
const STORE: u64 = 1 << 1;

impl Guest {
    /// Does what the last exit was for.
    pub(crate) fn handle(&mut self) {
        if self.vmcb.control.exit_code != code::PAGE_FAULT {
            self.take_back();
        }
        // These leave the guest's translations alone, or see to what becomes of them.
        let is_harmless = matches!(
            self.vmcb.control.exit_code,
            code::CPUID | code::MSR | code::PORT | code::VMMCALL | code::NMI
        );
        self.quiet.now &= is_harmless;
        let control = &mut self.vmcb.control;
        control.set_intercepts(control.intercepts() | Intercepts::NMI);
        match self.vmcb.control.exit_code {
            code::PAGE_FAULT => self.page_fault(),
            code::NESTED_PAGE_FAULT => self.nested_page_fault(),
            code if CONTROL.contains(&code) => self.access_control_register(),
            code::CR0_SELECTIVE => self.access_control_register(),
            code::INVLPG => self.invalidate(),
            code::CPUID => {
                self.counters.cpuid += 1;
                self.cpuid();
            }
            code::MSR => {
                self.counters.msr += 1;
                self.access_msr();
            }
            code::PORT => {
                self.counters.ports += 1;
                self.access_port();
            }
            code::VMMCALL => {
                self.counters.hypercalls += 1;
                self.hypercall();
            }
            // The guest has no SVM.
            code::INVLPGA | code::VMRUN..=code::SKINIT => {
                self.counters.other_exits += 1;
                self.inject(INVALID_OPCODE, None);
            }
            code::SHUTDOWN => {
                self.counters.other_exits += 1;
                self.fail(
                    Ending::TripleFault,
                    format_args!("the guest's processor shut down: a triple fault"),
                );
            }
            code::NMI => {
                self.counters.other_exits += 1;
                self.non_maskable_interrupt();
            }
            code::TASK_SWITCH => {
                self.counters.other_exits += 1;
                self.fail(
                    Ending::Unsupported,
                    format_args!("a task switch by hardware, which would load CR3"),
                );
            }
            code::INVALID | code::INVALID_LOW => {
                self.fail(Ending::OwnFault, format_args!("the processor refuses VMRUN"));
            }
            other => {
                self.counters.other_exits += 1;
                self.fail(Ending::OwnFault, format_args!("exit {other:#x} was not asked for"));
            }
        }
    }

    /// An NMI is the guest's own, which takes it as soon as it goes on, or tells to stop it: that reaches a guest that holds back
    /// all other interrupts.
    fn non_maskable_interrupt(&mut self) {
        if self.record.is_to_stop() {
            self.fail(Ending::TimeLimit, format_args!("the guest's time is over"));
        }
        let control = &mut self.vmcb.control;
        control.set_intercepts(control.intercepts() - Intercepts::NMI);
    }

    fn page_fault(&mut self) {
        let control = &self.vmcb.control;
        let (error, linear) = (control.exit_info_1 as u32, control.exit_info_2 as u32);
        let Some(shadow) = &mut self.shadow else {
            self.fail(Ending::OwnFault, format_args!("a page fault, which is not intercepted"))
        };
        match shadow.fault(&self.own, &self.machine, linear, error) {
            Resolution::Filled => self.counters.shadow_fills += 1,
            Resolution::Guest { error } => {
                self.counters.guest_page_faults += 1;
                self.fault(linear, error);
            }
            Resolution::TableWrite { physical } => {
                self.counters.table_writes += 1;
                self.carry_out(Some(physical / FRAME));
            }
            Resolution::Dropped { .. } => {
                self.counters.other_exits += 1;
                self.carry_out(None);
            }
        }
    }

    /// A store to a ROM or to nothing goes nowhere. Everything else is mapped.
    fn nested_page_fault(&mut self) {
        self.counters.nested_page_faults += 1;
        let control = &self.vmcb.control;
        let (error, physical) = (control.exit_info_1, control.exit_info_2);
        match self.machine.place(physical / FRAME) {
            Place::ReadOnly(_) | Place::Nothing if error & STORE != 0 => self.carry_out(None),
            place => self.fail(
                Ending::Unsupported,
                format_args!("no translation of {physical:#x}, error code {error:#x}, {place:?}"),
            ),
        }
    }

    fn invalidate(&mut self) {
        self.counters.invalidations += 1;
        let instruction = self.decode();
        let linear = emulate::address(&instruction, &self.state());
        self.record.set_detail(linear);
        if let Some(shadow) = &mut self.shadow {
            shadow.invalidate_page(&self.own, &self.machine, linear);
        }
        self.advance(&instruction);
    }

    fn hypercall(&mut self) {
        let instruction = self.decode();
        self.counters = self.counters_now();
        let call = Call {
            eax: self.register(RAX),
            ebx: self.register(RBX),
            ecx: self.register(RCX),
            cpl: self.vmcb.state.cpl,
        };
        let limit = self.limit();
        let may_be_quiet = self.options.features().contains(Features::QUIET);
        let before = self.own;
        let outcome = Machine {
            shadow: self.shadow.as_mut(),
            registers: &mut self.own,
            memory: &self.machine,
            is_hidden: Self::is_hidden,
            limit,
            counters: &mut self.counters,
            quiet: may_be_quiet.then_some(&mut self.quiet),
        }
        .call(call);
        match outcome {
            Outcome::Return(status, edx) => {
                self.record.set_result(status as i32 as u32);
                self.set_register(RAX, status as i32 as u32);
                self.set_register(RDX, edx);
                if self.shadow.is_none() {
                    self.vmcb.state.cr3 = self.own.cr3.into();
                    self.flush = true;
                } else if self.own != before {
                    self.follow_own();
                }
                self.advance(&instruction);
            }
            Outcome::Stop { address, bytes } => {
                break_line();
                self.show(address, bytes);
                self.fail(Ending::Stopped, format_args!("the guest asks to be stopped"))
            }
        }
    }

    /// Says what the guest wants said: a line for each of its own.
    fn show(&self, address: u32, bytes: u32) {
        let mut text = [0; 1024];
        let length = (bytes as usize).min(text.len());
        for (offset, byte) in text[..length].iter_mut().enumerate() {
            let value =
                self.machine.read(u64::from(address) + offset as u64, 1).unwrap_or_default();
            *byte = match value as u8 {
                byte @ (b' '..=b'~' | b'\n') => byte,
                _ => b'?',
            };
        }
        for text in core::str::from_utf8(&text[..length]).unwrap_or_default().lines() {
            line!("guest: {text}");
        }
    }
}
