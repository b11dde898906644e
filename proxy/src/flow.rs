//! Which frames belong together: the key of a flow.
//!
//! A key is directed as the guest sends. It carries the VLAN tags, so equal addresses on two VLANs
//! are two flows.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

/// Most VLAN tags that are looked through.
const VLANS_MAX: usize = 3;

/// What kind of traffic a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// ARP.
    Arp,
    /// Another EtherType (0: IEEE 802.3 with a length).
    Ethernet(u16),
    /// Fragments of this IP protocol.
    Fragment(u8),
    /// ICMP.
    Icmp,
    /// `ICMPv6`, neighbour discovery and MLD included.
    Icmpv6,
    /// Another IP protocol.
    Ip(u8),
    /// Frames that do not parse.
    Malformed,
    /// SCTP.
    Sctp,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Kinds of traffic that sums tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Traffic {
    /// ARP.
    Arp,
    /// Fragments of IP datagrams that are compared.
    Fragments,
    /// ICMP.
    Icmp,
    /// `ICMPv6`, neighbour discovery and MLD included.
    Icmpv6,
    /// Frames that do not parse.
    Malformed,
    /// Another EtherType.
    Other,
    /// Another IP protocol.
    OtherIp,
    /// SCTP, its fragments included.
    Sctp,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// The VLAN tags of a frame, outermost first; priorities left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vlans {
    count: u8,
    tags: [(u16, u16); VLANS_MAX],
}

/// One end of a flow; the port is 0 where there are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// Network address, for ARP the protocol's; unspecified for other flows below IP.
    pub address: IpAddr,
    /// Transport port; an ICMP echo's identifier at the destination.
    pub port: u16,
}

/// The key of a flow, directed as the guest sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowKey {
    /// Kind of traffic.
    pub class: Class,
    /// VLAN tags.
    pub vlans: Vlans,
    /// The guest's end.
    pub source: Endpoint,
    /// The other end.
    pub destination: Endpoint,
}

impl Class {
    /// Says whether it is compared at all. Each side of an SCTP association chooses its own tags and numbers at random,
    /// so no two guests say the same.
    #[must_use]
    pub const fn is_compared(self) -> bool {
        !matches!(self.traffic(), Traffic::Sctp)
    }

    /// Returns the kind of traffic that it is counted as.
    #[must_use]
    pub const fn traffic(self) -> Traffic {
        match self {
            Self::Arp => Traffic::Arp,
            Self::Ethernet(_) => Traffic::Other,
            Self::Sctp | Self::Fragment(132) => Traffic::Sctp,
            Self::Fragment(_) => Traffic::Fragments,
            Self::Icmp => Traffic::Icmp,
            Self::Icmpv6 => Traffic::Icmpv6,
            Self::Ip(_) => Traffic::OtherIp,
            Self::Malformed => Traffic::Malformed,
            Self::Tcp => Traffic::Tcp,
            Self::Udp => Traffic::Udp,
        }
    }
}

impl Traffic {
    /// Each kind, in the order of their names.
    pub const ALL: [Self; 10] = [
        Self::Arp,
        Self::Fragments,
        Self::Icmp,
        Self::Icmpv6,
        Self::Malformed,
        Self::Other,
        Self::OtherIp,
        Self::Sctp,
        Self::Tcp,
        Self::Udp,
    ];
}

impl Vlans {
    /// No tag.
    pub const NONE: Self = Self {
        count: 0,
        tags: [(0, 0); VLANS_MAX],
    };

    /// Returns the tags as pairs of tag protocol and VLAN number.
    #[must_use]
    pub fn tags(&self) -> &[(u16, u16)] {
        &self.tags[..usize::from(self.count).min(VLANS_MAX)]
    }

    /// Adds an inner tag; more than three are left out.
    pub(crate) fn push(&mut self, protocol: u16, vlan: u16) {
        if let Some(slot) = self.tags.get_mut(usize::from(self.count)) {
            *slot = (protocol, vlan);
            self.count += 1;
        }
    }
}

impl FlowKey {
    pub(crate) fn unaddressed(class: Class, vlans: Vlans) -> Self {
        let nowhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Self::addressed(class, vlans, (nowhere, nowhere), (0, 0))
    }

    pub(crate) fn addressed(class: Class, vlans: Vlans, addresses: (IpAddr, IpAddr), ports: (u16, u16)) -> Self {
        Self {
            class,
            vlans,
            source: Endpoint {
                address: addresses.0,
                port: ports.0,
            },
            destination: Endpoint {
                address: addresses.1,
                port: ports.1,
            },
        }
    }

    /// Returns the key of the opposite direction.
    pub(crate) fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            ..self
        }
    }
}

impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.class {
            Class::Arp => f.write_str("ARP")?,
            Class::Ethernet(kind) => write!(f, "EtherType {kind:#06x}")?,
            Class::Fragment(protocol) => write!(f, "fragments of IP protocol {protocol}")?,
            Class::Icmp => f.write_str("ICMP")?,
            Class::Icmpv6 => f.write_str("ICMPv6")?,
            Class::Ip(protocol) => write!(f, "IP protocol {protocol}")?,
            Class::Malformed => f.write_str("malformed")?,
            Class::Sctp => f.write_str("SCTP")?,
            Class::Tcp => f.write_str("TCP")?,
            Class::Udp => f.write_str("UDP")?,
        }
        for (_, vlan) in self.vlans.tags() {
            write!(f, " vlan {vlan}")?;
        }
        if self.source.address != self.destination.address {
            write!(f, " {} -> {}", self.source, self.destination)?;
        }
        Ok(())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.port, self.address) {
            (0, address) => write!(f, "{address}"),
            (port, address) => write!(f, "{}", std::net::SocketAddr::new(address, port)),
        }
    }
}
