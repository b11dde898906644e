//! The network device: 256 buffers each way, none of which is ever waited for.
//!
//! A received frame is copied out and its buffer given back at once; frames to send are put into free buffers
//! and announced to the device once a round, by [`Net::kick`]. If the device offers several pairs of queues, all are
//! used: the buffers to receive are divided among them, and frames of one flow are sent by one queue.

use alloc::vec;
use alloc::vec::Vec;

use guest::spread;
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

use super::console::print;
use super::devices::{self, Direct, Features, Registers};
use super::doorbell;

const QUEUE: usize = 256;
const BUFFER: usize = 2048;
/// `struct virtio_net_hdr`, all zero: no offloads.
const HEADER: usize = 12;
/// An Ethernet frame without its checksum.
const FRAME_MAX: usize = 1514;
/// The most pairs of queues that are used.
const PAIRS_MAX: u16 = 8;
/// Where the configuration says how many there are.
const PAIRS_AT: usize = 8;
/// A command's class and number: use so many pairs.
const USE_PAIRS: [u8; 2] = [4, 0];
const CONTROL_QUEUE: usize = 4;

/// The network device.
pub(crate) struct Net {
    registers: Registers,
    mac: [u8; 6],
    receive: Vec<Receive>,
    /// The queue that is looked at first when the next frame is taken.
    next: usize,
    frame: Vec<u8>,
    transmit: Transmit,
    /// Kept because the device goes on looking at its rings.
    _control: Option<Control>,
}

type Control = VirtQueue<Direct, CONTROL_QUEUE>;

struct Receive {
    number: u16,
    queue: VirtQueue<Direct, QUEUE>,
    /// By place: what the device was given.
    buffers: Vec<[u8; BUFFER]>,
    /// By token: the place of its buffer.
    places: Vec<u16>,
    news: bool,
    /// A frame has come by it.
    in_use: bool,
}

struct Transmit {
    queues: Vec<Lane>,
    buffers: Vec<[u8; BUFFER]>,
    free: Vec<u16>,
}

/// One queue of frames to send.
struct Lane {
    number: u16,
    queue: VirtQueue<Direct, QUEUE>,
    /// By token: the place and the used length of its buffer.
    sent: Vec<(u16, usize)>,
    news: bool,
    /// A frame has left by it.
    in_use: bool,
}

impl Net {
    /// Sets up the device and gives it all receive buffers.
    pub(crate) fn new(mut registers: Registers) -> Self {
        let known = Features::MAC | Features::CONTROL | Features::SEVERAL;
        let agreed = devices::begin(&mut registers, known);
        if !agreed.contains(Features::MAC) {
            panic!("the network device has no MAC address: give it one");
        }
        let Ok(mac) = registers.read_config_space::<[u8; 6]>(0) else {
            panic!("the network device has no configuration")
        };
        let offered = if agreed.contains(Features::CONTROL | Features::SEVERAL) {
            registers.read_config_space::<u16>(PAIRS_AT).unwrap_or(1)
        } else {
            1
        };
        let pairs = offered.clamp(1, PAIRS_MAX);
        let receive = (0..pairs).map(|pair| Receive::new(&mut registers, 2 * pair, QUEUE / usize::from(pairs)));
        let receive = receive.collect();
        let transmit = Transmit::new(&mut registers, pairs);
        let mut control = (pairs > 1).then(|| devices::queue(&mut registers, 2 * offered));
        registers.finish_init();
        if let Some(control) = &mut control {
            ask_for_pairs(&mut registers, control, 2 * offered, pairs);
        }
        let mut net = Self {
            registers,
            mac,
            receive,
            next: 0,
            frame: Vec::with_capacity(BUFFER),
            transmit,
            _control: control,
        };
        net.receive.iter_mut().for_each(Receive::give_all);
        net.kick();
        net
    }

    /// How many pairs of queues it uses.
    pub(crate) fn pairs(&self) -> usize {
        self.receive.len()
    }

    pub(crate) fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Whether a received frame lies ready.
    pub(crate) fn has_frame(&self) -> bool {
        self.receive.iter().any(|receive| receive.queue.can_pop())
    }

    /// Announces what has been put into the queues, if the device wants to know.
    pub(crate) fn kick(&mut self) {
        for receive in &mut self.receive {
            if core::mem::take(&mut receive.news) {
                devices::kick(&mut self.registers, &receive.queue, receive.number);
            }
        }
        for lane in &mut self.transmit.queues {
            if core::mem::take(&mut lane.news) {
                devices::kick(&mut self.registers, &lane.queue, lane.number);
            }
        }
    }

    /// Copies the next frame out, of one queue after the other.
    fn take(&mut self) -> bool {
        let queues = self.receive.len();
        for _ in 0..queues {
            let receive = &mut self.receive[self.next];
            self.next = (self.next + 1) % queues;
            if receive.take(&mut self.frame) {
                if queues > 1 && !core::mem::replace(&mut receive.in_use, true) {
                    tell_use(receive.number);
                }
                return true;
            }
        }
        false
    }
}

/// Says, once for each of several queues, that a frame has come or left by it.
fn tell_use(queue: u16) {
    print(&alloc::format!("tandem guest: network queue {queue} is in use"));
}

/// Has the device use so many pairs of queues.
fn ask_for_pairs(registers: &mut Registers, control: &mut Control, number: u16, pairs: u16) {
    let [low, high] = pairs.to_le_bytes();
    let [class, command] = USE_PAIRS;
    let asked = [class, command, low, high];
    let mut answer = [0xff];
    // SAFETY: both buffers are here until the queue has given them back.
    let token = match unsafe { control.add(&[&asked], &mut [&mut answer]) } {
        Ok(token) => token,
        Err(error) => panic!("network control queue: {error}"),
    };
    devices::kick(registers, control, number);
    while !control.can_pop() {
        doorbell::wait(0);
    }
    // SAFETY: these are the buffers that the token was given for.
    if let Err(error) = unsafe { control.pop_used(token, &[&asked], &mut [&mut answer]) } {
        panic!("network control queue: {error}");
    }
    if answer != [0] {
        panic!("the network device refuses to use the {pairs} pairs of queues that it offers");
    }
}

impl Receive {
    fn new(registers: &mut Registers, number: u16, buffers: usize) -> Self {
        Self {
            number,
            queue: devices::queue(registers, number),
            buffers: vec![[0; BUFFER]; buffers],
            places: vec![0; QUEUE],
            news: false,
            in_use: false,
        }
    }

    fn give_all(&mut self) {
        for place in (0..self.buffers.len()).filter_map(|place| u16::try_from(place).ok()) {
            self.give(place);
        }
    }

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
    fn take(&mut self, frame: &mut Vec<u8>) -> bool {
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
        frame.clear();
        frame.extend_from_slice(buffer.get(HEADER..length).unwrap_or_default());
        self.give(place);
        true
    }
}

impl Transmit {
    fn new(registers: &mut Registers, pairs: u16) -> Self {
        let lane = |number| Lane {
            number,
            queue: devices::queue(registers, number),
            sent: vec![(0, 0); QUEUE],
            news: false,
            in_use: false,
        };
        Self {
            queues: (0..pairs).map(|pair| 2 * pair + 1).map(lane).collect(),
            // No more than one queue has room for.
            buffers: vec![[0; BUFFER]; QUEUE],
            free: (0..QUEUE).rev().filter_map(|place| u16::try_from(place).ok()).collect(),
        }
    }

    /// Takes back what the device has sent; returns whether there is a free buffer.
    fn reclaim(&mut self) -> bool {
        for lane in &mut self.queues {
            lane.reclaim(&self.buffers, &mut self.free);
        }
        !self.free.is_empty()
    }
}

impl Lane {
    fn reclaim(&mut self, buffers: &[[u8; BUFFER]], free: &mut Vec<u16>) {
        while let Some(token) = self.queue.peek_used() {
            let Some((place, length)) = self.sent.get(usize::from(token)).copied() else {
                panic!("the network device has sent a buffer that it was not given");
            };
            let buffer = &buffers[usize::from(place)][..length];
            // SAFETY: this is the buffer that the token was given for.
            if let Err(error) = unsafe { self.queue.pop_used(token, &[buffer], &mut []) } {
                panic!("network transmit queue: {error}");
            }
            free.push(place);
        }
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
        let queues = self.0.queues.len();
        let lane = spread::queue(&buffer[HEADER..length], queues);
        let lane = &mut self.0.queues[lane];
        // SAFETY: the buffer lives as long as the queue and is not touched until it has been popped.
        match unsafe { lane.queue.add(&[&buffer[..length]], &mut []) } {
            Ok(token) => lane.sent[usize::from(token)] = (place, length),
            Err(error) => panic!("network transmit queue: {error}"),
        }
        lane.news = true;
        if queues > 1 && !core::mem::replace(&mut lane.in_use, true) {
            tell_use(lane.number);
        }
        result
    }
}

impl Device for Net {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Room<'_>)> {
        // A frame may need an answer at once: without room for one it stays where it is.
        if !self.transmit.reclaim() || !self.take() {
            return None;
        }
        Some((Received(&self.frame), Room(&mut self.transmit)))
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
