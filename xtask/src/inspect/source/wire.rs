//! What the two ways to a running QEMU share: a connection with one time limit for everything, and
//! errors.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Why a running machine's memory cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Nobody listens.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// The connection broke.
    #[error("the connection broke while {doing}: {source}")]
    Broken {
        /// What was going on.
        doing: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The time is over.
    #[error("no answer within the time limit while {doing}")]
    TimedOut {
        /// What was going on.
        doing: &'static str,
    },
    /// The other side says what the protocol does not have.
    #[error("not what was expected while {doing}: {said}")]
    Protocol {
        /// What was going on.
        doing: &'static str,
        /// The answer, or a part of it.
        said: String,
    },
    /// The other side refuses.
    #[error("refused while {doing}: {reason}")]
    Refused {
        /// What was going on.
        doing: &'static str,
        /// Its words.
        reason: String,
    },
}

/// A stream with time limits.
trait Stream: Read + Write {
    fn limit(&self, limit: Duration) -> io::Result<()>;
}

impl Stream for TcpStream {
    fn limit(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

impl Stream for UnixStream {
    fn limit(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

/// A connection whose whole life has a limit.
pub(super) struct Wire {
    stream: Box<dyn Stream>,
    end: Instant,
    buffer: Vec<u8>,
    taken: usize,
}

impl Wire {
    /// Connects to `HOST:PORT`.
    pub(super) fn tcp(endpoint: &str, limit: Duration) -> Result<Self, WireError> {
        let end = Instant::now() + limit;
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in endpoint.to_socket_addrs().map_err(WireError::Connect)? {
            let left = end.saturating_duration_since(Instant::now());
            match TcpStream::connect_timeout(&address, left.max(Duration::from_millis(1))) {
                Ok(stream) => {
                    // Questions are short and each waits for its answer: none may wait for company.
                    stream.set_nodelay(true).map_err(WireError::Connect)?;
                    return Ok(Self::new(Box::new(stream), end));
                }
                Err(error) => failure = error,
            }
        }
        Err(WireError::Connect(failure))
    }

    /// Connects to a socket in the file system.
    pub(super) fn unix(path: &Path, limit: Duration) -> Result<Self, WireError> {
        let end = Instant::now() + limit;
        let stream = UnixStream::connect(path).map_err(WireError::Connect)?;
        Ok(Self::new(Box::new(stream), end))
    }

    fn new(stream: Box<dyn Stream>, end: Instant) -> Self {
        Self { stream, end, buffer: Vec::new(), taken: 0 }
    }

    /// Grants more time, for what must not be left undone.
    pub(super) fn at_least(&mut self, limit: Duration) {
        self.end = self.end.max(Instant::now() + limit);
    }

    fn left(&self, doing: &'static str) -> Result<(), WireError> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(WireError::TimedOut { doing });
        }
        self.stream.limit(left).map_err(|source| WireError::Broken { doing, source })
    }

    /// Sends all bytes.
    pub(super) fn send(&mut self, bytes: &[u8], doing: &'static str) -> Result<(), WireError> {
        self.left(doing)?;
        self.stream.write_all(bytes).map_err(|source| failure(source, doing))
    }

    /// The next byte.
    pub(super) fn byte(&mut self, doing: &'static str) -> Result<u8, WireError> {
        if self.taken == self.buffer.len() {
            self.left(doing)?;
            self.buffer.resize(4096, 0);
            let got = loop {
                match self.stream.read(&mut self.buffer) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => self.left(doing)?,
                    other => break other,
                }
            };
            let got = got.map_err(|source| failure(source, doing));
            self.buffer.truncate(*got.as_ref().unwrap_or(&0));
            self.taken = 0;
            if got? == 0 {
                let source = io::Error::from(io::ErrorKind::UnexpectedEof);
                return Err(WireError::Broken { doing, source });
            }
        }
        let byte = self.buffer[self.taken];
        self.taken += 1;
        Ok(byte)
    }
}

fn failure(source: io::Error, doing: &'static str) -> WireError {
    match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => WireError::TimedOut { doing },
        _ => WireError::Broken { doing, source },
    }
}

/// The beginning of what the other side said, for an error.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(120)]).into_owned()
}
