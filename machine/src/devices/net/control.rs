//! The control queue of a card with several queue pairs: how many of them the driver uses.
//!
//! A command is a class, a number and its data in what the device may read, and one byte that it writes: whether it was
//! done. One command is known here. Of any other the answer is that it was not, and of a chain that is no command at all
//! there is no answer: it is an offence like those in the other queues.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ,
    VIRTIO_NET_OK,
};

use crate::devices::virtio::queue::{Chain, QueueError, Ring};
use crate::memory::Memory;

/// What a card with several queue pairs offers.
pub(super) const FEATURES: u64 = CONTROL | 1 << VIRTIO_NET_F_MQ;
const CONTROL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;

const HEADER_BYTES: u32 = 2;
const PAIRS_BYTES: u32 = 2;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Use so many queue pairs.
    Pairs(u16),
    /// Something that was not offered.
    Unknown,
}

/// Says whether a driver that has accepted these features uses several queue pairs.
pub(super) fn is_multi(accepted: u64) -> bool {
    accepted & FEATURES == FEATURES
}

/// Returns the control queue's number for a driver that has accepted these features, if it has one: it comes after all that
/// the driver could use.
pub(super) fn place(accepted: u64, pairs_max: u16) -> Option<usize> {
    let pairs = if is_multi(accepted) { pairs_max } else { 1 };
    (accepted & CONTROL != 0).then(|| 2 * usize::from(pairs))
}

/// Takes the next command.
pub(super) fn take(ring: &mut Ring, ram: &Memory) -> Result<Option<(Chain, Command)>, QueueError> {
    let Some(chain) = ring.pop(ram)? else { return Ok(None) };
    if chain.readable() < HEADER_BYTES || chain.writable() == 0 {
        return Err(QueueError::Layout(
            "a control command has no class, or no room for the answer",
        ));
    }
    let mut header = [0; 2];
    chain.read(ram, 0, &mut header)?;
    let [class, number] = header.map(u32::from);
    let is_known = class == VIRTIO_NET_CTRL_MQ && number == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    if !is_known || chain.readable() != HEADER_BYTES + PAIRS_BYTES {
        return Ok(Some((chain, Command::Unknown)));
    }
    let mut pairs = [0; 2];
    chain.read(ram, HEADER_BYTES, &mut pairs)?;
    Ok(Some((chain, Command::Pairs(u16::from_le_bytes(pairs)))))
}

/// Answers a command.
pub(super) fn answer(ring: &mut Ring, ram: &Memory, chain: &Chain, is_done: bool) -> Result<(), QueueError> {
    chain.write(ram, 0, &[if is_done { DONE } else { REFUSED }])?;
    ring.complete(ram, chain, 1)
}

#[expect(clippy::cast_possible_truncation, reason = "both are answers of one byte")]
const DONE: u8 = VIRTIO_NET_OK as u8;
#[expect(clippy::cast_possible_truncation, reason = "both are answers of one byte")]
const REFUSED: u8 = VIRTIO_NET_ERR as u8;
