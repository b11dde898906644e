//! Frames by name: what a scenario writes `A1` for, and how a frame is shown.
//!
//! A name that begins with a small letter is a frame of the clients, with a capital one of the guest. A name that was
//! not defined is a datagram that carries the name itself. Driven by the runner; holds no state of the pair.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use bytes::Bytes;
use checkpoint::Nic;
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TcpOptionElement, TransportSlice};

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const GUEST: [u8; 4] = [10, 0, 0, 1];
const CLIENTS_PORT: u16 = 5_000;

/// The frames that have names.
#[derive(Default)]
pub(super) struct Frames {
    by_name: BTreeMap<String, Bytes>,
    by_bytes: BTreeMap<Bytes, String>,
}

impl Frames {
    /// Returns the frame of that name and the card that it passes: the first, or the one that `NAME@1` says.
    pub(super) fn at_card(&mut self, name: &str) -> Result<(Nic, Bytes), String> {
        let (name, nic) = match name.split_once('@') {
            Some((name, number)) => {
                let nic = number.parse().ok().and_then(Nic::new);
                (name, nic.ok_or_else(|| format!("'{number}' is no network card"))?)
            }
            None => (name, Nic::FIRST),
        };
        Ok((nic, self.named(name)?))
    }

    /// Shows a frame and the card that it passes.
    pub(super) fn show_at(&self, nic: Nic, frame: &Bytes) -> String {
        let name = self.show(frame);
        if nic == Nic::FIRST {
            name
        } else {
            format!("{name}@{}", nic.number())
        }
    }

    /// Returns the frame of that name, making a datagram if the name is new.
    pub(super) fn named(&mut self, name: &str) -> Result<Bytes, String> {
        if let Some(frame) = self.by_name.get(name) {
            return Ok(frame.clone());
        }
        if !name.chars().all(char::is_alphanumeric) || name.is_empty() {
            return Err(format!("'{name}' is no name of a frame"));
        }
        let frame = udp(0, from_client(name), name.as_bytes());
        self.remember(name, frame.clone());
        Ok(frame)
    }

    /// Gives a frame a name: `NAME udp c1 "text"`, or `NAME tcp c1 seq=1 ack=2 SYN FIN RST sack=3..4 "text"`.
    pub(super) fn define(&mut self, words: &[String]) -> Result<(), String> {
        let [name, protocol, client, details @ ..] = words else {
            return Err("a frame has a name, a protocol and a client".to_owned());
        };
        let client: u16 = client
            .strip_prefix('c')
            .and_then(|number| number.parse().ok())
            .ok_or_else(|| format!("'{client}' is no client: c1, c2, …"))?;
        let frame = match protocol.as_str() {
            "udp" => {
                let text = details.first().map_or("", |text| text.trim_start_matches('"'));
                udp(client, from_client(name), text.as_bytes())
            }
            "tcp" => tcp(client, from_client(name), details)?,
            other => return Err(format!("'{other}' is no protocol: udp, tcp")),
        };
        self.remember(name, frame);
        Ok(())
    }

    /// Returns the frame's name, or what it is.
    pub(super) fn show(&self, frame: &Bytes) -> String {
        self.by_bytes.get(frame).cloned().unwrap_or_else(|| describe(frame))
    }

    fn remember(&mut self, name: &str, frame: Bytes) {
        self.by_bytes.insert(frame.clone(), name.to_owned());
        self.by_name.insert(name.to_owned(), frame);
    }
}

fn from_client(name: &str) -> bool {
    name.starts_with(|first: char| first.is_lowercase())
}

/// Returns hardware and network addresses of source and destination.
fn ends(client: u16, inbound: bool) -> ([[u8; 6]; 2], [[u8; 4]; 2]) {
    let address = [10, 0, 0, 100 + u8::try_from(client).unwrap_or(u8::MAX)];
    if inbound {
        ([CLIENT_MAC, GUEST_MAC], [address, GUEST])
    } else {
        ([GUEST_MAC, CLIENT_MAC], [GUEST, address])
    }
}

fn udp(client: u16, inbound: bool, payload: &[u8]) -> Bytes {
    let (mac, ip) = ends(client, inbound);
    let ports = if inbound {
        (CLIENTS_PORT + client, 7)
    } else {
        (7, CLIENTS_PORT + client)
    };
    let builder = PacketBuilder::ethernet2(mac[0], mac[1])
        .ipv4(ip[0], ip[1], 64)
        .udp(ports.0, ports.1);
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).expect("a vector takes all");
    proxy::complete(&frame)
}

fn tcp(client: u16, inbound: bool, details: &[String]) -> Result<Bytes, String> {
    let (mac, ip) = ends(client, inbound);
    let ports = if inbound {
        (CLIENTS_PORT + client, 80)
    } else {
        (80, CLIENTS_PORT + client)
    };
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("'{text}' is no number"));
    let (mut seq, mut payload) = (0, "");
    let (mut ack, mut flags, mut options) = (None, Vec::new(), Vec::new());
    for word in details {
        if let Some(text) = word.strip_prefix('"') {
            payload = text;
        } else if let Some(text) = word.strip_prefix("seq=") {
            seq = number(text)?;
        } else if let Some(text) = word.strip_prefix("ack=") {
            ack = Some(number(text)?);
        } else if let Some(text) = word.strip_prefix("sack=") {
            let (left, right) = text.split_once("..").ok_or("a SACK block is sack=LEFT..RIGHT")?;
            let block = (number(left)?, number(right)?);
            options.push(TcpOptionElement::SelectiveAcknowledgement(block, [None; 3]));
        } else {
            flags.push(word.as_str());
        }
    }
    let mut builder = PacketBuilder::ethernet2(mac[0], mac[1])
        .ipv4(ip[0], ip[1], 64)
        .tcp(ports.0, ports.1, seq, 1_000);
    if let Some(ack) = ack {
        builder = builder.ack(ack);
    }
    for flag in flags {
        builder = match flag {
            "SYN" => builder.syn(),
            "FIN" => builder.fin(),
            "RST" => builder.rst(),
            other => return Err(format!("'{other}' is no part of a segment")),
        };
    }
    let builder = builder.options(&options).map_err(|error| error.to_string())?;
    let mut frame = Vec::new();
    builder
        .write(&mut frame, payload.as_bytes())
        .expect("a vector takes all");
    Ok(proxy::complete(&frame))
}

/// Says what a frame without a name is.
fn describe(frame: &Bytes) -> String {
    let frame = proxy::on_wire(frame);
    let Ok(packet) = SlicedPacket::from_ethernet(&frame) else {
        return format!("{} bytes", frame.len());
    };
    if let Some(NetSlice::Arp(arp)) = &packet.net {
        return format!("arp of {}", address(arp.sender_protocol_addr()));
    }
    match &packet.transport {
        Some(TransportSlice::Tcp(segment)) => {
            let client = segment.source_port().max(segment.destination_port()) - CLIENTS_PORT;
            let mut text = format!("(tcp c{client} seq={}", segment.sequence_number());
            if segment.ack() {
                let _ = write!(text, " ack={}", segment.acknowledgment_number());
            }
            for (set, name) in [(segment.syn(), "SYN"), (segment.fin(), "FIN"), (segment.rst(), "RST")] {
                if set {
                    let _ = write!(text, " {name}");
                }
            }
            for option in segment.options_iterator() {
                if let Ok(TcpOptionElement::SelectiveAcknowledgement((left, right), _)) = option {
                    let _ = write!(text, " sack={left}..{right}");
                }
            }
            if !segment.payload().is_empty() {
                let _ = write!(text, " \"{}\"", String::from_utf8_lossy(segment.payload()));
            }
            text + ")"
        }
        Some(TransportSlice::Udp(datagram)) => format!("(udp \"{}\")", String::from_utf8_lossy(datagram.payload())),
        _ if frame.get(12..14) == Some(&[0x80, 0x35]) => "rarp".to_owned(),
        _ => format!("{} bytes", frame.len()),
    }
}

fn address(bytes: &[u8]) -> String {
    bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(".")
}
