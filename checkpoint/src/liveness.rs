//! Whether the peer lives, and until when this side may act on what it heard.
//!
//! ```text
//!   this side    sent s ─────────────── lease ends: s + 2/3 limit
//!                   \          ▲
//!                    \        / echo s
//!   the peer          r ──────────────────────────────── may suspect this side: r + limit
//! ```
//!
//! *Lease.* Each heartbeat carries the sender's clock, and the newest value of the peer's clock that the
//! sender has received. A side that gets its own value *s* back knows that the peer received it, at a
//! moment *r* that can't be earlier than *s*, and that the peer does not act on this side's silence
//! before *r* + limit. So until *s* + 2/3 of the limit this side may let output leave. Only its own clock is compared
//! with itself: no delay of any message, in a queue, on the wire or in a stopped process, makes the lease longer than
//! it should be; and clocks may drift by a third against each other before 2/3 of a limit here outlast a whole one there.
//!
//! *Suspicion.* Any bytes from the peer are a sign of life. This process may itself have been stopped for a while
//! (SIGSTOP, swap, a host without CPU); the peer's bytes then wait unread in the socket, and silence
//! proves nothing. A long gap between two calls of [`Liveness::poll`] therefore gives the peer a quarter
//! of the limit more, once in each silence, to let these bytes be read. That only puts this side's own suspicion off,
//! so it can't break the promise that the peer's lease rests on.
//!
//! Driven by the protocols of both roles. Never reads a clock.

use crate::limits::{FENCE_SHARE, HEARTBEATS_PER_LIMIT};
use crate::mutants::{self, Mutant};
use crate::time::{Duration, Instant};
use crate::wire::Heartbeat;

/// The signs of life of one peer.
#[derive(Clone, Debug)]
pub struct Liveness {
    limit: Duration,
    heard: Instant,
    polled: Instant,
    /// When the last heartbeat was sent; `None` before the first.
    sent: Option<Instant>,
    /// The newest moment at which this side sent what the peer has received; `None` before the first echo.
    echoed: Option<Instant>,
    /// The newest `sent` of the peer, by its clock.
    newest: Instant,
    /// Until then, a silent peer is not suspected.
    grace_until: Instant,
    grace_spent: bool,
}

/// The peer echoed a heartbeat that this side has not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it echoed a heartbeat that was not sent")]
pub struct FalseEcho;

impl Liveness {
    /// Starts with a peer that was heard just now. A heartbeat is due at once.
    #[must_use]
    pub fn new(takeover_limit: Duration, now: Instant) -> Self {
        Self {
            limit: takeover_limit,
            heard: now,
            polled: now,
            sent: None,
            echoed: None,
            newest: Instant(0),
            grace_until: Instant(0),
            grace_spent: false,
        }
    }

    /// Tells that the protocol loop runs. Call it first in each turn, before what the turn brings is looked at.
    pub fn poll(&mut self, now: Instant) {
        let gap = now.since(self.polled);
        self.polled = self.polled.max(now);
        if gap > self.part(1, 2) && !self.grace_spent {
            self.grace_until = now + self.part(1, 4);
            self.grace_spent = true;
        }
    }

    /// Tells that bytes of the peer were read.
    pub fn heard(&mut self, now: Instant) {
        self.poll(now);
        self.heard = self.heard.max(now);
        if now >= self.grace_until {
            self.grace_spent = false;
        }
    }

    /// Tells that this heartbeat of the peer was read.
    ///
    /// # Errors
    /// Fails if it echoes what was not sent: the peer is none.
    pub fn heartbeat(&mut self, now: Instant, heartbeat: Heartbeat) -> Result<(), FalseEcho> {
        self.heard(now);
        self.newest = self.newest.max(heartbeat.sent);
        if heartbeat.echo == Instant(0) {
            return Ok(());
        }
        if self.sent.is_none_or(|sent| heartbeat.echo > sent) {
            return Err(FalseEcho);
        }
        self.echoed = self.echoed.max(Some(heartbeat.echo));
        Ok(())
    }

    /// Returns the heartbeat to be sent now.
    pub fn beat(&mut self, now: Instant) -> Heartbeat {
        self.sent = self.sent.max(Some(now));
        Heartbeat {
            sent: now,
            echo: self.newest,
        }
    }

    /// Returns when the next heartbeat is to be sent.
    #[must_use]
    pub fn heartbeat_due(&self) -> Instant {
        self.sent
            .map_or(self.polled, |sent| sent + self.part(1, HEARTBEATS_PER_LIMIT))
    }

    /// Returns when the peer is declared lost unless it is heard before.
    #[must_use]
    pub fn suspect_at(&self) -> Instant {
        let limit = if mutants::on(Mutant::SuspectTooSoon) {
            self.part(1, 2)
        } else {
            self.limit
        };
        (self.heard + limit).max(self.grace_until)
    }

    /// Returns until when output may leave: the `not_after` of each release.
    #[must_use]
    pub fn lease_until(&self) -> Instant {
        self.echoed
            .map(|echoed| {
                if mutants::on(Mutant::LeaseFromHearing) {
                    self.heard
                } else {
                    echoed
                }
            })
            .map_or(Instant(0), |echoed| echoed + self.part(FENCE_SHARE.0, FENCE_SHARE.1))
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

    fn echo(millis: u64) -> Heartbeat {
        Heartbeat {
            sent: Instant(5),
            echo: at(millis),
        }
    }

    #[test]
    fn a_silent_peer_is_suspected_after_the_limit() {
        let mut liveness = started();
        run(&mut liveness, 0, 300);
        assert_eq!(liveness.suspect_at(), at(300));
        assert!(!liveness.is_suspect(at(299)));
        assert!(liveness.is_suspect(at(300)));
    }

    #[test]
    fn bytes_of_the_peer_put_suspicion_off() {
        let mut liveness = started();
        run(&mut liveness, 0, 100);
        liveness.heard(at(100));
        assert_eq!(liveness.suspect_at(), at(400));
        liveness.heard(at(90));
        assert_eq!(liveness.suspect_at(), at(400), "time does not go back");
    }

    #[test]
    fn heartbeats_come_eight_times_in_a_limit_and_the_first_at_once() {
        let mut liveness = started();
        assert_eq!(liveness.heartbeat_due(), at(0));
        assert_eq!(liveness.beat(at(100)).sent, at(100));
        assert_eq!(liveness.heartbeat_due().since(at(100)), Duration(LIMIT.0 / 8));
        assert_eq!(liveness.deadline(), liveness.heartbeat_due());
    }

    #[test]
    fn a_heartbeat_echoes_the_newest_of_the_peer() {
        let mut liveness = started();
        assert_eq!(liveness.beat(at(0)).echo, Instant(0));
        for sent in [3, 9, 4] {
            let heartbeat = Heartbeat {
                sent: Instant(sent),
                echo: Instant(0),
            };
            assert_eq!(liveness.heartbeat(at(1), heartbeat), Ok(()));
        }
        assert_eq!(liveness.beat(at(2)).echo, Instant(9));
    }

    #[test]
    fn the_lease_counts_from_when_the_echoed_heartbeat_was_sent_however_late_the_echo_comes() {
        let mut liveness = started();
        assert_eq!(liveness.lease_until(), Instant(0), "nothing was echoed yet");
        liveness.beat(at(0));
        liveness.beat(at(40));
        assert_eq!(liveness.heartbeat(at(100), echo(40)), Ok(()));
        assert_eq!(liveness.lease_until(), at(240));
        assert_eq!(liveness.heartbeat(at(5_000), echo(0)), Ok(()));
        assert_eq!(
            liveness.lease_until(),
            at(240),
            "an older echo takes nothing away and adds nothing"
        );
        liveness.heard(at(6_000));
        assert_eq!(
            liveness.lease_until(),
            at(240),
            "other bytes prove life, but echo nothing"
        );
    }

    #[test]
    fn an_echo_of_what_was_not_sent_is_refused() {
        let mut liveness = started();
        assert_eq!(liveness.heartbeat(at(1), echo(0)), Err(FalseEcho));
        liveness.beat(at(10));
        assert_eq!(liveness.heartbeat(at(11), echo(11)), Err(FalseEcho));
        assert_eq!(liveness.lease_until(), Instant(0));
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

    /// Two sides whose clocks differ in origin and speed, messages with any delay, processes that stop.
    #[test]
    fn no_lease_outlasts_the_peers_patience() {
        let mut seed = 7_u64;
        let mut below = |end: u64| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % end
        };
        for _ in 0..200 {
            // The holder's clock is up to 15 % slow, the peer's up to 15 % fast.
            let (slow, fast) = (100 - below(16), 100 + below(16));
            let holders = |real: u64| Instant(77_000_000 + real * slow / 100);
            let peers = |real: u64| Instant(real * fast / 100);
            let mut real = 0;
            let mut holder = Liveness::new(Duration(300_000), holders(0));
            let mut peer = Liveness::new(Duration(300_000), peers(0));
            let (mut there, mut back) = (std::collections::VecDeque::new(), std::collections::VecDeque::new());
            for _ in 0..200 {
                let longest = if below(10) == 0 { 200_000 } else { 20_000 };
                real += 1 + below(longest);
                match below(4) {
                    0 => there.push_back(holder.beat(holders(real))),
                    1 => back.push_back(peer.beat(peers(real))),
                    2 => {
                        if let Some(heartbeat) = there.pop_front() {
                            peer.heartbeat(peers(real), heartbeat).unwrap();
                        }
                    }
                    _ => {
                        if let Some(heartbeat) = back.pop_front() {
                            holder.heartbeat(holders(real), heartbeat).unwrap();
                        }
                    }
                }
                let suspected = peer.suspect_at().0 * 100 / fast;
                let leased = holder.lease_until().0.saturating_sub(77_000_000) * 100 / slow;
                assert!(leased < suspected, "lease until {leased}, suspicion at {suspected}");
            }
        }
    }
}
