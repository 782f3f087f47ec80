//! The users of processes: a range of ids, of which each process has the first plus its pid.
//!
//! No two living processes of a host have the same pid, so with one range no two have the same user,
//! whichever broker started them, without a registry, a lock or a clean-up. The range has to hold
//! an id for each pid that the kernel may give ([`UserRange::check`]), and has to exist in the broker's
//! user namespace ([`UserRange::exists`]).

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Ids that mean something to the kernel or to many programs: root, nobody, nobody of 16 bits and
/// "leave it as it is" of 16 bits, "leave it as it is".
const SPECIAL: [u32; 4] = [0, 65534, 65535, u32::MAX];
/// The largest `pid_max` of Linux.
pub const PID_MAX_MOST: u32 = 1 << 22;
/// Where the kernel says how many pids there are.
const PID_MAX: &str = "/proc/sys/kernel/pid_max";

/// Ids from the first to the last, both of users and of groups. Written `FIRST-LAST`, in decimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct UserRange {
    first: u32,
    last: u32,
}

/// Why a text is no range of ids, or not one for processes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UsersError {
    /// It has another form.
    #[error(
        "expected FIRST-LAST, two decimal ids such as \"{}\"",
        UserRange::DEFAULT
    )]
    Form,
    /// It ends before it begins.
    #[error("expected a last id that is not below the first")]
    Order,
    /// It holds an id that means something else.
    #[error("holds {0}, expected a range without 0, 65534, 65535 and 4294967295")]
    Special(u32),
    /// There are more pids than ids.
    #[error(
        "holds {ids} ids, expected at least {pid_max}, one for each pid (kernel.pid_max): \
         a process's id is FIRST + its pid"
    )]
    Small {
        /// Ids in the range.
        ids: u32,
        /// Pids that the kernel may give.
        pid_max: u32,
    },
}

impl UserRange {
    /// Above what distributions, container managers and systemd hand out, with one id for each
    /// possible pid.
    pub const DEFAULT: Self = Self {
        first: 0x7000_0000,
        last: 0x7000_0000 + PID_MAX_MOST - 1,
    };

    /// The first id.
    #[must_use]
    pub const fn first(self) -> u32 {
        self.first
    }

    /// The last id.
    #[must_use]
    pub const fn last(self) -> u32 {
        self.last
    }

    /// User and group of the process `pid`; none when there is no such id in the range. Allocates
    /// nothing: newborns ask.
    #[must_use]
    pub fn user_of(self, pid: u32) -> Option<u32> {
        let id = self.first.checked_add(pid)?;
        (id <= self.last).then_some(id)
    }

    /// Checks that there is an id for each of `pid_max` pids.
    ///
    /// # Errors
    /// [`UsersError::Small`].
    pub const fn check(self, pid_max: u32) -> Result<(), UsersError> {
        // No range holds 0, so the count fits.
        let ids = self.last - self.first + 1;
        match ids < pid_max {
            true => Err(UsersError::Small { ids, pid_max }),
            false => Ok(()),
        }
    }

    /// Whether both have an id in common.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Whether each process gets a user of its own: this program is root, and the ids exist in its
    /// user namespace.
    #[must_use]
    pub fn exists(self) -> bool {
        let covers = |path| {
            let map = std::fs::read_to_string(path).unwrap_or_default();
            self.is_within(&map)
        };
        nix::unistd::geteuid().is_root()
            && covers("/proc/self/uid_map")
            && covers("/proc/self/gid_map")
    }

    /// What is to be said when this program is root and the ids do not exist for it.
    #[must_use]
    pub fn lacking(self) -> Option<String> {
        let is_lacking = nix::unistd::geteuid().is_root() && !self.exists();
        is_lacking.then(|| {
            let fallback = super::plan::USER_FALLBACK;
            format!(
                "user ids {self} do not exist in this user namespace: every process is user {fallback} \
                 ([host] users in bulkhead.toml gives another range)"
            )
        })
    }

    /// Whether a user namespace with this map (`uid_map` or `gid_map` of `/proc`) has all the ids.
    #[must_use]
    pub fn is_within(self, map: &str) -> bool {
        let extent = |line: &str| {
            let mut fields = line.split_ascii_whitespace().map(str::parse::<u64>);
            let (first, _outside, count) = (fields.next()?, fields.next()?, fields.next()?);
            Some((first.ok()?, count.ok()?))
        };
        let mut extents: Vec<_> = map.lines().filter_map(extent).collect();
        extents.sort_unstable();
        let end = u64::from(self.last) + 1;
        let covered = extents.iter().fold(u64::from(self.first), |next, extent| {
            let (first, count) = *extent;
            match first <= next {
                true => next.max(first.saturating_add(count)),
                false => next,
            }
        });
        covered >= end
    }
}

impl Default for UserRange {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Display for UserRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for UserRange {
    type Err = UsersError;

    fn from_str(text: &str) -> Result<Self, UsersError> {
        let (first, last) = text.split_once('-').ok_or(UsersError::Form)?;
        let id = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            let id = plain.then(|| digits.parse().ok()).flatten();
            id.ok_or(UsersError::Form)
        };
        let (first, last) = (id(first)?, id(last)?);
        if last < first {
            return Err(UsersError::Order);
        }
        let special = SPECIAL.into_iter().find(|id| (first..=last).contains(id));
        match special {
            Some(special) => Err(UsersError::Special(special)),
            None => Ok(Self { first, last }),
        }
    }
}

impl TryFrom<String> for UserRange {
    type Error = UsersError;

    fn try_from(text: String) -> Result<Self, UsersError> {
        text.parse()
    }
}

impl From<UserRange> for String {
    fn from(users: UserRange) -> Self {
        users.to_string()
    }
}

/// How many pids the kernel may give; the most of any Linux where it does not say.
#[must_use]
pub fn pid_max() -> u32 {
    let text = std::fs::read_to_string(PID_MAX).ok();
    let number = text.and_then(|text| text.trim().parse().ok());
    number.unwrap_or(PID_MAX_MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> UserRange {
        text.parse().unwrap()
    }

    #[test]
    fn range_is_written_as_it_is_read() {
        assert_eq!(UserRange::DEFAULT.to_string(), "1879048192-1883242495");
        assert_eq!(range("1879048192-1883242495"), UserRange::DEFAULT);
        let json = serde_json::to_string(&range("70000-80000")).unwrap();
        assert_eq!(json, "\"70000-80000\"");
        assert_eq!(
            serde_json::from_str::<UserRange>(&json).unwrap(),
            range("70000-80000")
        );
        assert!(serde_json::from_str::<UserRange>("\"0-5\"").is_err());
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for text in [
            "",
            "-",
            "5",
            "5-",
            "-5",
            "+5-9",
            " 5-9",
            "5-9 ",
            "5-9-12",
            "5..9",
            "0x10-0x20",
            "1-4294967296",
        ] {
            assert_eq!(text.parse::<UserRange>(), Err(UsersError::Form), "{text:?}");
        }
        assert_eq!("9-5".parse::<UserRange>(), Err(UsersError::Order));
    }

    #[test]
    fn special_ids_are_nobody_s() {
        for (text, special) in [
            ("0-5000000", 0),
            ("60000-65534", 65534),
            ("65535-5000000", 65535),
            ("1-4294967294", 65534),
            ("4290000000-4294967295", u32::MAX),
        ] {
            let found = text.parse::<UserRange>();
            assert_eq!(found, Err(UsersError::Special(special)), "{text}");
        }
        let _fits_between = range("65536-4294967294");
    }

    #[test]
    fn each_pid_has_an_id_of_its_own() {
        let users = range("100000-132767");
        assert_eq!(users.check(32768), Ok(()));
        let small = UsersError::Small {
            ids: 32768,
            pid_max: 32769,
        };
        assert_eq!(users.check(32769), Err(small));
        assert_eq!(UserRange::DEFAULT.check(PID_MAX_MOST), Ok(()));
        assert_eq!(users.user_of(1), Some(100_001));
        assert_eq!(users.user_of(32767), Some(132_767));
        assert_eq!(users.user_of(32768), None);
        assert_eq!(range("65536-4294967294").user_of(u32::MAX), None);
    }

    #[test]
    fn range_exists_where_the_map_has_all_of_it() {
        let users = range("100000-132767");
        for (map, exists) in [
            ("         0          0 4294967295\n", true),
            ("0 1000 1\n", false),
            ("0 500000 100000\n100000 9 32768\n", true),
            ("100000 9 32767\n", false),
            ("100001 9 99999\n", false),
            // The kernel keeps extents in any order.
            ("110000 7 90000\n0 1 1\n90000 5 20000\n", true),
            ("110001 7 90000\n90000 5 20000\n", false),
            ("", false),
            ("a b c\n", false),
        ] {
            assert_eq!(users.is_within(map), exists, "{map:?}");
        }
    }

    #[test]
    fn ranges_overlap_when_they_share_an_id() {
        let users = range("100000-132767");
        assert!(users.overlaps(users));
        assert!(users.overlaps(range("132767-140000")));
        assert!(!users.overlaps(range("132768-140000")));
        assert!(range("90000-200000").overlaps(users));
        assert!(!range("90000-99999").overlaps(users));
    }
}
