//! The symbols that precompiled `core` and `alloc` expect from a C library.
//!
//! The crate is compiled with `no_builtins`, so that none of these loops becomes a call to itself.

use core::arch::asm;

/// From this many bytes on the string instructions are faster than a loop of words.
const LARGE: usize = 128;

/// Copies `count` bytes between areas that don't overlap.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(target: *mut u8, source: *const u8, count: usize) -> *mut u8 {
    if count >= LARGE {
        // SAFETY: the caller vouches for both areas; the direction flag is clear by the calling convention.
        unsafe {
            asm!("rep movsb", inout("rcx") count => _, inout("rdi") target => _, inout("rsi") source => _,
                options(nostack, preserves_flags));
        }
        return target;
    }
    let mut at = 0;
    while at + 8 <= count {
        // SAFETY: `at + 8` is within both areas.
        let word = unsafe { source.wrapping_add(at).cast::<u64>().read_unaligned() };
        // SAFETY: as above.
        unsafe { target.wrapping_add(at).cast::<u64>().write_unaligned(word) };
        at += 8;
    }
    while at < count {
        // SAFETY: `at` is within both areas.
        let byte = unsafe { source.wrapping_add(at).read() };
        // SAFETY: as above.
        unsafe { target.wrapping_add(at).write(byte) };
        at += 1;
    }
    target
}

/// Copies `count` bytes between areas that may overlap.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(target: *mut u8, source: *const u8, count: usize) -> *mut u8 {
    if target.addr().wrapping_sub(source.addr()) >= count {
        // Ascending is right when the target begins before the source, or after its end.
        // SAFETY: the caller vouches for both areas; the words are copied in ascending order.
        return unsafe { copy_ascending(target, source, count) };
    }
    let mut left = count;
    while left >= 8 {
        left -= 8;
        // SAFETY: `left + 8` is within both areas.
        let word = unsafe { source.wrapping_add(left).cast::<u64>().read_unaligned() };
        // SAFETY: as above.
        unsafe { target.wrapping_add(left).cast::<u64>().write_unaligned(word) };
    }
    while left > 0 {
        left -= 1;
        // SAFETY: `left` is within both areas.
        let byte = unsafe { source.wrapping_add(left).read() };
        // SAFETY: as above.
        unsafe { target.wrapping_add(left).write(byte) };
    }
    target
}

unsafe fn copy_ascending(target: *mut u8, source: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both areas; byte by byte ascending, in effect, whatever the overlap.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") target => _, inout("rsi") source => _,
            options(nostack, preserves_flags));
    }
    target
}

/// Fills `count` bytes with the low byte of `value`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(target: *mut u8, value: i32, count: usize) -> *mut u8 {
    let byte = value.to_le_bytes()[0];
    // SAFETY: the caller vouches for the area; the direction flag is clear by the calling convention.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") target => _, in("al") byte,
            options(nostack, preserves_flags));
    }
    target
}

/// Compares `count` bytes.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    let mut at = 0;
    while at + 8 <= count {
        // SAFETY: `at + 8` is within both areas.
        let a = unsafe { one.wrapping_add(at).cast::<u64>().read_unaligned() };
        // SAFETY: as above.
        let b = unsafe { other.wrapping_add(at).cast::<u64>().read_unaligned() };
        if a != b {
            return if a.swap_bytes() < b.swap_bytes() { -1 } else { 1 };
        }
        at += 8;
    }
    while at < count {
        // SAFETY: `at` is within both areas.
        let a = unsafe { *one.wrapping_add(at) };
        // SAFETY: as above.
        let b = unsafe { *other.wrapping_add(at) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
        at += 1;
    }
    0
}

/// Compares `count` bytes for equality.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    // SAFETY: the contract is the same.
    unsafe { memcmp(one, other, count) }
}

/// Counts the bytes before the first zero.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut count = 0;
    // SAFETY: the caller vouches for a zero at the end.
    while unsafe { *text.wrapping_add(count) } != 0 {
        count += 1;
    }
    count
}

/// Never called: panics abort.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Never called: panics abort.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    super::end_in_panic("unwinding was attempted")
}
