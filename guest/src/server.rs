//! The whole guest behind its devices: takes in a frame, serves, sends.
//!
//! Driven by the freestanding program's loop: [`Server::round`] with the time and the network devices, then the
//! store's disk requests, then [`Server::deadline`] when there was nothing to do. One round takes in at most one
//! frame of each device and then sends all that follows from it, so that what is sent depends on the order of frames and not on
//! how many lay ready. Time enters only where TCP itself needs it, and where it was asked for.

use alloc::vec::Vec;

use smoltcp::phy::Device;

use crate::clock::Moment;
use crate::random::{Random, Seed};
use crate::stack::Stack;
use crate::tcp::set_time;
use crate::world::World;

/// Accepted connections after which fresh entropy is mixed in.
const CONNECTIONS_PER_SEED: u64 = 16;

/// The services and the network stacks under them, one a card.
pub struct Server {
    stacks: Vec<Stack>,
    world: World,
    random: Random,
    accepted: u64,
    seeded_at: u64,
}

impl core::fmt::Debug for Server {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Server")
            .field("world", &self.world)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Sets up the network stacks of these devices, which have these hardware addresses, and all services.
    ///
    /// # Errors
    /// What of the settings can't be had.
    pub fn new(
        mut world: World,
        macs: &[[u8; 6]],
        seed: &Seed,
        devices: &mut [impl Device],
        now: Moment,
    ) -> Result<Self, &'static str> {
        let mut random = Random::new(*seed);
        let mut stacks = Vec::with_capacity(devices.len());
        for (card, (mac, device)) in macs.iter().zip(devices).enumerate() {
            let settings = world.settings;
            let addresses = *settings
                .cards
                .get(card)
                .ok_or("there are more network devices than the guest can have addresses for: leave some out")?;
            let gateways = match card {
                0 => (settings.gateway, settings.gateway6),
                _ => (None, None),
            };
            let networks = (addresses, gateways);
            stacks.push(Stack::new(&mut world, *mac, networks, &mut random, device, now)?);
        }
        Ok(Self {
            stacks,
            world,
            random,
            accepted: 0,
            seeded_at: 0,
        })
    }

    /// What the services share.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// What the services share.
    pub fn world_mut(&mut self) -> &mut World {
        &mut self.world
    }

    /// Takes in at most one frame of each device, serves, and sends; returns whether anything happened.
    pub fn round(&mut self, now: Moment, devices: &mut [impl Device]) -> bool {
        set_time(now);
        if self.world.settings.isn_skew {
            self.burn((now.tsc >> 3) & 15);
        }
        let Self { stacks, world, .. } = self;
        let mut moved = false;
        for (stack, device) in stacks.iter_mut().zip(&mut *devices) {
            moved |= stack.take_in(now, world, device);
        }
        moved |= world.touch.run(&mut world.arena);
        moved |= world.dirtier.run(&mut world.arena, now.ns);
        for stack in &mut *stacks {
            moved |= stack.serve(now, world);
        }
        for dial in world.dials.drain(..) {
            let near = stacks.iter().position(|stack| stack.is_near(dial.address));
            stacks[near.unwrap_or(0)].dial(dial);
        }
        for stack in &mut *stacks {
            moved |= stack.serve_rest(world);
        }
        for (stack, device) in stacks.iter_mut().zip(devices) {
            moved |= stack.send(now, world, device);
        }
        self.spend_accepted();
        moved
    }

    /// Whether a device had no room for all that was to be sent: wait for it, not for time.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.stacks.iter().any(Stack::is_stalled)
    }

    /// When [`Self::round`] must be called again at the latest, in guest nanoseconds; `None`: when a frame comes.
    pub fn deadline(&mut self, now: Moment) -> Option<u64> {
        if !self.world.touch.is_done() {
            return Some(now.ns);
        }
        let networks = self.stacks.iter_mut().filter_map(|stack| stack.deadline(now));
        networks.chain(self.world.dirtier.deadline()).min()
    }

    /// Whether it is time to draw from the entropy device; depends on the connections accepted only.
    #[must_use]
    pub fn wants_seed(&self) -> bool {
        self.accepted - self.seeded_at >= CONNECTIONS_PER_SEED
    }

    /// Mixes fresh entropy into the random state: what [`Self::wants_seed`] asked for, or what came at a takeover.
    pub fn mix(&mut self, fresh: &Seed) {
        self.seeded_at = self.accepted;
        self.random.mix(fresh);
        let rounds = self.random.draw() % 16384;
        self.burn(rounds);
    }

    /// After each accepted connection the next initial sequence number is moved on by an unknown distance.
    fn spend_accepted(&mut self) {
        while self.accepted < self.world.counters.accepted {
            self.accepted += 1;
            let rounds = self.random.draw() % 256;
            self.burn(rounds);
        }
    }

    fn burn(&mut self, rounds: u64) {
        self.stacks.iter_mut().for_each(|stack| stack.burn(rounds));
    }
}

#[cfg(test)]
mod tests;
