//! What `tandem flows` shows of a primary.

use checkpoint::Instant;
use link::flows::{Flow, FlowDivergence, Flows, Kind, Totals};
use proxy::Traffic;

use crate::protocol::Primary;

pub(crate) fn flows(protocol: &Primary, now: Instant, most: u32) -> Flows {
    let comparators = protocol.comparators();
    let (counters, held) = (comparators.counters(), comparators.held());
    let mut kinds = Traffic::ALL.map(|traffic| {
        let (name, compared) = described(traffic);
        let tally = counters.of(traffic);
        Kind {
            kind: name.to_owned(),
            compared: compared.to_owned(),
            matched: tally.matched,
            released_by_checkpoint: tally.committed,
            released_unprotected: tally.unprotected,
            waits: tally.waits,
            mismatched: tally.mismatched,
            unmatched: tally.unmatched,
            ..Kind::default()
        }
    });
    let mut all = Vec::with_capacity(counters.flows);
    for (nic, report) in comparators.flows() {
        let kind = &mut kinds[report.key.class.traffic() as usize];
        kind.flows += 1;
        kind.buffered += u64::from(report.buffered);
        kind.held += report.held as u64;
        all.push(Flow {
            card: nic.number().into(),
            flow: report.key.to_string(),
            buffered: report.buffered,
            matched: report.tally.matched,
            released_by_checkpoint: report.tally.committed,
            released_unprotected: report.tally.unprotected,
            mismatched: report.tally.mismatched,
            unmatched: report.tally.unmatched,
            waits: report.tally.waits,
            held: report.held as u64,
            pending: report.pending as u64,
            difference: report.difference.as_ref().map(ToString::to_string),
        });
    }
    let total = counters.total();
    let kinds = Traffic::ALL.into_iter().zip(kinds);
    let kinds = kinds.filter(|(traffic, kind)| kind.flows > 0 || !counters.of(*traffic).is_empty());
    let mut flows = Flows {
        cards: comparators.count() as u64,
        protection: protection(protocol),
        totals: Totals {
            matched: total.matched,
            lowered: counters.lowered,
            released_by_checkpoint: total.committed,
            released_unprotected: total.unprotected,
            held: held.frames as u64,
            held_bytes: held.bytes as u64,
            mismatched: total.mismatched,
            unmatched: total.unmatched,
            limited: counters.limited,
        },
        lag: protocol.protected().then(|| crate::status::lag(protocol)),
        kinds: kinds.map(|(_, kind)| kind).collect(),
        flows: all,
        left_out: 0,
        divergences: protocol
            .divergences()
            .map(|(when, nic, divergence)| FlowDivergence {
                card: nic.number().into(),
                age_ms: now.since(*when).as_millis(),
                epoch: divergence.epoch.0,
                what: divergence.to_string(),
            })
            .collect(),
    };
    flows.keep(most);
    flows
}

fn protection(protocol: &Primary) -> String {
    if protocol.protected() {
        format!("{}: {}", protocol.epoch_mode(), protocol.mode_reason())
    } else {
        format!("none: this side is {}", protocol.state_name())
    }
}

/// The policy is written in `proxy`'s documentation.
fn described(traffic: Traffic) -> (&'static str, &'static str) {
    const FRAME: &str = "the whole frame";
    const HEADERS: &str = "the whole frame but for TTL, TOS, IP identification and checksums";
    const NOTHING: &str = "nothing: its tags are random, so all of it waits for checkpoints";
    match traffic {
        Traffic::Arp => ("ARP", FRAME),
        Traffic::Other => ("other", FRAME),
        Traffic::Fragments => (
            "IP fragments",
            "the datagrams that they make; what makes none waits for checkpoints",
        ),
        Traffic::Icmp => ("ICMP", HEADERS),
        Traffic::Icmpv6 => ("ICMPv6", HEADERS),
        Traffic::OtherIp => ("other IP", HEADERS),
        Traffic::Malformed => ("malformed", FRAME),
        Traffic::Sctp => ("SCTP", NOTHING),
        Traffic::Tcp => (
            "TCP",
            "the bytes of the stream, SYN, FIN, RST; acknowledgements as upper bounds",
        ),
        Traffic::Udp => ("UDP", HEADERS),
    }
}
