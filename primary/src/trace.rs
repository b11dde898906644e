//! What each of the last checkpoints cost, part by part.
//!
//! ```text
//!   VM's thread: halt, harvest, copy, save ─► begin      resume ─► resumed
//!   courier:     encode and queue          ─► sent
//!   loop:        the acknowledgement       ─► committed    `tandem bench` ─► list
//! ```
//!
//! The threads that carry a checkpoint out write down here how long they took; the loop reads it for whoever asks. Nothing is
//! decided by it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use checkpoint::pages::{Amount, Codec, CodecStats};
use checkpoint::{Epoch, Tag};
use link::status::{CheckpointTrace, CodecTrace, PauseParts};
use tracing::debug;

/// Checkpoints that are remembered.
const TRACES_MAX: usize = 256;

/// The memory of the last checkpoints, shared by the threads of a role.
#[derive(Clone, Debug, Default)]
pub(crate) struct Traces(Arc<Mutex<VecDeque<Entry>>>);

#[derive(Debug)]
struct Entry {
    tag: Tag,
    began: Instant,
    resumed: bool,
    committed: bool,
    trace: CheckpointTrace,
}

/// Times one stop on the VM's thread.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    began: Instant,
    last: Instant,
    /// The parts so far.
    pub(crate) parts: PauseParts,
}

impl Stopwatch {
    /// Begins with the stop.
    pub(crate) fn start() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            last: now,
            parts: PauseParts::default(),
        }
    }

    /// Returns the time since the last lap, in microseconds.
    pub(crate) fn lap(&mut self) -> f64 {
        let now = Instant::now();
        micros(now - core::mem::replace(&mut self.last, now))
    }
}

impl Traces {
    /// A checkpoint is copied: its stop so far.
    pub(crate) fn begin(&self, tag: Tag, watch: &Stopwatch, pages: u64) {
        let mut entries = self.entries();
        if entries.len() == TRACES_MAX {
            entries.pop_front();
        }
        entries.push_back(Entry {
            tag,
            began: watch.began,
            resumed: false,
            committed: false,
            trace: CheckpointTrace {
                epoch: tag.epoch.0,
                pages,
                parts: watch.parts,
                ..CheckpointTrace::default()
            },
        });
    }

    /// The guest goes on after the stop of the last checkpoint begun.
    pub(crate) fn resumed(&self, watch: &Stopwatch) {
        if let Some(entry) = self.entries().back_mut().filter(|entry| entry.began == watch.began) {
            entry.trace.parts = watch.parts;
            entry.trace.pause_us = micros(watch.last - watch.began);
            entry.resumed = true;
        }
    }

    /// All of a checkpoint's pages are encoded and queued: some ahead of its stop, and after it so many `bytes`. The bases take, and may
    /// take, so much memory.
    pub(crate) fn sent(
        &self,
        tag: Tag,
        took: Duration,
        stats: &CodecStats,
        ahead: Amount,
        bytes: u64,
        bases: (usize, usize),
    ) {
        self.with(tag, |entry| {
            entry.trace.encode_us = micros(took);
            entry.trace.bases_bytes = bases.0 as u64;
            entry.trace.bases_bytes_max = bases.1 as u64;
            entry.trace.pages_ahead = ahead.pages;
            entry.trace.bytes = ahead.bytes + bytes;
            let codecs = Codec::ALL.map(|codec| (codec, stats.of(codec)));
            entry.trace.codecs = codecs
                .into_iter()
                .filter(|(_, amount)| amount.pages > 0)
                .map(|(codec, amount)| CodecTrace {
                    codec: codec.name().to_owned(),
                    pages: amount.pages,
                    bytes: amount.bytes,
                })
                .collect();
        });
    }

    /// The secondary has acknowledged a checkpoint.
    pub(crate) fn committed(&self, epoch: Epoch, predicted: Duration) {
        for entry in self.entries().iter_mut().rev().take_while(|entry| !entry.committed) {
            if entry.tag.epoch == epoch {
                entry.trace.commit_us = micros(entry.began.elapsed());
                entry.trace.predicted_us = micros(predicted);
                let trace = &entry.trace;
                debug!(
                    epoch = epoch.0,
                    pages = trace.pages,
                    ahead = trace.pages_ahead,
                    pause_us = trace.pause_us,
                    predicted_us = trace.predicted_us,
                    "checkpoint"
                );
                entry.committed = true;
                return;
            }
        }
    }

    /// Returns the checkpoints that are remembered, committed, and after which the guest goes on; the oldest first.
    pub(crate) fn list(&self) -> Vec<CheckpointTrace> {
        let entries = self.entries();
        let done = entries.iter().filter(|entry| entry.resumed && entry.committed);
        done.map(|entry| entry.trace.clone()).collect()
    }

    /// Returns the last checkpoint committed.
    pub(crate) fn last(&self) -> Option<CheckpointTrace> {
        let entries = self.entries();
        entries
            .iter()
            .rev()
            .find(|entry| entry.committed)
            .map(|entry| entry.trace.clone())
    }

    fn with(&self, tag: Tag, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.entries().iter_mut().rev().find(|entry| entry.tag == tag) {
            change(entry);
        }
    }

    fn entries(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn micros(span: Duration) -> f64 {
    span.as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::Generation;

    fn tag(epoch: u64) -> Tag {
        Tag {
            generation: Generation(1),
            epoch: Epoch(epoch),
        }
    }

    fn taken(traces: &Traces, epoch: u64) {
        let mut watch = Stopwatch::start();
        watch.parts.halt_us = watch.lap();
        traces.begin(tag(epoch), &watch, 7);
        traces.sent(
            tag(epoch),
            Duration::from_micros(5),
            &CodecStats::default(),
            Amount { pages: 3, bytes: 2 },
            9,
            (1, 2),
        );
        watch.parts.resume_us = watch.lap();
        traces.resumed(&watch);
    }

    #[test]
    fn only_what_was_committed_is_told() {
        let traces = Traces::default();
        taken(&traces, 1);
        taken(&traces, 2);
        assert!(traces.list().is_empty() && traces.last().is_none());
        traces.committed(Epoch(2), Duration::from_micros(8));
        let told = traces.list();
        assert_eq!(told.len(), 1);
        assert_eq!(
            (told[0].epoch, told[0].pages, told[0].pages_ahead, told[0].bytes),
            (2, 7, 3, 11)
        );
        assert!(told[0].commit_us >= told[0].pause_us && told[0].pause_us > 0.0);
        assert!((told[0].predicted_us - 8.0).abs() < 1e-6);
        assert_eq!(traces.last().as_ref(), told.first());
    }

    #[test]
    fn a_guest_that_still_stands_is_not_told_of_yet() {
        let traces = Traces::default();
        let watch = Stopwatch::start();
        traces.begin(tag(1), &watch, 0);
        traces.committed(Epoch(1), Duration::ZERO);
        assert!(traces.list().is_empty() && traces.last().is_some());
        traces.resumed(&Stopwatch::start());
        assert!(traces.list().is_empty(), "another stop's end");
        traces.resumed(&watch);
        assert_eq!(traces.list().len(), 1);
    }

    #[test]
    fn memory_is_bounded() {
        let traces = Traces::default();
        for epoch in 0..2_000 {
            taken(&traces, epoch);
            traces.committed(Epoch(epoch), Duration::ZERO);
        }
        let told = traces.list();
        assert_eq!((told.len(), told[0].epoch), (TRACES_MAX, 2_000 - TRACES_MAX as u64));
    }
}
