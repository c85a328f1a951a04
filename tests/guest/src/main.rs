//! A small 32-bit kernel that holds a VMI ROM against the interface's contracts.
//!
//! It finds the ROM as Linux does, binds its calls by pointer and by patched call sites, and checks
//! each of them: what it does, and what it leaves alone. The results go to the first serial port and
//! to the screen as TAP; the verdict ends QEMU through its debug-exit device, and stops a PC.
//!
//! - `boot`: from the boot loader's 32-bit start to [`main`] at C0100000h,
//! - `command_line`: the words that the boot loader passes on,
//! - `host`: the ring and the calls of a guest that a hypervisor has started itself,
//! - `processor`, `devices`, `console`: one wrapper for each privileged instruction; the machine,
//! - `segments`, `traps`, `paging`: the tables of an ordinary kernel,
//! - `harness`: enters a call with every register, flag and segment known, and looks at what is left,
//! - `client`: the kernels that exist, and how each reaches a ROM's calls,
//! - `rom`: probing, `vmi_init`, `get_reloc`,
//! - `site`: call sites, and what a ROM may make of them,
//! - `session`, `report`: which call is under test, what was found,
//! - `crowd`: several processors at one call site,
//! - `costs`: instructions of what a kernel does, with the ROM and without,
//! - `hypervisor`: the reference hypervisor below, where there is one,
//! - `xen`: Xen's own console and events, beside VMI,
//! - `workload`: what a kernel does to page tables all day, and what that costs under the hypervisor,
//! - `hostile`: what no guest should do to that hypervisor,
//! - `fate`: bad ends, for the hypervisor to tell of,
//! - `functions`: the functions that `vmi-abi` makes of the calls,
//! - `checks`: one function for each call, under the specification's name.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod boot;
#[cfg(target_os = "none")]
mod checks;
#[cfg(target_os = "none")]
mod client;
#[cfg(target_os = "none")]
mod command_line;
#[cfg(target_os = "none")]
mod console;
#[cfg(target_os = "none")]
mod costs;
#[cfg(target_os = "none")]
mod crowd;
#[cfg(target_os = "none")]
mod devices;
#[cfg(target_os = "none")]
mod fate;
#[cfg(target_os = "none")]
mod functions;
#[cfg(target_os = "none")]
mod harness;
#[cfg(target_os = "none")]
mod host;
#[cfg(target_os = "none")]
mod hostile;
#[cfg(target_os = "none")]
mod hypervisor;
#[cfg(target_os = "none")]
mod paging;
#[cfg(target_os = "none")]
mod processor;
#[cfg(target_os = "none")]
mod report;
#[cfg(target_os = "none")]
mod rom;
#[cfg(target_os = "none")]
mod segments;
#[cfg(target_os = "none")]
mod session;
#[cfg(target_os = "none")]
mod site;
#[cfg(target_os = "none")]
mod suite;
#[cfg(target_os = "none")]
mod traps;
#[cfg(target_os = "none")]
mod workload;
#[cfg(target_os = "none")]
mod xen;

#[cfg(not(target_os = "none"))]
fn main() {
    println!("the guest is built by `cargo xtask build`");
}
