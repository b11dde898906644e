//! What the network has to learn of a guest after a takeover.
//!
//! [`AddressBook`] watches what the guest sends and remembers its addresses for each VLAN. What the
//! guest says of itself (ARP, neighbour discovery) counts; source addresses of other packets count only
//! where it has said nothing, because a guest that routes sends packets of others.
//!
//! [`NetworkState`] is the network's part of a checkpoint: the translator and the addresses.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::Bytes;
use checkpoint::limits::FRAME_HEADER_BYTES;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};

use crate::checksum;
use crate::codec::{Reader, StateError, VERSION, put_address, put_count, put_vlans};
use crate::flow::{Class, FlowKey, Vlans};
use crate::frame::Frame;
use crate::sequence::{Snapshot, Translator};

/// Most addresses that are remembered.
const ADDRESSES_MAX: usize = 256;
/// Most pairs of a MAC address and VLANs that are remembered.
const MACS_MAX: usize = 64;

const BROADCAST: [u8; 6] = [0xff; 6];
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const FLAG_ROUTER: u8 = 0x80;
const FLAG_OVERRIDE: u8 = 0x20;

type Mac = [u8; 6];

/// The addresses of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressBook {
    macs: BTreeMap<(Vlans, Mac), u64>,
    addresses: BTreeMap<(Vlans, Mac, IpAddr), Known>,
    /// What the last frame was sent from, if it said no more than that.
    latest: Option<(Vlans, Mac, IpAddr)>,
    tick: u64,
}

/// How an address is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Known {
    /// The guest said that the address is its own.
    claimed: bool,
    /// The guest said that it is a router there.
    router: bool,
    used: u64,
}

/// The network's part of a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct NetworkState {
    /// The connections' sequence offsets and clocks.
    pub translator: Translator,
    /// The guest's addresses.
    pub addresses: AddressBook,
}

impl NetworkState {
    /// Returns the bytes for the checkpoint, below 1 MiB, and how many connections they leave out.
    #[must_use]
    pub fn encode(&self) -> Snapshot {
        let Snapshot { encoded, left_out } = self.translator.snapshot();
        let mut out = Vec::with_capacity(encoded.len() + 64);
        out.push(VERSION);
        put_count(&mut out, encoded.len());
        out.extend(encoded);
        out.extend(self.addresses.snapshot());
        Snapshot { encoded: out, left_out }
    }

    /// Takes over the state of a checkpoint, all or nothing.
    ///
    /// # Errors
    /// Fails if the bytes are not such a state within the bounds.
    pub fn replace(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let mut reader = Reader(bytes);
        reader.version()?;
        let length = reader.count("bytes of connections", bytes.len(), 1)?;
        let mut translator = self.translator.clone();
        translator.replace(reader.bytes(length)?)?;
        self.addresses.replace(reader.0)?;
        self.translator = translator;
        Ok(())
    }

    /// Checks that [`NetworkState::replace`] would succeed.
    ///
    /// # Errors
    /// Fails if the bytes are not such a state within the bounds.
    pub fn check(bytes: &[u8]) -> Result<(), StateError> {
        Self::default().replace(bytes)
    }
}

impl AddressBook {
    /// Makes an empty book.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Learns from a frame that the guest sends.
    pub(crate) fn learn(&mut self, parsed: &Frame, bytes: &[u8]) {
        let FlowKey {
            class, vlans, source, ..
        } = parsed.key;
        let Some(mac) = bytes
            .get(FRAME_HEADER_BYTES + 6..FRAME_HEADER_BYTES + 12)
            .and_then(|mac| Mac::try_from(mac).ok())
        else {
            return;
        };
        let is_unreadable = class == Class::Malformed && source.address.is_unspecified();
        if mac[0] & 1 != 0 || mac == [0; 6] || is_unreadable {
            return;
        }
        let says_more = matches!(class, Class::Arp | Class::Icmpv6);
        // What has been used again and again since anything else was used is the latest used without being told again.
        if !says_more && self.latest == Some((vlans, mac, source.address)) {
            return;
        }
        self.latest = None;
        self.tick += 1;
        remember(
            &mut self.macs,
            MACS_MAX,
            (vlans, mac),
            self.tick,
            |used| (true, *used),
            |used, tick| *used = tick,
        );
        if says_more {
            self.learn_claims(vlans, mac, bytes);
        } else {
            // Unspecified if there is none.
            self.note(vlans, mac, source.address, false, false);
            self.latest = Some((vlans, mac, source.address));
        }
    }

    /// Learns from what a guest says of its own addresses.
    fn learn_claims(&mut self, vlans: Vlans, mac: Mac, bytes: &[u8]) {
        let Ok(packet) = SlicedPacket::from_ethernet(&bytes[FRAME_HEADER_BYTES..]) else {
            return;
        };
        match &packet.net {
            Some(NetSlice::Arp(arp)) => {
                if let ([a, b, c, d], Ok(sender)) = (arp.sender_protocol_addr(), Mac::try_from(arp.sender_hw_addr())) {
                    self.note(vlans, sender, IpAddr::V4(Ipv4Addr::new(*a, *b, *c, *d)), true, false);
                }
            }
            Some(NetSlice::Ipv6(ip)) => {
                let source = IpAddr::V6(ip.header().source_addr());
                let message = match &packet.transport {
                    Some(TransportSlice::Icmpv6(icmp)) if ip.header().hop_limit() == 255 => icmp.slice(),
                    _ => &[],
                };
                match message {
                    [NEIGHBOUR_ADVERTISEMENT, _, _, _, flags, _, _, _, target @ ..] if target.len() >= 16 => {
                        let mut octets = [0; 16];
                        octets.copy_from_slice(&target[..16]);
                        self.note(vlans, mac, IpAddr::V6(octets.into()), true, flags & FLAG_ROUTER != 0);
                    }
                    [NEIGHBOUR_SOLICITATION | ROUTER_SOLICITATION, ..] => self.note(vlans, mac, source, true, false),
                    _ => self.note(vlans, mac, source, false, false),
                }
            }
            Some(NetSlice::Ipv4(ip)) => self.note(vlans, mac, IpAddr::V4(ip.header().source_addr()), false, false),
            None => {}
        }
    }

    /// Returns the frames that tell the network where the guest is now; to be sent a few times.
    #[must_use]
    pub fn announcements(&self) -> Vec<Bytes> {
        let mut frames = Vec::new();
        for (vlans, mac) in self.macs.keys() {
            frames.push(arp(ETHERTYPE_RARP, 3, vlans, *mac, *mac, Ipv4Addr::UNSPECIFIED));
        }
        for ((vlans, mac, address), known) in &self.addresses {
            if !known.claimed && self.claims(vlans, mac, *address) {
                continue;
            }
            match address {
                IpAddr::V4(v4) => {
                    frames.push(arp(ETHERTYPE_ARP, 1, vlans, *mac, [0; 6], *v4));
                    frames.push(arp(ETHERTYPE_ARP, 2, vlans, *mac, BROADCAST, *v4));
                }
                IpAddr::V6(v6) => frames.push(advertisement(vlans, *mac, *v6, known.router)),
            }
        }
        frames
    }

    /// Returns the addresses that are announced.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.addresses
            .iter()
            .filter(|((vlans, mac, address), known)| known.claimed || !self.claims(vlans, mac, *address))
            .map(|((_, _, address), _)| *address)
    }

    /// Returns the book for a checkpoint.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        put_count(&mut out, self.macs.len());
        for (vlans, mac) in self.macs.keys() {
            put_vlans(&mut out, vlans);
            out.extend(mac);
        }
        put_count(&mut out, self.addresses.len());
        for ((vlans, mac, address), known) in &self.addresses {
            put_vlans(&mut out, vlans);
            out.extend(mac);
            put_address(&mut out, *address);
            out.push(u8::from(known.claimed) | u8::from(known.router) << 1);
        }
        out
    }

    /// Replaces the book by that of a checkpoint, all or nothing.
    ///
    /// # Errors
    /// Fails if the bytes are not a snapshot within the bounds.
    pub fn replace(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let mut reader = Reader(bytes);
        reader.version()?;
        let mut book = Self::default();
        for _ in 0..reader.count("MAC addresses", MACS_MAX, 7)? {
            book.macs.insert((reader.vlans()?, reader.array()?), 0);
        }
        for _ in 0..reader.count("addresses", ADDRESSES_MAX, 13)? {
            let key = (reader.vlans()?, reader.array()?, reader.address()?);
            let flags = reader.u8()?;
            if flags > 3 {
                return Err(StateError::Invalid("address state"));
            }
            book.addresses.insert(
                key,
                Known {
                    claimed: flags & 1 != 0,
                    router: flags & 2 != 0,
                    used: 0,
                },
            );
        }
        reader.end()?;
        *self = book;
        Ok(())
    }

    fn note(&mut self, vlans: Vlans, mac: Mac, address: IpAddr, claimed: bool, router: bool) {
        let unusable = match address {
            IpAddr::V4(v4) => v4.is_broadcast() || v4.octets()[0] == 0,
            IpAddr::V6(_) => false,
        };
        if unusable || address.is_unspecified() || address.is_multicast() || address.is_loopback() || mac[0] & 1 != 0 {
            return;
        }
        let rank = |known: &Known| (known.claimed, known.used);
        let update = |known: &mut Known, tick| {
            known.used = tick;
            known.claimed |= claimed;
            known.router |= router;
        };
        remember(
            &mut self.addresses,
            ADDRESSES_MAX,
            (vlans, mac, address),
            self.tick,
            rank,
            update,
        );
    }

    /// Says whether the guest has claimed an address of this family there.
    fn claims(&self, vlans: &Vlans, mac: &Mac, like: IpAddr) -> bool {
        self.addresses.iter().any(|((other_vlans, other_mac, address), known)| {
            known.claimed && other_vlans == vlans && other_mac == mac && address.is_ipv4() == like.is_ipv4()
        })
    }
}

/// Updates an entry; a new one takes the place of the lowest ranked if there is no room.
fn remember<K: Ord + Copy, V: Default>(
    map: &mut BTreeMap<K, V>,
    limit: usize,
    key: K,
    tick: u64,
    rank: impl Fn(&V) -> (bool, u64),
    update: impl Fn(&mut V, u64),
) {
    if !map.contains_key(&key) && map.len() >= limit {
        let lowest = map.iter().min_by_key(|(_, value)| rank(value)).map(|(key, _)| *key);
        if let Some(lowest) = lowest {
            map.remove(&lowest);
        }
    }
    update(map.entry(key).or_default(), tick);
}

fn ethernet(destination: Mac, source: Mac, vlans: &Vlans, ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(112);
    frame.extend([0; FRAME_HEADER_BYTES]);
    frame.extend(destination);
    frame.extend(source);
    for (protocol, vlan) in vlans.tags() {
        frame.extend(protocol.to_be_bytes());
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame
}

fn arp(ethertype: u16, operation: u16, vlans: &Vlans, mac: Mac, target: Mac, address: Ipv4Addr) -> Bytes {
    let mut frame = ethernet(BROADCAST, mac, vlans, ethertype);
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend(target);
    frame.extend(address.octets());
    frame.into()
}

fn advertisement(vlans: &Vlans, mac: Mac, address: Ipv6Addr, router: bool) -> Bytes {
    let flags = FLAG_OVERRIDE | if router { FLAG_ROUTER } else { 0 };
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac);
    let sum = checksum::transport(IpAddr::V6(address), IpAddr::V6(ALL_NODES), ICMPV6, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = ethernet(ALL_NODES_MAC, mac, vlans, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0, 0, 32, ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame.into()
}

#[cfg(test)]
mod tests;
