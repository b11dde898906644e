//! Pages that have gone quiet are shipped ahead of the stop, and are what they were after a takeover.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use link::status::State;
use tandem::clients::Target;
use tandem::lab::Host;

use crate::load::Work;
use crate::stage::{LIMIT, Setup, Stage, await_fact};

const VALUES: usize = 200;
const VALUE_BYTES: usize = 3_000;
/// Pages of the memory that is touched once.
const TOUCHED: u64 = 8 * 256;

#[test]
fn quiet_pages_are_shipped_ahead_and_a_takeover_finds_them() {
    quiet_pages("1", 1);
}

#[test]
fn pages_take_several_streams_and_a_takeover_finds_them() {
    quiet_pages("4", 4);
}

fn quiet_pages(option: &'static str, streams: u64) {
    let setup = Setup {
        more: vec!["--streams", option],
        ..Setup::default()
    };
    let Some(mut stage) = Stage::new(setup) else {
        return;
    };
    stage.pair(Host::A);
    for host in [Host::A, Host::B] {
        let status = stage.status(host).expect("both answer");
        assert_eq!(status.peer.streams, streams);
    }
    let work = Work::start(&stage, "ahead:");
    store_values(&stage);
    let before = stage.status(Host::A).expect("the primary answers");
    stage.get("/touch/8", LIMIT).expect("memory is touched");
    // A dirtier that goes round slowly: each page is quiet until its next turn.
    stage.get("/set?dirty=4,400,random", LIMIT).expect("the dirtier starts");
    stage.await_status(Host::A, "pages shipped ahead", |status| {
        status.pages_ahead >= before.pages_ahead + TOUCHED / 2
    });
    let part = stage.await_status(Host::A, "a checkpoint with pages shipped ahead", |status| {
        status.last_checkpoint.is_some_and(|last| last.pages_ahead > 0)
    });
    let last = part.last_checkpoint.expect("just seen");
    assert!(last.pages_ahead <= last.pages, "{last:?}");
    let taken = part.checkpoints.total;
    stage.await_status(Host::A, "further checkpoints", |status| {
        status.checkpoints.total >= taken + 3
    });
    work.await_more();

    stage.kill(Host::A);
    stage.await_state(Host::B, State::Alone);
    work.await_more();
    check_values(&stage);
    work.finish(&stage);
}

/// Has the guest remember what [`check_values`] looks for.
pub(crate) fn store_values(stage: &Stage) {
    in_client(stage, |store| {
        (0..VALUES).try_for_each(|number| match store.ask(&["SET", &key(number), &value(number)])? {
            Some(answer) if answer == b"OK" => Ok(()),
            answer => Err(io::Error::other(format!("{answer:?}"))),
        })
    });
}

/// The guest remembers what it was told.
pub(crate) fn check_values(stage: &Stage) {
    let stored = in_client(stage, |store| {
        (0..VALUES)
            .map(|number| store.ask(&["GET", &key(number)]))
            .collect::<io::Result<Vec<_>>>()
    });
    for (number, stored) in stored.into_iter().enumerate() {
        assert!(
            stored.is_some_and(|stored| stored == value(number).as_bytes()),
            "{} has changed",
            key(number)
        );
    }
}

fn key(number: usize) -> String {
    format!("ahead-value-{number}")
}

/// Each is unlike the others, in every part of it.
fn value(number: usize) -> String {
    let mut value = String::new();
    for part in 0_usize.. {
        value.push_str(&format!(
            "{:x}.",
            (number + 1).wrapping_mul(part + 7).wrapping_mul(0x9e37_79b9)
        ));
        if value.len() >= VALUE_BYTES {
            break;
        }
    }
    value
}

/// Lets the client ask the store; a broken connection is tried again.
fn in_client<T: Send + 'static>(stage: &Stage, ask: fn(&mut Store) -> io::Result<T>) -> T {
    let address = Target::bundled().store_address();
    let connect = move || Store::connect(address).and_then(|mut store| ask(&mut store));
    await_fact("the store's answers", || stage.lab.client().run(connect).ok())
}

/// A connection to the guest's key-value store.
struct Store(BufReader<TcpStream>);

impl Store {
    fn connect(address: SocketAddr) -> io::Result<Self> {
        let connection = TcpStream::connect_timeout(&address, LIMIT)?;
        connection.set_read_timeout(Some(LIMIT))?;
        connection.set_nodelay(true)?;
        Ok(Self(BufReader::new(connection)))
    }

    /// Asks, and returns the one string of the answer.
    fn ask(&mut self, words: &[&str]) -> io::Result<Option<Vec<u8>>> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.0.get_mut().write_all(request.as_bytes())?;
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let line = line.trim_end();
        let Some(length) = line.strip_prefix('$') else {
            return Ok(line.strip_prefix('+').map(|text| text.as_bytes().to_vec()));
        };
        let Ok(length) = length.parse::<usize>() else {
            return Ok(None);
        };
        let mut answer = vec![0; length + 2];
        self.0.read_exact(&mut answer)?;
        answer.truncate(length);
        Ok(Some(answer))
    }
}
