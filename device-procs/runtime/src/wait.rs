//! Sleeping until one of a set of descriptors has something new: of a fixed few, each with a token, and
//! of the sockets that a process is given while it serves, each with a number.
//!
//! Descriptors are watched edge-triggered: a doorbell need not be read after it has rung, which
//! saves a system call for each wake-up, and a peer that keeps one ringing cannot make the process
//! spin by that. Whoever is woken therefore looks at everything that the descriptor announces.

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

/// Most descriptors with tokens that one process waits for.
pub const WATCHED_MAX: usize = 8;
/// Most events that one look takes. Those of others are not lost: they come with the next.
const EVENTS_MAX: usize = 64;
/// Set in what is registered of a socket; the rest is its number.
const SOCKET: u64 = 1 << 63;

/// The set. Made in the start-up phase, in which everything with a token is added.
#[derive(Debug)]
pub struct Waiter {
    epoll: Arc<Epoll>,
}

/// Adds sockets to the set of a process that serves.
#[derive(Debug, Clone)]
pub struct Watcher {
    epoll: Arc<Epoll>,
}

/// There is something new on a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketNews {
    /// Its number.
    pub number: u64,
    /// Whether both of its directions have ended.
    pub hung_up: bool,
    /// Whether it has an error; a pipe that nobody reads has one.
    pub failed: bool,
}

/// What woke the process: one bit for each token, and the sockets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Woken {
    tokens: u64,
    /// Sockets with something new.
    pub sockets: Vec<SocketNews>,
}

impl Woken {
    /// Whether the descriptor of `token` has something new.
    #[must_use]
    pub const fn by(&self, token: u8) -> bool {
        token < 64 && self.tokens & (1 << token) != 0
    }
}

impl Waiter {
    /// An empty set.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn new() -> Result<Self, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self {
            epoll: Arc::new(epoll),
        })
    }

    /// What adds sockets later.
    #[must_use]
    pub fn watcher(&self) -> Watcher {
        Watcher {
            epoll: Arc::clone(&self.epoll),
        }
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
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let got = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        let mut woken = Woken::default();
        for event in events.iter().take(got) {
            if event.data() & SOCKET == 0 {
                woken.tokens |= 1 << (event.data() % 64);
            } else {
                woken.sockets.push(SocketNews {
                    number: event.data() & !SOCKET,
                    hung_up: event.events().contains(EpollFlags::EPOLLHUP),
                    failed: event.events().contains(EpollFlags::EPOLLERR),
                });
            }
        }
        Ok(woken)
    }
}

impl Watcher {
    /// Adds a socket under a number below 2^63, for as long as it is open. What is new on it already is
    /// told as well.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn watch(&self, socket: impl AsFd, number: u64) -> Result<(), Errno> {
        let flags = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLET;
        let event = EpollEvent::new(flags, SOCKET | number);
        self.epoll.add(socket, event)
    }

    /// As [`Watcher::watch`], for what can be read only: a doorbell, an interface.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn watch_input(&self, fd: impl AsFd, number: u64) -> Result<(), Errno> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.epoll.add(fd, EpollEvent::new(flags, SOCKET | number))
    }

    /// Takes a descriptor away that others have as well, so that it would stay in the set when it is closed.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn forget(&self, fd: impl AsFd) -> Result<(), Errno> {
        self.epoll.delete(fd)
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
