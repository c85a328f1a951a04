//! Any bytes as a file that may carry a ROM.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| xtask::inspect::hostile::sources(bytes));
