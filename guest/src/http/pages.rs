//! What is served at which path.
//!
//! | path | what |
//! |---|---|
//! | `/` | a static page |
//! | `/file/N` | N bytes of [`crate::content`], up to 1 GiB |
//! | `/stats` | counters, as JSON; with `?time=1` also what depends on time |
//! | `/nd` | time and noise: different on each host |
//! | `/set?nondeterminism=N` | share of answers that carry noise, in permille |
//! | `/set?dirty=MiB,rate,pattern[,order]` or `off` | the memory dirtier |
//! | `/set?connect=IP:PORT,N` | opens N connections, sends a line on each, expects it back |
//! | `/touch/N` | writes N MiB of memory once, then answers |
//! | `/write/N,pattern[,differ]` | writes a pattern into N pages once, then answers; with `differ`, another on each host |
//! | `/poweroff`, `/reset` | ends or restarts the guest |

use alloc::format;
use alloc::string::String;

use core::net::SocketAddr;

use crate::clock::Moment;
use crate::kv::Status;
use crate::settings;
use crate::world::{Dial, Power, World};

const FILE_MAX: u64 = 1 << 30;
const DIALS_MAX: u32 = 10_000;
const DIAL_WISHES_MAX: usize = 64;
const OK: &str = "200 OK";
const PAGE: &str = "<!doctype html>\n<title>Tandem</title>\n<h1>Tandem</h1>\n\
                    <p>This page comes from a virtual machine that outlives its host.</p>\n";

/// An answer, before its headers are written.
pub(super) struct Answer {
    pub(super) status: &'static str,
    pub(super) kind: &'static str,
    pub(super) body: Body,
}

/// The body of an answer.
pub(super) enum Body {
    Text(String),
    /// So many bytes of content.
    File(u64),
    /// Not yet: the answer follows when the touch is done.
    WhenTouched,
}

impl Answer {
    pub(super) fn text(status: &'static str, text: String) -> Self {
        Self {
            status,
            kind: "text/plain",
            body: Body::Text(text),
        }
    }
}

/// Whether the `number`th answer (from 1) is one of the evenly spread `permille` of all.
pub(super) fn is_chosen(number: u64, permille: u16) -> bool {
    let chosen_until = |number: u64| number * u64::from(permille) / 1000;
    chosen_until(number) != chosen_until(number.saturating_sub(1))
}

pub(super) fn touched() -> Answer {
    Answer::text(OK, "touched\n".into())
}

pub(super) fn answer(world: &mut World, now: Moment, target: &str) -> Answer {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    match path {
        "/" => Answer {
            status: OK,
            kind: "text/html",
            body: Body::Text(PAGE.into()),
        },
        "/stats" => stats(world, now, query == "time=1"),
        "/nd" => Answer::text(OK, format!("{:016x} {:016x}\n", now.ns, now.tsc)),
        "/set" => set(world, now, query),
        "/poweroff" => power(world, Power::Off),
        "/reset" => power(world, Power::Reset),
        _ => match path.strip_prefix("/file/") {
            Some(bytes) => file(bytes),
            None => match (path.strip_prefix("/touch/"), path.strip_prefix("/write/")) {
                (Some(mib), _) => touch(world, mib),
                (None, Some(what)) => write(world, now, what),
                (None, None) => Answer::text("404 Not Found", "there is no such page\n".into()),
            },
        },
    }
}

fn bad(why: String) -> Answer {
    Answer::text("400 Bad Request", why)
}

fn file(bytes: &str) -> Answer {
    match bytes.parse() {
        Ok(bytes @ 0..=FILE_MAX) => Answer {
            status: OK,
            kind: "application/octet-stream",
            body: Body::File(bytes),
        },
        _ => bad(format!("a file's size is a number of bytes up to {FILE_MAX}\n")),
    }
}

fn touch(world: &mut World, mib: &str) -> Answer {
    let Ok(mib) = mib.parse() else {
        return bad("the size to touch is a number of MiB\n".into());
    };
    match world.touch.start(&world.arena, mib) {
        Ok(()) => when_touched(),
        Err(available) => bad(format!("only {available} MiB can be touched on this machine\n")),
    }
}

fn write(world: &mut World, now: Moment, what: &str) -> Answer {
    let mut words = what.split(',');
    let pages = words.next().and_then(|pages| pages.parse().ok());
    let pattern = words.next().and_then(settings::pattern);
    let noise = match words.next() {
        None => Some(0),
        Some("differ") => Some(now.tsc),
        Some(_) => None,
    };
    let (Some(pages), Some(pattern), Some(noise), None) = (pages, pattern, noise, words.next()) else {
        return bad("expected /write/pages,zero|sparse|run|runs|text|random[,differ]\n".into());
    };
    match world.touch.start_pattern(&world.arena, pages, pattern, noise) {
        Ok(()) => when_touched(),
        Err(available) => bad(format!("only {available} pages can be written now\n")),
    }
}

fn when_touched() -> Answer {
    Answer {
        status: OK,
        kind: "text/plain",
        body: Body::WhenTouched,
    }
}

fn power(world: &mut World, power: Power) -> Answer {
    world.power = Some(power);
    Answer::text(OK, "as you wish\n".into())
}

fn set(world: &mut World, now: Moment, query: &str) -> Answer {
    let Some((key, value)) = query.split_once('=') else {
        return bad("expected /set?key=value with key nondeterminism, dirty or connect\n".into());
    };
    let outcome = match key {
        "nondeterminism" => settings::permille(value)
            .map(|share| world.settings.nondeterminism = share)
            .ok_or_else(|| "expected a permille from 0 to 1000\n".into()),
        "dirty" => settings::dirty(value)
            .ok_or_else(|| format!("expected {}\n", settings::EXPECTED_DIRTY))
            .and_then(|dirty| {
                let outcome = world.dirtier.set(dirty, &world.arena, now.ns);
                outcome.map_err(|available| format!("the working set can have {available} MiB on this machine\n"))
            }),
        "connect" => connect(world, value),
        _ => Err("the keys are nondeterminism, dirty and connect\n".into()),
    };
    match outcome {
        Ok(()) => Answer::text(OK, "ok\n".into()),
        Err(why) => bad(why),
    }
}

fn connect(world: &mut World, value: &str) -> Result<(), String> {
    let dial = value.rsplit_once(',').and_then(|(to, count)| {
        let to: SocketAddr = to.parse().ok()?;
        let count = count.parse().ok().filter(|count| (1..=DIALS_MAX).contains(count))?;
        (to.port() != 0 && !to.ip().is_unspecified()).then(|| Dial {
            address: to.ip(),
            port: to.port(),
            count,
        })
    });
    let dial = dial.ok_or_else(|| format!("expected IP:PORT,N with N from 1 to {DIALS_MAX}\n"))?;
    if world.dials.len() >= DIAL_WISHES_MAX {
        return Err("too many connections are still to be opened: try again later\n".into());
    }
    world.counters.dials_asked += u64::from(dial.count);
    world.dials.push(dial);
    Ok(())
}

fn stats(world: &World, now: Moment, with_time: bool) -> Answer {
    let counters = &world.counters;
    let kv = &world.kv;
    let store = match kv.status() {
        Status::Loading => "loading",
        Status::Ready => "ready",
        Status::ReadOnly(_) => "read-only",
        Status::Failed(_) => "failed",
    };
    let mut text = format!(
        "{{\"requests\":{},\"commands\":{},\"accepted\":{},\"echo_bytes\":{},\"discard_bytes\":{},\"udp_echo\":{},\
         \"udp_discard\":{},\"nondeterminism\":{},\"dirty\":{},\
         \"store\":{{\"state\":\"{store}\",\"keys\":{},\"used\":{},\"limit\":{}}},\
         \"outgoing\":{{\"asked\":{},\"opened\":{},\"echoed\":{},\"failed\":{}}}",
        counters.http_requests,
        counters.redis_commands,
        counters.accepted,
        counters.echo_bytes,
        counters.discard_bytes,
        counters.udp_echo,
        counters.udp_discard,
        world.settings.nondeterminism,
        world.dirtier.dirty().is_some(),
        kv.keys(),
        kv.used(),
        kv.limit(),
        counters.dials_asked,
        counters.dials_opened,
        counters.dials_echoed,
        counters.dials_failed,
    );
    if with_time {
        let (batches, compactions) = kv.commits();
        text.push_str(&format!(
            ",\"time\":{{\"uptime_ns\":{},\"wall_ns\":{},\"tsc\":{},\"pages_dirtied\":{},\"touching\":{},\
             \"arena_mib\":{},\"batches\":{batches},\"compactions\":{compactions}}}",
            now.ns,
            now.wall_ns,
            now.tsc,
            world.dirtier.written(),
            !world.touch.is_done(),
            world.arena.pages() / crate::dirtier::PAGES_PER_MIB,
        ));
    }
    text.push_str("}\n");
    Answer {
        status: OK,
        kind: "application/json",
        body: Body::Text(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_share_is_even_and_exact() {
        for permille in [0, 1, 50, 333, 1000] {
            let chosen = (1..=1000).filter(|number| is_chosen(*number, permille)).count();
            assert_eq!(chosen, usize::from(permille));
        }
        assert!(!is_chosen(1, 500) && is_chosen(2, 500) && !is_chosen(3, 500));
    }
}
