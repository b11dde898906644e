//! Guest memory without a guest.

use super::*;

const SMALL: u64 = MEMORY_MIN;

fn page_of(byte: u8) -> [u8; PAGE_BYTES] {
    [byte; PAGE_BYTES]
}

fn seen(ram: &GuestRam, page: u64) -> u8 {
    let mut content = page_of(0xee);
    ram.read_page(page, &mut content).unwrap();
    content[0]
}

fn committed(ram: &GuestRam, page: u64) -> u8 {
    let mut content = page_of(0xee);
    ram.read_committed(page, &mut content).unwrap();
    content[0]
}

#[test]
fn refuses_sizes_no_machine_has() {
    for bytes in [0, 4096, SMALL + 4096, MEMORY_MAX + MEMORY_STEP, u64::MAX] {
        assert!(
            matches!(GuestRam::new(bytes, Mapping::Shared), Err(MemoryError::Size { .. })),
            "{bytes}"
        );
    }
}

#[test]
fn pages_are_numbered_across_the_device_window() {
    let ram = GuestRam::new(LOW_MEMORY_END_MAX + MEMORY_STEP, Mapping::Private).unwrap();
    let low = LOW_MEMORY_END_MAX / PAGE;
    assert_eq!(ram.pages(), low + 512);
    assert_eq!(ram.page_address(low - 1).unwrap().0, LOW_MEMORY_END_MAX - PAGE);
    assert_eq!(ram.page_address(low).unwrap().0, HIGH_MEMORY);
    assert!(ram.page_address(low + 512).is_err());
    assert_eq!(ram.page_at(HIGH_MEMORY + 5), Some(low));
    assert_eq!(ram.page_at(LOW_MEMORY_END_MAX), None);
    assert_eq!(ram.page_at(HIGH_MEMORY + MEMORY_STEP), None);

    ram.write_committed(low + 1, &page_of(7)).unwrap();
    assert_eq!(
        ram.memory().read_obj::<u8>(GuestAddress(HIGH_MEMORY + PAGE)).unwrap(),
        7
    );
    ram.memory().write_obj(9_u8, GuestAddress(HIGH_MEMORY + PAGE)).unwrap();
    let mut dirty = PageSet::new(ram.pages());
    ram.take_written(&mut dirty);
    assert_eq!(dirty.iter().collect::<Vec<_>>(), [low + 1]);
    ram.memory()
        .write_obj(9_u8, GuestAddress(LOW_MEMORY_END_MAX - 1))
        .unwrap();
    dirty.insert(low - 1);
    dirty.insert(low);
    ram.revert(&dirty).unwrap();
    assert_eq!(
        seen(&ram, low + 1),
        7,
        "a revert over the end of the low part reaches the high part"
    );
}

#[test]
fn private_writes_stay_out_of_the_image_until_reverted() {
    let ram = GuestRam::new(SMALL, Mapping::Private).unwrap();
    ram.write_committed(3, &page_of(1)).unwrap();
    assert_eq!(seen(&ram, 3), 1, "a page not written shows the image");
    ram.memory().write_slice(&page_of(2), GuestAddress(3 * PAGE)).unwrap();
    assert_eq!((seen(&ram, 3), committed(&ram, 3)), (2, 1));
    ram.write_committed(3, &page_of(4)).unwrap();
    assert_eq!(seen(&ram, 3), 2, "the guest's own copy hides the image");
    let mut dirty = PageSet::new(ram.pages());
    ram.take_written(&mut dirty);
    assert_eq!(dirty.iter().collect::<Vec<_>>(), [3]);
    ram.revert(&dirty).unwrap();
    assert_eq!(seen(&ram, 3), 4);
}

/// The host's kernel makes copies for the guest that no log knows of.
#[test]
fn a_checkpoint_shows_also_where_a_copy_was_made_that_nobody_logged() {
    let ram = GuestRam::new(SMALL, Mapping::Private).unwrap();
    let before: Vec<u64> = (2..6).collect();
    ram.write_committed_pages(&before, &[1; 4 * PAGE_BYTES]).unwrap();
    let touch = |page: u64, value: u8| ram.memory().write_slice(&page_of(value), GuestAddress(page * PAGE));
    // Pages 2 and 3 get copies of what is committed, 4 one of what the primary has too, 5 one that the guest wrote.
    for (page, value) in [(2, 1), (3, 1), (4, 7), (5, 8)] {
        touch(page, value).unwrap();
    }
    ram.take_written(&mut PageSet::new(ram.pages()));
    let (mut own, mut alike) = (PageSet::new(ram.pages()), PageSet::new(ram.pages()));
    own.insert(5);
    alike.insert(4);
    let content = [page_of(9), page_of(9)].concat();
    let none = PageSet::new(ram.pages());
    ram.commit([(&[2, 6][..], &content[..])], &alike, own, &none).unwrap();
    let image = [2, 3, 4, 5, 6].map(|page| committed(&ram, page));
    assert_eq!(image, [9, 1, 7, 1, 9]);
    assert_eq!([2, 3, 4, 5, 6].map(|page| seen(&ram, page)), image);

    touch(3, 5).unwrap();
    ram.revert_all().unwrap();
    assert_eq!(seen(&ram, 3), 1, "no copy is left");
}

#[test]
fn copies_that_are_kept_show_what_is_committed_and_are_clean() {
    let ram = GuestRam::new(SMALL, Mapping::Private).unwrap();
    let set = |pages: &[u64]| {
        let mut set = PageSet::new(ram.pages());
        set.extend(pages.iter().copied());
        set
    };
    let touch = |page: u64, value: u8| ram.memory().write_slice(&page_of(value), GuestAddress(page * PAGE));
    let written = || {
        let mut written = set(&[]);
        ram.take_written(&mut written);
        written
    };
    let both = |pages: [u64; 5]| pages.map(|page| (committed(&ram, page), seen(&ram, page)));
    for page in 2..7 {
        touch(page, 7).unwrap();
    }
    // 2 and 6 are alike, 3 is another on the primary, 4 and 5 are reverted.
    let staged = page_of(9);
    let own = written();
    ram.commit([(&[3][..], &staged[..])], &set(&[2, 6]), own, &set(&[2, 3, 4]))
        .unwrap();
    assert_eq!(ram.copies(&(0..ram.pages())).unwrap(), set(&[2, 3, 4]));
    assert_eq!(both([2, 3, 4, 5, 6]), [(7, 7), (9, 9), (0, 0), (0, 0), (7, 7)]);
    assert_eq!(written(), set(&[]));

    // The next checkpoint is another where nothing was written, and where something was.
    touch(3, 8).unwrap();
    let staged = [page_of(1), page_of(2)].concat();
    let mut stale = written();
    stale.union(&set(&[2, 3, 4]));
    ram.commit([(&[2, 3][..], &staged[..])], &set(&[]), stale, &set(&[3]))
        .unwrap();
    assert_eq!(ram.copies(&(0..ram.pages())).unwrap(), set(&[3]));
    assert_eq!(both([2, 3, 4, 5, 6]), [(1, 1), (2, 2), (0, 0), (0, 0), (7, 7)]);
}

#[test]
fn scattered_copies_are_all_dropped_and_no_others() {
    let ram = GuestRam::new(64 << 20, Mapping::Private).unwrap();
    let mut scattered = PageSet::new(ram.pages());
    scattered.extend((0..ram.pages()).step_by(3));
    assert!(scattered.len() > 5 * RANGES_MAX as u64);
    for page in 0..ram.pages() {
        ram.memory().write_obj(1_u8, GuestAddress(page * PAGE)).unwrap();
    }
    ram.revert(&scattered).unwrap();
    for page in 0..ram.pages() {
        assert_eq!(seen(&ram, page), u8::from(!scattered.contains(page)), "page {page}");
    }
    // As on a kernel without the call for many ranges.
    let all = PageSet::full(ram.pages());
    for run in all.runs() {
        drop_copies(&[ram.host_range(&run).unwrap()]).unwrap();
    }
    assert_eq!(seen(&ram, 1), 0);
}

#[test]
fn populated_pages_are_those_of_the_image_and_the_copies() {
    for mapping in [Mapping::Shared, Mapping::Private] {
        let ram = GuestRam::new(SMALL, mapping).unwrap();
        assert!(ram.populated().unwrap().is_empty());
        for page in [0, 7, 8, ram.pages() - 1] {
            ram.write_committed(page, &page_of(1)).unwrap();
        }
        ram.memory().write_obj(1_u8, GuestAddress(8 * PAGE)).unwrap();
        ram.give_back_image(0..ram.pages()).unwrap();
        let pages: Vec<_> = ram.populated().unwrap().iter().collect();
        assert_eq!(pages, [0, 7, 8, ram.pages() - 1], "{mapping:?}");
    }
}

#[test]
fn image_is_given_back_only_under_copies() {
    use std::os::unix::fs::MetadataExt;
    let ram = GuestRam::new(SMALL, Mapping::Private).unwrap();
    for page in 0..100 {
        ram.write_committed(page, &page_of(1)).unwrap();
    }
    for page in 0..40 {
        ram.memory()
            .write_slice(&page_of(2), GuestAddress(page * PAGE))
            .unwrap();
    }
    for page in 40..60 {
        assert_eq!(seen(&ram, page), 1, "only read");
    }
    let held = || ram.image.metadata().unwrap().blocks() / 8;
    assert_eq!(held(), 100);
    assert_eq!(ram.give_back_image(0..30).unwrap(), 30);
    assert_eq!(ram.give_back_image(20..ram.pages()).unwrap(), 20);
    assert_eq!(held(), 60);
    for page in 0..100 {
        assert_eq!(seen(&ram, page), if page < 40 { 2 } else { 1 }, "page {page}");
    }
    assert!(ram.give_back_image(0..ram.pages() + 1).is_err());
}

#[test]
fn staged_pages_reach_the_image_in_their_order() {
    let ram = GuestRam::new(SMALL, Mapping::Private).unwrap();
    let pages = [7, 8, 9, 3, 8, 9, u64::MAX];
    let content: Vec<u8> = (1..8).flat_map(page_of).collect();
    let error = ram.write_committed_pages(&pages, &content);
    assert!(matches!(error, Err(MemoryError::NoPage { .. })));
    let image: Vec<u8> = [7, 8, 9, 3, 10].map(|page| committed(&ram, page)).into();
    assert_eq!(image, [1, 5, 6, 4, 0]);
    ram.write_committed_pages(&[], &[]).unwrap();
}

/// What `Vm::clear_dirty` promises, against two devices that write all the time until a moment before the stop.
#[test]
fn what_was_copied_after_its_clear_is_the_content_unless_dirty_again() {
    const PAGES: u64 = 128;
    let ram = GuestRam::new(SMALL, Mapping::Shared).unwrap();
    let mut copies = vec![page_of(0); index(PAGES)];
    let (mut good, mut spoilt) = (0, 0);
    for round in 0..200 {
        std::thread::scope(|scope| {
            let device = |number: u64| {
                let ram = &ram;
                scope.spawn(move || {
                    for count in 0..500_u64 {
                        let page = (count ^ round).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57;
                        let content = [(count * 2 + number).to_le_bytes(); 64];
                        let at = page * PAGE + number * 1024 + 300;
                        ram.memory()
                            .write_slice(content.as_flattened(), GuestAddress(at))
                            .unwrap();
                    }
                })
            };
            let devices = [device(1), device(2)];
            while !devices.iter().all(|device| device.is_finished()) {
                let mut dirty = PageSet::new(ram.pages());
                ram.peek_written(&mut dirty);
                ram.clear_written(&dirty);
                for page in dirty.iter() {
                    ram.read_page(page, &mut copies[index(page)]).unwrap();
                }
            }
        });
        let mut dirty = PageSet::new(ram.pages());
        ram.take_written(&mut dirty);
        let mut content = page_of(0);
        for (page, copy) in (0..).zip(&mut copies) {
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
    println!("{good} pages good as copied, {spoilt} dirty again");
}

#[test]
fn a_cleared_image_is_zero_under_what_the_guest_wrote() {
    let ram = GuestRam::new(SMALL, Mapping::Private).unwrap();
    ram.write_committed(3, &page_of(1)).unwrap();
    ram.write_committed(4, &page_of(1)).unwrap();
    assert_eq!(seen(&ram, 4), 1, "read before");
    ram.memory().write_slice(&page_of(2), GuestAddress(3 * PAGE)).unwrap();
    ram.clear_image().unwrap();
    assert_eq!([3, 4].map(|page| committed(&ram, page)), [0, 0]);
    assert_eq!([3, 4].map(|page| seen(&ram, page)), [2, 0]);
}

#[test]
fn shared_writes_are_the_image() {
    let ram = GuestRam::new(SMALL, Mapping::Shared).unwrap();
    ram.memory().write_slice(&page_of(2), GuestAddress(3 * PAGE)).unwrap();
    assert_eq!(committed(&ram, 3), 2);
    ram.revert(&PageSet::full(ram.pages())).unwrap();
    assert_eq!(seen(&ram, 3), 2);
}

#[test]
fn pages_past_the_end_are_errors() {
    let ram = GuestRam::new(SMALL, Mapping::Shared).unwrap();
    let mut content = page_of(0);
    for page in [ram.pages(), u64::MAX] {
        assert!(matches!(
            ram.read_page(page, &mut content),
            Err(MemoryError::NoPage { .. })
        ));
        assert!(matches!(
            ram.read_committed(page, &mut content),
            Err(MemoryError::NoPage { .. })
        ));
        assert!(matches!(
            ram.write_committed(page, &content),
            Err(MemoryError::NoPage { .. })
        ));
    }
}
