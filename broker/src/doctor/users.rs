//! Whether each process can be a user of its own, and whether anybody else is given its id.

use super::probe::Probed;
use super::{Check, Host};
use crate::escape::excerpt;
use crate::launch::plan::USER_FALLBACK;
use crate::launch::users::UserRange;
use std::fmt::Display;

/// Where ranges of ids are handed out to users of the host (subuid(5)).
const HANDED_OUT: [&str; 2] = ["etc/subuid", "etc/subgid"];
/// Owner of a line there that keeps the range for Bulkhead.
const OWNER: &str = "bulkhead";

/// Checks the range of bulkhead.toml, or tells why there is none.
pub(super) fn check<E: Display>(
    host: &Host,
    probed: &Probed,
    users: &Result<UserRange, E>,
) -> Check {
    let id = "sandbox.users";
    let users = match users {
        Ok(users) => *users,
        Err(error) => {
            let cure = "correct bulkhead.toml in the configuration directory";
            return Check::fail(id, error.to_string(), cure);
        }
    };
    if !probed.is_root {
        let found = "not root: every process is this user, in a user namespace of its own";
        return Check::ok(id, found);
    }
    let has = |path| users.is_within(&host.text(path).unwrap_or_default());
    if !(has("proc/self/uid_map") && has("proc/self/gid_map")) {
        return Check::warn(
            id,
            format!(
                "ids {users} do not exist in this user namespace: every process is user {USER_FALLBACK}"
            ),
            "give this container those ids, or set users of [host] in bulkhead.toml to ids that it has, \
             as many as kernel.pid_max",
        );
    }
    let holders = HANDED_OUT.iter().find_map(|path| holder(host, path, users));
    match holders {
        Some((path, who)) => Check::warn(
            id,
            format!("ids {users} overlap with those of {who} in /{path}"),
            "set users of [host] in bulkhead.toml to a range that is nobody's, and keep it with a line of \
             the owner bulkhead in /etc/subuid and /etc/subgid",
        ),
        None => Check::ok(
            id,
            format!(
                "each process is a user of its own: {} + its pid, of {users}",
                users.first()
            ),
        ),
    }
}

/// Somebody else who has ids of the range by the file.
fn holder(host: &Host, path: &'static str, users: UserRange) -> Option<(&'static str, String)> {
    let text = host.text(path)?;
    text.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        let (name, first, count) = (fields.next()?, fields.next()?, fields.next()?);
        let (first, count) = (first.parse::<u64>().ok()?, count.parse::<u64>().ok()?);
        let last = first.saturating_add(count.checked_sub(1)?);
        let shared = first <= u64::from(users.last()) && u64::from(users.first()) <= last;
        (shared && name != OWNER).then(|| (path, excerpt(name, 64)))
    })
}
