//! The system calls that a policy denies, generated from it: what an attacker would try.
//!
//! All of the kernel's system calls and the unused numbers around them; of those that are granted under a
//! condition the arguments just outside of it.

use crate::constants;
use crate::grant::STARTUP;
use crate::plan::{Condition, Permit, Policy, Test};

/// Numbers that are tried; x86_64 has fewer.
pub const NUMBERS: u32 = 600;
/// `uretprobe` and `uprobe`, which Linux lets pass every filter (since 6.14 and 6.18): trampolines that the
/// kernel has written make them. From anywhere else they do nothing but fail.
const BEYOND_FILTERS: [u32; 2] = [335, 336];
/// What stands for an argument that no condition is on: no descriptor, no address, no flag.
const FILLER: u64 = 0x1_0000;

/// One call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    /// System call number.
    pub number: u32,
    /// Its arguments.
    pub args: [u64; 6],
}

impl Policy {
    /// Calls on both sides of each condition of `phase`, and one of each number.
    #[must_use]
    pub fn attempts(&self, phase: &str) -> Vec<Attempt> {
        let filler = std::array::from_fn(|n| FILLER * (n as u64 + 1));
        let mut attempts: Vec<Attempt> = (0..NUMBERS)
            .map(|number| Attempt {
                number,
                args: filler,
            })
            .collect();
        for permit in self.permits_in(phase) {
            let inside = inside(permit, filler);
            let attempt = |args| Attempt {
                number: permit.number,
                args,
            };
            attempts.push(attempt(inside));
            if !permit.requests.is_empty() {
                let own = permit.requests.iter().map(|r| r.code);
                let all = constants::REQUESTS.iter().map(|(_, code)| *code);
                let near = own.flat_map(around);
                attempts.extend(
                    all.chain(near)
                        .map(|code| attempt(with(inside, 1, code.into()))),
                );
            }
            for condition in &permit.conditions {
                let edges = edges(condition).into_iter();
                attempts.extend(edges.map(|value| attempt(with(inside, condition.index, value))));
            }
        }
        attempts.sort_unstable();
        attempts.dedup();
        attempts
    }

    /// Those of [`Policy::attempts`] that `phase` does not permit.
    #[must_use]
    pub fn denied(&self, phase: &str) -> Vec<Attempt> {
        let mut attempts = self.attempts(phase);
        attempts.retain(|a| !self.permits(phase, a.number, &a.args));
        attempts
    }

    /// Those of [`Policy::denied`] that end whoever makes them.
    #[must_use]
    pub fn stopped(&self, phase: &str) -> Vec<Attempt> {
        let mut attempts = self.denied(phase);
        attempts.retain(|attempt| !BEYOND_FILTERS.contains(&attempt.number));
        attempts
    }

    /// What is permitted in `phase`, the start-up's share in what locked threads are included.
    fn permits_in(&self, phase: &str) -> impl Iterator<Item = &Permit> {
        let is_startup = phase == STARTUP;
        let threads = self.locked.iter();
        let locked = threads.filter(move |t| is_startup || t.name == phase);
        let startup = self.startup.iter().filter(move |_| is_startup);
        startup.chain(locked.flat_map(|thread| &thread.permits))
    }
}

/// Arguments that a permit allows.
fn inside(permit: &Permit, filler: [u64; 6]) -> [u64; 6] {
    let mut args = filler;
    if let Some(request) = permit.requests.first() {
        args = with(args, 1, request.code.into());
    }
    for condition in &permit.conditions {
        let value = match &condition.test {
            Test::Is(values) => values.first().copied().map_or(0, u64::from),
            Test::BitsClear(_) => 0,
            Test::AtMost(most) => *most,
        };
        args = with(args, condition.index, value);
    }
    args
}

fn with(mut args: [u64; 6], index: u8, value: u64) -> [u64; 6] {
    if let Some(arg) = args.get_mut(usize::from(index)) {
        *arg = value;
    }
    args
}

/// The values around one, and it with another bit set at either end.
fn around(value: u32) -> [u32; 5] {
    let (before, after) = (value.wrapping_sub(1), value.wrapping_add(1));
    [before, value, after, value ^ 1 << 31, value ^ 1 << 16]
}

/// Values of an argument at the edges of a condition.
fn edges(condition: &Condition) -> Vec<u64> {
    match &condition.test {
        Test::Is(values) => {
            let near = values.iter().flat_map(|&value| around(value));
            near.map(u64::from).chain([u64::MAX]).collect()
        }
        Test::BitsClear(bits) => {
            let alone = (0..u64::BITS).map(|bit| 1 << bit);
            alone.chain([0, *bits, !*bits, u64::MAX]).collect()
        }
        Test::AtMost(most) => vec![0, *most, most.saturating_add(1), u64::MAX],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{evaluate, load, syscalls};
    use bulkhead_ipc::ident::ProcKind;

    #[test]
    fn what_is_denied_is_everything_that_is_not_granted() {
        for kind in ProcKind::ALL {
            let policy = load(kind, None, false).unwrap();
            for thread in &policy.locked {
                let denied = policy.denied(&thread.name);
                for &(name, number) in syscalls::SYSCALLS {
                    let tried = denied.iter().any(|attempt| attempt.number == number);
                    let permit = thread.permits.iter().find(|p| p.number == number);
                    let open =
                        permit.is_some_and(|p| p.requests.is_empty() && p.conditions.is_empty());
                    assert_eq!(tried, !open, "{kind} {} {name}", thread.name);
                }
            }
            // A condition on flags: each alone.
            let denied = policy.denied(STARTUP);
            let mmap = syscalls::number("mmap");
            let executable = |a: &&Attempt| Some(a.number) == mmap && a.args[2] == 4;
            // Work on images maps nothing at all.
            let maps = kind != ProcKind::Image;
            assert_eq!(denied.iter().any(|a| executable(&a)), maps, "{kind}");
        }
    }

    #[test]
    fn compiled_filters_decide_each_attempt_as_the_policy_says() {
        for kind in ProcKind::ALL {
            let policy = load(kind, None, false).unwrap();
            let filters = crate::compile(&policy).unwrap();
            let locked = filters
                .locked
                .iter()
                .map(|f| (f.thread.as_str(), &f.filter));
            for (phase, filter) in locked.chain([(STARTUP, &filters.startup)]) {
                let program = evaluate::instructions(&filter.bpf).unwrap();
                for attempt in policy.attempts(phase) {
                    let permits = policy.permits(phase, attempt.number, &attempt.args);
                    let action = evaluate::action(&program, &attempt).unwrap();
                    let expected = match permits {
                        true => evaluate::RET_ALLOW,
                        false => evaluate::RET_TRAP,
                    };
                    assert_eq!(action, expected, "{kind} {phase} {attempt:?}");
                }
            }
        }
    }
}
