//! A real device program, born with its real policy but without namespaces, for tests of whole
//! processes.
#![allow(
    unsafe_code,
    reason = "descriptors are put into place between fork and exec"
)]

use super::gate::Gate;
use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::control_page::{CONTROL_PAGE_BYTES, ControlPage};
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::PROTOCOL_VERSION;
use bulkhead_ipc::protocol::birth::{
    ADOPTION_FD, Birth, Born, CONTROL_FD, FIRST_GRANT_FD, FdRole, Filter, Grant, KindConfig,
    PAGE_FD, ThreadFilter, UringGrant,
};
use bulkhead_ipc::protocol::device::{FromDevice, ToDevice};
use bulkhead_ipc::shared::sealed_memfd;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What a program is born with beside its descriptors.
#[derive(Debug, Clone)]
pub struct Upbringing {
    /// Who it is.
    pub id: ProcId,
    /// Filter of the start-up phase.
    pub startup: Filter,
    /// Filters of the locked phase.
    pub locked: Vec<ThreadFilter>,
    /// io_uring operations.
    pub uring: UringGrant,
    /// What it is to do.
    pub config: KindConfig,
}

#[expect(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a test that cannot set itself up fails"
)]
impl Upbringing {
    /// The first process of its kind, behind its built-in policy.
    #[must_use]
    pub fn new(kind: ProcKind, config: KindConfig) -> Self {
        let policy = bulkhead_policies::load(kind, None, false).unwrap();
        let filters = bulkhead_policies::compile(&policy).unwrap();
        Self {
            id: ProcId {
                kind,
                index: 0,
                generation: 1,
            },
            startup: filters.startup,
            locked: filters.locked,
            uring: filters.uring,
            config,
        }
    }
}

/// The program, alive.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// The broker's end of its control channel.
    pub channel: Channel,
    /// Its control page.
    pub page: ControlPage,
}

/// First number of the descriptors while they are put into place.
const ASIDE: RawFd = 200;
const PATIENCE: Duration = Duration::from_secs(30);

#[expect(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set itself up fails"
)]
impl Process {
    /// Executes `program` and sends its birth message.
    #[must_use]
    pub fn spawn(program: &str, upbringing: Upbringing, held: Vec<(FdRole, u16, OwnedFd)>) -> Self {
        let (channel, theirs) = Channel::pair().unwrap();
        let page = sealed_memfd("page", CONTROL_PAGE_BYTES).unwrap();
        let mut fds: Vec<(OwnedFd, RawFd)> = vec![
            (theirs.into(), CONTROL_FD),
            (page.try_clone().unwrap(), PAGE_FD),
            (nowhere(), ADOPTION_FD),
        ];
        let mut grants = Vec::new();
        for ((role, index, owned), fd) in held.into_iter().zip(FIRST_GRANT_FD..) {
            grants.push(Grant { role, index, fd });
            fds.push((owned, fd));
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "a test starts the program by itself"
        )]
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::piped());
        let places: Vec<(RawFd, RawFd)> =
            fds.iter().map(|(fd, to)| (fd.as_raw_fd(), *to)).collect();
        let place = move || {
            for &(from, to) in &places {
                // SAFETY: plain integers.
                if unsafe { libc::fcntl(from, libc::F_DUPFD_CLOEXEC, ASIDE + to) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            for &(_, to) in &places {
                // SAFETY: plain integers; nothing of this child owns the target numbers.
                if unsafe { libc::dup2(ASIDE + to, to) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls only; it allocates nothing and takes no lock.
        unsafe { command.pre_exec(place) };
        let child = command.spawn().unwrap();
        let birth = Birth {
            version: PROTOCOL_VERSION,
            id: upbringing.id,
            vm: "test".to_owned(),
            token: [0; 32],
            grants,
            startup: upbringing.startup,
            locked: upbringing.locked,
            uring: upbringing.uring,
            config: upbringing.config,
        };
        let log = nowhere();
        let far_ends = [channel.as_fd(), log.as_fd()];
        channel.send(&birth, &far_ends).unwrap();
        Self {
            child,
            channel,
            page: ControlPage::map(page).unwrap(),
        }
    }

    /// Its answer to the birth message; what it logged and how it ended when there is none.
    ///
    /// # Errors
    /// A description for the test's output.
    pub fn born(&mut self) -> Result<Born, String> {
        match self.channel.recv_within::<Born>(PATIENCE) {
            Ok((born, _)) => Ok(born),
            Err(error) => {
                let (status, log) = self.end();
                Err(format!(
                    "{error}; {status}; denied: {:?}; log: {log}",
                    self.page.denial()
                ))
            }
        }
    }

    /// Asserts that it has locked itself and answers.
    pub fn assert_serving(&mut self) {
        let born = self.born();
        assert!(matches!(born, Ok(Born::Locked { .. })), "{born:?}");
        self.channel.send(&ToDevice::Ping(7), &[]).unwrap();
        let answer = self.channel.recv_within::<FromDevice>(PATIENCE);
        let denial = self.page.denial();
        assert!(
            matches!(answer, Ok((FromDevice::Pong(7), _))),
            "{answer:?}; denied: {denial:?}"
        );
    }

    /// Tells it to end and asserts that it does, without a word.
    pub fn assert_ends_quietly(&mut self) {
        self.channel.send(&ToDevice::Shutdown, &[]).unwrap();
        let (status, log) = self.end();
        let denial = self.page.denial();
        assert!(status.success(), "{status}; denied: {denial:?}; {log}");
        assert_eq!(log, "");
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end; kills it when that does not come. Returns its status and log.
    pub fn end(&mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                let _gone = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let mut log = String::new();
        if let Some(mut pipe) = self.child.stderr.take() {
            pipe.read_to_string(&mut log).expect("the log is text");
        }
        (status, log)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// A socket at which nobody can knock.
#[expect(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]
fn nowhere() -> OwnedFd {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::Datagram, flags, None).unwrap()
}

/// The descriptors of a gate, as grants for its device.
#[must_use]
pub fn gate_grants(gate: &Gate) -> Vec<(FdRole, u16, OwnedFd)> {
    let (window, kick, call) = gate.device_fds();
    vec![
        (FdRole::Window, 0, window),
        (FdRole::Kick, 0, kick.into()),
        (FdRole::Call, 0, call.into()),
    ]
}
