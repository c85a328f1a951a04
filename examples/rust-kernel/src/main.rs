//! A small kernel on VMI: see `kernel.rs`. On the host this only says how it is built.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod kernel;

#[cfg(not(target_os = "none"))]
fn main() {
    println!("the kernel is built by `cargo xtask build --examples`");
}
