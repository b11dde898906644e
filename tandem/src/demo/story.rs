//! What happens in the demo, told line by line with the time since the round began.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Instant;

use super::report::Report;

/// Tells the story, or keeps silent.
#[derive(Debug)]
pub(super) struct Story {
    aloud: bool,
    start: Mutex<Instant>,
}

impl Story {
    pub(super) fn new(aloud: bool) -> Self {
        Self {
            aloud,
            start: Mutex::new(Instant::now()),
        }
    }

    pub(super) fn title(&self, text: &str) {
        self.say(text);
    }

    /// Begins a round: its times count from now.
    pub(super) fn round(&self, number: u32, rounds: u32) {
        *self.start.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        if rounds > 1 {
            self.say(&format!("\nRound {number} of {rounds}"));
        }
    }

    /// Tells what has just happened.
    pub(super) fn tell(&self, text: &str) {
        self.tell_of(Instant::now(), text);
    }

    /// Tells what happened at a moment.
    pub(super) fn tell_of(&self, moment: Instant, text: &str) {
        let start = *self.start.lock().unwrap_or_else(PoisonError::into_inner);
        let ms = moment.saturating_duration_since(start).as_secs_f64() * 1e3;
        self.say(&format!("{ms:9.1} ms  {text}"));
    }

    /// Tells how it all ended.
    pub(super) fn summary(&self, report: &Report) {
        for line in report.summary() {
            self.say(&line);
        }
    }

    fn say(&self, line: &str) {
        if self.aloud {
            println!("{line}");
        }
    }
}
