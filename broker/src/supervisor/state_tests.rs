use super::*;
use bulkhead_ipc::ident::ProcKind;
use proptest::prelude::*;
use std::collections::HashMap;

const SECOND: Duration = Duration::from_secs(1);
const RESTART: RestartEntry = RestartEntry {
    restarts_max: 3,
    window_ms: 10_000,
    backoff_ms_min: 10,
    backoff_ms_max: 40,
};
const HEARTBEAT: HeartbeatEntry = HeartbeatEntry {
    interval_ms: 1000,
    misses_max: 2,
};

fn id(n: u16) -> ProcId {
    ProcId {
        kind: match n {
            0 => ProcKind::Vcpu,
            _ => ProcKind::Blk,
        },
        index: n,
        generation: 1,
    }
}

fn next(n: u16, generation: u32) -> ProcId {
    ProcId {
        generation,
        ..id(n)
    }
}

fn rule(on_death: OnDeath) -> Rule {
    Rule {
        on_death,
        birth_timeout: 10 * SECOND,
        restart: (on_death == OnDeath::Restart).then_some(RESTART),
        heartbeat: None,
        faults: None,
    }
}

/// A machine of `count` processes: the vCPU process, and devices with this rule.
fn with(count: u16, device: Rule) -> Supervisor {
    let mut s = Supervisor::new(SECOND);
    for n in 0..count {
        let rule = match n {
            0 => rule(OnDeath::EndMachine),
            _ => device,
        };
        s.add(id(n), rule, Duration::ZERO);
    }
    s
}

fn supervisor(count: u16) -> Supervisor {
    with(count, rule(OnDeath::Degrade))
}

/// All processes are locked.
fn running(count: u16, device: Rule) -> Supervisor {
    let mut s = with(count, device);
    for n in 0..count {
        s.step(Event::Locked(id(n)), Duration::ZERO);
    }
    s
}

fn died(id: ProcId) -> Event {
    Event::Died {
        id,
        reason: "x".into(),
        killed: false,
    }
}

/// Lets the successor be launched and serve at `now`.
fn revive(s: &mut Supervisor, id: ProcId, now: Moment) -> Vec<Action> {
    s.step(Event::Launched(id), now);
    s.step(Event::Locked(id), now);
    s.step(Event::Serving(id), now)
}

#[test]
fn machine_is_up_when_the_last_process_is_locked() {
    let mut s = supervisor(3);
    assert_eq!(s.step(Event::Locked(id(0)), SECOND), []);
    assert_eq!(s.step(Event::Locked(id(2)), SECOND), []);
    assert_eq!(s.step(Event::Locked(id(1)), SECOND), [Action::AllLocked]);
    assert_eq!(s.next_deadline(), None);
}

#[test]
fn machine_is_up_also_when_a_device_dies_before_the_last_one_is_locked() {
    let mut s = with(3, rule(OnDeath::Restart));
    s.step(Event::Locked(id(0)), SECOND);
    s.step(Event::Locked(id(1)), SECOND);
    assert_eq!(s.step(died(id(1)), SECOND).len(), 0, "a moment later");
    assert_eq!(s.step(Event::Locked(id(2)), SECOND), []);
    let later = 2 * SECOND;
    assert_eq!(s.step(Event::Tick, later).len(), 1);
    let actions = revive(&mut s, next(1, 2), later);
    assert!(actions.contains(&Action::AllLocked), "{actions:?}");

    let mut s = with(3, rule(OnDeath::Degrade));
    s.step(Event::Locked(id(0)), SECOND);
    s.step(Event::Locked(id(1)), SECOND);
    s.step(died(id(1)), SECOND);
    let actions = s.step(Event::Locked(id(2)), SECOND);
    assert_eq!(actions, [Action::AllLocked], "without the lost one");
}

#[test]
fn process_that_is_not_ready_in_time_fails_the_start() {
    for device in [OnDeath::Degrade, OnDeath::Restart] {
        let mut s = with(2, rule(device));
        s.step(Event::Locked(id(0)), SECOND);
        assert_eq!(s.next_deadline(), Some(10 * SECOND));
        let actions = s.step(Event::Tick, 10 * SECOND);
        assert_eq!(actions[0], Action::Kill(id(1)));
        assert!(matches!(actions[1], Action::StartFailed { .. }));
    }
}

#[test]
fn machine_whose_start_has_failed_is_never_up() {
    for device in [OnDeath::Degrade, OnDeath::Restart] {
        let mut s = with(3, rule(device));
        s.step(Event::Locked(id(0)), SECOND);
        let actions = s.step(died(id(1)), SECOND);
        assert!(matches!(actions[..], [Action::StartFailed { .. }]));
        // Before it is ended.
        assert_eq!(s.step(Event::Locked(id(2)), SECOND), []);
    }
}

#[test]
fn dead_device_degrades_and_dead_vcpu_ends() {
    let mut s = running(2, rule(OnDeath::Degrade));
    assert!(matches!(
        s.step(died(id(1)), SECOND)[..],
        [Action::Degraded { .. }]
    ));
    let actions = s.step(died(id(0)), SECOND);
    assert!(matches!(
        actions[..],
        [Action::MachineLost { .. }, Action::AllGone]
    ));
}

#[test]
fn dead_device_is_followed_by_its_next_generation() {
    let mut s = running(2, rule(OnDeath::Restart));
    let revive_it = Action::Revive {
        id: next(1, 2),
        reason: "x".into(),
        blame: true,
    };
    assert_eq!(s.step(died(id(1)), 5 * SECOND), [revive_it]);
    assert_eq!(s.step(died(id(1)), 5 * SECOND), [], "a death counts once");
    let back = Action::Revived {
        id: next(1, 2),
        reason: "x".into(),
        after: SECOND,
    };
    s.step(Event::Launched(next(1, 2)), 6 * SECOND);
    assert_eq!(s.step(Event::Locked(next(1, 2)), 6 * SECOND), []);
    assert_eq!(s.step(Event::Serving(next(1, 2)), 6 * SECOND), [back]);
}

#[test]
fn what_was_killed_from_outside_is_not_blamed_on_its_requests() {
    let mut s = running(2, rule(OnDeath::Restart));
    let killed = |id| Event::Died {
        id,
        reason: "x".into(),
        killed: true,
    };
    let blamed = |actions: &[Action]| match actions {
        [Action::Revive { blame, .. }] => *blame,
        other => panic!("{other:?}"),
    };
    assert!(!blamed(&s.step(killed(id(1)), SECOND)));
    revive(&mut s, next(1, 2), SECOND);
    let reason = "broke its ring".to_owned();
    let broke = Event::Broke {
        id: next(1, 2),
        reason: reason.clone(),
    };
    assert_eq!(s.step(broke, 2 * SECOND), [Action::Kill(next(1, 2))]);
    let actions = s.step(killed(next(1, 2)), 2 * SECOND);
    assert!(blamed(&actions), "the broker killed it for what it did");
    assert!(matches!(&actions[..], [Action::Revive { reason: r, .. }] if *r == reason));
}

#[test]
fn process_that_dies_at_once_is_restarted_after_longer_and_longer_pauses() {
    let mut s = running(2, rule(OnDeath::Restart));
    let mut now = 100 * SECOND;
    s.step(died(id(1)), now);
    for (generation, pause) in [(2, 10), (3, 20)] {
        s.step(Event::Launched(next(1, generation)), now);
        assert_eq!(s.step(died(next(1, generation)), now), []);
        let due = now + Duration::from_millis(pause);
        assert_eq!(s.next_deadline(), Some(due));
        now = due;
        let actions = s.step(Event::Tick, now);
        assert!(matches!(&actions[..], [Action::Revive { .. }]));
    }
}

#[test]
fn too_many_restarts_degrade_and_the_owner_brings_the_device_back() {
    let mut s = running(2, rule(OnDeath::Restart));
    let mut now = 100 * SECOND;
    for generation in 1..4 {
        now += SECOND;
        s.step(died(next(1, generation)), now);
        revive(&mut s, next(1, generation + 1), now);
    }
    now += SECOND;
    let actions = s.step(died(next(1, 4)), now);
    let [Action::Degraded { reason, .. }] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert!(reason.contains("restarted 3 times"), "{reason}");
    assert_eq!(s.next_deadline(), None);
    let actions = s.step(Event::Replace(next(1, 4)), now);
    assert!(matches!(&actions[..], [Action::Revive { id, .. }] if *id == next(1, 5)));
    let actions = revive(&mut s, next(1, 5), now);
    assert!(matches!(&actions[..], [Action::Revived { .. }]));
}

#[test]
fn restarts_of_long_ago_do_not_count() {
    let mut s = running(2, rule(OnDeath::Restart));
    for generation in 1..50 {
        let now = SECOND * 4 * generation;
        let actions = s.step(died(next(1, generation)), now);
        assert!(matches!(&actions[..], [Action::Revive { .. }]));
        revive(&mut s, next(1, generation + 1), now);
    }
}

#[test]
fn device_that_cannot_be_fenced_is_lost_at_once() {
    let mut s = running(2, rule(OnDeath::Restart));
    s.step(died(id(1)), SECOND);
    let hopeless = Event::NotRevived {
        id: next(1, 2),
        reason: "cannot be fenced".into(),
        hopeless: true,
    };
    let actions = s.step(hopeless, SECOND);
    assert!(matches!(&actions[..], [Action::Degraded { .. }]));
    assert_eq!(s.next_deadline(), None);
}

#[test]
fn replaced_device_is_asked_to_go_and_that_counts_as_no_failure() {
    let mut s = running(2, rule(OnDeath::Restart));
    for generation in 1..10 {
        let now = SECOND + Duration::from_millis(generation.into());
        let old = next(1, generation);
        assert_eq!(s.step(Event::Replace(old), now), [Action::Ask(old)]);
        assert_eq!(s.step(Event::Replace(old), now), []);
        let actions = s.step(died(old), now);
        let new = next(1, generation + 1);
        assert!(
            matches!(&actions[..], [Action::Revive { id, blame: false, .. }] if *id == new),
            "{actions:?}"
        );
        revive(&mut s, new, now);
    }
}

#[test]
fn what_follows_a_replaced_device_may_fail_once_without_counting() {
    // A rule without restarts: what was asked for must not depend on them.
    let mut s = running(
        2,
        Rule {
            restart: None,
            ..rule(OnDeath::Restart)
        },
    );
    s.step(Event::Replace(id(1)), SECOND);
    s.step(died(id(1)), SECOND);
    s.step(Event::Launched(next(1, 2)), SECOND);
    let actions = s.step(died(next(1, 2)), SECOND);
    assert!(
        matches!(&actions[..], [Action::Revive { id, .. }] if *id == next(1, 3)),
        "{actions:?}"
    );
    s.step(Event::Launched(next(1, 3)), SECOND);
    let actions = s.step(died(next(1, 3)), SECOND);
    assert!(
        matches!(&actions[..], [Action::Degraded { .. }]),
        "{actions:?}"
    );
}

#[test]
fn stuck_process_is_killed_after_missed_heartbeats_and_an_answering_one_is_not() {
    let device = Rule {
        heartbeat: Some(HEARTBEAT),
        ..rule(OnDeath::Restart)
    };
    let mut s = running(2, device);
    let beat = |s: &mut Supervisor, answer: bool| {
        let at = s.next_deadline().unwrap();
        let actions = s.step(Event::Tick, at);
        if let [Action::Ping { id, number }] = actions[..]
            && answer
        {
            s.step(Event::Pong { id, number }, at);
        }
        actions
    };
    for answer in [true, true, false, true, false, false] {
        let actions = beat(&mut s, answer);
        assert!(matches!(actions[..], [Action::Ping { .. }]));
    }
    assert_eq!(beat(&mut s, true), [Action::Kill(id(1))]);
    let killed = Event::Died {
        id: id(1),
        reason: "killed".into(),
        killed: true,
    };
    let actions = s.step(killed, 20 * SECOND);
    assert!(
        matches!(&actions[..], [Action::Revive { reason, .. }] if reason.contains("heartbeats")),
        "{actions:?}"
    );
}

#[test]
fn process_that_cannot_be_killed_is_given_up_and_has_no_second_beside_it() {
    let mut s = running(2, rule(OnDeath::Restart));
    let reason = "b".to_owned();
    s.step(Event::Broke { id: id(1), reason }, SECOND);
    let actions = s.step(Event::Tick, 2 * SECOND);
    assert!(matches!(&actions[..], [Action::Degraded { .. }]));
    assert_eq!(s.step(Event::Replace(id(1)), 3 * SECOND), []);
    assert_eq!(s.step(died(id(1)), 4 * SECOND), []);
    let actions = s.step(Event::Replace(id(1)), 5 * SECOND);
    assert!(matches!(&actions[..], [Action::Revive { .. }]));
}

/// One whose predecessor died, until it is killed for being late.
fn late(s: &mut Supervisor, generation: u32, now: Moment) -> Vec<Action> {
    s.step(Event::Launched(next(1, generation)), now);
    let now = now + 10 * SECOND;
    assert_eq!(
        s.step(Event::Tick, now),
        [Action::Kill(next(1, generation))]
    );
    s.step(died(next(1, generation)), now)
}

#[test]
fn process_that_is_late_again_and_again_is_given_up_though_restarts_are_few() {
    let faults = FaultsEntry {
        max: 2,
        window_ms: 600_000,
    };
    let rule = Rule {
        faults: Some(faults),
        ..rule(OnDeath::Restart)
    };
    let mut s = running(2, rule);
    s.step(died(id(1)), SECOND);
    for (n, generation) in (1u32..).zip(2..4) {
        let at = n * 20 * SECOND;
        let _pause = late(&mut s, generation, at);
        let actions = s.step(Event::Tick, at + 11 * SECOND);
        assert!(
            matches!(&actions[..], [Action::Revive { .. }]),
            "{actions:?}"
        );
    }
    let actions = late(&mut s, 4, 60 * SECOND);
    assert!(
        matches!(&actions[..], [Action::Degraded { reason, .. }] if reason.contains("at fault 3 times")),
        "{actions:?}"
    );
    // Its owner may have it back, with a clean record.
    s.step(Event::Replace(next(1, 4)), 80 * SECOND);
    let actions = late(&mut s, 5, 80 * SECOND);
    assert!(
        matches!(&actions[..], [Action::Revive { .. }]),
        "{actions:?}"
    );
}

#[test]
fn deaths_that_are_no_faults_are_not_counted_as_such() {
    let faults = FaultsEntry {
        max: 1,
        window_ms: 600_000,
    };
    let rule = Rule {
        faults: Some(faults),
        ..rule(OnDeath::Restart)
    };
    let mut s = running(2, rule);
    for generation in 1..20u32 {
        let now = generation * 20 * SECOND;
        let actions = s.step(died(next(1, generation)), now);
        assert!(
            matches!(&actions[..], [Action::Revive { .. }]),
            "{actions:?}"
        );
        s.step(Event::Launched(next(1, generation + 1)), now);
        s.step(Event::Serving(next(1, generation + 1)), now);
    }
}

#[test]
fn process_that_was_given_up_alive_is_lost_once() {
    let mut s = running(2, rule(OnDeath::Restart));
    let broke = || Event::Broke {
        id: id(1),
        reason: "b".to_owned(),
    };
    s.step(broke(), SECOND);
    s.step(Event::Tick, 2 * SECOND);
    assert_eq!(s.step(broke(), 3 * SECOND), []);
    assert_eq!(s.next_deadline(), None);
}

#[test]
fn news_of_an_old_generation_change_nothing() {
    let mut s = supervisor(1);
    let old = next(0, 0);
    assert_eq!(s.step(Event::Locked(old), SECOND), []);
    assert_eq!(s.step(died(old), SECOND), []);
}

#[test]
fn process_that_does_not_end_is_killed() {
    let mut s = supervisor(1);
    s.step(Event::Locked(id(0)), SECOND);
    assert_eq!(s.step(Event::End, SECOND), [Action::Ask(id(0))]);
    assert_eq!(s.next_deadline(), Some(2 * SECOND));
    assert_eq!(s.step(Event::Tick, 2 * SECOND), [Action::Kill(id(0))]);
    assert_eq!(s.step(died(id(0)), 3 * SECOND), [Action::AllGone]);
}

/// What the world does in a property test. Processes are named by slot; which generation is meant is
/// whichever is alive, as in life, or an old one.
#[derive(Debug, Clone)]
enum Move {
    Lock(u16),
    Serve(u16),
    Break(u16),
    Die(u16, bool),
    Launch(u16, bool),
    Replace(u16),
    OldNews(u16),
    End,
    Tick,
}

fn any_move() -> impl Strategy<Value = Move> {
    let who = || 0u16..4;
    prop_oneof![
        4 => who().prop_map(Move::Lock),
        4 => who().prop_map(Move::Serve),
        1 => who().prop_map(Move::Break),
        3 => (who(), any::<bool>()).prop_map(|(n, k)| Move::Die(n, k)),
        4 => (who(), any::<bool>()).prop_map(|(n, ok)| Move::Launch(n, ok)),
        1 => who().prop_map(Move::Replace),
        1 => who().prop_map(Move::OldNews),
        1 => Just(Move::End),
        4 => Just(Move::Tick),
    ]
}

/// The world around the supervisor: which processes are alive.
#[derive(Default)]
struct World {
    alive: HashMap<u16, ProcId>,
    wanted: HashMap<u16, ProcId>,
    last: HashMap<u16, ProcId>,
    restarts: HashMap<u16, Vec<Moment>>,
    ended: bool,
    told_lost: HashMap<ProcId, u32>,
    start_failed: bool,
}

impl World {
    fn watch(&mut self, actions: &[Action], now: Moment, asked_for: bool) {
        for action in actions {
            match action {
                Action::Revive { id, .. } => {
                    assert!(!self.ended, "nothing is restarted at the end");
                    assert!(!self.alive.contains_key(&id.index), "two are alive");
                    assert!(id.generation > self.last[&id.index].generation);
                    self.wanted.insert(id.index, *id);
                    self.last.insert(id.index, *id);
                    let restarts = self.restarts.entry(id.index).or_default();
                    if asked_for {
                        restarts.clear();
                    } else {
                        restarts.push(now);
                    }
                    let window = Duration::from_millis(RESTART.window_ms.into());
                    let recent = restarts.iter().filter(|&&at| at + window > now).count();
                    // A pause may put the last restart of a window behind its end.
                    assert!(recent <= usize::from(RESTART.restarts_max) + 1, "too often");
                }
                Action::Degraded { id, .. }
                | Action::MachineLost { id, .. }
                | Action::StartFailed { id, .. } => {
                    assert!(!self.ended, "a planned end is no loss");
                    let told = self.told_lost.entry(*id).or_default();
                    *told += 1;
                    assert!(*told <= 1, "{id} is lost once");
                    self.start_failed |= matches!(action, Action::StartFailed { .. });
                }
                Action::AllLocked => assert!(!self.start_failed, "up, and never started"),
                _ => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn in_any_order_one_generation_lives_restarts_are_bounded_and_everything_ends(
        moves in prop::collection::vec((any_move(), 0u64..3000), 0..120)
    ) {
        let mut s = with(4, rule(OnDeath::Restart));
        let mut world = World::default();
        for n in 0..4 {
            world.alive.insert(n, id(n));
            world.last.insert(n, id(n));
        }
        let mut now = Duration::ZERO;
        for (step, ms) in moves {
            now += Duration::from_millis(ms);
            let mut asked_for = false;
            let reason = "r".to_owned();
            let event = match step {
                Move::Lock(n) => world.alive.get(&n).map(|&id| Event::Locked(id)),
                Move::Serve(n) => world.alive.get(&n).map(|&id| Event::Serving(id)),
                Move::Break(n) => world.alive.get(&n).map(|&id| Event::Broke { id, reason }),
                Move::Die(n, killed) => {
                    world.alive.remove(&n).map(|id| Event::Died { id, reason, killed })
                }
                Move::Launch(n, true) => world.wanted.remove(&n).map(|id| {
                    world.alive.insert(n, id);
                    Event::Launched(id)
                }),
                Move::Launch(n, false) => world.wanted.remove(&n).map(|id| Event::NotRevived {
                    id,
                    reason,
                    hopeless: ms % 2 == 0,
                }),
                Move::Replace(n) => {
                    asked_for = true;
                    Some(Event::Replace(world.last[&n]))
                }
                Move::OldNews(n) => Some(died(next(n, 0))),
                Move::End => {
                    world.ended = true;
                    Some(Event::End)
                }
                Move::Tick => Some(Event::Tick),
            };
            if let Some(event) = event {
                let actions = s.step(event, now);
                world.watch(&actions, now, asked_for);
            }
        }
        world.ended = true;
        s.step(Event::End, now);
        // Whoever is told to end or killed dies, sooner or later.
        while let Some(deadline) = s.next_deadline() {
            now = now.max(deadline);
            let actions = s.step(Event::Tick, now);
            world.watch(&actions, now, false);
        }
        let mut last = s.all_gone();
        for (_, id) in world.alive {
            last |= s.step(died(id), now).contains(&Action::AllGone);
        }
        prop_assert!(last && s.all_gone());
    }
}
