//! The rules that a policy must keep, whoever wrote it. Each has a test with a file that breaks it.

use crate::constants;
use crate::plan::{
    Condition, FdGrant, Limits, MadeGrant, OpcodeGrant, Permit, Policy, Request, Test, Thread,
};
use crate::schema::{
    ArgCondition, Call, FaultsEntry, FdType, HeartbeatEntry, LandlockDeny, Namespace, Number,
    OnDeath, Opcode, Phase, PolicyFile, RestartEntry, SupervisionEntry,
};
use crate::syscalls;
use bulkhead_ipc::ident::ProcKind;
use std::ops::Range;

/// Most permitted requests of a device process in its locked phase.
pub const DEVICE_REQUESTS_MAX: usize = 25;
/// Most permitted requests of a process that serves a folder: each is one thing that can be done to files.
pub const FOLDER_REQUESTS_MAX: usize = 40;
/// Most permitted requests of one thread of `vcpu` in its locked phase.
pub const THREAD_REQUESTS_MAX: usize = 20;
/// Most permitted requests of `vcpu` over all its threads in the locked phase.
pub const VCPU_REQUESTS_MAX: usize = 35;

/// The flags of a socket that is made so that it never blocks and is closed at exec.
const SOCK_NONBLOCK_CLOEXEC: u32 = 0o2_004_000;

/// Shortest time between two heartbeats in milliseconds: answers count as messages, of which a
/// process has few.
pub const HEARTBEAT_MS_MIN: u32 = 200;

/// A policy file that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}{}: {key}: {fault}", .line.map(|l| format!(":{l}")).unwrap_or_default())]
pub struct PolicyError {
    /// The file, or `built-in KIND.toml`.
    pub file: String,
    /// The line, from 1, where it is known.
    pub line: Option<usize>,
    /// The key at fault.
    pub key: String,
    /// What is wrong with it, and what was expected.
    pub fault: String,
}

/// System calls that would undo the lock, and what each would let a process do.
const NEVER_AFTER_LOCK: &[(&str, &str)] = &[
    ("open", "opens files"),
    ("openat", "opens files"),
    ("openat2", "opens files"),
    ("creat", "opens files"),
    ("open_by_handle_at", "opens files"),
    ("open_tree", "opens files"),
    ("socket", "makes sockets"),
    ("socketpair", "makes sockets"),
    ("connect", "connects sockets"),
    ("bind", "binds sockets"),
    ("accept", "accepts connections"),
    ("execve", "executes programs"),
    ("execveat", "executes programs"),
    ("clone", "makes tasks"),
    ("clone3", "makes tasks"),
    ("fork", "makes tasks"),
    ("vfork", "makes tasks"),
    ("ptrace", "controls processes"),
    ("process_vm_readv", "reads other processes"),
    ("process_vm_writev", "writes other processes"),
    ("pidfd_getfd", "takes descriptors of other processes"),
    ("bpf", "loads programs into the kernel"),
    ("perf_event_open", "observes the kernel"),
    ("userfaultfd", "controls page faults"),
    ("io_uring_setup", "makes rings that no filter sees"),
    ("io_uring_register", "changes what a ring may do"),
    ("rt_sigaction", "replaces the handler that reports denials"),
    ("rt_sigprocmask", "blocks the signal that reports denials"),
    ("mount", "changes mounts"),
    ("setns", "joins namespaces"),
    ("unshare", "makes namespaces"),
    ("keyctl", "uses the kernel's key rings"),
    ("vmsplice", "lends pages of the process to pipes"),
    ("prctl", "changes the process's own restrictions"),
    ("seccomp", "adds filters"),
    ("dup", "makes descriptors"),
    ("memfd_create", "makes memory that can be shared"),
    ("personality", "changes how memory is mapped"),
    ("kill", "signals processes"),
];

struct Checker<'a> {
    file: &'a str,
    text: &'a str,
    kind: Option<ProcKind>,
}

type Checked<T> = Result<T, PolicyError>;

/// Reads and checks a policy file.
///
/// # Errors
/// The first fault, with file, line and key.
pub fn policy(file: &str, text: &str, kind: ProcKind) -> Checked<Policy> {
    let checker = Checker {
        file,
        text,
        kind: Some(kind),
    };
    let parsed: PolicyFile = parse(file, text)?;
    if parsed.kind != kind {
        return Err(checker.fault(
            None,
            "kind",
            format!("is {}, expected {kind} in this file", parsed.kind),
        ));
    }
    let policy = Policy {
        kind,
        fds: checker.fds(&parsed)?,
        made: checker.made(&parsed)?,
        startup: checker.startup(&parsed.startup)?,
        locked: checker.locked(&parsed)?,
        opcodes: checker.opcodes(&parsed.io_uring.opcode)?,
        namespaces: checker.namespaces(&parsed)?,
        landlock: checker.landlock(&parsed)?,
        speculation: parsed.sandbox.speculation.clone(),
        limits: checker.limits(&parsed)?,
        on_death: parsed.supervision.on_death,
        birth_timeout_ms: parsed.supervision.birth_timeout_ms,
        restart: checker.restart(&parsed.supervision)?,
        heartbeat: checker.heartbeat(&parsed.supervision)?,
        faults: checker.faults(&parsed.supervision)?,
        purpose: checker.said(None, "purpose", &parsed.purpose)?,
        sources: vec![file.to_owned()],
    };
    counts(file, &policy)?;
    accepting(file, &policy)?;
    checker.repeated(&parsed, &policy)?;
    Ok(policy)
}

/// Parses TOML of either kind of file.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(file: &str, text: &str) -> Checked<T> {
    toml::from_str(text).map_err(|e| PolicyError {
        file: file.to_owned(),
        line: e.span().map(|span| line_of(text, &span)),
        key: "syntax".to_owned(),
        fault: e.message().to_owned(),
    })
}

/// Reads the calls of one locked thread of an override.
pub(crate) fn extra_calls(
    file: &str,
    text: &str,
    thread: &str,
    phase: &Phase,
) -> Checked<Vec<Permit>> {
    Checker {
        file,
        text,
        kind: None,
    }
    .phase(&format!("allow.{thread}"), phase, true)
}

/// Why no policy may permit system call `name` after lock: what it does. `None` when one may.
#[must_use]
pub fn never_after_lock(name: &str) -> Option<&'static str> {
    let found = NEVER_AFTER_LOCK.iter().find(|(known, _)| *known == name);
    found.map(|(_, does)| *does)
}

/// Checks how many requests a policy permits.
pub(crate) fn counts(file: &str, policy: &Policy) -> Checked<()> {
    let too_many = |key: String, count: usize, most: usize| PolicyError {
        file: file.to_owned(),
        line: None,
        key,
        fault: format!("permits {count} requests after lock, expected at most {most}"),
    };
    let all = policy.locked_requests().len();
    let most = match policy.kind {
        ProcKind::Vcpu => VCPU_REQUESTS_MAX,
        ProcKind::Fs => FOLDER_REQUESTS_MAX,
        _ => DEVICE_REQUESTS_MAX,
    };
    if all > most {
        return Err(too_many("locked".to_owned(), all, most));
    }
    if policy.kind == ProcKind::Vcpu {
        for (thread, count) in policy.summary().per_thread {
            let most = match thread.as_str() {
                "main" => VCPU_REQUESTS_MAX,
                _ => THREAD_REQUESTS_MAX,
            };
            if count > most {
                return Err(too_many(format!("locked.{thread}"), count, most));
            }
        }
    }
    Ok(())
}

/// Only who was given a socket to take connections of may take any, and only so that it never waits for
/// them.
pub(crate) fn accepting(file: &str, policy: &Policy) -> Checked<()> {
    let listens = policy
        .fds
        .iter()
        .any(|grant| grant.is == FdType::ListeningSocket);
    let flags = |c: &Condition| {
        c.index == 3 && matches!(&c.test, Test::Is(values) if values == &[SOCK_NONBLOCK_CLOEXEC])
    };
    for thread in &policy.locked {
        let mut permits = thread.permits.iter();
        if permits.any(|p| p.name == "accept4" && !(listens && p.conditions.iter().any(flags))) {
            return Err(PolicyError {
                file: file.to_owned(),
                line: None,
                key: format!("locked.{}", thread.name),
                fault: "accept4 accepts connections: permitted only with a listening socket, \
                    and with SOCK_NONBLOCK and SOCK_CLOEXEC (526336) as argument 3"
                    .to_owned(),
            });
        }
    }
    Ok(())
}

pub(crate) fn line_of(text: &str, span: &Range<usize>) -> usize {
    let before = text.get(..span.start).unwrap_or(text);
    before.matches('\n').count() + 1
}

impl Checker<'_> {
    fn restart(&self, entry: &SupervisionEntry) -> Checked<Option<RestartEntry>> {
        let fault = |key: &str, fault: &str| Err(self.fault(None, key, fault));
        match (entry.on_death, entry.restart) {
            (OnDeath::Restart, None) => fault(
                "supervision.restart",
                "is missing, expected for a process that is restarted",
            ),
            (OnDeath::Degrade | OnDeath::EndMachine, Some(_)) => fault(
                "supervision.restart",
                "is given for a process that is not restarted",
            ),
            (_, Some(rule)) if rule.restarts_max == 0 || rule.window_ms == 0 => fault(
                "supervision.restart",
                "allows no restart, expected restarts_max and window_ms of at least 1",
            ),
            (_, Some(rule))
                if rule.backoff_ms_min == 0 || rule.backoff_ms_min > rule.backoff_ms_max =>
            {
                fault(
                    "supervision.restart",
                    "expected 1 <= backoff_ms_min <= backoff_ms_max",
                )
            }
            (_, rule) => Ok(rule),
        }
    }

    fn heartbeat(&self, entry: &SupervisionEntry) -> Checked<Option<HeartbeatEntry>> {
        match entry.heartbeat {
            Some(beat) if beat.interval_ms < HEARTBEAT_MS_MIN || beat.misses_max == 0 => {
                let fault = format!(
                    "expected interval_ms of at least {HEARTBEAT_MS_MIN} and misses_max of at least 1"
                );
                Err(self.fault(None, "supervision.heartbeat", fault))
            }
            beat => Ok(beat),
        }
    }

    fn faults(&self, entry: &SupervisionEntry) -> Checked<Option<FaultsEntry>> {
        let fault = |fault: &str| Err(self.fault(None, "supervision.faults", fault));
        match entry.faults {
            Some(_) if entry.on_death != OnDeath::Restart => {
                fault("is given for a process that is not restarted")
            }
            Some(rule) if rule.max == 0 || rule.window_ms == 0 => {
                fault("allows no fault, expected max and window_ms of at least 1")
            }
            rule => Ok(rule),
        }
    }

    fn fault(
        &self,
        span: Option<&Range<usize>>,
        key: impl Into<String>,
        fault: impl Into<String>,
    ) -> PolicyError {
        PolicyError {
            file: self.file.to_owned(),
            line: span.map(|span| line_of(self.text, span)),
            key: key.into(),
            fault: fault.into(),
        }
    }

    fn said(&self, span: Option<&Range<usize>>, key: &str, text: &str) -> Checked<String> {
        if text.trim().is_empty() {
            return Err(self.fault(span, key, "is missing, expected a reason in words"));
        }
        Ok(text.to_owned())
    }

    fn fds(&self, parsed: &PolicyFile) -> Checked<Vec<FdGrant>> {
        let mut grants: Vec<FdGrant> = Vec::new();
        for (n, entry) in parsed.fd.iter().enumerate() {
            let (span, role) = (entry.role.span(), *entry.role.get_ref());
            if grants.iter().any(|grant| grant.role == role) {
                return Err(self.fault(Some(&span), format!("fd[{n}].role"), "is granted twice"));
            }
            if entry.min > entry.max || entry.max == 0 {
                return Err(self.fault(
                    Some(&span),
                    format!("fd[{n}].max"),
                    format!("is {}, expected at least 1 and at least min", entry.max),
                ));
            }
            if (entry.is == FdType::CharDevice) != entry.path.is_some() {
                let fault = "expected the path of a character device, and of nothing else";
                return Err(self.fault(Some(&span), format!("fd[{n}].path"), fault));
            }
            grants.push(FdGrant {
                role,
                is: entry.is,
                access: entry.access,
                path: entry.path.clone(),
                held: entry.held,
                min: entry.min,
                max: entry.max,
                why: self.said(Some(&span), &format!("fd[{n}].why"), &entry.why)?,
            });
        }
        Ok(grants)
    }

    fn made(&self, parsed: &PolicyFile) -> Checked<Vec<MadeGrant>> {
        let mut grants: Vec<MadeGrant> = Vec::new();
        for (n, entry) in parsed.made.iter().enumerate() {
            let (span, is) = (entry.is.span(), *entry.is.get_ref());
            if grants.iter().any(|grant| grant.is == is) {
                return Err(self.fault(Some(&span), format!("made[{n}].is"), "is granted twice"));
            }
            if entry.min > entry.max || entry.max == 0 {
                return Err(self.fault(
                    Some(&span),
                    format!("made[{n}].max"),
                    format!("is {}, expected at least 1 and at least min", entry.max),
                ));
            }
            grants.push(MadeGrant {
                is,
                min: entry.min,
                max: entry.max,
                per_vcpu: entry.per_vcpu,
                why: self.said(Some(&span), &format!("made[{n}].why"), &entry.why)?,
            });
        }
        Ok(grants)
    }

    fn startup(&self, phase: &Phase) -> Checked<Vec<Permit>> {
        self.phase("startup", phase, false)
    }

    /// What a thread is permitted when it is locked is permitted in the start-up phase as well: to grant
    /// it there again says nothing.
    fn repeated(&self, parsed: &PolicyFile, policy: &Policy) -> Checked<()> {
        let locked = || policy.locked.iter().flat_map(|thread| &thread.permits);
        for (n, (permit, call)) in policy.startup.iter().zip(&parsed.startup.call).enumerate() {
            let twins = || locked().filter(|p| p.name == permit.name);
            let whole = twins().any(|p| p.requests.is_empty() && p.conditions == permit.conditions);
            let asked = |r: &&Request| twins().any(|p| p.requests.contains(r));
            let request = permit.requests.iter().find(asked);
            if whole || request.is_some() {
                let which = request.map_or(&permit.name, |request| &request.name);
                return Err(self.fault(
                    Some(&call.name.span()),
                    format!("startup.call[{n}].name"),
                    format!("{which} is permitted in the locked phase, and so in this one anyway"),
                ));
            }
        }
        Ok(())
    }

    fn locked(&self, parsed: &PolicyFile) -> Checked<Vec<Thread>> {
        let names: &[&str] = match parsed.kind {
            ProcKind::Vcpu => &["main", "vcpu", "vcpu-quirks", "gate"],
            _ => &["main"],
        };
        let mut threads = Vec::new();
        for &name in names {
            let key = format!("locked.{name}");
            let Some(phase) = parsed.locked.get(name) else {
                return Err(self.fault(None, key, "is missing"));
            };
            threads.push(Thread {
                name: name.to_owned(),
                permits: self.phase(&key, phase, true)?,
                host: phase.host,
            });
        }
        match parsed.locked.keys().find(|k| !names.contains(&k.as_str())) {
            Some(other) => Err(self.fault(
                None,
                format!("locked.{other}"),
                format!("is no thread of this kind, expected {}", names.join(", ")),
            )),
            None => Ok(threads),
        }
    }

    fn phase(&self, key: &str, phase: &Phase, locked: bool) -> Checked<Vec<Permit>> {
        let mut permits: Vec<Permit> = Vec::new();
        for (n, call) in phase.call.iter().enumerate() {
            let permit = self.call(&format!("{key}.call[{n}]"), call, locked)?;
            let open = |p: &Permit| p.conditions.is_empty() && p.requests.is_empty();
            let twin = permits.iter().find(|p| p.name == permit.name);
            if twin.is_some_and(|twin| open(twin) || open(&permit)) {
                return Err(self.fault(
                    Some(&call.name.span()),
                    format!("{key}.call[{n}].name"),
                    format!(
                        "{} is permitted twice, once without a condition",
                        permit.name
                    ),
                ));
            }
            permits.push(permit);
        }
        Ok(permits)
    }

    fn call(&self, key: &str, call: &Call, locked: bool) -> Checked<Permit> {
        let span = call.name.span();
        let name = call.name.get_ref().as_str();
        let Some(number) = syscalls::number(name) else {
            return Err(self.fault(
                Some(&span),
                format!("{key}.name"),
                format!("{name:?} is no system call of x86_64 Linux"),
            ));
        };
        let why = self.said(Some(&span), &format!("{key}.why"), &call.why)?;
        let mut requests = Vec::with_capacity(call.request.len());
        for request in &call.request {
            let name = request.get_ref();
            let code = constants::request(name).ok_or_else(|| {
                self.fault(
                    Some(&request.span()),
                    format!("{key}.request"),
                    format!("{name:?} is no known ioctl request"),
                )
            })?;
            requests.push(Request {
                name: name.clone(),
                code,
            });
        }
        if (name == "ioctl") == requests.is_empty() {
            return Err(self.fault(
                Some(&span),
                format!("{key}.request"),
                "expected request codes with ioctl, and only with ioctl",
            ));
        }
        let mut conditions = Vec::with_capacity(call.arg.len());
        for (n, arg) in call.arg.iter().enumerate() {
            conditions.push(self.condition(&span, &format!("{key}.arg[{n}]"), arg)?);
        }
        if locked {
            self.locked_call(&span, key, name, &conditions)?;
        }
        Ok(Permit {
            name: name.to_owned(),
            number,
            requests,
            conditions,
            host: call.host,
            build: call.build,
            on_failure: call.on_failure,
            why,
        })
    }

    fn condition(&self, span: &Range<usize>, key: &str, arg: &ArgCondition) -> Checked<Condition> {
        let number = |number: &Number| match number {
            Number::Value(value) => Ok(*value),
            Number::Name(name) => constants::flag(name)
                .or_else(|| constants::request(name))
                .ok_or_else(|| self.fault(Some(span), key, format!("{name:?} is no known number"))),
        };
        let test = match (&arg.is, &arg.bits_clear, &arg.at_most) {
            (Some(values), None, None) if !values.is_empty() => {
                Test::Is(values.iter().map(number).collect::<Checked<_>>()?)
            }
            (None, Some(bits), None) => Test::BitsClear(u64::from(number(bits)?)),
            (None, None, Some(most)) => Test::AtMost(u64::from(number(most)?)),
            _ => {
                return Err(self.fault(
                    Some(span),
                    key,
                    "expected exactly one of is, bits_clear and at_most",
                ));
            }
        };
        if arg.index > 5 {
            return Err(self.fault(
                Some(span),
                format!("{key}.index"),
                format!("is {}, expected 0 to 5", arg.index),
            ));
        }
        Ok(Condition {
            index: arg.index,
            test,
        })
    }

    /// What may never be permitted once a process serves.
    fn locked_call(
        &self,
        span: &Range<usize>,
        key: &str,
        name: &str,
        conditions: &[Condition],
    ) -> Checked<()> {
        let fault = |what: String| Err(self.fault(Some(span), format!("{key}.name"), what));
        // The one process that opens files: what it can reach is its folder's mount, and an empty root.
        let opens_its_own = self.kind == Some(ProcKind::Fs) && name == "openat2";
        if let Some(does) = never_after_lock(name).filter(|_| !opens_its_own) {
            return fault(format!("{name} {does}: never permitted after lock"));
        }
        let no_exec = |c: &Condition| {
            c.index == 2
                && match &c.test {
                    Test::BitsClear(bits) => bits & 4 != 0,
                    Test::Is(values) => values.iter().all(|v| v & 4 == 0),
                    Test::AtMost(most) => *most < 4,
                }
        };
        let maps = matches!(name, "mmap" | "mprotect" | "pkey_mprotect");
        if maps && !conditions.iter().any(no_exec) {
            return fault(format!(
                "{name} must not map executable memory after lock: expected a condition on argument 2"
            ));
        }
        let names_command = |c: &Condition| {
            c.index == 1
                && matches!(&c.test, Test::Is(values) if !values.contains(&4) && !values.contains(&0) && !values.contains(&1030))
        };
        if name == "fcntl" && !conditions.iter().any(names_command) {
            return fault(
                "fcntl must not change file flags or make descriptors after lock: expected the permitted commands in argument 1".to_owned(),
            );
        }
        Ok(())
    }

    fn limits(&self, parsed: &PolicyFile) -> Checked<Limits> {
        let l = &parsed.limits;
        if !(1..=1000).contains(&l.oom_score_adj) {
            return Err(self.fault(
                None,
                "limits.oom_score_adj",
                format!(
                    "is {}, expected 1 to 1000: a machine ends before its broker",
                    l.oom_score_adj
                ),
            ));
        }
        if l.file_size_of_disk && l.file_size.is_some() {
            return Err(self.fault(
                None,
                "limits.file_size_of_disk",
                "is given with file_size, expected one of them",
            ));
        }
        let limits = Limits {
            open_files: l.open_files,
            locked_memory_bytes: l.locked_memory.0,
            stack_bytes: l.stack.0,
            file_size_bytes: l.file_size.map(|s| s.0),
            file_size_of_disk: l.file_size_of_disk,
            address_space_bytes: l.address_space.map(|s| s.0),
            memory_bytes: l.memory.0,
            plus_guest_memory: l.plus_guest_memory,
            tasks: l.tasks,
            plus_vcpus: l.plus_vcpus,
            oom_score_adj: l.oom_score_adj,
            cpu_percent: l.cpu_percent,
            disk_read_per_s: l.disk_read_per_s.map(|s| s.0),
            disk_write_per_s: l.disk_write_per_s.map(|s| s.0),
            disk_read_iops: l.disk_read_iops,
            disk_write_iops: l.disk_write_iops,
        };
        let wrong = |(key, fault)| self.fault(None, format!("limits.{key}"), fault);
        host_share(parsed.kind, &limits).map_err(wrong)?;
        Ok(limits)
    }

    fn opcodes(&self, opcodes: &[Opcode]) -> Checked<Vec<OpcodeGrant>> {
        let mut grants = Vec::with_capacity(opcodes.len());
        for (n, opcode) in opcodes.iter().enumerate() {
            let (span, name) = (opcode.name.span(), opcode.name.get_ref());
            let key = format!("io_uring.opcode[{n}]");
            let Some(number) = constants::opcode(name) else {
                return Err(self.fault(
                    Some(&span),
                    format!("{key}.name"),
                    format!("{name:?} is no io_uring operation"),
                ));
            };
            const MOVES_DATA: &[&str] = &[
                "NOP",
                "READ",
                "WRITE",
                "READV",
                "WRITEV",
                "READ_FIXED",
                "WRITE_FIXED",
                "FSYNC",
                "FALLOCATE",
                "POLL_ADD",
                "POLL_REMOVE",
                "TIMEOUT",
                "TIMEOUT_REMOVE",
                "ASYNC_CANCEL",
                "SYNC_FILE_RANGE",
                "READV_FIXED",
                "WRITEV_FIXED",
            ];
            if !MOVES_DATA.contains(&name.as_str()) {
                return Err(self.fault(
                    Some(&span),
                    format!("{key}.name"),
                    format!(
                        "{name} does more than move data of a file the process has: never permitted"
                    ),
                ));
            }
            grants.push(OpcodeGrant {
                name: name.clone(),
                number,
                why: self.said(Some(&span), &format!("{key}.why"), &opcode.why)?,
            });
        }
        Ok(grants)
    }

    fn namespaces(&self, parsed: &PolicyFile) -> Checked<Vec<Namespace>> {
        use Namespace::{Cgroup, Ipc, Mount, Pid, User, Uts};
        let mut own = parsed.sandbox.namespaces.clone();
        own.sort_unstable();
        own.dedup();
        if own != [User, Pid, Mount, Ipc, Uts, Cgroup] {
            return Err(self.fault(
                None,
                "sandbox.namespaces",
                "expected user, pid, mount, ipc, uts and cgroup",
            ));
        }
        if let Some(capability) = parsed.sandbox.capabilities.first() {
            return Err(self.fault(
                None,
                "sandbox.capabilities",
                format!("{capability:?} is kept, expected none"),
            ));
        }
        Ok(own)
    }

    fn landlock(&self, parsed: &PolicyFile) -> Checked<Vec<LandlockDeny>> {
        use LandlockDeny::{
            AbstractUnixSocket, Filesystem, FilesystemOutsideFolder, Network, Signal,
        };
        let mut deny = parsed.sandbox.landlock.clone();
        deny.sort_unstable();
        deny.dedup();
        let (files, expected) = match parsed.kind {
            ProcKind::Fs => (
                FilesystemOutsideFolder,
                "expected filesystem-outside-folder, network, abstract-unix-socket and signal",
            ),
            _ => (
                Filesystem,
                "expected filesystem, network, abstract-unix-socket and signal",
            ),
        };
        if deny != [files, Network, AbstractUnixSocket, Signal] {
            return Err(self.fault(None, "sandbox.landlock", expected));
        }
        Ok(deny)
    }
}

/// Most of `cpu_percent`: 64 processors.
const CPU_PERCENT_MAX: u32 = 6400;
/// Least bytes a second, so that a page goes through at all.
const DISK_PER_S_MIN: u64 = 4096;

/// Checks what a process may take of processors and disks: the key that is wrong, and why.
pub(crate) fn host_share(kind: ProcKind, limits: &Limits) -> Result<(), (&'static str, String)> {
    if let Some(percent) = limits.cpu_percent
        && !(1..=CPU_PERCENT_MAX).contains(&percent)
    {
        let what =
            format!("is {percent}, expected 1 to {CPU_PERCENT_MAX} (percent of one processor)");
        return Err(("cpu_percent", what));
    }
    let disk = [
        ("disk_read_per_s", limits.disk_read_per_s, DISK_PER_S_MIN),
        ("disk_write_per_s", limits.disk_write_per_s, DISK_PER_S_MIN),
        ("disk_read_iops", limits.disk_read_iops.map(u64::from), 1),
        ("disk_write_iops", limits.disk_write_iops.map(u64::from), 1),
    ];
    for (key, value, least) in disk {
        let Some(value) = value else { continue };
        if kind != ProcKind::Blk {
            return Err((
                key,
                format!("is {value} for {kind}, expected none: only blk has a disk"),
            ));
        }
        if value < least {
            return Err((
                key,
                format!("is {value}, expected at least {least} a second"),
            ));
        }
    }
    Ok(())
}
