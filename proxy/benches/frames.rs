//! What a frame costs in translator and comparator alone, without any device: `cargo bench -p proxy --bench frames`.
//!
//! Every sample takes one batch: 64 frames of the primary's guest, then the same of the secondary's, as they come out of a link.

use bytes::BytesMut;
use checkpoint::frames::FramePool;
use checkpoint::limits::FRAME_HEADER_BYTES;
use checkpoint::{Epoch, EpochMode, Instant};
use divan::counter::ItemsCount;
use divan::{AllocProfiler, Bencher};
use proxy::{Comparator, ComparatorLimits, NetworkPicture, Verdict};

#[global_allocator]
static ALLOCATOR: AllocProfiler = AllocProfiler::system();

const BATCH: usize = 64;
const TCP: u8 = 6;
const UDP: u8 = 17;
const FLOWS: [usize; 3] = [1, 1_000, 50_000];

fn main() {
    divan::main();
}

#[divan::bench(args = FLOWS)]
fn udp_64(bencher: Bencher<'_, '_>, flows: usize) {
    run(bencher, Traffic::new(UDP, 64, flows));
}

#[divan::bench(args = FLOWS)]
fn tcp_1514(bencher: Bencher<'_, '_>, flows: usize) {
    run(bencher, Traffic::new(TCP, 1_514, flows));
}

fn run(bencher: Bencher<'_, '_>, mut traffic: Traffic) {
    let mut pool = FramePool::new();
    let mut picture = NetworkPicture::new();
    let mut comparator = Comparator::new(ComparatorLimits::default(), Epoch(1)).keyed(9);
    comparator.protect(Epoch(1), EpochMode::Lockstep);
    comparator.loaded(Instant(1), Epoch(0));
    let mut read = BytesMut::new();
    let mut verdicts = Vec::new();
    let mut pass = |traffic: &mut Traffic| {
        let (now, epoch) = (Instant(1_000_000), comparator.running());
        for frame in traffic.batch() {
            let leaving = picture.leaving(pool.copy(frame));
            comparator.primary_output(now, leaving, &mut verdicts);
        }
        for frame in traffic.batch() {
            // Of what a link reads at once.
            read.reserve(64 << 10);
            read.extend_from_slice(frame);
        }
        for frame in traffic.batch() {
            let frame = read.split_to(frame.len()).freeze();
            comparator.secondary_output(now, epoch, frame, &mut verdicts);
        }
        let released = verdicts
            .drain(..)
            .map(|verdict| matches!(verdict, Verdict::Release(..)));
        assert_eq!(released.count(), BATCH, "everything leaves");
        traffic.advance();
    };
    for _ in 0..=traffic.flows / BATCH * 2 {
        pass(&mut traffic);
    }
    bencher
        .counter(ItemsCount::new(BATCH))
        .bench_local(|| pass(&mut traffic));
}

/// Frames of many flows in turn, each with bytes of its own.
struct Traffic {
    protocol: u8,
    flows: usize,
    sent: usize,
    batch: Vec<Vec<u8>>,
}

impl Traffic {
    fn new(protocol: u8, length: usize, flows: usize) -> Self {
        let mut whole = vec![0; FRAME_HEADER_BYTES + length];
        let frame = &mut whole[FRAME_HEADER_BYTES..];
        frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 0]);
        let bytes = |from: usize| u16::try_from(length - from).expect("it fits").to_be_bytes();
        frame[14..26].copy_from_slice(&[0x45, 0, bytes(14)[0], bytes(14)[1], 0, 0, 0x40, 0, 64, protocol, 0, 0]);
        frame[26..30].copy_from_slice(&[10, 9, 0, 2]);
        frame[34..36].copy_from_slice(&80_u16.to_be_bytes());
        if protocol == UDP {
            frame[38..40].copy_from_slice(&bytes(34));
        } else {
            frame[42..50].copy_from_slice(&[0, 0, 0, 7, 0x80, 0x10, 1, 0]);
            frame[54..58].copy_from_slice(&[1, 1, 8, 10]);
        }
        let mut traffic = Self {
            protocol,
            flows,
            sent: 0,
            batch: vec![whole; BATCH],
        };
        traffic.advance();
        traffic
    }

    fn batch(&self) -> &[Vec<u8>] {
        &self.batch
    }

    fn advance(&mut self) {
        for whole in &mut self.batch {
            let frame = &mut whole[FRAME_HEADER_BYTES..];
            let number = |value: usize| u32::try_from(value % (1 << 32)).expect("it fits");
            let (flow, round) = (number(self.sent % self.flows), self.sent / self.flows);
            self.sent += 1;
            frame[30..34].copy_from_slice(&(0x0a0a_0000 + flow / 1_000).to_be_bytes());
            let port = u16::try_from(10_000 + flow % 1_000).expect("it fits");
            frame[36..38].copy_from_slice(&port.to_be_bytes());
            let mut payload = 42;
            if self.protocol == TCP {
                let sequence = number(round * (frame.len() - 66));
                frame[38..42].copy_from_slice(&sequence.to_be_bytes());
                frame[58..62].copy_from_slice(&number(round).to_be_bytes());
                payload = 66;
            }
            frame[payload..payload + 8].copy_from_slice(&(self.sent as u64).to_be_bytes());
        }
    }
}
