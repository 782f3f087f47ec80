//! A death in words: what the kernel says, and what the process claims.

use crate::escape::excerpt;
use crate::launch::Launched;
use bulkhead_ipc::control_page::{Denial, Phase};
use bulkhead_policies::{constants, syscalls};
use nix::sys::wait::WaitStatus;

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
        return format!(
            "{name} was stopped by the kernel: system call {} is not granted (claimed by the process, {})",
            denied(&denial),
            phase(launched.page.phase()),
        );
    }
    let how = match status {
        Some(WaitStatus::Exited(_, code)) => format!("ended with status {code}"),
        Some(WaitStatus::Signaled(_, signal, _)) => format!("was killed by {signal}"),
        _ => "is gone".to_owned(),
    };
    format!("{name} {how}, {}", phase(launched.page.phase()))
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

/// The call and its arguments, by name where there is one.
#[must_use]
pub fn denied(denial: &Denial) -> String {
    let name = syscalls::name(denial.number);
    let [first, second, rest @ ..] = denial.args;
    let request = u32::try_from(second & 0xffff_ffff)
        .ok()
        .filter(|_| name == Some("ioctl"))
        .and_then(constants::request_name);
    let second = request.map_or_else(|| format!("{second:#x}"), str::to_owned);
    let rest = rest.map(|arg| format!(", {arg:#x}")).concat();
    let arguments = format!("({first:#x}, {second}{rest})");
    match name {
        Some(name) => format!("{name}{arguments}"),
        None => format!("number {}{arguments}", denial.number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denial(number: u32, second: u64) -> Denial {
        Denial {
            number,
            thread: 1,
            args: [2, second, 0, 0, 0, 0],
        }
    }

    #[test]
    fn denied_calls_are_named() {
        assert_eq!(
            denied(&denial(41, 1)),
            "socket(0x2, 0x1, 0x0, 0x0, 0x0, 0x0)"
        );
        assert!(denied(&denial(16, 0xae80)).starts_with("ioctl(0x2, KVM_RUN,"));
        assert!(denied(&denial(9999, 1)).starts_with("number 9999("));
    }
}
