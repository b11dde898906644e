//! What a script can look at: who runs, what was released, what each side holds.

use checkpoint::cpu;

use super::host::{Host, Role};
use super::link::Item;
use super::pair::Pair;
use super::show::{Shown, record_line, sectors};

/// Prints what the words name.
pub(super) fn run(pair: &mut Pair, what: &[&str]) -> Result<(), String> {
    let lines = match *what {
        ["states"] => pair.hosts.iter().map(state).collect(),
        ["owner"] => owner(pair)?,
        ["released"] => released(pair),
        ["held"] => pair.hosts.iter().filter_map(held).collect(),
        ["outstanding"] => outstanding(pair),
        ["memory", host] => {
            let at = host_of(pair, host)?;
            let pages: Vec<String> = at
                .memory
                .iter()
                .map(|(page, content)| format!("{page}={content}"))
                .collect();
            vec![format!("{host} memory: {}; registers: {}", listed(&pages), at.cpu)]
        }
        ["disk", host] => {
            let text = sectors(0, &host_of(pair, host)?.disk());
            vec![format!(
                "{host} disk: {}",
                if text.is_empty() { "empty" } else { &text }
            )]
        }
        ["cpu", host] => {
            let model = &host_of(pair, host)?.processor.model;
            let features: Vec<_> = cpu::feature_names()
                .filter(|name| model.has(name))
                .map(str::to_owned)
                .collect();
            vec![format!("{host}'s VM has {}", listed(&features))]
        }
        ["inbox", host] => {
            let shown = Shown {
                frames: &pair.frames,
                now: checkpoint::Instant(0),
            };
            let inbox = &host_of(pair, host)?.inbox;
            let frames: Vec<String> = inbox.iter().map(|delivery| shown.delivery(delivery)).collect();
            vec![format!("{host} has yet to read: {}", listed(&frames))]
        }
        ["record", host] => {
            let record = host_of(pair, host)?.record;
            vec![format!(
                "{host} record: {}",
                record.map_or_else(|| "none".to_owned(), |record| record_line(&record))
            )]
        }
        _ => {
            return Err(
                "check states | owner | released | held | outstanding | memory H | disk H | cpu H | inbox H | record H"
                    .to_owned(),
            );
        }
    };
    lines.into_iter().for_each(|line| pair.print(line));
    Ok(())
}

fn host_of<'a>(pair: &'a Pair, name: &str) -> Result<&'a Host, String> {
    let host = pair.hosts.iter().find(|host| host.name == name);
    host.ok_or_else(|| format!("'{name}' is no host"))
}

fn listed(texts: &[String]) -> String {
    if texts.is_empty() {
        "nothing".to_owned()
    } else {
        texts.join(" ")
    }
}

fn state(host: &Host) -> String {
    let what = match &host.role {
        Role::Off(why) => why.clone(),
        Role::Waiting => "waits for a primary".to_owned(),
        Role::Primary(primary) => format!("primary {} {}", primary.tag(), primary.phase()),
        Role::Secondary(secondary) => format!("secondary {} {}", secondary.tag(), secondary.phase()),
    };
    let guest = match (host.running, host.frozen) {
        (_, true) => ", frozen",
        (true, false) => ", guest runs",
        (false, false) => ", guest stands",
    };
    match host.role {
        Role::Off(_) | Role::Waiting => format!("{}: {what}", host.name),
        _ => format!("{}: {what}{guest}", host.name),
    }
}

/// Rule 3: at most one side runs unprotected. Asserted, whatever the script expects.
fn owner(pair: &mut Pair) -> Result<Vec<String>, String> {
    let alone = |host: &Host| matches!(&host.role, Role::Primary(primary) if primary.state_name() == "alone");
    let owners: Vec<&str> = pair
        .hosts
        .iter()
        .filter(|host| alone(host) && host.running && !host.frozen)
        .map(|host| host.name)
        .collect();
    assert!(owners.len() <= 1, "rule 3: two owners");
    let latest = if pair.options.witness {
        let latest = pair.witness_of(0).latest().map_err(|error| error.to_string())?;
        latest.map_or_else(
            || "no term was won".to_owned(),
            |(term, owner)| format!("term {term} is {owner}'s"),
        )
    } else {
        "there is no witness".to_owned()
    };
    let runs = owners
        .first()
        .map_or_else(|| "nobody".to_owned(), |name| (*name).to_owned());
    Ok(vec![format!("runs alone: {runs}; {latest}")])
}

fn released(pair: &Pair) -> Vec<String> {
    (0..2)
        .map(|host| {
            let frames = pair.released.iter().filter(|(by, _)| *by == host);
            let frames: Vec<String> = frames.map(|(_, name)| name.clone()).collect();
            format!("{} released: {}", pair.hosts[host].name, listed(&frames))
        })
        .collect()
}

fn held(host: &Host) -> Option<String> {
    let Role::Primary(primary) = &host.role else {
        return None;
    };
    Some(format!(
        "{} holds {} frames",
        host.name,
        primary.comparators().held().frames
    ))
}

fn outstanding(pair: &Pair) -> Vec<String> {
    let mut lines = Vec::new();
    for (number, host) in pair.hosts.iter().enumerate() {
        let shown = Shown {
            frames: &pair.frames,
            now: host.clock(pair.now),
        };
        let orders = pair.waiting(number).into_iter();
        lines.extend(orders.map(|name| format!("{} is to do {name}", host.name)));
        for item in pair.link.iter().flat_map(|link| link.under_way(number)) {
            lines.push(match item {
                Item::Message(message) => format!("under way to {}: {}", host.name, shown.message(message)),
                Item::End(end) => format!("under way to {}: the end ({end})", host.name),
            });
        }
    }
    if lines.is_empty() {
        lines.push("nothing is outstanding".to_owned());
    }
    lines
}
