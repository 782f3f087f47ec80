//! One small shared page per process in which the process says how far it is and, if the kernel
//! stops it, what it had tried. The broker shows its content as *claimed by the process*.

use crate::shared::{SharedError, SharedMemory};
use crate::sync::Ordering;
use std::os::fd::OwnedFd;

/// Size of the page in bytes.
pub const CONTROL_PAGE_BYTES: u64 = 4096;
const OFFSET_PHASE: usize = 0;
const OFFSET_DENIED: usize = 8;
const OFFSET_NUMBER: usize = 12;
const OFFSET_THREAD: usize = 16;
const OFFSET_ARGS: usize = 24;
const OFFSET_NAME: usize = 72;
/// Longest name of a thread in a policy, in bytes.
pub const THREAD_NAME_BYTES: usize = 16;

/// How far a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Executed; has not read its birth message.
    Exec,
    /// The start-up filter is in force.
    Startup,
    /// The locked filter is in force.
    Locked,
}

/// A system call that the kernel refused, as told by the process's SIGSYS handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Denial {
    /// System call number (x86_64).
    pub number: u32,
    /// Thread id inside the process's pid namespace.
    pub thread: u32,
    /// Name of the thread's locked filter, padded with zeros; empty in the start-up phase.
    pub thread_name: [u8; THREAD_NAME_BYTES],
    /// Its six arguments.
    pub args: [u64; 6],
}

impl Denial {
    /// The thread's name in the policy; `None` in the start-up phase, or when it is no text.
    #[must_use]
    pub fn thread_name(&self) -> Option<&str> {
        let end = self.thread_name.iter().position(|&b| b == 0);
        let name = self.thread_name.get(..end.unwrap_or(THREAD_NAME_BYTES))?;
        std::str::from_utf8(name)
            .ok()
            .filter(|name| !name.is_empty())
    }
}

/// The mapped page.
#[derive(Debug)]
pub struct ControlPage {
    memory: SharedMemory,
}

impl ControlPage {
    /// Maps the page.
    ///
    /// # Errors
    /// As [`SharedMemory::map`].
    pub fn map(fd: OwnedFd) -> Result<Self, SharedError> {
        SharedMemory::map(fd, CONTROL_PAGE_BYTES).map(|memory| Self { memory })
    }

    /// Process: reports its phase.
    pub fn set_phase(&self, phase: Phase) {
        let value: u32 = match phase {
            Phase::Exec => 0,
            Phase::Startup => 1,
            Phase::Locked => 2,
        };
        self.memory.store(OFFSET_PHASE, value, Ordering::Release);
    }

    /// Broker: the phase that the process claims; nonsense counts as [`Phase::Exec`].
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.memory.load::<u32>(OFFSET_PHASE, Ordering::Acquire) {
            1 => Phase::Startup,
            2 => Phase::Locked,
            _ => Phase::Exec,
        }
    }

    /// Process, from its SIGSYS handler: async-signal-safe, takes no lock, allocates nothing.
    pub fn set_denial(&self, denial: Denial) {
        self.memory.write(OFFSET_NUMBER, denial.number);
        self.memory.write(OFFSET_THREAD, denial.thread);
        self.memory.write(OFFSET_NAME, denial.thread_name);
        self.memory.write(OFFSET_ARGS, denial.args);
        self.memory.store(OFFSET_DENIED, 1u32, Ordering::Release);
    }

    /// Broker: the denial that the process claims.
    #[must_use]
    pub fn denial(&self) -> Option<Denial> {
        (self.memory.load::<u32>(OFFSET_DENIED, Ordering::Acquire) == 1).then(|| Denial {
            number: self.memory.read(OFFSET_NUMBER),
            thread: self.memory.read(OFFSET_THREAD),
            thread_name: self.memory.read(OFFSET_NAME),
            args: self.memory.read(OFFSET_ARGS),
        })
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::shared::sealed_memfd;

    #[test]
    fn phase_and_denial_are_read_back() {
        let page = ControlPage::map(sealed_memfd("c", CONTROL_PAGE_BYTES).unwrap()).unwrap();
        assert_eq!((page.phase(), page.denial()), (Phase::Exec, None));
        page.set_phase(Phase::Locked);
        let denial = Denial {
            number: 41,
            thread: 1,
            thread_name: *b"main\0\0\0\0\0\0\0\0\0\0\0\0",
            args: [1, 2, 3, 4, 5, 6],
        };
        page.set_denial(denial);
        assert_eq!((page.phase(), page.denial()), (Phase::Locked, Some(denial)));
        assert_eq!(denial.thread_name(), Some("main"));
        let nonsense = Denial {
            thread_name: [0xff; THREAD_NAME_BYTES],
            ..denial
        };
        assert_eq!(nonsense.thread_name(), None);
    }
}
