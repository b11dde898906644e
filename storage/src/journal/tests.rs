//! Power cuts at every operation and at every byte.

use super::*;
use crate::sim::{SimDisk, SimImage};
use std::sync::Arc;

const SIZE: u64 = 9 * CHUNK + 1024;

fn tag(epoch: u64) -> Tag {
    Tag {
        generation: Generation(2),
        epoch: Epoch(epoch),
    }
}

/// Makes a batch of `(first sector, sectors, value)`; zeros are kept as such.
fn batch(writes: &[(u64, usize, u8)]) -> SectorMap {
    let mut batch = SectorMap::default();
    for (sector, count, value) in writes {
        match value {
            0 => batch.zero(sector * 512, *count as u64 * 512),
            value => batch.write(sector * 512, &vec![*value; count * 512]),
        }
    }
    batch
}

fn on(image: &SimImage, batch: &SectorMap) -> io::Result<()> {
    apply(image, batch, &crate::backed::Backed::default())
}

fn patched(base: &[u8], batch: &SectorMap) -> Vec<u8> {
    let mut content = base.to_vec();
    batch.read(0, &mut content);
    content
}

/// Does what a commit job does; tells whether the journal had been flushed when it ended.
fn commit(image: &SimImage, journal: &SimImage, last: Last, batch: &SectorMap) -> (bool, io::Result<()>) {
    let mut promised = false;
    let mut steps = || {
        write(journal, image.size(), last, batch)?;
        journal.flush()?;
        promised = true;
        on(image, batch)?;
        image.flush()?;
        retire(journal, image.size(), last)
    };
    let result = steps();
    (promised, result)
}

struct World {
    disk: Arc<SimDisk>,
    image: Arc<SimImage>,
    journal: Arc<SimImage>,
    before: Vec<u8>,
}

/// A disk with content, and a journal that has committed a batch before.
fn world(seed: u64, first: &SectorMap) -> World {
    let disk = SimDisk::new(seed);
    let (image, journal) = (disk.image(SIZE), disk.image(size_for(SIZE)));
    image.set_content(&vec![0xee; to_usize(SIZE)]);
    let last = Last {
        tag: tag(1),
        kind: Kind::Commit,
    };
    commit(&image, &journal, last, first).1.unwrap();
    World {
        before: image.content(),
        disk,
        image,
        journal,
    }
}

fn shapes() -> Vec<(SectorMap, SectorMap)> {
    vec![
        (batch(&[(0, 8, 1)]), batch(&[(3, 4, 2), (40, 9, 3), (72, 2, 4)])),
        (batch(&[(0, 74, 1)]), batch(&[(1, 1, 2)])),
        (batch(&[(8, 16, 1)]), batch(&[(8, 16, 2)])),
        (batch(&[(0, 40, 0)]), batch(&[(3, 40, 0), (9, 2, 6), (56, 16, 0)])),
        (SectorMap::default(), batch(&[(0, 74, 5)])),
    ]
}

#[test]
fn case_31_a_crash_at_every_step_of_commit_and_recovery_leaves_one_state() {
    let (mut old, mut new) = (0, 0);
    for (first, second) in &shapes() {
        for kind in [Kind::Commit, Kind::TakeOver] {
            for seed in 0..12 {
                for cut in 0.. {
                    let World {
                        disk,
                        image,
                        journal,
                        before,
                    } = world(seed, first);
                    let after = patched(&before, second);
                    disk.cut_power_after(cut);
                    let last = Last { tag: tag(2), kind };
                    let (promised, result) = commit(&image, &journal, last, second);
                    disk.power_cycle();
                    // The power fails again during the recovery, at each of its steps.
                    for again in 0..6 {
                        disk.cut_power_after(again);
                        let _ = recover(&*image, &*journal);
                        disk.power_cycle();
                    }
                    let recovery = recover(&*image, &*journal).unwrap();
                    let content = image.content();
                    assert!(
                        content == before || content == after,
                        "a mixture: cut {cut}, seed {seed}"
                    );
                    assert!(
                        !promised || content == after,
                        "a promised batch is lost: cut {cut}, seed {seed}"
                    );
                    if content == after {
                        new += 1;
                    } else {
                        old += 1;
                        assert_ne!(recovery.last(), Some(last), "the journal claims what the base has not");
                    }
                    if promised {
                        assert_eq!(recovery.last(), Some(last));
                    }
                    assert_eq!(recover(&*image, &*journal).unwrap().last(), recovery.last());
                    assert_eq!(
                        image.content(),
                        content,
                        "a recovery is harmless as often as it happens"
                    );
                    if result.is_ok() {
                        break;
                    }
                }
            }
        }
    }
    assert!(old > 100 && new > 100, "both outcomes are exercised: {old} {new}");
}

#[test]
fn a_journal_torn_at_any_byte_is_the_old_one_the_new_one_or_none() {
    for (first, second) in &shapes()[..4] {
        let World {
            image, journal, before, ..
        } = world(1, first);
        let after = patched(&before, second);
        let old = journal.content();
        write(
            &*journal,
            SIZE,
            Last {
                tag: tag(2),
                kind: Kind::Commit,
            },
            second,
        )
        .unwrap();
        let new = journal.content();
        let used = to_usize(INDEX_AT + index_bytes(9) + 10 * CHUNK).min(new.len());
        let cuts = (0..=520).chain((520..used).step_by(61)).chain((4096..4400).step_by(1));
        for cut in cuts {
            for (head, tail) in [(&new, &old), (&old, &new)] {
                let torn = [&head[..cut], &tail[cut..]].concat();
                image.set_content(&before);
                journal.set_content(&torn);
                match recover(&*image, &*journal).unwrap() {
                    Recovery::Replayed(Last { tag: found, .. }) if found == tag(2) => {
                        assert_eq!(image.content(), after, "cut {cut}");
                    }
                    _ => assert_eq!(image.content(), before, "cut {cut}"),
                }
            }
        }
    }
}

#[test]
fn a_flipped_bit_never_reaches_the_base() {
    let (first, second) = &shapes()[0];
    let World {
        image, journal, before, ..
    } = world(1, first);
    write(
        &*journal,
        SIZE,
        Last {
            tag: tag(2),
            kind: Kind::Commit,
        },
        second,
    )
    .unwrap();
    let whole = journal.content();
    let data_at = to_usize(INDEX_AT + index_bytes(second.iter().len() as u64));
    let used = data_at + second.iter().len() * CHUNK_BYTES;
    let cuts = (0..512)
        .chain(4096..4096 + 16 * second.iter().len())
        .chain((data_at..used).step_by(97));
    for at in cuts {
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        journal.set_content(&bytes);
        image.set_content(&before);
        assert_eq!(recover(&*image, &*journal).unwrap(), Recovery::Discarded, "byte {at}");
        assert_eq!(image.content(), before);
    }
}

#[test]
fn forged_journals_with_good_checksums_are_errors() {
    let World {
        image, journal, before, ..
    } = world(1, &SectorMap::default());
    let last = Last {
        tag: tag(2),
        kind: Kind::Commit,
    };
    let forge = |writes: &[(u64, usize, u8)], image_bytes| write(&*journal, image_bytes, last, &batch(writes)).unwrap();
    forge(&[(0, 1, 1), (74, 1, 2)], SIZE);
    assert!(
        matches!(recover(&*image, &*journal), Err(RecoverError::Damaged { .. })),
        "one sector too far"
    );
    forge(&[(u64::MAX / 1024, 1, 1)], SIZE);
    assert!(matches!(recover(&*image, &*journal), Err(RecoverError::Damaged { .. })));
    forge(&[(0, 1, 1)], SIZE + 512);
    assert!(matches!(recover(&*image, &*journal), Err(RecoverError::Foreign { .. })));
    retire(&*journal, SIZE + 512, last).unwrap();
    assert_eq!(
        recover(&*image, &*journal).unwrap(),
        Recovery::Fresh,
        "an image may be resized between two runs"
    );
    for zeros in [0..u64::MAX >> 9, 9..10, 1 << 52..(1 << 52) + 1] {
        let index = [
            zeros.start.to_le_bytes(),
            ((zeros.end - zeros.start) << 8).to_le_bytes(),
        ]
        .concat();
        forge_index(&journal, last, &index);
        assert!(
            matches!(recover(&*image, &*journal), Err(RecoverError::Damaged { .. })),
            "{zeros:?}"
        );
    }
    let huge = Header {
        version: VERSION,
        full: true,
        last,
        image_bytes: SIZE,
        count: u64::MAX / 8,
        digest: [0; 32],
    };
    journal.write_at(0, &huge.encode()).unwrap();
    assert_eq!(recover(&*image, &*journal).unwrap(), Recovery::Discarded);
    assert_eq!(image.content(), before);
}

/// Writes a whole journal of the first version with one write.
fn write_first_version(journal: &SimImage, last: Last) {
    let mut header = Header {
        version: 1,
        full: true,
        last,
        image_bytes: SIZE,
        count: 1,
        digest: [0; 32],
    };
    let index = [3_u64.to_le_bytes(), 0x81_u64.to_le_bytes()].concat();
    let data = [7; CHUNK_BYTES];
    header.digest = *header.hasher().update(&index).update(&data).finalize().as_bytes();
    journal.write_at(INDEX_AT, &index).unwrap();
    journal.write_at(header.data_at(), &data).unwrap();
    journal.write_at(0, &header.encode()).unwrap();
}

#[test]
fn a_journal_of_the_first_version_is_brought_in_and_one_of_a_later_is_left_alone() {
    let World {
        image, journal, before, ..
    } = world(1, &SectorMap::default());
    let last = Last {
        tag: tag(2),
        kind: Kind::Commit,
    };
    write_first_version(&journal, last);
    assert_eq!(&journal.content()[..8], b"TandemJ1");
    assert_eq!(recover(&*image, &*journal).unwrap(), Recovery::Replayed(last));
    let content = image.content();
    assert_eq!((content[3 * CHUNK_BYTES], content[4 * CHUNK_BYTES - 1]), (7, 7));
    assert_eq!(content[3 * CHUNK_BYTES + 512], before[3 * CHUNK_BYTES + 512]);
    assert_eq!(recover(&*image, &*journal).unwrap(), Recovery::Clean(last));
    let later = Header {
        version: VERSION + 1,
        full: true,
        last,
        image_bytes: SIZE,
        count: 0,
        digest: [0; 32],
    };
    journal.write_at(0, &later.encode()).unwrap();
    let left = journal.content();
    let error = recover(&*image, &*journal).unwrap_err();
    assert!(matches!(error, RecoverError::Version { version: 3 }));
    assert!(error.to_string().contains("run the newer program"), "{error}");
    assert!(journal.content() == left && image.content() == content);
}

/// Writes a journal with any index and no chunks, whose digest holds.
fn forge_index(journal: &SimImage, last: Last, index: &[u8]) {
    let mut header = Header {
        version: VERSION,
        full: true,
        last,
        image_bytes: SIZE,
        count: (index.len() / INDEX_ENTRY) as u64,
        digest: [0; 32],
    };
    header.digest = *header.hasher().update(index).finalize().as_bytes();
    journal.write_at(INDEX_AT, index).unwrap();
    journal.write_at(0, &header.encode()).unwrap();
}

#[test]
fn sizes_and_batches_agree() {
    for chunks in [0, 1, 255, 256, 257, 65_536] {
        let batch = chunks * CHUNK;
        assert_eq!(batch_for(size_for(batch)), batch);
        assert_eq!(
            batch_for(size_for(batch).saturating_sub(512)),
            batch.saturating_sub(CHUNK)
        );
    }
    assert_eq!(batch_for(0), 0);
}

#[test]
fn a_batch_of_many_pieces_comes_back_whole() {
    let disk = SimDisk::new(3);
    let size = 600 * CHUNK;
    let (image, journal) = (disk.image(size), disk.image(size_for(size)));
    let mut batch = SectorMap::default();
    for sector in 0..600 * 8 {
        if sector % 7 != 3 {
            batch.write(sector * 512, &[u8::try_from(sector % 251).unwrap(); 512]);
        }
    }
    let last = Last {
        tag: tag(1),
        kind: Kind::TakeOver,
    };
    write(&*journal, size, last, &batch).unwrap();
    journal.flush().unwrap();
    disk.power_cycle();
    assert_eq!(recover(&*image, &*journal).unwrap(), Recovery::Replayed(last));
    assert!(image.content() == patched(&vec![0; to_usize(size)], &batch));
    assert_eq!(recover(&*image, &*journal).unwrap(), Recovery::Clean(last));
}

#[test]
fn a_batch_does_not_come_back_over_what_is_written_after_a_start() {
    for seed in 0..64 {
        let World {
            disk, image, journal, ..
        } = world(seed, &batch(&[(0, 8, 1)]));
        // The process dies after the commit, the host lives: its retired journal is not durable.
        if seed % 2 == 0 {
            disk.fail_flushes(true);
            recover(&*image, &*journal).unwrap_err();
            disk.fail_flushes(false);
        }
        assert!(matches!(recover(&*image, &*journal).unwrap(), Recovery::Clean(_)));
        image.write_at(0, &[2; 4096]).unwrap();
        image.flush().unwrap();
        disk.power_cycle();
        recover(&*image, &*journal).unwrap();
        assert_eq!(image.content()[..4096], [2; 4096], "seed {seed}");
    }
}

/// A base that is half way to the next state needs a journal that brings it there.
#[test]
fn a_journal_that_a_failed_flush_has_lost_is_durable_before_it_is_applied() {
    for seed in 0..200 {
        let first = batch(&[(0, 8, 1)]);
        let World {
            disk,
            image,
            journal,
            before,
        } = world(seed, &first);
        let second = batch(&[(0, 40, 2)]);
        let last = Last {
            tag: tag(2),
            kind: Kind::Commit,
        };
        write(&*journal, image.size(), last, &second).unwrap();
        disk.fail_flushes(true);
        journal.flush().unwrap_err();
        disk.fail_flushes(false);
        // The process is started again, and the power fails while the journal is brought in.
        disk.cut_power_after(1 + seed % 12);
        let _ = recover(&*image, &*journal);
        disk.power_cycle();
        let recovery = recover(&*image, &*journal).unwrap();
        let is_new = recovery.last() == Some(last);
        let expected = if is_new { patched(&before, &second) } else { before };
        assert!(image.content() == expected, "seed {seed}: {recovery:?}");
    }
}
