//! Dirty pages, checks and restores of the whole machine.

use super::guests::{elf, high, pages};
use super::*;

#[test]
fn dirty_pages_are_those_of_the_guest_and_of_the_machine() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(pages());
    let boot = machine.vm.take_dirty().unwrap();
    for address in [BOOT_INFO, CLOCK_PAGE, IMAGE_BASE, guest::abi::PAGE_TABLES] {
        assert!(boot.contains(address / PAGE), "the machine wrote {address:#x} itself");
    }
    assert!(machine.vm.take_dirty().unwrap().is_empty());

    // KVM also reports a page when the guest touches it for the first time, so it goes round once before.
    let written: Vec<u64> = (0..10).map(|number| DATA_PAGE + number * 3).collect();
    machine.vm.resume().unwrap();
    machine.settle();
    let first = machine.vm.take_dirty().unwrap();
    assert!(written.iter().all(|page| first.contains(*page)));
    machine.vm.doorbell().trigger();
    machine.settle();
    assert_eq!(
        without_tables(machine.vm.take_dirty().unwrap())
            .iter()
            .collect::<Vec<_>>(),
        written,
        "only the guest's pages"
    );
    assert!(
        machine.vm.take_dirty().unwrap().is_empty(),
        "an idle guest writes nothing"
    );

    // One page that only the machine writes, and one that both write.
    machine
        .vm
        .ram
        .memory()
        .write_obj(1_u8, GuestAddress(DATA + PAGE))
        .unwrap();
    machine.vm.ram.memory().write_obj(1_u8, GuestAddress(DATA)).unwrap();
    machine.vm.doorbell().trigger();
    machine.settle();
    let mut both = written.clone();
    both.insert(1, DATA_PAGE + 1);
    let dirty = without_tables(machine.vm.take_dirty().unwrap());
    assert_eq!(dirty.iter().collect::<Vec<_>>(), both);
    assert_eq!(machine.word(DATA + 8), 3, "the guest was woken once each time");

    machine.vm.put_back_dirty(&dirty);
    machine
        .vm
        .ram
        .memory()
        .write_obj(1_u8, GuestAddress(DATA + 2 * PAGE))
        .unwrap();
    both.insert(2, DATA_PAGE + 2);
    assert_eq!(
        without_tables(machine.vm.take_dirty().unwrap())
            .iter()
            .collect::<Vec<_>>(),
        both
    );
    assert!(machine.vm.take_dirty().unwrap().is_empty());
    machine.vm.pause().unwrap();
    machine.vm.reseed([1; 32]);
    assert_eq!(
        without_tables(machine.vm.take_dirty().unwrap())
            .iter()
            .collect::<Vec<_>>(),
        [CLOCK]
    );
}

/// Leaves the guest's page tables out: where the processor walks them itself, with nested paging, it counts as writing there (AMD64
/// manual, volume 2, 15.25.5).
fn without_tables(mut pages: PageSet) -> PageSet {
    let mut tables = PageSet::new(pages.pages());
    tables.extend(guest::abi::PAGE_TABLES / PAGE..guest::abi::STACK_TOP / PAGE / 2);
    pages.subtract(&tables);
    pages
}

#[test]
fn a_look_changes_nothing_and_a_clear_only_what_it_names() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(pages());
    machine.vm.resume().unwrap();
    machine.settle();
    machine.vm.take_dirty().unwrap();
    machine.vm.doorbell().trigger();
    machine.settle();
    let memory = machine.vm.ram.memory().clone();
    let write = |page: u64| memory.write_obj(1_u8, GuestAddress(page * PAGE)).unwrap();
    write(DATA_PAGE + 1);
    write(DATA_PAGE + 3);
    let mut given_back = PageSet::new(machine.vm.ram.pages());
    given_back.extend([DATA_PAGE + 2, DATA_PAGE + 5]);
    machine.vm.put_back_dirty(&given_back);
    let mut expected = given_back.clone();
    expected.insert(DATA_PAGE + 1);
    expected.extend((0..10).map(|number| DATA_PAGE + number * 3));
    for _ in 0..2 {
        assert_eq!(without_tables(machine.vm.dirty_now().unwrap()), expected);
    }
    // Of the guest's, of the machine's, of both, given back, and of nobody.
    let mut some = PageSet::new(expected.pages());
    some.extend([0, 1, 2, 3, 4, 27].map(|offset| DATA_PAGE + offset));
    machine.vm.clear_dirty(&some).unwrap();
    expected.subtract(&some);
    assert_eq!(without_tables(machine.vm.dirty_now().unwrap()), expected);
    machine.vm.clear_dirty(&some).unwrap();
    // What was cleared is noticed again, by both.
    machine.vm.doorbell().trigger();
    machine.settle();
    write(DATA_PAGE + 1);
    expected.extend([0, 1, 3, 27].map(|offset| DATA_PAGE + offset));
    assert_eq!(without_tables(machine.vm.take_dirty().unwrap()), expected);
    assert!(machine.vm.dirty_now().unwrap().is_empty());
}

/// Background shipping, against a guest and a device that write all the time until a moment before the stop.
#[test]
fn what_was_shipped_ahead_is_good_unless_dirty_at_the_stop() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(pages());
    let (ram, doorbell) = (machine.vm.ram(), Arc::clone(machine.vm.doorbell()));
    let mut shipped: Vec<Option<[u8; PAGE_BYTES]>> = vec![None; crate::index(ram.pages())];
    let (mut good, mut spoilt) = (0_u64, 0_u64);
    for round in 0..100 {
        machine.vm.resume().unwrap();
        thread::scope(|scope| {
            let (ram, doorbell) = (&ram, &doorbell);
            let device = scope.spawn(move || {
                for count in 0..300_u64 {
                    let at = DATA + count * 7 % 64 * PAGE + 2048;
                    ram.memory().write_obj(count + round, GuestAddress(at)).unwrap();
                    doorbell.trigger();
                }
            });
            while !device.is_finished() {
                let dirty = machine.vm.dirty_now().unwrap();
                machine.vm.clear_dirty(&dirty).unwrap();
                for page in dirty.iter() {
                    let copy = shipped[crate::index(page)].get_or_insert([0; PAGE_BYTES]);
                    ram.read_page(page, copy).unwrap();
                }
            }
        });
        machine.vm.pause().unwrap();
        let dirty = machine.vm.take_dirty().unwrap();
        let mut content = [0; PAGE_BYTES];
        for (page, copy) in (0..).zip(&mut shipped) {
            let Some(copy) = copy else { continue };
            ram.read_page(page, &mut content).unwrap();
            if dirty.contains(page) {
                *copy = content;
                spoilt += 1;
            } else {
                assert!(*copy == content, "page {page} in round {round}");
                good += 1;
            }
        }
    }
    println!("{good} pages good as shipped, {spoilt} spoilt by the stop");
}

#[test]
fn private_machine_goes_back_to_the_committed_image() {
    if kvm_is_missing() {
        return;
    }
    let mut primary = booted(pages());
    primary.vm.resume().unwrap();
    primary.settle();
    primary.vm.pause().unwrap();
    let mut secondary = empty(Mapping::Private);
    primary.copy_to(&mut secondary);
    assert_eq!(secondary.word(DATA + 8), 1);
    for round in 1..4 {
        secondary.run_until(|machine| machine.word(DATA + 8 + 27 * PAGE) == 2);
        let mut page = [0; PAGE_BYTES];
        secondary.vm.ram.read_committed(DATA_PAGE, &mut page).unwrap();
        assert_eq!(
            page[8], 1,
            "what it does on its own does not reach the image, round {round}"
        );
        primary.copy_to(&mut secondary);
        assert_eq!(secondary.word(DATA + 8), 1, "it is back where the primary stopped");
    }
}

#[test]
fn check_names_what_this_host_would_refuse() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(pages());
    machine.vm.resume().unwrap();
    machine.settle();
    machine.vm.pause().unwrap();
    let good = machine.vm.save().unwrap();
    machine.vm.resume().unwrap();
    machine.vm.check(&good).unwrap();

    let spoil = |change: &dyn Fn(&mut CpuState)| {
        let mut state = good.clone();
        let mut reader = Reader::new(&good.0[0], VCPU_VERSION).unwrap();
        let mut cpu = CpuState::decode(&mut reader, Chips::None).unwrap();
        change(&mut cpu);
        let mut writer = Writer::new();
        cpu.encode(&mut writer);
        state.0[0] = writer.finish(vcpu_name(0), VCPU_VERSION);
        state
    };
    let cases: [(&str, MachineState); 6] = [
        ("special registers", spoil(&|cpu| cpu.registers.sregs.cr4 |= 1 << 63)),
        ("special registers", spoil(&|cpu| cpu.registers.sregs.efer = 0)),
        ("debug registers", spoil(&|cpu| cpu.registers.debug.dr7 = u64::MAX)),
        ("XCR registers", spoil(&|cpu| cpu.registers.xcrs.xcrs[0].value = 2)),
        ("XSAVE state", spoil(&|cpu| cpu.registers.xsave.region[129] = 1 << 30)),
        (
            "MSR 0xc0000082",
            spoil(&|cpu| {
                cpu.registers
                    .msrs
                    .iter_mut()
                    .find(|msr| msr.index == 0xc000_0082)
                    .unwrap()
                    .data = 1 << 62;
            }),
        ),
    ];
    for (name, state) in &cases {
        let error = machine.vm.check(state).expect_err(name);
        let VmError::Registers(error) = error else {
            panic!("{name}: {error}")
        };
        assert!(error.to_string().contains(name), "{error}");
        machine.vm.check(&good).expect("a failed trial leaves nothing behind");
    }

    let mut missing = good.clone();
    missing.0.remove(2);
    assert!(matches!(
        machine.vm.check(&missing),
        Err(VmError::State(StateError::Missing { .. }))
    ));
    let mut twice = good.clone();
    twice.0.push(twice.0[1].clone());
    assert!(matches!(
        machine.vm.check(&twice),
        Err(VmError::State(StateError::Unexpected { .. }))
    ));
    for (section, length) in (0..good.0.len()).flat_map(|section| [0, 1, 40].map(|length| (section, length))) {
        let mut short = good.clone();
        short.0[section].bytes.truncate(length);
        if short != good {
            assert!(machine.vm.check(&short).is_err(), "section {section} cut to {length}");
        }
    }

    machine.vm.pause().unwrap();
    machine.vm.restore(&cases[0].1).unwrap_err();
    assert!(
        matches!(machine.vm.resume(), Err(VmError::Poisoned)),
        "after a failed restore it never runs"
    );
}

#[test]
fn what_the_check_accepts_the_restore_accepts() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(pages());
    machine.vm.resume().unwrap();
    machine.settle();
    machine.vm.pause().unwrap();
    let good = machine.vm.save().unwrap();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random >> 16).unwrap() % below
    };
    let mut accepted = 0;
    for _ in 0..400 {
        let mut state = good.clone();
        let section = &mut state.0[next(good.0.len())].bytes;
        for _ in 0..=next(3) {
            let at = next(section.len());
            section[at] ^= 1 << next(8);
        }
        if machine.vm.check(&state).is_ok() {
            accepted += 1;
            machine.vm.restore(&state).unwrap();
        }
    }
    assert!(
        (1..400).contains(&accepted),
        "some changes are harmless, some are not: {accepted}"
    );
    machine.vm.restore(&good).unwrap();
    machine.vm.resume().unwrap();
    machine.settle();
    assert_eq!(machine.word(DATA + 8), 2, "nothing of it is left");
}

#[test]
fn memory_above_the_device_window_is_memory_too() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = sized(Mapping::Shared, guest::abi::LOW_MEMORY_END_MAX + (8 << 20));
    machine.vm.boot(&elf(high()), "").unwrap();
    machine.vm.take_dirty().unwrap();
    machine.vm.resume().unwrap();
    assert_eq!(machine.end(), PowerEvent::Off);
    machine.vm.pause().unwrap();
    assert_eq!(machine.word(DATA), 1 << 32);
    let dirty = machine.vm.take_dirty().unwrap();
    let page = guest::abi::LOW_MEMORY_END_MAX / PAGE + 5;
    assert!(
        dirty.contains(page) && dirty.contains(DATA_PAGE),
        "{:?}",
        dirty.runs().collect::<Vec<_>>()
    );
    assert!(without_tables(dirty).len() < 8);
    let mut content = [0; PAGE_BYTES];
    machine.vm.ram.read_page(page, &mut content).unwrap();
    assert_eq!(content[8..16], (1_u64 << 32).to_le_bytes());
    assert!(
        machine.vm.ram.populated().unwrap().len() < 100,
        "what nobody touched costs nothing"
    );
}

#[test]
fn the_state_of_a_machine_is_that_of_all_its_network_cards() {
    if kvm_is_missing() {
        return;
    }
    let cards = |count| with_cards(Mapping::Shared, MEMORY_MIN, count).vm;
    let [mut one, mut eight, mut other] = [1, 8, 8].map(cards);
    let mut saved = eight.save().unwrap();
    let nets: Vec<_> = saved
        .0
        .iter()
        .filter(|section| section.name.starts_with("net"))
        .collect();
    assert_eq!((nets.len(), eight.net_turns().len()), (8, 8));
    assert!(matches!(
        one.check(&saved),
        Err(VmError::State(StateError::Unexpected { section })) if section == "net1"
    ));
    other.check(&saved).unwrap();
    other.restore(&saved).unwrap();
    other.set_backends(nowhere(8), Box::new(Blank(1 << 20))).unwrap();
    saved.0.retain(|section| section.name != "net7");
    assert!(other.check(&saved).is_err(), "a card that is there has a state");
}
