//! What `tandem flows` shows of a primary.

use std::collections::BTreeMap;

use checkpoint::Instant;
use link::flows::{Flow, FlowDivergence, Flows, Kind, Totals};
use proxy::Class;

use crate::protocol::Primary;

pub(crate) fn flows(protocol: &Primary, now: Instant, most: u32) -> Flows {
    let comparators = protocol.comparators();
    let (counters, held) = (comparators.counters(), comparators.held());
    let mut kinds: BTreeMap<&'static str, Kind> = BTreeMap::new();
    let mut all = Vec::with_capacity(counters.flows);
    for (nic, report) in comparators.flows() {
        let (name, compared) = kind(report.key.class);
        let kind = kinds.entry(name).or_default();
        kind.kind = name.to_owned();
        kind.compared = compared.to_owned();
        kind.flows += 1;
        kind.buffered += u64::from(report.buffered);
        kind.matched += report.matched;
        kind.mismatched += report.mismatched;
        kind.held += report.held as u64;
        all.push(Flow {
            card: nic.number().into(),
            flow: report.key.to_string(),
            buffered: report.buffered,
            matched: report.matched,
            mismatched: report.mismatched,
            waits: report.waits,
            held: report.held as u64,
            pending: report.pending as u64,
        });
    }
    let mut flows = Flows {
        cards: comparators.count() as u64,
        protection: protection(protocol),
        totals: Totals {
            matched: counters.matched,
            lowered: counters.lowered,
            released_by_checkpoint: counters.released_by_commit,
            released_unprotected: counters.released_at_once,
            held: held.frames as u64,
            held_bytes: held.bytes as u64,
            mismatched: counters.mismatched,
            unmatched: counters.unmatched,
            limited: counters.limited,
        },
        lag: protocol.protected().then(|| crate::status::lag(protocol)),
        kinds: kinds.into_values().collect(),
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
fn kind(class: Class) -> (&'static str, &'static str) {
    const FRAME: &str = "the whole frame";
    const HEADERS: &str = "the whole frame but for TTL, TOS, IP identification and checksums";
    const NOTHING: &str = "nothing: its tags are random, so all of it waits for checkpoints";
    match class {
        Class::Arp => ("ARP", FRAME),
        Class::Ethernet(_) => ("other", FRAME),
        Class::Fragment(_) if !class.is_compared() => ("SCTP", NOTHING),
        Class::Fragment(_) => (
            "IP fragments",
            "the datagrams that they make; what makes none waits for checkpoints",
        ),
        Class::Icmp => ("ICMP", HEADERS),
        Class::Icmpv6 => ("ICMPv6", HEADERS),
        Class::Ip(_) => ("other IP", HEADERS),
        Class::Malformed => ("malformed", FRAME),
        Class::Sctp => ("SCTP", NOTHING),
        Class::Tcp => (
            "TCP",
            "the bytes of the stream, SYN, FIN, RST; acknowledgements as upper bounds",
        ),
        Class::Udp => ("UDP", HEADERS),
    }
}
