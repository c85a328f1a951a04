//! The form of the native calls that a kernel links: an object and a library with nothing in it but the object.
//!
//! The object holds a finished image, byte for byte, under one symbol, and a symbol for each call. Since
//! nothing in an image is relocated, nothing in the object is, and it needs no symbol of anybody's. A
//! linker takes it as it takes any other object of i386, and the kernel has a ROM that is always there.

use crate::build::{self, Form, Rom, Tools, read, shown, write};
use crate::c_header;
use anyhow::{Context, Result, bail};
use ar_archive_writer::{
    ArchiveKind, DEFAULT_OBJECT_READER, NewArchiveMember, write_archive_to_stream,
};
use object::write::{Object, Symbol, SymbolSection};
use object::{
    Architecture, BinaryFormat, Endianness, Object as _, ObjectSymbol, SectionKind, SymbolFlags,
    SymbolKind, SymbolScope,
};
use std::io::Cursor;
use std::path::PathBuf;
use vmi_abi::{REVISION_3_0, REVISION_13_0, REVISION_13_3, Revision};

/// What kernels link.
#[derive(Clone, Debug)]
pub struct Link {
    /// The image that the object holds.
    pub rom: Rom,
    /// The object.
    pub object: PathBuf,
    /// The library with the object.
    pub archive: PathBuf,
    /// The interface for C.
    pub header: PathBuf,
    /// How many symbols each of them defines.
    pub symbols: usize,
}

/// Where the image is in the object, on a boundary as slots are. Of text sections the scripts of old kernels
/// list no other, and what they do not list may land in memory that is freed after the start.
const SECTION: &[u8] = b".text";
const ALIGNMENT: u64 = 32;

/// A section that says by being there, empty and without flags, that no stack needs to be executable.
const STACK_NOTE: &[u8] = b".note.GNU-stack";

/// A call's code, or a byte, in the image, with the name that it gets.
struct Place {
    name: String,
    offset: u64,
    size: u64,
    kind: SymbolKind,
}

/// Builds what kernels of a revision link.
///
/// # Errors
///
/// There is no image of the revision, or it cannot be built.
pub fn build(tools: &Tools, revision: Revision) -> Result<Link> {
    of(build::rom(tools, form(revision)?)?)
}

/// What kernels of each revision link, that of 3.0 first. Images that are there already are not built again.
///
/// # Errors
///
/// One of them cannot be built.
pub fn all(tools: &Tools, built: &[Rom]) -> Result<Vec<Link>> {
    [REVISION_3_0, REVISION_13_0, REVISION_13_3]
        .into_iter()
        .map(|revision| {
            let form = form(revision)?;
            let rom = built.iter().find(|rom| rom.form == form).cloned();
            of(rom.map_or_else(|| build::rom(tools, form), Ok)?)
        })
        .collect()
}

/// The image that kernels of a revision link.
fn form(revision: Revision) -> Result<Form> {
    Ok(match revision {
        REVISION_3_0 => Form::Linked,
        REVISION_13_0 => Form::Slots13_0,
        REVISION_13_3 => Form::Slots13_3,
        Revision { major, minor } => bail!("there is no image of revision {major}.{minor}"),
    })
}

/// Puts a finished image into an object and a library.
fn of(rom: Rom) -> Result<Link> {
    let stem = stem(rom.form.revision(), ".");
    let folder = folder();
    let object = folder.join(format!("{stem}.o"));
    let archive = folder.join(format!("lib{stem}.a"));
    let places = places(&rom)?;
    let bytes = contents(&rom.image.bytes, &places)?;
    write(&archive, &library(&format!("{stem}.o"), &bytes)?)?;
    write(&object, &bytes)?;
    let header = header_path();
    write(&header, c_header::text().as_bytes())?;
    Ok(Link { rom, object, archive, header, symbols: places.len() })
}

/// What the symbols of a revision's object begin with.
#[must_use]
pub fn prefix(revision: Revision) -> String {
    stem(revision, "_")
}

/// Where the interface for C lands.
#[must_use]
pub fn header_path() -> PathBuf {
    folder().join(c_header::NAME)
}

/// Where the files land.
fn folder() -> PathBuf {
    crate::workspace().join("target/link")
}

/// The name of a revision's files and symbols: that of 3.0, which is the usual one, is the shortest.
fn stem(revision: Revision, dot: &str) -> String {
    match revision {
        REVISION_3_0 => "vmi_native".into(),
        Revision { major, minor } => format!("vmi_{major}{dot}{minor}_native"),
    }
}

/// What has a name in the object.
fn places(rom: &Rom) -> Result<Vec<Place>> {
    let linked = read(&rom.elf)?;
    let linked = object::File::parse(&*linked).with_context(|| shown(&rom.elf))?;
    let revision = rom.form.revision();
    let prefix = prefix(revision);
    // Bytes of a routine from a place in it to its end.
    let rest = |offset: u64| -> Result<u64> {
        linked
            .symbols()
            .filter(|symbol| symbol.kind() == SymbolKind::Text)
            .map(|symbol| symbol.address()..symbol.address() + symbol.size())
            .find(|routine| routine.contains(&offset))
            .map(|routine| routine.end - offset)
            .with_context(|| format!("{}: no routine at offset {offset:#x}", shown(&rom.elf)))
    };
    let routine = |name: String, offset: u64| -> Result<Place> {
        Ok(Place { name, offset, size: rest(offset)?, kind: SymbolKind::Text })
    };
    let image = Place {
        name: format!("{prefix}_rom"),
        offset: 0,
        size: rom.image.bytes.len() as u64,
        kind: SymbolKind::Data,
    };
    let mut places = vec![image];
    if revision.has_slots() {
        for (_, call) in revision.calls() {
            let slot = call.contract.slot.context("a call without a slot")?;
            places.push(routine(format!("{prefix}_{}", call.name), slot.offset() as u64)?);
        }
        return Ok(places);
    }
    for symbol in linked.symbols() {
        let name = symbol.name().unwrap_or_default();
        if name == "site_rule" {
            places.push(Place {
                name: format!("{prefix}_site_rule"),
                offset: symbol.address(),
                size: 2, // Behind it is the byte that keeps the image's sum.
                kind: SymbolKind::Data,
            });
        } else if name.strip_prefix(&prefix).is_some_and(|rest| rest.starts_with('_')) {
            places.push(routine(name.to_owned(), symbol.address())?);
        }
    }
    places.sort_by(|one, other| (one.offset, &one.name).cmp(&(other.offset, &other.name)));
    Ok(places)
}

/// The object.
fn contents(image: &[u8], places: &[Place]) -> Result<Vec<u8>> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::I386, Endianness::Little);
    let section = object.add_section(Vec::new(), SECTION.to_vec(), SectionKind::Text);
    object.set_section_data(section, image, ALIGNMENT);
    object.add_section(Vec::new(), STACK_NOTE.to_vec(), SectionKind::Other);
    for Place { name, offset, size, kind } in places {
        object.add_symbol(Symbol {
            name: name.clone().into_bytes(),
            value: *offset,
            size: *size,
            kind: *kind,
            scope: SymbolScope::Linkage,
            weak: false,
            section: SymbolSection::Section(section),
            flags: SymbolFlags::None,
        });
    }
    object.write().context("the object cannot be written")
}

/// The library, with an index, and without dates and owners.
fn library(member: &str, object: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    let member = NewArchiveMember::new(object, &DEFAULT_OBJECT_READER, member.to_owned());
    write_archive_to_stream(&mut bytes, &[member], ArchiveKind::Gnu, false, None)
        .context("the library cannot be written")?;
    Ok(bytes.into_inner())
}
