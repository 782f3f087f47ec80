//! What a living process may ask of the kernel, read from its seccomp filters in the kernel.
//!
//! The filters are fetched with `PTRACE_SECCOMP_GET_FILTER` and evaluated here for every system call
//! number, following both ways of each branch on an argument. So the figure is about what the
//! kernel enforces, and does not depend on policies or on what the process says.

use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;

/// System call numbers that are tried; x86_64 has fewer.
const NUMBERS: u32 = 600;
const IOCTL: u32 = 16;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const RET_ALLOW: u32 = 0x7fff_0000;
/// Offset of the low half of the second argument in `struct seccomp_data`.
const SECOND_ARGUMENT: u32 = 24;
/// Branches followed for one system call before giving up.
const PATHS_MAX: usize = 100_000;

/// One classic BPF instruction (`struct sock_filter`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    operand: u32,
}

/// Counts the requests that all `filters` together permit: system calls, and for `ioctl` each
/// permitted request code.
pub(super) fn permitted_requests(filters: &[Vec<Instruction>]) -> Result<usize> {
    let mut permitted: Option<BTreeSet<(u32, Option<u32>)>> = None;
    for filter in filters {
        let mut set = BTreeSet::new();
        for number in 0..NUMBERS {
            for codes in allowed_paths(filter, number)? {
                let code = if number == IOCTL { codes } else { None };
                set.insert((number, code));
            }
        }
        permitted = Some(match permitted {
            None => set,
            Some(before) => intersect(&before, &set),
        });
    }
    Ok(permitted.context("the process has no filter")?.len())
}

/// What both sets permit; an `ioctl` without a condition permits every code.
fn intersect(
    a: &BTreeSet<(u32, Option<u32>)>,
    b: &BTreeSet<(u32, Option<u32>)>,
) -> BTreeSet<(u32, Option<u32>)> {
    let covered = |set: &BTreeSet<(u32, Option<u32>)>, (number, code): (u32, Option<u32>)| {
        set.contains(&(number, code)) || set.contains(&(number, None))
    };
    let in_b = a.iter().copied().filter(|request| covered(b, *request));
    let in_a = b.iter().copied().filter(|request| covered(a, *request));
    let both: BTreeSet<_> = in_b.chain(in_a).collect();
    let wide = |number| a.contains(&(number, None)) && b.contains(&(number, None));
    both.into_iter()
        .filter(|(number, code)| code.is_some() || wide(*number))
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
fn allowed_paths(filter: &[Instruction], number: u32) -> Result<Vec<Option<u32>>> {
    let mut allowed = Vec::new();
    let mut open = vec![(0usize, Value::Unknown, None)];
    let mut followed = 0;
    while let Some((at, a, equal)) = open.pop() {
        followed += 1;
        if followed > PATHS_MAX {
            bail!("the filter branches too often to be evaluated");
        }
        let Some(&i) = filter.get(at) else {
            bail!("the filter runs past its end")
        };
        let operand = usize::try_from(i.operand)?;
        match i.code {
            0x20 => open.push((at + 1, load(i.operand, number), equal)),
            0x54 => {
                let masked = match a {
                    Value::Known(v) => Value::Known(v & i.operand),
                    _ => Value::Unknown,
                };
                open.push((at + 1, masked, equal));
            }
            0x05 => open.push((at + 1 + operand, a, equal)),
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
            other => bail!("BPF instruction {other:#x} is not known here"),
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

/// Reads the filters of a thread from the kernel. Needs CAP_SYS_ADMIN.
pub(super) fn read(thread: i32) -> Result<Vec<Vec<Instruction>>> {
    let _attached = sys::Attached::seize(thread)?;
    let mut filters = Vec::new();
    while let Some(filter) = sys::filter(thread, filters.len())? {
        filters.push(filter);
    }
    Ok(filters)
}

mod sys {
    #![allow(
        unsafe_code,
        reason = "ptrace has no safe interface for seccomp filters"
    )]

    use super::Instruction;
    use anyhow::{Context, Result};
    use nix::errno::Errno;
    use nix::sys::wait::{WaitPidFlag, waitpid};
    use nix::unistd::Pid;
    use std::ptr;

    /// A thread that is stopped under ptrace until this is dropped.
    pub(super) struct Attached(i32);

    impl Attached {
        pub(super) fn seize(thread: i32) -> Result<Self> {
            request(libc::PTRACE_SEIZE, thread, 0, ptr::null_mut())
                .with_context(|| format!("cannot look at thread {thread}"))?;
            let attached = Self(thread);
            request(libc::PTRACE_INTERRUPT, thread, 0, ptr::null_mut())?;
            waitpid(Pid::from_raw(thread), Some(WaitPidFlag::__WALL))?;
            Ok(attached)
        }
    }

    impl Drop for Attached {
        fn drop(&mut self) {
            // It may have ended meanwhile; there is nothing to let go of then.
            let _gone = request(libc::PTRACE_DETACH, self.0, 0, ptr::null_mut());
        }
    }

    /// Filter number `index` of a stopped thread, the newest first; none past the oldest.
    pub(super) fn filter(thread: i32, index: usize) -> Result<Option<Vec<Instruction>>> {
        const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
        let len = match request(PTRACE_SECCOMP_GET_FILTER, thread, index, ptr::null_mut()) {
            Ok(len) => usize::try_from(len)?,
            Err(Errno::ENOENT) => return Ok(None),
            Err(e) => return Err(e).context("cannot read a seccomp filter"),
        };
        let mut raw = vec![
            libc::sock_filter {
                code: 0,
                jt: 0,
                jf: 0,
                k: 0
            };
            len
        ];
        request(
            PTRACE_SECCOMP_GET_FILTER,
            thread,
            index,
            raw.as_mut_ptr().cast(),
        )?;
        let decode = |f: libc::sock_filter| Instruction {
            code: f.code,
            if_true: f.jt,
            if_false: f.jf,
            operand: f.k,
        };
        Ok(Some(raw.into_iter().map(decode).collect()))
    }

    fn request(
        request: libc::c_uint,
        thread: i32,
        address: usize,
        data: *mut libc::c_void,
    ) -> Result<libc::c_long, Errno> {
        // SAFETY: `data` is null or points to as many records as the kernel said it will write;
        // no other request used here touches our memory.
        let result = unsafe { libc::ptrace(request, thread, address, data) };
        Errno::result(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn system_calls_and_ioctl_codes_are_counted() {
        assert_eq!(permitted_requests(&[filter()]).unwrap(), 3);
    }

    #[test]
    fn stacked_filters_permit_what_all_permit() {
        let all = vec![i(0x06, 0, 0, RET_ALLOW)];
        assert_eq!(permitted_requests(&[filter(), all.clone()]).unwrap(), 3);
        let none = vec![i(0x06, 0, 0, 0)];
        assert_eq!(permitted_requests(&[filter(), none]).unwrap(), 0);
        assert_eq!(permitted_requests(&[all]).unwrap(), 600);
    }

    #[test]
    fn unknown_instruction_is_an_error_and_not_a_count() {
        assert!(permitted_requests(&[vec![i(0x99, 0, 0, 0)]]).is_err());
        assert!(permitted_requests(&[]).is_err());
    }
}
