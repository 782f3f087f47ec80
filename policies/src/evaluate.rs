//! What seccomp filters permit, found by evaluating them: for every system call number, both ways of
//! each branch on an argument are followed.
//!
//! For filters as the kernel gives them back: the result is about what is enforced, and depends on no
//! policy and on nothing that a process says.

use crate::denied::{Attempt, NUMBERS};
use crate::{constants, syscalls};
use std::collections::BTreeSet;
use std::fmt;

const IOCTL: u32 = 16;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// SECCOMP_RET_ALLOW.
pub const RET_ALLOW: u32 = 0x7fff_0000;
/// SECCOMP_RET_TRAP: SIGSYS.
pub const RET_TRAP: u32 = 0x0003_0000;
/// Offset of the low half of the second argument in `struct seccomp_data`.
const SECOND_ARGUMENT: u32 = 24;
/// Branches followed for one system call before giving up.
const PATHS_MAX: usize = 100_000;
/// Size of `struct sock_filter` in bytes.
const INSTRUCTION_BYTES: usize = 8;

/// One classic BPF instruction (`struct sock_filter`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip when a comparison holds.
    pub if_true: u8,
    /// Instructions to skip when it does not.
    pub if_false: u8,
    /// Constant.
    pub operand: u32,
}

/// A filter that cannot be evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvaluateError {
    /// There is none: everything is permitted.
    #[error("there is no filter")]
    None,
    /// It has an instruction that is not known here.
    #[error("BPF instruction {0:#x} is not known")]
    Unknown(u16),
    /// Control runs past its end.
    #[error("the filter runs past its end")]
    End,
    /// There are too many ways through it.
    #[error("the filter branches too often to be evaluated")]
    Branches,
    /// It is no sequence of instructions.
    #[error("a filter of {0} bytes is no sequence of instructions")]
    Length(usize),
}

/// Something that filters permit: a system call, or one request code of `ioctl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Permitted {
    /// System call number.
    pub number: u32,
    /// The request code of an `ioctl`; `None` for every code.
    pub code: Option<u32>,
}

impl fmt::Display for Permitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match syscalls::name(self.number) {
            Some(name) => f.write_str(name)?,
            None => write!(f, "number {}", self.number)?,
        }
        match self.code.map(|code| (code, constants::request_name(code))) {
            None => Ok(()),
            Some((_, Some(name))) => write!(f, "({name})"),
            Some((code, None)) => write!(f, "({code:#x})"),
        }
    }
}

/// The instructions of a compiled filter.
///
/// # Errors
/// [`EvaluateError::Length`].
pub fn instructions(bpf: &[u8]) -> Result<Vec<Instruction>, EvaluateError> {
    let (records, rest) = bpf.as_chunks::<INSTRUCTION_BYTES>();
    if !rest.is_empty() {
        return Err(EvaluateError::Length(bpf.len()));
    }
    let decode = |&[a, b, if_true, if_false, k @ ..]: &[u8; 8]| Instruction {
        code: u16::from_ne_bytes([a, b]),
        if_true,
        if_false,
        operand: u32::from_ne_bytes(k),
    };
    Ok(records.iter().map(decode).collect())
}

/// What a filter does with one call of x86_64.
///
/// # Errors
/// [`EvaluateError`]; then nothing is known.
pub fn action(filter: &[Instruction], call: &Attempt) -> Result<u32, EvaluateError> {
    let (mut at, mut a) = (0usize, 0u32);
    // Jumps lead forward only, so each instruction is met once at most.
    for _ in 0..=filter.len() {
        let &i = filter.get(at).ok_or(EvaluateError::End)?;
        at += 1;
        match i.code {
            0x20 => a = field(i.operand, call).ok_or(EvaluateError::Unknown(i.code))?,
            0x54 => a &= i.operand,
            0x05 => {
                let skip = usize::try_from(i.operand).map_err(|_| EvaluateError::End)?;
                at = at.saturating_add(skip);
            }
            0x15 | 0x25 | 0x35 | 0x45 => {
                let (yes, _) = branches(i, Value::Known(a));
                at += usize::from(if yes { i.if_true } else { i.if_false });
            }
            0x06 => return Ok(i.operand),
            other => return Err(EvaluateError::Unknown(other)),
        }
    }
    Err(EvaluateError::End)
}

/// A word of `struct seccomp_data`.
fn field(offset: u32, call: &Attempt) -> Option<u32> {
    const ARGUMENTS: u32 = 16;
    match offset {
        0 => return Some(call.number),
        4 => return Some(AUDIT_ARCH_X86_64),
        _ => {}
    }
    let place = offset.checked_sub(ARGUMENTS)?;
    let arg = call.args.get(usize::try_from(place / 8).ok()?)?;
    let half = if place % 8 == 0 { *arg } else { arg >> 32 };
    u32::try_from(half & 0xffff_ffff).ok()
}

/// What all `filters` of a thread together permit.
///
/// # Errors
/// [`EvaluateError`]; then nothing is known.
pub fn permitted(filters: &[Vec<Instruction>]) -> Result<BTreeSet<Permitted>, EvaluateError> {
    let mut permitted: Option<BTreeSet<Permitted>> = None;
    for filter in filters {
        let mut set = BTreeSet::new();
        for number in 0..NUMBERS {
            for code in allowed_paths(filter, number)? {
                let code = if number == IOCTL { code } else { None };
                set.insert(Permitted { number, code });
            }
        }
        permitted = Some(match permitted {
            None => set,
            Some(before) => intersect(&before, &set),
        });
    }
    permitted.ok_or(EvaluateError::None)
}

/// What both sets permit; an `ioctl` without a condition permits every code.
fn intersect(a: &BTreeSet<Permitted>, b: &BTreeSet<Permitted>) -> BTreeSet<Permitted> {
    let wide = |set: &BTreeSet<Permitted>, number| set.contains(&Permitted { number, code: None });
    let covered = |set: &BTreeSet<Permitted>, request: Permitted| {
        set.contains(&request) || wide(set, request.number)
    };
    let in_b = a.iter().copied().filter(|request| covered(b, *request));
    let in_a = b.iter().copied().filter(|request| covered(a, *request));
    let both: BTreeSet<_> = in_b.chain(in_a).collect();
    both.into_iter()
        .filter(|r| r.code.is_some() || (wide(a, r.number) && wide(b, r.number)))
        .collect()
}

/// What is known of a value at some point of a path.
#[derive(Debug, Clone, Copy)]
enum Value {
    Known(u32),
    Field(u32),
    Unknown,
}

/// For each way that ends in ALLOW: the value that the second argument was compared equal to.
fn allowed_paths(filter: &[Instruction], number: u32) -> Result<Vec<Option<u32>>, EvaluateError> {
    let mut allowed = Vec::new();
    let mut open = vec![(0usize, Value::Unknown, None)];
    let mut followed = 0;
    while let Some((at, a, equal)) = open.pop() {
        followed += 1;
        if followed > PATHS_MAX {
            return Err(EvaluateError::Branches);
        }
        let &i = filter.get(at).ok_or(EvaluateError::End)?;
        match i.code {
            0x20 => open.push((at + 1, load(i.operand, number), equal)),
            0x54 => {
                let masked = match a {
                    Value::Known(v) => Value::Known(v & i.operand),
                    _ => Value::Unknown,
                };
                open.push((at + 1, masked, equal));
            }
            0x05 => {
                let skip = usize::try_from(i.operand).map_err(|_| EvaluateError::End)?;
                open.push((at.saturating_add(1 + skip), a, equal));
            }
            0x15 | 0x25 | 0x35 | 0x45 => {
                let (yes, no) = branches(i, a);
                let hit = match a {
                    Value::Field(SECOND_ARGUMENT) if i.code == 0x15 => Some(i.operand),
                    _ => equal,
                };
                if yes {
                    open.push((at + 1 + usize::from(i.if_true), a, hit));
                }
                if no {
                    open.push((at + 1 + usize::from(i.if_false), a, equal));
                }
            }
            0x06 => {
                if i.operand == RET_ALLOW {
                    allowed.push(equal);
                }
            }
            other => return Err(EvaluateError::Unknown(other)),
        }
    }
    Ok(allowed)
}

fn load(offset: u32, number: u32) -> Value {
    match offset {
        0 => Value::Known(number),
        4 => Value::Known(AUDIT_ARCH_X86_64),
        field => Value::Field(field),
    }
}

fn branches(i: Instruction, a: Value) -> (bool, bool) {
    let Value::Known(value) = a else {
        return (true, true);
    };
    let yes = match i.code {
        0x15 => value == i.operand,
        0x25 => value > i.operand,
        0x35 => value >= i.operand,
        _ => value & i.operand != 0,
    };
    (yes, !yes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::ident::ProcKind;

    fn i(code: u16, if_true: u8, if_false: u8, operand: u32) -> Instruction {
        Instruction {
            code,
            if_true,
            if_false,
            operand,
        }
    }

    /// read; ioctl with two request codes; nothing else.
    fn filter() -> Vec<Instruction> {
        vec![
            i(0x20, 0, 0, 4),
            i(0x15, 1, 0, AUDIT_ARCH_X86_64),
            i(0x06, 0, 0, 0),
            i(0x20, 0, 0, 0),
            i(0x15, 4, 0, 0),
            i(0x15, 0, 4, IOCTL),
            i(0x20, 0, 0, SECOND_ARGUMENT),
            i(0x15, 1, 0, 0xae80),
            i(0x15, 0, 1, 0xae81),
            i(0x06, 0, 0, RET_ALLOW),
            i(0x06, 0, 0, 0x0003_0000),
        ]
    }

    #[test]
    fn system_calls_and_ioctl_codes_are_found() {
        let found = permitted(&[filter()]).unwrap();
        let named: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(named, ["read", "ioctl(KVM_RUN)", "ioctl(0xae81)"]);
    }

    #[test]
    fn stacked_filters_permit_what_all_permit() {
        let all = vec![i(0x06, 0, 0, RET_ALLOW)];
        let count = |filters: &[Vec<Instruction>]| permitted(filters).unwrap().len();
        assert_eq!(count(&[filter(), all.clone()]), 3);
        let none = vec![i(0x06, 0, 0, 0)];
        assert_eq!(count(&[filter(), none]), 0);
        assert_eq!(count(&[all]), 600);
    }

    #[test]
    fn unknown_instruction_is_an_error_and_not_a_count() {
        assert!(permitted(&[vec![i(0x99, 0, 0, 0)]]).is_err());
        assert_eq!(permitted(&[]), Err(EvaluateError::None));
        assert!(instructions(&[0; 9]).is_err());
    }

    #[test]
    fn compiled_policies_permit_what_the_policies_say() {
        for kind in ProcKind::ALL {
            let policy = crate::load(kind, None, false).unwrap();
            let filters = crate::compile(&policy).unwrap();
            for (thread, filter) in policy.locked.iter().zip(&filters.locked) {
                let program = instructions(&filter.filter.bpf).unwrap();
                let found = permitted(&[program]).unwrap();
                let said: BTreeSet<String> = thread
                    .permits
                    .iter()
                    .flat_map(|p| p.request_names())
                    .collect();
                let found: BTreeSet<String> = found.iter().map(ToString::to_string).collect();
                assert_eq!(found, said, "{kind} {}", thread.name);
            }
        }
    }
}
