//! The fewest faults that still fail: delta debugging over the plan of a run that failed.

use crate::random::Planned;
use crate::scenario::Scenario;

/// Removes faults from a plan for as long as `fails` says of the rest that it fails. `fails` is asked
/// `attempts` times at most.
pub fn shrink(
    plan: &[Planned],
    attempts: u32,
    mut fails: impl FnMut(&[Planned]) -> bool,
) -> Vec<Planned> {
    let mut kept = plan.to_vec();
    let mut left = attempts;
    let mut pieces = 2;
    while kept.len() > 1 && left > 0 {
        let size = kept.len().div_ceil(pieces);
        let mut at = 0;
        let mut has_shrunk = false;
        while at < kept.len() && left > 0 {
            let end = (at + size).min(kept.len());
            let rest: Vec<Planned> = [&kept[..at], &kept[end..]].concat();
            left -= 1;
            if fails(&rest) {
                kept = rest;
                has_shrunk = true;
            } else {
                at = end;
            }
        }
        if has_shrunk {
            pieces = pieces.saturating_sub(1).max(2);
        } else if size == 1 {
            break;
        } else {
            pieces = (pieces * 2).min(kept.len());
        }
    }
    kept
}

/// The scenario with exactly these faults, nothing left to draw.
#[must_use]
pub fn scenario_of(scenario: &Scenario, seed: u64, plan: &[Planned]) -> Scenario {
    Scenario {
        name: format!("{}-shrunk", scenario.name),
        seed,
        fault: plan.iter().map(|planned| planned.fault.clone()).collect(),
        random: None,
        ..scenario.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::bare;
    use crate::scenario::Action;

    fn plan(n: u32) -> Vec<Planned> {
        let planned = |id| Planned {
            id,
            fault: bare("broker", Action::Kill),
            seed: 0,
        };
        (1..=n).map(planned).collect()
    }

    #[test]
    fn exactly_the_guilty_are_left() {
        let guilty = [7, 19];
        let mut runs = 0;
        let left = shrink(&plan(32), 200, |plan| {
            runs += 1;
            guilty.iter().all(|id| plan.iter().any(|p| p.id == *id))
        });
        let ids: Vec<_> = left.iter().map(|p| p.id).collect();
        assert_eq!(ids, guilty);
        assert!(runs < 60, "{runs}");
    }

    #[test]
    fn attempts_are_bounded() {
        let mut runs = 0;
        let left = shrink(&plan(32), 5, |_| {
            runs += 1;
            false
        });
        assert_eq!((left.len(), runs), (32, 5));
    }
}
