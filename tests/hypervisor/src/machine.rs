//! The machine's memory: what is the guest's, what lies at the ROM's place, and the frames that the hypervisor keeps.

#![expect(unsafe_code, reason = "UNSAFETY: physical memory by its address")]

use crate::boot;
use crate::multiboot::{Loader, Module, Range, USABLE};
use crate::report::{Ending, give_up};
use core::mem::{align_of, size_of};
use vmi_hv_backend::reference::interface::OWN_MEMORY;
use vmi_hv_backend::reference::record::RECORD;
use vmi_hypervisor::memory::{FRAME, Memory, Place};

/// The hypervisor's own memory.
pub(crate) const OWN: core::ops::Range<u64> = OWN_MEMORY.start as u64..OWN_MEMORY.end as u64;

/// The end of the hypervisor's memory that can be taken: behind it lies the record of exits.
const END_OF_FREE: u64 = RECORD.start as u64;

/// The end of what is mapped, and of what the guest can have.
pub(crate) const END: u64 = 1 << 32;

/// The most ranges of memory.
const RANGES: usize = 32;

/// Frames of the hypervisor's that the guest sees at another address.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Window {
    /// Guest-physical address of the first.
    pub(crate) guest: u64,
    /// Where it really is.
    pub(crate) machine: u64,
    pub(crate) length: u64,
}

impl Window {
    fn find(&self, address: u64) -> Option<u64> {
        let offset = address.wrapping_sub(self.guest);
        (offset < self.length).then(|| self.machine + offset)
    }
}

/// The machine's memory as the guest has it.
pub(crate) struct Machine {
    usable: [Range; RANGES],
    count: usize,
    next: u64,
    /// Where the guest sees its ROM, and behind it what that was granted.
    pub(crate) rom: Window,
    /// The bytes that the image says it has.
    pub(crate) rom_length: u64,
    /// During POST.
    pub(crate) rom_is_writable: bool,
    pub(crate) grant: Window,
    /// A page of ones.
    pub(crate) ones: u64,
}

impl Machine {
    /// Of a machine that was started by this loader.
    pub(crate) fn new(loader: &Loader) -> Self {
        let mut usable = [Range::default(); RANGES];
        let mut count = 0;
        for range in loader.memory_map().filter(|range| range.kind == USABLE) {
            if count == RANGES {
                give_up(
                    Ending::UnfitMachine,
                    format_args!("the memory map has more than {RANGES} usable ranges"),
                );
            }
            usable[count] = range;
            count += 1;
        }
        let own = |range: &Range| range.start <= OWN.start && OWN.end <= range.end();
        if !usable[..count].iter().any(own) {
            give_up(
                Ending::UnfitMachine,
                format_args!("the machine has too little memory: more than 384 MiB are needed"),
            );
        }
        let used = loader.end_within(OWN.start, OWN.end).max(boot::end_of_image());
        if used > END_OF_FREE {
            give_up(
                Ending::BadArguments,
                format_args!("the modules do not leave the hypervisor enough of its own memory"),
            );
        }
        let mut machine = Self {
            usable,
            count,
            next: used.next_multiple_of(FRAME),
            rom: Window::default(),
            rom_length: 0,
            rom_is_writable: false,
            grant: Window::default(),
            ones: 0,
        };
        let ones = machine.take::<u8>(FRAME as usize);
        ones.fill(0xff);
        machine.ones = ones.as_ptr() as u64;
        machine
    }

    /// Takes zeroed memory out of the hypervisor's own, in whole frames; ends if there is too little. `T` is integers, or made of
    /// them: all zeros are a value.
    pub(crate) fn take<T>(&mut self, count: usize) -> &'static mut [T] {
        const { assert!(align_of::<T>() <= FRAME as usize) };
        let start = self.next;
        let bytes = (count * size_of::<T>()) as u64;
        let end = (start + bytes).next_multiple_of(FRAME);
        if end > END_OF_FREE {
            give_up(Ending::UnfitMachine, format_args!("the hypervisor's own memory is used up"));
        }
        self.next = end;
        // SAFETY: mapped memory that nobody has had before, aligned for `T`, and zeros are a `T`.
        unsafe {
            core::ptr::write_bytes(start as *mut u8, 0, (end - start) as usize);
            core::slice::from_raw_parts_mut(start as *mut T, count)
        }
    }

    /// The module where the guest cannot overwrite it.
    pub(crate) fn keep(&mut self, module: Module) -> Module {
        let bytes = self.copy(module.bytes);
        let line = self.copy(module.line.as_bytes());
        // What was copied is what it was.
        Module { bytes, line: core::str::from_utf8(line).unwrap_or_default() }
    }

    fn copy(&mut self, bytes: &'static [u8]) -> &'static [u8] {
        let range = bytes.as_ptr_range();
        if OWN.start <= range.start as u64 && range.end as u64 <= OWN.end {
            return bytes;
        }
        let copy = self.take::<u8>(bytes.len());
        copy.copy_from_slice(bytes);
        copy
    }

    /// The hypervisor's memory that is left.
    pub(crate) fn left(&self) -> u64 {
        END_OF_FREE - self.next
    }

    /// The end of the highest memory below 4 GiB.
    pub(crate) fn top(&self) -> u64 {
        self.usable().map(|range| range.end()).filter(|end| *end <= END).max().unwrap_or_default()
    }

    /// The machine's memory, the hypervisor's among it.
    pub(crate) fn usable(&self) -> impl Iterator<Item = &Range> {
        self.usable[..self.count].iter()
    }

    /// Whether all of this is the guest's memory.
    pub(crate) fn is_memory(&self, start: u64, length: u64) -> bool {
        let Some(end) = start.checked_add(length) else { return false };
        (end <= OWN.start || OWN.end <= start)
            && end <= END
            && self.usable().any(|range| range.start <= start && end <= range.end())
    }

    /// Copies bytes into the guest's memory, which must have been asked for: [`Machine::is_memory`].
    pub(crate) fn store(&self, address: u64, bytes: &[u8]) {
        assert!(
            self.is_memory(address, bytes.len() as u64),
            "a store outside of the guest's memory"
        );
        // SAFETY: mapped, not the hypervisor's, and the guest does not run.
        unsafe { core::ptr::copy(bytes.as_ptr(), address as *mut u8, bytes.len()) };
    }

    /// Clears the guest's memory.
    pub(crate) fn clear(&self, address: u64, length: u64) {
        assert!(self.is_memory(address, length), "a store outside of the guest's memory");
        // SAFETY: as above.
        unsafe { core::ptr::write_bytes(address as *mut u8, 0, length as usize) };
    }

    /// A byte of any physical memory below 4 GiB, as the firmware left it.
    pub(crate) fn byte(address: u32) -> u8 {
        // SAFETY: mapped; reading a device's memory may have effects, but is no error.
        unsafe { (address as usize as *const u8).read_volatile() }
    }
}

impl Memory for Machine {
    fn place(&self, frame: u64) -> Place {
        let Some(address) = frame.checked_mul(FRAME) else { return Place::Nothing };
        if let Some(address) = self.rom.find(address) {
            if self.rom_is_writable { Place::Memory(address) } else { Place::ReadOnly(address) }
        } else if let Some(address) = self.grant.find(address) {
            Place::Memory(address)
        } else if OWN.contains(&address) || address >= END {
            Place::Nothing
        } else if self.is_memory(address, FRAME) {
            Place::Memory(address)
        } else {
            Place::Device(address)
        }
    }

    fn read(&self, address: u64, size: usize) -> Option<u64> {
        let base = match self.place(address / FRAME) {
            Place::Memory(base) | Place::ReadOnly(base) => base,
            Place::Device(_) | Place::Nothing => return None,
        };
        // SAFETY: mapped memory within one frame, which no reference covers.
        unsafe { load(base + address % FRAME, size) }
    }

    fn write(&self, address: u64, size: usize, value: u64) -> bool {
        let Place::Memory(base) = self.place(address / FRAME) else { return false };
        // SAFETY: as above, and the guest's to write.
        unsafe { store(base + address % FRAME, size, value) }
    }
}

/// Reads 1, 2, 4 or 8 bytes of any alignment. None for another size.
///
/// # Safety
///
/// The machine's memory is mapped there, or a device's.
pub(crate) unsafe fn load(address: u64, size: usize) -> Option<u64> {
    let pointer = address as *const u8;
    // SAFETY: the caller's.
    unsafe {
        match size {
            1 => Some(pointer.read_volatile().into()),
            2 => Some(pointer.cast::<u16>().read_unaligned().into()),
            4 => Some(pointer.cast::<u32>().read_unaligned().into()),
            8 => Some(pointer.cast::<u64>().read_unaligned()),
            _ => None,
        }
    }
}

/// Stores 1, 2, 4 or 8 bytes of any alignment. False, and nothing is stored, for another size.
///
/// # Safety
///
/// As for [`load`], and what is stored there is the guest's business.
pub(crate) unsafe fn store(address: u64, size: usize, value: u64) -> bool {
    let pointer = address as *mut u8;
    // SAFETY: the caller's.
    unsafe {
        match size {
            1 => pointer.write_volatile(value as u8),
            2 => pointer.cast::<u16>().write_unaligned(value as u16),
            4 => pointer.cast::<u32>().write_unaligned(value as u32),
            8 => pointer.cast::<u64>().write_unaligned(value),
            _ => return false,
        }
    }
    true
}
