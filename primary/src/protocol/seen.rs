//! What a capture shows: each frame of both guests, each that was let out, and why; nothing while nobody captures.
//!
//! Filled in the course of a step, taken by the shell after it, and so never longer than one step makes it.

use bytes::Bytes;
use checkpoint::pair::{Place, Sight};
use checkpoint::{Instant, Nic};

/// What was seen and has not been taken.
#[derive(Debug, Default)]
pub(super) struct Seen {
    on: bool,
    sights: Vec<Sight>,
    /// What happened while no frame was seen; the next one tells it.
    note: Option<String>,
}

impl Seen {
    pub(super) fn set(&mut self, on: bool) {
        *self = Self { on, ..Self::default() };
    }

    /// Notes a frame. Costs nothing while nobody captures.
    pub(super) fn see(&mut self, at: Instant, nic: Nic, frame: &Bytes, place: Place, comment: impl FnOnce() -> String) {
        if !self.on {
            return;
        }
        let mut comment = comment();
        if let Some(note) = self.note.take() {
            comment = format!("{comment}; before it: {note}");
        }
        self.sights.push(Sight {
            at,
            nic,
            place,
            comment,
            frame: proxy::on_wire(frame),
        });
    }

    /// Notes what made a checkpoint necessary, with the frame of this step that showed it.
    pub(super) fn note(&mut self, note: &str) {
        if !self.on {
            return;
        }
        let sent = self.sights.iter_mut().rfind(|sight| sight.place != Place::Released);
        match sent {
            Some(sight) => sight.comment = format!("{}; {note}", sight.comment),
            None => self.note = Some(note.to_owned()),
        }
    }

    pub(super) fn take(&mut self) -> Vec<Sight> {
        core::mem::take(&mut self.sights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn see(seen: &mut Seen, place: Place) {
        seen.see(Instant(1), Nic::FIRST, &Bytes::from_static(b"frame"), place, || {
            "sent".to_owned()
        });
    }

    #[test]
    fn nothing_is_kept_while_nobody_captures() {
        let mut seen = Seen::default();
        seen.see(Instant(1), Nic::FIRST, &Bytes::new(), Place::Primary, || {
            panic!("nobody reads it")
        });
        seen.note("x");
        assert_eq!(seen.take(), []);
    }

    #[test]
    fn a_difference_is_told_with_the_frame_that_showed_it_or_with_the_next() {
        let mut seen = Seen::default();
        seen.set(true);
        see(&mut seen, Place::Secondary);
        see(&mut seen, Place::Released);
        seen.note("bytes differ");
        let comments: Vec<_> = seen.take().into_iter().map(|sight| sight.comment).collect();
        assert_eq!(comments, ["sent; bytes differ", "sent"]);
        seen.note("one waits");
        see(&mut seen, Place::Released);
        assert_eq!(seen.take()[0].comment, "sent; before it: one waits");
    }
}
