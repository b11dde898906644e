//! What the bits of CPUID are called, and what a feature rests on.
//!
//! The names are those of `/proc/cpuinfo`; a bit that Linux does not show there has the name of its constant in Linux's
//! source, in small letters. A bit that CPUID has twice (AMD repeats leaf 1) has one name for both. Data only.

/// One of the four registers that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

/// A register whose bits each stand for a feature.
pub(super) struct Word {
    pub(super) function: u32,
    pub(super) index: u32,
    pub(super) register: Register,
    /// From bit 0 on; "" where Linux knows no name.
    pub(super) names: &'static [&'static str],
}

const fn word(function: u32, index: u32, register: Register, names: &'static [&'static str]) -> Word {
    assert!(names.len() <= 32, "a register has 32 bits");
    Word {
        function,
        index,
        register,
        names,
    }
}

use Register::{Eax, Ebx, Ecx, Edx};

#[rustfmt::skip]
pub(super) const WORDS: [Word; 17] = [
    word(1, 0, Ecx, &[
        "pni", "pclmulqdq", "dtes64", "monitor", "ds_cpl", "vmx", "smx", "est",
        "tm2", "ssse3", "cid", "sdbg", "fma", "cx16", "xtpr", "pdcm",
        "", "pcid", "dca", "sse4_1", "sse4_2", "x2apic", "movbe", "popcnt",
        "tsc_deadline_timer", "aes", "xsave", "osxsave", "avx", "f16c", "rdrand", "hypervisor",
    ]),
    word(1, 0, Edx, &[
        "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce",
        "cx8", "apic", "", "sep", "mtrr", "pge", "mca", "cmov",
        "pat", "pse36", "pn", "clflush", "", "dts", "acpi", "mmx",
        "fxsr", "sse", "sse2", "ss", "ht", "tm", "ia64", "pbe",
    ]),
    word(6, 0, Eax, &["dtherm", "ida", "arat"]),
    word(7, 0, Ebx, &[
        "fsgsbase", "tsc_adjust", "sgx", "bmi1", "hle", "avx2", "fdp_excptn_only", "smep",
        "bmi2", "erms", "invpcid", "rtm", "cqm", "zero_fcs_fds", "mpx", "rdt_a",
        "avx512f", "avx512dq", "rdseed", "adx", "smap", "avx512ifma", "", "clflushopt",
        "clwb", "intel_pt", "avx512pf", "avx512er", "avx512cd", "sha_ni", "avx512bw", "avx512vl",
    ]),
    word(7, 0, Ecx, &[
        "prefetchwt1", "avx512vbmi", "umip", "pku", "ospke", "waitpkg", "avx512_vbmi2", "user_shstk",
        "gfni", "vaes", "vpclmulqdq", "avx512_vnni", "avx512_bitalg", "tme", "avx512_vpopcntdq", "",
        "la57", "", "", "", "", "", "rdpid", "keylocker",
        "bus_lock_detect", "cldemote", "", "movdiri", "movdir64b", "enqcmd", "sgx_lc", "pks",
    ]),
    word(7, 0, Edx, &[
        "", "sgx_keys", "avx512_4vnniw", "avx512_4fmaps", "fsrm", "uintr", "", "",
        "avx512_vp2intersect", "srbds_ctrl", "md_clear", "rtm_always_abort", "", "tsx_force_abort", "serialize", "hybrid_cpu",
        "tsxldtrk", "", "pconfig", "arch_lbr", "ibt", "", "amx_bf16", "avx512_fp16",
        "amx_tile", "amx_int8", "spec_ctrl", "intel_stibp", "flush_l1d", "arch_capabilities", "core_capabilities", "spec_ctrl_ssbd",
    ]),
    word(7, 1, Eax, &[
        "sha512", "sm3", "sm4", "rao_int", "avx_vnni", "avx512_bf16", "lass", "cmpccxadd",
        "arch_perfmon_ext", "", "fzrm", "fsrs", "fsrc", "", "", "",
        "", "fred", "lkgs", "wrmsrns", "nmi_src", "amx_fp16", "hreset", "avx_ifma",
        "", "", "lam", "msrlist",
    ]),
    word(7, 1, Edx, &[
        "", "", "", "", "avx_vnni_int8", "avx_ne_convert", "", "",
        "amx_complex", "", "avx_vnni_int16", "", "", "", "prefetchiti", "user_msr",
        "", "", "cet_sss", "avx10", "", "apx",
    ]),
    word(7, 2, Edx, &["intel_psfd", "ipred_ctrl", "rrsba_ctrl", "ddpd_u", "bhi_ctrl", "mcdt_no"]),
    word(0xd, 1, Eax, &["xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd"]),
    word(0x4000_0001, 0, Eax, &[
        "kvm_clocksource", "kvm_nop_io_delay", "kvm_mmu_op", "kvmclock", "kvm_async_pf", "kvm_steal_time", "kvm_pv_eoi", "kvm_pv_unhalt",
        "", "kvm_pv_tlb_flush", "kvm_async_pf_vmexit", "kvm_pv_send_ipi", "kvm_poll_control", "kvm_pv_sched_yield", "kvm_async_pf_int", "kvm_msi_ext_dest_id",
        "kvm_hc_map_gpa_range", "kvm_migration_control", "", "", "", "", "", "",
        "kvmclock_stable",
    ]),
    word(0x8000_0001, 0, Ecx, &[
        "lahf_lm", "cmp_legacy", "svm", "extapic", "cr8_legacy", "abm", "sse4a", "misalignsse",
        "3dnowprefetch", "osvw", "ibs", "xop", "skinit", "wdt", "", "lwp",
        "fma4", "tce", "", "nodeid_msr", "", "tbm", "topoext", "perfctr_core",
        "perfctr_nb", "", "bpext", "ptsc", "perfctr_llc", "mwaitx", "addr_mask_ext",
    ]),
    word(0x8000_0001, 0, Edx, &[
        "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce",
        "cx8", "apic", "", "syscall", "mtrr", "pge", "mca", "cmov",
        "pat", "pse36", "", "mp", "nx", "", "mmxext", "mmx",
        "fxsr", "fxsr_opt", "pdpe1gb", "rdtscp", "", "lm", "3dnowext", "3dnow",
    ]),
    word(0x8000_0007, 0, Edx, &["ts", "fid", "vid", "ttp", "tm_amd", "stc", "", "hw_pstate", "nonstop_tsc", "cpb"]),
    word(0x8000_0008, 0, Ebx, &[
        "clzero", "irperf", "xsaveerptr", "", "rdpru", "", "", "",
        "", "wbnoinvd", "", "", "amd_ibpb", "", "amd_ibrs", "amd_stibp",
        "", "amd_stibp_always_on", "amd_ibrs_preferred", "amd_ibrs_same_mode", "", "", "", "amd_ppin",
        "amd_ssbd", "virt_ssbd", "amd_ssb_no", "cppc", "amd_psfd", "btc_no", "amd_ibpb_ret", "brs",
    ]),
    word(0x8000_0021, 0, Eax, &[
        "no_nested_data_bp", "wrmsr_xx_base_ns", "lfence_rdtsc", "", "", "verw_clear", "null_sel_clr_base", "",
        "autoibrs", "no_smm_ctl_msr", "amd_fsrs", "amd_fsrc", "", "prefetchctl_msr", "", "",
        "", "", "", "", "prefetchi", "", "", "",
        "eraps", "", "", "sbpb", "ibpb_brtype", "srso_no", "srso_user_kernel_no",
    ]),
    word(0x8000_0021, 0, Ecx, &["", "tsa_sq_no", "tsa_l1_no"]),
];

/// MSRs that KVM has only for a feature, one of these: without it a guest has no use for them, and hosts differ in them.
pub(super) const MSRS: [(u32, &[&str]); 9] = [
    (0x3b, &["tsc_adjust"]),
    (
        0x48,
        &[
            "spec_ctrl",
            "intel_stibp",
            "spec_ctrl_ssbd",
            "amd_ibrs",
            "amd_stibp",
            "amd_ssbd",
        ],
    ),
    (0xe1, &["waitpkg"]),
    (0x10a, &["arch_capabilities"]),
    (0x122, &["arch_capabilities"]),
    (0x6e0, &["tsc_deadline_timer"]),
    (0xda0, &["xsaves"]),
    (0xc000_0103, &["rdtscp", "rdpid"]),
    (0xc001_011f, &["virt_ssbd"]),
];

/// A feature that is nothing without another: the first needs the second. Chains are followed.
pub(super) const NEEDS: [(&str, &str); 42] = [
    ("xsaveopt", "xsave"),
    ("xsavec", "xsave"),
    ("xsaves", "xsave"),
    ("xgetbv1", "xsave"),
    ("avx", "xsave"),
    ("pku", "xsave"),
    ("avx2", "avx"),
    ("fma", "avx"),
    ("f16c", "avx"),
    ("fma4", "avx"),
    ("xop", "avx"),
    ("vaes", "avx"),
    ("vpclmulqdq", "avx"),
    ("avx_vnni", "avx2"),
    ("avx_ifma", "avx2"),
    ("avx_vnni_int8", "avx2"),
    ("avx_vnni_int16", "avx2"),
    ("avx_ne_convert", "avx2"),
    ("sha512", "avx2"),
    ("sm3", "avx"),
    ("sm4", "avx2"),
    ("avx512f", "avx2"),
    ("avx512dq", "avx512f"),
    ("avx512ifma", "avx512f"),
    ("avx512pf", "avx512f"),
    ("avx512er", "avx512f"),
    ("avx512cd", "avx512f"),
    ("avx512bw", "avx512f"),
    ("avx512vl", "avx512f"),
    ("avx512vbmi", "avx512bw"),
    ("avx512_vbmi2", "avx512bw"),
    ("avx512_vnni", "avx512f"),
    ("avx512_bitalg", "avx512bw"),
    ("avx512_vpopcntdq", "avx512f"),
    ("avx512_4vnniw", "avx512f"),
    ("avx512_4fmaps", "avx512f"),
    ("avx512_vp2intersect", "avx512f"),
    ("avx512_bf16", "avx512f"),
    ("avx512_fp16", "avx512bw"),
    ("sse4_2", "sse4_1"),
    ("sse4_1", "ssse3"),
    ("ssse3", "pni"),
];

/// What XSAVE keeps in a component of its own, and which feature that is.
pub(super) const COMPONENTS: [(u32, &str); 6] = [
    (2, "avx"),
    (5, "avx512f"),
    (6, "avx512f"),
    (7, "avx512f"),
    (9, "pku"),
    (19, "apx"),
];
