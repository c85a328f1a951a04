//! Builds with Linux's build system, which Xen has too: a configuration from the answers that matter, make, and a note of what it was
//! made from.

use crate::build;
use crate::progress::Progress;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// What the user's environment may hold for other programs.
const OTHERS: [&str; 12] = [
    "ARCH",
    "CC",
    "CFLAGS",
    "CROSS_COMPILE",
    "DEBUG",
    "KBUILD_OUTPUT",
    "KCONFIG_CONFIG",
    "LDFLAGS",
    "LLVM",
    "MAKEFLAGS",
    "MFLAGS",
    "O",
];

/// A build of an unpacked source.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kbuild<'a> {
    /// The source.
    pub(crate) source: &'a Path,
    /// Where it is built.
    pub(crate) built: &'a Path,
    /// What make is told, `NAME=value`.
    pub(crate) variables: &'a [&'a str],
    /// Where the error output of the last step lands.
    pub(crate) log: &'a Path,
}

impl Kbuild<'_> {
    /// Configures: `answers` are ours, `others` is the target that answers all other questions.
    pub(crate) fn configure(&self, answers: &str, others: &str, progress: &Progress) -> Result<()> {
        let file = self.built.join("answers");
        build::write(&file, answers.as_bytes())?;
        self.run(self.command().env("KCONFIG_ALLCONFIG", &file).arg(others), progress)?;
        let chosen = fs::read_to_string(self.built.join(".config")).unwrap_or_default();
        let is_refused =
            |line: &&str| line.ends_with("=y") && !chosen.lines().any(|other| other == *line);
        let refused: Vec<&str> = answers.lines().filter(is_refused).collect();
        if !refused.is_empty() {
            bail!("{} failed: it cannot have {}", progress.title(), refused.join(", "));
        }
        Ok(())
    }

    /// Builds a target, on all processors.
    pub(crate) fn make(&self, target: &str, progress: &Progress) -> Result<()> {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        self.run(self.command().arg(format!("-j{jobs}")).arg(target), progress)
    }

    fn command(&self) -> Command {
        let mut make = Command::new("make");
        make.arg("-C").arg(self.source).arg(format!("O={}", self.built.display()));
        make.args(self.variables);
        for name in OTHERS {
            make.env_remove(name);
        }
        make
    }

    /// Runs a step, with its last line as progress and its error output in a file.
    fn run(&self, make: &mut Command, progress: &Progress) -> Result<()> {
        log::debug!("{make:?}");
        let log = self.log;
        let file =
            fs::File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        let mut child = make
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()
            .context("make does not start")?;
        let mut last = String::new();
        if let Some(pipe) = child.stdout.take() {
            for line in BufReader::new(pipe).lines() {
                last = line.context("cannot read what make says")?;
                progress.at(&last);
            }
        }
        let status = child.wait().context("cannot wait for make")?;
        if !status.success() {
            let said = fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<&str> = said.lines().collect();
            let end = lines[lines.len().saturating_sub(20)..].join("\n");
            bail!("{} failed ({status}), at {last:?}:\n{end}", progress.title());
        }
        Ok(())
    }
}

/// The name of the note beside what was built.
const NOTE: &str = "built-from";

/// Notes the version of the source, and what else went into what was built.
pub(crate) fn note(folder: &Path, version: &str, ours: &str) -> Result<()> {
    build::write(&folder.join(NOTE), format!("{version}\n{ours}").as_bytes())
}

/// The version of the source, if this went into what was built.
pub(crate) fn noted(folder: &Path, ours: &str) -> Option<String> {
    let note = fs::read_to_string(folder.join(NOTE)).ok()?;
    let (version, rest) = note.split_once('\n')?;
    (rest == ours).then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_holds_as_long_as_the_same_goes_in() -> Result<()> {
        let folder = tempfile::tempdir()?;
        assert_eq!(noted(folder.path(), "A=y\n"), None);
        note(folder.path(), "6.1.192-2", "A=y\n")?;
        assert_eq!(noted(folder.path(), "A=y\n").as_deref(), Some("6.1.192-2"));
        assert_eq!(noted(folder.path(), "A=n\n"), None);
        Ok(())
    }
}
