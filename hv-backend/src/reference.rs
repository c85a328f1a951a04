//! The backend for the reference hypervisor, which `tests/hypervisor` is.

pub mod interface;
