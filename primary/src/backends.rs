//! What stands behind a primary's devices: each thing that the guest does is told to the loop. Decides nothing.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use checkpoint::Nic;
use checkpoint::limits::ZEROS_BYTES_MAX;
use checkpoint::pair::Delivery;
use checkpoint::wire::Written;
use link::mailbox;
use link::port::Observer;
use machine::GuestRam;
use machine::devices::block;
use storage::{FileImage, Image as _, Room};
use tracing::{info, warn};

use crate::event::Event;

/// Bytes read at once of what a failed write has left.
const PIECE_BYTES: usize = 256 * 1024;
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

    /// A write has failed, and some of it may be there: whatever is, the secondary's disk gets it too.
    fn tell_what_is_there(&self, offset: u64, length: u64) -> std::io::Result<()> {
        for start in (offset..offset + length).step_by(PIECE_BYTES) {
            let piece = (offset + length - start).min(PIECE_BYTES as u64);
            let piece = usize::try_from(piece).expect("a small number");
            let written = storage::verify::read_written(&*self.image, start, piece)?;
            self.events.send(Event::GuestWrote { offset: start, written });
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
        let result = self.image.write_at(offset, bytes);
        if result.is_err() {
            self.tell_what_is_there(offset, bytes.len() as u64)?;
        } else {
            let written = Written::Data(bytes.to_vec().into());
            self.events.send(Event::GuestWrote { offset, written });
        }
        result
    }

    fn zero(&mut self, offset: u64, length: u64, give_back: bool) -> std::io::Result<()> {
        self.wait()?;
        let room = if give_back { Room::GiveBack } else { Room::Keep };
        let (mut offset, end) = (offset, offset + length);
        while offset < end {
            let piece = ZEROS_BYTES_MAX.min(end - offset);
            let result = self.image.zero(offset, piece, room);
            if result.is_err() {
                self.tell_what_is_there(offset, piece)?;
                return result;
            }
            let written = Written::Zeros(piece);
            self.events.send(Event::GuestWrote { offset, written });
            offset += piece;
        }
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.wait()?;
        self.image.flush()
    }
}
