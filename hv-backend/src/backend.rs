//! What a hypervisor's transport has to provide, and how one is chosen.

use crate::queue::Batch;
use crate::update::Update;
use crate::{Detection, Hypervisor};
use core::fmt;
use vmi_abi::CallNumber;

/// A transport to one hypervisor. `docs/write-a-backend.md` writes one.
///
/// What a transport does not provide is unsupported: the guest then keeps its own code, and the
/// hypervisor sees it by trapping. Only what would be wrong if it were left out has no default.
///
/// Every method takes `&self`: an interrupt may come at any time that interrupts are on, and make calls itself.
pub trait Backend: Sized {
    /// The transport to this hypervisor, ready for use, if it is the one that this transport speaks to.
    fn recognise(hypervisor: &Hypervisor) -> Option<Self>;

    /// Disables interrupts on this processor, and tells how they were.
    ///
    /// From here to [`Backend::set_interrupt_mask`] no code of the guest runs on this processor.
    fn disable_interrupts(&self) -> InterruptMask;

    /// Puts interrupts back as [`Backend::disable_interrupts`] found them; what is pending is delivered now.
    fn set_interrupt_mask(&self, mask: InterruptMask);

    /// Stops the guest, with a message: an update was refused for good, and the guest's view of its machine is wrong.
    ///
    /// It should not return. If it does, the queue takes and applies nothing any more.
    fn stop(&self, failure: &Failure);

    /// Whether it serves a call. What it does not serve is answered NONE.
    fn serves(&self, call: CallNumber) -> bool {
        let _ = call;
        false
    }

    /// Applies a batch in its order, and says how far it came. Called with interrupts off, which it leaves off.
    ///
    /// # Errors
    ///
    /// An update was refused; all before it are applied, it and all behind it are not.
    fn apply(&self, batch: Batch<'_>) -> Result<(), Refusal> {
        let _ = batch;
        Err(Refusal { applied: 0, reason: Reason::Unsupported, status: 0 })
    }

    /// Notes a failure that will be tried again: a line of a log.
    fn report(&self, failure: &Failure) {
        let _ = failure;
    }

    /// The transport to what [`crate::detect`] found, if there is one.
    fn choose(detection: &Detection) -> Option<Self> {
        match detection {
            Detection::Found(hypervisor) => Self::recognise(hypervisor),
            Detection::BareMetal | Detection::Unnamed => None,
        }
    }

    /// A place between two steps of the queue, where an interrupt may come if interrupts are on.
    #[cfg(test)]
    fn step(&self) {}
}

/// How interrupts were: bit 9 as in EFLAGS. The other bits are the transport's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptMask(pub u32);

/// How far a batch came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// How many of its updates are applied, from the front: also the index of the one that was refused.
    pub applied: usize,
    /// What to do about it.
    pub reason: Reason,
    /// The hypervisor's own word, for the log.
    pub status: i32,
}

/// Why an update was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It may succeed when it is tried again.
    Transient,
    /// It never will.
    Permanent,
    /// The transport has no such call.
    Unsupported,
}

/// An update that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The update.
    pub update: Update,
    /// Why.
    pub reason: Reason,
    /// The hypervisor's own word.
    pub status: i32,
    /// How many times it was refused, this time included.
    pub attempts: u32,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { update, reason, status, attempts } = self;
        let reason = match reason {
            Reason::Transient => "for now",
            Reason::Permanent => "for good",
            Reason::Unsupported => "as unsupported",
        };
        write!(f, "{update}: refused {reason}, status {status}, attempt {attempts}")
    }
}

/// Declares the transports that there are, as one closed enum that is a [`Backend`] itself.
///
/// The choice is made once, and each call is a `match`: the image has no place for tables of functions,
/// which would be absolute addresses.
#[macro_export]
macro_rules! backends {
    (
        $(#[$meta:meta])*
        $visibility:vis enum $name:ident {
            $( $(#[$variant_meta:meta])* $variant:ident($backend:ty) ),+ $(,)?
        }
    ) => {
        $(#[$meta])*
        $visibility enum $name {
            $( $(#[$variant_meta])* $variant($backend) ),+
        }

        impl $crate::Backend for $name {
            fn recognise(hypervisor: &$crate::Hypervisor) -> Option<Self> {
                $(
                    if let Some(backend) = <$backend as $crate::Backend>::recognise(hypervisor) {
                        return Some(Self::$variant(backend));
                    }
                )+
                None
            }

            fn disable_interrupts(&self) -> $crate::InterruptMask {
                match self { $( Self::$variant(backend) => backend.disable_interrupts() ),+ }
            }

            fn set_interrupt_mask(&self, mask: $crate::InterruptMask) {
                match self { $( Self::$variant(backend) => backend.set_interrupt_mask(mask) ),+ }
            }

            fn stop(&self, failure: &$crate::Failure) {
                match self { $( Self::$variant(backend) => backend.stop(failure) ),+ }
            }

            fn serves(&self, call: $crate::CallNumber) -> bool {
                match self { $( Self::$variant(backend) => backend.serves(call) ),+ }
            }

            fn apply(&self, batch: $crate::Batch<'_>) -> Result<(), $crate::Refusal> {
                match self { $( Self::$variant(backend) => backend.apply(batch) ),+ }
            }

            fn report(&self, failure: &$crate::Failure) {
                match self { $( Self::$variant(backend) => backend.report(failure) ),+ }
            }
        }
    };
}
