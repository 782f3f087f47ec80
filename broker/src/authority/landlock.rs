//! What Landlock denies a process, found out by trying: no file of /proc tells.
//!
//! A thread of the process is stopped for a moment and makes system calls that fail in one way under
//! Landlock, and in another way, or not at all, without (Landlock documentation, "filesystem flags" and
//! "network flags"). Its seccomp filters are suspended meanwhile: they would judge first.

use super::guided::{Guided, Outcome};
use nix::errno::Errno;
use serde::Serialize;
use std::fmt;
use std::io;

/// What Landlock denies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Landlock {
    /// Opening its own root directory, which its user may read.
    pub denies_files: bool,
    /// Binding a TCP socket to any port; `None` where the process can make no such socket.
    pub denies_tcp: Option<bool>,
}

impl fmt::Display for Landlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let denied = [
            ("files", self.denies_files),
            ("tcp", self.denies_tcp == Some(true)),
        ];
        let denied = denied
            .into_iter()
            .filter_map(|(name, is)| is.then_some(name));
        match denied.collect::<Vec<_>>().join("+") {
            none if none.is_empty() => f.write_str("nothing"),
            some => f.write_str(&some),
        }
    }
}

/// Tries it in process `pid`, whose main thread is stopped for a moment.
///
/// # Errors
/// EPERM without root, or when the caller has seccomp filters itself; ENOSYS on a kernel without
/// `CONFIG_CHECKPOINT_RESTORE`; ESRCH when the process is gone; what the process may not do for another
/// reason than Landlock.
pub fn measure(pid: i32) -> io::Result<Landlock> {
    let guided = Guided::stop_without_seccomp(pid, pid);
    let mut guided = guided.map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) => Errno::ENOSYS.into(),
        _ => e,
    })?;
    Ok(Landlock {
        denies_files: files(&mut guided)?,
        denies_tcp: tcp(&mut guided)?,
    })
}

/// A flag or number as a system call takes it; none of those used here is negative but AT_FDCWD, which
/// the kernel reads as 32 bits.
const fn word(flag: i32) -> u64 {
    flag.cast_unsigned() as u64
}

fn files(guided: &mut Guided) -> io::Result<bool> {
    let path = guided.place(b"/\0")?;
    // Landlock does not judge `faccessat2`: this is what the file's mode says.
    let may_read = [
        word(libc::AT_FDCWD),
        path,
        word(libc::R_OK),
        word(libc::AT_EACCESS),
        0,
        0,
    ];
    call(guided, libc::SYS_faccessat2, may_read)?;
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    let open = [word(libc::AT_FDCWD), path, word(flags), 0, 0, 0];
    match unless_denied(call(guided, libc::SYS_openat, open))? {
        Some(made) => close(guided, made).map(|()| false),
        None => Ok(true),
    }
}

fn tcp(guided: &mut Guided) -> io::Result<Option<bool>> {
    let stream = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    let arguments = [word(libc::AF_INET), word(stream), 0, 0, 0, 0];
    let Ok(socket) = call(guided, libc::SYS_socket, arguments) else {
        return Ok(None);
    };
    let family = u16::try_from(libc::AF_INET).unwrap_or_default();
    let mut any = [0; size_of::<libc::sockaddr_in>()];
    any[..2].copy_from_slice(&family.to_ne_bytes());
    let bound = guided.place(&any).and_then(|address| {
        let arguments = [socket, address, any.len() as u64, 0, 0, 0];
        unless_denied(call(guided, libc::SYS_bind, arguments))
    });
    close(guided, socket)?;
    bound.map(|allowed| Some(allowed.is_none()))
}

/// `None` of a call that is denied as Landlock denies files and ports.
fn unless_denied(called: io::Result<u64>) -> io::Result<Option<u64>> {
    match called {
        Err(e) if e.raw_os_error() == Some(libc::EACCES) => Ok(None),
        called => called.map(Some),
    }
}

fn close(guided: &mut Guided, descriptor: u64) -> io::Result<()> {
    call(guided, libc::SYS_close, [descriptor, 0, 0, 0, 0, 0]).map(|_| ())
}

fn call(guided: &mut Guided, number: i64, arguments: [u64; 6]) -> io::Result<u64> {
    match guided.call(number, arguments)? {
        Outcome::Returned(value) => u64::try_from(value).map_err(|_| {
            let errno = value.checked_neg().and_then(|n| i32::try_from(n).ok());
            io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO))
        }),
        Outcome::Exited(_) | Outcome::Killed(_) => Err(Errno::ESRCH.into()),
    }
}

#[cfg(test)]
#[allow(
    clippy::disallowed_methods,
    reason = "the test looks at a process of its own"
)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::process::{Child, Command, Stdio};

    struct Sleeper(Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _dead = self.0.kill();
            let _reaped = self.0.wait();
        }
    }

    #[test]
    fn a_process_without_landlock_is_denied_nothing_and_goes_on() {
        let mut cat = Command::new("cat");
        let cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut cat = Sleeper(cat.spawn().unwrap());
        let pid = cat.0.id().cast_signed();
        let (mut to, mut from) = (cat.0.stdin.take().unwrap(), cat.0.stdout.take().unwrap());
        let mut echoes = || {
            let mut back = [0; 2];
            to.write_all(b"on").unwrap();
            from.read_exact(&mut back).unwrap();
            assert_eq!(&back, b"on");
        };
        // From here on it is `cat`, with its own descriptors.
        echoes();
        let descriptors = || {
            std::fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .count()
        };
        let before = descriptors();
        let measured = measure(pid).unwrap();
        let nothing = Landlock {
            denies_files: false,
            denies_tcp: Some(false),
        };
        assert_eq!(
            (measured, measured.to_string()),
            (nothing, "nothing".into())
        );
        assert_eq!(descriptors(), before, "what was tried is closed again");
        // It was reading, and still is.
        echoes();
    }
}
