//! `cargo xtask`: set-up, build, inspector, runs in QEMU, tests.

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::process::ExitCode;
use xtask::table::BAD;
use xtask::verbs;

/// The open VMI ROM's one script: everything that the project builds, runs and checks.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct CommandLine {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Setup(verbs::setup::Args),
    Build(verbs::build::Args),
    Verify(verbs::verify::Args),
    Inspect(verbs::inspect::Args),
    Diff(verbs::diff::Args),
    Run(verbs::run::Args),
    Compare(verbs::compare::Args),
    Iso(verbs::iso::Args),
    Test(verbs::test::Args),
    Docs(verbs::docs::Args),
}

fn main() -> ExitCode {
    // `RUST_LOG=debug` shows every command that is run, with what it is told by its environment.
    env_logger::init();
    let done = match command_line().verb {
        Verb::Setup(args) => verbs::setup::run(&args),
        Verb::Build(args) => verbs::build::run(&args),
        Verb::Verify(args) => verbs::verify::run(&args),
        Verb::Inspect(args) => verbs::inspect::run(&args),
        Verb::Diff(args) => verbs::diff::run(&args),
        Verb::Run(args) => verbs::run::run(&args),
        Verb::Compare(args) => verbs::compare::run(&args),
        Verb::Iso(args) => verbs::iso::run(&args),
        Verb::Test(args) => verbs::test::run(&args),
        Verb::Docs(args) => verbs::docs::run(&args),
    };
    done.unwrap_or_else(|error| {
        anstream::eprintln!("{}error{}: {error:#}", BAD.render(), BAD.render_reset());
        ExitCode::FAILURE
    })
}

/// What the user typed, if options and run go together.
fn command_line() -> CommandLine {
    let mut command = CommandLine::command();
    let matches = command.get_matches_mut();
    if let Some((verb @ "run", given)) = matches.subcommand()
        && let Err(refusal) = verbs::run::options::check(given)
        && let Some(run) = command.find_subcommand_mut(verb)
    {
        refusal.format(run).exit();
    }
    CommandLine::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}
