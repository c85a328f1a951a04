//! The record of exits: what a report ends with, and what `xtask` makes traces of. It is written whether anybody reads it or not, so
//! that looking at a guest changes nothing.

#![expect(unsafe_code, reason = "UNSAFETY: memory that is read from outside")]

use crate::console::line;
use core::fmt;
use vmi_hv_backend::reference::interface::Counters;
use vmi_hv_backend::reference::record::{Exit, Head, NEVER, PLACES, RECORD, SIGNATURE, UNCOUNTED};

/// Exits that a report shows.
const LAST: u64 = 16;

/// Exits so far, and the last one while it is worked on.
pub(crate) struct Record {
    head: Head,
    exit: Exit,
    /// The counters at the exit.
    before: Counters,
}

impl Record {
    /// Without any.
    pub(crate) fn new() -> Self {
        let head = Head { signature: SIGNATURE, ..Head::default() };
        let record = Self { head, exit: Exit::default(), before: Counters::ZERO };
        record.store_head();
        record
    }

    /// The guest starts.
    pub(crate) fn start(&mut self, ticks: u64) {
        *self = Self::new();
        self.head.started = ticks;
        self.store_head();
    }

    /// The guest has left off.
    pub(crate) fn exited(&mut self, exit: Exit, counters: &Counters) {
        self.exit = Exit { spent: NEVER, cause: UNCOUNTED, ..exit };
        self.before = *counters;
        self.head.count += 1;
        self.store(&self.exit);
        self.store_head();
    }

    /// The last exit's detail, for who has to look for it.
    pub(crate) fn set_detail(&mut self, detail: u32) {
        self.exit.detail = detail;
    }

    /// The last exit's result.
    pub(crate) fn set_result(&mut self, result: u32) {
        self.exit.result = result;
    }

    /// The last exit is dealt with: what it was counted as, the ticks that it took, and what is delivered to the guest.
    pub(crate) fn done(&self, counters: &Counters, spent: u32, event: u16) {
        let updates = counters.updates.wrapping_sub(self.before.updates) as u8;
        let cause = counters.cause_since(&self.before).unwrap_or(UNCOUNTED);
        if self.head.count != 0 {
            self.store(&Exit { spent, cause, updates, event, ..self.exit });
        }
    }

    /// Whether somebody wants an end.
    pub(crate) fn is_to_stop(&self) -> bool {
        let head = RECORD.start as usize as *const Head;
        // SAFETY: the record's own memory; volatile, as it is written from outside.
        unsafe { (&raw const (*head).stop).read_volatile() != 0 }
    }

    /// Says what the last exits were.
    pub(crate) fn say(&self) {
        let count = self.head.count;
        let width = Counters::EXITS.iter().map(|name| name.len()).max().unwrap_or_default();
        line!("exits: {count}, the last ones:");
        for number in count.saturating_sub(LAST)..count {
            let exit = self.load(number);
            line!(
                "{number:8} {:width$} eip={:08x} cr3={:08x} {:08x}{}",
                exit.name(),
                exit.eip,
                exit.cr3,
                exit.detail,
                Rest(&exit)
            );
        }
    }

    fn place(number: u64) -> *mut Exit {
        (u64::from(RECORD.start) + Exit::offset(number)) as *mut Exit
    }

    fn load(&self, number: u64) -> Exit {
        // SAFETY: a place of the record's own memory; integers all through.
        unsafe { Self::place(number % PLACES).read_volatile() }
    }

    /// Stores the last exit.
    fn store(&self, exit: &Exit) {
        // SAFETY: as above; volatile, as it is read from outside.
        unsafe { Self::place(self.head.count - 1).write_volatile(*exit) };
    }

    /// Stores the head, but not what others write there.
    fn store_head(&self) {
        let head = RECORD.start as usize as *mut Head;
        // SAFETY: as above.
        unsafe {
            (&raw mut (*head).signature).write_volatile(self.head.signature);
            (&raw mut (*head).started).write_volatile(self.head.started);
            (&raw mut (*head).count).write_volatile(self.head.count);
        }
    }
}

/// What only some exits have.
struct Rest<'a>(&'a Exit);

impl fmt::Display for Rest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Exit { result, updates, .. } = *self.0;
        if result != 0 {
            write!(f, " result {}", result as i32)?;
        }
        if updates != 0 {
            write!(f, " updates {updates}")?;
        }
        match self.0.vector() {
            Some(vector) => write!(f, " delivered {vector}"),
            None => Ok(()),
        }
    }
}
