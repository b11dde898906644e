//! The primary's frames that may not leave yet, in the order in which its guest sent them.
//!
//! A frame is taken out of the middle when its equal has come, or from the front when its epoch is
//! committed. Taking is constant time; the memory of taken frames in the middle is a slot each, until
//! everything before them has gone.

use std::collections::VecDeque;

use bytes::Bytes;
use checkpoint::{Epoch, Instant};

use crate::table::FlowId;

/// A held frame.
#[derive(Clone, Debug)]
pub(crate) struct HeldFrame {
    pub(crate) frame: Bytes,
    pub(crate) arrived: Instant,
    pub(crate) epoch: Epoch,
    /// The flow it waits in; nothing if the flow table was full.
    pub(crate) flow: Option<FlowId>,
    /// When a part of it has left.
    pub(crate) begun: Option<Instant>,
}

/// All held frames, by serial number.
#[derive(Debug, Default)]
pub(crate) struct Hold {
    slots: VecDeque<Option<HeldFrame>>,
    first: u64,
    frames: usize,
    bytes: usize,
}

impl Hold {
    /// Holds a frame and returns its serial number.
    pub(crate) fn push(&mut self, held: HeldFrame) -> u64 {
        self.frames += 1;
        self.bytes += held.frame.len();
        self.slots.push_back(Some(held));
        self.first + self.slots.len() as u64 - 1
    }

    pub(crate) fn get(&self, serial: u64) -> Option<&HeldFrame> {
        self.slots.get(self.place(serial)?)?.as_ref()
    }

    /// Puts a frame into a flow.
    pub(crate) fn assign(&mut self, serial: u64, flow: FlowId) {
        if let Some(place) = self.place(serial)
            && let Some(Some(held)) = self.slots.get_mut(place)
        {
            held.flow = Some(flow);
        }
    }

    /// Takes note that a part of a frame leaves.
    pub(crate) fn begin(&mut self, serial: u64, now: Instant) {
        if let Some(place) = self.place(serial)
            && let Some(Some(held)) = self.slots.get_mut(place)
        {
            held.begun = Some(now);
        }
    }

    /// Takes a frame out; nothing if it has gone already.
    pub(crate) fn take(&mut self, serial: u64) -> Option<HeldFrame> {
        let place = self.place(serial)?;
        let held = self.slots.get_mut(place)?.take()?;
        self.frames -= 1;
        self.bytes -= held.frame.len();
        while let Some(None) = self.slots.front() {
            self.slots.pop_front();
            self.first += 1;
        }
        Some(held)
    }

    /// Returns the oldest frame.
    pub(crate) fn oldest(&self) -> Option<(u64, &HeldFrame)> {
        self.slots.front()?.as_ref().map(|held| (self.first, held))
    }

    /// Returns the serial numbers in use, from the oldest to after the newest.
    pub(crate) fn serials(&self) -> std::ops::Range<u64> {
        self.first..self.first + self.slots.len() as u64
    }

    /// Gives every frame another epoch.
    pub(crate) fn retag(&mut self, epoch: Epoch) {
        for held in self.slots.iter_mut().flatten() {
            held.epoch = epoch;
        }
    }

    pub(crate) fn frames(&self) -> usize {
        self.frames
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the frames and the slots of taken ones: what the frame limit counts.
    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    fn place(&self, serial: u64) -> Option<usize> {
        usize::try_from(serial.checked_sub(self.first)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(byte: u8) -> HeldFrame {
        HeldFrame {
            frame: Bytes::from(vec![byte; 10]),
            arrived: Instant(u64::from(byte)),
            epoch: Epoch(1),
            flow: None,
            begun: None,
        }
    }

    #[test]
    fn frames_leave_the_middle_once_and_the_front_moves_on() {
        let mut hold = Hold::default();
        let serials: Vec<u64> = (0..3).map(|byte| hold.push(held(byte))).collect();
        assert_eq!(hold.take(serials[1]).unwrap().frame[0], 1);
        assert!(hold.take(serials[1]).is_none());
        assert_eq!((hold.frames(), hold.bytes(), hold.slots()), (2, 20, 3));
        assert_eq!(hold.take(serials[0]).unwrap().frame[0], 0);
        assert_eq!(hold.oldest().unwrap().0, serials[2]);
        assert_eq!(hold.slots(), 1);
    }
}
