//! Where ROMs come from: a file, an object, a memory dump, a running machine, this machine.
//!
//! Whatever the user names is turned into candidates, each with the place where it was found. Nothing
//! here judges a ROM: a candidate has the signatures of a VMI ROM, and the rest is for [`super::rules`].
//! All sources are read-only, have time limits where another program answers, and keep at most
//! [`MOST_ROMS`] images and [`MOST_OTHERS`] remarks in memory, whatever the bytes claim.

mod container;
mod dev_mem;
mod gdb;
pub mod kernel;
mod qmp;
mod scan;
#[cfg(test)]
mod tests;
mod unpack;
mod wire;

pub use dev_mem::DevMemError;
pub(crate) use gdb::store as store_by_gdb;
pub use unpack::{Compression, LARGEST_UNPACKED};
pub use wire::WireError;

use super::rom::{ReadError, Rom};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmi_abi::header::LENGTH_UNIT;

/// Physical addresses that are read from a machine: the option-ROM area, and what follows up to the BIOS.
pub const MACHINE_AREA: Range<u64> = 0xc_0000..0xf_0000;

/// The most bytes that an option ROM's length byte can claim.
pub const LONGEST_ROM: usize = 255 * LENGTH_UNIT;

/// VMI ROMs that are kept from one source.
pub const MOST_ROMS: usize = 32;

/// Other option ROMs that are listed from one source.
pub const MOST_OTHERS: usize = 256;

/// Bytes of an object or a library, which are read as a whole. Dumps have no limit.
pub const LARGEST_OBJECT: u64 = 256 << 20;

/// What to look at. Without one of the options a file is read.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SourceArgs {
    /// A ROM, a memory dump, or an ELF object, static library or kernel that carries a ROM; unpacked if need be
    #[arg(required_unless_present_any = ["qmp", "gdb", "dev_mem"])]
    pub file: Option<PathBuf>,

    /// Take the file for a dump of memory whose first byte lies at this physical address, such as 0xC0000 or C0000h
    #[arg(long, value_name = "ADDRESS", value_parser = address, requires = "file")]
    pub base: Option<u64>,

    /// Choose the N-th VMI ROM that is found, counted from 1
    #[arg(long, value_name = "N", conflicts_with = "at")]
    pub rom: Option<usize>,

    /// Choose the ROM at this physical address; in a file without `--base`, at this offset
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub at: Option<u64>,

    /// Read the option-ROM area of a running QEMU over its machine protocol: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "SOCKET", group = "machine", conflicts_with = "file")]
    pub qmp: Option<qmp::Endpoint>,

    /// Read the option-ROM area of a running QEMU over its gdb stub; the machine halts meanwhile
    #[arg(long, value_name = "HOST:PORT", group = "machine", conflicts_with = "file")]
    pub gdb: Option<String>,

    /// With --gdb: leave the machine stopped, for one that somebody had stopped before
    #[arg(long, requires = "gdb")]
    pub keep_stopped: bool,

    /// Read the option-ROM area of the machine that this runs on
    #[arg(long, group = "machine", conflicts_with = "file")]
    pub dev_mem: bool,

    /// Seconds that a running machine has to answer
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub wait: u64,
}

/// An address: hexadecimal with `0x` in front or `h` behind, or decimal.
///
/// # Errors
///
/// The text is none of these.
pub fn address(text: &str) -> Result<u64, std::num::ParseIntError> {
    match text.strip_prefix("0x").or_else(|| text.strip_suffix(['h', 'H'])) {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

/// Where a ROM was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Origin {
    /// The file or the machine.
    pub place: String,
    /// The library's member.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// The object's section.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section: Option<String>,
    /// The symbol that names the place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub symbol: Option<String>,
    /// The compression that was undone, of the file or of what a kernel's image carries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unpacked: Option<Compression>,
    /// Offset in the section, if there is one, or else in the member, the file, what was unpacked or the area that
    /// was read.
    pub offset: u64,
    /// Offset in the file itself, unless the bytes come from a machine or were unpacked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_offset: Option<u64>,
    /// Physical address, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub physical: Option<u64>,
}

impl Origin {
    /// The file or machine, with the member of a library as tools write it.
    #[must_use]
    pub fn file(&self) -> String {
        match &self.member {
            Some(member) => format!("{}({member})", self.place),
            None => self.place.clone(),
        }
    }

    /// Whether the ROM is a file of its own: then its place says nothing beyond the name.
    #[must_use]
    pub fn is_whole_file(&self) -> bool {
        *self == Self { place: self.place.clone(), file_offset: Some(0), ..Self::default() }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)?;
        if let Some(compression) = self.unpacked {
            write!(f, ", unpacked from {compression}")?;
        }
        if let Some(member) = &self.member {
            write!(f, ", member {member}")?;
        }
        if let Some(section) = &self.section {
            write!(f, ", section {section}")?;
        }
        match self.physical {
            Some(physical) => write!(f, ", physical {physical:X}h")?,
            None if self.offset != 0 || self.section.is_some() => {
                write!(f, ", offset {:X}h", self.offset)?;
            }
            None => {}
        }
        match &self.symbol {
            Some(symbol) => write!(f, " ({symbol})"),
            None => Ok(()),
        }
    }
}

/// A VMI ROM.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The ROM. Its bytes are those that the length byte claims, as far as they are there; a file that
    /// is nothing but this ROM is taken as a whole.
    pub rom: Rom,
    /// Where it was found.
    pub origin: Origin,
    /// What a reader should know about how the bytes were cut out.
    pub remarks: Vec<String>,
}

/// What an option ROM without VMI is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One with a `PCIR` structure.
    Pci {
        /// Vendor of the device.
        vendor: u16,
        /// The device.
        device: u16,
        /// 0 for a PC's BIOS, 3 for EFI.
        code_type: u8,
    },
    /// One with a `$PnP` structure only.
    Pnp,
    /// One with neither.
    Plain,
    /// A VMI header without `55 AA` before it: no guest finds it.
    Unsigned,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci { vendor, device, code_type } => {
                match code_type {
                    0 => f.write_str("BIOS")?,
                    1 => f.write_str("Open Firmware")?,
                    3 => f.write_str("EFI")?,
                    other => write!(f, "code type {other}")?,
                }
                write!(f, ", PCI device {vendor:04x}:{device:04x}")
            }
            Self::Pnp => f.write_str("BIOS, Plug and Play"),
            Self::Plain => f.write_str("BIOS"),
            Self::Unsigned => f.write_str("VMI header without 55 AA: no guest finds it"),
        }
    }
}

/// An option ROM without VMI.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Other {
    /// Offset in the file or the area that was read.
    pub offset: u64,
    /// Physical address, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub physical: Option<u64>,
    /// Bytes that its length byte claims.
    pub bytes: usize,
    /// Whether all of them are there and add up to 0.
    pub checksum_right: bool,
    /// What it is.
    pub kind: Kind,
}

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.physical {
            Some(physical) => write!(f, "physical {physical:X}h")?,
            None => write!(f, "offset {:X}h", self.offset)?,
        }
        write!(f, ": {} bytes, {}", self.bytes, self.kind)?;
        if !self.checksum_right && self.kind != Kind::Unsigned {
            f.write_str(", checksum wrong")?;
        }
        Ok(())
    }
}

/// Everything found in a source.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// VMI ROMs by their place.
    pub roms: Vec<Candidate>,
    /// Other option ROMs by their place.
    pub others: Vec<Other>,
    /// Places that were not kept, because there were too many.
    pub left_out: u64,
}

/// Why there is no ROM to look at.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The file or device cannot be read.
    #[error("cannot read {place}")]
    Read {
        /// The file.
        place: String,
        /// Why.
        source: io::Error,
    },
    /// An object or library is too large to be read as a whole.
    #[error("{place} has {bytes} bytes; objects and libraries are read up to {LARGEST_OBJECT}")]
    TooLarge {
        /// The file.
        place: String,
        /// Its size.
        bytes: u64,
    },
    /// An object or library cannot be followed.
    #[error("{place}: {reason}")]
    Damaged {
        /// The file, and the member of a library.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// Compressed in a way that is not undone here.
    #[error("{place}: compressed with {compression}, which is not unpacked here: unpack it first")]
    Packed {
        /// The file.
        place: String,
        /// The compression.
        compression: Compression,
    },
    /// Compressed bytes that become too many.
    #[error(
        "{place}: {compression} data that unpacks to more than {LARGEST_UNPACKED} bytes, which is as much as is read"
    )]
    Bomb {
        /// The file.
        place: String,
        /// The compression.
        compression: Compression,
    },
    /// No VMI ROM where one should be.
    #[error("{place}: {reason}")]
    NotARom {
        /// The place.
        place: String,
        /// What is wrong with what is there.
        reason: ReadError,
    },
    /// No VMI ROM anywhere.
    #[error("{place}: no VMI ROM found{}", list(others))]
    Nothing {
        /// The file or machine.
        place: String,
        /// What was found instead.
        others: Vec<Other>,
    },
    /// The choice does not exist.
    #[error("{place}: there is no ROM {wanted}: {found} found")]
    NoSuchRom {
        /// The file or machine.
        place: String,
        /// The number that was asked for.
        wanted: usize,
        /// How many there are.
        found: usize,
    },
    /// More than one VMI ROM where one is wanted.
    #[error("{place}: {found} VMI ROMs instead of one")]
    Several {
        /// The file.
        place: String,
        /// How many there are.
        found: usize,
    },
    /// The address is not in the source.
    #[error("{place}: address {at:X}h is not in what was read")]
    Outside {
        /// The file or machine.
        place: String,
        /// The address.
        at: u64,
    },
    /// QEMU does not answer as it should.
    #[error("{place}: {reason}")]
    Wire {
        /// The machine.
        place: String,
        /// What went wrong.
        reason: WireError,
    },
    /// This machine's memory cannot be read.
    #[error(transparent)]
    DevMem(#[from] DevMemError),
}

fn list(others: &[Other]) -> String {
    if others.is_empty() {
        return String::new();
    }
    let lines: Vec<String> = others.iter().map(|other| format!("\n  {other}")).collect();
    format!("; other option ROMs:{}", lines.concat())
}

impl SourceArgs {
    /// A file and nothing else.
    #[must_use]
    pub fn of_file(file: &Path) -> Self {
        Self { file: Some(file.to_owned()), wait: 10, ..Self::default() }
    }

    /// Finds the ROMs that the user means: the one that was chosen, or all.
    ///
    /// # Errors
    ///
    /// The source cannot be read, or it holds no VMI ROM. `Ok` has at least one.
    pub fn find(&self) -> Result<Found, SourceError> {
        let limit = Duration::from_secs(self.wait);
        let (place, memory) = if let Some(endpoint) = &self.qmp {
            let place = format!("QEMU at {endpoint}");
            (
                place.clone(),
                qmp::read(endpoint, MACHINE_AREA, limit)
                    .map_err(|reason| SourceError::Wire { place, reason })?,
            )
        } else if let Some(endpoint) = &self.gdb {
            let place = format!("gdb stub at {endpoint}");
            let memory = gdb::read(endpoint, MACHINE_AREA, limit, self.keep_stopped);
            (place.clone(), memory.map_err(|reason| SourceError::Wire { place, reason })?)
        } else if self.dev_mem {
            (dev_mem::PATH.to_owned(), dev_mem::read(Path::new(dev_mem::PATH), MACHINE_AREA)?)
        } else {
            return self.in_file(self.file.as_deref().unwrap_or(Path::new("")));
        };
        let found = self.in_dump(&place, &mut io::Cursor::new(memory), Some(MACHINE_AREA.start))?;
        Ok(found.not_in_file(None))
    }

    /// The same for bytes in memory, as if they were a file's.
    ///
    /// # Errors
    ///
    /// The bytes hold no VMI ROM.
    pub fn find_in(&self, place: &str, bytes: &[u8]) -> Result<Found, SourceError> {
        self.in_bytes(place, &mut io::Cursor::new(bytes))
    }

    fn in_file(&self, path: &Path) -> Result<Found, SourceError> {
        let place = path.display().to_string();
        let unreadable = |source| SourceError::Read { place: place.to_owned(), source };
        let mut file = File::open(path).map_err(unreadable)?;
        let data = file.metadata().map_err(unreadable)?;
        if !data.is_file() {
            // A pipe cannot be read twice, and its length is not known.
            let bytes = whole(&mut file, u64::MAX, &place)?;
            return self.find_in(&place, &bytes);
        }
        self.in_bytes(&place, &mut file)
    }

    fn in_bytes<R: Read + Seek>(&self, place: &str, reader: &mut R) -> Result<Found, SourceError> {
        let (head, length) = head(reader, place)?;
        if let Some(compression) = Compression::of_file(&head) {
            let bytes = unpack::unpack(compression, &whole(reader, length, place)?, place)?;
            // What is in it may be a kernel, compressed in itself; that is as deep as it goes.
            let found = self.in_plain(place, &mut io::Cursor::new(bytes))?;
            return Ok(found.not_in_file(Some(compression)));
        }
        self.in_plain(place, reader)
    }

    /// Looks at bytes that are not compressed as a whole.
    fn in_plain<R: Read + Seek>(&self, place: &str, reader: &mut R) -> Result<Found, SourceError> {
        let unreadable = |source| SourceError::Read { place: place.to_owned(), source };
        let (head, length) = head(reader, place)?;
        if self.base.is_some() {
            return self.in_dump(place, reader, self.base);
        }
        if head.starts_with(container::ELF) {
            if let Some(segments) = container::core_segments(reader, place)? {
                return self
                    .chosen(place, scan::core(reader, place, &segments).map_err(unreadable)?);
            }
            let bytes = whole(reader, length, place)?;
            self.chosen(place, container::elf(&bytes, place))
        } else if container::is_library(&head) {
            let bytes = whole(reader, length, place)?;
            let found = container::library(&bytes, place)?;
            self.chosen(place, found)
        } else if kernel::is_kernel(&head) {
            let bytes = whole(reader, length, place)?;
            self.chosen(place, kernel::search(&bytes, place)?)
        } else {
            self.in_dump(place, reader, None)
        }
    }

    fn in_dump<R: Read + Seek>(
        &self,
        place: &str,
        reader: &mut R,
        base: Option<u64>,
    ) -> Result<Found, SourceError> {
        let unreadable = |source| SourceError::Read { place: place.to_owned(), source };
        let length = reader.seek(SeekFrom::End(0)).map_err(unreadable)?;
        if let Some(at) = self.at {
            let outside = || SourceError::Outside { place: place.to_owned(), at };
            let offset = at.checked_sub(base.unwrap_or(0)).ok_or_else(outside)?;
            if offset >= length {
                return Err(outside());
            }
            let bytes = some(reader, offset).map_err(unreadable)?;
            let origin = Origin {
                place: place.to_owned(),
                offset,
                file_offset: Some(offset),
                physical: base.map(|_| at),
                ..Origin::default()
            };
            return Candidate::cut(&bytes, origin)
                .map(|rom| Found { roms: vec![rom], ..Found::default() })
                .map_err(|reason| SourceError::NotARom {
                    place: format!("{place}, address {at:X}h"),
                    reason,
                });
        }
        reader.rewind().map_err(unreadable)?;
        let found = scan::dump(reader, place, base).map_err(unreadable)?;
        if base.is_none() && self.rom.is_none() && length <= LONGEST_ROM as u64 && is_single(&found)
        {
            // Nothing but this ROM, right or wrong: its size is then one of the things to judge.
            let bytes = some(reader, 0).map_err(unreadable)?;
            let origin =
                Origin { place: place.to_owned(), file_offset: Some(0), ..Origin::default() };
            let rom = Rom::parse(&bytes)
                .map_err(|reason| SourceError::NotARom { place: place.to_owned(), reason })?;
            let rom = Candidate { rom, origin, remarks: Vec::new() };
            return Ok(Found { roms: vec![rom], ..Found::default() });
        }
        self.chosen(place, found)
    }

    /// Leaves the ROM that the user wants.
    fn chosen(&self, place: &str, mut found: Found) -> Result<Found, SourceError> {
        let count = found.roms.len();
        if count == 0 {
            return Err(SourceError::Nothing { place: place.to_owned(), others: found.others });
        }
        let index = match (self.at, self.rom) {
            (Some(at), _) => {
                let is_there =
                    |rom: &Candidate| rom.origin.physical.unwrap_or(rom.origin.offset) == at;
                Some(
                    found
                        .roms
                        .iter()
                        .position(is_there)
                        .ok_or(SourceError::Outside { place: place.to_owned(), at })?,
                )
            }
            (None, Some(wanted)) => {
                let missing =
                    SourceError::NoSuchRom { place: place.to_owned(), wanted, found: count };
                Some(wanted.checked_sub(1).filter(|index| *index < count).ok_or(missing)?)
            }
            (None, None) => None,
        };
        if let Some(index) = index {
            let rom = found.roms.swap_remove(index);
            found = Found { roms: vec![rom], ..Found::default() };
        }
        Ok(found)
    }
}

impl Found {
    /// For bytes that were read from a machine or unpacked: no offset is one in a file.
    fn not_in_file(mut self, compression: Option<Compression>) -> Self {
        for rom in &mut self.roms {
            rom.origin.file_offset = None;
            // What a kernel's image carries was unpacked last, and offsets count in that.
            rom.origin.unpacked = rom.origin.unpacked.or(compression);
        }
        self
    }
}

impl Candidate {
    /// Takes as many bytes as the length byte claims.
    fn cut(bytes: &[u8], origin: Origin) -> Result<Self, ReadError> {
        let claimed = claimed(bytes);
        let mut remarks = Vec::new();
        let length = if claimed == 0 {
            let length = bytes.len().min(LONGEST_ROM);
            remarks.push(format!("the length byte is 0: {length} bytes are taken"));
            length
        } else {
            claimed
        };
        if length > bytes.len() {
            remarks
                .push(format!("the length byte claims {length} bytes, {} are there", bytes.len()));
        }
        // Fewer bytes than a header would hide what is wrong with the length.
        let length = length.max(size_of::<vmi_abi::header::RomHeader>()).min(bytes.len());
        Ok(Self { rom: Rom::parse(&bytes[..length])?, origin, remarks })
    }
}

/// Reads a file that should hold one ROM.
///
/// # Errors
///
/// It cannot be read, or holds none, or several.
pub fn one(path: &Path) -> Result<Rom, SourceError> {
    let mut found = SourceArgs::of_file(path).find()?;
    match found.roms.len() {
        1 => Ok(found.roms.swap_remove(0).rom),
        count => Err(SourceError::Several { place: path.display().to_string(), found: count }),
    }
}

/// Bytes that an option ROM's length byte claims.
fn claimed(rom: &[u8]) -> usize {
    rom.get(2).map_or(0, |units| usize::from(*units) * LENGTH_UNIT)
}

/// Whether a file holds at most one ROM, which begins where the file does.
fn is_single(found: &Found) -> bool {
    let (roms, others) = (&found.roms, &found.others);
    let extent = match (roms.first(), others.first()) {
        (Some(rom), _) => rom.rom.claimed_length() as u64,
        (None, Some(other)) => other.bytes as u64,
        (None, None) => 0,
    };
    roms.len() <= 1
        && roms.iter().all(|rom| rom.origin.offset == 0)
        && others.iter().all(|other| other.offset == 0 || other.offset < extent)
}

/// The first bytes, which tell what a file is, and how many there are; the reader is where it was.
fn head<R: Read + Seek>(reader: &mut R, place: &str) -> Result<(Vec<u8>, u64), SourceError> {
    let unreadable = |source| SourceError::Read { place: place.to_owned(), source };
    let mut head = Vec::new();
    reader.take(kernel::HEAD).read_to_end(&mut head).map_err(unreadable)?;
    let length = reader.seek(SeekFrom::End(0)).map_err(unreadable)?;
    reader.rewind().map_err(unreadable)?;
    Ok((head, length))
}

/// As much from an offset on as a ROM can have.
fn some<R: Read + Seek>(reader: &mut R, offset: u64) -> io::Result<Vec<u8>> {
    reader.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    reader.take(LONGEST_ROM as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// All bytes of an object, a library or a pipe.
fn whole<R: Read>(reader: &mut R, length: u64, place: &str) -> Result<Vec<u8>, SourceError> {
    let mut bytes = Vec::new();
    if length <= LARGEST_OBJECT || length == u64::MAX {
        reader
            .take(LARGEST_OBJECT + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| SourceError::Read { place: place.to_owned(), source })?;
        if bytes.len() as u64 <= LARGEST_OBJECT {
            return Ok(bytes);
        }
    }
    let bytes = length.min(LARGEST_OBJECT + 1);
    Err(SourceError::TooLarge { place: place.to_owned(), bytes })
}
