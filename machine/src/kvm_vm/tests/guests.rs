//! Tiny guests in machine code, wrapped as programs.

use std::arch::global_asm;

use guest::abi::IMAGE_BASE;

use crate::memory::PAGE_BYTES;

global_asm!(
    ".pushsection .rodata.guests, \"a\"",
    // Global: the code that names them may be in another object file.
    ".globl guest_count, guest_count_end, guest_compute, guest_compute_end, guest_pages, guest_pages_end, guest_tick, guest_tick_end, guest_hostile, guest_hostile_end, guest_high, guest_high_end, guest_fault, guest_fault_end",
    // Counts for ever.
    "guest_count:",
    "mov ebx, 0x400000",
    "xor eax, eax",
    "2: inc rax",
    "mov [rbx], rax",
    "jmp 2b",
    "guest_count_end:",
    // 3 * 10^7 rounds over general registers, SSE, memory and the FS base; then power off.
    "guest_compute:",
    "mov ecx, 30000000",
    "mov eax, 0x3ff00000",
    "shl rax, 32",
    "movq xmm1, rax",
    "xorps xmm0, xmm0",
    "2: addsd xmm0, xmm1",
    "mulsd xmm1, xmm0",
    "sqrtsd xmm1, xmm1",
    "divsd xmm1, xmm0",
    "mov rax, fs:[0x10]",
    "add rax, rcx",
    "rol rax, 7",
    "mov fs:[0x10], rax",
    "dec rcx",
    "jnz 2b",
    "movsd fs:[0x18], xmm0",
    "mov eax, 0xd0100008",
    "mov dword ptr [rax], 1",
    "2: jmp 2b",
    "guest_compute_end:",
    // Writes every third page of 30, then waits at the doorbell; again and again.
    "guest_pages:",
    "xor r8d, r8d",
    "2: inc r8",
    "mov ebx, 0x400000",
    "mov ecx, 10",
    "3: mov [rbx + 8], r8",
    "add rbx, 0x3000",
    "dec ecx",
    "jnz 3b",
    "mov eax, 0xd0100000",
    "mov [rax], rcx",
    "jmp 2b",
    "guest_pages_end:",
    // Reads its clock, waits 2 ms, counts; again and again.
    "guest_tick:",
    "mov esi, 0x2000",
    "mov ebx, 0x400000",
    "mov edi, 0xd0100000",
    "2: rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "sub rax, [rsi + 8]",
    "mul qword ptr [rsi + 24]",
    "shrd rax, rdx, 32",
    "add rax, [rsi + 16]",
    "mov [rbx], rax",
    "inc qword ptr [rbx + 8]",
    "add rax, 2000000",
    "mov [rdi], rax",
    "jmp 2b",
    "guest_tick_end:",
    // Touches device registers in every wrong way; then power off.
    "guest_hostile:",
    "mov ebx, 0x400000",
    "mov esi, 0xd0000000",
    "movzx eax, byte ptr [rsi + 0x300000]",
    "mov [rbx], rax",
    "mov rax, [rsi + 0x4000]",
    "mov [rbx + 8], rax",
    "movups xmm0, [rsi + 0x200ff9]",
    "movups [rbx + 16], xmm0",
    "mov eax, 0xb0000000",
    "mov rax, [rax]",
    "mov [rbx + 32], rax",
    "xor eax, eax",
    "mov ecx, 0x6000",
    "4: mov [rsi + rcx], al",
    "mov [rsi + rcx], rax",
    "add rax, 0x1234567",
    "add ecx, 0x1f",
    "cmp ecx, 0x8000",
    "jb 4b",
    "mov ecx, 0",
    "5: mov ax, [rsi + rcx]",
    "mov [rsi + rcx], ax",
    "mov [rsi + rcx], rax",
    "mov [rsi + rcx + 1], eax",
    "movups xmm0, [rsi + rcx + 3]",
    "movups [rsi + rcx + 3], xmm0",
    "add ecx, 0x61",
    "cmp ecx, 0x4000",
    "jb 5b",
    "movups [rsi + 0x100ff8], xmm0",
    "movups [rsi + 0x100001], xmm0",
    "mov edi, 0xe0000000",
    "mov ecx, 300",
    "rep movsb",
    "mov qword ptr [rbx + 40], 1",
    "mov eax, 0xd0100008",
    "mov byte ptr [rax], 1",
    "mov dword ptr [rax], 77",
    "mov dword ptr [rax], 1",
    "2: jmp 2b",
    "guest_hostile_end:",
    // Writes above the device window; then power off.
    "guest_high:",
    "mov eax, 1",
    "shl rax, 32",
    "mov [rax + 0x5008], rax",
    "mov ebx, 0x400000",
    "mov rcx, [rax + 0x5008]",
    "mov [rbx], rcx",
    "mov eax, 0xd0100008",
    "mov dword ptr [rax], 1",
    "2: jmp 2b",
    "guest_high_end:",
    // Faults, without a handler.
    "guest_fault:",
    "ud2",
    "guest_fault_end:",
    ".popsection",
);

macro_rules! guests {
    ($($name:ident $end:ident $function:ident)*) => {
        unsafe extern "C" {
            $(static $name: u8; static $end: u8;)*
        }
        $(pub(super) fn $function() -> &'static [u8] {
            let (start, end) = (&raw const $name, &raw const $end);
            // SAFETY: the two labels bound one stretch of the read-only data above.
            unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
        })*
    };
}

guests! {
    guest_count guest_count_end count
    guest_compute guest_compute_end compute
    guest_pages guest_pages_end pages
    guest_tick guest_tick_end tick
    guest_hostile guest_hostile_end hostile
    guest_high guest_high_end high
    guest_fault guest_fault_end fault
}

/// Wraps code as a program for the guest's interface.
pub(super) fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [IMAGE_BASE, 64, 0] {
        image.extend(field.to_le_bytes());
    }
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    image.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let size = code.len() as u64;
    for field in [HEADERS, IMAGE_BASE, IMAGE_BASE, size, size, PAGE_BYTES as u64] {
        image.extend(field.to_le_bytes());
    }
    assert_eq!(image.len() as u64, HEADERS);
    image.extend(code);
    image
}
