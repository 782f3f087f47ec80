//! What the gates cost, measured by doing without them: one process in which Bulkhead's own block device
//! works on guest memory itself. Never installed; `cargo xtask bench gate` runs it in turns with
//! `bulkhead run` and QEMU.
//!
//! vCPUs, transport and device are the product's. There are no walls, no window, no other process:
//! whoever takes this device over has the guest.
#![forbid(unsafe_code)]

mod disk;
mod serial;

use anyhow::{Context, Result, bail};
use bulkhead_ipc::protocol::birth::{HugePages, VcpuConfig};
use bulkhead_ipc::protocol::vcpu::Outcome;
use bulkhead_vcpu::group::Directive;
use bulkhead_vcpu::setup::{self, Machine, Resources};
use clap::Parser;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// A machine with one vCPU, a serial port on standard output, and a disk that shares its memory.
#[derive(Debug, Parser)]
struct Options {
    /// Kernel.
    #[arg(long)]
    kernel: PathBuf,
    /// Its command line.
    #[arg(long)]
    cmdline: String,
    /// Raw image of the disk.
    #[arg(long)]
    disk: PathBuf,
    /// Guest memory in MiB.
    #[arg(long)]
    memory_mib: u32,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    // First, since what is granted is all that is open afterwards.
    let grants = disk::grants(&options.disk)?;
    let memory_bytes = options.memory_mib << 20;
    let (serial, legacy) = serial::connect()?;
    let config = VcpuConfig {
        vcpus: 1,
        memory_bytes: memory_bytes.into(),
        huge_pages: HugePages::Transparent,
        cmdline: options.cmdline,
        quirks: Path::new("/sys/module/kvm_pvm").exists(),
        devices: vec![disk::slot()],
        legacy_generation: serial::GENERATION,
        legacy_output_position: 0,
    };
    let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let resources = Resources {
        kvm: kvm.context("/dev/kvm")?.into(),
        kernel: open(&options.kernel)?,
        initrd: None,
        core: None,
        legacy,
        devices: vec![disk::unused_window()?],
        adoption: None,
    };
    let Machine {
        gates,
        loops,
        group,
        ..
    } = setup::build(config, resources, |groundwork| {
        let (told, result) = flume::bounded(1);
        let _awaited = told.send(groundwork.lay());
        Ok(result)
    })?;
    let boundary = gates.ungated().context("the machine has no device")?;
    std::thread::spawn(move || serial.serve());
    std::thread::spawn(move || {
        let served = disk::serve(&boundary, grants, memory_bytes);
        // Nobody is left to answer the guest.
        served.expect("the disk");
    });
    for mut vcpu in loops {
        let group = Arc::clone(&group);
        std::thread::spawn(move || {
            group.join(vcpu.index);
            vcpu.run();
        });
    }
    group.direct(Directive::Run);
    let ending = loop {
        if let Some(ending) = group.ending() {
            break ending;
        }
        let bell = PollFd::new(group.wake().as_fd(), PollFlags::POLLIN);
        poll(&mut [bell], PollTimeout::NONE)?;
        group.wake().take();
    };
    match ending.outcome {
        Outcome::DebugExit(value) => Ok(ExitCode::from(value << 1 | 1)),
        Outcome::PowerOff => Ok(ExitCode::SUCCESS),
        other => bail!("the machine ended with {other:?}: {}", ending.detail),
    }
}
