//! The replica against flat arrays, and what it does when space or the disk fails.

use super::*;
use crate::journal::{Recovery, recover};
use crate::sectors::to_usize;
use crate::sim::{SimDisk, SimImage};
use proptest::prelude::*;

const SIZE: u64 = 160 * 1024 + 512;
const SECTORS: u64 = SIZE / 512;
const LIMITS: Limits = Limits {
    overlay: 1 << 20,
    staged: 1 << 20,
};

fn tag(epoch: u64) -> Tag {
    Tag {
        generation: Generation(5),
        epoch: Epoch(epoch),
    }
}

fn files(seed: u64) -> (Arc<SimDisk>, Arc<SimImage>, Arc<SimImage>) {
    let disk = SimDisk::new(seed);
    let (image, journal) = (disk.image(SIZE), disk.image(journal::size_for(LIMITS.batch(SIZE))));
    journal.reserve(0, journal.size()).unwrap();
    (disk, image, journal)
}

fn replica(seed: u64) -> (Arc<SimDisk>, Arc<SimImage>, Arc<SimImage>, Replica<SimImage>) {
    let (disk, image, journal) = files(seed);
    let replica = Replica::new(Arc::clone(&image), Arc::clone(&journal), LIMITS, tag(0));
    (disk, image, journal, replica)
}

fn bytes(value: u8, sectors: usize) -> Vec<u8> {
    vec![value; sectors * 512]
}

fn data(value: u8, sectors: usize) -> Written {
    Written::Data(bytes(value, sectors).into())
}

fn view(replica: &Replica<SimImage>) -> Vec<u8> {
    let mut content = vec![0; to_usize(SIZE)];
    replica.read(0, &mut content).unwrap();
    content
}

#[derive(Clone, Debug)]
enum Op {
    /// From a sector on so many; zeros without a value.
    Write(u64, usize, Option<u8>),
    Stage(u64, u64, usize, Option<u8>),
    Commit,
    Job,
    Abandon,
    TakeOver,
    /// The host's file system has no room left, or has some again.
    Fill(bool),
}

fn op() -> impl Strategy<Value = Op> {
    let long = (0..SECTORS - 150, 30_usize..150, Just(None));
    let short = (0..SECTORS - 20, 1_usize..20, prop::option::weighted(0.7, any::<u8>()));
    let range = prop_oneof![5 => short, 1 => long];
    prop_oneof![
        6 => range.clone().prop_map(|(sector, count, value)| Op::Write(sector, count, value)),
        6 => (1_u64..3, range).prop_map(|(ahead, (sector, count, value))| Op::Stage(ahead, sector, count, value)),
        4 => Just(Op::Commit),
        3 => Just(Op::Job),
        1 => Just(Op::Abandon),
        1 => any::<bool>().prop_map(Op::Fill),
        1 => prop::bool::weighted(0.2).prop_map(|take| if take { Op::TakeOver } else { Op::Job }),
    ]
}

/// The same disk as flat arrays.
struct Model {
    /// What the guest sees.
    speculative: Vec<u8>,
    /// The state of each commit.
    states: BTreeMap<Epoch, Vec<u8>>,
    taken_over: Option<Vec<u8>>,
    staged: BTreeMap<Epoch, Vec<(u64, Vec<u8>)>>,
    /// What the base holds for sure.
    base: Vec<u8>,
    last: Epoch,
}

impl Model {
    fn target(&self, last: Last) -> Vec<u8> {
        match last.kind {
            Kind::Commit => self.states[&last.tag.epoch].clone(),
            Kind::TakeOver => self.taken_over.clone().unwrap(),
        }
    }

    fn commit(&mut self) -> Epoch {
        let epoch = self.last.next();
        let mut state = self.states[&self.last].clone();
        for (_, writes) in self.staged.extract_if(..=epoch, |_, _| true) {
            writes.iter().for_each(|(offset, data)| put(&mut state, *offset, data));
        }
        self.speculative = state.clone();
        self.states.insert(epoch, state);
        self.last = epoch;
        epoch
    }
}

fn put(flat: &mut [u8], offset: u64, data: &[u8]) {
    flat[to_usize(offset)..][..data.len()].copy_from_slice(data);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Reads always see the committed state plus the guest's own writes, the base always is one whole state, a job never
    /// lacks room, and a power cut at the end leaves the state before or after the job that was running.
    #[test]
    fn the_replica_is_two_flat_disks(ops in prop::collection::vec(op(), 1..60), seed: u64, cut in prop::option::of(0_u64..12)) {
        let (disk, image, journal, mut replica) = replica(seed);
        let zeros = vec![0; to_usize(SIZE)];
        let mut model = Model {
            speculative: zeros.clone(), states: [(Epoch(0), zeros.clone())].into(), taken_over: None,
            staged: BTreeMap::new(), base: zeros, last: Epoch(0),
        };
        let (mut running, mut full) = (None, false);
        for op in ops {
            match op {
                Op::Write(sector, count, value) => {
                    let data = bytes(value.unwrap_or(0), count);
                    let kept = match value {
                        Some(_) => replica.write(sector * 512, &data),
                        None => replica.zero(sector * 512, data.len() as u64),
                    };
                    match kept {
                        Ok(()) => put(&mut model.speculative, sector * 512, &data),
                        Err(error) => prop_assert!(full && matches!(error, DiskError::Io(_)), "{error}"),
                    }
                }
                Op::Fill(fill) => {
                    full = fill;
                    disk.set_free(if fill { 0 } else { u64::MAX });
                }
                Op::Stage(ahead, sector, count, value) => {
                    let (epoch, data) = (Epoch(model.last.0 + ahead), bytes(value.unwrap_or(0), count));
                    let written = match value {
                        Some(_) => Written::Data(data.clone().into()),
                        None => Written::Zeros(data.len() as u64),
                    };
                    let staged = replica.stage(epoch, sector * 512, &written);
                    if model.taken_over.is_some() {
                        prop_assert_eq!(staged, Err(StageError::Promoted));
                    } else {
                        staged.unwrap();
                        model.staged.entry(epoch).or_default().push((sector * 512, data));
                    }
                }
                Op::Commit if model.taken_over.is_none() => {
                    let epoch = model.last.next();
                    match replica.reserve(epoch) {
                        Err(ReserveError::Busy) => prop_assert!(running.is_some()),
                        Err(ReserveError::Io(_)) => prop_assert!(full),
                        other => {
                            other.unwrap();
                            model.commit();
                            let job = replica.commit(epoch);
                            prop_assert_eq!(job.is_some(), running.is_none());
                            running = running.or(job);
                        }
                    }
                }
                Op::TakeOver if model.taken_over.is_none() => {
                    model.taken_over = Some(model.speculative.clone());
                    model.staged.clear();
                    let job = replica.take_over();
                    prop_assert_eq!(job.is_some(), running.is_none());
                    running = running.or(job);
                }
                Op::Abandon => {
                    replica.abandon();
                    model.staged.clear();
                }
                Op::Job => if let Some(job) = running.take() {
                    let target = model.target(job.last());
                    let done = job.run().unwrap();
                    model.base = target;
                    prop_assert!(image.content() == model.base, "the base is the state of the job");
                    running = replica.committed(&done);
                },
                Op::Commit | Op::TakeOver => {}
            }
            prop_assert!(view(&replica) == model.speculative);
            prop_assert_eq!(replica.is_settled(), model.taken_over.is_some() && running.is_none());
        }
        let mut either = model.base.clone();
        let mut promised = None;
        if let (Some(job), Some(cut)) = (running, cut) {
            either = model.target(job.last());
            disk.cut_power_after(cut);
            promised = job.run().ok();
        }
        disk.power_cycle();
        let recovery = recover(&*image, &*journal).unwrap();
        let content = image.content();
        prop_assert!(content == either || (content == model.base && promised.is_none()));
        if let Some(last) = recovery.last() {
            prop_assert!(content == model.target(last), "the journal tells what the base is");
        }
    }
}

#[test]
fn the_guest_never_sees_the_primarys_writes_before_the_commit() {
    let (_, _, _, mut replica) = replica(0);
    replica.stage(Epoch(1), 0, &data(1, 8)).unwrap();
    replica.stage(Epoch(2), 0, &data(2, 1)).unwrap();
    replica.write(512, &bytes(9, 2)).unwrap();
    assert_eq!(view(&replica)[..2048], [bytes(0, 1), bytes(9, 2), bytes(0, 1)].concat());
    replica.reserve(Epoch(1)).unwrap();
    let job = replica.commit(Epoch(1)).unwrap();
    assert_eq!(view(&replica)[..4096], [1; 4096], "at once, before the job has run");
    assert_eq!(
        (
            replica.overlay_bytes(),
            replica.staged_bytes(),
            replica.committing_bytes()
        ),
        (0, 4096, 4096)
    );
    assert_eq!(replica.last(), tag(1));
    let done = job.run().unwrap();
    assert_eq!((done.last().tag, done.bytes()), (tag(1), 4096));
    assert!(replica.committed(&done).is_none());
    assert_eq!(view(&replica)[..4096], [1; 4096]);
}

#[test]
fn commits_meanwhile_join_and_a_takeover_comes_last() {
    let (_, image, journal, mut replica) = replica(0);
    let commit = |replica: &mut Replica<SimImage>, epoch| {
        replica
            .stage(Epoch(epoch), epoch * 512, &data(u8::try_from(epoch).unwrap(), 1))
            .unwrap();
        replica.reserve(Epoch(epoch)).unwrap();
        replica.commit(Epoch(epoch))
    };
    let first = commit(&mut replica, 1).unwrap();
    assert!(commit(&mut replica, 2).is_none());
    assert!(commit(&mut replica, 3).is_none());
    replica.write(0, &bytes(7, 1)).unwrap();
    assert!(replica.take_over().is_none());
    assert_eq!(replica.flush(), Flush::AfterTakeover);
    replica.write(5 * 512, &bytes(8, 1)).unwrap();
    let joined = replica.committed(&first.run().unwrap()).unwrap();
    assert_eq!(
        joined.last(),
        Last {
            tag: tag(3),
            kind: Kind::Commit
        }
    );
    let takeover = replica.committed(&joined.run().unwrap()).unwrap();
    assert_eq!(
        takeover.last(),
        Last {
            tag: tag(3),
            kind: Kind::TakeOver
        }
    );
    assert!(!replica.is_settled());
    assert!(replica.committed(&takeover.run().unwrap()).is_none());
    assert!(replica.is_settled());
    assert_eq!(
        image.content()[5 * 512],
        0,
        "written after the takeover, still in memory"
    );
    replica.into_image().unwrap();
    let expected: Vec<u8> = [7, 1, 2, 3, 0, 8].iter().flat_map(|value| [*value; 512]).collect();
    assert_eq!(image.content()[..6 * 512], expected);
    assert!(matches!(recover(&*image, &*journal), Ok(Recovery::Clean(_))));
}

#[test]
fn case_34_after_a_takeover_no_old_journal_comes_back_over_new_writes() {
    for seed in 0..64 {
        let (disk, image, journal, mut replica) = replica(seed);
        replica.write(0, &bytes(1, 1)).unwrap();
        let job = replica.take_over().unwrap();
        assert!(replica.committed(&job.run().unwrap()).is_none());
        let image_again = replica.into_image().unwrap();
        image_again.write_at(0, &bytes(2, 1)).unwrap();
        image_again.flush().unwrap();
        disk.power_cycle();
        recover(&*image, &*journal).unwrap();
        assert_eq!(image.content()[..512], [2; 512]);
    }
}

#[test]
fn case_33_a_power_cut_at_every_step_of_the_job_leaves_one_state() {
    for (seed, takeover) in (0..24).flat_map(|seed| [(seed, false), (seed, true)]) {
        for cut in 0.. {
            let (disk, image, journal, mut replica) = replica(seed);
            let job = if takeover {
                replica.write(512, &bytes(1, 99)).unwrap();
                replica.take_over().unwrap()
            } else {
                replica.stage(Epoch(1), 512, &data(1, 99)).unwrap();
                replica.stage(Epoch(1), 4096, &Written::Zeros(80 * 1024)).unwrap();
                replica.stage(Epoch(1), 65_536, &data(2, 3)).unwrap();
                replica.reserve(Epoch(1)).unwrap();
                replica.commit(Epoch(1)).unwrap()
            };
            let after = view(&replica);
            disk.cut_power_after(cut);
            let result = job.run();
            disk.power_cycle();
            let recovery = recover(&*image, &*journal).unwrap();
            if image.content() != after {
                assert!(image.content().iter().all(|byte| *byte == 0), "a mixture: cut {cut}");
                assert!(matches!(result, Err(CommitError::Journal(_))), "cut {cut}: {result:?}");
                assert_eq!(recovery.last(), None);
            }
            if result.is_ok() {
                break;
            }
        }
    }
}

#[test]
fn a_sync_is_not_overwritten_by_an_old_journal() {
    for seed in 0..64 {
        let (disk, image, journal, mut replica) = replica(seed);
        replica.stage(Epoch(1), 0, &data(1, 1)).unwrap();
        replica.reserve(Epoch(1)).unwrap();
        let job = replica.commit(Epoch(1)).unwrap();
        assert!(replica.committed(&job.run().unwrap()).is_none());
        let base = replica.begin_sync().unwrap();
        base.write_at(0, &bytes(2, 1)).unwrap();
        base.flush().unwrap();
        replica.end_sync(tag(7));
        assert_eq!(replica.last(), tag(7));
        disk.power_cycle();
        recover(&*image, &*journal).unwrap();
        assert_eq!(image.content()[..512], [2; 512]);
    }
}

#[test]
fn case_29_a_full_disk_is_noticed_before_the_commit_point() {
    let (disk, _, _, mut replica) = replica(0);
    disk.set_free(BLOCK);
    replica.stage(Epoch(1), 0, &data(1, 1)).unwrap();
    replica.stage(Epoch(1), BLOCK, &data(1, 1)).unwrap();
    assert!(
        matches!(replica.reserve(Epoch(1)), Err(ReserveError::Io(error)) if error.kind() == io::ErrorKind::StorageFull)
    );
    replica.abandon();
    replica.stage(Epoch(2), 0, &data(2, 1)).unwrap();
    replica.reserve(Epoch(2)).unwrap();
    let done = replica.commit(Epoch(2)).unwrap().run().unwrap();
    assert!(replica.committed(&done).is_none());
    assert!(
        matches!(replica.write(BLOCK, &bytes(3, 1)), Err(DiskError::Io(error)) if error.kind() == io::ErrorKind::StorageFull)
    );
    replica.write(512, &bytes(3, 1)).unwrap();
    replica.take_over().unwrap().run().unwrap();
}

#[test]
fn case_30_a_disk_that_fails_after_the_commit_point_stops_this_side_and_recovers_later() {
    for (seed, flushes) in (0..32).flat_map(|seed| [(seed, false), (seed, true)]) {
        let (disk, image, journal, mut replica) = replica(seed);
        replica.stage(Epoch(1), 0, &data(1, 60)).unwrap();
        replica.reserve(Epoch(1)).unwrap();
        let job = replica.commit(Epoch(1)).unwrap();
        disk.fail_flushes(flushes);
        disk.fail_writes(!flushes);
        assert!(matches!(job.run(), Err(CommitError::Journal(_))));
        disk.power_cycle();
        recover(&*image, &*journal).unwrap();
        let content = image.content();
        assert!(content[..60 * 512] == [1; 60 * 512] || content.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_discard_gives_room_back_only_where_nobody_counts_on_it() {
    let (disk, image, _, mut replica) = replica(0);
    image.set_content(&vec![1; to_usize(SIZE)]);
    image.reserve(0, SIZE).unwrap();
    disk.set_free(0);
    replica.stage(Epoch(1), 0, &Written::Zeros(SIZE - 512)).unwrap();
    replica.reserve(Epoch(1)).unwrap();
    let discards = replica.commit(Epoch(1)).unwrap();
    // Room is found while that job has not run yet, and is there when it has.
    replica.stage(Epoch(2), BLOCK, &data(2, 1)).unwrap();
    replica.reserve(Epoch(2)).unwrap();
    assert!(replica.commit(Epoch(2)).is_none());
    replica.write(0, &bytes(3, 1)).unwrap();
    let next = replica.committed(&discards.run().unwrap()).unwrap();
    assert!(replica.committed(&next.run().unwrap()).is_none());
    let done = replica.take_over().unwrap().run().unwrap();
    assert!(replica.committed(&done).is_none());
    let expected = [bytes(3, 1), vec![0; to_usize(BLOCK) - 512], bytes(2, 1)].concat();
    assert!(image.content()[..expected.len()] == expected);
    let refused = image.write_at(2 * BLOCK, &bytes(4, 1)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::StorageFull, "this room went back");
}

#[test]
fn a_long_discard_costs_no_more_than_a_short_one() {
    let disk = SimDisk::new(0);
    let size = 64 << 20;
    let (image, journal) = (disk.image(size), disk.image(journal::size_for(8 * 4096)));
    let limits = Limits {
        overlay: 8 * 4096,
        staged: 8 * 4096,
    };
    let mut replica = Replica::new(image, journal, limits, tag(0));
    replica.zero(512, size - 1024).unwrap();
    replica.stage(Epoch(1), 512, &Written::Zeros(size - 1024)).unwrap();
    assert_eq!((replica.overlay_bytes(), replica.staged_bytes()), (3 * 4096, 3 * 4096));
    replica.stage(Epoch(1), 0, &Written::Zeros(size)).unwrap();
    assert_eq!(replica.staged_bytes(), 4096);
    for extent in 1..6 {
        replica.zero(8192 * extent, 4096).unwrap();
    }
    assert!(matches!(replica.zero(512, 8192), Err(DiskError::OverlayFull)) || replica.overlay_bytes() <= 8 * 4096);
    replica.reserve(Epoch(1)).unwrap();
    let before = disk.operations();
    assert!(replica.commit(Epoch(1)).unwrap().run().is_ok());
    // A few for each 4 MiB, whatever the number of sectors.
    assert!(disk.operations() - before < 30);
}

#[test]
fn what_a_primary_must_not_send_is_refused() {
    let (_, _, _, mut replica) = replica(0);
    for (offset, len) in [
        (1, 512),
        (0, 511),
        (SIZE, 512),
        (512, SIZE),
        (u64::MAX - 511, 512),
        (512, u64::MAX - 511),
    ] {
        assert!(matches!(
            replica.stage(Epoch(1), offset, &Written::Zeros(len)),
            Err(StageError::Range(_))
        ));
        assert!(matches!(replica.zero(offset, len), Err(DiskError::Range(_))));
    }
    assert!(matches!(
        replica.stage(Epoch(1), 1, &data(0, 1)),
        Err(StageError::Range(_))
    ));
    assert!(matches!(
        replica.stage(Epoch(1), SIZE, &data(0, 1)),
        Err(StageError::Range(_))
    ));
    assert!(matches!(
        replica.stage(Epoch(1), u64::MAX - 511, &data(0, 1)),
        Err(StageError::Range(_))
    ));
    assert!(matches!(
        replica.stage(Epoch(0), 0, &data(0, 1)),
        Err(StageError::Sealed { .. })
    ));
    for epoch in 1..=BUFFERS_MAX as u64 {
        replica.stage(Epoch(epoch), 0, &data(0, 1)).unwrap();
    }
    assert_eq!(replica.stage(Epoch(99), 0, &data(0, 1)), Err(StageError::TooManyEpochs));
    replica.reserve(Epoch(1)).unwrap();
    assert!(matches!(
        replica.stage(Epoch(1), 0, &data(0, 1)),
        Err(StageError::Sealed { .. })
    ));
}

#[test]
fn memory_is_bounded_and_a_checkpoint_is_asked_for_before() {
    let (_, image, journal) = files(0);
    let limits = Limits {
        overlay: 8 * 4096,
        staged: 8 * 4096,
    };
    let mut replica = Replica::new(image, journal, limits, tag(0));
    for chunk in 0..6 {
        assert!(!replica.near_limit());
        replica.write(chunk * 4096, &bytes(1, 1)).unwrap();
    }
    assert!(replica.near_limit());
    replica.write(6 * 4096, &bytes(1, 16)).unwrap();
    assert!(matches!(
        replica.write(9 * 4096, &bytes(1, 1)),
        Err(DiskError::OverlayFull)
    ));
    replica.write(0, &bytes(2, 64)).unwrap();
    assert_eq!(replica.overlay_bytes(), 8 * 4096);
    replica.stage(Epoch(1), 0, &data(1, 40)).unwrap();
    replica.stage(Epoch(2), 0, &data(1, 24)).unwrap();
    assert_eq!(
        replica.stage(Epoch(2), 24 * 512, &data(1, 1)),
        Err(StageError::TooMuch { limit: 8 * 4096 })
    );
}

#[test]
fn commits_that_wait_never_outgrow_the_journal() {
    let (_, image, journal) = files(0);
    let limits = Limits {
        overlay: 4096,
        staged: SIZE,
    };
    let capacity = journal::batch_for(journal.size());
    let mut replica = Replica::new(Arc::clone(&image), journal, limits, tag(0));
    let commit = |replica: &mut Replica<SimImage>, epoch, first: u64, sectors| {
        replica
            .stage(Epoch(epoch), first * 512, &data(u8::try_from(epoch).unwrap(), sectors))
            .unwrap();
        replica.reserve(Epoch(epoch)).map(|()| replica.commit(Epoch(epoch)))
    };
    let first = commit(&mut replica, 1, 0, 8).unwrap().unwrap();
    assert!(commit(&mut replica, 2, 0, 260).unwrap().is_none());
    assert!(matches!(commit(&mut replica, 3, 60, 260), Err(ReserveError::Busy)));
    assert!(matches!(replica.reserve(Epoch(3)), Err(ReserveError::Busy)));
    let second = replica.committed(&first.run().unwrap()).unwrap();
    replica.reserve(Epoch(3)).unwrap();
    assert!(replica.commit(Epoch(3)).is_none());
    assert!(replica.committing_bytes() <= 2 * capacity);
    let third = replica.committed(&second.run().unwrap()).unwrap();
    assert!(replica.committed(&third.run().unwrap()).is_none());
    assert_eq!(image.content(), view(&replica));
    assert_eq!(image.content()[59 * 512..61 * 512], [[2; 512], [3; 512]].concat());
}

#[test]
#[should_panic(expected = "not reserved")]
fn a_commit_needs_a_reservation() {
    let (_, _, _, mut replica) = replica(0);
    let _ = replica.commit(Epoch(1));
}

#[test]
fn commits_on_a_real_file_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let open = || {
        let image = Arc::new(crate::FileImage::open(&path).unwrap());
        let (journal, new) =
            crate::FileImage::open_journal(crate::Record::journal_for(&path), LIMITS.batch(SIZE)).unwrap();
        new.into_iter().for_each(crate::NewFile::keep);
        (image, Arc::new(journal))
    };
    let (image, journal) = open();
    assert_eq!(recover(&*image, &*journal).unwrap(), Recovery::Fresh);
    let mut replica = Replica::new(image, journal, LIMITS, tag(0));
    for epoch in 1..=5 {
        replica
            .stage(Epoch(epoch), epoch * 4096, &data(u8::try_from(epoch).unwrap(), 3))
            .unwrap();
        replica.reserve(Epoch(epoch)).unwrap();
        let job = replica.commit(Epoch(epoch)).unwrap();
        let done = std::thread::spawn(move || job.run().unwrap()).join().unwrap();
        assert!(replica.committed(&done).is_none());
    }
    drop(replica);
    let (image, journal) = open();
    assert_eq!(
        recover(&*image, &*journal).unwrap().last(),
        Some(Last {
            tag: tag(5),
            kind: Kind::Commit
        })
    );
    let mut sector = [0; 512];
    image.read_at(5 * 4096, &mut sector).unwrap();
    assert_eq!(sector, [5; 512]);
    let (smaller, _new) = crate::FileImage::open_journal(dir.path().join("other"), 4096).unwrap();
    let smaller = Arc::new(smaller);
    let recovery = recover(&*smaller, &*journal).unwrap();
    assert_eq!(
        recovery,
        Recovery::Fresh,
        "a retired journal says nothing of another image"
    );
}
