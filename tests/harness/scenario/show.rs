//! Events, actions and messages as a scenario shows them: one line each, without anything that changes from run to run.

use checkpoint::pages::identical::{PageHashes, PageMatches};
use checkpoint::pair::{Delivery, RecordUpdate, Report, WitnessAnswer};
use checkpoint::wire::{Begin, DiskWrite, Held, Message, Written};
use checkpoint::{Duration, EpochMode, Instant, Tag};
use primary::event::{Action as PrimaryAction, Event as PrimaryEvent, GuestEnd, Outcome as PrimaryOutcome};
use secondary::event::{Action as SecondaryAction, Event as SecondaryEvent, Outcome as SecondaryOutcome};

use super::frames::Frames;

/// What is needed to show a value.
pub(super) struct Shown<'a> {
    pub(super) frames: &'a Frames,
    /// By the clock of the host concerned.
    pub(super) now: Instant,
}

impl Shown<'_> {
    pub(super) fn primary_event(&self, event: &PrimaryEvent) -> String {
        match event {
            PrimaryEvent::CheckpointAsked => "CheckpointAsked".to_owned(),
            PrimaryEvent::CheckpointSent(_) => "CheckpointSent".to_owned(),
            PrimaryEvent::CompareAsked(tag) => format!("CompareAsked {tag}"),
            PrimaryEvent::Connected(welcome) => format!("Connected to {}", welcome.node),
            PrimaryEvent::Copied { tag, .. } => format!("Copied {tag}"),
            PrimaryEvent::DiskSynced(_) => "DiskSynced".to_owned(),
            PrimaryEvent::FrameArrived(nic, frame) => format!("FrameArrived {}", self.frames.show_at(*nic, frame)),
            PrimaryEvent::GuestSent(nic, frame) => format!("GuestSent {}", self.frames.show_at(*nic, frame)),
            PrimaryEvent::GuestStopped(end) => match end {
                GuestEnd::PowerOff => "GuestStopped: power off".to_owned(),
                GuestEnd::Reset => "GuestStopped: reset".to_owned(),
                GuestEnd::Crashed(why) => format!("GuestStopped: {why}"),
            },
            PrimaryEvent::GuestWrote { offset, written } => format!("GuestWrote {}", self.written(*offset, written)),
            PrimaryEvent::Hashed(hashes) => format!("Hashed {}", hashes_line(hashes)),
            PrimaryEvent::InputConsumed(delivery) => format!("InputConsumed {}", self.delivery(delivery)),
            PrimaryEvent::LinkClosed(cause) => format!("LinkClosed: {cause}"),
            PrimaryEvent::Looked(look) => format!("Looked {}: {} dirty, {} ahead", look.tag, look.dirty, look.ahead),
            PrimaryEvent::MemorySynced(_) => "MemorySynced".to_owned(),
            PrimaryEvent::Paused => "Paused".to_owned(),
            PrimaryEvent::PeerSent(message) => format!("hears {}", self.message(message)),
            PrimaryEvent::RecordStored(record) => format!("RecordStored {}", record_line(record)),
            PrimaryEvent::ShippedAhead(shipment) => format!("ShippedAhead {}: {}", shipment.tag, shipment.pages),
            PrimaryEvent::StopAsked => "StopAsked".to_owned(),
            PrimaryEvent::Timeout => "Timeout".to_owned(),
            PrimaryEvent::VmFailed(why) => format!("VmFailed: {why}"),
            PrimaryEvent::WitnessAnswered(term, answer) => answer_line(term.0, answer),
        }
    }

    pub(super) fn secondary_event(&self, event: &SecondaryEvent) -> String {
        match event {
            SecondaryEvent::Checked(tag, Ok(())) => format!("Checked {tag}: it can be loaded"),
            SecondaryEvent::Checked(tag, Err(why)) => format!("Checked {tag}: {why}"),
            SecondaryEvent::Compared(matches) => format!("Compared {}", matches_line(matches)),
            SecondaryEvent::ControlClosed(end) => format!("ControlClosed: {end}"),
            SecondaryEvent::DataClosed(end) => format!("DataClosed: {end}"),
            SecondaryEvent::DiskCommitted(epoch) => format!("DiskCommitted {epoch}"),
            SecondaryEvent::GuestSent(nic, frame) => format!("GuestSent {}", self.frames.show_at(*nic, frame)),
            SecondaryEvent::GuestStopped(why) => format!("GuestStopped: {why}"),
            SecondaryEvent::InputConsumed(delivery) => format!("InputConsumed {}", self.delivery(delivery)),
            SecondaryEvent::Loaded(tag) => format!("Loaded {tag}"),
            SecondaryEvent::Counted(tag, pages) => format!("Counted {tag}: {pages} pages"),
            SecondaryEvent::OutputDrained => "OutputDrained".to_owned(),
            SecondaryEvent::NearLimit => "NearLimit".to_owned(),
            SecondaryEvent::PagesArrived(stream, batch) => {
                let on = if *stream == 0 {
                    String::new()
                } else {
                    format!(" on stream {stream}")
                };
                let content = String::from_utf8_lossy(&batch.encoded);
                format!("hears Pages {}{on}: {content}", batch.tag)
            }
            SecondaryEvent::PagesClosed(end) => format!("PagesClosed: {end}"),
            SecondaryEvent::Paused => "Paused".to_owned(),
            SecondaryEvent::PeerSent(message) => format!("hears {}", self.message(message)),
            SecondaryEvent::RecordStored(record) => format!("RecordStored {}", record_line(record)),
            SecondaryEvent::StageFailed(why) => format!("StageFailed: {why}"),
            SecondaryEvent::StopAsked => "StopAsked".to_owned(),
            SecondaryEvent::TakeOverAsked => "TakeOverAsked".to_owned(),
            SecondaryEvent::Timeout => "Timeout".to_owned(),
            SecondaryEvent::VmFailed(why) => format!("VmFailed: {why}"),
            SecondaryEvent::WitnessAnswered(term, answer) => answer_line(term.0, answer),
        }
    }

    pub(super) fn primary_action(&self, action: &PrimaryAction) -> String {
        match action {
            PrimaryAction::Alike(matches) => format!("Alike {}", matches_line(matches)),
            PrimaryAction::AskAlike(tag) => format!("AskAlike {tag}"),
            PrimaryAction::Claim(term) => format!("Claim term {term}"),
            PrimaryAction::CloseLink => "CloseLink".to_owned(),
            PrimaryAction::CompareBlocks(hashes) => {
                format!("CompareBlocks {} from {}", hashes.hashes.len(), hashes.first)
            }
            PrimaryAction::Deliver(delivery) => format!("Deliver {}", self.delivery(delivery)),
            PrimaryAction::Dial => "Dial".to_owned(),
            PrimaryAction::End(PrimaryOutcome::Ended(reason)) => format!("End in order: {reason}"),
            PrimaryAction::End(PrimaryOutcome::Fenced(reason)) => format!("End fenced: {reason}"),
            PrimaryAction::End(PrimaryOutcome::Failed(reason)) => format!("End failed: {reason}"),
            PrimaryAction::HoldInput(hold) => format!("HoldInput {}", if *hold { "on" } else { "off" }),
            PrimaryAction::KeepDirty => "KeepDirty".to_owned(),
            PrimaryAction::PauseVm => "PauseVm".to_owned(),
            PrimaryAction::Report(report) => report_line(report),
            PrimaryAction::Reseed => "Reseed".to_owned(),
            PrimaryAction::ResumeVm => "ResumeVm".to_owned(),
            PrimaryAction::Send(message) | PrimaryAction::SendControl(message) => {
                format!("Send {}", self.message(message))
            }
            PrimaryAction::SendBlocks { tag, blocks } => format!("SendBlocks {tag} {blocks:?}"),
            PrimaryAction::SendCheckpoint { tag, blocks, .. } if blocks.is_empty() => format!("SendCheckpoint {tag}"),
            PrimaryAction::SendCheckpoint { tag, blocks, .. } => format!("SendCheckpoint {tag} blocks={blocks:?}"),
            PrimaryAction::SeedEntropy(Some(_)) => "SeedEntropy from the checkpoint".to_owned(),
            PrimaryAction::SeedEntropy(None) => "SeedEntropy from the host".to_owned(),
            PrimaryAction::ShipAhead { tag, .. } => format!("ShipAhead {tag}"),
            PrimaryAction::StoreRecord(record) => format!("StoreRecord {}", record_line(record)),
            PrimaryAction::SyncMemory { difference, .. } => format!("SyncMemory{}", by_difference(*difference)),
            PrimaryAction::Transmit { nic, frames, not_after } => {
                let names: Vec<String> = frames.iter().map(|frame| self.frames.show_at(*nic, frame)).collect();
                let until = not_after.map_or_else(String::new, |limit| format!(" until={}", self.relative(limit)));
                format!("Transmit {}{until}", names.join(" "))
            }
        }
    }

    pub(super) fn secondary_action(&self, action: &SecondaryAction) -> String {
        match action {
            SecondaryAction::ApplyPages(..) => "ApplyPages".to_owned(),
            SecondaryAction::ApplyWrite(_) => "ApplyWrite".to_owned(),
            SecondaryAction::BeginSync(begin) => format!("BeginSync {}", begin_line(begin)),
            SecondaryAction::Check(tag) => format!("Check {tag}"),
            SecondaryAction::Claim(term) => format!("Claim term {term}"),
            SecondaryAction::CloseLink => "CloseLink".to_owned(),
            SecondaryAction::Compare(hashes) => format!("Compare {}", hashes_line(hashes)),
            SecondaryAction::CommitDisk(epoch) => format!("CommitDisk {epoch}"),
            SecondaryAction::CountOwn(tag) => format!("CountOwn {tag}"),
            SecondaryAction::Deliver(delivery) => format!("Deliver {}", self.delivery(delivery)),
            SecondaryAction::DropDeliveries => "DropDeliveries".to_owned(),
            SecondaryAction::DropStage => "DropStage".to_owned(),
            SecondaryAction::End(outcome) => match outcome {
                SecondaryOutcome::Ended(reason) => format!("End in order: {reason}"),
                SecondaryOutcome::Fenced { reason, memory } => format!("End fenced with {memory}: {reason}"),
                SecondaryOutcome::Failed(reason) => format!("End failed: {reason}"),
                SecondaryOutcome::Unpaired {
                    reason,
                    memory: Some(memory),
                } => format!("End unpaired with {memory}: {reason}"),
                SecondaryOutcome::Unpaired { reason, memory: None } => format!("End unpaired: {reason}"),
                SecondaryOutcome::TakenOver(taken) => {
                    format!(
                        "End taken over: generation {}, after epoch {}",
                        taken.generation, taken.last_epoch
                    )
                }
            },
            SecondaryAction::HoldOutput(hold) => format!("HoldOutput {}", if *hold { "on" } else { "off" }),
            SecondaryAction::Load(tag) => format!("Load {tag}"),
            SecondaryAction::PauseVm => "PauseVm".to_owned(),
            SecondaryAction::Report(report) => report_line(report),
            SecondaryAction::ResumeVm => "ResumeVm".to_owned(),
            SecondaryAction::Send(message) | SecondaryAction::SendControl(message) => {
                format!("Send {}", self.message(message))
            }
            SecondaryAction::SeedEntropy(_) => "SeedEntropy from the checkpoint".to_owned(),
            SecondaryAction::StageDevices(_) => "StageDevices".to_owned(),
            SecondaryAction::StagePages(..) => "StagePages".to_owned(),
            SecondaryAction::StageWrite(_) => "StageWrite".to_owned(),
            SecondaryAction::StoreRecord(record) => format!("StoreRecord {}", record_line(record)),
        }
    }

    pub(super) fn message(&self, message: &Message) -> String {
        let name = message_name(message);
        match message {
            Message::Heartbeat(_) | Message::Hello(_) | Message::Welcome(_) | Message::Attach(_) => name.to_owned(),
            Message::Refuse(why) => format!("{name}: {why}"),
            Message::Goodbye(why) => format!("{name}: {why}"),
            Message::Begin(begin) => format!("{name} {}", begin_line(begin)),
            Message::Want(tag)
            | Message::Acknowledge(tag)
            | Message::Loaded(tag)
            | Message::Committed(tag)
            | Message::Halt(tag)
            | Message::Halted(tag) => format!("{name} {tag}"),
            Message::PageHashes(hashes) => format!("{name} {}", hashes_line(hashes)),
            Message::PageMatches(matches) => format!("{name} {}", matches_line(matches)),
            Message::Confirm(tag, number) => format!("{name} {tag} #{}", number.0),
            Message::BlockHashes(hashes) => {
                format!("{name} {}: {} from {}", hashes.tag, hashes.hashes.len(), hashes.first)
            }
            Message::SyncBlock(DiskWrite { tag, offset, written })
            | Message::Write(DiskWrite { tag, offset, written }) => {
                format!("{name} {tag}: {}", self.written(*offset, written))
            }
            Message::Input(input) => {
                format!(
                    "{name} {} #{} {}",
                    input.tag,
                    input.number.0,
                    self.frames.show_at(input.nic, &input.frame)
                )
            }
            Message::Pages(batch) => format!("{name} {}: {}", batch.tag, String::from_utf8_lossy(&batch.encoded)),
            Message::DeviceState(state) => format!("{name} {}", state.tag),
            Message::NetworkState(state) => format!("{name} {}", state.tag),
            Message::End(mark) => {
                let base = mark.base.map_or_else(|| "none".to_owned(), |base| base.to_string());
                let next = match mark.next {
                    EpochMode::Lockstep => "",
                    EpochMode::Buffered => " next=buffered",
                };
                format!(
                    "{name} {}: base={base} pages={} writes={} input={}{next}",
                    mark.tag,
                    mark.pages.pages(),
                    mark.writes,
                    mark.input.0
                )
            }
            Message::Output(output) => format!(
                "{name} {} {}",
                output.tag,
                self.frames.show_at(output.nic, &output.frame)
            ),
        }
    }

    pub(super) fn delivery(&self, delivery: &Delivery) -> String {
        let number = delivery
            .number
            .map_or_else(String::new, |number| format!("#{} ", number.0));
        let wire = self.frames.show_at(delivery.nic, &delivery.wire);
        if delivery.guest == delivery.wire {
            format!("{number}{wire}")
        } else {
            format!("{number}{wire} as {}", self.frames.show(&delivery.guest))
        }
    }

    fn relative(&self, at: Instant) -> String {
        if at < self.now {
            format!("-{}", milliseconds(self.now.since(at)))
        } else {
            format!("+{}", milliseconds(at.since(self.now)))
        }
    }

    fn written(&self, offset: u64, written: &Written) -> String {
        match written {
            Written::Data(data) if storage::verify::is_zero(data) => format!("at {offset} zeros"),
            Written::Data(data) => sectors(offset, data),
            Written::Zeros(len) => format!("at {offset} {len} zeros"),
        }
    }
}

fn hashes_line(hashes: &PageHashes) -> String {
    let pages: Vec<String> = hashes.pages.iter().map(|(page, _)| page.to_string()).collect();
    format!("{}: {}", hashes.tag, pages.join(" "))
}

fn matches_line(matches: &PageMatches) -> String {
    let alike: Vec<_> = matches
        .alike
        .iter()
        .map(|alike| if *alike { "yes" } else { "no" })
        .collect();
    format!("{}: {}", matches.tag, alike.join(" "))
}

fn by_difference(difference: bool) -> &'static str {
    if difference { " by difference" } else { "" }
}

fn begin_line(begin: &Begin) -> String {
    let Begin {
        tag,
        base: Held { memory, disk },
    } = begin;
    let on = |what, tag: &Option<Tag>| tag.map_or_else(String::new, |tag| format!(" {what}={tag}"));
    format!("{tag}{}{}", on("memory", memory), on("disk", disk))
}

/// Shows the sectors that are not zero, with their numbers.
pub(super) fn sectors(offset: u64, data: &[u8]) -> String {
    let mut shown = Vec::new();
    for (number, sector) in (offset / 512..).zip(data.chunks(512)) {
        let text = String::from_utf8_lossy(sector);
        let text = text.trim_end_matches('\0');
        if !text.is_empty() {
            shown.push(format!("{number}={text}"));
        }
    }
    shown.join(" ")
}

/// Returns the name of the message's kind.
pub(super) fn message_name(message: &Message) -> &'static str {
    match message {
        Message::Hello(_) => "Hello",
        Message::Welcome(_) => "Welcome",
        Message::Refuse(_) => "Refuse",
        Message::Attach(_) => "Attach",
        Message::Heartbeat(_) => "Heartbeat",
        Message::Goodbye(_) => "Goodbye",
        Message::Begin(_) => "Begin",
        Message::BlockHashes(_) => "BlockHashes",
        Message::SyncBlock(_) => "SyncBlock",
        Message::Input(_) => "Input",
        Message::Write(_) => "Write",
        Message::Pages(_) => "Pages",
        Message::DeviceState(_) => "DeviceState",
        Message::NetworkState(_) => "NetworkState",
        Message::End(_) => "End",
        Message::Output(_) => "Output",
        Message::Confirm(..) => "Confirm",
        Message::Want(_) => "Want",
        Message::Acknowledge(_) => "Acknowledge",
        Message::Loaded(_) => "Loaded",
        Message::Committed(_) => "Committed",
        Message::Halt(_) => "Halt",
        Message::Halted(_) => "Halted",
        Message::PageHashes(_) => "PageHashes",
        Message::PageMatches(_) => "PageMatches",
    }
}

pub(super) fn record_line(record: &RecordUpdate) -> String {
    let RecordUpdate {
        generation,
        role,
        committed,
        complete,
        clean,
    } = record;
    let complete = if *complete { "" } else { " incomplete" };
    let clean = if *clean { " clean" } else { "" };
    format!("{generation}/{committed} {role}{complete}{clean}")
}

pub(super) fn milliseconds(span: Duration) -> String {
    let (whole, rest) = (span.0 / 1_000_000, span.0 % 1_000_000);
    let fraction = format!("{rest:06}");
    match fraction.trim_end_matches('0') {
        "" => format!("{whole}ms"),
        fraction => format!("{whole}.{fraction}ms"),
    }
}

fn answer_line(term: u64, answer: &WitnessAnswer) -> String {
    match answer {
        WitnessAnswer::Won => format!("WitnessAnswered term {term}: won"),
        WitnessAnswer::LostTo(owner) => format!("WitnessAnswered term {term}: it is {owner}'s"),
        WitnessAnswer::Unreachable(_) => format!("WitnessAnswered term {term}: unreachable"),
    }
}

fn report_line(report: &Report) -> String {
    match report {
        Report::Alarm(text) => format!("Alarm: {text}"),
        Report::Note(text) => format!("Note: {text}"),
        Report::State(name) => format!("State {name}"),
    }
}
