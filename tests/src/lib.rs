//! What the image and guest tests share: the built files, and ways to break them.
//!
//! The tests themselves are in `tests/`: `image.rs` looks at bytes, `guest.rs` runs machines,
//! `mutants.rs` breaks one call after the other and demands that the guest names it.

use anyhow::{Context, Result, ensure};
use iced_x86::code_asm::CodeAssembler;
use object::{Object, ObjectSymbol};
use std::path::Path;
use vmi_abi::header::LENGTH_UNIT;
use vmi_abi::{CallNumber, RelocationInfo, RelocationType};
use xtask::image;

/// An image that can be taken apart: its bytes, and where its relocation table is.
pub struct Specimen {
    /// The finished image.
    pub bytes: Vec<u8>,
    /// Bytes of it that are in use.
    used: usize,
    /// Offset of the relocation table's first row.
    rows: usize,
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
        let symbol = |name: &str| -> Result<usize> {
            let mut found = linked.symbols().filter(|symbol| symbol.name() == Ok(name));
            let symbol =
                found.next().with_context(|| format!("no symbol {name} in {}", elf.display()))?;
            Ok(usize::try_from(symbol.address())?)
        };
        Ok(Self { bytes, used: symbol("rom_end")?, rows: symbol("rows")? })
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
