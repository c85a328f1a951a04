//! The hypervisor's record of exits, and traces made of it: the JSON that Perfetto and speedscope open.
//!
//! Each run is a process of the trace, with tracks for what there was: the guest between its exits, the hypervisor at work on
//! each exit, hypercalls that carried updates, the guest's address spaces, and what was delivered to the guest. Time is that
//! of the machine's time-stamp counter. [`picture`] draws the same exits for a page.

mod picture;

pub use picture::picture;

use crate::qemu::TICKS_PER_INSTRUCTION;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use vmi_hv_backend::reference::record::{Exit, Head, NEVER, PLACES, RECORD, SIGNATURE};

/// Ticks of the time-stamp counter in a microsecond of a machine with steady time: of the machine's own time.
pub const TICKS_PER_MICROSECOND: u64 = 1000;

/// The exits of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// When the guest started, in ticks.
    pub started: u64,
    /// How many exits there were.
    pub count: u64,
    /// The last ones.
    pub exits: Vec<Exit>,
}

impl Record {
    /// Reads it out of a machine's memory.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or there is no record in it: the hypervisor did not start.
    pub fn read(memory: &Path) -> Result<Self> {
        let mut file = File::open(memory).with_context(|| memory.display().to_string())?;
        file.seek(SeekFrom::Start(RECORD.start.into()))?;
        let mut file = BufReader::new(file.take(u64::from(RECORD.end - RECORD.start)));
        let mut bytes = [0; size_of::<Head>()];
        file.read_exact(&mut bytes).context("the machine's memory is too small")?;
        let Head { signature, count, started, .. } = Head::of_bytes(&bytes);
        ensure!(
            signature == SIGNATURE,
            "the hypervisor did not start: there is no record of exits"
        );
        let (kept, mut places) = (count.min(PLACES), Vec::new());
        for _ in 0..kept {
            let mut bytes = [0; size_of::<Exit>()];
            file.read_exact(&mut bytes)?;
            places.push(Exit::of_bytes(&bytes));
        }
        if count > PLACES {
            places.rotate_left((count % PLACES) as usize);
        }
        Ok(Self { started, count, exits: places })
    }

    /// How many exits came too early to be there still.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.count - self.exits.len() as u64
    }
}

/// A track of a process.
#[derive(Clone, Copy)]
enum Track {
    Guest = 1,
    Exits,
    Batches,
    Spaces,
    Delivered,
}

impl Track {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Guest, "guest"),
        (Self::Exits, "exits"),
        (Self::Batches, "batches"),
        (Self::Spaces, "address spaces"),
        (Self::Delivered, "delivered"),
    ];

    /// Its thread in a process. Viewers take the thread that has the number of its process for the main one, and a system
    /// gives each number once: so none is that of a process or of a thread elsewhere.
    const fn of(self, process: usize) -> usize {
        process * 10 + self as usize
    }
}

/// Writes events one after the other.
struct Events<W> {
    to: W,
    process: usize,
    is_first: bool,
}

impl<W: Write> Events<W> {
    fn put(&mut self, event: &serde_json::Value) -> Result<()> {
        let separator = if std::mem::take(&mut self.is_first) { "\n" } else { ",\n" };
        write!(self.to, "{separator}{event}")?;
        Ok(())
    }

    /// Something that lasted.
    fn span(
        &mut self,
        track: Track,
        name: &str,
        (start, end): (u64, u64),
        args: Option<serde_json::Value>,
    ) -> Result<()> {
        let duration = microseconds(end.saturating_sub(start));
        let mut event = json!({
            "ph": "X", "pid": self.process, "tid": track.of(self.process), "name": name,
            "ts": microseconds(start), "dur": duration,
        });
        if let Some(args) = args {
            event["args"] = args;
        }
        self.put(&event)
    }

    /// Where an address space begins or ends. One ends where the next begins, to the tick. As events that last they would
    /// overlap: viewers add start and duration in floating point.
    fn border(&mut self, phase: &str, cr3: u32, at: u64) -> Result<()> {
        self.put(&json!({
            "ph": phase, "pid": self.process, "tid": Track::Spaces.of(self.process),
            "name": format!("CR3 {cr3:#010x}"), "ts": microseconds(at),
        }))
    }
}

fn microseconds(ticks: u64) -> f64 {
    ticks as f64 / TICKS_PER_MICROSECOND as f64
}

/// Writes the trace of runs, each with its name.
///
/// # Errors
///
/// It cannot be written.
pub fn write(to: &mut impl Write, runs: &[(String, &Record)]) -> Result<()> {
    write!(to, "{{\"displayTimeUnit\":\"ns\",\"otherData\":")?;
    let names = |run: &(String, &Record)| {
        let (name, record) = run;
        (name.clone(), json!({ "exits": record.count, "lost": record.lost() }))
    };
    let other = json!({
        "clock": format!(
            "time-stamp counter, {TICKS_PER_MICROSECOND} ticks to a microsecond; in steady time {TICKS_PER_INSTRUCTION} to an instruction"
        ),
        "runs": runs.iter().map(names).collect::<serde_json::Map<_, _>>(),
    });
    write!(to, "{other},\"traceEvents\":[")?;
    let mut events = Events { to, process: 0, is_first: true };
    for (name, record) in runs {
        events.process += 1;
        one(&mut events, name, record)?;
    }
    writeln!(events.to, "\n]}}")?;
    Ok(())
}

fn one(events: &mut Events<impl Write>, name: &str, record: &Record) -> Result<()> {
    let process = events.process;
    events.put(&json!({
        "ph": "M", "pid": process, "name": "process_name", "args": { "name": name },
    }))?;
    for (track, name) in Track::ALL {
        let (order, thread) = (track as usize, track.of(process));
        events.put(&json!({
            "ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": { "name": name },
        }))?;
        events.put(&json!({
            "ph": "M", "pid": process, "tid": thread, "name": "thread_sort_index",
            "args": { "sort_index": order },
        }))?;
    }
    let since_start = |ticks: u64| ticks.saturating_sub(record.started);
    // Where exits were lost, what the guest did before the first one is not known.
    let mut running = if record.lost() == 0 { Some(0) } else { None };
    let mut space = None;
    for exit in &record.exits {
        let at = since_start(exit.exited);
        let spent = if exit.spent == NEVER { 0 } else { u64::from(exit.spent) };
        if let Some(start) = running {
            events.span(Track::Guest, "guest", (start, at), None)?;
        }
        running = (exit.spent != NEVER).then_some(at + spent);
        let address = format!("{:#010x}", exit.detail);
        let cr3 = format!("{:#010x}", exit.cr3);
        let mut args = json!({
            "eip": format!("{:#010x}", exit.eip), "cr3": cr3, "detail": address,
            "result": exit.result as i32, "counted": exit.is_counted(),
        });
        if exit.updates != 0 {
            args["updates"] = exit.updates.into();
        }
        events.span(Track::Exits, exit.name(), (at, at + spent), Some(args))?;
        if exit.updates != 0 {
            let name = match exit.updates {
                1 => "1 update".to_owned(),
                updates => format!("{updates} updates"),
            };
            let args = json!({ "updates": exit.updates });
            events.span(Track::Batches, &name, (at, at + spent), Some(args))?;
        }
        if space != Some(exit.cr3) {
            if let Some(known) = space.replace(exit.cr3) {
                events.border("E", known, at)?;
            }
            events.border("B", exit.cr3, at)?;
        }
        if let Some(vector) = exit.vector() {
            events.put(&json!({
                "ph": "i", "s": "t", "pid": process, "tid": Track::Delivered.of(process),
                "name": format!("vector {vector}"), "ts": microseconds(at + spent),
            }))?;
        }
    }
    if let (Some(known), Some(last)) = (space, record.exits.last()) {
        events.border("E", known, since_start(last.exited))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::collections::{BTreeMap, BTreeSet};
    use vmi_hv_backend::reference::interface::Counters;
    use vmi_hv_backend::reference::record::DELIVERED;

    /// A file with a record: a head, and what lies in the places.
    fn memory(count: u64, place: impl Fn(u64) -> Exit) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(u64::from(RECORD.end)).expect("a sparse file");
        file.seek(SeekFrom::Start(RECORD.start.into())).expect("a place");
        let mut bytes: Vec<u8> =
            [SIGNATURE, count, 5, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        for index in 0..count.min(PLACES) {
            let exit = place(index);
            bytes.extend(exit.exited.to_le_bytes());
            for word in [exit.spent, exit.eip, exit.cr3, exit.detail, exit.result] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.extend([exit.cause, exit.updates]);
            bytes.extend(exit.event.to_le_bytes());
        }
        file.write_all(&bytes).expect("space");
        file
    }

    #[test]
    fn a_full_record_begins_with_the_oldest_exit() {
        let read = |count| {
            // What lies in a place is the last exit that was put there.
            let number = |place: u64| (count - 1 - place) / PLACES * PLACES + place;
            let file = memory(count, |place| Exit { exited: number(place), ..Exit::default() });
            Record::read(file.path()).expect("a record")
        };
        for count in [0, 3, PLACES, PLACES + 7] {
            let record = read(count);
            assert_eq!((record.started, record.count), (5, count));
            assert_eq!(record.lost(), count.saturating_sub(PLACES));
            let numbers = record.exits.iter().map(|exit| exit.exited);
            assert!(numbers.eq(record.lost()..count), "{count}");
        }
    }

    #[test]
    fn memory_without_a_record_is_refused() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        assert!(Record::read(file.path()).is_err(), "an empty file");
        file.as_file().set_len(u64::from(RECORD.end)).expect("a sparse file");
        let error = Record::read(file.path()).expect_err("zeros");
        assert!(error.to_string().contains("did not start"), "{error}");
    }

    #[test]
    fn every_track_has_its_events_and_the_last_exit_no_end() {
        let hypercalls = Counters { hypercalls: 1, ..Counters::ZERO };
        let cause = hypercalls.cause_since(&Counters::ZERO).expect("a cause");
        let exits = vec![
            Exit { exited: 1005, spent: 500, cr3: 1, cause, updates: 7, ..Exit::default() },
            Exit {
                exited: 3005,
                spent: 10,
                cr3: 2,
                cause,
                updates: 1,
                event: DELIVERED | 14,
                ..Exit::default()
            },
            Exit { exited: 4005, spent: NEVER, cr3: 2, ..Exit::default() },
        ];
        let record = Record { started: 5, count: 3, exits };
        let mut text = Vec::new();
        write(&mut text, &[("a".to_owned(), &record), ("b".to_owned(), &record)]).expect("a trace");
        let trace: Value = serde_json::from_slice(&text).expect("JSON");
        assert_eq!(trace["otherData"]["runs"]["b"]["exits"], 3);
        let events = trace["traceEvents"].as_array().expect("events");
        let of = |track: Track| -> Vec<(&str, f64, f64)> {
            let is_it = |event: &&Value| {
                event["pid"] == 2 && event["tid"] == track.of(2) && event["ph"] != "M"
            };
            let figures = |event: &'_ Value| {
                (event["ts"].as_f64().unwrap_or(-1.0), event["dur"].as_f64().unwrap_or(-1.0))
            };
            let shown = |event| {
                let (start, duration) = figures(event);
                (event["name"].as_str().unwrap_or_default(), start, duration)
            };
            events.iter().filter(is_it).map(shown).collect()
        };
        let guest = [("guest", 0.0, 1.0), ("guest", 1.5, 1.5), ("guest", 3.01, 0.99)];
        assert_eq!(of(Track::Guest), guest);
        assert_eq!(of(Track::Exits).len(), 3);
        assert_eq!(of(Track::Exits)[0], ("hypercall", 1.0, 0.5));
        assert_eq!(of(Track::Batches), [("7 updates", 1.0, 0.5), ("1 update", 3.0, 0.01)]);
        let (one, two) = ("CR3 0x00000001", "CR3 0x00000002");
        let borders = [(one, 1.0, -1.0), (one, 3.0, -1.0), (two, 3.0, -1.0), (two, 4.0, -1.0)];
        assert_eq!(of(Track::Spaces), borders);
        let in_spaces = |event: &&Value| event["tid"] == Track::Spaces.of(2) && event["ph"] != "M";
        let phases = events.iter().filter(in_spaces).map(|event| event["ph"].as_str());
        assert!(phases.eq(["B", "E", "B", "E"].map(Some)), "one ends before the next begins");
        assert_eq!(of(Track::Delivered), [("vector 14", 3.01, -1.0)]);
        // No thread has the number of a process or of another's track: viewers would take them for one.
        let (mut threads, mut processes) = (BTreeMap::new(), BTreeSet::new());
        for event in events.iter().filter(|event| event["ph"] != "M") {
            let (process, thread) = (event["pid"].as_u64(), event["tid"].as_u64());
            assert_eq!(*threads.entry(thread).or_insert(process), process, "{event}");
            processes.insert(process);
        }
        assert_eq!((threads.len(), processes.len()), (2 * Track::ALL.len(), 2));
        assert!(processes.iter().all(|process| !threads.contains_key(process)), "{threads:?}");
        // Nothing nests: nothing begins before the one before it has ended.
        for track in [Track::Guest, Track::Exits, Track::Batches] {
            let spans = of(track);
            assert!(spans.is_sorted_by(|one, next| one.1 + one.2 <= next.1), "{spans:?}");
        }
    }
}
