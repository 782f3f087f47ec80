//! The leases of a network, kept for the next switch: on disk, so that an address is nobody else's after the host's start
//! either.

use crate::api::time::now_ms;
use bulkhead_ipc::protocol::switch::{LEASES_MAX, LeaseTerms};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Most leases that are kept.
const KEPT_MAX: usize = 4096;
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

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Book {
    directory: PathBuf,
    leases: BTreeMap<[u8; 6], Kept>,
    changed: bool,
}

impl Book {
    /// What was written in `directory`. A file that is damaged is as good as none: addresses are chosen by the cards'
    /// own, so most are what they were.
    pub(super) fn open(directory: &Path) -> Self {
        let mut book = Self {
            directory: directory.to_owned(),
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
            Ok(leases) => leases.into_iter().for_each(|lease| book.put(lease)),
            Err(error) => tracing::warn!(%error, "leases are damaged"),
        }
        book.changed = false;
        book
    }

    /// What a switch tells.
    pub(super) fn hear(&mut self, leases: &[LeaseTerms]) {
        let now = now_ms();
        for lease in leases {
            self.put(Kept {
                mac: lease.mac,
                address: lease.address,
                until_ms: now.saturating_add(u64::from(lease.left_s) * 1000),
            });
        }
    }

    fn put(&mut self, lease: Kept) {
        self.leases
            .retain(|mac, other| *mac == lease.mac || other.address != lease.address);
        self.leases.insert(lease.mac, lease);
        while self.leases.len() > KEPT_MAX {
            let first = self.leases.values().min_by_key(|lease| lease.until_ms);
            let Some(mac) = first.map(|lease| lease.mac) else {
                break;
            };
            self.leases.remove(&mac);
        }
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
    fs::write(&new, serde_json::to_vec(leases)?)?;
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

    #[test]
    fn leases_outlive_the_daemon_and_an_address_has_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("lab");
        let mut book = Book::open(&directory);
        assert!(book.news().is_none());
        book.hear(&[terms(5, 1, 100), terms(6, 2, 100), terms(5, 3, 200)]);
        let (place, kept) = book.news().unwrap();
        write(&place, &kept).unwrap();
        assert!(book.news().is_none());
        let mut again = Book::open(&directory);
        assert!(again.news().is_none());
        let found: Vec<_> = again
            .current()
            .map(|l| (l.address.octets()[3], l.mac[5]))
            .collect();
        assert_eq!(found, [(6, 2), (5, 3)]);
        again.hear(&[terms(6, 2, 0)]);
        assert_eq!(again.current().count(), 1);
        assert_eq!(
            again.terms().concat().len(),
            2,
            "it is still known whose it was"
        );
        fs::write(directory.join(FILE_NAME), b"[{\"mac\":").unwrap();
        assert_eq!(Book::open(&directory).current().count(), 0);
    }

    #[test]
    fn there_are_only_so_many() {
        let mut book = Book::default();
        for n in 0..5000u32 {
            let [_, _, a, b] = n.to_be_bytes();
            book.hear(&[LeaseTerms {
                mac: [2, 0, 0, 0, a, b],
                address: n.into(),
                left_s: 60 + n,
            }]);
        }
        let parts = book.terms();
        assert_eq!(parts.concat().len(), KEPT_MAX);
        assert!(parts.iter().all(|part| part.len() <= LEASES_MAX));
        assert!(
            book.current()
                .all(|lease| u32::from(lease.address) >= 5000 - 4096)
        );
    }
}
