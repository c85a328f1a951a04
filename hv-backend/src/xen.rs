//! The backend for Xen, as a 32-bit guest with paravirtualization.

pub mod interface;

use crate::CallNumber;
use crate::update::contains;

/// Bytes of memory for all that is remembered; the last page of them is the loader's [`interface::Placement`].
pub const MEMORY: u32 = 4 * interface::PAGE_SIZE;

/// The transport to Xen.
#[derive(Debug)]
pub struct Xen;

impl Xen {
    /// The calls that are served.
    pub const SERVED: &[CallNumber] = &[];

    /// Whether a call is one of [`Self::SERVED`].
    #[must_use]
    pub const fn is_served(call: CallNumber) -> bool {
        contains(Self::SERVED, call)
    }
}
