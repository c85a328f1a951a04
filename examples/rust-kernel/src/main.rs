//! A small kernel on VMI: see `kernel.rs`.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod kernel;

#[cfg(not(target_os = "none"))]
fn main() {
    println!("the kernel is built by `cargo xtask build --examples`");
}
