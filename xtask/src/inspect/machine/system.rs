//! Instructions that reach beyond the program, as far as the program can see their effect.

use super::execute::size;
use super::flags::{self, INTERRUPT, LOADABLE, RESUME, VIRTUAL_8086};
use super::{Machine, Stop};
use crate::inspect::random::Random;
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};
use std::collections::BTreeMap;

/// State that only the system's instructions show.
#[derive(Clone, Debug)]
pub struct System {
    /// Where values from outside come from: ports, counters.
    pub random: Random,
    /// Limit and base of the global descriptor table.
    pub gdtr: (u16, u32),
    /// Limit and base of the interrupt descriptor table.
    pub idtr: (u16, u32),
    /// The local descriptor table's selector.
    pub ldtr: u16,
    /// The task state segment's selector.
    pub task_register: u16,
    /// CR0 to CR7.
    pub control: [u32; 8],
    /// DR0 to DR7.
    pub debug: [u32; 8],
    /// The time-stamp counter.
    pub time: u64,
    /// CPUID leaves that are another processor's than the plain one's: EAX, EBX, ECX, EDX.
    pub leaves: BTreeMap<u32, [u32; 4]>,
    /// A debug console, if there is one: its port, which reads as its own number, and what was written to it.
    pub console: Option<(u16, Vec<u8>)>,
    model_specific: BTreeMap<u32, u64>,
}

/// Bytes of a console that are kept.
const CONSOLE_KEPT: usize = 4096;

impl System {
    pub(super) fn new(random: Random) -> Self {
        Self {
            random,
            gdtr: (0, 0),
            idtr: (0, 0),
            ldtr: 0,
            task_register: 0,
            control: [0x8005_003b, 0, 0, 0, 0x6b0, 0, 0, 0],
            debug: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            time: 0x10_0000_0000,
            leaves: BTreeMap::new(),
            console: None,
            model_specific: BTreeMap::new(),
        }
    }

    fn tick(&mut self) -> u64 {
        self.time = self.time.wrapping_add(37);
        self.time
    }

    /// EAX, EBX, ECX, EDX of a plain processor without a hypervisor.
    fn identify(leaf: u32, subleaf: u32) -> [u32; 4] {
        match leaf {
            0 => [
                2,
                u32::from_le_bytes(*b"Genu"),
                u32::from_le_bytes(*b"ntel"),
                u32::from_le_bytes(*b"ineI"),
            ],
            1 => [0x633, 0x800, 0x8000_2000 & !0x8000_0000, 0x0383_fbff],
            0x4000_0000.. => [0; 4],
            _ => {
                let mut random = Random::new((u64::from(leaf) << 32) | u64::from(subleaf));
                [random.word(), random.word(), random.word(), random.word()]
            }
        }
    }
}

impl Machine<'_> {
    /// Whether a MOV's operand is a control or debug register.
    pub(super) fn is_system_move(&self, i: &Instruction) -> bool {
        [i.op0_register(), i.op1_register()]
            .into_iter()
            .any(|register| register.is_cr() || register.is_dr() || register.is_tr())
    }

    pub(super) fn execute_system_move(&mut self, i: &Instruction) -> Result<(), Stop> {
        let (to, from) = (i.op0_register(), i.op1_register());
        let system = if to.is_gpr() { from } else { to };
        let bank = if system.is_cr() {
            &mut self.system.control
        } else if system.is_dr() {
            &mut self.system.debug
        } else {
            return Err(Stop::Undecided);
        };
        let place = bank.get_mut(system.number()).ok_or(Stop::Interrupt(6))?;
        if to.is_gpr() {
            let value = *place;
            self.registers.set(to, value);
        } else {
            *place = self.registers.get(from);
        }
        Ok(())
    }

    pub(super) fn execute_system(&mut self, i: &Instruction) -> Result<(), Stop> {
        match i.mnemonic() {
            M::Cli => self.set_flags(INTERRUPT, 0),
            M::Sti => {
                self.shadow = !self.flag(INTERRUPT);
                self.set_flags(INTERRUPT, INTERRUPT);
            }
            M::Hlt => {
                if !self.flag(INTERRUPT) {
                    return Err(Stop::Halted);
                }
            }
            M::Pushfd => {
                let value = self.registers.eflags & !(VIRTUAL_8086 | RESUME);
                self.push(value, 4);
            }
            M::Pushf => {
                let value = self.registers.eflags;
                self.push(value, 2);
            }
            M::Popfd => {
                let value = self.pop(4);
                self.set_flags(LOADABLE, value);
            }
            M::Popf => {
                let value = self.pop(2);
                self.set_flags(LOADABLE & 0xffff, value);
            }
            M::Iretd => self.interrupt_return(),
            M::Sysexit => {
                let (eip, esp) =
                    (self.registers.get(Register::EDX), self.registers.get(Register::ECX));
                self.registers.eip = eip;
                self.registers.set(Register::ESP, esp);
                // As if the kernel's code segment, the first of four, were selector 60h.
                self.registers.set(Register::CS, 0x73);
                self.registers.set(Register::SS, 0x7b);
            }
            M::Lgdt => self.system.gdtr = self.load_table(i),
            M::Lidt => self.system.idtr = self.load_table(i),
            M::Sgdt => self.store_table(i, self.system.gdtr)?,
            M::Sidt => self.store_table(i, self.system.idtr)?,
            M::Lldt => self.system.ldtr = self.operand(i, 0)? as u16,
            M::Ltr => self.system.task_register = self.operand(i, 0)? as u16,
            M::Sldt => self.set_operand(i, 0, u32::from(self.system.ldtr))?,
            M::Str => self.set_operand(i, 0, u32::from(self.system.task_register))?,
            M::Smsw => {
                let value = self.system.control[0] & flags::mask(size(i, 0));
                self.set_operand(i, 0, value)?;
            }
            M::Lmsw => {
                let value = self.operand(i, 0)?;
                let old = self.system.control[0];
                self.system.control[0] = (old & !0xe) | (value & 0xf);
            }
            M::Clts => self.system.control[0] &= !8,
            M::Invd | M::Wbinvd | M::Invlpg => {}
            M::In => {
                let register = i.op0_register();
                let console =
                    self.system.console.as_ref().filter(|(port, _)| *port == self.port(i, 1));
                let value = match console {
                    Some((port, _)) => u32::from(*port),
                    None => self.system.random.word() & flags::mask(register.size()),
                };
                self.registers.set(register, value);
            }
            M::Out => {
                let (port, value) = (self.port(i, 0), self.registers.get(i.op1_register()));
                let console = self.system.console.as_mut();
                if let Some((_, text)) = console.filter(|(console, _)| *console == port)
                    && text.len() < CONSOLE_KEPT
                {
                    text.push(value as u8);
                }
            }
            M::Rdmsr => {
                let index = self.registers.get(Register::ECX);
                let fresh = self.system.random.bits();
                let value = *self.system.model_specific.entry(index).or_insert(fresh);
                self.set_pair(value);
            }
            M::Wrmsr => {
                let [eax, ecx, edx, ..] = self.registers.general();
                let value = (u64::from(edx) << 32) | u64::from(eax);
                self.system.model_specific.insert(ecx, value);
            }
            M::Rdtsc => {
                let value = self.system.tick();
                self.set_pair(value);
            }
            M::Rdtscp => {
                let value = self.system.tick();
                self.set_pair(value);
                self.registers.set(Register::ECX, 0);
            }
            M::Rdpmc => {
                let value = self.system.random.bits() & 0xff_ffff_ffff;
                self.set_pair(value);
            }
            M::Cpuid => {
                let [leaf, subleaf, ..] = self.registers.general();
                let known = self.system.leaves.get(&leaf).copied();
                let [eax, ebx, ecx, edx] = known.unwrap_or_else(|| System::identify(leaf, subleaf));
                self.registers.set(Register::EAX, eax);
                self.registers.set(Register::EBX, ebx);
                self.registers.set(Register::ECX, ecx);
                self.registers.set(Register::EDX, edx);
            }
            M::Int3 => return Err(self.interrupt(3)),
            M::Int => return Err(self.interrupt(i.immediate8())),
            M::Ud2 => return Err(self.interrupt(6)),
            _ => return Err(Stop::Undecided),
        }
        Ok(())
    }

    /// The port that an operand names.
    fn port(&self, i: &Instruction, operand: u32) -> u16 {
        match i.op_kind(operand) {
            OpKind::Immediate8 => i.immediate8().into(),
            _ => self.registers.get(Register::DX) as u16,
        }
    }

    /// An interrupt: without a usable table of handlers the processor shuts down.
    fn interrupt(&self, vector: u8) -> Stop {
        let (limit, _) = self.system.idtr;
        if limit < 8 * 8 + 7 { Stop::Reset } else { Stop::Interrupt(vector) }
    }

    fn set_pair(&mut self, value: u64) {
        self.registers.set(Register::EAX, value as u32);
        self.registers.set(Register::EDX, (value >> 32) as u32);
    }

    fn load_table(&mut self, i: &Instruction) -> (u16, u32) {
        let address = self.address(i);
        let value = self.load(i.memory_segment(), address, 6);
        (value as u16, (value >> 16) as u32)
    }

    fn store_table(&mut self, i: &Instruction, (limit, base): (u16, u32)) -> Result<(), Stop> {
        if i.op0_kind() != OpKind::Memory {
            return Err(Stop::Undecided);
        }
        let address = self.address(i);
        let value = u64::from(limit) | (u64::from(base) << 16);
        self.store(i.memory_segment(), address, 6, value)
    }

    fn interrupt_return(&mut self) {
        let eip = self.pop(4);
        let cs = self.pop(4);
        let eflags = self.pop(4);
        let virtual_8086 = eflags & VIRTUAL_8086 != 0;
        if virtual_8086 || cs & 3 != 0 {
            let esp = self.pop(4);
            let ss = self.pop(4);
            if virtual_8086 {
                for segment in [Register::ES, Register::DS, Register::FS, Register::GS] {
                    let selector = self.pop(4);
                    self.registers.set(segment, selector);
                }
            }
            self.registers.set(Register::ESP, esp);
            self.registers.set(Register::SS, ss);
        }
        self.registers.eip = eip;
        // In virtual-8086 mode the privilege level is 3 whatever CS holds; the run ends there.
        self.registers.set(Register::CS, if virtual_8086 { cs | 3 } else { cs });
        let mask =
            LOADABLE | VIRTUAL_8086 | RESUME | flags::VIRTUAL_INTERRUPT | flags::VIRTUAL_PENDING;
        self.set_flags(mask, eflags);
    }
}
