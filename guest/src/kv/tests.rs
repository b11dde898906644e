//! Tests of the store against a disk in memory that can lose and tear what was not flushed.

#![expect(
    clippy::cast_possible_truncation,
    reason = "the numbers of these tests are small, or meant to wrap"
)]

use super::log::{SECTOR, Superblock};
use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

const CAPACITY: u64 = 2048;
const MEMORY: usize = 64 * 1024 * 1024;

/// A disk: what is durable, and the writes since the last flush.
#[derive(Clone)]
struct Disk {
    durable: Vec<u8>,
    pending: Vec<(usize, Vec<u8>)>,
    discards: usize,
}

impl Disk {
    fn new() -> Self {
        Self {
            durable: vec![0; CAPACITY as usize * SECTOR],
            pending: Vec::new(),
            discards: 0,
        }
    }

    fn serve(&mut self, kv: &mut Kv) -> bool {
        let Some(request) = kv.next_request() else { return false };
        match request {
            Request::Read { sector, bytes } => {
                let mut all = self.durable.clone();
                for (at, data) in &self.pending {
                    all[*at..*at + data.len()].copy_from_slice(data);
                }
                let at = sector as usize * SECTOR;
                kv.completed(Ok(&all[at..at + bytes]));
            }
            Request::Write { sector, data } => {
                assert!(data.len().is_multiple_of(SECTOR) && data.len() <= engine::REQUEST_BYTES_MAX);
                let data = data.to_vec();
                assert!(sector as usize * SECTOR + data.len() <= self.durable.len());
                self.pending.push((sector as usize * SECTOR, data));
                kv.completed(Ok(&[]));
            }
            Request::Discard { sector, sectors } => {
                let (at, len) = (sector as usize * SECTOR, sectors as usize * SECTOR);
                assert!(len > 0 && at + len <= self.durable.len());
                self.discards += 1;
                self.pending.push((at, vec![0; len]));
                kv.completed(if self.discards.is_multiple_of(3) {
                    Err(DiskError)
                } else {
                    Ok(&[])
                });
            }
            Request::Flush => {
                self.crash(&[true]);
                kv.completed(Ok(&[]));
            }
        }
        true
    }

    fn settle(&mut self, kv: &mut Kv) {
        while self.serve(kv) {}
    }

    /// Loses each sector not yet flushed for which `kept` (repeated) is false.
    fn crash(&mut self, kept: &[bool]) {
        let mut kept = kept.iter().cycle();
        for (at, data) in self.pending.drain(..) {
            for (index, sector) in data.chunks(SECTOR).enumerate() {
                if *kept.next().unwrap() {
                    let at = at + index * SECTOR;
                    self.durable[at..at + SECTOR].copy_from_slice(sector);
                }
            }
        }
    }

    fn boot(&mut self) -> Kv {
        let mut kv = Kv::on_disk(CAPACITY, false, MEMORY);
        self.settle(&mut kv);
        kv
    }
}

fn content(kv: &Kv) -> Vec<(Vec<u8>, Vec<u8>)> {
    kv.data
        .map
        .iter()
        .map(|(key, value)| (key.to_vec(), value.to_vec()))
        .collect()
}

#[test]
fn a_blank_disk_is_formatted_and_keeps_what_was_set() {
    let mut disk = Disk::new();
    let mut kv = disk.boot();
    assert_eq!(*kv.status(), Status::Ready);
    let ticket = kv.set(b"a", b"1").unwrap();
    assert!(kv.durable() < ticket);
    disk.settle(&mut kv);
    assert_eq!(kv.durable(), ticket);
    kv.set(b"b", &[7; 3000]).unwrap();
    kv.delete(b"a").unwrap();
    disk.settle(&mut kv);
    disk.crash(&[false]);
    let again = disk.boot();
    assert_eq!(content(&again), [(b"b".to_vec(), vec![7; 3000])]);
    assert_eq!(again.used(), kv.used());
}

#[test]
fn nothing_is_durable_before_the_flush() {
    let mut disk = Disk::new();
    let mut kv = disk.boot();
    let ticket = kv.set(b"a", b"1").unwrap();
    assert!(matches!(kv.next_request(), Some(Request::Write { .. })));
    kv.completed(Ok(&[]));
    let later = kv.set(b"a", b"2").unwrap();
    assert_eq!(kv.value(b"a").1, later);
    assert!(kv.durable() < ticket);
    assert_eq!(kv.next_request(), Some(Request::Flush));
    kv.completed(Ok(&[]));
    assert_eq!(kv.durable(), ticket);
    assert!(matches!(kv.next_request(), Some(Request::Write { .. })));
}

#[test]
fn a_torn_tail_is_dropped_reported_and_never_comes_back() {
    let mut disk = Disk::new();
    let mut kv = disk.boot();
    kv.set(b"kept", b"1").unwrap();
    disk.settle(&mut kv);
    // One batch over several sectors, of which the crash keeps all but the first.
    for number in 0..9 {
        kv.set(format!("lost{number}").as_bytes(), &[1; 400]).unwrap();
    }
    assert!(disk.serve(&mut kv));
    disk.crash(&[true, false, true]);
    let mut kv = disk.boot();
    assert!(kv.take_messages().iter().any(|line| line.contains("torn at byte")));
    assert_eq!(*kv.status(), Status::Ready);
    let keys = kv.keys();
    assert!((1..10).contains(&keys));
    assert!(kv.value(b"kept").0.is_some());
    // The same lengths again: records beyond the tear must not be taken for these.
    kv.set(b"lost0", &[2; 400]).unwrap();
    disk.settle(&mut kv);
    let mut again = disk.boot();
    assert!(!again.take_messages().iter().any(|line| line.contains("torn")));
    assert_eq!(content(&again), content(&kv));
}

#[test]
fn a_full_half_is_compacted_into_the_other() {
    let mut disk = Disk::new();
    let mut kv = disk.boot();
    for round in 0_u32..300 {
        kv.set(format!("key{}", round % 5).as_bytes(), &vec![round as u8; 20_000])
            .unwrap();
        disk.settle(&mut kv);
        assert_eq!(kv.durable(), kv.executed());
    }
    let compactions = kv.commits().1;
    assert!(compactions > 5 && disk.discards as u64 == compactions);
    disk.crash(&[false]);
    let again = disk.boot();
    assert_eq!(content(&again), content(&kv));
}

#[test]
fn the_limit_holds_and_a_full_store_still_compacts() {
    let mut disk = Disk::new();
    let mut kv = disk.boot();
    let mut number = 0_u32;
    while kv.set(format!("key{number}").as_bytes(), &[3; 5000]).is_ok() {
        disk.settle(&mut kv);
        number += 1;
    }
    assert_eq!(kv.set(b"one more", &[3; 5000]), Err(Refused::Full));
    assert!(kv.used() <= kv.limit());
    for round in 0..400_u32 {
        kv.set(format!("key{}", round % number).as_bytes(), &[round as u8; 5000])
            .unwrap();
        disk.settle(&mut kv);
    }
    assert_eq!(content(&disk.boot()), content(&kv));
    kv.clear().unwrap();
    disk.settle(&mut kv);
    assert_eq!(disk.boot().keys(), 0);
}

#[test]
fn without_a_writable_disk_writes_are_refused() {
    assert_eq!(Kv::without_disk().set(b"a", b"1"), Err(Refused::ReadOnly));
    let mut disk = Disk::new();
    let mut kv = disk.boot();
    kv.set(b"a", b"1").unwrap();
    disk.settle(&mut kv);
    let mut kv = Kv::on_disk(CAPACITY, true, MEMORY);
    disk.settle(&mut kv);
    assert_eq!(kv.value(b"a").0.as_deref(), Some(&b"1"[..]));
    assert_eq!(kv.set(b"a", b"2"), Err(Refused::ReadOnly));
    assert_eq!(kv.clear(), Err(Refused::ReadOnly));
}

#[test]
fn foreign_small_and_failing_disks_are_told_apart() {
    let reason = |kv: &Kv| match kv.status() {
        Status::Failed(reason) => reason.clone(),
        other => panic!("{other:?}"),
    };
    let mut disk = Disk::new();
    disk.durable[..8].copy_from_slice(b"\xebc\x90mkfs.");
    assert!(reason(&disk.boot()).contains("something else"));
    assert_eq!(&disk.durable[..8], b"\xebc\x90mkfs.");
    let mut small = Kv::on_disk(100, false, MEMORY);
    assert_eq!(small.next_request(), None);
    assert!(reason(&small).contains("smaller than 1024 KiB"));
    let mut kv = Disk::new().boot();
    kv.set(b"a", b"1").unwrap();
    assert!(kv.next_request().is_some());
    kv.completed(Err(DiskError));
    assert!(reason(&kv).contains("error on write"));
    assert_eq!(kv.set(b"a", b"1"), Err(Refused::ReadOnly));
    assert!(kv.durable() < kv.executed());
}

#[test]
fn too_little_memory_for_the_store_is_an_error() {
    let mut disk = Disk::new();
    let mut kv = disk.boot();
    kv.set(b"a", &[1; 10_000]).unwrap();
    disk.settle(&mut kv);
    let mut kv = Kv::on_disk(CAPACITY, false, 5_000);
    disk.settle(&mut kv);
    assert!(matches!(kv.status(), Status::Failed(reason) if reason.contains("more memory")));
}

#[test]
fn the_superblock_changes_sides() {
    let mut disk = Disk::new();
    disk.boot();
    let first = Superblock::first(CAPACITY).unwrap();
    assert_eq!(first.sector(), 8);
    assert_eq!(first.next().sector(), 0);
    assert!(disk.durable[8 * SECTOR..9 * SECTOR].iter().any(|byte| *byte != 0));
    assert!(disk.durable[..SECTOR].iter().all(|byte| *byte == 0));
}

#[derive(Clone, Debug)]
enum Step {
    Set(u8, usize),
    Delete(u8),
    Clear,
    Disk,
    Crash(Vec<bool>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0_u8..12, prop_oneof![Just(3_usize), 0..20_000_usize, Just(log::VALUE_MAX)]).prop_map(|(key, size)| Step::Set(key, size)),
        2 => (0_u8..12).prop_map(Step::Delete),
        1 => Just(Step::Clear),
        12 => Just(Step::Disk),
        1 => vec(any::<bool>(), 1..20).prop_map(Step::Crash),
    ]
}

type Content = Vec<(Vec<u8>, Vec<u8>)>;

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// After any crash the store is one of its states since the last durable change, in particular not older.
    #[test]
    fn every_durable_change_survives_every_crash(steps in vec(step(), 1..120)) {
        let mut disk = Disk::new();
        let mut kv = disk.boot();
        let mut states: Vec<(Ticket, Content)> = vec![(0, content(&kv))];
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Set(key, size) => { let _ = kv.set(&[key], &vec![number as u8; size]); }
                Step::Delete(key) => { kv.delete(&[key]).unwrap(); }
                Step::Clear => { kv.clear().unwrap(); }
                Step::Disk => { disk.serve(&mut kv); }
                Step::Crash(kept) => {
                    let durable = kv.durable();
                    disk.crash(&kept);
                    kv = disk.boot();
                    prop_assert_eq!(kv.status(), &Status::Ready);
                    let now = content(&kv);
                    let possible = states.iter().filter(|(ticket, _)| *ticket >= durable).any(|(_, state)| *state == now);
                    prop_assert!(possible, "durable {} of {}", durable, states.last().unwrap().0);
                    states = vec![(0, now)];
                }
            }
            if states.last().unwrap().0 != kv.executed() {
                states.push((kv.executed(), content(&kv)));
            }
            prop_assert!(kv.used() <= kv.limit());
        }
        disk.settle(&mut kv);
        prop_assert_eq!(content(&disk.boot()), content(&kv));
    }
}
