//! Kernel and initial RAM disk from a disk of the machine itself.
//!
//! The broker opens the disk, holds its locks and looks at nothing in it: a process that has the disk's
//! files for reading, and two files of memory of a fixed size, finds the kernel and copies it. What it
//! leaves there is given to the vCPU process like any kernel that a user names; both trust it as little.
//!
//! That is done at each start and restart, so a guest that installs another kernel boots it the next time.

use super::devices;
use super::resources::{DiskFiles, plain, sealed};
use super::session::{RunError, RunOptions};
use super::spec::{BootDisk, VmSpec};
use crate::image::chain::Chain;
use crate::image::work::{self, Shop, WorkError};
use crate::launch::Launcher;
use crate::supervisor::fault::said;
use bulkhead_ipc::protocol::birth::{ImageFormat, ImageLayer};
use bulkhead_ipc::protocol::image::{
    BootReport, INITRD_BYTES_MAX, ImageConfig, ImageJob, KERNEL_BYTES_MAX,
};
use bulkhead_policies::cache::Compiled;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// How long it may take. A kernel and its RAM disk are some tens of megabytes; the rest is for disks that
/// are slow, and not for file systems that have no end.
const WITHIN: Duration = Duration::from_secs(60);

/// Takes kernel and initial RAM disk out of the disk, whose files are open and locked.
///
/// # Errors
/// Why there are none.
pub(super) fn take_out(
    spec: &VmSpec,
    boot: &BootDisk,
    disks: &[DiskFiles],
    options: &RunOptions,
    launcher: &mut Launcher,
    compiled: &Compiled,
) -> Result<(File, Option<File>), RunError> {
    let place = spec.disks.iter().zip(disks);
    let Some((disk, files)) = place.into_iter().find(|(disk, _)| disk.name == boot.disk) else {
        let missing = format!("boot.from_disk: there is no disk {}", boot.disk);
        return Err(RunError::Configuration(missing));
    };
    let host = |cause: io::Error| RunError::Host {
        lacks: format!(
            "memory for the kernel of disk {}: {}",
            disk.name,
            plain(&cause)
        ),
    };
    // The changes to an ephemeral disk are made from nothing at each start.
    let layers = devices::layers(disk).split_off(usize::from(disk.ephemeral));
    let own = files.own.iter().filter(|_| !disk.ephemeral);
    let sources = own.chain(&files.below).map(read_again);
    let chain = Chain::of(layers, sources.collect::<io::Result<_>>().map_err(host)?);
    let (kernel, initrd) = (
        room("bulkhead-kernel", KERNEL_BYTES_MAX).map_err(host)?,
        room("bulkhead-initrd", INITRD_BYTES_MAX).map_err(host)?,
    );
    let target = ImageLayer {
        format: ImageFormat::Raw,
        files: vec!["kernel".to_owned(), "initrd".to_owned()],
    };
    let copies = vec![
        kernel.try_clone().map_err(host)?,
        initrd.try_clone().map_err(host)?,
    ];
    let target = Chain::of(vec![target], copies);
    let config = ImageConfig {
        job: ImageJob::BootFiles {
            kernel: boot.kernel.clone(),
            initrd: boot.initrd.clone(),
        },
        layers: chain.layers.clone(),
        foreign: None,
        target: target.layers.clone(),
    };
    let mut gifts = chain.gifts();
    gifts.extend(target.target_gifts());
    let shop = Shop {
        launcher,
        compiled,
        policies: options.policies.as_deref(),
        runtime: &options.runtime,
        name: &spec.name,
        within: Some(WITHIN),
    };
    let report = work::run_in(shop, config, &gifts, |_, _| {});
    let report = report.map_err(|error| fault(&disk.name, &error))?;
    let Some(found) = report.boot.filter(has_sizes) else {
        let error = WorkError::Lost("it has not told what it has found".to_owned());
        return Err(fault(&disk.name, &error));
    };
    tell(spec, &disk.name, &found);
    let cut = |file: &File, bytes: u64| {
        file.set_len(bytes)?;
        sealed(file)
    };
    let initrd = found.initrd.map(|file| cut(&initrd, file.bytes));
    Ok((
        cut(&kernel, found.kernel.bytes).map_err(host)?,
        initrd.transpose().map_err(host)?,
    ))
}

/// The process may have been taken over by what it has read.
fn has_sizes(found: &BootReport) -> bool {
    let initrd = found.initrd.as_ref().map_or(0, |file| file.bytes);
    found.kernel.bytes <= KERNEL_BYTES_MAX && initrd <= INITRD_BYTES_MAX
}

fn tell(spec: &VmSpec, disk: &str, found: &BootReport) {
    tracing::info!(
        vm = spec.name,
        disk,
        volume = said(&found.volume),
        kernel = said(&found.kernel.path),
        initrd = found.initrd.as_ref().map(|file| said(&file.path)),
        "boots what is on its disk"
    );
}

fn fault(disk: &str, error: &WorkError) -> RunError {
    match error {
        WorkError::Failed(reason) => {
            // It names files of the guest.
            let reason = said(reason);
            let reason = reason.strip_prefix("disk: ").unwrap_or(&reason);
            RunError::Configuration(format!("booting from disk {disk}: {reason}"))
        }
        WorkError::Policy(reason) => RunError::Configuration(format!("policy: {reason}")),
        error => RunError::Start {
            who: format!("the process that reads the kernel from disk {disk}"),
            reason: error.to_string(),
        },
    }
}

/// The same file, open for reading alone, without a lock: the machine holds that.
fn read_again(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Memory for a file of at most so many bytes, which takes none yet and cannot grow.
fn room(name: &str, bytes: u64) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags)?);
    file.set_len(bytes)?;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::protocol::image::BootFile;
    use std::os::unix::fs::FileExt;

    #[test]
    fn room_does_not_grow_and_is_cut_to_what_was_written() {
        let file = room("test", 1 << 20).unwrap();
        assert!(file.write_all_at(b"x", 1 << 20).is_err());
        assert!(file.set_len((1 << 20) + 1).is_err());
        file.write_all_at(b"kernel", 0).unwrap();
        file.set_len(6).unwrap();
        let reader = sealed(&file).unwrap();
        assert!(file.write_all_at(b"x", 0).is_err());
        assert!(reader.write_all_at(b"x", 0).is_err());
        assert_eq!(reader.metadata().unwrap().len(), 6);
    }

    #[test]
    fn sizes_that_cannot_be_are_not_believed() {
        let file = |bytes| BootFile {
            path: "/k".to_owned(),
            bytes,
        };
        let report = |kernel, initrd| BootReport {
            volume: "v".to_owned(),
            kernel: file(kernel),
            initrd: Some(file(initrd)),
        };
        assert!(has_sizes(&report(KERNEL_BYTES_MAX, INITRD_BYTES_MAX)));
        assert!(!has_sizes(&report(KERNEL_BYTES_MAX + 1, 1)));
        assert!(!has_sizes(&report(1, u64::MAX)));
    }

    #[test]
    fn what_the_guest_has_named_is_shown_escaped() {
        let error = fault("d", &WorkError::Failed("disk: a\x1b[2Jb\n".to_owned())).to_string();
        assert!(error.starts_with("booting from disk d: a"), "{error}");
        assert!(!error.contains(['\x1b', '\n']), "{error}");
    }
}
