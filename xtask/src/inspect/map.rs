//! Where every byte of an image goes, and what lies in the option-ROM area: as text and as a picture.

use super::answers::{ASK_BUDGET, INIT_BUDGET};
use super::interface::Function;
use super::machine::{Code, Stop};
use super::reach::reach;
use super::rom::{Rom, UD2};
use super::survey::Survey;
use super::trial::{self, Placement};
use crate::table::{Align, Cell, DIM, HEAD, PLAIN, Table};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic, OpKind, Register};
use std::collections::BTreeSet;
use std::fmt::Write;
use vmi_abi::header::{PciHeader, PnpHeader, RomHeader};

/// Instructions that may be executed to see what is read.
const FUEL: u64 = 2_000_000;

/// The option-ROM area: what firmware and guests scan.
pub const AREA: std::ops::Range<u32> = 0xc_0000..0xf_0000;

/// Equal bytes in a row that nobody uses count as padding from this many on.
const PADDING: usize = 4;

/// Bytes between two that are read count as read with them up to this many.
const ROW_GAP: usize = 8;

/// Printable characters in a row that nobody uses count as text from this many on.
const TEXT: usize = 6;

/// What bytes are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Fields of the header.
    Header,
    /// The `PCIR` structure.
    Pcir,
    /// The `$PnP` structure.
    Pnp,
    /// A string that a structure points to.
    String,
    /// 16-bit code that the BIOS runs at start-up.
    Post,
    /// Code of `vmi_init`.
    Init,
    /// Code of `get_reloc`.
    Lookup,
    /// Data that code was seen to read.
    Data,
    /// Code of a call.
    Call,
    /// The byte that makes the sum right.
    Checksum,
    /// The same byte over and over.
    Padding,
    /// Nothing is known of it.
    Unknown,
}

impl Kind {
    /// Every kind, in the order of the legend.
    pub const ALL: [Self; 12] = [
        Self::Header,
        Self::Pcir,
        Self::Pnp,
        Self::String,
        Self::Post,
        Self::Init,
        Self::Lookup,
        Self::Data,
        Self::Call,
        Self::Checksum,
        Self::Padding,
        Self::Unknown,
    ];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Pcir => "PCIR",
            Self::Pnp => "$PnP",
            Self::String => "strings",
            Self::Post => "16-bit entry",
            Self::Init => "vmi_init",
            Self::Lookup => "get_reloc",
            Self::Data => "tables and data read",
            Self::Call => "calls",
            Self::Checksum => "checksum",
            Self::Padding => "padding",
            Self::Unknown => "unknown",
        }
    }

    /// Its colour: of a middle lightness, so that black text on it can be read and it stands out from white and black.
    const fn colour(self) -> &'static str {
        match self {
            Self::Header => "#7aa6dc",
            Self::Pcir => "#57b8b8",
            Self::Pnp => "#6cc49a",
            Self::String => "#b9c95e",
            Self::Post => "#e0b34f",
            Self::Init => "#e8935a",
            Self::Lookup => "#e07a7a",
            Self::Data => "#d68fb8",
            Self::Call => "#a994dd",
            Self::Checksum => "#8f8f8f",
            Self::Padding => "#c9ccd1",
            Self::Unknown => "#f0e442",
        }
    }
}

/// Bytes of one kind in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Offset of the first byte.
    pub start: usize,
    /// Offset behind the last byte.
    pub end: usize,
    /// What they are for.
    pub kind: Kind,
    /// Which of that kind.
    pub label: String,
}

/// Where every byte of an image goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    /// Spans without gaps, in order.
    pub spans: Vec<Span>,
    /// Whether the budget ran out, so that bytes which code is or reads may stand for something else.
    pub cut_short: bool,
}

/// A ROM in the option-ROM area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Physical address of its first byte.
    pub address: u32,
    /// Bytes that it claims.
    pub length: usize,
    /// What it is.
    pub label: String,
}

/// The owner of each byte while the map is made.
struct Paint {
    owners: Vec<Option<(Kind, usize)>>,
    labels: Vec<String>,
}

impl Paint {
    /// Gives bytes to an owner, as far as they have none yet.
    fn give(&mut self, range: std::ops::Range<usize>, kind: Kind, label: &str) {
        let number = match self.labels.iter().rposition(|known| known == label) {
            Some(number) => number,
            None => {
                self.labels.push(label.to_owned());
                self.labels.len() - 1
            }
        };
        let end = range.end.min(self.owners.len());
        for owner in self.owners.get_mut(range.start.min(end)..end).unwrap_or_default() {
            owner.get_or_insert((kind, number));
        }
    }

    fn is_free(&self, place: usize) -> bool {
        self.owners.get(place).is_some_and(Option::is_none)
    }
}

/// Where every byte of the image goes.
#[must_use]
pub fn map(rom: &Rom, survey: &Survey) -> Map {
    map_within(rom, survey, FUEL)
}

fn map_within(rom: &Rom, survey: &Survey, fuel: u64) -> Map {
    let image = rom.image();
    let code = Code::new(image, fuel);
    let mut paint = Paint { owners: vec![None; image.len()], labels: Vec::new() };
    paint_code(&mut paint, &code, rom, survey);
    let cut_short = !code.follow();
    paint_structures(&mut paint, rom);
    paint_rest(&mut paint, image);
    let mut spans: Vec<Span> = Vec::new();
    for (place, owner) in paint.owners.iter().enumerate() {
        let (kind, number) = owner.unwrap_or((Kind::Unknown, usize::MAX));
        let label = paint.labels.get(number).map_or("", String::as_str);
        match spans.last_mut() {
            Some(last) if last.kind == kind && last.label == label => last.end = place + 1,
            _ => spans.push(Span { start: place, end: place + 1, kind, label: label.to_owned() }),
        }
    }
    Map { spans, cut_short }
}

fn paint_code(paint: &mut Paint, code: &Code<'_>, rom: &Rom, survey: &Survey) {
    let mut read = BTreeSet::new();
    let mut functions = Vec::new();
    if let Ok(interface) = rom.interface() {
        let numbers = interface.calls().map(|(number, _)| number).collect();
        functions.push((interface.init, Kind::Init, vec![0], INIT_BUDGET));
        functions.extend(interface.lookup.map(|by| (by, Kind::Lookup, numbers, ASK_BUDGET)));
    }
    for (Function { name, offset: entry, .. }, kind, numbers, budget) in functions {
        let mut executed = BTreeSet::new();
        for number in numbers {
            let mut start = trial::plain(code, Placement::whole(survey.base), entry, 0);
            start.machine.registers.set(Register::EAX, number);
            watch(code, &mut start.machine, budget, &mut read);
            executed.extend(start.machine.trace.offsets.iter().copied());
        }
        for (offset, instruction) in &reach(code, entry, &executed, false).instructions {
            paint.give(*offset..offset + instruction.len(), kind, name);
        }
    }
    for call in &survey.calls {
        let label = format!("{} {}", call.number, call.name);
        let elsewhere = call.elsewhere.iter().chain(&call.keep_site).map(|other| &other.code);
        for line in call.code.iter().chain(elsewhere).flat_map(|code| &code.listing) {
            // Two digits and a blank for each byte but the last.
            let length = line.bytes.len().div_ceil(3);
            paint.give(line.offset..line.offset + length, Kind::Call, &label);
        }
    }
    paint_post(paint, code.image());
    // A row of a table is read in part where the answer has no address.
    let mut before: Option<usize> = None;
    for (offset, size) in read {
        let start = before.filter(|end| *end < offset && offset - end < ROW_GAP).unwrap_or(offset);
        paint.give(start..offset + size, Kind::Data, "read by get_reloc or vmi_init");
        before = Some(before.unwrap_or(0).max(offset + size));
    }
}

/// Executes, and notes where in the image data is read.
fn watch(
    code: &Code<'_>,
    machine: &mut super::machine::Machine<'_>,
    budget: u64,
    read: &mut BTreeSet<(usize, usize)>,
) {
    for _ in 0..budget {
        let at = machine.memory.offset_of(machine.registers.eip);
        let Some(instruction) = at.and_then(|offset| code.at(offset)) else { return };
        let size = instruction.memory_size().size();
        let is_read = instruction.mnemonic() != Mnemonic::Lea && size != 0;
        for operand in 0..instruction.op_count() {
            if !is_read || instruction.op_kind(operand) != OpKind::Memory {
                continue;
            }
            let address = instruction.virtual_address(operand, 0, |register, _, _| {
                // Segments count as flat.
                let flat = register.is_segment_register();
                Some(if flat { 0 } else { u64::from(machine.registers.get(register)) })
            });
            let offset = address.and_then(|address| machine.memory.offset_of(address as u32));
            read.extend(offset.map(|offset| (offset, size)));
        }
        if machine.run(1) != Stop::Budget {
            return;
        }
    }
}

/// The BIOS calls offset 3 with CS at the image's start, so that offsets are instruction pointers.
fn paint_post(paint: &mut Paint, image: &[u8]) {
    let entry = std::mem::offset_of!(RomHeader, rom_entry);
    let mut todo = vec![entry];
    let mut seen = BTreeSet::new();
    while let Some(offset) = todo.pop() {
        let free = paint.is_free(offset) && seen.insert(offset);
        let Some(bytes) = image.get(offset..).filter(|_| free) else { continue };
        let mut decoder = Decoder::with_ip(16, bytes, offset as u64, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            continue;
        }
        let next = offset + instruction.len();
        paint.give(offset..next, Kind::Post, "16-bit entry");
        if instruction.op0_kind() == OpKind::NearBranch16 {
            todo.push(usize::from(instruction.near_branch16()));
        }
        let goes_on = !matches!(
            instruction.flow_control(),
            FlowControl::Return
                | FlowControl::UnconditionalBranch
                | FlowControl::IndirectBranch
                | FlowControl::Exception
        );
        if goes_on {
            todo.push(next);
        }
    }
}

fn paint_structures(paint: &mut Paint, rom: &Rom) {
    let string = |paint: &mut Paint, offset: u16, name: &str| {
        if let Some(text) = rom.string(offset).filter(|_| offset != 0) {
            let start = usize::from(offset);
            let label = format!("{name} \"{}\"", super::rules::structure_text(text));
            paint.give(start..start + text.len() + 1, Kind::String, &label);
        }
    };
    if rom.pci().is_some() {
        let start = usize::from(rom.header().pci_header_offs.get());
        paint.give(start..start + size_of::<PciHeader>(), Kind::Pcir, "PCIR");
    }
    if let Some(pnp) = rom.pnp() {
        let start = usize::from(rom.header().pnp_header_offs.get());
        paint.give(start..start + size_of::<PnpHeader>(), Kind::Pnp, "$PnP");
        string(paint, pnp.manufacturer.get(), "manufacturer");
        string(paint, pnp.product.get(), "product");
    }
    // In 13.x the slots begin where 3.0 has its two entries.
    let end = match rom.interface() {
        Ok(interface) if interface.revision.has_slots() => interface.init.offset,
        _ => {
            string(paint, rom.header().license_offs.get(), "licence");
            size_of::<RomHeader>()
        }
    };
    paint.give(0..end, Kind::Header, "header");
}

fn paint_rest(paint: &mut Paint, image: &[u8]) {
    // What the 16-bit code prints, for instance.
    let mut start = 0;
    while start < image.len() {
        let is_text = |byte: u8| matches!(byte, b' '..=b'~' | b'\r' | b'\n');
        let run = image[start..].iter().enumerate();
        let run = run.take_while(|(i, byte)| is_text(**byte) && paint.is_free(start + i)).count();
        if run >= TEXT {
            let shown = super::rules::structure_text(&image[start..start + run]);
            let end = start + run + usize::from(image.get(start + run) == Some(&0));
            paint.give(start..end, Kind::String, &format!("text \"{shown}\""));
        }
        start += run.max(1);
    }
    if let Some(last) = image.len().checked_sub(1) {
        paint.give(last..last + 1, Kind::Checksum, "checksum");
    }
    let mut start = 0;
    while let Some(byte) = image.get(start) {
        let run = (start..image.len())
            .take_while(|place| paint.is_free(*place) && image.get(*place) == Some(byte))
            .count();
        if run >= PADDING {
            paint.give(start..start + run, Kind::Padding, &format!("{byte:02X}h"));
        }
        start += run.max(1);
    }
    let mut start = 0;
    while start < image.len() {
        let pairs = image.get(start..).unwrap_or_default().chunks_exact(UD2.len());
        let run = UD2.len() * pairs.take_while(|pair| **pair == UD2).count();
        // The checksum at the end may have taken the place of a second half.
        let half = run > 0 && start + run + UD2.len() == image.len();
        let run = run + usize::from(half && image.get(start + run) == UD2.first());
        let free = (start..start + run).take_while(|place| paint.is_free(*place)).count();
        if free >= PADDING {
            paint.give(start..start + free, Kind::Padding, "UD2");
        }
        start += free.max(1);
    }
    // A byte or two that align the next thing.
    for place in 0..image.len() {
        let alone =
            paint.is_free(place) && matches!(image.get(place), Some(0 | 0x90 | 0xcc | 0xff));
        let known = |place: Option<usize>| {
            place.is_none_or(|place| paint.owners.get(place).is_none_or(Option::is_some))
        };
        let end = (place..image.len()).find(|next| image.get(*next) != image.get(place));
        if alone && known(place.checked_sub(1)) && known(end) {
            let label = image.get(place).map_or(String::new(), |byte| format!("{byte:02X}h"));
            paint.give(place..place + 1, Kind::Padding, &label);
        }
    }
    for place in 0..image.len() {
        paint.give(place..place + 1, Kind::Unknown, "nothing was seen to use it");
    }
}

/// Bytes of each kind that occurs.
fn totals(spans: &[Span]) -> Vec<(Kind, usize)> {
    Kind::ALL
        .iter()
        .map(|kind| {
            let of_kind = spans.iter().filter(|span| span.kind == *kind);
            (*kind, of_kind.map(|span| span.end - span.start).sum())
        })
        .filter(|(_, bytes)| *bytes != 0)
        .collect()
}

/// The map for a reader. Print it through `anstream`.
#[must_use]
pub fn text(spans: &[Span]) -> String {
    let mut table =
        Table::new(&[Align::Right, Align::Right, Align::Right, Align::Left, Align::Left]);
    table.heading(&["from", "to", "bytes", "for", ""]);
    for span in spans {
        let style = if span.kind == Kind::Padding { DIM } else { PLAIN };
        let label = if span.label == span.kind.name() { "" } else { &span.label };
        table.row([
            Cell::new(format!("{:X}h", span.start), style),
            Cell::new(format!("{:X}h", span.end - 1), style),
            Cell::new((span.end - span.start).to_string(), style),
            Cell::new(span.kind.name(), style),
            Cell::new(label, style),
        ]);
    }
    let mut sums = Table::new(&[Align::Left, Align::Right]);
    for (kind, bytes) in totals(spans) {
        sums.row([Cell::new(kind.name(), HEAD), bytes.to_string().into()]);
    }
    table.render() + "\n" + &sums.render()
}

/// What lies in the option-ROM area, for a reader: ROMs by address, and what is free between them.
#[must_use]
pub fn area_text(roms: &[Placed]) -> String {
    let mut table = Table::new(&[Align::Right, Align::Right, Align::Right, Align::Left]);
    table.heading(&["from", "to", "bytes", "option-ROM area"]);
    let mut row = |from: u32, to: u32, label: &str, style| {
        table.row([
            Cell::new(format!("{from:X}h"), style),
            Cell::new(format!("{:X}h", to.wrapping_sub(1)), style),
            Cell::new(to.wrapping_sub(from).to_string(), style),
            Cell::new(label, style),
        ]);
    };
    let mut at = AREA.start;
    for (from, to, rom) in inside(roms) {
        if from > at {
            row(at, from, "no ROM found", DIM);
        }
        row(from, to, &rom.label, PLAIN);
        at = at.max(to);
    }
    if at < AREA.end {
        row(at, AREA.end, "no ROM found", DIM);
    }
    table.render()
}

/// The ROMs in the area, by address, cut to it.
fn inside(roms: &[Placed]) -> Vec<(u32, u32, &Placed)> {
    let mut found: Vec<_> = roms
        .iter()
        .map(|rom| {
            let length = u32::try_from(rom.length).unwrap_or(u32::MAX);
            let end = rom.address.saturating_add(length).min(AREA.end);
            (rom.address.max(AREA.start), end, rom)
        })
        .filter(|(from, to, _)| from < to)
        .collect();
    found.sort_by_key(|(from, to, _)| (*from, *to));
    found
}

/// Width of the picture's rows, and where they begin.
const WIDTH: f64 = 1024.0;
const LEFT: f64 = 72.0;
const ROW: f64 = 22.0;

/// Maps as an SVG picture, with the option-ROM area below them if ROMs with addresses are given.
#[must_use]
pub fn svg(maps: &[(String, Vec<Span>)], roms: &[Placed]) -> String {
    let mut body = String::new();
    let mut y = 30.0;
    for (title, spans) in maps {
        picture(&mut body, &mut y, title, spans);
    }
    if !roms.is_empty() {
        area(&mut body, &mut y, roms);
    }
    let (width, height) = (LEFT + WIDTH + 40.0, y);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <style>.paper{{fill:#fff}}.ink{{fill:#1b1f24}}.offset{{fill:#57606a;text-anchor:end;font-family:monospace}}\
         .note{{fill:#57606a}}.on{{fill:#101418}}.free{{fill:#e6e8eb}}\
         @media(prefers-color-scheme:dark){{.paper{{fill:#14181d}}.ink{{fill:#e6edf3}}.offset,.note{{fill:#9aa4af}}.free{{fill:#2b3138}}}}</style>\n\
         <rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n{body}</svg>\n"
    )
}

/// One image: rows of bytes, and the legend.
fn picture(body: &mut String, y: &mut f64, title: &str, spans: &[Span]) {
    let length = spans.last().map_or(0, |span| span.end);
    // At most 64 rows, so that the picture of a large image can be looked at as well.
    let row = length.div_ceil(64).next_power_of_two().max(64);
    let scale = WIDTH / row as f64;
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(
        body,
        "<text class=\"ink\" x=\"{LEFT}\" y=\"{y}\" font-size=\"18\" font-weight=\"bold\">{}</text>",
        escape(title)
    );
    let scope = format!("{length} bytes, {row} in a row; offsets on the left");
    label(body, "note", LEFT, *y + 20.0, &scope);
    *y += 34.0;
    for start in (0..length).step_by(row) {
        let end = (start + row).min(length);
        let mut names = Vec::new();
        label(body, "offset", LEFT - 8.0, *y + ROW / 2.0 + 4.0, &format!("{start:X}h"));
        for (place, span) in spans.iter().enumerate() {
            if span.start >= end || span.end <= start {
                continue;
            }
            let (from, to) = (span.start.max(start), span.end.min(end));
            let x = LEFT + (from - start) as f64 * scale;
            let width = (to - from) as f64 * scale;
            let bytes = span.end - span.start;
            let tip = format!(
                "{:X}h to {:X}h, {bytes} bytes: {} ({})",
                span.start,
                span.end - 1,
                span.label,
                span.kind.name()
            );
            // Padding says nothing, so that the name of what stands before it may run over into it.
            let next = spans.get(place + 1).filter(|next| next.kind == Kind::Padding);
            let room = next.map_or(to, |next| if to == span.end { next.end.min(end) } else { to });
            let name = match span.kind {
                Kind::Padding | Kind::Checksum => "",
                Kind::Unknown => "?",
                _ => &span.label,
            };
            block(body, [x, *y, width], span.kind.colour(), &tip);
            names.push((x, (room - from) as f64 * scale, name));
        }
        // Behind all blocks, or the next one would cover them.
        for (x, room, name) in names {
            named(body, x, *y, room, name);
        }
        *y += ROW + 2.0;
    }
    *y += 14.0;
    legend(body, y, spans, length);
}

fn label(body: &mut String, class: &str, x: f64, y: f64, text: &str) {
    let _ = writeln!(body, "<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{}</text>", escape(text));
}

/// A coloured block with a tip; without a colour, free space.
fn block(body: &mut String, [x, y, width]: [f64; 3], fill: &str, tip: &str) {
    let style =
        if fill.is_empty() { "class=\"free\"".to_owned() } else { format!("fill=\"{fill}\"") };
    let gap = if width > 6.0 { 1.0 } else { 0.0 };
    let _ = writeln!(
        body,
        "<rect {style} x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{ROW}\" rx=\"2\"><title>{}</title></rect>",
        width - gap,
        escape(tip)
    );
}

/// A name on a block, as far as there is room.
fn named(body: &mut String, x: f64, y: f64, room: f64, name: &str) {
    // 12 px sans-serif: a letter takes 6.8 on average.
    let room = ((room - 6.0) / 6.8) as usize;
    let fits = name.chars().count() <= room;
    if name.is_empty() || !fits && room < 6 {
        return;
    }
    let mut short: String = name.chars().take(if fits { room } else { room - 1 }).collect();
    if !fits {
        short.push('…');
    }
    label(body, "on", x + 4.0, y + ROW / 2.0 + 4.0, &short);
}

fn legend(body: &mut String, y: &mut f64, spans: &[Span], length: usize) {
    for (place, (kind, bytes)) in totals(spans).iter().enumerate() {
        let x = LEFT + (place % 4) as f64 * WIDTH / 4.0;
        if place != 0 && place % 4 == 0 {
            *y += 22.0;
        }
        let _ = writeln!(
            body,
            "<rect fill=\"{}\" x=\"{x}\" y=\"{}\" width=\"14\" height=\"14\" rx=\"2\"/>",
            kind.colour(),
            *y
        );
        let share = *bytes as f64 * 100.0 / length.max(1) as f64;
        let text = format!("{}: {bytes} bytes, {share:.1} %", kind.name());
        label(body, "ink", x + 20.0, *y + 11.0, &text);
    }
    *y += 56.0;
}

/// The area as one bar, with the ROMs in a list below it.
fn area(body: &mut String, y: &mut f64, roms: &[Placed]) {
    let _ = writeln!(
        body,
        "<text class=\"ink\" x=\"{LEFT}\" y=\"{}\" font-size=\"15\" font-weight=\"bold\">Option-ROM area {:X}h to {:X}h</text>",
        *y + 4.0,
        AREA.start,
        AREA.end - 1
    );
    *y += 16.0;
    let scale = WIDTH / f64::from(AREA.end - AREA.start);
    block(body, [LEFT, *y, WIDTH], "", "no ROM found");
    let colours = [Kind::Header, Kind::Call, Kind::Pnp, Kind::Post, Kind::Data, Kind::String];
    let found = inside(roms);
    let colour = |place: usize| colours.get(place % colours.len()).map_or("", |kind| kind.colour());
    for (place, (from, to, rom)) in found.iter().enumerate() {
        let x = LEFT + f64::from(from - AREA.start) * scale;
        let tip = format!("{from:X}h to {:X}h: {}", to - 1, rom.label);
        let width = (f64::from(to - from) * scale).max(3.0);
        block(body, [x, *y, width], colour(place), &tip);
        named(body, x, *y, width, &rom.label);
    }
    *y += ROW + 16.0;
    for step in (AREA.start..=AREA.end).step_by(0x8000) {
        let x = LEFT + f64::from(step - AREA.start) * scale;
        let _ = writeln!(
            body,
            "<text class=\"note\" x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{step:X}h</text>",
            *y
        );
    }
    *y += 14.0;
    for (place, (from, to, rom)) in found.iter().enumerate() {
        let _ = writeln!(
            body,
            "<rect fill=\"{}\" x=\"{LEFT}\" y=\"{}\" width=\"14\" height=\"14\" rx=\"2\"/>",
            colour(place),
            *y
        );
        let text = format!("{from:X}h to {:X}h, {} bytes: {}", to - 1, to - from, rom.label);
        label(body, "ink", LEFT + 20.0, *y + 11.0, &text);
        *y += 20.0;
    }
}

/// Text as XML has it. Other control characters than these cannot be in XML at all.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            letter if letter.is_control() => escaped.push('\u{fffd}'),
            letter => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::samples::Sample;
    use crate::inspect::{HIGH_BASE, survey};

    fn mapped(image: &[u8]) -> Vec<Span> {
        let rom = Rom::parse(image).expect("a ROM");
        let map = map(&rom, &survey(&rom, HIGH_BASE).expect("of revision 3.0"));
        assert!(!map.cut_short);
        map.spans
    }

    #[test]
    fn a_budget_that_runs_out_is_said() {
        let rom = Rom::parse(&Sample::new().build()).expect("a ROM");
        let survey = survey(&rom, HIGH_BASE).expect("of revision 3.0");
        let map = map_within(&rom, &survey, 100);
        assert!(map.cut_short);
        is_whole(&map.spans, rom.image().len());
    }

    #[track_caller]
    fn is_whole(spans: &[Span], length: usize) {
        let mut at = 0;
        for span in spans {
            assert!(span.start == at && span.end > at, "{spans:#?}");
            at = span.end;
        }
        assert_eq!(at, length);
    }

    #[test]
    fn every_byte_has_one_place() {
        let image = Sample::new().build();
        let spans = mapped(&image);
        is_whole(&spans, image.len());
        let at = |offset: usize| spans.iter().find(|span| span.end > offset).expect("a span");
        assert_eq!(at(0).kind, Kind::Header);
        assert_eq!((at(3).kind, at(3).end), (Kind::Post, 4), "a far return");
        assert_eq!((at(0x80).kind, at(0x80).end), (Kind::Init, 0x85));
        assert_eq!((at(0x88).kind, at(0x88).end), (Kind::Lookup, 0x8d));
        assert_eq!((at(0x90).kind, at(0x90).end), (Kind::Pcir, 0xa8));
        assert_eq!((at(0xb0).kind, at(0xb0).end), (Kind::Pnp, 0xd0));
        assert_eq!(at(0xd0).label, "licence \"GPL\"");
        assert_eq!(at(0xf0).label, "manufacturer \"maker\"");
        assert_eq!(at(0x130).kind, Kind::Init);
        assert_eq!(at(0x500).kind, Kind::Data);
        assert_eq!(at(0x800).label, "29 EnableInterrupts");
        assert_eq!(at(0xfff).kind, Kind::Checksum);
        assert!(text(&spans).contains("30 DisableInterrupts"));
    }

    #[test]
    fn what_nobody_uses_is_unknown() {
        let mut image = Sample::new().build();
        image[0xf00..0xf05].copy_from_slice(b"\x01\x02\x03\x04\x05");
        let spans = mapped(&image);
        is_whole(&spans, image.len());
        let unknown: Vec<_> = spans.iter().filter(|span| span.kind == Kind::Unknown).collect();
        assert_eq!(unknown.iter().map(|s| (s.start, s.end)).collect::<Vec<_>>(), [(0xf00, 0xf05)]);
    }

    #[test]
    fn pictures_are_xml() {
        let spans = mapped(&Sample::new().license(b"<B&D>\0").build());
        let roms = [
            Placed { address: 0xc_0000, length: 0x9000, label: "VGA <BIOS>".to_owned() },
            Placed { address: 0xc_9000, length: 0x1000, label: "VMI 3.0".to_owned() },
            Placed { address: 0xe_f800, length: usize::MAX, label: "lies".to_owned() },
            Placed { address: 0xf_f000, length: 512, label: "elsewhere".to_owned() },
        ];
        for picture in [svg(&[("a & b".to_owned(), spans)], &roms), svg(&[], &[])] {
            let tags = |tag: &str| picture.matches(tag).count();
            assert_eq!(tags("<rect") - tags("/>"), tags("</rect>"));
            assert_eq!(tags("<text"), tags("</text>"));
            assert!(!picture.contains("<B&D>") && !picture.contains("NaN"));
        }
        let shown = area_text(&roms);
        assert!(shown.contains("lies") && !shown.contains("elsewhere"), "{shown}");
        assert!(shown.contains("no ROM found"));
        assert!(area_text(&[]).contains("196608"));
    }
}
