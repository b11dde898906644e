//! The primary's host is cut off in each phase of a connection; the client goes on with the other stack and notices nothing.

use std::thread::{scope, sleep};
use std::time::Duration;

use checkpoint::Duration as Span;
use machine::offload::Offloads;

use crate::clients;
use crate::segment::Kind;
use crate::services::Style;
use crate::stage::{Ip, Setup, Stage, Timestamps, end};
use crate::switch::{Conditions, Moment};

const LENGTH: u64 = 1 << 20;

/// Has a client do something, with the primary's host cut off at a moment of it, under all kinds of addresses.
fn taken_over(moment: Moment, client: fn(Ip)) {
    for (number, (ip, vlans)) in [(Ip::V4, &[][..]), (Ip::V6, &[]), (Ip::V4, &[7]), (Ip::V6, &[100, 7])]
        .into_iter()
        .enumerate()
    {
        let conditions = Conditions {
            seed: number as u64,
            delay: Span::from_millis(4),
            vlans,
            ..Conditions::default()
        };
        let setup = Setup {
            conditions,
            timestamps: [Timestamps::Apart, Timestamps::Alike][number / 2],
            // Half of them leave to the network what they can.
            offloads: [[Offloads::ALL, Offloads::NONE][number % 2]; 3],
            ..Setup::default()
        };
        let Some(stage) = Stage::new(&setup) else { return };
        stage.switch.take_over(moment);
        stage.client(move || {
            client(ip);
            clients::echo(ip, 5);
        });
        assert!(stage.agreed().taken_over, "{moment:?} has come");
    }
}

fn downloads(ip: Ip) {
    clients::download(ip, LENGTH, |_| {});
}

fn downloads_half_closed(ip: Ip) {
    clients::download_half_closed(ip, LENGTH, |_| {});
}

fn is_called(ip: Ip) {
    let (asks, stream) = clients::called(ip, 30_001, 40_001);
    clients::use_call(asks, stream);
}

#[test]
fn before_the_answer_to_a_syn() {
    taken_over(Moment::Sent(Kind::SynAck), downloads);
}

#[test]
fn after_the_answer_to_a_syn() {
    taken_over(Moment::Left(Kind::SynAck), downloads);
}

#[test]
fn while_bytes_are_sent() {
    taken_over(Moment::Left(Kind::Data), downloads);
}

#[test]
fn while_one_direction_is_closed() {
    taken_over(Moment::Left(Kind::Data), downloads_half_closed);
}

#[test]
fn before_the_end() {
    taken_over(Moment::Sent(Kind::Fin), downloads);
}

#[test]
fn after_the_end() {
    taken_over(Moment::Left(Kind::Fin), downloads_half_closed);
}

#[test]
fn before_the_server_calls() {
    taken_over(Moment::Sent(Kind::Syn), is_called);
}

#[test]
fn after_the_server_has_called() {
    taken_over(Moment::Left(Kind::Syn), is_called);
}

#[test]
fn at_any_moment_of_many_connections() {
    for (delay, wait) in [(1, 50), (20, 200), (5, 130)] {
        let conditions = Conditions {
            seed: wait,
            lost: 5,
            delay: Span::from_millis(delay),
            ..Conditions::default()
        };
        let setup = Setup {
            conditions,
            timestamps: Timestamps::Apart,
            style: Style::Whole,
            ..Setup::default()
        };
        let Some(stage) = Stage::new(&setup) else { return };
        let clients = stage.start_client(|| {
            scope(|scope| {
                for ip in [Ip::V4, Ip::V6] {
                    scope.spawn(move || (0..20).for_each(|_| clients::echo(ip, 14)));
                    scope.spawn(move || downloads(ip));
                    scope.spawn(move || clients::upload(ip, LENGTH));
                    scope.spawn(move || clients::echo_flood(ip, LENGTH));
                }
            });
        });
        sleep(Duration::from_millis(wait));
        stage.switch.take_over(Moment::Now);
        end(clients);
        assert!(stage.agreed().taken_over);
    }
}
