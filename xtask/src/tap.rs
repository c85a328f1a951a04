//! What the test guest reports on its serial port: TAP version 14, and comments with figures.
//!
//! ```text
//! TAP version 14
//! # rom base=0xca000 length=1536 revision=3.0 linked=false license="GPL v2"
//! ok 1 - description
//! not ok 2 - description
//!   ---
//!   rule: "what the contract says"
//!   message: "what was seen"
//!   ...
//! # call mode=non-PAE alias=direct number=29 name=EnableInterrupts answer=CALL_REL verdict=ok stack=4 instructions=2 checks=118
//! # cost operation="cli and sti" times=100 native=8000 rom=8000
//! # workload name="fork" mode=PAE operations=4 entries=12288 counters=0,12,...
//! # hostile what="hypercalls" count=1500
//! # xen-cost work="map" entries=32 rom=608 raw=555 trapped=3175
//! 1..2
//! # vmi-guest: 1 of 2 checks fail
//! ```
//!
//! The firmware writes to the same port, so everything before the version line is its own affair.
//! From there on the reader is strict: a guest that loses a line must not pass.

use serde::Serialize;
use std::collections::BTreeMap;
use vmi_hv_backend::reference::interface::Counters;

/// The line that starts the report.
const VERSION: &str = "TAP version 14";

/// The start of the line that ends it.
const MARKER: &str = "# vmi-guest: ";

/// A report, read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The ROM that the guest found.
    pub rom: Option<RomLine>,
    /// Every check, in the order of the report.
    pub checks: Vec<Check>,
    /// Every call's figures.
    pub calls: Vec<CallLine>,
    /// What the operations of a kernel cost.
    pub costs: Vec<CostLine>,
    /// What a kernel's work costs under the reference hypervisor.
    pub workloads: Vec<WorkloadLine>,
    /// What a hostile guest tried under it.
    pub attempts: Vec<AttemptLine>,
    /// What changes cost on Xen.
    pub xen_costs: Vec<XenCostLine>,
    /// How many checks the guest planned.
    pub plan: Option<usize>,
    /// The closing line, without its start.
    pub closing: Option<String>,
    /// What is wrong with the report itself.
    pub faults: Vec<String>,
}

/// What a change costs on Xen, in instructions of the guest, the ROM and Xen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct XenCostLine {
    /// What is done.
    pub work: String,
    /// To how many entries at once; the counts are for one.
    pub entries: u32,
    /// By the ROM's calls.
    pub rom: u64,
    /// By hypercalls of the guest's own.
    pub raw: u64,
    /// By stores that Xen traps; 0 where there are none that it would emulate.
    pub trapped: u64,
}

impl XenCostLine {
    /// How much more it costs by the ROM than by a guest that was written for Xen.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        self.rom as f64 / self.raw as f64
    }

    /// How much more it costs by stores that trap than by the ROM.
    #[must_use]
    pub fn saving(&self) -> Option<f64> {
        (self.trapped != 0).then(|| self.trapped as f64 / self.rom as f64)
    }
}

/// The ROM that the guest found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RomLine {
    /// Its physical address.
    pub base: u64,
    /// Its length in bytes.
    pub length: u64,
    /// The revision that it serves.
    pub revision: String,
    /// It is linked into the guest, and not the machine's.
    pub linked: bool,
    /// Its licence.
    pub license: String,
}

/// One check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its number.
    pub number: usize,
    /// Whether it holds.
    pub ok: bool,
    /// What it checks.
    pub description: String,
    /// What was written below it: `rule` and `message`, perhaps more; a list has several values.
    pub details: BTreeMap<String, Vec<String>>,
}

/// What happened to one call, in one way of reaching it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CallLine {
    /// The guest's paging: `non-PAE` or `PAE`.
    pub mode: String,
    /// The view of the ROM: `direct`, `alias` or `copy`.
    pub alias: String,
    /// The call's number.
    pub number: u32,
    /// The call's name.
    pub name: String,
    /// What `get_reloc` answered.
    pub answer: String,
    /// What came of it.
    pub verdict: Verdict,
    /// Bytes of stack that the call used.
    pub stack: Option<u32>,
    /// Instructions that it took.
    pub instructions: Option<u32>,
    /// Checks that were made.
    pub checks: Option<u32>,
}

/// What an operation of a kernel costs, in ticks of the time-stamp counter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CostLine {
    /// What is done.
    pub operation: String,
    /// How often.
    pub times: u32,
    /// With native code at the sites, as a kernel without a ROM has it.
    pub native: u64,
    /// With the ROM's answers.
    pub rom: u64,
}

/// What a kernel's work costs under the reference hypervisor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WorkloadLine {
    /// What is done.
    pub name: String,
    /// The guest's paging mode.
    pub mode: String,
    /// How often it is done.
    pub operations: u32,
    /// Page-table entries that were changed, in all operations.
    pub entries: u64,
    /// What the hypervisor counted meanwhile.
    #[serde(serialize_with = "by_name")]
    pub counters: Counters,
}

/// What a hostile guest tried.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AttemptLine {
    /// What.
    pub what: String,
    /// How many times.
    pub count: u32,
}

/// The counters under their names.
fn by_name<S: serde::Serializer>(counters: &Counters, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(named(counters))
}

/// The counters with their names.
pub fn named(counters: &Counters) -> impl Iterator<Item = (&'static str, u64)> {
    Counters::EXITS.iter().chain(Counters::OTHERS).copied().zip(counters.values())
}

/// What came of a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It was not tried.
    #[default]
    Skip,
    /// It kept its contract.
    Ok,
    /// It broke it.
    Fail,
}

impl Report {
    /// Reads what came from the serial port.
    #[must_use]
    pub fn parse(log: &str) -> Self {
        let mut reader = Reader::default();
        for line in log.lines() {
            // A debug console in between writes CR LF.
            reader.line(line.trim_end_matches('\r'));
        }
        reader.finish()
    }

    /// The checks that fail.
    pub fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| !check.ok)
    }

    /// Why the run did not pass; nothing if it did.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        let failing = self.failures().count();
        if failing != 0 {
            return Some(format!("{failing} of {} checks fail", self.checks.len()));
        }
        self.faults.first().map(|fault| match self.faults.len() {
            1 => format!("the guest's report is not whole: {fault}"),
            count => format!("the guest's report is not whole: {fault} (and {} more)", count - 1),
        })
    }
}

/// The state of the reading.
#[derive(Default)]
struct Reader {
    report: Report,
    has_started: bool,
    /// Inside the block below a check, and its list's key.
    block: Option<Option<String>>,
    skip_reasons: usize,
}

impl Reader {
    fn fault(&mut self, fault: String) {
        self.report.faults.push(fault);
    }

    fn line(&mut self, line: &str) {
        if !self.has_started {
            // The firmware may leave the cursor in the middle of a line.
            self.has_started = line.ends_with(VERSION);
            return;
        }
        if self.block.is_some() {
            self.block_line(line);
        } else if let Some(comment) = line.strip_prefix(MARKER) {
            if self.report.closing.replace(comment.trim().to_owned()).is_some() {
                self.fault("two closing lines".into());
            }
        } else if let Some(fields) = line.strip_prefix("# call ") {
            self.call(fields);
        } else if let Some(fields) = line.strip_prefix("# cost ") {
            self.cost(fields);
        } else if let Some(fields) = line.strip_prefix("# workload ") {
            self.workload(fields);
        } else if let Some(fields) = line.strip_prefix("# xen-cost ") {
            self.xen_cost(fields);
        } else if let Some(fields) = line.strip_prefix("# hostile ") {
            self.attempt(fields);
        } else if let Some(fields) = line.strip_prefix("# rom ") {
            self.rom(fields);
        } else if let Some(rest) = line.strip_prefix("ok ") {
            self.check(true, rest);
        } else if let Some(rest) = line.strip_prefix("not ok ") {
            self.check(false, rest);
        } else if let Some(plan) = line.strip_prefix("1..") {
            match plan.trim().parse() {
                Ok(count) if self.report.plan.is_none() => self.report.plan = Some(count),
                _ => self.fault(format!("a second or unreadable plan: {line:?}")),
            }
        } else if line.trim() == "---" {
            if self.report.checks.is_empty() {
                self.fault("a block below no check".into());
            }
            self.block = Some(None);
        } else if let Some(reason) = line.strip_prefix("Bail out!") {
            self.fault(format!("the guest gave up:{reason}"));
        } else if line.ends_with(VERSION) {
            self.fault("the guest started twice".into());
        } else if !line.trim().is_empty() && !line.starts_with('#') {
            self.fault(format!("a line that is not TAP: {line:?}"));
        }
    }

    /// A line of the block below a check: `key: value`, `key:`, or `- value` of the key before.
    fn block_line(&mut self, line: &str) {
        let text = line.trim();
        if text == "..." {
            self.block = None;
            return;
        }
        let (key, value) = if let Some(value) = text.strip_prefix("- ") {
            (self.block.clone().flatten(), Some(value))
        } else if let Some((key, value)) = text.split_once(':') {
            self.block = Some(Some(key.to_owned()));
            (Some(key.to_owned()), Some(value.trim()).filter(|value| !value.is_empty()))
        } else {
            (None, Some(text))
        };
        match (self.report.checks.last_mut(), key, value) {
            (Some(check), Some(key), Some(value)) => {
                check.details.entry(key).or_default().push(unquoted(value))
            }
            (Some(_), Some(_), None) => {}
            _ => self.fault(format!("an unreadable line below a check: {line:?}")),
        }
    }

    fn check(&mut self, ok: bool, rest: &str) {
        let (number, description) = rest.split_once(' ').unwrap_or((rest, ""));
        let Ok(number) = number.parse::<usize>() else {
            return self.fault(format!("a check without a number: {rest:?}"));
        };
        let expected = self.report.checks.len() + 1;
        if number != expected {
            self.fault(format!("check {number} where {expected} should be"));
        }
        if description.contains("# SKIP") || description.contains("# TODO") {
            self.skip_reasons += 1;
        }
        let description = description.strip_prefix("- ").unwrap_or(description).to_owned();
        self.report.checks.push(Check { number, ok, description, details: BTreeMap::new() });
    }

    fn call(&mut self, text: &str) {
        let fields = fields(text);
        let word = |key: &str| fields.get(key).cloned();
        let number = |key: &str| fields.get(key).and_then(|value| value.parse().ok());
        let verdict = match fields.get("verdict").map(String::as_str) {
            Some("ok") => Some(Verdict::Ok),
            Some("FAIL") => Some(Verdict::Fail),
            Some("skip") => Some(Verdict::Skip),
            _ => None,
        };
        let call = || {
            Some(CallLine {
                mode: word("mode")?,
                alias: word("alias")?,
                number: number("number")?,
                name: word("name")?,
                answer: word("answer")?,
                verdict: verdict?,
                stack: number("stack"),
                instructions: number("instructions"),
                checks: number("checks"),
            })
        };
        match call() {
            Some(call) => self.report.calls.push(call),
            None => self.fault(format!("an unreadable call line: {text:?}")),
        }
    }

    /// What an operation costs.
    fn cost(&mut self, text: &str) {
        let fields = fields(text);
        let number = |key: &str| fields.get(key).and_then(|text| integer(text));
        let line = (|| {
            Some(CostLine {
                operation: fields.get("operation")?.clone(),
                times: u32::try_from(number("times")?).ok().filter(|times| *times != 0)?,
                native: number("native")?,
                rom: number("rom")?,
            })
        })();
        match line {
            Some(line) => self.report.costs.push(line),
            None => self.fault(format!("an unreadable line of costs: {text:?}")),
        }
    }

    /// What a kernel's work costs.
    fn workload(&mut self, text: &str) {
        let fields = fields(text);
        let number = |key: &str| fields.get(key).and_then(|text| integer(text));
        let line = (|| {
            let values = fields.get("counters")?.split(',').map(integer);
            let values: Vec<u64> = values.collect::<Option<_>>()?;
            Some(WorkloadLine {
                name: fields.get("name")?.clone(),
                mode: fields.get("mode")?.clone(),
                operations: u32::try_from(number("operations")?)
                    .ok()
                    .filter(|count| *count != 0)?,
                entries: number("entries")?,
                counters: Counters::from_values(values.try_into().ok()?),
            })
        })();
        match line {
            Some(line) => self.report.workloads.push(line),
            None => self.fault(format!("an unreadable line of a workload: {text:?}")),
        }
    }

    /// What a change costs on Xen.
    fn xen_cost(&mut self, text: &str) {
        let fields = fields(text);
        let number = |key: &str| fields.get(key).and_then(|text| integer(text));
        let line = (|| {
            Some(XenCostLine {
                work: fields.get("work")?.clone(),
                entries: u32::try_from(number("entries")?).ok()?,
                // What was never the same is 0.
                rom: number("rom").filter(|count| *count != 0)?,
                raw: number("raw").filter(|count| *count != 0)?,
                trapped: number("trapped")?,
            })
        })();
        match line {
            Some(line) => self.report.xen_costs.push(line),
            None => self.fault(format!("an unreadable line of costs on Xen: {text:?}")),
        }
    }

    /// What a hostile guest tried.
    fn attempt(&mut self, text: &str) {
        let fields = fields(text);
        let count = fields.get("count").and_then(|count| count.parse().ok());
        match (fields.get("what"), count) {
            (Some(what), Some(count)) => {
                self.report.attempts.push(AttemptLine { what: what.clone(), count })
            }
            _ => self.fault(format!("an unreadable line of attempts: {text:?}")),
        }
    }

    fn rom(&mut self, text: &str) {
        let fields = fields(text);
        let rom = || {
            Some(RomLine {
                base: integer(fields.get("base")?)?,
                length: integer(fields.get("length")?)?,
                revision: fields.get("revision")?.clone(),
                linked: fields.get("linked")?.parse().ok()?,
                license: fields.get("license")?.clone(),
            })
        };
        match rom() {
            Some(rom) => self.report.rom = Some(rom),
            None => self.fault(format!("an unreadable rom line: {text:?}")),
        }
    }

    fn finish(mut self) -> Report {
        if !self.has_started {
            self.fault(format!("no line `{VERSION}`"));
            return self.report;
        }
        if self.block.is_some() {
            self.fault("the block below the last check has no end".into());
        }
        let total = self.report.checks.len();
        let failing = self.report.failures().count();
        match self.report.plan {
            None => self.fault("no plan".into()),
            Some(0) => self.fault("a plan of no checks".into()),
            Some(plan) if plan != total => {
                self.fault(format!("{plan} checks planned, {total} reported"))
            }
            Some(_) => {}
        }
        let expected = if failing == 0 {
            format!("all {total} checks hold")
        } else {
            format!("{failing} of {total} checks fail")
        };
        match &self.report.closing {
            None => self.fault("no closing line".into()),
            Some(closing) if *closing != expected => {
                let fault =
                    format!("the closing line says {closing:?}, the checks say {expected:?}");
                self.fault(fault);
            }
            Some(_) => {}
        }
        let broken = self
            .report
            .calls
            .iter()
            .find(|call| call.verdict == Verdict::Fail)
            .map(|call| call.name.clone());
        if let (0, Some(name)) = (failing, broken) {
            self.fault(format!("{name} is said to fail, yet no check does"));
        }
        if self.skip_reasons != 0 {
            self.fault(format!("{} checks are marked as skipped or to be done", self.skip_reasons));
        }
        self.report
    }
}

/// `key=value key="value with blanks"`.
fn fields(text: &str) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    let mut rest = text.trim_start();
    while let Some((key, tail)) = rest.split_once('=') {
        let (value, after) = match tail.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => tail.split_once(' ').unwrap_or((tail, "")),
        };
        fields.insert(key.trim().to_owned(), value.to_owned());
        rest = after.trim_start();
    }
    fields
}

/// A decimal or `0x` hexadecimal number.
fn integer(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// A value without the quotation marks around it.
fn unquoted(text: &str) -> String {
    let inner = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    inner.map_or_else(|| text.to_owned(), |inner| inner.replace("\\\"", "\"").replace("\\\\", "\\"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "SeaBIOS\nTAP version 14\n# rom base=0xca000 length=1536 revision=3.0 linked=false license=\"GPL v2\"\nok 1 - finds a ROM\n\
        # call mode=non-PAE alias=direct number=29 name=EnableInterrupts answer=CALL_REL verdict=ok stack=4 instructions=2 checks=118\n\
        ok 2 - EnableInterrupts\n1..2\n# vmi-guest: all 2 checks hold\n";

    #[test]
    fn a_whole_report_passes() {
        let report = Report::parse(GOOD);
        assert_eq!(report.complaint(), None, "{report:?}");
        assert_eq!(
            report.rom,
            Some(RomLine {
                base: 0xca000,
                length: 1536,
                revision: "3.0".into(),
                linked: false,
                license: "GPL v2".into()
            })
        );
        let [call] = &report.calls[..] else { panic!("one call") };
        assert_eq!(
            (call.number, call.stack, call.instructions, call.checks),
            (29, Some(4), Some(2), Some(118))
        );
        assert_eq!(call.verdict, Verdict::Ok);
        assert_eq!(Report::parse(&GOOD.replace('\n', "\r\n")), report);
    }

    #[test]
    fn counters_are_read_all_or_not_at_all() {
        let counters = Counters { hypercalls: 7, updates: 9, ..Counters::ZERO };
        let values: Vec<String> = counters.values().iter().map(u64::to_string).collect();
        let line = |values: &str| {
            let line = format!(
                "# workload name=\"fork\" mode=PAE operations=4 entries=40 counters={values}\n"
            );
            Report::parse(
                &GOOD.replace("1..2", &format!("{line}# hostile what=\"x\" count=3\n1..2")),
            )
        };
        let report = line(&values.join(","));
        assert_eq!(report.complaint(), None);
        let [found] = &report.workloads[..] else { panic!("one workload") };
        assert_eq!((found.operations, found.entries, found.counters), (4, 40, counters));
        assert_eq!(report.attempts, [AttemptLine { what: "x".into(), count: 3 }]);
        for broken in [&values[1..].join(","), "", "1,2"] {
            assert!(line(broken).complaint().is_some(), "{broken}");
        }
    }

    #[test]
    fn a_failure_carries_its_rules_and_its_message() {
        let log = "TAP version 14\nnot ok 1 - EnableInterrupts\n  ---\n  rule: \"keeps EAX\"\n  message: \"EAX is 1\"\n  ...\n\
            not ok 2 - IRET\n  ---\n  rule:\n  - \"first: a\"\n  - \"second\"\n  message: plain\n  ...\n1..2\n# vmi-guest: 2 of 2 checks fail\n";
        let report = Report::parse(log);
        assert_eq!(report.faults, Vec::<String>::new());
        assert_eq!(report.complaint().as_deref(), Some("2 of 2 checks fail"));
        assert_eq!(report.checks[0].details["rule"], ["keeps EAX"]);
        assert_eq!(report.checks[0].details["message"], ["EAX is 1"]);
        assert_eq!(report.checks[1].details["rule"], ["first: a", "second"]);
        assert_eq!(report.checks[1].details["message"], ["plain"]);
    }

    #[test]
    fn a_report_that_lost_something_fails() {
        let without = |part: &str| GOOD.replace(part, "");
        let changed = |from: &str, to: &str| GOOD.replace(from, to);
        for (log, fault) in [
            (without("TAP version 14\n"), "no line"),
            (without("ok 2 - EnableInterrupts\n"), "2 checks planned, 1 reported"),
            (without("ok 1 - finds a ROM\n"), "check 2 where 1 should be"),
            (without("1..2\n"), "no plan"),
            (without("# vmi-guest: all 2 checks hold\n"), "no closing line"),
            (changed("all 2", "all 3"), "the closing line says"),
            (changed("verdict=ok", "verdict=FAIL"), "is said to fail"),
            (changed("verdict=ok", "verdict=good"), "an unreadable call line"),
            (changed("1..2", "1..2\n1..2"), "a second or unreadable plan"),
            (changed("ok 2 -", "ok two -"), "a check without a number"),
            (changed("1..2", "garbage"), "a line that is not TAP"),
            (changed("1..2", "Bail out! no ROM"), "the guest gave up"),
            (changed("ok 2 - E", "ok 2 - # SKIP E"), "marked as skipped"),
            (
                changed("1..2", "  ---\n  rule: x\n1..2"),
                "the block below the last check has no end",
            ),
            (format!("{GOOD}{GOOD}"), "started twice"),
            (
                "TAP version 14\n1..0\n# vmi-guest: all 0 checks hold\n".into(),
                "a plan of no checks",
            ),
        ] {
            let report = Report::parse(&log);
            assert!(report.complaint().is_some(), "{log}");
            assert!(
                report.faults.iter().any(|found| found.contains(fault)),
                "{fault}: {:?}",
                report.faults
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(log in "(TAP version 14\n)?(\\PC|\n|ok |not ok |# call |1\\.\\.|  ---\n|=|\"){0,200}") {
            let _ = Report::parse(&log).complaint();
        }
    }

    #[test]
    fn costs_on_xen_are_read_and_what_was_never_the_same_is_a_fault() {
        let log =
            |line: &str| format!("{VERSION}\nok 1 - x\n{line}\n1..1\n{MARKER}all 1 checks hold\n");
        let report =
            Report::parse(&log("# xen-cost work=\"map\" entries=32 rom=600 raw=500 trapped=3000"));
        let [found] = &report.xen_costs[..] else { panic!("one line") };
        assert_eq!((found.work.as_str(), found.entries, found.ratio()), ("map", 32, 1.2));
        assert_eq!(found.saving(), Some(5.0));
        assert_eq!(report.complaint(), None);
        let report =
            Report::parse(&log("# xen-cost work=\"map\" entries=32 rom=0 raw=500 trapped=3000"));
        assert!(report.complaint().is_some() && report.xen_costs.is_empty());
    }
}
