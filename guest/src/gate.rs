//! Turns away what smoltcp would answer wrongly, without an answer of its own.
//!
//! A new connection while a port has no free socket, the way a full backlog does: the client tries again after a
//! while; smoltcp would reset the connection. And a repeated SYN of a connection that is being opened: smoltcp would give
//! it to the first socket that listens, which may stand before the one that has it, and later reset the client.

use smoltcp::phy::{Device, DeviceCapabilities, RxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpAddress, IpEndpoint, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket,
};

/// Ports that take no new connection now.
pub(crate) type Full = [Option<u16>; 4];
/// Connections that are being opened: the port here, and who opens it.
pub(crate) type Opening = [(u16, IpEndpoint)];

/// A network device behind the gate.
pub(crate) struct Gate<'a, D> {
    pub(crate) device: &'a mut D,
    pub(crate) full: Full,
    pub(crate) opening: &'a Opening,
}

/// A received frame at the gate.
pub(crate) struct Gated<'a, T> {
    token: T,
    full: Full,
    opening: &'a Opening,
}

impl<D: Device> Device for Gate<'_, D> {
    type RxToken<'b>
        = Gated<'b, D::RxToken<'b>>
    where
        Self: 'b;
    type TxToken<'b>
        = D::TxToken<'b>
    where
        Self: 'b;

    fn receive(&mut self, now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let (full, opening) = (self.full, self.opening);
        self.device
            .receive(now)
            .map(|(token, room)| (Gated { token, full, opening }, room))
    }

    fn transmit(&mut self, now: Instant) -> Option<Self::TxToken<'_>> {
        self.device.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.device.capabilities()
    }
}

impl<T: RxToken> RxToken for Gated<'_, T> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let (full, opening) = (self.full, self.opening);
        self.token.consume(|frame| {
            let guarded = !opening.is_empty() || full.iter().any(Option::is_some);
            let stopped = guarded
                && opens(frame)
                    .is_some_and(|(port, peer)| full.contains(&Some(port)) || opening.contains(&(port, peer)));
            f(if stopped { &[] } else { frame })
        })
    }
}

/// The port that this frame wants to open a connection to, and who does.
fn opens(frame: &[u8]) -> Option<(u16, IpEndpoint)> {
    let frame = EthernetFrame::new_checked(frame).ok()?;
    let (source, payload) = match frame.ethertype() {
        EthernetProtocol::Ipv4 => {
            let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
            let whole = packet.next_header() == IpProtocol::Tcp && packet.frag_offset() == 0;
            whole.then_some((IpAddress::Ipv4(packet.src_addr()), packet.payload()))?
        }
        EthernetProtocol::Ipv6 => {
            let packet = Ipv6Packet::new_checked(frame.payload()).ok()?;
            (packet.next_header() == IpProtocol::Tcp)
                .then_some((IpAddress::Ipv6(packet.src_addr()), packet.payload()))?
        }
        _ => return None,
    };
    let segment = TcpPacket::new_checked(payload).ok()?;
    (segment.syn() && !segment.ack()).then(|| (segment.dst_port(), IpEndpoint::new(source, segment.src_port())))
}
