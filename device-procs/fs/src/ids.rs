//! Which user and group of the guest is which of the host.

use std::str::FromStr;

/// The id that the guest sees for an owner that no range names (Linux's overflow id).
const UNMAPPED: u32 = 65534;
/// Ranges that one map may have.
const RANGES_MAX: usize = 32;

/// Why a map was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdMapError {
    /// A range is not `GUEST:HOST:COUNT`.
    #[error("{0:?} is not GUEST:HOST:COUNT, three numbers with a count of at least 1")]
    Syntax(String),
    /// A range ends past the largest id, 4294967294.
    #[error("{0:?} ends past the largest id")]
    PastEnd(String),
    /// Two ranges name the same id.
    #[error("{0:?} overlaps a range before it")]
    Overlap(String),
    /// More than 32 ranges.
    #[error("more than {RANGES_MAX} ranges")]
    TooMany,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    guest: u32,
    host: u32,
    count: u32,
}

/// A map of ids, as `GUEST:HOST:COUNT` ranges separated by commas. Without ranges, every id is itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap(Vec<Range>);

const fn translate(id: u32, from: u32, to: u32, count: u32) -> Option<u32> {
    match id.checked_sub(from) {
        Some(distance) if distance < count => to.checked_add(distance),
        _ => None,
    }
}

const fn overlap(a: u32, a_count: u32, b: u32, b_count: u32) -> bool {
    (a as u64) < b as u64 + b_count as u64 && (b as u64) < a as u64 + a_count as u64
}

impl IdMap {
    /// The guest's id for an owner on the host; 65534 when no range names it.
    #[must_use]
    pub fn to_guest(&self, host: u32) -> u32 {
        if self.0.is_empty() {
            return host;
        }
        let found = self
            .0
            .iter()
            .find_map(|r| translate(host, r.host, r.guest, r.count));
        found.unwrap_or(UNMAPPED)
    }

    /// The host's id for one of the guest; none when no range names it.
    #[must_use]
    pub fn to_host(&self, guest: u32) -> Option<u32> {
        if self.0.is_empty() {
            return Some(guest);
        }
        self.0
            .iter()
            .find_map(|r| translate(guest, r.guest, r.host, r.count))
    }
}

impl FromStr for IdMap {
    type Err = IdMapError;

    fn from_str(text: &str) -> Result<Self, IdMapError> {
        let mut ranges: Vec<Range> = Vec::new();
        for part in text.split(',') {
            let syntax = || IdMapError::Syntax(part.to_owned());
            let numbers: Vec<u32> = part
                .split(':')
                .map(|n| n.trim().parse().map_err(|_| syntax()))
                .collect::<Result<_, _>>()?;
            let &[guest, host, count] = numbers.as_slice() else {
                return Err(syntax());
            };
            if count == 0 {
                return Err(syntax());
            }
            // The id 4294967295 means "leave as it is" in chown.
            if guest.checked_add(count).is_none() || host.checked_add(count).is_none() {
                return Err(IdMapError::PastEnd(part.to_owned()));
            }
            if ranges.iter().any(|r| {
                overlap(r.guest, r.count, guest, count) || overlap(r.host, r.count, host, count)
            }) {
                return Err(IdMapError::Overlap(part.to_owned()));
            }
            if ranges.len() == RANGES_MAX {
                return Err(IdMapError::TooMany);
            }
            ranges.push(Range { guest, host, count });
        }
        Ok(Self(ranges))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn broken_ranges_are_refused() {
        for text in [
            "", "1", "1:2", "1:2:3:4", "a:1:1", "-1:0:1", "0:0:0", "0:1:1,",
        ] {
            assert!(
                matches!(text.parse::<IdMap>(), Err(IdMapError::Syntax(_))),
                "{text}"
            );
        }
        assert!(matches!(
            "0:4294967295:1".parse::<IdMap>(),
            Err(IdMapError::PastEnd(_))
        ));
        assert!(matches!(
            "0:9:5,4:90:1".parse::<IdMap>(),
            Err(IdMapError::Overlap(_))
        ));
        assert!(matches!(
            "0:9:5,9:13:1".parse::<IdMap>(),
            Err(IdMapError::Overlap(_))
        ));
    }

    #[test]
    fn ids_outside_of_every_range_have_no_host_id() {
        let map: IdMap = "0:1000:1,1000:2000:10".parse().unwrap();
        assert_eq!(map.to_host(0), Some(1000));
        assert_eq!(map.to_host(1), None);
        assert_eq!(map.to_host(1009), Some(2009));
        assert_eq!(map.to_host(1010), None);
        assert_eq!(map.to_guest(0), UNMAPPED);
    }

    proptest! {
        #[test]
        fn mapped_ids_come_back(guest in 0u32..1 << 30, host in 0u32..1 << 30,
                                count in 1u32..1 << 20, offset in any::<u32>()) {
            let map: IdMap = format!("{guest}:{host}:{count}").parse().unwrap();
            let id = guest + offset % count;
            prop_assert_eq!(map.to_guest(map.to_host(id).unwrap()), id);
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in "[0-9:, -]{0,40}") {
            let _ = text.parse::<IdMap>();
        }
    }
}
