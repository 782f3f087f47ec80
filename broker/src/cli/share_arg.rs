//! The value of `--share`: `PATH[,tag=NAME][,readonly][,owner=UID:GID][,guest_owner=UID:GID][,cache_ms=N]`.

use super::disk_arg::split_commas;
use crate::escape::excerpt;
use crate::vm::spec::SHARE_CACHE_MS_MAX;
use crate::vmfile::{DraftShare, Located, Place, Problem, nearest, parse_owner};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

const KEYS: [&str; 5] = ["tag", "readonly", "owner", "guest_owner", "cache_ms"];

/// Reads one `--share`.
///
/// # Errors
/// What was expected.
pub(super) fn parse_share(argument: &OsStr) -> Result<DraftShare, Problem> {
    let place = Place::Option {
        option: "--share".to_owned(),
        value: argument.to_string_lossy().into_owned(),
    };
    let wrong = |expectation: String| Problem {
        place: place.clone(),
        expectation,
    };
    let mut parts = split_commas(argument.as_bytes()).into_iter();
    let path = parts.next().unwrap_or_default();
    if path.is_empty() || path.contains(&0) {
        return Err(wrong("expected the path of a directory".to_owned()));
    }
    let path = PathBuf::from(OsString::from_vec(path));
    let mut share = DraftShare::new(place.clone());
    share.path = Some(Located {
        value: std::path::absolute(&path).unwrap_or(path),
        place: place.clone(),
    });
    for part in parts {
        let text = String::from_utf8_lossy(&part).into_owned();
        set(&mut share, &text).map_err(wrong)?;
    }
    Ok(share)
}

fn set(share: &mut DraftShare, text: &str) -> Result<(), String> {
    let place = share.place.clone();
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (text, None),
    };
    match (key, value) {
        ("readonly", None) => share.read_only = Some(Located { value: true, place }),
        ("tag", Some(name)) => {
            let value = name.to_owned();
            share.name = Some(Located { value, place });
        }
        ("owner" | "guest_owner", Some(owner)) => {
            let value = parse_owner(owner).map_err(|e| format!("{key}: {e}"))?;
            let owner = Some(Located { value, place });
            match key {
                "owner" => share.owner = owner,
                _ => share.guest_owner = owner,
            }
        }
        ("cache_ms", Some(ms)) => {
            let ms = ms.parse().ok().filter(|ms| *ms <= SHARE_CACHE_MS_MAX);
            let value =
                ms.ok_or_else(|| format!("cache_ms: expected 0 to {SHARE_CACHE_MS_MAX}"))?;
            share.cache_ms = Some(Located { value, place });
        }
        _ => {
            let hint = nearest(key, KEYS).map_or_else(
                || format!("expected one of {}", KEYS.join(", ")),
                |near| format!("did you mean `{near}`?"),
            );
            return Err(format!("unknown option `{}`; {hint}", excerpt(text, 40)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(text: &str) -> Result<DraftShare, String> {
        parse_share(text.as_ref()).map_err(|problem| problem.expectation)
    }

    #[test]
    fn every_option_reaches_the_draft() {
        let all = "/a,,b,tag=home,readonly,owner=1:2,guest_owner=0:0,cache_ms=0";
        let share = share(all).unwrap();
        assert_eq!(share.path.unwrap().value, PathBuf::from("/a,b"));
        assert_eq!(share.name.unwrap().value, "home");
        assert!(share.read_only.unwrap().value);
        assert_eq!(share.owner.unwrap().value, (1, 2));
        assert_eq!(share.guest_owner.unwrap().value, (0, 0));
        assert_eq!(share.cache_ms.unwrap().value, 0);
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (text, told) in [
            ("", "the path of a directory"),
            ("/a,readonli", "did you mean `readonly`?"),
            ("/a,owner=me", "user and group as numbers"),
            ("/a,owner=1:4294967295", "user and group as numbers"),
            ("/a,cache_ms=x", "expected 0 to 3600000"),
        ] {
            let error = share(text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
