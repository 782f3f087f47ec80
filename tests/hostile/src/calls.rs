//! System calls that the policy denies, one in each life: the first ends the process.
#![allow(
    unsafe_code,
    reason = "there is no safe way to make any system call at all, which is what a process that was taken over does"
)]

use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::denied::Attempt;
use bulkhead_policies::load;

/// Exit code of a process that was let do what its policy denies.
pub(crate) const EXIT_ESCAPED: i32 = 77;

/// Everything that the locked process of `kind` must not call: its first thread, for the vCPU group the one
/// that talks to the broker.
pub(crate) fn denied(kind: ProcKind) -> Vec<Attempt> {
    let policy = load(kind, None, false);
    policy.map_or_else(|_| Vec::new(), |policy| policy.stopped("main"))
}

/// Makes the call. Nothing of this process is used after it: it has ended, or leaves.
pub(crate) fn attempt(attempt: &Attempt) -> ! {
    let [a, b, c, d, e, f] = attempt.args;
    // SAFETY: if the kernel did carry it out, it could not break anything that is used afterwards.
    unsafe { libc::syscall(attempt.number.into(), a, b, c, d, e, f) };
    bulkhead_runtime::leave(EXIT_ESCAPED)
}
