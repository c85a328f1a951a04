//! Results as TAP (version 14) on the serial port, and the verdict.

use crate::console::{line, screen_line};
use crate::devices;
use core::fmt;

/// Test points so far.
#[derive(Default)]
pub(crate) struct Report {
    points: u32,
    failures: u32,
}

impl Report {
    /// Writes a test point, with the broken rules below it.
    pub(crate) fn point(&mut self, description: fmt::Arguments<'_>, problems: &Problems) {
        self.points += 1;
        if problems.is_empty() {
            line!("ok {} - {description}", self.points);
            return;
        }
        self.failures += 1;
        line!("not ok {} - {description}", self.points);
        line!("  ---");
        line!("  broken:");
        for problem in problems.iter() {
            line!("  - \"{problem}\"");
        }
        if problems.dropped > 0 {
            line!("  - \"and {} more\"", problems.dropped);
        }
        line!("  ...");
    }

    /// A test point of a single condition.
    pub(crate) fn check(
        &mut self,
        description: fmt::Arguments<'_>,
        result: Result<(), fmt::Arguments<'_>>,
    ) {
        let mut problems = Problems::default();
        if let Err(problem) = result {
            problems.add(problem);
        }
        self.point(description, &problems);
    }

    /// A report that goes on after a reset.
    pub(crate) fn resumed(points: u32, failures: u32) -> Self {
        Self { points, failures }
    }

    /// Test points so far.
    pub(crate) fn points(&self) -> u32 {
        self.points
    }

    /// Test points that failed.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// Whether nothing has failed.
    pub(crate) fn is_clean(&self) -> bool {
        self.failures == 0
    }

    /// Writes plan and marker, and ends the machine.
    pub(crate) fn finish(&self) -> ! {
        line!("1..{}", self.points);
        if self.failures == 0 {
            line!("# vmi-guest: all {} checks hold", self.points);
        } else {
            line!("# vmi-guest: {} of {} checks fail", self.failures, self.points);
        }
        screen_line!("{}", if self.is_clean() { PASSES } else { FAILS });
        devices::exit(self.is_clean())
    }
}

/// What the screen says at the end, to whoever sits before it.
const PASSES: &str = "\nPASSED: the ROM keeps its contract. You can switch the machine off.";
const FAILS: &str =
    "\nFAILED: the ROM breaks rules. The lines `not ok` say which; the serial port has them all.";
const STOPPED: &str = "\nNO VERDICT: the test could not go on. You can switch the machine off.";

/// Ends the machine when the guest cannot go on.
pub(crate) fn abandon(reason: fmt::Arguments<'_>) -> ! {
    line!("Bail out! {reason}");
    screen_line!("{STOPPED}");
    devices::exit(false)
}

const KEPT: usize = 8;
const LENGTH: usize = 160;

/// The rules that a call broke: the first few in words.
pub(crate) struct Problems {
    texts: [Text; KEPT],
    kept: usize,
    dropped: u32,
}

impl Default for Problems {
    fn default() -> Self {
        Self { texts: [const { Text::new() }; KEPT], kept: 0, dropped: 0 }
    }
}

impl Problems {
    /// Adds one; the same words are kept once.
    pub(crate) fn add(&mut self, problem: fmt::Arguments<'_>) {
        let mut text = Text::new();
        // A text that does not fit is cut, which is all that can go wrong.
        let _ = fmt::write(&mut text, problem);
        if self.iter().any(|known| known == text.as_str()) {
            return;
        }
        if self.kept == KEPT {
            self.dropped += 1;
        } else {
            self.texts[self.kept] = text;
            self.kept += 1;
        }
    }

    /// Whether every rule was kept.
    pub(crate) fn is_empty(&self) -> bool {
        self.kept == 0
    }

    fn iter(&self) -> impl Iterator<Item = &str> {
        self.texts[..self.kept].iter().map(Text::as_str)
    }
}

/// A short text without a heap.
struct Text {
    bytes: [u8; LENGTH],
    length: usize,
}

impl Text {
    const fn new() -> Self {
        Self { bytes: [0; LENGTH], length: 0 }
    }

    fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.length]).unwrap_or("(not text)")
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // A quote would end the report's string.
            let byte = if byte == b'"' || !byte.is_ascii() { b'\'' } else { byte };
            *self.bytes.get_mut(self.length).ok_or(fmt::Error)? = byte;
            self.length += 1;
        }
        Ok(())
    }
}
