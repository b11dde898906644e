//! Round trips, damage and garbage.

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::cpu::CpuLeaf;
use crate::epoch::Generation;
use crate::limits::{CPU_LEAVES_MAX, CPU_MSRS_MAX, NICS_MAX};
use crate::pages::identical::PageHash;
use crate::wire::decoder::Decoder;
use crate::wire::{Held, MachineShape, wire_samples};

fn tags() -> impl Strategy<Value = Tag> {
    (any::<u64>(), any::<u64>()).prop_map(|(g, e)| Tag {
        generation: Generation(g),
        epoch: Epoch(e),
    })
}

fn bytes(most: usize) -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..=most).prop_map(Bytes::from)
}

fn name() -> &'static str {
    "[a-zA-Z0-9äß=:. -]{0,30}"
}

/// Of any content: what it says is judged in the handshake.
fn cpus() -> impl Strategy<Value = CpuModel> {
    let leaf = any::<(u32, u32, [u32; 4])>().prop_map(|(function, index, words)| CpuLeaf::new(function, index, words));
    (vec(leaf, 0..CPU_LEAVES_MAX), vec(any::<u32>(), 0..CPU_MSRS_MAX))
        .prop_map(|(leaves, msrs)| CpuModel { leaves, msrs })
}

fn hellos() -> impl Strategy<Value = Hello> {
    let shape = (0..1u64 << 50, any::<u32>(), vec(name(), 0..6), any::<u64>(), cpus()).prop_map(
        |(pages, vcpus, devices, disk_bytes, cpu)| MachineShape {
            memory_bytes: pages * 4096,
            vcpus,
            devices,
            disk_bytes,
            cpu,
        },
    );
    (
        name(),
        name(),
        (shape, any::<bool>()),
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        any::<bool>(),
        any::<u32>(),
    )
        .prop_map(
            |(pair, node, (shape, adapts), generation, committed, takeover_limit_ms, witness, streams)| Hello {
                pair,
                node,
                shape,
                adapts,
                generation,
                committed,
                takeover_limit_ms,
                witness,
                streams,
            },
        )
}

fn refusals() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        (any::<u16>(), any::<u16>()).prop_map(|(ours, theirs)| Refusal::Version { ours, theirs }),
        (name(), name()).prop_map(|(ours, theirs)| Refusal::Pair { ours, theirs }),
        name().prop_map(Refusal::SameNode),
        (name(), name(), name()).prop_map(|(what, primary, secondary)| Refusal::Differs {
            what,
            primary,
            secondary
        }),
        (name(), name()).prop_map(|(missing, cure)| Refusal::Cpu { missing, cure }),
        name().prop_map(Refusal::Busy),
        (any::<u64>(), any::<u64>()).prop_map(|(ours, theirs)| Refusal::OlderGeneration { ours, theirs }),
        any::<u64>().prop_map(Refusal::BothRan),
        name().prop_map(Refusal::Protocol),
    ]
}

fn marks() -> impl Strategy<Value = EndMark> {
    let sum = (any::<u64>(), any::<u64>(), any::<u32>());
    let sum = sum.prop_map(|(pages, bytes, digest)| PageSum { pages, bytes, digest });
    let pages = vec(sum, 1..=STREAMS_MAX).prop_map(|sums| PageSums::of(&sums).unwrap());
    let sums = (pages, any::<u64>(), any::<u32>());
    (
        tags(),
        any::<Option<u64>>(),
        sums,
        any::<u32>(),
        any::<u64>(),
        prop_oneof![Just(EpochMode::Lockstep), Just(EpochMode::Buffered)],
        any::<[u8; 32]>(),
    )
        .prop_map(
            |(tag, base, (pages, writes, writes_digest), sections, input, next, entropy)| EndMark {
                tag,
                base: base.map(Epoch),
                pages,
                writes,
                writes_digest,
                sections,
                input: InputNumber(input),
                next,
                entropy,
            },
        )
}

fn writes() -> impl Strategy<Value = DiskWrite> {
    let zeros = (1..=ZEROS_BYTES_MAX / SECTOR_BYTES).prop_map(|sectors| Written::Zeros(sectors * SECTOR_BYTES));
    let written = prop_oneof![bytes(5000).prop_map(Written::Data), zeros];
    (tags(), 0..1u64 << 60, written).prop_map(|(tag, offset, written)| DiskWrite { tag, offset, written })
}

fn sections() -> impl Strategy<Value = Vec<Section>> {
    let section = (name(), any::<u32>(), vec(any::<u8>(), 0..200)).prop_map(|(name, version, bytes)| Section {
        name,
        version,
        bytes,
    });
    vec(section, 0..5)
}

fn held() -> impl Strategy<Value = Held> {
    (option::of(tags()), option::of(tags())).prop_map(|(memory, disk)| Held { memory, disk })
}

pub(crate) fn messages() -> impl Strategy<Value = Message> {
    let control = prop_oneof![
        hellos().prop_map(Message::Hello),
        (
            name(),
            any::<u128>(),
            cpus(),
            any::<u64>(),
            any::<u64>(),
            held(),
            any::<u32>()
        )
            .prop_map(|(node, session, cpu, generation, committed, held, streams)| {
                Message::Welcome(Welcome {
                    node,
                    session: Session(session),
                    cpu,
                    generation,
                    committed,
                    held,
                    streams,
                })
            }),
        refusals().prop_map(Message::Refuse),
        (any::<u128>(), option::of(0..STREAMS_MAX)).prop_map(|(session, stream)| Message::Attach(Attach {
            session: Session(session),
            stream
        })),
        (any::<u64>(), any::<u64>()).prop_map(|(sent, echo)| Message::Heartbeat(Heartbeat {
            sent: Instant(sent),
            echo: Instant(echo)
        })),
        Just(Message::Goodbye(GoodbyeReason::Operator)),
        Just(Message::Goodbye(GoodbyeReason::PowerOff)),
        name().prop_map(|why| Message::Goodbye(GoodbyeReason::Failed(why))),
    ];
    let primary = prop_oneof![
        (tags(), held()).prop_map(|(tag, base)| Message::Begin(Begin { tag, base })),
        (tags(), 0..1u64 << 40, vec(any::<[u8; 16]>(), 0..40))
            .prop_map(|(tag, first, hashes)| Message::BlockHashes(BlockHashes { tag, first, hashes })),
        writes().prop_map(Message::SyncBlock),
        writes().prop_map(Message::Write),
        (tags(), any::<u64>(), nics(), bytes(1600)).prop_map(|(tag, number, nic, frame)| Message::Input(Input {
            tag,
            number: InputNumber(number),
            nic,
            frame
        })),
        (tags(), any::<u8>(), bytes(20_000)).prop_map(|(tag, count, encoded)| {
            let count = u32::from(count).min(u32::try_from(encoded.len()).unwrap());
            Message::Pages(PageBatch::new(tag, count, encoded))
        }),
        (tags(), sections()).prop_map(|(tag, sections)| Message::DeviceState(DeviceState { tag, sections })),
        (tags(), bytes(3000)).prop_map(|(tag, encoded)| Message::NetworkState(NetworkState { tag, encoded })),
        marks().prop_map(|mark| Message::End(Box::new(mark))),
        tags().prop_map(Message::Halt),
        (
            tags(),
            any::<[u8; 32]>(),
            btree_map(0..1u64 << 32, any::<[u8; 16]>(), 0..40)
        )
            .prop_map(|(tag, seed, pages)| {
                let pages = pages.into_iter().map(|(page, hash)| (page, PageHash(hash))).collect();
                Message::PageHashes(PageHashes { tag, seed, pages })
            }),
    ];
    let secondary = prop_oneof![
        (tags(), nics(), bytes(1600)).prop_map(|(tag, nic, frame)| Message::Output(Output { tag, nic, frame })),
        (tags(), any::<u64>()).prop_map(|(tag, number)| Message::Confirm(tag, InputNumber(number))),
        tags().prop_map(Message::Want),
        tags().prop_map(Message::Acknowledge),
        tags().prop_map(Message::Loaded),
        tags().prop_map(Message::Committed),
        tags().prop_map(Message::Halted),
        (tags(), vec(any::<bool>(), 0..40)).prop_map(|(tag, alike)| Message::PageMatches(PageMatches { tag, alike })),
    ];
    prop_oneof![control, primary, secondary]
}

fn nics() -> impl Strategy<Value = Nic> {
    (0..u32::try_from(NICS_MAX).unwrap()).prop_map(|number| Nic::new(number).unwrap())
}

fn to_vec(message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    encode_into(message, &mut out);
    out
}

/// Reads one message as an asynchronous reader does: header, then body.
fn read_one(bytes: &[u8]) -> Result<Message, WireError> {
    let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(WireError::Length {
            kind: "header",
            bytes: bytes.len(),
        });
    };
    decode(&Header::parse(header)?, Bytes::copy_from_slice(body))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn messages_come_back_as_they_were(message in messages()) {
        let bytes = to_vec(&message);
        prop_assert_eq!(encode(&message).len(), bytes.len());
        prop_assert_eq!(read_one(&bytes), Ok(message));
    }

    #[test]
    fn pieces_of_any_size_make_the_same_messages(
        sent in vec(messages(), 1..8),
        sizes in vec(1usize..9000, 1..20),
    ) {
        let bytes: Vec<u8> = sent.iter().flat_map(to_vec).collect();
        let (mut decoder, mut received, mut rest) = (Decoder::new(), Vec::new(), &bytes[..]);
        for size in sizes.iter().cycle() {
            let (piece, later) = rest.split_at(rest.len().min(*size));
            decoder.push(piece);
            while let Some(message) = decoder.next().unwrap() {
                received.push(message);
            }
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert!(!decoder.is_within_message());
        prop_assert_eq!(received, sent);
    }

    #[test]
    fn a_flipped_bit_is_always_detected(message in messages(), at in any::<prop::sample::Index>()) {
        let mut bytes = to_vec(&message);
        let bit = at.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(read_one(&bytes).is_err());
    }
}

#[test]
fn truncation_at_every_byte_is_no_message() {
    for message in wire_samples() {
        let bytes = to_vec(&message);
        for length in 0..bytes.len() {
            assert!(read_one(&bytes[..length]).is_err(), "{message:?} cut to {length}");
            let mut decoder = Decoder::new();
            decoder.push(&bytes[..length]);
            assert_eq!(decoder.next(), Ok(None));
            assert_eq!(decoder.is_within_message(), length > 0);
        }
    }
}

#[test]
fn archives_damaged_behind_a_good_checksum_do_no_harm() {
    // A hostile peer computes its checksums well; only the archive's own validation is left.
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let archives: Vec<_> = wire_samples()
        .into_iter()
        .filter(|m| !encode(m).body.is_empty())
        .collect();
    for round in 0..100_000 {
        let encoded = encode(&archives[round % archives.len()]);
        let header = Header::parse(&encoded.header).unwrap();
        let mut body = encoded.body.to_vec();
        for _ in 0..=random() % 4 {
            let at = usize::try_from(random() % body.len() as u64).unwrap();
            body[at] = random().to_le_bytes()[0];
        }
        body.truncate(usize::try_from(random() % (body.len() as u64 * 2)).unwrap());
        let header = Header {
            body_bytes: u32::try_from(body.len()).unwrap(),
            body_crc: crc32fast::hash(&body),
            ..header
        };
        // Any answer will do that is one.
        if let Ok(message) = decode(&header, Bytes::from(body)) {
            let _ = encode(&message);
        }
    }
}

#[test]
fn garbage_is_an_error_and_keeps_no_memory() {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..100_000 {
        let mut piece = [0; 64];
        for byte in &mut piece {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            *byte = (seed >> 33).to_le_bytes()[0];
        }
        let mut decoder = Decoder::new();
        decoder.push(&piece);
        let error = decoder.next().unwrap_err();
        decoder.push(&piece);
        assert_eq!(decoder.buffered(), 0, "a lost stream is not collected");
        assert_eq!(decoder.next(), Err(error));
    }
}

#[test]
fn another_version_is_answered_with_a_refusal_that_names_both() {
    let refusal = WireError::Version { theirs: 7 }.refusal();
    assert_eq!(
        refusal,
        Refusal::Version {
            ours: PROTOCOL_VERSION,
            theirs: 7
        }
    );
    assert!(matches!(WireError::HeaderChecksum.refusal(), Refusal::Protocol(_)));
}

#[test]
fn texts_are_cut_at_a_character_and_freed_of_controls() {
    assert_eq!(cut_text("aä\u{1b}[2J", 2), "a");
    assert_eq!(cut_text("aä\u{1b}[2J", 64), "aä [2J");
    // A control character of two bytes becomes a space of one, never the other way round.
    assert_eq!(cut_text("\u{85}\u{85}", 4), "  ");
    let long = Message::Goodbye(GoodbyeReason::Failed("x\n".repeat(TEXT_BYTES_MAX)));
    let Ok(Message::Goodbye(GoodbyeReason::Failed(why))) = read_one(&to_vec(&long)) else {
        panic!("cut, not refused")
    };
    assert_eq!(why.len(), TEXT_BYTES_MAX);
}

#[test]
fn texts_with_terminal_escapes_are_refused() {
    let body = archive(&GoodbyeReason::Failed("\u{1b}]0;x".into()));
    let header = Header {
        kind: Kind::Goodbye,
        tag: Tag::default(),
        number: 0,
        count: 0,
        body_bytes: u32::try_from(body.len()).unwrap(),
        body_crc: crc32fast::hash(&body),
    };
    assert_eq!(
        decode(&header, body),
        Err(WireError::Field {
            kind: "Goodbye",
            what: "a text"
        })
    );
}

#[test]
#[should_panic(expected = "over its bound")]
fn an_own_message_over_its_bound_is_a_fault() {
    let _ = encode(&Message::Output(Output {
        tag: Tag::default(),
        nic: Nic::FIRST,
        frame: Bytes::from(vec![0; crate::limits::FRAME_BYTES_MAX + 1]),
    }));
}

#[test]
fn a_card_that_no_machine_has_is_refused() {
    for kind in [Kind::Input, Kind::Output] {
        for count in [u32::try_from(NICS_MAX).unwrap(), 256, u32::MAX] {
            let header = Header {
                kind,
                tag: Tag::default(),
                number: 0,
                count,
                body_bytes: 0,
                body_crc: crc32fast::hash(&[]),
            };
            assert_eq!(
                decode(&header, Bytes::new()),
                Err(WireError::Field {
                    kind: kind.name(),
                    what: "a network card"
                })
            );
        }
    }
}

#[test]
fn a_disk_write_past_the_end_of_all_files_is_refused() {
    let write = DiskWrite {
        tag: Tag::default(),
        offset: u64::MAX - 2,
        written: Written::Data(Bytes::from_static(b"abc")),
    };
    let zeros = DiskWrite {
        offset: u64::MAX - 511,
        written: Written::Zeros(512),
        ..write
    };
    for write in [write, zeros] {
        assert_eq!(
            read_one(&to_vec(&Message::Write(write))),
            Err(WireError::Field {
                kind: "Write",
                what: "an offset"
            })
        );
    }
}

#[test]
fn zeros_of_a_disk_write_are_bounded_and_have_no_body() {
    let read = |sectors: u64, body: &'static [u8]| {
        let header = Header {
            kind: Kind::SyncBlock,
            tag: Tag::default(),
            number: 4096,
            count: u32::try_from(sectors).unwrap(),
            body_bytes: u32::try_from(body.len()).unwrap(),
            body_crc: crc32fast::hash(body),
        };
        decode(&header, Bytes::from_static(body))
    };
    let most = ZEROS_BYTES_MAX / SECTOR_BYTES;
    let zeros = |len| DiskWrite {
        tag: Tag::default(),
        offset: 4096,
        written: Written::Zeros(len),
    };
    assert_eq!(read(most, b""), Ok(Message::SyncBlock(zeros(ZEROS_BYTES_MAX))));
    assert_eq!(encode(&Message::SyncBlock(zeros(ZEROS_BYTES_MAX))).len(), HEADER_BYTES);
    for (sectors, body) in [(most + 1, &b""[..]), (u64::from(u32::MAX), b""), (1, b"x")] {
        assert_eq!(
            read(sectors, body),
            Err(WireError::Field {
                kind: "SyncBlock",
                what: "the number of zeros"
            })
        );
    }
}

#[test]
#[should_panic(expected = "zeros in one disk write")]
fn more_zeros_than_a_disk_write_may_have_are_a_fault() {
    let _ = encode(&Message::Write(DiskWrite {
        tag: Tag::default(),
        offset: 0,
        written: Written::Zeros(ZEROS_BYTES_MAX + 512),
    }));
}
