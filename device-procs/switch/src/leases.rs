//! Which address each machine is leased. A machine has the same one each time: the one that it is told to
//! have, the one it had, or one of the pool that its Ethernet address chooses, also after the switch has
//! died and forgotten everything.

use crate::PortId;
use crate::settings::Subnet;
use crate::wire::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// Leases of one port: cards that are held to their Ethernet address have one.
pub(crate) const PER_PORT_MAX: usize = 16;

/// A lease, as it is shown and restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Whose it is.
    pub mac: Mac,
    /// Its address.
    pub address: Ipv4Addr,
    /// How long it holds; zero when the machine has not taken it or let it run out.
    pub left: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    address: Ipv4Addr,
    port: Option<PortId>,
    expires: Instant,
    /// Until when it holds as far as others were told.
    told: Option<Instant>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    held: BTreeMap<Mac, Held>,
    owners: BTreeMap<Ipv4Addr, Mac>,
    /// What was confirmed and not told yet.
    news: BTreeSet<Mac>,
}

impl Leases {
    /// Leases that a switch before this one has given.
    pub(crate) fn restore(&mut self, subnet: &Subnet, leases: &[Lease], now: Instant) {
        for lease in leases {
            let left = lease.left.min(Duration::from_secs(subnet.lease_s.into()));
            let is_ours = subnet.has(lease.address) && subnet.router != Some(lease.address);
            if is_ours && !self.owners.contains_key(&lease.address) {
                self.hold(lease.mac, lease.address, None, now + left);
            }
        }
    }

    /// The address of `mac` at `port`, which is told to have `fixed`. `is_free` says whether an address is
    /// nobody's by other means. `None` when there is none, or the port has too many.
    pub(crate) fn address(
        &mut self,
        subnet: &Subnet,
        mac: Mac,
        port: PortId,
        fixed: Option<Ipv4Addr>,
        now: Instant,
        is_free: impl Fn(Ipv4Addr) -> bool,
    ) -> Option<Ipv4Addr> {
        if let Some(held) = self.held.get_mut(&mac)
            && fixed.is_none_or(|fixed| fixed == held.address)
            && (fixed.is_some() || is_free(held.address))
        {
            held.port = Some(port);
            return Some(held.address);
        }
        let own = |held: &&Held| held.port == Some(port);
        if self.held.values().filter(own).count() >= PER_PORT_MAX {
            return None;
        }
        let address = match fixed {
            Some(fixed) => fixed,
            None => self.choose(subnet, mac, now, is_free)?,
        };
        self.hold(mac, address, Some(port), now);
        Some(address)
    }

    /// The machine has taken its address.
    pub(crate) fn confirm(&mut self, mac: Mac, until: Instant) {
        if let Some(held) = self.held.get_mut(&mac) {
            held.expires = until;
            self.news.insert(mac);
        }
    }

    /// Leases that others have to be told of: new ones, and those that hold for much longer than was told. A machine
    /// cannot make many of them by asking again and again.
    pub(crate) fn take_news(&mut self, now: Instant) -> Vec<Lease> {
        let mut news = Vec::new();
        for mac in std::mem::take(&mut self.news) {
            let Some(held) = self.held.get_mut(&mac) else {
                continue;
            };
            let left = held.expires.saturating_duration_since(now);
            if held.told.is_none_or(|told| told < now + left / 2) {
                held.told = Some(held.expires);
                news.push(Lease {
                    mac,
                    address: held.address,
                    left,
                });
            }
        }
        news
    }

    /// The address that `mac` has, while its lease holds.
    pub(crate) fn current(&self, mac: Mac, now: Instant) -> Option<Ipv4Addr> {
        let held = self.held.get(&mac).filter(|held| held.expires > now)?;
        Some(held.address)
    }

    /// What is leased, by address.
    pub(crate) fn list(&self, now: Instant) -> Vec<Lease> {
        let lease = |(address, mac): (&Ipv4Addr, &Mac)| {
            let held = self.held.get(mac)?;
            Some(Lease {
                mac: *mac,
                address: *address,
                left: held.expires.saturating_duration_since(now),
            })
        };
        self.owners.iter().filter_map(lease).collect()
    }

    fn hold(&mut self, mac: Mac, address: Ipv4Addr, port: Option<PortId>, expires: Instant) {
        if let Some(before) = self.owners.insert(address, mac)
            && before != mac
        {
            self.held.remove(&before);
        }
        let held = Held {
            address,
            port,
            expires,
            told: None,
        };
        if let Some(before) = self.held.insert(mac, held)
            && before.address != address
        {
            self.owners.remove(&before.address);
        }
    }

    /// A place in the pool: the first from where the Ethernet address points that nobody has; if there is
    /// none, that of the lease that ran out first.
    fn choose(
        &self,
        subnet: &Subnet,
        mac: Mac,
        now: Instant,
        is_free: impl Fn(Ipv4Addr) -> bool,
    ) -> Option<Ipv4Addr> {
        let (first, last) = (u32::from(subnet.pool.0), u32::from(subnet.pool.1));
        let count = last.checked_sub(first)?.checked_add(1)?;
        let start = hash(mac) % count;
        // More addresses than there can be ports need not be looked at.
        let places = (0..count.min(65_536)).map(|n| first + (start + n) % count);
        let mut places = places.map(Ipv4Addr::from).filter(|&a| is_free(a));
        if let Some(address) = places.find(|address| !self.owners.contains_key(address)) {
            return Some(address);
        }
        let over = self.held.values().filter(|held| held.expires <= now);
        let over = over.filter(|held| (first..=last).contains(&held.address.into()));
        let over = over.filter(|held| is_free(held.address));
        over.min_by_key(|held| held.expires)
            .map(|held| held.address)
    }
}

/// FNV-1a: the same number for the same address in every process.
fn hash(mac: Mac) -> u32 {
    mac.0.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn subnet(last: u8) -> Subnet {
        Subnet {
            gateway: Ipv4Addr::new(10, 0, 0, 1),
            prefix: 24,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            pool: (Ipv4Addr::new(10, 0, 0, 10), Ipv4Addr::new(10, 0, 0, last)),
            router: None,
            lease_s: 3600,
        }
    }

    fn mac(n: u8) -> Mac {
        Mac([2, 0, 0, 0, 1, n])
    }

    #[test]
    fn machine_has_the_same_address_each_time_and_in_the_next_process() {
        let now = Instant::now();
        let (mut a, mut b) = (Leases::default(), Leases::default());
        let ask = |leases: &mut Leases, n: u8| {
            leases.address(&subnet(200), mac(n), n.into(), None, now, |_| true)
        };
        let first: Vec<_> = (0..20).map(|n| ask(&mut a, n)).collect();
        assert_eq!(first, (0..20).map(|n| ask(&mut a, n)).collect::<Vec<_>>());
        let distinct: BTreeSet<_> = first.iter().flatten().collect();
        assert_eq!(distinct.len(), 20);
        // Another process that is asked in another order, and was told.
        b.restore(&subnet(200), &a.list(now), now);
        assert_eq!(ask(&mut b, 7), first[7]);
        let mut c = Leases::default();
        assert_eq!(ask(&mut c, 0), first[0], "and one that was not");
    }

    #[test]
    fn told_address_is_leased_and_another_is_not_given_what_is_told() {
        let (mut leases, now) = (Leases::default(), Instant::now());
        let fixed = Ipv4Addr::new(10, 0, 0, 77);
        let ask = |leases: &mut Leases, n, fixed| {
            leases.address(&subnet(200), mac(n), 1, fixed, now, |a| {
                a != Ipv4Addr::new(10, 0, 0, 77)
            })
        };
        let before = ask(&mut leases, 1, None).unwrap();
        assert_eq!(ask(&mut leases, 1, Some(fixed)), Some(fixed));
        assert_eq!(leases.list(now).len(), 1, "{before} is free again");
        assert_ne!(ask(&mut leases, 1, None), Some(fixed));
    }

    #[test]
    fn full_pool_gives_what_ran_out_and_nothing_else() {
        let (mut leases, now) = (Leases::default(), Instant::now());
        let ask = |leases: &mut Leases, n: u8, now| {
            leases.address(&subnet(12), mac(n), n.into(), None, now, |_| true)
        };
        let got: Vec<_> = (0..3).map(|n| ask(&mut leases, n, now).unwrap()).collect();
        let hour = Duration::from_secs(3600);
        for (n, hours) in [(0, 3), (1, 1), (2, 2)] {
            leases.confirm(mac(n), now + hour * hours);
        }
        assert_eq!(ask(&mut leases, 3, now), None);
        assert_eq!(ask(&mut leases, 3, now + 2 * hour), Some(got[1]));
        assert_eq!(ask(&mut leases, 0, now + 2 * hour), Some(got[0]));
    }

    #[test]
    fn port_with_many_addresses_gets_its_share() {
        let (mut leases, now) = (Leases::default(), Instant::now());
        let got = (0..100)
            .filter_map(|n| leases.address(&subnet(200), mac(n), 1, None, now, |_| true))
            .count();
        assert_eq!(got, PER_PORT_MAX);
        let other = leases.address(&subnet(200), mac(101), 2, None, now, |_| true);
        assert!(other.is_some());
    }

    #[test]
    fn each_lease_is_told_once_and_again_when_half_of_it_is_over() {
        let (mut leases, start) = (Leases::default(), Instant::now());
        let hour = Duration::from_secs(3600);
        let address = leases.address(&subnet(200), mac(1), 1, None, start, |_| true);
        assert_eq!(leases.take_news(start), [], "an offer is no lease");
        leases.confirm(mac(1), start + hour);
        let told = leases.take_news(start);
        assert_eq!((told.len(), told[0].left), (1, hour));
        assert_eq!(Some(told[0].address), address);
        for s in 0..100 {
            let now = start + Duration::from_secs(s);
            // Given back, and taken again.
            leases.confirm(mac(1), now);
            assert_eq!(leases.take_news(now), []);
            leases.confirm(mac(1), now + hour);
            assert_eq!(leases.take_news(now), []);
        }
        let later = start + hour / 2 + Duration::from_secs(60);
        leases.confirm(mac(1), later + hour);
        assert_eq!(leases.take_news(later).len(), 1);
    }

    proptest! {
        #[test]
        fn no_address_has_two_owners(steps in prop::collection::vec((0u8..40, 0u16..6, any::<bool>(), 0u64..9000), 0..200)) {
            let (mut leases, start) = (Leases::default(), Instant::now());
            for (n, port, told, s) in steps {
                let now = start + Duration::from_secs(s);
                let fixed = told.then(|| Ipv4Addr::new(10, 0, 0, 10 + n % 8));
                if let Some(address) = leases.address(&subnet(25), mac(n), port, fixed, now, |_| true) {
                    prop_assert!(subnet(25).has(address));
                    leases.confirm(mac(n), now + Duration::from_secs(3600));
                }
                prop_assert_eq!(leases.held.len(), leases.owners.len());
                for (mac, held) in &leases.held {
                    prop_assert_eq!(leases.owners.get(&held.address), Some(mac));
                }
            }
        }
    }
}
