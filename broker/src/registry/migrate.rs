//! The registry's schema version, and the way from each old one to the next.
//!
//! A step changes tables in the transaction that also writes the new version, so that a program
//! that dies on the way leaves the old schema whole. A registry that a newer program has written
//! is refused, not guessed at.

use super::{META, RegistryError, VERSION_KEY};
use redb::{ReadableTable, WriteTransaction};

/// One way from version `n` to `n + 1`, where `n` is its place in the list, from 1.
pub(super) type Step = fn(&WriteTransaction) -> Result<(), RegistryError>;

/// Every step since the first release. A step that was released is never changed.
pub(super) const STEPS: &[Step] = &[];

/// Brings an opened registry to the version after the last of `steps`; an empty one gets it at once.
pub(super) fn migrate(transaction: &WriteTransaction, steps: &[Step]) -> Result<(), RegistryError> {
    let newest = 1 + steps.len() as u64;
    let found = {
        let meta = transaction.open_table(META)?;
        meta.get(VERSION_KEY)?.map(|version| version.value())
    };
    let version = found.unwrap_or(newest);
    if version == 0 || version > newest {
        return Err(RegistryError::Version {
            found: version,
            newest,
        });
    }
    let done = usize::try_from(version - 1).unwrap_or(usize::MAX);
    for step in steps.iter().skip(done) {
        step(transaction)?;
    }
    if found != Some(newest) {
        transaction.open_table(META)?.insert(VERSION_KEY, newest)?;
    }
    Ok(())
}
