//! No frame costs an allocation: counted, so in a test.

use allocation_counter::measure;
use bytes::{Bytes, BytesMut};
use checkpoint::frames::FramePool;
use checkpoint::wire::{Decoder, Message, Output, encode_into};
use checkpoint::{Epoch, EpochMode, Generation, Instant, Nic, Tag};
use proxy::{Comparator, ComparatorLimits, NetworkPicture, Verdict};

const BATCH: u32 = 64;
const FLOWS: u32 = 300;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The primary's part: frames of its guest, and the secondary's, a batch of a link at a time.
struct Way {
    protocol: u8,
    length: usize,
    sent: u32,
    pool: FramePool,
    picture: NetworkPicture,
    comparator: Comparator,
    decoder: Decoder,
    encoded: Vec<u8>,
    verdicts: Vec<Verdict>,
}

impl Way {
    fn new(protocol: u8, length: usize) -> Self {
        let mut comparator = Comparator::new(ComparatorLimits::default(), Epoch(1)).keyed(5);
        comparator.protect(Epoch(1), EpochMode::Lockstep);
        comparator.loaded(Instant(1), Epoch(0));
        Self {
            protocol,
            length,
            sent: 0,
            pool: FramePool::new(),
            picture: NetworkPicture::new(),
            comparator,
            decoder: Decoder::new(),
            encoded: Vec::new(),
            verdicts: Vec::new(),
        }
    }

    /// Returns how many allocations a batch costs, with the secondary ahead or behind.
    fn batch(&mut self, is_ahead: bool) -> u64 {
        let frames: Vec<Vec<u8>> = (self.sent..self.sent + BATCH)
            .map(|number| self.frame(number))
            .collect();
        self.sent += BATCH;
        self.encoded.clear();
        let tag = Tag {
            generation: Generation(1),
            epoch: self.comparator.running(),
        };
        for frame in &frames {
            let frame = Bytes::copy_from_slice(frame);
            encode_into(
                &Message::Output(Output {
                    tag,
                    nic: Nic::FIRST,
                    frame,
                }),
                &mut self.encoded,
            );
        }
        let counted = measure(|| {
            if is_ahead {
                self.secondary();
            }
            for frame in &frames {
                let leaving = self.picture.leaving(self.pool.copy(frame));
                self.comparator.primary_output(Instant(2), leaving, &mut self.verdicts);
            }
            if !is_ahead {
                self.secondary();
            }
        });
        let left: Vec<Verdict> = self.verdicts.drain(..).collect();
        assert_eq!(left.len(), frames.len(), "everything leaves");
        for (verdict, frame) in left.iter().zip(&frames) {
            assert!(
                matches!(verdict, Verdict::Release(left, _) if left == frame),
                "{verdict:?}"
            );
        }
        counted.count_total
    }

    fn secondary(&mut self) {
        for piece in self.encoded.chunks(20_000) {
            self.decoder.push(piece);
            while let Some(Message::Output(output)) = self.decoder.next().expect("it is whole") {
                let epoch = output.tag.epoch;
                self.comparator
                    .secondary_output(Instant(2), epoch, output.frame, &mut self.verdicts);
            }
        }
    }

    fn frame(&self, number: u32) -> Vec<u8> {
        let (flow, round) = (number % FLOWS, number / FLOWS);
        let bytes = |from: usize| u16::try_from(self.length - from).expect("it fits").to_be_bytes();
        let mut frame = BytesMut::zeroed(self.length);
        frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 0]);
        frame[14..26].copy_from_slice(&[
            0x45,
            0,
            bytes(14)[0],
            bytes(14)[1],
            0,
            0,
            0x40,
            0,
            64,
            self.protocol,
            0,
            0,
        ]);
        frame[26..30].copy_from_slice(&[10, 9, 0, 2]);
        frame[30..34].copy_from_slice(&(0x0a0a_0000 + flow).to_be_bytes());
        frame[34..38].copy_from_slice(&[0, 80, 40, 0]);
        if self.protocol == UDP {
            frame[38..40].copy_from_slice(&bytes(34));
        } else {
            let sequence = round * u32::try_from(self.length - 54).expect("it fits");
            frame[38..42].copy_from_slice(&sequence.to_be_bytes());
            frame[42..50].copy_from_slice(&[0, 0, 0, 7, 0x50, 0x10, 1, 0]);
        }
        frame[54..58].copy_from_slice(&number.to_be_bytes());
        proxy::complete(&frame).to_vec()
    }
}

#[test]
fn a_frame_costs_no_allocation_in_the_steady_state() {
    for (protocol, length) in [
        (UDP, 64),
        (UDP, 1_400),
        (TCP, 64),
        (TCP, 1_514),
        (TCP, 9_000),
        (TCP, 65_000),
    ] {
        let mut way = Way::new(protocol, length);
        // Longer than what is kept for retransmissions, in which all flows are seen.
        let warm = 9 * 1024 * 1024 / u32::try_from(length).expect("it fits") / BATCH;
        (0..warm.max(20)).for_each(|number| {
            way.batch(number % 2 == 0);
        });
        let batches = 200;
        let allocations: u64 = (0..batches).map(|number| way.batch(number % 2 == 0)).sum();
        let frames = u64::from(BATCH) * batches;
        assert_eq!(allocations, 0, "{frames} frames of {length} bytes, protocol {protocol}");
    }
}
