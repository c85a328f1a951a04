//! The project's one script, as a library: `cargo xtask` is a thin command line on top of it, and
//! the tests call the same code.
