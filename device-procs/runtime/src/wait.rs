//! Sleeping until one of a fixed set of descriptors has something new.
//!
//! Descriptors are watched edge-triggered: a doorbell need not be read after it has rung, which
//! saves a system call for each wake-up, and a peer that keeps one ringing cannot make the process
//! spin by that. Whoever is woken therefore looks at everything that the descriptor announces.

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::os::fd::AsFd;
use std::time::Duration;

/// Most descriptors that one process waits for.
pub const WATCHED_MAX: usize = 8;

/// The set. Made in the start-up phase; nothing is added after lock.
#[derive(Debug)]
pub struct Waiter {
    epoll: Epoll,
}

/// What woke the process: one bit for each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Woken {
    tokens: u64,
}

impl Woken {
    /// Whether the descriptor of `token` has something new.
    #[must_use]
    pub const fn by(self, token: u8) -> bool {
        token < 64 && self.tokens & (1 << token) != 0
    }
}

impl Waiter {
    /// An empty set.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn new() -> Result<Self, Errno> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(|epoll| Self { epoll })
    }

    /// Adds a descriptor under a token from 0 to 63.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn watch(&self, fd: impl AsFd, token: u8) -> Result<(), Errno> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.epoll.add(fd, EpollEvent::new(flags, u64::from(token)))
    }

    /// Sleeps until something is new, for at most `within` if given.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn sleep(&self, within: Option<Duration>) -> Result<Woken, Errno> {
        // Rounded up: a wait that ends early would be repeated with nothing to do.
        let timeout = within.map_or(EpollTimeout::NONE, |d| {
            let ms = d.as_nanos().div_ceil(1_000_000);
            EpollTimeout::try_from(ms).unwrap_or(EpollTimeout::MAX)
        });
        let mut events = [EpollEvent::empty(); WATCHED_MAX];
        let got = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        let mut woken = Woken::default();
        for event in events.iter().take(got) {
            woken.tokens |= 1 << (event.data() % 64);
        }
        Ok(woken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::shared::Doorbell;

    #[test]
    fn every_ring_wakes_once_without_being_read() {
        let (a, b) = (Doorbell::new().unwrap(), Doorbell::new().unwrap());
        let waiter = Waiter::new().unwrap();
        waiter.watch(&a, 0).unwrap();
        waiter.watch(&b, 9).unwrap();
        let now = Some(Duration::ZERO);
        assert_eq!(waiter.sleep(now).unwrap(), Woken::default());
        for _ in 0..3 {
            b.ring();
            let woken = waiter.sleep(now).unwrap();
            assert!(woken.by(9) && !woken.by(0));
            assert_eq!(waiter.sleep(now).unwrap(), Woken::default());
        }
    }
}
