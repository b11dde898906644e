//! The sequence numbers that ICMP errors quote: a guest ignores an error about bytes that it has not sent.
//!
//! Without it no path MTU and no unreachable network would be told to the guest on a translated connection. Whatever
//! else the quotation says stays as it is, its own checksum too: nobody checks that of a part.

use checkpoint::limits::FRAME_HEADER_BYTES;
use etherparse::{LaxIpSlice, SlicedPacket, TransportSlice};

use crate::checksum;
use crate::flow::{Class, FlowKey};
use crate::frame::{self, TCP_SEQ_AT};
use crate::seq::Seq;

use super::{Offset, Translator};

/// Where the quotation starts in an ICMP error, and where its checksum is, in both versions.
const QUOTED_AT: usize = 8;
const ICMP_CHECKSUM_AT: usize = 2;

impl Translator {
    /// Translates what an ICMP error to the guest quotes of its segments.
    pub(super) fn quoted(&self, outer: &FlowKey, frame: &mut [u8]) {
        if !matches!(outer.class, Class::Icmp | Class::Icmpv6) {
            return;
        }
        let Some((key, icmp, at)) = quotation(outer, frame) else {
            return;
        };
        let Some(connection) = self.connections.get(&key) else {
            return;
        };
        if let Offset::Known(offset) = connection.offset {
            let mut seq = [0; 4];
            seq.copy_from_slice(&frame[icmp + at..icmp + at + 4]);
            let seq = Seq(u32::from_be_bytes(seq)).plus(offset);
            checksum::replace_u32(frame, icmp, at, ICMP_CHECKSUM_AT, seq.0.to_be_bytes());
        }
    }
}

/// Returns which connection a frame quotes, where its ICMP header is, and from there where the quoted sequence number is.
fn quotation(outer: &FlowKey, frame: &[u8]) -> Option<(FlowKey, usize, usize)> {
    let packet = SlicedPacket::from_ethernet(frame.get(FRAME_HEADER_BYTES..)?).ok()?;
    let message = match packet.transport.as_ref()? {
        TransportSlice::Icmpv4(icmp) if matches!(icmp.type_u8(), 3 | 11 | 12) => icmp.slice(),
        TransportSlice::Icmpv6(icmp) if matches!(icmp.type_u8(), 1..=4) => icmp.slice(),
        _ => return None,
    };
    let (ip, _) = LaxIpSlice::from_slice(message.get(QUOTED_AT..)?).ok()?;
    let payload = ip.payload();
    if payload.ip_number.0 != 6 || payload.fragmented {
        return None;
    }
    let &[a, b, c, d, _, _, _, _, ..] = payload.payload else {
        return None;
    };
    let ports = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    let ends = (ip.source_addr(), ip.destination_addr());
    let key = FlowKey::addressed(Class::Tcp, outer.vlans, ends, ports);
    let tcp = frame::offset(message, payload.payload)?;
    Some((key, frame::offset(frame, message)?, tcp + TCP_SEQ_AT))
}
