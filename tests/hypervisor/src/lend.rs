//! Stores to watched page tables that are not carried out here: by instructions that are not known, or by the processor when it
//! delivers an interrupt. The table is lent to the guest, as if it had promised to tell of changes, up to the next exit that is no
//! page fault. What the guest may rely on before is what it may of a TLB: INVLPG and MOV to CR3 are exits, and an entry
//! that was not present is found by the page fault.

use crate::guest::Guest;
use vmi_hypervisor::memory::FRAME;

/// The most tables that are lent at once: one instruction stores to two pages, three if it delivers something as well.
const TABLES: usize = 4;

/// The frames that are lent.
#[derive(Default)]
pub(crate) struct Lent {
    frames: [u64; TABLES],
    count: usize,
}

impl Guest {
    /// Lets the guest store to a watched page table.
    pub(crate) fn lend(&mut self, frame: u64) {
        if self.lent.count == TABLES {
            self.take_back();
        }
        if let Some(shadow) = &mut self.shadow {
            shadow.announce(frame);
            self.lent.frames[self.lent.count] = frame;
            self.lent.count += 1;
        }
    }

    /// Watches the tables again, and forgets what was made from them.
    pub(crate) fn take_back(&mut self) {
        let lent = core::mem::take(&mut self.lent);
        if let Some(shadow) = &mut self.shadow {
            for frame in &lent.frames[..lent.count] {
                shadow.release(*frame);
                shadow.written(&self.own, &self.machine, frame * FRAME, FRAME as usize);
            }
        }
    }
}
