//! The contract, held against a ROM.

mod answering;
mod calls;
mod effects;
mod help;
mod slots;
mod structure;

pub use answering::kind_name;
pub use structure::shown as structure_text;

use super::answers::{FUEL, Table, table};
use super::interface::Function;
use super::machine::{Breach, Code};
use super::reach::Reach;
use super::rom::Rom;
use super::{HIGH_BASE, Interface, LOW_BASE};
use iced_x86::{Formatter, Instruction, IntelFormatter};
use serde::Serialize;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use vmi_abi::CallNumber;

macro_rules! rules {
    ($( $(#[doc = $meaning:literal])+ $name:ident = $text:literal, )*) => {
        /// What a ROM can break.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Rule { $( $(#[doc = $meaning])+ $name, )* }

        impl Rule {
            /// Every rule.
            pub const ALL: &[Self] = &[ $( Self::$name, )* ];

            /// The name that reports print.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $( Self::$name => $text, )* }
            }

            /// What it asks for, in a sentence.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $( Self::$name => concat!($($meaning),+).trim_ascii(), )* }
            }
        }
    };
}

rules! {
    /// The file is as long as the length byte says, and fits into the option-ROM area.
    Length = "length",
    /// The image starts with `55 AA` and carries `cVmi` at offset 8.
    Signature = "signature",
    /// All bytes of the image add up to 0 modulo 256, or the firmware ignores it.
    Checksum = "checksum",
    /// The interface revision is 3.0 or one of 13.x.
    Revision = "revision",
    /// The licence string is exactly `GPL` or `GPL v2`, or Linux ignores the ROM.
    License = "licence",
    /// There is a `PCIR` structure, and it agrees with the header.
    PciHeader = "pci-header",
    /// The `$PnP` structure, if there is one, is whole.
    PnpHeader = "pnp-header",
    /// The hole at the top of linear space leaves room for the kernel.
    VirtualTop = "virtual-top",
    /// The 16-bit entry is code.
    PostEntry = "post-entry",
    /// `vmi_init`, in 13.x Init, returns 0 and keeps what a function keeps.
    Init = "vmi-init",
    /// `get_reloc`, from 13.3 on GetRelocationInfo, returns for any number and keeps what a function keeps.
    GetReloc = "get-reloc",
    /// The answer is a type that exists and that the call's contract allows, with an address in the image.
    Answer = "answer",
    /// A question gets the same answer each time, whatever was asked before.
    Constancy = "constancy",
    /// Calls that belong together are answered all or not at all.
    Group = "group",
    /// A register that the call must keep is kept.
    Register = "register",
    /// Flags that the call must keep are kept, and the interrupt flag is what the call makes it.
    Flags = "flags",
    /// The stack pointer is where the caller expects it.
    StackBalance = "stack-balance",
    /// The call uses little of the caller's stack, nothing below it and nothing above its arguments.
    StackUse = "stack-use",
    /// The call ends as its contract says: returns, transfers or stops.
    Ending = "ending",
    /// Nothing is stored into the image.
    ImageStore = "image-store",
    /// Only the image, the stack and memory that arguments point to are touched.
    Memory = "memory",
    /// Only CS and SS are used where DS and ES may be somebody else's.
    Segment = "segment",
    /// No x87, MMX or SSE instruction: that state belongs to the interrupted program.
    Vector = "vector",
    /// All code that can be reached is code, inside the image.
    Code = "code",
    /// The code does the same at every linear base.
    Base = "base-dependence",
    /// The call does what it is for.
    Effect = "effect",
    /// A call site is changed only where its bytes prove it, as a whole, alone, and only by code that may.
    Site = "site",
    /// In 13.x each slot has code that ends in it or leaves it by a jump.
    Slot = "slot",
    /// In 13.x each slot's code does the same in a copy of the first 4 KiB.
    Copy = "copy",
    /// What could not be executed to its end is not known to be right.
    Undecided = "undecided",
}

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// The call's number; `None` for what concerns the whole image.
    pub call: Option<u32>,
    /// The call's name, or what else the violation is in.
    pub subject: &'static str,
    /// Offset in the image, where there is one to point to.
    pub offset: Option<usize>,
    /// The instruction there.
    pub instruction: Option<String>,
    /// What is wrong.
    pub detail: String,
}

/// Something worth knowing that breaks no rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Note {
    /// What it is about.
    pub subject: &'static str,
    /// What is to be known.
    pub detail: String,
}

/// A rule that the ROM's revision does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct NotApplicable {
    /// The rule.
    #[serde(serialize_with = "name_of")]
    pub rule: Rule,
    /// Why it says nothing about this ROM.
    pub reason: &'static str,
}

fn name_of<S: serde::Serializer>(rule: &Rule, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(rule.name())
}

/// The verdict on a ROM.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The ROM's interface; `None` for a revision that the inspector does not know.
    pub interface: Option<Interface>,
    /// Rules that this ROM was not held against.
    pub not_applicable: Vec<NotApplicable>,
    /// Every broken rule.
    pub violations: Vec<Violation>,
    /// What else there is to know.
    pub notes: Vec<Note>,
    /// The answers, if the ROM could be asked.
    pub table: Option<Table>,
    /// Most instructions of a call that were executed at once, by number.
    pub executed: Vec<Option<u64>>,
    /// Calls that change sites in a way that is right on a machine with one processor only.
    one_processor: BTreeSet<&'static str>,
    /// Places already listed, by rule and subject.
    places: HashMap<(Rule, &'static str), BTreeSet<usize>>,
}

/// Places listed of what breaks one rule in one call: a hostile image has one at every instruction.
const PLACES_LISTED: usize = 32;

/// Why a rule may be undecided.
const OUT_OF_FUEL: &str =
    "cannot decide: the inspection's budget of instructions or memory is used up";

impl Report {
    /// Whether no rule is broken.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    /// Whether a rule is broken by a call.
    #[must_use]
    pub fn names(&self, rule: Rule, call: CallNumber) -> bool {
        self.violations.iter().any(|found| found.rule == rule && found.call == Some(call.0))
    }

    /// The name of a call that the report speaks of.
    #[must_use]
    pub fn call_name(&self, number: u32) -> &'static str {
        Subject::call(self.interface.as_ref(), number).name
    }

    fn note(&mut self, subject: &'static str, detail: impl Into<String>) {
        self.notes.push(Note { subject, detail: detail.into() });
    }

    /// A violation of the image as a whole.
    fn image(&mut self, rule: Rule, offset: Option<usize>, detail: impl Into<String>) {
        self.image_of(&Subject { name: "image", call: None }, rule, offset, detail);
    }

    /// A violation of a place in which there is no instruction to show.
    fn image_of(
        &mut self,
        subject: &Subject,
        rule: Rule,
        offset: Option<usize>,
        detail: impl Into<String>,
    ) {
        let (call, subject) = (subject.call, subject.name);
        let detail = detail.into();
        self.violations.push(Violation { rule, call, subject, offset, instruction: None, detail });
    }

    /// Notes the most instructions that a call was seen to take.
    fn ran(&mut self, number: u32, instructions: u64) {
        let place = number as usize;
        if self.executed.len() <= place {
            self.executed.resize(place + 1, None);
        }
        if let Some(most) = self.executed.get_mut(place) {
            *most = (*most).max(Some(instructions));
        }
    }

    /// A violation of a piece of code; each rule once for each place.
    fn code(
        &mut self,
        code: &Code<'_>,
        subject: &Subject,
        rule: Rule,
        offset: Option<usize>,
        detail: impl Into<String>,
    ) {
        if let Some(offset) = offset {
            let places = self.places.entry((rule, subject.name)).or_default();
            if places.len() > PLACES_LISTED || !places.insert(offset) {
                return;
            }
            if places.len() > PLACES_LISTED {
                let detail = format!("more places than the {PLACES_LISTED} listed break this rule");
                return self.code(code, subject, rule, None, detail);
            }
        }
        let instruction = offset.and_then(|offset| code.at(offset)).map(|i| disassemble(&i));
        self.violations.push(Violation {
            rule,
            call: subject.call,
            subject: subject.name,
            offset,
            instruction,
            detail: detail.into(),
        });
    }

    /// What an execution must not have done.
    fn breaches(
        &mut self,
        code: &Code<'_>,
        subject: &Subject,
        breaches: &[(Option<usize>, Breach)],
    ) {
        for (offset, breach) in breaches {
            let rule = match breach {
                Breach::StoreIntoImage { .. } => Rule::ImageStore,
                Breach::Read { .. } | Breach::Write { .. } => Rule::Memory,
                Breach::Segment { .. } => Rule::Segment,
                Breach::BelowStack { .. } | Breach::CallerStack { .. } => Rule::StackUse,
                Breach::Vector => Rule::Vector,
                Breach::OtherText { .. } | Breach::ProtectedText { .. } => Rule::Site,
            };
            self.code(code, subject, rule, *offset, breach.to_string());
        }
    }

    /// What can be seen in the code without executing it.
    fn reachable(&mut self, code: &Code<'_>, subject: &Subject, reach: &Reach) {
        for offset in reach.instructions.keys() {
            if code.vector_at(*offset) {
                self.code(code, subject, Rule::Vector, Some(*offset), Breach::Vector.to_string());
            }
        }
        if reach.cut_short {
            self.code(code, subject, Rule::Undecided, None, OUT_OF_FUEL);
        }
        for (offset, target) in &reach.leaves {
            let detail = format!("branches out of the image, to offset {target:X}h");
            self.code(code, subject, Rule::Code, Some(*offset), detail);
        }
        for offset in &reach.unreadable {
            self.code(code, subject, Rule::Code, Some(*offset), "no instruction can be read here");
        }
        for offset in &reach.unresolved {
            let detail = "cannot decide where this branch leads: no execution came here";
            self.code(code, subject, Rule::Undecided, Some(*offset), detail);
        }
    }
}

/// What a violation is in.
#[derive(Clone, Copy, Debug)]
struct Subject {
    name: &'static str,
    call: Option<u32>,
}

impl Subject {
    fn function(function: Function) -> Self {
        Self { name: function.name, call: function.number }
    }

    /// A call of the ROM's revision.
    fn call(interface: Option<&Interface>, number: u32) -> Self {
        let call = interface.and_then(|interface| interface.revision.call(number));
        Self { name: call.map_or("call", |call| call.name), call: Some(number) }
    }
}

impl Rule {
    /// Why the rule says nothing about ROMs of a revision; `None` where it does.
    #[must_use]
    pub const fn not_applicable(self, interface: &Interface) -> Option<&'static str> {
        let slots = interface.revision.has_slots();
        match self {
            Self::Slot | Self::Copy if !slots => Some("revision 3.0 has no slots"),
            Self::License | Self::VirtualTop if slots => {
                Some("the field is reserved in revision 13.x")
            }
            Self::Group if slots => Some("in revision 13.x every call has a slot"),
            Self::GetReloc | Self::Answer | Self::Constancy if interface.lookup.is_none() => {
                Some("before revision 13.3 there is nobody to ask")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// An instruction as a reader knows it.
#[must_use]
pub fn disassemble(instruction: &Instruction) -> String {
    let mut text = String::new();
    formatter().format(instruction, &mut text);
    text
}

/// The instructions at a call site as a reader knows them.
#[must_use]
pub fn at_site(instructions: &[Instruction]) -> String {
    instructions.iter().map(disassemble).collect::<Vec<_>>().join("; ")
}

/// Intel's syntax, as the code of this project is written.
#[must_use]
pub fn formatter() -> IntelFormatter {
    let mut formatter = IntelFormatter::new();
    let options = formatter.options_mut();
    options.set_space_after_operand_separator(true);
    options.set_branch_leading_zeros(false);
    options.set_small_hex_numbers_in_decimal(true);
    formatter
}

/// Holds a ROM against every rule.
#[must_use]
pub fn verify(rom: &Rom) -> Report {
    verify_within(rom, FUEL)
}

/// [`verify`] with a budget of its own: what it does not reach is [`Rule::Undecided`].
#[must_use]
pub fn verify_within(rom: &Rom, fuel: u64) -> Report {
    let mut report = Report::default();
    structure::check(rom, &mut report);
    let Ok(interface) = rom.interface() else {
        report.note(
            "image",
            "the calls of another revision cannot be asked for: they were not looked at",
        );
        return report;
    };
    report.interface = Some(interface);
    report.not_applicable = Rule::ALL
        .iter()
        .filter_map(|rule| {
            Some(NotApplicable { rule: *rule, reason: rule.not_applicable(&interface)? })
        })
        .collect();
    let code = Code::new(rom.image(), fuel);
    answering::check_init(&code, &interface, &mut report);
    let high = table(&code, &interface, HIGH_BASE);
    let low = table(&code, &interface, LOW_BASE);
    answering::check(&code, &interface, &high, &low, &mut report);
    calls::check(&code, &interface, &high, &mut report);
    report.table = Some(high);
    report
        .violations
        .sort_by_key(|found| (found.call.is_some(), found.call, found.rule, found.offset));
    report
}
