//! `cargo xtask`: set-up, build, inspector, runs in QEMU, tests.

fn main() {}
