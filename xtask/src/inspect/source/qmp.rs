//! Memory of a running QEMU over its machine protocol, a line of JSON for each message.
//!
//! The machine goes on running. `pmemsave` writes a file where QEMU runs, so QEMU must be on this
//! host and be permitted to write into the folder for temporary files.

use super::wire::{Wire, WireError, excerpt};
use serde_json::{Value, json};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Bytes of a message; QEMU's own are far shorter.
const LONGEST_LINE: usize = 1 << 20;

/// Where QEMU listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A host and a port.
    Tcp(String),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl FromStr for Endpoint {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", address)) if address.contains(':') => Ok(Self::Tcp(address.into())),
            _ => Err("neither unix:PATH nor tcp:HOST:PORT"),
        }
    }
}

/// Reads an area of physical memory.
pub(super) fn read(
    endpoint: &Endpoint,
    area: Range<u64>,
    limit: Duration,
) -> Result<Vec<u8>, WireError> {
    let mut wire = match endpoint {
        Endpoint::Unix(path) => Wire::unix(path, limit)?,
        Endpoint::Tcp(address) => Wire::tcp(address, limit)?,
    };
    let doing = "waiting for the greeting";
    let greeting = message(&mut wire, doing)?;
    if greeting.get("QMP").is_none() {
        return Err(WireError::Protocol { doing, said: excerpt(greeting.to_string().as_bytes()) });
    }
    execute(&mut wire, "agreeing on capabilities", &json!({"execute": "qmp_capabilities"}))?;

    let doing = "saving memory into a temporary file";
    let broken = |source| WireError::Broken { doing, source };
    let folder = tempfile::tempdir().map_err(broken)?;
    let path = folder.path().join("memory");
    let name = path.to_str().ok_or_else(|| WireError::Refused {
        doing,
        reason: format!("the path {} cannot be sent as JSON", path.display()),
    })?;
    let size = area.end - area.start;
    let arguments = json!({"val": area.start, "size": size, "filename": name});
    execute(&mut wire, doing, &json!({"execute": "pmemsave", "arguments": arguments}))?;

    let doing = "reading the file that QEMU wrote";
    let file = File::open(&path).map_err(|error| WireError::Refused {
        doing,
        reason: format!("{name}: {error}; if QEMU runs elsewhere, use its gdb stub"),
    })?;
    let mut memory = Vec::new();
    file.take(size)
        .read_to_end(&mut memory)
        .map_err(|source| WireError::Broken { doing, source })?;
    if memory.len() as u64 == size {
        Ok(memory)
    } else {
        let reason = format!("{} bytes instead of {size}", memory.len());
        Err(WireError::Refused { doing, reason })
    }
}

/// Executes a command and waits for its end; events in between are of no interest.
fn execute(wire: &mut Wire, doing: &'static str, command: &Value) -> Result<(), WireError> {
    wire.send(format!("{command}\n").as_bytes(), doing)?;
    loop {
        let answer = message(wire, doing)?;
        if let Some(error) = answer.get("error") {
            let words = error.get("desc").and_then(Value::as_str);
            let reason = words.map_or_else(|| error.to_string(), str::to_owned);
            return Err(WireError::Refused { doing, reason: excerpt(reason.as_bytes()) });
        }
        if answer.get("return").is_some() {
            return Ok(());
        }
        if answer.get("event").is_none() {
            return Err(WireError::Protocol {
                doing,
                said: excerpt(answer.to_string().as_bytes()),
            });
        }
    }
}

fn message(wire: &mut Wire, doing: &'static str) -> Result<Value, WireError> {
    let mut line = Vec::new();
    loop {
        match wire.byte(doing)? {
            b'\n' if line.iter().all(u8::is_ascii_whitespace) => line.clear(),
            b'\n' => break,
            byte => line.push(byte),
        }
        if line.len() > LONGEST_LINE {
            return Err(WireError::Protocol { doing, said: excerpt(&line) });
        }
    }
    serde_json::from_slice(&line).map_err(|_| WireError::Protocol { doing, said: excerpt(&line) })
}
