//! A network in memory for the tests of the card.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use rustix::event::EventfdFlags;

use crate::devices::net::{Backend, CardConfig};
use crate::offload::Offloads;

/// A card of which nothing but the address is offered.
pub(super) const CONFIG: CardConfig = CardConfig {
    mac: [2, 0, 0, 0, 0, 1],
    offloads: false,
    queues: 1,
};

/// A network in memory: what was transmitted, what is to be received, what was delivered.
#[derive(Clone)]
pub(super) struct Wire(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) sent: Mutex<Vec<Vec<u8>>>,
    pub(super) waiting: Mutex<VecDeque<Bytes>>,
    pub(super) delivered: Mutex<Vec<Bytes>>,
    pub(super) accepted: Mutex<Option<Offloads>>,
    pub(super) full: AtomicBool,
    pub(super) ready: OwnedFd,
}

impl Wire {
    pub(super) fn new() -> Self {
        let ready = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        Self(Arc::new(Inner {
            sent: Mutex::default(),
            waiting: Mutex::default(),
            delivered: Mutex::default(),
            accepted: Mutex::default(),
            full: AtomicBool::new(false),
            ready,
        }))
    }

    pub(super) fn push(&self, frame: Vec<u8>) {
        self.0.waiting.lock().unwrap().push_back(frame.into());
        rustix::io::write(&self.0.ready, &1u64.to_ne_bytes()).unwrap();
    }

    pub(super) fn sent(&self) -> Vec<Vec<u8>> {
        self.0.sent.lock().unwrap().clone()
    }

    pub(super) fn delivered(&self) -> usize {
        self.0.delivered.lock().unwrap().len()
    }
}

impl Backend for Wire {
    fn accepts(&mut self, offloads: Offloads) {
        *self.0.accepted.lock().unwrap() = Some(offloads);
    }

    fn transmit(&mut self, frame: &[u8]) {
        self.0.sent.lock().unwrap().push(frame.to_vec());
    }

    fn may_transmit(&self) -> bool {
        !self.0.full.load(Ordering::Relaxed)
    }

    fn receive(&mut self) -> Option<Bytes> {
        let mut waiting = self.0.waiting.lock().unwrap();
        if waiting.is_empty() {
            let _ = rustix::io::read(&self.0.ready, &mut [0; 8]);
        }
        waiting.pop_front()
    }

    fn put_back(&mut self, frame: Bytes) {
        self.0.waiting.lock().unwrap().push_front(frame);
    }

    fn delivered(&mut self, frame: Bytes) {
        self.0.delivered.lock().unwrap().push(frame);
    }

    fn readiness(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.0.ready.as_fd()]
    }
}
