//! The leases of a network, kept for the next switch: on disk, so that an address is nobody else's after the host's start
//! either.

use crate::api::time::now_ms;
use crate::network::spec::SubnetSpec;
use bulkhead_ipc::protocol::switch::{LEASES_MAX, LeaseTerms};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Most leases that are kept.
pub(super) const KEPT_MAX: usize = 4096;
/// By how much the times of two tales of one lease differ: they are in whole seconds, and told a little later.
const SLACK_MS: u64 = 3000;
/// File name in the network's state.
const FILE_NAME: &str = "leases.json";
const NEW_NAME: &str = "leases.json.new";

/// A lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) mac: [u8; 6],
    pub(super) address: Ipv4Addr,
    /// When it is over, in milliseconds since 1970.
    pub(super) until_ms: u64,
}

/// All of them. Whoever owns a switch can make it tell anything: what is kept has an address that is leased here, for
/// no longer than leases hold, and which is nobody else's.
#[derive(Debug, Default)]
pub(super) struct Book {
    directory: PathBuf,
    subnet: Option<SubnetSpec>,
    leases: BTreeMap<[u8; 6], Kept>,
    owners: BTreeMap<Ipv4Addr, [u8; 6]>,
    changed: bool,
}

impl Book {
    /// What was written in `directory`. A file that is damaged is as good as none: addresses are chosen by the cards'
    /// own, so most are what they were.
    pub(super) fn open(directory: &Path, subnet: Option<SubnetSpec>) -> Self {
        let mut book = Self {
            directory: directory.to_owned(),
            subnet,
            ..Self::default()
        };
        let text = match fs::read(directory.join(FILE_NAME)) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%error, "leases cannot be read");
                }
                return book;
            }
        };
        match serde_json::from_slice::<Vec<Kept>>(&text) {
            Ok(leases) => {
                let now = now_ms();
                leases.into_iter().for_each(|lease| book.put(lease, now));
            }
            Err(error) => tracing::warn!(%error, "leases are damaged"),
        }
        book.changed = false;
        book
    }

    /// What a switch tells of cards that `knows`. Returns whether there is something to be written.
    pub(super) fn hear(&mut self, leases: &[LeaseTerms], knows: impl Fn(&[u8; 6]) -> bool) -> bool {
        let now = now_ms();
        for lease in leases.iter().filter(|lease| knows(&lease.mac)) {
            let until_ms = now.saturating_add(u64::from(lease.left_s) * 1000);
            let kept = Kept {
                mac: lease.mac,
                address: lease.address,
                until_ms,
            };
            self.put(kept, now);
        }
        self.changed
    }

    fn put(&mut self, lease: Kept, now: u64) {
        let Some(subnet) = self.subnet else {
            return;
        };
        let is_leased = (subnet.first..=subnet.last).contains(&lease.address)
            && subnet.router != Some(lease.address)
            && subnet.gateway != lease.address;
        let until_max = now.saturating_add(u64::from(subnet.lease_s) * 1000);
        if !is_leased || lease.until_ms > until_max.saturating_add(SLACK_MS) {
            return;
        }
        let other = self.owners.get(&lease.address).copied();
        if let Some(other) = other.filter(|mac| *mac != lease.mac) {
            if self.leases.get(&other).is_some_and(|l| l.until_ms > now) {
                return;
            }
            self.leases.remove(&other);
        }
        let before = self.leases.insert(lease.mac, lease);
        let moved = before.filter(|before| before.address != lease.address);
        if let Some(moved) = moved {
            self.owners.remove(&moved.address);
        }
        self.owners.insert(lease.address, lease.mac);
        // What is told again is not news.
        self.changed |= before.is_none_or(|before| {
            before.address != lease.address || before.until_ms.abs_diff(lease.until_ms) > SLACK_MS
        });
        while self.leases.len() > KEPT_MAX {
            let first = self.leases.values().min_by_key(|lease| lease.until_ms);
            let Some(first) = first.copied() else {
                break;
            };
            self.leases.remove(&first.mac);
            self.owners.remove(&first.address);
        }
    }

    /// What was to be written is still to be.
    pub(super) const fn keep_news(&mut self) {
        self.changed = true;
    }

    /// For the next switch, in parts that fit a message.
    pub(super) fn terms(&self) -> Vec<Vec<LeaseTerms>> {
        let now = now_ms();
        let left = |lease: &Kept| lease.until_ms.saturating_sub(now) / 1000;
        let all: Vec<LeaseTerms> = self
            .leases
            .values()
            .map(|lease| LeaseTerms {
                mac: lease.mac,
                address: lease.address,
                left_s: u32::try_from(left(lease)).unwrap_or(u32::MAX),
            })
            .collect();
        all.chunks(LEASES_MAX).map(<[_]>::to_vec).collect()
    }

    /// Those that hold.
    pub(super) fn current(&self) -> impl Iterator<Item = Kept> {
        let now = now_ms();
        let current = self.leases.values().copied();
        current.filter(move |lease| lease.until_ms > now)
    }

    /// What is to be written, if anything has changed since it was asked last.
    pub(super) fn news(&mut self) -> Option<(PathBuf, Vec<Kept>)> {
        let changed = std::mem::take(&mut self.changed);
        changed.then(|| {
            (
                self.directory.clone(),
                self.leases.values().copied().collect(),
            )
        })
    }
}

/// Writes leases, whole or not at all.
pub(super) fn write(directory: &Path, leases: &[Kept]) -> io::Result<()> {
    crate::serve::make_private(directory)?;
    let new = directory.join(NEW_NAME);
    let mut file = fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec(leases)?)?;
    file.sync_all()?;
    fs::rename(new, directory.join(FILE_NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(last: u8, mac: u8, left_s: u32) -> LeaseTerms {
        LeaseTerms {
            mac: [2, 0, 0, 0, 0, mac],
            address: Ipv4Addr::new(10, 0, 0, last),
            left_s,
        }
    }

    fn subnet() -> Option<SubnetSpec> {
        SubnetSpec::parse("10.0.0.0/24").ok()
    }

    const ANYBODY: fn(&[u8; 6]) -> bool = |_| true;

    #[test]
    fn leases_outlive_the_daemon_and_an_address_has_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("lab");
        let mut book = Book::open(&directory, subnet());
        assert!(book.news().is_none());
        let told = [terms(5, 1, 0), terms(6, 2, 100), terms(5, 3, 200)];
        assert!(book.hear(&told, ANYBODY));
        let (place, kept) = book.news().unwrap();
        write(&place, &kept).unwrap();
        assert!(book.news().is_none());
        assert!(!book.hear(&told[1..], ANYBODY), "it is known");
        let mut again = Book::open(&directory, subnet());
        assert!(again.news().is_none());
        let found: Vec<_> = again
            .current()
            .map(|l| (l.address.octets()[3], l.mac[5]))
            .collect();
        assert_eq!(found, [(6, 2), (5, 3)]);
        again.hear(&[terms(6, 2, 0)], ANYBODY);
        assert_eq!(again.current().count(), 1);
        assert_eq!(
            again.terms().concat().len(),
            2,
            "it is still known whose it was"
        );
        fs::write(directory.join(FILE_NAME), b"[{\"mac\":").unwrap();
        assert_eq!(Book::open(&directory, subnet()).current().count(), 0);
    }

    #[test]
    fn lies_are_not_kept() {
        let subnet = subnet().map(|subnet| SubnetSpec {
            router: Some(Ipv4Addr::new(10, 0, 0, 9)),
            ..subnet
        });
        let mut book = Book::open(Path::new("/nowhere"), subnet);
        book.hear(&[terms(5, 1, 3600)], ANYBODY);
        let lies = [
            // Somebody else's, the router's, the gateway's, nobody's, and for ever.
            terms(5, 2, 3600),
            terms(9, 2, 3600),
            terms(1, 2, 3600),
            terms(255, 2, 3600),
            terms(7, 2, u32::MAX),
        ];
        book.hear(&lies, ANYBODY);
        book.hear(&[terms(8, 3, 60)], |mac| mac[5] != 3);
        let kept = book.terms().concat();
        assert_eq!(kept.len(), 1, "{kept:?}");
        assert_eq!((kept[0].address.octets()[3], kept[0].mac[5]), (5, 1));
        // Who moves leaves its place to others.
        book.hear(&[terms(6, 1, 3600), terms(5, 2, 3600)], ANYBODY);
        assert_eq!(book.current().count(), 2);
    }

    #[test]
    fn there_are_only_so_many() {
        let subnet = SubnetSpec::parse("10.0.0.0/16").ok();
        let mut book = Book::open(Path::new("/nowhere"), subnet);
        for n in 0..5000u32 {
            let [_, _, a, b] = n.to_be_bytes();
            let lease = LeaseTerms {
                mac: [2, 0, 0, 0, a, b],
                address: (0x0a00_0100 + n).into(),
                left_s: n / 2,
            };
            book.hear(&[lease], ANYBODY);
        }
        let parts = book.terms();
        assert_eq!(parts.concat().len(), KEPT_MAX);
        assert!(parts.iter().all(|part| part.len() <= LEASES_MAX));
        assert!(
            book.current()
                .all(|lease| u32::from(lease.address) - 0x0a00_0100 >= 5000 - 4096 - 2)
        );
    }
}
