//! A request that kills whichever process works on it costs one I/O error, and nothing else.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::pattern::{self, SECTOR};
use bulkhead_tests::{Machine, Programs, Restart, disk};
use std::os::unix::fs::FileExt;

/// The sector that ends `bulkhead-poison`.
const POISON: u64 = 1234;
const SECTORS: u64 = 4096;
/// Each round writes and reads every sector once.
const ROUNDS: usize = 3;
/// Processes that die with a request before it is given up.
const DEATHS: usize = 3;

#[test]
fn poisoned_sector_costs_one_error_each_time_and_every_other_sector_is_right() {
    let programs = Programs::with("blk", "bulkhead-poison");
    let image = disk(SECTORS * SECTOR as u64);
    let load = format!(
        "mode=blk-poison sector={POISON} sectors={SECTORS} count={ROUNDS} qd=16 timeout=60"
    );
    let path = image.path().to_str().unwrap();
    let arguments = ["--libexec-dir", programs.argument(), "--disk", path];
    let ended = Machine::test_guest(&load, &arguments).wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    let attempts = 2 * ROUNDS;
    let end = format!("BH blk-poison.end rounds={ROUNDS} ");
    assert!(ended.console.contains(&end), "{ended:?}");
    assert!(
        ended.console.contains(&format!(" refused={attempts} ")),
        "{ended:?}"
    );
    assert!(ended.console.contains("BH done errors=0"), "{ended:?}");

    // The machine says which requests it gave up, and never the device.
    let given_up = ended.errors.matches("disk0 gave up a request").count();
    assert_eq!(given_up, attempts, "{}", ended.errors);
    assert!(!ended.errors.contains("degraded"), "{}", ended.errors);
    // One that dies before it has served is counted by its successor's generation alone.
    let last = Restart::all(&ended.errors).last().map(|r| r.generation);
    let deaths = u32::try_from(attempts * DEATHS).unwrap();
    assert_eq!(last, Some(1 + deaths), "{}", ended.errors);

    // Behind the guest's back: the last round's pattern all around the sector, which nobody could write.
    let mut bytes = vec![0; usize::try_from(SECTORS).unwrap() * SECTOR];
    image.as_file().read_exact_at(&mut bytes, 0).unwrap();
    let seed = ROUNDS as u64;
    let (before, rest) = bytes.split_at(usize::try_from(POISON).unwrap() * SECTOR);
    let (poisoned, after) = rest.split_at(SECTOR);
    assert_eq!(pattern::first_difference(seed, 0, before), None);
    assert_eq!(pattern::first_difference(seed, POISON + 1, after), None);
    assert!(
        poisoned.iter().all(|&byte| byte == 0),
        "it was never written"
    );
}
