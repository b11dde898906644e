//! Clients at work: what users of the VM would notice, counted.
//!
//! ```text
//!   start ─► one thread a connection:  http  increments  echo      request, answer, check, pause, …
//!            two threads:              udp                         a request every so often, answers noted apart
//!            one thread:               ping
//!   stop  ─► Report
//! ```
//!
//! All connections are opened once and kept. A TCP request that fails, or takes longer than 10 s, is
//! counted and never tried again; its connection ends with it. Every answer is checked in full. The
//! clients know nothing of the pair: whoever kills a host looks at the moments in the report.

mod datagram;
mod tcp;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::lab::Namespace;

pub use datagram::{PingReport, UdpLog};
pub use tcp::{HttpAnswer, RequestError, http_get, stored_count};

use tcp::{Echo, Exchange, Http, Increments};

/// A TCP request that takes longer has failed.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// Where the VM is and on which ports it serves.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// IPv4 address.
    pub v4: Ipv4Addr,
    /// IPv6 address; without one nothing is asked by IPv6.
    pub v6: Option<Ipv6Addr>,
    /// HTTP.
    pub http: u16,
    /// The key-value store.
    pub store: u16,
    /// Echo, TCP and UDP.
    pub echo: u16,
    /// Bytes without end, to whoever asks for a large file by HTTP.
    pub source: u16,
}

/// How much the clients ask.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// HTTP connections over IPv4; one more goes over IPv6.
    pub http: u16,
    /// Connections that increment a counter each.
    pub increments: u16,
    /// Pause between an answer and the next request on a TCP connection.
    pub pause: Duration,
    /// From one UDP request to the next, whether that is answered or not.
    pub udp_every: Duration,
}

/// Clients that are at work.
#[derive(Debug)]
pub struct Clients {
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    tcp: Vec<JoinHandle<TcpReport>>,
    udp: datagram::Udp,
    ping: JoinHandle<PingReport>,
}

/// What the clients saw, all in all.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What the TCP connections saw, summed up.
    pub tcp: TcpReport,
    /// Every UDP request.
    pub udp: UdpLog,
    /// The pings.
    pub ping: PingReport,
}

/// What one TCP connection saw, or several.
#[derive(Clone, Debug, Default)]
pub struct TcpReport {
    /// Requests answered in full and in time.
    pub requests: u64,
    /// Requests not answered in time, or cut off.
    pub failed: u64,
    /// Answers that were wrong.
    pub wrong: u64,
    /// Connections that the other side ended, or that could not be opened.
    pub broken: u64,
    /// Longest time from one answer to the next on one connection.
    pub longest_gap: Option<Gap>,
    /// What went wrong, in words.
    pub faults: Vec<String>,
    /// The counters incremented, with what the clients know of them.
    pub counters: Vec<Counter>,
}

/// A time in which a connection got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The answer before it, or the connection's beginning.
    pub from: Instant,
    /// The answer after it, or the failure.
    pub until: Instant,
    /// The client's kind.
    pub client: &'static str,
}

/// A key that one connection increments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Its name.
    pub key: String,
    /// Increments acknowledged.
    pub acknowledged: u64,
    /// Increments requested, the acknowledged ones included.
    pub requested: u64,
}

impl Target {
    /// Where the bundled guest is, unless told otherwise.
    #[must_use]
    pub fn bundled() -> Self {
        Self::on_card(0)
    }

    /// Where it is on one of its network cards, unless told otherwise.
    ///
    /// # Panics
    /// If a VM has no such card.
    #[must_use]
    pub fn on_card(card: usize) -> Self {
        let addresses = guest::settings::Settings::default().cards[card];
        Self {
            v4: addresses.ip.map_or(Ipv4Addr::UNSPECIFIED, |network| network.address),
            v6: addresses.ip6.map(|network| network.address),
            http: 80,
            store: 6379,
            echo: 7,
            source: 80,
        }
    }

    /// A Linux guest with the services of the lab's (RFC 864: its characters come by themselves).
    #[must_use]
    pub fn linux(v4: Ipv4Addr) -> Self {
        Self {
            v4,
            v6: None,
            source: 19,
            ..Self::bundled()
        }
    }

    /// Returns the address of the HTTP service.
    #[must_use]
    pub fn http_address(&self) -> SocketAddr {
        (self.v4, self.http).into()
    }

    /// Returns the address of the key-value store.
    #[must_use]
    pub fn store_address(&self) -> SocketAddr {
        (self.v4, self.store).into()
    }
}

impl Default for Load {
    fn default() -> Self {
        Self {
            http: 2,
            increments: 4,
            pause: Duration::from_millis(5),
            udp_every: Duration::from_millis(2),
        }
    }
}

impl Clients {
    /// Starts all clients in a namespace, with increments of the keys `<prefix>0`, `<prefix>1`, …
    ///
    /// # Errors
    /// Fails if a thread or a socket can't be made. A target that does not answer is for the report.
    pub fn start(namespace: &Namespace, target: Target, load: Load, prefix: &str) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(AtomicU64::new(0));
        let mut tcp = Vec::new();
        let run = Runner {
            stop: Arc::clone(&stop),
            requests: Arc::clone(&requests),
            pause: load.pause,
        };
        let addresses = std::iter::repeat_n(IpAddr::V4(target.v4), load.http.into()).chain(target.v6.map(IpAddr::V6));
        for (number, address) in addresses.enumerate() {
            let http = Http::new(number);
            tcp.push(run.start(namespace, "http", (address, target.http).into(), http)?);
        }
        for number in 0..load.increments {
            let increments = Increments::new(format!("{prefix}{number}"));
            tcp.push(run.start(namespace, "increments", target.store_address(), increments)?);
        }
        tcp.push(run.start(namespace, "echo", (target.v4, target.echo).into(), Echo::default())?);
        let udp = datagram::Udp::start(namespace, (target.v4, target.echo).into(), load.udp_every, &stop)?;
        let ping = datagram::ping(namespace, target.v4, &stop)?;
        Ok(Self {
            stop,
            requests,
            tcp,
            udp,
            ping,
        })
    }

    /// Returns how many TCP requests were answered so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Returns when the first answer came to a UDP request sent after `moment`.
    #[must_use]
    pub fn first_answer_since(&self, moment: Instant) -> Option<Instant> {
        self.udp.log().first_answer_since(moment)
    }

    /// Lets every client finish what it has begun, and returns what they saw.
    ///
    /// # Panics
    /// Panics if a client did.
    #[must_use]
    pub fn stop(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let mut report = Report::default();
        for client in self.tcp {
            report.tcp.add(client.join().expect("a client does not panic"));
        }
        report.ping = self.ping.join().expect("a client does not panic");
        report.udp = self.udp.join();
        report
    }
}

impl Gap {
    /// Returns how long it was.
    #[must_use]
    pub fn length(&self) -> Duration {
        self.until - self.from
    }
}

impl TcpReport {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.failed += other.failed;
        self.wrong += other.wrong;
        self.broken += other.broken;
        self.note_gap(other.longest_gap);
        self.faults.extend(other.faults);
        self.counters.extend(other.counters);
    }

    fn note_gap(&mut self, gap: Option<Gap>) {
        self.longest_gap = self.longest_gap.into_iter().chain(gap).max_by_key(Gap::length);
    }

    fn fail(&mut self, client: &str, error: &RequestError) {
        match error {
            RequestError::Late => self.failed += 1,
            RequestError::Wrong(_) => self.wrong += 1,
            RequestError::Ended | RequestError::Io(_) => {
                self.failed += 1;
                self.broken += 1;
            }
        }
        self.faults.push(format!("{client}: {error}"));
    }
}

/// Runs one TCP client: request after request on one connection, until told to stop or until one fails.
#[derive(Clone)]
struct Runner {
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    pause: Duration,
}

impl Runner {
    fn start(
        &self,
        namespace: &Namespace,
        name: &'static str,
        address: SocketAddr,
        client: impl Exchange + Send + 'static,
    ) -> io::Result<JoinHandle<TcpReport>> {
        let runner = self.clone();
        namespace.thread(name, move || runner.run(name, address, client))
    }

    fn run(&self, name: &'static str, address: SocketAddr, mut client: impl Exchange) -> TcpReport {
        let mut report = TcpReport::default();
        let mut line = match tcp::Line::connect(address) {
            Ok(line) => line,
            Err(error) => {
                report.fail(name, &error);
                return report;
            }
        };
        let mut last_answer = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            let result = client.exchange(&mut line, Instant::now() + REQUEST_LIMIT);
            let now = Instant::now();
            report.note_gap(Some(Gap {
                from: last_answer,
                until: now,
                client: name,
            }));
            last_answer = now;
            if let Err(error) = result {
                report.fail(name, &error);
                break;
            }
            report.requests += 1;
            self.requests.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(self.pause);
        }
        report.counters.extend(client.counter());
        report
    }
}

#[cfg(test)]
mod tests;
