//! Memory: the heap behind the image, and all the rest as the arena that the dirtier writes to.
//!
//! The page tables map everything one to one, so an address is also what a device is told.

use alloc::vec::Vec;
use core::alloc::{GlobalAlloc, Layout as Shape};
use core::cell::UnsafeCell;
use core::ptr::NonNull;

use guest::abi::{BootInfo, COMMAND_LINE, COMMAND_LINE_MAX, HIGH_MEMORY};
use guest::dirtier::{Arena, PAGE_BYTES, Page};
use rlsf::Tlsf;

const MIB: usize = 1 << 20;
const HEAP_MIN: usize = 52 * MIB;
const HEAP_MAX: usize = 128 * MIB;
const HEAP_LEAST: usize = 24 * MIB;

/// What became of the memory.
pub(crate) struct Layout {
    pub(crate) heap_bytes: usize,
    pub(crate) arena: Arena,
}

/// Sets up the heap and takes the rest as the arena. To be called once, before anything is allocated.
pub(crate) fn take(boot: &BootInfo) -> Layout {
    let start = image_end().next_multiple_of(PAGE_BYTES);
    let end = address(boot.low_memory_end);
    let available = end.saturating_sub(start);
    if available < HEAP_LEAST {
        panic!("the machine has too little memory: give it 64 MiB");
    }
    // What follows it begins with a page too.
    let heap_bytes = (available / 4).clamp(HEAP_MIN, HEAP_MAX).min(available) / PAGE_BYTES * PAGE_BYTES;
    HEAP.add(start, heap_bytes);
    let mut pieces = Vec::new();
    let high_end = address(boot.high_memory_end);
    for (from, to) in [(start + heap_bytes, end), (address(HIGH_MEMORY), high_end)] {
        let pages = to.saturating_sub(from) / PAGE_BYTES;
        if pages > 0 {
            let first = core::ptr::with_exposed_provenance_mut::<Page>(from);
            // SAFETY: the machine says that this is memory; it is mapped, page-aligned, and nobody else's: it lies
            // outside the image, the stack, the heap and the areas the machine wrote. Any bytes are valid words.
            pieces.push(unsafe { core::slice::from_raw_parts_mut(first, pages) });
        }
    }
    Layout {
        heap_bytes,
        arena: Arena::new(pieces),
    }
}

/// The machine's command line.
pub(crate) fn command_line(boot: &BootInfo) -> &'static str {
    let bytes = address(boot.command_line_bytes);
    if bytes > COMMAND_LINE_MAX {
        panic!("the command line is longer than {COMMAND_LINE_MAX} bytes");
    }
    let first = core::ptr::with_exposed_provenance::<u8>(address(COMMAND_LINE));
    // SAFETY: the machine wrote so many bytes there before it started the guest, and leaves them alone.
    let line = unsafe { core::slice::from_raw_parts(first, bytes) };
    match core::str::from_utf8(line) {
        Ok(line) => line,
        Err(_) => panic!("the command line is not UTF-8"),
    }
}

pub(crate) fn address(value: u64) -> usize {
    // Both are 64 bits wide here.
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn image_end() -> usize {
    unsafe extern "C" {
        static __image_end: u8;
    }
    (&raw const __image_end).expose_provenance()
}

/// The heap: constant time whatever its size and state. Its largest block has 512 MiB.
struct Heap(UnsafeCell<Tlsf<'static, u32, u32, 24, 16>>);

// SAFETY: the guest has one thread and no interrupts.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new(Tlsf::new()));

impl Heap {
    fn add(&self, start: usize, bytes: usize) {
        let block = core::ptr::with_exposed_provenance_mut::<u8>(start);
        let Some(first) = NonNull::new(block) else { return };
        // SAFETY: one thread, and no other borrow is alive: no method calls back.
        let heap = unsafe { &mut *self.0.get() };
        // SAFETY: `take` gives memory that is nobody else's, for ever.
        unsafe { heap.insert_free_block_ptr(NonNull::slice_from_raw_parts(first, bytes)) };
    }
}

// SAFETY: `Tlsf` keeps the contract; alignments are passed on.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, shape: Shape) -> *mut u8 {
        // SAFETY: one thread, and no other borrow is alive: no method calls back.
        let heap = unsafe { &mut *self.0.get() };
        heap.allocate(shape).map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, block: *mut u8, shape: Shape) {
        let Some(block) = NonNull::new(block) else { return };
        // SAFETY: as in `alloc`.
        let heap = unsafe { &mut *self.0.get() };
        // SAFETY: the caller got this block from `alloc` with the same alignment.
        unsafe { heap.deallocate(block, shape.align()) };
    }

    unsafe fn realloc(&self, block: *mut u8, shape: Shape, bytes: usize) -> *mut u8 {
        let (Some(block), Ok(shape)) = (NonNull::new(block), Shape::from_size_align(bytes, shape.align())) else {
            return core::ptr::null_mut();
        };
        // SAFETY: as in `alloc`.
        let heap = unsafe { &mut *self.0.get() };
        // SAFETY: the caller got this block from `alloc` with the same alignment.
        let moved = unsafe { heap.reallocate(block, shape) };
        moved.map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }
}
