//! The two walls that a process puts up around itself: Landlock, without a single rule but for the folder of
//! a process that shares one, and the seccomp filters of its birth message.
//!
//! Landlock comes first, before anything of the process has run, so that no phase of it can name a
//! file, bind or connect a TCP port, or signal or reach sockets of another process. It is inherited by threads
//! made later. Seccomp filters are per thread: each thread locks itself by its name in the policy.

use crate::sys;
use bulkhead_ipc::protocol::birth::{Filter, ThreadFilter};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, PathBeneath,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, Scope,
};
use nix::errno::Errno;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// The newest Landlock ABI whose rights are asked for.
const LANDLOCK_ABI: ABI = ABI::V7;
const INSTRUCTION_BYTES: usize = 8;
const INSTRUCTIONS_MAX: usize = 4096;

/// Why a wall could not be put up.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// Landlock refused.
    #[error("Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The kernel refused a filter.
    #[error("seccomp filter of {phase}: {errno}")]
    Seccomp {
        /// Thread name, or `start-up`.
        phase: String,
        /// Why.
        errno: Errno,
    },
    /// The filter is no program.
    #[error(
        "seccomp filter of {phase} has {bytes} bytes, expected 1 to {INSTRUCTIONS_MAX} instructions of {INSTRUCTION_BYTES}"
    )]
    Malformed {
        /// Thread name, or `start-up`.
        phase: String,
        /// Its length.
        bytes: usize,
    },
    /// The policy has no filter for a thread of this name.
    #[error("no locked filter for thread {thread:?}")]
    NoFilter {
        /// The name.
        thread: String,
    },
}

/// Forbids every file system, network and signalling right that this kernel's Landlock knows.
/// Returns the ABI in force, 0 when the kernel has none.
///
/// # Errors
/// [`ConfineError::Landlock`] when a kernel that has it refuses.
pub fn forbid_paths() -> Result<u8, ConfineError> {
    Ok(in_force(&rules()?.restrict_self()?.landlock))
}

/// Nothing is permitted by them yet.
fn rules() -> Result<RulesetCreated, ConfineError> {
    let rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK_ABI))?
        .handle_access(AccessNet::from_all(LANDLOCK_ABI))?
        .scope(Scope::from_all(LANDLOCK_ABI))?;
    Ok(rules.create()?)
}

/// The ABI in force, 0 for none.
fn in_force(status: &LandlockStatus) -> u8 {
    match *status {
        LandlockStatus::Available { effective_abi, .. } => (effective_abi as i32)
            .min(LANDLOCK_ABI as i32)
            .try_into()
            .unwrap_or(0),
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => 0,
    }
}

/// Forbids the same, but for what is below `folder`: there files and directories are read, and unless it is
/// `read_only` made, written, renamed and removed. Nothing is executed, and no device node, pipe or socket
/// is made, anywhere.
///
/// # Errors
/// As [`forbid_paths`].
pub fn permit_folder(folder: BorrowedFd<'_>, read_only: bool) -> Result<u8, ConfineError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let change = AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::MakeSym
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Refer;
    let access = if read_only { read } else { read | change };
    let rules = rules()?.add_rule(PathBeneath::new(folder, access))?;
    Ok(in_force(&rules.restrict_self()?.landlock))
}

/// The locked filters of a process, for each of its threads to put on itself.
#[derive(Debug, Clone)]
pub struct Locks {
    filters: Arc<[ThreadFilter]>,
}

impl Locks {
    pub(crate) fn new(filters: Vec<ThreadFilter>) -> Self {
        Self {
            filters: filters.into(),
        }
    }

    /// Locks the calling thread. Nothing beyond the filter of `thread` works in it from here on.
    ///
    /// # Errors
    /// [`ConfineError`]; the process must then end.
    pub fn lock_thread(&self, thread: &str) -> Result<(), ConfineError> {
        let found = self.filters.iter().find(|f| f.thread == thread);
        let found = found.ok_or_else(|| ConfineError::NoFilter {
            thread: thread.to_owned(),
        })?;
        sys::note_thread();
        sys::fix_heap();
        install(thread, &found.filter)?;
        // Not before: what is denied until here is denied by the start-up filter.
        sys::name_thread(thread);
        Ok(())
    }
}

pub(crate) fn install(phase: &str, filter: &Filter) -> Result<(), ConfineError> {
    let (instructions, rest) = filter.bpf.as_chunks::<INSTRUCTION_BYTES>();
    if instructions.is_empty() || instructions.len() > INSTRUCTIONS_MAX || !rest.is_empty() {
        return Err(ConfineError::Malformed {
            phase: phase.to_owned(),
            bytes: filter.bpf.len(),
        });
    }
    let program: Vec<libc::sock_filter> = instructions
        .iter()
        .map(|&[a, b, jt, jf, k @ ..]| libc::sock_filter {
            code: u16::from_ne_bytes([a, b]),
            jt,
            jf,
            k: u32::from_ne_bytes(k),
        })
        .collect();
    sys::install_filter(&program).map_err(|errno| ConfineError::Seccomp {
        phase: phase.to_owned(),
        errno,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_that_is_no_program_is_refused() {
        for bytes in [0, 7, 9, 8 * (INSTRUCTIONS_MAX + 1)] {
            let filter = Filter {
                bpf: vec![0; bytes],
            };
            assert!(matches!(
                install("start-up", &filter),
                Err(ConfineError::Malformed { bytes: got, .. }) if got == bytes
            ));
        }
    }

    #[test]
    fn thread_without_filter_is_refused() {
        let locks = Locks::new(Vec::new());
        assert!(matches!(
            locks.lock_thread("vcpu"),
            Err(ConfineError::NoFilter { .. })
        ));
    }

    #[test]
    #[expect(
        clippy::disallowed_methods,
        reason = "the test is its own child, not a part of the program"
    )]
    fn locked_thread_has_memory_of_any_size() {
        const INSIDE: &str = "BULKHEAD_TEST_LOCKED_HEAP";
        if std::env::var_os(INSIDE).is_some() {
            allocate_behind_the_filter();
        }
        // The filter cannot be taken off again, so another process puts it on. With one test
        // thread it has one thread to begin with, as a newborn has.
        let name = "confine::tests::locked_thread_has_memory_of_any_size";
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture", "--test-threads=1"])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        assert_eq!(child.status.code(), Some(77), "{child:?}");
    }

    /// What a gate does for a guest with long descriptor chains, and a crash report with symbols.
    fn allocate_behind_the_filter() -> ! {
        let policy = bulkhead_policies::load(bulkhead_ipc::ident::ProcKind::Vcpu, None, false);
        let filters = bulkhead_policies::compile(&policy.unwrap()).unwrap();
        let locks = Locks::new(filters.locked);
        sys::share_heap();
        let gate = std::thread::spawn(move || {
            locks.lock_thread("gate").unwrap();
            let small: Vec<Vec<u8>> = (0..4096).map(|_| vec![1; 1024]).collect();
            let large = vec![1u8; 40 << 20];
            std::hint::black_box((&small, &large));
            drop((small, large));
            sys::leave(77);
        });
        let _never = gate.join();
        sys::leave(78);
    }

    #[test]
    fn landlock_closes_the_file_system_for_the_thread_that_asks() {
        let opened = std::thread::spawn(|| {
            let before = std::fs::File::open("/etc/hostname").is_ok();
            let abi = forbid_paths().unwrap();
            (abi, before, std::fs::File::open("/etc/hostname").is_ok())
        });
        let (abi, before, after) = opened.join().unwrap();
        assert!(before);
        assert_eq!(after, abi == 0, "Landlock ABI {abi}");
    }
}
