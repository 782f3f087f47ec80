//! What is left of the dead owner of a lock: a process that it was about to start has its descriptors
//! from fork to exec, and so the lock.

use crate::vm::record;
use std::time::{Duration, Instant};

/// How long a lock may outlive its owner.
pub const LONGEST: Duration = Duration::from_secs(2);
/// How often it is looked meanwhile.
pub const POLL: Duration = Duration::from_millis(2);

/// A wait for the remains of owners that are dead.
#[derive(Debug)]
pub struct Remains {
    until: Instant,
}

impl Remains {
    /// Begins to wait.
    #[must_use]
    pub fn begin() -> Self {
        Self {
            until: Instant::now() + LONGEST,
        }
    }

    /// Whether to ask again for the lock that `owner` says it has: after [`POLL`], for which it blocks, when
    /// that process is dead and [`LONGEST`] is not over; else at once not.
    #[must_use]
    pub fn wait(&self, owner: Option<u32>) -> bool {
        let owner = owner.and_then(|pid| i32::try_from(pid).ok());
        let is_dead = owner.is_some_and(record::is_dead);
        let again = is_dead && Instant::now() < self.until;
        if again {
            std::thread::sleep(POLL);
        }
        again
    }
}
