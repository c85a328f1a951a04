//! What a guest asks for with VMMCALL, checked and done.

use crate::memory::Memory;
use crate::shadow::Shadow;
use crate::walk::Registers;
use vmi_hv_backend::reference::interface::{Counters, Status};

/// What a hypercall is carried out on.
#[derive(Debug)]
pub struct Machine<'a, 'pool, M, H> {
    /// The shadow page tables. None with nested paging: the caller then flushes the TLB after each [`Machine::call`].
    pub shadow: Option<&'a mut Shadow<'pool>>,
    /// The guest's registers. CR3 may change.
    pub registers: &'a mut Registers,
    /// The guest's memory.
    pub memory: &'a M,
    /// Whether a guest-physical frame number is the hypervisor's.
    pub is_hidden: H,
    /// The most updates of one hypercall.
    pub limit: u32,
    /// What is read, and where updates and refusals are counted.
    pub counters: &'a mut Counters,
}

/// A hypercall's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The number.
    pub eax: u32,
    /// The first argument.
    pub ebx: u32,
    /// The second argument.
    pub ecx: u32,
    /// The ring that it was made in.
    pub cpl: u8,
}

/// What has to be done about a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest goes on behind VMMCALL, with these in EAX and EDX.
    Return(Status, u32),
    /// The guest ends with a text, `bytes` of readable guest-physical memory.
    Stop {
        /// Guest-physical address.
        address: u32,
        /// Bytes.
        bytes: u32,
    },
}

impl<M: Memory, H: Fn(u64) -> bool> Machine<'_, '_, M, H> {
    /// Carries out a hypercall.
    #[must_use]
    pub fn call(&mut self, call: Call) -> Outcome {
        let _ = call;
        Outcome::Return(Status::UnknownHypercall, 0)
    }
}
