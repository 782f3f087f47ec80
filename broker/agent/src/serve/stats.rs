//! How the guest is, from /proc and its files.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_ipc::protocol::agent::{Address, FileSystem, LIST_MAX, Stats, User, text_of};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;
use nix::sys::statvfs::statvfs;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;

/// Largest part of a file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

fn read(path: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    // What is not there is left out: guests differ.
    if let Ok(file) = File::open(path) {
        let _partly = file.take(FILE_BYTES_MAX).read_to_end(&mut bytes);
    }
    bytes
}

fn text(path: &str) -> String {
    String::from_utf8_lossy(&read(path)).into_owned()
}

/// The first line of a file.
pub(super) fn line(path: &str) -> String {
    text_of(text(path).lines().next().unwrap_or_default())
}

/// Everything at once.
pub(super) fn stats() -> Stats {
    let memory = text("/proc/meminfo");
    let [one, five, fifteen] = load(&text("/proc/loadavg"));
    Stats {
        hostname: line("/proc/sys/kernel/hostname"),
        kernel: line("/proc/sys/kernel/osrelease"),
        uptime_ms: uptime_ms(&text("/proc/uptime")),
        load_hundredths: [one, five, fifteen],
        memory_bytes: meminfo(&memory, "MemTotal:"),
        available_bytes: meminfo(&memory, "MemAvailable:"),
        swap_bytes: meminfo(&memory, "SwapTotal:"),
        swap_free_bytes: meminfo(&memory, "SwapFree:"),
        file_systems: mounts()
            .iter()
            .take(LIST_MAX)
            .filter_map(file_system)
            .collect(),
        addresses: addresses(),
        users: users(&read("/var/run/utmp")),
    }
}

/// `12.34` in hundredths.
fn hundredths(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once('.')?;
    let part = part.get(..2)?;
    let whole: u64 = whole.parse().ok()?;
    whole.checked_mul(100)?.checked_add(part.parse().ok()?)
}

fn load(text: &str) -> [u32; 3] {
    let mut words = text.split_ascii_whitespace();
    [(); 3].map(|()| {
        let load = words.next().and_then(hundredths).unwrap_or(0);
        u32::try_from(load).unwrap_or(u32::MAX)
    })
}

fn uptime_ms(text: &str) -> u64 {
    let first = text.split_ascii_whitespace().next();
    first.and_then(hundredths).unwrap_or(0).saturating_mul(10)
}

fn meminfo(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|line| line.split_ascii_whitespace().next());
    kib.and_then(|kib| kib.parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(1024)
}

/// A file system of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// Where.
    pub(super) point: String,
    kind: String,
    source: String,
}

/// The file systems of disks, each once, in the order in which they were mounted.
pub(super) fn mounts() -> Vec<Mount> {
    parse_mounts(&text("/proc/self/mountinfo"))
}

/// `36 35 98:0 /root /point options optional… - type source options`
fn parse_mounts(text: &str) -> Vec<Mount> {
    let mut devices = BTreeSet::new();
    let mounts = text.lines().filter_map(|line| {
        let (before, behind) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(2);
        let device = before.next()?.to_owned();
        let point = unescape(before.nth(1)?);
        let mut behind = behind.split(' ');
        let (kind, source) = (behind.next()?.to_owned(), unescape(behind.next()?));
        let of_disk = source.starts_with("/dev/") && devices.insert(device);
        of_disk.then_some(Mount {
            point,
            kind,
            source,
        })
    });
    mounts.collect()
}

/// The kernel writes blanks and the like as `\040`.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.filter(|_| first == b'\\') {
            Some(code) => {
                bytes.push(code);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn file_system(mount: &Mount) -> Option<FileSystem> {
    let found = statvfs(mount.point.as_str()).ok()?;
    let unit = found.fragment_size();
    Some(FileSystem {
        mount_point: text_of(&mount.point),
        source: text_of(&mount.source),
        kind: text_of(&mount.kind),
        bytes: unit.saturating_mul(found.blocks()),
        available_bytes: unit.saturating_mul(found.blocks_available()),
    })
}

fn addresses() -> Vec<Address> {
    let Ok(found) = getifaddrs() else {
        return Vec::new();
    };
    let addresses = found.filter_map(|one| {
        let address = one.address.as_ref().and_then(shown)?;
        Some(Address {
            interface: text_of(&one.interface_name),
            address,
        })
    });
    addresses.take(LIST_MAX).collect()
}

fn shown(address: &SockaddrStorage) -> Option<String> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(v4.ip().to_string());
    }
    if let Some(v6) = address.as_sockaddr_in6() {
        return Some(v6.ip().to_string());
    }
    let mac = address.as_link_addr()?.addr()?;
    let bytes: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    (mac != [0; 6]).then(|| bytes.join(":"))
}

/// The logins in a `utmp` file: records of 384 bytes, as the C library has them on this architecture.
fn users(bytes: &[u8]) -> Vec<User> {
    const RECORD_BYTES: usize = 384;
    const USER_PROCESS: u16 = 7;
    let word = |bytes: Option<&[u8]>| {
        let bytes = bytes.unwrap_or_default();
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
    };
    let records = bytes.chunks_exact(RECORD_BYTES).filter_map(|record| {
        let kind = u16::from_le_bytes(*record.first_chunk()?);
        let seconds = record.get(340..)?.first_chunk()?;
        (kind == USER_PROCESS).then(|| User {
            name: word(record.get(44..76)),
            terminal: word(record.get(8..40)),
            since_s: u32::from_le_bytes(*seconds).into(),
        })
    });
    records.take(LIST_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_proc_are_read_without_rounding() {
        assert_eq!(load("0.52 12.03 99.99 1/200 4\n"), [52, 1203, 9999]);
        assert_eq!(load("nonsense"), [0; 3]);
        assert_eq!(uptime_ms("3723.45 1.00\n"), 3_723_450);
        let memory = "MemTotal:       16384 kB\nMemFree: 1 kB\nMemAvailable:  8192 kB\n";
        assert_eq!(meminfo(memory, "MemAvailable:"), 8 << 20);
        assert_eq!(meminfo(memory, "SwapTotal:"), 0);
    }

    #[test]
    fn file_systems_of_disks_are_found_once() {
        let text = "22 1 0:21 / /proc rw - proc proc rw\n\
                    25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
                    26 25 254:0 /sub /bind rw - ext4 /dev/vda rw\n\
                    27 25 254:16 / /my\\040disk rw master:3 shared:2 - xfs /dev/vdb rw\n\
                    broken\n";
        let mounts = parse_mounts(text);
        let points: Vec<_> = mounts.iter().map(|m| m.point.as_str()).collect();
        assert_eq!(points, ["/", "/my disk"]);
        assert_eq!(mounts[1].kind, "xfs");
    }

    #[test]
    fn logins_are_read_from_records() {
        let mut record = vec![0; 384];
        record[0] = 7;
        record[8..13].copy_from_slice(b"pts/0");
        record[44..48].copy_from_slice(b"user");
        record[340..344].copy_from_slice(&1_700_000_000u32.to_le_bytes());
        let other = vec![0; 384];
        let found = users(&[other, record, vec![1; 100]].concat());
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].name.as_str(), found[0].terminal.as_str()),
            ("user", "pts/0")
        );
        assert_eq!(found[0].since_s, 1_700_000_000);
    }

    #[test]
    fn this_machine_has_statistics() {
        let stats = stats();
        assert!(stats.uptime_ms > 0 && stats.memory_bytes > 0);
        assert!(stats.addresses.iter().any(|a| a.address == "127.0.0.1"));
    }
}
