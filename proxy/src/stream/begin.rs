//! Which part of a segment may leave though the whole may not.
//!
//! Two guests cut their streams differently. One that may send a single segment (after a loss, or into a small window) waits
//! for the acknowledgement of that; the other's segment with those bytes and more would wait for the rest, and the client would
//! see neither. And two guests have room for different amounts: what the client sends into the window of the primary's, the
//! secondary's may have dropped. It takes that only when the client repeats it, and acknowledges it only then.

use crate::frame::Segment;
use crate::seq::Seq;

use super::{Leave, Note, Stream};

impl Note {
    /// Says whether it is an acknowledgement and nothing else, and may be lowered.
    pub(crate) fn only_acknowledges(&self) -> bool {
        let Segment {
            syn, fin, rst, options, ..
        } = self.segment;
        self.data.is_empty() && self.urgent.is_none() && !(syn || fin || rst || options.signed)
    }
}

impl Stream {
    /// Returns the number after those first bytes of a segment that may leave, and how, if there are any.
    pub(crate) fn begins(&self, note: &Note) -> Option<(Seq, Leave)> {
        let Segment { syn, rst, options, .. } = note.segment;
        if syn || rst || options.signed || note.urgent.is_some() {
            return None;
        }
        let until = self.settled.end_of(note.data.start)?.min(note.data.end);
        let bytes = u32::try_from(until - note.data.start).ok()?;
        let end = note.segment.data_seq().plus(bytes);
        if bytes == 0 {
            return None;
        }
        let begun = Note {
            data: note.data.start..until,
            fin: None,
            ..note.clone()
        };
        match self.leave(&begun) {
            Leave::Wait => None,
            leave => Some((end, leave)),
        }
    }

    /// Returns the acknowledgement with which a segment that only acknowledges may leave, if that is news.
    pub(crate) fn lowers(&self, note: &Note) -> Option<Seq> {
        let (ack, permitted) = (note.segment.ack?, self.permitted?);
        let lowered = if ack.at_most(permitted) { ack } else { permitted };
        let is_news = self.left.is_none_or(|left| !lowered.at_most(left));
        (is_news && !note.segment.options.signed).then_some(lowered)
    }
}
