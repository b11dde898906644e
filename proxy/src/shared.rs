//! What all flows of a comparator share: memory that is used again, so that a frame costs no allocation and an idle flow no queues.

use checkpoint::frames::FramePool;

use crate::datagram::Queues as WholeQueues;
use crate::order::Queues as OrderQueues;
use crate::said::Said;

/// Most spare queues of a kind.
const SPARE_MAX: usize = 1_024;
/// Entries for which spare queues may have room: what a burst needed is not kept for ever.
const SPARE_ROOM_MAX: usize = 512;

/// It; see the module.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// What the primary has said lately.
    pub(crate) said: Said,
    /// Copies of what is kept of the secondary's output.
    pub(crate) pool: FramePool,
    pub(crate) orders: Spare<OrderQueues>,
    pub(crate) wholes: Spare<WholeQueues>,
}

/// Queues that were emptied, the last one first: it is the most likely to be in the processor's cache.
#[derive(Debug, Default)]
pub(crate) struct Spare<T>(Vec<Box<T>>);

/// Queues that a flow has only while there is something in them.
#[derive(Debug)]
pub(crate) struct Lent<T>(Option<Box<T>>);

impl<T> Default for Lent<T> {
    fn default() -> Self {
        Self(None)
    }
}

/// Queues, which keep their room while they are empty.
pub(crate) trait Room {
    /// Returns for how many entries there is room.
    fn room(&self) -> usize;
}

impl<T: Default + Room> Lent<T> {
    pub(crate) fn get(&self) -> Option<&T> {
        self.0.as_deref()
    }

    pub(crate) fn get_mut(&mut self) -> Option<&mut T> {
        self.0.as_deref_mut()
    }

    /// Returns the queues to put something in.
    pub(crate) fn get_or_take(&mut self, spare: &mut Spare<T>) -> &mut T {
        self.0.get_or_insert_with(|| spare.0.pop().unwrap_or_default())
    }

    /// Gives the queues back, which are empty.
    pub(crate) fn give_back(&mut self, spare: &mut Spare<T>) {
        if let Some(queues) = self.0.take()
            && spare.0.len() < SPARE_MAX
            && queues.room() <= SPARE_ROOM_MAX
        {
            spare.0.push(queues);
        }
    }
}
