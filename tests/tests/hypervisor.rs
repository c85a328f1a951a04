//! The test guest on the reference hypervisor: every call in each of its modes, what a kernel's work costs there,
//! and what becomes of a guest that means harm. Exits are counted; no test looks at a clock.

use anyhow::{Context, Result};
use std::time::Duration;
use vmi_hv_backend::reference::interface::BATCH_LIMIT;
use xtask::hypervisor::{self, Comparison, Hosted, Mode, Paging, Setup, Task};
use xtask::tap::WorkloadLine;

/// Runs the guest, and wants every check to hold.
fn passes(mode: Mode, paging: Paging, task: Task) -> Result<Hosted> {
    let built = hypervisor::ensure()?;
    let limit = Duration::from_secs(180);
    let hosted = Setup { built, rom: None, mode, paging, limit }.run(task, |_| ())?;
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

/// The piece that changes few entries, and takes page faults that are the guest's own.
const PROGRAM: &str = "fork, exec, exit";

/// What VMI is for: a tenth of the exits where tables change in bulk, 32 entries or more with each exit, and no more
/// than one exit for a context switch. And what it is not: an exit for each entry, where nothing may wait.
#[test]
fn a_kernels_work_takes_few_exits() -> Result<()> {
    let runs = Mode::ALL
        .into_iter()
        .map(|mode| passes(mode, Paging::Shadow, Task::Workload))
        .collect::<Result<Vec<_>>>()?;
    let comparisons = Comparison::of(&runs);
    assert_eq!(comparisons.len(), 2 * (BULK.len() + 2), "{comparisons:#?}");
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
        } else if comparison.name == PROGRAM {
            // A page fault of the guest's costs two exits, before and behind its handler; neither can be saved.
            let faults = |line: &WorkloadLine| line.counters.guest_page_faults;
            assert!(faults(trap) == faults(batched) && faults(trap) > 0, "{comparison:#?}");
            let operations = u64::from(batched.operations);
            assert!(exits(batched) <= 2 * faults(batched) + 12 * operations, "{comparison:#?}");
            let factor = if comparison.guest_mode == "PAE" { 3 } else { 2 };
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
