//! The verbs of the command line, one file each.

pub mod build;
pub mod diff;
pub mod docs;
pub mod inspect;
pub mod iso;
pub mod run;
pub mod setup;
pub mod test;
pub mod verify;
