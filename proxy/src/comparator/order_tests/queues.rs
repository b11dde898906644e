//! The comparator with guests whose card has several queues: each sends its flows side by side, in an order of its own.

use bytes::Bytes;
use proptest::prelude::*;

use crate::frame;
use crate::testkit::*;
use crate::verdict::Verdict;

/// The first number of every connection: the secondary's output comes translated to the primary's.
const FIRST: u32 = 999;
const CONNECTIONS: u16 = 3;
const DATAGRAMS: u8 = 4;

/// What a guest says on each of its flows: connections from their first word to their last, datagrams, and what has no flow.
fn flows() -> Vec<Vec<Bytes>> {
    let mut flows = Vec::new();
    for port in 5_000..5_000 + CONNECTIONS {
        let on_port = |tcp: Tcp| {
            Tcp {
                ports: (80, port),
                ..tcp
            }
            .frame()
        };
        let mut words = vec![on_port(Tcp::new(FIRST, 500, SYN | ACK, b""))];
        let mut next = FIRST + 1;
        for part in 0..DATAGRAMS {
            let text = [port.to_le_bytes()[0], part, 7, 7];
            words.push(on_port(Tcp::data(next, 500, &text)));
            next += 4;
        }
        words.push(on_port(Tcp::new(next, 500, FIN | ACK, b"")));
        flows.push(words);
    }
    for port in 6_000..6_002 {
        flows.push((0..DATAGRAMS).map(|number| udp(port, &[number; 9])).collect());
    }
    flows.push((0..DATAGRAMS).map(|last| arp(1, [10, 0, 0, last])).collect());
    flows.push(
        (0..DATAGRAMS)
            .map(|number| ethernet(&[], 0x88cc, &[number; 60]))
            .collect(),
    );
    flows
}

/// Sends the flows side by side: the next frame is of the flow that comes next in `picks`.
fn merged(flows: Vec<Vec<Bytes>>, picks: &[usize]) -> Vec<Bytes> {
    let mut flows: Vec<_> = flows.into_iter().map(|flow| flow.into_iter().peekable()).collect();
    let mut picks = picks.iter().copied().cycle();
    let mut sent = Vec::new();
    loop {
        flows.retain_mut(|flow| flow.peek().is_some());
        if flows.is_empty() {
            return sent;
        }
        let pick = picks.next().unwrap_or(0) % flows.len();
        sent.extend(flows[pick].next());
    }
}

fn picks() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(0_usize..60, 1..60)
}

proptest! {
    #[test]
    fn case_p18_guests_that_send_the_same_by_several_queues_are_equal(
        primary in picks(),
        secondary in picks(),
        turns in proptest::collection::vec(any::<bool>(), 1..80),
    ) {
        let [mut primary, mut secondary] = [primary, secondary]
            .map(|picks| merged(flows(), &picks).into_iter().peekable());
        let mut bench = Bench::new();
        let mut verdicts: Vec<Verdict> = Vec::new();
        let mut turns = turns.into_iter().cycle();
        while primary.peek().is_some() || secondary.peek().is_some() {
            let turn = turns.next().unwrap_or(true);
            if let Some(frame) = primary.next_if(|_| turn || secondary.peek().is_none()) {
                verdicts.extend(bench.primary(frame));
            } else if let Some(frame) = secondary.next() {
                verdicts.extend(bench.secondary(frame));
            }
        }
        prop_assert!(divergence(&verdicts).is_none(), "{:?}", divergence(&verdicts));
        prop_assert_eq!((bench.comparator.held().frames, bench.comparator.pending().frames), (0, 0));
        // Whatever has an order keeps it: that of each flow is the primary's.
        let left = released(&verdicts);
        for flow in flows() {
            let key = frame::parse(&flow[0]).key;
            let mut of_flow: Vec<Bytes> = left.iter().filter(|frame| frame::parse(frame).key == key).cloned().collect();
            let mut expected: Vec<Bytes> = flow.into_iter().filter(|frame| frame::parse(frame).key == key).collect();
            if !matches!(frame::parse(&expected[0]).body, frame::Body::Tcp(_)) {
                of_flow.sort();
                expected.sort();
            }
            prop_assert_eq!(of_flow, expected);
        }
    }
}

#[test]
fn case_p18_a_flow_that_changes_its_queue_costs_a_checkpoint_at_most() {
    // The primary's guest has moved the flow to a queue that is served earlier: its later frames overtake.
    for flow in flows() {
        let mut bench = Bench::new();
        let mut swapped = flow.clone();
        swapped[1..3].reverse();
        let mut verdicts: Vec<Verdict> = swapped.iter().flat_map(|frame| bench.primary(frame.clone())).collect();
        verdicts.extend(flow.iter().flat_map(|frame| bench.secondary(frame.clone())));
        verdicts.extend(bench.wait(checkpoint::limits::UNMATCHED_MAX));
        let waits = bench.comparator.held().frames > 0;
        assert!(
            !waits || divergence(&verdicts).is_some(),
            "what waits is told: {verdicts:?}"
        );
        verdicts.extend(bench.checkpoint());
        assert_eq!(released(&verdicts).len(), flow.len());
        assert_eq!(bench.comparator.held().frames, 0);
    }
}
