//! ROMs inside a compressed Linux kernel for x86, a `bzImage`.
//!
//! The image starts with a setup part of some sectors, which the boot protocol describes. Behind it is 32-bit code
//! that carries the kernel, compressed. Since protocol 2.08 the setup part says where; before, only the beginning of
//! gzip data tells.

use super::unpack::{self, Compression};
use super::{Found, SourceError, container};

/// Bytes in which everything lies that tells what a file is.
pub const HEAD: u64 = 0x250;

/// The setup part's signature, and where it is.
const SIGNATURE: (usize, &[u8]) = (0x202, b"HdrS");

/// Where the setup part says how many sectors it has behind the first.
const SETUP_SECTORS: usize = 0x1f1;

/// Sectors if it says 0.
const SETUP_SECTORS_IF_0: usize = 4;

/// Bytes of a sector.
const SECTOR: usize = 512;

/// Where the protocol's version is.
const VERSION: usize = 0x206;

/// The first version with the two fields below.
const VERSION_WITH_PAYLOAD: u16 = 0x208;

/// Where the compressed kernel's offset is, which counts from the end of the setup part.
const PAYLOAD_OFFSET: usize = 0x248;

/// Where the compressed kernel's length is.
const PAYLOAD_LENGTH: usize = 0x24c;

/// Places that look like the beginning of gzip data and are tried: each may cost as much as unpacking ever does.
const MOST_PLACES: usize = 8;

/// Bytes behind all but gzip data: the length of the kernel, for whoever unpacks it.
const LENGTH: usize = 4;

/// Whether a file starts as a kernel's image does.
#[must_use]
pub fn is_kernel(head: &[u8]) -> bool {
    head.get(SIGNATURE.0..).is_some_and(|bytes| bytes.starts_with(SIGNATURE.1))
}

/// The kernel that an image carries.
enum Payload<'a> {
    /// Unpacked.
    Unpacked(Compression, Vec<u8>),
    /// As it lies in the file, from an offset on.
    Plain(u64, &'a [u8]),
}

/// The ROMs of a kernel.
pub(super) fn search(bytes: &[u8], place: &str) -> Result<Found, SourceError> {
    match payload(bytes, place)? {
        Payload::Unpacked(compression, kernel) => {
            Ok(container::elf(&kernel, place).not_in_file(Some(compression)))
        }
        Payload::Plain(start, kernel) => {
            let mut found = container::elf(kernel, place);
            for rom in &mut found.roms {
                rom.origin.file_offset = rom.origin.file_offset.map(|offset| start + offset);
            }
            Ok(found)
        }
    }
}

fn payload<'a>(bytes: &'a [u8], place: &str) -> Result<Payload<'a>, SourceError> {
    let damaged =
        |reason: &str| SourceError::Damaged { place: place.to_owned(), reason: reason.to_owned() };
    let version = field(bytes, VERSION).map(u16::from_le_bytes).unwrap_or_default();
    let sectors = match bytes.get(SETUP_SECTORS) {
        None | Some(0) => SETUP_SECTORS_IF_0,
        Some(sectors) => usize::from(*sectors),
    };
    let setup = (sectors + 1) * SECTOR;
    let code =
        bytes.get(setup..).ok_or_else(|| damaged("the kernel ends before its setup part does"))?;
    if version < VERSION_WITH_PAYLOAD {
        return unlisted(code, place);
    }
    let word = |at| field(bytes, at).map(|word| u32::from_le_bytes(word) as usize);
    let (offset, payload) = word(PAYLOAD_OFFSET)
        .zip(word(PAYLOAD_LENGTH))
        .and_then(|(offset, length)| Some((offset, code.get(offset..)?.get(..length)?)))
        .ok_or_else(|| damaged("the payload lies outside of the kernel's image"))?;
    if payload.starts_with(container::ELF) {
        return Ok(Payload::Plain((setup + offset) as u64, payload));
    }
    let compression = Compression::of_payload(payload)
        .ok_or_else(|| damaged("the payload is compressed in a way that is not known"))?;
    // LZMA has no end of its own, so that one byte too many counts as damage.
    let payload = match compression {
        Compression::Lzma => payload.get(..payload.len().saturating_sub(LENGTH)),
        _ => Some(payload),
    };
    let kernel = unpack::unpack(compression, payload.unwrap_or_default(), place)?;
    Ok(Payload::Unpacked(compression, kernel))
}

/// The kernel in an image that does not say where it is.
fn unlisted<'a>(code: &[u8], place: &str) -> Result<Payload<'a>, SourceError> {
    let places = code.windows(3).enumerate();
    let places =
        places.filter(|(_, window)| Compression::of_file(window) == Some(Compression::Gzip));
    for (at, _) in places.take(MOST_PLACES) {
        match unpack::unpack(Compression::Gzip, &code[at..], place) {
            Ok(kernel) => return Ok(Payload::Unpacked(Compression::Gzip, kernel)),
            Err(error @ SourceError::Bomb { .. }) => return Err(error),
            Err(_) => {}
        }
    }
    Err(SourceError::Damaged {
        place: place.to_owned(),
        reason: "a kernel of a boot protocol before 2.08 without gzip data".to_owned(),
    })
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{find, found, object, sample};
    use super::super::unpack::tests::{UNPACKED, pack};
    use super::super::{SourceArgs, SourceError};
    use super::*;
    use object::Architecture;

    /// A kernel's image with a payload at a distance behind the setup part.
    fn image(version: u16, sectors: u8, distance: usize, payload: &[u8]) -> Vec<u8> {
        let setup = (usize::from(if sectors == 0 { 4 } else { sectors }) + 1) * SECTOR;
        let mut bytes = vec![0; setup + distance];
        bytes[SETUP_SECTORS] = sectors;
        bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        bytes[SIGNATURE.0..][..4].copy_from_slice(SIGNATURE.1);
        bytes[VERSION..][..2].copy_from_slice(&version.to_le_bytes());
        if version >= VERSION_WITH_PAYLOAD {
            bytes[PAYLOAD_OFFSET..][..4].copy_from_slice(&(distance as u32).to_le_bytes());
            bytes[PAYLOAD_LENGTH..][..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        }
        bytes.extend(payload);
        bytes.extend([0xcc; 100]);
        bytes
    }

    /// A payload as the kernel's build makes it: the length follows, except where gzip data ends in it anyway.
    fn payload(compression: Compression, kernel: &[u8]) -> Vec<u8> {
        let mut bytes = pack(compression, kernel);
        if compression != Compression::Gzip {
            bytes.extend((kernel.len() as u32).to_le_bytes());
        }
        bytes
    }

    fn reason(bytes: &[u8]) -> String {
        find(bytes, &SourceArgs::default()).expect_err("no kernel").to_string()
    }

    #[test]
    fn a_payload_is_unpacked_and_searched() {
        let kernel = object(Architecture::I386);
        for compression in UNPACKED {
            for sectors in [0, 1, 27] {
                let bytes = image(0x208, sectors, 0x123, &payload(compression, &kernel));
                let found = found(&bytes);
                let [rom] = found.roms.as_slice() else { panic!("{found:?}") };
                assert_eq!(rom.rom.file(), sample());
                let origin = &rom.origin;
                assert_eq!((origin.unpacked, origin.file_offset), (Some(compression), None));
                assert_eq!(origin.symbol.as_deref(), Some("vendor_rom"));
                let shown =
                    format!("unpacked from {compression}, section .vmi, offset Ch (vendor_rom)");
                assert!(origin.to_string().ends_with(&shown), "{origin}");
            }
        }
        let plain = found(&image(0x20f, 4, 0, &kernel));
        assert_eq!((plain.roms.len(), plain.roms[0].origin.unpacked), (1, None));
        let place = plain.roms[0].origin.file_offset.expect("in the file") as usize;
        assert!(image(0x20f, 4, 0, &kernel)[place..].starts_with(&sample()));
        // Before 2.6.26 the payload is no ELF file but the bytes as they lie in memory, the ROM on any of them.
        let raw = [vec![0x90; 77], sample()].concat();
        let raw = found(&image(0x209, 4, 0, &payload(Compression::Gzip, &raw)));
        assert_eq!(raw.roms[0].origin.offset, 77);
    }

    #[test]
    fn an_old_image_is_searched_for_gzip_data() {
        let kernel = [vec![0x90; 77], sample()].concat();
        let packed = pack(Compression::Gzip, &kernel);
        let found = found(&image(0x206, 7, 0x3001, &packed));
        assert_eq!(found.roms[0].origin.unpacked, Some(Compression::Gzip));
        assert_eq!((found.roms[0].rom.file(), found.roms[0].origin.offset), (&*sample(), 77));
        // What only looks like the beginning is passed over.
        let decoy = [&b"\x1f\x8b\x08decoy"[..], &packed].concat();
        assert_eq!(super::super::tests::found(&image(0x200, 7, 3, &decoy)).roms.len(), 1);
        let text = reason(&image(0x207, 7, 3, b"nothing"));
        assert!(text.contains("before 2.08 without gzip data"), "{text}");
        let many = [&b"\x1f\x8b\x08".repeat(MOST_PLACES)[..], &packed].concat();
        assert!(reason(&image(0x207, 7, 3, &many)).contains("without gzip data"));
    }

    #[test]
    fn a_kernel_inside_a_compressed_file() {
        let bytes = image(0x20a, 4, 0, &payload(Compression::Xz, &object(Architecture::I386)));
        let found = found(&pack(Compression::Gzip, &bytes));
        assert_eq!(found.roms[0].origin.unpacked, Some(Compression::Xz), "offsets count in this");
    }

    #[test]
    fn what_is_wrong_with_a_kernel_is_said() {
        let right = image(0x208, 4, 16, &pack(Compression::Gzip, &sample()));
        let cut = |length: usize| reason(&right[..length]);
        assert!(cut(0x250).contains("ends before its setup part does"), "{}", cut(0x250));
        assert!(cut(0xa00).contains("payload lies outside"), "{}", cut(0xa00));
        assert!(cut(0xa20).contains("payload lies outside"));
        for at in [PAYLOAD_OFFSET, PAYLOAD_LENGTH] {
            let mut far = right.clone();
            far[at..at + 4].copy_from_slice(&[0xff; 4]);
            assert!(reason(&far).contains("payload lies outside"));
        }
        let mut damaged = right.clone();
        damaged[0xa40] ^= 0x40;
        assert!(reason(&damaged).contains("damaged gzip data"), "{}", reason(&damaged));
        let unknown = reason(&image(0x208, 4, 0, b"something else"));
        assert!(unknown.contains("compressed in a way that is not known"), "{unknown}");
        for (head, name) in
            [(&b"BZh9"[..], "bzip2"), (b"\x89LZO\0\r\n\x1a\n", "lzo"), (b"\x02\x21\x4c\x18", "lz4")]
        {
            let text = reason(&image(0x208, 4, 0, head));
            assert!(text.contains(&format!("compressed with {name}")), "{text}");
        }
        let empty = image(0x208, 4, 0, &payload(Compression::Zstd, b"no ROM"));
        let error = find(&empty, &SourceArgs::default()).expect_err("no ROM");
        assert!(matches!(error, SourceError::Nothing { .. }), "{error}");
    }
}
