//! The facts about a ROM, gathered for a reader: what `inspect` prints.

use super::answers::{Table, table};
use super::interface::{Entry, Interface};
use super::machine::{Code, Stop, is_system, registers::GENERAL, written};
use super::reach::{Executed, Reach, reach};
use super::rom::{ReadError, Rom};
use super::rules::structure_text;
use super::trial::{self, Placement, Trial};
use iced_x86::{Instruction, Mnemonic};
use serde::Serialize;
use std::collections::BTreeSet;
use vmi_abi::{Call, Ending};

/// The version of the JSON form; it rises when a field changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// States from which each call is executed to see what it does.
const LOOKS: u64 = 64;

/// Instructions of one such execution.
const LOOK_BUDGET: u64 = 20_000;

/// Instructions of all executions.
const FUEL: u64 = 3_000_000;

/// Everything about a ROM.
#[derive(Clone, Debug, Serialize)]
pub struct Survey {
    /// [`SCHEMA_VERSION`].
    pub version: u32,
    /// The header.
    pub header: Header,
    /// The `PCIR` structure, if there is one.
    pub pci: Option<Pci>,
    /// The `$PnP` structure, if there is one.
    pub pnp: Option<Pnp>,
    /// Linear address at which the ROM was executed.
    pub base: u32,
    /// EAX as `vmi_init`, or Init of 13.x, returned it; `None` if it did not return.
    pub vmi_init_result: Option<u32>,
    /// Most instructions of a `get_reloc`, or of a GetRelocationInfo.
    pub get_reloc_instructions: u64,
    /// The calls by number.
    pub calls: Vec<CallFacts>,
}

/// The header's fields and what follows from them.
#[derive(Clone, Debug, Serialize)]
pub struct Header {
    /// Major revision of the interface.
    pub revision_major: u8,
    /// Minor revision of the interface.
    pub revision_minor: u8,
    /// Bytes of the file.
    pub file_bytes: usize,
    /// Bytes that the length byte claims.
    pub image_bytes: usize,
    /// Bytes without the padding at the end.
    pub used_bytes: usize,
    /// Bytes of padding.
    pub free_bytes: usize,
    /// Sum of all bytes modulo 256; 0 is right.
    pub byte_sum: u8,
    /// Bytes that the guest reserves at the top of its linear space.
    pub reserved_top_bytes: u32,
    /// The field itself.
    pub virtual_top: u32,
    /// The licence.
    pub license: Option<String>,
    /// Slots in the table of revision 13.x.
    pub jump_slots: u8,
}

/// The `PCIR` structure.
#[derive(Clone, Debug, Serialize)]
pub struct Pci {
    /// Its offset.
    pub offset: u16,
    /// Vendor of the device.
    pub vendor: u16,
    /// Device of that vendor.
    pub device: u16,
    /// Base class, subclass, interface.
    pub class: [u8; 3],
    /// Bytes of the image.
    pub image_bytes: usize,
    /// What Linux prints as the ROM's version: major, minor.
    pub version: [u8; 2],
    /// 0 for a PC's BIOS.
    pub code_type: u8,
    /// Whether no further image follows.
    pub last_image: bool,
}

/// The `$PnP` structure.
#[derive(Clone, Debug, Serialize)]
pub struct Pnp {
    /// Its offset.
    pub offset: u16,
    /// Sum of its bytes modulo 256; 0 is right, `None` if it does not fit into the image.
    pub byte_sum: Option<u8>,
    /// The manufacturer's name.
    pub manufacturer: Option<String>,
    /// The product's name.
    pub product: Option<String>,
}

/// A call.
#[derive(Clone, Debug, Serialize)]
pub struct CallFacts {
    /// Its number in the ROM's revision.
    pub number: u32,
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// What `get_reloc` or GetRelocationInfo answered; `None` if nothing.
    pub answer: Option<String>,
    /// The type's number.
    pub answer_type: Option<u8>,
    /// Where its slot is in revision 13.x.
    pub slot: Option<usize>,
    /// Where its code is: in 13.x the slot.
    pub offset: Option<usize>,
    /// What its code does.
    pub code: Option<CodeFacts>,
    /// What lies where GetRelocationInfo points to, if that is not the slot.
    pub elsewhere: Option<Elsewhere>,
    /// What is answered to a guest that wants its call sites kept, if that is other code.
    pub keep_site: Option<Elsewhere>,
}

impl CallFacts {
    /// What the guest was answered, or else how it gets to the call.
    #[must_use]
    pub fn answer_text(&self) -> String {
        let other = if self.slot.is_some() { "slot" } else { "no answer" };
        self.answer.clone().unwrap_or_else(|| other.to_owned())
    }
}

/// A call's code in a second place.
#[derive(Clone, Debug, Serialize)]
pub struct Elsewhere {
    /// Where it is.
    pub offset: usize,
    /// What it does.
    pub code: CodeFacts,
}

/// A call's code.
#[derive(Clone, Debug, Serialize)]
pub struct CodeFacts {
    /// Bytes of the instructions that can be reached.
    pub bytes: usize,
    /// Instructions that can be reached.
    pub instructions: usize,
    /// Most instructions of one execution.
    pub executed: u64,
    /// Whether an execution was cut short, so that `executed` and `stack_bytes` are lower bounds.
    pub cut_short: bool,
    /// Instructions that reach beyond the program.
    pub system: Vec<String>,
    /// Registers that some instruction writes, ESP left out.
    pub written: Vec<&'static str>,
    /// Most bytes of stack used below ESP on entry.
    pub stack_bytes: u32,
    /// What the code puts over the instruction that called it; `None` if it leaves that alone.
    pub site: Option<SiteFacts>,
    /// Offset, bytes and text of each instruction.
    pub listing: Vec<Line>,
}

/// The instructions that take the place of a call, found by executing them. What only fills the
/// place is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SiteFacts {
    /// The instructions.
    pub instructions: Vec<String>,
    /// Their bytes in hexadecimal.
    pub bytes: String,
    /// Those that reach beyond the program.
    pub system: Vec<String>,
    /// Registers that some instruction writes, ESP left out.
    pub written: Vec<&'static str>,
}

impl SiteFacts {
    /// The instructions in a line.
    #[must_use]
    pub fn text(&self) -> String {
        self.instructions.join("; ")
    }
}

/// A line of disassembly.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Offset in the image.
    pub offset: usize,
    /// The bytes in hexadecimal.
    pub bytes: String,
    /// The instruction.
    pub text: String,
    /// Whether an execution came here.
    pub executed: bool,
}

/// One call, as `inspect --call --json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct OneCall<'a> {
    /// [`SCHEMA_VERSION`].
    pub version: u32,
    /// The call.
    pub call: &'a CallFacts,
}

/// Gathers the facts, with the ROM at a linear base.
///
/// # Errors
///
/// The ROM is of a revision that the inspector does not know.
pub fn survey(rom: &Rom, base: u32) -> Result<Survey, ReadError> {
    survey_within(rom, base, FUEL)
}

/// [`survey`] with a budget of its own: calls that it does not reach are marked as cut short.
///
/// # Errors
///
/// The ROM is of a revision that the inspector does not know.
pub fn survey_within(rom: &Rom, base: u32, fuel: u64) -> Result<Survey, ReadError> {
    let interface = rom.interface()?;
    let code = Code::new(rom.image(), fuel);
    let table = table(&code, &interface, base);
    let calls = interface
        .calls()
        .map(|(number, call)| call_facts(&code, &interface, &table, number, call))
        .collect();
    Ok(Survey {
        version: SCHEMA_VERSION,
        header: header(rom),
        pci: pci(rom),
        pnp: pnp(rom),
        base,
        vmi_init_result: table.init,
        get_reloc_instructions: table.most_instructions(),
        calls,
    })
}

fn header(rom: &Rom) -> Header {
    let header = rom.header();
    Header {
        revision_major: header.api_version_maj,
        revision_minor: header.api_version_min,
        file_bytes: rom.file().len(),
        image_bytes: rom.claimed_length(),
        used_bytes: rom.used(),
        free_bytes: rom.image().len() - rom.used(),
        byte_sum: rom.sum(),
        reserved_top_bytes: header.virtual_top.get().wrapping_neg(),
        virtual_top: header.virtual_top.get(),
        license: rom.license().map(structure_text),
        jump_slots: header.jump_slots,
    }
}

fn pci(rom: &Rom) -> Option<Pci> {
    let pci = rom.pci()?;
    let [interface, subclass, base] = pci.class_code;
    Some(Pci {
        offset: rom.header().pci_header_offs.get(),
        vendor: pci.vendor.get(),
        device: pci.device.get(),
        class: [base, subclass, interface],
        image_bytes: usize::from(pci.image_length.get()) * vmi_abi::header::LENGTH_UNIT,
        version: [pci.version_major, pci.version_minor],
        code_type: pci.code_type,
        last_image: pci.indicator & vmi_abi::header::PCI_LAST_IMAGE != 0,
    })
}

fn pnp(rom: &Rom) -> Option<Pnp> {
    let pnp = rom.pnp()?;
    let text = |offset: u16| rom.string(offset).map(structure_text);
    Some(Pnp {
        offset: rom.header().pnp_header_offs.get(),
        byte_sum: rom.pnp_bytes().map(vmi_abi::header::checksum),
        manufacturer: text(pnp.manufacturer.get()),
        product: text(pnp.product.get()),
    })
}

fn call_facts(
    code: &Code<'_>,
    interface: &Interface,
    table: &Table,
    number: u32,
    call: &'static Call,
) -> CallFacts {
    let kind = table.answer_at(number).map(|answer| answer.kind);
    let entries = interface.entries(table, number, call);
    let mut entries = entries.into_iter().filter(|entry| entry.offset < code.image().len());
    let first = entries.next();
    let keeping = interface
        .keep_site_entry(table, number)
        .filter(|entry| first.is_none_or(|first| first.offset != entry.offset));
    let beside = |entry: Entry| Elsewhere {
        offset: entry.offset,
        code: code_facts(code, table.base, call, entry),
    };
    CallFacts {
        number,
        name: call.name,
        summary: call.summary,
        answer: kind.map(super::rules::kind_name),
        answer_type: kind.map(|kind| kind.0),
        slot: first.filter(|entry| entry.is_slot).map(|entry| entry.offset),
        offset: first.map(|entry| entry.offset),
        code: first.map(|entry| code_facts(code, table.base, call, entry)),
        elsewhere: entries.next().map(beside),
        keep_site: keeping.map(beside),
    }
}

fn code_facts(code: &Code<'_>, base: u32, call: &Call, entry: Entry) -> CodeFacts {
    let Entry { offset, kind, .. } = entry;
    let mut executed = Executed::new(code);
    let (mut most, mut depth, mut cut_short) = (0, 0, false);
    let mut site = None;
    for seed in 0..LOOKS {
        let placement = Placement::whole(base);
        let mut trial = trial::call(code, placement, offset, call, kind, seed);
        let stop = trial.machine.run(LOOK_BUDGET);
        // Now from the site as it was left, as often as it takes to find one that does without the ROM.
        if site.is_none()
            && let Some(mut again) =
                trial::again(code, placement, offset, call, kind, seed + LOOKS, &trial)
        {
            again.machine.run(LOOK_BUDGET);
            executed.add(&again.machine.trace);
            site = site_facts(&again);
        }
        executed.add(&trial.machine.trace);
        let trace = &trial.machine.trace;
        most = most.max(trace.instructions - trace.site.len() as u64);
        depth = depth.max(trial.machine.stack_depth());
        if matches!(stop, Stop::Budget | Stop::Fuel) {
            cut_short = true;
            break;
        }
        if call.contract.ending == Ending::Stops && seed > 2 {
            break;
        }
    }
    let executed = executed.offsets();
    let reached = reach(code, offset, executed, cut_short);
    cut_short |= reached.cut_short;
    CodeFacts {
        bytes: reached.bytes(),
        instructions: reached.instructions.len(),
        executed: most,
        cut_short,
        system: system(reached.instructions.values()),
        written: registers(reached.instructions.values()),
        stack_bytes: depth,
        site,
        listing: listing(code, &reached, executed),
    }
}

/// What an execution from a rewritten site found there; `None` if the site has a prefix before what a
/// ROM may change, or still calls.
fn site_facts(again: &Trial<'_>) -> Option<SiteFacts> {
    let at = again.site.as_ref().filter(|site| site.start == site.first)?;
    let trace = &again.machine.trace;
    if trace.instructions != trace.site.len() as u64 {
        return None;
    }
    let base = again.machine.memory.image_base();
    let filler = at.end..at.resume;
    // The number of a TEST is what is left of a call's distance.
    let only_fills = |i: &&Instruction| {
        matches!(i.mnemonic(), Mnemonic::Nop | Mnemonic::Jmp | Mnemonic::Pause)
            || i.code() == iced_x86::Code::Test_EAX_imm32
            || filler.contains(&base.wrapping_add(i.ip32())) && i.mnemonic() == Mnemonic::Mov
    };
    let native: Vec<&Instruction> = trace.site.iter().filter(|i| !only_fills(i)).collect();
    let bytes = native.iter().flat_map(|i| {
        let start = base.wrapping_add(i.ip32()).wrapping_sub(at.start) as usize;
        at.bytes.get(start..start + i.len()).unwrap_or_default()
    });
    Some(SiteFacts {
        instructions: native.iter().map(|i| super::rules::disassemble(i)).collect(),
        bytes: hexadecimal(bytes),
        system: system(native.iter().copied()),
        written: registers(native.iter().copied()),
    })
}

fn hexadecimal<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> String {
    bytes.into_iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(" ")
}

fn system<'a>(instructions: impl Iterator<Item = &'a Instruction>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for instruction in instructions.filter(|i| is_system(i)) {
        let name = match instruction.mnemonic() {
            // Which debug register it is stands in the listing.
            Mnemonic::Mov if instruction.op0_register().is_dr() => "mov dr, reg".to_owned(),
            Mnemonic::Mov if instruction.op1_register().is_dr() => "mov reg, dr".to_owned(),
            Mnemonic::Mov => super::rules::disassemble(instruction),
            other => format!("{other:?}").to_ascii_lowercase(),
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn registers<'a>(instructions: impl Iterator<Item = &'a Instruction> + Clone) -> Vec<&'static str> {
    let places = instructions.clone().fold(0, |all, i| all | written(i));
    let changes_flags = instructions
        .clone()
        .any(|i| (i.rflags_written() | i.rflags_cleared() | i.rflags_set()) != 0);
    let mut names: Vec<&'static str> = (GENERAL.iter().enumerate())
        .filter(|(place, (name, _))| places & (1 << place) != 0 && *name != "ESP")
        .map(|(_, (name, _))| *name)
        .collect();
    if changes_flags {
        names.push("flags");
    }
    names
}

fn listing(code: &Code<'_>, reached: &Reach, executed: &BTreeSet<usize>) -> Vec<Line> {
    let line = |(offset, instruction): (&usize, &Instruction)| {
        let bytes = code.image().get(*offset..offset + instruction.len()).unwrap_or_default();
        Line {
            offset: *offset,
            bytes: hexadecimal(bytes),
            text: super::rules::disassemble(instruction),
            executed: executed.contains(offset),
        }
    };
    reached.instructions.iter().map(line).collect()
}
