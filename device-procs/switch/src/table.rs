//! Which port an Ethernet address is at.
//!
//! The addresses of machines that are held to theirs are *fixed*; others are learned from the frames that
//! come, and forgotten when none comes any more. Each port has its share of the table: one that floods it
//! with addresses replaces its own oldest and nobody else's.

use crate::PortId;
use crate::wire::Mac;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// How long an address is remembered from which nothing comes.
pub(crate) const AGE: Duration = Duration::from_secs(300);
/// Addresses that are learned at a machine's port.
pub(crate) const MACHINE_SHARE: usize = 64;
/// Addresses that are learned at an uplink.
pub(crate) const UPLINK_SHARE: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Entry {
    port: PortId,
    fixed: bool,
    seen: Instant,
    at_uplink: bool,
}

type Key = (u16, Mac);

/// The table of all VLANs.
#[derive(Debug, Default)]
pub(crate) struct Table {
    entries: BTreeMap<Key, Entry>,
    /// What each port has learned, oldest first. An address that has moved away stays listed until its
    /// turn comes; so no list is longer than its port's share.
    learned: BTreeMap<PortId, VecDeque<Key>>,
}

impl Table {
    /// The address of a machine that is held to it.
    pub(crate) fn fix(&mut self, vlan: u16, mac: Mac, port: PortId, now: Instant) {
        let entry = Entry {
            port,
            fixed: true,
            seen: now,
            at_uplink: false,
        };
        self.entries.insert((vlan, mac), entry);
    }

    /// A frame of `mac` came from `port`. Returns whether it may be there: not when the address is fixed at
    /// another port, or when a machine takes an address that is alive at an uplink.
    pub(crate) fn learn(
        &mut self,
        vlan: u16,
        mac: Mac,
        port: PortId,
        is_uplink: bool,
        now: Instant,
    ) -> bool {
        let key = (vlan, mac);
        if let Some(entry) = self.entries.get_mut(&key) {
            if entry.port == port {
                entry.seen = now;
                return true;
            }
            let alive = now.saturating_duration_since(entry.seen) < AGE;
            if entry.fixed || (entry.at_uplink && !is_uplink && alive) {
                return false;
            }
        }
        let share = if is_uplink {
            UPLINK_SHARE
        } else {
            MACHINE_SHARE
        };
        let learned = self.learned.entry(port).or_default();
        while learned.len() >= share {
            let Some(oldest) = learned.pop_front() else {
                break;
            };
            if self
                .entries
                .get(&oldest)
                .is_some_and(|e| e.port == port && !e.fixed)
            {
                self.entries.remove(&oldest);
            }
        }
        learned.push_back(key);
        let entry = Entry {
            port,
            fixed: false,
            seen: now,
            at_uplink: is_uplink,
        };
        self.entries.insert(key, entry);
        true
    }

    /// Where frames to `mac` go.
    pub(crate) fn find(&self, vlan: u16, mac: Mac, now: Instant) -> Option<PortId> {
        let entry = self.entries.get(&(vlan, mac))?;
        let alive = entry.fixed || now.saturating_duration_since(entry.seen) < AGE;
        alive.then_some(entry.port)
    }

    /// Forgets everything at a port.
    pub(crate) fn forget(&mut self, port: PortId) {
        self.learned.remove(&port);
        self.entries.retain(|_, entry| entry.port != port);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mac(n: u16) -> Mac {
        let [a, b] = n.to_be_bytes();
        Mac([2, 0, 0, 0, a, b])
    }

    #[test]
    fn addresses_are_learned_moved_and_forgotten() {
        let (mut table, now) = (Table::default(), Instant::now());
        assert!(table.learn(0, mac(1), 3, false, now));
        assert_eq!(table.find(0, mac(1), now), Some(3));
        assert_eq!(table.find(7, mac(1), now), None, "another VLAN");
        assert!(table.learn(0, mac(1), 4, false, now));
        assert_eq!(table.find(0, mac(1), now), Some(4));
        assert_eq!(table.find(0, mac(1), now + AGE), None);
        table.forget(4);
        assert_eq!((table.find(0, mac(1), now), table.len()), (None, 0));
    }

    #[test]
    fn nobody_takes_a_fixed_address_nor_a_machine_one_of_the_uplink() {
        let (mut table, now) = (Table::default(), Instant::now());
        table.fix(0, mac(1), 3, now);
        assert!(!table.learn(0, mac(1), 4, false, now) && !table.learn(0, mac(1), 5, true, now));
        assert_eq!(
            table.find(0, mac(1), now + AGE),
            Some(3),
            "it is never forgotten"
        );
        assert!(table.learn(0, mac(2), 5, true, now));
        assert!(!table.learn(0, mac(2), 4, false, now));
        assert!(
            table.learn(0, mac(2), 4, false, now + AGE),
            "the uplink's is gone"
        );
        assert!(
            table.learn(0, mac(2), 5, true, now + AGE),
            "it has moved back"
        );
    }

    #[test]
    fn one_port_cannot_flush_what_others_have() {
        let (mut table, now) = (Table::default(), Instant::now());
        table.fix(0, mac(1), 1, now);
        for n in 100..110 {
            assert!(table.learn(0, mac(n), 2, false, now));
        }
        for n in 1000..20_000 {
            assert!(table.learn(0, mac(n), 3, false, now));
        }
        assert_eq!(table.len(), 1 + 10 + MACHINE_SHARE);
        assert!((100..110).all(|n| table.find(0, mac(n), now) == Some(2)));
        assert_eq!(table.find(0, mac(1), now), Some(1));
        assert_eq!(table.find(0, mac(19_999), now), Some(3));
    }

    proptest! {
        #[test]
        fn no_port_has_more_than_its_share(steps in prop::collection::vec((0u16..200, 0u16..4, 0u64..400), 0..600)) {
            let (mut table, start) = (Table::default(), Instant::now());
            for (n, port, s) in steps {
                table.learn(n % 3, mac(n), port, false, start + Duration::from_secs(s));
            }
            for port in 0..4 {
                let has = table.entries.values().filter(|entry| entry.port == port).count();
                prop_assert!(has <= MACHINE_SHARE);
                prop_assert!(table.learned.get(&port).is_none_or(|list| list.len() <= MACHINE_SHARE));
            }
        }
    }
}
