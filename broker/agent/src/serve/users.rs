//! Users of the guest, from its files: a static program has no other way to look them up.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_ipc::protocol::agent::{Failure, FailureKind};
use nix::unistd::{Gid, Uid};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Largest part of such a file that is read.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Somebody that a command may run as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
    pub(super) shell: String,
    /// Whether a command has to change to it.
    pub(super) change: bool,
}

impl Account {
    /// What a new process becomes; `None` when it is that already.
    pub(super) fn ids(&self) -> Option<(Uid, Gid, Vec<Gid>)> {
        let groups = self.groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
        self.change
            .then(|| (Uid::from_raw(self.uid), Gid::from_raw(self.gid), groups))
    }
}

/// The account that `user` names, or the agent's own.
pub(super) fn account(user: Option<&str>) -> Result<Account, Failure> {
    let read = |path: &str| {
        let mut text = Vec::new();
        let file = File::open(Path::new(path)).map(|file| file.take(FILE_BYTES_MAX));
        // A guest may have no users but root, and no file of them.
        let _missing = file.and_then(|mut file| file.read_to_end(&mut text));
        String::from_utf8_lossy(&text).into_owned()
    };
    let (passwd, group) = (read("/etc/passwd"), read("/etc/group"));
    find(user, &passwd, &group, nix::unistd::geteuid().as_raw())
}

fn find(user: Option<&str>, passwd: &str, group: &str, me: u32) -> Result<Account, Failure> {
    let not_found = |what: &str, name: &str| {
        Failure::new(FailureKind::NotFound, format!("there is no {what} {name}"))
    };
    let (name, of_group) = match user.map(|user| user.split_once(':')) {
        Some(Some((name, group))) => (Some(name), Some(group)),
        Some(None) => (user, None),
        None => (None, None),
    };
    let number = match name {
        Some(name) => name.parse().ok(),
        None => Some(me),
    };
    let known = passwd.lines().filter_map(entry).find(|found| match number {
        Some(uid) => found.uid == uid,
        None => Some(found.name.as_str()) == name,
    });
    let mut account = match (known, number) {
        (Some(known), _) => known,
        (None, Some(uid)) => Account {
            name: uid.to_string(),
            uid,
            gid: uid,
            groups: Vec::new(),
            home: if uid == 0 { "/root" } else { "/" }.to_owned(),
            shell: "/bin/sh".to_owned(),
            change: false,
        },
        (None, None) => return Err(not_found("user", name.unwrap_or_default())),
    };
    account.change = name.is_some();
    account.groups = groups_of(group, &account.name);
    if let Some(wanted) = of_group {
        let known = || group.lines().find_map(|line| gid_of(line, wanted));
        let gid = wanted.parse().ok().or_else(known);
        account.gid = gid.ok_or_else(|| not_found("group", wanted))?;
        account.groups.clear();
    }
    account.groups.insert(0, account.gid);
    Ok(account)
}

/// `name:password:uid:gid:comment:home:shell`
fn entry(line: &str) -> Option<Account> {
    let mut fields = line.split(':');
    let name = fields.next()?.to_owned();
    let mut fields = fields.skip(1);
    let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let mut fields = fields.skip(1);
    let or = |text: Option<&str>, other: &str| {
        let text = text.filter(|text| !text.is_empty());
        text.unwrap_or(other).to_owned()
    };
    Some(Account {
        name,
        uid,
        gid,
        groups: Vec::new(),
        home: or(fields.next(), "/"),
        shell: or(fields.next(), "/bin/sh"),
        change: false,
    })
}

/// `name:password:gid:member,member`
fn gid_of(line: &str, name: &str) -> Option<u32> {
    let mut fields = line.split(':');
    (fields.next() == Some(name)).then_some(())?;
    fields.nth(1)?.parse().ok()
}

fn groups_of(group: &str, user: &str) -> Vec<u32> {
    let lines = group.lines().filter_map(|line| {
        let mut fields = line.split(':').skip(2);
        let gid = fields.next()?.parse().ok()?;
        let members = fields.next()?;
        members
            .split(',')
            .any(|member| member == user)
            .then_some(gid)
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n# a comment\nbroken\n\
                          web:x:33:34:,,,:/var/www:\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nadm:x:4:syslog,web\nssl:x:5:webmaster\n";

    fn of(user: Option<&str>) -> Result<Account, Failure> {
        find(user, PASSWD, GROUP, 0)
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let web = of(Some("web")).unwrap();
        assert_eq!((web.uid, web.gid, &web.groups), (33, 34, &vec![34, 4]));
        assert_eq!(
            (web.home.as_str(), web.shell.as_str()),
            ("/var/www", "/bin/sh")
        );
        assert_eq!(of(Some("33")).unwrap(), web);
        assert!(web.ids().is_some());
        let same = of(Some("web:www")).unwrap();
        assert_eq!((same.gid, same.groups), (34, vec![34]));
        assert_eq!(of(Some("web:77")).unwrap().gid, 77);
    }

    #[test]
    fn nobody_is_asked_for_and_nothing_changes() {
        let root = of(None).unwrap();
        assert_eq!((root.name.as_str(), root.ids()), ("root", None));
        let root = find(None, "", "", 0).unwrap();
        assert_eq!((root.home.as_str(), root.ids()), ("/root", None));
    }

    #[test]
    fn strangers_are_not_found_and_numbers_always_are() {
        for user in ["nobody", "web:nogroup", "", "# a comment"] {
            assert_eq!(of(Some(user)).unwrap_err().kind, FailureKind::NotFound);
        }
        let account = of(Some("1234")).unwrap();
        assert_eq!((account.gid, account.groups), (1234, vec![1234]));
    }
}
