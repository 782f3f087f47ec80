//! From `exec` to the locked phase.
//!
//! ```text
//!   exec ── harden, SIGSYS handler, Landlock ── Birth received and checked ── start-up filter
//!        ── the kind takes its grants and sets itself up ── locked filter ── Born::Locked
//! ```
//!
//! A process that cannot go on answers `Born::Failed` with the cause and ends. It never serves
//! anything before the locked filter is in force. The same code runs in device processes and in
//! `bulkhead-vcpu`, which locks each of its threads by itself ([`Newborn::locks`]).

use crate::adoption::Adoption;
use crate::confine::{self, ConfineError, Locks};
use crate::control::Control;
use crate::grants::{GrantError, Grants};
use crate::wait::Waiter;
use crate::{log, sys};
use bulkhead_ipc::adoption::AdoptionSocket;
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::control_page::{ControlPage, Phase};
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::PROTOCOL_VERSION;
use bulkhead_ipc::protocol::birth::{
    ADOPTION_FD, BIRTH_FDS, Birth, Born, CONTROL_FD, DeviceConfig, DeviceOwn, FdRole, KindConfig,
    PAGE_FD, UringGrant,
};
use bulkhead_ipc::shared::SharedError;
use nix::errno::Errno;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::Duration;

/// How long a process waits for its birth message.
const BIRTH_WITHIN: Duration = Duration::from_secs(10);
/// Exit status of a process that could not start.
pub const EXIT_STILLBORN: i32 = 70;
/// The program's version as it stands in the file, behind a mark by which it can be found there.
const PROGRAM: &str = concat!("bulkhead-program=", env!("CARGO_PKG_VERSION"));
/// Longest VM name in bytes.
const VM_NAME_BYTES_MAX: usize = 64;

/// Why a process could not start.
#[derive(Debug, thiserror::Error)]
pub enum Stillbirth {
    /// A descriptor that the launcher places is not there.
    #[error(
        "descriptor {fd} is missing: this program is started by `bulkhead`, not by hand ({errno})"
    )]
    Descriptor {
        /// Its number.
        fd: i32,
        /// Why.
        errno: Errno,
    },
    /// The process could not be hardened.
    #[error("hardening the process: {0}")]
    Harden(Errno),
    /// The control page is not usable.
    #[error("control page: {0}")]
    Page(#[from] SharedError),
    /// A wall could not be put up.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// The birth message did not come or was not understood.
    #[error("birth message: {0}")]
    Channel(#[from] ChannelError),
    /// The broker speaks another version.
    #[error("the broker speaks protocol version {got}, this process {PROTOCOL_VERSION}")]
    Version {
        /// The broker's.
        got: u32,
    },
    /// The birth is another kind's.
    #[error("born as {got}, but this program is {expected}")]
    Kind {
        /// What the message says.
        got: ProcId,
        /// What the program is.
        expected: ProcKind,
    },
    /// A field of the birth message is out of range.
    #[error("birth message: {field} is {got}, expected {expected}")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        got: String,
        /// What is acceptable.
        expected: &'static str,
    },
    /// The descriptors are not those of the policy.
    #[error("grants: {0}")]
    Grants(#[from] GrantError),
    /// The kind could not set itself up.
    #[error("{0}")]
    Setup(String),
}

impl Stillbirth {
    /// A failure of a kind's own set-up.
    #[must_use]
    pub fn setup(cause: impl std::fmt::Display) -> Self {
        Self::Setup(cause.to_string())
    }
}

/// A process in its start-up phase.
#[derive(Debug)]
pub struct Newborn {
    /// Who it is.
    pub id: ProcId,
    /// The VM it belongs to.
    pub vm: String,
    /// What it is to do.
    pub config: KindConfig,
    /// The io_uring operations it may register.
    pub uring: UringGrant,
    /// Its descriptors; all must be taken before it locks itself.
    pub grants: Grants,
    /// The control channel.
    pub channel: Channel,
    /// The filters of its threads.
    pub locks: Locks,
    /// CPUs that it may run on.
    pub cpus: usize,
    /// Until it is taken.
    adoption: Option<Adoption>,
    page: &'static ControlPage,
    landlock_abi: u8,
}

impl Newborn {
    /// Hardens the process, receives the birth message of a `kind` and enters the start-up phase.
    /// Call it first of all, before anything makes a descriptor or a thread.
    ///
    /// # Errors
    /// [`Stillbirth`]; the broker has been told where that was possible. Leave with
    /// [`EXIT_STILLBORN`].
    pub fn receive(kind: ProcKind) -> Result<Self, Stillbirth> {
        sys::share_heap();
        if kind != ProcKind::Vcpu {
            // The kernels that vCPU processes unpack should not stay in their heaps.
            sys::settle_heap(match kind {
                ProcKind::Vsock => CONNECTIONS_HEAP_BYTES,
                ProcKind::Fs => FOLDER_HEAP_BYTES,
                ProcKind::Switch => NETWORK_HEAP_BYTES,
                _ => HEAP_BYTES,
            });
        }
        sys::harden().map_err(Stillbirth::Harden)?;
        sys::prefer_short_slices();
        let adopt = |fd| sys::adopt(fd).map_err(|errno| Stillbirth::Descriptor { fd, errno });
        let channel = Channel::from(adopt(CONTROL_FD)?);
        let page = adopt(PAGE_FD)?;
        let socket = AdoptionSocket::from(adopt(ADOPTION_FD)?);
        log::on_panic();
        Self::receive_on(&channel, page, socket, kind)
            .inspect_err(|cause| tell(&channel, cause))
            .map(|born| born(channel))
    }

    fn receive_on(
        channel: &Channel,
        page: OwnedFd,
        socket: AdoptionSocket,
        kind: ProcKind,
    ) -> Result<impl FnOnce(Channel) -> Self + use<>, Stillbirth> {
        let kept_page = page.try_clone().map_err(Stillbirth::setup)?;
        let page = ControlPage::map(page)?;
        let page = sys::report_denials(page).map_err(Stillbirth::Harden)?;
        page.set_phase(Phase::Exec);
        let cpus = sys::cpus();
        // A process that shares a folder has to be given that first; until then its root is empty.
        let early = match kind {
            ProcKind::Fs => None,
            _ => Some(confine::forbid_paths()?),
        };
        // The last moment at which a broker that dies takes the process with it: until now the far
        // end of the channel is the broker's alone.
        let (birth, fds) = channel.recv_within::<Birth>(BIRTH_WITHIN)?;
        check(&birth, kind)?;
        let kept = kept(fds, kept_page)?;
        log::start(birth.id, &birth.vm);
        let grants = Grants::adopt(&birth.grants, &kept)?;
        let landlock_abi = match early {
            Some(abi) => abi,
            None => permit_folder(&birth.config, &grants)?,
        };
        confine::install("start-up", &birth.startup)?;
        page.set_phase(Phase::Startup);
        Ok(move |channel| Self {
            id: birth.id,
            vm: birth.vm,
            config: birth.config,
            uring: birth.uring,
            grants,
            channel,
            locks: Locks::new(birth.locked),
            cpus,
            adoption: Some(Adoption::new(
                socket,
                birth.token,
                birth.id,
                landlock_abi,
                kept,
            )),
            page,
            landlock_abi,
        })
    }

    /// Locks the calling thread as `main` and tells the broker. For single-threaded processes. Ends the
    /// process as [`Self::fail`] does when a grant was not taken or the filter is refused.
    ///
    /// # Errors
    /// [`Stillbirth::Channel`] when the broker is gone.
    pub fn lock(self) -> Result<(Control, ProcId), Stillbirth> {
        let Self {
            id,
            adoption,
            grants,
            channel,
            locks,
            page,
            landlock_abi,
            ..
        } = self;
        let taken = grants.finish().map_err(Stillbirth::from);
        bulkhead_ipc::shed::start_up_code();
        let locked = taken.and_then(|()| Ok(locks.lock_thread("main")?));
        if let Err(cause) = locked {
            fail(&channel, &cause);
        }
        announce(&channel, page, landlock_abi)?;
        Ok((Control::new(channel, adoption), id))
    }

    /// Has `waiter` report under `token` whatever brokers say: over the control channel, or at the
    /// adoption socket. [`Control::listen`] attends to both.
    ///
    /// # Errors
    /// [`Stillbirth::Setup`] with the kernel's errno.
    pub fn watch_brokers(&self, waiter: &Waiter, token: u8) -> Result<(), Stillbirth> {
        let watched = waiter.watch(&self.channel, token);
        let watched = watched.and_then(|()| match &self.adoption {
            Some(adoption) => waiter.watch(adoption, token),
            None => Ok(()),
        });
        watched.map_err(Stillbirth::setup)
    }

    /// What it keeps for later brokers, for a process that attends to them by itself. There is one.
    pub const fn take_adoption(&mut self) -> Option<Adoption> {
        self.adoption.take()
    }

    /// Tells the broker that every thread is locked. For processes that lock their threads by
    /// themselves; the control channel stays theirs.
    ///
    /// # Errors
    /// [`Stillbirth::Channel`] when the broker is gone.
    pub fn announce_locked(&self) -> Result<(), Stillbirth> {
        announce(&self.channel, self.page, self.landlock_abi)
    }

    /// Tells the broker that the process could not set itself up, and ends it.
    pub fn fail(&self, cause: &Stillbirth) -> ! {
        fail(&self.channel, cause)
    }
}

/// Leaves at once: where debug assertions are on, descriptors that are dropped make calls that not even the
/// start-up is granted.
fn fail(channel: &Channel, cause: &Stillbirth) -> ! {
    tell(channel, cause);
    sys::leave(EXIT_STILLBORN)
}

/// Has a process that has received its birth message, or has not, do what it is for: `life` returns its exit
/// status, or leaves with it where what it would drop needs calls that the process has no more.
pub fn live_out(
    newborn: Result<Newborn, Stillbirth>,
    life: impl FnOnce(Newborn) -> Result<i32, Stillbirth>,
) -> ExitCode {
    match newborn.and_then(life) {
        Ok(status) => sys::leave(status),
        Err(cause) => {
            log::line(&cause.to_string());
            sys::leave(EXIT_STILLBORN)
        }
    }
}

/// Heap that a process can use without asking the kernel: a control message with its buffer, and
/// what its queues keep.
const HEAP_BYTES: i32 = 1 << 20;
/// The same of a socket device, which keeps 64 KiB for each of a thousand clients that do not read, in blocks
/// that have grown to that size.
const CONNECTIONS_HEAP_BYTES: i32 = 160 << 20;
/// The same of a folder's process, which may ask for more: what it keeps of names is up to its guest.
const FOLDER_HEAP_BYTES: i32 = 256 << 10;
/// The same of a switch: what it keeps for each of its ports has a limit, all together a few MiB.
const NETWORK_HEAP_BYTES: i32 = 32 << 20;

/// Version of this program.
fn program_version() -> &'static str {
    // Read from the file as it is, mark included.
    let text = std::hint::black_box(PROGRAM);
    text.split_once('=').map_or(text, |(_, version)| version)
}

fn announce(channel: &Channel, page: &ControlPage, landlock_abi: u8) -> Result<(), Stillbirth> {
    page.set_phase(Phase::Locked);
    let born = Born::Locked {
        version: PROTOCOL_VERSION,
        landlock_abi,
        program: program_version().to_owned(),
    };
    Ok(channel.send(&born, &[])?)
}

/// What goes to a later broker, in the order of `Adopted`.
fn kept(fds: Vec<OwnedFd>, page: OwnedFd) -> Result<Vec<OwnedFd>, Stillbirth> {
    let fds: [OwnedFd; BIRTH_FDS] = fds.try_into().map_err(|fds: Vec<_>| Stillbirth::Field {
        field: "descriptors",
        got: fds.len().to_string(),
        expected: "the far end of the control channel, the log",
    })?;
    let [far, log] = fds;
    Ok(vec![far, page, log])
}

fn tell(channel: &Channel, cause: &Stillbirth) {
    let reason = cause.to_string();
    log::line(&reason);
    // The broker may be gone, which is why the process ends; there is nobody else to tell.
    let _sent = channel.send(&Born::Failed { reason }, &[]);
}

/// Lets a process that shares a folder use what is below that, and nothing else.
fn permit_folder(config: &KindConfig, grants: &Grants) -> Result<u8, Stillbirth> {
    let read_only = match config {
        KindConfig::Device(DeviceConfig {
            own: DeviceOwn::Fs { read_only, .. },
            ..
        }) => *read_only,
        _ => return Err(Stillbirth::setup("no configuration of a shared folder")),
    };
    let folder = grants.look(FdRole::Folder, 0)?;
    Ok(confine::permit_folder(folder, read_only)?)
}

fn check(birth: &Birth, kind: ProcKind) -> Result<(), Stillbirth> {
    if birth.version != PROTOCOL_VERSION {
        return Err(Stillbirth::Version { got: birth.version });
    }
    let config_kind = match &birth.config {
        KindConfig::Vcpu(_) => ProcKind::Vcpu,
        KindConfig::Legacy(_) => ProcKind::Legacy,
        KindConfig::Image(_) => ProcKind::Image,
        KindConfig::Switch(_) => ProcKind::Switch,
        KindConfig::Device(device) => device.kind.proc_kind(),
    };
    if birth.id.kind != kind || config_kind != kind {
        return Err(Stillbirth::Kind {
            got: ProcId {
                kind: config_kind,
                ..birth.id
            },
            expected: kind,
        });
    }
    if birth.id.generation == 0 {
        return Err(Stillbirth::Field {
            field: "generation",
            got: "0".to_owned(),
            expected: "1 or more",
        });
    }
    if birth.vm.is_empty() || birth.vm.len() > VM_NAME_BYTES_MAX {
        return Err(Stillbirth::Field {
            field: "vm",
            got: format!("{} bytes long", birth.vm.len()),
            expected: "1 to 64 bytes",
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::device_kind::VirtioKind;
    use bulkhead_ipc::protocol::birth::Filter;

    fn birth() -> Birth {
        Birth {
            version: PROTOCOL_VERSION,
            id: ProcId {
                kind: ProcKind::Rng,
                index: 0,
                generation: 1,
            },
            vm: "t".to_owned(),
            token: [0; 32],
            grants: Vec::new(),
            startup: Filter::default(),
            locked: Vec::new(),
            uring: UringGrant::default(),
            config: KindConfig::Device(DeviceConfig {
                kind: VirtioKind::Rng,
                queue_sizes: vec![64],
                window_bytes: 1 << 20,
                features: 0,
                config: Vec::new(),
                own: DeviceOwn::Rng,
            }),
        }
    }

    #[test]
    fn birth_of_the_right_kind_is_accepted() {
        check(&birth(), ProcKind::Rng).unwrap();
    }

    #[test]
    fn birth_of_another_kind_or_version_is_refused() {
        assert!(matches!(
            check(&birth(), ProcKind::Blk),
            Err(Stillbirth::Kind { .. })
        ));
        let mut crossed = birth();
        crossed.id.kind = ProcKind::Blk;
        assert!(matches!(
            check(&crossed, ProcKind::Blk),
            Err(Stillbirth::Kind { .. })
        ));
        let mut old = birth();
        old.version = 0;
        assert!(matches!(
            check(&old, ProcKind::Rng),
            Err(Stillbirth::Version { got: 0 })
        ));
    }

    #[test]
    fn birth_with_fields_out_of_range_is_refused() {
        let mut unborn = birth();
        unborn.id.generation = 0;
        assert!(check(&unborn, ProcKind::Rng).is_err());
        let mut nameless = birth();
        nameless.vm = "x".repeat(65);
        assert!(check(&nameless, ProcKind::Rng).is_err());
    }
}
