//! The end: why, where the guest was, and what it cost.

#![expect(unsafe_code, reason = "UNSAFETY: port I/O")]

use crate::console::{drain, line};
use crate::svm::{RBP, RBX, RCX, RDI, RDX, RSI, Registers, State};
use core::fmt;
use vmi_hv_backend::reference::interface::Counters;
pub(crate) use vmi_hv_backend::reference::record::Ending;

/// The exit device's port: what is written ends QEMU, whose status is twice the value and one more. A guest that ends itself
/// writes its own value.
pub(crate) const EXIT_PORT: u16 = 0xf4;

/// Ends QEMU.
pub(crate) fn exit(ending: Ending) -> ! {
    line!("ending {}", ending.name());
    drain();
    // SAFETY: the exit device. Where there is none nothing happens.
    unsafe { x86::io::outb(EXIT_PORT, ending as u8) };
    loop {
        // SAFETY: nothing is left to do; interrupts are disabled.
        unsafe { x86::halt() };
    }
}

/// Says why, and ends.
pub(crate) fn give_up(ending: Ending, reason: fmt::Arguments<'_>) -> ! {
    line!("{reason}");
    exit(ending)
}

/// The guest's registers.
pub(crate) fn registers(state: &State, registers: &Registers) {
    let of = |index: usize| registers[index] as u32;
    line!(
        "eax={:08x} ebx={:08x} ecx={:08x} edx={:08x}",
        state.rax as u32,
        of(RBX),
        of(RCX),
        of(RDX)
    );
    line!(
        "esi={:08x} edi={:08x} ebp={:08x} esp={:08x}",
        of(RSI),
        of(RDI),
        of(RBP),
        state.rsp as u32
    );
    line!(
        "eip={:08x} eflags={:08x} cpl={} efer={:x}",
        state.rip as u32,
        state.rflags as u32,
        state.cpl,
        state.efer
    );
    line!(
        "cr0={:08x} cr2={:08x} cr3={:08x} cr4={:08x}",
        state.cr0 as u32,
        state.cr2 as u32,
        state.cr3 as u32,
        state.cr4 as u32
    );
    for (name, segment) in [
        ("cs", &state.cs),
        ("ss", &state.ss),
        ("ds", &state.ds),
        ("es", &state.es),
        ("fs", &state.fs),
        ("gs", &state.gs),
        ("tr", &state.tr),
        ("ldtr", &state.ldtr),
        ("gdtr", &state.gdtr),
        ("idtr", &state.idtr),
    ] {
        line!(
            "{name:4} {:04x} base={:08x} limit={:08x} attributes={:03x}",
            segment.selector,
            segment.base as u32,
            segment.limit,
            segment.attributes
        );
    }
}

/// What the guest cost: a table for people, a line for programs.
pub(crate) fn counters(counters: &Counters) {
    let values = counters.values();
    let names = || Counters::EXITS.iter().chain(Counters::OTHERS);
    let width = names().map(|name| name.len()).max().unwrap_or_default();
    for (index, (name, value)) in names().zip(values).enumerate() {
        if index == Counters::EXITS.len() {
            line!("{:width$} {:>16}", "exits", counters.exits());
        }
        line!("{name:width$} {value:>16}");
    }
    line!("counters {}", Json(counters));
}

/// An object of names and numbers.
struct Json<'a>(&'a Counters);

impl fmt::Display for Json<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Counters::EXITS.iter().chain(Counters::OTHERS);
        let mut separator = '{';
        for (name, value) in names.zip(self.0.values()) {
            write!(f, "{separator}\"{name}\":{value}")?;
            separator = ',';
        }
        f.write_str("}")
    }
}
