//! The clients against a small server of the test's own, which can be told to misbehave.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Mutex;

use super::*;

/// What the server does from its fiftieth request on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    CloseConnection,
    RepeatIncrement,
    SpoilBody,
    LoseDatagrams,
}

struct Server {
    fault: Fault,
    requests: AtomicU64,
    counts: Mutex<HashMap<String, u64>>,
}

fn namespace() -> Option<Namespace> {
    match Namespace::new("test") {
        Ok(namespace) => {
            namespace.netlink(async |net| net.up("lo").await).unwrap();
            Some(namespace)
        }
        Err(error) => {
            assert!(std::env::var_os("TANDEM_REQUIRE_KVM").is_none(), "needs root: {error}");
            eprintln!("SKIPPED: the clients' test needs root: {error}");
            None
        }
    }
}

fn target() -> Target {
    Target {
        v4: Ipv4Addr::LOCALHOST,
        v6: Some(Ipv6Addr::LOCALHOST),
        http: 80,
        store: 6379,
        echo: 7,
        source: 80,
    }
}

/// Serves until the test ends.
fn serve(namespace: &Namespace, fault: Fault) -> Arc<Server> {
    let server = Arc::new(Server {
        fault,
        requests: AtomicU64::new(0),
        counts: Mutex::default(),
    });
    for (port, service) in [
        (80, Server::http as fn(&Server, &mut TcpStream)),
        (6379, Server::store),
        (7, Server::echo),
    ] {
        let listener = namespace.run(move || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap());
        let server = Arc::clone(&server);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let server = Arc::clone(&server);
                std::thread::spawn(move || service(&server, &mut stream.unwrap()));
            }
        });
    }
    let socket = namespace.run(|| UdpSocket::bind("0.0.0.0:7").unwrap());
    let server_of_datagrams = Arc::clone(&server);
    std::thread::spawn(move || {
        let mut request = [0; 64];
        loop {
            let (length, from) = socket.recv_from(&mut request).unwrap();
            if !server_of_datagrams.misbehaves(Fault::LoseDatagrams) {
                socket.send_to(&request[..length], from).unwrap();
            }
        }
    });
    server
}

impl Server {
    fn misbehaves(&self, fault: Fault) -> bool {
        self.fault == fault && self.requests.fetch_add(1, Ordering::Relaxed) >= 50
    }

    fn http(&self, stream: &mut TcpStream) {
        let mut input = Vec::new();
        loop {
            while let Some(end) = input.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = String::from_utf8(input.drain(..end + 4).collect()).unwrap();
                let path = head.split(' ').nth(1).unwrap();
                let mut body = b"a page".to_vec();
                if let Some(bytes) = path.strip_prefix("/file/") {
                    body = vec![0; bytes.parse().unwrap()];
                    guest::content::fill(0, &mut body);
                }
                if self.misbehaves(Fault::SpoilBody) {
                    body[0] ^= 1;
                }
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                let _ = stream.write_all(&[head.as_bytes(), &body].concat());
            }
            if !more(stream, &mut input) || self.misbehaves(Fault::CloseConnection) {
                return;
            }
        }
    }

    fn store(&self, stream: &mut TcpStream) {
        let mut input = Vec::new();
        loop {
            while input.iter().filter(|byte| **byte == b'\n').count() >= 5 {
                let text = String::from_utf8(std::mem::take(&mut input)).unwrap();
                let words: Vec<_> = text.lines().collect();
                let mut counts = self.counts.lock().unwrap();
                let count = counts.entry(words[4].to_owned()).or_default();
                let answer = match words[2] {
                    "INCR" => {
                        *count += u64::from(!self.misbehaves(Fault::RepeatIncrement));
                        format!(":{count}\r\n")
                    }
                    _ if *count == 0 => "$-1\r\n".to_owned(),
                    _ => format!("${}\r\n{count}\r\n", count.to_string().len()),
                };
                let _ = stream.write_all(answer.as_bytes());
            }
            if !more(stream, &mut input) {
                return;
            }
        }
    }

    fn echo(&self, stream: &mut TcpStream) {
        let mut input = Vec::new();
        while more(stream, &mut input) {
            let _ = stream.write_all(&std::mem::take(&mut input));
        }
    }
}

fn more(stream: &mut TcpStream, input: &mut Vec<u8>) -> bool {
    let mut portion = [0; 4096];
    let count = stream.read(&mut portion).unwrap_or(0);
    input.extend_from_slice(&portion[..count]);
    count > 0
}

fn run(namespace: &Namespace, fault: Fault) -> (Report, Arc<Server>) {
    let server = serve(namespace, fault);
    let load = Load {
        pause: Duration::from_millis(1),
        ..Load::default()
    };
    let clients = Clients::start(namespace, target(), load, "key:").unwrap();
    std::thread::sleep(Duration::from_millis(700));
    assert!(clients.requests() > 0);
    (clients.stop(), server)
}

#[test]
fn a_good_server_gets_a_clean_report() {
    let Some(namespace) = namespace() else { return };
    let before = Instant::now();
    let (report, server) = run(&namespace, Fault::None);
    assert!(report.tcp.faults.is_empty(), "{:?}", report.tcp.faults);
    assert_eq!((report.tcp.failed, report.tcp.wrong, report.tcp.broken), (0, 0, 0));
    assert!(
        report.tcp.requests > 100 && report.udp.sent() > 50 && report.ping.answered > 5,
        "{report:?}"
    );
    assert_eq!((report.udp.lost(), report.udp.wrong, report.udp.repeated), (0, 0, 0));
    assert!(report.udp.first_answer_since(before).is_some());
    assert!(report.tcp.longest_gap.unwrap().length() > Duration::ZERO);
    assert_eq!(report.tcp.counters.len(), 4);
    for counter in &report.tcp.counters {
        assert_eq!(counter.acknowledged, counter.requested);
        assert_eq!(counter.acknowledged, server.counts.lock().unwrap()[&counter.key]);
        let address = target().store_address();
        let (key, expected) = (counter.key.clone(), counter.acknowledged);
        let stored = namespace.run(move || stored_count(address, &key, Duration::from_secs(1)).unwrap());
        assert_eq!(stored, expected);
    }
    let none = namespace.run(|| stored_count(target().store_address(), "none", Duration::from_secs(1)).unwrap());
    assert_eq!(none, 0);
    let page = namespace.run(|| http_get(target().http_address(), "/", Duration::from_secs(1)).unwrap());
    assert_eq!(
        page,
        HttpAnswer {
            status: 200,
            body: b"a page".to_vec()
        }
    );
}

#[test]
fn a_closed_connection_is_counted_once_and_never_opened_again() {
    let Some(namespace) = namespace() else { return };
    let (report, _) = run(&namespace, Fault::CloseConnection);
    assert_eq!(
        (report.tcp.failed, report.tcp.broken),
        (3, 3),
        "{:?}",
        report.tcp.faults
    );
    assert_eq!(report.tcp.wrong, 0);
}

#[test]
fn an_increment_done_twice_or_never_is_a_wrong_answer() {
    let Some(namespace) = namespace() else { return };
    let (report, _) = run(&namespace, Fault::RepeatIncrement);
    assert_eq!((report.tcp.wrong, report.tcp.failed), (4, 0), "{:?}", report.tcp.faults);
}

#[test]
fn a_spoilt_byte_is_a_wrong_answer() {
    let Some(namespace) = namespace() else { return };
    let (report, _) = run(&namespace, Fault::SpoilBody);
    assert_eq!((report.tcp.wrong, report.tcp.failed), (3, 0), "{:?}", report.tcp.faults);
}

#[test]
fn lost_datagrams_are_counted() {
    let Some(namespace) = namespace() else { return };
    let (report, _) = run(&namespace, Fault::LoseDatagrams);
    assert_eq!(report.udp.sent() - report.udp.lost(), 50);
    assert_eq!(report.tcp.failed, 0);
}

#[test]
fn a_target_that_is_not_there_is_told() {
    let Some(namespace) = namespace() else { return };
    let clients = Clients::start(&namespace, target(), Load::default(), "key:").unwrap();
    let report = clients.stop();
    assert_eq!(report.tcp.broken, 8, "{:?}", report.tcp.faults);
    assert_eq!(report.tcp.requests, 0);
}
