//! What a kernel's operations cost, as our first program counts them, without a ROM and with one.

use super::{Boot, Booted};
use crate::conformance::Cost;
use crate::qemu::TICKS_PER_INSTRUCTION;
use anyhow::{Context, Result, ensure};

/// A boot that says what operations cost, instead of one of the tests.
///
/// The kernel puts programs at the same addresses each time, and starts none of the machine's other processors, for instructions can be
/// counted only if it waits for none.
#[must_use]
pub fn boot(tests: Boot<'_>) -> Boot<'_> {
    Boot { append: append(&tests.append).into(), steady_time: true, ..tests }
}

/// The command line's words with those for it. Behind two dashes our first program runs one of its tests and says what operations cost.
fn append(words: &str) -> String {
    let dashes = if words.split_whitespace().any(|word| word == "--") { "" } else { "-- " };
    let space = if words.is_empty() { "" } else { " " };
    format!("norandmaps maxcpus=1 {words}{space}{dashes}only=pipe costs")
}

/// The operations of a boot, and the instructions that each takes.
///
/// # Errors
///
/// It says of none, or something that cannot be read.
fn instructions(serial: &str) -> Result<Vec<(&str, f64)>> {
    let read = |line| {
        let (name, rest) = str::split_once(line, ": ")?;
        let (ticks, times) = rest.split_once(" ticks for ")?;
        let (ticks, times): (u64, u32) = (ticks.parse().ok()?, times.parse().ok()?);
        let one = ticks as f64 / f64::from(times) / f64::from(TICKS_PER_INSTRUCTION);
        (ticks != 0 && times != 0).then_some((name, one))
    };
    let lines = serial.lines().filter_map(|line| line.trim_end().strip_prefix("linux: cost "));
    let costs: Vec<_> = lines
        .map(|line| read(line).with_context(|| format!("an unreadable line of costs: {line:?}")))
        .collect::<Result<_>>()?;
    ensure!(!costs.is_empty(), "the first program does not say what operations cost");
    Ok(costs)
}

/// What each operation costs with a ROM, against a boot without.
///
/// # Errors
///
/// One of the boots does not say it, or they say it of different operations.
pub fn compare(without: &Booted, with: &Booted) -> Result<Vec<Cost>> {
    compare_said(&without.run.serial, &with.run.serial)
}

fn compare_said(without: &str, with: &str) -> Result<Vec<Cost>> {
    let (without, with) = (instructions(without)?, instructions(with)?);
    let names = |costs: &[(&str, f64)]| costs.iter().map(|(name, _)| (*name).to_owned()).collect();
    let (one, other): (Vec<_>, Vec<_>) = (names(&without), names(&with));
    ensure!(one == other, "the boots are of different operations: {one:?}, {other:?}");
    let pairs = without.into_iter().zip(with);
    Ok(pairs
        .map(|((name, native), (_, rom))| Cost { operation: name.to_owned(), native, rom })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_become_instructions_of_one() -> Result<()> {
        let without = "[    1.0] x\nlinux: cost fork, exit: 1600 ticks for 2\r\nlinux: all\n";
        let with = "linux: cost fork, exit: 1680 ticks for 2\n";
        let costs = compare_said(without, with)?;
        let [cost] = &costs[..] else { anyhow::bail!("{costs:?}") };
        assert_eq!((cost.operation.as_str(), cost.native, cost.rom), ("fork, exit", 100.0, 105.0));
        Ok(())
    }

    #[test]
    fn what_is_said_of_something_else_or_not_at_all_is_refused() {
        let line = "linux: cost a: 8 ticks for 1\n";
        for (without, with, why) in [
            (line, "linux: test a ok\n", "does not say"),
            (line, "linux: cost b: 8 ticks for 1\n", "different operations"),
            (line, "linux: cost a: 8 ticks for 0\n", "unreadable"),
            ("linux: cost a: 0 ticks for 1\n", line, "unreadable"),
            ("linux: cost a FAILED: mmap fails (0)\n", line, "unreadable"),
        ] {
            let said = compare_said(without, with).expect_err(with).to_string();
            assert!(said.contains(why), "{said}");
        }
    }

    #[test]
    fn words_stand_behind_two_dashes_once() {
        assert_eq!(append(""), "norandmaps maxcpus=1 -- only=pipe costs");
        assert_eq!(append("quiet"), "norandmaps maxcpus=1 quiet -- only=pipe costs");
        assert_eq!(append("a -- forks=3"), "norandmaps maxcpus=1 a -- forks=3 only=pipe costs");
    }
}
