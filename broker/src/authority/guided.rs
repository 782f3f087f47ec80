//! A thread of another process under our control: it makes the system calls that we choose, at the very
//! place where it was stopped, and goes on as if nothing had been.
//!
//! The kernel judges these calls as the thread's own. That is how what no file of /proc tells is measured.

use super::sys::Stopped;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Where bytes are placed below the stack pointer: beyond the 128 bytes that the ABI leaves to leaf
/// functions.
const BELOW_STACK: u64 = 2048;
/// Most text that is searched for a `syscall`.
const TEXT_MAX: u64 = 16 << 20;

/// What became of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It returned this value: an errno when negative.
    Returned(i64),
    /// The process has ended with this exit code.
    Exited(i32),
    /// A signal has killed the process.
    Killed(Signal),
}

/// A stopped thread. Dropping it lets the thread go on where it was.
#[derive(Debug)]
pub struct Guided {
    thread: Pid,
    memory: File,
    saved: libc::user_regs_struct,
    /// Lets go of it, after its registers are what they were.
    _stopped: Stopped,
}

impl Guided {
    /// Stops thread `tid` of process `pid`. Blocks until it has stopped: at once, unless it waits for a
    /// broken disk.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_PTRACE over the process; ESRCH when the thread is gone.
    pub fn stop(pid: i32, tid: i32) -> io::Result<Self> {
        Self::seize(pid, tid, Options::empty())
    }

    /// The same; the thread's seccomp filters do not judge its calls until it is let go. Those of its
    /// other threads do.
    ///
    /// # Errors
    /// As [`Self::stop`]; EPERM also without CAP_SYS_ADMIN, and when the caller has filters itself; EINVAL
    /// when the kernel has no `CONFIG_CHECKPOINT_RESTORE`.
    pub fn stop_without_seccomp(pid: i32, tid: i32) -> io::Result<Self> {
        const PTRACE_O_SUSPEND_SECCOMP: i32 = 1 << 21;
        Self::seize(
            pid,
            tid,
            Options::from_bits_retain(PTRACE_O_SUSPEND_SECCOMP),
        )
    }

    fn seize(pid: i32, tid: i32, options: Options) -> io::Result<Self> {
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))?;
        let stopped = Stopped::seize(tid, options)?;
        let thread = Pid::from_raw(tid);
        Ok(Self {
            thread,
            memory,
            saved: ptrace::getregs(thread)?,
            _stopped: stopped,
        })
    }

    /// The system call that was interrupted: its number and its second argument; `None` when the thread
    /// was not in one.
    #[must_use]
    pub fn interrupted(&self) -> Option<(u64, u64)> {
        let is_behind = self.instruction_at(self.saved.rip.checked_sub(2)?);
        is_behind.then_some((self.saved.orig_rax, self.saved.rsi))
    }

    /// Puts at most 1024 `bytes` where the thread does not notice them, and returns their address.
    ///
    /// # Errors
    /// When no stack is mapped there.
    pub fn place(&self, bytes: &[u8]) -> io::Result<u64> {
        let address = self.saved.rsp.saturating_sub(BELOW_STACK) & !63;
        self.write(address, bytes)?;
        Ok(address)
    }

    /// Reads `len` bytes of the process at `address`.
    ///
    /// # Errors
    /// EIO when nothing is mapped there.
    pub fn read(&self, address: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, address)?;
        Ok(bytes)
    }

    /// Writes bytes of the process at `address`.
    ///
    /// # Errors
    /// EIO when nothing is mapped there.
    pub fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(bytes, address)
    }

    /// Makes the thread issue system call `number`, and waits until it returns or the process ends.
    ///
    /// # Errors
    /// ESRCH when the process has ended already, ENOENT when its text has no `syscall`.
    pub fn call(&mut self, number: i64, arguments: [u64; 6]) -> io::Result<Outcome> {
        let mut registers = self.saved;
        registers.rip = self.syscall_instruction()?;
        // Not in a system call: the kernel must not restart the one that was interrupted.
        registers.orig_rax = u64::MAX;
        registers.rax = number.cast_unsigned();
        let [a, b, c, d, e, f] = arguments;
        (registers.rdi, registers.rsi, registers.rdx) = (a, b, c);
        (registers.r10, registers.r8, registers.r9) = (d, e, f);
        ptrace::setregs(self.thread, registers)?;
        ptrace::step(self.thread, None)?;
        loop {
            match waitpid(self.thread, Some(WaitPidFlag::__WALL))? {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                    let after = ptrace::getregs(self.thread)?;
                    return Ok(Outcome::Returned(after.rax.cast_signed()));
                }
                WaitStatus::Stopped(_, signal) => ptrace::cont(self.thread, signal)?,
                WaitStatus::Exited(_, code) => {
                    return Ok(Outcome::Exited(code));
                }
                WaitStatus::Signaled(_, signal, _) => {
                    return Ok(Outcome::Killed(signal));
                }
                _ => ptrace::cont(self.thread, None)?,
            }
        }
    }

    /// Where a `syscall` is: behind the thread, if it was in one, else anywhere in its text.
    fn syscall_instruction(&self) -> io::Result<u64> {
        let behind = self.saved.rip.saturating_sub(2);
        if self.instruction_at(behind) {
            return Ok(behind);
        }
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.thread))?;
        let text = maps.lines().filter(|line| line.contains(" r-xp "));
        text.filter_map(|line| {
            let (begin, end) = line.split_once(' ')?.0.split_once('-')?;
            let begin = u64::from_str_radix(begin, 16).ok()?;
            let len = u64::from_str_radix(end, 16).ok()?.checked_sub(begin)?;
            let bytes = self.read(begin, usize::try_from(len.min(TEXT_MAX)).ok()?);
            let bytes = bytes.ok()?;
            let found = bytes.windows(2).position(|pair| pair == SYSCALL)?;
            Some(begin + found as u64)
        })
        .next()
        .ok_or_else(|| Errno::ENOENT.into())
    }

    fn instruction_at(&self, address: u64) -> bool {
        self.read(address, SYSCALL.len())
            .is_ok_and(|bytes| bytes == SYSCALL)
    }
}

impl Drop for Guided {
    fn drop(&mut self) {
        // The interrupted call is restarted where it was. A process that has ended has no registers.
        let _restored = ptrace::setregs(self.thread, self.saved);
    }
}
