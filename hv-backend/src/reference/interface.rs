//! What the reference hypervisor and its guests agree on, version 1.0: `docs/reference-hypervisor.md` in numbers.
//!
//! The hypervisor in `tests/hypervisor`, the ROM's side in [`crate::reference`], the test guest and `xtask` all take it from
//! here.

use bitflags::bitflags;
use core::mem::size_of;
use core::ops::Range;
use static_assertions::const_assert_eq;

/// What leaf [`BASE`] answers in EBX, ECX and EDX.
pub const SIGNATURE: [u8; 12] = *b"OpenVMIRefHv";

/// The first CPUID leaf of the interface. EAX: the last one, [`LEAF_GRANT`] or more.
pub const BASE: u32 = 0x4000_0000;

/// EAX: [`VERSION`]. EBX: [`Features`]. ECX: the most updates that a batch may have. EDX: 0.
pub const LEAF_INTERFACE: u32 = BASE + 1;

/// EAX: the physical address of the memory granted to the ROM, a multiple of 4096. EBX: its bytes; 0 where there is none.
/// ECX, EDX: 0.
pub const LEAF_GRANT: u32 = BASE + 2;

/// The version: a new major number breaks old guests, a new minor one does not.
pub const VERSION: u32 = 1 << 16;

/// Whether a guest that was written for [`VERSION`] understands this one.
#[must_use]
pub const fn is_understood(version: u32) -> bool {
    version >> 16 == VERSION >> 16 && version >= VERSION
}

bitflags! {
    /// What the hypervisor wants, and what it can do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u32 {
        /// Page tables are shadowed: being told of their changes saves it from watching them. Clear with nested paging, where
        /// the guest's own code for page tables is the fastest.
        const PAGE_TABLES = 1 << 0;
        /// Updates may wait, and come in batches. Clear: one at a time, at once.
        const BATCH = 1 << 1;
        /// The guest has one processor, and a page fault that the shadow alone has is resolved from the guest's own tables. So what
        /// is in them already may be told as late as a processor with a TLB may see it, and frames may become tables and stop being
        /// some as late. Without [`Features::BATCH`] it means nothing.
        const LATE = 1 << 2;
        /// With [`Features::LATE`]: page faults that are the guest's own may reach it without an exit, once it asks for that by
        /// [`Hypercall::BeQuiet`].
        const QUIET = 1 << 3;
    }
}

/// A flag of UpdatePxE and UpdatePxELong: the address is a guest-physical one. It is none of the guest's flags.
pub const PHYSICAL: u32 = 1 << 6;

/// The most updates that a batch may have, in version 1.0 without exception where [`Features::BATCH`] is set.
pub const BATCH_LIMIT: u32 = 128;

/// Words of the map that [`Hypercall::BeQuiet`] names.
pub const MAP_WORDS: usize = 32;

/// Words behind it: the directories that the processor walks. One with entries of 32 bits, with PAE up to one for each gibibyte, in their
/// order. A physical address with bit 0 set; 0: none.
pub const DIRECTORIES: usize = 4;

/// Bytes of both.
pub const SHOWN_BYTES: u32 = 4 * (MAP_WORDS + DIRECTORIES) as u32;

/// A hypercall's number, in EAX at VMMCALL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hypercall {
    /// Applies updates in their order. EBX: physical address of an array of [`crate::Update`], a multiple of 4. ECX: how many.
    /// Out: EDX: how many are applied, which is also the index of the one that was refused.
    Apply = 1,
    /// Reads the [`Counters`]. EBX: physical address of the buffer, a multiple of 8. ECX: its bytes; what does not fit is left out.
    /// Out: EDX: bytes written.
    ReadCounters = 2,
    /// Ends the guest with a message. EBX: physical address of the text, ECX: its bytes. Does not return but on an error.
    Stop = 3,
    /// From here on the guest's own page faults may be quiet, and changes of the tables that CR3 leads to are told. EBX: physical address of
    /// the map and the words behind it, a multiple of 4; ECX: their bytes, [`SHOWN_BYTES`], within one page; 0: none of it holds any longer.
    BeQuiet = 4,
    /// A page fault came again whose cause the guest has seen to. EBX: its linear address, of which what is known is read again. Page
    /// faults are not quiet until the next [`Hypercall::Apply`].
    Reconsider = 5,
}

impl Hypercall {
    /// The hypercall of a number.
    #[must_use]
    pub const fn of(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Apply),
            2 => Some(Self::ReadCounters),
            3 => Some(Self::Stop),
            4 => Some(Self::BeQuiet),
            5 => Some(Self::Reconsider),
            _ => None,
        }
    }
}

macro_rules! statuses {
    ($( $(#[$doc:meta])* $name:ident = $value:literal: $text:literal )*) => {
        /// What a hypercall says in EAX.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(i32)]
        pub enum Status {
            $( $(#[$doc])* $name = $value, )*
        }

        impl Status {
            /// Each of them.
            pub const ALL: &[Self] = &[$( Self::$name ),*];

            /// In words.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $( Self::$name => $text ),* }
            }
        }
    };
}

statuses! {
    /// Done.
    Done = 0: "done"
    /// No such hypercall.
    UnknownHypercall = -1: "no such hypercall"
    /// VMMCALL outside ring 0.
    NotPrivileged = -2: "not in ring 0"
    /// The array, buffer or text is not aligned, or not all of it is the guest's memory.
    BadBuffer = -3: "the buffer is not the guest's memory, or not aligned"
    /// More updates than a batch may have, or more text.
    TooLong = -4: "too long"
    /// The update's call is none that can be applied.
    BadCall = -5: "no such update"
    /// What the update changes is not mapped, not aligned, or not the guest's memory.
    BadAddress = -6: "not an address of the guest's memory"
    /// The new value has reserved bits set, or leads to memory that is not the guest's.
    BadValue = -7: "not a value that the guest may set"
    /// Not now; the same may succeed when it is tried again.
    Busy = -8: "busy"
}

/// Where the hypervisor in `tests/hypervisor` has its own memory. A guest is not owed it: the hostile one looks there.
pub const OWN_MEMORY: Range<u32> = 0x1000_0000..0x1800_0000;

/// The memory that a ROM wants, a structure in its image directly behind the header: at [`GRANT_OFFSET`].
///
/// Whoever places the image fills in `distance` and mends the checksum. An image without the structure wants none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Grant {
    /// [`GRANT_SIGNATURE`].
    pub signature: u32,
    /// The bytes that the ROM wants: zeroed, writable by the guest's kernel, of each virtual processor its own.
    pub wanted: u32,
    /// From the image's first byte to the memory's, in guest-physical addresses; 0 until somebody grants it.
    pub distance: u32,
}

/// The bytes `VmiG`.
pub const GRANT_SIGNATURE: u32 = u32::from_le_bytes(*b"VmiG");

/// Where a [`Grant`] lies in an image of revision 3.0.
pub const GRANT_OFFSET: usize = size_of::<vmi_abi::header::RomHeader>();

const_assert_eq!(GRANT_OFFSET % 4, 0);

macro_rules! counters {
    (
        exits { $( $(#[$exit_doc:meta])* $exit:ident: $exit_text:literal )* }
        others { $( $(#[$other_doc:meta])* $other:ident: $other_text:literal )* }
    ) => {
        /// What the hypervisor counts, since it started the guest.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[repr(C)]
        pub struct Counters {
            $( $(#[$exit_doc])* pub $exit: u64, )*
            $( $(#[$other_doc])* pub $other: u64, )*
        }

        impl Counters {
            /// What each exit is counted as, once: the first counters, in their order.
            pub const EXITS: &[&str] = &[$( $exit_text ),*];

            /// The counters behind those, in their order.
            pub const OTHERS: &[&str] = &[$( $other_text ),*];

            /// None counted.
            pub const ZERO: Self = Self { $( $exit: 0, )* $( $other: 0, )* };

            /// All, in the order of the structure.
            #[must_use]
            pub const fn values(&self) -> [u64; size_of::<Self>() / size_of::<u64>()] {
                [$( self.$exit, )* $( self.$other, )*]
            }

            /// The structure of such values.
            #[must_use]
            pub const fn from_values(values: [u64; size_of::<Self>() / size_of::<u64>()]) -> Self {
                let [$( $exit, )* $( $other, )*] = values;
                Self { $( $exit, )* $( $other, )* }
            }

            /// All exits.
            #[must_use]
            pub const fn exits(&self) -> u64 {
                0 $( + self.$exit )*
            }
        }
    };
}

counters! {
    exits {
        /// Page faults that are the guest's own, and were handed to it. Nobody sees those that are quiet.
        guest_page_faults: "guest page fault"
        /// Page faults that only the shadow had: an entry was filled in.
        shadow_fills: "shadow fill"
        /// Writes to a page table that was protected against them: emulated.
        table_writes: "page-table write"
        /// With nested paging: no translation of a guest-physical address.
        nested_page_faults: "nested page fault"
        /// INVLPG.
        invalidations: "INVLPG"
        /// MOV to CR3.
        cr3_writes: "CR3 write"
        /// MOV to CR0 or CR4, LMSW.
        control_writes: "CR0 or CR4 write"
        /// MOV from a control register.
        control_reads: "control-register read"
        /// CPUID.
        cpuid: "CPUID"
        /// RDMSR and WRMSR.
        msr: "RDMSR or WRMSR"
        /// IN, OUT and their string forms.
        ports: "port I/O"
        /// VMMCALL.
        hypercalls: "hypercall"
        /// Exceptions but page faults.
        exceptions: "exception"
        /// Everything else.
        other_exits: "other"
    }
    others {
        /// Updates that hypercalls applied.
        updates: "updates carried"
        /// Updates that were refused.
        refusals: "updates refused"
        /// Reads of a control register that a processor would not have reported. QEMU 10 does, once those of CR3 are asked for.
        needless_reads: "reads that QEMU reports needlessly"
        /// Guest page tables, or parts of one, that got a shadow.
        shadowed: "tables shadowed"
        /// Time-stamp counter ticks from an exit to the next entry, summed.
        host_ticks: "ticks in the hypervisor"
        /// Ticks since the guest started.
        ticks: "ticks in all"
    }
}

const_assert_eq!(
    Counters::EXITS.len() + Counters::OTHERS.len(),
    size_of::<Counters>() / size_of::<u64>()
);
