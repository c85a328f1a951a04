//! A machine for tests: some memory, and a processor that walks the shadow tables.

use super::{ADDRESS, ENTRIES, Frame, Page, Role, Shadow, Slot, Storage, TRACKED};
use crate::memory::{FRAME, Memory, Place};
use crate::walk::{
    ACCESSED, Access, CR0_PAGING, CR0_WRITE_PROTECT, CR4_PAE, CR4_PAGE_SIZE, DIRTY,
    EFER_NO_EXECUTE, ERROR_EXECUTE, ERROR_PRESENT, ERROR_USER, ERROR_WRITE, GLOBAL, NO_EXECUTE,
    PRESENT, Registers, USER, WRITABLE,
};
use std::boxed::Box;
use std::cell::RefCell;
use std::mem::take;
use std::vec;
use std::vec::Vec;

/// Frames of memory, from 0 on; a ROM, a device, and the hypervisor's frames behind them. Nothing else.
pub(crate) const MEMORY: u64 = 20;
pub(crate) const ROM: u64 = MEMORY;
pub(crate) const DEVICE: u64 = ROM + 4;
pub(crate) const HIDDEN: u64 = DEVICE + 4;
pub(crate) const NOTHING: u64 = HIDDEN + 4;

/// The machine's frame numbers of the ROM, the device, the page of ones, and the pool.
const ROM_COPY: u64 = 0x700;
const DEVICE_FRAMES: u64 = 0x800;
const ONES: u64 = 0x900;
const POOL: u64 = 0xa00;

/// No address of the guest's is the machine's.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ram {
    bytes: RefCell<Vec<u8>>,
}

impl Ram {
    pub(crate) fn new() -> Self {
        Self { bytes: RefCell::new(vec![0; (DEVICE * FRAME) as usize]) }
    }

    pub(crate) fn frame(&self, frame: u64) -> Vec<u8> {
        let start = (frame * FRAME) as usize;
        self.bytes.borrow()[start..start + FRAME as usize].to_vec()
    }

    /// Stores to the ROM too.
    pub(crate) fn put(&self, address: u64, size: usize, value: u64) {
        let address = address as usize;
        self.bytes.borrow_mut()[address..address + size]
            .copy_from_slice(&value.to_le_bytes()[..size]);
    }
}

impl Memory for Ram {
    fn place(&self, frame: u64) -> Place {
        match frame {
            ..ROM => Place::Memory((MEMORY - 1 - frame) * FRAME),
            ROM..DEVICE => Place::ReadOnly((ROM_COPY + frame - ROM) * FRAME),
            DEVICE..HIDDEN => Place::Device((DEVICE_FRAMES + frame - DEVICE) * FRAME),
            HIDDEN.. => Place::Nothing,
        }
    }

    fn read(&self, address: u64, size: usize) -> Option<u64> {
        assert!(address % FRAME + size as u64 <= FRAME, "within one frame");
        let mut value = [0; 8];
        let start = usize::try_from(address).ok()?;
        value[..size].copy_from_slice(self.bytes.borrow().get(start..start + size)?);
        Some(u64::from_le_bytes(value))
    }

    fn write(&self, address: u64, size: usize, value: u64) -> bool {
        assert!(address % FRAME + size as u64 <= FRAME, "within one frame");
        let is_memory = address / FRAME < MEMORY;
        if is_memory {
            self.put(address, size, value);
        }
        is_memory
    }
}

pub(crate) fn is_hidden(frame: u64) -> bool {
    (HIDDEN..NOTHING).contains(&frame)
}

/// Pool, slots and frames of a shadow.
type Lent = (&'static mut [Page], &'static mut [Slot], &'static mut [Frame]);

std::thread_local! {
    /// What shadows gave back. Memory that lives for ever is never freed, but can be lent again.
    static IDLE: RefCell<Vec<Lent>> = const { RefCell::new(Vec::new()) };
}

/// A shadow with so many tables. [`give_back`] takes what it works with.
pub(crate) fn shadow(tables: usize) -> Shadow<'static> {
    let idle = IDLE.with_borrow_mut(|idle| {
        let index = idle.iter().position(|(pool, ..)| pool.len() == tables)?;
        Some(idle.swap_remove(index))
    });
    let (pool, slots, frames) = idle.unwrap_or_else(|| {
        (
            Box::leak(vec![Page([0; ENTRIES]); tables].into_boxed_slice()),
            Box::leak(vec![Slot::EMPTY; tables].into_boxed_slice()),
            Box::leak(vec![Frame::EMPTY; MEMORY as usize].into_boxed_slice()),
        )
    });
    pool.fill(Page([0xdead_beef; ENTRIES]));
    slots.fill(Slot::EMPTY);
    Shadow::new(Storage { pool, base: POOL * FRAME, slots, frames, ones: ONES * FRAME })
}

/// Takes what a shadow works with, for the next one.
pub(crate) fn give_back(shadow: &mut Shadow<'static>) {
    let lent = (take(&mut shadow.pool), take(&mut shadow.slots), take(&mut shadow.frames));
    IDLE.with_borrow_mut(|idle| idle.push(lent));
}

/// Two-level tables or PAE, with everything on.
pub(crate) fn registers(pae: bool, root: u64) -> Registers {
    Registers {
        cr0: CR0_PAGING | CR0_WRITE_PROTECT,
        cr3: (root * FRAME) as u32,
        cr4: CR4_PAGE_SIZE | if pae { CR4_PAE } else { 0 },
        efer: EFER_NO_EXECUTE,
        width: 40,
    }
}

pub(crate) const fn error_of(access: Access) -> u32 {
    (if access.write { ERROR_WRITE } else { 0 })
        | (if access.user { ERROR_USER } else { 0 })
        | (if access.execute { ERROR_EXECUTE } else { 0 })
}

/// What the machine's processor makes of a linear address: the machine's address and the entry's global bit, or the error code
/// of its page fault.
pub(crate) fn walk(shadow: &Shadow<'_>, linear: u32, access: Access) -> Result<(u64, bool), u32> {
    let mut table = 0;
    let mut allowed = WRITABLE | USER;
    let mut no_execute = 0;
    let mut entry = 0;
    for (level, shift) in [(0, 30), (1, 21), (2, 12)] {
        entry = shadow.pool[table].0[linear as usize >> shift & if level == 0 { 3 } else { 511 }];
        if entry & PRESENT == 0 {
            return Err(error_of(access));
        }
        if level == 0 {
            assert_eq!(entry & !ADDRESS & !ACCESSED, PRESENT, "bits of a PDPTE");
        } else {
            assert_eq!(entry & !ADDRESS & !NO_EXECUTE & !0xfff, 0, "reserved bits");
            assert!(entry & ACCESSED != 0, "the processor stores nothing here");
            allowed &= entry;
            no_execute |= entry & NO_EXECUTE;
        }
        if level != 2 {
            let page = (entry & ADDRESS) / FRAME;
            assert!((POOL..POOL + shadow.pool.len() as u64).contains(&page), "a table of the pool");
            table = (page - POOL) as usize;
        }
    }
    if access.write && allowed & WRITABLE == 0
        || access.user && allowed & USER == 0
        || access.execute && no_execute != 0
    {
        return Err(ERROR_PRESENT | error_of(access));
    }
    assert!(entry & DIRTY != 0, "the processor stores nothing here");
    Ok((entry & ADDRESS | (u64::from(linear) % FRAME), entry & GLOBAL != 0))
}

/// Checks what must be true of the shadow at any time: no frame is mapped that [`Memory::place`] did not give, none can be stored to that
/// must not be, and the counts are right.
pub(crate) fn audit(shadow: &Shadow<'_>) {
    let tables = shadow.pool.len();
    let (mut writers, mut parents) = (vec![0; MEMORY as usize], vec![0; tables]);
    for (slot, page) in shadow.pool.iter().enumerate() {
        let role = shadow.slots[slot].key.role;
        if role == Role::Other && slot != 0 {
            continue;
        }
        for &entry in page.0.iter().filter(|&entry| entry & PRESENT != 0) {
            let frame = (entry & ADDRESS) / FRAME;
            if !matches!(role, Role::Table | Role::Direct) {
                let child = (frame - POOL) as usize;
                assert_ne_role(shadow, child);
                parents[child] += 1;
                continue;
            }
            match frame {
                ..MEMORY => {
                    assert_eq!(entry & TRACKED != 0, entry & WRITABLE != 0, "stores are counted");
                    if entry & WRITABLE != 0 {
                        writers[frame as usize] += 1;
                        let guest = MEMORY - 1 - frame;
                        assert!(!shadow.is_watched(guest), "a watched frame {guest} is writable");
                    }
                }
                ROM_COPY..0x704 | ONES => assert_eq!(entry & (WRITABLE | TRACKED), 0, "read only"),
                DEVICE_FRAMES..0x804 => assert_eq!(entry & TRACKED, 0, "a device"),
                _ => std::panic!("{entry:#x} maps what is not the guest's"),
            }
        }
    }
    let counted: Vec<u32> = shadow.frames.iter().map(|frame| frame.writers).collect();
    assert_eq!(counted, writers, "writers");
    let counted: Vec<u32> = shadow.slots.iter().map(|slot| slot.parents).collect();
    assert_eq!(counted, parents, "parents");
    let mut listed = 0;
    for frame in 0..MEMORY {
        listed += shadow.list(frame).count();
        assert_eq!(shadow.tables(frame).count(), shadow.frames[frame as usize].tables as usize);
    }
    assert_eq!(listed + shadow.free_count + 1, tables, "slots in use and free");
}

fn assert_ne_role(shadow: &Shadow<'_>, child: usize) {
    assert!(shadow.slots[child].key.role != Role::Other, "an entry leads to a table that is gone");
}
