//! ROMs inside ELF files and static libraries.
//!
//! The bytes of a file are searched once for the two signatures, and only then is asked which section
//! and which symbol are there: what an object claims about itself costs no time and loses no ROM.

use super::scan::Segment;
use super::{Candidate, Found, LONGEST_ROM, MOST_ROMS, Origin, SourceError, claimed};
use crate::image;
use object::read::archive::ArchiveFile;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Object, ObjectKind, ObjectSection, ObjectSegment, ObjectSymbol, SymbolKind, elf};
use std::io::{Read, Seek};
use std::mem::offset_of;
use vmi_abi::header::{LENGTH_UNIT, ROM_SIGNATURE, RomHeader, VMI_SIGNATURE};

/// With which an ELF file starts.
pub(super) const ELF: &[u8] = b"\x7fELF";

/// Bytes in which a core dump's list of segments must lie.
const CORE_HEAD: u64 = 1 << 20;

/// Whether a file starts as a static library does.
pub(super) fn is_library(magic: &[u8]) -> bool {
    [b"!<arch>\n", b"!<thin>\n"].iter().any(|start| magic.starts_with(*start))
}

/// The segments of a core dump; `None` for any other ELF file.
pub(super) fn core_segments<R: Read + Seek>(
    reader: &mut R,
    place: &str,
) -> Result<Option<Vec<Segment>>, SourceError> {
    let unreadable = |source| SourceError::Read { place: place.to_owned(), source };
    let mut head = Vec::new();
    reader.take(CORE_HEAD).read_to_end(&mut head).map_err(unreadable)?;
    reader.rewind().map_err(unreadable)?;
    let segments = match head.get(4).copied() {
        Some(elf::ELFCLASS32) => segments::<elf::FileHeader32<object::Endianness>>(&head),
        Some(elf::ELFCLASS64) => segments::<elf::FileHeader64<object::Endianness>>(&head),
        _ => return Ok(None),
    };
    segments.map_err(|error| SourceError::Damaged {
        place: place.to_owned(),
        reason: format!("a core dump without a list of segments: {error}"),
    })
}

fn segments<E: FileHeader>(head: &[u8]) -> object::read::Result<Option<Vec<Segment>>> {
    // What is no ELF file after all has no segments, but may have a ROM.
    let Ok(header) = E::parse(head) else { return Ok(None) };
    let Ok(endian) = header.endian() else { return Ok(None) };
    if header.e_type(endian) != elf::ET_CORE {
        return Ok(None);
    }
    let loads = header.program_headers(endian, head)?.iter();
    let loads = loads.filter(|load| load.p_type(endian) == elf::PT_LOAD);
    Ok(Some(
        loads
            .map(|load| Segment {
                offset: load.p_offset(endian).into(),
                length: load.p_filesz(endian).into(),
                physical: load.p_paddr(endian).into(),
            })
            .collect(),
    ))
}

/// The ROMs of a static library's members.
pub(super) fn library(bytes: &[u8], place: &str) -> Result<Found, SourceError> {
    let damaged = |reason: String| SourceError::Damaged { place: place.to_owned(), reason };
    let archive = ArchiveFile::parse(bytes).map_err(|error| damaged(error.to_string()))?;
    if archive.is_thin() {
        return Err(damaged("a thin library: name one of the objects that it lists".into()));
    }
    let mut found = Found::default();
    let mut last = "the library's start".to_owned();
    for member in archive.members() {
        let member = member.map_err(|error| damaged(format!("behind {last}: {error}")))?;
        let name = String::from_utf8_lossy(member.name()).into_owned();
        let data =
            member.data(bytes).map_err(|error| damaged(format!("member {name}: {error}")))?;
        let origin = Origin {
            place: place.to_owned(),
            member: Some(name.clone()),
            file_offset: Some(member.file_range().0),
            ..Origin::default()
        };
        search(data, &origin, &mut found);
        last = format!("member {name}");
    }
    Ok(found)
}

/// The ROMs of an ELF file.
pub(super) fn elf(bytes: &[u8], place: &str) -> Found {
    let mut found = Found::default();
    let origin = Origin { place: place.to_owned(), file_offset: Some(0), ..Origin::default() };
    search(bytes, &origin, &mut found);
    found
}

/// Searches an object, or bytes that are none.
fn search(bytes: &[u8], origin: &Origin, found: &mut Found) {
    let signature = VMI_SIGNATURE.to_le_bytes();
    let distance = offset_of!(RomHeader, vrom_signature);
    let headers = bytes
        .windows(signature.len())
        .enumerate()
        .skip(distance)
        .filter(|(_, window)| **window == signature)
        .map(|(at, _)| at - distance)
        .filter(|at| bytes[*at..].starts_with(&ROM_SIGNATURE.to_le_bytes()));
    let mut parsed = None;
    for at in headers {
        if found.roms.len() >= MOST_ROMS {
            found.left_out += 1;
            continue;
        }
        let parsed = parsed.get_or_insert_with(|| object::File::parse(bytes));
        let is_elf = bytes.starts_with(ELF);
        let mut origin = Origin {
            offset: at as u64,
            file_offset: origin.file_offset.map(|start| start + at as u64),
            ..origin.clone()
        };
        let mut remarks = Vec::new();
        let mut rest = &bytes[at..];
        match parsed {
            Ok(file) => rest = locate(file, bytes, at, &mut origin, &mut remarks),
            Err(error) if is_elf => remarks.push(format!("the object is damaged: {error}")),
            Err(_) => {}
        }
        let finished = finished(rest, &mut remarks);
        // A header without all of its bytes is none.
        if let Ok(mut rom) = Candidate::cut(finished.as_deref().unwrap_or(rest), origin) {
            rom.remarks.splice(0..0, remarks);
            found.roms.push(rom);
        }
    }
}

/// The image that a linked file is to become, if nobody set its lengths and checksums so far.
fn finished(rest: &[u8], remarks: &mut Vec<String>) -> Option<Vec<u8>> {
    if claimed(rest) != 0 || rest.len() >= LONGEST_ROM {
        return None;
    }
    let size = (rest.len() + 1).next_multiple_of(LENGTH_UNIT);
    let image = image::finish(rest, size).ok()?;
    remarks.push(format!(
        "the length byte is 0, as before an image is finished: {size} bytes are assumed; lengths and checksums are not judged"
    ));
    Some(image)
}

/// A range of a file's bytes, clipped to them.
fn range(bytes: &[u8], (start, length): (u64, u64)) -> std::ops::Range<usize> {
    let clip = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
    clip(start)..clip(start.saturating_add(length))
}

/// Names the section and the symbol at a place, and gives the bytes that belong to it.
fn locate<'a>(
    file: &object::File<'_>,
    bytes: &'a [u8],
    at: usize,
    origin: &mut Origin,
    remarks: &mut Vec<String>,
) -> &'a [u8] {
    let section = file.sections().find_map(|section| {
        let range = range(bytes, section.file_range()?);
        range.contains(&at).then_some((section, range))
    });
    let segment = file
        .segments()
        .map(|segment| range(bytes, segment.file_range()))
        .find(|range| range.contains(&at));
    let Some((section, extent)) = section else {
        remarks.push("the header lies outside of all sections".into());
        return &bytes[at..segment.map_or(bytes.len(), |segment| segment.end)];
    };
    origin.offset = (at - extent.start) as u64;
    origin.section = Some(match section.name() {
        Ok(name) => name.to_owned(),
        Err(_) => format!("number {}", section.index().0),
    });
    let address = section.address().wrapping_add(origin.offset);
    let names = || {
        file.symbols().filter(|symbol| {
            let is_name = !matches!(symbol.kind(), SymbolKind::Section | SymbolKind::File);
            is_name
                && symbol.section_index() == Some(section.index())
                && symbol.address() == address
                && symbol.name().is_ok_and(|name| !name.is_empty())
        })
    };
    // The name that others link to says more than a local label.
    let symbol = names().find(|symbol| symbol.is_global()).or_else(|| names().next());
    origin.symbol = symbol.and_then(|symbol| {
        symbol.name().ok().map(|name| rustc_demangle::demangle(name).to_string())
    });

    let end = at.saturating_add(claimed(&bytes[at..]).max(1));
    let relocations = if file.kind() == ObjectKind::Relocatable {
        let inside =
            |offset: &u64| (origin.offset..origin.offset + (end - at) as u64).contains(offset);
        section.relocations().filter(|(offset, _)| inside(offset)).count()
    } else {
        0
    };
    if relocations != 0 {
        remarks.push(format!(
            "{relocations} relocations are still to be applied: link the object for a verdict"
        ));
    }
    // A ROM that the linker put together from several sections reaches beyond the one with its header.
    let last = segment.filter(|segment| end > extent.end && segment.end > extent.end);
    &bytes[at..last.map_or(extent.end, |segment| segment.end)]
}
