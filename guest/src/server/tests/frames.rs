//! What the guest's frames carry: tags, timestamps, sequence numbers.

use super::*;

#[test]
fn a_guest_on_a_vlan_speaks_and_hears_that_one_only() {
    let mut lab = Lab::new("vlan=5");
    assert!(lab.get("/").starts_with("HTTP/1.1 200"));
    // Full segments, too.
    let answer = lab.exchange(SERVER6, 80, b"GET /file/100000 HTTP/1.0\r\n\r\n", usize::MAX);
    assert!(answer.len() > 100_000);
    assert!(lab.sent.iter().all(|frame| frame[12..16] == [0x81, 0, 0, 5]));
    let heard = lab.sent.len();
    for mut frame in lab.given.clone() {
        frame[15] = 6;
        lab.wires[0].inbound.push_back(frame);
    }
    lab.settle();
    assert_eq!(lab.sent.len(), heard, "nothing is said to another VLAN");
}

#[test]
fn a_connection_has_timestamps_if_both_ends_want_them() {
    let count = |lab: &mut Lab, wants: bool| {
        lab.wants_timestamps = wants;
        lab.sent.clear();
        lab.get("/");
        lab.sent.iter().filter(|frame| has_timestamps(frame)).count()
    };
    let mut lab = Lab::new("timestamps=1");
    // A socket's next connection is another matter.
    for _ in 0..20 {
        assert_eq!(count(&mut lab, false), 0);
        assert!(count(&mut lab, true) >= 2);
    }
    assert_eq!(count(&mut Lab::new(""), true), 0);
}

fn has_timestamps(frame: &[u8]) -> bool {
    let is_tcp = frame[12..14] == [8, 0] && frame[23] == 6;
    let options = || frame[54..34 + usize::from(frame[46] >> 4) * 4].windows(2);
    is_tcp && options().any(|option| option == [8, 10])
}

/// Runs the same clients against a guest; the clocks, the disk and the rx batches are the host's own.
fn frames_of_a_run(tsc: u64, disk_delay: usize, line: &'static str) -> Vec<Vec<u8>> {
    let mut lab = Lab::new(line);
    lab.tsc = tsc;
    lab.disk_delay = disk_delay;
    for _ in 0..20 {
        lab.get("/");
        lab.get("/stats");
        let reply = lab.exchange(SERVER4, 6379, b"INCR n\r\nGET m\r\n", 9);
        assert!(reply.ends_with(b"\r\n$-1\r\n"));
        lab.exchange(SERVER6, 7, b"echo", 4);
    }
    lab.sent
}

#[test]
fn two_guests_with_the_same_input_send_the_same_frames() {
    let one = frames_of_a_run(0, 0, "");
    assert!(one.len() > 150, "{}", one.len());
    assert!(one == frames_of_a_run(12_345_678, 0, ""));
    let skewed = frames_of_a_run(12_345_678, 0, "isn_skew=1");
    assert!(skewed != frames_of_a_run(999, 0, "isn_skew=1"));
    let noisy = frames_of_a_run(12_345_678, 0, "nondeterminism=100");
    assert!(noisy != frames_of_a_run(999, 0, "nondeterminism=100"));
}

#[test]
fn fresh_entropy_changes_the_sequence_numbers_and_is_asked_for() {
    let syn_acks = |mix: bool| {
        let mut lab = Lab::new("");
        if mix {
            lab.server.mix(&[9; 32]);
        }
        for _ in 0..20 {
            lab.get("/");
        }
        assert!(lab.server.wants_seed());
        lab.server.mix(&[1; 32]);
        assert!(!lab.server.wants_seed());
        lab.sent
    };
    assert!(syn_acks(false) == syn_acks(false));
    assert!(syn_acks(false) != syn_acks(true));
}
