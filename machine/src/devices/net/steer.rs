//! Which of a card's receive queues a frame goes to: a pure function of its flow.
//!
//! The two guests of a pair get the same frames, and each has to find a flow on the queue where the other finds it, before
//! and after a takeover. So nothing counts here but the frame itself: not what the guest sent last and by which queue, which
//! would depend on the moment. Both directions of a flow come to the same queue. Total: what does not parse goes to the first.

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};

use crate::offload::HEADER_BYTES;

/// An odd number without a pattern: 2⁶⁴ divided by the golden ratio.
const SCATTER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Returns the queue, of so many, for a frame with its header.
pub(super) fn queue(frame: &[u8], queues: u16) -> u16 {
    if queues <= 1 {
        return 0;
    }
    let Some(flow) = flow(frame.get(HEADER_BYTES..).unwrap_or_default()) else {
        return 0;
    };
    let mixed = (flow ^ flow >> 32).wrapping_mul(SCATTER) >> 32;
    let queue = (mixed * u64::from(queues)) >> 32;
    u16::try_from(queue).expect("it is less than the number of queues")
}

/// Returns what both directions of a flow have in common. Fragments have no ports, nor has a datagram that travels in such:
/// its first fragment goes where the others go.
fn flow(frame: &[u8]) -> Option<u64> {
    let packet = LaxSlicedPacket::from_ethernet(frame).ok()?;
    let addresses = match packet.net? {
        LaxNetSlice::Ipv4(ip) => {
            let header = ip.header();
            let [from, to] = [header.source(), header.destination()].map(u32::from_be_bytes);
            u64::from(from ^ to)
        }
        LaxNetSlice::Ipv6(ip) => {
            let header = ip.header();
            let [from, to] = [header.source(), header.destination()].map(u128::from_be_bytes);
            let both = from ^ to;
            low(both) ^ low(both >> 64).rotate_left(32)
        }
        LaxNetSlice::Arp(_) => return None,
    };
    let ports = match packet.transport {
        Some(TransportSlice::Tcp(tcp)) => tcp.source_port() ^ tcp.destination_port(),
        Some(TransportSlice::Udp(udp)) => udp.source_port() ^ udp.destination_port(),
        _ => 0,
    };
    Some(addresses ^ u64::from(ports) << 16)
}

#[expect(clippy::cast_possible_truncation, reason = "that is its purpose")]
const fn low(value: u128) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

    /// A frame between these ends.
    fn tcp(from: ([u8; 4], u16), to: ([u8; 4], u16), payload: &[u8]) -> Vec<u8> {
        let packet = PacketBuilder::ethernet2(MACS[0], MACS[1]);
        let packet = packet.ipv4(from.0, to.0, 64).tcp(from.1, to.1, 1, 1_000);
        let mut frame = vec![0; HEADER_BYTES];
        packet.write(&mut frame, payload).unwrap();
        frame
    }

    fn udp6(from: ([u8; 16], u16), to: ([u8; 16], u16), vlan: bool) -> Vec<u8> {
        let packet = PacketBuilder::ethernet2(MACS[0], MACS[1]);
        let mut frame = vec![0; HEADER_BYTES];
        if vlan {
            let packet = packet.single_vlan(7.try_into().unwrap());
            packet
                .ipv6(from.0, to.0, 64)
                .udp(from.1, to.1)
                .write(&mut frame, b"x")
                .unwrap();
        } else {
            packet
                .ipv6(from.0, to.0, 64)
                .udp(from.1, to.1)
                .write(&mut frame, b"x")
                .unwrap();
        }
        frame
    }

    #[test]
    fn flows_spread_over_the_queues_and_each_keeps_its_own_both_ways() {
        for queues in 2..=8 {
            let mut used = vec![0; usize::from(queues)];
            for port in 40_000..41_000 {
                let (client, server) = (([10, 0, 0, 9], port), ([10, 0, 0, 1], 80));
                let there = queue(&tcp(client, server, b""), queues);
                assert_eq!(queue(&tcp(client, server, &[7; 900]), queues), there);
                assert_eq!(queue(&tcp(server, client, b"answer"), queues), there);
                used[usize::from(there)] += 1;
                let [client, server] = [[0xfd; 16], [0xfc; 16]];
                let (client, server) = ((client, port), (server, 53));
                let there = queue(&udp6(client, server, false), queues);
                assert_eq!(queue(&udp6(server, client, true), queues), there);
                used[usize::from(there)] += 1;
            }
            let fair = 2_000 / u32::from(queues);
            assert!(used.iter().all(|&flows| flows > fair / 2), "{used:?}");
        }
    }

    #[test]
    fn each_client_has_its_queue_where_there_are_no_ports() {
        let echo = |client: u8| {
            let packet = PacketBuilder::ethernet2(MACS[0], MACS[1]).ipv4([10, 0, 0, client], [10, 0, 0, 1], 64);
            let mut frame = vec![0; HEADER_BYTES];
            packet.icmpv4_echo_request(1, 1).write(&mut frame, b"ping").unwrap();
            queue(&frame, 2)
        };
        let first = (2..100).filter(|client| echo(*client) == 0).count();
        assert!((20..80).contains(&first), "{first}");
    }

    #[test]
    fn all_fragments_of_a_datagram_go_to_one_queue() {
        // The first has ports to be read, and the others have not.
        let fragment = |at: u16, more: bool| {
            let mut frame = tcp(([10, 0, 0, 9], 40_000), ([10, 0, 0, 1], 80), &[0; 64]);
            let flags = (u16::from(more) << 13) | (at / 8);
            frame[HEADER_BYTES + 14 + 6..][..2].copy_from_slice(&flags.to_be_bytes());
            frame
        };
        let queues = [fragment(0, true), fragment(64, true), fragment(128, false)].map(|frame| queue(&frame, 8));
        assert!(queues.iter().all(|queue| *queue == queues[0]), "{queues:?}");
    }

    #[test]
    fn what_has_no_flow_goes_to_the_first_queue() {
        let mut arp = vec![0xff; HEADER_BYTES + 60];
        arp[HEADER_BYTES + 12..][..2].copy_from_slice(&[8, 6]);
        assert_eq!(queue(&arp, 8), 0);
        assert_eq!(queue(&[], 8), 0);
        assert_eq!(queue(&[0xff; HEADER_BYTES + 13], 8), 0);
        assert_eq!(queue(&tcp(([10, 0, 0, 9], 1), ([10, 0, 0, 1], 80), b""), 1), 0);
    }

    proptest! {
        #[test]
        fn it_is_one_of_the_queues_whatever_the_frame(bytes in proptest::collection::vec(any::<u8>(), 0..200), queues in 1..9_u16) {
            prop_assert!(queue(&bytes, queues) < queues);
        }
    }
}
