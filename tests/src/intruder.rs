//! A process that has been taken over, without any help from it: the test stops a thread with ptrace
//! and makes it issue system calls, as an attacker who runs code in it would. seccomp, Landlock and
//! the io_uring restrictions judge these calls as they judge the process's own.

use bulkhead::authority::guided::{Guided, Outcome};
use nix::sys::signal::Signal;
use std::fs;
use std::time::Duration;

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
pub struct Intruder(Guided);

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
            .unwrap_or_else(|| panic!("process {pid} has no thread {name:?}"));
        // One that looks for work in its rings is let go on until it sleeps.
        for _ in 0..1000 {
            let guided = Guided::stop(pid.cast_signed(), thread).expect("CAP_SYS_PTRACE");
            if guided.interrupted().is_some() {
                return Self(guided);
            }
            drop(guided);
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("thread {thread} is never behind a syscall");
    }

    /// The system call that was interrupted: its number and its second argument.
    ///
    /// # Panics
    /// Never: [`Self::enter`] has seen it.
    #[must_use]
    pub fn interrupted(&self) -> (u64, u64) {
        self.0.interrupted().expect("seen before")
    }

    /// Puts `bytes` below the thread's stack and returns their address.
    ///
    /// # Panics
    /// When the stack is not mapped there.
    pub fn place(&self, bytes: &[u8]) -> u64 {
        self.0.place(bytes).expect("the thread's stack")
    }

    /// Reads `len` bytes of the process at `address`.
    ///
    /// # Panics
    /// When nothing is mapped there.
    #[must_use]
    pub fn look(&self, address: u64, len: usize) -> Vec<u8> {
        self.0.read(address, len).expect("mapped memory")
    }

    /// Writes bytes of the process at `address`.
    ///
    /// # Panics
    /// When nothing is mapped there.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.0.write(address, bytes).expect("mapped memory");
    }

    /// Makes the thread issue system call `number`.
    ///
    /// # Panics
    /// When ptrace fails.
    pub fn call(&mut self, number: i64, arguments: [u64; 6]) -> Fate {
        match self.0.call(number, arguments).expect("a stopped thread") {
            Outcome::Returned(value) => Fate::Returned(value),
            Outcome::Exited(code) => Fate::Stopped { code },
            Outcome::Killed(signal) => Fate::Killed(signal),
        }
    }
}
