//! The block device of `bulkhead-blk`, on the guest's own queues and buffers.
//!
//! The loop is that of a device process, and waits as the gate thread does: it looks at the rings for as
//! long as that has paid lately, and then sleeps.

use anyhow::{Context, Result};
use bulkhead_blk::Blk;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::protocol::birth::{
    DeviceConfig, DeviceOwn, DiskLimits, FIRST_GRANT_FD, FdRole, Grant, ImageFormat, ImageLayer,
    UringGrant, VirtioSlot,
};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_runtime::spin::Spin;
use bulkhead_runtime::wait::Waiter;
use bulkhead_runtime::{Device, Grants, Kept, Queues, Setup, cpus};
use bulkhead_vcpu::gate::{Asked, Ungated};
use bulkhead_vcpu::virtio::SlotFds;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::File;
use std::hint::spin_loop;
use std::path::Path;
use std::time::Instant;

const TOKEN_ASKED: u8 = 0;
const TOKEN_NOTIFY: u8 = 1;
const QUEUE_SIZE: u16 = 256;
/// Of a window that nobody uses.
const WINDOW_BYTES: u32 = 1 << 20;
/// VIRTIO_BLK_F_FLUSH.
const FEATURES: u64 = 1 << 9;
/// IORING_OP_READ, WRITE, FSYNC and FALLOCATE.
const OPERATIONS: [u8; 4] = [22, 23, 3, 17];
const LOOKS_PER_CLOCK: u32 = 16;
const REQUESTS_PER_PASS: u32 = 256;

/// The disk, as a device takes it. Closes everything else that is open but the standard descriptors.
pub(crate) fn grants(disk: &Path) -> Result<Grants> {
    let file = File::options().read(true).write(true).open(disk);
    let file = file.with_context(|| disk.display().to_string())?;
    let fd = fcntl(&file, FcntlArg::F_DUPFD_CLOEXEC(FIRST_GRANT_FD))?;
    let grant = Grant {
        role: FdRole::Disk,
        index: 0,
        fd,
    };
    Ok(Grants::adopt(&[grant], &[])?)
}

/// The device as the transport sees it.
pub(crate) fn slot() -> VirtioSlot {
    VirtioSlot {
        slot: 0,
        name: "disk".to_owned(),
        kind: VirtioKind::Blk,
        generation: 1,
        queue_sizes: vec![QUEUE_SIZE],
        window_bytes: WINDOW_BYTES,
        features: FEATURES,
        config: Vec::new(),
        output_position: 0,
        input_position: 0,
    }
}

/// The transport is made together with a gate, which is not used.
pub(crate) fn unused_window() -> Result<SlotFds> {
    Ok(SlotFds {
        window: sealed_memfd("window", WINDOW_BYTES.into())?,
        kick: Doorbell::new()?.into(),
        call: Doorbell::new()?.into(),
    })
}

/// Serves until the machine ends.
pub(crate) fn serve(boundary: &Ungated, mut grants: Grants, memory_bytes: u32) -> Result<()> {
    let waiter = Waiter::new()?;
    waiter.watch(&boundary.bell, TOKEN_ASKED)?;
    for notify in &boundary.notify {
        waiter.watch(notify, TOKEN_NOTIFY)?;
    }
    let over = |queues| Queues::over(boundary.memory.clone(), memory_bytes, queues);
    let mut queues = over(Vec::new());
    let VirtioSlot {
        kind,
        queue_sizes,
        window_bytes,
        features,
        config,
        ..
    } = slot();
    let config = DeviceConfig {
        kind,
        queue_sizes,
        window_bytes,
        features,
        config,
        own: DeviceOwn::Blk {
            read_only: false,
            serial: String::new(),
            waits_for_room: false,
            limits: DiskLimits::default(),
            ephemeral: false,
            layers: vec![ImageLayer {
                format: ImageFormat::Raw,
                files: vec!["disk".to_owned()],
            }],
            bytes_min: 0,
        },
    };
    let operations = UringGrant {
        opcodes: OPERATIONS.to_vec(),
    };
    let memory = queues.memory();
    let kept = Kept::nothing(queues.memory());
    let mut setup = Setup::new(
        &config,
        &mut grants,
        &operations,
        memory,
        kept,
        cpus(),
        1,
        &waiter,
    );
    let mut blk = Blk::start(&mut setup)?;
    boundary.publish(blk.features(), &blk.config());
    let mut spin = Spin::beside(1, cpus());
    loop {
        for asked in boundary.asked() {
            match asked {
                Asked::Start {
                    features,
                    queues: made,
                } => {
                    queues = over(made.into_iter().flatten().collect());
                    blk.on_driver(Some(features), &mut queues)?;
                }
                Asked::Reset => {
                    blk.on_driver(None, &mut queues)?;
                    while blk.in_flight() > 0 {
                        blk.settle(&mut queues)?;
                    }
                    queues = over(Vec::new());
                    boundary.reset_is_done();
                }
                Asked::Stop => return Ok(()),
            }
        }
        if pass(&mut blk, &mut queues, boundary)? || look(&blk, &queues, &spin) {
            continue;
        }
        if !queues.ask_for_kicks(|_| true)? && !blk.has_news() {
            let asleep = Instant::now();
            waiter.sleep(None)?;
            spin.slept(asleep.elapsed());
        }
    }
}

/// Does everything there is to do now. Returns whether there was anything.
fn pass(blk: &mut Blk, queues: &mut Queues, boundary: &Ungated) -> Result<bool> {
    let mut busy = false;
    for index in 0..queues.len() {
        let mut budget = REQUESTS_PER_PASS;
        while budget > 0
            && !blk.is_full()
            && let Some(chain) = queues.pop(index)?
        {
            blk.on_request(index, chain, queues)?;
            budget -= 1;
            busy = true;
        }
    }
    busy |= blk.settle(queues)?;
    if queues.call_needed()? {
        boundary.interrupt();
    }
    Ok(busy)
}

/// Looks for work for as long as it has paid lately.
fn look(blk: &Blk, queues: &Queues, spin: &Spin) -> bool {
    let start = Instant::now();
    while start.elapsed() < spin.budget() {
        for _ in 0..LOOKS_PER_CLOCK {
            if queues.any_waiting() || blk.has_news() {
                return true;
            }
            spin_loop();
        }
    }
    false
}
