//! Makes a guest another one than that which it was copied from.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::sys;
use bulkhead_ipc::protocol::agent::{
    Mac, Outcome, Reidentify, SEED_BYTES_MAX, Step, What, text_of,
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Longest host name that the kernel takes.
const HOSTNAME_BYTES_MAX: usize = 64;
const KEYS: &str = "/etc/ssh";
/// Where new keys are made, before they take the place of the old ones.
const NEW_KEYS: &str = "/etc/ssh/.bulkhead-new";

type Done = Result<Outcome, String>;

/// Does what is asked for, and says how each step went.
pub(super) fn reidentify(wish: Reidentify) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut add = |what, done: Option<Done>| {
        if let Some(done) = done {
            let outcome = done.unwrap_or_else(|why| Outcome::Failed(text_of(&why)));
            steps.push(Step { what, outcome });
        }
    };
    // First of all what the others may need.
    add(What::Seed, wish.seed.map(|seed| seed_with(&seed)));
    add(
        What::MachineId,
        wish.machine_id.map(|id| machine_id(&id, Path::new("/"))),
    );
    add(What::Hostname, wish.hostname.map(|name| hostname(&name)));
    add(What::SshHostKeys, wish.ssh_host_keys.then(ssh_host_keys));
    add(What::Mac, wish.mac.map(|mac| set_mac(&mac)));
    steps
}

fn told<T>(doing: impl std::fmt::Display, done: io::Result<T>) -> Result<T, String> {
    done.map_err(|error| format!("{doing}: {error}"))
}

fn seed_with(seed: &[u8]) -> Done {
    if seed.is_empty() || seed.len() > SEED_BYTES_MAX {
        return Err(format!("expected 1 to {SEED_BYTES_MAX} bytes"));
    }
    let device = "/dev/random";
    let random = told(device, OpenOptions::new().write(true).open(device))?;
    sys::credit(random, seed).map_err(|errno| errno.desc().to_owned())?;
    Ok(Outcome::Done)
}

/// Replaces a file as a whole. A link in its place is replaced and not followed.
fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), String> {
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(".bulkhead-new");
    let hidden = PathBuf::from(hidden);
    // What is left of an agent that was killed.
    let _left = fs::remove_file(&hidden);
    let write = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&hidden)?;
        file.write_all(content)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&hidden, path)
    };
    told(path.display(), write())
}

fn machine_id(id: &str, root: &Path) -> Done {
    let digits = id
        .bytes()
        .all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'));
    if id.len() != 32 || !digits {
        return Err("expected 32 hexadecimal digits".to_owned());
    }
    let line = format!("{id}\n");
    replace(&root.join("etc/machine-id"), line.as_bytes(), 0o444)?;
    // D-Bus has a copy of it, or a link to it.
    let copy = root.join("var/lib/dbus/machine-id");
    if fs::symlink_metadata(&copy).is_ok_and(|found| found.is_file()) {
        replace(&copy, line.as_bytes(), 0o444)?;
    }
    Ok(Outcome::Done)
}

fn is_hostname(name: &str) -> bool {
    let plain = |label: &str| {
        let inner = label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-');
        (1..=63).contains(&label.len()) && inner && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= HOSTNAME_BYTES_MAX && name.split('.').all(plain)
}

fn hostname(name: &str) -> Done {
    if !is_hostname(name) {
        return Err("expected letters, digits, '-' and '.', at most 64".to_owned());
    }
    nix::unistd::sethostname(name).map_err(|errno| errno.desc().to_owned())?;
    replace(
        Path::new("/etc/hostname"),
        format!("{name}\n").as_bytes(),
        0o644,
    )?;
    Ok(Outcome::Done)
}

fn ssh_host_keys() -> Done {
    let places = [
        "/usr/bin/ssh-keygen",
        "/usr/local/bin/ssh-keygen",
        "/bin/ssh-keygen",
    ];
    let Some(program) = places.into_iter().find(|place| Path::new(place).exists()) else {
        return Ok(Outcome::Skipped("there is no ssh-keygen".to_owned()));
    };
    if !Path::new(KEYS).is_dir() {
        return Ok(Outcome::Skipped(format!("there is no {KEYS}")));
    }
    // `ssh-keygen -A -f PREFIX` writes to PREFIX/etc/ssh.
    let _left = fs::remove_dir_all(NEW_KEYS);
    let made = PathBuf::from(format!("{NEW_KEYS}{KEYS}"));
    told("making a folder", fs::create_dir_all(&made))?;
    told(
        "closing it",
        fs::set_permissions(NEW_KEYS, Permissions::from_mode(0o700)),
    )?;
    let done = make_keys(program, &made);
    let _removed = fs::remove_dir_all(NEW_KEYS);
    done?;
    reload();
    Ok(Outcome::Done)
}

fn make_keys(program: &str, made: &Path) -> Result<(), String> {
    #[expect(clippy::disallowed_methods, reason = "a program of the guest")]
    let mut command = Command::new(program);
    command.args(["-A", "-f", NEW_KEYS]).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let status = told(program, command.status())?;
    if !status.success() {
        return Err(format!("{program}: {status}"));
    }
    let is_key = |name: &str| name.starts_with("ssh_host_") && name.contains("_key");
    let names = |folder: &Path| -> Result<Vec<String>, String> {
        let entries = told(folder.display(), fs::read_dir(folder))?.flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.filter(|name| is_key(name)).collect())
    };
    let new = names(made)?;
    if new.is_empty() {
        return Err(format!("{program} has made no keys"));
    }
    for old in names(Path::new(KEYS))? {
        // A key of a kind that is not made any more must not stay.
        if !new.contains(&old) {
            told(&old, fs::remove_file(Path::new(KEYS).join(&old)))?;
        }
    }
    for name in new {
        told(
            &name,
            fs::rename(made.join(&name), Path::new(KEYS).join(&name)),
        )?;
    }
    Ok(())
}

/// Has a running SSH server read its new keys. One that is not there needs none.
fn reload() {
    let pid = fs::read_to_string("/run/sshd.pid").ok();
    let pid = pid
        .and_then(|pid| pid.trim().parse().ok())
        .filter(|&pid| pid > 1);
    let Some(pid) = pid else { return };
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if name.trim() == "sshd" {
        let signal = nix::sys::signal::Signal::SIGHUP;
        let _gone = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
    }
}

fn set_mac(mac: &Mac) -> Done {
    // A group address is nobody's, and neither is none at all.
    if mac.address == [0; 6] || mac.address.first().is_none_or(|first| first & 1 == 1) {
        return Err("expected the address of one station".to_owned());
    }
    if !Path::new("/sys/class/net").join(&mac.interface).exists() || mac.interface.contains('/') {
        return Ok(Outcome::Skipped(format!(
            "there is no interface {}",
            mac.interface
        )));
    }
    let flags = SockFlag::SOCK_CLOEXEC;
    let made = socket(AddressFamily::Inet, SockType::Datagram, flags, None);
    let made = made.map_err(|errno| errno.desc().to_owned())?;
    sys::set_mac(made, &mac.interface, mac.address).map_err(|errno| errno.desc().to_owned())?;
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_done_that_is_not_asked_for() {
        assert!(reidentify(Reidentify::default()).is_empty());
    }

    #[test]
    fn values_that_cannot_be_are_refused_before_anything_is_changed() {
        let wish = Reidentify {
            seed: Some(vec![0; SEED_BYTES_MAX + 1]),
            machine_id: Some("not-a-machine-id".to_owned()),
            hostname: Some("-x".to_owned()),
            ssh_host_keys: false,
            mac: Some(Mac {
                interface: "lo".to_owned(),
                address: [1, 2, 3, 4, 5, 6],
            }),
        };
        let steps = reidentify(wish);
        assert_eq!(steps.len(), 4);
        for step in steps {
            assert!(matches!(step.outcome, Outcome::Failed(_)), "{step:?}");
        }
    }

    #[test]
    fn names_of_hosts() {
        let long = "x".repeat(64);
        for good in ["web", "web-1.example.org", "7"] {
            assert!(is_hostname(good), "{good}");
        }
        for bad in ["", ".", "a..b", "a b", "-a", "a-", "a/b", "\u{e9}", &long] {
            assert!(!is_hostname(bad), "{bad}");
        }
    }

    #[test]
    fn machine_id_takes_the_place_of_a_link_without_following_it() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        fs::create_dir(&etc).unwrap();
        fs::write(root.path().join("other"), b"kept").unwrap();
        std::os::unix::fs::symlink(root.path().join("other"), etc.join("machine-id")).unwrap();
        let id = "0123456789abcdef0123456789abcdef";
        assert_eq!(machine_id(id, root.path()), Ok(Outcome::Done));
        assert_eq!(fs::read(root.path().join("other")).unwrap(), b"kept");
        let written = fs::read_to_string(etc.join("machine-id")).unwrap();
        assert_eq!(written, format!("{id}\n"));
    }
}
