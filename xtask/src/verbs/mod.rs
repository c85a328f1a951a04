//! The verbs of the command line, one file each.

mod boots;
pub mod build;
pub mod compare;
pub mod diff;
pub mod docs;
pub mod inspect;
pub mod iso;
pub mod run;
pub mod setup;
pub mod test;
pub mod verify;
