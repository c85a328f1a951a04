//! What each call must do, one function for each, under the specification's name.
//!
//! The dispatch is made from the declaration in [`vmi_abi::calls`]: a call without a check does not
//! compile.

#![expect(unsafe_code, reason = "UNSAFETY: small routines in assembly that the harness runs")]

mod descriptor;
mod interrupt;
mod memory;
mod port;
mod power;
mod processor;
mod slots;
mod timer;
mod transfer;

pub(crate) use power::reboot;

use crate::client::Client;
use crate::harness::{self, Context, Entry, FLAT, Outcome, Registers, Trap};
use crate::paging::USER_CODE_FRAME;
use crate::report::Problems;
use crate::rom::{KEPT, Rom};
use crate::session::{self, FIXED_FLAG, Session};
use crate::{site, traps};
use core::arch::naked_asm;
use vmi_abi::header::SLOT_COUNT;
use vmi_abi::{
    CALLS_3_0, CallNumber, Group, KEEP_SITE, RelocationInfo, RelocationType, for_each_call,
};
use vmi_native_backend::calls as native;

macro_rules! dispatch {
    (
        revision_3_0 { $( #[doc = $summary:literal] $name:ident = $number:literal => $contract:expr )* }
        only_13 { $( #[doc = $old_summary:literal] $old_name:ident => $old_contract:expr )* }
    ) => {
        /// Runs the checks of a call.
        pub(crate) fn check(session: &mut Session) {
            match session.call.name {
                $( stringify!($name) => checks_by_name::$name(session), )*
                $( stringify!($old_name) => checks_by_name::$old_name(session), )*
                _ => {}
            }
        }

        /// The guest's own code for a call, used where the ROM answers NONE.
        ///
        /// It is the native backend, linked in: what a kernel on bare hardware would do.
        pub(crate) fn own_code(number: CallNumber) -> Option<u32> {
            let code = match number.0 {
                $( $number => own::$name as *const () as u32, )*
                _ => return None,
            };
            (code != native::not_served as *const () as u32).then_some(code)
        }
    };
}

for_each_call!(dispatch);

mod checks_by_name {
    pub(super) use super::descriptor::*;
    pub(super) use super::interrupt::*;
    pub(super) use super::memory::*;
    pub(super) use super::port::*;
    pub(super) use super::power::*;
    pub(super) use super::processor::*;
    pub(super) use super::slots::*;
    pub(super) use super::timer::*;
    pub(super) use super::transfer::*;
}

mod own {
    /// The guest calls its own code through a pointer, so a return address lies above the frame.
    pub(super) use vmi_native_backend::calls::IRET_by_call as IRET;
    pub(super) use vmi_native_backend::calls::*;
}

/// An empty function, to which a pointer call that is answered NOP is bound.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn do_nothing() {
    naked_asm!("ret")
}

/// Checks `vmi_init` and `get_reloc` of a ROM at one of its places, or what slots have instead.
pub(crate) fn entry_points(rom: &Rom, problems: &mut Problems) {
    let initialized = rom.initialize();
    returned_cleanly("vmi_init", &initialized, problems);
    if initialized.after.registers.eax != 0 {
        problems.add(format_args!("vmi_init failed: EAX = {:#x}", initialized.after.registers.eax));
    }
    if rom.client == Client::CopiedSlots {
        return; // Nothing is asked.
    }
    let count = if rom.client == Client::Lookup { CALLS_3_0.len() } else { SLOT_COUNT } as u32;
    let beyond = [count, count + 1, 255, 256, 0x4000_0000, KEEP_SITE + count, u32::MAX];
    // A ROM may know KEEP_SITE or not; what it answers, it answers alike.
    let kept = (0..count).map(|number| number | KEEP_SITE);
    let numbers = (0..count).chain(beyond).chain(kept);
    for number in numbers.clone() {
        let answer = one_answer(rom, number, problems);
        let (again, _) = rom.ask(number, session::INTERRUPT_FLAG);
        if answer != again {
            problems.add(format_args!("get_reloc({number}) answers {again:x?} after {answer:x?}"));
        }
    }
    // The other way round: no answer may depend on the one before.
    for number in numbers.rev() {
        one_answer(rom, number, problems);
    }
    if rom.client != Client::Lookup {
        return; // No call is left out, so no group is either.
    }
    for group in [Group::Timer, Group::Apic] {
        let mut kinds = CALLS_3_0
            .iter()
            .filter(|call| call.contract.group == Some(group))
            .filter_map(|call| Some(rom.answer(call.number?.0).kind == RelocationType::NONE));
        let first = kinds.next();
        if kinds.any(|is_none| Some(is_none) != first) {
            problems.add(format_args!("{group:?} calls must be answered all or none"));
        }
    }
}

/// Asks once, and holds the answer against that at the place where the ROM was found.
fn one_answer(rom: &Rom, number: u32, problems: &mut Problems) -> RelocationInfo {
    let (answer, outcome) = rom.ask(number, 0);
    if let Some(outcome) = outcome {
        returned_cleanly("get_reloc", &outcome, problems);
    }
    let offset = answer.eip.get().wrapping_sub(rom.base);
    if answer.kind.name().is_none() {
        problems.add(format_args!("get_reloc({number}): type {} does not exist", answer.kind.0));
    }
    if answer.kind.has_address() && offset >= rom.length {
        problems.add(format_args!(
            "get_reloc({number}): {:#x} is outside of the image",
            answer.eip.get()
        ));
    }
    let is_call = rom.client.revision().call(number & !KEEP_SITE).is_some();
    if !is_call && answer.kind != RelocationType::NONE {
        problems.add(format_args!("get_reloc({number}) is no call, but is answered"));
    }
    answer
}

/// Checks what an entry point of the header must leave alone.
fn returned_cleanly(name: &str, outcome: &Outcome, problems: &mut Problems) {
    if let Some(Trap { frame, address }) = outcome.trap {
        problems.add(format_args!(
            "{name}: exception {} at {:#x}, address {address:#x}",
            frame.vector, frame.eip
        ));
        return;
    }
    let Registers { ebx, ebp, esi, edi, .. } = outcome.after.registers;
    if (ebx, ebp, esi, edi) != (KEPT.ebx, KEPT.ebp, KEPT.esi, KEPT.edi) {
        problems.add(format_args!("{name} does not keep EBX, EBP, ESI, EDI"));
    }
    if outcome.after.esp != harness::entry_esp(0) {
        problems.add(format_args!("{name} does not leave ESP as it was"));
    }
    if outcome.after.segments != FLAT {
        problems.add(format_args!("{name} does not keep the data segments"));
    }
    if outcome.stack_used > vmi_abi::STACK_LIMIT {
        problems.add(format_args!("{name} uses {} bytes of stack", outcome.stack_used));
    }
}

/// Runs a routine of the guest's own under the harness: exceptions become outcomes.
pub(crate) fn run_own(
    routine: unsafe extern "C" fn(),
    registers: Registers,
    stack: &[u32],
) -> Outcome {
    harness::run(&Entry {
        context: Context { registers, esp: 0, eflags: FIXED_FLAG, segments: FLAT },
        stack,
        target: site::own_site(routine as *const () as u32),
        by_call: true,
        code: 0..0,
        watch: None,
        demand: None,
    })
}

/// EAX -> word -> EAX.
#[unsafe(naked)]
unsafe extern "C" fn read_word() {
    naked_asm!("mov eax, [eax]", "ret")
}

/// Reads a word that may not be mapped.
pub(crate) fn read(address: u32) -> Result<u32, Trap> {
    let outcome = run_own(read_word, Registers { eax: address, ..Registers::default() }, &[]);
    outcome.trap.map_or(Ok(outcome.after.registers.eax), Err)
}

/// Runs ring 3 with a frame, by the guest's own IRET, until something brings it back.
pub(crate) fn run_user(registers: Registers, frame: &[u32]) -> Outcome {
    run_own(traps::return_from_interrupt, registers, frame)
}

/// Puts code where ring 3 executes it.
pub(crate) fn place_user_code(code: &[u8]) {
    place_code((&raw mut USER_CODE_FRAME).cast(), code);
}

/// Writes code.
pub(crate) fn place_code(place: *mut u8, code: &[u8]) {
    for (index, byte) in code.iter().enumerate() {
        // SAFETY: callers name a page for code that is not being executed.
        unsafe { place.add(index).write_volatile(*byte) };
    }
}

/// `int 0x80`.
pub(crate) const COME_BACK: [u8; 2] = [0xcd, 0x80];
