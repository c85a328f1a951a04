//! From Xen's events to the vectors of the guest.
//!
//! Xen has one entry for all events, and bits that say which are pending. Of them the timer's is the ROM's. All others belong to the guest,
//! which speaks to Xen beside VMI: such an event is masked, and stays pending until the guest looks for it.

use super::Xen;
use super::interface::{PORTS, SharedInfo};
use super::machine::Machine;
use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

/// Where an interrupt goes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Delivery {
    /// The handler; 0: there is nothing to deliver.
    pub address: u32,
    /// Its selector, for the kernel's ring.
    pub selector: u32,
}

impl Xen {
    /// What to deliver now. Interrupts are off. What is pending beyond that stays so, and comes when they are on again.
    #[inline(never)]
    pub fn next_event(&self, machine: &impl Machine) -> Delivery {
        self.shared.pending.store(0, Relaxed);
        let words = self.shared.selector.swap(0, Relaxed);
        for word in 0..PORTS / 32 {
            if words >> word & 1 != 0 {
                self.take_events(machine, word);
            }
        }
        while let Some((vector, is_last)) = self.due().map(|(vector, more)| (vector, !more)) {
            if !is_last {
                self.shared.pending.store(1, Relaxed);
            }
            // Without a handler it is lost, as on a machine whose vector leads nowhere: there the guest would be, too.
            if let Some(delivery) = self.delivery(machine, vector) {
                self.woken.set(self.woken.get().wrapping_add(1));
                return delivery;
            }
        }
        Delivery::default()
    }

    /// Where an exception goes to that Xen leaves to the ROM.
    pub fn delivery(&self, machine: &impl Machine, vector: u32) -> Option<Delivery> {
        let (selector, address) = self.handler(machine, vector)?;
        Some(Delivery { address, selector: u32::from(selector) & !3 | 1 })
    }

    /// Takes the events of one word.
    #[inline(never)]
    fn take_events(&self, machine: &impl Machine, word: u32) {
        let there = |offset| self.frames.shared_info.get().wrapping_add(offset as u32 + 4 * word);
        let pending = there(offset_of!(SharedInfo, evtchn_pending));
        let mask = there(offset_of!(SharedInfo, evtchn_mask));
        let mut events = machine.load(pending) & !machine.load(mask);
        let port = self.alarms.port.get();
        let timer = if port / 32 == word { 1 << (port % 32) } else { 0 };
        if events & timer != 0 {
            machine.clear_bits(pending, timer);
            self.expire(machine);
        }
        events &= !timer;
        if events != 0 {
            self.woken.set(self.woken.get().wrapping_add(1));
            machine.set_bits(mask, events);
        }
    }
}
