//! Core scheduling: which processes may run on the hardware threads of one core at the same time.
//!
//! Processes with the same cookie share a core, all others never do, so that a guest cannot watch
//! another VM through what siblings share (caches, buffers, predictors). A VM's processes get one
//! cookie, which its vCPU process keeps; the broker has none. Where the kernel has no core scheduling
//! or the host has no siblings, nothing is done; `bulkhead doctor` tells which.

use super::sys;
use nix::errno::Errno;
use std::io;

/// Whether cookies exist here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cookie {
    /// The process has its VM's.
    Given,
    /// The kernel has no core scheduling (EINVAL), or the processors no siblings (ENODEV).
    NotHere,
}

/// Gives process `pid` a cookie that no other has.
///
/// # Errors
/// The kernel's, when it has core scheduling and refuses.
pub fn create(pid: i32) -> Result<Cookie, Errno> {
    outcome(sys::core_scheduling(sys::CoreCommand::CreateFor(pid)))
}

/// Gives process `pid` the cookie of process `from`. A thread lends itself to it: cookies are copied
/// from and to the caller only.
///
/// # Errors
/// The kernel's, when it has core scheduling and refuses, or has no room for a thread.
pub fn share(from: i32, pid: i32) -> Result<Cookie, Errno> {
    // The common case, where there is nothing to copy, needs no thread.
    if outcome(sys::core_scheduling(sys::CoreCommand::Ask))? == Cookie::NotHere {
        return Ok(Cookie::NotHere);
    }
    let lend = move || {
        sys::core_scheduling(sys::CoreCommand::TakeFrom(from))?;
        sys::core_scheduling(sys::CoreCommand::GiveTo(pid))
    };
    let builder = std::thread::Builder::new().name("cookie".to_owned());
    let thread = builder
        .spawn(lend)
        .map_err(|e: io::Error| e.raw_os_error().map_or(Errno::EAGAIN, Errno::from_raw))?;
    outcome(thread.join().unwrap_or(Err(Errno::ESRCH)))
}

fn outcome(result: Result<(), Errno>) -> Result<Cookie, Errno> {
    match result {
        Ok(()) => Ok(Cookie::Given),
        Err(Errno::EINVAL | Errno::ENODEV) => Ok(Cookie::NotHere),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kernel_without_it_is_forgiven() {
        assert_eq!(outcome(Ok(())), Ok(Cookie::Given));
        assert_eq!(outcome(Err(Errno::EINVAL)), Ok(Cookie::NotHere));
        assert_eq!(outcome(Err(Errno::ENODEV)), Ok(Cookie::NotHere));
        assert_eq!(outcome(Err(Errno::EPERM)), Err(Errno::EPERM));
    }
}
