//! How many bytes of inputs are on their way: forwarded and not confirmed on the primary, received and not consumed on the
//! secondary. Bounded by whoever adds to it.

use std::collections::VecDeque;

/// The sizes of inputs in their order.
#[derive(Clone, Debug, Default)]
pub struct Backlog {
    sizes: VecDeque<u32>,
    bytes: u64,
}

impl Backlog {
    /// Adds an input of so many bytes behind the others.
    pub fn add(&mut self, bytes: usize) {
        // A frame is no longer than the wire allows.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.sizes.push_back(bytes);
        self.bytes += u64::from(bytes);
    }

    /// The first so many inputs are settled.
    pub fn settle(&mut self, count: u64) {
        for _ in 0..count {
            let Some(bytes) = self.sizes.pop_front() else { return };
            self.bytes -= u64::from(bytes);
        }
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Returns the bytes of those that are not settled.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_settled_in_their_order() {
        let mut backlog = Backlog::default();
        for bytes in [60, 1_500, 9_000] {
            backlog.add(bytes);
        }
        backlog.settle(2);
        assert_eq!(backlog.bytes(), 9_000);
        backlog.settle(7);
        assert_eq!(backlog.bytes(), 0);
        backlog.add(100);
        backlog.clear();
        assert_eq!(backlog.bytes(), 0);
    }
}
