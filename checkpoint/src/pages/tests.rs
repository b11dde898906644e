//! Every codec and batches as wholes: exactness, sizes, hostile bytes.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;

mod hostile;
mod together;

/// What a page may hold.
#[derive(Clone, Debug)]
enum Shape {
    Zero,
    Pattern(u8, u8),
    Noise(u64),
    /// Another page with some bytes changed.
    Changed(Box<Self>, Vec<(usize, Vec<u8>)>),
    /// Another page, shifted: base and content overlap without being aligned.
    Shifted(Box<Self>, usize),
}

fn content(shape: &Shape) -> Box<Page> {
    let mut page = Box::new(ZERO_PAGE);
    match shape {
        Shape::Zero => {}
        Shape::Pattern(value, step) => page
            .iter_mut()
            .step_by(usize::from(*step) + 1)
            .for_each(|byte| *byte = *value),
        Shape::Noise(seed) => {
            let mut random = Random(seed | 1);
            page.iter_mut().for_each(|byte| *byte = random.byte());
        }
        Shape::Changed(of, changes) => {
            page = content(of);
            for (at, bytes) in changes {
                let end = (at + bytes.len()).min(PAGE_BYTES);
                page[*at..end].copy_from_slice(&bytes[..end - at]);
            }
        }
        Shape::Shifted(of, by) => {
            page = content(of);
            page.rotate_right(*by);
        }
    }
    page
}

/// The same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 24
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[2]
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next()).unwrap() % end
    }
}

fn plain_shapes() -> impl Strategy<Value = Shape> {
    prop_oneof![
        Just(Shape::Zero),
        (any::<u8>(), any::<u8>()).prop_map(|(value, step)| Shape::Pattern(value, step)),
        any::<u64>().prop_map(Shape::Noise),
    ]
}

/// A content and its base: unrelated, the same, a little changed, or shifted.
fn pairs() -> impl Strategy<Value = (Shape, Option<Shape>)> {
    let changes = vec((0..PAGE_BYTES, vec(any::<u8>(), 1..40)), 0..40);
    prop_oneof![
        plain_shapes().prop_map(|shape| (shape, None)),
        (plain_shapes(), plain_shapes()).prop_map(|(shape, base)| (shape, Some(base))),
        (plain_shapes(), changes)
            .prop_map(|(base, changes)| (Shape::Changed(Box::new(base.clone()), changes), Some(base))),
        (plain_shapes(), 0..PAGE_BYTES).prop_map(|(base, by)| (Shape::Shifted(Box::new(base.clone()), by), Some(base))),
    ]
}

const BASE: Epoch = Epoch(41);
const SPEEDS: [u64; 3] = [1_000_000, 125_000_000, 50_000_000_000];

fn chooser(bytes_per_second: u64) -> Chooser {
    Chooser::new(Link {
        bytes_per_second,
        zstd: true,
    })
}

/// A page to be pushed.
struct Case {
    page: Box<Page>,
    base: Option<Box<Page>>,
    shipped: bool,
}

impl Case {
    fn reference(&self) -> Option<Reference<'_>> {
        let page = self.base.as_deref()?;
        Some(Reference {
            page,
            epoch: BASE,
            shipped: self.shipped,
        })
    }
}

fn encode(cases: &BTreeMap<u64, Case>, capacity: usize, chooser: &mut Chooser) -> (Vec<(u32, Bytes)>, CodecStats) {
    let mut encoder = BatchEncoder::new(capacity, Some(BASE));
    let mut batches = Vec::new();
    for (index, case) in cases {
        if encoder.push(*index, &case.page, case.reference(), chooser).full {
            batches.push(encoder.finish());
        }
    }
    if !encoder.is_empty() {
        batches.push(encoder.finish());
    }
    assert!(encoder.is_empty());
    (batches, *encoder.stats())
}

/// Decodes to what the pages of a receiver with the bases of `cases` are then.
fn decode(cases: &BTreeMap<u64, Case>, batches: &[(u32, Bytes)]) -> Result<BTreeMap<u64, Box<Page>>, PageError> {
    let mut decoder = BatchDecoder::default();
    let mut pages: BTreeMap<_, _> = cases
        .iter()
        .filter_map(|(index, case)| Some((*index, case.base.clone()?)))
        .collect();
    for (count, batch) in batches {
        let expected = Expected {
            count: *count,
            pages: INDEX_END,
            base: Some(BASE),
        };
        let base = |index, page: &mut Page| {
            *page = **cases[&index].base.as_ref().expect("deltas need a base");
            Ok(())
        };
        decoder.decode::<PageError>(batch, &expected, base, |index, content| {
            match content {
                Content::Page(page) => drop(pages.insert(index, Box::new(*page))),
                Content::Unchanged => {
                    let base = cases[&index].base.clone().expect("unchanged against a base");
                    pages.insert(index, base);
                }
                Content::Own => panic!("not asked for"),
            }
            Ok(())
        })?;
    }
    Ok(pages)
}

fn one(page: &Page, base: Option<&Page>) -> (Pushed, Bytes) {
    let mut encoder = BatchEncoder::new(BATCH_BYTES, Some(BASE));
    let reference = base.map(|page| Reference {
        page,
        epoch: BASE,
        shipped: true,
    });
    let pushed = encoder.push(70_000, page, reference, &mut Chooser::default());
    (pushed, encoder.finish().1)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pages_come_back_as_they_were(
        pages in btree_map(0..INDEX_END, (pairs(), any::<bool>()), 0..40),
        speed in prop::sample::select(&SPEEDS[..]),
        capacity in BATCH_BYTES_MIN..BATCH_BYTES_MIN * 4,
    ) {
        let cases: BTreeMap<_, _> = pages.iter().map(|(index, ((page, base), shipped))| {
            (*index, Case { page: content(page), base: base.as_ref().map(content), shipped: *shipped })
        }).collect();
        let (batches, stats) = encode(&cases, capacity, &mut chooser(speed));
        prop_assert!(batches.iter().all(|(_, batch)| batch.len() <= capacity));
        prop_assert_eq!(stats.total().pages, cases.len() as u64);
        let heads = batches.len() * 2;
        let bytes: usize = batches.iter().map(|(_, batch)| batch.len()).sum();
        prop_assert_eq!(stats.total().bytes, (bytes - heads) as u64);
        let decoded = decode(&cases, &batches).unwrap();
        prop_assert!(cases.iter().all(|(index, case)| decoded[index] == case.page));
        prop_assert_eq!(decoded.len(), cases.len());
        if let Some((count, batch)) = batches.last() {
            for announced in [count - 1, count + 1] {
                prop_assert_eq!(
                    decode(&cases, &[(announced, batch.clone())]).err(),
                    Some(PageError::Count { found: *count, announced })
                );
            }
        }
    }

    #[test]
    fn deltas_are_exact_whatever_the_base((page, base) in pairs()) {
        let (page, base) = (content(&page), base.map_or_else(|| Box::new([0xaa; PAGE_BYTES]), |base| content(&base)));
        let mut runs = bytes::BytesMut::new();
        if delta::put(&mut runs, &page, &base) && page != base {
            prop_assert!(runs.len() <= PACKED_BYTES_MAX);
            let mut decoded = *base;
            prop_assert_eq!(delta::apply(&runs, &mut decoded), Some(()));
            prop_assert!(decoded == *page);
        }
    }
}

#[test]
fn each_codec_is_used_where_it_pays() {
    let noise = content(&Shape::Noise(3));
    let text = content(&Shape::Pattern(1, 7));
    let mut near = noise.clone();
    near[100..164].copy_from_slice(&[0; 64]);
    for (page, base, codec, most) in [
        (&ZERO_PAGE, None, Codec::Zero, 4),
        (&ZERO_PAGE, Some(&*noise), Codec::Zero, 4),
        (&ZERO_PAGE, Some(&ZERO_PAGE), Codec::Unchanged, 4),
        (&*noise, Some(&*noise), Codec::Unchanged, 4),
        (&*near, Some(&*noise), Codec::Delta, 80),
        (&*text, None, Codec::Lz4, 100),
        (&*text, Some(&*noise), Codec::Lz4, 100),
        (&*noise, None, Codec::Raw, 4 + PAGE_BYTES),
        (&*noise, Some(&*text), Codec::Raw, 4 + PAGE_BYTES),
    ] {
        let (pushed, batch) = one(page, base);
        assert_eq!(pushed.codec, codec);
        assert!(pushed.bytes <= most && batch.len() == pushed.bytes + 2, "{pushed:?}");
    }
    let mut slow = chooser(100_000);
    let mut encoder = BatchEncoder::new(BATCH_BYTES, None);
    assert_eq!(encoder.push(0, &text, None, &mut slow).codec, Codec::Zstd);
}

#[test]
fn a_page_that_is_as_in_the_base_is_left_out_unless_it_was_shipped() {
    let page = content(&Shape::Noise(3));
    let mut encoder = BatchEncoder::new(BATCH_BYTES, Some(BASE));
    let mut chooser = Chooser::default();
    let mut push = |index, shipped| {
        let reference = Reference {
            page: &page,
            epoch: BASE,
            shipped,
        };
        encoder.push(index, &page, Some(reference), &mut chooser)
    };
    assert_eq!((push(5, false).codec, push(6, false).bytes), (Codec::Unchanged, 0));
    assert_eq!((push(7, true).codec, push(8, true).bytes), (Codec::Unchanged, 1));
    let expected = Amount { pages: 4, bytes: 2 };
    assert_eq!(encoder.stats().of(Codec::Unchanged), expected);
    let (count, batch) = encoder.finish();
    assert_eq!((count, &batch[..]), (2, &[1, 42, 7 << 3 | 5, 5][..]));
}

#[test]
fn sparse_changes_meet_their_targets_on_the_wire() {
    let framing = crate::wire::HEADER_BYTES;
    for seed in 0..200 {
        let mut random = Random(seed);
        let base = content(&Shape::Noise(seed));
        let mut flip = |page: &mut Page, length: usize| {
            let at = random.below(PAGE_BYTES - length);
            page[at..at + length].iter_mut().for_each(|byte| *byte ^= 0x55);
        };
        let mut page = base.clone();
        flip(&mut page, 64);
        let (pushed, batch) = one(&page, Some(&base));
        assert_eq!(pushed.codec, Codec::Delta);
        // A batch of its own with a whole message's header: with others in the batch it is less.
        assert!(batch.len() + framing <= 150, "{} bytes", batch.len());
        let mut page = base.clone();
        (0..8).for_each(|_| flip(&mut page, 8));
        let (_, batch) = one(&page, Some(&base));
        assert!(batch.len() + framing <= 200, "{} bytes", batch.len());
    }
}

#[test]
fn bytes_of_a_batch_are_fixed() {
    let mut encoder = BatchEncoder::new(BATCH_BYTES, Some(Epoch(199)));
    let mut chooser = Chooser::default();
    let base = content(&Shape::Noise(1));
    let mut page = base.clone();
    for at in [3, 4, 300] {
        page[at] ^= 1;
    }
    let _ = encoder.push(0, &ZERO_PAGE, None, &mut chooser);
    let _ = encoder.push(40, &ZERO_PAGE, None, &mut chooser);
    let _ = encoder.push_own(41);
    let reference = Reference {
        page: &base,
        epoch: Epoch(199),
        shipped: false,
    };
    let _ = encoder.push(43, &page, Some(reference), &mut chooser);
    let runs = [&[3, 2, page[3], page[4], 0xa7, 2, 1, page[300]][..]].concat();
    let expected = [&[1, 0xc8, 1, 0, 0xb8, 2, 6, 1 << 3 | 4, 8, 0][..], &runs].concat();
    assert_eq!(encoder.finish(), (4, Bytes::from(expected)));
    encoder.rebase(None);
    let _ = encoder.push(2, &ZERO_PAGE, None, &mut chooser);
    assert_eq!(encoder.finish(), (1, Bytes::from_static(&[1, 0, 16])));
}

#[test]
#[should_panic(expected = "page 5 after page 6")]
fn pages_of_a_batch_ascend() {
    let mut encoder = BatchEncoder::new(BATCH_BYTES, None);
    let _ = encoder.push_own(5);
    let _ = encoder.push_own(5);
}

#[test]
#[should_panic(expected = "another base")]
fn a_reference_is_of_the_batchs_base() {
    let reference = Reference {
        page: &ZERO_PAGE,
        epoch: Epoch(40),
        shipped: false,
    };
    let mut encoder = BatchEncoder::new(BATCH_BYTES, Some(BASE));
    let _ = encoder.push(5, &ZERO_PAGE, Some(reference), &mut Chooser::default());
}

#[test]
fn codecs_are_numbered_as_documented() {
    assert!(
        Codec::ALL
            .iter()
            .enumerate()
            .all(|(number, codec)| *codec as usize == number)
    );
}

#[test]
fn one_bit_anywhere_is_not_zero() {
    assert!(is_zero(&ZERO_PAGE));
    for at in 0..PAGE_BYTES {
        let mut page = ZERO_PAGE;
        page[at] = 0x10;
        assert!(!is_zero(&page), "byte {at}");
    }
}
