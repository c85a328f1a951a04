//! `cargo xtask test`.

use crate::artifacts;
use crate::build::{self, Tools};
use crate::debian::{self, Flavour};
use crate::table::{BAD, GOOD, HEAD};
use crate::toolchain::{Findings, Need};
use crate::xen::source::Build;
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, IsTerminal};
use std::process::{Command, ExitCode, Stdio};

/// Runs all that must pass: formatting, lints, builds, and every test, those in QEMU included.
///
/// Goes on after a failure and ends with one line of totals.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run only tests whose name contains this; no formatting, no lints.
    filter: Option<String>,
}

/// What passed and what did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    passed: usize,
    failed: usize,
}

impl Totals {
    fn add(&mut self, is_good: bool) {
        if is_good { self.passed += 1 } else { self.failed += 1 }
    }
}

/// Tests.
///
/// # Errors
///
/// Something that the tests need is missing, or Cargo does not start.
pub fn run(args: &Args) -> Result<ExitCode> {
    let findings = super::setup::provide(Need::TEST)?;
    let mut totals = Totals::default();
    if args.filter.is_none() {
        formatting(&mut totals)?;
        host_lints(&mut totals)?;
        bare_lints(&findings, &mut totals)?;
        undefined_behaviour(&mut totals)?;
    }
    step("build");
    // The tests build what they need themselves; a build that fails here is said once, not in each.
    let is_built = artifacts::build_all(&findings)
        .inspect_err(|error| anstream::eprintln!("{error:#}"))
        .is_ok();
    totals.add(is_built);
    step("kernels for guests and for KVM");
    let are_there =
        debian::fetch(&Flavour::ALL).inspect_err(|error| anstream::eprintln!("{error:#}")).is_ok();
    totals.add(are_there);
    step("Linux with a client of VMI");
    let is_there = super::setup::linux_vmi().inspect_err(|error| anstream::eprintln!("{error:#}"));
    totals.add(is_there.is_ok());
    step("Xen for guests");
    let is_there =
        super::setup::xen(Build::Release).inspect_err(|error| anstream::eprintln!("{error:#}"));
    totals.add(is_there.is_ok());
    tests(args.filter.as_deref(), &mut totals)?;

    let Totals { passed, failed } = totals;
    println!("{passed} passed, {failed} failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn step(name: &str) {
    anstream::println!("{}{name}{}", HEAD.render(), HEAD.render_reset());
}

/// The Cargo that runs us.
fn cargo(arguments: &[&str]) -> Command {
    let mut command =
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.args(arguments).current_dir(crate::workspace()).env("RUSTUP_AUTO_INSTALL", "0");
    command
}

/// Whether the Cargo that runs us has a subcommand; says so if not.
fn has(subcommand: &str) -> bool {
    let is_there =
        cargo(&[subcommand, "--version"]).output().is_ok_and(|output| output.status.success());
    if !is_there {
        anstream::println!("left out: this Cargo comes without `cargo {subcommand}`");
    }
    is_there
}

/// Runs a step to its end and counts it.
fn count(totals: &mut Totals, mut command: Command) -> Result<()> {
    log::debug!("{command:?}");
    let status = command.status().context("cargo does not start")?;
    let (style, word) = if status.success() { (GOOD, "passed") } else { (BAD, "FAILED") };
    anstream::println!("{}{word}{}", style.render(), style.render_reset());
    totals.add(status.success());
    Ok(())
}

fn formatting(totals: &mut Totals) -> Result<()> {
    step("formatting");
    if has("fmt") { count(totals, cargo(&["fmt", "--all", "--check"])) } else { Ok(()) }
}

fn host_lints(totals: &mut Totals) -> Result<()> {
    step("lints of the host's crates");
    if !has("clippy") {
        return Ok(());
    }
    let clippy = |arguments: &[&str]| {
        let mut command = cargo(&["clippy", "--quiet", "--locked", "--all-targets"]);
        command.args(arguments).args(["--", "--deny", "warnings"]);
        command
    };
    count(totals, clippy(&[]))?;
    // KVM's host is a program for this processor and system only.
    if cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        count(totals, clippy(&["--package", "vmi-kvm-host"]))?;
    }
    Ok(())
}

/// Image, guest and hypervisor are linted for their own targets, if a compiler with its library's source has clippy.
fn bare_lints(findings: &Findings, totals: &mut Totals) -> Result<()> {
    step("lints of image, guest and hypervisor");
    let mut tools = Tools::from_findings(findings)?;
    let mut compilers =
        findings.compilers.iter().filter_map(|candidate| candidate.verdict.as_ref().ok());
    match compilers.find(|compiler| compiler.has_clippy()) {
        Some(compiler) => {
            tools.compiler = compiler.clone();
            build::bare_clippy(&tools).into_iter().try_for_each(|lints| count(totals, lints))
        }
        None => {
            anstream::println!(
                "clippy is left out: {} comes without it; the compiler's own warnings count",
                tools.compiler
            );
            let outcome = build::bare_warnings(&tools)?;
            if let Some(warnings) = &outcome {
                anstream::eprintln!("{warnings}");
            }
            let (style, word) = if outcome.is_none() { (GOOD, "passed") } else { (BAD, "FAILED") };
            anstream::println!("{}{word}{}", style.render(), style.render_reset());
            totals.add(outcome.is_none());
            Ok(())
        }
    }
}

/// The update queue in Miri, which sees undefined behaviour that tests do not, if it is there; few cases, as it is slow.
fn undefined_behaviour(totals: &mut Totals) -> Result<()> {
    step("undefined behaviour");
    if !has("miri") {
        return Ok(());
    }
    let mut command = cargo(&["miri", "test", "--quiet", "--locked", "--lib"]);
    command.args(["--package", "vmi-hv-backend"]);
    command.envs([("PROPTEST_CASES", "4"), ("QUEUE_LENGTH", "1")]);
    // Tests read their settings from the environment and write down what failed.
    command.env("MIRIFLAGS", "-Zmiri-disable-isolation");
    count(totals, command)
}

/// All tests of the host's crates, shown as they come and counted.
fn tests(filter: Option<&str>, totals: &mut Totals) -> Result<()> {
    step("tests");
    let mut command = cargo(&["test", "--quiet", "--locked", "--no-fail-fast"]);
    command.args(filter).arg("--");
    if std::io::stdout().is_terminal() {
        command.args(["--color", "always"]);
    }
    log::debug!("{command:?}");
    let mut child = command.stdout(Stdio::piped()).spawn().context("cargo does not start")?;
    let before = *totals;
    if let Some(pipe) = child.stdout.take() {
        for line in BufReader::new(pipe).lines() {
            let line = line.context("cannot read what the tests say")?;
            anstream::println!("{line}");
            if let Some(result) = result_line(&anstream::adapter::strip_str(&line).to_string()) {
                totals.passed += result.passed;
                totals.failed += result.failed;
            }
        }
    }
    let status = child.wait().context("cannot wait for cargo")?;
    // A test that does not even compile has no result line.
    if !status.success() && totals.failed == before.failed {
        totals.failed += 1;
    }
    Ok(())
}

/// The figures of a line `test result: ok. 3 passed; 0 failed; ...`.
fn result_line(line: &str) -> Option<Totals> {
    let figures = line.strip_prefix("test result: ")?;
    let figure = |name: &str| {
        figures
            .split([';', '.'])
            .find_map(|part| part.trim().strip_suffix(name)?.trim().parse::<usize>().ok())
    };
    Some(Totals { passed: figure("passed")?, failed: figure("failed")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_counted_and_others_are_not() {
        let line = "test result: FAILED. 11 passed; 2 failed; 0 ignored; 0 measured; 29 filtered out; finished in 0.13s";
        assert_eq!(result_line(line), Some(Totals { passed: 11, failed: 2 }));
        assert_eq!(result_line("test image::tests::x ... ok"), None);
        assert_eq!(result_line("test result: "), None);
    }
}
