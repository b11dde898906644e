//! Batches as an enemy would send them.

use super::*;

const PAGES: u64 = 64;

fn expected(count: u32) -> Expected {
    Expected {
        count,
        pages: PAGES,
        base: Some(BASE),
    }
}

/// Decodes with a base of noise. Returns the pages that were given out.
fn attempt(decoder: &mut BatchDecoder, bytes: &[u8], count: u32) -> (Result<(), PageError>, Vec<u64>) {
    let mut given: Vec<u64> = Vec::new();
    let base = |index, page: &mut Page| {
        assert!(index < PAGES);
        *page = [0x5a; PAGE_BYTES];
        Ok(())
    };
    let result = decoder.decode(bytes, &expected(count), base, |index, _| {
        assert!(index < PAGES, "page {index}");
        given.push(index);
        Ok(())
    });
    assert!(given.is_sorted_by(|a, b| a < b), "{given:?}");
    assert!(given.len() <= count as usize);
    (result, given)
}

fn fails(bytes: &[u8]) -> PageError {
    attempt(&mut BatchDecoder::default(), bytes, 9)
        .0
        .expect_err("a hostile batch")
}

/// A batch with every codec in it.
fn rich(random: &mut Random) -> (u32, Vec<u8>) {
    let mut encoder = BatchEncoder::new(BATCH_BYTES, Some(BASE));
    let mut choosers = SPEEDS.map(chooser);
    let base = [0x5a; PAGE_BYTES];
    for index in 0..10 {
        let mut page = content(&match random.below(4) {
            0 => Shape::Noise(random.next()),
            1 => Shape::Pattern(random.byte(), random.byte()),
            2 => Shape::Zero,
            _ => Shape::Pattern(0x5a, 0),
        });
        (0..random.below(6)).for_each(|_| page[random.below(PAGE_BYTES)] = random.byte());
        let reference = Reference {
            page: &base,
            epoch: BASE,
            shipped: random.below(2) == 0,
        };
        let reference = (random.below(3) > 0).then_some(reference);
        let _ = encoder.push(index * 6, &page, reference, &mut choosers[random.below(SPEEDS.len())]);
    }
    let _ = encoder.push_own(60);
    let (count, batch) = encoder.finish();
    (count, batch.to_vec())
}

#[test]
fn mutated_batches_are_errors_or_pages_within_the_memory() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut decoder = BatchDecoder::default();
    let mut refused = 0;
    let rounds = 6_000;
    for _ in 0..rounds {
        let (count, mut bytes) = rich(&mut random);
        let (whole, given) = attempt(&mut decoder, &bytes, count);
        assert_eq!((whole, given.len()), (Ok(()), count as usize));
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len());
            match random.below(5) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = random.byte(),
                2 => bytes.truncate(at.max(1)),
                3 => bytes.insert(at, random.byte()),
                _ => {
                    let end = at + random.below(bytes.len() - at).min(64);
                    let part = bytes[at..end].to_vec();
                    let to = random.below(bytes.len());
                    bytes.splice(to..to, part);
                }
            }
        }
        refused += usize::from(attempt(&mut decoder, &bytes, count).0.is_err());
    }
    // A change inside a raw page is another page: what travels is summed elsewhere.
    assert!(refused > rounds / 4, "{refused}");
}

#[test]
fn garbage_is_an_error_or_pages_within_the_memory() {
    let mut random = Random(77);
    let mut decoder = BatchDecoder::default();
    for round in 0..100_000_usize {
        let mut bytes = [0; 98];
        bytes.iter_mut().for_each(|byte| *byte = random.byte() >> (round % 5));
        // A good head, so that the records are reached.
        bytes[..2].copy_from_slice(&[VERSION, 42]);
        let _ = attempt(&mut decoder, &bytes[..2 + round % 97], 200);
    }
}

#[test]
fn hostile_batches_are_named() {
    assert_eq!(fails(&[]), PageError::Head);
    assert_eq!(fails(&[1]), PageError::Head);
    assert_eq!(fails(&[1, 0x80, 0]), PageError::Head);
    assert_eq!(fails(&[2, 0]), PageError::Version(2));
    assert_eq!(fails(&[1, 0, 7]), PageError::Encoding { record: 0, encoding: 7 });
    assert_eq!(fails(&[1, 0, 0x80, 4]), PageError::Outside { index: 64, pages: 64 });
    // 63, then the next after it.
    assert_eq!(fails(&[1, 0, 0xf8, 3, 0]), PageError::Outside { index: 64, pages: 64 });
    assert_eq!(fails(&[1, 0, 0, 1, 0]), PageError::Truncated(1));
    assert_eq!(fails(&[1, 0, 2, 5]), PageError::Truncated(0));
    assert_eq!(fails(&[1, 0, 2, 5, 0, 1]), PageError::Truncated(0));
    assert_eq!(fails(&[1, 0, 0x80]), PageError::Truncated(0));
    assert_eq!(
        fails(&[1, 0, 0x80, 0]),
        PageError::Index(0),
        "two encodings of one number"
    );
    assert_eq!(
        fails(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]),
        PageError::Index(0)
    );
    for codec in [Codec::Lz4, Codec::Zstd] {
        let number = (codec as u64).to_le_bytes()[0];
        assert_eq!(fails(&[1, 0, number, 1, 0, 0]), PageError::Content { index: 0, codec });
        assert_eq!(fails(&[1, 0, number, 0, 0]), PageError::Content { index: 0, codec });
    }
    let zeros = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        fails(&zeros),
        PageError::Count {
            found: 10,
            announced: 9
        }
    );
    assert_eq!(fails(&zeros[..4]), PageError::Count { found: 2, announced: 9 });
}

#[test]
fn a_batch_builds_on_what_is_held_or_on_nothing() {
    let decode = |bytes: &[u8], base| {
        let expected = Expected { base, ..expected(9) };
        let nothing = |_, _: &mut Page| unreachable!("without a base none is read");
        BatchDecoder::default().decode::<PageError>(bytes, &expected, nothing, |_, _| Ok(()))
    };
    let found = Epoch(40);
    let held = Some(BASE);
    assert_eq!(fails(&[1, 41, 5]), PageError::Base { found, held });
    for codec in [Codec::Delta, Codec::Unchanged] {
        let number = (codec as u64).to_le_bytes()[0];
        assert_eq!(fails(&[1, 0, number]), PageError::Misplaced { index: 0, codec });
        assert!(matches!(
            decode(&[1, 42, number], None),
            Err(PageError::Base { held: None, .. })
        ));
    }
    assert!(
        fails(&[1, 41, 5])
            .to_string()
            .contains("changes epoch 40, this host holds epoch 41")
    );
}

#[test]
fn deltas_never_write_past_the_page() {
    for runs in [
        &[][..],
        &[0, 0],
        &[0, 1],
        &[0, 2, 9],
        &[0xff, 0x1f, 2, 9, 9],
        &[0x80, 0x20, 1, 9],
        &[0xfe, 0x1f, 1, 9, 1, 1, 9],
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1, 9],
        &[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 9],
        &[0x80, 0, 1, 9],
        &[0, 1, 9, 0],
    ] {
        let length = u8::try_from(runs.len()).unwrap();
        let bytes = [&[1, 42, 4, length, 0], runs].concat();
        let codec = Codec::Delta;
        assert_eq!(fails(&bytes), PageError::Content { index: 0, codec }, "{runs:?}");
    }
    let mut page = ZERO_PAGE;
    assert_eq!(delta::apply(&[0xff, 0x1f, 1, 9], &mut page), Some(()), "the last byte");
    assert_eq!(page[PAGE_BYTES - 1], 9);
}

#[test]
fn a_block_of_more_or_less_than_a_page_is_refused() {
    for length in [PAGE_BYTES - 1, PAGE_BYTES + 1, 100 * PAGE_BYTES] {
        let plain = vec![7; length];
        let blocks = [
            (Codec::Lz4, lz4_flex::block::compress(&plain)),
            (Codec::Zstd, zstd::bulk::compress(&plain, 1).unwrap()),
        ];
        for (codec, block) in blocks {
            let mut bytes = vec![1, 0, (codec as u64).to_le_bytes()[0]];
            bytes.extend_from_slice(&u16::try_from(block.len()).unwrap().to_le_bytes());
            bytes.extend_from_slice(&block);
            assert_eq!(fails(&bytes), PageError::Content { index: 0, codec });
        }
    }
}

#[test]
fn errors_of_the_callers_come_back() {
    #[derive(Debug, PartialEq)]
    enum Failure {
        Page(PageError),
        Base(u64),
        Apply(u64),
    }
    impl From<PageError> for Failure {
        fn from(error: PageError) -> Self {
            Self::Page(error)
        }
    }
    let mut decoder = BatchDecoder::default();
    let mut run = |bytes: &[u8]| {
        decoder.decode(
            bytes,
            &expected(1),
            |index, _| Err(Failure::Base(index)),
            |index, _| Err(Failure::Apply(index)),
        )
    };
    assert_eq!(run(&[1, 42, 0x1c, 3, 0, 0, 1, 9]), Err(Failure::Base(3)));
    assert_eq!(run(&[1, 42, 0x18]), Err(Failure::Apply(3)));
    assert_eq!(
        run(&[1, 42, 7]),
        Err(Failure::Page(PageError::Encoding { record: 0, encoding: 7 }))
    );
}
