//! What the code under inspection may touch, and what is in it.

use std::collections::HashMap;
use std::ops::Range;

/// Memory that the code was given, besides the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// What it is, for messages.
    pub name: &'static str,
    /// Linear address of the first byte.
    pub base: u32,
    /// Its content.
    pub bytes: Vec<u8>,
    /// Whether the code may change it.
    pub writable: bool,
}

impl Region {
    /// The place of `size` bytes in the region, if all of them are inside.
    fn place(&self, address: u32, size: usize) -> Option<Range<usize>> {
        let start = address.checked_sub(self.base)? as usize;
        let end = start.checked_add(size)?;
        (end <= self.bytes.len()).then_some(start..end)
    }

    /// A little-endian number of up to 8 bytes.
    #[must_use]
    pub fn number(&self, address: u32, size: usize) -> Option<u64> {
        self.place(address, size).map(|place| number(&self.bytes[place]))
    }
}

/// A little-endian number of up to 8 bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

/// Text of the kernel around the place that a call came from: two pages, of which one is granted.
#[derive(Clone, Debug)]
pub struct Text {
    /// Linear address of the first byte.
    pub base: u32,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The page that the code may read: the one that the call's last byte was fetched from.
    pub granted: u32,
    /// The instruction that calls, where it is entered, and its filler. Behind that the caller goes on.
    pub site: Range<u32>,
    /// Another processor that does the same: the bytes that it leaves, and how often the text is read
    /// before they are there.
    pub rival: Option<(u32, Vec<u8>)>,
}

impl Text {
    /// Changes the bytes before and behind the site, as if they were of sites of their own.
    pub fn change_neighbours(&mut self) {
        for address in [self.site.start.wrapping_sub(1), self.site.end] {
            if let Some(byte) = self.bytes.get_mut(address.wrapping_sub(self.base) as usize) {
                *byte ^= 0xff;
            }
        }
    }

    /// Puts other bytes at the site.
    pub fn set_site(&mut self, bytes: &[u8]) {
        let start = self.site.start.wrapping_sub(self.base) as usize;
        if let Some(site) = self.bytes.get_mut(start..start + bytes.len()) {
            site.copy_from_slice(bytes);
        }
    }

    /// To be called before each read.
    pub(super) fn about_to_be_read(&mut self) {
        match &mut self.rival {
            Some((0, bytes)) => {
                self.bytes = std::mem::take(bytes);
                self.rival = None;
            }
            Some((reads, _)) => *reads -= 1,
            None => {}
        }
    }

    /// The place of `size` bytes in the granted page, if all of them are inside.
    fn place(&self, address: u32, size: usize) -> Option<Range<usize>> {
        let last = address.checked_add(size.checked_sub(1)? as u32)?;
        let inside = |address: u32| address / PAGE as u32 == self.granted;
        let start = address.checked_sub(self.base)? as usize;
        (inside(address) && inside(last) && start + size <= self.bytes.len())
            .then_some(start..start + size)
    }

    /// Whether an address is one of the text, granted or not.
    #[must_use]
    pub fn contains(&self, address: u32) -> bool {
        (address.wrapping_sub(self.base) as usize) < self.bytes.len()
    }

    /// The bytes from an address of the site on; `None` outside the site.
    #[must_use]
    pub fn code_at(&self, address: u32) -> Option<&[u8]> {
        let start = address.checked_sub(self.base).filter(|_| self.site.contains(&address))?;
        self.bytes.get(start as usize..)
    }

    /// The bytes of the site.
    #[must_use]
    pub fn site_bytes(&self) -> &[u8] {
        let place = |address: u32| address.wrapping_sub(self.base) as usize;
        self.bytes.get(place(self.site.start)..place(self.site.end)).unwrap_or_default()
    }
}

/// Why an access did not go as the code wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// A store into the image. The real thing drops it.
    Image,
    /// Memory that the code was not given.
    NotGranted,
    /// Kernel text beside the granted page.
    OtherText,
    /// More different pages than are remembered.
    Full,
}

/// Bytes of a page.
const PAGE: usize = 4096;

/// Pages of it that are remembered: what a program fills must not become the host's memory.
const PAGES_KEPT: usize = 64;

/// Linear memory.
#[derive(Clone, Debug)]
pub struct Memory<'a> {
    image: &'a [u8],
    image_base: u32,
    /// The regions, the stack first.
    pub regions: Vec<Region>,
    /// Whether memory that was not given may be touched all the same.
    pub lenient: bool,
    /// Text around the place that a call came from; `None` where nobody may look for one.
    pub text: Option<Text>,
    elsewhere: HashMap<u32, Box<[u8; PAGE]>>,
    full: bool,
}

impl<'a> Memory<'a> {
    /// Memory with the image in it.
    #[must_use]
    pub fn new(image: &'a [u8], image_base: u32, regions: Vec<Region>) -> Self {
        Self {
            image,
            image_base,
            regions,
            lenient: false,
            text: None,
            elsewhere: HashMap::new(),
            full: false,
        }
    }

    /// Whether something was stored that could not be remembered.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// Linear address of the image.
    #[must_use]
    pub fn image_base(&self) -> u32 {
        self.image_base
    }

    /// Bytes of the image that are there.
    #[must_use]
    pub fn image_length(&self) -> usize {
        self.image.len()
    }

    /// The offset in the image that an address stands for.
    #[must_use]
    pub fn offset_of(&self, address: u32) -> Option<usize> {
        let offset = address.checked_sub(self.image_base)? as usize;
        (offset < self.image.len()).then_some(offset)
    }

    /// Whether a store of `size` bytes reaches into kernel text.
    #[must_use]
    pub fn reaches_text(&self, address: u32, size: usize) -> bool {
        let last = address.wrapping_add(size.saturating_sub(1) as u32);
        self.text.as_ref().is_some_and(|text| text.contains(address) || text.contains(last))
    }

    /// Reads up to 8 bytes.
    ///
    /// # Errors
    ///
    /// [`Denied::NotGranted`], [`Denied::OtherText`].
    pub fn read(&self, address: u32, size: usize) -> Result<u64, Denied> {
        if let Some(offset) = self.offset_of(address)
            && let Some(bytes) = self.image.get(offset..offset + size)
        {
            return Ok(number(bytes));
        }
        if let Some(value) = self.regions.iter().find_map(|region| region.number(address, size)) {
            return Ok(value);
        }
        if let Some(text) = self.text.as_ref().filter(|_| self.reaches_text(address, size)) {
            let place = text.place(address, size).ok_or(Denied::OtherText)?;
            return Ok(number(&text.bytes[place]));
        }
        if self.lenient {
            let byte = |i: u32| {
                let (page, place) = page_of(address.wrapping_add(i));
                self.elsewhere.get(&page).and_then(|page| page.get(place)).copied().unwrap_or(0)
            };
            return Ok((0..size as u32)
                .rev()
                .fold(0, |value, i| (value << 8) | u64::from(byte(i))));
        }
        Err(Denied::NotGranted)
    }

    /// Writes up to 8 bytes.
    ///
    /// # Errors
    ///
    /// The store was dropped, for the reason given.
    pub fn write(&mut self, address: u32, size: usize, value: u64) -> Result<(), Denied> {
        let bytes = value.to_le_bytes();
        let last = address.wrapping_add(size.saturating_sub(1) as u32);
        if self.offset_of(address).is_some() || self.offset_of(last).is_some() {
            return Err(Denied::Image);
        }
        for region in &mut self.regions {
            if let Some(place) = region.place(address, size) {
                if !region.writable {
                    return Err(Denied::NotGranted);
                }
                region.bytes[place].copy_from_slice(&bytes[..size]);
                return Ok(());
            }
        }
        if self.reaches_text(address, size) {
            let text = self.text.as_mut().ok_or(Denied::NotGranted)?;
            let place = text.place(address, size).ok_or(Denied::OtherText)?;
            text.bytes[place].copy_from_slice(&bytes[..size]);
            return Ok(());
        }
        if self.lenient {
            for (i, byte) in (0..).zip(&bytes[..size]) {
                let (page, place) = page_of(address.wrapping_add(i));
                if self.elsewhere.len() >= PAGES_KEPT && !self.elsewhere.contains_key(&page) {
                    self.full = true;
                    return Err(Denied::Full);
                }
                let page = self.elsewhere.entry(page).or_insert_with(|| Box::new([0; PAGE]));
                page[place] = *byte;
            }
            return Ok(());
        }
        Err(Denied::NotGranted)
    }
}

/// Number of an address's page, and the place in it.
fn page_of(address: u32) -> (u32, usize) {
    (address / PAGE as u32, address as usize % PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_can_be_read_and_stays_as_it_is() {
        let mut memory = Memory::new(&[1, 2, 3, 4], 0x1000, Vec::new());
        assert_eq!(memory.read(0x1001, 2), Ok(0x0302));
        assert_eq!(memory.write(0x1003, 1, 9), Err(Denied::Image));
        assert_eq!(memory.write(0xfff, 4, 9), Err(Denied::Image));
        assert_eq!(memory.read(0x1003, 1), Ok(4));
        assert_eq!(memory.read(0x1003, 2), Err(Denied::NotGranted));
    }

    #[test]
    fn a_region_ends_where_it_ends() {
        let region = Region { name: "page", base: u32::MAX - 3, bytes: vec![0; 4], writable: true };
        let mut memory = Memory::new(&[], 0, vec![region]);
        assert_eq!(memory.write(u32::MAX - 3, 4, 0x0403_0201), Ok(()));
        assert_eq!(memory.read(u32::MAX - 1, 2), Ok(0x0403));
        assert_eq!(memory.read(u32::MAX, 2), Err(Denied::NotGranted));
        memory.lenient = true;
        assert_eq!(memory.write(u32::MAX, 2, 0x0807), Ok(()));
        assert_eq!(memory.read(u32::MAX, 2), Ok(0x0807));
    }

    #[test]
    fn only_so_much_is_remembered() {
        let mut memory = Memory::new(&[], 0, Vec::new());
        memory.lenient = true;
        for page in 0..PAGES_KEPT as u32 {
            assert_eq!(memory.write(page * PAGE as u32, 8, 7), Ok(()));
        }
        assert!(!memory.is_full());
        assert_eq!(memory.write(4, 4, 8), Ok(()));
        assert_eq!(memory.write(u32::MAX, 1, 7), Err(Denied::Full));
        assert!(memory.is_full());
        assert_eq!(memory.read(4, 4), Ok(8));
    }
}
