//! What no guest should do: malformed hypercalls and malformed page tables, below the reference hypervisor.
//!
//! Each attempt must come to what the interface says, and none may show, change or stop anything that is the
//! hypervisor's. The numbers are random with a fixed seed, and edge cases made by hand. In the end the guest
//! does an ordinary kernel's work, and says how much it tried:
//!
//! ```text
//! # hostile what="malformed hypercalls" count=1500
//! ```
//!
//! - `hypercalls`: numbers, pointers, lengths and updates,
//! - `tables`: page tables that are linked into the running address space, and touched.

mod hypercalls;
mod tables;

use crate::console::line;
use crate::hypervisor::Hypervisor;
use crate::paging::{PAGE, Space};
use crate::report::{Problems, Report};
use crate::rom::Rom;
use crate::workload;
use core::ops::Range;
use vmi_hv_backend::reference::interface::OWN_MEMORY;

/// The hypervisor's own memory, hidden from the guest.
const HIDDEN: Range<u32> = OWN_MEMORY;

/// Where the machine has neither memory nor devices.
const NOTHING: Range<u32> = 0x2800_0000..0xb000_0000;

/// The screen: a device that does not mind being read.
const DEVICE: Range<u32> = 0xa_0000..0xc_0000;

/// A generator of numbers: the same in each run.
struct Random(u32);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }

    /// A number in a range that is not empty.
    fn within(&mut self, range: Range<u32>) -> u32 {
        range.start + self.next() % (range.end - range.start)
    }

    /// The address of a frame in a range.
    fn frame(&mut self, range: Range<u32>) -> u32 {
        self.within(range) & !(PAGE - 1)
    }
}

/// Attempts so far.
#[derive(Default)]
pub(crate) struct Attempts {
    hypercalls: u32,
    from_ring_3: u32,
    updates: u32,
    tables: u32,
}

impl Attempts {
    /// Writes how many there were.
    pub(crate) fn say(&self) {
        for (what, count) in [
            ("malformed hypercalls", self.hypercalls),
            ("hypercalls from ring 3", self.from_ring_3),
            ("malformed updates", self.updates),
            ("malformed page tables", self.tables),
        ]
        .into_iter()
        .filter(|(_, count)| *count != 0)
        {
            line!("# hostile what=\"{what}\" count={count}");
        }
    }
}

/// Tries everything in the space of a mode, which is the current one.
pub(crate) fn run(report: &mut Report, attempts: &mut Attempts, space: Space, rom: Rom) {
    let mode = space.mode.name();
    let Some(hypervisor) = Hypervisor::find() else {
        line!("# not tried: there is no reference hypervisor");
        return;
    };
    let parts: [(&str, Part); 4] = [
        ("malformed hypercalls", hypercalls::malformed),
        ("hypercalls from ring 3", hypercalls::from_ring_3),
        ("malformed updates", hypercalls::updates),
        ("malformed page tables", tables::malformed),
    ];
    for (name, part) in parts {
        let mut trial = Trial {
            hypervisor,
            space,
            attempts,
            problems: Problems::default(),
            random: Random(0x2545_f491),
        };
        part(&mut trial);
        let problems = trial.problems;
        report.point(format_args!("{mode}: {name}"), &problems);
    }
    // Whatever was done, this is as it was.
    workload::run(report, space, rom);
}

/// A kind of attempts.
type Part = fn(&mut Trial<'_>);

/// A part under way.
struct Trial<'a> {
    hypervisor: Hypervisor,
    space: Space,
    attempts: &'a mut Attempts,
    problems: Problems,
    random: Random,
}
