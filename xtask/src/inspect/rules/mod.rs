//! The contract, held against a ROM.

mod answering;
mod calls;
mod effects;
mod help;
mod structure;

pub use answering::kind_name;
pub use structure::shown as structure_text;

use super::answers::{FUEL, Table, table};
use super::machine::{Breach, Code};
use super::reach::Reach;
use super::rom::Rom;
use super::{HIGH_BASE, LOW_BASE};
use iced_x86::{Formatter, Instruction, IntelFormatter};
use serde::Serialize;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use vmi_abi::{CallNumber, REVISION_3_0};

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
    /// The interface revision is 3.0.
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
    /// `vmi_init` returns 0 and keeps what a function keeps.
    Init = "vmi-init",
    /// `get_reloc` returns for any number and keeps what a function keeps.
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

/// The verdict on a ROM.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Every broken rule.
    pub violations: Vec<Violation>,
    /// What else there is to know.
    pub notes: Vec<Note>,
    /// The answers, if the ROM could be asked.
    pub table: Option<Table>,
    /// Most instructions of a call that were executed at once, by number.
    pub executed: Vec<Option<u64>>,
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
        answering::subject(number).name
    }

    fn note(&mut self, subject: &'static str, detail: impl Into<String>) {
        self.notes.push(Note { subject, detail: detail.into() });
    }

    /// A violation of the image as a whole.
    fn image(&mut self, rule: Rule, offset: Option<usize>, detail: impl Into<String>) {
        let detail = detail.into();
        self.violations.push(Violation {
            rule,
            call: None,
            subject: "image",
            offset,
            instruction: None,
            detail,
        });
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
    fn breaches(&mut self, code: &Code<'_>, subject: &Subject, breaches: &[(usize, Breach)]) {
        for (offset, breach) in breaches {
            let rule = match breach {
                Breach::StoreIntoImage { .. } => Rule::ImageStore,
                Breach::Read { .. } | Breach::Write { .. } => Rule::Memory,
                Breach::Segment { .. } => Rule::Segment,
                Breach::BelowStack { .. } | Breach::CallerStack { .. } => Rule::StackUse,
                Breach::Vector => Rule::Vector,
            };
            self.code(code, subject, rule, Some(*offset), breach.to_string());
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
    const INIT: Self = Self { name: "vmi_init", call: None };
    const GET_RELOC: Self = Self { name: "get_reloc", call: None };
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
    if rom.revision().major != REVISION_3_0.major {
        report.note(
            "image",
            "the calls of another revision cannot be asked for: they were not looked at",
        );
        return report;
    }
    let code = Code::new(rom.image(), fuel);
    answering::check_init(&code, &mut report);
    let high = table(&code, HIGH_BASE);
    let low = table(&code, LOW_BASE);
    answering::check(&code, &high, &low, &mut report);
    calls::check(&code, &high, &mut report);
    report.table = Some(high);
    report
        .violations
        .sort_by_key(|found| (found.call.is_some(), found.call, found.rule, found.offset));
    report
}
