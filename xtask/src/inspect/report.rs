//! Surveys and verdicts as text for a reader. Print it through `anstream`.

use super::interface::Interface;
use super::rules::{NotApplicable, Report, kind_name};
use super::survey::{CallFacts, CodeFacts, Header, Pci, Pnp, SiteFacts, Survey};
use crate::table::{Align, BAD, Cell, DIM, GOOD, HEAD, PLAIN, Table};
use anstyle::Style;
use std::fmt::Write;
use vmi_abi::{RelocationType, Revision};

/// What `inspect` prints of the whole ROM.
#[must_use]
pub fn survey(survey: &Survey) -> String {
    let mut text = head(survey).render();
    text.push('\n');
    text.push_str(&calls(survey).render());
    let answered = survey.calls.iter().filter(|call| call.offset.is_some()).count();
    let _ = write!(text, "\n{answered} of {} calls have code", survey.calls.len());
    if let Some(lookup) = interface(survey).and_then(|interface| interface.lookup) {
        let _ = write!(
            text,
            "; {} takes at most {} instructions for an answer",
            lookup.name, survey.get_reloc_instructions
        );
    }
    text.push_str(".\n");
    if survey.calls.iter().filter_map(|call| call.code.as_ref()).any(|code| code.cut_short) {
        text.push_str("+ more: the execution was ended after a time.\n");
    }
    text
}

fn interface(survey: &Survey) -> Option<Interface> {
    let Header { revision_major: major, revision_minor: minor, .. } = survey.header;
    Interface::of(Revision { major, minor })
}

fn head(survey: &Survey) -> Table {
    let mut table = Table::new(&[Align::Left, Align::Left]);
    let mut line = |name: &str, value: String, style: Style| {
        table.row([Cell::new(name, HEAD), Cell::new(value, style)]);
    };
    let Header { image_bytes, used_bytes, free_bytes, virtual_top, .. } = survey.header;
    let header = &survey.header;
    line("interface", format!("{}.{}", header.revision_major, header.revision_minor), PLAIN);
    line(
        "image",
        format!("{image_bytes} bytes ({image_bytes:X}h): {used_bytes} used, {free_bytes} free"),
        PLAIN,
    );
    if header.file_bytes != image_bytes {
        line("file", format!("{} bytes: not what the length byte says", header.file_bytes), BAD);
    }
    match header.byte_sum {
        0 => line("checksum", "right".to_owned(), GOOD),
        sum => line("checksum", format!("wrong: the bytes add up to {sum:02X}h"), BAD),
    }
    if !interface(survey).is_some_and(|interface| interface.revision.has_slots()) {
        match &header.license {
            Some(license) => line("licence", license.clone(), PLAIN),
            None => line("licence", "none".to_owned(), BAD),
        }
        let top = match virtual_top {
            0 => "0: no hole at the top of linear space".to_owned(),
            top => format!("{top:08X}h: {} bytes reserved", header.reserved_top_bytes),
        };
        line("virtual_top", top, PLAIN);
    }
    line("PCIR", survey.pci.as_ref().map_or("none".to_owned(), pci), PLAIN);
    match &survey.pnp {
        Some(found) => {
            line("$PnP", pnp(found), if found.byte_sum == Some(0) { PLAIN } else { BAD });
            line("manufacturer", found.manufacturer.clone().unwrap_or_default(), PLAIN);
            line("product", found.product.clone().unwrap_or_default(), PLAIN);
        }
        None => line("$PnP", "none".to_owned(), PLAIN),
    }
    let base = survey.base;
    let init = interface(survey).map_or("vmi_init", |interface| interface.init.name);
    match survey.vmi_init_result {
        Some(0) => line(init, format!("EAX = 0, success (image at linear {base:08X}h)"), GOOD),
        Some(result) => line(init, format!("EAX = {result:08X}h, failure"), BAD),
        None => line(init, "did not return".to_owned(), BAD),
    }
    table
}

fn pci(pci: &Pci) -> String {
    let [base, subclass, interface] = pci.class;
    let [major, minor] = pci.version;
    format!(
        "at {:X}h: device {:04x}:{:04x}, class {base:02x}{subclass:02x}{interface:02x}, version {major}.{minor}, \
         {} bytes, code type {}{}",
        pci.offset,
        pci.vendor,
        pci.device,
        pci.image_bytes,
        pci.code_type,
        if pci.last_image { ", last image" } else { "" }
    )
}

fn pnp(pnp: &Pnp) -> String {
    let sum = match pnp.byte_sum {
        Some(0) => "checksum right".to_owned(),
        Some(sum) => format!("checksum wrong: the bytes add up to {sum:02X}h"),
        None => "longer than the image".to_owned(),
    };
    format!("at {:X}h: {sum}", pnp.offset)
}

fn calls(survey: &Survey) -> Table {
    use Align::{Left, Right};
    let of_code: [(&str, Align); 7] = [
        ("offset", Right),
        ("bytes", Right),
        ("instr", Right),
        ("run", Right),
        ("stack", Right),
        ("writes", Left),
        ("system instructions", Left),
    ];
    let mut columns = vec![("nr", Right), ("call", Left), ("answer", Left)];
    columns.extend(of_code);
    // Columns that most ROMs have nothing for.
    let rewrites = survey.calls.iter().any(|call| site(call).is_some());
    if rewrites {
        columns.splice(8..8, [("plain", Right), ("at the site", Left)]);
    }
    let (names, aligns): (Vec<&str>, Vec<Align>) = columns.into_iter().unzip();
    let mut table = Table::new(&aligns);
    table.heading(&names);
    for call in &survey.calls {
        let none = call.answer_type == Some(RelocationType::NONE.0);
        let style = if none { DIM } else { PLAIN };
        let mut cells = vec![
            Cell::new(call.number.to_string(), style),
            Cell::new(call.name, style),
            Cell::new(call.answer_text(), style),
        ];
        if let (Some(offset), Some(code)) = (call.offset, &call.code) {
            let more = if code.cut_short { "+" } else { "" };
            cells.extend([
                Cell::from(format!("{offset:X}h")),
                code.bytes.to_string().into(),
                code.instructions.to_string().into(),
                format!("{}{more}", code.executed).into(),
                code.stack_bytes.to_string().into(),
            ]);
            let site = site(call);
            if rewrites {
                let plain = call.keep_site.as_ref().map(|plain| plain.code.executed.to_string());
                cells.extend([
                    Cell::from(plain.unwrap_or_default()),
                    site.map(SiteFacts::text).unwrap_or_default().into(),
                ]);
            }
            // What rewrites a site touches everything, once; what stands there is what a guest runs.
            let (written, system) = match site {
                Some(site) => (&site.written, &site.system),
                None => (&code.written, &code.system),
            };
            cells.extend([Cell::from(written.join(" ")), system.join(", ").into()]);
        }
        table.row(cells);
    }
    table
}

/// What becomes of a site that a call is made from.
fn site(call: &CallFacts) -> Option<&SiteFacts> {
    call.code.as_ref()?.site.as_ref()
}

/// What `inspect --call` prints.
#[must_use]
pub fn call(call: &CallFacts) -> String {
    let mut text =
        format!("{}{} {}{}\n", HEAD.render(), call.number, call.name, HEAD.render_reset());
    let _ = writeln!(text, "{}", call.summary);
    match (&call.answer, call.slot) {
        (None, Some(slot)) => {
            let _ = writeln!(text, "slot: {slot:X}h");
        }
        (answer, _) => {
            let _ = writeln!(text, "answer: {}", answer.as_deref().unwrap_or("none returned"));
        }
    }
    if let Some(site) = site(call) {
        let _ = writeln!(text, "at its call site: {} ({})", site.text(), site.bytes);
    }
    if let Some(code) = &call.code {
        listing(&mut text, code);
    }
    if let Some(plain) = &call.keep_site {
        let _ = writeln!(text, "\nwith KEEP_SITE: code at {:X}h", plain.offset);
        listing(&mut text, &plain.code);
    }
    if let Some(elsewhere) = &call.elsewhere {
        let _ =
            writeln!(text, "\nthe answer points to {:X}h instead of the slot", elsewhere.offset);
        listing(&mut text, &elsewhere.code);
    }
    text
}

fn listing(text: &mut String, code: &CodeFacts) {
    let _ = writeln!(
        text,
        "{} bytes, {} instructions, at most {}{} executed, {} bytes of stack\n",
        code.bytes,
        code.instructions,
        code.executed,
        if code.cut_short { " and more" } else { "" },
        code.stack_bytes
    );
    let mut table = Table::new(&[Align::Right, Align::Left, Align::Left, Align::Left]);
    for line in &code.listing {
        let (style, remark) = if line.executed { (PLAIN, "") } else { (DIM, "; not executed") };
        table.row([
            Cell::new(format!("{:X}h", line.offset), DIM),
            Cell::new(line.bytes.clone(), DIM),
            Cell::new(line.text.clone(), style),
            Cell::new(remark, DIM),
        ]);
    }
    text.push_str(&table.render());
}

/// What `verify` prints.
#[must_use]
pub fn verdict(report: &Report) -> String {
    let mut text = String::new();
    text.push_str(&answered(report).render());
    if !text.is_empty() {
        text.push('\n');
    }
    for violation in &report.violations {
        let place = match (violation.offset, &violation.instruction) {
            (Some(offset), Some(instruction)) => format!(" at {offset:X}h `{instruction}`"),
            (Some(offset), None) => format!(" at {offset:X}h"),
            _ => String::new(),
        };
        let number = violation.call.map_or(String::new(), |number| format!("call {number} "));
        let _ = writeln!(
            text,
            "{}{}{}: {number}{}{place}: {}",
            BAD.render(),
            violation.rule,
            BAD.render_reset(),
            violation.subject,
            violation.detail
        );
    }
    for note in &report.notes {
        let _ = writeln!(
            text,
            "{}note{}: {}: {}",
            DIM.render(),
            DIM.render_reset(),
            note.subject,
            note.detail
        );
    }
    let slots = report.interface.filter(|interface| interface.revision.has_slots());
    if slots.is_some() {
        text.push_str(&not_applicable(&report.not_applicable));
    }
    let executed = report.executed.iter().flatten().count();
    let asked = match slots {
        Some(interface) => format!("{} slots", interface.calls().count()),
        None => {
            let answers = report.table.iter().flat_map(|table| &table.answers);
            format!("{} calls answered", answers.flatten().count())
        }
    };
    let (style, verdict) = match report.violations.len() {
        0 => (GOOD, "clean".to_owned()),
        1 => (BAD, "1 violation".to_owned()),
        count => (BAD, format!("{count} violations")),
    };
    let _ = writeln!(
        text,
        "{}{verdict}{}: {asked}, {executed} of them with code that was executed",
        style.render(),
        style.render_reset()
    );
    text
}

/// Instructions of each call that has code.
fn answered(report: &Report) -> Table {
    let mut table =
        Table::new(&[Align::Right, Align::Left, Align::Left, Align::Right, Align::Right]);
    let (Some(found), Some(interface)) = (&report.table, &report.interface) else { return table };
    let mut rows = interface.calls().filter_map(|(number, call)| {
        let executed = report.executed.get(number as usize).copied().flatten()?;
        let entries = interface.entries(found, number, call);
        let places: Vec<String> =
            entries.iter().map(|entry| format!("{:X}h", entry.offset)).collect();
        let answer = found.answer_at(number).map_or("slot".to_owned(), |a| kind_name(a.kind));
        Some([
            number.to_string().into(),
            call.name.into(),
            answer.into(),
            places.join(" ").into(),
            executed.to_string().into(),
        ])
    });
    let Some(first) = rows.next() else { return table };
    table.heading(&["nr", "call", "answer", "offset", "instructions"]);
    for row in std::iter::once(first).chain(rows) {
        table.row(row);
    }
    table
}

/// Rules that a ROM of 13.x was not held against, a line for each reason.
fn not_applicable(rules: &[NotApplicable]) -> String {
    let mut lines: Vec<(&str, Vec<&str>)> = Vec::new();
    for NotApplicable { rule, reason } in rules {
        match lines.iter_mut().find(|(known, _)| known == reason) {
            Some((_, names)) => names.push(rule.name()),
            None => lines.push((*reason, vec![rule.name()])),
        }
    }
    let mut text = String::new();
    for (reason, names) in lines {
        let (on, off) = (DIM.render(), DIM.render_reset());
        let _ = writeln!(text, "{on}not applicable{off}: {}: {reason}", names.join(", "));
    }
    text
}
