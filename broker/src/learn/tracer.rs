//! Follows a run and its processes system call by system call.
//!
//! The thread that starts the run traces it: everything that the run clones is traced from its first
//! instruction. A process counts from the moment it executes a program of ours; what the broker itself
//! does passes unseen.

use super::rings::Ring;
use super::sys::{self, News};
use super::{Learnt, auxv};
use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::cache::Compiled;
use bulkhead_policies::grant::{Grant, IO_URING, Part, STARTUP};
use bulkhead_policies::{decode, syscalls};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::process::Command;

/// `op` of `struct ptrace_syscall_info`.
const ENTRY: u8 = 1;
const EXIT: u8 = 2;

/// A task that is traced.
#[derive(Debug, Clone, Default)]
struct Task {
    /// The process, once it is one of ours.
    kind: Option<ProcKind>,
    /// Its thread group.
    process: i32,
    /// Filters that its thread has.
    filters: usize,
    /// The phase for grants.
    phase: String,
    /// Whether it has stopped for the first time.
    started: bool,
    /// Whether it stands still until it is told whose child it is.
    held: bool,
    /// The call that it is in.
    call: Option<(u32, [u64; 6])>,
}

/// The clock of the host, as the processes of a followed run see it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Clock {
    /// As it is.
    #[default]
    AsItIs,
    /// As on hosts whose clock source the vDSO cannot read: each look at a clock is a system call.
    WithoutVdso,
}

/// Runs `command` to its end and learns what its processes used of `policies`.
///
/// # Errors
/// When it cannot be started or traced.
pub fn follow(command: &mut Command, policies: &Compiled, clock: Clock) -> io::Result<Learnt> {
    let child = sys::spawn_traced(command)?;
    let root = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let mut tracer = Tracer {
        policies,
        clock,
        tasks: BTreeMap::new(),
        rings: BTreeMap::new(),
        learnt: Learnt::default(),
    };
    waitpid(root, Some(WaitPidFlag::__WALL))?;
    ptrace::setoptions(
        root,
        Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACEEXEC
            // Whoever follows a run and dies does not leave it half followed.
            | Options::PTRACE_O_EXITKILL,
    )?;
    let started = Task {
        process: root.as_raw(),
        started: true,
        ..Task::default()
    };
    tracer.tasks.insert(root.as_raw(), started);
    ptrace::cont(root, None)?;
    tracer.run(root)?;
    Ok(tracer.learnt)
}

struct Tracer<'a> {
    policies: &'a Compiled,
    clock: Clock,
    tasks: BTreeMap<i32, Task>,
    /// The ring of each process that has one.
    rings: BTreeMap<i32, Ring>,
    learnt: Learnt,
}

impl Tracer<'_> {
    fn run(&mut self, root: Pid) -> io::Result<()> {
        while let Some((pid, news)) = sys::wait()? {
            match news {
                News::Exited(code) => self.ended(pid, root, code),
                News::Killed(signal) => self.ended(pid, root, 128 + signal),
                News::Event(event) => {
                    self.event(Pid::from_raw(pid), event);
                    self.resume(pid, 0)?;
                }
                News::SystemCall => {
                    self.system_call(Pid::from_raw(pid));
                    self.resume(pid, 0)?;
                }
                News::Signal(_) if !self.tasks.contains_key(&pid) => self.hold(pid),
                News::Signal(signal) => {
                    let task = self.tasks.entry(pid).or_default();
                    // A new tracee begins with a stop that is nobody's signal.
                    let first = !std::mem::replace(&mut task.started, true);
                    let nobodys = first && signal == libc::SIGSTOP;
                    self.resume(pid, if nobodys { 0 } else { signal })?;
                }
            }
        }
        Ok(())
    }

    fn ended(&mut self, pid: i32, root: Pid, code: i32) {
        if pid == root.as_raw() {
            self.learnt.exit_code = code;
        }
        self.tasks.remove(&pid);
        self.release_orphans();
    }

    /// A new tracee may stop before the stop of its parent says that there is one. Until then nobody
    /// knows what it is, and if it went on its system calls would pass unseen.
    fn hold(&mut self, pid: i32) {
        let held = Task {
            started: true,
            held: true,
            ..Task::default()
        };
        self.tasks.insert(pid, held);
    }

    /// Lets those go on whose parent has ended without having told of them.
    fn release_orphans(&mut self) {
        let held = self.tasks.iter().filter(|(_, task)| task.held);
        let held: Vec<i32> = held.map(|(&pid, _)| pid).collect();
        for pid in held {
            if parent_of(pid).is_some_and(|parent| self.tasks.contains_key(&parent)) {
                continue;
            }
            if let Some(task) = self.tasks.get_mut(&pid) {
                task.held = false;
            }
            // One that is gone as well needs no help.
            let _gone = self.resume(pid, 0);
        }
    }

    fn resume(&self, pid: i32, signal: i32) -> io::Result<()> {
        let ours = self.tasks.get(&pid);
        match sys::resume(pid, ours.is_some_and(|task| task.kind.is_some()), signal) {
            // Killed meanwhile; its end is still to be told.
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn event(&mut self, pid: Pid, event: i32) {
        match event {
            libc::PTRACE_EVENT_EXEC => {
                let kind = kind_of(pid);
                if kind.is_some() && self.clock == Clock::WithoutVdso {
                    // One that ended meanwhile needs no clock.
                    let _hidden = auxv::hide_vdso(pid);
                }
                let task = self.tasks.entry(pid.as_raw()).or_default();
                *task = Task {
                    kind,
                    process: pid.as_raw(),
                    started: true,
                    phase: STARTUP.to_owned(),
                    ..Task::default()
                };
                if let Some(kind) = kind {
                    self.learnt.used.entry(kind).or_default();
                }
            }
            libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK => {
                let Ok(child) = ptrace::getevent(pid) else {
                    return;
                };
                let child = i32::try_from(child).unwrap_or(0);
                let mut task = self.tasks.get(&pid.as_raw()).cloned().unwrap_or_default();
                // It may have stopped before this was told.
                let known = self.tasks.get(&child);
                task.started = known.is_some_and(|known| known.started);
                let held = known.is_some_and(|known| known.held);
                task.call = None;
                self.tasks.insert(child, task);
                if held {
                    // One that was killed meanwhile is told as ended.
                    let _gone = self.resume(child, 0);
                }
            }
            _ => {}
        }
    }

    fn system_call(&mut self, pid: Pid) {
        let Ok(info) = ptrace::syscall_info(pid) else {
            return;
        };
        let Ok(registers) = ptrace::getregs(pid) else {
            return;
        };
        match info.op {
            ENTRY => {
                let number = u32::try_from(registers.orig_rax).unwrap_or(u32::MAX);
                let r = &registers;
                let args = [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9];
                self.entered(pid, number, args);
            }
            EXIT => self.left(pid, registers.rax.cast_signed()),
            _ => {}
        }
    }

    fn entered(&mut self, pid: Pid, number: u32, args: [u64; 6]) {
        let Some(task) = self.tasks.get_mut(&pid.as_raw()) else {
            return;
        };
        task.call = Some((number, args));
        let (Some(kind), true) = (task.kind, task.filters > 0) else {
            // Before the first filter a process is no more than the launcher made it.
            return;
        };
        let (phase, process) = (task.phase.clone(), task.process);
        let Some((policy, _)) = self.policies.get(kind) else {
            return;
        };
        if !policy.permits(&phase, number, &args) {
            let call = decode::call(number, &args, &|_| None);
            self.learnt.denied.insert((kind, phase, call));
            return;
        }
        let mut used = policy.grants_of(&phase, number, &args);
        if syscalls::name(number) == Some("io_uring_enter") {
            let memory = File::open(format!("/proc/{process}/mem"));
            let ring = self.rings.get(&process);
            let handed = memory
                .ok()
                .and_then(|memory| ring?.waiting(&memory, args[1]));
            for operation in handed.into_iter().flatten() {
                let known = policy.opcodes.iter().find(|o| o.number == operation);
                used.extend(known.map(|opcode| Grant {
                    phase: IO_URING.to_owned(),
                    name: opcode.name.clone(),
                    part: Part::Whole,
                }));
            }
        }
        self.learnt.used.entry(kind).or_default().extend(used);
    }

    fn left(&mut self, pid: Pid, result: i64) {
        let Some(task) = self.tasks.get_mut(&pid.as_raw()) else {
            return;
        };
        let Some((number, args)) = task.call.take() else {
            return;
        };
        // What failed, or was skipped for a filter, has changed nothing.
        if task.kind.is_none() || (-4095..0).contains(&result) {
            return;
        }
        let process = task.process;
        match syscalls::name(number) {
            Some("seccomp") => {
                task.filters += 1;
                if task.filters > 1 {
                    task.phase = thread_name(process, pid.as_raw());
                }
            }
            Some("io_uring_setup") => {
                let memory = File::open(format!("/proc/{process}/mem"));
                let descriptor = result.cast_unsigned();
                let ring = memory
                    .ok()
                    .and_then(|m| Ring::made(&m, descriptor, args[1]));
                self.rings.extend(ring.map(|ring| (process, ring)));
            }
            Some("mmap") => {
                if let Some(ring) = self.rings.get_mut(&process) {
                    ring.mapped(args[4], args[5], result.cast_unsigned());
                }
            }
            _ => {}
        }
    }
}

/// The kind of process that has just executed, by its first argument.
fn kind_of(pid: Pid) -> Option<ProcKind> {
    let cmdline = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let name = cmdline.split(|&b| b == 0).next()?;
    let name = std::str::from_utf8(name).ok()?.strip_prefix("bulkhead-")?;
    ProcKind::ALL.into_iter().find(|kind| kind.name() == name)
}

/// Who has made a task: its process, for a thread that is not the first.
fn parent_of(task: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{task}/status")).ok()?;
    let field = |name: &str| {
        let mut lines = status.lines();
        lines.find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    };
    match field("Tgid:") {
        Some(process) if process != task => Some(process),
        _ => field("PPid:"),
    }
}

/// The name of a thread in its policy.
fn thread_name(process: i32, thread: i32) -> String {
    if process == thread {
        return "main".to_owned();
    }
    let name = fs::read_to_string(format!("/proc/{process}/task/{thread}/comm"));
    name.unwrap_or_default().trim().to_owned()
}
