//! What stands behind a primary's devices: each thing that the guest does is told to the loop. Decides nothing.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use checkpoint::Nic;
use checkpoint::pair::Delivery;
use link::mailbox;
use link::port::Observer;
use machine::GuestRam;
use machine::devices::block;
use storage::{FileImage, Image as _};
use tracing::{info, warn};

use crate::event::Event;

/// Time after a takeover before memory that is held twice is given back.
const GIVE_BACK_AFTER: Duration = Duration::from_secs(2);

/// After a takeover the committed image is of no more use where the guest has copies of its own: its memory goes back to
/// the host, a little at a time.
pub(crate) fn give_back_image(ram: GuestRam) -> std::io::Result<()> {
    const PAGES_AT_ONCE: u64 = 4_096;
    std::thread::Builder::new()
        .name("give-back".to_owned())
        .spawn(move || {
            // Clients come first: right after the takeover they need the processors.
            std::thread::sleep(GIVE_BACK_AFTER);
            let mut pages = 0;
            for first in (0..ram.pages()).step_by(PAGES_AT_ONCE.try_into().expect("a small number")) {
                match ram.give_back_image(first..(first + PAGES_AT_ONCE).min(ram.pages())) {
                    Ok(count) => pages += count,
                    Err(error) => return warn!("{}", link::describe(&error)),
                }
                std::thread::yield_now();
            }
            info!(pages, "memory that was held twice is given back");
        })?;
    Ok(())
}

/// What happens in a turn of a network card, which the loop takes itself.
#[derive(Clone)]
pub(crate) struct Events(pub(crate) mailbox::Sender<Event>);

impl Observer for Events {
    fn sent(&mut self, nic: Nic, frame: Bytes) {
        self.0.post(Event::GuestSent(nic, frame));
    }

    fn consumed(&mut self, delivery: Delivery) {
        self.0.post(Event::InputConsumed(delivery));
    }
}

/// The block device's back end: the image, and each write told to the loop before the guest hears of it.
pub(crate) struct Disk {
    image: Arc<FileImage>,
    /// Opened by the disk's thread; closed for good if the image could not be brought up to date.
    ready: Option<std::sync::mpsc::Receiver<()>>,
    events: mailbox::Sender<Event>,
}

impl Disk {
    pub(crate) fn new(
        image: Arc<FileImage>,
        ready: Option<std::sync::mpsc::Receiver<()>>,
        events: mailbox::Sender<Event>,
    ) -> Self {
        Self { image, ready, events }
    }

    fn wait(&mut self) -> std::io::Result<()> {
        if let Some(ready) = &self.ready {
            ready.recv().map_err(std::io::Error::other)?;
            self.ready = None;
        }
        Ok(())
    }
}

impl block::Backend for Disk {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        self.wait()?;
        self.image.read_at(offset, bytes)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.wait()?;
        let written = self.image.write_at(offset, bytes);
        let mut data = bytes.to_vec();
        if written.is_err() {
            // Some of it may be there: whatever is, the secondary's disk gets it too.
            self.image.read_at(offset, &mut data)?;
        }
        let data = data.into();
        self.events.send(Event::GuestWrote { offset, data });
        written
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.wait()?;
        self.image.flush()
    }
}
