//! Physical memory of the machine that this runs on, read-only.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

/// The kernel's view of physical memory.
pub(super) const PATH: &str = "/dev/mem";

/// What the kernel says of its lockdown, if it has one.
const LOCKDOWN: &str = "/sys/kernel/security/lockdown";

/// Bytes that are read at once, so that a refusal names its page.
const PIECE: usize = 4096;

/// Why physical memory cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DevMemError {
    /// The device cannot be opened.
    #[error("cannot open {path}: {error}; {hint}")]
    Open {
        /// The device.
        path: String,
        /// The kernel's answer.
        error: io::Error,
        /// What it most likely means.
        hint: String,
    },
    /// The device gives no bytes of this page.
    #[error("cannot read physical {address:X}h from {path}: {error}; {hint}")]
    Page {
        /// The device.
        path: String,
        /// The page.
        address: u64,
        /// The kernel's answer.
        error: io::Error,
        /// What it most likely means.
        hint: String,
    },
}

/// Reads an area of physical memory.
pub(super) fn read(path: &Path, area: Range<u64>) -> Result<Vec<u8>, DevMemError> {
    let name = || path.display().to_string();
    let lockdown = std::fs::read_to_string(LOCKDOWN).ok();
    let mut device = File::open(path).map_err(|error| DevMemError::Open {
        path: name(),
        hint: opening_hint(&error, lockdown.as_deref()),
        error,
    })?;
    let mut memory = vec![0; (area.end - area.start) as usize];
    for (address, page) in (area.start..).step_by(PIECE).zip(memory.chunks_mut(PIECE)) {
        device.seek(SeekFrom::Start(address)).and_then(|_| device.read_exact(page)).map_err(
            |error| DevMemError::Page {
                path: name(),
                address,
                hint: reading_hint(&error, lockdown.as_deref()),
                error,
            },
        )?;
    }
    Ok(memory)
}

/// The active mode stands in brackets: `none [integrity] confidentiality`.
fn lockdown_mode(text: &str) -> Option<&str> {
    let mode = text.split_once('[')?.1.split_once(']')?.0;
    (mode != "none").then_some(mode)
}

fn opening_hint(error: &io::Error, lockdown: Option<&str>) -> String {
    match (error.kind(), lockdown.and_then(lockdown_mode)) {
        (io::ErrorKind::NotFound, _) => {
            "the kernel was built without CONFIG_DEVMEM, or this is a container without the device"
                .into()
        }
        (io::ErrorKind::PermissionDenied, Some(mode)) => {
            format!(
                "the kernel is locked down ({mode}), usually by Secure Boot: boot with lockdown off, or read the ROM elsewhere"
            )
        }
        (io::ErrorKind::PermissionDenied, None) => {
            "it takes root with CAP_SYS_RAWIO, and a container that lets it through".into()
        }
        _ => "the kernel does not say more".into(),
    }
}

fn reading_hint(error: &io::Error, lockdown: Option<&str>) -> String {
    match (error.kind(), lockdown.and_then(lockdown_mode)) {
        (io::ErrorKind::PermissionDenied, Some(mode)) => {
            format!("the kernel is locked down ({mode})")
        }
        (io::ErrorKind::PermissionDenied, None) => {
            "the kernel was built with CONFIG_STRICT_DEVMEM or CONFIG_IO_STRICT_DEVMEM, and a driver claims the page or it is ordinary memory; `iomem=relaxed` on its command line lifts the second".into()
        }
        (io::ErrorKind::UnexpectedEof, _) => "the device ends before this page".into(),
        _ if error.raw_os_error() == Some(14) => {
            "nothing is mapped there: the machine has no legacy option-ROM area".into()
        }
        _ => "the kernel does not say more".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_errno_and_its_likely_reason() {
        let missing = read(Path::new("/nonexistent/mem"), 0..PIECE as u64).expect_err("no device");
        let text = missing.to_string();
        assert!(text.contains("os error 2") && text.contains("CONFIG_DEVMEM"), "{text}");
        let refused = io::Error::from_raw_os_error(1);
        let locked = Some("none [integrity] confidentiality\n");
        assert!(opening_hint(&refused, locked).contains("locked down (integrity)"));
        assert!(reading_hint(&refused, locked).contains("locked down (integrity)"));
        assert!(reading_hint(&refused, Some("[none] integrity\n")).contains("STRICT_DEVMEM"));
        assert!(opening_hint(&refused, None).contains("CAP_SYS_RAWIO"));
        assert!(
            reading_hint(&io::Error::from_raw_os_error(14), None).contains("nothing is mapped")
        );
    }

    #[test]
    fn pages_come_in_order_and_the_missing_one_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("mem");
        let bytes: Vec<u8> = (0..3 * PIECE).map(|at| (at / 16) as u8).collect();
        std::fs::write(&path, &bytes).expect("a file");
        let piece = PIECE as u64;
        assert_eq!(read(&path, piece..3 * piece).expect("all there"), bytes[PIECE..]);
        let short = read(&path, piece..4 * piece).expect_err("a page too many");
        assert!(matches!(short, DevMemError::Page { address, .. } if address == 3 * piece));
    }
}
