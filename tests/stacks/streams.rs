//! What clients do while both hosts live: the two must agree on all of it, whatever the wires do.

use std::thread::{scope, sleep};
use std::time::Duration;

use checkpoint::Duration as Span;
use machine::offload::Offloads;
use proxy::Traffic;

use crate::clients;
use crate::services::{ECHO, PATIENT, Style};
use crate::stage::{Ip, Setup, Stage, Timestamps, set};
use crate::switch::Conditions;

const BOTH: [Ip; 2] = [Ip::V4, Ip::V6];
const MEBI: u64 = 1 << 20;

fn stage(timestamps: Timestamps, conditions: Conditions) -> Option<Stage> {
    Stage::new(&Setup {
        conditions,
        timestamps,
        ..Setup::default()
    })
}

/// A stage whose programs hand over their bytes alike. A stack that may send one small segment only waits for its
/// acknowledgement, and the other's larger one, which has those bytes and more, waits for the rest of them.
fn alike(conditions: Conditions) -> Option<Stage> {
    Stage::new(&Setup {
        conditions,
        timestamps: Timestamps::Apart,
        style: Style::Whole,
        ..Setup::default()
    })
}

fn delayed(milliseconds: u64) -> Conditions {
    Conditions {
        seed: 1,
        delay: Span::from_millis(milliseconds),
        ..Conditions::default()
    }
}

/// Everything, once.
fn all_kinds(ip: Ip, bulk: u64) {
    clients::is_reset(ip);
    kinds_that_outlive_loss(ip, bulk);
}

/// The same without what is said once only: a reset by the server.
fn kinds_that_outlive_loss(ip: Ip, bulk: u64) {
    clients::echo(ip, 30);
    clients::download(ip, bulk, |_| {});
    clients::upload(ip, bulk);
    clients::echo_flood(ip, bulk);
    clients::download_half_closed(ip, bulk / 4, |_| {});
    clients::datagrams(ip, 50, 1_400);
    clients::resets(ip);
    clients::is_refused(ip);
    let (asks, stream) = clients::called(ip, 30_001, 40_001);
    clients::use_call(asks, stream);
}

#[test]
fn two_hosts_agree_on_all_kinds_of_traffic() {
    for timestamps in [Timestamps::Off, Timestamps::Alike, Timestamps::Apart] {
        let Some(stage) = stage(timestamps, delayed(2)) else {
            return;
        };
        stage.client(|| BOTH.map(|ip| all_kinds(ip, 2 * MEBI)));
        let told = stage.agreed();
        assert!(
            told.counters.total().matched > 1_000,
            "frames are compared, and leave by a match"
        );
    }
}

#[test]
fn a_slow_secondary_costs_time_and_nothing_else() {
    let Some(stage) = stage(Timestamps::Apart, delayed(50)) else {
        return;
    };
    stage.client(|| BOTH.map(|ip| all_kinds(ip, MEBI / 8)));
    stage.agreed();
}

#[test]
fn lost_repeated_and_overtaking_frames_are_no_difference() {
    for seed in 0..2 {
        let conditions = Conditions {
            seed,
            lost: 20,
            repeated: 10,
            overtaken: 20,
            delay: Span::from_millis(1 + 7 * seed),
            vlans: &[],
        };
        let Some(stage) = stage(Timestamps::Apart, conditions) else {
            return;
        };
        stage.client(|| BOTH.map(|ip| kinds_that_outlive_loss(ip, MEBI / 4)));
        let told = stage.agreed();
        assert!(told.harmed > 20, "the wire does what it is told to");
    }
}

#[test]
fn datagrams_in_fragments_are_compared_as_wholes() {
    for vlans in [&[][..], &[7]] {
        for (lost, longest) in [(0, 9_000), (20, 4_000)] {
            let conditions = Conditions {
                seed: 3,
                lost,
                overtaken: lost,
                vlans,
                ..delayed(2)
            };
            let Some(stage) = stage(Timestamps::Off, conditions) else {
                return;
            };
            stage.client(move || BOTH.map(|ip| clients::datagrams(ip, 60, longest)));
            let told = stage.agreed();
            let fragments = told.counters.of(Traffic::Fragments);
            assert!(fragments.matched > 100, "{fragments:?}");
        }
    }
}

#[test]
fn vlans_are_no_difference() {
    for vlans in [&[7][..], &[100, 7]] {
        let conditions = Conditions { vlans, ..delayed(2) };
        let Some(stage) = stage(Timestamps::Alike, conditions) else {
            return;
        };
        stage.client(|| BOTH.map(|ip| all_kinds(ip, MEBI / 4)));
        stage.agreed();
    }
}

/// Long segments of one stack, and those of Ethernet's length of the other, are one stream; whichever is the longer leaves.
#[test]
fn case_p10_what_is_left_to_the_network_is_no_difference() {
    let checksums = Offloads {
        checksum: true,
        ..Offloads::NONE
    };
    for (primary, secondary, client, vlans) in [
        (Offloads::ALL, Offloads::ALL, Offloads::ALL, &[][..]),
        (Offloads::ALL, Offloads::NONE, Offloads::ALL, &[]),
        (Offloads::NONE, Offloads::ALL, Offloads::NONE, &[100, 7]),
        (Offloads::ALL, checksums, Offloads::ALL, &[7]),
    ] {
        let stage = Stage::new(&Setup {
            conditions: Conditions { vlans, ..delayed(2) },
            timestamps: Timestamps::Apart,
            offloads: [primary, secondary, client],
            ..Setup::default()
        });
        let Some(stage) = stage else { return };
        stage.client(|| BOTH.map(|ip| all_kinds(ip, 4 * MEBI)));
        let told = stage.agreed();
        assert_eq!(told.longest > 30_000, primary.tcp4, "{} bytes", told.longest);
    }
}

#[test]
fn case_p10_long_segments_outlive_loss() {
    for seed in 0..2 {
        let stage = Stage::new(&Setup {
            conditions: Conditions {
                seed,
                lost: 20,
                repeated: 10,
                overtaken: 20,
                delay: Span::from_millis(3),
                vlans: &[],
            },
            timestamps: Timestamps::Apart,
            offloads: [
                Offloads::ALL,
                [Offloads::ALL, Offloads::NONE][usize::from(seed > 0)],
                Offloads::ALL,
            ],
            ..Setup::default()
        });
        let Some(stage) = stage else { return };
        stage.client(|| BOTH.map(|ip| kinds_that_outlive_loss(ip, MEBI)));
        let told = stage.agreed();
        assert!(
            told.harmed > 20 && told.longest > 1_600,
            "{} {}",
            told.harmed,
            told.longest
        );
    }
}

#[test]
fn many_short_connections_at_once() {
    let Some(stage) = stage(Timestamps::Alike, delayed(5)) else {
        return;
    };
    stage.client(|| {
        scope(|scope| {
            for worker in 0..8 {
                scope.spawn(move || {
                    for _ in 0..50 {
                        clients::echo(BOTH[worker % 2], 3);
                    }
                });
            }
        });
    });
    stage.agreed();
}

#[test]
fn an_idle_connection_is_asked_after() {
    let Some(stage) = stage(Timestamps::Apart, delayed(10)) else {
        return;
    };
    stage.client(|| {
        let mut idle = BOTH.map(|ip| clients::connect(ip.server(PATIENT)));
        for round in 0..3 {
            idle.iter_mut().for_each(|stream| clients::exchange(stream, round, 100));
            sleep(Duration::from_millis(1_300));
        }
        idle.into_iter().for_each(clients::close);
    });
    stage.agreed();
}

#[test]
fn a_window_that_closes_opens_again() {
    let Some(stage) = alike(delayed(10)) else {
        return;
    };
    stage.client(|| {
        let mut stops = [MEBI, 12 * MEBI].into_iter().peekable();
        clients::download(Ip::V4, 16 * MEBI, |heard| {
            if stops.next_if(|stop| heard >= *stop).is_some() {
                sleep(Duration::from_millis(1_500));
            }
        });
    });
    stage.agreed();
}

#[test]
fn a_call_from_another_port_is_seen_for_what_it_is() {
    let Some(stage) = alike(delayed(5)) else {
        return;
    };
    // What the kernels choose from has nothing in common.
    for (host, range) in stage.hosts().iter().zip(["30000 34999", "35000 39999"]) {
        set(host, "ipv4/ip_local_port_range", range);
    }
    stage.client(|| {
        let (asks, stream) = clients::called(Ip::V4, 0, 40_001);
        clients::use_call(asks, stream);
    });
    let told = stage.switch.tell();
    let [divergence] = &told.divergences[..] else {
        panic!("one divergence, and the primary goes on alone: {told:?}");
    };
    // Not that something had waited for too long.
    assert!(divergence.starts_with("opened from port "), "{divergence}");
}

#[test]
fn connections_go_on_across_commits() {
    let Some(stage) = stage(Timestamps::Apart, delayed(5)) else {
        return;
    };
    let mut streams = stage.client(|| BOTH.map(|ip| clients::connect(ip.server(ECHO))));
    for round in 0..4 {
        streams = stage.client(move || {
            for stream in &mut streams {
                clients::exchange(stream, round * 50_000, 50_000);
            }
            streams
        });
        stage.switch.commit();
    }
    stage.client(|| streams.into_iter().for_each(clients::close));
    let told = stage.agreed();
    assert_eq!(told.commits, 4);
}
