//! The filter, and a child that runs under it from its first instruction on.
#![allow(
    unsafe_code,
    reason = "the filter is installed between fork and exec; the page on which child and parent meet"
)]

use super::memory::take_descriptor;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::signal::SigSet;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// `AUDIT_ARCH_X86_64`.
const ARCH: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const ARCH_AT: u32 = 4;
/// Most system calls of one filter: a jump spans as many instructions.
const CALLS_MAX: usize = 200;
/// How long a child may take from fork to its filter.
const PATIENCE: Duration = Duration::from_secs(10);
const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Why no process could be started under a filter.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// Too many system calls.
    #[error("{0} system calls in one filter, at most {CALLS_MAX}")]
    TooMany(usize),
    /// The kernel refused.
    #[error("starting {program} under a filter that notifies: {cause}")]
    Os {
        /// What was to be started.
        program: String,
        /// The kernel's error.
        cause: io::Error,
    },
    /// The child never came as far as its filter.
    #[error("the child installed no filter")]
    NoListener,
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    }
}

/// Notifies for `calls`, allows everything else.
fn program(calls: &[u32]) -> Result<Vec<libc::sock_filter>, NotifyError> {
    if calls.len() > CALLS_MAX {
        return Err(NotifyError::TooMany(calls.len()));
    }
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let give = libc::BPF_RET | libc::BPF_K;
    let mut code = vec![
        instruction(load, ARCH_AT, 0, 0),
        instruction(equal, ARCH, 1, 0),
        instruction(give, libc::SECCOMP_RET_ALLOW, 0, 0),
        instruction(load, NUMBER_AT, 0, 0),
    ];
    for (n, &call) in calls.iter().enumerate() {
        // Over the comparisons that follow and the ALLOW behind them.
        let over = u8::try_from(calls.len() - n).unwrap_or(0);
        code.push(instruction(equal, call, over, 0));
    }
    code.push(instruction(give, libc::SECCOMP_RET_ALLOW, 0, 0));
    code.push(instruction(give, libc::SECCOMP_RET_USER_NOTIF, 0, 0));
    Ok(code)
}

/// Where child and parent meet: the child says where its listener is and waits until it is taken.
#[derive(Debug, Default)]
struct Meeting {
    pid: AtomicI32,
    listener: AtomicI32,
    /// 1 when the parent has it, -1 when it could not take it.
    taken: AtomicI32,
}

/// A page that a child shares with us.
fn meeting() -> io::Result<&'static Meeting> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let page = unsafe {
        mmap_anonymous(
            None,
            PAGE,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_SHARED,
        )
    }?;
    // SAFETY: zeroed, aligned and larger than the three integers, and never unmapped: one page for
    // each broker that the harness starts.
    Ok(unsafe { page.cast::<Meeting>().as_ref() })
}

/// In the child: installs the filter and waits until the parent has taken the listener. Only system
/// calls, nothing allocates.
fn install(code: &[libc::sock_filter], at: &Meeting) -> io::Result<()> {
    // The harness waits for signals in one thread and blocks them; its children do not.
    SigSet::empty().thread_set_mask()?;
    let program = libc::sock_fprog {
        len: u16::try_from(code.len()).unwrap_or(0),
        filter: code.as_ptr().cast_mut(),
    };
    // A call that is being looked at is not restarted by signals that do not kill: it would be
    // seen twice.
    let flags =
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: the program lives until the kernel has copied it.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    at.listener
        .store(i32::try_from(listener).unwrap_or(-1), Ordering::SeqCst);
    // SAFETY: no arguments.
    let pid = unsafe { libc::getpid() };
    at.pid.store(pid, Ordering::SeqCst);
    loop {
        match at.taken.load(Ordering::SeqCst) {
            0 => {}
            1 => return Ok(()),
            _ => return Err(io::Error::from_raw_os_error(libc::EPERM)),
        }
        // SAFETY: no arguments.
        unsafe { libc::sched_yield() };
    }
}

fn take(at: &Meeting) -> Option<OwnedFd> {
    let until = Instant::now() + PATIENCE;
    while at.pid.load(Ordering::SeqCst) == 0 {
        if Instant::now() > until || at.taken.load(Ordering::SeqCst) != 0 {
            return None;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    let pid = at.pid.load(Ordering::SeqCst);
    let listener = take_descriptor(pid, at.listener.load(Ordering::SeqCst)).ok();
    let said = if listener.is_some() { 1 } else { -1 };
    at.taken.store(said, Ordering::SeqCst);
    listener
}

/// Starts `command` with a filter that notifies for `calls`, in it and in everything that it starts.
/// The listener goes to `serving`, with the pid, before the program is
/// executed.
///
/// # Errors
/// The kernel's, also when the program cannot be executed.
pub fn spawn(
    command: &mut Command,
    calls: &[u32],
    serving: impl FnOnce(OwnedFd, i32) + Send,
) -> Result<Child, NotifyError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let os = |cause| NotifyError::Os {
        program: name.clone(),
        cause,
    };
    let code = program(calls)?;
    let at = meeting().map_err(os)?;
    // SAFETY: `install` makes system calls and writes to a page that child and parent share.
    unsafe { command.pre_exec(move || install(&code, at)) };
    std::thread::scope(|scope| {
        let taker = scope.spawn(|| {
            let listener = take(at)?;
            serving(listener, at.pid.load(Ordering::SeqCst));
            Some(())
        });
        let child = command.spawn();
        if child.is_err() {
            // Ends a taker that still waits; one that is done does not look.
            at.taken.store(-1, Ordering::SeqCst);
        }
        let taken = taker.join().ok().flatten();
        let child = child.map_err(os)?;
        taken.map(|()| child).ok_or(NotifyError::NoListener)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_end_at_the_last_instruction() {
        let code = program(&[1, 2, 3]).unwrap();
        let last = code.len() - 1;
        assert_eq!(code[last].k, libc::SECCOMP_RET_USER_NOTIF);
        assert_eq!(code[last - 1].k, libc::SECCOMP_RET_ALLOW);
        for (at, instruction) in code.iter().enumerate().skip(4).take(3) {
            assert_eq!(at + 1 + usize::from(instruction.jt), last);
            assert_eq!(instruction.jf, 0);
        }
        assert!(program(&[0; CALLS_MAX + 1]).is_err());
    }
}
