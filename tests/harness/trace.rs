//! What happened last, for a failure's report. Kept as values, and turned into text only when asked for.

use std::collections::VecDeque;
use std::fmt::{self, Debug, Write as _};

use checkpoint::Tag;
use primary::event::Event as PrimaryEvent;
use secondary::event::Event as SecondaryEvent;

use crate::random::Random;

const LINES: usize = 80;
const LINE_CHARS: usize = 130;

/// One line of a trace.
pub enum Line {
    /// The primary's protocol on that host took a step.
    Primary(usize, Tag, PrimaryEvent),
    /// The secondary's protocol on that host took a step.
    Secondary(usize, Tag, SecondaryEvent),
    /// Anything else.
    Note(String),
}

impl Line {
    /// Tells apart what may be mistaken for one another at the same moment.
    fn number(&self) -> u64 {
        match self {
            Self::Primary(node, tag, _) => 2 * *node as u64 + 4 * tag.epoch.0,
            Self::Secondary(node, tag, _) => 1 + 2 * *node as u64 + 4 * tag.epoch.0,
            Self::Note(text) => text.len() as u64,
        }
    }
}

/// The last lines.
#[derive(Default)]
pub struct Trace {
    lines: VecDeque<(u64, Line)>,
    loud: bool,
    digest: u64,
}

impl Trace {
    /// Returns a digest of all lines so far.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Prints each line as it comes, instead of the last ones at a failure.
    pub fn be_loud(&mut self) {
        self.loud = true;
    }

    /// Adds a line at that time.
    pub fn add(&mut self, now: u64, line: Line) {
        if self.loud {
            eprint!("{}", text(now, &line));
        }
        self.digest = Random::new(self.digest ^ now ^ line.number() << 48).draw();
        if self.lines.len() == LINES {
            self.lines.pop_front();
        }
        self.lines.push_back((now, line));
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines
            .iter()
            .try_for_each(|(now, line)| f.write_str(&text(*now, line)))
    }
}

fn text(now: u64, line: &Line) -> String {
    let what = match line {
        Line::Primary(node, tag, event) => format!("primary   {node} {tag} {}", brief(event)),
        Line::Secondary(node, tag, event) => format!("secondary {node} {tag} {}", brief(event)),
        Line::Note(note) => note.clone(),
    };
    format!("  {:>5}.{:06} ms  {what}\n", now / 1_000_000, now % 1_000_000)
}

/// Shows the start of a value: enough to follow a trace.
pub fn brief(value: &impl Debug) -> String {
    let mut start = Start(String::new());
    // Stops at the limit.
    let _ = write!(start, "{value:?}");
    start.0
}

struct Start(String);

impl fmt::Write for Start {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.push_str(text);
        if self.0.len() < LINE_CHARS {
            return Ok(());
        }
        self.0.truncate(self.0.floor_char_boundary(LINE_CHARS));
        Err(fmt::Error)
    }
}
