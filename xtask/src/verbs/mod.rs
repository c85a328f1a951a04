//! The verbs of the command line, one file each.

pub mod build;
pub mod run;
pub mod setup;
