//! Memory of a running QEMU over its gdb stub: read by the inspector, and stored to by whoever wants to stop a machine.
//!
//! The stub stops the machine when somebody connects. So a machine that ran is told to go on, also
//! when the reading fails; one that was never started (`-S`) is left as it is. The stub cannot tell
//! whether somebody had stopped the machine before: then the caller says so.

use super::wire::{Wire, WireError, excerpt};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

/// Bytes of memory in one packet; every stub's packets hold twice as many digits.
const PIECE: u64 = 0x400;

/// Bytes of a packet from the stub.
const LONGEST_PACKET: usize = 1 << 16;

/// Packets that the stub may send to one question.
const MOST_PACKETS: usize = 256;

/// How long the machine has to be let go when all other time is over.
const FAREWELL: Duration = Duration::from_secs(2);

/// Reads an area of physical memory.
pub(super) fn read(
    endpoint: &str,
    area: Range<u64>,
    limit: Duration,
    keep_stopped: bool,
) -> Result<Vec<u8>, WireError> {
    let mut stub = Stub { wire: Wire::tcp(endpoint, limit)?, keep_stopped, console: Vec::new() };
    let command: String = "info status".bytes().map(|byte| format!("{byte:02x}")).collect();
    // A stub without a monitor answers with nothing, and then the machine is taken to have run.
    stub.ask(&format!("qRcmd,{command}"), "asking whether the machine runs")?;
    let memory = stub.memory(area);
    // The next one to connect wants linear addresses.
    let restored = stub.ask("Qqemu.PhyMemMode:0", "going back to linear addresses");
    let memory = memory?;
    restored?;
    Ok(memory)
}

/// Stores words to physical memory, devices' among it, while the machine stands.
pub(crate) fn store(
    socket: &Path,
    stores: &[(u32, u32)],
    limit: Duration,
) -> Result<(), WireError> {
    let wire = Wire::unix(socket, limit)?;
    let mut stub = Stub { wire, keep_stopped: false, console: Vec::new() };
    stub.use_physical_addresses()?;
    let doing = "storing to memory";
    for (address, value) in stores {
        let digits: String = value.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let answer = stub.ask(&format!("M{address:x},4:{digits}"), doing)?;
        if answer != b"OK" {
            return Err(WireError::Refused { doing, reason: excerpt(&answer) });
        }
    }
    Ok(())
}

struct Stub {
    wire: Wire,
    keep_stopped: bool,
    /// What the monitor said; it may come later than the answer to its command.
    console: Vec<u8>,
}

impl Drop for Stub {
    fn drop(&mut self) {
        // QEMU says of a machine that waits for its start, or of one that cannot go on, more than
        // that it is paused.
        let waits = String::from_utf8_lossy(&self.console).contains("paused (");
        if self.keep_stopped || waits {
            return;
        }
        let doing = "letting the machine go";
        self.wire.at_least(FAREWELL);
        // Nobody is left to hear of a failure: if the stub is gone, so is the machine.
        if self.wire.send(&packet("D"), doing).is_ok() {
            let _ = self.answer(doing);
        }
    }
}

/// A packet: `$`, the text, `#`, and the sum of the text's bytes.
fn packet(text: &str) -> Vec<u8> {
    let sum = text.bytes().fold(0u8, |sum, byte| sum.wrapping_add(byte));
    format!("${text}#{sum:02x}").into_bytes()
}

impl Stub {
    fn use_physical_addresses(&mut self) -> Result<(), WireError> {
        let doing = "asking for physical addresses";
        match self.ask("Qqemu.PhyMemMode:1", doing)?.as_slice() {
            b"OK" => Ok(()),
            b"" => {
                let reason =
                    "the stub is not QEMU's, or older than 4.1: it cannot read physical memory"
                        .into();
                Err(WireError::Refused { doing, reason })
            }
            other => Err(WireError::Protocol { doing, said: excerpt(other) }),
        }
    }

    fn memory(&mut self, area: Range<u64>) -> Result<Vec<u8>, WireError> {
        self.use_physical_addresses()?;
        let doing = "reading memory";
        let mut memory = Vec::new();
        let mut at = area.start;
        while at < area.end {
            let length = PIECE.min(area.end - at);
            let answer = self.ask(&format!("m{at:x},{length:x}"), doing)?;
            match bytes(&answer) {
                Some(piece) if piece.len() as u64 == length => memory.extend(piece),
                _ if answer.first() == Some(&b'E') => {
                    let reason = format!("{} for {length} bytes at {at:X}h", excerpt(&answer));
                    return Err(WireError::Refused { doing, reason });
                }
                _ => return Err(WireError::Protocol { doing, said: excerpt(&answer) }),
            }
            at += length;
        }
        Ok(memory)
    }

    fn ask(&mut self, text: &str, doing: &'static str) -> Result<Vec<u8>, WireError> {
        self.wire.send(&packet(text), doing)?;
        self.answer(doing)
    }

    /// The next packet's text. Others come in between: the monitor's words are an `O` and digits, and
    /// that the machine stopped, because of this visit, is a `T` or an `S`.
    fn answer(&mut self, doing: &'static str) -> Result<Vec<u8>, WireError> {
        for _ in 0..MOST_PACKETS {
            let text = self.packet(doing)?;
            if matches!(text.first(), Some(b'T' | b'S')) {
                continue;
            }
            match text.strip_prefix(b"O").and_then(bytes).filter(|said| !said.is_empty()) {
                Some(said) if self.console.len() < LONGEST_PACKET => self.console.extend(said),
                Some(_) => {}
                None => return Ok(text),
            }
        }
        Err(WireError::Protocol { doing, said: "no answer among too many packets".into() })
    }

    fn packet(&mut self, doing: &'static str) -> Result<Vec<u8>, WireError> {
        // Acknowledgements come before it.
        for _ in 0..LONGEST_PACKET {
            match self.wire.byte(doing)? {
                b'$' => return self.text(doing),
                b'-' => return Err(WireError::Protocol { doing, said: "-".into() }),
                _ => {}
            }
        }
        Err(WireError::Protocol { doing, said: "no packet".into() })
    }

    fn text(&mut self, doing: &'static str) -> Result<Vec<u8>, WireError> {
        let (mut text, mut sum) = (Vec::new(), 0u8);
        loop {
            let byte = self.wire.byte(doing)?;
            if byte == b'#' {
                break;
            }
            sum = sum.wrapping_add(byte);
            text.push(byte);
            if text.len() > LONGEST_PACKET {
                return Err(WireError::Protocol { doing, said: excerpt(&text) });
            }
        }
        let digits = [self.wire.byte(doing)?, self.wire.byte(doing)?];
        if bytes(&digits) != Some(vec![sum]) {
            return Err(WireError::Protocol { doing, said: "a packet with a wrong sum".into() });
        }
        self.wire.send(b"+", doing)?;
        Ok(text)
    }
}

/// The bytes that pairs of hexadecimal digits stand for.
fn bytes(digits: &[u8]) -> Option<Vec<u8>> {
    let value = |digit: u8| char::from(digit).to_digit(16);
    let pairs = digits.chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    pairs.map(|pair| Some((value(pair[0])? << 4 | value(pair[1])?) as u8)).collect()
}
