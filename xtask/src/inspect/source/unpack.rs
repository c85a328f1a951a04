//! Compressed bytes, unpacked in memory and only up to a limit: a few bytes may stand for endless ones.

use super::SourceError;
use std::fmt;
use std::io::{self, Read, Write};

/// The most bytes that compressed data may become.
pub const LARGEST_UNPACKED: u64 = 256 << 20;

/// The most memory that a decoder may keep for looking back. What compresses kernels asks for 64 MiB at most.
const LARGEST_WINDOW: usize = 128 << 20;

/// A way of compressing, as files and kernels have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// DEFLATE in the frame of RFC 1952.
    Gzip,
    /// LZMA2 in the frame of the XZ utilities.
    Xz,
    /// LZMA with the 13 bytes in front that the LZMA utilities wrote.
    Lzma,
    /// Zstandard, RFC 8878.
    Zstd,
    /// Not unpacked here.
    Bzip2,
    /// Not unpacked here.
    Lzo,
    /// Not unpacked here.
    Lz4,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Zstd => "zstd",
            Self::Bzip2 => "bzip2",
            Self::Lzo => "lzo",
            Self::Lz4 => "lz4",
        })
    }
}

impl Compression {
    /// The compression that a file's first bytes tell of.
    #[must_use]
    pub fn of_file(head: &[u8]) -> Option<Self> {
        const SIGNATURES: [(&[u8], Compression); 7] = [
            (b"\x1f\x8b\x08", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
            (b"BZh", Compression::Bzip2),
            (b"\x89LZO\0\r\n", Compression::Lzo),
            (b"\x02\x21\x4c\x18", Compression::Lz4),
            (b"\x04\x22\x4d\x18", Compression::Lz4),
        ];
        let known = SIGNATURES.iter().find(|(signature, _)| head.starts_with(signature));
        known.map(|(_, compression)| *compression)
    }

    /// The same for what a kernel's image carries. LZMA has no signature, only values that are usual, so that only a
    /// place where something compressed must be tells it from other bytes.
    #[must_use]
    pub fn of_payload(head: &[u8]) -> Option<Self> {
        Self::of_file(head).or_else(|| head.starts_with(b"\x5d\0\0").then_some(Self::Lzma))
    }
}

/// Unpacks bytes that begin as the compression has it; what follows their end is passed over.
pub(super) fn unpack(
    compression: Compression,
    packed: &[u8],
    place: &str,
) -> Result<Vec<u8>, SourceError> {
    within(compression, packed, place, LARGEST_UNPACKED)
}

/// The same up to another limit.
pub(super) fn within(
    compression: Compression,
    packed: &[u8],
    place: &str,
    limit: u64,
) -> Result<Vec<u8>, SourceError> {
    let mut kept = Kept { bytes: Vec::new(), limit, is_full: false };
    let done = match compression {
        Compression::Gzip => pour(flate2::bufread::GzDecoder::new(packed), &mut kept),
        Compression::Xz => xz(packed, &mut kept),
        Compression::Lzma => lzma(packed, &mut kept),
        Compression::Zstd => zstd(packed, &mut kept),
        Compression::Bzip2 | Compression::Lzo | Compression::Lz4 => {
            return Err(SourceError::Packed { place: place.to_owned(), compression });
        }
    };
    if kept.is_full {
        return Err(SourceError::Bomb { place: place.to_owned(), compression });
    }
    match done {
        Ok(()) => Ok(kept.bytes),
        Err(error) => Err(SourceError::Damaged {
            place: place.to_owned(),
            reason: format!("damaged {compression} data: {error}"),
        }),
    }
}

/// Unpacked bytes up to a limit. The next one is refused, which ends every decoder.
struct Kept {
    bytes: Vec<u8>,
    limit: u64,
    is_full: bool,
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.bytes.len() + bytes.len()) as u64 > self.limit {
            self.is_full = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn pour(mut decoder: impl Read, kept: &mut Kept) -> io::Result<()> {
    io::copy(&mut decoder, kept).map(|_| ())
}

fn zstd(packed: &[u8], kept: &mut Kept) -> io::Result<()> {
    let window = LARGEST_WINDOW as u64;
    let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, window);
    pour(decoder.map_err(io::Error::other)?, kept)
}

fn lzma(packed: &[u8], kept: &mut Kept) -> io::Result<()> {
    let options = lzma_rs::decompress::Options {
        memlimit: Some(LARGEST_WINDOW),
        ..lzma_rs::decompress::Options::default()
    };
    let mut rest = packed;
    lzma_rs::lzma_decompress_with_options(&mut rest, kept, &options).map_err(|error| match error {
        lzma_rs::error::Error::IoError(error) | lzma_rs::error::Error::HeaderTooShort(error) => {
            error
        }
        lzma_rs::error::Error::LzmaError(reason) | lzma_rs::error::Error::XzError(reason) => {
            io::Error::other(reason)
        }
    })
}

fn xz(mut packed: &[u8], kept: &mut Kept) -> io::Result<()> {
    let mut decoder = xz4rust::XzDecoder::in_heap_with_alloc_dict_size(0, LARGEST_WINDOW);
    let mut piece = vec![0; 1 << 16];
    loop {
        let step = decoder.decode(packed, &mut piece).map_err(io::Error::other)?;
        packed = packed.get(step.input_consumed()..).unwrap_or_default();
        kept.write_all(piece.get(..step.output_produced()).unwrap_or_default())?;
        if step.is_end_of_stream() {
            return Ok(());
        }
        if !step.made_progress() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tests::{find, found, memory, object, sample};
    use super::super::{Origin, SourceArgs};
    use super::*;
    use object::Architecture;

    /// What can be unpacked.
    pub(in super::super) const UNPACKED: [Compression; 4] =
        [Compression::Gzip, Compression::Xz, Compression::Lzma, Compression::Zstd];

    pub(in super::super) fn pack(compression: Compression, mut bytes: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        match compression {
            Compression::Gzip => {
                let level = flate2::Compression::fast();
                let mut encoder = flate2::write::GzEncoder::new(&mut packed, level);
                encoder.write_all(bytes).and_then(|()| encoder.finish().map(|_| ()))
            }
            Compression::Xz => lzma_rs::xz_compress(&mut bytes, &mut packed),
            Compression::Lzma => lzma_rs::lzma_compress(&mut bytes, &mut packed),
            _ => {
                let level = ruzstd::encoding::CompressionLevel::Fastest;
                packed = ruzstd::encoding::compress_to_vec(bytes, level);
                Ok(())
            }
        }
        .expect("a vector grows");
        packed
    }

    #[test]
    fn what_was_packed_comes_back() {
        let bytes = [memory(), memory()].concat();
        for compression in UNPACKED {
            let mut packed = pack(compression, &bytes);
            assert_eq!(Compression::of_payload(&packed), Some(compression));
            assert_eq!(unpack(compression, &packed, "x").expect("right"), bytes, "{compression}");
            if compression != Compression::Lzma {
                assert_eq!(Compression::of_file(&packed), Some(compression));
                packed.extend(b"more");
                assert_eq!(unpack(compression, &packed, "x").expect("right"), bytes);
            }
        }
    }

    #[test]
    fn a_bomb_is_no_more_than_the_limit() {
        let bytes = vec![0; 1 << 20];
        for compression in UNPACKED {
            let packed = pack(compression, &bytes);
            let limit = bytes.len() as u64;
            assert_eq!(within(compression, &packed, "x", limit).expect("just enough"), bytes);
            let error = within(compression, &packed, "x", limit - 1).expect_err("one too many");
            assert!(matches!(error, SourceError::Bomb { .. }), "{error}");
            let text = error.to_string();
            assert!(text.starts_with(&format!("x: {compression} data")), "{text}");
        }
    }

    #[test]
    fn damage_names_the_compression() {
        for compression in UNPACKED {
            let packed = pack(compression, &memory());
            let mut changed = packed.clone();
            let middle = changed.len() / 2;
            changed[middle] ^= 0x55;
            changed[middle + 1] ^= 0x55;
            for bytes in [&packed[..packed.len() / 2], &packed[..4], &[], &changed] {
                let Err(error) = unpack(compression, bytes, "x") else {
                    // LZMA alone has no sum, and these XZ data have none either.
                    assert!(matches!(compression, Compression::Lzma | Compression::Xz));
                    assert_eq!(bytes, changed);
                    continue;
                };
                let text = error.to_string();
                let start = format!("x: damaged {compression} data: ");
                assert!(text.starts_with(&start) && text.len() > start.len(), "{text}");
            }
        }
    }

    #[test]
    fn a_window_beyond_the_limit_is_refused() {
        // Properties, a dictionary of 4 GiB less a byte, an unknown length; then a literal at a distance.
        let error = unpack(Compression::Lzma, &[0x5d; 5], "x").expect_err("too short");
        assert!(error.to_string().contains("damaged lzma"), "{error}");
        // A frame's header with a window of 1 GiB: descriptor 0, exponent 20.
        let zstd = [&b"\x28\xb5\x2f\xfd\x00\xa0"[..], &[1, 0, 0]].concat();
        let error = unpack(Compression::Zstd, &zstd, "x").expect_err("too large");
        assert!(error.to_string().contains("damaged zstd data"), "{error}");
    }

    #[test]
    fn compressed_files_are_read_as_what_is_in_them() {
        let no_options = SourceArgs::default();
        for compression in [Compression::Gzip, Compression::Xz, Compression::Zstd] {
            let whole = found(&pack(compression, &sample()));
            assert_eq!(whole.roms[0].rom.file(), sample());
            let origin = &whole.roms[0].origin;
            assert_eq!((origin.unpacked, origin.file_offset), (Some(compression), None));
            assert!(!origin.is_whole_file());
            assert!(origin.to_string().ends_with(&format!("unpacked from {compression}")));
            let in_object = found(&pack(compression, &object(Architecture::I386)));
            assert_eq!(in_object.roms[0].origin.section.as_deref(), Some(".vmi"));
            let dump = pack(compression, &memory());
            let args = SourceArgs { base: Some(0xc_0000), rom: Some(2), ..SourceArgs::default() };
            let in_dump = find(&dump, &args).expect("the second");
            assert_eq!(in_dump.roms[0].origin.physical, Some(0xc_8000));
            let nothing = find(&pack(compression, b"nothing"), &no_options);
            assert!(matches!(nothing, Err(SourceError::NotARom { .. })), "{nothing:?}");
        }
        let plain = found(&sample());
        assert_eq!(plain.roms[0].origin.file_offset, Some(0));
        assert!(plain.roms[0].origin.is_whole_file());
        assert!(!Origin { offset: 1, ..plain.roms[0].origin.clone() }.is_whole_file());
        for (head, name) in [
            (&b"BZh91AY&SY"[..], "bzip2"),
            (b"\x89LZO\0\r\n\x1a\n", "lzo"),
            (b"\x02\x21\x4c\x18", "lz4"),
            (b"\x04\x22\x4d\x18", "lz4"),
        ] {
            let error = find(head, &no_options).expect_err("not unpacked").to_string();
            assert!(error.contains(&format!("compressed with {name}")), "{error}");
        }
    }
}
