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
use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, Instruction};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};
use std::mem::offset_of;
use vmi_abi::header::{
    LENGTH_UNIT, PCI_SIGNATURE, PNP_SIGNATURE, PciHeader, PnpHeader, RomHeader, SLOT_TABLE_SIZE,
    checksum,
};
use vmi_abi::probe::{self, Refusal as ProbeRefusal};
use vmi_abi::{REVISION_3_0, Revision};
use zerocopy::FromBytes;

/// The most bytes that the native image may have.
pub const NATIVE_LIMIT: usize = 8 * 1024;

/// The most bytes that the image with native and reference backends may have.
pub const REFERENCE_LIMIT: usize = 16 * 1024;

/// The most bytes that the image with all backends may have.
pub const HYPERVISORS_LIMIT: usize = 32 * 1024;

/// The section that becomes the image; see `linker.ld`.
const SECTION: &str = ".rom";

/// ld keeps three words of the global offset table for itself, and fills none of them in.
const LINKER_TABLE: u64 = 12;

/// Sections that the linker makes for a loader. Nobody loads the image, and they are not in it.
const LOADER_SECTIONS: [&str; 6] =
    [".dynamic", ".dynsym", ".dynstr", ".hash", ".gnu.hash", ".interp"];

/// What fills the space behind the code: a breakpoint, for whoever runs into it.
const FILLER: [u8; 2] = [0xcc, 0xcc];

/// What fills the slots of revision 13.x that hold neither call nor code: UD2. They begin at even
/// offsets, so it is whole where a guest could enter one.
const SLOT_FILLER: [u8; 2] = [0x0f, 0x0b];

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
    let least = if revision(first.bytes).has_slots() { SLOT_TABLE_SIZE } else { 0 };
    let size = (used + 1).next_multiple_of(LENGTH_UNIT).max(least);
    if size > limit {
        return Err(Refusal::TooLarge { size, limit, largest: first.largest() });
    }
    let bytes = finish(first.bytes, size)?;
    Ok(Image { bytes, used })
}

/// The revision that an image says it serves: 3.0 for one that the interface does not know, so that
/// it is refused as no ROM of that.
fn revision(image: &[u8]) -> Revision {
    RomHeader::read_from_prefix(image)
        .map(|(header, _)| Revision {
            major: header.api_version_maj,
            minor: header.api_version_min,
        })
        .ok()
        .filter(|revision| revision.calls().next().is_some())
        .unwrap_or(REVISION_3_0)
}

/// Pads an image to `size` bytes and sets its lengths and checksums.
///
/// # Errors
///
/// The headers are not where they should be.
pub fn finish(unfinished: &[u8], size: usize) -> Result<Vec<u8>, Refusal> {
    let revision = revision(unfinished);
    let filler = if revision.has_slots() { SLOT_FILLER } else { FILLER };
    let mut bytes = unfinished.to_vec();
    bytes.truncate(size);
    bytes.extend((bytes.len()..size).map(|offset| filler[offset % filler.len()]));
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

    probe::probe(&bytes, revision).map_err(Refusal::Header)?;
    Ok(bytes)
}

/// A copy of an image for the expansion ROM of a PCI card: SeaBIOS runs it only if it carries the card's numbers.
///
/// The last byte makes up for the change. Bytes that are no VMI ROM are copied as they are.
#[must_use]
pub fn for_card(image: &[u8], vendor: u16, device: u16) -> Vec<u8> {
    let mut bytes = image.to_vec();
    let Ok((header, _)) = RomHeader::read_from_prefix(image) else { return bytes };
    let length = usize::from(header.rom_length) * LENGTH_UNIT;
    if probe::pci_header(image).is_none()
        || !(size_of::<RomHeader>()..=bytes.len()).contains(&length)
    {
        return bytes;
    }
    let before = checksum(&bytes[..length]);
    let pci =
        bytes.get_mut(usize::from(header.pci_header_offs.get())..).map(PciHeader::mut_from_prefix);
    if let Some(Ok((pci, _))) = pci {
        pci.vendor.set(vendor);
        pci.device.set(device);
    }
    // A sum that was wrong stays as wrong as it was.
    let change = checksum(&bytes[..length]).wrapping_sub(before);
    bytes[length - 1] = bytes[length - 1].wrapping_sub(change);
    bytes
}

/// Makes the sum of all bytes 0 modulo 256 by the byte at `offset`.
fn set_checksum(bytes: &mut [u8], offset: usize) {
    bytes[offset] = 0;
    bytes[offset] = checksum(bytes).wrapping_neg();
}

/// The unit that an instruction uses, if its state belongs to the guest: x87, MMX, SSE and what came later.
#[must_use]
pub fn foreign_unit(instruction: &Instruction) -> Option<String> {
    // The decoder counts it among the first processor's, yet it waits for the floating-point unit.
    if instruction.code() == Code::Wait {
        return Some("FPU".into());
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHT_PROGBITS: u32 = 1;
    const SHT_SYMTAB: u32 = 2;
    const SHT_STRTAB: u32 = 3;
    const SHF_WRITE: u32 = 1;

    /// A section of a file that the linker might have written.
    struct Section {
        name: &'static str,
        kind: u32,
        flags: u32,
        data: Vec<u8>,
    }

    /// A linked file: the image, further sections, and functions in the image.
    struct File {
        base: u32,
        rom: Vec<u8>,
        sections: Vec<Section>,
        functions: Vec<(&'static str, u32, u32)>,
    }

    impl File {
        /// An image with valid headers and one function at 100h.
        fn good() -> Self {
            let mut rom = vec![0; 0x100];
            let mut header =
                RomHeader::read_from_bytes(&[0; size_of::<RomHeader>()]).expect("its own size");
            header.rom_signature.set(vmi_abi::header::ROM_SIGNATURE);
            header.vrom_signature.set(vmi_abi::header::VMI_SIGNATURE);
            header.api_version_maj = 3;
            header.pci_header_offs.set(0x90);
            header.pnp_header_offs.set(0xb0);
            header.license_offs.set(0xd0);
            rom[..size_of::<RomHeader>()].copy_from_slice(zerocopy::IntoBytes::as_bytes(&header));
            rom[0x90..0x94].copy_from_slice(&PCI_SIGNATURE);
            rom[0xb0..0xb4].copy_from_slice(&PNP_SIGNATURE);
            rom[0xd0..0xd4].copy_from_slice(b"GPL\0");
            rom.extend([0x31, 0xc0, 0xc3]); // xor eax, eax; ret
            Self { base: 0, rom, sections: Vec::new(), functions: vec![("answer", 0x100, 3)] }
        }

        /// The same with the function's code replaced.
        fn with_code(code: &[u8]) -> Self {
            let mut file = Self::good();
            file.rom.truncate(0x100);
            file.rom.extend(code);
            file.functions = vec![("answer", 0x100, u32::try_from(code.len()).expect("short"))];
            file
        }

        fn with_section(name: &'static str, kind: u32, size: usize) -> Self {
            let mut file = Self::good();
            file.sections.push(Section {
                name,
                kind,
                flags: SHF_ALLOC | SHF_WRITE,
                data: vec![0; size],
            });
            file
        }

        /// The file's bytes: header, contents, section headers.
        fn bytes(&self) -> Vec<u8> {
            let word = |value: usize| u32::try_from(value).expect("small").to_le_bytes();
            let mut strings = vec![0];
            let mut symbols = vec![0; 16];
            for (name, offset, size) in &self.functions {
                symbols.extend(word(strings.len()));
                symbols.extend((self.base + offset).to_le_bytes());
                symbols.extend(size.to_le_bytes());
                symbols.extend([0x12, 0, 1, 0]); // A global function in section 1.
                strings.extend(name.bytes().chain([0]));
            }
            let symbols_at = self.sections.len() + 2;
            let rom = (".rom", SHT_PROGBITS, SHF_ALLOC, &self.rom, 0);
            let others = self.sections.iter().map(|section| {
                let link = if section.kind == SHT_REL { symbols_at } else { 0 };
                (section.name, section.kind, section.flags, &section.data, link)
            });
            let tables = [
                (".symtab", SHT_SYMTAB, 0, &symbols, symbols_at + 1),
                (".strtab", SHT_STRTAB, 0, &strings, 0),
            ];
            let sections: Vec<_> = [rom].into_iter().chain(others).chain(tables).collect();

            let mut names = vec![0];
            let mut contents = vec![0; 52];
            let mut headers = vec![0; 40];
            let mut address = self.base;
            let mut add = |name: &str,
                           kind: u32,
                           flags: u32,
                           data: &[u8],
                           link: usize,
                           contents: &mut Vec<u8>,
                           names: &mut Vec<u8>| {
                headers.extend(word(names.len()));
                headers.extend(kind.to_le_bytes());
                headers.extend(flags.to_le_bytes());
                headers.extend(if flags & SHF_ALLOC != 0 { address } else { 0 }.to_le_bytes());
                headers.extend(word(contents.len()));
                headers.extend(word(data.len()));
                headers.extend(word(link));
                headers.extend(word(usize::from(kind == SHT_SYMTAB)));
                headers.extend(word(4));
                headers.extend(word(match kind {
                    SHT_SYMTAB => 16,
                    SHT_REL => 8,
                    _ => 0,
                }));
                names.extend(name.bytes().chain([0]));
                contents.extend(data);
                contents.resize(contents.len().next_multiple_of(4), 0);
                address += u32::try_from(data.len()).expect("small");
            };
            for (name, kind, flags, data, link) in &sections {
                add(name, *kind, *flags, data, *link, &mut contents, &mut names);
            }
            let mut all_names = names.clone();
            all_names.extend(b".shstrtab\0");
            add(".shstrtab", SHT_STRTAB, 0, &all_names, 0, &mut contents, &mut names);

            let header: Vec<u8> = [
                b"\x7fELF\x01\x01\x01".as_slice(),
                &[0; 9],
                &[3, 0, 3, 0],
                &word(1),
                &word(0),
                &word(0),
                &word(contents.len()),
                &word(0),
                &[52, 0, 32, 0, 0, 0, 40, 0],
                &u16::try_from(sections.len() + 2).expect("few").to_le_bytes(),
                &u16::try_from(sections.len() + 1).expect("few").to_le_bytes(),
            ]
            .concat();
            contents[..header.len()].copy_from_slice(&header);
            contents.extend(headers);
            contents
        }
    }

    fn refusal(file: &File) -> Refusal {
        make(&file.bytes(), &file.bytes(), NATIVE_LIMIT).expect_err("broken")
    }

    #[test]
    fn lengths_and_checksums_are_set() {
        let other = File { base: 0xc00c_a000, ..File::good() };
        let image =
            make(&File::good().bytes(), &other.bytes(), NATIVE_LIMIT).expect("nothing wrong");
        assert_eq!((image.bytes.len(), image.used, image.free()), (512, 0x103, 512 - 0x103 - 1));
        assert_eq!(checksum(&image.bytes), 0);
        assert_eq!(checksum(&image.bytes[0xb0..0xd0]), 0);
        assert_eq!(image.bytes[2], 1);
        let (pci, _) = PciHeader::read_from_prefix(&image.bytes[0x90..]).expect("long enough");
        assert_eq!((pci.image_length.get(), pci.runtime_length.get()), (1, 1));
        assert!(probe::probe(&image.bytes, REVISION_3_0).is_ok());
    }

    #[test]
    fn the_checksum_has_a_byte_of_its_own() {
        let code = |length: usize| File::with_code(&vec![0x90; length]);
        let size = |file: File| {
            make(&file.bytes(), &file.bytes(), NATIVE_LIMIT).expect("nothing wrong").bytes.len()
        };
        assert_eq!(size(code(0xff)), 512);
        assert_eq!(size(code(0x100)), 1024);
    }

    #[test]
    fn slots_are_padded_to_what_guests_copy() {
        let mut file = File::with_code(&[0xc3]);
        file.rom[offset_of!(RomHeader, api_version_maj)] = 13;
        let image = make(&file.bytes(), &file.bytes(), SLOT_TABLE_SIZE).expect("nothing wrong");
        assert_eq!((image.bytes.len(), image.used), (SLOT_TABLE_SIZE, 0x101));
        assert_eq!(image.bytes[0x101..0x104], [0x0b, 0x0f, 0x0b]);
        assert_eq!(checksum(&image.bytes), 0);
        file.rom[offset_of!(RomHeader, api_version_maj)] = 4;
        let revision = Revision { major: 4, minor: 0 };
        assert_eq!(refusal(&file), Refusal::Header(ProbeRefusal::Revision(revision)));
    }

    #[test]
    fn a_relocation_is_refused_with_its_place() {
        let mut file = File::good();
        let entry = [0x0101_u32.to_le_bytes(), 8_u32.to_le_bytes()].concat();
        file.sections.push(Section {
            name: ".rel.dyn",
            kind: SHT_REL,
            flags: SHF_ALLOC,
            data: entry,
        });
        let refusal = refusal(&file);
        assert!(matches!(refusal, Refusal::Relocation { kind: 8, offset: 0x101, .. }), "{refusal}");
        assert!(refusal.to_string().contains("answer+0x1"), "{refusal}");
    }

    #[test]
    fn writable_data_is_refused() {
        for name in [".data", ".bss", ".forbidden_data", ".rodata", ".text"] {
            let refusal = refusal(&File::with_section(name, SHT_PROGBITS, 4));
            assert!(
                matches!(&refusal, Refusal::Section { section, size: 4, .. } if section == name),
                "{refusal}"
            );
        }
    }

    #[test]
    fn the_linkers_own_words_are_all_that_an_offset_table_may_hold() {
        let file = |size| File::with_section(".forbidden_got", SHT_PROGBITS, size);
        assert!(make(&file(12).bytes(), &file(12).bytes(), NATIVE_LIMIT).is_ok());
        assert!(matches!(refusal(&file(16)), Refusal::Section { size: 16, .. }));
    }

    #[test]
    fn bytes_that_depend_on_the_address_are_refused_with_their_place() {
        let mut other = File { base: 0xc00c_a000, ..File::good() };
        other.rom[0x102] = 0xcb;
        let refusal =
            make(&File::good().bytes(), &other.bytes(), NATIVE_LIMIT).expect_err("a difference");
        assert!(matches!(refusal, Refusal::BaseDependent { offset: 0x102, .. }), "{refusal}");
        assert!(refusal.to_string().contains("answer+0x2"), "{refusal}");
        other.rom.pop();
        let refusal =
            make(&File::good().bytes(), &other.bytes(), NATIVE_LIMIT).expect_err("a difference");
        assert!(refusal.to_string().contains("the end"), "{refusal}");
    }

    #[test]
    fn instructions_of_the_guests_units_are_refused() {
        for (code, text) in [
            (&[0x90, 0x0f, 0x57, 0xc0, 0xc3][..], "xorps"),
            (&[0x90, 0x66, 0x0f, 0xef, 0xc0], "pxor"),
            (&[0x90, 0x0f, 0x77, 0xc3], "emms"),
            (&[0x90, 0xd9, 0xe8, 0xc3], "fld1"),
            (&[0x90, 0x9b, 0xc3], "wait"),
            (&[0x90, 0x0f, 0xae, 0x00], "fxsave"),
            (&[0x90, 0xc5, 0xf8, 0x57, 0xc0], "vxorps"),
        ] {
            let refusal = refusal(&File::with_code(code));
            assert!(
                matches!(refusal, Refusal::ForeignUnit { offset: 0x101, .. }),
                "{text}: {refusal}"
            );
            assert!(refusal.to_string().contains(text), "{text}: {refusal}");
        }
    }

    #[test]
    fn other_young_instructions_are_not() {
        let file = File::with_code(&[
            0x0f, 0x01, 0xf9, 0x0f, 0x34, 0x0f, 0xc7, 0x09, 0x0f, 0x44, 0xc1, 0xf3, 0x90,
        ]);
        assert!(make(&file.bytes(), &file.bytes(), NATIVE_LIMIT).is_ok());
    }

    #[test]
    fn a_function_of_other_bytes_than_instructions_is_refused() {
        assert!(matches!(
            refusal(&File::with_code(&[0x0f, 0xff])),
            Refusal::NoInstruction { offset: 0x100, .. }
        ));
        let mut file = File::good();
        file.functions = vec![("answer", 0x100, 4)];
        assert!(matches!(refusal(&file), Refusal::NoInstruction { .. }));
    }

    #[test]
    fn an_image_over_the_limit_is_refused_with_its_largest_function() {
        let full = NATIVE_LIMIT - 0x100 - 1;
        let file = File::with_code(&vec![0x90; full]);
        assert_eq!(
            make(&file.bytes(), &file.bytes(), NATIVE_LIMIT).map(|image| image.bytes.len()),
            Ok(NATIVE_LIMIT)
        );
        let refusal = refusal(&File::with_code(&vec![0x90; full + 1]));
        assert!(matches!(refusal, Refusal::TooLarge { .. }), "{refusal}");
        assert!(refusal.to_string().contains("answer 7936"), "{refusal}");
    }

    #[test]
    fn headers_that_a_guest_would_not_find_are_refused() {
        let broken = |offset: usize| {
            let mut file = File::good();
            file.rom[offset] ^= 1;
            refusal(&file)
        };
        assert!(matches!(broken(0), Refusal::Header(ProbeRefusal::NoRomSignature)));
        assert!(matches!(broken(13), Refusal::Header(ProbeRefusal::Revision(_))));
        assert!(matches!(broken(24), Refusal::Header(ProbeRefusal::NoPciHeader)));
        assert!(matches!(broken(26), Refusal::NoPnpHeader));
        assert!(matches!(broken(0xd0), Refusal::Header(ProbeRefusal::License)));
        let short = File { rom: vec![0; 10], functions: Vec::new(), ..File::good() };
        assert!(matches!(refusal(&short), Refusal::Header(_)));
    }

    #[test]
    fn a_card_gets_its_own_numbers_and_a_right_sum() {
        let file = File::good().bytes();
        let image = make(&file, &file, NATIVE_LIMIT).expect("nothing wrong").bytes;
        let copy = for_card(&image, 0x8086, 0x100e);
        let pci = probe::pci_header(&copy).expect("a PCIR structure");
        assert_eq!((pci.vendor.get(), pci.device.get(), checksum(&copy)), (0x8086, 0x100e, 0));
        assert_eq!(for_card(b"short", 1, 2), b"short");
        assert_eq!(for_card(&[0; 512], 1, 2), [0; 512]);
        let mut damaged = image;
        damaged[0x40] ^= 0x5a;
        assert_eq!(checksum(&for_card(&damaged, 1, 2)), checksum(&damaged));
    }

    #[test]
    fn another_kind_of_file_is_refused() {
        assert!(matches!(make(b"", b"", 512), Err(Refusal::NotElf(_))));
        let mut file = File::good().bytes();
        file[18] = 62;
        assert!(matches!(make(&file, &file, 512), Err(Refusal::NotElf(_))));
    }

    proptest! {
        #[test]
        fn a_damaged_file_never_panics(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20)) {
            let mut file = File::good().bytes();
            for (index, byte) in damage {
                let at = index.index(file.len());
                file[at] = byte;
            }
            let _ = make(&file, &file, NATIVE_LIMIT);
        }
    }
}
