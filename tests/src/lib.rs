//! What the image and guest tests share: the built files, and ways to break them.
//!
//! The tests themselves are in `tests/`: `image.rs` looks at bytes, `guest.rs` runs machines,
//! `mutants.rs` and `mutants_13.rs` break one call after the other and demand that the guest names it.

use anyhow::{Context, Result, ensure};
use iced_x86::Register;
use iced_x86::code_asm::CodeAssembler;
use object::{Object, ObjectSymbol};
use std::mem::offset_of;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use vmi_abi::header::{LENGTH_UNIT, checksum};
use vmi_abi::{CallNumber, RelocationInfo, RelocationType};
use vmi_hv_backend::reference::interface::{GRANT_OFFSET, Grant};
use vmi_native_backend::binding::SiteRule;
use xtask::conformance::Conformance;
use xtask::image;

/// Registers that a call keeps, if its contract says nothing else.
pub const KEPT: [Register; 6] =
    [Register::EBX, Register::ESI, Register::EDI, Register::EBP, Register::DS, Register::ES];

/// An image as somebody leaves it who grants it memory at this distance.
///
/// # Panics
///
/// It is shorter than an image is.
#[must_use]
pub fn placed(image: &[u8], distance: u32) -> Vec<u8> {
    let mut bytes = image.to_vec();
    let at = GRANT_OFFSET + offset_of!(Grant, distance);
    bytes[at..at + 4].copy_from_slice(&distance.to_le_bytes());
    let last = bytes.len() - 1;
    bytes[last] = bytes[last].wrapping_sub(checksum(&bytes));
    bytes
}

/// An image that can be taken apart: its bytes, and where its relocation table is.
pub struct Specimen {
    /// The finished image.
    pub bytes: Vec<u8>,
    /// Bytes of it that are in use.
    used: usize,
    /// Offset of the relocation table's first row.
    rows: usize,
    /// Offset of the byte that POST sets, in an image that rewrites call sites.
    site_rule: Option<usize>,
}

impl Specimen {
    /// Reads an image and the linked file that it was made from.
    ///
    /// # Errors
    ///
    /// A file is missing or is not what it should be.
    pub fn read(rom: &Path, elf: &Path) -> Result<Self> {
        let bytes = std::fs::read(rom).with_context(|| rom.display().to_string())?;
        let linked = std::fs::read(elf).with_context(|| elf.display().to_string())?;
        let linked = object::File::parse(&*linked)?;
        let place = |name: &str| -> Option<usize> {
            let symbol = linked.symbols().find(|symbol| symbol.name() == Ok(name))?;
            usize::try_from(symbol.address()).ok()
        };
        let symbol = |name: &str| {
            place(name).with_context(|| format!("no symbol {name} in {}", elf.display()))
        };
        let (used, rows) = (symbol("rom_end")?, symbol("rows")?);
        Ok(Self { bytes, used, rows, site_rule: place("site_rule") })
    }

    /// Offset of a call's row.
    fn row(&self, call: CallNumber) -> usize {
        self.rows + call.0 as usize * size_of::<RelocationInfo>()
    }

    /// Offset of a call's code.
    ///
    /// # Errors
    ///
    /// The call has none.
    pub fn code(&self, call: CallNumber) -> Result<usize> {
        let row = self.row(call);
        let distance = i32::from_le_bytes(self.bytes[row..row + 4].try_into()?);
        ensure!(distance != 0, "call {} has no code", call.0);
        row.checked_add_signed(distance as isize).context("a distance that leads out of the image")
    }

    /// Bytes between a call's code and its plain form, as the table has it.
    #[must_use]
    pub fn plain_distance(&self, call: CallNumber) -> u8 {
        self.bytes[self.row(call) + 5]
    }

    /// The image as POST leaves it when it has found this rule for call sites.
    ///
    /// # Errors
    ///
    /// The image rewrites no sites.
    pub fn with_rule(&self, rule: SiteRule) -> Result<Vec<u8>> {
        let place = self.site_rule.context("no symbol site_rule")?;
        let mut bytes = self.bytes.clone();
        let (old, new) = (bytes[place], rule as u8);
        bytes[place] = new;
        bytes[place + 1] = bytes[place + 1].wrapping_add(old).wrapping_sub(new);
        Ok(bytes)
    }

    /// The image with other instructions instead of some that it has exactly once.
    ///
    /// # Errors
    ///
    /// It does not have them once, or the new ones are of another length.
    pub fn with_instructions(&self, old: &[u8], new: &[u8]) -> Result<Vec<u8>> {
        let mut places = (0..self.used).filter(|place| self.bytes[*place..].starts_with(old));
        let place = places.next().context("the image does not have these instructions")?;
        ensure!(places.next().is_none() && old.len() == new.len(), "these instructions do not fit");
        let mut bytes = self.bytes.clone();
        bytes[place..place + new.len()].copy_from_slice(new);
        Ok(image::finish(&bytes, bytes.len())?)
    }

    /// The image with another type in a call's answer.
    ///
    /// # Errors
    ///
    /// The image cannot be finished.
    pub fn with_type(&self, call: CallNumber, kind: RelocationType) -> Result<Vec<u8>> {
        let mut bytes = self.bytes.clone();
        bytes[self.row(call) + 4] = kind.0;
        Ok(image::finish(&bytes, bytes.len())?)
    }

    /// The image with NOP for an answer to each of these calls.
    ///
    /// # Errors
    ///
    /// The image cannot be finished.
    pub fn with_nop(&self, calls: impl IntoIterator<Item = CallNumber>) -> Result<Vec<u8>> {
        let mut bytes = self.bytes.clone();
        for call in calls {
            bytes[self.row(call) + 4] = RelocationType::NOP.0;
        }
        Ok(image::finish(&bytes, bytes.len())?)
    }

    /// The image with other code for a call, behind all that is there. `write` is told where the
    /// original code is, and may jump to it.
    ///
    /// # Errors
    ///
    /// The code cannot be assembled, or the image cannot be finished.
    pub fn with_code(
        &self,
        call: CallNumber,
        write: impl FnOnce(&mut CodeAssembler, u64) -> Result<(), iced_x86::IcedError>,
    ) -> Result<Vec<u8>> {
        let start = self.used.next_multiple_of(16);
        let mut assembler = CodeAssembler::new(32)?;
        write(&mut assembler, self.code(call)? as u64)?;
        let code = assembler.assemble(start as u64)?;
        let mut bytes = self.bytes[..self.used].to_vec();
        bytes.resize(start, 0xcc);
        bytes.extend(code);
        let row = self.row(call);
        let distance = i32::try_from(start)? - i32::try_from(row)?;
        bytes[row..row + 4].copy_from_slice(&distance.to_le_bytes());
        let size = (bytes.len() + 1).next_multiple_of(LENGTH_UNIT);
        Ok(image::finish(&bytes, size)?)
    }
}

/// Tries all mutants, on all of the host's processors.
///
/// # Errors
///
/// Some were missed; which, and why.
pub fn all_are_caught<T: Sync>(
    mutants: &[T],
    name: impl Fn(&T) -> String + Sync,
    is_caught: impl Fn(&T) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let work = || -> Vec<String> {
        let mut missed = Vec::new();
        while let Some(mutant) = mutants.get(next.fetch_add(1, Ordering::Relaxed)) {
            match is_caught(mutant) {
                Ok(()) => println!("caught: {}", name(mutant)),
                Err(error) => missed.push(format!("{}: {error:#}", name(mutant))),
            }
        }
        missed
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let missed = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let join = |worker: thread::ScopedJoinHandle<'_, Vec<String>>| {
            worker.join().unwrap_or_else(|_| vec!["a worker panicked".to_owned()])
        };
        workers.into_iter().flat_map(join).collect::<Vec<_>>()
    });
    let (found, all) = (missed.len(), mutants.len());
    ensure!(missed.is_empty(), "{found} of {all} mutants missed:\n{}", missed.join("\n"));
    println!("{all} mutants caught");
    Ok(())
}

/// Whether the guest failed a ROM with one broken call, named the call, said these words, and blamed no other.
///
/// # Errors
///
/// It did not; what it said instead.
pub fn names_the_fault(result: &Conformance, name: &str, words: &str) -> Result<()> {
    let complaint = result.complaint().context("the guest passes it")?;

    // A call that takes the guest down with it is named by the last line before its end.
    let last = result.run.serial.lines().rev().find(|line| line.starts_with("# begin"));
    let mut said: Vec<String> = result
        .report
        .failures()
        .map(|check| format!("{} {:?}", check.description, check.details))
        .collect();
    if result.report.plan.is_none() {
        said.extend(last.map(str::to_owned));
    }
    let names_call = |text: &String| {
        [format!(" {name} "), format!("={name}")]
            .iter()
            .any(|form| format!("{text} ").contains(form))
    };
    ensure!(said.iter().any(names_call), "the call is not named: {complaint}: {said:#?}");
    ensure!(said.iter().any(|text| text.contains(words)), "`{words}` is not said: {said:#?}");
    // Nobody else is blamed, but for get_reloc itself where it answered what does not exist.
    let others: Vec<&String> = said
        .iter()
        .filter(|text| !names_call(text) && !text.contains("vmi_init and get_reloc"))
        .collect();
    ensure!(others.is_empty(), "other calls are blamed: {others:#?}");
    Ok(())
}
