//! Where a kernel calls the ROM from, and what a ROM may make of that place.
//!
//! A ROM may put a call's own instructions over the instruction that called it. All that it knows
//! of the place is the return address, and the bytes before it in the same page.

use super::machine::{Region, Text};
use super::random::Random;

/// The text around the site: two pages, so that a site may lie across their border.
const TEXT_BASE: u32 = 0xc010_4000;
const PAGE: u32 = 4096;

/// Where the pointers of indirect calls lie, in kernel data.
const POINTERS: u32 = 0xc030_0000;

/// Code of the kernel that is none of the ROM's.
const FOREIGN_CODE: u32 = 0xc015_2340;

/// What any processor sees changed as a whole.
pub const WORD: u32 = 8;

/// `call rel32`, `call [disp32]`, and the prefix with which Linux reads the pointer through CS.
const DIRECT: u8 = 0xe8;
const INDIRECT: [u8; 2] = [0xff, 0x15];
const THROUGH_CS: u8 = 0x2e;

/// What a kernel fills a site up with where a shorter call was written over a longer one. The first
/// is no filler.
const FILLERS: [&[u8]; 8] = [
    b"",
    b"\x90",
    b"\x66\x90",
    b"\x66\x66\x90",
    b"\x89\xf6",
    b"\x8b\xc0",
    b"\x0f\x1f\x00",
    b"\xf3\x90",
];

/// What comes behind all that: of no filler a part.
const RETURN: u8 = 0xc3;

/// A call site.
#[derive(Clone, Debug)]
pub struct Site {
    /// Where it is entered: the prefix, if it has one.
    pub start: u32,
    /// The first byte that a ROM may change.
    pub first: u32,
    /// The return address.
    pub end: u32,
    /// Where the caller goes on: behind the filler, which is there to be executed and does nothing.
    pub resume: u32,
    /// Whether the bytes that may be read prove that the site calls this code and nothing else.
    pub proven: bool,
    /// The variable that it calls through.
    pub pointer: Option<Region>,
    /// Its bytes on entry.
    pub bytes: Vec<u8>,
}

/// The forms that a site takes in turn. Direct and indirect ones lie anywhere in a page, then across
/// its border and next to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Direct,
    Indirect,
    /// A direct call of something else that got to the ROM.
    OtherTarget,
    /// An indirect call of something else.
    OtherPointer,
    /// An instruction of another form, with its bytes from the end.
    Other(&'static [u8]),
}

/// Calls that say nothing of where they lead: through EAX, EDI, memory behind registers.
const OTHERS: [&[u8]; 6] = [
    b"\xff\xd0",
    // Bytes before it that look like a call through a pointer.
    b"\xff\x15\x78\x56\xff\xd7",
    b"\xff\x53\x08",
    b"\xff\x93\x20\x01\x00\x00",
    b"\xff\x94\x24\x80\x00\x00\x00",
    b"\xff\x10",
];

impl Site {
    /// A site that calls `target`. The seed chooses its form and place, so that 64 of them in a row
    /// have all of them; `through_cs` says that no data segment is flat there.
    #[must_use]
    pub fn new(target: u32, through_cs: bool, seed: u64, random: &mut Random) -> Self {
        let step = (seed % 16) as u32;
        let inside = PAGE + 16 * (1 + random.below(PAGE / 16 - 2)) + step;
        // Behind the pages' border by so many bytes, most sites lie across it or touch it.
        let border = PAGE + step % 8;
        let (form, end) = match (seed / 16 % 4, step) {
            (0, _) => (Form::Direct, inside),
            (1, _) => (Form::Indirect, inside),
            (2, 0..8) => (Form::Direct, border),
            (3, 15) => (Form::Direct, PAGE - 1),
            (2, _) => (Form::Indirect, border),
            (_, 0..8) => (
                OTHERS.get(step as usize).map_or(Form::OtherTarget, |bytes| Form::Other(bytes)),
                inside,
            ),
            (_, 8..12) => (Form::OtherPointer, inside),
            _ => (Form::OtherTarget, inside),
        };
        let end = TEXT_BASE + end;
        let mut pointer = None;
        let distance = |target: u32| target.wrapping_sub(end).to_le_bytes();
        let mut through = |target: u32, random: &mut Random| {
            let base = POINTERS + 4 * random.below(0x4_0000);
            let bytes = target.to_le_bytes().to_vec();
            pointer = Some(Region { name: "pointer", base, bytes, writable: false });
            [INDIRECT.as_slice(), &base.to_le_bytes()].concat()
        };
        let bytes = match form {
            Form::Direct => [[DIRECT].as_slice(), &distance(target)].concat(),
            Form::Indirect => through(target, random),
            Form::OtherTarget => [[DIRECT].as_slice(), &distance(FOREIGN_CODE)].concat(),
            Form::OtherPointer => through(FOREIGN_CODE, random),
            Form::Other(bytes) => bytes.to_vec(),
        };
        let first = end - bytes.len() as u32;
        let proves = matches!(form, Form::Direct | Form::Indirect);
        let proven = proves && first / PAGE == (end - 1) / PAGE;
        let prefixed = pointer.is_some() && (through_cs || step.is_multiple_of(2));
        let bytes = if prefixed { [[THROUGH_CS].as_slice(), &bytes].concat() } else { bytes };
        let start = end - bytes.len() as u32;
        let filler = FILLERS[(3 * seed % FILLERS.len() as u64) as usize];
        let bytes = [&bytes, filler].concat();
        let resume = end + filler.len() as u32;
        Self { start, first, end, resume, proven, pointer, bytes }
    }

    /// The bytes between the return address and where the caller goes on.
    #[cfg(test)]
    fn filler(&self) -> &[u8] {
        &self.bytes[(self.end - self.start) as usize..]
    }

    /// The text around it. What does not lie near it is the same everywhere.
    #[must_use]
    pub fn text(&self, random: &mut Random) -> Text {
        let mut bytes = vec![random.word() as u8; 2 * PAGE as usize];
        let place = |address: u32| (address - TEXT_BASE) as usize;
        let (start, end) = (place(self.start), place(self.resume));
        if let Some(near) = bytes.get_mut(start - 16..end + 16) {
            random.fill(near);
        }
        if let Some(site) = bytes.get_mut(start..end) {
            site.copy_from_slice(&self.bytes);
        }
        if let Some(behind) = bytes.get_mut(end) {
            *behind = RETURN;
        }
        Text {
            base: TEXT_BASE,
            bytes,
            granted: (self.end - 1) / PAGE,
            site: self.start..self.resume,
            rival: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn sixty_four_in_a_row_have_every_form_and_place() {
        let sites: Vec<Site> = (0..64)
            .map(|seed| Site::new(0xc00c_8800, false, seed, &mut Random::new(seed)))
            .collect();
        for length in [5, 6] {
            let proven =
                || sites.iter().filter(|site| site.proven && site.end - site.first == length);
            let alignments: BTreeSet<u32> = proven().map(|site| site.first % 16).collect();
            assert_eq!(alignments.len(), 16);
            assert!(proven().any(|site| site.end % PAGE == 0), "at a page's end");
            assert!(proven().any(|site| site.first % PAGE == 0), "at a page's start");
        }
        let crosses = |site: &&Site| site.first / PAGE != (site.end - 1) / PAGE;
        assert!(sites.iter().filter(crosses).count() >= 8);
        assert!(sites.iter().filter(crosses).all(|site| !site.proven));
        assert!(sites.iter().filter(|site| !site.proven).count() >= 24);
        let fillers = |end: &dyn Fn(u32) -> bool| -> BTreeSet<&[u8]> {
            let direct = sites.iter().filter(|site| site.proven && site.pointer.is_none());
            direct.filter(|site| end(site.end)).map(Site::filler).collect()
        };
        assert_eq!(fillers(&|_| true).len(), FILLERS.len());
        // No room for the call in one word; in the page for one byte behind it.
        assert!(fillers(&|end| matches!(end % WORD, 3 | 4)).len() >= 2);
        assert!(fillers(&|end| end % PAGE == PAGE - 1).iter().all(|filler| filler.len() == 2));
        for site in &sites {
            let text = site.text(&mut Random::new(1));
            assert_eq!(text.site_bytes(), site.bytes);
            assert!(site.end - site.start >= 2);
        }
    }
}
