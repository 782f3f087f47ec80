//! The value of `--disk`: `PATH[,readonly][,ephemeral][,format=raw][,name=N][,serial=S][,queues=N]`.

use crate::escape::excerpt;
use crate::vm::spec::DISK_QUEUES_MAX;
use crate::vmfile::{DraftDisk, Located, Place, Problem, check_format, nearest};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

const KEYS: [&str; 6] = [
    "readonly",
    "ephemeral",
    "format",
    "name",
    "serial",
    "queues",
];

/// Reads one `--disk`.
///
/// # Errors
/// What was expected.
pub(super) fn parse_disk(argument: &OsStr) -> Result<DraftDisk, Problem> {
    let place = Place::Option {
        option: "--disk".to_owned(),
        value: argument.to_string_lossy().into_owned(),
    };
    let wrong = |expectation: String| Problem {
        place: place.clone(),
        expectation,
    };
    let mut parts = split_commas(argument.as_bytes()).into_iter();
    let path = parts.next().unwrap_or_default();
    if path.is_empty() || path.contains(&0) {
        return Err(wrong("expected the path of a file".to_owned()));
    }
    let path = PathBuf::from(OsString::from_vec(path));
    let mut disk = DraftDisk::new(place.clone());
    disk.path = Some(Located {
        value: std::path::absolute(&path).unwrap_or(path),
        place: place.clone(),
    });
    for part in parts {
        let text = String::from_utf8_lossy(&part).into_owned();
        set(&mut disk, &text).map_err(wrong)?;
    }
    Ok(disk)
}

fn set(disk: &mut DraftDisk, text: &str) -> Result<(), String> {
    let place = disk.place.clone();
    let yes = Some(Located {
        value: true,
        place: place.clone(),
    });
    let words = |value: &str| {
        Some(Located {
            value: value.to_owned(),
            place: place.clone(),
        })
    };
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (text, None),
    };
    match (key, value) {
        ("readonly", None) => disk.read_only = yes,
        ("ephemeral", None) => disk.ephemeral = yes,
        ("format", Some(format)) => {
            check_format(format).map_err(|e| format!("format={}: {e}", excerpt(format, 20)))?;
        }
        ("name", Some(name)) => disk.name = words(name),
        ("serial", Some(serial)) => disk.serial = words(serial),
        ("queues", Some(n)) => {
            let n = n.parse().ok().filter(|n| (1..=DISK_QUEUES_MAX).contains(n));
            let value = n.ok_or_else(|| format!("queues: expected 1 to {DISK_QUEUES_MAX}"))?;
            disk.queues = Some(Located { value, place });
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

/// Splits at single commas; two commas stand for one.
fn split_commas(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut rest = bytes.iter().copied().peekable();
    while let Some(byte) = rest.next() {
        let doubled = byte == b',' && rest.next_if_eq(&b',').is_some();
        match parts.last_mut() {
            Some(part) if byte != b',' || doubled => part.push(byte),
            _ => parts.push(Vec::new()),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn options_follow_the_path() {
        let text = "/a,,b.img,readonly,name=x,serial=S,queues=2,format=raw";
        let disk = parse_disk(text.as_ref()).unwrap();
        assert_eq!(disk.path.unwrap().value, PathBuf::from("/a,b.img"));
        assert!(disk.read_only.unwrap().value && disk.ephemeral.is_none());
        assert_eq!(disk.name.unwrap().value, "x");
        assert_eq!(disk.serial.unwrap().value, "S");
        assert_eq!(disk.queues.unwrap().value, 2);
    }

    #[test]
    fn wrong_options_are_named() {
        for (text, wanted) in [
            (
                "a,readonyl",
                "unknown option `readonyl`; did you mean `readonly`?",
            ),
            (
                "a,format=qcow2",
                "format=qcow2: this image format is not supported yet",
            ),
            ("a,queues=9", "queues: expected 1 to 8"),
            ("a,readonly=yes", "unknown option `readonly=yes`"),
            ("a,", "unknown option ``"),
            (",readonly", "expected the path"),
            ("", "expected the path"),
        ] {
            let problem = parse_disk(text.as_ref()).unwrap_err().to_string();
            assert!(
                problem.starts_with("--disk ") && problem.contains(wanted),
                "{problem}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_argument_is_read_or_refused(bytes: Vec<u8>) {
            let _either = parse_disk(&OsString::from_vec(bytes));
        }
    }
}
