//! Fragments through the comparator: any cut of equal datagrams is equal, and nothing else is.

use proptest::prelude::*;

use super::*;
use crate::comparator::ComparatorLimits;
use crate::testkit::*;
use crate::verdict::Verdict;
use checkpoint::{Epoch, EpochMode};

/// A fragment of a datagram of this number: the bytes from `at` to `end`.
fn part(v6: bool, number: u32, protocol: u8, datagram: &[u8], at: usize, end: usize) -> Bytes {
    let more = end < datagram.len();
    piece(v6, number, protocol, &datagram[at..end], at, more)
}

fn piece(v6: bool, number: u32, protocol: u8, bytes: &[u8], at: usize, more: bool) -> Bytes {
    let (from, to) = ends(v6, false);
    let place = u16::try_from(at).unwrap();
    if v6 {
        let mut extended = vec![protocol, 0];
        extended.extend((place | u16::from(more)).to_be_bytes());
        extended.extend(number.to_be_bytes());
        extended.extend(bytes);
        return ip(from, to, 44, 64, &[], &extended);
    }
    let mut frame = ip(from, to, protocol, 64, &[], bytes).to_vec();
    frame[IP_AT + 4..IP_AT + 6].copy_from_slice(&u16::try_from(number).unwrap().to_be_bytes());
    frame[IP_AT + 6..IP_AT + 8].copy_from_slice(&((place / 8) | (u16::from(more) << 13)).to_be_bytes());
    frame.into()
}

/// A UDP datagram; the sum is the sender's.
fn datagram(sum: u16, bytes: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0, 53, 0, 9];
    datagram.extend(u16::try_from(8 + bytes.len()).unwrap().to_be_bytes());
    datagram.extend(sum.to_be_bytes());
    datagram.extend(bytes);
    datagram
}

/// Cuts a datagram at these places, in units of eight bytes.
fn cut(v6: bool, number: u32, datagram: &[u8], cuts: &[usize]) -> Vec<Bytes> {
    let units = datagram.len().div_ceil(8);
    let mut places: Vec<usize> = cuts.iter().map(|cut| (1 + cut % (units - 1)) * 8).collect();
    places.extend([0, datagram.len()]);
    places.sort_unstable();
    places.dedup();
    let ends = places.windows(2);
    ends.map(|ends| part(v6, number, 17, datagram, ends[0], ends[1]))
        .collect()
}

fn all(bench: &mut Bench, primary: bool, frames: &[Bytes]) -> Vec<Bytes> {
    let mut verdicts = Vec::new();
    for frame in frames {
        verdicts.extend(if primary {
            bench.primary(frame.clone())
        } else {
            bench.secondary(frame.clone())
        });
    }
    released(&verdicts)
}

fn one(frame: &Bytes) -> &[Bytes] {
    std::slice::from_ref(frame)
}

#[test]
fn case_p17_datagrams_that_are_cut_differently_are_equal_and_leave_as_sent() {
    for v6 in [false, true] {
        let bytes = datagram(7, &[9; 1_992]);
        let mine = [part(v6, 3, 17, &bytes, 0, 1_480), part(v6, 3, 17, &bytes, 1_480, 2_000)];
        let theirs = [part(v6, 8, 17, &bytes, 0, 1_000), part(v6, 8, 17, &bytes, 1_000, 2_000)];
        let mut bench = Bench::new();
        assert_eq!(all(&mut bench, true, &mine), [] as [Bytes; 0]);
        assert_eq!(all(&mut bench, false, &theirs), mine);
        assert_eq!(bench.comparator.held().frames, 0);
        assert_eq!(bench.comparator.pending(), crate::Pending::default());
        // The secondary first; its sum is another, its last fragment comes first, the primary's is padded.
        let other = datagram(8, &[9; 1_992]);
        let theirs = [part(v6, 9, 17, &other, 8, 2_000), part(v6, 9, 17, &other, 0, 8)];
        let padded = Bytes::from([&mine[1][..], &[0xee; 5]].concat());
        assert_eq!(all(&mut bench, false, &theirs), [] as [Bytes; 0]);
        assert_eq!(
            all(&mut bench, true, &[padded, mine[0].clone()]),
            [mine[1].clone(), mine[0].clone()]
        );
        assert_eq!(bench.comparator.pending(), crate::Pending::default());
    }
}

#[test]
fn case_p17_each_kind_of_difference_is_seen() {
    let bytes = datagram(7, &[9; 40]);
    let mine = cut(false, 3, &bytes, &[1, 3]);
    let sees = |theirs: &[Bytes]| {
        let mut bench = Bench::new();
        assert_eq!(all(&mut bench, true, &mine), [] as [Bytes; 0]);
        assert_eq!(all(&mut bench, false, theirs), [] as [Bytes; 0]);
        let Some(Reason::Mismatch(difference)) =
            divergence(&bench.wait(Duration::from_millis(2))).map(|told| told.reason.clone())
        else {
            panic!("a difference is expected")
        };
        assert_eq!(released(&bench.checkpoint()), mine);
        difference
    };
    for at in [0, 7 + 8, 47] {
        let mut other = bytes.clone();
        other[at] ^= 1;
        let difference = sees(&cut(false, 3, &other, &[2]));
        assert_eq!(difference.offset, at as u64);
        assert_eq!((difference.primary[0], difference.secondary[0]), (bytes[at], other[at]));
    }
    let shorter = sees(&cut(false, 3, &bytes[..46], &[2]));
    assert_eq!((shorter.offset, shorter.primary.len()), (46, 2));
    assert_eq!(sees(&cut(false, 3, &[&bytes[..], &[1]].concat(), &[2])).offset, 48);
    // Another station, in one fragment only; and the same in all.
    let mut theirs: Vec<Vec<u8>> = cut(false, 3, &bytes, &[2]).iter().map(|frame| frame.to_vec()).collect();
    theirs.iter_mut().for_each(|frame| frame[FRAME_HEADER_BYTES + 5] ^= 1);
    let theirs: Vec<Bytes> = theirs.into_iter().map(Bytes::from).collect();
    assert_eq!(sees(&theirs).offset, 5);
}

#[test]
fn case_p17_fragments_are_equal_as_parts_of_equal_datagrams_only() {
    let (first, other) = (datagram(1, &[0xaa; 40]), datagram(2, &[0xbb; 40]));
    let halves = |number, from: &[u8], rest: &[u8]| {
        [
            part(false, number, 17, from, 0, 24),
            part(false, number, 17, rest, 24, 48),
        ]
    };
    let mut bench = Bench::new();
    all(&mut bench, false, &halves(1, &first, &first));
    all(&mut bench, false, &halves(2, &other, &other));
    assert_eq!(all(&mut bench, true, &halves(1, &first, &other)), [] as [Bytes; 0]);
    assert_eq!(all(&mut bench, true, &halves(2, &other, &first)), [] as [Bytes; 0]);
    assert!(divergence(&bench.wait(Duration::from_millis(2))).is_some());
    assert_eq!(released(&bench.checkpoint()).len(), 4);
}

#[test]
fn overlapping_and_senseless_fragments_wait_for_the_commit() {
    let bytes = datagram(7, &[9; 40]);
    let good = cut(false, 3, &bytes, &[1]);
    let with = |extra: Bytes| [&good[..1], &[extra], &good[1..]].concat();
    for bad in [
        // Again, by a part, and behind the end.
        good[0].clone(),
        part(false, 3, 17, &bytes, 0, 16),
        part(false, 3, 17, &[&bytes[..], &[0; 8]].concat(), 48, 56),
        // A part that is no multiple of eight, one of nothing, one that ends too far out, and one from another station.
        piece(false, 3, 17, &bytes[8..15], 8, true),
        piece(false, 3, 17, &[], 8, true),
        piece(false, 3, 17, &[0; 16], 65_528, false),
        {
            let mut frame = part(false, 3, 17, &bytes, 8, 16).to_vec();
            frame[FRAME_HEADER_BYTES + 5] ^= 1;
            [&frame[..]].concat().into()
        },
    ] {
        let mut bench = Bench::new();
        // With other headers it must be a second one of its kind, so the good ones come around it.
        let frames = with(bad);
        let expected = frames.len();
        all(&mut bench, false, &good);
        assert_eq!(all(&mut bench, true, &frames), [] as [Bytes; 0]);
        assert!(divergence(&bench.wait(Duration::from_millis(200))).is_some());
        assert_eq!(released(&bench.checkpoint()).len(), expected);
        // On the secondary's side, and what is left of it does not count against the next.
        all(&mut bench, false, &frames);
        let next = cut(false, 4, &bytes, &[2]);
        assert_eq!(all(&mut bench, true, &next), [] as [Bytes; 0]);
        assert_eq!(all(&mut bench, false, &cut(false, 9, &bytes, &[4])), next);
    }
}

#[test]
fn a_datagram_goes_on_over_a_commit_under_its_own_number() {
    let bytes = datagram(7, &[9; 40]);
    let [first, rest] = [part(false, 3, 17, &bytes, 0, 16), part(false, 3, 17, &bytes, 16, 48)];
    let begun = || {
        let mut bench = Bench::new();
        bench.primary(first.clone());
        assert_eq!(released(&bench.checkpoint()), one(&first));
        bench
    };
    let mut bench = begun();
    bench.primary(rest.clone());
    assert_eq!(all(&mut bench, false, one(&rest)), one(&rest));
    // Its number is used again.
    let next = cut(false, 3, &bytes, &[3]);
    all(&mut bench, true, &next);
    assert_eq!(all(&mut bench, false, &cut(false, 8, &bytes, &[2])), next);

    // The secondary goes on under another number.
    let mut bench = begun();
    bench.primary(rest.clone());
    assert_eq!(
        all(&mut bench, false, &[part(false, 4, 17, &bytes, 16, 48)]),
        [] as [Bytes; 0]
    );
    // Both had begun: as many bytes, but under other numbers.
    let mut bench = begun();
    bench.primary(part(false, 4, 17, &datagram(7, &[8; 40]), 0, 16));
    assert_eq!(released(&bench.checkpoint()).len(), 1);
    bench.primary(rest.clone());
    assert_eq!(
        all(&mut bench, false, &[part(false, 4, 17, &bytes, 16, 48)]),
        [] as [Bytes; 0]
    );
    // A part of it came before protection began.
    let mut bench = Bench::new();
    let mut verdicts = Vec::new();
    bench.comparator = crate::Comparator::new(ComparatorLimits::default(), Epoch(4));
    bench.comparator.primary_output(bench.now, first.clone(), &mut verdicts);
    assert_eq!(bench.comparator.stop(EpochMode::Lockstep), Epoch(4));
    bench.comparator.protect(Epoch(5), EpochMode::Lockstep);
    bench.primary(rest.clone());
    assert_eq!(all(&mut bench, false, one(&rest)), one(&rest));
}

#[test]
fn what_a_receiver_may_still_have_is_not_put_together_with_anything_else() {
    // The primary's client has the beginning of A under number 3. If B leaves under it, the client puts A and B together.
    let (before, other) = (datagram(1, &[0xaa; 40]), datagram(2, &[0xbb; 40]));
    let (mine, theirs) = (cut(false, 3, &other, &[2]), cut(false, 8, &other, &[2]));
    let (first, last) = (part(false, 3, 17, &before, 0, 16), part(false, 3, 17, &before, 16, 48));
    for begun in [first, last] {
        let mut bench = Bench::new();
        bench.primary(begun);
        bench.checkpoint();
        all(&mut bench, false, &theirs);
        assert_eq!(all(&mut bench, true, &mine), [] as [Bytes; 0]);
        assert_eq!(released(&bench.checkpoint()).len(), 2);
        // The other way round the secondary's number says nothing about what the client has.
        all(&mut bench, false, &mine);
        assert_eq!(
            all(&mut bench, true, &theirs),
            [] as [Bytes; 0],
            "the secondary's is not put together either"
        );
        bench.checkpoint();
        bench.now = bench.now + FORGOTTEN_AFTER + Duration(1);
        all(&mut bench, true, &mine);
        assert_eq!(all(&mut bench, false, &theirs), mine, "nobody has it any more");
    }
}

#[test]
fn a_begun_datagram_is_at_the_receiver_until_its_rest_has_left() {
    let (first, other) = (datagram(1, &[0xaa; 40]), datagram(2, &[0xbb; 40]));
    let mut bench = Bench::new();
    bench.primary(part(false, 3, 17, &first, 0, 16));
    bench.checkpoint();
    // The rest, of which the secondary says another; then all of another, under the same number and its end first.
    bench.primary(part(false, 3, 17, &first, 16, 48));
    bench.secondary(part(false, 3, 17, &other, 16, 48));
    let mine = [part(false, 3, 17, &other, 16, 48), part(false, 3, 17, &other, 0, 16)];
    all(&mut bench, true, &mine);
    let leaves = all(&mut bench, false, &cut(false, 8, &other, &[2]));
    assert_eq!(
        leaves,
        [] as [Bytes; 0],
        "the receiver would put the first one's beginning before it"
    );
    assert_eq!(released(&bench.checkpoint()).len(), 3);
}

#[test]
fn too_many_unfinished_datagrams_are_a_reason_for_a_checkpoint_and_then_for_commits() {
    let bytes = datagram(7, &[9; 40]);
    let limit =
        |verdicts: &[Verdict]| divergence(verdicts).is_some_and(|told| told.reason == Reason::Limit(Limit::Fragments));
    for primary in [true, false] {
        let mut bench = Bench::new();
        let mut told = false;
        for number in 0..10_000 {
            let frame = part(false, number, 17, &bytes, 0, 16);
            told |= limit(&if primary {
                bench.primary(frame)
            } else {
                bench.secondary(frame)
            });
            let (frames, _) = {
                let pending = bench.comparator.pending();
                (pending.frames, pending.bytes)
            };
            assert!(frames <= PARTS_MAX);
        }
        assert!(told);
        assert_eq!(released(&bench.checkpoint()).len(), if primary { 10_000 } else { 0 });
        let (mine, theirs) = (cut(false, 60_000, &bytes, &[2]), cut(false, 5, &bytes, &[3]));
        all(&mut bench, true, &mine);
        let leaves = all(&mut bench, false, &theirs);
        if primary {
            assert_eq!(
                leaves,
                [] as [Bytes; 0],
                "each number may be one that a receiver remembers"
            );
            assert!(bench.comparator.waits_for_commit());
            assert_eq!(released(&bench.checkpoint()), mine);
            bench.now = bench.now + FORGOTTEN_AFTER + Duration(1);
            all(&mut bench, true, &mine);
            assert_eq!(released(&bench.checkpoint()), mine);
            all(&mut bench, true, &mine);
            assert_eq!(all(&mut bench, false, &theirs), mine);
        } else {
            assert_eq!(leaves, mine);
        }
    }
}

#[test]
fn one_datagram_may_not_have_too_many_fragments() {
    let bytes = datagram(7, &[9; 8 * (PIECES_MAX + 8)]);
    let cuts: Vec<usize> = (0..=PIECES_MAX + 8).collect();
    let mut bench = Bench::new();
    all(&mut bench, true, &cut(false, 3, &bytes, &[2]));
    assert_eq!(all(&mut bench, false, &cut(false, 4, &bytes, &cuts)), [] as [Bytes; 0]);
    assert_eq!(
        bench.comparator.pending(),
        crate::Pending::default(),
        "nothing of it is kept"
    );
    assert_eq!(
        all(&mut bench, false, &cut(false, 5, &bytes, &cuts[..PIECES_MAX - 1])).len(),
        2
    );
}

#[test]
fn fragments_of_sctp_are_not_compared() {
    let frames = [
        part(false, 3, 132, &[7; 40], 0, 16),
        part(false, 3, 132, &[7; 40], 16, 40),
    ];
    let mut bench = Bench::new();
    all(&mut bench, true, &frames);
    assert!(bench.comparator.waits_for_commit());
    assert_eq!(all(&mut bench, false, &frames), [] as [Bytes; 0]);
    assert_eq!(released(&bench.checkpoint()), frames);
}

/// What a receiver makes of fragments: the datagrams in the order in which they become whole.
fn received(frames: &[Bytes]) -> Vec<Vec<u8>> {
    let mut pool = etherparse::defrag::IpDefragPool::<(), ()>::new();
    let mut datagrams = Vec::new();
    for frame in frames {
        let packet = etherparse::SlicedPacket::from_ethernet(&frame[FRAME_HEADER_BYTES..]).unwrap();
        if let Ok(Some(whole)) = pool.process_sliced_packet(&packet, (), ()) {
            datagrams.push(whole.payload);
        }
    }
    datagrams
}

proptest! {
    /// Datagrams of both sides, cut anywhere, each side's in any order, fragments of several mixed: a client receives each
    /// datagram that both have sent, and none that only one has.
    #[test]
    fn what_leaves_is_what_both_have_sent(
        v6 in any::<bool>(),
        plans in proptest::collection::vec(
            (any::<u8>(), 16usize..200, proptest::collection::vec(0usize..24, 1..5), proptest::collection::vec(0usize..24, 1..5),
                proptest::option::weighted(0.3, 0usize..200)),
            1..6,
        ),
        order in proptest::collection::vec(any::<u32>(), 200),
        numbers in any::<u16>(),
    ) {
        let mut events: Vec<(u32, bool, Bytes)> = Vec::new();
        let mut equal = Vec::new();
        let mut order = order.into_iter();
        let mut next = || order.next().unwrap_or(0);
        for (number, (byte, length, mine, theirs, flip)) in (0u32..).zip(&plans) {
            let bytes: Vec<u8> = (0..*length).map(|at| byte.wrapping_add(u8::try_from(at).unwrap())).collect();
            let bytes = datagram(u16::from(*byte), &bytes);
            let mut others = bytes.clone();
            match flip.map(|at| at % bytes.len()) {
                // The sum is not compared.
                None | Some(6 | 7) => equal.push(bytes.clone()),
                Some(at) => others[at] ^= 0x80,
            }
            let first = u32::from(numbers >> 1) + number;
            events.extend(cut(v6, first, &bytes, mine).into_iter().map(|frame| (next(), true, frame)));
            let other = u32::from(numbers >> 2) + 7 * number;
            events.extend(cut(v6, other, &others, theirs).into_iter().map(|frame| (next(), false, frame)));
        }
        events.sort_by_key(|(at, ..)| *at);
        let mut bench = Bench::new();
        let mut left = Vec::new();
        for (_, primary, frame) in &events {
            left.extend(all(&mut bench, *primary, one(frame)));
        }
        let sent: Vec<Bytes> = events.iter().filter(|(_, primary, _)| *primary).map(|(.., frame)| frame.clone()).collect();
        prop_assert!(left.iter().all(|frame| sent.contains(frame)), "as sent");
        let mut received = received(&left);
        received.sort();
        equal.sort();
        prop_assert_eq!(received, equal);
        prop_assert_eq!(released(&bench.checkpoint()).len(), sent.len() - left.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    /// Any fragments of few numbers and places, many of which make no sense, over several epochs: what a client puts together
    /// from what left, it would have put together from what the secondary sent, both after what left by the last commit.
    #[test]
    fn no_trick_makes_a_client_receive_what_the_secondary_has_not_sent(
        steps in proptest::collection::vec((0u8..12, 0u32..3, 0usize..2, 0u8..10, 0u8..2), 1..60),
    ) {
        let mut bench = Bench::new();
        let (mut left, mut theirs) = (Vec::new(), Vec::new());
        for (kind, number, at, odd, byte) in steps {
            let more = (at == 0) != (odd == 0);
            let frame = piece(false, number, 0xfd, &[byte; 8], at * 8, more);
            match kind {
                0 => {
                    left.extend(released(&bench.checkpoint()));
                    theirs.clone_from(&left);
                }
                1..=5 => left.extend(all(&mut bench, true, &[frame])),
                _ => {
                    theirs.push(frame.clone());
                    left.extend(all(&mut bench, false, &[frame]));
                }
            }
            let (mine, others) = (receive_all(&left), receive_all(&theirs));
            for datagram in &mine {
                let count = |all: &[Vec<u8>]| all.iter().filter(|other| *other == datagram).count();
                prop_assert!(
                    count(&mine) <= count(&others),
                    "{datagram:?} was not sent by the secondary: {mine:?}, {others:?}"
                );
            }
        }
    }
}

/// What a receiver that forgets nothing and ignores what it has makes of fragments.
fn receive_all(frames: &[Bytes]) -> Vec<Vec<u8>> {
    let mut unfinished: std::collections::BTreeMap<u8, (Vec<Option<u8>>, Option<usize>)> =
        std::collections::BTreeMap::new();
    let mut datagrams = Vec::new();
    for frame in frames {
        let (number, at, more) = (frame[19], usize::from(frame[21]) * 8, frame[20] & 0x20 != 0);
        if at == 0 && !more {
            datagrams.push(frame[34..].to_vec());
            continue;
        }
        let (bytes, length) = unfinished.entry(number).or_default();
        for (place, byte) in (at..).zip(&frame[34..]) {
            bytes.resize(bytes.len().max(place + 1), None);
            bytes[place].get_or_insert(*byte);
        }
        if !more {
            length.get_or_insert(at + frame.len() - 34);
        }
        if let Some(length) = *length
            && let Some(whole) = bytes
                .get(..length)
                .and_then(|bytes| bytes.iter().copied().collect::<Option<Vec<u8>>>())
        {
            datagrams.push(whole);
            unfinished.remove(&number);
        }
    }
    datagrams
}
