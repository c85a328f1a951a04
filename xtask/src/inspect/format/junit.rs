//! Verdicts as JUnit XML: a suite for each ROM, in it a test case for each rule that concerns the
//! whole image and one for each call.

use super::{Judged, is_undecided, sentence};
use crate::inspect::rules::{Rule, Violation};
use quick_junit::{NonSuccessKind, Report as Document, TestCase, TestCaseStatus, TestSuite};
use std::collections::BTreeSet;

/// All verdicts in one document.
///
/// # Errors
///
/// The XML could not be written.
pub fn junit(verdicts: &[Judged<'_>]) -> Result<String, quick_junit::SerializeError> {
    let mut document = Document::new("vmi-verify");
    for judged in verdicts {
        document.add_test_suite(suite(judged));
    }
    document.to_string().map(|text| text + "\n")
}

fn suite(judged: &Judged<'_>) -> TestSuite {
    let name = match judged.start() {
        0 => judged.source.to_owned(),
        start => format!("{} at {start:X}h", judged.source),
    };
    let mut suite = TestSuite::new(name);
    let violations = &judged.report.violations;
    for rule in Rule::ALL {
        let broken: Vec<_> =
            violations.iter().filter(|v| v.call.is_none() && v.rule == *rule).collect();
        let mut case = case(rule.name().to_owned(), "image", &broken);
        let skipped = judged.report.not_applicable.iter().find(|skipped| skipped.rule == *rule);
        if let Some(skipped) = skipped.filter(|_| broken.is_empty()) {
            let mut status = TestCaseStatus::skipped();
            status.set_message(format!("not applicable: {}", skipped.reason));
            case.status = status;
        }
        suite.add_test_case(case);
    }
    // Calls with code were executed; a call without any can still be answered wrongly.
    let executed = (0..).zip(&judged.report.executed).filter(|(_, run)| run.is_some());
    let calls: BTreeSet<u32> = executed
        .map(|(number, _)| number)
        .chain(violations.iter().filter_map(|v| v.call))
        .collect();
    for number in calls {
        let broken: Vec<_> = violations.iter().filter(|v| v.call == Some(number)).collect();
        let name = judged.report.call_name(number);
        suite.add_test_case(case(format!("{number} {name}"), "calls", &broken));
    }
    if !judged.report.notes.is_empty() {
        let notes = judged.report.notes.iter().map(|n| format!("{}: {}", n.subject, n.detail));
        suite.set_system_out(notes.collect::<Vec<_>>().join("\n"));
    }
    suite
}

fn case(name: String, class: &str, broken: &[&Violation]) -> TestCase {
    let status = match broken {
        [] => TestCaseStatus::success(),
        [first, ..] => {
            let undecided = broken.iter().all(|violation| is_undecided(violation));
            let kind = if undecided { NonSuccessKind::Error } else { NonSuccessKind::Failure };
            let mut status = TestCaseStatus::non_success(kind);
            let lines = broken.iter().map(|v| format!("{}: {}", v.rule, sentence(v)));
            status.set_message(sentence(first));
            status.set_type(first.rule.name());
            status.set_description(lines.collect::<Vec<_>>().join("\n"));
            status
        }
    };
    let mut case = TestCase::new(name, status);
    case.set_classname(class);
    case
}
