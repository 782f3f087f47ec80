//! The supervisor and the life of a machine, the very code that the broker runs, driven through seeded
//! schedules: processes die, break their protocol, hang, cannot be killed, come up late or never,
//! guests end in every way, owners change their minds, and news arrive in any order.
//!
//! A failure prints its seed; `BULKHEAD_SIM_SEED=N cargo test --test sim` runs that schedule alone,
//! `BULKHEAD_SIM_STEPS=N` changes how many steps are made in all.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

mod world;

use world::{Mood, World};

/// Steps of all schedules together.
const STEPS: u64 = 1_000_000;
/// Steps of one schedule before its machine is told to end.
const STEPS_OF_ONE: u64 = 400;

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value} is no number")),
    )
}

/// Runs one schedule to the end of its machine and returns how many steps it took.
fn schedule(seed: u64) -> u64 {
    let mut world = World::new(seed);
    while world.steps() < STEPS_OF_ONE && world.step() {}
    world.end();
    while world.step() {}
    world.check_end();
    world.steps()
}

#[test]
fn every_schedule_keeps_the_invariants_and_ends() {
    if let Some(seed) = variable("BULKHEAD_SIM_SEED") {
        let _steps = schedule(seed);
        return;
    }
    let wanted = variable("BULKHEAD_SIM_STEPS").unwrap_or(STEPS);
    let (mut steps, mut seed) = (0, 0);
    while steps < wanted {
        let made = std::panic::catch_unwind(|| schedule(seed));
        steps += made.unwrap_or_else(|_| panic!("BULKHEAD_SIM_SEED={seed} shows it"));
        seed += 1;
    }
}

#[test]
fn machine_left_alone_runs_for_ever() {
    let mut world = World::with_mood(7, Mood::Quiet);
    for _ in 0..2000 {
        assert!(world.step(), "heartbeats go on");
    }
    assert!(world.is_serving());
}

#[test]
fn machine_whose_devices_keep_dying_is_served_again_when_that_stops() {
    for seed in 0..200 {
        let mut world = World::with_mood(seed, Mood::Deadly);
        for _ in 0..200 {
            world.step();
        }
        world.calm_down();
        for _ in 0..2000 {
            world.step();
        }
        assert!(world.is_serving_or_given_up(), "seed {seed}");
        world.bring_back();
        for _ in 0..2000 {
            world.step();
        }
        assert!(world.is_serving(), "seed {seed}");
    }
}
