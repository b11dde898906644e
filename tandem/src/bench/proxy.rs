//! What the proxy costs for each frame, beside a plain copy from TAP to TAP through user space.
//!
//! ```text
//!   frames ──► near ──► translator ──► comparator ──► far            copy: near ──► far
//!   the same, encoded ──► socket ──► decoder ──┘
//! ```
//!
//! The primary's part of the product in one thread: what its guest sends comes from a TAP here, the secondary's in batches from
//! a socket, with the codec of the wire. Batches take turns with the copy's, and only what is done for them is counted, as processor time of
//! the thread: other work on the machine does not count. A checkpoint is committed between two rounds.

use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use checkpoint::frames::FramePool;
use checkpoint::wire::{Decoder, Message, Output, encode_into};
use checkpoint::{Epoch, EpochMode, Generation, Nic, Tag, limits};
use link::clock;
use proxy::{Comparator, ComparatorLimits, NetworkPicture, Verdict};
use rustix::net::sockopt;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::report::Target;
use super::traffic::{Frames, Road, Traffic, number_of};
use super::{Progress, Spread, ratio};

const FLOWS: [usize; 3] = [1, 1_000, 50_000];
/// A batch of the secondary must fit.
const SOCKET_BYTES: usize = 1 << 20;
/// How long a frame may take from one TAP to another.
const FRAME_LIMIT: Duration = Duration::from_secs(5);

/// The whole report.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ProxyReport {
    pub(super) cases: Vec<Case>,
}

/// One kind of frames and number of flows.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Case {
    pub(super) frames: &'static str,
    pub(super) flows: usize,
    pub(super) copy: Cost,
    pub(super) proxy: Cost,
    /// The proxy's throughput ÷ the copy's.
    pub(super) to_copy: f64,
}

/// What a way costs.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Cost {
    /// Processor time of each frame that came out.
    pub(super) ns_per_frame: f64,
    pub(super) frames_per_s_and_core: f64,
    pub(super) bytes_per_s_and_core: f64,
    /// From reading to having written, frames one by one and in batches.
    pub(super) latency_us: Spread,
    pub(super) batch_latency_us: Spread,
}

impl ProxyReport {
    pub(super) fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for case in &self.cases {
            let what = format!(
                "throughput for each core, {} in {} flows, to the copy's",
                case.frames, case.flows
            );
            targets.push(Target::at_least(&what, 0.7, case.to_copy, "x copy"));
        }
        for one in self.cases.iter().filter(|case| case.flows == FLOWS[0]) {
            let of_many = |case: &&Case| (case.frames, case.flows) == (one.frames, FLOWS[2]);
            let Some(many) = self.cases.iter().find(of_many) else {
                continue;
            };
            let more = many.proxy.ns_per_frame - one.proxy.ns_per_frame;
            let what = format!(
                "what a frame costs more in {} flows than in one, {}",
                many.flows, one.frames
            );
            targets.push(Target::at_most(&what, 0.2, ratio(more, one.proxy.ns_per_frame), "x"));
        }
        targets
    }

    pub(super) fn text(&self) -> String {
        let mut text = String::from(
            "Processor time of a frame and what one processor does; latency from read to written, p50 / p99 in µs\n\
             frames     flows  way     ns/frame  frames/s    MB/s   one by one      in batches      to copy\n",
        );
        for case in &self.cases {
            for (way, cost) in [("copy", &case.copy), ("proxy", &case.proxy)] {
                let (alone, batch) = (cost.latency_us, cost.batch_latency_us);
                let to_copy = if way == "copy" { 1.0 } else { case.to_copy };
                // Writing to a string can't fail.
                let _ = writeln!(
                    text,
                    "{:9} {:6}  {way:6} {:9.0} {:9.0} {:7.0}   {:5.1} / {:5.1}   {:5.1} / {:5.1}   {to_copy:.2}",
                    case.frames,
                    case.flows,
                    cost.ns_per_frame,
                    cost.frames_per_s_and_core,
                    cost.bytes_per_s_and_core / 1e6,
                    alone.p50,
                    alone.p99,
                    batch.p50,
                    batch.p99,
                );
            }
        }
        text
    }
}

/// Measures each case.
pub(super) fn run(quick: bool, progress: &Progress) -> Result<ProxyReport> {
    let road = Road::make()?;
    let mut cases = Vec::new();
    for frames in [Frames::Udp64, Frames::Tcp1514, Frames::Tcp64k] {
        for flows in FLOWS {
            let case = measure(&road, frames, flows, quick)?;
            progress.tell(&format!(
                "{} of {flows} flows: copy {:.0} ns, proxy {:.0} ns a frame",
                case.frames, case.copy.ns_per_frame, case.proxy.ns_per_frame
            ));
            cases.push(case);
        }
    }
    Ok(ProxyReport { cases })
}

fn measure(road: &Road, frames: Frames, flows: usize, quick: bool) -> Result<Case> {
    let batch = frames.batch();
    let batches = if quick { 10_000 } else { 100_000 }.max(flows) / 64;
    let rounds = if quick { 2 } else { 4 };
    let mut proxy = Proxy::new(road, Traffic::new(frames, flows), Traffic::new(frames, flows))?;
    let mut copy = Copy::new(road, Traffic::new(frames, flows));
    // Every flow has been seen, and is known to be settled, before anything is counted.
    for _ in 0..2 {
        proxy.round(batches.max(flows / batch + 1), batch)?;
    }
    copy.round(batches, batch)?;
    proxy.tally = Tally::default();
    copy.tally = Tally::default();
    for _ in 0..rounds {
        copy.round(batches, batch)?;
        proxy.round(batches, batch)?;
    }
    let (copied, compared) = (copy.tally.take(), proxy.tally.take());
    for _ in 0..rounds {
        copy.round(batches / 8, 1)?;
        proxy.round(batches / 8, 1)?;
    }
    let copy = copied.cost(frames, &copy.tally);
    let proxy = compared.cost(frames, &proxy.tally);
    Ok(Case {
        frames: frames.name(),
        flows,
        to_copy: ratio(copy.ns_per_frame, proxy.ns_per_frame),
        copy,
        proxy,
    })
}

/// What has been counted.
#[derive(Default)]
struct Tally {
    frames: u64,
    time: Duration,
    latencies_us: Vec<f64>,
}

impl Tally {
    fn take(&mut self) -> Self {
        std::mem::take(self)
    }

    fn cost(self, frames: Frames, alone: &Self) -> Cost {
        let seconds = self.time.as_secs_f64() / self.frames as f64;
        Cost {
            ns_per_frame: seconds * 1e9,
            frames_per_s_and_core: 1.0 / seconds,
            bytes_per_s_and_core: frames.length() as f64 / seconds,
            latency_us: Spread::of(alone.latencies_us.clone()),
            batch_latency_us: Spread::of(self.latencies_us),
        }
    }
}

/// The plain copy.
struct Copy<'a> {
    road: &'a Road,
    traffic: Traffic,
    buffer: Vec<u8>,
    tally: Tally,
}

impl<'a> Copy<'a> {
    fn new(road: &'a Road, traffic: Traffic) -> Self {
        Self {
            road,
            traffic,
            buffer: Vec::new(),
            tally: Tally::default(),
        }
    }

    fn round(&mut self, batches: usize, batch: usize) -> Result<()> {
        let mut frame = vec![0; limits::FRAME_BYTES_MAX];
        for _ in 0..batches {
            enter(self.road, &mut self.traffic, &mut self.buffer, batch)?;
            let start = processor_time();
            for _ in 0..batch {
                let length = next_frame(self.road, &mut frame)?;
                let read = Instant::now();
                self.road.far.send(&frame[..length]).context("the TAP takes no frame")?;
                self.tally.latencies_us.push(read.elapsed().as_secs_f64() * 1e6);
            }
            self.tally.time += processor_time() - start;
            self.tally.frames += batch as u64;
        }
        Ok(())
    }
}

/// The primary's part of the proxy.
struct Proxy<'a> {
    road: &'a Road,
    traffic: Traffic,
    mirror: Traffic,
    /// A frame is read into it.
    frame: Vec<u8>,
    buffer: Vec<u8>,
    encoded: Vec<u8>,
    link: (UnixStream, UnixStream),
    decoder: Decoder,
    pool: FramePool,
    sent: Vec<Bytes>,
    received: Vec<Output>,
    picture: NetworkPicture,
    comparator: Comparator,
    verdicts: Vec<Verdict>,
    /// When the frames of the batch were read, and the number of the first.
    read: Vec<Instant>,
    first: u64,
    tally: Tally,
}

impl<'a> Proxy<'a> {
    fn new(road: &'a Road, traffic: Traffic, mirror: Traffic) -> Result<Self> {
        let link = UnixStream::pair().context("can't make a socket")?;
        sockopt::set_socket_send_buffer_size(&link.0, SOCKET_BYTES).context("can't enlarge a socket's buffer")?;
        link.0.set_nonblocking(true)?;
        link.1.set_nonblocking(true)?;
        let mut comparator = Comparator::new(ComparatorLimits::default(), Epoch(1));
        comparator.protect(Epoch(1), EpochMode::Lockstep);
        comparator.loaded(clock::now(), Epoch(0));
        Ok(Self {
            road,
            traffic,
            mirror,
            frame: vec![0; limits::FRAME_BYTES_MAX],
            buffer: Vec::new(),
            encoded: Vec::new(),
            link,
            decoder: Decoder::new(),
            pool: FramePool::new(),
            sent: Vec::new(),
            received: Vec::new(),
            picture: NetworkPicture::new(),
            comparator,
            verdicts: Vec::new(),
            read: Vec::new(),
            first: 1,
            tally: Tally::default(),
        })
    }

    fn round(&mut self, batches: usize, batch: usize) -> Result<()> {
        for _ in 0..batches {
            enter(self.road, &mut self.traffic, &mut self.buffer, batch)?;
            self.mirror(batch)?;
            self.read.clear();
            let start = processor_time();
            self.take_primary(batch)?;
            self.take_secondary(batch)?;
            self.tally.time += processor_time() - start;
            self.tally.frames += batch as u64;
            self.first += batch as u64;
            ensure!(
                self.comparator.held().frames == 0,
                "a frame is left: a fault of the benchmark"
            );
        }
        let now = clock::now();
        let epoch = self.comparator.stop(EpochMode::Lockstep);
        self.comparator.commit(now, epoch, &mut self.verdicts);
        self.comparator.loaded(now, epoch);
        ensure!(
            self.verdicts.is_empty(),
            "a commit releases nothing: a fault of the benchmark"
        );
        Ok(())
    }

    /// Has the secondary send the next batch.
    fn mirror(&mut self, batch: usize) -> Result<()> {
        self.encoded.clear();
        let tag = Tag {
            generation: Generation(1),
            epoch: self.comparator.running(),
        };
        for _ in 0..batch {
            self.mirror.next(&mut self.buffer);
            let frame = Bytes::copy_from_slice(&self.buffer);
            let nic = Nic::FIRST;
            encode_into(&Message::Output(Output { tag, nic, frame }), &mut self.encoded);
        }
        self.link.0.write_all(&self.encoded).context("the socket is too small")
    }

    /// Takes a batch as `primary::run` and the primary's protocol do: in a turn of its network card all that the guest has sent.
    fn take_primary(&mut self, batch: usize) -> Result<()> {
        for _ in 0..batch {
            let length = next_frame(self.road, &mut self.frame)?;
            self.read.push(Instant::now());
            self.sent.push(self.pool.copy(&self.frame[..length]));
        }
        for frame in self.sent.drain(..) {
            let frame = self.picture.leaving(frame);
            self.comparator.primary_output(clock::now(), frame, &mut self.verdicts);
        }
        self.release()
    }

    /// Takes what a link has read, and then what it has made of that.
    fn take_secondary(&mut self, batch: usize) -> Result<()> {
        let mut piece = [0; 64 << 10];
        let mut taken = 0;
        while taken < batch {
            let length = match self.link.1.read(&mut piece) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                length => length.context("the socket can't be read")?,
            };
            ensure!(
                length > 0,
                "a frame of the secondary is missing: a fault of the benchmark"
            );
            self.decoder.push(&piece[..length]);
            while let Some(message) = self.decoder.next().context("the codec fails")? {
                let Message::Output(output) = message else { continue };
                self.received.push(output);
            }
            taken += self.received.len();
            for output in self.received.drain(..) {
                let (now, epoch) = (clock::now(), output.tag.epoch);
                self.comparator
                    .secondary_output(now, epoch, output.frame, &mut self.verdicts);
            }
            self.release()?;
        }
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        for verdict in self.verdicts.drain(..) {
            let Verdict::Release(frame, _) = verdict else {
                anyhow::bail!("the two sides' frames are the same: {verdict:?}");
            };
            self.road.far.send(&frame).context("the TAP takes no frame")?;
            let place = usize::try_from(number_of(&frame) - self.first).unwrap_or(usize::MAX);
            let read = self.read.get(place).context("an unknown frame came out")?;
            self.tally.latencies_us.push(read.elapsed().as_secs_f64() * 1e6);
        }
        Ok(())
    }
}

/// Writes a batch of frames to where they come in.
fn enter(road: &Road, traffic: &mut Traffic, buffer: &mut Vec<u8>, batch: usize) -> Result<()> {
    for _ in 0..batch {
        traffic.next(buffer);
        road.entry.send(buffer).context("the TAP takes no frame")?;
    }
    Ok(())
}

/// Reads a frame that has been sent, or is about to arrive.
fn next_frame(road: &Road, frame: &mut [u8]) -> Result<usize> {
    if let Some(length) = road.near.recv(frame).context("the TAP can't be read")? {
        return Ok(length);
    }
    let start = Instant::now();
    while start.elapsed() < FRAME_LIMIT {
        if let Some(length) = road.near.recv(frame).context("the TAP can't be read")? {
            return Ok(length);
        }
    }
    anyhow::bail!("a frame was lost between two TAPs")
}

fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
