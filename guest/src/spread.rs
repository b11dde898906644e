//! By which of a network device's queues a frame leaves: all of a flow by the same, so that they leave in their order.

use core::net::IpAddr;

use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket,
};

/// EtherType of an 802.1Q tag, which has four bytes.
const TAGGED: u16 = 0x8100;
const TAG: usize = 4;

/// Returns the queue, of so many, for a frame that the guest sends.
pub fn queue(frame: &[u8], queues: usize) -> usize {
    if queues <= 1 {
        return 0;
    }
    flow(frame).map_or(0, |flow| {
        usize::try_from(crc32fast::hash(&flow)).unwrap_or_default() % queues
    })
}

/// Returns what tells the frame's flow from others: the client's address and both ports.
fn flow(bytes: &[u8]) -> Option<[u8; 20]> {
    let frame = EthernetFrame::new_checked(bytes).ok()?;
    let (kind, payload) = match frame.ethertype() {
        EthernetProtocol::Unknown(TAGGED) => {
            let inner = frame.payload().get(TAG - 2..)?;
            let (kind, rest) = inner.split_first_chunk::<2>()?;
            (EthernetProtocol::from(u16::from_be_bytes(*kind)), rest)
        }
        kind => (kind, frame.payload()),
    };
    let (to, protocol, payload) = match kind {
        EthernetProtocol::Ipv4 => {
            let packet = Ipv4Packet::new_checked(payload).ok()?;
            let is_whole = !packet.more_frags() && packet.frag_offset() == 0;
            let payload = if is_whole { packet.payload() } else { &[] };
            (IpAddress::from(packet.dst_addr()), packet.next_header(), payload)
        }
        EthernetProtocol::Ipv6 => {
            let packet = Ipv6Packet::new_checked(payload).ok()?;
            (
                IpAddress::from(packet.dst_addr()),
                packet.next_header(),
                packet.payload(),
            )
        }
        _ => return None,
    };
    let ports = match protocol {
        IpProtocol::Tcp => (TcpPacket::new_checked(payload).ok()).map(|tcp| [tcp.src_port(), tcp.dst_port()]),
        IpProtocol::Udp => (UdpPacket::new_checked(payload).ok()).map(|udp| [udp.src_port(), udp.dst_port()]),
        _ => None,
    };
    let mut flow = [0; 20];
    match IpAddr::from(to) {
        IpAddr::V4(to) => flow[..4].copy_from_slice(&to.octets()),
        IpAddr::V6(to) => flow[..16].copy_from_slice(&to.octets()),
    }
    let [own, theirs] = ports.unwrap_or_default();
    flow[16..18].copy_from_slice(&own.to_be_bytes());
    flow[18..].copy_from_slice(&theirs.to_be_bytes());
    Some(flow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// A UDP datagram over IPv4 to this client.
    fn datagram(client: u8, port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = [2; 12].to_vec();
        frame.extend([8, 0, 0x45, 0]);
        let length = |header: usize| u16::try_from(header + payload.len()).unwrap().to_be_bytes();
        frame.extend(length(28));
        frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, client, 0, 7]);
        frame.extend(port.to_be_bytes());
        frame.extend(length(8));
        frame.extend([0, 0]);
        frame.extend(payload);
        frame
    }

    fn tagged(frame: &[u8]) -> Vec<u8> {
        [&frame[..12], &[0x81, 0, 0, 7], &frame[12..]].concat()
    }

    #[test]
    fn flows_spread_over_the_queues_and_each_keeps_to_its_own() {
        let mut used = [0; 4];
        for client in 2..20 {
            for port in 4_000..4_020 {
                let there = queue(&datagram(client, port, b"one"), 4);
                assert_eq!(queue(&datagram(client, port, &[0; 900]), 4), there);
                assert_eq!(queue(&tagged(&datagram(client, port, b"two")), 4), there);
                used[there] += 1;
            }
        }
        assert!(used.iter().all(|flows| *flows > 45), "{used:?}");
    }

    #[test]
    fn a_fragment_goes_with_the_others_to_its_client() {
        let fragment = |at: u8| {
            let mut frame = datagram(9, 4_000, &[at; 64]);
            frame[20] = 0x20;
            frame[21] = at;
            queue(&frame, 8)
        };
        assert_eq!(fragment(0), fragment(8));
    }

    proptest! {
        #[test]
        fn it_is_one_of_the_queues_whatever_the_frame(bytes in proptest::collection::vec(any::<u8>(), 0..120), queues in 1..9_usize) {
            prop_assert!(queue(&bytes, queues) < queues);
        }
    }
}
