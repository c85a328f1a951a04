//! Two ROMs compared by what they mean to a guest, not by their bytes.

use super::answers;
use super::flow::{Step, steps};
use super::interface::Interface;
use super::machine::Code;
use super::reach::{Reach, reach};
use super::rom::{ReadError, Rom};
use super::survey::{CallFacts, CodeFacts, Elsewhere, Header, Pci, Pnp, SiteFacts, Survey, survey};
use super::trial::Placement;
use crate::table::{Align, BAD, Cell, DIM, GOOD, HEAD, PLAIN, Table};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt::Write;
use vmi_abi::RelocationType;

/// The version of the JSON form; it rises when a field changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// Instructions that the comparison of code may execute in all, for each ROM.
const FUEL: u64 = 3_000_000;

/// Places of a table of common steps; beyond, two listings stand side by side as they are.
const ALIGNED: usize = 1 << 20;

/// What differs between two ROMs.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// [`SCHEMA_VERSION`].
    pub version: u32,
    /// Whether a guest could not tell one from the other by what was compared.
    pub same: bool,
    /// Fields of the header and its structures that differ.
    pub header: Vec<Field>,
    /// `vmi_init` and all calls of either, by name.
    pub calls: Vec<CallDifference>,
}

/// A value that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// In the first ROM.
    pub a: String,
    /// In the second.
    pub b: String,
}

/// How two pieces of code compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Likeness {
    /// Neither ROM has code for the call.
    NoCode,
    /// The same bytes, at the same distance from each other.
    SameBytes,
    /// The same instructions, placed or encoded in another way.
    SameInstructions,
    /// Other instructions.
    Different,
    /// Only one ROM has code.
    OneSided,
}

/// A call in both ROMs.
#[derive(Clone, Debug, Serialize)]
pub struct CallDifference {
    /// Its name.
    pub name: &'static str,
    /// Its number in each ROM; `None` for `vmi_init`, or where the revision lacks the call.
    pub numbers: [Option<u32>; 2],
    /// How its code compares.
    pub code: Likeness,
    /// The answer, and facts about the code that the contract is about, where they differ.
    pub fields: Vec<Field>,
    /// Both listings, step by step; only of code that differs.
    pub listing: Vec<Row>,
}

/// A row of two listings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// In the first ROM.
    pub a: Option<Place>,
    /// In the second.
    pub b: Option<Place>,
}

/// An instruction of a listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Offset in the image.
    pub offset: usize,
    /// The instruction; targets of branches are numbers of steps.
    pub text: String,
}

impl CallDifference {
    /// Whether the call means the same in both.
    #[must_use]
    pub fn is_same(&self) -> bool {
        self.fields.is_empty() && !matches!(self.code, Likeness::Different | Likeness::OneSided)
    }
}

/// Compares two ROMs, both executed at a linear base.
///
/// # Errors
///
/// One of them has a revision that cannot be looked at.
pub fn difference(a: &Rom, b: &Rom, base: u32) -> Result<Difference, ReadError> {
    let surveys = [survey(a, base)?, survey(b, base)?];
    let interfaces = [a.interface()?, b.interface()?];
    let codes = [Code::new(a.image(), FUEL), Code::new(b.image(), FUEL)];
    let header = header(&surveys);
    let mut calls = Vec::new();
    let [first, second] = &surveys;
    // Where Init is a call of both it is compared as one.
    let init_apart = interfaces.iter().any(|interface| interface.init.number.is_none());
    if init_apart {
        calls.push(init(&codes, &interfaces, base));
    }
    let is_compared = |call: &&CallFacts| {
        let is_init = |interface: &Interface| interface.init.name == call.name;
        !(init_apart && interfaces.iter().any(is_init))
    };
    for call in first.calls.iter().filter(is_compared) {
        let other = second.calls.iter().find(|other| other.name == call.name);
        calls.push(compare_call([Some(call), other], &codes));
    }
    for call in second.calls.iter().filter(is_compared) {
        if !first.calls.iter().any(|other| other.name == call.name) {
            calls.push(compare_call([None, Some(call)], &codes));
        }
    }
    let same = header.is_empty() && calls.iter().all(CallDifference::is_same);
    Ok(Difference { version: SCHEMA_VERSION, same, header, calls })
}

/// Collects the values that differ.
struct Fields(Vec<Field>);

impl Fields {
    fn add(&mut self, name: &'static str, a: impl Into<String>, b: impl Into<String>) {
        let (a, b) = (a.into(), b.into());
        if a != b {
            self.0.push(Field { name, a, b });
        }
    }

    fn each<T>(&mut self, name: &'static str, pair: [&T; 2], show: impl Fn(&T) -> String) {
        self.add(name, show(pair[0]), show(pair[1]));
    }
}

fn header(surveys: &[Survey; 2]) -> Vec<Field> {
    let mut fields = Fields(Vec::new());
    let [a, b] = surveys;
    let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
    let pair: [&Header; 2] = [&a.header, &b.header];
    fields.each("interface", pair, |h| format!("{}.{}", h.revision_major, h.revision_minor));
    fields.each("image bytes", pair, |h| h.image_bytes.to_string());
    fields.each("checksum", pair, |h| match h.byte_sum {
        0 => "right".to_owned(),
        _ => "wrong".to_owned(),
    });
    fields.each("licence", pair, |h| text(&h.license));
    fields.each("virtual_top", pair, |h| format!("{:08X}h", h.virtual_top));
    fields.each("jump_slots", pair, |h| h.jump_slots.to_string());
    // Where a structure lies means nothing, what it says does.
    let pci: [&Option<Pci>; 2] = [&a.pci, &b.pci];
    let part = |show: fn(&Pci) -> String| {
        move |found: &Option<Pci>| found.as_ref().map_or("no PCIR".to_owned(), show)
    };
    fields.each("PCIR device", pci, part(|pci| format!("{:04x}:{:04x}", pci.vendor, pci.device)));
    fields.each(
        "PCIR class",
        pci,
        part(|pci| pci.class.map(|byte| format!("{byte:02x}")).concat()),
    );
    fields.each(
        "PCIR version",
        pci,
        part(|pci| pci.version.map(|part| part.to_string()).join(".")),
    );
    fields.each("PCIR image bytes", pci, part(|pci| pci.image_bytes.to_string()));
    fields.each("PCIR code type", pci, part(|pci| pci.code_type.to_string()));
    fields.each("PCIR last image", pci, part(|pci| pci.last_image.to_string()));
    let pnp: [&Option<Pnp>; 2] = [&a.pnp, &b.pnp];
    fields.each("$PnP", pnp, |found| match found {
        None => "none".to_owned(),
        Some(pnp) if pnp.byte_sum == Some(0) => "checksum right".to_owned(),
        Some(_) => "checksum wrong".to_owned(),
    });
    let string = |get: fn(&Pnp) -> &Option<String>| {
        move |found: &Option<Pnp>| {
            found.as_ref().and_then(|pnp| get(pnp).clone()).unwrap_or_default()
        }
    };
    fields.each("manufacturer", pnp, string(|pnp| &pnp.manufacturer));
    fields.each("product", pnp, string(|pnp| &pnp.product));
    fields.each("vmi_init", [a, b], |survey| match survey.vmi_init_result {
        Some(result) => format!("EAX = {result:X}h"),
        None => "did not return".to_owned(),
    });
    fields.0
}

fn init(codes: &[Code<'_>; 2], interfaces: &[Interface; 2], base: u32) -> CallDifference {
    let follow = |code: &Code<'_>, interface: &Interface| {
        let (machine, _) = answers::initialise(code, interface, Placement::whole(base));
        let executed = machine.trace.offsets.iter().copied().collect();
        reach(code, interface.init.offset, &executed, false)
    };
    let ([a, b], [first, second]) = (codes, interfaces);
    let reached = [follow(a, first), follow(b, second)];
    let (code, listing) = compare_code(&reached, [first.init.offset, second.init.offset], codes);
    CallDifference { name: "vmi_init", numbers: [None; 2], code, fields: Vec::new(), listing }
}

fn compare_call(pair: [Option<&CallFacts>; 2], codes: &[Code<'_>; 2]) -> CallDifference {
    let mut fields = Fields(Vec::new());
    fields.each("answer", [&pair[0], &pair[1]], |call| match call {
        None => "no such call in this revision".to_owned(),
        // Told so or not, the guest calls the slot.
        Some(call)
            if call.slot.is_some() && call.answer_type == Some(RelocationType::CALL_REL.0) =>
        {
            "slot".to_owned()
        }
        Some(call) => call.answer_text(),
    });
    let beside = |place: Option<&Elsewhere>| {
        place.map_or("none".to_owned(), |place| {
            let lines = place.code.listing.iter().map(|line| line.text.as_str());
            lines.collect::<Vec<_>>().join("; ")
        })
    };
    fields.each("code beside the slot", [&pair[0], &pair[1]], |call| {
        beside(call.and_then(|call| call.elsewhere.as_ref()))
    });
    fields.each("code with KEEP_SITE", [&pair[0], &pair[1]], |call| {
        beside(call.and_then(|call| call.keep_site.as_ref()))
    });
    fields.each("at the call site", [&pair[0], &pair[1]], |call| {
        let site = call.and_then(|call| call.code.as_ref()?.site.as_ref());
        site.map_or("the call".to_owned(), SiteFacts::text)
    });
    let part = |place: usize| {
        let call: &CallFacts = pair[place]?;
        Some((call.code.as_ref()?, call.offset?, &codes[place]))
    };
    let (code, listing) = match (part(0), part(1)) {
        (None, None) => (Likeness::NoCode, Vec::new()),
        (Some((a, a_entry, a_code)), Some((b, b_entry, b_code))) => {
            let reached = [again(a, a_entry, a_code), again(b, b_entry, b_code)];
            let (likeness, listing) = compare_code(&reached, [a_entry, b_entry], codes);
            if likeness == Likeness::Different {
                facts(&mut fields, [a, b]);
            }
            (likeness, listing)
        }
        _ => (Likeness::OneSided, Vec::new()),
    };
    let name = pair.iter().flatten().next().map_or("", |call| call.name);
    let numbers = pair.map(|call| call.map(|call| call.number));
    CallDifference { name, numbers, code, fields: fields.0, listing }
}

/// What the survey found, as instructions.
fn again(facts: &CodeFacts, entry: usize, code: &Code<'_>) -> Reach {
    let executed: BTreeSet<usize> =
        facts.listing.iter().filter(|line| line.executed).map(|line| line.offset).collect();
    reach(code, entry, &executed, facts.cut_short)
}

fn facts(fields: &mut Fields, pair: [&CodeFacts; 2]) {
    let list = |names: Vec<&str>| match names.is_empty() {
        true => "none".to_owned(),
        false => names.join(" "),
    };
    fields.each("registers written", pair, |code| list(code.written.clone()));
    fields.each("bytes of stack", pair, |code| code.stack_bytes.to_string());
    fields.each("system instructions", pair, |code| {
        list(code.system.iter().map(String::as_str).collect())
    });
}

fn compare_code(
    reached: &[Reach; 2],
    entries: [usize; 2],
    codes: &[Code<'_>; 2],
) -> (Likeness, Vec<Row>) {
    let bytes = |place: usize| -> Vec<(usize, &[u8])> {
        let Some(instructions) = reached.get(place).map(|reach| &reach.instructions) else {
            return Vec::new();
        };
        instructions
            .iter()
            .map(|(offset, instruction)| {
                let image = codes[place].image();
                let bytes = image.get(*offset..offset + instruction.len()).unwrap_or_default();
                (offset.wrapping_sub(entries[place]), bytes)
            })
            .collect()
    };
    if bytes(0) == bytes(1) {
        return (Likeness::SameBytes, Vec::new());
    }
    let [a, b] = [steps(&reached[0], entries[0]), steps(&reached[1], entries[1])];
    if a.iter().map(|step| &step.text).eq(b.iter().map(|step| &step.text)) {
        return (Likeness::SameInstructions, Vec::new());
    }
    (Likeness::Different, aligned(&a, &b))
}

/// Two listings side by side, with as many common steps in a row as there are.
fn aligned(a: &[Step], b: &[Step]) -> Vec<Row> {
    let place = |step: &Step| Some(Place { offset: step.offset, text: step.text.clone() });
    let width = b.len() + 1;
    if (a.len() + 1).saturating_mul(width) > ALIGNED {
        let rows = a.len().max(b.len());
        return (0..rows)
            .map(|i| Row { a: a.get(i).and_then(place), b: b.get(i).and_then(place) })
            .collect();
    }
    // Common steps from each pair of places on.
    let mut common = vec![0u32; (a.len() + 1) * width];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            common[i * width + j] = if a[i].text == b[j].text {
                common[(i + 1) * width + j + 1] + 1
            } else {
                common[(i + 1) * width + j].max(common[i * width + j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut rows = Vec::new();
    while i < a.len() || j < b.len() {
        let both = i < a.len() && j < b.len();
        if both && a[i].text == b[j].text {
            rows.push(Row { a: place(&a[i]), b: place(&b[j]) });
            (i, j) = (i + 1, j + 1);
        } else if j == b.len()
            || (i < a.len() && common[(i + 1) * width + j] >= common[i * width + j + 1])
        {
            rows.push(Row { a: place(&a[i]), b: None });
            i += 1;
        } else {
            rows.push(Row { a: None, b: place(&b[j]) });
            j += 1;
        }
    }
    rows
}

/// A difference for a reader. Print it through `anstream`.
#[must_use]
pub fn text(difference: &Difference, names: [&str; 2]) -> String {
    let mut text = String::new();
    if !difference.header.is_empty() {
        let mut table = Table::new(&[Align::Left, Align::Left, Align::Left]);
        table.heading(&["header", names[0], names[1]]);
        for field in &difference.header {
            table.row([
                field.name.into(),
                Cell::new(field.a.clone(), BAD),
                Cell::new(field.b.clone(), GOOD),
            ]);
        }
        text.push_str(&table.render());
        text.push('\n');
    }
    let changed = || difference.calls.iter().filter(|call| !call.is_same());
    let mut table = Table::new(&[Align::Right, Align::Left, Align::Left, Align::Left]);
    table.heading(&["nr", "answer", names[0], names[1]]);
    let mut answers = 0;
    for call in changed().filter(|call| call.listing.is_empty()) {
        for field in &call.fields {
            answers += 1;
            table.row([
                numbers(call).into(),
                call.name.into(),
                Cell::new(field.a.clone(), BAD),
                Cell::new(field.b.clone(), GOOD),
            ]);
        }
    }
    if answers != 0 {
        text.push_str(&table.render());
        text.push('\n');
    }
    for call in changed().filter(|call| !call.listing.is_empty()) {
        call_text(&mut text, call, names);
    }
    let count =
        |likeness: Likeness| difference.calls.iter().filter(|call| call.code == likeness).count();
    let _ = writeln!(
        text,
        "code: {} with the same bytes, {} with the same instructions in another place, {} different, \
         {} in one ROM only",
        count(Likeness::SameBytes),
        count(Likeness::SameInstructions),
        count(Likeness::Different),
        count(Likeness::OneSided)
    );
    let (style, verdict) = match difference.same {
        true => (GOOD, "same meaning".to_owned()),
        false => (
            BAD,
            format!(
                "different: header fields {}, calls {}",
                difference.header.len(),
                changed().count()
            ),
        ),
    };
    let _ = writeln!(text, "{}{verdict}{}", style.render(), style.render_reset());
    text
}

/// A call's number, or both where the revisions number it differently.
fn numbers(call: &CallDifference) -> String {
    match call.numbers {
        [Some(a), Some(b)] if a != b => format!("{a}/{b}"),
        [Some(number), _] | [None, Some(number)] => number.to_string(),
        [None, None] => String::new(),
    }
}

fn call_text(text: &mut String, call: &CallDifference, names: [&str; 2]) {
    let title = format!("{} {}", numbers(call), call.name);
    let _ = writeln!(text, "{}{}{}", HEAD.render(), title.trim_start(), HEAD.render_reset());
    let mut table = Table::new(&[Align::Left, Align::Left, Align::Left]);
    table.row([Cell::from(""), Cell::new(names[0], DIM), Cell::new(names[1], DIM)]);
    for field in &call.fields {
        table.row([
            Cell::from(field.name),
            Cell::new(field.a.clone(), BAD),
            Cell::new(field.b.clone(), GOOD),
        ]);
    }
    for row in &call.listing {
        let same = row.a.as_ref().zip(row.b.as_ref()).is_some_and(|(a, b)| a.text == b.text);
        let cell = |place: &Option<Place>, style| {
            let shown = place
                .as_ref()
                .map(|place| format!("{:>5}  {}", format!("{:X}h", place.offset), place.text));
            Cell::new(shown.unwrap_or_default(), if same { PLAIN } else { style })
        };
        let mark = match (same, &row.a) {
            (true, _) => "",
            (false, Some(_)) if row.b.is_some() => "  !",
            (false, Some(_)) => "  -",
            (false, None) => "  +",
        };
        table.row([Cell::new(mark, DIM), cell(&row.a, BAD), cell(&row.b, GOOD)]);
    }
    text.push_str(&table.render());
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::samples::{Lookup, Sample, seal};
    use crate::inspect::{HIGH_BASE, LOW_BASE};
    use iced_x86::code_asm::*;
    use vmi_abi::number;

    fn compared(a: &[u8], b: &[u8]) -> Difference {
        let rom = |image: &[u8]| Rom::parse(image).expect("a ROM");
        difference(&rom(a), &rom(b), HIGH_BASE).expect("of revision 3.0")
    }

    fn of<'a>(difference: &'a Difference, name: &str) -> &'a CallDifference {
        difference.calls.iter().find(|call| call.name == name).expect("a call")
    }

    fn get_cr0() -> Sample {
        let mut sample = Sample::new();
        sample.call(number::GetCR0, |a| {
            a.mov(eax, cr0)?;
            a.ret()
        });
        sample
    }

    #[test]
    fn a_rom_is_like_itself_whatever_finds_its_answers() {
        let image = get_cr0().build();
        assert!(compared(&image, &image).same);
        let chain = get_cr0().lookup(Lookup::Chain).build();
        assert_ne!(image, chain);
        assert!(compared(&image, &chain).same);
        let rom = Rom::parse(&image).expect("a ROM");
        assert!(difference(&rom, &rom, LOW_BASE).expect("of 3.0").same);
    }

    #[test]
    fn code_in_another_place_is_the_same() {
        let image = get_cr0().build();
        let moved = get_cr0()
            .call(number::GetCR0, |a| {
                let (mut there, mut back) = (a.create_label(), a.create_label());
                a.jmp(there)?;
                a.set_label(&mut back)?;
                a.ret()?;
                a.set_label(&mut there)?;
                a.mov(eax, cr0)?;
                a.jmp(back)
            })
            .build();
        let found = compared(&image, &moved);
        assert!(found.same, "{found:#?}");
        assert_eq!(of(&found, "GetCR0").code, Likeness::SameInstructions);
        assert_eq!(of(&found, "IRET").code, Likeness::SameBytes);
        assert_eq!(of(&found, "SetCR0").code, Likeness::NoCode);
    }

    #[test]
    fn other_code_is_shown_side_by_side() {
        let image = get_cr0().build();
        let other = get_cr0()
            .call(number::GetCR0, |a| {
                a.push(ebx)?;
                a.mov(eax, cr0)?;
                a.pop(ebx)?;
                a.ret()
            })
            .build();
        let found = compared(&image, &other);
        let call = of(&found, "GetCR0");
        assert!(!found.same && call.code == Likeness::Different);
        let sides: Vec<_> =
            call.listing.iter().map(|row| (row.a.is_some(), row.b.is_some())).collect();
        assert_eq!(sides, [(false, true), (true, true), (false, true), (true, true)]);
        let fields: Vec<_> = call.fields.iter().map(|field| field.name).collect();
        assert_eq!(fields, ["registers written", "bytes of stack"]);
        assert_eq!(found.calls.iter().filter(|call| !call.is_same()).count(), 1);
        let shown = text(&found, ["a", "b"]);
        assert!(
            shown.contains("push ebx") && shown.contains("different: header fields 0, calls 1")
        );
    }

    #[test]
    fn answers_and_headers_are_compared() {
        let image = Sample::new().build();
        let found = compared(&image, &get_cr0().build());
        let call = of(&found, "GetCR0");
        assert_eq!(call.code, Likeness::OneSided);
        assert_eq!((call.fields[0].a.as_str(), call.fields[0].b.as_str()), ("NONE", "CALL_REL"));
        let found = compared(&image, &Sample::new().license(b"BSD\0").build());
        assert_eq!(found.header.iter().map(|field| field.name).collect::<Vec<_>>(), ["licence"]);
        let mut changed = image.clone();
        changed[16..20].copy_from_slice(&0xff00_0000u32.to_le_bytes());
        assert_eq!(compared(&image, &changed).header.len(), 2, "virtual_top and the checksum");
        seal(&mut changed);
        assert_eq!(compared(&image, &changed).header.len(), 1);
        let init = Sample::new()
            .init(|a| {
                a.mov(eax, 0)?;
                a.ret()
            })
            .build();
        assert_eq!(of(&compared(&image, &init), "vmi_init").code, Likeness::Different);
    }

    #[test]
    fn json_can_be_read_back() {
        let found = compared(&Sample::new().build(), &get_cr0().build());
        let text = serde_json::to_string(&found).expect("text");
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value["version"], SCHEMA_VERSION);
        assert_eq!(value["same"], false);
        assert_eq!(value["calls"].as_array().map(Vec::len), Some(found.calls.len()));
        assert_eq!(value["calls"][0]["code"], "same-bytes");
    }
}
