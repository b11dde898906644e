//! One guest's network at its edge: every frame passes here once on its way in and once on its way out.

use bytes::{Bytes, BytesMut};
use checkpoint::Nic;
use checkpoint::frames::FramePool;
use checkpoint::pair::Delivery;

use crate::announce::NetworkState;
use crate::codec::StateError;
use crate::flow::Class;
use crate::frame::{self, Frame};
use crate::offload;
use crate::sequence::Snapshot;

/// The translator and the address book of one guest, driven by the protocols of both roles.
#[derive(Clone, Debug, Default)]
pub struct NetworkPicture {
    state: NetworkState,
    /// Copies of frames that are changed and that others hold.
    pool: FramePool,
}

/// A frame of a guest as the clients shall see it, and what was read of it: each is read once.
#[derive(Clone, Debug)]
pub struct Leaving {
    pub(crate) wire: Bytes,
    pub(crate) parsed: Frame,
}

impl Leaving {
    /// Returns the frame.
    #[must_use]
    pub fn wire(&self) -> &Bytes {
        &self.wire
    }

    /// Tells whether it belongs to a TCP connection: its receiver knows a repetition for what it is.
    #[must_use]
    pub fn is_repeatable(&self) -> bool {
        self.parsed.key.class == Class::Tcp
    }

    /// Returns the frame.
    #[must_use]
    pub fn into_wire(self) -> Bytes {
        self.wire
    }
}

impl From<Bytes> for Leaving {
    fn from(wire: Bytes) -> Self {
        let parsed = frame::parse(&wire);
        Self { wire, parsed }
    }
}

impl NetworkPicture {
    /// Makes a picture of a guest that has sent nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a picture of a guest that has sent nothing yet, and is known by its hardware address.
    #[must_use]
    pub fn of(mac: [u8; 6]) -> Self {
        let mut picture = Self::default();
        let mut wire = [0; 60];
        wire[..6].fill(0xff);
        wire[6..12].copy_from_slice(&mac);
        // An EtherType for local experiments: nothing but the source address is learned from the frame.
        wire[12..14].copy_from_slice(&[0x88, 0xb5]);
        let frame = offload::complete(&wire);
        picture.state.addresses.learn(&frame::parse(&frame), &frame);
        picture
    }

    /// Follows a primary from here on.
    pub fn follow(&mut self) {
        self.state.translator.follow();
    }

    /// Leads from here on.
    pub fn lead(&mut self) {
        self.state.translator.lead();
    }

    /// Takes a frame of the clients and makes what the guest shall see of it, as if at its only card.
    pub fn arriving(&mut self, wire: Bytes) -> Delivery {
        let parsed = frame::parse(&wire);
        let mut guest = wire.clone();
        if self.state.translator.concerns(&parsed) {
            let mut seen = self.pool.copy_mut(&wire);
            self.state.translator.inbound(&parsed, &mut seen);
            if seen != wire {
                guest = seen.freeze();
            }
        }
        Delivery {
            nic: Nic::FIRST,
            number: None,
            wire,
            guest,
        }
    }

    /// Takes a frame of the guest and makes what the clients shall see of it.
    pub fn leaving(&mut self, frame: Bytes) -> Leaving {
        let mut leaving = Leaving::from(frame);
        self.state.addresses.learn(&leaving.parsed, &leaving.wire);
        let edits = self.state.translator.outbound(&leaving.parsed);
        if !edits.is_empty() {
            let pool = &mut self.pool;
            let mut wire = leaving
                .wire
                .try_into_mut()
                .unwrap_or_else(|shared| pool.copy_mut(&shared));
            edits.apply(&mut leaving.parsed, &mut wire);
            leaving.wire = wire.freeze();
        }
        leaving
    }

    /// Takes a frame that left the guest before and was kept; returns what the clients shall see of it now, if anything.
    #[must_use]
    pub fn leaving_again(&self, frame: Bytes) -> Option<Bytes> {
        let parsed = frame::parse(&frame);
        let mut wire = into_mut(frame);
        self.state.translator.again(&parsed, &mut wire).then(|| wire.freeze())
    }

    /// Returns the bytes for the checkpoint, and how many connections they leave out for want of room.
    #[must_use]
    pub fn encode(&self) -> Snapshot {
        self.state.encode()
    }

    /// Reads the bytes of a checkpoint.
    ///
    /// # Errors
    /// Fails if they are not such a state within the bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let mut state = NetworkState::default();
        state.replace(bytes)?;
        Ok(Self {
            state,
            pool: FramePool::new(),
        })
    }

    /// Returns the frames that tell the network where the guest is now.
    #[must_use]
    pub fn announcements(&self) -> Vec<Bytes> {
        self.state.addresses.announcements()
    }
}

/// Returns a frame to be changed: itself, or a copy if it is shared.
pub(crate) fn into_mut(frame: Bytes) -> BytesMut {
    frame
        .try_into_mut()
        .unwrap_or_else(|shared| BytesMut::from(&shared[..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_has_sent_nothing_is_announced_by_its_hardware_address() {
        let mac = [2, 0, 0, 1, 2, 3];
        let frames = NetworkPicture::of(mac).announcements();
        assert_eq!(frames.len(), 1, "RARP: nothing else is known");
        assert_eq!(&frames[0][18..26], &[2, 0, 0, 1, 2, 3, 0x80, 0x35]);
        assert!(NetworkPicture::new().announcements().is_empty());
    }
}
