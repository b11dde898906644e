//! The timestamps (RFC 7323) of one TCP connection: the guest's clock and the one that its client knows.
//!
//! Two guests that open the same connection need not begin it at the same time of the same clock, and the
//! secondary's clock lags the primary's: it goes on at each load from where the primary was at the stop. Three rules
//! make up for it; `sent` is the latest time that the guest has sent, `echoed` the latest that the client has
//! returned:
//!
//! 1. *Shift.* The first acknowledgement of the guest's SYN returns the time of the primary's SYN. Guest's clock
//!    − clients' clock follows from it, as the sequence offset does from the acknowledgement.
//! 2. *Ceiling.* A guest never hears back a time later than the latest it has sent. Without that a SYN whose answer
//!    returns a repetition that only the primary sent, or any answer at all while the clock lags, would be refused.
//! 3. *Floor.* After a takeover no earlier time leaves than the client can have seen, else it drops the segments
//!    (PAWS) until the lag is over. A shift alone can't do this: how far the clock lags is not known but only that
//!    it is at least up to what was echoed, and a shift that makes up for a generous guess would stay for the life
//!    of every connection, in each checkpoint, and spoil the round-trip times of what is in flight. The floor is the later of `sent`
//!    and `echoed`, and some time for what the primary sent after that. The clients' clock stands there until the
//!    guest's has caught up: equal times are good for PAWS, and rule 2 keeps the guest's round-trip times right. Then
//!    it is forgotten.

use checkpoint::mutants::{self, Mutant};

use crate::seq::Seq;

/// What the primary can have sent after the latest time known: a second of a clock of milliseconds, as is usual.
pub(super) const SLACK: u32 = 1 << 10;
/// A floor further ahead of the guest's clock is none: nobody lags so long, the client has returned nonsense.
const AHEAD_MAX: i32 = 1 << 24;

/// What is known of the timestamps of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Clock {
    /// Guest's clock minus the clients'.
    pub(super) shift: u32,
    /// The latest time that the guest has sent, by its clock.
    pub(super) sent: Option<Seq>,
    /// The latest time that the client has returned since the last load, by the clients' clock.
    pub(super) echoed: Option<Seq>,
    /// Nothing earlier leaves, by the clients' clock.
    pub(super) floor: Option<Seq>,
}

impl Clock {
    /// The client has acknowledged the guest's SYN, and returned this time.
    pub(super) fn learn(&mut self, echo: Seq) {
        if let Some(sent) = self.sent {
            self.shift = sent.0.wrapping_sub(echo.0);
        }
    }

    /// Returns with which time a segment leaves.
    pub(super) fn outbound(&mut self, value: Seq) -> Seq {
        self.sent = Seq::later_known(self.sent, Some(value));
        let value = value.minus(self.shift);
        self.floor = self.floor.filter(|floor| (1..=AHEAD_MAX).contains(&floor.after(value)));
        self.floor.unwrap_or(value)
    }

    /// Returns which time the guest hears back.
    pub(super) fn inbound(&mut self, echo: Seq) -> Seq {
        self.echoed = Seq::later_known(self.echoed, Some(echo));
        let echo = echo.plus(self.shift);
        match self.sent {
            Some(sent) if sent.at_most(echo) => sent,
            _ => echo,
        }
    }

    /// The guest is the one that the client talks to from here on.
    pub(super) fn lead(&mut self) {
        let sent = self.sent.map(|sent| sent.minus(self.shift));
        let latest = Seq::later_known(self.floor, Seq::later_known(sent, self.echoed.take()));
        if !mutants::on(Mutant::ForgetClock) {
            self.floor = latest.map(|latest| latest.plus(SLACK));
        }
    }

    /// Returns with which time a segment leaves that was translated before.
    pub(super) fn again(&self, value: Seq) -> Seq {
        self.floor.map_or(value, |floor| floor.later(value))
    }

    /// Says whether forgetting it would show.
    pub(super) fn matters(&self) -> bool {
        self.shift != 0 || self.floor.is_some()
    }
}
