//! TAP devices in namespaces of their own, and the kernel behind them.

use super::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// Runs `test` on a thread with a network namespace of its own, which ends with it.
fn in_own_network(test: fn()) {
    let thread = thread::spawn(move || {
        // SAFETY: a new network namespace for this thread changes nothing that other threads rely on.
        let result = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
        let able = result.is_ok() && fs::metadata("/dev/net/tun").is_ok() && run("ip link set lo up");
        if able {
            test();
            return;
        }
        assert!(
            std::env::var_os("TANDEM_REQUIRE_KVM").is_none(),
            "this test needs root, /dev/net/tun and the command ip"
        );
        println!("SKIPPED: this test needs root, /dev/net/tun and the command ip");
    });
    thread.join().unwrap();
}

fn run(command: &str) -> bool {
    let mut words = command.split(' ');
    Command::new(words.next().unwrap())
        .args(words)
        .status()
        .is_ok_and(|status| status.success())
}

/// Sends from the host until the frame comes out at the TAP: its carrier comes up a moment after opening.
fn frame_of(tap: &Tap, text: &[u8], send: impl Fn()) -> Vec<u8> {
    let start = Instant::now();
    let mut frame = vec![0; 2048];
    while start.elapsed() < Duration::from_secs(5) {
        send();
        match tap.recv(&mut frame).unwrap() {
            Some(bytes) if frame[..bytes].ends_with(text) => return frame[..bytes].to_vec(),
            Some(_) => {}
            None => thread::sleep(Duration::from_millis(5)),
        }
    }
    panic!("no such frame within 5 s");
}

#[test]
fn refuses_names_that_no_device_can_have() {
    for name in ["", "sixteen-letters-", "tap%d", "a/b", "two words", "a:b", "..", "ü"] {
        assert!(matches!(Tap::open(name), Err(TapError::Name { .. })), "{name:?}");
    }
}

#[test]
fn refuses_what_is_not_there_or_not_a_tap_and_says_why() {
    in_own_network(|| {
        for name in ["absent0", "lo"] {
            let refused = Tap::open_with_offloads(name).unwrap_err();
            assert_eq!(refused.to_string(), Tap::open(name).unwrap_err().to_string());
        }
        let error = Tap::open("absent0").unwrap_err();
        assert!(matches!(error, TapError::Missing { .. }), "{error:?}");
        assert!(error.to_string().contains("ip tuntap add dev absent0 mode tap"));
        assert!(!run("ip link show absent0"), "a refused device is not created");
        assert!(matches!(Tap::open("lo"), Err(TapError::Kind { .. })));
        assert!(run("ip tuntap add dev tun0 mode tun"));
        assert!(matches!(Tap::open("tun0"), Err(TapError::Kind { .. })));
        assert!(run("ip tuntap add dev tun1 mode tun multi_queue"));
        assert!(matches!(Tap::open("tun1"), Err(TapError::Kind { .. })));
        assert!(run("ip tuntap add dev tap0 mode tap"));
        assert!(matches!(Tap::open("tap0"), Err(TapError::Down { .. })));
    });
}

#[test]
fn one_process_at_a_time() {
    in_own_network(|| {
        assert!(run("ip tuntap add dev tap0 mode tap") && run("ip link set tap0 up"));
        let first = Tap::open("tap0").unwrap();
        assert!(matches!(Tap::open("tap0"), Err(TapError::Busy { .. })));
        drop(first);
        let second = open_when_free("tap0").unwrap();
        assert_eq!(second.name(), "tap0");
    });
}

#[test]
fn one_process_at_a_time_has_a_device_that_was_made_for_several_queues() {
    in_own_network(|| {
        assert!(run("ip tuntap add dev tap0 mode tap multi_queue") && run("ip link set tap0 up"));
        assert!(run("ip tuntap add dev tap1 mode tap multi_queue") && run("ip link set tap1 up"));
        let first = Tap::open("tap0").unwrap();
        for open in [Tap::open as fn(&str) -> _, Tap::open_with_offloads] {
            assert!(matches!(open("tap0"), Err(TapError::Busy { .. })));
        }
        Tap::open("tap1").unwrap();
        drop(first);
        open_when_free("tap0").unwrap();
    });
}

#[test]
fn carries_frames_both_ways_and_drains() {
    in_own_network(|| carries("ip tuntap add dev tap0 mode tap", Tap::open));
}

#[test]
fn a_device_that_was_made_for_several_queues_carries_all_frames_by_one() {
    in_own_network(|| carries("ip tuntap add dev tap0 mode tap multi_queue", Tap::open));
    in_own_network(|| carries("ip tuntap add dev tap0 mode tap multi_queue", Tap::open_with_offloads));
}

/// Has the kernel say something by a device that was made like this, answers, and throws away what follows.
fn carries(made: &str, open: fn(&str) -> Result<Tap, TapError>) {
    for command in [
        made,
        "ip addr add 10.9.9.1/24 dev tap0",
        "ip link set tap0 up",
        "ip neigh add 10.9.9.2 lladdr 02:00:00:00:00:02 dev tap0",
    ] {
        assert!(run(command), "{command}");
    }
    let tap = open("tap0").unwrap();
    let socket = UdpSocket::bind("10.9.9.1:4000").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut frame = frame_of(&tap, b"out and back", || {
        socket.send_to(b"out and back", "10.9.9.2:4000").unwrap();
    });
    // The answer: both ends swapped, which leaves every checksum right.
    for (a, b, bytes) in [(12, 18, 6), (38, 42, 4), (46, 48, 2)] {
        let (left, right) = frame.split_at_mut(b);
        left[a..a + bytes].swap_with_slice(&mut right[..bytes]);
    }
    tap.send(&frame).unwrap();
    let mut text = [0; 64];
    let (bytes, from) = socket.recv_from(&mut text).unwrap();
    assert_eq!(
        (&text[..bytes], from.to_string().as_str()),
        (&b"out and back"[..], "10.9.9.2:4000")
    );

    for port in 4000..4010 {
        socket.send_to(b"stale", ("10.9.9.2", port)).unwrap();
    }
    assert!(tap.drain().unwrap() >= 10);
    assert_eq!(tap.recv(&mut text).unwrap(), None);
}

const BULK: usize = 8 << 20;

/// A kernel with an address on its TAP, in a namespace of its own, that sends or receives in bulk.
fn kernel(own: &'static str, open: fn(&str) -> Result<Tap, TapError>, work: fn()) -> (Tap, thread::JoinHandle<()>) {
    let (ready, tap) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        // SAFETY: a new network namespace for this thread changes nothing that other threads rely on.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        let address = format!("ip addr add {own}/24 dev tap0");
        for command in ["ip tuntap add dev tap0 mode tap", &address, "ip link set tap0 up"] {
            assert!(run(command), "{command}");
        }
        ready.send(open("tap0").unwrap()).unwrap();
        work();
    });
    (tap.recv().unwrap(), thread)
}

fn byte(at: usize) -> u8 {
    (at % 251).to_le_bytes()[0]
}

/// Has one kernel send to another in bulk; returns the longest frame, and how many had no complete checksum.
fn bulk(open: fn(&str) -> Result<Tap, TapError>, offloads: Offloads) -> (usize, usize) {
    let (receiver, received) = kernel("10.9.9.1", open, || {
        let (mut stream, _) = TcpListener::bind("10.9.9.1:4000").unwrap().accept().unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        assert!(
            bytes.iter().copied().eq((0..BULK).map(byte)),
            "what was sent has arrived"
        );
    });
    let (sender, sent) = kernel("10.9.9.2", open, || {
        let bytes: Vec<u8> = (0..BULK).map(byte).collect();
        let start = Instant::now();
        let mut stream = loop {
            match TcpStream::connect("10.9.9.1:4000") {
                Err(error) if start.elapsed() > Duration::from_secs(10) => panic!("{error}"),
                Err(_) => thread::sleep(Duration::from_millis(5)),
                Ok(stream) => break stream,
            }
        };
        stream.write_all(&bytes).unwrap();
    });
    let taps = [&receiver, &sender];
    for tap in taps {
        tap.set_offloads(offloads).unwrap();
    }
    let mut frame = vec![0; 1 << 17];
    let (mut longest, mut partial) = (0, 0);
    while !(received.is_finished() && sent.is_finished()) {
        let mut moved = false;
        for [from, to] in [[0, 1], [1, 0]].map(|pair| pair.map(|index| taps[index])) {
            while let Some(length) = from.recv(&mut frame).unwrap() {
                moved = true;
                longest = longest.max(length);
                partial += usize::from(frame[0] & 1);
                to.send(&frame[..length]).unwrap();
            }
        }
        if !moved {
            thread::sleep(Duration::from_micros(100));
        }
    }
    sent.join().unwrap();
    received.join().unwrap();
    (longest, partial)
}

/// A child that another test is just starting may hold the descriptor until it executes.
fn open_when_free(name: &str) -> Result<Tap, TapError> {
    let start = Instant::now();
    loop {
        match Tap::open(name) {
            Err(TapError::Busy { .. }) if start.elapsed() < Duration::from_secs(5) => thread::yield_now(),
            other => return other,
        }
    }
}

const FRAME: usize = HEADER_BYTES + 1_514;

#[test]
fn case_p10_two_kernels_hand_each_other_64_kib_at_a_time_and_the_bytes_arrive() {
    in_own_network(|| {
        let (longest, partial) = bulk(Tap::open_with_offloads, Offloads::ALL);
        assert!(longest > 60_000 && partial > 0, "{longest} {partial}");
        assert!(longest <= crate::devices::net::FRAME_BYTES_MAX);
    });
}

#[test]
fn case_p10_who_has_not_agreed_to_more_gets_complete_frames() {
    in_own_network(|| {
        // The last one comes after a process that had agreed to all.
        let after_another = |name: &str| {
            Tap::open_with_offloads(name)?.set_offloads(Offloads::ALL).unwrap();
            open_when_free(name)
        };
        for open in [Tap::open as fn(&str) -> _, Tap::open_with_offloads, after_another] {
            assert_eq!(bulk(open, Offloads::NONE), (FRAME, 0));
        }
        let checksums = Offloads {
            checksum: true,
            ..Offloads::NONE
        };
        let (longest, partial) = bulk(Tap::open_with_offloads, checksums);
        assert!(longest == FRAME && partial > 0, "{longest} {partial}");
    });
}

#[test]
fn case_p10_a_plain_tap_neither_takes_nor_hands_over_what_another_process_had_agreed_to() {
    in_own_network(|| {
        assert!(run("ip tuntap add dev tap0 mode tap") && run("ip link set tap0 up"));
        let first = Tap::open_with_offloads("tap0").unwrap();
        first.set_offloads(Offloads::ALL).unwrap();
        drop(first);
        let second = open_when_free("tap0").unwrap();
        second.set_offloads(Offloads::NONE).unwrap();
        let refused = second.set_offloads(Offloads::ALL).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
        let mut frame = vec![0; FRAME];
        frame[0] = 1;
        assert_eq!(second.send(&frame).unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert_eq!(
            second.send(&frame[..5]).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        frame[0] = 0;
        second.send(&frame).unwrap();
    });
}
