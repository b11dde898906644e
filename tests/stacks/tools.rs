//! Other people's clients and servers, and what Wireshark says of the frames. The script `tools.sh` installs them.

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use checkpoint::Duration as Span;
use guest::content;
use link::pcapng;

use crate::clients;
use crate::segment::Kind;
use crate::services::HTTP;
use crate::stage::{Ip, LIMIT, Setup, Stage, Timestamps};
use crate::switch::{Conditions, Moment};

const CONDITIONS: Conditions = Conditions {
    seed: 5,
    lost: 0,
    repeated: 0,
    overtaken: 0,
    delay: Span::from_millis(5),
    vlans: &[],
};

/// What a client of theirs does against both hosts' servers.
fn stage(captures: Option<&Path>) -> Option<Stage> {
    stage_of(CONDITIONS, captures)
}

fn stage_of(conditions: Conditions, captures: Option<&Path>) -> Option<Stage> {
    if !are_installed() {
        return None;
    }
    Stage::new(&Setup {
        conditions,
        timestamps: Timestamps::Apart,
        captures: captures.map(Path::to_owned),
        ..Setup::default()
    })
}

fn are_installed() -> bool {
    let are = std::env::var_os("STACKS_TOOLS").is_some();
    if !are {
        eprintln!("LEFT OUT: set STACKS_TOOLS, or call tests/stacks/run, which installs the programs that it needs");
    }
    are
}

/// A server on each host; dropping it ends it.
struct Servers(Vec<Child>);

impl Servers {
    /// Starts them, and waits until they accept connections.
    fn start(stage: &Stage, port: u16, words: &[&str]) -> Self {
        let mut servers = Self(Vec::new());
        for host in stage.hosts() {
            servers
                .0
                .push(host.spawn(command(words)).expect("tools.sh installs it"));
            host.thread("probe", move || {
                let start = Instant::now();
                while TcpStream::connect(("127.0.0.1", port)).is_err() {
                    assert!(start.elapsed() < LIMIT, "the server does not accept");
                    sleep(Duration::from_millis(10));
                }
            })
            .map(|probe| probe.join().expect("the server accepts"))
            .expect("a thread can be started");
        }
        servers
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for server in &mut self.0 {
            // It may have ended.
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Runs a client to its end and returns what it says.
fn client(stage: &Stage, words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
    let ended = stage.client(move || Command::new(&words[0]).args(&words[1..]).output());
    let ended = ended.expect("tools.sh installs it");
    let told = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{}: {told}", ended.status);
    String::from_utf8_lossy(&ended.stdout).into_owned()
}

#[test]
fn curl() {
    let Some(stage) = stage(None) else { return };
    let folder = tempfile::tempdir().expect("a folder can be made");
    for (number, host) in ["10.77.0.2", "[fd77::2]"].into_iter().enumerate() {
        let to = folder.path().join(number.to_string());
        let to = to.to_str().expect("a name of letters");
        let url = format!("http://{host}:{HTTP}");
        let one = format!("{url}/1000");
        let all = [
            "curl",
            "-sSf",
            "-o",
            to,
            &one,
            "-o",
            to,
            &one,
            "-o",
            to,
            &format!("{url}/3000000"),
        ];
        client(&stage, &all);
        let (mut got, mut wanted) = (Vec::new(), vec![0; 3_000_000]);
        fs::File::open(to)
            .and_then(|mut file| file.read_to_end(&mut got))
            .expect("curl writes it");
        content::fill(0, &mut wanted);
        assert!(got == wanted, "curl heard other bytes");
    }
    stage.agreed();
}

#[test]
fn redis() {
    let Some(stage) = stage(None) else { return };
    let words = [
        "redis-server",
        "--save",
        "",
        "--protected-mode",
        "no",
        "--bind",
        "*",
        "-::*",
    ];
    let _servers = Servers::start(&stage, 6_379, &words);
    // Of different connections' commands the two hosts may choose the order: none of these depends on others.
    for host in ["10.77.0.2", "fd77::2"] {
        let told = client(
            &stage,
            &[
                "redis-benchmark",
                "-h",
                host,
                "-n",
                "1500",
                "-c",
                "10",
                "-q",
                "-t",
                "ping,set,get",
            ],
        );
        assert!(told.contains("GET"), "{told}");
    }
    stage.agreed();
}

#[test]
fn dns() {
    let Some(stage) = stage(None) else { return };
    let words = [
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--pid-file=",
        "--user=root",
        "--no-resolv",
        "--no-hosts",
        "--host-record=pair.example,192.0.2.7,2001:db8::7",
    ];
    let _servers = Servers::start(&stage, 53, &words);
    for (server, transport) in [
        ("@10.77.0.2", "+notcp"),
        ("@10.77.0.2", "+tcp"),
        ("@fd77::2", "+notcp"),
        ("@fd77::2", "+tcp"),
    ] {
        for (kind, address) in [("A", "192.0.2.7\n"), ("AAAA", "2001:db8::7\n")] {
            let told = client(&stage, &["dig", "+short", transport, server, "pair.example", kind]);
            assert_eq!(told, address, "{server} {transport} {kind}");
        }
    }
    stage.agreed();
}

#[test]
fn what_ssh_says_differs_from_the_key_exchange_on() {
    let Some(stage) = stage(None) else { return };
    let folder = tempfile::tempdir().expect("a folder can be made");
    let path = |name: &str| folder.path().join(name).to_str().expect("a name of letters").to_owned();
    let key = path("key");
    let made = command(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", &key]).status();
    assert!(made.expect("tools.sh installs it").success());
    // Without it sshd does not start.
    fs::create_dir_all("/run/sshd").expect("a folder can be made");
    let keys = format!("AuthorizedKeysFile={key}.pub");
    let words = [
        "/usr/sbin/sshd",
        "-D",
        "-f",
        "/dev/null",
        "-p",
        "22",
        "-h",
        &key,
        "-o",
        "PidFile=none",
        "-o",
        "StrictModes=no",
        "-o",
        "PermitRootLogin=yes",
        "-o",
        &keys,
    ];
    let _servers = Servers::start(&stage, 22, &words);
    let told = client(
        &stage,
        &[
            "ssh",
            "-F",
            "/dev/null",
            "-i",
            &key,
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "root@10.77.0.2",
            "seq 1000 | cksum",
        ],
    );
    // The session goes on, by the primary alone.
    assert_eq!(told, "1830648734 3893\n");
    let told = stage.switch.tell();
    assert!(told.divergences[0].contains("10.77.0.2:22"), "{:?}", told.divergences);
}

#[test]
fn what_differs_is_seen() {
    let Some(stage) = stage(None) else { return };
    let _servers = Servers::start(&stage, 5_201, &["iperf3", "-s"]);
    // Its servers tell what processor time they used.
    client(&stage, &["iperf3", "-c", "10.77.0.2", "-n", "4M", "-R"]);
    let told = stage.switch.tell();
    assert!(told.divergences[0].contains("10.77.0.2:5201"), "{:?}", told.divergences);
}

/// What is wrong with a frame by itself.
const BROKEN: [&str; 2] = [
    "tcp.checksum.status == 0 || udp.checksum.status == 0 || ip.checksum.status == 0",
    "_ws.malformed",
];

#[test]
fn wireshark_misses_nothing_and_finds_nothing_broken() {
    // On bad wires what is said again may leave in two steps, the second of which says all of it.
    for (lost, repeats) in [
        (0, &["tcp.analysis.out_of_order", "tcp.analysis.retransmission"][..]),
        (20, &[]),
    ] {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let conditions = Conditions {
            lost,
            overtaken: lost / 2,
            ..CONDITIONS
        };
        {
            let Some(stage) = stage_of(conditions, Some(folder.path())) else {
                return;
            };
            stage.client(move || {
                for ip in [Ip::V4, Ip::V6] {
                    clients::echo(ip, 30);
                    clients::download(ip, 1 << 20, |_| {});
                    clients::upload(ip, 1 << 20);
                    if lost == 0 {
                        clients::is_reset(ip);
                    }
                    clients::datagrams(ip, 20, 1_400);
                }
            });
            stage.agreed();
        }
        let streams = [
            "tcp.analysis.lost_segment",
            "tcp.analysis.ack_lost_segment",
            "tcp.analysis.reused_ports",
        ];
        for anomaly in streams.iter().chain(repeats).chain(&BROKEN) {
            let count = |file: &str| found(&folder.path().join(file), anomaly);
            let (alone, released) = (count("alone.pcap"), count("released.pcap"));
            let told = format!("{lost} ‰ lost, {anomaly}: {released} released, {alone} of the primary alone");
            println!("{told}");
            assert!(released <= alone, "{told}");
        }
    }
}

#[test]
fn wireshark_finds_nothing_broken_in_what_leaves_over_a_takeover() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    {
        let Some(stage) = stage(Some(folder.path())) else {
            return;
        };
        stage.switch.take_over(Moment::Left(Kind::Data));
        stage.client(|| {
            for ip in [Ip::V4, Ip::V6] {
                clients::download(ip, 1 << 20, |_| {});
                clients::upload(ip, 1 << 20);
                clients::datagrams(ip, 20, 4_000);
            }
        });
        assert!(stage.agreed().taken_over);
    }
    for anomaly in BROKEN
        .iter()
        .chain(&["tcp.analysis.ack_lost_segment", "tcp.analysis.reused_ports"])
    {
        let released = found(&folder.path().join("released.pcap"), anomaly);
        assert_eq!(released, 0, "{anomaly}");
    }
}

#[test]
fn wireshark_shows_where_a_captured_packet_was_seen_and_why_it_left() {
    if !are_installed() {
        return;
    }
    let mut capture = Vec::new();
    pcapng::section(&mut capture, "tandem");
    for place in ["primary", "secondary", "released"] {
        pcapng::interface(&mut capture, place, "what was seen there");
    }
    let frame = [&[0xff; 12][..], &[0x08, 0x06], &[7; 46]].concat();
    for (interface, comment) in [(0, "epoch 7"), (1, "epoch 7, équal"), (2, "equal on both sides")] {
        let packet = pcapng::Packet {
            interface,
            time: 1_700_000_000_123_456_789 + u64::from(interface),
            frame: &frame,
            comment,
            lost: u64::from(interface),
        };
        pcapng::packet(&mut capture, &packet);
    }
    pcapng::statistics(&mut capture, 2, 1_700_000_001_000_000_000, 3, 1, "1 packet is missing");
    let folder = tempfile::tempdir().expect("a folder can be made");
    let file = folder.path().join("capture.pcapng");
    fs::write(&file, capture).expect("the disk has room");
    let mut tshark = Command::new("tshark");
    tshark.arg("-r").arg(&file).args(["-T", "fields"]);
    for field in ["frame.interface_name", "frame.time_epoch", "frame.len", "frame.comment"] {
        tshark.args(["-e", field]);
    }
    let ended = tshark.output().expect("tools.sh installs it");
    let (told, trouble) = (
        String::from_utf8_lossy(&ended.stdout),
        String::from_utf8_lossy(&ended.stderr),
    );
    assert!(ended.status.success(), "{trouble}");
    assert_eq!(
        told,
        "primary\t1700000000.123456789\t60\tepoch 7\n\
         secondary\t1700000000.123456790\t60\tepoch 7, équal\n\
         released\t1700000000.123456791\t60\tequal on both sides\n"
    );
}

/// Returns how many frames of a capture Wireshark finds something about.
fn found(capture: &Path, anomaly: &str) -> usize {
    let mut tshark = Command::new("tshark");
    tshark.arg("-r").arg(capture).args(["-Y", anomaly]);
    for check in [
        "tcp.check_checksum:TRUE",
        "udp.check_checksum:TRUE",
        "ip.check_checksum:TRUE",
    ] {
        tshark.args(["-o", check]);
    }
    let ended = tshark.output().expect("tools.sh installs it");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    String::from_utf8_lossy(&ended.stdout).lines().count()
}
