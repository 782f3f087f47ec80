//! The share that a machine or a process has of processors and disks, as the files of either kind of hierarchy want it.

use crate::vm::spec::HostShare;
use nix::sys::stat::{SFlag, fstat, major, minor};
use std::fs;
use std::os::fd::AsFd;

/// Major and minor number of a whole block device.
pub type Device = (u64, u64);

/// Length of a period in which `cpu_percent` is measured, in microseconds: the kernel's default.
const PERIOD_US: u64 = 100_000;

/// The host disk that `file` is on, or is; None on file systems without one, such as tmpfs.
pub fn device_of(file: impl AsFd) -> Option<Device> {
    let stat = fstat(file.as_fd()).ok()?;
    let is_block = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFBLK.bits();
    let number = if is_block { stat.st_rdev } else { stat.st_dev };
    whole((major(number), minor(number)))
}

/// Limits are those of whole disks: the disk that a partition is part of.
fn whole((major, minor): Device) -> Option<Device> {
    let at = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let disk = match at.join("partition").exists() {
        true => at.parent()?,
        false => &at,
    };
    let text = fs::read_to_string(disk.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

type Files = Vec<(&'static str, String)>;

/// The controllers of a unified hierarchy that are needed.
pub(super) fn controllers(share: &HostShare) -> impl Iterator<Item = &'static str> {
    let files = unified(share, &[]);
    let needs = move |controller: &&str| files.iter().any(|(file, _)| file.starts_with(controller));
    ["cpu", "io"].into_iter().filter(needs)
}

/// For a unified hierarchy.
pub(super) fn unified(share: &HostShare, disks: &[Device]) -> Files {
    let mut files = Files::new();
    if let Some(weight) = share.cpu_weight {
        files.push(("cpu.weight", weight.to_string()));
    }
    if let Some(percent) = share.cpu_percent {
        files.push(("cpu.max", format!("{} {PERIOD_US}", quota_us(percent))));
    }
    let limits = [
        ("rbps", share.disk_read_per_s),
        ("wbps", share.disk_write_per_s),
        ("riops", share.disk_read_iops.map(u64::from)),
        ("wiops", share.disk_write_iops.map(u64::from)),
    ];
    let limits: Vec<String> = limits
        .iter()
        .filter_map(|(key, value)| Some(format!("{key}={}", (*value)?)))
        .collect();
    if !limits.is_empty() {
        files.push(("io.max", lines(disks, &limits.join(" "))));
    }
    files
}

/// For separate hierarchies: the files of each controller that is needed.
pub(super) fn separate(share: &HostShare, disks: &[Device]) -> Vec<(&'static str, Files)> {
    let mut cpu = Files::new();
    if let Some(weight) = share.cpu_weight {
        // 1024 shares are what a weight of 100 is, and 2 the least.
        let shares = (u64::from(weight) * 1024 / 100).max(2);
        cpu.push(("cpu.shares", shares.to_string()));
    }
    if let Some(percent) = share.cpu_percent {
        cpu.push(("cpu.cfs_period_us", PERIOD_US.to_string()));
        cpu.push(("cpu.cfs_quota_us", quota_us(percent).to_string()));
    }
    let limits = [
        ("blkio.throttle.read_bps_device", share.disk_read_per_s),
        ("blkio.throttle.write_bps_device", share.disk_write_per_s),
        (
            "blkio.throttle.read_iops_device",
            share.disk_read_iops.map(u64::from),
        ),
        (
            "blkio.throttle.write_iops_device",
            share.disk_write_iops.map(u64::from),
        ),
    ];
    let blkio: Files = limits
        .iter()
        .filter_map(|(file, value)| Some((*file, lines(disks, &(*value)?.to_string()))))
        .collect();
    [("cpu", cpu), ("blkio", blkio)]
        .into_iter()
        .filter(|(_, files)| !files.is_empty())
        .collect()
}

fn quota_us(percent: u32) -> u64 {
    u64::from(percent) * PERIOD_US / 100
}

/// The same limit for each device, one a line.
fn lines(disks: &[Device], limit: &str) -> String {
    let line = |(major, minor): &Device| format!("{major}:{minor} {limit}");
    disks.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARE: HostShare = HostShare {
        cpu_weight: Some(50),
        cpu_percent: Some(150),
        disk_read_per_s: Some(1 << 20),
        disk_write_per_s: None,
        disk_read_iops: None,
        disk_write_iops: Some(70),
    };

    #[test]
    fn share_is_written_for_a_unified_hierarchy() {
        let files = unified(&SHARE, &[(8, 0), (259, 1)]);
        let expected = [
            ("cpu.weight", "50"),
            ("cpu.max", "150000 100000"),
            (
                "io.max",
                "8:0 rbps=1048576 wiops=70\n259:1 rbps=1048576 wiops=70",
            ),
        ];
        assert_eq!(files, expected.map(|(file, text)| (file, text.to_owned())));
        assert!(unified(&HostShare::default(), &[(8, 0)]).is_empty());
    }

    #[test]
    fn share_is_written_for_separate_hierarchies() {
        let all = separate(&SHARE, &[(8, 0)]);
        let [("cpu", cpu), ("blkio", blkio)] = &all[..] else {
            panic!("{all:?}");
        };
        let texts = |files: &Files| -> Vec<String> {
            files.iter().map(|(f, t)| format!("{f} {t}")).collect()
        };
        let expected = [
            "cpu.shares 512",
            "cpu.cfs_period_us 100000",
            "cpu.cfs_quota_us 150000",
        ];
        assert_eq!(texts(cpu), expected);
        let expected = [
            "blkio.throttle.read_bps_device 8:0 1048576",
            "blkio.throttle.write_iops_device 8:0 70",
        ];
        assert_eq!(texts(blkio), expected);
        assert!(separate(&HostShare::default(), &[]).is_empty());
    }

    #[test]
    fn file_in_memory_is_on_no_disk() {
        let memory = nix::sys::memfd::memfd_create("m", nix::sys::memfd::MFdFlags::empty());
        assert_eq!(device_of(memory.unwrap()), None);
    }
}
