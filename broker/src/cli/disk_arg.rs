//! The value of `--disk`: `PATH[,readonly][,ephemeral][,shareable][,format=F][,backing=PATH:FORMAT][,extent=PATH][,name=N]
//! [,serial=S][,bytes_per_s=SIZE][,bytes_burst=SIZE][,requests_per_s=N][,requests_burst=N][,queues=N]`.

use crate::escape::excerpt;
use crate::vm::spec::DISK_QUEUES_MAX;
use crate::vmfile::{DraftDisk, Located, Place, Problem, nearest, parse_format, parse_size};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

const KEYS: [&str; 13] = [
    "bytes_per_s",
    "bytes_burst",
    "requests_per_s",
    "requests_burst",
    "shareable",
    "readonly",
    "ephemeral",
    "format",
    "backing",
    "extent",
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
        ("shareable", None) => disk.shareable = yes,
        ("bytes_per_s" | "bytes_burst", Some(text)) => {
            let value =
                parse_size(text).map_err(|e| format!("{key}={}: {e}", excerpt(text, 20)))?;
            let limit = Some(Located { value, place });
            match key {
                "bytes_per_s" => disk.limits.bytes_per_s = limit,
                _ => disk.limits.bytes_burst = limit,
            }
        }
        ("requests_per_s" | "requests_burst", Some(text)) => {
            let value = text.parse().ok().filter(|n| *n > 0);
            let value = value.ok_or_else(|| format!("{key}: expected a number from 1 on"))?;
            let limit = Some(Located { value, place });
            match key {
                "requests_per_s" => disk.limits.requests_per_s = limit,
                _ => disk.limits.requests_burst = limit,
            }
        }
        ("format", Some(format)) => {
            let value =
                parse_format(format).map_err(|e| format!("format={}: {e}", excerpt(format, 20)))?;
            disk.format = Some(Located { value, place });
        }
        ("backing", Some(value)) => {
            let wrong = || format!("backing={}: expected PATH:FORMAT", excerpt(value, 40));
            let (path, format) = value.rsplit_once(':').ok_or_else(wrong)?;
            let format =
                parse_format(format).map_err(|e| format!("backing={}: {e}", excerpt(value, 40)))?;
            let value = absolute(path).ok_or_else(wrong)?;
            disk.backing.push((Located { value, place }, format));
        }
        ("extent", Some(path)) => {
            let value = absolute(path).ok_or_else(|| "extent: expected a path".to_owned())?;
            disk.extents.push(Located { value, place });
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

fn absolute(path: &str) -> Option<PathBuf> {
    let path = (!path.is_empty() && !path.contains('\0')).then(|| PathBuf::from(path))?;
    Some(std::path::absolute(&path).unwrap_or(path))
}

/// Splits at single commas; two commas stand for one.
pub(super) fn split_commas(bytes: &[u8]) -> Vec<Vec<u8>> {
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
    use bulkhead_ipc::protocol::birth::ImageFormat;
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
    fn files_below_and_beside_an_image_are_named() {
        let text = "/a.qcow2,format=qcow2,backing=/m:n.qcow2:qcow2,backing=/b.img:raw,extent=/x";
        let disk = parse_disk(text.as_ref()).unwrap();
        assert_eq!(disk.format.unwrap().value, ImageFormat::Qcow2);
        let backing: Vec<_> = disk
            .backing
            .iter()
            .map(|(p, f)| (p.value.to_str().unwrap(), *f))
            .collect();
        assert_eq!(
            backing,
            [
                ("/m:n.qcow2", ImageFormat::Qcow2),
                ("/b.img", ImageFormat::Raw)
            ]
        );
        assert_eq!(disk.extents[0].value, PathBuf::from("/x"));
    }

    #[test]
    fn wrong_options_are_named() {
        for (text, wanted) in [
            (
                "a,readonyl",
                "unknown option `readonyl`; did you mean `readonly`?",
            ),
            (
                "a,format=vhd",
                "convert it with `bulkhead image convert --from vhd` first",
            ),
            ("a,format=qcow", "expected \"raw\", \"qcow2\" or \"vmdk\""),
            ("a,backing=b", "backing=b: expected PATH:FORMAT"),
            ("a,backing=:raw", "expected PATH:FORMAT"),
            ("a,backing=b:tar", "backing=b:tar: expected \"raw\""),
            ("a,extent=", "extent: expected a path"),
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
