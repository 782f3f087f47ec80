//! A death in words: what the kernel says, and what the process claims.

use crate::escape::excerpt;
use crate::launch::Launched;
use bulkhead_ipc::control_page::{Denial, Phase};
use bulkhead_ipc::protocol::birth::{CONTROL_FD, PAGE_FD};
use bulkhead_policies::explain::{self, Denied, Explanation};
use bulkhead_policies::{decode, load, role_name};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use std::path::Path;

/// Status with which a process ends after it has reported a denial: 128 + SIGSYS.
const EXIT_DENIED: i32 = 159;
/// Longest reason that a process may give, in bytes.
const REASON_BYTES_MAX: usize = 400;

/// Why a process that was watched is gone.
#[must_use]
pub fn describe(launched: &Launched, status: Option<WaitStatus>) -> String {
    let name = format!("bulkhead-{}", launched.id.kind);
    if let Some(reason) = launched.unborn() {
        return format!("{name} could not be executed: {reason}");
    }
    if let Some(denial) = launched.page.denial() {
        let but = match status {
            Some(WaitStatus::Exited(_, EXIT_DENIED)) | None => String::new(),
            // Not the end that its own report makes.
            other => format!("; it {}", end(other)),
        };
        return format!(
            "{name} was stopped by the kernel: {} is not granted (claimed by the process, {}{but})",
            denied(launched, &denial),
            phase(launched.page.phase()),
        );
    }
    // Where a process has its signals blocked, as while it makes a thread, it cannot report.
    let unreported = match status {
        Some(WaitStatus::Signaled(_, Signal::SIGSYS, _)) => {
            " for a system call that is not granted and that it could not report"
        }
        _ => "",
    };
    let phase = phase(launched.page.phase());
    format!("{name} {}{unreported}, {phase}", end(status))
}

fn end(status: Option<WaitStatus>) -> String {
    match status {
        Some(WaitStatus::Exited(_, code)) => format!("ended with status {code}"),
        Some(WaitStatus::Signaled(_, signal, _)) => format!("was killed by {signal}"),
        _ => "is gone".to_owned(),
    }
}

/// What a process says about itself, made harmless.
#[must_use]
pub fn said(reason: &str) -> String {
    excerpt(reason, REASON_BYTES_MAX)
}

const fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Exec => "before its filters were in force",
        Phase::Startup => "while starting",
        Phase::Locked => "while serving",
    }
}

/// The call with its arguments, and the thread that made it.
fn denied(launched: &Launched, denial: &Denial) -> String {
    let role = |fd| role(launched, fd);
    let call = decode::call(denial.number, &denial.args, &role);
    let name = denial.thread_name().unwrap_or("start-up");
    let name = excerpt(name, REASON_BYTES_MAX);
    format!("system call {call} of thread {name} ({})", denial.thread)
}

/// What a descriptor of a process was when it was born.
fn role(launched: &Launched, fd: i32) -> Option<String> {
    let fixed = match fd {
        0 | 1 => "null",
        2 => "log",
        CONTROL_FD => "control",
        PAGE_FD => "control page",
        _ => {
            let grant = launched.grants.iter().find(|grant| grant.fd == fd)?;
            let several = launched.grants.iter().filter(|g| g.role == grant.role);
            let name = role_name(grant.role);
            return Some(match several.count() {
                1 => name,
                _ => format!("{name} {}", grant.index),
            });
        }
    };
    Some(fixed.to_owned())
}

/// The denial that a dead process claims, with the line of the policy that would allow it. `policies`
/// is the directory of overrides.
#[must_use]
pub fn denial(launched: &Launched, policies: Option<&Path>) -> Option<Explanation> {
    let claimed = launched.page.denial()?;
    // A thread that the policy does not know is one that the process has made up.
    let known = |name: &&str| {
        load(launched.id.kind, None, false)
            .is_ok_and(|policy| policy.locked.iter().any(|thread| thread.name == *name))
    };
    let denied = Denied {
        thread: claimed.thread_name().filter(known),
        number: claimed.number,
        args: claimed.args,
    };
    let explained = explain::denial(launched.id.kind, policies, &denied, &|fd| {
        role(launched, fd)
    });
    // The reason of the death tells the call all the same.
    explained.ok()
}
