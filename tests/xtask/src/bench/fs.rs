//! `fs.*`: a shared folder on tmpfs, used by a FUSE client that is part of the guest program and polls in
//! ring 3, one request at a time. QEMU shares the same folder through virtiofsd, with the guest's memory in a memfd.
//!
//! `fs.meta` counts four operations of a file: it is made, looked up, asked about and removed. Closing and
//! forgetting it are part of the time.

use super::Print;
use super::figure::Figure;
use super::guest::{Bench, MEMORY_MIB, Running, Vmm, value};
use super::virtiofsd::{self, Virtiofsd};
use anyhow::{Result, ensure};
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

const SECONDS: u32 = 1;
/// Who owns the folder where this process is root: a user that exists nowhere else. Root's own would have
/// Bulkhead's process map it first.
const OWNER: u32 = 61_234;

struct Load {
    name: &'static str,
    unit: &'static str,
    arguments: &'static str,
    /// The key of the record that is counted, and what of it makes one unit.
    counted: (&'static str, f64),
}

const LOADS: [Load; 3] = [
    Load {
        name: "fs.meta",
        unit: "op/s",
        arguments: "op=meta",
        counted: ("operations", 1.0),
    },
    Load {
        name: "fs.read_1m",
        unit: "MB/s",
        arguments: "op=read bs=1m size=64m",
        counted: ("bytes", 1e6),
    },
    Load {
        name: "fs.write_1m",
        unit: "MB/s",
        arguments: "op=write bs=1m size=64m",
        counted: ("bytes", 1e6),
    },
];

pub(super) fn run(bench: &Bench, print: &mut Print<'_>) -> Result<()> {
    let virtiofsd = bench.has_peer().then(virtiofsd::build).transpose()?;
    for load in &LOADS {
        let (ours, peer) = bench.alternate(|vmm| {
            let folder = empty_folder(bench)?;
            // Dropped last: it ends with its machine.
            let (_server, running) = start(bench, vmm, load, &folder, virtiofsd.as_deref())?;
            let rate = measure(running, load)?;
            let left = fs::read_dir(&folder)?.count();
            ensure!(left == 0, "the guest left {left} files");
            Ok(rate)
        })?;
        let figure = Figure::new(load.name, load.unit, ours, peer);
        print(figure.beside(virtiofsd::PEER))?;
    }
    Ok(())
}

fn empty_folder(bench: &Bench) -> Result<PathBuf> {
    let folder = bench.directory().join("folder");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir(&folder)?;
    if nix::unistd::geteuid().is_root() {
        chown(&folder, Some(OWNER), Some(OWNER))?;
    }
    Ok(folder)
}

/// The guest at its load, with what serves the folder if that is a process of its own.
fn start(
    bench: &Bench,
    vmm: Vmm,
    load: &Load,
    folder: &Path,
    virtiofsd: Option<&Path>,
) -> Result<(Option<Virtiofsd>, Running)> {
    let arguments = format!(
        "mode=bench-fs {} seconds={SECONDS} end=debug:0",
        load.arguments
    );
    let mut command = bench.command(vmm, &arguments, None);
    let server = match (vmm, virtiofsd) {
        (Vmm::Qemu, Some(program)) => {
            let server = Virtiofsd::start(program, folder, bench.directory())?;
            let memory = format!("memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on");
            command.args(["-object", &memory, "-machine", "memory-backend=memory"]);
            let socket = server.socket().display();
            command.args(["-chardev", &format!("socket,id=fs0,path={socket}")]);
            command.args(["-device", "vhost-user-fs-device,chardev=fs0,tag=bench"]);
            Some(server)
        }
        _ => {
            command.arg("--share");
            command.arg(format!("{},tag=bench", folder.display()));
            None
        }
    };
    Ok((server, bench.spawn(command)?))
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of one second are far below 2^52"
)]
fn measure(mut running: Running, load: &Load) -> Result<f64> {
    let (begin, _) = running.record("bench-fs.begin")?;
    let (end, keys) = running.record("bench-fs.end")?;
    // Told after the content was verified; an error is one of `record`'s.
    running.record("bench-fs.done")?;
    let _exit_code = running.finish()?;
    let (key, one) = load.counted;
    Ok(value(&keys, key)? as f64 / one / (end - begin).as_secs_f64())
}
