//! From the linked file to the finished image, or a refusal.
//!
//! The image's storage is read-only after POST, nobody relocates it, and it is seen at several
//! linear addresses at once. What would not survive that is refused here, before it can run: the
//! linker script asserts some of the same, but only one step sees everything and names the place.
//!
//! This step alone knows the size, so it alone sets the length byte, the lengths in `PCIR` and the
//! checksums.

use goblin::elf::Elf;
use goblin::elf::section_header::{SHF_ALLOC, SHT_REL, SHT_RELA};
use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};
use std::mem::offset_of;
use vmi_abi::REVISION_3_0;
use vmi_abi::header::{
    LENGTH_UNIT, PCI_SIGNATURE, PNP_SIGNATURE, PciHeader, PnpHeader, RomHeader, checksum,
};
use vmi_abi::probe::{self, Refusal as ProbeRefusal};
use zerocopy::FromBytes;

/// The most bytes that the native image may have.
pub const NATIVE_LIMIT: usize = 8 * 1024;

/// The section that becomes the image; see `linker.ld`.
const SECTION: &str = ".rom";

/// ld keeps three words of the global offset table for itself, and fills none of them in.
const LINKER_TABLE: u64 = 12;

/// Sections that the linker makes for a loader. Nobody loads the image, and they are not in it.
const LOADER_SECTIONS: [&str; 6] =
    [".dynamic", ".dynsym", ".dynstr", ".hash", ".gnu.hash", ".interp"];

/// What fills the space behind the code: a breakpoint, for whoever runs into it.
const FILLER: u8 = 0xcc;

/// Why a linked file does not become an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not a file that the linker could have written.
    #[error("not a 32-bit x86 ELF file: {0}")]
    NotElf(String),
    /// The section is missing.
    #[error("no section `{SECTION}`: is it linked with linker.ld?")]
    NoSection,
    /// A relocation that nobody would apply.
    #[error(
        "section `{section}`: run-time relocation of type {kind} at offset {offset:#x} ({place}); \
         use distances between symbols instead of addresses"
    )]
    Relocation {
        /// The relocated section, or the table of relocations.
        section: String,
        /// The relocation's type.
        kind: u32,
        /// Where in the image.
        offset: u64,
        /// The symbol there.
        place: String,
    },
    /// Data that somebody would have to load or fill in.
    #[error("section `{section}` has {size} bytes at offset {offset:#x} ({place}): {reason}")]
    Section {
        /// The section.
        section: String,
        /// Its size.
        size: u64,
        /// Where it would lie.
        offset: u64,
        /// The symbol there.
        place: String,
        /// Why it must not be.
        reason: &'static str,
    },
    /// The bytes depend on the address.
    #[error(
        "section `{SECTION}` differs between two link bases, first at offset {offset:#x} ({place}): {first} at the \
         one base, {second} at the other; something there is an address"
    )]
    BaseDependent {
        /// Where in the image.
        offset: usize,
        /// The symbol there.
        place: String,
        /// The byte, or what is there instead.
        first: String,
        /// The same at the other base.
        second: String,
    },
    /// An instruction that uses the floating-point or vector unit, whose state is the guest's.
    #[error(
        "section `{SECTION}`: `{instruction}` at offset {offset:#x} ({place}) uses {unit}: that state is the guest's"
    )]
    ForeignUnit {
        /// Where in the image.
        offset: u64,
        /// The function.
        place: String,
        /// The instruction.
        instruction: String,
        /// The unit's name.
        unit: String,
    },
    /// Bytes in a function that are no instruction.
    #[error("section `{SECTION}`: no instruction at offset {offset:#x} ({place})")]
    NoInstruction {
        /// Where in the image.
        offset: u64,
        /// The function.
        place: String,
    },
    /// Too many bytes.
    #[error("the image has {size} bytes, {} more than the {limit} allowed; the largest functions: {largest}", size - limit)]
    TooLarge {
        /// Its bytes.
        size: usize,
        /// The limit.
        limit: usize,
        /// The largest functions.
        largest: String,
    },
    /// A guest would not take it.
    #[error("a guest would pass the image over: {0}")]
    Header(ProbeRefusal),
    /// The plug-and-play header is not where the ROM header says.
    #[error("no $PnP structure where offset {} points to", offset_of!(RomHeader, pnp_header_offs))]
    NoPnpHeader,
}

/// A finished image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its bytes, length and checksums set.
    pub bytes: Vec<u8>,
    /// Bytes that the linker placed.
    pub used: usize,
}

impl Image {
    /// Bytes between the last one used and the checksum.
    #[must_use]
    pub fn free(&self) -> usize {
        self.bytes.len().saturating_sub(self.used + 1)
    }
}

/// Makes the image of at most `limit` bytes from one program, linked at two bases.
///
/// # Errors
///
/// The first rule that the program breaks.
pub fn make(first: &[u8], second: &[u8], limit: usize) -> Result<Image, Refusal> {
    let first = Linked::parse(first)?;
    let second = Linked::parse(second)?;
    for linked in [&first, &second] {
        linked.check_relocations()?;
        linked.check_sections()?;
    }
    first.check_same(&second)?;
    first.check_instructions()?;
    let used = first.bytes.len();
    let size = (used + 1).next_multiple_of(LENGTH_UNIT);
    if size > limit {
        return Err(Refusal::TooLarge { size, limit, largest: first.largest() });
    }
    let bytes = finish(first.bytes, size)?;
    Ok(Image { bytes, used })
}

/// Pads an image to `size` bytes and sets its lengths and checksums.
///
/// # Errors
///
/// The headers are not where they should be.
pub fn finish(unfinished: &[u8], size: usize) -> Result<Vec<u8>, Refusal> {
    let mut bytes = unfinished.to_vec();
    bytes.resize(size, FILLER);
    let units = size / LENGTH_UNIT;
    let header = |bytes: &[u8]| {
        RomHeader::read_from_prefix(bytes)
            .map(|(header, _)| header)
            .map_err(|_| Refusal::Header(ProbeRefusal::Truncated))
    };
    let (pci_at, pnp_at) = {
        let header = header(&bytes)?;
        (usize::from(header.pci_header_offs.get()), usize::from(header.pnp_header_offs.get()))
    };

    let too_large = || Refusal::TooLarge {
        size,
        limit: usize::from(u8::MAX) * LENGTH_UNIT,
        largest: String::new(),
    };
    if let Some(length) = bytes.get_mut(offset_of!(RomHeader, rom_length)) {
        *length = u8::try_from(units).map_err(|_| too_large())?;
    }

    let pci = bytes
        .get_mut(pci_at..)
        .and_then(|tail| PciHeader::mut_from_prefix(tail).ok())
        .map(|(pci, _)| pci)
        .filter(|pci| pci.signature == PCI_SIGNATURE)
        .ok_or(Refusal::Header(ProbeRefusal::NoPciHeader))?;
    pci.image_length.set(u16::try_from(units).map_err(|_| too_large())?);
    pci.runtime_length = pci.image_length;

    let pnp = bytes
        .get_mut(pnp_at..)
        .filter(|tail| tail.starts_with(&PNP_SIGNATURE))
        .and_then(|tail| tail.get_mut(..size_of::<PnpHeader>()))
        .ok_or(Refusal::NoPnpHeader)?;
    set_checksum(pnp, offset_of!(PnpHeader, checksum));
    set_checksum(&mut bytes, size - 1);

    probe::probe(&bytes, REVISION_3_0).map_err(Refusal::Header)?;
    Ok(bytes)
}

/// Makes the sum of all bytes 0 modulo 256 by the byte at `offset`.
fn set_checksum(bytes: &mut [u8], offset: usize) {
    bytes[offset] = 0;
    bytes[offset] = checksum(bytes).wrapping_neg();
}

/// The unit that an instruction uses, if its state belongs to the guest: x87, MMX, SSE and what came later.
#[must_use]
pub fn foreign_unit(instruction: &Instruction) -> Option<String> {
    instruction.cpuid_features().iter().map(|feature| (feature, format!("{feature:?}"))).find_map(
        |(feature, name)| {
            let is_named_so =
                ["SSE", "SSSE", "AVX", "D3NOW", "FPU", "FMA", "AMX", "AES", "SHA", "KNC"];
            let is_foreign = matches!(
                feature,
                CpuidFeature::MMX
                    | CpuidFeature::FXSR
                    | CpuidFeature::XSAVE
                    | CpuidFeature::XSAVEC
                    | CpuidFeature::XSAVEOPT
                    | CpuidFeature::XSAVES
                    | CpuidFeature::F16C
                    | CpuidFeature::XOP
                    | CpuidFeature::GFNI
                    | CpuidFeature::PCLMULQDQ
                    | CpuidFeature::VAES
                    | CpuidFeature::VPCLMULQDQ
                    | CpuidFeature::CYRIX_FPU
                    | CpuidFeature::CYRIX_D3NOW
                    | CpuidFeature::CYRIX_EMMI
            ) || is_named_so.iter().any(|start| name.starts_with(start));
            is_foreign.then_some(name)
        },
    )
}

/// A linked program, read.
struct Linked<'a> {
    elf: Elf<'a>,
    object: object::File<'a>,
    /// The image's bytes.
    bytes: &'a [u8],
    /// The address that they are linked at.
    base: u64,
}

impl<'a> Linked<'a> {
    fn parse(file: &'a [u8]) -> Result<Self, Refusal> {
        let not_elf = |error: &dyn std::fmt::Display| Refusal::NotElf(error.to_string());
        let elf = Elf::parse(file).map_err(|error| not_elf(&error))?;
        if elf.is_64 || elf.header.e_machine != goblin::elf::header::EM_386 {
            return Err(not_elf(&"another machine"));
        }
        let object = object::File::parse(file).map_err(|error| not_elf(&error))?;
        let section = object.section_by_name(SECTION).ok_or(Refusal::NoSection)?;
        let bytes = section.data().map_err(|error| not_elf(&error))?;
        let base = section.address();
        Ok(Self { elf, object, bytes, base })
    }

    /// Nobody applies relocations: not the BIOS, not the guest.
    fn check_relocations(&self) -> Result<(), Refusal> {
        let tables = [
            ("of the dynamic segment", &self.elf.dynrels),
            ("of the dynamic segment", &self.elf.dynrelas),
            ("of the procedure linkage table", &self.elf.pltrelocs),
        ];
        let sections = self.elf.shdr_relocs.iter().filter_map(|(index, table)| {
            let header = self.elf.section_headers.get(*index)?;
            let is_loaded = header.sh_flags & u64::from(SHF_ALLOC) != 0;
            is_loaded.then(|| (self.elf.shdr_strtab.get_at(header.sh_name).unwrap_or("?"), table))
        });
        for (section, table) in tables.into_iter().chain(sections) {
            if let Some(relocation) = table.iter().next() {
                let offset = relocation.r_offset;
                return Err(Refusal::Relocation {
                    section: section.into(),
                    kind: relocation.r_type,
                    offset: offset.wrapping_sub(self.base),
                    place: self.place(offset),
                });
            }
        }
        // A table that is there but that the reader could not make sense of.
        for header in &self.elf.section_headers {
            let is_table = matches!(header.sh_type, SHT_REL | SHT_RELA);
            if is_table && header.sh_flags & u64::from(SHF_ALLOC) != 0 && header.sh_size != 0 {
                let section = self.elf.shdr_strtab.get_at(header.sh_name).unwrap_or("?").into();
                return Err(Refusal::Relocation {
                    section,
                    kind: 0,
                    offset: 0,
                    place: "unreadable".into(),
                });
            }
        }
        Ok(())
    }

    /// All that the program needs is in the image's own section.
    fn check_sections(&self) -> Result<(), Refusal> {
        for section in self.object.sections() {
            let name = section.name().unwrap_or("?");
            let is_loaded = matches!(section.flags(), object::SectionFlags::Elf { sh_flags } if sh_flags & u64::from(SHF_ALLOC) != 0);
            if !is_loaded || name == SECTION || LOADER_SECTIONS.contains(&name) {
                continue;
            }
            let is_table = name.contains("got") || name.contains("plt");
            if section.size() <= if is_table { LINKER_TABLE } else { 0 } {
                continue;
            }
            let reason = if is_table {
                "somebody would have to fill the addresses in; a symbol is not known to be local to the image"
            } else if name.contains("data") || name.contains("bss") {
                "the image's storage is read-only after POST; use the caller's stack or registers"
            } else {
                "only `.rom` becomes the image"
            };
            let offset = section.address().wrapping_sub(self.base);
            return Err(Refusal::Section {
                section: name.into(),
                size: section.size(),
                offset,
                place: self.place(section.address()),
                reason,
            });
        }
        Ok(())
    }

    fn check_same(&self, other: &Self) -> Result<(), Refusal> {
        let byte = |bytes: &[u8], offset: usize| {
            bytes.get(offset).map_or("the end".into(), |byte| format!("{byte:#04x}"))
        };
        let length = self.bytes.len().max(other.bytes.len());
        match (0..length).find(|offset| self.bytes.get(*offset) != other.bytes.get(*offset)) {
            None => Ok(()),
            Some(offset) => Err(Refusal::BaseDependent {
                offset,
                place: self.place(self.base + offset as u64),
                first: byte(self.bytes, offset),
                second: byte(other.bytes, offset),
            }),
        }
    }

    /// Every function is 32-bit integer code. The 16-bit entry is assembly, and its symbols have no size.
    fn check_instructions(&self) -> Result<(), Refusal> {
        for symbol in self
            .object
            .symbols()
            .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() != 0)
        {
            let start = symbol.address().wrapping_sub(self.base);
            let range = usize::try_from(start)
                .ok()
                .zip(usize::try_from(start.saturating_add(symbol.size())).ok());
            let place = demangled(symbol.name().unwrap_or("?"));
            let code = range
                .and_then(|(from, to)| self.bytes.get(from..to))
                .ok_or_else(|| Refusal::NoInstruction { offset: start, place: place.clone() })?;
            for instruction in &mut Decoder::with_ip(32, code, start, DecoderOptions::NONE) {
                let offset = instruction.ip();
                if instruction.is_invalid() {
                    return Err(Refusal::NoInstruction { offset, place });
                }
                if let Some(unit) = foreign_unit(&instruction) {
                    return Err(Refusal::ForeignUnit {
                        offset,
                        place,
                        instruction: instruction.to_string(),
                        unit,
                    });
                }
            }
        }
        Ok(())
    }

    /// The symbol at or before an address, and the distance from it.
    fn place(&self, address: u64) -> String {
        self.object
            .symbols()
            .filter(|symbol| {
                !symbol.is_undefined()
                    && symbol.section_index().is_some()
                    && symbol.address() <= address
            })
            .filter(|symbol| symbol.name().is_ok_and(|name| !name.is_empty()))
            .max_by_key(|symbol| symbol.address())
            .map_or_else(
                || "no symbol".into(),
                |symbol| {
                    let name = demangled(symbol.name().unwrap_or("?"));
                    match address - symbol.address() {
                        0 => name,
                        distance => format!("{name}+{distance:#x}"),
                    }
                },
            )
    }

    /// The largest functions, for a message.
    fn largest(&self) -> String {
        let mut sizes: Vec<(u64, String)> = self
            .object
            .symbols()
            .filter(|symbol| symbol.kind() == SymbolKind::Text)
            .map(|symbol| (symbol.size(), demangled(symbol.name().unwrap_or("?"))))
            .collect();
        sizes.sort_by(|a, b| b.cmp(a));
        sizes
            .iter()
            .take(5)
            .map(|(size, name)| format!("{name} {size}"))
            .collect::<Vec<_>>()
            .join(", ")
    }
}

/// A symbol's name as a reader knows it: the path without its hash.
fn demangled(name: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(name))
}
