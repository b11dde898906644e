//! The order in which the compared frames of a TCP flow leave.
//!
//! New bytes, SYN, FIN and RST leave as the guest sent them. What says nothing new need not wait behind bytes that
//! the secondary has not sent yet: a pure acknowledgement leaves when it is permitted, what is said again when its bytes may.
//! Nothing overtakes a SYN or RST. Else a client that has lost a segment, or that sends a lot itself, would wait for the
//! secondary's next bytes, and these for the client.
//!
//! An acknowledgement that overtakes, or was overtaken, is renumbered to the end of what has left: behind a gap or
//! before known bytes its receiver might not take it.
//!
//! Driven by `lane`; knows one epoch at a time, never holds a frame.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;
use checkpoint::mutants::{self, Mutant};

use crate::frame::Segment;
use crate::seq::Seq;
use crate::shared::{Lent, Room, Spare};
use crate::stream::{Leave, Note, Stream, Turn};
use crate::verdict::Why;

/// Most frames said again that are looked at; further ones wait for those.
const AGAIN_MAX: usize = 16;

/// The compared frames of a flow that have not left.
#[derive(Debug, Default)]
pub(crate) struct Order {
    queues: Lent<Queues>,
    /// SYN and RST among the new.
    barriers: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Queues {
    new: VecDeque<Entry>,
    acknowledgements: VecDeque<Entry>,
    again: VecDeque<Entry>,
}

/// A frame that may leave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Next {
    pub(crate) serial: u64,
    pub(crate) leave: Leave,
    pub(crate) place: Place,
}

/// The part of a frame that leaves before the rest.
#[derive(Debug)]
pub(crate) struct Begun<'a> {
    pub(crate) serial: u64,
    pub(crate) segment: &'a Segment,
    pub(crate) part: Range<Seq>,
    pub(crate) leave: Leave,
}

/// Where a frame that may leave waits.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    New,
    Acknowledgement,
    Again(usize),
    /// In a flow that is compared whole.
    Whole,
}

/// A compared frame.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) serial: u64,
    pub(crate) note: Note,
    /// Its first bytes have left by themselves, until this number.
    begun: Option<Seq>,
}

impl Next {
    /// Returns why it may leave.
    pub(crate) fn why(&self) -> Why {
        match (self.leave, self.place) {
            (Leave::Lowered(_), _) => Why::Lowered,
            (_, Place::Again(_)) => Why::Again,
            _ => Why::Equal,
        }
    }
}

impl Entry {
    /// Returns where what has not left begins, within the segment.
    pub(crate) fn begins_at(&self) -> Seq {
        let said = self.begun.filter(|_| self.note.turn() == Turn::InOrder);
        said.unwrap_or_else(|| self.note.segment().seq)
    }

    /// Returns the frame without first bytes that have left, unless it is to say them again.
    pub(crate) fn rest(&self, frame: Bytes) -> Bytes {
        let (segment, from) = (self.note.segment(), self.begins_at());
        if from == segment.seq {
            return frame;
        }
        segment.part(&frame, from..segment.end_seq()).into()
    }
}

impl Room for Queues {
    fn room(&self) -> usize {
        self.new.capacity() + self.acknowledgements.capacity() + self.again.capacity()
    }
}

impl Queues {
    fn len(&self) -> usize {
        self.new.len() + self.acknowledgements.len() + self.again.len()
    }
}

impl Order {
    pub(crate) fn push(&mut self, serial: u64, note: Note, spare: &mut Spare<Queues>) {
        let queues = self.queues.get_or_take(spare);
        let queue = match note.turn() {
            Turn::InOrder => &mut queues.new,
            Turn::Acknowledgement => &mut queues.acknowledgements,
            Turn::Again => &mut queues.again,
        };
        self.barriers += usize::from(is_barrier(note.segment()));
        queue.push_back(Entry {
            serial,
            note,
            begun: None,
        });
    }

    pub(crate) fn len(&self) -> usize {
        self.queues.get().map_or(0, Queues::len)
    }

    /// Does without queues as long as there is nothing to put in.
    pub(crate) fn rest(&mut self, spare: &mut Spare<Queues>) {
        if self.len() == 0 {
            self.queues.give_back(spare);
        }
    }

    /// Returns the serial number of the next frame with something new.
    fn first_new(&self) -> Option<u64> {
        Some(self.queues.get()?.new.front()?.serial)
    }

    /// Says whether a SYN or RST waits.
    pub(crate) fn is_barred(&self) -> bool {
        self.barriers > 0
    }

    /// Returns the oldest of the frames that may leave now.
    pub(crate) fn next(&self, stream: &Stream) -> Option<Next> {
        let may = |entry: &Entry, place| {
            let leave = stream.leave(&entry.note);
            let serial = entry.serial;
            (leave != Leave::Wait).then_some(Next { serial, leave, place })
        };
        let queues = self.queues.get()?;
        let first = queues.new.front();
        let new = first.and_then(|entry| may(entry, Place::New));
        let acknowledgement = queues.acknowledgements.front().filter(|entry| {
            let overtakes = first.is_some_and(|first| first.serial < entry.serial);
            !overtakes || !self.is_barred() && stream.left_end().is_some()
        });
        let acknowledgement = acknowledgement.and_then(|entry| may(entry, Place::Acknowledgement));
        let again = queues.again.iter().take(AGAIN_MAX).enumerate();
        let again = again
            .filter(|_| !self.is_barred())
            .find_map(|(at, entry)| may(entry, Place::Again(at)));
        [new, acknowledgement, again]
            .into_iter()
            .flatten()
            .min_by_key(|next| next.serial)
    }

    /// Returns the frames of which a part may leave before the rest: the next of each kind.
    pub(crate) fn firsts(&self) -> impl Iterator<Item = &Entry> {
        let queues = self.queues.get();
        let new = queues.and_then(|queues| queues.new.front());
        let others = queues.filter(|_| !self.is_barred());
        let others = others.map(|queues| [queues.acknowledgements.front(), queues.again.front()]);
        new.into_iter().chain(others.into_iter().flatten().flatten())
    }

    /// Takes note that the first bytes of a frame leave, and returns it and how. What is new leaves once, as far as it goes; what is
    /// said again leaves from its start, for each frame that says it.
    pub(crate) fn begin(&mut self, stream: &Stream) -> Option<Begun<'_>> {
        let most = if self.is_barred() { 0 } else { AGAIN_MAX };
        let queues = self.queues.get_mut()?;
        let new = queues.new.front_mut().into_iter();
        new.chain(queues.again.iter_mut().take(most)).find_map(|entry| {
            let (end, leave) = stream.begins(&entry.note)?;
            let start = entry.begins_at();
            if end.at_most(entry.begun.unwrap_or(start)) {
                return None;
            }
            entry.begun = Some(end);
            Some(Begun {
                serial: entry.serial,
                segment: entry.note.segment(),
                part: start..end,
                leave,
            })
        })
    }

    /// Returns the next acknowledgement and the last, which says most. A guest that has sent nothing but its SYN has them among the
    /// new.
    pub(crate) fn acknowledgements(&self, stream: &Stream) -> Option<(&Entry, &Entry)> {
        let queues = self.queues.get().filter(|_| !self.is_barred())?;
        let new = queues.new.iter().take_while(|entry| entry.note.only_acknowledges());
        if let Some(ends) = queues.new.front().zip(new.last()) {
            return Some(ends);
        }
        let ends = queues.acknowledgements.front().zip(queues.acknowledgements.back());
        // What overtakes has to be renumbered.
        ends.filter(|(_, last)| stream.left_end().is_some() || self.first_new().is_none_or(|new| last.serial < new))
    }

    /// Takes out a frame that leaves.
    pub(crate) fn take(&mut self, place: Place) -> Option<Entry> {
        let queues = self.queues.get_mut()?;
        let entry = match place {
            Place::New => queues.new.pop_front(),
            Place::Acknowledgement => queues.acknowledgements.pop_front(),
            Place::Again(at) => queues.again.remove(at),
            Place::Whole => None,
        }?;
        self.barriers -= usize::from(is_barrier(entry.note.segment()));
        Some(entry)
    }

    /// Takes out the frame that has waited longest, if it is this one.
    pub(crate) fn take_oldest(&mut self, serial: u64) -> Option<Entry> {
        let is_it = |queue: &VecDeque<Entry>| queue.front().is_some_and(|entry| entry.serial == serial);
        let queues = self.queues.get()?;
        let place = if is_it(&queues.new) {
            Place::New
        } else if is_it(&queues.acknowledgements) {
            Place::Acknowledgement
        } else if is_it(&queues.again) {
            Place::Again(0)
        } else {
            return None;
        };
        self.take(place)
    }

    /// Returns the sequence number with which an acknowledgement leaves that was just taken out, if it is another than its own.
    pub(crate) fn renumbered(&self, entry: &Entry, left_end: Option<Seq>) -> Option<Seq> {
        let end = left_end.filter(|_| entry.note.turn() == Turn::Acknowledgement)?;
        let ahead = entry.note.segment().seq.after(end);
        let overtakes = self.first_new().is_some_and(|first| first < entry.serial);
        (ahead < 0 || ahead > 0 && overtakes).then_some(end)
    }
}

/// Says whether nothing may overtake this segment.
fn is_barrier(segment: &Segment) -> bool {
    (segment.syn || segment.rst) && !mutants::on(Mutant::OvertakeReset)
}
