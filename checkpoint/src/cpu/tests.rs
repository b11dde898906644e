//! Models made, compared, lessened, and damaged.

use super::samples::{INTEL, made_by, server};
use super::*;

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_model_has_one_form() {
    let model = server();
    assert_eq!(model.check(), Ok(()));
    assert_eq!(model.msrs, [0x10a, 0x174, 0xc000_0081]);
    assert!(
        !model.has("osxsave") && model.has("avx512vl") && model.has("pku"),
        "{model:?}"
    );
    assert!(model.leaf(0xb, 0).is_none(), "the topology is no part of it");
    assert_eq!(model.leaf(0, 0).map(|leaf| leaf.eax), Some(0xd));
    assert_eq!(
        model.leaf(1, 0).map(|leaf| leaf.ebx),
        Some(0x0800),
        "nor is the APIC's number"
    );
    assert_eq!(model.leaf(0xd, 0).map(|leaf| (leaf.eax, leaf.ecx)), Some((0x2e7, 2440)));
    assert_eq!((model.physical_bits(), CpuModel::default().check()), (48, Ok(())));
}

#[test]
fn a_malformed_model_is_told_from_a_good_one() {
    let wrong: [fn(&mut CpuModel); 7] = [
        |model| model.leaves.swap(0, 1),
        |model| model.leaves.push(*model.leaves.last().unwrap()),
        |model| model.msrs.reverse(),
        |model| model.leaves[0].eax += 1,
        |model| model.leaves.push(CpuLeaf::new(0xc000_0001, 0, [1; 4])),
        |model| model.leaves = vec![CpuLeaf::default(); CPU_LEAVES_MAX + 1],
        |model| model.msrs = vec![1; CPU_MSRS_MAX + 1],
    ];
    for (number, change) in wrong.into_iter().enumerate() {
        let mut model = server();
        change(&mut model);
        assert!(matches!(model.check(), Err(CpuError::Malformed(_))), "change {number}");
    }
}

#[test]
fn what_a_host_lacks_is_named_as_linux_names_it() {
    let vm = server();
    assert_eq!(vm.missing_from(&server()), Vec::<String>::new());
    let lacks = |change: &dyn Fn(&mut CpuModel)| {
        let mut host = server();
        change(&mut host);
        host.tidy();
        vm.missing_from(&host)
    };
    assert_eq!(lacks(&|host| host.clear("rdrand")), names(&["rdrand"]));
    assert_eq!(
        lacks(&|host| {
            host.clear("rdseed");
            host.clear("arch_capabilities");
            host.clear("sse4_2");
            host.clear("kvmclock");
        }),
        names(&["sse4_2", "rdseed", "arch_capabilities", "kvmclock"])
    );
    assert_eq!(
        lacks(&|host| host.clear("mmx")),
        names(&["mmx"]),
        "once, though CPUID has it twice"
    );
    assert_eq!(
        lacks(&|host| host.leaf_mut(7, 1).unwrap().eax = 0),
        names(&["avx512_bf16"])
    );
    assert_eq!(
        lacks(&|host| host.msrs.retain(|msr| *msr != 0x10a)),
        names(&["MSR 0x10a"])
    );
    assert_eq!(
        lacks(&|host| host.leaf_mut(SIZES, 0).unwrap().eax = 0x3027),
        names(&["48 physical address bits (it has 39)"])
    );
    assert_eq!(
        lacks(&|host| host.leaf_mut(1, 0).unwrap().ebx = 0x1000),
        names(&["cache lines of 64 bytes (it has 128)"])
    );
    assert_eq!(
        vm.missing_from(&made_by(INTEL)),
        names(&["vendor AuthenticAMD (it is GenuineIntel)"])
    );
    let mut unknown = server();
    unknown.leaf_mut(7, 0).unwrap().ebx |= 1 << 22;
    unknown.tidy();
    assert_eq!(unknown.missing_from(&vm), names(&["cpuid 7.0 ebx bit 22"]));
}

#[test]
fn avx_takes_with_it_what_rests_on_it() {
    let model = server().without(["avx"]);
    for name in ["avx2", "fma", "f16c", "avx512f", "avx512_bf16", "vaes"] {
        assert!(!model.has(name), "{name}");
    }
    assert!(model.has("sse4_2") && model.has("pku") && model.has("xsaveopt"));
    assert_eq!(model.components(), 0x203);
    assert!(model.leaf(0xd, 2).is_none());
    let model = server().without(["xsave"]);
    assert!(!model.has("pku") && model.leaf(0xd, 0).is_none());
    assert_eq!(model.check(), Ok(()));
}

#[test]
fn a_component_in_another_place_is_no_common_one() {
    let (a, mut b) = (server(), server());
    b.leaf_mut(0xd, 9).unwrap().ebx = 2688;
    b.tidy();
    assert_eq!(a.missing_from(&b), names(&["xsave component 9 (pku) in this place"]));
    let both = a.intersection(&b).unwrap();
    assert!(!both.has("pku") && both.has("avx512f"));
    assert!(both.missing_from(&a).is_empty() && both.missing_from(&b).is_empty());
}

#[test]
fn the_intersection_fits_both_and_lacks_nothing_that_both_have() {
    let a = server().without(["rdrand", "sha_ni"]);
    let mut b = server().without(["avx512f"]);
    b.leaf_mut(SIZES, 0).unwrap().eax = 0x392b;
    b.msrs = vec![0x174, 0x175];
    b.tidy();
    let both = a.intersection(&b).unwrap();
    assert_eq!(both.check(), Ok(()));
    assert!(both.missing_from(&a).is_empty() && both.missing_from(&b).is_empty());
    assert!(!both.has("rdrand") && !both.has("avx512vl") && both.has("avx2"));
    assert_eq!((both.physical_bits(), both.msrs.as_slice()), (43, [0x174].as_slice()));
    let vendors = a.intersection(&made_by(INTEL)).unwrap_err();
    assert!(
        vendors.to_string().starts_with("AuthenticAMD and GenuineIntel"),
        "{vendors}"
    );
    assert_eq!(a.intersection(&a), Ok(a));
}

#[test]
fn the_levels_are_those_of_the_psabi() {
    let host = server();
    let [v2, v3, v4] = Level::ALL.map(|level| level.of(&host).unwrap());
    assert!(v2.has("sse4_2") && v2.has("popcnt") && v2.has("xsave") && v2.has("kvmclock") && v2.has("lm"));
    assert!(!v2.has("avx") && !v2.has("bmi1") && !v2.has("rdrand") && !v2.has("aes") && !v2.has("pku"));
    assert!(v3.has("avx2") && v3.has("fma") && !v3.has("avx512f") && v3.components() == 7);
    assert!(v4.has("avx512vl") && !v4.has("avx512_vnni") && v4.components() == 0xe7);
    assert!(v2.missing_from(&v3).is_empty() && v3.missing_from(&v4).is_empty() && v4.missing_from(&host).is_empty());
    assert_eq!((v4.physical_bits(), v4.check()), (39, Ok(())));
    let old = host.without(["avx2", "movbe"]);
    assert_eq!(Level::V2.of(&old), Ok(v2));
    let lacking = Level::V3.of(&old).unwrap_err();
    assert_eq!(lacking, CpuError::Lacks(names(&["avx2", "movbe"])));
    assert_eq!(
        lacking.to_string(),
        "this host's processor or its KVM lacks avx2, movbe"
    );
}

#[test]
fn every_name_of_a_table_is_a_feature_once() {
    let known = |name: &str| feature_names().any(|known| known == name);
    for (name, needed) in names::NEEDS {
        assert!(known(name) && known(needed), "{name} {needed}");
    }
    for (_, name) in names::COMPONENTS {
        assert!(known(name), "{name}");
    }
    let all: Vec<_> = feature_names().collect();
    let mut twice: Vec<_> = all
        .iter()
        .filter(|name| all.iter().filter(|n| n == name).count() > 1)
        .collect();
    twice.sort_unstable();
    twice.dedup();
    let repeated = WORDS
        .iter()
        .find(|word| (word.function, word.register) == (0x8000_0001, Register::Edx))
        .unwrap();
    assert!(twice.iter().all(|name| repeated.mask(name) != 0), "{twice:?}");
    assert_eq!(feature("TSC-deadline"), Some("tsc_deadline_timer"));
    assert_eq!((feature("sse4-2"), feature("rdrandom")), (Some("sse4_2"), None));
}

#[test]
fn a_long_list_is_cut() {
    let many: Vec<_> = (0..30).map(|number| format!("f{number}")).collect();
    assert!(listed(&many).ends_with("f23 and 6 more"));
    assert_eq!(listed(&many[..2]), "f0, f1");
}

/// Any pair of hosts, damaged anyhow: the intersection has one form and fits both.
#[test]
fn intersections_of_random_hosts_fit_both() {
    use proptest::prelude::*;
    let leaves = || {
        let functions = prop::sample::select(vec![
            0,
            1,
            2,
            4,
            6,
            7,
            0xd,
            0x4000_0001,
            0x8000_0001,
            0x8000_0008,
            0x8000_0021,
        ]);
        let leaf = (functions, 0..10_u32, any::<[u32; 4]>()).prop_map(|(f, i, words)| CpuLeaf::new(f, i, words));
        (
            prop::collection::vec(leaf, 0..40),
            prop::collection::vec(0..50_u32, 0..20),
        )
    };
    proptest!(|((ours, our_msrs) in leaves(), (theirs, their_msrs) in leaves())| {
        let (mut a, mut b) = (CpuModel::new(ours, our_msrs), CpuModel::new(theirs, their_msrs));
        for model in [&mut a, &mut b] {
            model.leaves.retain(|leaf| leaf.function != 0);
            for leaf in &mut model.leaves {
                if leaf.function == 1 {
                    leaf.ebx = 0x800;
                }
            }
            model.leaves.retain(|leaf| leaf.function != 1 || leaf.ebx != 0);
            model.tidy();
            prop_assert_eq!(model.check(), Ok(()));
        }
        let both = a.intersection(&b).unwrap();
        prop_assert_eq!(both.check(), Ok(()));
        let unknown = |list: Vec<String>| list.into_iter().filter(|name| !name.starts_with("cache line")).collect::<Vec<_>>();
        prop_assert_eq!(unknown(both.missing_from(&a)), Vec::<String>::new());
        prop_assert_eq!(unknown(both.missing_from(&b)), Vec::<String>::new());
        prop_assert_eq!(both.intersection(&a).unwrap(), both.clone());
    });
}

#[test]
fn an_msr_goes_with_its_feature() {
    let with = |msrs: &[u32]| CpuModel::new(server().leaves, [&[0x174, 0xc000_0081], msrs].concat());
    let (newer, older) = (with(&[0xe1, 0x122, 0xda0, 0xc000_0103]), with(&[0xc000_0103]));
    let newer = newer.without(["arch_capabilities"]);
    for level in Level::ALL {
        let vm = level.of(&newer).unwrap();
        assert_eq!(vm.missing_from(&older), Vec::<String>::new(), "{}", level.name());
    }
    let vm = server().without(["rdtscp", "rdpid"]);
    assert!(!vm.msrs.contains(&0xc000_0103) && vm.msrs.contains(&0x174));
    assert_eq!(vm.check(), Ok(()));
}

#[test]
fn msrs_name_features_that_there_are() {
    for (msr, features) in names::MSRS {
        for feature in features {
            assert!(super::feature(feature).is_some(), "{msr:#x}: {feature}");
        }
    }
}
