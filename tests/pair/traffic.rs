//! What the operator is told of the VM's traffic.

use link::control::Command;
use link::flows::Flows;
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
        flows.totals.mismatched > 0 && flows.divergences.iter().any(|divergence| shown(&divergence.what))
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
    let (status, text) = stage.operate(Host::B, &["flows"]);
    assert!(!status.success() && text.contains("ask the primary"), "{text}");
}

fn await_flows(stage: &mut Stage, what: &str, is_so: impl Fn(&Flows) -> bool) -> Flows {
    await_fact(what, || {
        let answer = stage.ask(Host::A, &Command::Flows { most: 1_000 });
        let flows = serde_json::from_value(answer.expect("the primary answers")).expect("flows");
        Some(flows).filter(&is_so)
    })
}
