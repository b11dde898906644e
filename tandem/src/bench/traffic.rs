//! What the benchmark of the proxy sends through it, and the TAPs that it is sent through.
//!
//! ```text
//!   entry ── bridge ── near ──► (a copy, or translator and comparator) ──► far     all in a namespace of its own
//! ```
//!
//! What is written to `entry` comes out at `near`; the kernel drops what is written to `far`, which has no address. All three
//! leave to each other what they can, as between guests.

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use checkpoint::limits::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES};
use machine::netns::make_lasting_tap;
use machine::offload::Offloads;
use machine::tap::Tap;

use crate::lab::Namespace;

const BRIDGE: &str = "br0";
const NAMES: [&str; 3] = ["entry", "near", "far"];
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const CLIENTS: u32 = u32::from_be_bytes([10, 10, 0, 0]);
/// Flows with one client's address.
const PORTS: usize = 1_000;
/// How long the bridge is waited for, at most.
const SETTLE_EVERY: Duration = Duration::from_millis(10);
const SETTLE_TRIES: usize = 1_000;
/// Where the packet starts.
const PACKET: usize = FRAME_HEADER_BYTES + 14;
const IPV4: usize = 20;
const UDP: usize = 8;
const TCP: usize = 32;
/// What a segment that is left to the network to be cut is cut into: what Ethernet takes.
const PIECE: u16 = 1_448;

/// Three open TAPs, and the namespace that they are in.
pub(super) struct Road {
    pub(super) entry: Tap,
    pub(super) near: Tap,
    pub(super) far: Tap,
    _namespace: Namespace,
}

/// What kind of frames are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frames {
    /// The smallest that Ethernet has.
    Udp64,
    /// The largest that it has, with timestamps.
    Tcp1514,
    /// The largest that a guest leaves to the network to be cut, and its checksum, too.
    Tcp64k,
}

/// Frames of many flows in turn, each with bytes of its own.
pub(super) struct Traffic {
    frames: Frames,
    flows: usize,
    sent: usize,
}

impl Road {
    /// Makes it.
    pub(super) fn make() -> Result<Self> {
        let namespace = Namespace::new("road")?;
        namespace.sysctl("ipv6/conf/default/disable_ipv6", "1")?;
        for name in NAMES {
            let made = namespace.run(move || make_lasting_tap(name));
            made.context(
                "can't make a TAP device: load the kernel's module with `modprobe tun` and check /dev/net/tun",
            )?;
        }
        namespace.netlink(async |net| {
            net.add_bridge(BRIDGE).await?;
            net.join_bridge("entry", BRIDGE).await?;
            net.join_bridge("near", BRIDGE).await?;
            for name in NAMES {
                net.up(name).await?;
            }
            Ok(())
        })?;
        let open = |name| {
            namespace
                .run(move || Tap::open_with_offloads(name))
                .context("can't open a TAP")
        };
        let road = Self {
            entry: open("entry")?,
            near: open("near")?,
            far: open("far")?,
            _namespace: namespace,
        };
        road.near
            .set_offloads(Offloads::ALL)
            .context("the TAP cuts segments itself")?;
        road.settle()?;
        Ok(road)
    }

    /// Waits until the bridge forwards, which it begins to do some time after it was told to.
    fn settle(&self) -> Result<()> {
        let mut probe = [0; FRAME_HEADER_BYTES + 60];
        let wire = &mut probe[FRAME_HEADER_BYTES..];
        wire[..6].fill(0xff);
        // From a hardware address of its own, with an EtherType for local experiments.
        wire[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 7, 0x88, 0xb5]);
        let mut frame = vec![0; FRAME_BYTES_MAX];
        let mut has_passed = false;
        for _ in 0..SETTLE_TRIES {
            if !has_passed {
                self.entry.send(&probe).context("the TAP takes no frame")?;
            }
            thread::sleep(SETTLE_EVERY);
            let mut passes = false;
            while self.near.recv(&mut frame).context("the TAP can't be read")?.is_some() {
                passes = true;
            }
            if has_passed && !passes {
                return Ok(());
            }
            has_passed |= passes;
        }
        anyhow::bail!("a bridge forwards nothing from one TAP to another")
    }
}

impl Frames {
    /// Returns what the tables call them.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Udp64 => "udp 64",
            Self::Tcp1514 => "tcp 1514",
            Self::Tcp64k => "tcp 64k",
        }
    }

    /// Returns how many come at once: what a guest sends between two looks at its queue, or about 512 KiB.
    pub(super) fn batch(self) -> usize {
        match self {
            Self::Udp64 | Self::Tcp1514 => 64,
            Self::Tcp64k => 8,
        }
    }

    /// Returns their length, without the header before them.
    pub(super) fn length(self) -> usize {
        match self {
            Self::Udp64 => 64,
            Self::Tcp1514 => 1_514,
            // As many whole pieces as fit into a packet.
            Self::Tcp64k => 14 + IPV4 + TCP + 45 * usize::from(PIECE),
        }
    }
}

impl Traffic {
    /// Begins anew.
    pub(super) fn new(frames: Frames, flows: usize) -> Self {
        Self { frames, flows, sent: 0 }
    }

    /// Writes the next frame.
    pub(super) fn next(&mut self, frame: &mut Vec<u8>) {
        let (flow, round) = (self.sent % self.flows, self.sent / self.flows);
        self.sent += 1;
        frame.clear();
        frame.resize(FRAME_HEADER_BYTES + self.frames.length(), 0);
        let addresses = PACKET - 2;
        frame[FRAME_HEADER_BYTES..addresses].copy_from_slice(&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1]);
        frame[addresses..PACKET].copy_from_slice(&[8, 0]);
        let client = CLIENTS + number(flow / PORTS);
        let client_port = u16::try_from(10_000 + flow % PORTS).unwrap_or(u16::MAX);
        let transport = PACKET + IPV4;
        let (protocol, header) = match self.frames {
            Frames::Udp64 => (17, UDP),
            Frames::Tcp1514 | Frames::Tcp64k => (6, TCP),
        };
        ip(&mut frame[PACKET..], protocol, client);
        let length = frame.len() - transport;
        let fields = &mut frame[transport..];
        fields[..2].copy_from_slice(&80_u16.to_be_bytes());
        fields[2..4].copy_from_slice(&client_port.to_be_bytes());
        if protocol == 17 {
            fields[4..6].copy_from_slice(&u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
        } else {
            let sequence = number(round).wrapping_mul(number(length - TCP));
            fields[4..8].copy_from_slice(&sequence.to_be_bytes());
            fields[8..12].copy_from_slice(&7_u32.to_be_bytes());
            fields[12..16].copy_from_slice(&[0x80, 0x10, 1, 0]);
            fields[20..24].copy_from_slice(&[1, 1, 8, 10]);
            fields[24..28].copy_from_slice(&number(round).to_be_bytes());
        }
        if self.frames == Frames::Tcp64k {
            // The checksum is to be filled in; nobody here does, so what the field holds does not matter.
            let place = |at: usize| u16::try_from(at - FRAME_HEADER_BYTES).unwrap_or(u16::MAX).to_le_bytes();
            frame[..2].copy_from_slice(&[1, 1]);
            frame[2..4].copy_from_slice(&place(transport + TCP));
            frame[4..6].copy_from_slice(&PIECE.to_le_bytes());
            frame[6..8].copy_from_slice(&place(transport));
            frame[8] = 16;
        }
        let fields = &mut frame[transport..];
        fields[header..header + 8].copy_from_slice(&(self.sent as u64).to_be_bytes());
    }
}

/// Returns which frame this is, counted from 1.
pub(super) fn number_of(frame: &[u8]) -> u64 {
    let header = if frame[PACKET + 9] == 17 { UDP } else { TCP };
    let at = PACKET + IPV4 + header;
    frame[at..at + 8]
        .iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn number(value: usize) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "sequence numbers wrap")]
    let number = value as u32;
    number
}

fn ip(packet: &mut [u8], protocol: u8, client: u32) {
    let length = u16::try_from(packet.len()).unwrap_or(u16::MAX).to_be_bytes();
    packet[..12].copy_from_slice(&[0x45, 0, length[0], length[1], 0, 0, 0x40, 0, 64, protocol, 0, 0]);
    packet[12..16].copy_from_slice(&GUEST.octets());
    packet[16..20].copy_from_slice(&client.to_be_bytes());
    let sum: u32 = packet[..IPV4]
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap_or(u16::MAX);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_take_turns_and_each_goes_on_where_it_was() {
        let mut traffic = Traffic::new(Frames::Tcp1514, 2);
        let mut frame = Vec::new();
        let mut seen = Vec::new();
        for number in 1..=4 {
            traffic.next(&mut frame);
            assert_eq!((number_of(&frame), frame.len()), (number, 1_526));
            seen.push((frame[48..50].to_vec(), frame[50..54].to_vec()));
        }
        assert_eq!(seen[0].0, seen[2].0);
        assert_ne!(seen[0].0, seen[1].0);
        assert_eq!(seen[2].1, 1_448_u32.to_be_bytes());
    }
}
