//! Pages on their way to the streams: encoded and sent, a thread a stream where there are many.
//!
//! ```text
//!   pages ─┬─ those of stream 0 ─► Lane ─► stream 0          the calling thread
//!          ├─ those of stream 1 ─► Lane ─► stream 1          a thread for as long as this takes
//!          └─ …
//! ```
//!
//! A stream that takes no more blocks who fills it, and nobody else. Driven by the courier, and by the VM's thread during the
//! initial sync. No decision is made here.

use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, ScopedJoinHandle, scope};

use checkpoint::limits::PAGE_BYTES;
use checkpoint::pages::{Page, is_zero, stream_of};
use link::PageSenders;
use link::clock;
use machine::GuestRam;

use crate::encoding::{Encoding, Lane};
use crate::ship::{LinkGone, ShipError};

/// Pages from which on each stream has a thread: what a thread costs is little beside what they take to encode.
const SPREAD_PAGES_MIN: usize = 512;

/// Ships so many pages that are copied. The last of them may wait in the encoders.
pub(crate) fn ship_copied<'a, I>(
    encoding: &mut Encoding,
    out: &PageSenders,
    count: usize,
    pages: impl Fn() -> I + Sync,
) -> Result<(), ShipError>
where
    I: Iterator<Item = (u64, &'a Page)>,
{
    let streams = out.streams();
    side_by_side(encoding.lanes(), count >= SPREAD_PAGES_MIN, |stream, lane| {
        for (page, content) in pages().filter(|(page, _)| stream_of(*page, streams) == stream) {
            push(lane, stream, out, page, content)?;
        }
        Ok(())
    })
}

/// Ships pages out of memory. A fresh image is zero: `skip_zero` leaves such pages out.
pub(crate) fn ship_memory<I>(
    encoding: &mut Encoding,
    out: &PageSenders,
    ram: &GuestRam,
    pages: impl Fn() -> I + Sync,
    skip_zero: bool,
) -> Result<(), ShipError>
where
    I: Iterator<Item = u64>,
{
    let streams = out.streams();
    side_by_side(encoding.lanes(), true, |stream, lane| {
        let mut content = [0; PAGE_BYTES];
        for page in pages().filter(|page| stream_of(*page, streams) == stream) {
            ram.read_page(page, &mut content)?;
            if !(skip_zero && is_zero(&content)) {
                push(lane, stream, out, page, &content)?;
            }
        }
        Ok(finish(lane, stream, out)?)
    })
}

/// Encodes a page, and sends the batch if that fills it, or if the page has no place in it.
pub(crate) fn push(
    lane: &mut Lane,
    stream: usize,
    out: &PageSenders,
    page: u64,
    content: &Page,
) -> Result<(), LinkGone> {
    if !lane.follows(page) {
        finish(lane, stream, out)?;
    }
    if lane.push_timed(page, content, clock::now) {
        if let Some(speed) = out.take_speed(stream) {
            lane.link_measured(speed);
        }
        finish(lane, stream, out)?;
    }
    Ok(())
}

/// Sends the batches that are begun.
pub(crate) fn finish_all(encoding: &mut Encoding, out: &PageSenders) -> Result<(), LinkGone> {
    let mut lanes = encoding.lanes().iter_mut().enumerate();
    lanes.try_for_each(|(stream, lane)| finish(lane, stream, out))
}

/// Sends the batch that is begun, if there is one.
fn finish(lane: &mut Lane, stream: usize, out: &PageSenders) -> Result<(), LinkGone> {
    match lane.finish() {
        Some(batch) => out.blocking_send(stream, batch).map_err(|_closed| LinkGone),
        None => Ok(()),
    }
}

/// Does the work of each stream, at the same time if it is to be spread. A host that refuses a thread only makes it slower.
fn side_by_side<L: Send>(
    lanes: &mut [L],
    spread: bool,
    work: impl Fn(usize, &mut L) -> Result<(), ShipError> + Sync,
) -> Result<(), ShipError> {
    let helpers = if spread { lanes.len() - 1 } else { 0 };
    let waiting = Mutex::new(lanes.iter_mut().enumerate());
    let take = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work_off = || {
        while let Some((stream, lane)) = take() {
            work(stream, lane)?;
        }
        Ok(())
    };
    scope(|scope| {
        let helpers: Vec<ScopedJoinHandle<'_, Result<(), ShipError>>> = (1..=helpers)
            .map_while(|helper| {
                let thread = Builder::new().name(format!("encode-{helper}"));
                thread.spawn_scoped(scope, work_off).ok()
            })
            .collect();
        let mut result = work_off();
        for helper in helpers {
            // A panic of a helper is this thread's.
            let done = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(done);
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Barrier;
    use std::thread::current;

    use super::*;

    #[test]
    fn streams_are_worked_on_at_the_same_time_where_that_is_wanted() {
        for (streams, spread, threads) in [(4, true, 4), (4, false, 1), (1, true, 1)] {
            let mut lanes = vec![0; streams];
            // Nobody gets past it alone.
            let meet = Barrier::new(threads);
            let seen = Mutex::new(BTreeSet::new());
            let done = side_by_side(&mut lanes, spread, |stream, lane| {
                meet.wait();
                seen.lock().unwrap().insert(format!("{:?}", current().id()));
                *lane += stream + 1;
                Ok(())
            });
            assert!(done.is_ok());
            assert_eq!(lanes, (1..=streams).collect::<Vec<_>>());
            assert_eq!(seen.into_inner().unwrap().len(), threads);
        }
    }

    #[test]
    fn the_failure_of_any_stream_is_told() {
        for failing in 0..3 {
            let done = side_by_side(&mut [(); 3], true, |stream, ()| {
                if stream == failing {
                    Err(ShipError::Link)
                } else {
                    Ok(())
                }
            });
            assert!(matches!(done, Err(ShipError::Link)));
        }
    }
}
