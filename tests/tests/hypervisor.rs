//! The test guest on the reference hypervisor: every call in each of its modes, what a kernel's work costs there,
//! what becomes of a guest that means harm or comes to a bad end, and the record of exits. Exits are counted; no test looks at a clock.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;
use vmi_hv_backend::reference::interface::{BATCH_LIMIT, Counters};
use vmi_hv_backend::reference::record::Ending;
use xtask::artifacts;
use xtask::hypervisor::{Comparison, End, Fate, Hosted, Mode, Paging, Setup, Supply, Task};
use xtask::tap::{self, WorkloadLine};
use xtask::trace;

/// Runs the guest.
fn host(mode: Mode, paging: Paging, task: Task, limit: u64, traced: bool) -> Result<Hosted> {
    let (built, limit) = (artifacts::ensure_hosting()?, Duration::from_secs(limit));
    let supply = Supply { built, rom: None, limit };
    Setup { supply, mode, paging, traced }.run(task, |_| ())
}

/// Runs the guest, and wants every check to hold.
fn passes(mode: Mode, paging: Paging, task: Task) -> Result<Hosted> {
    watched(mode, paging, task, false)
}

/// The same, with the exits if they are wanted.
fn watched(mode: Mode, paging: Paging, task: Task, traced: bool) -> Result<Hosted> {
    let hosted = host(mode, paging, task, 180, traced)?;
    let run = hosted.run();
    assert_eq!(hosted.complaint(), None, "{}\n{}\n{}", run.command, run.host, run.serial);
    Ok(hosted)
}

/// Every call, as on bare hardware; the ROM's calls go to the hypervisor, and Reboot starts it again.
fn calls_hold(mode: Mode, paging: Paging) -> Result<()> {
    let hosted = passes(mode, paging, Task::Conformance)?;
    // Both paging modes of the guest, all of the ROM's places; what is linked in is mapped once.
    let places = if mode == Mode::Trap { 2 } else { 3 };
    let calls = hosted.conformance.calls.len();
    assert_eq!(hosted.report().checks.len(), 2 * places * calls + 4, "{}", hosted.run().command);
    Ok(())
}

#[test]
fn calls_trapped() -> Result<()> {
    calls_hold(Mode::Trap, Paging::Shadow)
}

#[test]
fn calls_told() -> Result<()> {
    calls_hold(Mode::Vmi, Paging::Shadow)
}

#[test]
fn calls_batched() -> Result<()> {
    calls_hold(Mode::VmiBatched, Paging::Shadow)
}

#[test]
fn calls_with_nested_paging() -> Result<()> {
    calls_hold(Mode::VmiBatched, Paging::Nested)
}

/// The pieces of work that change many entries.
const BULK: [&str; 3] = ["fork", "mmap, touch, munmap", "mprotect"];

/// The pieces whose page faults are the guest's own, which need no exit, how many exits each takes at most besides one for each of them,
/// and how many times fewer than `trap`, with 32-bit entries and with PAE: a small shell has few entries to change, a big one many.
const PROGRAMS: [(&str, u64, u64, u64); 2] =
    [("fork, exec, exit", 10, 3, 5), ("fork, exec, exit, 1 MiB", 15, 12, 20)];

/// What VMI is for: a tenth of the exits where tables change in bulk, 32 entries or more with each exit, and no more
/// than one exit for a context switch. And what it is not: an exit for each entry, where nothing may wait.
#[test]
fn a_kernels_work_takes_few_exits() -> Result<()> {
    let runs = Mode::ALL
        .into_iter()
        .map(|mode| passes(mode, Paging::Shadow, Task::Workload))
        .collect::<Result<Vec<_>>>()?;
    // In both paging modes. Where page faults are quiet the hypervisor hears of such a store at the third.
    for (mode, run) in Mode::ALL.into_iter().zip(&runs).filter(|(mode, _)| *mode != Mode::Trap) {
        let faults = if mode == Mode::VmiBatched { 3 } else { 0 };
        let line = format!("# stores-to-rom faults={faults}");
        let said = run.run().serial.lines().filter(|said| said.trim_end() == line).count();
        assert_eq!(said, 2, "{mode:?}: {}", run.run().serial);
    }
    let comparisons = Comparison::of(&runs);
    assert_eq!(comparisons.len(), 2 * (BULK.len() + PROGRAMS.len() + 1), "{comparisons:#?}");
    for comparison in &comparisons {
        let cost = |mode| comparison.cost(mode).with_context(|| format!("{comparison:#?}"));
        let (trap, told, batched) = (cost(Mode::Trap)?, cost(Mode::Vmi)?, cost(Mode::VmiBatched)?);
        let exits = |line: &WorkloadLine| line.counters.exits();
        // The same work in each mode.
        assert!([told, batched].iter().all(|line| line.entries == trap.entries), "{comparison:#?}");
        assert_eq!(batched.counters.refusals + told.counters.refusals, 0, "{comparison:#?}");
        if BULK.contains(&comparison.name) {
            assert!(exits(batched) * 10 <= exits(trap), "{comparison:#?}");
            assert!(exits(batched) * 32 <= batched.entries, "{comparison:#?}");
            // Each entry that traps is one that somebody has to be told of.
            assert!(exits(trap) >= trap.entries / 2, "{comparison:#?}");
            assert!(told.counters.hypercalls == told.counters.updates, "{comparison:#?}");
            let least = batched.counters.updates.div_ceil(BATCH_LIMIT.into());
            assert!(batched.counters.hypercalls >= least, "{comparison:#?}");
        } else if let Some((_, besides, short, long)) =
            PROGRAMS.iter().find(|(name, ..)| *name == comparison.name)
        {
            // Its page faults are the guest's own affair. What it then maps is told with an exit each, but few besides.
            let faults = |line: &WorkloadLine| line.counters.guest_page_faults;
            assert!(faults(trap) == faults(told) && faults(trap) > 0, "{comparison:#?}");
            assert_eq!(faults(batched) + batched.counters.shadow_fills, 0, "{comparison:#?}");
            let operations = u64::from(batched.operations);
            assert!(exits(batched) <= faults(trap) + besides * operations, "{comparison:#?}");
            let factor = if comparison.guest_mode == "PAE" { long } else { short };
            assert!(exits(batched) * factor <= exits(trap), "{comparison:#?}");
        } else {
            assert!(exits(batched) <= batched.operations.into(), "{comparison:#?}");
        }
    }
    Ok(())
}

/// With nested paging nobody has to be told, and nobody is.
#[test]
fn nested_paging_takes_no_exits() -> Result<()> {
    let hosted = passes(Mode::VmiBatched, Paging::Nested, Task::Workload)?;
    for line in &hosted.report().workloads {
        assert_eq!(line.counters.exits(), 0, "{line:#?}");
    }
    Ok(())
}

/// A guest that means harm comes to what the interface says, sees nothing, and goes on as if nothing had been.
fn survives(mode: Mode, paging: Paging) -> Result<()> {
    let hosted = passes(mode, paging, Task::Hostile)?;
    let count = |words: &[&str]| -> u32 {
        let is_it = |what: &str| words.iter().any(|word| what.contains(word));
        let lines = hosted.report().attempts.iter();
        lines.filter(|line| is_it(&line.what)).map(|line| line.count).sum()
    };
    assert!(count(&["hypercalls", "updates"]) >= 1000, "{:#?}", hosted.report().attempts);
    assert!(count(&["page tables"]) >= 1000, "{:#?}", hosted.report().attempts);
    Ok(())
}

#[test]
fn harm_is_refused_where_updates_are_batched() -> Result<()> {
    survives(Mode::VmiBatched, Paging::Shadow)
}

#[test]
fn harm_is_refused_where_tables_trap() -> Result<()> {
    survives(Mode::Trap, Paging::Shadow)
}

#[test]
fn harm_is_refused_with_nested_paging() -> Result<()> {
    survives(Mode::VmiBatched, Paging::Nested)
}

/// Lets the guest come to an end, and wants the hypervisor to say which, where the guest was, and what its last exits were.
fn ends(fate: Fate, paging: Paging, limit: u64, ending: Ending, words: &str) -> Result<()> {
    let mode = if fate == Fate::Garbage { Mode::VmiBatched } else { Mode::Trap };
    let hosted = host(mode, paging, Task::End(fate), limit, false)?;
    let said = &hosted.run().host;
    let all = || format!("{fate:?}: {:?}: {}\n{said}", hosted.end, hosted.run().command);
    ensure!(hosted.end == End::Hypervisor(ending), "{}", all());
    let complaint = hosted.complaint().unwrap_or_default();
    ensure!(complaint.starts_with(ending.name()), "{complaint}: {}", all());
    // The guest got as far as it should.
    ensure!(hosted.run().serial.contains("ok 1 - "), "{}", all());
    for wanted in [words, "eip=", "cr0=", "idtr", "exits: "] {
        ensure!(said.contains(wanted), "no `{wanted}`: {}", all());
    }
    let exits: u64 = said
        .lines()
        .find_map(|line| line.strip_prefix("exits: ")?.split(',').next()?.parse().ok())
        .with_context(all)?;
    // The last of them is there, at the place where the guest was.
    let place = said
        .lines()
        .find_map(|line| Some(&line[line.strip_prefix("eip=").map(|_| 0..12)?]))
        .with_context(all)?;
    let last = format!("{:8} ", exits - 1);
    let is_last = |line: &str| line.starts_with(&last) && line.contains(place);
    ensure!(said.lines().any(is_last), "{}", all());
    let counters = hosted.counters.with_context(all)?;
    ensure!(counters.exits() + counters.needless_reads == exits, "{}", all());
    Ok(())
}

#[test]
fn a_triple_fault_is_told_of() -> Result<()> {
    let words = "the guest's processor shut down";
    ends(Fate::TripleFault, Paging::Shadow, 180, Ending::TripleFault, words)?;
    ends(Fate::TripleFault, Paging::Nested, 180, Ending::TripleFault, words)
}

#[test]
fn page_tables_on_a_device_are_told_of() -> Result<()> {
    let words = "cr3=000b8000";
    ends(Fate::DeviceTables, Paging::Shadow, 180, Ending::TripleFault, words)?;
    ends(Fate::DeviceTables, Paging::Nested, 180, Ending::TripleFault, words)
}

/// Hypercalls that do not exist are refused, and seen among the last exits.
#[test]
fn garbage_is_told_of() -> Result<()> {
    ends(Fate::Garbage, Paging::Shadow, 180, Ending::Stopped, "00000107 result -1")
}

/// How long a guest has that does not end: long enough to get there on a busy machine.
const PATIENCE: u64 = 20;

#[test]
fn a_loop_is_told_of() -> Result<()> {
    ends(Fate::Loop, Paging::Shadow, PATIENCE, Ending::TimeLimit, "the guest's time is over")
}

/// No interrupt reaches such a guest.
#[test]
fn a_loop_without_interrupts_is_told_of() -> Result<()> {
    let words = "the guest's time is over";
    ends(Fate::LoopMasked, Paging::Shadow, PATIENCE, Ending::TimeLimit, words)?;
    ends(Fate::LoopMasked, Paging::Nested, PATIENCE, Ending::TimeLimit, words)
}

/// An NMI that is not to stop the guest is its own: it is let through, also where the shadow has to be filled on the way to its handler.
#[test]
fn an_nmi_is_the_guests_own() -> Result<()> {
    ends(Fate::OwnNmi, Paging::Shadow, 180, Ending::TripleFault, "delivered 2")?;
    ends(Fate::OwnNmi, Paging::Nested, 180, Ending::TripleFault, "00000061")
}

#[test]
fn a_halt_without_interrupts_is_told_of() -> Result<()> {
    ends(Fate::HaltMasked, Paging::Shadow, PATIENCE, Ending::TimeLimit, "the guest's time is over")
}

#[test]
fn a_loop_of_exits_is_told_of() -> Result<()> {
    ends(Fate::LoopOfExits, Paging::Shadow, PATIENCE, Ending::TimeLimit, "CPUID")
}

/// Counters but those of time.
fn counts(hosted: &Hosted) -> Vec<(&'static str, u64)> {
    let counters = hosted.counters.unwrap_or_default();
    tap::named(&counters).filter(|(name, _)| !name.contains("ticks")).collect()
}

/// The trace has every exit that was counted, by its cause, and to look changes no count.
#[test]
fn a_trace_has_what_was_counted() -> Result<()> {
    let plain = watched(Mode::VmiBatched, Paging::Shadow, Task::Workload, false)?;
    let traced = watched(Mode::VmiBatched, Paging::Shadow, Task::Workload, true)?;
    assert_eq!(counts(&plain), counts(&traced));
    assert!(plain.record.is_none());

    let record = traced.record.as_ref().context("a record")?;
    let mut text = Vec::new();
    trace::write(&mut text, &[("guest".to_owned(), record)])?;
    let json: Value = serde_json::from_slice(&text)?;
    let events = json["traceEvents"].as_array().context("events")?;
    let (mut exits, mut updates, mut batches) = (BTreeMap::new(), 0, 0);
    let mut last = 0.0;
    for event in events.iter().filter(|event| event["ph"] == "X") {
        let args = &event["args"];
        if args["counted"].is_null() {
            batches += u64::from(!args["updates"].is_null());
            continue;
        }
        let start = event["ts"].as_f64().context("a time")?;
        assert!(last <= start, "{event}");
        last = start;
        *exits.entry(event["name"].as_str().unwrap_or_default()).or_insert(0) += 1;
        updates += args["updates"].as_u64().unwrap_or_default();
    }
    let counters = traced.counters.context("counters")?;
    let counted =
        tap::named(&counters).take(Counters::EXITS.len()).filter(|(_, count)| *count != 0);
    assert_eq!(exits, counted.collect());
    assert_eq!(updates, counters.updates);
    assert!(batches > 0 && batches <= counters.hypercalls, "{batches} of {}", counters.hypercalls);
    Ok(())
}
