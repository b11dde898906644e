//! The entry point: the machine jumps here in ring 3, with RSP at the stack's top and RDI at the boot information.

core::arch::global_asm!(
    ".section .text.boot, \"ax\"",
    ".global _start",
    "_start:",
    "xor ebp, ebp",
    "mov rbx, rdi",
    // A machine that starts again has not cleared what an earlier run left in .bss.
    "lea rdi, [rip + __bss_start]",
    "lea rcx, [rip + __bss_end]",
    "sub rcx, rdi",
    "xor eax, eax",
    "cld",
    "rep stosb",
    "mov rdi, rbx",
    "and rsp, -16",
    "call {main}",
    "ud2",
    ".text",
    main = sym crate::rust_main,
);
