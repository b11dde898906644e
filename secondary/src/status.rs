//! What `tandem status` shows of a secondary.

use checkpoint::{Duration, Instant, limits};
use link::status::{Checkpoints, LastCheckpoint, Memory, Mode, Peer, Queues, Rates, State, Status};

use crate::protocol::Secondary;

/// What the shell knows and the protocol does not.
pub(crate) struct Shell<'a> {
    pub(crate) pair: &'a str,
    pub(crate) node: &'a str,
    pub(crate) address: &'a str,
    pub(crate) connected: bool,
    pub(crate) link_queued_bytes: u64,
    pub(crate) overlay_bytes: u64,
    pub(crate) staged_bytes: u64,
    pub(crate) rates: Rates,
    pub(crate) alarms: &'a [String],
    pub(crate) since: Duration,
}

pub(crate) fn status(protocol: &Secondary, now: Instant, shell: &Shell<'_>) -> Status {
    let counters = protocol.counters();
    let [own, staged, room] = protocol
        .room()
        .map(|pages| pages.saturating_mul(limits::PAGE_BYTES as u64));
    let tag = protocol.tag();
    let state = State::named(protocol.state_name()).unwrap_or_default();
    Status {
        pair: shell.pair.to_owned(),
        node: shell.node.to_owned(),
        role: "secondary".to_owned(),
        state,
        generation: tag.generation.0,
        epoch: tag.epoch.0,
        peer: Peer {
            node: Some(protocol.primary().to_owned()),
            addr: shell.address.to_owned(),
            connected: shell.connected,
            streams: protocol.streams() as u64,
        },
        mode: (state.is_protected()).then(|| Mode {
            now: protocol.epoch_mode().to_string(),
            set: None,
            why: "the primary decides".to_owned(),
            ..Mode::default()
        }),
        last_checkpoint_age_ms: counters.last_checkpoint.map(|last| now.since(last).as_millis()),
        checkpoints: Checkpoints {
            total: counters.checkpoints,
            ..Checkpoints::default()
        },
        last_checkpoint: counters.last_checkpoint.map(|_| LastCheckpoint {
            pages: counters.last_shipment.0,
            bytes: counters.last_shipment.1,
            pause_us: counters.last_pause.0 / 1_000,
            commit_us: counters.last_pause.0 / 1_000,
            ..LastCheckpoint::default()
        }),
        queues: Queues {
            link_queued_bytes: shell.link_queued_bytes,
            overlay_bytes: shell.overlay_bytes,
            staged_bytes: shell.staged_bytes,
            ..Queues::default()
        },
        memory: Memory {
            own_bytes: own,
            staged_bytes: staged,
            pages_bytes_max: room,
            ..Memory::default()
        },
        rates: shell.rates,
        alarms: shell.alarms.to_vec(),
        since_ms: shell.since.as_millis(),
        pid: std::process::id(),
        ..Status::default()
    }
}
