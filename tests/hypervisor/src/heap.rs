//! Memory for the instruction decoder, which makes its tables once and keeps them.

#![expect(unsafe_code, reason = "UNSAFETY: an allocator")]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Its bytes: the decoder's tables take some 200 KiB.
const SIZE: usize = 4 << 20;

/// Hands out memory and takes none back.
struct Heap {
    memory: UnsafeCell<[u8; SIZE]>,
    used: AtomicUsize,
}

// SAFETY: each byte is handed out once.
unsafe impl Sync for Heap {}

// SAFETY: what is handed out is aligned, of the wanted size, and nobody else's; null where there is no more.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let start = self.memory.get().cast::<u8>();
        let address = start as usize + self.used.load(Ordering::Relaxed);
        let padding = address.next_multiple_of(layout.align()) - address;
        let offset = self.used.load(Ordering::Relaxed) + padding;
        match offset.checked_add(layout.size()) {
            Some(end) if end <= SIZE => {
                self.used.store(end, Ordering::Relaxed);
                start.wrapping_add(offset)
            }
            _ => core::ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, _pointer: *mut u8, _layout: Layout) {}
}

#[global_allocator]
static HEAP: Heap = Heap { memory: UnsafeCell::new([0; SIZE]), used: AtomicUsize::new(0) };
