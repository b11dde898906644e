//! What a role tells its operator: the log, and the alarms that its status shows.

use checkpoint::pair::Report;
use tracing::{info, warn};

/// Alarms that the status shows; older ones are in the log.
const ALARMS_MAX: usize = 16;

/// The last alarms, newest first.
#[derive(Clone, Debug, Default)]
pub struct Alarms(Vec<String>);

impl Alarms {
    /// Tells the operator.
    pub fn report(&mut self, report: Report) {
        match report {
            Report::Alarm(text) => {
                warn!("{text}");
                self.0.truncate(ALARMS_MAX - 1);
                self.0.insert(0, text);
            }
            Report::Note(text) => info!("{text}"),
            Report::State(_) => {}
        }
    }

    /// Returns the alarms.
    #[must_use]
    pub fn list(&self) -> &[String] {
        &self.0
    }
}
