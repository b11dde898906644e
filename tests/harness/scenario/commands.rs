//! The language of scenarios. `docs/TESTING.md` describes it; each command is one arm here.

use checkpoint::wire::{Message, Written};
use checkpoint::{Duration, Nic, cpu};
use primary::event::{Event as PrimaryEvent, GuestEnd};
use secondary::event::Event as SecondaryEvent;

use super::forge;
use super::host::{Role, SECTOR, stream_of_batch};
use super::link::{BOTH, Connection, Item};
use super::pair::{Event, Pair};
use super::script::words;
use super::show::message_name;

pub(super) type Done = Result<(), String>;

/// Carries out one line of a script.
pub(super) fn run(pair: &mut Pair, command: &str) -> Done {
    let words = words(command);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match *words.as_slice() {
        ["pair", ref options @ ..] => pair.protect(options),
        ["options", ref options @ ..] => pair.set(options),
        ["frame", ref details @ ..] => pair
            .frames
            .define(&details.iter().map(|&word| word.to_owned()).collect::<Vec<_>>()),
        ["new", "hosts"] => {
            pair.renew();
            Ok(())
        }
        ["start", host, "as", "primary"] => pair.start_primary(number(host)?),
        ["start", host, "as", "secondary"] => pair.start_secondary(number(host)?),
        ["lacks", host, feature] => pair.lacks(number(host)?, feature),
        ["connect", from, to] => pair.connect(number(from)?, number(to)?),
        ["client", "sends", ref names @ ..] => pair.client_sends(names),
        ["time", span] => pair.wait(span_of(span)?),
        ["deliver", "to", host, ref which @ ..] => pair.deliver(number(host)?, which),
        ["forge", "to", host, ref message @ ..] => pair.forge(number(host)?, message),
        ["drop" | "duplicate" | "postpone", "to", host, kind] => pair.tamper(words[0], number(host)?, kind),
        ["kill", host] => pair.kill(number(host)?, 0, false),
        ["kill", host, unsent] => pair.kill(number(host)?, count(unsent, "unsent=")?, false),
        ["power", "off", host] => pair.kill(number(host)?, 0, true),
        ["link", how, ref which @ ..] => pair.change_link(how, which),
        ["stream", "breaks"] => {
            pair.break_stream();
            Ok(())
        }
        ["heartbeats", "shown"] => {
            pair.shows_heartbeats = true;
            Ok(())
        }
        ["witness", how, ref which @ ..] => pair.change_witness(how, which),
        ["freeze", host] => pair.freeze(number(host)?, true),
        ["thaw", host] => pair.freeze(number(host)?, false),
        ["do", host, ref which @ ..] => pair.carry_out_named(number(host)?, which),
        ["stabilize"] => pair.stabilize(),
        ["check", ref what @ ..] => super::checks::run(pair, what),
        [host @ ("a" | "b"), ref what @ ..] => pair.tell(number(host)?, what),
        _ => Err("there is no such command".to_owned()),
    }
}

fn number(host: &str) -> Result<usize, String> {
    ["a", "b"]
        .iter()
        .position(|name| *name == host)
        .ok_or_else(|| format!("'{host}' is no host: a, b"))
}

fn count(word: &str, prefix: &str) -> Result<usize, String> {
    let number = word.strip_prefix(prefix).and_then(|number| number.parse().ok());
    number.ok_or_else(|| format!("'{word}' is not {prefix}NUMBER"))
}

pub(super) fn span_of(text: &str) -> Result<Duration, String> {
    let number = |unit| text.strip_prefix('+')?.strip_suffix(unit)?.parse().ok();
    let micros = number("us").or_else(|| number("ms").map(|ms: u64| ms * 1_000));
    let micros = micros.or_else(|| number("s").map(|s: u64| s * 1_000_000));
    micros
        .map(Duration::from_micros)
        .ok_or_else(|| format!("'{text}' is no span: +200ms"))
}

impl Pair {
    /// The host's processor is another one, without that feature.
    fn lacks(&mut self, host: usize, feature: &str) -> Done {
        let feature = cpu::feature(feature).ok_or("there is no such feature")?;
        let processor = &mut self.hosts[host].processor;
        processor.gives = processor.gives.without([feature]);
        Ok(())
    }

    // Guests, clients, operators.

    fn client_sends(&mut self, names: &[&str]) -> Done {
        for name in names {
            let (nic, frame) = self.frames.at_card(name)?;
            for host in 0..2 {
                let at = &self.hosts[host];
                if matches!(at.role, Role::Primary(_)) && !at.frozen && !at.holds_input {
                    self.step(host, Event::Primary(PrimaryEvent::FrameArrived(nic, frame.clone())));
                }
            }
        }
        Ok(())
    }

    fn tell(&mut self, host: usize, what: &[&str]) -> Done {
        if let ["tap", how @ ("slow" | "quick")] = what {
            self.hosts[host].slow_tap = *how == "slow";
            self.settle(host);
            return Ok(());
        }
        if let ["guest", what @ ..] = what {
            return self.guest(host, what);
        }
        let text = |why: &str| why.trim_start_matches('"').to_owned();
        let event = match (&self.hosts[host].role, what) {
            (Role::Primary(_), ["CheckpointAsked"]) => Event::Primary(PrimaryEvent::CheckpointAsked),
            (Role::Primary(_), ["StopAsked"]) => Event::Primary(PrimaryEvent::StopAsked),
            (Role::Primary(_), ["VmFailed", why]) => Event::Primary(PrimaryEvent::VmFailed(text(why))),
            (Role::Primary(_), ["GuestStopped", how]) => {
                self.hosts[host].running = false;
                Event::Primary(PrimaryEvent::GuestStopped(match *how {
                    "off" => GuestEnd::PowerOff,
                    "reset" => GuestEnd::Reset,
                    why => GuestEnd::Crashed(text(why)),
                }))
            }
            (Role::Secondary(_), ["StopAsked"]) => Event::Secondary(SecondaryEvent::StopAsked),
            (Role::Secondary(_), ["TakeOverAsked"]) => Event::Secondary(SecondaryEvent::TakeOverAsked),
            (Role::Secondary(_), ["OutputDrained"]) => Event::Secondary(SecondaryEvent::OutputDrained),
            (Role::Secondary(_), ["NearLimit"]) => Event::Secondary(SecondaryEvent::NearLimit),
            (Role::Secondary(_), ["VmFailed", why]) => Event::Secondary(SecondaryEvent::VmFailed(text(why))),
            (Role::Secondary(_), ["StageFailed", why]) => Event::Secondary(SecondaryEvent::StageFailed(text(why))),
            (Role::Secondary(_), ["GuestStopped", why]) => {
                self.hosts[host].running = false;
                Event::Secondary(SecondaryEvent::GuestStopped(text(why)))
            }
            _ => return Err("that host hears no such thing in its role".to_owned()),
        };
        self.step(host, event);
        Ok(())
    }

    fn guest(&mut self, host: usize, what: &[&str]) -> Done {
        let at = &mut self.hosts[host];
        if !at.running || at.frozen {
            return Err("that guest does not run".to_owned());
        }
        let leads = matches!(at.role, Role::Primary(_));
        if at.holds_output && matches!(what, ["sends", ..]) {
            return Err("that guest's network card takes nothing from it".to_owned());
        }
        match *what {
            ["sends", ref names @ ..] => {
                for name in names {
                    let (nic, frame) = self.frames.at_card(name)?;
                    self.hosts[host].cpu += 1;
                    self.step(
                        host,
                        if leads {
                            Event::Primary(PrimaryEvent::GuestSent(nic, frame))
                        } else {
                            Event::Secondary(SecondaryEvent::GuestSent(nic, frame))
                        },
                    );
                }
            }
            ["reads", ref card @ ..] => {
                let is_meant = |nic: Nic| card.first().is_none_or(|card| **card == nic.to_string());
                let place = at.inbox.iter().position(|delivery| is_meant(delivery.nic));
                let Some(delivery) = place.and_then(|place| at.inbox.remove(place)) else {
                    return Err("nothing is there to be read".to_owned());
                };
                at.cpu += 1;
                self.step(
                    host,
                    if leads {
                        Event::Primary(PrimaryEvent::InputConsumed(delivery))
                    } else {
                        Event::Secondary(SecondaryEvent::InputConsumed(delivery))
                    },
                );
            }
            ["writes", "page", page, content] => {
                at.write_page(page.parse().map_err(|_| "a page has a number")?, content);
            }
            ["writes", "sector", sector, content] => {
                let data = [content.as_bytes(), &[0; SECTOR]].concat()[..SECTOR].to_vec();
                self.guest_wrote(host, leads, sector, Written::Data(data.into()))?;
            }
            ["discards", sectors, "sectors", "from", sector] => {
                let sectors: u64 = sectors.parse().map_err(|_| "sectors are counted")?;
                self.guest_wrote(host, leads, sector, Written::Zeros(sectors * SECTOR as u64))?;
            }
            _ => {
                let what = "a guest sends, reads, writes page N X, writes sector N X, discards N sectors from N";
                return Err(what.to_owned());
            }
        }
        Ok(())
    }

    // The link.

    fn guest_wrote(&mut self, host: usize, leads: bool, sector: &str, written: Written) -> Done {
        let sector: u64 = sector.parse().map_err(|_| "a sector has a number")?;
        let offset = sector * SECTOR as u64;
        self.hosts[host].write_disk(offset, &written);
        if leads {
            self.step(host, Event::Primary(PrimaryEvent::GuestWrote { offset, written }));
        }
        Ok(())
    }

    fn deliver(&mut self, host: usize, which: &[&str]) -> Done {
        if self.hosts[host].frozen {
            return Err("that host is frozen".to_owned());
        }
        let streams = self.options.streams;
        let stream_of = move |item: &Item| match item {
            Item::Message(Message::Pages(batch)) => Some(stream_of_batch(batch, streams)),
            _ => None,
        };
        match *which {
            ["stream", stream] => {
                let wanted = Some(count(stream, "")?);
                return self.deliver_wanted(host, |item| stream_of(item) == wanted);
            }
            ["others"] => return self.deliver_wanted(host, |item| stream_of(item).is_none()),
            _ => {}
        }
        let (connections, most, until) = match *which {
            [] => (&BOTH[..], usize::MAX, ""),
            ["data"] => (&BOTH[..1], usize::MAX, ""),
            ["control"] => (&BOTH[1..], usize::MAX, ""),
            ["until", kind] => (&BOTH[..1], usize::MAX, kind),
            [number] => (&BOTH[..1], count(number, "")?, ""),
            _ => {
                return Err(
                    "deliver to HOST [data | control | NUMBER | until KIND | stream NUMBER | others]".to_owned(),
                );
            }
        };
        let mut arrived = 0;
        for &connection in connections {
            while arrived < most
                && let Some(item) = self.link.as_mut().and_then(|link| link.next(host, connection))
            {
                arrived += 1;
                let last = matches!(&item, Item::Message(message) if message_name(message) == until);
                self.arrive(host, connection, item);
                if last {
                    return Ok(());
                }
            }
        }
        if !until.is_empty() {
            return Err(format!("no {until} came"));
        }
        if arrived == 0 && !which.is_empty() {
            return Err("nothing is under way".to_owned());
        }
        Ok(())
    }

    /// Some of what is under way overtakes the rest.
    fn deliver_wanted(&mut self, host: usize, wanted: impl Fn(&Item) -> bool) -> Done {
        let mut arrived = false;
        while let Some(item) = self.link.as_mut().and_then(|link| link.next_wanted(host, &wanted)) {
            arrived = true;
            self.arrive(host, Connection::Data, item);
        }
        if arrived {
            Ok(())
        } else {
            Err("nothing of that is under way".to_owned())
        }
    }

    fn forge(&mut self, host: usize, words: &[&str]) -> Done {
        let message = forge::message(&mut self.frames, words)?;
        let connection = match message {
            Message::Heartbeat(_) | Message::Goodbye(_) => Connection::Control,
            _ => Connection::Data,
        };
        self.arrive(host, connection, Item::Message(message));
        Ok(())
    }

    /// What a network does not do to a connection, but a broken peer may.
    fn tamper(&mut self, how: &str, host: usize, kind: &str) -> Done {
        let link = self.link.as_mut().ok_or("there is no link")?;
        let (queue, place) = link.find(host, kind).ok_or_else(|| format!("no {kind} is under way"))?;
        match how {
            "drop" => {
                queue.remove(place);
            }
            "duplicate" => {
                let Item::Message(message) = &queue[place] else {
                    return Ok(());
                };
                let message = message.clone();
                queue.insert(place, Item::Message(message));
            }
            _ if place + 1 < queue.len() => queue.swap(place, place + 1),
            _ => return Err(format!("nothing is after the {kind}")),
        }
        Ok(())
    }

    fn change_link(&mut self, how: &str, which: &[&str]) -> Done {
        let link = self.link.as_mut().ok_or("there is no link")?;
        let to = match *which {
            [] => None,
            ["to", host] => Some(number(host)?),
            _ => return Err("link cut|mended [to HOST], link reset|stalled|flows".to_owned()),
        };
        match how {
            "cut" | "mended" => {
                for host in (0..2).filter(|host| to.is_none_or(|to| to == *host)) {
                    link.cut[host] = how == "cut";
                }
            }
            "reset" => link.reset(),
            "stalled" => link.stalled = true,
            "flows" => link.stalled = false,
            _ => return Err("link cut|mended [to HOST], link reset|stalled|flows".to_owned()),
        }
        Ok(())
    }

    fn kill(&mut self, host: usize, unsent: usize, power: bool) -> Done {
        if let Some(link) = &mut self.link {
            link.forget_last(1 - host, unsent);
            if power {
                link.cut = [true; 2];
            }
            link.close(host);
        }
        self.hosts[host].die(if power { "without power" } else { "dead" }, power);
        Ok(())
    }

    fn change_witness(&mut self, how: &str, which: &[&str]) -> Done {
        let to = match *which {
            [] => None,
            ["to", host] => Some(number(host)?),
            _ => return Err("witness unreachable|answers [to HOST]".to_owned()),
        };
        for host in (0..2).filter(|host| to.is_none_or(|to| to == *host)) {
            self.hosts[host].reaches_witness = match how {
                "unreachable" => false,
                "answers" => true,
                _ => return Err("witness unreachable|answers [to HOST]".to_owned()),
            };
        }
        Ok(())
    }

    // Hosts.

    fn freeze(&mut self, host: usize, frozen: bool) -> Done {
        if self.hosts[host].frozen == frozen {
            return Err("it is so already".to_owned());
        }
        self.hosts[host].frozen = frozen;
        Ok(())
    }

    fn carry_out_named(&mut self, host: usize, which: &[&str]) -> Done {
        if self.hosts[host].frozen {
            return Err("that host is frozen".to_owned());
        }
        match *which {
            [] => {
                while !self.waiting(host).is_empty() {
                    self.carry_out_next(host, None, None)?;
                }
                Ok(())
            }
            [name] => self.carry_out_next(host, Some(name), None),
            [name, "fails", why] => self.carry_out_next(host, Some(name), Some(why.trim_start_matches('"'))),
            _ => Err("do HOST [ORDER [fails \"why\"]]".to_owned()),
        }
    }

    /// Carries out everything outstanding, in a fixed order; guests and time stand.
    pub(super) fn stabilize(&mut self) -> Done {
        loop {
            let mut idle = true;
            for host in (0..2).filter(|host| !self.hosts[*host].frozen).collect::<Vec<_>>() {
                if !self.waiting(host).is_empty() {
                    idle = false;
                    self.carry_out_next(host, None, None)?;
                }
                for connection in BOTH {
                    while let Some(item) = self.link.as_mut().and_then(|link| link.next(host, connection)) {
                        idle = false;
                        self.arrive(host, connection, item);
                    }
                }
            }
            if idle {
                return Ok(());
            }
        }
    }
}
