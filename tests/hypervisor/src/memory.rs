//! The guest's physical memory, as the hypervisor sees it.

/// Bytes of a frame.
pub const FRAME: u64 = 4096;

/// What lies in a frame of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The guest's memory, at this physical address of the machine.
    Memory(u64),
    /// Memory that the guest may only read: a ROM.
    ReadOnly(u64),
    /// A device's registers or memory, passed through.
    Device(u64),
    /// Nothing, or the hypervisor's own memory: reads as ones, and stores go nowhere.
    Nothing,
}

/// The guest's physical memory.
pub trait Memory {
    /// What lies in the frame with this number.
    fn place(&self, frame: u64) -> Place;

    /// Reads a little-endian number of 1, 2, 4 or 8 bytes that lies within one frame. None where it is neither [`Place::Memory`]
    /// nor [`Place::ReadOnly`].
    fn read(&self, address: u64, size: usize) -> Option<u64>;

    /// Stores one, at once as the processor would. False, and nothing is stored, where it is not [`Place::Memory`].
    fn write(&self, address: u64, size: usize, value: u64) -> bool;
}
