//! The network device: 256 buffers each way, none of which is ever waited for.
//!
//! A received frame is copied out and its buffer given back at once; frames to send are put into free buffers
//! and announced to the device once a round, by [`Net::kick`].

use alloc::vec;
use alloc::vec::Vec;

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

use super::devices::{self, Direct, Features, Registers};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE: usize = 256;
const BUFFER: usize = 2048;
/// `struct virtio_net_hdr`, all zero: no offloads.
const HEADER: usize = 12;
/// An Ethernet frame without its checksum.
const FRAME_MAX: usize = 1514;

/// The network device.
pub(crate) struct Net {
    registers: Registers,
    mac: [u8; 6],
    receive: Receive,
    transmit: Transmit,
}

struct Receive {
    queue: VirtQueue<Direct, QUEUE>,
    /// By token: what the device was given.
    buffers: Vec<[u8; BUFFER]>,
    /// By token: the place of its buffer.
    places: Vec<u16>,
    frame: Vec<u8>,
    news: bool,
}

struct Transmit {
    queue: VirtQueue<Direct, QUEUE>,
    buffers: Vec<[u8; BUFFER]>,
    /// By token: the place and the used length of its buffer.
    sent: Vec<(u16, usize)>,
    free: Vec<u16>,
    news: bool,
}

impl Net {
    /// Sets up the device and gives it all receive buffers.
    pub(crate) fn new(mut registers: Registers) -> Self {
        let agreed = devices::begin(&mut registers, Features::MAC);
        if !agreed.contains(Features::MAC) {
            panic!("the network device has no MAC address: give it one");
        }
        let Ok(mac) = registers.read_config_space::<[u8; 6]>(0) else {
            panic!("the network device has no configuration")
        };
        let receive = devices::queue(&mut registers, RECEIVE);
        let transmit = devices::queue(&mut registers, TRANSMIT);
        registers.finish_init();
        let mut receive = Receive {
            queue: receive,
            buffers: vec![[0; BUFFER]; QUEUE],
            places: vec![0; QUEUE],
            frame: Vec::with_capacity(BUFFER),
            news: false,
        };
        for place in (0..QUEUE).filter_map(|place| u16::try_from(place).ok()) {
            receive.give(place);
        }
        let transmit = Transmit {
            queue: transmit,
            buffers: vec![[0; BUFFER]; QUEUE],
            sent: vec![(0, 0); QUEUE],
            free: (0..QUEUE).rev().filter_map(|place| u16::try_from(place).ok()).collect(),
            news: false,
        };
        let mut net = Self {
            registers,
            mac,
            receive,
            transmit,
        };
        net.kick();
        net
    }

    pub(crate) fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Whether a received frame lies ready.
    pub(crate) fn has_frame(&self) -> bool {
        self.receive.queue.can_pop()
    }

    /// Announces what has been put into the queues, if the device wants to know.
    pub(crate) fn kick(&mut self) {
        if core::mem::take(&mut self.receive.news) {
            devices::kick(&mut self.registers, &self.receive.queue, RECEIVE);
        }
        if core::mem::take(&mut self.transmit.news) {
            devices::kick(&mut self.registers, &self.transmit.queue, TRANSMIT);
        }
    }
}

impl Receive {
    fn give(&mut self, place: u16) {
        let buffer = &mut self.buffers[usize::from(place)];
        // SAFETY: the buffer lives as long as the queue and is not touched until it has been popped.
        match unsafe { self.queue.add(&[], &mut [buffer]) } {
            Ok(token) => self.places[usize::from(token)] = place,
            Err(error) => panic!("network receive queue: {error}"),
        }
        self.news = true;
    }

    /// Copies the next frame out and gives its buffer back.
    fn take(&mut self) -> bool {
        let Some(token) = self.queue.peek_used() else {
            return false;
        };
        let Some(place) = self.places.get(usize::from(token)).copied() else {
            panic!("the network device has used a buffer that it was not given");
        };
        let buffer = &mut self.buffers[usize::from(place)];
        // SAFETY: this is the buffer that the token was given for.
        let length = match unsafe { self.queue.pop_used(token, &[], &mut [buffer]) } {
            Ok(length) => usize::try_from(length).unwrap_or(usize::MAX).min(BUFFER),
            Err(error) => panic!("network receive queue: {error}"),
        };
        self.frame.clear();
        self.frame
            .extend_from_slice(buffer.get(HEADER..length).unwrap_or_default());
        self.give(place);
        true
    }
}

impl Transmit {
    /// Takes back what the device has sent; returns whether there is a free buffer.
    fn reclaim(&mut self) -> bool {
        while let Some(token) = self.queue.peek_used() {
            let Some((place, length)) = self.sent.get(usize::from(token)).copied() else {
                panic!("the network device has sent a buffer that it was not given");
            };
            let buffer = &self.buffers[usize::from(place)][..length];
            // SAFETY: this is the buffer that the token was given for.
            if let Err(error) = unsafe { self.queue.pop_used(token, &[buffer], &mut []) } {
                panic!("network transmit queue: {error}");
            }
            self.free.push(place);
        }
        !self.free.is_empty()
    }
}

/// A frame that was received.
pub(crate) struct Received<'a>(&'a [u8]);

/// Room for a frame to send.
pub(crate) struct Room<'a>(&'a mut Transmit);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let Some(place) = self.0.free.pop() else {
            panic!("a token without room")
        };
        let buffer = &mut self.0.buffers[usize::from(place)];
        let length = HEADER + len;
        let result = f(&mut buffer[HEADER..length]);
        // SAFETY: the buffer lives as long as the queue and is not touched until it has been popped.
        match unsafe { self.0.queue.add(&[&buffer[..length]], &mut []) } {
            Ok(token) => self.0.sent[usize::from(token)] = (place, length),
            Err(error) => panic!("network transmit queue: {error}"),
        }
        self.0.news = true;
        result
    }
}

impl Device for Net {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Room<'_>)> {
        // A frame may need an answer at once: without room for one it stays where it is.
        if !self.transmit.reclaim() || !self.receive.take() {
            return None;
        }
        Some((Received(&self.receive.frame), Room(&mut self.transmit)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Room<'_>> {
        self.transmit.reclaim().then_some(Room(&mut self.transmit))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_MAX;
        capabilities
    }
}
