//! From a policy to the seccomp filters of its processes.
//!
//! The kernel applies every filter of a thread, so the start-up filter permits what the locked ones
//! permit as well. What no rule permits raises SIGSYS (SECCOMP_RET_TRAP).

use crate::plan::{Permit, Policy, Test};
use bulkhead_ipc::protocol::birth::{Filter, ThreadFilter, UringGrant};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The filters of one kind of process, ready for its birth message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filters {
    /// Start-up phase.
    pub startup: Filter,
    /// Locked phase, by thread.
    pub locked: Vec<ThreadFilter>,
    /// io_uring operations.
    pub uring: UringGrant,
}

/// A filter that `seccompiler` refuses.
#[derive(Debug, thiserror::Error)]
#[error("{kind}: the {phase} filter does not compile: {cause}")]
pub struct CompileError {
    /// The kind of process.
    pub kind: &'static str,
    /// `startup` or the thread.
    pub phase: String,
    /// What `seccompiler` said.
    pub cause: seccompiler::BackendError,
}

/// Compiles all filters of `policy`.
///
/// # Errors
/// [`CompileError`] when a filter is longer than the kernel's 4096 instructions.
pub fn compile(policy: &Policy) -> Result<Filters, CompileError> {
    let fails = |phase: &str| {
        let phase = phase.to_owned();
        move |cause| CompileError {
            kind: policy.kind.name(),
            phase,
            cause,
        }
    };
    let locked = || policy.locked.iter().flat_map(|thread| &thread.permits);
    let startup = filter(locked().chain(&policy.startup)).map_err(fails("startup"))?;
    let mut threads = Vec::with_capacity(policy.locked.len());
    for thread in &policy.locked {
        threads.push(ThreadFilter {
            thread: thread.name.clone(),
            filter: filter(thread.permits.iter()).map_err(fails(&thread.name))?,
        });
    }
    let opcodes = policy.opcodes.iter().map(|o| o.number).collect();
    Ok(Filters {
        startup,
        locked: threads,
        uring: UringGrant { opcodes },
    })
}

fn filter<'a>(
    permits: impl Iterator<Item = &'a Permit>,
) -> Result<Filter, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Option<Vec<SeccompRule>>> = BTreeMap::new();
    for permit in permits {
        let entry = rules
            .entry(i64::from(permit.number))
            .or_insert_with(|| Some(Vec::new()));
        if permit.requests.is_empty() && permit.conditions.is_empty() {
            // Permitted without a condition once is permitted without a condition.
            *entry = None;
        } else if let Some(rules) = entry {
            for rule in rules_of(permit)? {
                if !rules.contains(&rule) {
                    rules.push(rule);
                }
            }
        }
    }
    let rules = rules
        .into_iter()
        .map(|(number, rules)| (number, rules.unwrap_or_default()))
        .collect();
    let program: BpfProgram = SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()?;
    let mut bpf = Vec::with_capacity(program.len() * 8);
    for instruction in program {
        bpf.extend_from_slice(&instruction.code.to_ne_bytes());
        bpf.extend_from_slice(&[instruction.jt, instruction.jf]);
        bpf.extend_from_slice(&instruction.k.to_ne_bytes());
    }
    Ok(Filter { bpf })
}

/// One rule for each combination of the values that arguments may have.
fn rules_of(permit: &Permit) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let mut combinations: Vec<Vec<SeccompCondition>> = vec![Vec::new()];
    let codes: Vec<u32> = permit.requests.iter().map(|r| r.code).collect();
    let request = (!codes.is_empty()).then_some((1, Test::Is(codes)));
    let conditions = permit.conditions.iter().map(|c| (c.index, c.test.clone()));
    for (index, test) in request.into_iter().chain(conditions) {
        let choices = choices(index, &test)?;
        combinations = combinations
            .iter()
            .flat_map(|so_far| {
                choices.iter().map(|choice| {
                    let mut longer = so_far.clone();
                    longer.push(choice.clone());
                    longer
                })
            })
            .collect();
    }
    combinations.into_iter().map(SeccompRule::new).collect()
}

fn choices(index: u8, test: &Test) -> Result<Vec<SeccompCondition>, seccompiler::BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    match test {
        Test::Is(values) => values
            .iter()
            .map(|&v| SeccompCondition::new(index, Dword, SeccompCmpOp::Eq, u64::from(v)))
            .collect(),
        Test::BitsClear(bits) => {
            SeccompCondition::new(index, Qword, SeccompCmpOp::MaskedEq(*bits), 0).map(|c| vec![c])
        }
        Test::AtMost(most) => {
            SeccompCondition::new(index, Qword, SeccompCmpOp::Le, *most).map(|c| vec![c])
        }
    }
}
