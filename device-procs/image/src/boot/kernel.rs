//! Which kernel, and which initial RAM disk belongs to it.
//!
//! Without a wish the kernel is the one that the distribution calls the newest: `/vmlinuz` (Debian keeps
//! this link) or `/boot/vmlinuz`; else the one with the highest version in `/boot`, or, where the file
//! system is a boot partition, in its root.

use super::Wish;
use ext4_view::{Ext4, Ext4Error, Path, PathBuf};
use std::cmp::Ordering;

/// Names that are a kernel wherever there is a file behind them.
const LINKS: [&str; 2] = ["/vmlinuz", "/boot/vmlinuz"];
/// Directories with kernels of several versions.
const DIRECTORIES: [&str; 2] = ["/boot", "/"];
const PREFIX: &[u8] = b"vmlinuz-";
/// Most entries of a directory that are looked at.
const ENTRIES_MAX: usize = 10_000;

/// Files, by their paths without symbolic links, and their sizes.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) kernel: (PathBuf, u64),
    pub(super) initrd: Option<(PathBuf, u64)>,
}

/// A path, and what is wrong with it.
type Fault = (String, Ext4Error);

/// Looks for what is wished for. `None` when the file system has no kernel.
pub(super) fn look(fs: &Ext4, wish: &Wish) -> Result<Option<Found>, Fault> {
    let kernel = match &wish.kernel {
        Some(path) => file(fs, path.as_bytes())?,
        None => newest(fs)?,
    };
    let Some(kernel) = kernel else {
        return Ok(None);
    };
    let initrd = match &wish.initrd {
        Some(path) => {
            Some(file(fs, path.as_bytes())?.ok_or_else(|| (path.clone(), Ext4Error::NotFound))?)
        }
        None => initrd_of(fs, &kernel.0)?,
    };
    Ok(Some(Found { kernel, initrd }))
}

/// The regular file that `path` leads to. `None` when it leads nowhere.
fn file(fs: &Ext4, path: &[u8]) -> Result<Option<(PathBuf, u64)>, Fault> {
    let fault = |error| (String::from_utf8_lossy(path).into_owned(), error);
    let found = Path::try_from(path)
        .map_err(|_| Ext4Error::MalformedPath)
        .and_then(|path| fs.canonicalize(path));
    let place = match found {
        Ok(place) => place,
        Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => return Ok(None),
        Err(error) => return Err(fault(error)),
    };
    let file = fs.open(&place).map_err(fault)?;
    let bytes = file.metadata().len();
    Ok(Some((place, bytes)))
}

fn newest(fs: &Ext4) -> Result<Option<(PathBuf, u64)>, Fault> {
    for path in LINKS {
        if let Some(found) = file(fs, path.as_bytes())? {
            return Ok(Some(found));
        }
    }
    for directory in DIRECTORIES {
        let mut names = kernels_in(fs, directory)?;
        names.sort_by(|one, other| compare_versions(other, one));
        for name in names {
            let path = [directory.trim_end_matches('/').as_bytes(), b"/", &name].concat();
            if let Some(found) = file(fs, &path)? {
                return Ok(Some(found));
            }
        }
    }
    Ok(None)
}

/// Names of the kernels in a directory, if it is one. Backups and rescue kernels do not count.
fn kernels_in(fs: &Ext4, directory: &str) -> Result<Vec<Vec<u8>>, Fault> {
    let entries = match fs.read_dir(directory) {
        Ok(entries) => entries,
        Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => return Ok(Vec::new()),
        Err(error) => return Err((directory.to_owned(), error)),
    };
    let mut names = Vec::new();
    for entry in entries.take(ENTRIES_MAX) {
        let entry = entry.map_err(|error| (directory.to_owned(), error))?;
        let name = entry.file_name();
        let name: &[u8] = name.as_ref();
        let text = String::from_utf8_lossy(name);
        let spare = ["old", "bak", "dpkg-new", "dpkg-tmp", "rpmsave"];
        let is_spare = text.ends_with('~')
            || text.contains("rescue")
            || text
                .rsplit_once('.')
                .is_some_and(|(_, end)| spare.contains(&end));
        if name.starts_with(PREFIX) && !is_spare {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// The initial RAM disk that belongs to a kernel, by the names that distributions use.
fn initrd_of(fs: &Ext4, kernel: &PathBuf) -> Result<Option<(PathBuf, u64)>, Fault> {
    let kernel: &[u8] = kernel.as_ref();
    let at = kernel
        .iter()
        .rposition(|&byte| byte == b'/')
        .map_or(0, |at| at + 1);
    let (directory, name) = kernel.split_at(at);
    let names: Vec<Vec<u8>> = match name.strip_prefix(PREFIX) {
        Some(version) => [
            (&b"initrd.img-"[..], &b""[..]),
            (b"initramfs-", b".img"),
            (b"initrd-", b""),
            (b"initramfs-", b""),
        ]
        .map(|(before, after)| [before, version, after].concat())
        .into(),
        None if name == b"vmlinuz" => {
            let names: [&[u8]; 3] = [b"initrd.img", b"initramfs.img", b"initrd"];
            names.map(<[u8]>::to_vec).into()
        }
        None => Vec::new(),
    };
    for name in names {
        if let Some(found) = file(fs, &[directory, &name].concat())? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Compares names with numbers in them: `6.1.0-9` comes before `6.1.0-57`.
fn compare_versions(one: &[u8], other: &[u8]) -> Ordering {
    let (mut one, mut other) = (one, other);
    loop {
        let (text, rest) = split(one, |byte| !byte.is_ascii_digit());
        let (other_text, other_rest) = split(other, |byte| !byte.is_ascii_digit());
        let (number, rest) = split(rest, u8::is_ascii_digit);
        let (other_number, other_rest) = split(other_rest, u8::is_ascii_digit);
        let order = text
            .cmp(other_text)
            .then_with(|| value(number).cmp(&value(other_number)));
        if order != Ordering::Equal || (rest.is_empty() && other_rest.is_empty()) {
            return order;
        }
        (one, other) = (rest, other_rest);
    }
}

fn split(bytes: &[u8], belongs: impl Fn(&u8) -> bool) -> (&[u8], &[u8]) {
    let end = bytes.iter().position(|byte| !belongs(byte));
    bytes.split_at(end.unwrap_or(bytes.len()))
}

/// Digits as something that compares like their number, however many they are.
fn value(digits: &[u8]) -> (usize, &[u8]) {
    let start = digits.iter().position(|&digit| digit != b'0');
    let digits = start
        .and_then(|start| digits.get(start..))
        .unwrap_or_default();
    (digits.len(), digits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        let rising: [&[u8]; 6] = [
            b"vmlinuz-5.10.0-31-amd64",
            b"vmlinuz-6.1.0-9-amd64",
            b"vmlinuz-6.1.0-57-amd64",
            b"vmlinuz-6.1.0-57-cloud-amd64",
            b"vmlinuz-6.9",
            b"vmlinuz-6.10",
        ];
        for pair in rising.windows(2) {
            assert_eq!(compare_versions(pair[0], pair[1]), Ordering::Less);
            assert_eq!(compare_versions(pair[1], pair[0]), Ordering::Greater);
        }
        assert_eq!(compare_versions(b"a-007", b"a-7"), Ordering::Equal);
    }

    proptest! {
        #[test]
        fn comparison_is_an_order(
            a in prop::collection::vec(prop::sample::select(&b"019.-a"[..]), 0..8),
            b in prop::collection::vec(prop::sample::select(&b"019.-a"[..]), 0..8),
            c in prop::collection::vec(prop::sample::select(&b"019.-a"[..]), 0..8),
        ) {
            prop_assert_eq!(compare_versions(&a, &b), compare_versions(&b, &a).reverse());
            if compare_versions(&a, &b).is_le() && compare_versions(&b, &c).is_le() {
                prop_assert!(compare_versions(&a, &c).is_le());
            }
        }
    }
}
