//! Clients at work on the pair, and the judgement of what they saw.

use std::time::{Duration, Instant};

use tandem::clients::{Clients, Counter, Load, Report, Target, stored_count};

use crate::stage::{LIMIT, Stage, await_fact};

/// A UDP answer may have been held back for so long when a host died.
const UDP_IN_FLIGHT: Duration = Duration::from_secs(1);

/// Clients on connections that stay open until they are asked what they saw.
pub(crate) struct Work(Clients);

impl Work {
    pub(crate) fn start(stage: &Stage, prefix: &str) -> Self {
        Self::start_at(stage, Target::bundled(), prefix)
    }

    /// Starts clients that ask the guest at these addresses of it.
    pub(crate) fn start_at(stage: &Stage, target: Target, prefix: &str) -> Self {
        let clients = Clients::start(stage.lab.client(), target, Load::default(), prefix);
        let work = Self(clients.expect("clients can be started"));
        work.await_more();
        work
    }

    /// Waits until requests were answered that were asked from now on.
    pub(crate) fn await_more(&self) {
        let moment = Instant::now();
        await_fact("an answer over UDP", || self.0.first_answer_since(moment));
        // There are eight connections; each may have one answer under way from before.
        let enough = self.0.requests() + 100;
        await_fact("answers over TCP", || (self.0.requests() >= enough).then_some(()));
    }

    /// Returns when the first answer came to a UDP request sent after `moment`.
    pub(crate) fn await_answer_since(&self, moment: Instant) -> Instant {
        await_fact("an answer over UDP", || self.0.first_answer_since(moment))
    }

    /// Returns when the first answer came to a UDP request sent after `moment`, if one has come.
    pub(crate) fn answer_since(&self, moment: Instant) -> Option<Instant> {
        self.0.first_answer_since(moment)
    }

    /// Lets the clients finish and demands that they have noticed nothing.
    pub(crate) fn finish(self, stage: &Stage) -> Report {
        let report = self.0.stop();
        let tcp = &report.tcp;
        assert!(
            tcp.failed == 0 && tcp.wrong == 0 && tcp.broken == 0,
            "clients have noticed: {:?}",
            tcp.faults
        );
        assert_eq!(report.udp.wrong, 0, "answers over UDP to nothing that was asked");
        let open = tcp
            .counters
            .iter()
            .find(|counter| counter.requested != counter.acknowledged);
        assert_eq!(open, None, "every increment that was asked for is acknowledged");
        assert_stored(stage, &tcp.counters);
        report
    }

    /// As `finish`; and between the blows, each with its first answer, nothing was lost even over UDP.
    pub(crate) fn finish_after(self, stage: &Stage, blow: Instant, answer: Instant) {
        let report = self.finish(stage);
        let from = blow.checked_sub(UDP_IN_FLIGHT).expect("the machine is up that long");
        assert_eq!(
            report.udp.lost_outside(from, answer),
            0,
            "datagrams lost while nothing was broken"
        );
    }

    /// Ends clients whose VM was taken away, and returns what they know of their counters.
    pub(crate) fn abandon(self) -> Vec<Counter> {
        let report = self.0.stop();
        assert_eq!(report.tcp.wrong, 0, "wrong answers: {:?}", report.tcp.faults);
        report.tcp.counters
    }
}

/// Demands that every acknowledged increment is stored, and none twice.
pub(crate) fn assert_stored(stage: &Stage, counters: &[Counter]) {
    for counter in counters {
        assert!(counter.acknowledged > 0, "{} was incremented at all", counter.key);
        let key = counter.key.clone();
        let stored = stage
            .lab
            .client()
            .run(move || stored_count(Target::bundled().store_address(), &key, LIMIT));
        let stored = stored.unwrap_or_else(|error| panic!("can't read {} back: {error}", counter.key));
        assert!(
            (counter.acknowledged..=counter.requested).contains(&stored),
            "{} is {stored}; {} increments were acknowledged, {} asked for",
            counter.key,
            counter.acknowledged,
            counter.requested
        );
    }
}
