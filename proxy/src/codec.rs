//! Reading and writing the network's part of a checkpoint: fixed little-endian fields, nothing trusted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::EtherType;

use crate::flow::Vlans;

/// Why the network's part of a checkpoint cannot be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The bytes end too early.
    #[error("the network state in the checkpoint is cut short; the peer's version may differ")]
    Truncated,
    /// Bytes are left over.
    #[error("the network state in the checkpoint has {0} bytes too many; the peer's version may differ")]
    Excess(usize),
    /// Another format.
    #[error(
        "the network state in the checkpoint has version {0}, this program knows {VERSION}; run the same version on both hosts"
    )]
    Version(u8),
    /// A value that nothing writes.
    #[error("the network state in the checkpoint has an impossible {0}")]
    Invalid(&'static str),
    /// More than the bounds allow.
    #[error("the network state in the checkpoint has {count} {what}, more than {limit}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many are allowed.
        limit: usize,
    },
}

/// What tells that a VLAN tag follows: the customer's, the provider's, and the provider's of old.
const TAG_PROTOCOLS: [EtherType; 3] = [
    EtherType::VLAN_TAGGED_FRAME,
    EtherType::PROVIDER_BRIDGING,
    EtherType::VLAN_DOUBLE_TAGGED_FRAME,
];

/// The format written.
pub(crate) const VERSION: u8 = 2;

/// Reads fields off the front of a slice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], StateError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(StateError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(StateError::Truncated)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, StateError> {
        self.array().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, StateError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, StateError> {
        self.array().map(u32::from_le_bytes)
    }

    /// Reads a count of at most `limit` things of at least `size` bytes each.
    pub(crate) fn count(&mut self, what: &'static str, limit: usize, size: usize) -> Result<usize, StateError> {
        let count = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if count > limit {
            return Err(StateError::TooMany { what, count, limit });
        }
        if count.saturating_mul(size) > self.0.len() {
            Err(StateError::Truncated)
        } else {
            Ok(count)
        }
    }

    pub(crate) fn version(&mut self) -> Result<(), StateError> {
        match self.u8()? {
            VERSION => Ok(()),
            other => Err(StateError::Version(other)),
        }
    }

    pub(crate) fn end(self) -> Result<(), StateError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(StateError::Excess(self.0.len()))
        }
    }

    pub(crate) fn vlans(&mut self) -> Result<Vlans, StateError> {
        let mut vlans = Vlans::NONE;
        let count = self.u8()?;
        if count > 3 {
            return Err(StateError::Invalid("number of VLAN tags"));
        }
        for _ in 0..count {
            let (protocol, vlan) = (self.u16()?, self.u16()?);
            if !TAG_PROTOCOLS.contains(&EtherType(protocol)) {
                return Err(StateError::Invalid("VLAN tag protocol"));
            }
            if vlan > 0xfff {
                return Err(StateError::Invalid("VLAN number"));
            }
            vlans.push(protocol, vlan);
        }
        Ok(vlans)
    }

    pub(crate) fn address(&mut self) -> Result<IpAddr, StateError> {
        match self.u8()? {
            4 => Ok(IpAddr::V4(Ipv4Addr::from(self.array::<4>()?))),
            6 => Ok(IpAddr::V6(Ipv6Addr::from(self.array::<16>()?))),
            _ => Err(StateError::Invalid("address family")),
        }
    }
}

pub(crate) fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend(u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
}

pub(crate) fn put_vlans(out: &mut Vec<u8>, vlans: &Vlans) {
    out.push(u8::try_from(vlans.tags().len()).unwrap_or(u8::MAX));
    for (protocol, vlan) in vlans.tags() {
        out.extend(protocol.to_le_bytes());
        out.extend(vlan.to_le_bytes());
    }
}

pub(crate) fn put_address(out: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => {
            out.push(4);
            out.extend(v4.octets());
        }
        IpAddr::V6(v6) => {
            out.push(6);
            out.extend(v6.octets());
        }
    }
}
