//! A guest with several network cards serves the same on each, from addresses of its own.

use super::*;
use crate::world::Dial;

#[test]
fn a_further_card_serves_what_the_first_does() {
    let mut lab = Lab::on_card("", false, 1);
    let server = IpAddress::v4(10, 78, 0, 10);
    let answer = lab.exchange(server, 80, b"GET / HTTP/1.0\r\n\r\n", usize::MAX);
    assert!(
        answer.starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    let server6 = IpAddress::v6(0xfd78, 0, 0, 0, 0, 0, 0, 0x10);
    assert_eq!(lab.exchange(server6, 7, b"echo", 4), b"echo");
    assert!(lab.sent.iter().all(|frame| frame[6..12] == [2, 0, 0, 0, 1, 1]));
    assert!(lab.wires[0].outbound.is_empty(), "nothing of it leaves by the first");
}

#[test]
fn a_card_has_the_addresses_that_were_set_for_it() {
    let mut lab = Lab::on_card("ip.1=10.78.0.99/24 ip.2=none", false, 1);
    let answer = lab.exchange(IpAddress::v4(10, 78, 0, 99), 7, b"echo", 4);
    assert_eq!(answer, b"echo");
}

#[test]
fn connections_outwards_go_by_the_card_whose_network_they_lead_to() {
    for (address, on_the_last) in [("10.78.0.1", true), ("10.77.0.1", false)] {
        let mut lab = Lab::on_card("", false, 1);
        let dial = Dial {
            address: address.parse().unwrap(),
            port: 7,
            count: 1,
        };
        lab.server.world_mut().dials.push(dial);
        lab.settle();
        let asked = |frames: &[Vec<u8>]| frames.iter().any(|frame| frame[12..14] == [8, 6]);
        let first: Vec<_> = lab.wires[0].outbound.iter().cloned().collect();
        assert_eq!(
            (asked(&first), asked(&lab.sent)),
            (!on_the_last, on_the_last),
            "{address}"
        );
    }
}

#[test]
fn one_card_more_leaves_less_for_each() {
    let settings = Settings::default();
    let limits = |cards| Limits::new(&settings, cards, 48 << 20);
    let [one, two] = [1, 2].map(|cards| limits(cards).unwrap());
    assert!(two.side_connections < one.side_connections && two.store < one.store);
    assert!(Limits::new(&settings, 8, 16 << 20).is_err());
}
