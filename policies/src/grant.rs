//! The grants of a policy one by one: the smallest pieces that can be taken away.
//!
//! A system call without a list of values is one grant; each request code of an `ioctl`, each value that
//! an argument may have, and each io_uring operation is one of its own. Used to learn which were
//! needed in a run, to take one away, and to compare policies.

use crate::plan::{Permit, Policy, Test};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The phase of grants that only the start-up needs.
pub const STARTUP: &str = "startup";
/// The phase of io_uring operations.
pub const IO_URING: &str = "io_uring";

/// One grant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Grant {
    /// [`STARTUP`], the name of a thread, or [`IO_URING`].
    pub phase: String,
    /// The system call, or the io_uring operation.
    pub name: String,
    /// Which part of it.
    pub part: Part,
}

/// Which part of a system call a grant is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// All of it.
    Whole,
    /// One request code of `ioctl`, by name.
    Request(String),
    /// One value of one argument.
    Value {
        /// Which argument, from 0.
        index: u8,
        /// The value.
        value: u32,
    },
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.phase, self.name)?;
        match &self.part {
            Part::Whole => Ok(()),
            Part::Request(request) => write!(f, "({request})"),
            Part::Value { index, value } => write!(f, " with argument {index} = {value}"),
        }
    }
}

impl Grant {
    /// The override file of `kind` that takes this grant away and nothing else.
    #[must_use]
    pub fn denial(&self, kind: &str) -> String {
        let Self { phase, name, part } = self;
        if phase == IO_URING {
            return format!("kind = \"{kind}\"\ndeny_opcode = [\"{name}\"]\n");
        }
        let part = match part {
            Part::Whole => String::new(),
            Part::Request(request) => format!("request = [\"{request}\"]\n"),
            Part::Value { index, value } => {
                format!("arg = [{{ index = {index}, is = [{value}] }}]\n")
            }
        };
        format!("kind = \"{kind}\"\n\n[[deny]]\nname = \"{name}\"\nthread = \"{phase}\"\n{part}")
    }
}

impl Policy {
    /// Every grant of a request to the kernel, in the order of the file.
    #[must_use]
    pub fn grants(&self) -> Vec<Grant> {
        let startup = self.startup.iter().flat_map(|p| parts(STARTUP, p));
        let locked = self
            .locked
            .iter()
            .flat_map(|thread| thread.permits.iter().flat_map(|p| parts(&thread.name, p)));
        let opcodes = self.opcodes.iter().map(|opcode| Grant {
            phase: IO_URING.to_owned(),
            name: opcode.name.clone(),
            part: Part::Whole,
        });
        startup.chain(locked).chain(opcodes).collect()
    }

    /// The grants that permit this system call in `phase`; none when it is denied. In the start-up
    /// phase what any thread is permitted when it is locked is permitted as well, and then it is no
    /// grant of the start-up that is used.
    #[must_use]
    pub fn grants_of(&self, phase: &str, number: u32, args: &[u64; 6]) -> Vec<Grant> {
        let fits = |p: &&Permit| p.number == number && p.allows(args);
        let locked = self.locked.iter().find(|thread| thread.name == phase);
        let permits = match locked {
            Some(thread) => &thread.permits,
            None => {
                let mut all = self.locked.iter().flat_map(|thread| &thread.permits);
                if all.any(|p| fits(&p)) {
                    return Vec::new();
                }
                &self.startup
            }
        };
        let used = permits.iter().filter(fits);
        used.flat_map(|permit| parts_of(phase, permit, args))
            .collect()
    }

    /// Whether this system call is permitted in `phase`.
    #[must_use]
    pub fn permits(&self, phase: &str, number: u32, args: &[u64; 6]) -> bool {
        let fits = |p: &Permit| p.number == number && p.allows(args);
        match self.locked.iter().find(|thread| thread.name == phase) {
            Some(thread) => thread.permits.iter().any(fits),
            None => {
                let locked = self.locked.iter().flat_map(|thread| &thread.permits);
                locked.chain(&self.startup).any(fits)
            }
        }
    }
}

impl Permit {
    /// The grants that it stands for in `phase`.
    #[must_use]
    pub fn grants(&self, phase: &str) -> Vec<Grant> {
        parts(phase, self)
    }
}

/// All grants of a permit.
fn parts(phase: &str, permit: &Permit) -> Vec<Grant> {
    collect(phase, permit, &|_, _| true)
}

/// Those of a permit's grants that a call with `args` uses.
fn parts_of(phase: &str, permit: &Permit, args: &[u64; 6]) -> Vec<Grant> {
    collect(phase, permit, &|index, value| {
        let arg = args.get(usize::from(index)).copied().unwrap_or(0);
        arg & 0xffff_ffff == u64::from(value)
    })
}

fn collect(phase: &str, permit: &Permit, wanted: &dyn Fn(u8, u32) -> bool) -> Vec<Grant> {
    let grant = |part| Grant {
        phase: phase.to_owned(),
        name: permit.name.clone(),
        part,
    };
    let mut grants = Vec::new();
    let mut listed = false;
    for request in &permit.requests {
        listed = true;
        if wanted(1, request.code) {
            grants.push(grant(Part::Request(request.name.clone())));
        }
    }
    for condition in &permit.conditions {
        let Test::Is(values) = &condition.test else {
            continue;
        };
        listed = true;
        let index = condition.index;
        let values = values.iter().filter(|&&value| wanted(index, value));
        grants.extend(values.map(|&value| grant(Part::Value { index, value })));
    }
    if !listed {
        grants.push(grant(Part::Whole));
    }
    grants
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overrides::apply;
    use crate::{load, syscalls};
    use bulkhead_ipc::ident::ProcKind;

    #[test]
    fn each_grant_can_be_taken_away_alone() {
        for kind in ProcKind::ALL {
            let policy = load(kind, None, false).unwrap();
            let all = policy.grants();
            for grant in &all {
                let text = grant.denial(kind.name());
                let tighter = apply(policy.clone(), "o.toml", &text, false)
                    .unwrap_or_else(|e| panic!("{kind} {grant}: {e}"));
                let mut left = all.clone();
                left.retain(|other| other != grant);
                let mut found = tighter.grants();
                // What a locked thread loses, the start-up keeps.
                found.retain(|other| all.contains(other));
                assert_eq!(found, left, "{kind} {grant}");
            }
        }
    }

    #[test]
    fn call_uses_the_grants_of_its_phase_and_arguments() {
        let blk = load(ProcKind::Blk, None, false).unwrap();
        let number = |name| syscalls::number(name).unwrap();
        let fcntl = blk.grants_of(STARTUP, number("fcntl"), &[5, 1034, 0, 0, 0, 0]);
        let names: Vec<String> = fcntl.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["startup fcntl with argument 1 = 1034"]);
        // The locked phase grants it, so it is no grant of the start-up.
        assert_eq!(blk.grants_of(STARTUP, number("write"), &[0; 6]), []);
        assert!(blk.permits(STARTUP, number("write"), &[0; 6]));
        assert!(!blk.permits("main", number("mmap"), &[0; 6]));
        let vcpu = load(ProcKind::Vcpu, None, false).unwrap();
        let run = vcpu.grants_of("vcpu", number("ioctl"), &[9, 0xae80, 0, 0, 0, 0]);
        assert_eq!(run.len(), 1);
        assert_eq!(run[0].part, Part::Request("KVM_RUN".to_owned()));
    }
}
