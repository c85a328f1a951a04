//! Option ROMs in memory: on 2 KiB steps, as firmware and guests look for them, and right behind a
//! ROM's end, as files and cards line them up.
//!
//! The bytes stream past: a dump may be larger than memory.

use super::{Candidate, Found, Kind, LONGEST_ROM, MOST_OTHERS, MOST_ROMS, Origin, Other, claimed};
use std::collections::BTreeSet;
use std::io::{self, Read, Seek, SeekFrom};
use std::mem::offset_of;
use vmi_abi::header::{
    LENGTH_UNIT, PNP_SIGNATURE, PciHeader, ROM_SIGNATURE, RomHeader, VMI_SIGNATURE, checksum,
};
use vmi_abi::probe::SCAN_STEP;
use zerocopy::FromBytes;

/// Bytes that are looked at before the next ones are read; a multiple of the step.
const WINDOW: usize = 1 << 20;

/// A part of a core dump: where it lies in the file and in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Offset in the file.
    pub(super) offset: u64,
    /// Bytes in the file.
    pub(super) length: u64,
    /// Physical address of the first.
    pub(super) physical: u64,
}

/// Looks through a dump whose first byte lies at physical address `base`, if that is known.
pub(super) fn dump(reader: &mut impl Read, place: &str, base: Option<u64>) -> io::Result<Found> {
    let mut search =
        Search { place, base, start: 0, found: Found::default(), next: BTreeSet::new() };
    search.run(reader)?;
    Ok(search.found)
}

/// Looks through the parts of a core dump; no more bytes in all than the file has, because parts may
/// claim the same ones.
pub(super) fn core<R: Read + Seek>(
    reader: &mut R,
    place: &str,
    segments: &[Segment],
) -> io::Result<Found> {
    let size = reader.seek(SeekFrom::End(0))?;
    let mut left = size;
    let mut found = Found::default();
    for segment in segments.iter().filter(|segment| segment.offset < size) {
        let length = segment.length.min(left);
        left -= length;
        reader.seek(SeekFrom::Start(segment.offset))?;
        let (base, start) = (Some(segment.physical), segment.offset);
        let mut search = Search { place, base, start, found, next: BTreeSet::new() };
        search.run(&mut reader.take(length))?;
        found = search.found;
    }
    Ok(found)
}

struct Search<'a> {
    place: &'a str,
    base: Option<u64>,
    /// What is added to offsets.
    start: u64,
    found: Found,
    /// Ends of ROMs, beyond the steps.
    next: BTreeSet<u64>,
}

impl Search<'_> {
    fn run(&mut self, reader: &mut impl Read) -> io::Result<()> {
        let step = u64::from(SCAN_STEP);
        let mut on_step = (step - self.base.unwrap_or(0) % step) % step;
        let (mut window, mut window_start) = (Vec::new(), 0);
        loop {
            let wanted = WINDOW + LONGEST_ROM - window.len();
            let got = reader.take(wanted as u64).read_to_end(&mut window)?;
            let last = got < wanted;
            let end = window_start + if last { window.len() } else { WINDOW } as u64;
            loop {
                let offset = self.next.first().map_or(on_step, |next| on_step.min(*next));
                if offset >= end {
                    break;
                }
                self.next.remove(&offset);
                if offset == on_step {
                    on_step += step;
                }
                if let Some(bytes) = window.get((offset - window_start) as usize..) {
                    self.look(offset, &bytes[..bytes.len().min(LONGEST_ROM)]);
                }
            }
            if last {
                return Ok(());
            }
            window.drain(..WINDOW);
            window_start = end;
        }
    }

    fn look(&mut self, offset: u64, bytes: &[u8]) {
        let is_rom = bytes.starts_with(&ROM_SIGNATURE.to_le_bytes());
        let vmi_at = offset_of!(RomHeader, vrom_signature);
        let is_vmi =
            bytes.get(vmi_at..).is_some_and(|b| b.starts_with(&VMI_SIGNATURE.to_le_bytes()));
        if !is_rom && !is_vmi {
            return;
        }
        if self.found.roms.len() >= MOST_ROMS || self.found.others.len() >= MOST_OTHERS {
            self.found.left_out += 1;
            return;
        }
        let image = bytes.get(..claimed(bytes)).filter(|image| image.len() > 2);
        let physical = self.base.map(|base| base.wrapping_add(offset));
        let offset_in_file = self.start + offset;
        if is_rom {
            let chained = pci(bytes).map(|pci| usize::from(pci.image_length.get()) * LENGTH_UNIT);
            let ends = [Some(claimed(bytes)), chained];
            self.next.extend(
                ends.into_iter().flatten().filter(|end| *end != 0).map(|end| offset + end as u64),
            );
        }
        if is_rom && is_vmi {
            let origin = Origin {
                place: self.place.to_owned(),
                offset: offset_in_file,
                file_offset: Some(offset_in_file),
                physical,
                ..Origin::default()
            };
            // A header without all of its bytes is none.
            if let Ok(rom) = Candidate::cut(bytes, origin) {
                self.found.roms.push(rom);
                return;
            }
        }
        self.found.others.push(Other {
            offset: offset_in_file,
            physical,
            bytes: claimed(bytes),
            checksum_right: image.is_some_and(|image| checksum(image) == 0),
            kind: kind(bytes, is_rom),
        });
    }
}

fn pci(bytes: &[u8]) -> Option<&PciHeader> {
    vmi_abi::probe::pci_header(bytes)
}

fn kind(bytes: &[u8], is_rom: bool) -> Kind {
    if !is_rom {
        return Kind::Unsigned;
    }
    if let Some(pci) = pci(bytes) {
        return Kind::Pci {
            vendor: pci.vendor.get(),
            device: pci.device.get(),
            code_type: pci.code_type,
        };
    }
    let header = RomHeader::ref_from_prefix(bytes).ok();
    let offset = header.map_or(0, |(header, _)| usize::from(header.pnp_header_offs.get()));
    let pnp = bytes.get(offset..).is_some_and(|bytes| bytes.starts_with(&PNP_SIGNATURE));
    if pnp { Kind::Pnp } else { Kind::Plain }
}
