//! An allocator that counts what the thread that asks has allocated, and holds.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
    static HELD: Cell<usize> = const { Cell::new(0) };
}

pub struct Counting;

/// What a piece takes of memory: the system's allocator has a length in front of each, 16 bytes are its grain and 32 the least.
fn taken(layout: Layout) -> usize {
    (layout.size() + size_of::<usize>())
        .next_multiple_of(16)
        .max(32)
}

// SAFETY: every call is handed to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        HELD.with(|held| held.set(held.get().wrapping_add(taken(layout))));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // Another thread's piece may end here.
        HELD.with(|held| held.set(held.get().wrapping_sub(taken(layout))));
        // SAFETY: the caller keeps the contract of `dealloc`, and `pointer` came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Bytes that this thread has allocated and nobody has let go of here.
pub fn held() -> usize {
    HELD.with(Cell::get)
}

/// Allocations of this thread so far.
pub fn count() -> usize {
    COUNT.with(Cell::get)
}
