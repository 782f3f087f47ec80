//! The program `bulkhead-vcpu` itself, born as the launcher would: descriptors at fixed numbers, a
//! process id of 1, the filters of its policy.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Duration;

use bulkhead_ipc::adoption::{bind_in, knock};
use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::control_page::{CONTROL_PAGE_BYTES, ControlPage};
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::PROTOCOL_VERSION;
use bulkhead_ipc::protocol::adopt::{Adopt, Adopted};
use bulkhead_ipc::protocol::birth::{
    ADOPTION_FD, Birth, Born, CONTROL_FD, FIRST_GRANT_FD, FdRole, Grant, KindConfig, PAGE_FD,
    VcpuConfig,
};
use bulkhead_ipc::shared::sealed_memfd;
use bulkhead_vcpu::setup::Resources;

/// The program, and the page on which it says what it was denied.
pub(crate) struct Program {
    child: Child,
    page: ControlPage,
    home: tempfile::TempDir,
}

const TOKEN: [u8; 32] = [3; 32];

impl Program {
    /// Whether it has ended, which it does successfully or not at all.
    pub(crate) fn is_over(&mut self) -> bool {
        let status = self.child.try_wait().unwrap();
        status.is_some_and(|status| {
            assert!(status.success(), "{status}: {self:?}");
            true
        })
    }

    /// Adopts it: its control channel.
    pub(crate) fn adopt(&self) -> Channel {
        let adopt = Adopt {
            version: PROTOCOL_VERSION,
            token: TOKEN,
        };
        let directory = File::open(self.home.path()).unwrap();
        let answer = knock(directory.as_fd(), "socket", &adopt).unwrap();
        let patience = Duration::from_secs(20);
        let (adopted, mut fds) = answer.recv_within::<Adopted>(patience).unwrap();
        assert_eq!(adopted.id.kind, ProcKind::Vcpu);
        Channel::from(fds.remove(0))
    }
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "program denied {:?}", self.page.denial())
    }
}

/// Starts the program and waits until it is locked.
pub(crate) fn start(
    config: VcpuConfig,
    resources: Resources,
    broker: &Channel,
    process: Channel,
) -> Program {
    let page = sealed_memfd("control-page", CONTROL_PAGE_BYTES).unwrap();
    let grants = grants(resources);
    let home = tempfile::tempdir().unwrap();
    let directory = File::open(home.path()).unwrap();
    let socket = bind_in(directory.as_fd(), "socket").unwrap();
    let mut targets: Vec<(RawFd, RawFd)> = vec![
        (process.as_raw_fd(), CONTROL_FD),
        (page.as_raw_fd(), PAGE_FD),
        (socket.as_fd().as_raw_fd(), ADOPTION_FD),
    ];
    let numbers = FIRST_GRANT_FD..;
    targets.extend(grants.iter().map(|grant| grant.2.as_raw_fd()).zip(numbers));
    let child = spawn(targets);
    let log = File::open("/dev/null").unwrap();
    let far_ends = [broker.as_fd(), log.as_fd()];
    broker.send(&birth(config, &grants), &far_ends).unwrap();
    // From here on only the program holds its ends.
    drop((process, grants));
    let page = ControlPage::map(page).unwrap();
    let patience = Duration::from_secs(20);
    match broker.recv_within::<Born>(patience) {
        Ok((Born::Locked { .. }, _)) => Program { child, page, home },
        other => panic!("{other:?}, denied {:?}", page.denial()),
    }
}

#[expect(clippy::disallowed_methods, reason = "this test is the launcher")]
fn spawn(targets: Vec<(RawFd, RawFd)>) -> Child {
    let mut command = Command::new("unshare");
    command.args([
        "--user",
        "--map-root-user",
        "--pid",
        "--fork",
        "--kill-child",
    ]);
    if let Some(trace) = std::env::var_os("BULKHEAD_TEST_STRACE") {
        command.args(["strace", "-f", "-o"]).arg(trace);
    }
    command.arg(env!("CARGO_BIN_EXE_bulkhead-vcpu"));
    // SAFETY: between fork and exec only descriptors are copied, in memory that exists already.
    unsafe { command.pre_exec(move || place(&targets)) };
    command.spawn().expect("`unshare` of util-linux is needed")
}

/// Copies descriptors to their numbers; above all of them first, so that none is overwritten
/// before it is copied.
fn place(targets: &[(RawFd, RawFd)]) -> std::io::Result<()> {
    let numbers = targets.iter().map(|&(from, to)| from.max(to));
    let first_free = numbers.max().unwrap_or(0) + 1;
    let copy = |from, to| match nix::errno::Errno::result(copy_fd(from, to)) {
        Ok(_) => Ok(()),
        Err(errno) => Err(std::io::Error::from(errno)),
    };
    for (&(from, _), high) in targets.iter().zip(first_free..) {
        copy(from, high)?;
    }
    for (&(_, to), high) in targets.iter().zip(first_free..) {
        copy(high, to)?;
    }
    Ok(())
}

fn copy_fd(from: RawFd, to: RawFd) -> libc::c_int {
    // SAFETY: dup2 takes two integers; the number `to` belongs to nobody between fork and exec.
    unsafe { libc::dup2(from, to) }
}

fn birth(config: VcpuConfig, grants: &[(FdRole, u16, OwnedFd)]) -> Birth {
    let policy = bulkhead_policies::load(ProcKind::Vcpu, None, false).unwrap();
    let filters = bulkhead_policies::compile(&policy).unwrap();
    let numbered = grants.iter().zip(FIRST_GRANT_FD..);
    Birth {
        version: PROTOCOL_VERSION,
        id: ProcId {
            kind: ProcKind::Vcpu,
            index: 0,
            generation: 1,
        },
        vm: "test".to_owned(),
        token: TOKEN,
        grants: numbered
            .map(|((role, index, _), fd)| Grant {
                role: *role,
                index: *index,
                fd,
            })
            .collect(),
        startup: filters.startup,
        locked: filters.locked,
        uring: filters.uring,
        config: KindConfig::Vcpu(config),
    }
}

fn grants(resources: Resources) -> Vec<(FdRole, u16, OwnedFd)> {
    let legacy = resources.legacy;
    let mut grants = vec![
        (FdRole::Kvm, 0, resources.kvm),
        (FdRole::Kernel, 0, resources.kernel.into()),
        (FdRole::LegacyPage, 0, legacy.page),
        (FdRole::LegacyKick, 0, legacy.kick),
        (FdRole::LegacyInterrupt, 0, legacy.interrupt),
        (FdRole::LegacyReply, 0, legacy.reply),
    ];
    grants.extend(resources.core.map(|file| (FdRole::Core, 0, file.into())));
    grants
}
