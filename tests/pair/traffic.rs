//! What the operator is told of the VM's traffic.

use link::control::Command;
use link::flows::{Flow, Flows};
use tandem::lab::Host;

use crate::load::Work;
use crate::stage::{LIMIT, Setup, Stage, await_fact};

#[test]
fn every_kind_of_traffic_is_told_and_where_the_guests_differ() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let work = Work::start(&stage, "traffic:");
    let equal = |flows: &Flows| {
        let matched = |name: &str| flows.kinds.iter().any(|kind| kind.kind == name && kind.matched > 0);
        matched("TCP") && matched("ARP")
    };
    let flows = await_flows(&mut stage, "output is equal", equal);
    assert!(flows.protection.starts_with("lockstep: "), "{}", flows.protection);
    assert!(flows.flows.iter().any(|flow| flow.matched > 0), "{:?}", flows.flows);

    let told = stage.get("/set?nondeterminism=1000", LIMIT).expect("the guest answers");
    assert_eq!(told.0, 200, "{told:?}");
    let differs = |flows: &Flows| {
        let shown = |what: &str| what.contains("primary") && what.contains("secondary");
        let of_flow = |flow: &Flow| flow.mismatched > 0 && flow.difference.as_deref().is_some_and(shown);
        flows.totals.mismatched > 0
            && flows.divergences.iter().any(|divergence| shown(&divergence.what))
            && flows.flows.iter().any(of_flow)
    };
    let flows = await_flows(&mut stage, "the guests differ", differs);
    assert!(
        flows.divergences.is_sorted_by_key(|divergence| divergence.age_ms),
        "{:?}",
        flows.divergences
    );
    work.await_more();
    drop(work.finish(&stage));

    let (status, text) = stage.operate(Host::A, &["flows", "--most", "1"]);
    assert!(
        status.success() && text.contains("WHAT MADE CHECKPOINTS NECESSARY"),
        "{text}"
    );
    assert!(text.contains("more: --most lists them"), "{text}");
    let (status, text) = stage.operate(Host::A, &["flows", "--json"]);
    let told: Flows = serde_json::from_str(&text).expect("flows");
    assert!(status.success() && told.totals.mismatched > 0, "{text}");
    let tcp = told
        .kinds
        .iter()
        .find(|kind| kind.kind == "TCP")
        .expect("there was some");
    assert!(
        tcp.released_by_checkpoint > 0 && tcp.waits > 0 && tcp.mismatched > 0,
        "{tcp:?}"
    );
    let control = stage.control(Host::A).display().to_string();
    let words = ["flows", "--json", "--watch", "--control", &control];
    let words = words.map(str::to_owned).to_vec();
    let ends = ["sh", "-c", "(sleep 4; kill -TERM $$) & exec \"$0\" \"$@\""];
    let (_, text) = stage.run_within(Host::A, &ends, words);
    let told: Vec<Flows> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    assert!(told.len() > 1, "again and again: {text}");
    let (status, text) = stage.operate(Host::B, &["flows"]);
    assert!(!status.success() && text.contains("ask the primary"), "{text}");
}

#[test]
fn a_capture_has_what_both_guests_sent_and_why_it_was_let_out() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let work = Work::start(&stage, "captured:");
    let told = stage.get("/set?nondeterminism=500", LIMIT).expect("the guest answers");
    assert_eq!(told.0, 200, "{told:?}");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("x.pcapng");
    let out = file.to_str().expect("a path in plain letters").to_owned();
    let (status, text) = stage.operate(Host::A, &["capture", "--out", &out, "--seconds", "3"]);
    assert!(status.success() && text.contains("packets"), "{text}");
    work.await_more();
    drop(work.finish(&stage));

    let bytes = std::fs::read(&file).expect("the file");
    let comments = comments(&bytes);
    for (interface, packets) in comments.iter().enumerate() {
        assert!(packets.len() > 10, "interface {interface}: {packets:?}");
    }
    let has = |interface: usize, what: &str| comments[interface].iter().any(|comment| comment.contains(what));
    assert!(has(0, "sent in epoch") && has(1, "sent in epoch"), "{comments:?}");
    assert!(
        has(2, "equal on both sides") && has(2, "covered by checkpoint"),
        "{comments:?}"
    );
    assert!(has(0, "differ") || has(1, "differ"), "{comments:?}");

    let small = folder.path().join("small.pcapng");
    let small = small.to_str().expect("a path in plain letters");
    let (status, text) = stage.operate(Host::A, &["capture", "--out", small, "--seconds", "1", "--most", "10K"]);
    assert!(status.success(), "{text}");
    assert!(std::fs::metadata(small).expect("the file").len() <= 10 * 1024);
    let (status, text) = stage.operate(Host::A, &["capture", "--out", "/nowhere/x.pcapng"]);
    assert!(!status.success() && text.contains("choose another --out"), "{text}");
    let (status, text) = stage.operate(Host::B, &["capture", "--out", "-"]);
    assert!(!status.success() && text.contains("ask the primary"), "{text}");
}

/// Returns the comments of all packets by their interfaces; each block must be whole.
fn comments(mut bytes: &[u8]) -> [Vec<String>; 3] {
    let mut comments = [const { Vec::new() }; 3];
    let word = |bytes: &[u8], at: usize| {
        let word = bytes[at..at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(word) as usize
    };
    while !bytes.is_empty() {
        let length = word(bytes, 4);
        assert_eq!(word(bytes, length - 4), length, "a block says its length twice");
        if word(bytes, 0) == 6 {
            // Behind the frame; a comment is the first option.
            let option = 28 + word(bytes, 20).next_multiple_of(4);
            assert_eq!(bytes[option..option + 2], [1, 0], "each packet has a comment");
            let text = usize::from(u16::from_le_bytes([bytes[option + 2], bytes[option + 3]]));
            let text = &bytes[option + 4..option + 4 + text];
            comments[word(bytes, 8)].push(String::from_utf8_lossy(text).into_owned());
        }
        bytes = &bytes[length..];
    }
    comments
}

fn await_flows(stage: &mut Stage, what: &str, is_so: impl Fn(&Flows) -> bool) -> Flows {
    await_fact(what, || {
        let answer = stage.ask(Host::A, &Command::Flows { most: 1_000 });
        let flows = serde_json::from_value(answer.expect("the primary answers")).expect("flows");
        Some(flows).filter(&is_so)
    })
}
