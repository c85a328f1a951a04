//! The test guest on Xen.

pub mod source;
