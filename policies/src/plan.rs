//! A policy in its meaning: names resolved to numbers, overrides applied. Everything that launches,
//! compiles, shows or explains a policy works on this.

use crate::schema::{
    Access, Build, FaultsEntry, FdType, HeartbeatEntry, Held, HostKvm, LandlockDeny, MadeType,
    Namespace, OnDeath, RestartEntry, Speculation,
};
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::FdRole;
use serde::{Deserialize, Serialize};

/// What processes of one kind are granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The kind.
    pub kind: ProcKind,
    /// What such a process is for.
    pub purpose: String,
    /// The descriptors it is born with.
    pub fds: Vec<FdGrant>,
    /// The descriptors that it makes for itself.
    pub made: Vec<MadeGrant>,
    /// System calls that only the start-up phase needs.
    pub startup: Vec<Permit>,
    /// System calls of the locked phase.
    pub locked: Vec<Thread>,
    /// io_uring operations; none means that there is no ring.
    pub opcodes: Vec<OpcodeGrant>,
    /// Namespaces of its own, in order.
    pub namespaces: Vec<Namespace>,
    /// What Landlock denies.
    pub landlock: Vec<LandlockDeny>,
    /// Speculation that it gives up.
    pub speculation: Vec<Speculation>,
    /// Limits.
    pub limits: Limits,
    /// What its death means.
    pub on_death: OnDeath,
    /// Time it has from its start to being locked, in milliseconds.
    pub birth_timeout_ms: u32,
    /// How it is restarted, if it is.
    pub restart: Option<RestartEntry>,
    /// How it shows that it is not stuck, if it is asked.
    pub heartbeat: Option<HeartbeatEntry>,
    /// How often it may be at fault.
    pub faults: Option<FaultsEntry>,
    /// Files that the policy was read from: the built-in one, then overrides.
    pub sources: Vec<String>,
}

/// A descriptor grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdGrant {
    /// What for.
    pub role: FdRole,
    /// What it is.
    pub is: FdType,
    /// What may be done with it.
    pub access: Access,
    /// Path of a character device.
    pub path: Option<String>,
    /// Whether the locked process still has it.
    pub held: Held,
    /// Fewest.
    pub min: u16,
    /// Most.
    pub max: u16,
    /// Why.
    pub why: String,
}

/// A descriptor that a process makes for itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeGrant {
    /// What it is.
    pub is: MadeType,
    /// Fewest.
    pub min: u16,
    /// Most.
    pub max: u16,
    /// Whether these are for each vCPU.
    pub per_vcpu: bool,
    /// Why.
    pub why: String,
}

/// The locked phase of one kind of thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// `main`, `vcpu` or `gate`.
    pub name: String,
    /// Its system calls.
    pub permits: Vec<Permit>,
    /// The hosts on which there is such a thread; `None` for all.
    pub host: Option<HostKvm>,
}

/// A permitted system call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permit {
    /// Its name.
    pub name: String,
    /// Its number.
    pub number: u32,
    /// ioctl request codes; empty for other system calls.
    pub requests: Vec<Request>,
    /// Conditions that must all hold.
    pub conditions: Vec<Condition>,
    /// The hosts that need it; `None` for all.
    pub host: Option<HostKvm>,
    /// The build that needs it; `None` for all.
    pub build: Option<Build>,
    /// Whether only a start that fails needs it.
    pub on_failure: bool,
    /// Why.
    pub why: String,
}

/// An ioctl request code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Its name.
    pub name: String,
    /// Its number.
    pub code: u32,
}

/// A condition on an argument.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Which argument, from 0.
    pub index: u8,
    /// What must hold.
    pub test: Test,
}

/// What must hold of an argument.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Test {
    /// Its low 32 bits are one of these.
    Is(Vec<u32>),
    /// None of these bits is set.
    BitsClear(u64),
    /// It is at most this.
    AtMost(u64),
}

/// An io_uring operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpcodeGrant {
    /// Its name without `IORING_OP_`.
    pub name: String,
    /// Its number.
    pub number: u8,
    /// Why.
    pub why: String,
}

/// Limits in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// RLIMIT_NOFILE.
    pub open_files: u32,
    /// RLIMIT_MEMLOCK in bytes.
    pub locked_memory_bytes: u64,
    /// RLIMIT_STACK in bytes.
    pub stack_bytes: u64,
    /// RLIMIT_FSIZE in bytes.
    pub file_size_bytes: Option<u64>,
    /// Whether RLIMIT_FSIZE is the size of its disk image.
    pub file_size_of_disk: bool,
    /// RLIMIT_AS in bytes.
    pub address_space_bytes: Option<u64>,
    /// Memory of the control group in bytes, besides guest memory.
    pub memory_bytes: u64,
    /// Whether guest memory is added.
    pub plus_guest_memory: bool,
    /// Tasks of the control group.
    pub tasks: u32,
    /// Whether one for each vCPU is added.
    pub plus_vcpus: bool,
    /// Added to its badness when the host runs out of memory, 1 to 1000.
    pub oom_score_adj: u16,
    /// Processor time in percent of one processor.
    pub cpu_percent: Option<u32>,
    /// Bytes a second read from each host disk.
    pub disk_read_per_s: Option<u64>,
    /// The same for writes.
    pub disk_write_per_s: Option<u64>,
    /// Reads a second of each host disk.
    pub disk_read_iops: Option<u32>,
    /// The same for writes.
    pub disk_write_iops: Option<u32>,
}

/// One thing that a locked process may ask of the kernel: a system call, an ioctl request, or an
/// io_uring operation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PermittedRequest {
    /// System call, `ioctl` with its request, or `io_uring` with its operation.
    pub name: String,
    /// The threads that may.
    pub threads: Vec<String>,
    /// Conditions on its arguments in words; empty for none.
    pub when: Vec<String>,
    /// Why.
    pub why: String,
}

/// A policy in figures and words, for tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The kind.
    pub kind: ProcKind,
    /// What for.
    pub purpose: String,
    /// Everything that the locked process may ask of the kernel.
    pub requests: Vec<PermittedRequest>,
    /// Permitted requests of each thread in the locked phase.
    pub per_thread: Vec<(String, usize)>,
    /// Descriptors: role, type, access, count, why.
    pub fds: Vec<FdGrant>,
    /// System calls of the start-up phase alone, with their reasons.
    pub startup: Vec<PermittedRequest>,
    /// Files that the policy was read from.
    pub sources: Vec<String>,
}

impl Permit {
    /// The requests it stands for: one, or one for each ioctl request code.
    #[must_use]
    pub fn request_names(&self) -> Vec<String> {
        if self.requests.is_empty() {
            return vec![self.name.clone()];
        }
        let named = |r: &Request| format!("{}({})", self.name, r.name);
        self.requests.iter().map(named).collect()
    }

    /// Whether it permits a call of its name with these arguments.
    #[must_use]
    pub fn allows(&self, args: &[u64; 6]) -> bool {
        let [_, request, ..] = *args;
        let requested = |r: &Request| u64::from(r.code) == request & 0xffff_ffff;
        (self.requests.is_empty() || self.requests.iter().any(requested))
            && self
                .conditions
                .iter()
                .all(|condition| condition.holds(args))
    }

    fn when(&self) -> Vec<String> {
        self.conditions.iter().map(Condition::in_words).collect()
    }
}

impl Condition {
    fn holds(&self, args: &[u64; 6]) -> bool {
        let value = args.get(usize::from(self.index)).copied().unwrap_or(0);
        match &self.test {
            Test::Is(values) => values.iter().any(|v| u64::from(*v) == value & 0xffff_ffff),
            Test::BitsClear(bits) => value & bits == 0,
            Test::AtMost(most) => value <= *most,
        }
    }

    /// Whether it lists values.
    #[must_use]
    pub const fn is_list(&self) -> bool {
        matches!(self.test, Test::Is(_))
    }

    /// The values that it lists, each with the argument.
    #[must_use]
    pub fn values(&self) -> Vec<(u8, u32)> {
        match &self.test {
            Test::Is(values) => values.iter().map(|&value| (self.index, value)).collect(),
            Test::BitsClear(_) | Test::AtMost(_) => Vec::new(),
        }
    }

    /// The condition as a reader would say it.
    #[must_use]
    pub fn in_words(&self) -> String {
        let n = self.index;
        match &self.test {
            Test::Is(values) => {
                let values: Vec<String> = values.iter().map(ToString::to_string).collect();
                format!("argument {n} is {}", values.join(" or "))
            }
            Test::BitsClear(bits) => format!("argument {n} has none of the bits {bits:#x}"),
            Test::AtMost(most) => format!("argument {n} is at most {most}"),
        }
    }
}

impl Policy {
    /// Everything that the locked process may ask of the kernel, over all its threads.
    #[must_use]
    pub fn locked_requests(&self) -> Vec<PermittedRequest> {
        let mut all: Vec<PermittedRequest> = Vec::new();
        for thread in &self.locked {
            for permit in &thread.permits {
                for name in permit.request_names() {
                    match all.iter_mut().find(|known| known.name == name) {
                        Some(known) if known.threads.contains(&thread.name) => {}
                        Some(known) => known.threads.push(thread.name.clone()),
                        None => all.push(permitted(name, permit, Some(&thread.name))),
                    }
                }
            }
        }
        all.extend(self.opcodes.iter().map(|opcode| PermittedRequest {
            name: format!("io_uring({})", opcode.name),
            threads: vec!["main".to_owned()],
            when: vec!["on a registered file".to_owned()],
            why: opcode.why.clone(),
        }));
        all
    }

    /// The policy in figures and words.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let per_thread = self.locked.iter().map(|thread| {
            let count: usize = thread.permits.iter().map(|p| p.requests.len().max(1)).sum();
            (thread.name.clone(), count)
        });
        let startup = self.startup.iter().flat_map(|permit| {
            let names = permit.request_names().into_iter();
            names.map(move |name| permitted(name, permit, None))
        });
        Summary {
            kind: self.kind,
            purpose: self.purpose.clone(),
            requests: self.locked_requests(),
            per_thread: per_thread.collect(),
            fds: self.fds.clone(),
            startup: startup.collect(),
            sources: self.sources.clone(),
        }
    }

    /// The grant for descriptors of `role`.
    #[must_use]
    pub fn fd(&self, role: FdRole) -> Option<&FdGrant> {
        self.fds.iter().find(|grant| grant.role == role)
    }
}

fn permitted(name: String, permit: &Permit, thread: Option<&String>) -> PermittedRequest {
    PermittedRequest {
        name,
        threads: thread.cloned().into_iter().collect(),
        when: permit.when(),
        why: permit.why.clone(),
    }
}
