//! A status as humans read it: aligned lines, units that fit the size, and nothing that a terminal obeys.

use std::fmt::{self, Display, Write};

use super::{Card, Checkpoints, Lag, LastSync, Memory, Mode, Peer, Queues, Rates, State, Status};

impl Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Display for Status {
    /// Writes the report for humans: one aligned line a subject, without a newline at the end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = Lines::default();
        lines.add("pair", &printable(&self.pair));
        lines.add(
            "node",
            &format!(
                "{} ({}, pid {})",
                printable(&self.node),
                printable(&self.role),
                self.pid
            ),
        );
        lines.add("state", &format!("{} for {}", self.state, span_ms(self.since_ms)));
        if let Some(reason) = &self.reason {
            lines.add("reason", &printable(reason));
        }
        lines.add("peer", &self.peer.to_string());
        if let Some(mode) = &self.mode {
            lines.add("mode", &mode.to_string());
        }
        lines.add("generation", &self.generation.to_string());
        lines.add("epoch", &self.epoch.to_string());
        lines.add("checkpoints", &self.checkpoints.to_string());
        lines.add("last", &self.last());
        if let Some(sync) = &self.last_sync {
            lines.add("sync", &sync.to_string());
        }
        lines.add("divergences", &self.divergences.to_string());
        lines.add("output", &self.queues.output());
        // With one card there is nothing to tell that was not told.
        for (number, card) in self.cards.iter().enumerate().filter(|_| self.cards.len() > 1) {
            lines.add(&format!("net{number}"), &card.to_string());
        }
        if let Some(lag) = &self.lag {
            lines.add("lag", &lag.to_string());
        }
        lines.add("input", &self.queues.input());
        lines.add("disk", &self.queues.disk());
        lines.add("link", &self.queues.link());
        if let Some(memory) = self.memory.text() {
            lines.add("memory", &memory);
        }
        lines.add("rates", &self.rates.to_string());
        if self.released_late > 0 {
            lines.add("dropped", &format!("{} frames, released too late", self.released_late));
        }
        if self.frames_refused > 0 {
            lines.add("refused", &format!("{} frames, by the TAP", self.frames_refused));
        }
        if self.frames_too_long > 0 {
            lines.add(
                "too long",
                &format!("{} frames of clients, dropped", self.frames_too_long),
            );
        }
        for alarm in &self.alarms {
            lines.add("ALARM", &printable(alarm));
        }
        f.write_str(lines.0.trim_end())
    }
}

impl Status {
    fn last(&self) -> String {
        let age = self
            .last_checkpoint_age_ms
            .map_or_else(|| "never".to_owned(), |ms| format!("{} ago", span_ms(ms)));
        let Some(last) = self.last_checkpoint else {
            return age;
        };
        format!(
            "{age}: {} pages ({} ahead), {}, paused {} ({} expected), committed after {}",
            last.pages,
            last.pages_ahead,
            size(last.bytes),
            span_us(last.pause_us),
            span_us(last.predicted_us),
            span_us(last.commit_us)
        )
    }
}

impl Queues {
    fn output(&self) -> String {
        format!(
            "{} frames held ({}), {} of the secondary's pending ({})",
            self.held_frames,
            size(self.held_bytes),
            self.pending_frames,
            size(self.pending_bytes)
        )
    }

    fn input(&self) -> String {
        let bytes = size(self.input_bytes_unconfirmed);
        format!("{} unconfirmed ({bytes})", self.inputs_unconfirmed)
    }

    fn disk(&self) -> String {
        format!(
            "{} in the overlay, {} of writes unacknowledged",
            size(self.overlay_bytes),
            size(self.writes_unacknowledged_bytes)
        )
    }

    fn link(&self) -> String {
        format!(
            "{} queued, {} staged",
            size(self.link_queued_bytes),
            size(self.staged_bytes)
        )
    }
}

impl Memory {
    /// Tells of the side that it is; nothing before there is something to tell.
    fn text(&self) -> Option<String> {
        if self.bases_bytes_max > 0 {
            let (bases, max) = (size(self.bases_bytes), size(self.bases_bytes_max));
            return Some(format!("{bases} to send differences to ({max} at most)"));
        }
        (self.pages_bytes_max > 0).then(|| {
            let (own, staged, max) = (self.own_bytes, self.staged_bytes, self.pages_bytes_max);
            format!(
                "{} of its own pages, {} staged ({} at most)",
                size(own),
                size(staged),
                size(max)
            )
        })
    }
}

impl Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", printable(&self.now), printable(&self.why))?;
        if self.now != "lockstep" {
            return Ok(());
        }
        for (count, what) in [(self.buffered_services, "service"), (self.buffered_flows, "flow")] {
            match count {
                0 => {}
                1 => write!(f, "; 1 {what} waits for checkpoints")?,
                _ => write!(f, "; {count} {what}s wait for checkpoints")?,
            }
        }
        Ok(())
    }
}

impl Display for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} frames equal on both sides, {} by checkpoints, {} unprotected, {} held ({})",
            printable(&self.tap),
            self.matched,
            self.released_by_checkpoint,
            self.released_unprotected,
            self.held_frames,
            size(self.held_bytes)
        )
    }
}

impl Display for Lag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (most, bound) = (span_us(self.most_us), span_us(self.bound_us));
        write!(
            f,
            "{most} at most in {} matches; a frame waits {bound} for its equal",
            self.matches
        )
    }
}

impl Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let node = self.node.as_deref().map_or_else(|| "unknown".to_owned(), printable);
        let connected = if self.connected { "connected" } else { "not connected" };
        write!(f, "{node} at {}, {connected}", printable(&self.addr))?;
        match self.streams {
            0 => Ok(()),
            1 => f.write_str(", 1 page stream"),
            streams => write!(f, ", {streams} page streams"),
        }
    }
}

impl Display for Checkpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.total)?;
        let by = [
            ("sync", self.sync),
            ("mismatch", self.mismatch),
            ("unmatched", self.unmatched),
            ("period", self.period),
            ("limit", self.limit),
            ("budget", self.budget),
            ("memory", self.memory),
            ("age", self.age),
            ("admin", self.admin),
        ];
        let told: Vec<_> = by
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, n)| format!("{n} {name}"))
            .collect();
        if told.is_empty() {
            Ok(())
        } else {
            write!(f, " ({})", told.join(", "))
        }
    }
}

impl Display for LastSync {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.memory_by_difference {
            "by difference"
        } else {
            "all of memory"
        };
        write!(f, "{how}: {} of {} pages, ", self.pages, self.pages_total)?;
        match self.blocks {
            Some(blocks) => write!(f, "{blocks} of {} blocks", self.blocks_total),
            None => write!(f, "{} blocks compared", self.blocks_total),
        }
    }
}

impl Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.0} inputs/s, {:.0} outputs/s, {:.0} pages/s, {:.1} MiB/s",
            self.inputs_per_s,
            self.outputs_per_s,
            self.pages_per_s,
            self.bytes_per_s / (1024.0 * 1024.0)
        )
    }
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, name: &str, value: &str) {
        writeln!(self.0, "{name:<12} {value}").expect("a string takes everything");
    }
}

/// Makes a text from elsewhere harmless to a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match UNITS.iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit),
        None => format!("{bytes} B"),
    }
}

pub(crate) fn span_ms(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        _ => format!("{} h {} min", ms / 3_600_000, ms % 3_600_000 / 60_000),
    }
}

fn span_us(us: u64) -> String {
    if us < 10_000 {
        format!("{us} µs")
    } else {
        span_ms(us / 1_000)
    }
}

#[cfg(test)]
mod tests {
    use crate::status::tests::example;
    use crate::status::{Card, Memory};

    #[test]
    fn the_text_for_humans_is_aligned_and_harmless_to_a_terminal() {
        let mut status = example();
        status.peer.node = Some("\x1b[2Jevil".into());
        status.alarms.push("the witness\ndoes not answer".into());
        let text = status.to_string();
        assert!(!text.contains('\x1b'), "{text}");
        assert!(
            text.lines().all(|line| line.len() > 13 && line.as_bytes()[12] == b' '),
            "{text}"
        );
        assert!(text.contains("at 10.0.0.2:4242, connected, 2 page streams"), "{text}");
        assert!(
            text.contains("memory       2.0 MiB to send differences to (64.0 MiB at most)"),
            "{text}"
        );
        assert!(text.contains("checkpoints  9 (1 sync, 8 mismatch)"), "{text}");
        assert!(
            text.contains(
                "last         412 ms ago: 10 pages (4 ahead), 40.0 KiB, paused 900 µs (850 µs expected), committed after 12 ms"
            )
        );
        assert!(
            text.contains("sync         by difference: 12 of 16384 pages, 3 of 1024 blocks"),
            "{text}"
        );
        status.memory = Memory {
            own_bytes: 40_960,
            pages_bytes_max: 128 << 20,
            ..Memory::default()
        };
        let text = status.to_string();
        assert!(
            text.contains("memory       40.0 KiB of its own pages, 0 B staged (128.0 MiB at most)"),
            "{text}"
        );
        assert_eq!(text.lines().filter(|line| line.starts_with("ALARM")).count(), 1);
    }

    #[test]
    fn cards_are_told_apart_where_there_are_several() {
        let card = |tap: &str| Card {
            tap: tap.to_owned(),
            matched: 9,
            ..Card::default()
        };
        let mut status = example();
        status.cards = vec![card("tap0")];
        assert!(!status.to_string().contains("net0"), "{status}");
        status.cards.push(card("tap1"));
        let text = status.to_string();
        assert!(
            text.contains("net1         tap1: 9 frames equal on both sides, 0 by"),
            "{text}"
        );
    }
}
