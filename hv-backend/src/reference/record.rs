//! What the reference hypervisor leaves for whoever runs it: how it ended, and a record of its guest's exits.
//!
//! The hypervisor in `tests/hypervisor` and `xtask` take it from here. No guest is owed any of it.

use super::interface::{BATCH_LIMIT, Counters, OWN_MEMORY};
use core::mem::{offset_of, size_of};
use core::ops::Range;
use static_assertions::const_assert;

macro_rules! endings {
    ($( $(#[$doc:meta])* $name:ident = $value:literal $word:literal )*) => {
        /// What the hypervisor writes to the exit device when it ends the guest.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Ending {
            $( $(#[$doc])* $name = $value, )*
        }

        impl Ending {
            /// Each of them.
            pub const ALL: &[Self] = &[$( Self::$name ),*];

            /// Its name for programs.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $( Self::$name => $word ),* }
            }
        }
    };
}

endings! {
    /// The processor has no SVM or no long mode, QEMU does not intercept what it should, or memory is short.
    UnfitMachine = 0x20 "unfit-machine"
    /// The command line or a module cannot be used.
    BadArguments = 0x21 "bad-arguments"
    /// The guest's processor shut down: a triple fault.
    TripleFault = 0x22 "triple-fault"
    /// The guest asked to be stopped, by the hypercall Stop.
    Stopped = 0x23 "stopped"
    /// The guest did what the hypervisor cannot do for it.
    Unsupported = 0x24 "unsupported"
    /// The hypervisor is wrong: an exception or a panic of its own, or a refused VMRUN.
    OwnFault = 0x25 "own-fault"
    /// Whoever runs the hypervisor wants an end: [`Head::stop`].
    TimeLimit = 0x26 "time-limit"
}

impl Ending {
    /// QEMU's exit status: its exit device makes it from what is written.
    #[must_use]
    pub const fn status(self) -> u8 {
        self as u8 * 2 + 1
    }
}

/// What the hypervisor says when the guest switches the machine off.
pub const POWER_OFF: &str = "the guest powers off";

/// What it says when the guest resets the machine.
pub const RESET: &str = "the guest resets the machine";

/// How the line begins that says that a guest starts.
pub const START: &str = "the guest starts at ";

/// How the line begins that says that the guest writes to the exit device.
pub const OWN_END: &str = "the guest ends itself with ";

/// Where the record lies: the end of the hypervisor's own memory.
pub const RECORD: Range<u32> = OWN_MEMORY.end - (32 << 20)..OWN_MEMORY.end;

/// The first bytes of [`RECORD`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Head {
    /// [`SIGNATURE`].
    pub signature: u64,
    /// Exits so far. Exit `n` lies in place `n` modulo [`PLACES`]: the last ones are there.
    pub count: u64,
    /// Time-stamp counter when the guest started.
    pub started: u64,
    /// Whoever runs the hypervisor writes 1 here, and then sends an NMI: the guest is to end.
    pub stop: u64,
}

impl Head {
    /// Of its bytes in memory.
    #[must_use]
    pub const fn of_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        Self {
            signature: long(bytes, offset_of!(Self, signature)),
            count: long(bytes, offset_of!(Self, count)),
            started: long(bytes, offset_of!(Self, started)),
            stop: long(bytes, offset_of!(Self, stop)),
        }
    }
}

const fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

const fn long(bytes: &[u8], at: usize) -> u64 {
    word(bytes, at) as u64 | (word(bytes, at + 4) as u64) << 32
}

/// The bytes `VmiExits`.
pub const SIGNATURE: u64 = u64::from_le_bytes(*b"VmiExits");

/// The physical address of [`Head::stop`].
pub const STOP: u32 = RECORD.start + offset_of!(Head, stop) as u32;

/// An exit of the guest's, and what became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Exit {
    /// Time-stamp counter.
    pub exited: u64,
    /// Ticks until the guest went on, or [`NEVER`].
    pub spent: u32,
    /// Where the guest was.
    pub eip: u32,
    /// The guest's CR3.
    pub cr3: u32,
    /// The address of a page fault or of INVLPG, the new value of a control register, the number of a port, a model-specific
    /// register or a hypercall, the leaf of CPUID. Of anything else: SVM's code of the exit.
    pub detail: u32,
    /// The error code of a page fault, the status of a hypercall.
    pub result: u32,
    /// What it was counted as: an index into [`Counters::values`], or [`UNCOUNTED`].
    pub cause: u8,
    /// Updates that a hypercall applied.
    pub updates: u8,
    /// What was delivered to the guest: a vector in bits 0 to 7, its type as SVM has it in bits 8 to 10, bit 15; or 0.
    pub event: u16,
}

/// In [`Exit::spent`]: the guest did not go on.
pub const NEVER: u32 = u32::MAX;

/// In [`Exit::cause`]: it was counted as nothing.
pub const UNCOUNTED: u8 = u8::MAX;

/// In [`Exit::event`]: something was delivered.
pub const DELIVERED: u16 = 1 << 15;

/// How many exits the record holds.
pub const PLACES: u64 = (RECORD.end - RECORD.start) as u64 / size_of::<Exit>() as u64 - Exit::FIRST;

const_assert!(size_of::<Head>().is_multiple_of(size_of::<Exit>()));
const_assert!(BATCH_LIMIT <= u8::MAX as u32);

impl Exit {
    /// Places that the head takes.
    const FIRST: u64 = (size_of::<Head>() / size_of::<Self>()) as u64;

    /// The offset of exit `number` in [`RECORD`].
    #[must_use]
    pub const fn offset(number: u64) -> u64 {
        (Self::FIRST + number % PLACES) * size_of::<Self>() as u64
    }

    /// What it was counted as, in words.
    #[must_use]
    pub fn name(&self) -> &'static str {
        let index = usize::from(self.cause);
        let names = Counters::EXITS.iter().chain(Counters::OTHERS);
        names.copied().nth(index).unwrap_or("not counted")
    }

    /// Whether it is counted as an exit.
    #[must_use]
    pub const fn is_counted(&self) -> bool {
        (self.cause as usize) < Counters::EXITS.len()
    }

    /// The vector that was delivered.
    #[must_use]
    pub const fn vector(&self) -> Option<u8> {
        if self.event & DELIVERED != 0 { Some(self.event as u8) } else { None }
    }

    /// Of its bytes in memory.
    #[must_use]
    pub const fn of_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        Self {
            exited: long(bytes, offset_of!(Self, exited)),
            spent: word(bytes, offset_of!(Self, spent)),
            eip: word(bytes, offset_of!(Self, eip)),
            cr3: word(bytes, offset_of!(Self, cr3)),
            detail: word(bytes, offset_of!(Self, detail)),
            result: word(bytes, offset_of!(Self, result)),
            cause: bytes[offset_of!(Self, cause)],
            updates: bytes[offset_of!(Self, updates)],
            event: bytes[offset_of!(Self, event)] as u16
                | (bytes[offset_of!(Self, event) + 1] as u16) << 8,
        }
    }
}

impl Counters {
    /// What one exit was counted as, from the counters before it to these: an index into [`Counters::values`].
    #[must_use]
    pub fn cause_since(&self, before: &Self) -> Option<u8> {
        let changed = |(now, before): (u64, u64)| now != before;
        let exits = self.values().into_iter().zip(before.values()).take(Self::EXITS.len());
        let cause = exits.map(changed).position(|changed| changed);
        let needless = self.needless_reads != before.needless_reads;
        let index = cause
            .or_else(|| needless.then_some(offset_of!(Self, needless_reads) / size_of::<u64>()));
        index.map(|index| index as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_is_the_cause_of_its_exit() {
        let before = Counters { updates: 3, cpuid: 9, host_ticks: 1, ..Counters::ZERO };
        let now = Counters { host_ticks: 7, updates: 9, ..before };
        assert_eq!(now.cause_since(&before), None);
        for index in 0..Counters::EXITS.len() {
            let mut values = now.values();
            values[index] += 1;
            let exit = Exit {
                cause: Counters::from_values(values).cause_since(&before).expect("a cause"),
                ..Exit::default()
            };
            assert_eq!((exit.name(), exit.is_counted()), (Counters::EXITS[index], true));
        }
        let needless = Counters { needless_reads: 1, ..now };
        let cause = needless.cause_since(&before).expect("a cause");
        let exit = Exit { cause, ..Exit::default() };
        assert!(exit.name().contains("needlessly") && !exit.is_counted(), "{}", exit.name());
        assert_eq!(Exit { cause: UNCOUNTED, ..exit }.name(), "not counted");
    }

    #[test]
    fn an_exit_is_its_bytes() {
        let bytes = core::array::from_fn(|index| index as u8 + 1);
        let exit = Exit::of_bytes(&bytes);
        assert_eq!((exit.exited, exit.spent), (0x0807_0605_0403_0201, 0x0c0b_0a09));
        assert_eq!((exit.eip, exit.cr3), (0x100f_0e0d, 0x1413_1211));
        assert_eq!((exit.detail, exit.result), (0x1817_1615, 0x1c1b_1a19));
        assert_eq!((exit.cause, exit.updates, exit.event), (0x1d, 0x1e, 0x201f));
    }

    #[test]
    fn places_follow_the_head_and_begin_again() {
        let size = size_of::<Exit>() as u64;
        assert_eq!(Exit::offset(0), size_of::<Head>() as u64);
        assert_eq!(Exit::offset(PLACES - 1) + size, u64::from(RECORD.end - RECORD.start));
        assert_eq!(Exit::offset(PLACES), Exit::offset(0));
    }

    #[test]
    fn statuses_are_their_own_and_none_is_a_pass() {
        for (index, ending) in Ending::ALL.iter().enumerate() {
            assert!(ending.status() > 33, "{ending:?}");
            assert!(Ending::ALL[..index].iter().all(|other| other.name() != ending.name()));
        }
        assert_eq!(Ending::TripleFault.status(), 69);
    }
}
