//! Turns away new connections while a port has no free socket, the way a full backlog does: without an answer.
//!
//! The client tries again after a while; smoltcp on its own would reset the connection.

use smoltcp::phy::{Device, DeviceCapabilities, RxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket};

/// Ports that take no new connection now.
pub(crate) type Full = [Option<u16>; 4];

/// A network device behind the gate.
pub(crate) struct Gate<'a, D> {
    pub(crate) device: &'a mut D,
    pub(crate) full: Full,
}

/// A received frame at the gate.
pub(crate) struct Gated<T> {
    token: T,
    full: Full,
}

impl<D: Device> Device for Gate<'_, D> {
    type RxToken<'b>
        = Gated<D::RxToken<'b>>
    where
        Self: 'b;
    type TxToken<'b>
        = D::TxToken<'b>
    where
        Self: 'b;

    fn receive(&mut self, now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let full = self.full;
        self.device
            .receive(now)
            .map(|(token, room)| (Gated { token, full }, room))
    }

    fn transmit(&mut self, now: Instant) -> Option<Self::TxToken<'_>> {
        self.device.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.device.capabilities()
    }
}

impl<T: RxToken> RxToken for Gated<T> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let full = self.full;
        self.token.consume(|frame| {
            let stopped =
                full.iter().any(Option::is_some) && opens(frame).is_some_and(|port| full.contains(&Some(port)));
            f(if stopped { &[] } else { frame })
        })
    }
}

/// The port that this frame wants to open a connection to.
fn opens(frame: &[u8]) -> Option<u16> {
    let frame = EthernetFrame::new_checked(frame).ok()?;
    let payload = match frame.ethertype() {
        EthernetProtocol::Ipv4 => {
            let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
            (packet.next_header() == IpProtocol::Tcp && packet.frag_offset() == 0).then_some(packet.payload())?
        }
        EthernetProtocol::Ipv6 => {
            let packet = Ipv6Packet::new_checked(frame.payload()).ok()?;
            (packet.next_header() == IpProtocol::Tcp).then_some(packet.payload())?
        }
        _ => return None,
    };
    let segment = TcpPacket::new_checked(payload).ok()?;
    (segment.syn() && !segment.ack()).then(|| segment.dst_port())
}
