//! Cache, encoder and decoder of both sides together, over many epochs.

use super::*;
use crate::pages::identical::{PageHasher, PageHashes};
use crate::{Generation, Tag};

const PAGES: u64 = 12;

/// The primary's guest and shell.
struct Sender {
    memory: Vec<Page>,
    dirty: Vec<bool>,
    cache: BaseCache,
    chooser: Chooser,
    used: CodecStats,
}

/// The secondary's memfd, its guest's view, and what is staged.
struct Receiver {
    committed: Vec<Page>,
    own: Vec<Page>,
    stage: BTreeMap<u64, Page>,
    decoder: BatchDecoder,
    epoch: Epoch,
}

fn at(index: u64) -> usize {
    usize::try_from(index).unwrap()
}

impl Sender {
    fn write(&mut self, random: &mut Random) {
        let index = random.below(at(PAGES));
        write(&mut self.memory[index], random);
        self.dirty[index] = true;
    }

    /// Ships dirty pages, all or some; those in `alike` as the receiver's own.
    fn ship(&mut self, some: impl Fn(u64) -> bool, alike: &[u64], to: &mut Receiver) {
        let mut encoder = BatchEncoder::new(BATCH_BYTES, self.cache.committed());
        for index in (0..PAGES).filter(|index| self.dirty[at(*index)] && some(*index)) {
            let page = &self.memory[at(index)];
            let pushed = if alike.contains(&index) {
                encoder.push_own(index)
            } else {
                encoder.push(index, page, self.cache.base(index), &mut self.chooser)
            };
            self.cache.shipped(index, page, pushed.codec);
        }
        self.used.add(encoder.stats());
        let (count, batch) = encoder.finish();
        if count > 0 {
            to.stage(count, &batch);
        }
    }

    fn question(&self, seed: u8) -> PageHashes {
        let seed = [seed; 32];
        let hasher = PageHasher::new(&seed);
        let dirty = (0..PAGES).filter(|index| self.dirty[at(*index)]);
        PageHashes {
            tag: Tag {
                generation: Generation(1),
                epoch: Epoch(1),
            },
            seed,
            pages: dirty
                .map(|index| (index, hasher.hash(&self.memory[at(index)])))
                .collect(),
        }
    }
}

impl Receiver {
    fn stage(&mut self, count: u32, batch: &[u8]) {
        let expected = Expected {
            count,
            pages: PAGES,
            base: Some(self.epoch),
        };
        let Self {
            committed,
            own,
            stage,
            decoder,
            ..
        } = self;
        let base = |index, page: &mut Page| {
            *page = committed[at(index)];
            Ok(())
        };
        let decoded = decoder.decode::<PageError>(batch, &expected, base, |index, content| {
            match content {
                Content::Page(page) => drop(stage.insert(index, *page)),
                Content::Unchanged => drop(stage.remove(&index)),
                Content::Own => drop(stage.insert(index, own[at(index)])),
            }
            Ok(())
        });
        decoded.expect("a batch of this test");
    }

    fn load(&mut self, epoch: Epoch) {
        for (index, page) in core::mem::take(&mut self.stage) {
            self.committed[at(index)] = page;
        }
        self.own = self.committed.clone();
        self.epoch = epoch;
    }
}

/// Few bytes to choose from, so that pages often become what they were, or zero.
fn write(page: &mut Page, random: &mut Random) {
    match random.below(8) {
        0 => *page = ZERO_PAGE,
        1 => *page = *content(&Shape::Noise(random.next() % 4)),
        2 => *page = *content(&Shape::Pattern(random.byte() % 2, 3)),
        _ => page[random.below(64) * 64] = random.byte() % 2,
    }
}

#[test]
fn both_sides_hold_the_same_after_every_commit() {
    let mut used = CodecStats::default();
    for seed in 0..60 {
        let mut random = Random(seed);
        let memory = vec![ZERO_PAGE; at(PAGES)];
        let mut receiver = Receiver {
            committed: memory.clone(),
            own: memory.clone(),
            stage: BTreeMap::new(),
            decoder: BatchDecoder::default(),
            epoch: Epoch(0),
        };
        let mut sender = Sender {
            dirty: vec![false; memory.len()],
            memory,
            // From no room at all to more than enough.
            cache: BaseCache::new(random.below(30) * 4_224),
            chooser: chooser(SPEEDS[random.below(SPEEDS.len())]),
            used: CodecStats::default(),
        };
        sender.cache.commit(receiver.epoch);
        for epoch in 1..30 {
            // Some is shipped ahead, written again, shipped again.
            for _ in 0..random.below(4) {
                (0..random.below(12)).for_each(|_| sender.write(&mut random));
                let mask = random.next();
                sender.ship(|index| mask >> index & 1 == 1, &[], &mut receiver);
            }
            // The secondary's guest did the same in some places, and something else in others.
            for index in 0..at(PAGES) {
                match random.below(3) {
                    0 => receiver.own[index] = sender.memory[index],
                    1 => write(&mut receiver.own[index], &mut random),
                    _ => {}
                }
            }
            let mut alike = Vec::new();
            if random.below(2) == 0 {
                let question = sender.question(random.byte());
                let answer = question.answer::<()>(|index, page| {
                    *page = receiver.own[at(index)];
                    Ok(())
                });
                let answers = question.pages.iter().zip(answer.unwrap().alike);
                alike = answers
                    .filter_map(|((index, _), alike)| alike.then_some(*index))
                    .collect();
            }
            sender.ship(|_| true, &alike, &mut receiver);
            if random.below(4) == 0 {
                // Given up: the dirty pages belong to the next epoch.
                receiver.stage.clear();
                sender.cache.abandon();
                continue;
            }
            receiver.load(Epoch(epoch));
            sender.cache.commit(Epoch(epoch));
            sender.dirty.fill(false);
            assert!(receiver.committed == sender.memory, "seed {seed}, epoch {epoch}");
        }
        used.add(&sender.used);
    }
    let never = Codec::ALL.iter().filter(|codec| used.of(**codec).pages == 0).count();
    assert_eq!(never, 0, "{used:?}");
    assert!(used.of(Codec::Unchanged).bytes > 0, "{used:?}");
}
