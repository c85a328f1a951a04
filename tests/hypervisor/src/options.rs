//! The hypervisor's command line: `mode=trap|vmi|vmi-batched`, `paging=shadow|nested`.

use crate::report::{Ending, give_up};
use core::fmt;
use vmi_hv_backend::reference::interface::Features;

/// How page tables are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Without the ROM's help.
    Trap,
    /// The ROM tells of each change.
    Vmi,
    /// The ROM tells of many at once.
    VmiBatched,
}

/// How the guest's linear addresses become the machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Paging {
    /// Through tables that the hypervisor makes from the guest's.
    Shadow,
    /// The processor walks the guest's tables, and then the hypervisor's.
    Nested,
}

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) mode: Mode,
    pub(crate) paging: Paging,
}

impl Options {
    /// Reads the line. A loader may put the program's name first. Ends on what it does not know.
    pub(crate) fn parse(line: &str) -> Self {
        let mut options = Self { mode: Mode::Trap, paging: Paging::Shadow };
        for (index, word) in line.split_ascii_whitespace().enumerate() {
            match word {
                "mode=trap" => options.mode = Mode::Trap,
                "mode=vmi" => options.mode = Mode::Vmi,
                "mode=vmi-batched" => options.mode = Mode::VmiBatched,
                "paging=shadow" => options.paging = Paging::Shadow,
                "paging=nested" => options.paging = Paging::Nested,
                _ if index == 0 && !word.starts_with("mode=") && !word.starts_with("paging=") => {}
                _ => give_up(
                    Ending::BadArguments,
                    format_args!(
                        "`{word}` on the command line is neither mode=trap|vmi|vmi-batched nor paging=shadow|nested"
                    ),
                ),
            }
        }
        options
    }

    /// What the guest is told.
    pub(crate) fn features(self) -> Features {
        let paging = match self.paging {
            Paging::Shadow => Features::PAGE_TABLES,
            Paging::Nested => Features::empty(),
        };
        match self.mode {
            Mode::Trap => Features::empty(),
            Mode::Vmi => paging,
            Mode::VmiBatched => paging | Features::BATCH | Features::LATE | Features::QUIET,
        }
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = match self.mode {
            Mode::Trap => "trap",
            Mode::Vmi => "vmi",
            Mode::VmiBatched => "vmi-batched",
        };
        let paging = match self.paging {
            Paging::Shadow => "shadow",
            Paging::Nested => "nested",
        };
        write!(f, "mode={mode} paging={paging}")
    }
}
