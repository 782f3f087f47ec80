//! The empty namespaces that all processes without a network share.
//!
//! Making a network namespace is the dearest part of starting a process, and one that holds nothing
//! can be shared without harm: it has no interface that is up, and the mount namespace that goes
//! with it holds one empty directory that nobody can write to. Made once by a thread of the broker
//! that is thrown away, while the broker reads its command line and opens the machine's resources.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

/// The namespaces, as descriptors for `setns`.
#[derive(Debug)]
pub struct Hollow {
    /// Network.
    pub network: OwnedFd,
    /// Mounts: one empty read-only directory.
    pub root: OwnedFd,
}

/// A [`Hollow`] in the making.
#[derive(Debug)]
pub struct HollowMaker(JoinHandle<io::Result<Hollow>>);

/// One that was begun before anybody asked for it.
static BEGUN: Mutex<Option<HollowMaker>> = Mutex::new(None);

/// Begins to make one for the launcher to come, if this program may. For a command line that is
/// about to start processes: reading it takes about as long as making namespaces.
pub fn begin() {
    if nix::unistd::geteuid().is_root() {
        // Without a thread now, the launcher tries again and reports what it finds.
        *BEGUN.lock().unwrap_or_else(PoisonError::into_inner) = HollowMaker::start().ok();
    }
}

impl HollowMaker {
    /// The one that was begun, or a new one.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn begun() -> io::Result<Self> {
        let begun = BEGUN.lock().unwrap_or_else(PoisonError::into_inner).take();
        begun.map_or_else(Self::start, Ok)
    }

    fn start() -> io::Result<Self> {
        std::thread::Builder::new()
            .name("hollow".into())
            .spawn(make)
            .map(Self)
    }

    /// Waits for it; it is a matter of a millisecond and depends on no peer.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn finish(self) -> io::Result<Hollow> {
        match self.0.join() {
            Ok(made) => made,
            Err(_) => Err(io::Error::other("the thread that makes namespaces died")),
        }
    }
}

fn make() -> io::Result<Hollow> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    let network = File::open("/proc/thread-self/ns/net")?.into();
    let root = File::open("/proc/thread-self/ns/mnt")?.into();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = Some("size=4k,nr_inodes=2,mode=0555");
    // Any directory that every host has will do: it is the root a moment later.
    mount(Some("hollow"), "/proc", Some("tmpfs"), flags, options)?;
    chdir("/proc")?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(Hollow { network, root })
}
