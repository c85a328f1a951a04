//! As much of the ELF format for 32-bit x86 as a kernel's file needs: what is to be loaded, and notes.

/// Values of fields.
const MAGIC: [u8; 7] = [0x7f, b'E', b'L', b'F', 1, 1, 1];
const ET_EXEC: u16 = 2;
const EM_386: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// Offsets of fields of the file's header.
const E_TYPE: usize = 16;
const E_MACHINE: usize = 18;
const E_PHOFF: usize = 28;
const E_PHENTSIZE: usize = 42;
const E_PHNUM: usize = 44;

/// A program for 32-bit x86.
#[derive(Clone, Copy)]
pub(crate) struct Program<'a> {
    file: &'a [u8],
}

/// A piece of it.
pub(crate) struct Segment<'a> {
    kind: u32,
    /// What the file has of it.
    pub(crate) bytes: &'a [u8],
    /// Where it is loaded to.
    pub(crate) physical: u32,
    /// The bytes that it has in memory.
    pub(crate) size: u32,
}

fn half(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn slice(bytes: &[u8], start: u32, length: u32) -> Option<&[u8]> {
    bytes.get(start as usize..)?.get(..length as usize)
}

impl<'a> Program<'a> {
    /// The program in a file; `None` if it holds none, or one with pieces that are not in the file.
    pub(crate) fn of(file: &'a [u8]) -> Option<Self> {
        let program = Self { file };
        let is_one = file.starts_with(&MAGIC)
            && half(file, E_TYPE)? == ET_EXEC
            && half(file, E_MACHINE)? == EM_386;
        let is_whole = (0..program.count()?).all(|index| program.segment(index).is_some());
        (is_one && is_whole).then_some(program)
    }

    fn count(self) -> Option<u16> {
        half(self.file, E_PHNUM)
    }

    fn segment(self, index: u16) -> Option<Segment<'a>> {
        let size = usize::from(half(self.file, E_PHENTSIZE)?);
        let start = word(self.file, E_PHOFF)? as usize + usize::from(index) * size;
        let header = self.file.get(start..)?;
        let [kind, offset, _, physical, length, size] =
            [0, 4, 8, 12, 16, 20].map(|offset| word(header, offset));
        let bytes = slice(self.file, offset?, length?)?;
        Some(Segment { kind: kind?, bytes, physical: physical?, size: size? })
    }

    fn segments(self) -> impl Iterator<Item = Segment<'a>> {
        (0..self.count().unwrap_or(0)).filter_map(move |index| self.segment(index))
    }

    /// What is to be loaded.
    pub(crate) fn loaded(self) -> impl Iterator<Item = Segment<'a>> {
        self.segments().filter(|segment| segment.kind == PT_LOAD)
    }

    /// The text of the first note of a name and a type.
    pub(crate) fn note(self, name: &str, kind: u32) -> Option<&'a [u8]> {
        let mut notes = self.segments().filter(|segment| segment.kind == PT_NOTE);
        notes.find_map(|segment| note(segment.bytes, name, kind))
    }
}

/// The same in a segment of notes: each has three words, a name that ends in a NUL, a text, both filled up to words.
fn note<'a>(mut notes: &'a [u8], name: &str, kind: u32) -> Option<&'a [u8]> {
    const HEADER: u32 = 12;
    loop {
        let [name_length, length] = [word(notes, 0)?, word(notes, 4)?];
        let start = HEADER.checked_add(name_length.checked_next_multiple_of(4)?)?;
        let found = slice(notes, HEADER, name_length)?;
        let text = slice(notes, start, length)?;
        if found.strip_suffix(&[0]) == Some(name.as_bytes()) && word(notes, 8)? == kind {
            return Some(text);
        }
        notes = notes.get((start as usize).checked_add(length as usize)?.next_multiple_of(4)..)?;
    }
}
