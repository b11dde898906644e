//! A bounded table of flows, in which finding one costs the same however many there are.
//!
//! Found by a digest of their keys. Clients choose keys, and could choose many with one digest: so the digest is keyed with a secret
//! of the host. Nothing else depends on it: flows have places in the order in which they came, and every run visits those alike.
//!
//! Which flow is forgotten if there is no room is decided here, too: one that says of itself that it may be.

use std::hash::{DefaultHasher, Hasher};
use std::net::IpAddr;

use hashbrown::HashTable;

use crate::flow::{Class, Endpoint, FlowKey};

/// Places behind one that may be forgotten in which one is looked for that is no loss.
const LOOK_FURTHER: usize = 64;

/// A flow's place in its table; valid until the flow is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FlowId(usize);

/// What the table has to know of a flow.
pub(crate) trait Flow {
    /// Returns its key.
    fn key(&self) -> &FlowKey;

    /// Says whether it may be forgotten to make room: nothing of it is held, waits or is noted for the next commit. What goes with
    /// it is how its sides have agreed so far; it is compared again as one that is seen for the first time.
    fn is_idle(&self) -> bool;

    /// Says whether there is nothing worth remembering.
    fn is_over(&self) -> bool;

    /// Says whether it has been used since this was last asked.
    fn was_used(&mut self) -> bool;
}

/// The table; see the module.
#[derive(Debug)]
pub(crate) struct FlowTable<T> {
    secret: u64,
    index: HashTable<Place>,
    slots: Vec<Option<T>>,
    free: Vec<FlowId>,
    limit: usize,
    /// Where the search for one that may be forgotten goes on.
    hand: usize,
    /// None was found, and none can be until the next commit.
    in_vain: bool,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    digest: u32,
    slot: u32,
}

impl<T: Flow> FlowTable<T> {
    pub(crate) fn new(limit: usize, secret: u64) -> Self {
        Self {
            secret,
            index: HashTable::new(),
            slots: Vec::new(),
            free: Vec::new(),
            limit: limit.min(u32::MAX as usize),
            hand: 0,
            in_vain: false,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    pub(crate) fn find(&self, key: &FlowKey) -> Option<FlowId> {
        let digest = self.digest(key);
        let place = self
            .index
            .find(spread(digest), |place| place.digest == digest && self.is_at(place, key))?;
        Some(FlowId(place.slot as usize))
    }

    /// Adds a flow that is not in the table, in the place of another if need be; nothing if the table is full.
    pub(crate) fn insert(&mut self, flow: T) -> Option<FlowId> {
        if self.index.len() >= self.limit && !self.forget_one() {
            return None;
        }
        let key = *flow.key();
        assert!(self.find(&key).is_none(), "a flow is inserted once");
        let id = if let Some(id) = self.free.pop() {
            self.slots[id.0] = Some(flow);
            id
        } else {
            self.slots.push(Some(flow));
            FlowId(self.slots.len() - 1)
        };
        let digest = self.digest(&key);
        let slot = u32::try_from(id.0).expect("the limit is below that");
        let place = Place { digest, slot };
        self.index
            .insert_unique(spread(digest), place, |place| spread(place.digest));
        Some(id)
    }

    pub(crate) fn get(&self, id: FlowId) -> Option<&T> {
        self.slots.get(id.0)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, id: FlowId) -> Option<&mut T> {
        self.slots.get_mut(id.0)?.as_mut()
    }

    /// Returns all flows, in the order of their places.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().flatten()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut().flatten()
    }

    /// Flows that could not be forgotten may be now.
    pub(crate) fn committed(&mut self) {
        self.in_vain = false;
    }

    /// Forgets a flow that may be: the first that has not been used since the round before, or one near it of which nothing is
    /// worth remembering.
    fn forget_one(&mut self) -> bool {
        if self.in_vain {
            return false;
        }
        // Each round goes on where the one before ended, so all flows together are visited a few times for as many forgotten.
        let mut unused = None;
        let mut further = LOOK_FURTHER;
        for _ in 0..self.slots.len() * 2 {
            if further == 0 {
                break;
            }
            further -= usize::from(unused.is_some());
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let Some(flow) = &mut self.slots[slot] else { continue };
            if !flow.is_idle() {
                continue;
            }
            if flow.is_over() {
                self.remove(slot);
                return true;
            }
            if unused.is_none() && !flow.was_used() {
                unused = Some(slot);
            }
        }
        self.in_vain = unused.is_none();
        unused.is_some_and(|slot| {
            self.remove(slot);
            true
        })
    }

    fn remove(&mut self, slot: usize) {
        let Some(flow) = self.slots[slot].take() else { return };
        let digest = self.digest(flow.key());
        let found = self
            .index
            .find_entry(spread(digest), |place| place.slot as usize == slot);
        let (place, _) = found.expect("what is in a slot is in the index").remove();
        self.free.push(FlowId(place.slot as usize));
    }

    fn is_at(&self, place: &Place, key: &FlowKey) -> bool {
        let flow = self.slots.get(place.slot as usize).and_then(Option::as_ref);
        flow.is_some_and(|flow| flow.key() == key)
    }

    fn digest(&self, key: &FlowKey) -> u32 {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.secret);
        let (kind, number) = (key.class.traffic() as u32, u32::from(number(key.class)));
        let tags = key.vlans.tags();
        hasher.write_u32(kind | number << 8 | u32::try_from(tags.len()).unwrap_or(0) << 24);
        hasher.write_u32(u32::from(key.source.port) << 16 | u32::from(key.destination.port));
        for (protocol, vlan) in tags {
            hasher.write_u32(u32::from(*protocol) << 16 | u32::from(*vlan));
        }
        for Endpoint { address, .. } in [key.source, key.destination] {
            match address {
                IpAddr::V4(v4) => hasher.write_u32(v4.to_bits()),
                IpAddr::V6(v6) => hasher.write_u128(v6.to_bits()),
            }
        }
        let digest = hasher.finish();
        let [a, b, c, d, ..] = digest.to_ne_bytes();
        u32::from_ne_bytes([a, b, c, d])
    }
}

/// Returns what distinguishes flows of one kind of traffic.
fn number(class: Class) -> u16 {
    match class {
        Class::Ethernet(number) => number,
        Class::Fragment(protocol) | Class::Ip(protocol) => u16::from(protocol),
        _ => 0,
    }
}

/// Spreads a digest over the bits that the index looks at.
fn spread(digest: u32) -> u64 {
    u64::from(digest).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::flow::Vlans;

    #[derive(Debug)]
    struct Toy {
        key: FlowKey,
        idle: bool,
        over: bool,
        used: bool,
    }

    impl Flow for Toy {
        fn key(&self) -> &FlowKey {
            &self.key
        }

        fn is_idle(&self) -> bool {
            self.idle
        }

        fn is_over(&self) -> bool {
            self.over
        }

        fn was_used(&mut self) -> bool {
            std::mem::take(&mut self.used)
        }
    }

    fn key(number: u16) -> FlowKey {
        FlowKey::addressed(
            Class::Tcp,
            Vlans::NONE,
            ([10, 0, 0, 1].into(), [10, 0, 0, 2].into()),
            (80, number),
        )
    }

    fn toy(number: u16, idle: bool, over: bool) -> Toy {
        let (key, used) = (key(number), true);
        Toy { key, idle, over, used }
    }

    #[test]
    fn with_room_nothing_is_forgotten_and_without_it_what_has_ended_goes_first() {
        let mut table = FlowTable::new(4, 7);
        for (number, idle, over) in [(0, true, false), (1, false, true), (2, true, false), (3, true, true)] {
            table.insert(toy(number, idle, over)).unwrap();
        }
        let known = |table: &FlowTable<Toy>| {
            (0..9)
                .filter(|number| table.find(&key(*number)).is_some())
                .collect::<Vec<_>>()
        };
        assert_eq!(known(&table), [0, 1, 2, 3]);
        table.insert(toy(4, false, false)).unwrap();
        assert_eq!(known(&table), [0, 1, 2, 4], "the one that is over");
        table.get_mut(table.find(&key(0)).unwrap()).unwrap().used = true;
        table.insert(toy(5, false, false)).unwrap();
        assert_eq!(known(&table), [0, 1, 4, 5], "the one that was not used since");
        table.insert(toy(6, false, false)).unwrap();
        assert_eq!(known(&table), [1, 4, 5, 6]);
        let id = table.find(&key(5)).unwrap();
        *table.get_mut(id).unwrap() = toy(5, true, true);
        let id = table.find(&key(4)).unwrap();
        *table.get_mut(id).unwrap() = Toy {
            used: false,
            ..toy(4, true, false)
        };
        table.insert(toy(8, false, false)).unwrap();
        assert_eq!(
            known(&table),
            [1, 4, 6, 8],
            "one that is over behind one that was not used"
        );
        table.get_mut(id).unwrap().idle = false;
        assert_eq!(table.insert(toy(7, true, true)), None, "nothing may be forgotten");
        table.iter_mut().for_each(|toy| toy.idle = true);
        assert_eq!(table.insert(toy(7, true, true)), None, "not before the next commit");
        table.committed();
        table.insert(toy(7, true, true)).unwrap();
        assert_eq!(table.len(), 4);
    }

    proptest! {
        #[test]
        fn a_flow_is_found_where_it_was_put_whatever_the_secret(
            steps in proptest::collection::vec((0u16..40, any::<bool>(), any::<bool>()), 1..300), secret: u64, limit in 1usize..40,
        ) {
            let (mut table, mut other) = (FlowTable::<Toy>::new(limit, secret), FlowTable::new(limit, !secret));
            let mut model = BTreeMap::new();
            for (number, idle, over) in steps {
                let found = table.find(&key(number));
                prop_assert_eq!(found, other.find(&key(number)));
                if let Some(id) = found {
                    prop_assert_eq!(table.get(id).unwrap().key, key(number));
                    prop_assert_eq!(model.get(&number), Some(&id));
                } else {
                    let id = table.insert(toy(number, idle, over));
                    prop_assert_eq!(id, other.insert(toy(number, idle, over)));
                    let Some(id) = id else { continue };
                    model.retain(|_, before| *before != id);
                    model.insert(number, id);
                }
                prop_assert!(table.len() <= limit && table.len() == model.len());
                prop_assert_eq!(table.iter().count(), table.len());
            }
        }
    }
}
