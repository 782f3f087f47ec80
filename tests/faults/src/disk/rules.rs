//! Which operation on the disk meets which fault.

use super::DiskError;
use super::model::SECTOR_BYTES;
use std::ops::Range;
use std::time::Duration;

/// What is done to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskOp {
    /// A read.
    Read,
    /// A write, or a range that is made zero.
    Write,
    /// A flush.
    Flush,
}

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskAction {
    /// It fails with EIO and does nothing.
    Error,
    /// It fails with ENOSPC and does nothing.
    Full,
    /// It is done and answered after so long.
    Delay(Duration),
    /// It is done and answered when somebody lets it go.
    Hang,
    /// It is answered at once, and a power cut before the next flush leaves its first bytes.
    Torn {
        /// How many bytes.
        bytes: u64,
    },
    /// It is answered at once, and does nothing.
    Lie,
}

/// A fault that the disk is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRule {
    /// Which operations it is about.
    pub op: DiskOp,
    /// Those that touch one of these sectors of 512 bytes; `None` for everywhere. A flush is everywhere.
    pub sectors: Option<Range<u64>>,
    /// The first one that has the fault, counted from 1 over the operations that the rule is about.
    pub nth: u64,
    /// Operations before this time, since the disk was mounted, are not the rule's.
    pub after: Duration,
    /// How many have the fault; `None` for each from the first one on.
    pub times: Option<u64>,
    /// The fault.
    pub action: DiskAction,
}

impl DiskRule {
    /// A rule for the next operation, wherever it is.
    #[must_use]
    pub const fn next(op: DiskOp, action: DiskAction) -> Self {
        Self {
            op,
            sectors: None,
            nth: 1,
            after: Duration::ZERO,
            times: Some(1),
            action,
        }
    }

    /// The same for each operation from the next one on.
    #[must_use]
    pub const fn always(op: DiskOp, action: DiskAction) -> Self {
        let mut rule = Self::next(op, action);
        rule.times = None;
        rule
    }

    /// Whether such an operation can have such a fault.
    fn check(&self) -> Result<(), DiskError> {
        let is_possible = match self.action {
            DiskAction::Error | DiskAction::Delay(_) | DiskAction::Hang => true,
            DiskAction::Full => self.op != DiskOp::Read,
            DiskAction::Torn { .. } => self.op == DiskOp::Write,
            DiskAction::Lie => self.op == DiskOp::Flush,
        };
        if !is_possible {
            return Err(DiskError::Senseless(self.op, self.action));
        }
        if self.nth == 0 || self.times == Some(0) {
            return Err(DiskError::Never);
        }
        if self.sectors.as_ref().is_some_and(Range::is_empty) {
            return Err(DiskError::Never);
        }
        Ok(())
    }

    fn is_about(&self, request: &Request, now: Duration) -> bool {
        self.op == request.op && now >= self.after && self.touches(request)
    }

    fn touches(&self, request: &Request) -> bool {
        let Some(sectors) = self.sectors.as_ref().filter(|_| self.op != DiskOp::Flush) else {
            return true;
        };
        let first = request.offset / SECTOR_BYTES;
        let end = request.offset.saturating_add(request.bytes);
        let end = end.div_ceil(SECTOR_BYTES).max(first + 1);
        first < sectors.end && sectors.start < end
    }
}

/// An operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) op: DiskOp,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

#[derive(Debug, Clone)]
struct Counted {
    rule: DiskRule,
    met: u64,
    done: u64,
}

/// The faults that the disk is to have, in the order in which they were added. Of several that an
/// operation could have it has the first; the others wait for the next one.
#[derive(Debug, Clone, Default)]
pub struct DiskRules(Vec<Counted>);

impl DiskRules {
    /// None.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// One more.
    ///
    /// # Errors
    /// When no operation can ever have it.
    pub fn add(&mut self, rule: DiskRule) -> Result<(), DiskError> {
        rule.check()?;
        let (met, done) = (0, 0);
        self.0.push(Counted { rule, met, done });
        Ok(())
    }

    /// As [`DiskRules::add`], for a list in one piece.
    ///
    /// # Errors
    /// When no operation can ever have it.
    pub fn with(mut self, rule: DiskRule) -> Result<Self, DiskError> {
        self.add(rule)?;
        Ok(self)
    }

    /// Counts an operation, and says what happens to it.
    pub(super) fn decide(&mut self, request: &Request, now: Duration) -> Option<DiskAction> {
        let mut chosen = None;
        for counted in &mut self.0 {
            let Counted { rule, met, done } = counted;
            if !rule.is_about(request, now) {
                continue;
            }
            *met += 1;
            let is_due = *met >= rule.nth && rule.times.is_none_or(|times| *done < times);
            if is_due && chosen.is_none() {
                *done += 1;
                chosen = Some(rule.action);
            }
        }
        // What is over is not looked at again.
        self.0.retain(|c| c.rule.times.is_none_or(|t| c.done < t));
        chosen
    }

    /// None from now on.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATE: Duration = Duration::from_secs(1);

    fn write(sector: u64, sectors: u64) -> Request {
        Request {
            op: DiskOp::Write,
            offset: sector * SECTOR_BYTES,
            bytes: sectors * SECTOR_BYTES,
        }
    }

    fn decisions(rules: &mut DiskRules, requests: &[Request]) -> Vec<bool> {
        let decide = |r| rules.decide(r, LATE).is_some();
        requests.iter().map(decide).collect()
    }

    #[test]
    fn rule_is_about_sectors_that_a_request_touches() {
        let rule = DiskRule {
            sectors: Some(10..12),
            ..DiskRule::always(DiskOp::Write, DiskAction::Error)
        };
        let mut rules = DiskRules::new().with(rule).unwrap();
        let requests = [write(8, 2), write(9, 2), write(11, 1), write(12, 4)];
        assert_eq!(decisions(&mut rules, &requests), [false, true, true, false]);
        let read = Request {
            op: DiskOp::Read,
            ..write(10, 1)
        };
        assert_eq!(rules.decide(&read, LATE), None);
    }

    #[test]
    fn nth_occurrence_has_the_fault_and_so_often_as_it_says() {
        let rule = DiskRule {
            nth: 3,
            times: Some(2),
            ..DiskRule::next(DiskOp::Write, DiskAction::Full)
        };
        let mut rules = DiskRules::new().with(rule).unwrap();
        let all = decisions(&mut rules, &[write(0, 1); 6]);
        assert_eq!(all, [false, false, true, true, false, false]);
        assert!(rules.0.is_empty());
    }

    #[test]
    fn operations_before_the_time_do_not_count() {
        let rule = DiskRule {
            after: LATE,
            nth: 2,
            ..DiskRule::next(DiskOp::Write, DiskAction::Error)
        };
        let mut rules = DiskRules::new().with(rule).unwrap();
        assert_eq!(rules.decide(&write(0, 1), Duration::ZERO), None);
        assert_eq!(rules.decide(&write(0, 1), Duration::ZERO), None);
        assert_eq!(decisions(&mut rules, &[write(0, 1); 2]), [false, true]);
    }

    #[test]
    fn one_operation_has_one_fault_and_the_other_waits() {
        let mut rules = DiskRules::new();
        let [first, second] = [DiskAction::Error, DiskAction::Hang];
        rules.add(DiskRule::next(DiskOp::Write, first)).unwrap();
        rules.add(DiskRule::next(DiskOp::Write, second)).unwrap();
        assert_eq!(rules.decide(&write(0, 1), LATE), Some(first));
        assert_eq!(rules.decide(&write(0, 1), LATE), Some(second));
        assert_eq!(rules.decide(&write(0, 1), LATE), None);
    }

    #[test]
    fn faults_that_an_operation_cannot_have_are_refused() {
        let mut rules = DiskRules::new();
        let bytes = 1;
        for (op, action) in [
            (DiskOp::Read, DiskAction::Lie),
            (DiskOp::Write, DiskAction::Lie),
            (DiskOp::Read, DiskAction::Full),
            (DiskOp::Flush, DiskAction::Torn { bytes }),
        ] {
            assert!(
                rules.add(DiskRule::next(op, action)).is_err(),
                "{op:?} {action:?}"
            );
        }
        let rule = DiskRule::next(DiskOp::Read, DiskAction::Error);
        let never = [
            DiskRule {
                nth: 0,
                ..rule.clone()
            },
            DiskRule {
                times: Some(0),
                ..rule.clone()
            },
            DiskRule {
                sectors: Some(5..5),
                ..rule
            },
        ];
        for rule in never {
            assert!(matches!(rules.add(rule), Err(DiskError::Never)));
        }
    }
}
