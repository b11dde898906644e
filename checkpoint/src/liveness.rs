//! Whether the peer lives, and until when this side may act on what it heard.
//!
//! ```text
//!   last heard ────────── fence_at ──────── suspect_at
//!        │  releases allowed  │  none allowed    │  peer declared lost, the witness asked
//! ```
//!
//! Any bytes from the peer are a sign of life. This process may itself have been stopped for a while
//! (SIGSTOP, swap, a host without CPU); the peer's bytes then wait unread in the socket, and silence
//! proves nothing. A long gap between two calls of [`Liveness::poll`] therefore gives the peer a quarter
//! of the limit more, once in each silence, to let these bytes be read.
//!
//! That can't harm safety: the grace only delays this side's own suspicion, and who may run is decided by
//! the witness, not by who asks first. Releases get no grace, on the contrary: bytes read during it may
//! be as old as the gap, so they prove that the peer lived but do not move `fence_at`.
//!
//! Driven by the protocols of both roles. Never reads a clock.

use crate::limits::{FENCE_SHARE, HEARTBEATS_PER_LIMIT};
use crate::time::{Duration, Instant};

/// The signs of life of one peer.
#[derive(Clone, Debug)]
pub struct Liveness {
    limit: Duration,
    heard: Instant,
    heard_fresh: Instant,
    sent: Instant,
    polled: Instant,
    /// Until then, bytes that are read may be as old as the last gap.
    stale_until: Instant,
    /// Until then, a silent peer is not suspected.
    grace_until: Instant,
    grace_spent: bool,
}

impl Liveness {
    /// Starts with a peer that was heard just now.
    #[must_use]
    pub fn new(takeover_limit: Duration, now: Instant) -> Self {
        Self {
            limit: takeover_limit,
            heard: now,
            heard_fresh: now,
            sent: now,
            polled: now,
            stale_until: Instant(0),
            grace_until: Instant(0),
            grace_spent: false,
        }
    }

    /// Tells that the protocol loop runs. Call it first in each turn, before what the turn brings is looked at.
    pub fn poll(&mut self, now: Instant) {
        let gap = now.since(self.polled);
        self.polled = self.polled.max(now);
        if gap <= self.part(1, 2) {
            return;
        }
        self.stale_until = now + self.part(1, 4);
        if !self.grace_spent {
            self.grace_until = self.stale_until;
            self.grace_spent = true;
        }
    }

    /// Tells that bytes of the peer were read.
    pub fn heard(&mut self, now: Instant) {
        self.poll(now);
        self.heard = self.heard.max(now);
        if now >= self.stale_until {
            self.heard_fresh = self.heard;
            self.grace_spent = false;
        }
    }

    /// Tells that bytes were sent to the peer.
    pub fn sent(&mut self, now: Instant) {
        self.sent = self.sent.max(now);
    }

    /// Returns when a heartbeat is to be sent unless something else is before.
    #[must_use]
    pub fn heartbeat_due(&self) -> Instant {
        self.sent + self.part(1, HEARTBEATS_PER_LIMIT)
    }

    /// Returns when the peer is declared lost unless it is heard before.
    #[must_use]
    pub fn suspect_at(&self) -> Instant {
        (self.heard + self.limit).max(self.grace_until)
    }

    /// Returns until when output may be released: the `not_after` of each release.
    #[must_use]
    pub fn fence_at(&self) -> Instant {
        self.heard_fresh + self.part(FENCE_SHARE.0, FENCE_SHARE.1)
    }

    /// Returns whether the peer is to be declared lost.
    #[must_use]
    pub fn is_suspect(&self, now: Instant) -> bool {
        now >= self.suspect_at()
    }

    /// Returns when to look again: the next heartbeat or the suspicion.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.heartbeat_due().min(self.suspect_at())
    }

    fn part(&self, numerator: u64, denominator: u64) -> Duration {
        Duration(self.limit.0 / denominator * numerator)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(300);

    fn at(millis: u64) -> Instant {
        Instant(0) + Duration::from_millis(10_000 + millis)
    }

    fn started() -> Liveness {
        Liveness::new(LIMIT, at(0))
    }

    /// Runs the loop every 10 ms.
    fn run(liveness: &mut Liveness, from: u64, to: u64) {
        (from..=to).step_by(10).for_each(|millis| liveness.poll(at(millis)));
    }

    #[test]
    fn a_silent_peer_is_fenced_off_first_and_suspected_later() {
        let mut liveness = started();
        run(&mut liveness, 0, 300);
        assert_eq!(liveness.fence_at(), at(200));
        assert_eq!(liveness.suspect_at(), at(300));
        assert!(!liveness.is_suspect(at(299)));
        assert!(liveness.is_suspect(at(300)));
    }

    #[test]
    fn bytes_of_the_peer_put_both_off() {
        let mut liveness = started();
        run(&mut liveness, 0, 100);
        liveness.heard(at(100));
        assert_eq!((liveness.fence_at(), liveness.suspect_at()), (at(300), at(400)));
        liveness.heard(at(90));
        assert_eq!(liveness.suspect_at(), at(400), "time does not go back");
    }

    #[test]
    fn heartbeats_come_eight_times_in_a_limit() {
        let mut liveness = started();
        liveness.sent(at(100));
        assert_eq!(liveness.heartbeat_due().since(at(100)), Duration(LIMIT.0 / 8));
        assert_eq!(liveness.deadline(), liveness.heartbeat_due());
    }

    #[test]
    fn after_a_pause_of_this_process_the_peer_gets_a_grace() {
        let mut liveness = started();
        liveness.poll(at(5_000));
        assert!(!liveness.is_suspect(at(5_000)), "its bytes may wait unread");
        assert_eq!(liveness.suspect_at(), at(5_075));
        run(&mut liveness, 5_000, 5_080);
        assert!(liveness.is_suspect(at(5_080)));
    }

    #[test]
    fn bytes_read_after_a_pause_prove_life_but_release_nothing() {
        let mut liveness = started();
        liveness.poll(at(5_000));
        liveness.heard(at(5_000));
        assert_eq!(liveness.fence_at(), at(200), "they may be as old as the pause");
        assert_eq!(liveness.suspect_at(), at(5_300));
        liveness.heard(at(5_074));
        assert_eq!(liveness.fence_at(), at(200));
        liveness.heard(at(5_075));
        assert_eq!(liveness.fence_at(), at(5_275));
    }

    #[test]
    fn a_pause_found_by_the_first_read_counts_too() {
        let mut liveness = started();
        liveness.heard(at(5_000));
        assert_eq!(liveness.fence_at(), at(200));
    }

    #[test]
    fn one_silence_gets_one_grace_however_often_this_process_stalls() {
        let mut liveness = started();
        for millis in (0..5_000).step_by(200) {
            liveness.poll(at(millis));
        }
        assert!(liveness.is_suspect(at(5_000)));
        liveness.heard(at(5_000));
        liveness.poll(at(5_200));
        liveness.poll(at(5_600));
        assert_eq!(
            liveness.suspect_at(),
            at(5_300),
            "a second grace needs proof of life after the first"
        );
    }

    #[test]
    fn the_fence_never_opens_later_than_the_peer_could_take_over() {
        let mut liveness = started();
        let mut seed = 7_u64;
        let mut now = 0;
        for _ in 0..10_000 {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            now += (seed >> 33) % 250;
            if seed >> 62 == 0 {
                liveness.heard(at(now))
            } else {
                liveness.poll(at(now))
            }
            assert!(liveness.fence_at() < liveness.suspect_at());
        }
    }
}
