//! Services: all flows of one port of the guest, or to one port that it connects to. When one flow after the other differs
//! there, the next is not compared from its begin; pure.
//!
//! A flow that keeps differing has a temper of its own, and costs three checkpoints before it is buffered. A service that is asked
//! over a new connection each time, and whose answers bear a date, would cost one for each. So a flow's first
//! difference counts for its service, too, and a service that is buffered takes all of its flows along, those that begin meanwhile
//! included. As with flows, what is compared changes at a commit only.

use std::collections::BTreeMap;

use checkpoint::{Epoch, Instant};

use crate::crossing::has_ports;
use crate::flow::{Class, Endpoint, FlowKey, Vlans};
use crate::temper::{Patience, Temper};

/// Services that are remembered: those with a difference of late, and those that are buffered or on trial.
const SERVICES_MAX: usize = 1_024;

/// What a service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ServiceKey {
    class: Class,
    vlans: Vlans,
    end: Endpoint,
    /// It is the other end's: the guest has opened the flow.
    remote: bool,
}

impl ServiceKey {
    /// Returns the service that a flow belongs to, if its kind has ports.
    pub(crate) fn of(key: &FlowKey, opened_by_guest: bool) -> Option<Self> {
        has_ports(key.class).then_some(Self {
            class: key.class,
            vlans: key.vlans,
            end: if opened_by_guest { key.destination } else { key.source },
            remote: opened_by_guest,
        })
    }
}

/// The services that have differed lately.
#[derive(Debug, Default)]
pub(crate) struct Services {
    known: BTreeMap<ServiceKey, Temper>,
    buffered: usize,
}

impl Services {
    /// A flow of it has differed for the first time.
    pub(crate) fn differed(&mut self, now: Instant, epoch: Epoch, key: ServiceKey, patience: &Patience) {
        if self.known.len() >= SERVICES_MAX && !self.known.contains_key(&key) {
            return;
        }
        self.known.entry(key).or_default().differed(now, epoch, patience);
    }

    /// Decides for the epoch that is compared from now on.
    pub(crate) fn decide(&mut self, now: Instant, patience: &Patience) {
        self.known.retain(|_, temper| {
            temper.decide(now, patience);
            !temper.is_settled(now, patience)
        });
        self.buffered = self.known.values().filter(|temper| temper.is_buffered()).count();
    }

    /// Says whether what belongs to this service waits for commits, in the epoch that is compared.
    pub(crate) fn is_buffered(&self, key: Option<ServiceKey>) -> bool {
        self.buffered > 0
            && key
                .and_then(|key| self.known.get(&key))
                .is_some_and(Temper::is_buffered)
    }

    /// Returns how many are buffered.
    pub(crate) fn buffered(&self) -> usize {
        self.buffered
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::temper::FlowPatience;
    use checkpoint::Duration;

    fn key(port: u16, client: u16) -> FlowKey {
        let addresses = ([10, 0, 0, 1].into(), [10, 0, 0, 9].into());
        FlowKey::addressed(Class::Tcp, Vlans::NONE, addresses, (port, client))
    }

    #[test]
    fn flows_of_one_port_are_one_service_in_either_direction() {
        assert_eq!(
            ServiceKey::of(&key(80, 5_000), false),
            ServiceKey::of(&key(80, 5_001), false)
        );
        assert_ne!(
            ServiceKey::of(&key(80, 5_000), false),
            ServiceKey::of(&key(81, 5_000), false)
        );
        assert_eq!(
            ServiceKey::of(&key(40_000, 443), true),
            ServiceKey::of(&key(40_001, 443), true)
        );
        assert_ne!(ServiceKey::of(&key(80, 80), true), ServiceKey::of(&key(80, 80), false));
        let arp = FlowKey::unaddressed(Class::Arp, Vlans::NONE);
        assert_eq!(ServiceKey::of(&arp, false), None);
    }

    #[test]
    fn a_service_is_buffered_for_a_time_and_then_forgotten_if_it_agrees() {
        let patience = FlowPatience::default().of_services();
        let service = ServiceKey::of(&key(80, 5_000), false);
        let mut services = Services::default();
        let mut now = Instant(1_000_000_000);
        for epoch in 0..3 {
            assert!(!services.is_buffered(service));
            services.differed(now, Epoch(epoch), service.unwrap(), &patience);
            now += Duration::from_millis(50);
            services.decide(now, &patience);
        }
        assert!(services.is_buffered(service));
        assert!(!services.is_buffered(ServiceKey::of(&key(81, 5_000), false)));
        now += patience.backoff_min;
        services.decide(now, &patience);
        assert_eq!(
            (services.is_buffered(service), services.known.len()),
            (false, 1),
            "on trial"
        );
        now = now + patience.backoff_min + patience.row + Duration(1);
        services.decide(now, &patience);
        assert!(services.known.is_empty());
    }

    #[test]
    fn their_number_is_bounded() {
        let patience = FlowPatience::default().of_services();
        let mut services = Services::default();
        for port in 0..2_000 {
            services.differed(
                Instant(1),
                Epoch(1),
                ServiceKey::of(&key(port, 1), false).unwrap(),
                &patience,
            );
        }
        assert_eq!(services.known.len(), SERVICES_MAX);
    }
}
