//! The words that the boot loader was told to pass on: `word` and `key=value`, between spaces.

#![expect(unsafe_code, reason = "UNSAFETY: reads what the boot loader left in memory")]

use crate::boot::PAGE_OFFSET;
use spin::Once;

/// Multiboot specification 0.6.96, section 3.2: what a loader leaves in EAX.
const LOADER_MAGIC: u32 = 0x2bad_b002;

/// What may be there: the VMI entry passes on the same structure.
const MAGICS: [u32; 2] = [LOADER_MAGIC, vmi_abi::entry::MAGIC];

/// Section 3.3: the loader's structure begins with flags; this one says that its fifth word is the
/// address of a command line.
const HAS_COMMAND_LINE: u32 = 1 << 2;
const COMMAND_LINE: u32 = 16;

/// What `boot` maps of physical memory.
const MAPPED: u32 = 16 << 20;

/// Longer lines are cut.
const LENGTH: usize = 256;

/// The line's bytes, and how many there are.
static LINE: Once<([u8; LENGTH], usize)> = Once::new();

/// Takes the command line away before anything overwrites it. `boot` calls it with what it got in
/// EAX and EBX.
pub(crate) extern "C" fn initialize(magic: u32, information: u32) {
    if !MAGICS.contains(&magic) || word(information) & HAS_COMMAND_LINE == 0 {
        return;
    }
    let start = word(information + COMMAND_LINE);
    LINE.call_once(|| {
        let mut line = [0; LENGTH];
        let mut length = 0;
        while length < LENGTH {
            match byte(start + length as u32) {
                0 => break,
                byte => line[length] = byte,
            }
            length += 1;
        }
        (line, length)
    });
}

/// Whether a word is on the line.
pub(crate) fn has(word: &str) -> bool {
    words().any(|other| other == word)
}

/// What follows `key=` on the line; of several the last.
pub(crate) fn value(key: &str) -> Option<&'static str> {
    let of_key = |word: &'static str| word.strip_prefix(key)?.strip_prefix('=');
    words().filter_map(of_key).last()
}

fn words() -> impl Iterator<Item = &'static str> {
    let line = LINE.get().map(|(line, length)| &line[..*length]).unwrap_or_default();
    core::str::from_utf8(line).unwrap_or_default().split_ascii_whitespace()
}

fn word(address: u32) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|offset| byte(address + offset)))
}

/// A byte of physical memory; 0 beyond what is mapped.
fn byte(address: u32) -> u8 {
    if address >= MAPPED {
        return 0;
    }
    // SAFETY: mapped, and the loader's until the guest's first test.
    unsafe { ((PAGE_OFFSET + address) as *const u8).read_volatile() }
}
