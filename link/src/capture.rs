//! Captures: what both guests sent, what was let out and why, on its way to whoever asked for it.
//!
//! The role's loop offers what it sees ([`Captures::offer`]) and never waits; a task for each capture writes it to its client as pcapng. One that
//! reads too slowly misses packets, and their number is in its file. Nothing is copied or counted while nobody captures.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use checkpoint::pair::{Place, Sight};
use checkpoint::{Instant, Nic};
use tokio::io::{self, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::{clock, pcapng};

/// Captures at a time.
pub const CAPTURES_MAX: usize = 4;
/// Packets that wait for a client, and
const PACKETS_WAITING_MAX: usize = 8 * 1024;
/// their bytes.
const BYTES_WAITING_MAX: u64 = 8 * 1024 * 1024;
/// A client that takes nothing for so long is given up.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);
/// Bytes that are gathered before they are written.
const WRITE_BYTES: usize = 64 * 1024;

/// All captures of a role.
#[derive(Debug)]
pub struct Captures {
    sinks: Vec<Sink>,
    /// Network cards of the VM.
    cards: usize,
}

#[derive(Debug)]
struct Sink {
    packets: mpsc::Sender<Sight>,
    counts: Arc<Counts>,
}

/// One capture's end at its client.
#[derive(Debug)]
pub struct Capture {
    packets: mpsc::Receiver<Sight>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    waiting_bytes: AtomicU64,
    interfaces: Vec<Interface>,
}

/// What was seen on an interface of the capture: a place of a card.
#[derive(Debug, Default)]
struct Interface {
    seen: AtomicU64,
    lost: AtomicU64,
}

/// The interfaces that a capture has for each card.
const PLACES: [Place; 3] = [Place::Primary, Place::Secondary, Place::Released];

fn describe(place: Place) -> (&'static str, &'static str) {
    match place {
        Place::Primary => ("primary", "what the primary's guest sent"),
        Place::Secondary => ("secondary", "what the secondary's guest sent"),
        Place::Released => ("released", "what was let out to the clients, and why"),
    }
}

/// Returns the number of an interface.
fn interface(nic: Nic, place: Place) -> usize {
    nic.index() * PLACES.len() + place as usize
}

impl Captures {
    /// Makes none yet, of a VM that has so many network cards.
    #[must_use]
    pub fn new(cards: usize) -> Self {
        Self {
            sinks: Vec::new(),
            cards,
        }
    }

    /// Begins one more.
    ///
    /// # Errors
    /// Says why not.
    pub fn begin(&mut self) -> Result<Capture, String> {
        self.forget_ended();
        if self.sinks.len() >= CAPTURES_MAX {
            return Err(format!("{CAPTURES_MAX} captures are running already: end one of them"));
        }
        let (packets, receiver) = mpsc::channel(PACKETS_WAITING_MAX);
        let interfaces = (0..self.cards * PLACES.len()).map(|_| Interface::default());
        let counts = Arc::new(Counts {
            waiting_bytes: AtomicU64::new(0),
            interfaces: interfaces.collect(),
        });
        self.sinks.push(Sink {
            packets,
            counts: Arc::clone(&counts),
        });
        Ok(Capture {
            packets: receiver,
            counts,
        })
    }

    /// Tells whether nobody captures.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sinks.is_empty()
    }

    /// Offers a packet to each. Never waits.
    pub fn offer(&mut self, packet: &Sight) {
        for sink in &self.sinks {
            sink.offer(packet);
        }
        self.forget_ended();
    }

    fn forget_ended(&mut self) {
        self.sinks.retain(|sink| !sink.packets.is_closed());
    }
}

impl Sink {
    fn offer(&self, packet: &Sight) {
        let counts = &self.counts;
        let interface = &counts.interfaces[interface(packet.nic, packet.place)];
        interface.seen.fetch_add(1, Ordering::Relaxed);
        let bytes = packet.frame.len() as u64;
        // Counted first: its reader may be done with it at once.
        let waiting = counts.waiting_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if waiting > BYTES_WAITING_MAX || self.packets.try_send(packet.clone()).is_err() {
            counts.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            interface.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Capture {
    /// Writes pcapng to a client until it wants no more, and says so by closing its half of the connection, or until the role ends.
    pub(crate) async fn write_to(mut self, stream: &mut UnixStream) -> io::Result<()> {
        let mut out = Vec::new();
        pcapng::section(&mut out, concat!("tandem ", env!("CARGO_PKG_VERSION")));
        for number in 0..self.counts.interfaces.len() {
            let (name, description) = describe(PLACES[number % PLACES.len()]);
            if self.counts.interfaces.len() == PLACES.len() {
                pcapng::interface(&mut out, name, description);
            } else {
                let card = number / PLACES.len();
                let (name, description) = (
                    format!("net{card} {name}"),
                    format!("network card {card}: {description}"),
                );
                pcapng::interface(&mut out, &name, &description);
            }
        }
        let (mut reader, mut writer) = stream.split();
        let epoch = Epoch::now();
        let mut told = vec![0; self.counts.interfaces.len()];
        let mut nothing = [0; 16];
        let why = loop {
            timeout(CLIENT_LIMIT, writer.write_all(&out)).await??;
            out.clear();
            let first = tokio::select! {
                packet = self.packets.recv() => packet,
                ended = reader.read(&mut nothing) => match ended? {
                    0 => break "the capture was ended",
                    _ => continue,
                },
            };
            let Some(first) = first else { break "the role ended" };
            self.add(&mut out, &first, &epoch, &mut told);
            while out.len() < WRITE_BYTES
                && let Ok(packet) = self.packets.try_recv()
            {
                self.add(&mut out, &packet, &epoch, &mut told);
            }
        };
        // What had been seen by then belongs to it.
        self.packets.close();
        while let Ok(packet) = self.packets.try_recv() {
            self.add(&mut out, &packet, &epoch, &mut told);
        }
        self.add_statistics(&mut out, &epoch, why);
        timeout(CLIENT_LIMIT, writer.write_all(&out)).await?
    }

    fn add(&self, out: &mut Vec<u8>, packet: &Sight, epoch: &Epoch, told: &mut [u64]) {
        let number = interface(packet.nic, packet.place);
        let bytes = packet.frame.len() as u64;
        self.counts.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
        let lost = self.counts.interfaces[number].lost.load(Ordering::Relaxed);
        let before = std::mem::replace(&mut told[number], lost);
        let packet = pcapng::Packet {
            interface: wire_number(number),
            time: epoch.time(packet.at),
            frame: &packet.frame,
            comment: &packet.comment,
            lost: lost - before,
        };
        pcapng::packet(out, &packet);
    }

    fn add_statistics(&self, out: &mut Vec<u8>, epoch: &Epoch, why: &str) {
        for (number, interface) in self.counts.interfaces.iter().enumerate() {
            let [seen, lost] = [&interface.seen, &interface.lost].map(|count| count.load(Ordering::Relaxed));
            let comment = if lost == 0 {
                format!("{why}; no packet is missing")
            } else {
                format!("{why}; {lost} of {seen} packets are missing: they came faster than they were read")
            };
            let at = epoch.time(clock::now());
            pcapng::statistics(out, wire_number(number), at, seen, lost, &comment);
        }
    }
}

fn wire_number(interface: usize) -> u32 {
    u32::try_from(interface).expect("a few interfaces a card")
}

/// A moment by both clocks.
struct Epoch {
    own: Instant,
    unix: u64,
}

impl Epoch {
    fn now() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            own: clock::now(),
            unix: u64::try_from(unix.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    fn time(&self, at: Instant) -> u64 {
        (self.unix + at.since(self.own).0).saturating_sub(self.own.since(at).0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(place: Place, bytes: usize) -> Sight {
        Sight {
            at: clock::now(),
            nic: Nic::FIRST,
            place,
            comment: "why".to_owned(),
            frame: vec![7; bytes].into(),
        }
    }

    async fn read(mut stream: UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        bytes
    }

    /// Counts the blocks of a kind.
    fn count(mut bytes: &[u8], kind: u32) -> usize {
        let mut count = 0;
        while !bytes.is_empty() {
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            count += usize::from(word(0) == kind);
            bytes = &bytes[word(4) as usize..];
        }
        count
    }

    #[tokio::test]
    async fn a_client_gets_what_was_offered_until_it_has_enough() {
        let mut captures = Captures::new(1);
        let capture = captures.begin().unwrap();
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let task = tokio::spawn(async move { capture.write_to(&mut theirs).await });
        for place in PLACES {
            captures.offer(&packet(place, 60));
        }
        ours.shutdown().await.unwrap();
        let bytes = read(ours).await;
        task.await.unwrap().unwrap();
        assert_eq!((count(&bytes, 1), count(&bytes, 6), count(&bytes, 5)), (3, 3, 3));
        let text = String::from_utf8_lossy(&bytes).into_owned();
        assert!(text.contains("the capture was ended; no packet is missing"), "{text}");
        captures.offer(&packet(Place::Primary, 60));
        assert!(captures.is_empty(), "an ended one is forgotten");
    }

    #[tokio::test]
    async fn the_end_of_the_role_ends_a_capture_in_order() {
        let mut captures = Captures::new(1);
        let capture = captures.begin().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let task = tokio::spawn(async move { capture.write_to(&mut theirs).await });
        captures.offer(&packet(Place::Released, 60));
        drop(captures);
        let bytes = read(ours).await;
        task.await.unwrap().unwrap();
        assert_eq!((count(&bytes, 6), count(&bytes, 5)), (1, 3));
        assert!(String::from_utf8_lossy(&bytes).contains("the role ended"));
    }

    #[tokio::test]
    async fn a_client_that_is_too_slow_misses_packets_and_is_told_how_many() {
        let mut captures = Captures::new(1);
        let capture = captures.begin().unwrap();
        for _ in 0..1_200 {
            captures.offer(&packet(Place::Primary, 9_000));
        }
        assert!(capture.counts.waiting_bytes.load(Ordering::Relaxed) <= BYTES_WAITING_MAX);
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let task = tokio::spawn(async move { capture.write_to(&mut theirs).await });
        ours.shutdown().await.unwrap();
        let bytes = read(ours).await;
        task.await.unwrap().unwrap();
        let kept = count(&bytes, 6);
        let text = format!("{} of 1200 packets are missing", 1_200 - kept);
        assert!(kept < 1_200 && String::from_utf8_lossy(&bytes).contains(&text));
    }

    #[tokio::test]
    async fn each_card_has_interfaces_of_its_own() {
        let mut captures = Captures::new(2);
        let capture = captures.begin().unwrap();
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let task = tokio::spawn(async move { capture.write_to(&mut theirs).await });
        for nic in Nic::all(2) {
            captures.offer(&Sight {
                nic,
                ..packet(Place::Released, 60)
            });
        }
        ours.shutdown().await.unwrap();
        let mut bytes = &read(ours).await[..];
        task.await.unwrap().unwrap();
        assert_eq!((count(bytes, 1), count(bytes, 6), count(bytes, 5)), (6, 2, 6));
        let text = String::from_utf8_lossy(bytes).into_owned();
        assert!(
            text.contains("net0 primary") && text.contains("net1 released"),
            "{text}"
        );
        let mut interfaces = Vec::new();
        while !bytes.is_empty() {
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            if word(0) == pcapng::PACKET {
                interfaces.push(word(8));
            }
            bytes = &bytes[word(4) as usize..];
        }
        assert_eq!(interfaces, [2, 5]);
    }

    #[test]
    fn their_number_is_bounded() {
        let mut captures = Captures::new(1);
        let running: Vec<_> = (0..CAPTURES_MAX).map(|_| captures.begin().unwrap()).collect();
        assert!(captures.begin().unwrap_err().contains("end one"));
        drop(running);
        assert!(captures.begin().is_ok());
    }
}
