//! `mmio.write`, `legacy.read`: one access to a device register by a ring-0 loop of the guest, which is an exit for both.

use super::Print;
use super::figure::Figure;
use super::guest::{Bench, Vmm, value};
use anyhow::Result;

const ACCESSES: f64 = 20_000.0;

pub(super) fn run(bench: &Bench, print: &mut Print<'_>) -> Result<()> {
    for (name, mode) in [
        ("mmio.write", "bench-mmio"),
        ("legacy.read", "bench-legacy"),
    ] {
        let (ours, peer) = bench.alternate(|vmm| measure(bench, vmm, mode))?;
        print(Figure::new(name, "us", ours, peer))?;
    }
    Ok(())
}

fn measure(bench: &Bench, vmm: Vmm, mode: &str) -> Result<f64> {
    let arguments = format!("mode={mode} count={ACCESSES} end=debug:0");
    let mut running = bench.start(vmm, &arguments, None)?;
    let (begin, _) = running.record(&format!("{mode}.begin"))?;
    let (end, keys) = running.record(&format!("{mode}.end"))?;
    anyhow::ensure!(
        value(&keys, "count")? == 20_000,
        "the guest did something else: {keys}"
    );
    let _exit_code = running.finish()?;
    Ok((end - begin).as_secs_f64() * 1e6 / ACCESSES)
}
