//! The end of the guest.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_ipc::protocol::agent::{Failure, FailureKind, Power};
use nix::sys::reboot::{RebootMode, reboot};
use std::path::Path;
use std::process::{Command, Stdio};

/// Where systemd says that it runs.
const SYSTEMD: &str = "/run/systemd/system";
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Begins to shut down.
pub(super) fn end(how: Power, force: bool) -> Result<(), Failure> {
    if force {
        nix::unistd::sync();
        let mode = match how {
            Power::Off => RebootMode::RB_POWER_OFF,
            Power::Reboot => RebootMode::RB_AUTOBOOT,
        };
        let Err(errno) = reboot(mode);
        return Err(Failure::new(FailureKind::Denied, errno.desc()));
    }
    let word = match how {
        Power::Off => "poweroff",
        Power::Reboot => "reboot",
    };
    let (program, arguments) = match Path::new(SYSTEMD).exists() {
        true => ("systemctl", vec!["--no-block", word]),
        // The program of the same name has init do it.
        false => (word, Vec::new()),
    };
    let places = DIRECTORIES.map(|directory| Path::new(directory).join(program));
    let place = places.into_iter().find(|place| place.exists());
    let place = place.ok_or_else(|| {
        let text = format!("the guest has no program {program}; try --force");
        Failure::new(FailureKind::Unsupported, text)
    })?;
    #[expect(clippy::disallowed_methods, reason = "a program of the guest")]
    let mut command = Command::new(place);
    command.args(arguments).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let done = command.status();
    match done {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::new(
            FailureKind::Other,
            format!("{program}: {status}"),
        )),
        Err(error) => Err(Failure::new(
            FailureKind::Other,
            format!("{program}: {error}"),
        )),
    }
}
