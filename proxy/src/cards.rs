//! The network cards of one guest: what each has for itself, and what holds for all of them.
//!
//! There is a network of its own behind each card, so each has its own [`NetworkPicture`] and its own [`Comparator`]: frames of
//! one card are never compared with those of another. Epochs are the guest's: they end and are committed for all cards at
//! once, whichever of them made that necessary.
//!
//! Bounds are those of the guest. What may be held, and kept of the secondary's output, is for whichever card needs
//! it; of the flows each card has an equal share.

use bytes::Bytes;
use checkpoint::mutants::{self, Mutant};
use checkpoint::pair::Delivery;
use checkpoint::{Epoch, EpochMode, Instant, Nic};

use crate::codec::{Reader, StateError, put_count};
use crate::comparator::{Comparator, ComparatorLimits, Mode};
use crate::counters::{Counters, FlowReport, Held, Pending};
use crate::lag::Lag;
use crate::picture::{Leaving, NetworkPicture};
use crate::sequence::Snapshot;
use crate::verdict::Verdict;

/// The pictures of a guest's cards, in their order.
#[derive(Clone, Debug)]
pub struct Pictures(Vec<NetworkPicture>);

impl Pictures {
    /// Makes pictures of a guest that has so many cards and has sent nothing yet.
    #[must_use]
    pub fn new(cards: usize) -> Self {
        Self(vec![NetworkPicture::new(); cards])
    }

    /// Makes pictures of a guest that has sent nothing yet, whose cards have these hardware addresses.
    #[must_use]
    pub fn of(macs: &[[u8; 6]]) -> Self {
        Self(macs.iter().copied().map(NetworkPicture::of).collect())
    }

    /// Returns how many cards there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Follows a primary from here on.
    pub fn follow(&mut self) {
        self.0.iter_mut().for_each(NetworkPicture::follow);
    }

    /// Leads from here on.
    pub fn lead(&mut self) {
        self.0.iter_mut().for_each(NetworkPicture::lead);
    }

    /// Takes a frame of the clients at that card and makes what the guest shall see of it.
    pub fn arriving(&mut self, nic: Nic, wire: Bytes) -> Delivery {
        Delivery {
            nic,
            ..self.0[nic.index()].arriving(wire)
        }
    }

    /// Takes a frame that the guest sent on that card and makes what the clients shall see of it.
    pub fn leaving(&mut self, nic: Nic, frame: Bytes) -> Leaving {
        self.0[nic.index()].leaving(frame)
    }

    /// Takes a frame that left the guest on that card before and was kept; returns what the clients shall see of it now, if
    /// anything.
    #[must_use]
    pub fn leaving_again(&self, nic: Nic, frame: Bytes) -> Option<Bytes> {
        self.0[nic.index()].leaving_again(frame)
    }

    /// Returns the bytes for the checkpoint, and how many connections they leave out for want of room.
    #[must_use]
    pub fn encode(&self) -> Snapshot {
        let mut out = Snapshot {
            encoded: Vec::new(),
            left_out: 0,
        };
        put_count(&mut out.encoded, self.0.len());
        for picture in &self.0 {
            let Snapshot { encoded, left_out } = picture.encode();
            put_count(&mut out.encoded, encoded.len());
            out.encoded.extend(encoded);
            out.left_out += left_out;
        }
        out
    }

    /// Reads the bytes of a checkpoint of a guest with so many cards.
    ///
    /// # Errors
    /// Fails if they are not such a state within the bounds.
    pub fn decode(bytes: &[u8], cards: usize) -> Result<Self, StateError> {
        let mut reader = Reader(bytes);
        let count = reader.count("network cards", cards, 4)?;
        if count < cards {
            return Err(StateError::Invalid("number of network cards"));
        }
        let mut pictures = Vec::with_capacity(cards);
        for _ in 0..cards {
            let length = reader.count("bytes of a network card", bytes.len(), 1)?;
            pictures.push(NetworkPicture::decode(reader.bytes(length)?)?);
        }
        reader.end()?;
        if mutants::on(Mutant::KeepFirstCardOnly) {
            pictures[1..].fill(NetworkPicture::new());
        }
        Ok(Self(pictures))
    }

    /// Returns the frames that tell the network behind each card where the guest is now.
    pub fn announcements(&self) -> impl Iterator<Item = (Nic, Vec<Bytes>)> + '_ {
        let cards = Nic::all(self.0.len()).zip(&self.0);
        cards.map(|(nic, picture)| (nic, picture.announcements()))
    }
}

/// The comparators of a guest's cards, in their order.
#[derive(Debug)]
pub struct Comparators {
    cards: Vec<Card>,
    /// Those of all cards together.
    limits: ComparatorLimits,
}

#[derive(Debug)]
struct Card {
    comparator: Comparator,
    /// What it has decided and nobody has taken.
    verdicts: Vec<Verdict>,
}

impl Comparators {
    /// Makes comparators for so many cards that release at once, until [`Comparators::protect`], and find flows by a digest that is
    /// keyed with this secret, see [`Comparator::keyed`].
    ///
    /// # Panics
    /// If there is no card.
    #[must_use]
    pub fn new(cards: usize, limits: ComparatorLimits, first_epoch: Epoch, secret: u64) -> Self {
        assert!(cards > 0, "a guest has a network card");
        let each = ComparatorLimits {
            flows: limits.flows / cards,
            ..limits
        };
        let card = |_| Card {
            comparator: Comparator::new(each, first_epoch).keyed(secret),
            verdicts: Vec::new(),
        };
        Self {
            cards: (0..cards).map(card).collect(),
            limits,
        }
    }

    /// Returns how many cards there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.cards.len()
    }

    /// Returns what was decided about a card's output and not taken yet, to be taken.
    pub fn verdicts(&mut self, nic: Nic) -> &mut Vec<Verdict> {
        &mut self.cards[nic.index()].verdicts
    }

    /// Takes a frame that the primary's guest sent on that card in the epoch now running.
    pub fn primary_output(&mut self, now: Instant, nic: Nic, frame: impl Into<Leaving>) {
        self.lend(nic);
        let Card { comparator, verdicts } = &mut self.cards[nic.index()];
        comparator.primary_output(now, frame, verdicts);
    }

    /// Takes a frame that the secondary's guest sent on that card in `epoch`.
    pub fn secondary_output(&mut self, now: Instant, nic: Nic, epoch: Epoch, frame: Bytes) {
        self.lend(nic);
        let Card { comparator, verdicts } = &mut self.cards[nic.index()];
        comparator.secondary_output(now, epoch, frame, verdicts);
    }

    /// Lets a card have what the others do not use.
    fn lend(&mut self, nic: Nic) {
        if self.cards.len() == 1 {
            return;
        }
        let others = || {
            let cards = self.cards.iter().enumerate();
            cards.filter_map(|(at, card)| (at != nic.index()).then_some(&card.comparator))
        };
        let ((bytes, slots), pending) = (room_taken(others()), pending(others()));
        let Self { cards, limits } = self;
        let lent = &mut cards[nic.index()].comparator.limits;
        lent.held_bytes = limits.held_bytes.saturating_sub(bytes);
        lent.held_frames = limits.held_frames.saturating_sub(slots);
        lent.pending_bytes = limits.pending_bytes.saturating_sub(pending.bytes);
        lent.pending_frames = limits.pending_frames.saturating_sub(pending.frames);
    }

    /// Ends the running epoch on all cards; see [`Comparator::stop`].
    ///
    /// # Panics
    /// If the cards are not in the same epoch, or one is uncommitted already.
    pub fn stop(&mut self, next: EpochMode) -> Epoch {
        let mut ended = self.cards.iter_mut().map(|card| card.comparator.stop(next));
        let epoch = ended.next().expect("a guest has a network card");
        assert!(ended.all(|other| other == epoch), "all cards are in the same epoch");
        epoch
    }

    /// Takes the commit of `epoch`, which covers what was sent on all cards.
    pub fn commit(&mut self, now: Instant, epoch: Epoch) {
        let cards = if mutants::on(Mutant::CommitFirstCardOnly) {
            &mut self.cards[..1]
        } else {
            &mut self.cards[..]
        };
        for Card { comparator, verdicts } in cards {
            comparator.commit(now, epoch, verdicts);
        }
    }

    /// Notes that the secondary has loaded `epoch` and runs.
    pub fn loaded(&mut self, now: Instant, epoch: Epoch) {
        self.each(|comparator| comparator.loaded(now, epoch));
    }

    /// Joins the uncommitted epoch to the running one; see [`Comparator::abandon`].
    pub fn abandon(&mut self) {
        self.each(Comparator::abandon);
    }

    /// Runs alone from here on: releases everything held, in order.
    pub fn release_all(&mut self) {
        for Card { comparator, verdicts } in &mut self.cards {
            comparator.release_all(verdicts);
        }
    }

    /// Holds and compares from `epoch` on; see [`Comparator::protect`].
    pub fn protect(&mut self, epoch: Epoch, mode: EpochMode) {
        self.each(|comparator| comparator.protect(epoch, mode));
    }

    /// Returns when to call [`Comparators::timeout`].
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.iter().filter_map(Comparator::deadline).min()
    }

    /// Takes note that the time has come.
    pub fn timeout(&mut self, now: Instant) {
        for Card { comparator, verdicts } in &mut self.cards {
            comparator.timeout(now, verdicts);
        }
    }

    /// Returns what the comparators do.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.cards[0].comparator.mode()
    }

    /// Returns what is held of the primary's output, on all cards.
    #[must_use]
    pub fn held(&self) -> Held {
        held(self.iter())
    }

    /// Says whether no more output of the primary's guest should be taken until a commit. Between the divergence that a limit
    /// tells and this there is as much room again, for what is under way.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let (bytes, slots) = room_taken(self.iter());
        self.limits.are_passed_twice(bytes, slots)
    }

    /// Returns what is kept of the secondary's output, on all cards.
    #[must_use]
    pub fn pending(&self) -> Pending {
        pending(self.iter())
    }

    /// Returns the comparator of each card.
    pub fn iter(&self) -> impl Iterator<Item = &Comparator> {
        self.cards.iter().map(|card| &card.comparator)
    }

    /// Returns the sums over all flows of all cards.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.iter().for_each(|one| sum.add(&one.counters()));
        sum
    }

    /// Says whether output of the running epoch waits that only its commit can release, though the epoch is compared.
    #[must_use]
    pub fn waits_for_commit(&self) -> bool {
        self.iter().any(Comparator::waits_for_commit)
    }

    /// Returns how many flows wait for commits, uncompared, those of buffered services aside.
    #[must_use]
    pub fn buffered_flows(&self) -> usize {
        self.iter().map(Comparator::buffered_flows).sum()
    }

    /// Returns how many services' flows all wait for commits, uncompared.
    #[must_use]
    pub fn buffered_services(&self) -> usize {
        self.iter().map(Comparator::buffered_services).sum()
    }

    /// Returns how far the secondary's output trails, and how long output of the primary may wait for it: on the card where
    /// that is most.
    #[must_use]
    pub fn lag(&self) -> Lag {
        let lags = || self.iter().map(Comparator::lag);
        Lag {
            most: lags().map(|lag| lag.most).max().unwrap_or_default(),
            matches: lags().map(|lag| lag.matches).sum(),
            bound: lags().map(|lag| lag.bound).max().unwrap_or_default(),
        }
    }

    /// Returns what is known of each flow, card by card, in order of their keys.
    pub fn flows(&self) -> impl Iterator<Item = (Nic, FlowReport)> + '_ {
        let cards = Nic::all(self.cards.len()).zip(&self.cards);
        cards.flat_map(|(nic, card)| card.comparator.flows().map(move |flow| (nic, flow)))
    }

    fn each(&mut self, act: impl FnMut(&mut Comparator)) {
        self.cards.iter_mut().map(|card| &mut card.comparator).for_each(act);
    }
}

fn held<'a>(comparators: impl Iterator<Item = &'a Comparator>) -> Held {
    comparators
        .map(Comparator::held)
        .fold(Held::default(), |sum, one| Held {
            frames: sum.frames + one.frames,
            bytes: sum.bytes + one.bytes,
            oldest: sum.oldest.into_iter().chain(one.oldest).min(),
        })
}

/// Returns the bytes that are held, and the slots that they take.
fn room_taken<'a>(comparators: impl Iterator<Item = &'a Comparator>) -> (usize, usize) {
    comparators.fold((0, 0), |(bytes, slots), one| {
        (bytes + one.hold.bytes(), slots + one.hold.slots())
    })
}

fn pending<'a>(comparators: impl Iterator<Item = &'a Comparator>) -> Pending {
    comparators
        .map(Comparator::pending)
        .fold(Pending::default(), |sum, one| Pending {
            frames: sum.frames + one.frames,
            bytes: sum.bytes + one.bytes,
        })
}

#[cfg(test)]
mod tests {
    use checkpoint::limits::FRAME_HEADER_BYTES;

    use super::*;
    use crate::verdict::{Limit, Reason, Why};

    const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

    fn frame(byte: u8) -> Bytes {
        vec![byte; 60].into()
    }

    fn comparing(limits: ComparatorLimits) -> Comparators {
        let mut cards = Comparators::new(2, limits, Epoch(1), 7);
        cards.protect(Epoch(1), EpochMode::Lockstep);
        cards.loaded(Instant(1), Epoch(0));
        cards
    }

    fn taken(cards: &mut Comparators) -> Vec<Vec<Verdict>> {
        Nic::all(2).map(|nic| cards.verdicts(nic).drain(..).collect()).collect()
    }

    #[test]
    fn the_pictures_of_a_checkpoint_are_those_of_all_cards_and_no_more() {
        let pictures = Pictures::of(&MACS);
        let bytes = pictures.encode().encoded;
        let again = Pictures::decode(&bytes, 2).unwrap();
        assert!(again.announcements().eq(pictures.announcements()));
        let sources: Vec<_> = again
            .announcements()
            .map(|(_, frames)| frames[0][FRAME_HEADER_BYTES + 6..][..6].to_vec())
            .collect();
        assert_eq!(sources, MACS.map(Vec::from));
        assert!(matches!(
            Pictures::decode(&bytes, 1),
            Err(StateError::TooMany { count: 2, .. })
        ));
        assert_eq!(
            Pictures::decode(&bytes, 3).unwrap_err(),
            StateError::Invalid("number of network cards")
        );
        for end in 0..bytes.len() {
            assert!(Pictures::decode(&bytes[..end], 2).is_err(), "{end} bytes");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(Pictures::decode(&longer, 2).unwrap_err(), StateError::Excess(1));
    }

    #[test]
    fn what_one_card_said_is_no_equal_of_what_another_does() {
        let mut cards = comparing(ComparatorLimits::default());
        let [first, second] = [0, 1].map(|number| Nic::new(number).unwrap());
        cards.primary_output(Instant(2), first, frame(7));
        cards.secondary_output(Instant(3), second, Epoch(1), frame(7));
        assert_eq!(taken(&mut cards), [vec![], vec![]]);
        cards.secondary_output(Instant(4), first, Epoch(1), frame(7));
        assert_eq!(
            taken(&mut cards),
            [vec![Verdict::Release(frame(7), Why::Equal)], vec![]]
        );
    }

    #[test]
    fn one_commit_covers_every_card() {
        let mut cards = comparing(ComparatorLimits::default());
        for (byte, nic) in (1..).zip(Nic::all(2)) {
            cards.primary_output(Instant(2), nic, frame(byte));
        }
        assert_eq!(cards.held().frames, 2);
        let epoch = cards.stop(EpochMode::Lockstep);
        cards.commit(Instant(3), epoch);
        let released = |byte| vec![Verdict::Release(frame(byte), Why::Committed(Epoch(1)))];
        assert_eq!(taken(&mut cards), [released(1), released(2)]);
        assert_eq!(cards.held().frames, 0);
    }

    #[test]
    fn what_may_be_held_is_the_guests_whichever_card_needs_it() {
        let limits = ComparatorLimits {
            held_bytes: 150,
            ..ComparatorLimits::default()
        };
        let [first, second] = [0, 1].map(|number| Nic::new(number).unwrap());
        let full = |verdicts: &[Verdict]| {
            let limit = Reason::Limit(Limit::Held);
            matches!(verdicts, [Verdict::Diverged(divergence)] if divergence.reason == limit)
        };
        // Two fit, on one card or on both; the third is too much, on whichever.
        for (one, two, three) in [(first, first, second), (first, second, first), (second, second, second)] {
            let mut cards = comparing(limits);
            cards.primary_output(Instant(2), one, frame(1));
            cards.primary_output(Instant(2), two, frame(2));
            assert_eq!(taken(&mut cards), [vec![], vec![]]);
            cards.primary_output(Instant(2), three, frame(3));
            assert!(full(&taken(&mut cards)[three.index()]));
            assert!(!cards.is_full());
            for byte in 4..7 {
                cards.primary_output(Instant(2), one, frame(byte));
            }
            assert!(cards.is_full(), "twice as much is held");
        }
    }
}
