//! Frames of which something is left to do, through parser, translator and comparator.

use proptest::prelude::*;

use super::*;
use crate::comparator::properties::garbage;
use crate::frame::{self, Body};
use crate::picture::NetworkPicture;
use crate::seq::Seq;
use crate::testkit::*;
use crate::verdict::{Reason, Verdict};
use checkpoint::limits::FRAME_BYTES_MAX;

fn is_tcp(frame: &[u8]) -> bool {
    matches!(frame::parse(frame).body, Body::Tcp(_))
}

/// A frame as on a wire, behind a header that says that nothing is left to do.
fn done(frame: &Bytes) -> Bytes {
    complete(&on_wire(frame))
}

#[test]
fn case_p10_a_header_that_is_not_true_of_its_segment_makes_it_no_segment() {
    let left = left_to_do(&Tcp::data(1, 1, b"some data").frame(), Some(4));
    assert!(is_tcp(&left));
    for (at, bit, what) in [
        (0, 4, "a flag that nobody knows"),
        (0, 1, "to be cut, with a checksum"),
        (1, 5, "to be cut as IPv6"),
        (1, 2, "to be cut as UDP"),
        (4, 4, "to be cut into nothing"),
        (6, 1, "another place to begin the sum"),
        (7, 0x80, "and one far outside"),
        (8, 2, "another place for the sum"),
        (9, 0xff, "and one far outside"),
    ] {
        let mut other = left.to_vec();
        other[at] ^= bit;
        assert!(!is_tcp(&other), "{what}");
        let mut bench = Bench::new();
        bench.primary(other.clone());
        assert!(released(&bench.secondary(left.clone())).is_empty(), "{what}");
        assert_eq!(
            released(&bench.secondary(other.clone())),
            [other],
            "{what}: as it is, or not at all"
        );
    }
    // What the guest is told of a checksum, and of congestion, is none of ours.
    for (at, bit) in [(0, 2), (1, 0x80), (2, 9), (10, 7)] {
        let mut other = left.to_vec();
        other[at] ^= bit;
        assert!(is_tcp(&other), "{at}");
    }
}

#[test]
fn case_p10_long_segments_and_short_ones_are_one_stream_and_leave_as_sent() {
    let bytes: Vec<u8> = (0..130_000_usize)
        .map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1])
        .collect();
    let cut = |size: usize, header: Option<u16>| -> Vec<Bytes> {
        let pieces = bytes.chunks(size).zip((1_000_u32..).step_by(size));
        pieces
            .map(|(piece, seq)| {
                let frame = Tcp::data(seq, 500, piece).frame();
                header.map_or_else(|| frame.clone(), |size| left_to_do(&frame, Some(size)))
            })
            .collect()
    };
    let (long, short) = (cut(65_000, Some(1_448)), cut(1_448, None));
    for (mine, theirs) in [(&long, &short), (&short, &long), (&long, &long)] {
        let mut bench = Bench::new();
        bench.primary(Tcp::ack(1_000, 500).frame());
        bench.secondary(Tcp::ack(1_000, 500).frame());
        let mut left = Vec::new();
        for frame in mine {
            left.extend(released(&bench.primary(frame.clone())));
        }
        for frame in theirs {
            left.extend(released(&bench.secondary(frame.clone())));
        }
        assert_eq!(left, *mine);
        assert_eq!(bench.comparator.pending().frames, 0);
    }
    // One byte near the end of a long one.
    let mut other = long.clone();
    let mut last = other[1].to_vec();
    *last.last_mut().unwrap() ^= 1;
    other[1] = last.into();
    let mut bench = Bench::new();
    long.iter().for_each(|frame| drop(bench.primary(frame.clone())));
    let told: Vec<Verdict> = other.iter().flat_map(|frame| bench.secondary(frame.clone())).collect();
    let Some(Reason::Mismatch(difference)) = divergence(&told).map(|told| told.reason.clone()) else {
        panic!("a difference is expected")
    };
    assert_eq!(difference.offset, 129_999);
}

#[test]
fn case_p10_a_part_of_a_long_segment_is_a_frame_of_its_own() {
    for v6 in [false, true] {
        let whole = Tcp {
            v6,
            ..Tcp::data(1_000, 500, &[7; 9_000])
        };
        let frame = left_to_do(&whole.times(5, 6).frame(), Some(1_000));
        let Body::Tcp(found) = frame::parse(&frame).body else {
            panic!("a segment is expected")
        };
        for (from, to, is_cut) in [
            (0, 999, false),
            (0, 1_000, false),
            (0, 1_001, true),
            (2_000, 9_000, true),
        ] {
            let part = Bytes::from(found.part(&frame, Seq(1_000 + from)..Seq(1_000 + to)));
            assert_eq!((part[0], part[1] != 0, part[4..6] != [0, 0]), (1, is_cut, is_cut));
            let (seen, payload) = segment(&done(&part));
            assert_eq!(
                (seen.seq.0, payload.len()),
                (1_000 + from, usize::try_from(to - from).unwrap())
            );
            assert!(is_tcp(&part), "it is one for those that get it, too");
        }
        let ack = Bytes::from(found.acknowledgement(&frame, Seq(400)).unwrap());
        assert_eq!((ack[0], ack[1]), (1, 0));
        assert_eq!(segment(&done(&ack)).0.ack, Some(Seq(400)));
        assert!(is_tcp(&ack));
    }
}

#[test]
fn case_p10_a_datagram_is_equal_whoever_computes_its_checksum() {
    let whole = udp(9, b"question");
    let left = left_to_do(&whole, None);
    for (mine, theirs) in [(&whole, &left), (&left, &whole), (&left, &left)] {
        let mut bench = Bench::new();
        bench.primary(mine.clone());
        assert_eq!(released(&bench.secondary(theirs.clone())), std::slice::from_ref(mine));
    }
    // The checksum of something within it, as tunnels have it, is its business: compared with all else.
    let mut inner = left.to_vec();
    inner[6] += 12;
    let mut bench = Bench::new();
    bench.primary(inner.clone());
    assert!(released(&bench.secondary(left)).is_empty());
    assert_eq!(released(&bench.secondary(inner.clone())), [inner]);
}

#[test]
fn case_p23_a_difference_behind_the_first_64_kib_is_seen() {
    let (from, to) = ends(true, false);
    let bytes = vec![5; 65_535];
    let frame = ip(from, to, 253, 64, &[(0x88a8, 1), (0x8100, 2)], &bytes);
    assert_eq!(frame.len(), FRAME_BYTES_MAX);
    let mut other = frame.to_vec();
    *other.last_mut().unwrap() = 6;
    let mut bench = Bench::new();
    bench.primary(frame.clone());
    assert!(released(&bench.secondary(other)).is_empty());
    assert_eq!(released(&bench.secondary(frame.clone())), [frame]);
}

#[test]
fn a_capture_shows_frames_as_on_a_wire() {
    let whole = Tcp::data(1, 1, b"odd").frame();
    assert_eq!(on_wire(&whole)[..], whole[FRAME_HEADER_BYTES..]);
    let (ours, theirs) = (on_wire(&left_to_do(&whole, Some(2))), &whole[FRAME_HEADER_BYTES..]);
    assert_eq!(ours[..], *theirs);
    assert!(on_wire(&Bytes::from_static(b"short")).is_empty());
}

proptest! {
    /// Whether the checksum is filled in before or after the numbers are translated makes no difference.
    #[test]
    fn case_p10_translating_what_is_left_to_do_is_doing_it_and_translating(
        v6: bool, own: u32, seq in 1u32..9_000, echo: u32, payload in proptest::collection::vec(any::<u8>(), 0..40), size in 1u16..9,
    ) {
        let shape = |tcp: Tcp, inbound| Tcp { v6, inbound, ..tcp };
        let both = [false, true].map(|left| {
            let left = |frame: Bytes| if left { left_to_do(&frame, Some(size)) } else { frame };
            let mut picture = NetworkPicture::new();
            picture.follow();
            let syn = shape(Tcp::new(own, 78, SYN | ACK, b"").times(700, 3), false).frame();
            let opened = picture.leaving(left(syn)).into_wire();
            let answer = shape(Tcp::ack(78, 1_000_001).times(4, 9_000), true).frame();
            let heard = picture.arriving(left(answer)).guest;
            let data = shape(Tcp::data(own.wrapping_add(seq), 78, &payload).times(701, echo), false).frame();
            let sent = picture.leaving(left(data)).into_wire();
            let sack = shape(Tcp::ack(78, 1_000_001).sack(&[(1_000_005, 1_000_009)]).times(5, 9_001), true).frame();
            let selected = picture.arriving(left(sack)).guest;
            [opened, heard, sent, selected].map(|frame| on_wire(&frame))
        });
        let [done, left] = both;
        for (done, left) in done.iter().zip(&left) {
            let (mut done, mut left) = (done.to_vec(), left.to_vec());
            // Both zeroes mean the same.
            let at = if v6 { TRANSPORT_V6_AT } else { TRANSPORT_AT } - FRAME_HEADER_BYTES + 16;
            for frame in [&mut done, &mut left] {
                if frame[at..at + 2] == [0, 0] {
                    frame[at..at + 2].fill(0xff);
                }
            }
            prop_assert_eq!(done, left);
        }
        prop_assert_eq!(segment(&complete(&left[2])).0.seq, Seq(1_000_000_u32.wrapping_add(seq)));
    }

    #[test]
    fn any_header_before_any_bytes_is_read_and_carried_out_without_harm(header: [u8; FRAME_HEADER_BYTES], frame in garbage()) {
        let mut bytes = frame;
        for (to, from) in bytes.iter_mut().zip(header) {
            *to = from;
        }
        let bytes = Bytes::from(bytes);
        let wire = on_wire(&bytes);
        prop_assert_eq!(wire.len(), bytes.len().saturating_sub(FRAME_HEADER_BYTES));
        if let Body::Tcp(found) = frame::parse(&bytes).body {
            let _part = (!found.syn).then(|| found.part(&bytes, found.seq..found.end_seq()));
            let _reply = found.acknowledgement(&bytes, Seq(1));
        }
    }
}
