//! Two guests that say the same, or not, against a model that knows nothing of how streams are compared.
//!
//! Both sides cut one stream at random, repeat parts of it, acknowledge at their own pace, and go through epochs: stopped,
//! loaded and committed at random moments. The model is two tables: what each side has said in which epoch, byte by byte.

use std::collections::BTreeMap;

use bytes::Bytes;
use checkpoint::{Epoch, EpochMode};
use proptest::prelude::*;

use crate::seq::Seq;
use crate::testkit::*;
use crate::verdict::{Fact, Reason, Verdict};

/// The byte of an undisturbed guest.
fn content(position: u32) -> u8 {
    u8::try_from((u64::from(position) * 37 + u64::from(position / 7)) % 251).unwrap()
}

#[derive(Clone, Debug)]
enum Event {
    /// A side sends: how much of what it said it says again first, how much is new, how much more it has heard.
    Say {
        primary: bool,
        again: u32,
        new: u32,
        heard: u32,
    },
    /// The client has these many bytes less than the guest thought: the guest says them again, from there.
    Lost {
        primary: bool,
        back: u32,
        length: u32,
    },
    /// The secondary's guest says another byte at this distance from its newest, until it loads.
    Differ(u32),
    Stop,
    Load,
    Commit,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        12 => (any::<bool>(), 0u32..12, 0u32..30, 0u32..9).prop_map(|(primary, again, new, heard)| Event::Say {
            primary,
            again: if again > 4 { 0 } else { again },
            new,
            heard,
        }),
        3 => (any::<bool>(), 1u32..60, 2u32..40).prop_map(|(primary, back, length)| Event::Lost { primary, back, length }),
        1 => Just(Event::Stop),
        1 => Just(Event::Load),
        1 => Just(Event::Commit),
    ]
}

/// A guest.
#[derive(Clone, Copy, Debug, Default)]
struct Guest {
    newest: u32,
    heard: u32,
}

/// What a side has said in an epoch: its bytes, and the highest acknowledgement.
#[derive(Clone, Debug, Default)]
struct Said {
    bytes: BTreeMap<u32, u8>,
    heard: u32,
}

struct World {
    bench: Bench,
    base: u32,
    acks: u32,
    primary: Guest,
    secondary: Guest,
    /// The primary's guest as it was at the stop.
    stopped: Option<(Epoch, Guest)>,
    /// Whether the secondary's guest has gone on from there already.
    loaded: bool,
    /// At the last commit.
    committed: Guest,
    said: [BTreeMap<Epoch, Said>; 2],
    /// Where the secondary's guest says other bytes.
    flips: Vec<u32>,
    told: BTreeMap<Epoch, Reason>,
    /// They differed at the stop; what comes out while it is checkpointed asks for nothing more.
    must_be_told: bool,
    left: BTreeMap<u32, u8>,
}

impl World {
    fn new(base: u32, acks: u32) -> Self {
        let mut world = Self {
            bench: Bench::new(),
            base,
            acks,
            primary: Guest::default(),
            secondary: Guest::default(),
            stopped: None,
            loaded: false,
            committed: Guest::default(),
            said: Default::default(),
            flips: Vec::new(),
            told: BTreeMap::new(),
            must_be_told: false,
            left: BTreeMap::new(),
        };
        // Both know the connection.
        world.say(true, 0, 0);
        world.apply(&Event::Stop);
        world.apply(&Event::Commit);
        world
    }

    fn epoch(&self, primary: bool) -> Epoch {
        match self.stopped {
            Some((epoch, _)) if !primary && !self.loaded => epoch,
            _ => self.bench.comparator.running(),
        }
    }

    fn apply(&mut self, event: &Event) {
        match *event {
            Event::Say {
                primary,
                again,
                new,
                heard,
            } => {
                let guest = if primary {
                    &mut self.primary
                } else {
                    &mut self.secondary
                };
                let start = guest.newest.saturating_sub(again);
                guest.newest += new;
                guest.heard += heard;
                let end = guest.newest;
                self.say(primary, start, end);
            }
            Event::Lost { primary, back, length } => {
                let newest = if primary { self.primary } else { self.secondary }.newest;
                let start = newest.saturating_sub(back);
                self.say(primary, start, (start + length).min(newest));
            }
            Event::Differ(ahead) => self.flips.push(self.secondary.newest + ahead),
            Event::Stop => {
                if self.stopped.is_none() {
                    self.must_be_told = self.difference(self.bench.comparator.running()).is_some();
                    self.stopped = Some((self.bench.comparator.stop(EpochMode::Lockstep), self.primary));
                }
            }
            Event::Load => self.load(),
            Event::Commit => {
                self.load();
                if let Some((epoch, guest)) = self.stopped.take() {
                    self.judge_epoch(epoch, self.must_be_told);
                    (self.committed, self.loaded) = (guest, false);
                    let verdicts = self.bench.commit(epoch);
                    self.judge(&verdicts);
                }
            }
        }
    }

    fn load(&mut self) {
        if let Some((_, guest)) = self.stopped
            && !core::mem::replace(&mut self.loaded, true)
        {
            self.secondary = guest;
            self.flips.clear();
        }
    }

    fn say(&mut self, primary: bool, start: u32, end: u32) {
        let guest = if primary { self.primary } else { self.secondary };
        let flips = &self.flips;
        let byte = |at: u32| content(at) ^ (u8::from(!primary && flips.contains(&at)) * 0x40);
        let payload: Vec<u8> = (start..end).map(byte).collect();
        let epoch = self.epoch(primary);
        let said = self.said[usize::from(!primary)].entry(epoch).or_default();
        said.bytes.extend((start..end).zip(payload.iter().copied()));
        said.heard = said.heard.max(guest.heard);
        let seq = self.base.wrapping_add(start);
        let frame = Tcp::data(seq, self.acks.wrapping_add(guest.heard), &payload).frame();
        let verdicts = if primary {
            self.bench.primary(frame)
        } else {
            self.bench.secondary_in(epoch.0, frame)
        };
        self.judge(&verdicts);
    }

    /// What both have said in this epoch, and otherwise.
    fn difference(&self, epoch: Epoch) -> Option<u32> {
        let [mine, theirs] = [0, 1].map(|side: usize| self.said[side].get(&epoch));
        let (mine, theirs) = (mine?, theirs?);
        let differs = |(at, byte): (&u32, &u8)| theirs.bytes.get(at).is_some_and(|other| other != byte).then_some(*at);
        mine.bytes.iter().find_map(differs)
    }

    fn judge(&mut self, verdicts: &[Verdict]) {
        for verdict in verdicts {
            match verdict {
                Verdict::Release(frame, _) => self.judge_release(frame),
                Verdict::Diverged(told) => {
                    assert!(self.told.insert(told.epoch, told.reason.clone()).is_none(), "once");
                }
                Verdict::Violation(what) => panic!("{what}"),
            }
        }
    }

    fn judge_release(&mut self, frame: &Bytes) {
        let (found, payload) = segment(frame);
        let comparing = self.bench.comparator.comparing();
        let theirs = self.said[1].get(&comparing);
        let start = u32::try_from(found.seq.after(Seq(self.base))).unwrap();
        for (at, byte) in (start..).zip(&payload) {
            let both = theirs.is_some_and(|said| said.bytes.get(&at) == Some(byte));
            let again = self.left.get(&at) == Some(byte);
            assert!(
                both || again || at < self.committed.newest,
                "byte {at} is of one side alone"
            );
            assert_eq!(*self.left.entry(at).or_insert(*byte), *byte, "a client sees one stream");
        }
        let heard = found.ack.unwrap().0.wrapping_sub(self.acks);
        let permitted = theirs.map_or(0, |said| said.heard).max(self.committed.heard);
        assert!(
            heard <= permitted,
            "{heard} is acknowledged, and {permitted} by the secondary"
        );
    }

    /// All that both sides say in an epoch has been said: equal if, and only if, the bytes are.
    fn judge_epoch(&self, epoch: Epoch, must_be_told: bool) {
        match (self.difference(epoch), self.told.get(&epoch)) {
            (None, None) => {}
            (Some(_), None) => assert!(!must_be_told, "the difference in epoch {epoch} is not told"),
            (Some(_), Some(Reason::Mismatch(found))) => {
                assert_eq!(found.fact, Fact::Bytes);
                assert_eq!(found.primary[0] ^ found.secondary[0], 0x40, "where they differ");
            }
            (at, told) => panic!("in epoch {epoch} they differ at {at:?}, and {told:?} was told"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn streams_are_equal_if_and_only_if_their_bytes_are(
        base in prop_oneof![Just(u32::MAX - 100), any::<u32>()],
        acks in prop_oneof![Just(u32::MAX - 20), any::<u32>()],
        events in proptest::collection::vec(event(), 1..120),
        differ in proptest::option::of((0usize..120, 0u32..40)),
    ) {
        let mut world = World::new(base, acks);
        for (number, event) in events.iter().enumerate() {
            if let Some((at, ahead)) = differ && at == number {
                world.apply(&Event::Differ(ahead));
            }
            world.apply(event);
        }
        // Both get as far as the one that is ahead, with no checkpoint any more.
        world.apply(&Event::Commit);
        let end = world.primary.newest.max(world.secondary.newest);
        let heard = world.primary.heard.max(world.secondary.heard);
        for primary in [true, false] {
            let guest = if primary { &mut world.primary } else { &mut world.secondary };
            guest.heard = heard;
            let start = core::mem::replace(&mut guest.newest, end);
            world.say(primary, start, end);
        }
        let epoch = world.bench.comparator.running();
        world.judge_epoch(epoch, true);
        if world.difference(epoch).is_none() {
            prop_assert_eq!(world.bench.comparator.held().frames, 0, "all has left");
            prop_assert_eq!(world.bench.comparator.pending(), crate::Pending::default());
        }
        world.apply(&Event::Stop);
        world.apply(&Event::Commit);
        prop_assert_eq!(world.bench.comparator.held().frames, 0);
        prop_assert!(world.left.keys().copied().eq(0..world.left.len().try_into().unwrap()), "without a gap");
    }
}
