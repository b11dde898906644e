//! What a role tells about itself: `tandem status`, as JSON and for humans.
//!
//! Filled by the role's loop, carried by `control`, printed by the command line. The names are an
//! interface: scripts read them. Nothing here measures or decides anything.

mod text;

pub(crate) use text::{printable, size, span_ms};

use serde::{Deserialize, Serialize};

/// Everything that one role tells.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the pair.
    pub pair: String,
    /// Name of this host.
    pub node: String,
    /// `primary` or `secondary`.
    pub role: String,
    /// Where the role is in its life.
    pub state: State,
    /// The witness's term it runs in.
    pub generation: u64,
    /// The epoch that is open.
    pub epoch: u64,
    /// The other host.
    pub peer: Peer,
    /// Who runs between two checkpoints, while protected.
    pub mode: Option<Mode>,
    /// How far the secondary's output trails, on the primary while protected.
    #[serde(default)]
    pub lag: Option<Lag>,
    /// Time since the last commit; none before the first.
    pub last_checkpoint_age_ms: Option<u64>,
    /// Checkpoints committed since this process started.
    pub checkpoints: Checkpoints,
    /// The last one committed.
    pub last_checkpoint: Option<LastCheckpoint>,
    /// The initial sync of the last pairing, on the primary.
    pub last_sync: Option<LastSync>,
    /// Pages shipped ahead of a stop since this process started.
    pub pages_ahead: u64,
    /// How often the two guests' outputs differed.
    pub divergences: u64,
    /// What waits where.
    pub queues: Queues,
    /// The VM's network cards, on the primary.
    #[serde(default)]
    pub cards: Vec<Card>,
    /// Memory that the pairing takes beside the guest's.
    #[serde(default)]
    pub memory: Memory,
    /// Rates over the last second.
    pub rates: Rates,
    /// Frames dropped because their release came too late.
    pub released_late: u64,
    /// Frames that the TAP refused.
    #[serde(default)]
    pub frames_refused: u64,
    /// Frames of clients that were dropped because they were too long.
    #[serde(default)]
    pub frames_too_long: u64,
    /// Why the role is in this state, if that needs telling.
    pub reason: Option<String>,
    /// What is wrong and does not stop the VM.
    pub alarms: Vec<String>,
    /// Time since the state last changed.
    pub since_ms: u64,
    /// The process.
    pub pid: u32,
}

/// Where a role is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Has no peer yet.
    #[default]
    Starting,
    /// Memory and disk go to the secondary; not protected yet.
    Syncing,
    /// Both run; either may be lost.
    Protected,
    /// Protected, and a checkpoint is under way.
    Checkpointing,
    /// The peer is lost and the witness has not answered: stopped, no output.
    Contending,
    /// The secondary becomes the one that runs.
    Promoting,
    /// Runs without a peer.
    Alone,
    /// The contest is lost: stopped for good.
    Fenced,
    /// The run is over.
    Ended,
}

/// Who runs between two checkpoints, and what lets output leave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mode {
    /// `lockstep` or `buffered`.
    pub now: String,
    /// What the operator set, on the primary.
    pub set: Option<String>,
    /// Why it is so now.
    pub why: String,
    /// Changes of it since the primary began.
    pub switches: u64,
    /// Flows that wait for checkpoints though the mode is lockstep.
    pub buffered_flows: u64,
    /// Services all flows of which do.
    #[serde(default)]
    pub buffered_services: u64,
}

/// How far the secondary's output trails the primary's, over the last half minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lag {
    /// The most, in microseconds.
    pub most_us: u64,
    /// Frames it was measured at.
    pub matches: u64,
    /// How long a frame may wait for its equal now before a checkpoint is taken, in microseconds.
    pub bound_us: u64,
}

/// The other host, as this one sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name, once it has told it.
    pub node: Option<String>,
    /// Its address, or the one that this host listens on.
    pub addr: String,
    /// Whether all connections stand.
    pub connected: bool,
    /// Connections for pages among them; 0 before they are agreed on.
    #[serde(default)]
    pub streams: u64,
}

/// Checkpoints committed, by what triggered them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoints {
    /// All of them.
    pub total: u64,
    /// The first of a pairing.
    pub sync: u64,
    /// The outputs differed.
    pub mismatch: u64,
    /// A frame waited too long for its equal.
    pub unmatched: u64,
    /// Output waited for it, and the time between two checkpoints had passed.
    #[serde(default)]
    pub period: u64,
    /// A queue came near its limit.
    pub limit: u64,
    /// The pause would soon have been longer than the budget.
    pub budget: u64,
    /// Its pages would soon have taken more memory than they may.
    #[serde(default)]
    pub memory: u64,
    /// The epoch reached its maximum age.
    pub age: u64,
    /// The operator asked.
    pub admin: u64,
}

/// One committed checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastCheckpoint {
    /// Pages it carried, those shipped ahead of the stop included.
    pub pages: u64,
    /// Those that were shipped ahead of the stop.
    pub pages_ahead: u64,
    /// Bytes it sent.
    pub bytes: u64,
    /// Time that the guest stood still.
    pub pause_us: u64,
    /// What was expected of it before.
    pub predicted_us: u64,
    /// Time from the stop to the commit.
    pub commit_us: u64,
}

/// What one committed checkpoint cost the primary. All times are in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CheckpointTrace {
    /// The epoch that it ended.
    pub epoch: u64,
    /// Pages that were dirty at the stop.
    pub pages: u64,
    /// Pages shipped ahead of it; one that was dirty again is counted there, too.
    pub pages_ahead: u64,
    /// Bytes of pages sent, those shipped ahead included.
    pub bytes: u64,
    /// Pages and bytes by codec; codecs without a page are left out.
    pub codecs: Vec<CodecTrace>,
    /// How long the guest stood.
    pub pause_us: f64,
    /// How long it was expected to stand.
    pub predicted_us: f64,
    /// What it stood for.
    pub parts: PauseParts,
    /// How long its pages were encoded and queued.
    pub encode_us: f64,
    /// Memory of the contents that differences are sent to, in bytes.
    #[serde(default)]
    pub bases_bytes: u64,
    /// What these may take.
    #[serde(default)]
    pub bases_bytes_max: u64,
    /// From the stop to the commit.
    pub commit_us: f64,
}

/// What the guest stood for, in microseconds. Together it is the pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PauseParts {
    /// Until processor and devices were at rest.
    pub halt_us: f64,
    /// Until the protocol had ended the epoch and ordered the checkpoint.
    pub order_us: f64,
    /// Until the dirty pages were known.
    pub harvest_us: f64,
    /// Until the shipment before had left the room that pages are copied to.
    pub room_us: f64,
    /// Until the pages were copied; those beyond that room were encoded and queued.
    pub copy_us: f64,
    /// Until processor and devices were saved.
    pub save_us: f64,
    /// Until the protocol had the guest go on.
    pub handover_us: f64,
    /// Until it went on.
    pub resume_us: f64,
}

/// What one codec did for a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodecTrace {
    /// Its name.
    pub codec: String,
    /// Pages.
    pub pages: u64,
    /// The bytes that they became.
    pub bytes: u64,
}

/// What an initial sync sent while the guest ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastSync {
    /// Pages that it sent.
    pub pages: u64,
    /// Pages of the whole memory.
    pub pages_total: u64,
    /// Whether it sent only pages changed since a checkpoint that the secondary still had.
    pub memory_by_difference: bool,
    /// Blocks sent because they were changed since such a checkpoint; none if the disks were compared.
    pub blocks: Option<u64>,
    /// Blocks of the whole disk.
    pub blocks_total: u64,
}

/// What waits where. A queue near its limit triggers a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queues {
    /// Frames of the primary's guest that wait for release.
    pub held_frames: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// Frames of the secondary's guest that wait for the primary's.
    pub pending_frames: u64,
    /// Their bytes.
    pub pending_bytes: u64,
    /// Inputs forwarded and not confirmed.
    pub inputs_unconfirmed: u64,
    /// Their bytes.
    #[serde(default)]
    pub input_bytes_unconfirmed: u64,
    /// Bytes that wait to be sent to the peer.
    pub link_queued_bytes: u64,
    /// The secondary's own disk writes since the last commit.
    pub overlay_bytes: u64,
    /// Disk writes of the checkpoint that arrives.
    pub staged_bytes: u64,
    /// Disk writes that the peer has not acknowledged.
    pub writes_unacknowledged_bytes: u64,
}

/// What has left by a network card, in frames, since this process started, and what waits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// The TAP device.
    pub tap: String,
    /// Frames released because the secondary's guest sent the same.
    pub matched: u64,
    /// Released because a checkpoint covers them.
    pub released_by_checkpoint: u64,
    /// Released unprotected.
    pub released_unprotected: u64,
    /// Frames that wait for release.
    pub held_frames: u64,
    /// Their bytes.
    pub held_bytes: u64,
}

/// Memory that a pairing takes beside the guest's, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// On the primary: contents that the secondary has committed, to send differences to them.
    pub bases_bytes: u64,
    /// What these may take.
    pub bases_bytes_max: u64,
    /// On the secondary: pages that its own guest has written since the last commit.
    pub own_bytes: u64,
    /// On the secondary: pages of the checkpoint that arrives.
    pub staged_bytes: u64,
    /// What both may take before the epoch is to end.
    pub pages_bytes_max: u64,
}

/// Rates over the last second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Frames that reached the guest.
    pub inputs_per_s: f64,
    /// Frames released to the clients.
    pub outputs_per_s: f64,
    /// Pages shipped or staged.
    pub pages_per_s: f64,
    /// Bytes of pages shipped or staged.
    pub bytes_per_s: f64,
}

impl Rates {
    /// Makes the rates of so many frames, pages and bytes in a span.
    #[must_use]
    pub fn over(span: checkpoint::Duration, inputs: u64, outputs: u64, pages: u64, bytes: u64) -> Self {
        let seconds = std::time::Duration::from(span).as_secs_f64();
        let rate = |count: u64| count as f64 / seconds;
        Self {
            inputs_per_s: rate(inputs),
            outputs_per_s: rate(outputs),
            pages_per_s: rate(pages),
            bytes_per_s: rate(bytes),
        }
    }
}

impl State {
    /// Returns the name as it is written in the JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Syncing => "syncing",
            Self::Protected => "protected",
            Self::Checkpointing => "checkpointing",
            Self::Contending => "contending",
            Self::Promoting => "promoting",
            Self::Alone => "alone",
            Self::Fenced => "fenced",
            Self::Ended => "ended",
        }
    }

    /// Returns the state of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        const ALL: [State; 9] = [
            State::Starting,
            State::Syncing,
            State::Protected,
            State::Checkpointing,
            State::Contending,
            State::Promoting,
            State::Alone,
            State::Fenced,
            State::Ended,
        ];
        ALL.into_iter().find(|state| state.name() == name)
    }

    /// Tells whether the loss of either host is survived in this state.
    #[must_use]
    pub fn is_protected(self) -> bool {
        matches!(self, Self::Protected | Self::Checkpointing)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> Status {
        Status {
            pair: "shop".into(),
            node: "a".into(),
            role: "primary".into(),
            state: State::Checkpointing,
            generation: 3,
            epoch: 712,
            peer: Peer {
                node: Some("b".into()),
                addr: "10.0.0.2:4242".into(),
                connected: true,
                streams: 2,
            },
            last_checkpoint_age_ms: Some(412),
            checkpoints: Checkpoints {
                total: 9,
                sync: 1,
                mismatch: 8,
                ..Checkpoints::default()
            },
            last_checkpoint: Some(LastCheckpoint {
                pages: 10,
                pages_ahead: 4,
                bytes: 41_000,
                pause_us: 900,
                predicted_us: 850,
                commit_us: 12_000,
            }),
            last_sync: Some(LastSync {
                pages: 12,
                pages_total: 16_384,
                memory_by_difference: true,
                blocks: Some(3),
                blocks_total: 1_024,
            }),
            memory: Memory {
                bases_bytes: 2 << 20,
                bases_bytes_max: 64 << 20,
                ..Memory::default()
            },
            since_ms: 61_000,
            pid: 77,
            ..Status::default()
        }
    }

    #[test]
    fn json_names_the_states_in_lower_case_and_reads_back() {
        let text = serde_json::to_string(&example()).unwrap();
        assert!(text.contains(r#""state":"checkpointing""#), "{text}");
        assert!(text.contains(r#""last_checkpoint_age_ms":412"#), "{text}");
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), example());
    }

    #[test]
    fn every_state_is_found_by_the_name_that_the_json_has() {
        for name in [
            "starting",
            "syncing",
            "protected",
            "checkpointing",
            "contending",
            "promoting",
            "alone",
            "fenced",
            "ended",
        ] {
            let state = State::named(name).unwrap();
            assert_eq!(serde_json::to_value(state).unwrap(), name);
        }
        assert_eq!(State::named("Protected"), None);
    }
}
