//! Two ends of a link on one host, honest and otherwise.

#![allow(clippy::unwrap_used, reason = "a test that meets the unexpected fails")]

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use bytes::Bytes;
use checkpoint::cpu::CpuModel;
use checkpoint::wire::{
    Attach, DiskWrite, GoodbyeReason, Heartbeat, Held, Hello, Input, MachineShape, Message, PageBatch, Refusal,
    Session, Welcome, encode_into,
};
use checkpoint::{InputNumber, Instant, Nic, Tag};
use link::{
    CloseCause, ConnectError, Established, Events, Link, LinkEvent, ListenError, Listener, Which, clock, connect,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(20);
const STREAMS: u32 = 3;
const HEARTBEAT: Message = Message::Heartbeat(Heartbeat {
    sent: Instant(1),
    echo: Instant(2),
});

fn hello(node: &str) -> Hello {
    Hello {
        pair: "shop".into(),
        node: node.into(),
        shape: MachineShape {
            memory_bytes: 64 << 20,
            vcpus: 1,
            devices: vec!["net=52:54:00:00:00:01".into()],
            disk_bytes: 1 << 20,
            cpu: CpuModel::default(),
        },
        adapts: false,
        generation: 1,
        committed: 0,
        takeover_limit_ms: 300,
        witness: true,
        streams: STREAMS,
    }
}

#[expect(clippy::unnecessary_wraps, reason = "a judge may refuse")]
fn welcome(hello: &Hello, session: Session) -> Result<Welcome, Refusal> {
    Ok(Welcome {
        node: "b".into(),
        session,
        cpu: hello.shape.cpu.clone(),
        generation: 0,
        committed: 0,
        held: Held::default(),
        streams: hello.streams,
    })
}

fn anywhere() -> SocketAddr {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0).into()
}

fn input(number: u64, bytes: usize) -> Message {
    Message::Input(Input {
        tag: Tag::default(),
        number: InputNumber(number),
        nic: Nic::FIRST,
        frame: Bytes::from(vec![number.to_le_bytes()[0]; bytes]),
    })
}

fn bulk(bytes: usize) -> Message {
    Message::Write(DiskWrite {
        tag: Tag::default(),
        offset: 0,
        written: Bytes::from(vec![7; bytes]).into(),
    })
}

fn pages(number: u32, bytes: usize) -> PageBatch {
    PageBatch::new(Tag::default(), number + 1, Bytes::from(vec![7; bytes]))
}

async fn established(listener: &mut Listener) -> (Established, Established) {
    let addr = listener.local_addr();
    let (primary, secondary) = tokio::join!(connect(addr, hello("a"), |_| Ok(())), listener.accept(welcome));
    (primary.unwrap(), secondary)
}

async fn next(events: &mut Events) -> Option<LinkEvent> {
    timeout(LIMIT, events.recv(true)).await.expect("an event")
}

async fn message(events: &mut Events) -> Message {
    match next(events).await {
        Some(LinkEvent::Message(message)) => message,
        other => panic!("a message, not {other:?}"),
    }
}

/// Writes raw bytes to the listener and returns what it answers until it closes.
async fn raw(addr: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(LIMIT, stream.read_to_end(&mut answer))
        .await
        .expect("the listener closes");
    answer
}

/// The control connection of a primary that says what this test wants.
async fn raw_control(addr: SocketAddr) -> (TcpStream, Session) {
    let mut control = TcpStream::connect(addr).await.unwrap();
    control.write_all(&bytes_of(&Message::Hello(hello("a")))).await.unwrap();
    let mut decoder = checkpoint::wire::Decoder::new();
    loop {
        let mut bytes = [0; 512];
        let count = control.read(&mut bytes).await.unwrap();
        decoder.push(&bytes[..count]);
        if let Some(Message::Welcome(welcome)) = decoder.next().unwrap() {
            return (control, welcome.session);
        }
    }
}

async fn raw_attached(addr: SocketAddr, session: Session, stream: Option<usize>) -> TcpStream {
    let mut connection = TcpStream::connect(addr).await.unwrap();
    connection.write_all(&attach(session, stream)).await.unwrap();
    connection
}

async fn raw_streams(addr: SocketAddr, session: Session) -> Vec<TcpStream> {
    let mut streams = Vec::new();
    for stream in 0..STREAMS as usize {
        streams.push(raw_attached(addr, session, Some(stream)).await);
    }
    streams
}

/// A refusal with these words comes, and then the end.
async fn assert_refused(connection: &mut TcpStream, words: &str) {
    let mut answer = Vec::new();
    let _ = timeout(LIMIT, connection.read_to_end(&mut answer))
        .await
        .expect("the listener closes");
    let mut decoder = checkpoint::wire::Decoder::new();
    decoder.push(&answer);
    match decoder.next().unwrap() {
        Some(Message::Refuse(refusal)) => assert!(refusal.to_string().contains(words), "{refusal}"),
        other => panic!("{other:?}"),
    }
}

fn attach(session: Session, stream: Option<usize>) -> Vec<u8> {
    bytes_of(&Message::Attach(Attach { session, stream }))
}

fn bytes_of(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_into(message, &mut bytes);
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_know_each_other_and_messages_arrive_in_order() {
    let mut listener = Listener::bind(anywhere()).unwrap();
    let (primary, mut secondary) = established(&mut listener).await;
    let primary_session = primary.welcome.session;
    let (mut primary_events, primary) = (primary.events, primary.link);
    assert_eq!(secondary.hello, hello("a"));
    assert_eq!(secondary.welcome.session, primary_session);
    for number in 0..2_000 {
        primary.send(input(number, if number % 100 == 0 { 9_000 } else { 60 }));
        if number % 500 == 0 {
            primary.send(bulk(900_000));
        }
    }
    for number in 0..2_000 {
        assert_eq!(
            message(&mut secondary.events).await,
            input(number, if number % 100 == 0 { 9_000 } else { 60 })
        );
        if number % 500 == 0 {
            assert_eq!(message(&mut secondary.events).await, bulk(900_000));
        }
    }
    secondary.link.send(Message::Acknowledge(Tag::default()));
    secondary.link.send_control(HEARTBEAT);
    let both = [message(&mut primary_events).await, message(&mut primary_events).await];
    assert!(both.contains(&HEARTBEAT) && both.contains(&Message::Acknowledge(Tag::default())));
    assert_eq!(primary.queued_bytes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_pass_while_data_is_backed_up_and_nothing_is_lost() {
    const MEGABYTES: usize = 100;
    let mut listener = Listener::bind(anywhere()).unwrap();
    let (primary, mut secondary) = established(&mut listener).await;
    let sender = primary.link.bulk();
    let sender = std::thread::spawn(move || (0..MEGABYTES).try_for_each(|_| sender.blocking_send(bulk(1_000_000))));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!sender.is_finished(), "a sender waits for a peer that does not read");
    let queued = primary.link.queued_bytes();
    assert!((8 << 20..10 << 20).contains(&queued), "{queued} bytes queued");
    primary.link.send_control(HEARTBEAT);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(message(&mut secondary.events).await, HEARTBEAT);
    for _ in 0..MEGABYTES {
        assert_eq!(message(&mut secondary.events).await, bulk(1_000_000));
    }
    sender.join().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn case_p19_neither_direction_waits_for_the_other() {
    const MEGABYTES: usize = 100;
    let mut listener = Listener::bind(anywhere()).unwrap();
    let (mut primary, mut secondary) = established(&mut listener).await;
    let senders = [&primary, &secondary].map(|end| {
        let sender = end.link.bulk();
        std::thread::spawn(move || (0..MEGABYTES).try_for_each(|_| sender.blocking_send(bulk(1_000_000))))
    });
    // The kernel takes some; what is queued beyond that is all that may be, and the senders wait.
    let full = async {
        while [&primary, &secondary]
            .iter()
            .any(|end| end.link.queued_bytes() < 8 << 20)
        {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, full).await.expect("peers that do not read");
    assert!(senders.iter().all(|sender| !sender.is_finished()));
    // The secondary reads nothing yet, and all that it sends arrives.
    for end in [&mut primary, &mut secondary] {
        for _ in 0..MEGABYTES {
            assert_eq!(message(&mut end.events).await, bulk(1_000_000));
        }
    }
    for sender in senders {
        sender.join().unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_link_is_read_to_its_end() {
    let mut listener = Listener::bind(anywhere()).unwrap();
    let (primary, mut secondary) = established(&mut listener).await;
    for number in 0..100 {
        primary.link.send(input(number, 100));
    }
    primary.link.send_control(Message::Goodbye(GoodbyeReason::Operator));
    let finish = tokio::spawn(async move { primary.link.finish(LIMIT).await });
    let (mut inputs, mut goodbye, mut ends) = (0, false, Vec::new());
    while ends.len() < 2 + STREAMS as usize {
        match next(&mut secondary.events).await.unwrap() {
            LinkEvent::Message(Message::Input(_)) if !ends.contains(&Which::Data) => inputs += 1,
            LinkEvent::Message(Message::Goodbye(_)) => goodbye = true,
            LinkEvent::Closed {
                which,
                cause: CloseCause::Eof,
            } => ends.push(which),
            other => panic!("{other:?}"),
        }
    }
    assert!(goodbye);
    assert_eq!(ends[0], Which::Control, "the end of another would look like a loss");
    assert_eq!(inputs, 100);
    assert!(next(&mut secondary.events).await.is_none());
    secondary.link.close();
    timeout(LIMIT, finish).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_lets_go_of_everyone_who_waits() {
    let mut listener = Listener::bind(anywhere()).unwrap();
    let (mut primary, mut secondary) = established(&mut listener).await;
    let (sender, streams) = (primary.link.bulk(), primary.link.page_senders());
    let sender = std::thread::spawn(move || while sender.blocking_send(bulk(1_000_000)).is_ok() {});
    let shipper = std::thread::spawn(move || while streams.blocking_send(1, pages(0, 1_000_000)).is_ok() {});
    tokio::time::sleep(Duration::from_millis(200)).await;
    primary.link.close();
    tokio::task::spawn_blocking(move || (sender.join().unwrap(), shipper.join().unwrap()))
        .await
        .unwrap();
    assert_eq!(primary.link.queued_bytes(), 0);
    assert!(next(&mut primary.events).await.is_none());
    primary.link.send(HEARTBEAT);
    while next(&mut secondary.events).await.is_some() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_primary_is_told_that_the_secondary_is_busy_until_the_link_is_closed() {
    let mut listener = Listener::bind(anywhere()).unwrap();
    let addr = listener.local_addr();
    let (primary, secondary) = established(&mut listener).await;
    match connect(addr, hello("c"), |_| Ok(())).await {
        Err(
            error @ ConnectError::Refused {
                refusal: Refusal::Busy(_),
                ..
            },
        ) => {
            assert!(error.is_passing());
            assert!(error.to_string().contains("already follows a"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    primary.link.send(HEARTBEAT);
    let Established { link, mut events, .. } = secondary;
    assert_eq!(message(&mut events).await, HEARTBEAT);
    link.close();
    let (again, _) = established(&mut listener).await;
    assert_eq!(again.hello.node, "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_side_may_turn_the_other_away_and_is_told_why() {
    let mut listener = Listener::bind(anywhere()).unwrap();
    let addr = listener.local_addr();
    let pair = || Refusal::Pair {
        ours: "shop".into(),
        theirs: "mail".into(),
    };
    let mut judged = 0;
    let judge = |hello: &Hello, session| {
        judged += 1;
        if judged == 1 {
            Err(pair())
        } else {
            welcome(hello, session)
        }
    };
    let attempts = async {
        let refused = connect(addr, hello("a"), |_| Ok(())).await;
        assert!(
            matches!(&refused, Err(ConnectError::Refused { refusal, .. }) if *refusal == pair()),
            "{refused:?}"
        );
        let unfit = connect(addr, hello("a"), |_| Err(pair())).await;
        assert!(
            matches!(&unfit, Err(ConnectError::Unfit { refusal, .. }) if *refusal == pair()),
            "{unfit:?}"
        );
        loop {
            // The one that was turned away may still count as being followed for a moment.
            match connect(addr, hello("a"), |_| Ok(())).await {
                Ok(established) => return established,
                Err(error) => assert!(error.is_passing(), "{error}"),
            }
        }
    };
    let (primary, secondary) = timeout(LIMIT, async { tokio::join!(attempts, listener.accept(judge)) })
        .await
        .unwrap();
    assert_eq!(primary.welcome.session, secondary.welcome.session);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_do_not_disturb_a_link_nor_keep_one_from_being_made() {
    let mut listener = Listener::bind(anywhere()).unwrap();
    let addr = listener.local_addr();
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    let mut slow = TcpStream::connect(addr).await.unwrap();
    slow.write_all(&bytes_of(&Message::Hello(hello("slow")))[..20])
        .await
        .unwrap();
    let garbage = raw(
        addr,
        b"GET / HTTP/1.1\r\nHost: tandem\r\nAccept: everything there is to have\r\n\r\n",
    )
    .await;
    assert!(!garbage.is_empty(), "a stranger is told that this is the wrong place");
    raw(addr, &bytes_of(&HEARTBEAT)).await;
    let (primary, mut secondary) = timeout(LIMIT, established(&mut listener)).await.unwrap();
    raw(addr, &[0xff; 10_000]).await;
    raw(addr, &bytes_of(&Message::Hello(hello("c")))).await;
    primary.link.send(input(1, 60));
    assert_eq!(message(&mut secondary.events).await, input(1, 60));
    drop(silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_version_is_told_so() {
    let listener = Listener::bind(anywhere()).unwrap();
    let mut bytes = bytes_of(&Message::Hello(hello("a")));
    // The layout of the header is the same in all versions: version at 4, checksum of the first 44 bytes behind them.
    bytes[4..6].copy_from_slice(&10_u16.to_le_bytes());
    let checksum = crc32fast::hash(&bytes[..44]);
    bytes[44..48].copy_from_slice(&checksum.to_le_bytes());
    let answer = raw(listener.local_addr(), &bytes).await;
    let mut decoder = checkpoint::wire::Decoder::new();
    decoder.push(&answer);
    match decoder.next().unwrap() {
        Some(Message::Refuse(Refusal::Version { theirs, .. })) => assert_eq!(theirs, 10),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_connection_needs_the_session_of_its_control_connection() {
    let mut listener = Listener::bind(anywhere()).unwrap();
    let addr = listener.local_addr();
    let (mut thief, session) = (TcpStream::connect(addr).await.unwrap(), Session(0));
    thief.write_all(&attach(session, None)).await.unwrap();
    let steal = async {
        let mut control = TcpStream::connect(addr).await.unwrap();
        control.write_all(&bytes_of(&Message::Hello(hello("x")))).await.unwrap();
        control.read_exact(&mut [0]).await.unwrap();
        let mut data = TcpStream::connect(addr).await.unwrap();
        data.write_all(&attach(session, None)).await.unwrap();
        assert_refused(&mut data, "another session").await;
        drop(control);
        loop {
            match connect(addr, hello("a"), |_| Ok(())).await {
                Ok(established) => return established,
                Err(error) => assert!(error.is_passing(), "{error}"),
            }
        }
    };
    let (_primary, secondary) = timeout(LIMIT, async { tokio::join!(steal, listener.accept(welcome)) })
        .await
        .unwrap();
    assert_eq!(secondary.hello.node, "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_after_the_handshake_ends_that_connection_with_its_cause() {
    let mut listener = Listener::bind(anywhere()).unwrap();
    let addr = listener.local_addr();
    let forge = async {
        let (control, session) = raw_control(addr).await;
        let mut data = raw_attached(addr, session, None).await;
        let streams = raw_streams(addr, session).await;
        let write = Message::Write(DiskWrite {
            tag: Tag::default(),
            offset: 0,
            written: Bytes::from_static(&[1; 512]).into(),
        });
        let mut bytes = bytes_of(&write);
        data.write_all(&bytes).await.unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        data.write_all(&bytes).await.unwrap();
        (control, data, streams)
    };
    let (_streams, mut secondary) = tokio::join!(forge, listener.accept(welcome));
    assert!(matches!(message(&mut secondary.events).await, Message::Write(_)));
    match next(&mut secondary.events).await {
        Some(LinkEvent::Closed {
            which: Which::Data,
            cause: CloseCause::Garbage(_),
        }) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_come_in_the_order_of_their_stream() {
    const BATCHES: u32 = 60;
    let mut listener = Listener::bind(anywhere()).unwrap();
    let (primary, mut secondary) = established(&mut listener).await;
    let streams = primary.link.page_senders();
    assert_eq!(streams.streams(), STREAMS as usize);
    let senders: Vec<_> = (0..streams.streams())
        .map(|stream| {
            let streams = streams.clone();
            let size = move |number: u32| [100, 5_000, 250_000, 1_000_000][(number as usize + stream) % 4];
            std::thread::spawn(move || {
                (0..BATCHES).try_for_each(|number| streams.blocking_send(stream, pages(number, size(number))))
            })
        })
        .collect();
    let mut next_numbers = [0; STREAMS as usize];
    while next_numbers != [BATCHES; STREAMS as usize] {
        let Some(LinkEvent::Pages(arrived)) = next(&mut secondary.events).await else {
            panic!("pages");
        };
        let number = &mut next_numbers[arrived.stream];
        let bytes = arrived.batch.encoded.len();
        assert_eq!(arrived.batch, pages(*number, bytes));
        *number += 1;
    }
    senders.into_iter().for_each(|sender| sender.join().unwrap().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_pages_are_not_taken_holds_up_nothing_else() {
    let mut listener = Listener::bind(anywhere()).unwrap();
    let (primary, mut secondary) = established(&mut listener).await;
    let (streams, mut held, mut batches) = (primary.link.page_senders(), Vec::new(), 0);
    let sender =
        std::thread::spawn(move || (0..60).try_for_each(|number| streams.blocking_send(0, pages(number, 1_000_000))));
    // What is read and neither staged nor dropped is bounded: the reader stops, and then who sends.
    while let Ok(Some(event)) = timeout(Duration::from_millis(700), secondary.events.recv(true)).await {
        let LinkEvent::Pages(arrived) = event else {
            panic!("pages")
        };
        batches += 1;
        held.push(arrived.room);
    }
    assert!((5..16).contains(&batches) && !sender.is_finished(), "{batches} batches");
    let streams = primary.link.page_senders();
    std::thread::spawn(move || streams.blocking_send(1, pages(0, 500_000)));
    primary.link.send(input(1, 60));
    primary.link.send_control(HEARTBEAT);
    let mut others = 0;
    while others < 3 {
        match next(&mut secondary.events).await.unwrap() {
            LinkEvent::Pages(arrived) => assert_eq!(arrived.stream, 1),
            LinkEvent::Message(_) => {}
            other => panic!("{other:?}"),
        }
        others += 1;
    }
    held.clear();
    while batches < 60 {
        assert!(matches!(next(&mut secondary.events).await, Some(LinkEvent::Pages(arrived)) if arrived.stream == 0));
        batches += 1;
    }
    sender.join().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_wait_until_they_are_wanted() {
    let mut listener = Listener::bind(anywhere()).unwrap();
    let (primary, mut secondary) = established(&mut listener).await;
    let streams = primary.link.page_senders();
    let sent = tokio::task::spawn_blocking(move || streams.blocking_send(2, pages(0, 10)));
    sent.await.unwrap().unwrap();
    primary.link.send(input(1, 60));
    let first = timeout(LIMIT, secondary.events.recv(false)).await.unwrap();
    assert!(matches!(first, Some(LinkEvent::Message(Message::Input(_)))));
    assert!(secondary.events.try_recv(false).is_none());
    assert!(matches!(next(&mut secondary.events).await, Some(LinkEvent::Pages(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_has_one_place_and_only_one_that_was_agreed_on() {
    let mut listener = Listener::bind(anywhere()).unwrap();
    let addr = listener.local_addr();
    let forge = async {
        let (control, session) = raw_control(addr).await;
        let mut data = raw_attached(addr, session, None).await;
        let mut again = raw_attached(addr, session, None).await;
        // Which of the two is read first is the listener's affair.
        tokio::select! {
            () = assert_refused(&mut data, "open already") => {}
            () = assert_refused(&mut again, "open already") => {}
        }
        let mut beyond = raw_attached(addr, session, Some(STREAMS as usize)).await;
        assert_refused(&mut beyond, "not agreed on").await;
        let mut streams = raw_streams(addr, session).await;
        streams[1]
            .write_all(&bytes_of(&Message::Pages(pages(0, 100))))
            .await
            .unwrap();
        (control, data, again, streams)
    };
    let (_streams, mut secondary) = tokio::join!(forge, listener.accept(welcome));
    assert!(matches!(next(&mut secondary.events).await, Some(LinkEvent::Pages(arrived)) if arrived.stream == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_stream_carries_good_pages_and_nothing_else() {
    let damaged = {
        let mut bytes = bytes_of(&Message::Pages(pages(0, 5_000)));
        bytes[3_000] ^= 1;
        bytes
    };
    for (bytes, misplaced) in [
        (damaged, false),
        (bytes_of(&input(1, 60)), true),
        (vec![0xff; 500], false),
    ] {
        let mut listener = Listener::bind(anywhere()).unwrap();
        let (primary, mut secondary) = {
            let addr = listener.local_addr();
            let forge = async {
                let (control, session) = raw_control(addr).await;
                let data = raw_attached(addr, session, None).await;
                let mut streams = raw_streams(addr, session).await;
                // Pages behind it in one go are not lost.
                streams[0]
                    .write_all(&bytes_of(&Message::Pages(pages(0, 200))))
                    .await
                    .unwrap();
                streams[0].write_all(&bytes).await.unwrap();
                (control, data, streams)
            };
            tokio::join!(forge, listener.accept(welcome))
        };
        assert!(matches!(next(&mut secondary.events).await, Some(LinkEvent::Pages(_))));
        match next(&mut secondary.events).await {
            Some(LinkEvent::Closed {
                which: Which::Pages(0),
                cause,
            }) => assert!(
                matches!(cause, CloseCause::Misplaced("Input")) == misplaced
                    && matches!(cause, CloseCause::Garbage(_)) != misplaced,
                "{cause}"
            ),
            other => panic!("{other:?}"),
        }
        drop(primary);
    }
}

#[tokio::test]
async fn a_missing_a_silent_and_an_alien_peer_are_told_apart() {
    let taken = std::net::TcpListener::bind(anywhere()).unwrap();
    let addr = taken.local_addr().unwrap();
    assert!(matches!(Listener::bind(addr), Err(ListenError::InUse { .. })));
    let silent = connect(addr, hello("a"), |_| Ok(())).await;
    assert!(matches!(silent, Err(ConnectError::Silent { .. })), "{silent:?}");
    let alien = std::thread::spawn(move || {
        use std::io::Write;
        let _silent = taken.accept().unwrap();
        let (mut stream, _) = taken.accept().unwrap();
        stream.write_all(&[b'x'; 1_000]).unwrap();
        stream
    });
    let alien_seen = connect(addr, hello("a"), |_| Ok(())).await;
    assert!(matches!(alien_seen, Err(ConnectError::Alien { .. })), "{alien_seen:?}");
    drop(alien.join().unwrap());
    let nobody = connect(addr, hello("a"), |_| Ok(())).await;
    assert!(matches!(nobody, Err(ConnectError::Unreachable { .. })), "{nobody:?}");
}

/// Prints how long one message takes on an idle link, and a bare write to a bare connection beside it.
/// A machine under load makes no promise, so nothing is asserted.
#[tokio::test(flavor = "multi_thread")]
async fn latency_of_one_message() {
    use std::io::{Read, Write};
    let mut listener = Listener::bind(anywhere()).unwrap();
    let (primary, mut secondary) = established(&mut listener).await;
    let link: Link = primary.link;
    let bare = std::net::TcpListener::bind(anywhere()).unwrap();
    let mut ours = std::net::TcpStream::connect(bare.local_addr().unwrap()).unwrap();
    ours.set_nodelay(true).unwrap();
    let (mut theirs, _) = bare.accept().unwrap();
    let reader = std::thread::spawn(move || while theirs.read(&mut [0; 1_000]).unwrap() > 0 {});
    let (mut bare, mut sends, mut trips) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..200 {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let before = clock::now();
        ours.write_all(&[0; 148]).unwrap();
        bare.push(clock::now().since(before));
        tokio::time::sleep(Duration::from_millis(1)).await;
        let before = clock::now();
        link.send(input(number, 100));
        sends.push(clock::now().since(before));
        assert_eq!(message(&mut secondary.events).await, input(number, 100));
        trips.push(clock::now().since(before));
    }
    drop(ours);
    reader.join().unwrap();
    for times in [&mut bare, &mut sends, &mut trips] {
        times.sort();
    }
    println!(
        "bare write {}, send {}, received after {} (medians)",
        bare[100], sends[100], trips[100]
    );
}
