//! What `tandem flows` shows: which of the VM's traffic is protected, how, and where the two guests differ.

use std::fmt::{self, Display};

use serde::{Deserialize, Serialize};

use crate::status::{Lag, printable, size};

/// Flows in one answer, at most, whatever is asked for.
pub const FLOWS_MAX: u32 = 1_000;

/// The traffic that the guest sends, as the primary sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flows {
    /// Network cards of the VM.
    #[serde(default)]
    pub cards: u64,
    /// Whether output is protected now, and by what.
    pub protection: String,
    /// Sums over all flows since the VM started here.
    pub totals: Totals,
    /// How far the secondary's output trails, while protected.
    #[serde(default)]
    pub lag: Option<Lag>,
    /// The coverage: what came of each kind of traffic that there was.
    pub kinds: Vec<Kind>,
    /// Those that hold output first, then those that differed or came late, then the busiest.
    pub flows: Vec<Flow>,
    /// Flows that are known and not listed.
    pub left_out: u64,
    /// What made checkpoints necessary lately, the newest first.
    pub divergences: Vec<FlowDivergence>,
}

/// Sums over all flows, those included that are no longer known. Units: frames, unless said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Released because the secondary's guest sent the same.
    pub matched: u64,
    /// Those of them whose acknowledgement was lowered.
    pub lowered: u64,
    /// Released because a checkpoint covers them.
    pub released_by_checkpoint: u64,
    /// Released unprotected: the VM ran alone.
    pub released_unprotected: u64,
    /// Held now.
    pub held: u64,
    /// Bytes held now.
    pub held_bytes: u64,
    /// Times that the outputs differed.
    pub mismatched: u64,
    /// Times that one side's output waited too long for the other's.
    pub unmatched: u64,
    /// Times that a bound of a queue was reached.
    pub limited: u64,
}

/// One kind of traffic. Units: frames, unless said; those of flows included that are no longer known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kind {
    /// Its name: `TCP`, `UDP`, `ARP`.
    pub kind: String,
    /// What of it is compared before it leaves.
    pub compared: String,
    /// Flows known now.
    pub flows: u64,
    /// Those that are not compared, and wait for checkpoints.
    pub buffered: u64,
    /// Released because the secondary's guest sent the same.
    pub matched: u64,
    /// Released because a checkpoint covers them.
    #[serde(default)]
    pub released_by_checkpoint: u64,
    /// Released unprotected: the VM ran alone.
    #[serde(default)]
    pub released_unprotected: u64,
    /// Those of them all that were not released the moment they came.
    #[serde(default)]
    pub waits: u64,
    /// Times that the outputs differed.
    pub mismatched: u64,
    /// Times that one side's output waited too long for the other's.
    #[serde(default)]
    pub unmatched: u64,
    /// Held now.
    pub held: u64,
}

/// One flow, directed as the guest sends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// The network card, from 0 on.
    #[serde(default)]
    pub card: u64,
    /// Kind, VLAN tags, and both ends.
    pub flow: String,
    /// It is not compared, because it kept differing: its output waits for checkpoints.
    pub buffered: bool,
    /// Frames released because the secondary's guest sent the same.
    pub matched: u64,
    /// Frames released because a checkpoint covers them.
    #[serde(default)]
    pub released_by_checkpoint: u64,
    /// Frames released unprotected since the flow is known: the VM ran alone.
    #[serde(default)]
    pub released_unprotected: u64,
    /// Differences seen.
    pub mismatched: u64,
    /// Times that one side's output waited too long for the other's.
    #[serde(default)]
    pub unmatched: u64,
    /// Frames that were not released the moment they came.
    pub waits: u64,
    /// Frames held now.
    pub held: u64,
    /// Frames or pieces of the secondary that wait for the primary's.
    pub pending: u64,
    /// The latest difference: the first byte that differs, and what both sides have from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difference: Option<String>,
}

/// Something that made a checkpoint necessary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowDivergence {
    /// Time since then.
    pub age_ms: u64,
    /// The network card on which it happened.
    #[serde(default)]
    pub card: u64,
    /// The epoch in which it happened.
    pub epoch: u64,
    /// What differed, where, and the bytes of both sides from there.
    pub what: String,
}

impl Flows {
    /// Puts the flows in their order and leaves out those beyond `most`.
    pub fn keep(&mut self, most: u32) {
        let rank = |flow: &Flow| {
            (
                flow.held,
                flow.mismatched.saturating_add(flow.unmatched),
                flow.waits,
                flow.matched,
            )
        };
        self.flows.sort_by(|one, other| {
            rank(other)
                .cmp(&rank(one))
                .then_with(|| (one.card, &one.flow).cmp(&(other.card, &other.flow)))
        });
        let most = most.min(FLOWS_MAX) as usize;
        self.left_out = self.flows.len().saturating_sub(most) as u64;
        self.flows.truncate(most);
    }
}

impl Flows {
    /// Says which card something is about, if there are several.
    fn card(&self, card: u64) -> String {
        if self.cards > 1 {
            format!("net{card} ")
        } else {
            String::new()
        }
    }
}

impl Display for Flows {
    /// Writes tables for humans, without a newline at the end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let totals = &self.totals;
        writeln!(f, "protection   {}", printable(&self.protection))?;
        writeln!(
            f,
            "released     {} equal on both sides ({} with a lowered acknowledgement), {} by checkpoints, {} unprotected",
            totals.matched, totals.lowered, totals.released_by_checkpoint, totals.released_unprotected
        )?;
        writeln!(f, "held         {} frames ({})", totals.held, size(totals.held_bytes))?;
        writeln!(
            f,
            "checkpoints  {} for differences, {} for output that waited, {} for full queues",
            totals.mismatched, totals.unmatched, totals.limited
        )?;
        if let Some(lag) = &self.lag {
            writeln!(f, "lag          {lag}")?;
        }
        if !self.kinds.is_empty() {
            writeln!(
                f,
                "\n{:<12} {:>7} {:>9} {:>10} {:>10} {:>8} {:>7} {:>6} {:>8} {:>6}  compared",
                "KIND", "FLOWS", "BUFFERED", "EQUAL", "CHECKPOINT", "ALONE", "DIFFER", "LATE", "WAITED", "HELD"
            )?;
        }
        for kind in &self.kinds {
            writeln!(
                f,
                "{:<12} {:>7} {:>9} {:>10} {:>10} {:>8} {:>7} {:>6} {:>8} {:>6}  {}",
                printable(&kind.kind),
                kind.flows,
                kind.buffered,
                kind.matched,
                kind.released_by_checkpoint,
                kind.released_unprotected,
                kind.mismatched,
                kind.unmatched,
                kind.waits,
                kind.held,
                printable(&kind.compared)
            )?;
        }
        if !self.flows.is_empty() {
            writeln!(
                f,
                "\n{:>10} {:>10} {:>8} {:>7} {:>6} {:>8} {:>6} {:>7}  FLOW",
                "EQUAL", "CHECKPOINT", "ALONE", "DIFFER", "LATE", "WAITED", "HELD", "PENDING"
            )?;
        }
        for flow in &self.flows {
            writeln!(
                f,
                "{:>10} {:>10} {:>8} {:>7} {:>6} {:>8} {:>6} {:>7}  {}{}{}",
                flow.matched,
                flow.released_by_checkpoint,
                flow.released_unprotected,
                flow.mismatched,
                flow.unmatched,
                flow.waits,
                flow.held,
                flow.pending,
                self.card(flow.card),
                printable(&flow.flow),
                if flow.buffered { ", waits for checkpoints" } else { "" }
            )?;
            if let Some(difference) = &flow.difference {
                writeln!(f, "{:>71}{}", "", printable(difference))?;
            }
        }
        if self.left_out > 0 {
            writeln!(f, "{:>70} and {} more: --most lists them", "", self.left_out)?;
        }
        if !self.divergences.is_empty() {
            write!(f, "\nWHAT MADE CHECKPOINTS NECESSARY")?;
        } else {
            write!(f, "\nnothing made a checkpoint necessary lately")?;
        }
        for divergence in &self.divergences {
            write!(
                f,
                "\n{} ago: {}{}",
                crate::status::span_ms(divergence.age_ms),
                self.card(divergence.card),
                printable(&divergence.what)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(name: &str, held: u64, mismatched: u64, matched: u64) -> Flow {
        Flow {
            flow: name.to_owned(),
            held,
            mismatched,
            matched,
            ..Flow::default()
        }
    }

    #[test]
    fn those_that_matter_come_first_and_the_others_are_counted() {
        let mut flows = Flows {
            flows: vec![
                flow("quiet", 0, 0, 1),
                flow("busy", 0, 0, 9),
                flow("differs", 0, 1, 0),
                flow("held", 1, 0, 0),
            ],
            ..Flows::default()
        };
        flows.keep(3);
        let names: Vec<_> = flows.flows.iter().map(|flow| flow.flow.as_str()).collect();
        assert_eq!((names, flows.left_out), (vec!["held", "differs", "busy"], 1));
        assert!(flows.to_string().contains("and 1 more"), "{flows}");
    }

    #[test]
    fn the_card_is_named_where_there_are_several() {
        let mut flows = Flows {
            cards: 2,
            flows: vec![Flow {
                card: 1,
                ..flow("TCP", 0, 0, 1)
            }],
            ..Flows::default()
        };
        assert!(flows.to_string().contains("net1 TCP"), "{flows}");
        flows.cards = 1;
        assert!(!flows.to_string().contains("net"), "{flows}");
    }

    #[test]
    fn the_longest_answer_fits_into_a_reply_and_comes_back_as_it_was() {
        let mut flows = Flows {
            flows: (0..70_000)
                .map(|number| Flow {
                    card: 7,
                    flow: format!("TCP vlan 4094 vlan 4094 vlan 4094 [2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535 -> [2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:{number}"),
                    matched: u64::MAX,
                    released_by_checkpoint: u64::MAX,
                    released_unprotected: u64::MAX,
                    mismatched: u64::MAX / 2,
                    unmatched: u64::MAX / 2,
                    waits: u64::MAX,
                    held: u64::MAX,
                    pending: u64::MAX,
                    buffered: true,
                    difference: Some("x".repeat(220)),
                })
                .collect(),
            ..Flows::default()
        };
        flows.keep(u32::MAX);
        assert_eq!(flows.left_out, 69_000);
        let text = serde_json::to_string(&flows).unwrap();
        assert!(text.len() < 1024 * 1024 * 3 / 4, "{}", text.len());
        assert_eq!(serde_json::from_str::<Flows>(&text).unwrap(), flows);
    }

    #[test]
    fn what_a_peer_named_can_not_steer_a_terminal() {
        let flows = Flows {
            protection: "\u{1b}[2J".to_owned(),
            divergences: vec![FlowDivergence {
                what: "\u{1b}c".to_owned(),
                ..FlowDivergence::default()
            }],
            ..Flows::default()
        };
        assert!(!flows.to_string().contains('\u{1b}'));
    }
}
