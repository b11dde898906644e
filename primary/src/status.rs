//! What `tandem status` shows of a primary.

use std::net::SocketAddr;

use checkpoint::pair::Trigger;
use checkpoint::{Duration, Instant};
use link::status::{
    Card, CheckpointTrace, Checkpoints, Lag, LastCheckpoint, LastSync, Memory, Mode, Peer, Queues, Rates, State, Status,
};

use proxy::Comparator;

use crate::clients::Lost;
use crate::protocol::Primary;

/// What the shell knows and the protocol does not.
pub(crate) struct Shell<'a> {
    pub(crate) pair: &'a str,
    pub(crate) node: &'a str,
    pub(crate) peer_address: Option<SocketAddr>,
    pub(crate) link_queued_bytes: u64,
    pub(crate) rates: Rates,
    pub(crate) lost: Lost,
    /// Names of the TAPs, one a network card.
    pub(crate) taps: Vec<&'a str>,
    pub(crate) alarms: &'a [String],
    pub(crate) since: Duration,
    pub(crate) last: Option<CheckpointTrace>,
}

pub(crate) fn status(protocol: &Primary, now: Instant, shell: &Shell<'_>) -> Status {
    let counters = protocol.counters();
    let count = |trigger| counters.checkpoints.get(&trigger).copied().unwrap_or_default();
    let held = protocol.comparators().held();
    let pending = protocol.comparators().pending();
    let tag = protocol.tag();
    Status {
        pair: shell.pair.to_owned(),
        node: shell.node.to_owned(),
        role: "primary".to_owned(),
        state: State::named(protocol.state_name()).unwrap_or_default(),
        generation: tag.generation.0,
        epoch: tag.epoch.0,
        peer: Peer {
            node: protocol.peer().map(str::to_owned),
            addr: shell
                .peer_address
                .map_or_else(|| "none configured".to_owned(), |address| address.to_string()),
            connected: protocol.peer().is_some(),
            streams: protocol.streams().unwrap_or_default() as u64,
        },
        mode: protocol.protected().then(|| Mode {
            now: protocol.epoch_mode().to_string(),
            set: Some(protocol.mode().to_string()),
            why: protocol.mode_reason(),
            switches: counters.switches,
            buffered_flows: protocol.comparators().buffered_flows() as u64,
            buffered_services: protocol.comparators().buffered_services() as u64,
        }),
        lag: protocol.protected().then(|| lag(protocol)),
        last_checkpoint_age_ms: counters.last_checkpoint.map(|last| now.since(last).as_millis()),
        checkpoints: Checkpoints {
            total: counters.checkpoints.values().sum(),
            sync: count(Trigger::Sync),
            mismatch: count(Trigger::Mismatch),
            unmatched: count(Trigger::Unmatched),
            period: count(Trigger::Period),
            limit: count(Trigger::Limit),
            budget: count(Trigger::Budget),
            memory: count(Trigger::Memory),
            age: count(Trigger::Age),
            admin: count(Trigger::Admin),
        },
        last_checkpoint: shell.last.as_ref().map(|last| LastCheckpoint {
            pages: last.pages + last.pages_ahead,
            pages_ahead: last.pages_ahead,
            bytes: last.bytes,
            pause_us: whole(last.pause_us),
            predicted_us: whole(last.predicted_us),
            commit_us: whole(last.commit_us),
        }),
        last_sync: (counters.sync.pages_total > 0).then_some(LastSync {
            pages: counters.sync.pages,
            pages_total: counters.sync.pages_total,
            memory_by_difference: counters.sync.memory_by_difference,
            blocks: counters.sync.blocks,
            blocks_total: counters.sync.blocks_total,
        }),
        pages_ahead: counters.pages_ahead,
        divergences: counters.divergences,
        queues: Queues {
            held_frames: held.frames as u64,
            held_bytes: held.bytes as u64,
            pending_frames: pending.frames as u64,
            pending_bytes: pending.bytes as u64,
            inputs_unconfirmed: protocol.inputs_unconfirmed(),
            input_bytes_unconfirmed: protocol.input_bytes_unconfirmed(),
            link_queued_bytes: shell.link_queued_bytes,
            writes_unacknowledged_bytes: protocol.writes_uncommitted_bytes(),
            ..Queues::default()
        },
        cards: cards(protocol, &shell.taps),
        memory: Memory {
            bases_bytes: shell.last.as_ref().map_or(0, |last| last.bases_bytes),
            bases_bytes_max: shell.last.as_ref().map_or(0, |last| last.bases_bytes_max),
            ..Memory::default()
        },
        rates: shell.rates,
        released_late: shell.lost.late,
        frames_refused: shell.lost.refused,
        frames_too_long: shell.lost.too_long,
        reason: None,
        alarms: shell.alarms.to_vec(),
        since_ms: shell.since.as_millis(),
        pid: std::process::id(),
    }
}

fn cards(protocol: &Primary, taps: &[&str]) -> Vec<Card> {
    let comparators = protocol.comparators().iter().zip(taps);
    let card = |(comparator, tap): (&Comparator, &&str)| {
        let (sums, held) = (comparator.counters().total(), comparator.held());
        Card {
            tap: (*tap).to_owned(),
            matched: sums.matched,
            released_by_checkpoint: sums.committed,
            released_unprotected: sums.unprotected,
            held_frames: held.frames as u64,
            held_bytes: held.bytes as u64,
        }
    };
    comparators.map(card).collect()
}

/// Returns how far the secondary's output trails.
pub(crate) fn lag(protocol: &Primary) -> Lag {
    let lag = protocol.comparators().lag();
    Lag {
        most_us: lag.most.as_micros(),
        matches: lag.matches,
        bound_us: lag.bound.as_micros(),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float that is too large, or none, becomes the nearest number"
)]
fn whole(micros: f64) -> u64 {
    micros as u64
}
