//! Clients that ask without a connection: UDP echo every few milliseconds, and ping.
//!
//! UDP is the clock by which a takeover is measured, since nothing retransmits it: every request's moment
//! and every answer's is kept.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};

use crate::lab::Namespace;

const PING_PERIOD: Duration = Duration::from_millis(50);
/// After the last request, answers are waited for this long.
const LAST_ANSWERS: Duration = Duration::from_millis(1_200);
const LISTEN_PERIOD: Duration = Duration::from_millis(50);
const UDP_MARK: u64 = 0x7461_6e64_656d_2e31;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// Every UDP request and its answer.
#[derive(Clone, Debug, Default)]
pub struct UdpLog {
    requests: Vec<UdpRequest>,
    /// Answers to nothing that was asked.
    pub wrong: u64,
    /// Answers that came twice or more.
    pub repeated: u64,
}

#[derive(Clone, Copy, Debug)]
struct UdpRequest {
    sent: Instant,
    answered: Option<Instant>,
}

/// What ping saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PingReport {
    /// Echo requests sent.
    pub sent: u64,
    /// Answered in time, before the next one was sent.
    pub answered: u64,
}

/// The running UDP client.
#[derive(Debug)]
pub(super) struct Udp {
    log: Arc<Mutex<UdpLog>>,
    threads: [JoinHandle<()>; 2],
}

impl UdpLog {
    /// Returns how many requests were sent.
    #[must_use]
    pub fn sent(&self) -> u64 {
        u64::try_from(self.requests.len()).unwrap_or(u64::MAX)
    }

    /// Returns how many requests were never answered.
    #[must_use]
    pub fn lost(&self) -> u64 {
        count(self.lost_requests())
    }

    /// Returns how many requests sent before `from` or after `until` were never answered.
    #[must_use]
    pub fn lost_outside(&self, from: Instant, until: Instant) -> u64 {
        count(
            self.lost_requests()
                .filter(|request| request.sent < from || request.sent > until),
        )
    }

    /// Returns how long each answer took.
    pub fn latencies(&self) -> impl Iterator<Item = Duration> {
        let answered = self
            .requests
            .iter()
            .filter_map(|request| Some((request.sent, request.answered?)));
        answered.map(|(sent, answered)| answered.saturating_duration_since(sent))
    }

    /// Returns the longest time without an answer, from the first request to the last.
    #[must_use]
    pub fn longest_silence(&self) -> Option<Duration> {
        let mut moments: Vec<_> = self.requests.iter().filter_map(|request| request.answered).collect();
        // One that goes on ends with what is known.
        moments.extend(self.requests.last().map(|request| request.sent));
        moments.sort_unstable();
        let from = self
            .requests
            .first()
            .map(|request| request.sent)
            .into_iter()
            .chain(moments.iter().copied());
        from.zip(&moments)
            .map(|(from, until)| until.saturating_duration_since(from))
            .max()
    }

    /// Returns when the first answer came to a request sent after `moment`.
    #[must_use]
    pub fn first_answer_since(&self, moment: Instant) -> Option<Instant> {
        let recent = self.requests.iter().rev().take_while(|request| request.sent > moment);
        recent.filter_map(|request| request.answered).min()
    }

    fn lost_requests(&self) -> impl Iterator<Item = &UdpRequest> {
        self.requests.iter().filter(|request| request.answered.is_none())
    }

    fn note(&mut self, answer: &[u8], now: Instant) {
        let numbers: Option<([u8; 8], [u8; 8])> = answer
            .split_first_chunk()
            .and_then(|(mark, rest)| Some((*mark, rest.try_into().ok()?)));
        let Some((mark, number)) = numbers else {
            self.wrong += 1;
            return;
        };
        let request = usize::try_from(u64::from_le_bytes(number))
            .ok()
            .and_then(|at| self.requests.get_mut(at));
        match request {
            Some(request) if u64::from_le_bytes(mark) == UDP_MARK => match request.answered {
                None => request.answered = Some(now),
                Some(_) => self.repeated += 1,
            },
            _ => self.wrong += 1,
        }
    }
}

impl Udp {
    pub(super) fn start(
        namespace: &Namespace,
        address: SocketAddr,
        period: Duration,
        stop: &Arc<AtomicBool>,
    ) -> io::Result<Self> {
        let log = Arc::new(Mutex::new(UdpLog::default()));
        let socket = namespace.run(move || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(address)?;
            socket.set_read_timeout(Some(LISTEN_PERIOD))?;
            Ok::<_, io::Error>(socket)
        })?;
        let (ears, stopped, heard) = (socket.try_clone()?, Arc::clone(stop), Arc::clone(&log));
        let listener = namespace.thread("udp-answers", move || listen(&ears, &heard, &stopped))?;
        let (stopped, asked) = (Arc::clone(stop), Arc::clone(&log));
        let sender = namespace.thread("udp", move || send(&socket, &asked, period, &stopped))?;
        Ok(Self {
            log,
            threads: [sender, listener],
        })
    }

    pub(super) fn log(&self) -> MutexGuard<'_, UdpLog> {
        locked(&self.log)
    }

    pub(super) fn join(self) -> UdpLog {
        for thread in self.threads {
            thread.join().expect("a client does not panic");
        }
        std::mem::take(&mut *locked(&self.log))
    }
}

fn send(socket: &UdpSocket, log: &Mutex<UdpLog>, period: Duration, stop: &AtomicBool) {
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let sent = Instant::now();
        let number = {
            let mut log = locked(log);
            log.requests.push(UdpRequest { sent, answered: None });
            log.sent() - 1
        };
        let mut request = [0; 16];
        request[..8].copy_from_slice(&UDP_MARK.to_le_bytes());
        request[8..].copy_from_slice(&number.to_le_bytes());
        // An unreachable target is an answer missing, which the log has.
        let _ = socket.send(&request);
        // A thread that was late does not catch up in a burst.
        next = (next + period).max(Instant::now());
        sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn listen(socket: &UdpSocket, log: &Mutex<UdpLog>, stop: &AtomicBool) {
    let mut answer = [0; 64];
    let mut end = None;
    loop {
        let received = socket.recv(&mut answer);
        let now = Instant::now();
        if let Ok(length) = received {
            locked(log).note(&answer[..length], now);
        }
        if stop.load(Ordering::Relaxed) {
            let end = *end.get_or_insert(now + LAST_ANSWERS);
            if now > end || (received.is_err() && locked(log).lost() == 0) {
                return;
            }
        }
    }
}

/// Starts a ping that runs until `stop`.
pub(super) fn ping(
    namespace: &Namespace,
    target: Ipv4Addr,
    stop: &Arc<AtomicBool>,
) -> io::Result<JoinHandle<PingReport>> {
    let socket = namespace.run(move || {
        let socket = socket_with(
            AddressFamily::INET,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(ipproto::ICMP),
        )?;
        // Sending, receiving and timeouts are those of a datagram socket.
        let socket = UdpSocket::from(socket);
        socket.connect((target, 0))?;
        Ok::<_, io::Error>(socket)
    })?;
    let stop = Arc::clone(stop);
    namespace.thread("ping", move || {
        let mut report = PingReport::default();
        while !stop.load(Ordering::Relaxed) {
            let deadline = Instant::now() + PING_PERIOD;
            report.sent += 1;
            let _ = socket.send(&echo_request(report.sent));
            report.answered += u64::from(is_answered(&socket, report.sent, deadline));
            sleep(deadline.saturating_duration_since(Instant::now()));
        }
        report
    })
}

fn is_answered(socket: &UdpSocket, number: u64, deadline: Instant) -> bool {
    let expected = echo_request(number);
    let mut packet = [0; 256];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || socket.set_read_timeout(Some(left)).is_err() {
            return false;
        }
        let Ok(length) = socket.recv(&mut packet) else {
            return false;
        };
        let header = usize::from(packet[0] & 0x0f) * 4;
        let Some(icmp) = packet[..length].get(header..) else {
            continue;
        };
        // All but type and checksum come back as they were sent.
        if icmp.len() == expected.len() && icmp[0] == ECHO_REPLY && icmp[4..] == expected[4..] {
            return true;
        }
    }
}

fn echo_request(number: u64) -> [u8; 16] {
    let mut packet = [0; 16];
    packet[0] = ECHO_REQUEST;
    packet[4..6].copy_from_slice(&UDP_MARK.to_be_bytes()[..2]);
    packet[8..].copy_from_slice(&number.to_be_bytes());
    let sum: u32 = packet
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    let [_, _, high, low] = folded.to_be_bytes();
    packet[2] = !high;
    packet[3] = !low;
    packet
}

fn count<T>(items: impl Iterator<Item = T>) -> u64 {
    items.fold(0, |count, _| count + 1)
}

fn locked(log: &Mutex<UdpLog>) -> MutexGuard<'_, UdpLog> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(answers: &[Option<u64>]) -> (Instant, UdpLog) {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let requests = answers.iter().zip(0..).map(|(answer, number)| UdpRequest {
            sent: at(number * 2),
            answered: answer.map(at),
        });
        (
            start,
            UdpLog {
                requests: requests.collect(),
                ..UdpLog::default()
            },
        )
    }

    #[test]
    fn the_first_answer_counts_only_if_its_request_came_after_the_moment() {
        // Sent at 0, 2, 4, 6, 8; the second is answered very late.
        let (start, log) = log(&[Some(1), Some(30), None, None, Some(9)]);
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(log.first_answer_since(at(3)), Some(at(9)));
        assert_eq!(log.first_answer_since(at(1)), Some(at(9)));
        assert_eq!(log.first_answer_since(at(8)), None);
        assert_eq!((log.sent(), log.lost()), (5, 2));
        assert_eq!(log.lost_outside(at(3), at(9)), 0);
        assert_eq!(log.lost_outside(at(5), at(9)), 1);
        assert_eq!(log.lost_outside(at(3), at(5)), 1);
    }

    #[test]
    fn odd_answers_are_counted_and_not_believed() {
        let (start, mut log) = log(&[None, None]);
        let answer = |number: u64| [UDP_MARK.to_le_bytes(), number.to_le_bytes()].concat();
        log.note(&answer(0), start);
        log.note(&answer(0), start);
        log.note(&answer(7), start);
        log.note(&[0; 16], start);
        log.note(&answer(1)[..15], start);
        log.note(&[answer(1), vec![0]].concat(), start);
        assert_eq!((log.lost(), log.repeated, log.wrong), (1, 1, 4));
    }

    #[test]
    fn the_checksum_of_an_echo_request_adds_up() {
        for number in [0, 1, 0xffff, u64::MAX] {
            let packet = echo_request(number);
            let sum: u32 = packet
                .chunks(2)
                .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
                .sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "{number}");
        }
    }
}
