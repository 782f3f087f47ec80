//! The modes that the command line can name, one file each.

mod bench;
mod bench_blk;
mod bench_fs;
mod bench_net;
mod beside;
mod blk;
mod blk_held;
mod blk_load;
mod blk_poison;
mod blk_sweep;
mod blocks;
mod button;
mod changing;
mod clock;
mod console;
mod fuzz;
mod fuzz_shapes;
mod hello;
mod idle;
mod legacy;
mod memory;
mod net;
mod net_peer;
mod nonce;
mod pace;
mod rng;
mod serial;
mod share;
mod smp;
mod spare;
mod vsock;

use bulkhead_guest::record::Escaped;

use crate::machine::Machine;
use crate::report::{Failure, fail, say};
use crate::sys::phys;

type Mode = fn(&Machine) -> Result<(), Failure>;

const MODES: &[(&str, Mode)] = &[
    ("bench-blk", bench_blk::run),
    ("bench-fs", bench_fs::run),
    ("bench-legacy", bench::legacy),
    ("bench-mmio", bench::mmio),
    ("bench-net", bench_net::run),
    ("beside", beside::run),
    ("blk", blk::run),
    ("blk-held", blk_held::run),
    ("blk-load", blk_load::run),
    ("blk-poison", blk_poison::run),
    ("blocks", blocks::run),
    ("busy", smp::busy),
    ("button", button::run),
    ("clock", clock::run),
    ("console", console::run),
    ("counter", changing::counter),
    ("dirty", changing::dirty),
    ("fuzz", fuzz::run),
    ("hello", hello::run),
    ("idle", idle::run),
    ("legacy", legacy::run),
    ("memory", memory::run),
    ("net", net::run),
    ("net-peer", net_peer::run),
    ("nonce", nonce::run),
    ("pace", pace::run),
    ("rng", rng::run),
    ("serial", serial::run),
    ("share", share::run),
    ("share-load", share::load),
    ("share-look", share::look),
    ("share-refused", share::refusals),
    ("smp", smp::run),
    ("vsock-ask", vsock::ask),
    ("vsock-echo", vsock::echo),
];

/// Runs the modes of the command line in order; a failure ends its mode, not the others.
pub fn run_all(machine: &Machine) {
    let args = machine.args();
    say!(
        "hello version=1 mode={} memory_bytes={}",
        Escaped(args.text("mode").unwrap_or("hello").as_bytes()),
        hello::ram_bytes(machine)
    );
    for name in args.modes() {
        let Some((name, mode)) = MODES.iter().find(|(known, _)| *known == name) else {
            fail!(
                "boot",
                "kind=unknown_mode mode={}",
                Escaped(name.as_bytes())
            );
            continue;
        };
        let mark = phys::heap_mark();
        match mode(machine) {
            Ok(()) => say!("mode.end name={name} result=ok"),
            Err(failure) => {
                fail!(name, "{failure}");
                say!("mode.end name={name} result=failed");
            }
        }
        crate::virtio::mmio::reset_all(machine);
        phys::heap_release(mark);
    }
}

/// How long to wait for a device: `timeout=` in seconds, 10 by default.
fn timeout_ms(machine: &Machine) -> Result<u64, Failure> {
    Ok(machine.number("timeout", 10)?.saturating_mul(1000))
}
