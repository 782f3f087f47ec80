//! `boot.exec_to_first_byte`: exec of the VMM to the guest's first serial byte, as read by the
//! parent that started it. No daemon, pool or snapshot exists before; only on-disk caches do.

use super::Print;
use super::figure::Figure;
use super::guest::Bench;
use anyhow::Result;

pub(super) fn run(bench: &Bench, print: &mut Print<'_>) -> Result<()> {
    let (ours, peer) = bench.alternate(|vmm| {
        let mut running = bench.start(vmm, "mode=hello end=debug:0", None)?;
        let elapsed = running.first_byte_ms()?;
        let _exit_code = running.finish()?;
        Ok(elapsed)
    })?;
    print(Figure::new("boot.exec_to_first_byte", "ms", ours, peer))
}
