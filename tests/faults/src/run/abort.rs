//! A harness that is told to end takes everything with it: the processes of its hosts, its mounts, its
//! directories.

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// What there is to be taken away.
static TAKEN: Mutex<Vec<Thing>> = Mutex::new(Vec::new());

#[derive(Debug, Clone)]
enum Thing {
    /// A directory; processes whose programs are in it are killed.
    Directory(PathBuf),
    /// A mount of the harness's own.
    Mount(PathBuf),
    /// A network namespace.
    Namespace(PathBuf),
}

fn remember(thing: Thing) {
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    taken.push(thing);
}

/// A directory of this run.
pub(super) fn directory(path: &Path) {
    remember(Thing::Directory(path.to_owned()));
}

/// A mount of this run.
pub(super) fn mount(path: &Path) {
    remember(Thing::Mount(path.to_owned()));
}

/// A network namespace of this run.
pub(super) fn namespace(path: &Path) {
    remember(Thing::Namespace(path.to_owned()));
}

/// Everything of the run is gone.
pub(super) fn forget() {
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    taken.clear();
}

/// Cleans up at SIGINT and SIGTERM, then calls `end`. To be called before there are other threads.
///
/// # Errors
/// The kernel's, when signals cannot be waited for.
pub fn clean_up_at_signals(end: impl FnOnce() + Send + 'static) -> nix::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            clean_up();
            end();
        }
    });
    Ok(())
}

fn clean_up() {
    let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner).clone();
    // Twice: a broker may have started another process meanwhile.
    for thing in taken.iter().chain(&taken) {
        match thing {
            Thing::Directory(path) => {
                kill_all_of(path);
                let _best_effort = fs::remove_dir_all(path);
            }
            Thing::Namespace(path) => crate::network::remove(path),
            Thing::Mount(path) => {
                let _gone = umount2(path, MntFlags::MNT_DETACH);
                let _gone = fs::remove_dir(path);
            }
        }
    }
}

fn kill_all_of(directory: &Path) {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let program = fs::read_link(entry.path().join("exe"));
        let pid = entry.file_name().to_str().and_then(|pid| pid.parse().ok());
        let (Ok(program), Some(pid)) = (program, pid) else {
            continue;
        };
        if program.starts_with(directory) {
            let _dead = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}
