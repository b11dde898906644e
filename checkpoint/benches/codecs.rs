//! What a page costs: encoding, decoding, comparing and hashing, with the bytes per second beside memcpy's.
//!
//! `cargo bench -p checkpoint --bench codecs`. Every benchmark handles 1,024 pages; throughput counts their plain bytes.

use bytes::{Bytes, BytesMut};
use checkpoint::Epoch;
use checkpoint::limits::PAGE_BYTES;
use checkpoint::pages::identical::PageHasher;
use checkpoint::pages::{
    BATCH_BYTES, BaseCache, BatchDecoder, BatchEncoder, Chooser, Codec, Content, Expected, Link, Page, PageError,
    Reference, is_zero,
};
use divan::counter::BytesCount;
use divan::{Bencher, black_box};

fn main() {
    print_sizes();
    divan::main();
}

const PAGES: usize = 1_024;
const BASE: Epoch = Epoch(7);

/// What the pages hold, and what they held before.
const CASES: [&str; 8] = ["zero", "same", "64B", "8x8B", "counters", "text", "text-zstd", "random"];

struct Pages {
    new: Vec<Page>,
    old: Option<Vec<Page>>,
    bytes_per_second: u64,
}

fn noise(seed: u64, page: &mut Page) {
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(page);
}

fn text(seed: u64, page: &mut Page) {
    const WORDS: [&str; 16] = [
        "the ",
        "guest ",
        "sends ",
        "a frame, ",
        "and ",
        "waits ",
        "for its ",
        "equal: ",
        "GET /index ",
        "HTTP/1.1\r\n",
        "checkpoint ",
        "of epoch ",
        "17 ",
        "commits.\n",
        "key=",
        "value ",
    ];
    let mut random = [0; PAGE_BYTES];
    noise(seed, &mut random);
    let mut choice = random.iter();
    let mut rest = &mut page[..];
    while !rest.is_empty() {
        let word = WORDS[usize::from(*choice.next().expect("words are longer than a byte")) % WORDS.len()].as_bytes();
        let length = word.len().min(rest.len());
        let (place, later) = rest.split_at_mut(length);
        place.copy_from_slice(&word[..length]);
        rest = later;
    }
}

fn pages(case: &str) -> Pages {
    let fill = |make: fn(u64, &mut Page)| -> Vec<Page> {
        (0..PAGES as u64)
            .map(|seed| {
                let mut page = [0; PAGE_BYTES];
                make(seed, &mut page);
                page
            })
            .collect()
    };
    let changed = |change: fn(&mut Page)| {
        let old = fill(noise);
        let mut new = old.clone();
        new.iter_mut().for_each(change);
        (new, Some(old))
    };
    let (new, old) = match case {
        "zero" => (fill(|_, _| ()), None),
        "same" => changed(|_| ()),
        "64B" => changed(|page| page[1_001..1_065].iter_mut().for_each(|byte| *byte ^= 0x55)),
        "8x8B" => changed(|page| {
            for at in (100..PAGE_BYTES).step_by(512) {
                page[at..at + 8].iter_mut().for_each(|byte| *byte ^= 0x55);
            }
        }),
        "counters" => changed(|page| page.iter_mut().step_by(32).for_each(|byte| *byte ^= 1)),
        "random" => (fill(noise), None),
        _ => (fill(text), None),
    };
    Pages {
        new,
        old,
        // Slow enough that zstd is chosen for the one case, so fast that it is not for the others.
        bytes_per_second: if case == "text-zstd" { 1_000_000 } else { 125_000_000 },
    }
}

impl Pages {
    fn chooser(&self) -> Chooser {
        Chooser::new(Link {
            bytes_per_second: self.bytes_per_second,
            zstd: true,
        })
    }

    fn reference(&self, index: usize) -> Option<Reference<'_>> {
        let page = &self.old.as_ref()?[index];
        Some(Reference {
            page,
            epoch: BASE,
            shipped: true,
        })
    }

    fn encode(&self, encoder: &mut BatchEncoder, chooser: &mut Chooser, mut sink: impl FnMut(u32, Bytes)) {
        for (index, page) in self.new.iter().enumerate() {
            if encoder.push(index as u64, page, self.reference(index), chooser).full {
                let (count, batch) = encoder.finish();
                sink(count, batch);
            }
        }
        let (count, batch) = encoder.finish();
        sink(count, batch);
    }
}

fn encoder() -> BatchEncoder {
    BatchEncoder::with_buffer(BytesMut::with_capacity(BATCH_BYTES), Some(BASE))
}

fn plain_bytes() -> BytesCount {
    BytesCount::new(PAGES * PAGE_BYTES)
}

fn print_sizes() {
    println!("bytes on the wire per page (without the message's header, one for many pages)");
    for case in CASES {
        let pages = pages(case);
        let mut encoder = encoder();
        pages.encode(&mut encoder, &mut pages.chooser(), |_, batch| drop(batch));
        let stats = encoder.stats();
        let used = Codec::ALL.iter().filter(|codec| stats.of(**codec).pages > 0);
        let used: Vec<_> = used
            .map(|codec| format!("{} {}", stats.of(*codec).pages, codec.name()))
            .collect();
        println!(
            "  {case:<10} {:>7.1}   {}",
            stats.total().bytes as f64 / PAGES as f64,
            used.join(", ")
        );
    }
}

#[divan::bench]
fn memcpy(bencher: Bencher<'_, '_>) {
    let from = pages("random").new;
    let mut to = from.clone();
    bencher
        .counter(plain_bytes())
        .bench_local(|| black_box(&mut to).copy_from_slice(black_box(&from)));
}

#[divan::bench(args = CASES)]
fn encode(bencher: Bencher<'_, '_>, case: &str) {
    let pages = pages(case);
    let (mut encoder, mut chooser) = (encoder(), pages.chooser());
    bencher.counter(plain_bytes()).bench_local(|| {
        pages.encode(&mut encoder, &mut chooser, |_, batch| drop(black_box(batch)));
    });
}

#[divan::bench(args = CASES)]
fn decode(bencher: Bencher<'_, '_>, case: &str) {
    let pages = pages(case);
    let mut batches = Vec::new();
    pages.encode(&mut encoder(), &mut pages.chooser(), |count, batch| {
        batches.push((count, batch))
    });
    let mut stage = pages.new.clone();
    let mut decoder = BatchDecoder::default();
    bencher.counter(plain_bytes()).bench_local(|| {
        for (count, batch) in &batches {
            let expected = Expected {
                count: *count,
                pages: PAGES as u64,
                base: Some(BASE),
            };
            let place = |index: u64| usize::try_from(index).expect("small");
            let base = |index, page: &mut Page| {
                page.copy_from_slice(&pages.old.as_ref().expect("deltas have a base")[place(index)]);
                Ok(())
            };
            let decoded = decoder.decode::<PageError>(batch, &expected, base, |index, content| {
                if let Content::Page(page) = content {
                    stage[place(index)].copy_from_slice(page);
                }
                Ok(())
            });
            decoded.expect("a batch of this process");
        }
    });
}

#[divan::bench]
fn zero_check(bencher: Bencher<'_, '_>) {
    let pages = pages("zero").new;
    bencher
        .counter(plain_bytes())
        .bench_local(|| black_box(&pages).iter().filter(|page| is_zero(page)).count());
}

#[divan::bench]
fn hash(bencher: Bencher<'_, '_>) {
    let pages = pages("random").new;
    let hasher = PageHasher::new(&[3; 32]);
    bencher.counter(plain_bytes()).bench_local(|| {
        black_box(&pages).iter().for_each(|page| {
            black_box(hasher.hash(page));
        });
    });
}

/// What the page hash is measured against.
#[divan::bench]
fn hash_blake3(bencher: Bencher<'_, '_>) {
    let pages = pages("random").new;
    bencher.counter(plain_bytes()).bench_local(|| {
        black_box(&pages).iter().for_each(|page| {
            black_box(blake3::keyed_hash(&[3; 32], page));
        });
    });
}

/// The cost of remembering: a look-up, the copy beside the base, the commit.
#[divan::bench]
fn base_cache(bencher: Bencher<'_, '_>) {
    let pages = pages("random").new;
    let mut cache = BaseCache::new(PAGES * PAGE_BYTES * 3);
    let mut epoch = 0;
    bencher.counter(plain_bytes()).bench_local(|| {
        for (index, page) in pages.iter().enumerate() {
            black_box(cache.base(index as u64));
            cache.shipped(index as u64, page, Codec::Raw);
        }
        epoch += 1;
        cache.commit(Epoch(epoch));
    });
}
