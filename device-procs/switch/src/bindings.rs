//! Which IP address belongs to which port: fixed ones and leases are told, others belong to whoever is the
//! first to claim them for as long as he uses them (RFC 6620). Each port has so many and no more.

use crate::PortId;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// How long a claimed address is kept that is not used.
const AGE: Duration = Duration::from_secs(300);
/// Addresses that one port may claim.
pub(crate) const CLAIMS_MAX: usize = 16;

#[derive(Debug, Clone, Copy)]
struct Binding {
    port: PortId,
    fixed: bool,
    seen: Instant,
}

/// The addresses of all VLANs.
#[derive(Debug, Default)]
pub(crate) struct Bindings {
    entries: BTreeMap<(u16, IpAddr), Binding>,
}

impl Bindings {
    /// The address is the port's, whoever had claimed it.
    pub(crate) fn fix(&mut self, vlan: u16, address: IpAddr, port: PortId, now: Instant) {
        let binding = Binding {
            port,
            fixed: true,
            seen: now,
        };
        self.entries.insert((vlan, address), binding);
    }

    /// Whether the address is the port's already.
    pub(crate) fn has(&mut self, vlan: u16, address: IpAddr, port: PortId, now: Instant) -> bool {
        match self.entries.get_mut(&(vlan, address)) {
            Some(binding) if binding.port == port => {
                binding.seen = now;
                true
            }
            _ => false,
        }
    }

    /// Whether the port may use the address, which is its own from now on if nobody has it.
    pub(crate) fn claim(&mut self, vlan: u16, address: IpAddr, port: PortId, now: Instant) -> bool {
        if self.has(vlan, address, port, now) {
            return true;
        }
        let is_old = |b: &Binding| !b.fixed && now.saturating_duration_since(b.seen) >= AGE;
        if self
            .entries
            .get(&(vlan, address))
            .is_some_and(|b| !is_old(b))
        {
            return false;
        }
        let own = |b: &&Binding| b.port == port && !b.fixed;
        if self.entries.values().filter(own).count() >= CLAIMS_MAX {
            let before = self.entries.len();
            self.entries.retain(|_, b| b.port != port || !is_old(b));
            if self.entries.len() == before {
                return false;
            }
        }
        let binding = Binding {
            port,
            fixed: false,
            seen: now,
        };
        self.entries.insert((vlan, address), binding);
        true
    }

    /// Forgets everything of a port.
    pub(crate) fn forget(&mut self, port: PortId) {
        self.entries.retain(|_, binding| binding.port != port);
    }

    /// The addresses of a port in a VLAN.
    pub(crate) fn of(&self, vlan: u16, port: PortId) -> impl Iterator<Item = IpAddr> + '_ {
        let own = self
            .entries
            .iter()
            .filter(move |((v, _), b)| *v == vlan && b.port == port);
        own.map(|((_, address), _)| *address)
    }

    /// Whose an address is.
    pub(crate) fn owner(&self, vlan: u16, address: IpAddr) -> Option<PortId> {
        self.entries.get(&(vlan, address)).map(|b| b.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn address(n: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, n).into()
    }

    #[test]
    fn first_to_claim_has_it_as_long_as_it_is_used() {
        let (mut bindings, now) = (Bindings::default(), Instant::now());
        assert!(bindings.claim(0, address(1), 1, now));
        assert!(!bindings.claim(0, address(1), 2, now));
        assert!(bindings.claim(5, address(1), 2, now), "another VLAN");
        let later = now + AGE / 2;
        assert!(bindings.claim(0, address(1), 1, later));
        assert!(
            !bindings.claim(0, address(1), 2, now + AGE),
            "it was used since"
        );
        assert!(bindings.claim(0, address(1), 2, later + AGE));
        assert!(!bindings.has(0, address(1), 1, later + AGE));
    }

    #[test]
    fn fixed_addresses_are_taken_from_whoever_claimed_them_and_kept() {
        let (mut bindings, now) = (Bindings::default(), Instant::now());
        assert!(bindings.claim(0, address(1), 1, now));
        bindings.fix(0, address(1), 2, now);
        assert!(!bindings.claim(0, address(1), 1, now + 2 * AGE));
        bindings.forget(2);
        assert!(bindings.claim(0, address(1), 1, now));
    }

    #[test]
    fn port_cannot_claim_the_whole_network() {
        let (mut bindings, now) = (Bindings::default(), Instant::now());
        let got = (0..200)
            .filter(|&n| bindings.claim(0, address(n), 1, now))
            .count();
        assert_eq!(got, CLAIMS_MAX);
        assert!(bindings.claim(0, address(201), 2, now));
        assert!(
            bindings.claim(0, address(202), 1, now + AGE),
            "its old ones make room"
        );
        assert_eq!(bindings.of(0, 1).count(), 1);
    }
}
