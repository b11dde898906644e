//! Short sequences of frames, of kinds that no guest of the simulated world sends, through the shipped comparator.
//!
//! Each says what must not happen. `tests/mutants.rs` runs them under the deliberate bugs that only they can notice.

use bytes::Bytes;
use checkpoint::{Duration, Epoch, EpochMode, Instant, Role};
use proxy::{Comparator, ComparatorLimits, NetworkPicture, Verdict};

use crate::packet::{ACK, IP, RST, SYN, TRANSPORT};

const URG: u8 = 32;

/// What must not happen, and whether it does.
type Sequence = (&'static str, fn() -> bool);

/// Runs all of them.
///
/// # Errors
/// Says what happened that must not.
pub fn run() -> Result<(), String> {
    let sequences: [Sequence; 9] = [
        ("rule 1: bytes that were said before, but others, leave", repeated),
        ("rule 1: a byte that only the secondary marks as urgent leaves", urgent),
        (
            "rule 1: an acknowledgement leaves before the reset that ends its connection",
            reset,
        ),
        (
            "rule 1: fragments of two datagrams leave for one that they would make",
            fragments,
        ),
        ("rule 1: bytes of a stream that began in other numbers leave", numbers),
        (
            "rule 6: connections opened from different ports wait for the whole bound",
            ports,
        ),
        ("rule 1: more of a segment leaves than both have said", begin),
        ("a time before that of what has overtaken leaves", overtaken),
        ("a time before one that the client has seen leaves", takeover),
    ];
    match sequences.iter().find(|(_, happens)| happens()) {
        Some((what, _)) => Err((*what).to_owned()),
        None => Ok(()),
    }
}

/// A primary's comparator; its frames leave at once until the first checkpoint.
struct Primary(Comparator);

impl Primary {
    fn new() -> Self {
        Self(Comparator::new(ComparatorLimits::default(), Epoch(1)))
    }

    /// The secondary has the state of now, and follows from here on.
    fn protect(&mut self) {
        let epoch = self.0.stop(EpochMode::Lockstep);
        self.0.protect(epoch.next(), EpochMode::Lockstep);
        self.0.loaded(Instant(0), epoch);
    }

    /// Tells whether anything leaves.
    fn sends(&mut self, frame: Bytes) -> bool {
        let mut verdicts = Vec::new();
        self.0.primary_output(Instant(0), frame, &mut verdicts);
        leaves(&verdicts)
    }

    fn hears(&mut self, frame: Bytes) -> bool {
        let mut verdicts = Vec::new();
        let epoch = self.0.running();
        self.0.secondary_output(Instant(0), epoch, frame, &mut verdicts);
        leaves(&verdicts)
    }
}

fn leaves(verdicts: &[Verdict]) -> bool {
    verdicts.iter().any(|verdict| matches!(verdict, Verdict::Release(..)))
}

fn repeated() -> bool {
    let mut primary = Primary::new();
    primary.protect();
    primary.sends(tcp(1000, ACK, 0, b"abcd"));
    assert!(primary.hears(tcp(1000, ACK, 0, b"abcd")), "equal bytes leave");
    primary.sends(tcp(1000, ACK, 0, b"abXd"))
}

fn urgent() -> bool {
    let mut primary = Primary::new();
    primary.protect();
    primary.hears(tcp(1000, ACK | URG, 2, b"abc"));
    primary.sends(tcp(1000, ACK, 0, b"abc"))
}

fn reset() -> bool {
    let mut primary = Primary::new();
    primary.sends(tcp(1000, ACK, 0, b"abcd"));
    primary.protect();
    let before = primary.sends(tcp(1004, ACK | RST, 0, b""));
    before || primary.sends(tcp(1004, ACK, 0, b""))
}

fn fragments() -> bool {
    let mut primary = Primary::new();
    primary.protect();
    for (datagram, place, byte) in [(7, 0, 0xa1), (7, 1, 0xa2), (8, 0, 0xa1), (8, 1, 0xa2)] {
        primary.hears(fragment(datagram, place, byte));
    }
    primary.sends(fragment(1, 0, 0xa1));
    assert!(primary.sends(fragment(1, 1, 0xa2)), "an equal datagram leaves");
    primary.sends(fragment(2, 0, 0xa1));
    primary.sends(fragment(3, 1, 0xa2))
}

/// The primary took over before the client's first acknowledgement: it sent its own SYN, and then as the client knows the connection.
fn numbers() -> bool {
    let mut primary = Primary::new();
    primary.sends(tcp(5_000, ACK | SYN, 0, b""));
    primary.sends(tcp(1_001, ACK, 0, b"hello"));
    primary.protect();
    primary.sends(tcp(1_006, ACK, 0, b"AAAA"))
}

/// The secondary has said the first bytes of a segment, and says no more.
fn begin() -> bool {
    let mut primary = Primary::new();
    primary.sends(tcp(996, ACK, 0, b"past"));
    primary.protect();
    primary.sends(tcp(1000, ACK, 0, b"abcd"));
    primary.hears(tcp(1000, ACK, 0, b"ab"));
    let mut verdicts = Vec::new();
    let due = primary.0.deadline().expect("something waits");
    primary.0.timeout(due, &mut verdicts);
    assert!(leaves(&verdicts), "what both have said leaves");
    let both = tcp(1000, ACK, 0, b"ab").len();
    let more = |verdict: &Verdict| matches!(verdict, Verdict::Release(frame, _) if frame.len() > both);
    verdicts.iter().any(more)
}

/// An acknowledgement leaves before the bytes that were sent before it.
fn overtaken() -> bool {
    let mut primary = Primary::new();
    primary.sends(timed(1000, 500, 90, b""));
    primary.protect();
    primary.sends(timed(1000, 500, 100, b"abcd"));
    primary.sends(timed(1004, 600, 150, b""));
    assert!(primary.hears(timed(1000, 600, 140, b"")), "an acknowledgement leaves");
    let mut verdicts = Vec::new();
    let epoch = primary.0.running();
    let frame = timed(1000, 500, 140, b"abcd");
    primary.0.secondary_output(Instant(0), epoch, frame, &mut verdicts);
    let early = |verdict: &Verdict| matches!(verdict, Verdict::Release(frame, _) if time(frame) < 150);
    assert!(leaves(&verdicts), "equal bytes leave");
    verdicts.iter().any(early)
}

/// The secondary's clock lags.
fn takeover() -> bool {
    let mut network = NetworkPicture::new();
    network.follow();
    network.leaving(timed(1000, 500, 100, b"abcd"));
    network.arriving(answer(timed(500, 1004, 40, b""), 130));
    network.lead();
    time(network.leaving(timed(1004, 500, 110, b"abcd")).wire()) < 130
}

/// Its own time is in the last bytes of the header but four, that which it returns in the last four.
fn timed(seq: u32, ack: u32, time: u32, payload: &[u8]) -> Bytes {
    let mut segment = vec![0, 80, 0x13, 0x88];
    segment.extend(seq.to_be_bytes());
    segment.extend(ack.to_be_bytes());
    segment.extend([8 << 4, ACK, 4, 0, 0, 0, 0, 0, 1, 1, 8, 10]);
    segment.extend(time.to_be_bytes());
    segment.extend([0, 0, 0, 1]);
    segment.extend(payload);
    ipv4(6, [0, 0, 0, 0], &segment)
}

/// The same from the other end, returning this time.
fn answer(frame: Bytes, time: u32) -> Bytes {
    let mut frame = frame.to_vec();
    for at in IP + 12..IP + 16 {
        frame.swap(at, at + 4);
    }
    frame.swap(TRANSPORT, TRANSPORT + 2);
    frame.swap(TRANSPORT + 1, TRANSPORT + 3);
    frame[TRANSPORT + 28..TRANSPORT + 32].copy_from_slice(&time.to_be_bytes());
    frame.into()
}

fn time(frame: &[u8]) -> u32 {
    let at = TRANSPORT + 24;
    u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
}

/// Both guests connect to the same place, each from a port of its own.
fn ports() -> bool {
    let mut primary = Primary::new();
    primary.protect();
    for (side, port) in [(Role::Primary, 40), (Role::Secondary, 50)] {
        let mut frame = tcp(1000, SYN, 0, b"").to_vec();
        frame[TRANSPORT] = port;
        match side {
            Role::Primary => primary.sends(frame.into()),
            Role::Secondary => primary.hears(frame.into()),
        };
    }
    primary
        .0
        .deadline()
        .is_none_or(|deadline| deadline > Instant(0) + Duration::from_millis(1))
}

/// A segment to port 5000 that acknowledges 500; nobody looks at its checksums.
fn tcp(seq: u32, flags: u8, urgent: u16, payload: &[u8]) -> Bytes {
    let mut segment = vec![0, 80, 0x13, 0x88];
    segment.extend(seq.to_be_bytes());
    segment.extend(500u32.to_be_bytes());
    segment.extend([5 << 4, flags, 4, 0, 0, 0]);
    segment.extend(urgent.to_be_bytes());
    segment.extend(payload);
    ipv4(6, [0, 0, 0, 0], &segment)
}

/// Eight bytes of a datagram; `place` is in units of as many.
fn fragment(datagram: u8, place: u8, byte: u8) -> Bytes {
    let more = if place == 0 { 0x20 } else { 0 };
    ipv4(17, [0, datagram, more, place], &[byte; 8])
}

fn ipv4(protocol: u8, fragment: [u8; 4], payload: &[u8]) -> Bytes {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
    let length = u16::try_from(20 + payload.len()).expect("short");
    frame.extend(length.to_be_bytes());
    frame.extend(fragment);
    frame.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 9]);
    frame.extend(payload);
    proxy::complete(&frame)
}
