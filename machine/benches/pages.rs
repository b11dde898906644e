//! Pages copied, applied and reverted: what each costs, beside a plain memcpy.
//!
//! `cargo bench -p machine --bench pages`

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use machine::{CopyBuffer, GuestRam, Mapping, PAGE_BYTES, PageSet};
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 256 << 20;
const PAGE: u64 = PAGE_BYTES as u64;
const ROUNDS: usize = 30;

fn median(mut work: impl FnMut() -> Duration) -> Duration {
    let mut times: Vec<_> = (0..ROUNDS).map(|_| work()).collect();
    times.sort_unstable();
    times[ROUNDS / 2]
}

fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn print(what: &str, layout: &str, pages: u64, each: Duration) {
    let seconds = each.as_secs_f64();
    println!(
        "{what:34} {pages:6} pages {layout:9} {:9.1} µs, {:6.3} µs a page, {:5.2} GB/s",
        seconds * 1e6,
        seconds * 1e6 / pages as f64,
        (pages * PAGE) as f64 / seconds / 1e9,
    );
}

/// Pages in runs of `run`, spread over the memory.
fn pages(count: u64, run: u64) -> PageSet {
    let total = RAM / PAGE;
    let mut set = PageSet::new(total);
    let step = (total / count.div_ceil(run)).max(run);
    for start in (0..count.div_ceil(run)).map(|number| number * step) {
        set.extend((start..start + run).take(usize::try_from(count - set.len().min(count)).unwrap()));
    }
    set
}

fn halves(set: &PageSet) -> [PageSet; 2] {
    let mut parts = [PageSet::new(set.pages()), PageSet::new(set.pages())];
    let half = set.len() / 2;
    for (page, place) in set.iter().zip(0..) {
        parts[usize::from(place >= half)].insert(page);
    }
    parts
}

fn copies(ram: &GuestRam, set: &PageSet, layout: &str) {
    let count = set.len();
    let size = usize::try_from(count).unwrap();
    let source = vec![1_u8; size * PAGE_BYTES];
    let mut target = vec![2_u8; size * PAGE_BYTES];
    let plain = median(|| time(|| black_box(&mut target).copy_from_slice(black_box(&source))));
    print("memcpy", "whole", count, plain);
    let mut buffer = CopyBuffer::new(size);
    let copied = median(|| {
        buffer.clear();
        time(|| assert!(buffer.copy(ram, set).unwrap().is_empty()))
    });
    print("CopyBuffer::copy", layout, count, copied);
    let parts = halves(set);
    let mut buffers = [CopyBuffer::new(size), CopyBuffer::new(size)];
    let shared = median(|| {
        buffers.iter_mut().for_each(CopyBuffer::clear);
        time(|| {
            std::thread::scope(|scope| {
                let [first, second] = &mut buffers;
                scope.spawn(|| assert!(first.copy(ram, &parts[0]).unwrap().is_empty()));
                assert!(second.copy(ram, &parts[1]).unwrap().is_empty());
            });
        })
    });
    print("CopyBuffer::copy by two threads", layout, count, shared);
}

fn applies(set: &PageSet, layout: &str) {
    let ram = GuestRam::new(RAM, Mapping::Private).unwrap();
    let numbers: Vec<_> = set.iter().collect();
    let content = vec![7_u8; numbers.len() * PAGE_BYTES];
    ram.write_committed_pages(&numbers, &content).unwrap();
    let one_by_one = median(|| {
        time(|| {
            for (page, content) in numbers.iter().zip(content.as_chunks().0) {
                ram.write_committed(*page, content).unwrap();
            }
        })
    });
    print("write_committed, one by one", layout, set.len(), one_by_one);
    let runs = median(|| time(|| ram.write_committed_pages(&numbers, &content).unwrap()));
    print("write_committed_pages", layout, set.len(), runs);
    let reverted = median(|| {
        for page in &numbers {
            ram.memory().write_obj(1_u8, GuestAddress(page * PAGE)).unwrap();
        }
        time(|| ram.revert(set).unwrap())
    });
    print("revert", layout, set.len(), reverted);
}

fn main() {
    let ram = GuestRam::new(RAM, Mapping::Shared).unwrap();
    for page in 0..ram.pages() {
        ram.memory().write_obj(page, GuestAddress(page * PAGE)).unwrap();
    }
    for count in [100, 1_000, 10_000, 50_000] {
        for (run, layout) in [(u64::MAX, "in a run"), (8, "by eight"), (1, "single")] {
            let set = pages(count, run.min(count));
            copies(&ram, &set, layout);
            applies(&set, layout);
        }
    }
}
