//! What the backend asks of the machine below it: memory at linear addresses, and hypercalls with what they point to.
//!
//! On 32-bit x86 that is Xen, in `transport`. The tests have a model of it.

use super::interface::{MmuExtOp, MmuUpdate, MulticallEntry, TrapInfo, hypercall};
use core::cell::Cell;

/// Memory and hypercalls.
pub trait Machine {
    /// Reads a word of the guest's memory.
    fn load(&self, address: u32) -> u32;

    /// Writes one.
    fn store(&self, address: u32, value: u32);

    /// Writes two, of which nobody sees only one.
    fn store_long(&self, address: u32, value: u64);

    /// Clears bits of a word that Xen changes too, in one step, and answers how it was.
    fn clear_bits(&self, address: u32, bits: u32) -> u32;

    /// Sets bits, likewise.
    fn set_bits(&self, address: u32, bits: u32) -> u32;

    /// A hypercall whose arguments are numbers.
    fn hypercall(&self, number: u32, arguments: [u32; 4]) -> i32;

    /// A hypercall with a command, and a pointer to words that it reads or writes.
    fn operate(&self, number: u32, command: u32, words: &mut [u32]) -> i32;

    /// `mmu_update`: its result, and how many updates are applied.
    fn mmu_update(&self, updates: &[Cell<MmuUpdate>]) -> (i32, u32);

    /// `mmuext_op` with one operation.
    fn mmuext_op(&self, operation: MmuExtOp) -> i32;

    /// `multicall`. Each entry has its result.
    fn multicall(&self, calls: &[Cell<MulticallEntry>]) -> i32;

    /// The arguments of an `mmuext_op` in a multicall, whose operation lies in a place that stays.
    fn mmuext_arguments(&self, operation: &Cell<MmuExtOp>) -> [u32; 6];

    /// `set_trap_table`; none: no vector has a handler any more.
    fn set_trap_table(&self, traps: Option<&[Cell<TrapInfo>]>) -> i32;

    /// `set_gdt`, with one page.
    fn set_gdt(&self, frame: u32, entries: u32) -> i32;

    /// The time-stamp counter.
    fn time_stamp(&self) -> u64;

    /// The selector of the kernel's stack.
    fn stack_selector(&self) -> u32;

    /// CR0, CR3 and CR4 as Xen shows them.
    fn control(&self) -> (u32, u32, u32);

    /// Writes to Xen's console.
    fn say(&self, text: &[Cell<u8>]);

    /// The domain is over.
    fn shut_down(&self, reason: u32) -> !;

    /// `update_va_mapping`.
    fn update_va_mapping(&self, address: u32, entry: u64, flags: u32) -> i32 {
        let arguments = [address, entry as u32, (entry >> 32) as u32, flags];
        self.hypercall(hypercall::UPDATE_VA_MAPPING, arguments)
    }
}
