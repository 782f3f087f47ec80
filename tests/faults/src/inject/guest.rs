//! Faults that a guest sees and no process of its machine: what the hardware of a real one would do.
//!
//! KVM takes orders from the process of the vCPUs alone, so a vCPU thread is stopped and given them; it
//! goes on where it was.

use bulkhead::authority::guided::{Guided, Outcome};
use nix::errno::Errno;
use std::fs;
use std::io;

/// `KVM_NMI` (KVM API section 4.64), an order to a vCPU.
const KVM_NMI: u64 = 0xae9a;
/// What the threads of vCPUs are named.
const VCPU_THREADS: &str = "vcpu";
/// What a descriptor of the first vCPU is.
const VCPU: &str = "anon_inode:kvm-vcpu:0";

/// A non-maskable interrupt for the first vCPU of a vCPU process.
///
/// # Errors
/// When there is no such thread or descriptor, or KVM refuses.
pub fn nmi(pid: i32) -> io::Result<()> {
    let thread = vcpu_thread(pid)?;
    let vcpu = descriptor(pid, VCPU)?;
    let mut guided = Guided::stop_without_seccomp(pid, thread)?;
    match guided.call(libc::SYS_ioctl, [vcpu, KVM_NMI, 0, 0, 0, 0])? {
        Outcome::Returned(0) => Ok(()),
        Outcome::Returned(negative) => {
            let errno = i32::try_from(-negative).unwrap_or(libc::EIO);
            Err(Errno::from_raw(errno).into())
        }
        Outcome::Exited(_) | Outcome::Killed(_) => Err(Errno::ESRCH.into()),
    }
}

/// The thread of the first vCPU: a group's first thread directs the others, which are made in their order.
fn vcpu_thread(pid: i32) -> io::Result<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    let threads = tasks.filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let tid: i32 = task.file_name().to_str()?.parse().ok()?;
        (tid != pid && name.trim().starts_with(VCPU_THREADS)).then_some(tid)
    });
    let first = threads.min();
    first.ok_or_else(|| io::Error::other("it has no vCPU thread"))
}

fn descriptor(pid: i32, is: &str) -> io::Result<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    let mut found = entries.filter_map(|entry| {
        let link = fs::read_link(entry.path()).ok()?;
        let number: u64 = entry.file_name().to_str()?.parse().ok()?;
        (link.to_str() == Some(is)).then_some(number)
    });
    let found = found.next();
    found.ok_or_else(|| io::Error::other(format!("it has no {is}")))
}
