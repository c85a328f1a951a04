//! The VMI entry: a second start for a kernel, with paging on and in whatever ring the platform gives it.
//!
//! Where a hypervisor starts kernels itself, in a ring that is not 0, the first instructions of a bare machine's boot
//! loader protocol cannot be executed. A kernel that has this entry needs none of them. `docs/vmi-entry.md` has the state
//! that it is entered in.

/// The name of the note in the kernel's ELF file.
pub const NOTE_NAME: &str = "VMI";

/// The note's type. Its text is one word, the linear address of the entry.
pub const NOTE_ENTRY: u32 = 1;

/// What is in EAX at the entry: "VMI1", the last letter in the lowest byte.
pub const MAGIC: u32 = u32::from_be_bytes(*b"VMI1");
