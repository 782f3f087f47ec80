//! A process that has been taken over, without any help from the product: the test stops a thread
//! with ptrace and makes it issue system calls, as an attacker who runs code in it would. seccomp,
//! Landlock and the io_uring restrictions judge these calls as they judge the process's own.

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// What became of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It returned this value: an errno when negative.
    Returned(i64),
    /// The kernel stopped it with SIGSYS; the process ended with this exit code.
    Stopped {
        /// Exit code of the process.
        code: i32,
    },
    /// The process was killed by a signal.
    Killed(Signal),
}

/// One thread under our control. Dropping it lets the thread go on.
#[derive(Debug)]
pub struct Intruder {
    thread: Pid,
    memory: File,
    saved: libc::user_regs_struct,
    alive: bool,
}

impl Intruder {
    /// Takes over the thread named `name` of process `pid`; the first one without a name.
    ///
    /// # Panics
    /// When the thread is not there, or does not sleep in a system call or KVM.
    #[must_use]
    pub fn enter(pid: u32, name: Option<&str>) -> Self {
        let thread = fs::read_dir(format!("/proc/{pid}/task"))
            .expect("the process is alive")
            .flatten()
            .filter(|task| {
                let comm = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
                name.is_none_or(|name| comm.trim() == name)
            })
            .find_map(|task| task.file_name().to_str()?.parse().ok())
            .map(Pid::from_raw)
            .unwrap_or_else(|| panic!("process {pid} has no thread {name:?}"));
        ptrace::seize(thread, ptrace::Options::empty()).expect("a tracer with CAP_SYS_PTRACE");
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .expect("memory of a traced process");
        let saved = stop_behind_syscall(thread, &memory);
        Self {
            thread,
            memory,
            saved,
            alive: true,
        }
    }

    /// The system call that was interrupted: its number and its second argument.
    #[must_use]
    pub const fn interrupted(&self) -> (u64, u64) {
        (self.saved.orig_rax, self.saved.rsi)
    }

    /// Puts `bytes` below the thread's stack and returns their address.
    ///
    /// # Panics
    /// When the stack is not mapped there.
    pub fn place(&self, bytes: &[u8]) -> u64 {
        let address = (self.saved.rsp - 2048) & !63;
        self.memory
            .write_all_at(bytes, address)
            .expect("the thread's stack");
        address
    }

    /// Reads `len` bytes of the process at `address`.
    ///
    /// # Panics
    /// When nothing is mapped there.
    #[must_use]
    pub fn look(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_exact_at(&mut bytes, address)
            .expect("mapped memory");
        bytes
    }

    /// Writes bytes of the process at `address`.
    ///
    /// # Panics
    /// When nothing is mapped there.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_all_at(bytes, address)
            .expect("mapped memory");
    }

    /// Makes the thread issue system call `number`.
    ///
    /// # Panics
    /// When ptrace fails.
    pub fn call(&mut self, number: i64, arguments: [u64; 6]) -> Fate {
        let mut registers = self.saved;
        registers.rip -= 2;
        // Not in a system call: the kernel must not restart the one that was interrupted.
        registers.orig_rax = u64::MAX;
        registers.rax = number.cast_unsigned();
        let [a, b, c, d, e, f] = arguments;
        (registers.rdi, registers.rsi, registers.rdx) = (a, b, c);
        (registers.r10, registers.r8, registers.r9) = (d, e, f);
        ptrace::setregs(self.thread, registers).expect("a stopped thread");
        ptrace::step(self.thread, None).expect("a stopped thread");
        loop {
            match waitpid(self.thread, Some(WaitPidFlag::__WALL)).expect("our tracee") {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                    let after = ptrace::getregs(self.thread).expect("a stopped thread");
                    return Fate::Returned(after.rax.cast_signed());
                }
                WaitStatus::Stopped(_, signal) => {
                    ptrace::cont(self.thread, signal).expect("a stopped thread");
                }
                WaitStatus::Exited(_, code) => {
                    self.alive = false;
                    return Fate::Stopped { code };
                }
                WaitStatus::Signaled(_, signal, _) => {
                    self.alive = false;
                    return Fate::Killed(signal);
                }
                _ => ptrace::cont(self.thread, None).expect("a stopped thread"),
            }
        }
    }
}

/// Stops the thread where it is in a system call; one that looks for work in its rings is let go on
/// until it sleeps.
fn stop_behind_syscall(thread: Pid, memory: &File) -> libc::user_regs_struct {
    for _ in 0..1000 {
        ptrace::interrupt(thread).expect("a seized thread");
        waitpid(thread, Some(WaitPidFlag::__WALL)).expect("it stops");
        let registers = ptrace::getregs(thread).expect("a stopped thread");
        let mut instruction = [0; 2];
        memory
            .read_exact_at(&mut instruction, registers.rip - 2)
            .expect("its text");
        if instruction == [0x0f, 0x05] {
            return registers;
        }
        ptrace::cont(thread, None).expect("a stopped thread");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("thread {thread} is never behind a syscall");
}

impl Drop for Intruder {
    fn drop(&mut self) {
        if self.alive {
            // The interrupted call is restarted where it was.
            let _restored = ptrace::setregs(self.thread, self.saved);
            let _detached = ptrace::detach(self.thread, None);
        }
    }
}
