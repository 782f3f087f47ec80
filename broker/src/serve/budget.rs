//! Guest memory of all machines together, against what the host may give.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Shared by all machines.
#[derive(Debug)]
pub(super) struct Budget {
    bytes: u64,
    taken: Mutex<BTreeMap<String, u64>>,
}

/// There is not enough left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "its memory of {} MiB does not fit the {} MiB that are left of the host's budget of {} MiB \
     (host.memory in bulkhead.toml)",
    wanted >> 20, left >> 20, budget >> 20
)]
pub(super) struct TooMuch {
    pub(super) wanted: u64,
    pub(super) left: u64,
    pub(super) budget: u64,
}

/// A machine's part. Dropped, it is free again.
#[derive(Debug)]
pub(super) struct Share {
    budget: Arc<Budget>,
    name: String,
}

impl Budget {
    pub(super) fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            bytes,
            taken: Mutex::default(),
        })
    }

    /// Takes `wanted` bytes for the machine `name`.
    pub(super) fn take(self: &Arc<Self>, name: &str, wanted: u64) -> Result<Share, TooMuch> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let others = taken.iter().filter(|(other, _)| *other != name);
        let sum = others.fold(0u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
        let left = self.bytes.saturating_sub(sum);
        if wanted > left {
            let budget = self.bytes;
            return Err(TooMuch {
                wanted,
                left,
                budget,
            });
        }
        taken.insert(name.to_owned(), wanted);
        Ok(self.share(name))
    }

    /// The part of a machine that has its memory already, whether or not it fits.
    pub(super) fn keep(self: &Arc<Self>, name: &str, has: u64) -> Share {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.insert(name.to_owned(), has);
        self.share(name)
    }

    fn share(self: &Arc<Self>, name: &str) -> Share {
        Share {
            budget: Arc::clone(self),
            name: name.to_owned(),
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let taken = self.budget.taken.lock();
        taken
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_share_one_budget_and_give_their_part_back() {
        let budget = Budget::new(10 << 20);
        let first = budget.take("a", 6 << 20).unwrap();
        let error = budget.take("b", 5 << 20).unwrap_err();
        let told = error.to_string();
        assert!(told.contains("5 MiB") && told.contains("4 MiB") && told.contains("10 MiB"));
        let second = budget.take("b", 4 << 20).unwrap();
        drop(first);
        assert!(budget.take("c", 7 << 20).is_err());
        assert!(budget.take("c", 6 << 20).is_ok(), "and was dropped at once");
        drop(second);
        let found = budget.keep("found", 20 << 20);
        assert!(budget.take("c", 1 << 20).is_err());
        drop(found);
        assert!(budget.take("c", 10 << 20).is_ok());
    }
}
