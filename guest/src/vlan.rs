//! A VLAN tag (802.1Q) on every frame: smoltcp knows of none.
//!
//! Put between the network stack and a device. With a VLAN set, frames of that VLAN are received, without their tag, and
//! nothing else is; what is sent is tagged. Without one, frames pass as they are.

use alloc::vec::Vec;

use smoltcp::phy::{Device, DeviceCapabilities, RxToken, TxToken};
use smoltcp::time::Instant;

/// The two Ethernet addresses, before the tag.
const ADDRESSES: usize = 12;
const TAG: usize = 4;
const ETHERTYPE: [u8; 2] = [0x81, 0x00];
/// The bits of a tag that say which VLAN it is.
const VLAN_MASK: u16 = 0xfff;

/// A device behind the tag.
pub(crate) struct Tagged<'a, D> {
    pub(crate) device: &'a mut D,
    pub(crate) vlan: Option<u16>,
}

/// A received frame, or room for one.
pub(crate) struct Token<T> {
    token: T,
    vlan: Option<u16>,
}

impl<D: Device> Device for Tagged<'_, D> {
    type RxToken<'b>
        = Token<D::RxToken<'b>>
    where
        Self: 'b;
    type TxToken<'b>
        = Token<D::TxToken<'b>>
    where
        Self: 'b;

    fn receive(&mut self, now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let vlan = self.vlan;
        let (token, room) = self.device.receive(now)?;
        Some((Token { token, vlan }, Token { token: room, vlan }))
    }

    fn transmit(&mut self, now: Instant) -> Option<Self::TxToken<'_>> {
        let vlan = self.vlan;
        self.device.transmit(now).map(|token| Token { token, vlan })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.device.capabilities()
    }
}

impl<T: RxToken> RxToken for Token<T> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let vlan = self.vlan;
        self.token.consume(|frame| match vlan {
            None => f(frame),
            // An empty frame is ignored.
            Some(vlan) => f(&untagged(frame, vlan).unwrap_or_default()),
        })
    }
}

impl<T: TxToken> TxToken for Token<T> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let Some(vlan) = self.vlan else {
            return self.token.consume(len, f);
        };
        self.token.consume(len + TAG, |frame| {
            let result = f(&mut frame[TAG..]);
            frame.copy_within(TAG..TAG + ADDRESSES, 0);
            frame[ADDRESSES..ADDRESSES + 2].copy_from_slice(&ETHERTYPE);
            frame[ADDRESSES + 2..ADDRESSES + TAG].copy_from_slice(&vlan.to_be_bytes());
            result
        })
    }
}

/// Returns a frame of this VLAN without its tag.
fn untagged(frame: &[u8], vlan: u16) -> Option<Vec<u8>> {
    let (addresses, rest) = frame.split_at_checked(ADDRESSES)?;
    let (tag, rest) = rest.split_at_checked(TAG)?;
    let of = u16::from_be_bytes([tag[2], tag[3]]) & VLAN_MASK;
    (tag[..2] == ETHERTYPE && of == vlan).then(|| [addresses, rest].concat())
}
