//! Which occurrence of a point has which fault.

use crate::points::Point;
use crate::random::Planned;
use crate::scenario::Action;
use std::time::Duration;

/// A point that was reached.
#[derive(Debug, Clone)]
pub struct Occurrence<'a> {
    /// The point.
    pub point: Point,
    /// Its name.
    pub name: &'a str,
    /// On which host.
    pub host: usize,
    /// Of which machine.
    pub vm: Option<&'a str>,
    /// At which of its processes, without generation.
    pub process: Option<&'a str>,
    /// Whether it is a call on an anonymous file (a doorbell, say), which has no short counts.
    pub is_anonymous: bool,
}

#[derive(Debug)]
struct Rule {
    planned: Planned,
    point: Option<Point>,
    /// Occurrences that were its own.
    met: u64,
    /// How often it was injected.
    done: u64,
    /// Why it was not, if it could not be.
    failed: Option<String>,
}

/// The faults of a plan, and how often each was injected.
#[derive(Debug)]
pub struct Rules {
    rules: Vec<Rule>,
    /// Names of the hosts.
    hosts: Vec<String>,
    /// Whether anything is injected any more.
    is_over: bool,
}

impl Rule {
    fn is_about(&self, occurrence: &Occurrence<'_>, hosts: &[String]) -> bool {
        let fault = &self.planned.fault;
        let same = |wanted: &Option<String>, found: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| found == Some(wanted))
        };
        self.point.as_ref() == Some(&occurrence.point)
            && same(&fault.vm, occurrence.vm)
            && same(&fault.process, occurrence.process)
            && same(&fault.host, hosts.get(occurrence.host).map(String::as_str))
            && !(occurrence.is_anonymous && fault.action == Action::Short)
    }

    /// Counts the occurrence; whether it has the fault.
    fn meet(&mut self, now: Option<Duration>) -> bool {
        let fault = &self.planned.fault;
        let times = fault.times.unwrap_or(1);
        if let Some(at_ms) = fault.at_ms {
            let due = now.is_some_and(|now| now >= Duration::from_millis(at_ms));
            if !due {
                return false;
            }
        }
        self.met += 1;
        self.met >= fault.nth.unwrap_or(1) && self.done < times
    }
}

impl Rules {
    /// Of a plan.
    #[must_use]
    pub fn new(plan: &[Planned]) -> Self {
        let rule = |planned: &Planned| Rule {
            point: Point::named(&planned.fault.point),
            planned: planned.clone(),
            met: 0,
            done: 0,
            failed: None,
        };
        Self {
            rules: plan.iter().map(rule).collect(),
            hosts: Vec::new(),
            is_over: false,
        }
    }

    /// The names of the hosts, for faults that name one.
    pub fn set_hosts(&mut self, hosts: Vec<String>) {
        self.hosts = hosts;
    }

    /// Counts an occurrence and returns the faults that it has. They count as injected.
    pub fn meet(&mut self, occurrence: &Occurrence<'_>, now: Option<Duration>) -> Vec<Planned> {
        if self.is_over {
            return Vec::new();
        }
        let mut hits = Vec::new();
        for rule in &mut self.rules {
            if rule.is_about(occurrence, &self.hosts) && rule.meet(now) {
                rule.done += 1;
                hits.push(rule.planned.clone());
            }
        }
        hits
    }

    /// Whether any rule is about a call or message with this point.
    #[must_use]
    pub fn knows(&self, point: &Point) -> bool {
        self.rules.iter().any(|r| r.point.as_ref() == Some(point))
    }

    /// Whether any rule is about requests of the API.
    #[must_use]
    pub fn knows_api(&self) -> bool {
        let mut points = self.rules.iter().map(|rule| &rule.point);
        points.any(|point| matches!(point, Some(Point::Api(..))))
    }

    /// The points of all faults.
    pub fn points(&self) -> impl Iterator<Item = String> + use<> {
        let points = self.rules.iter().map(|r| r.planned.fault.point.clone());
        points.collect::<Vec<_>>().into_iter()
    }

    /// Fault `id` was injected by somebody else.
    pub fn done(&mut self, id: u32) {
        if let Some(rule) = self.rules.iter_mut().find(|rule| rule.planned.id == id) {
            rule.done += 1;
        }
    }

    /// Fault `id` could not be injected.
    pub fn failed(&mut self, id: u32, why: String) {
        if let Some(rule) = self.rules.iter_mut().find(|rule| rule.planned.id == id) {
            rule.done = rule.done.saturating_sub(1);
            rule.failed = Some(why);
        }
    }

    /// A fault of a point that is met elsewhere and was not injected as often as it shall be.
    pub fn pending(&self, is_it: impl Fn(&Planned, &Point) -> bool) -> Option<Planned> {
        let due = |rule: &&Rule| {
            let times = rule.planned.fault.times.unwrap_or(1);
            let point = rule.point.as_ref();
            rule.done < times && point.is_some_and(|point| is_it(&rule.planned, point))
        };
        self.rules.iter().find(due).map(|rule| rule.planned.clone())
    }

    /// Nothing is injected from now on.
    pub fn end(&mut self) {
        self.is_over = true;
    }

    /// Faults that were never injected, and why, as far as that is known.
    #[must_use]
    pub fn missing(&self) -> Vec<(Planned, String)> {
        let missing = self.rules.iter().filter(|rule| rule.done == 0);
        let why = |rule: &Rule| match &rule.failed {
            Some(why) => why.clone(),
            None if rule.met == 0 => "its point was never reached".to_owned(),
            None => format!("its point was reached {} times only", rule.met),
        };
        missing.map(|r| (r.planned.clone(), why(r))).collect()
    }

    /// Faults that were injected, and how often.
    #[must_use]
    pub fn injected(&self) -> Vec<(Planned, u64)> {
        let done = self.rules.iter().filter(|rule| rule.done > 0);
        done.map(|rule| (rule.planned.clone(), rule.done)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::points::When;
    use crate::random::bare;
    use crate::scenario::Fault;

    fn rules(fault: Fault) -> Rules {
        let planned = Planned {
            id: 1,
            fault,
            seed: 1,
        };
        Rules::new(&[planned])
    }

    fn ping<'a>(vm: &'a str, process: &'a str) -> Occurrence<'a> {
        Occurrence {
            point: Point::Message("to-device.ping", When::Before),
            name: "to-device.ping:before",
            host: 0,
            vm: Some(vm),
            process: Some(process),
            is_anonymous: false,
        }
    }

    #[test]
    fn nth_of_the_process_in_question_is_met_once() {
        let mut fault = bare("to-device.ping", Action::Drop);
        fault.nth = Some(2);
        fault.process = Some("blk0".to_owned());
        let mut rules = rules(fault);
        let mut met = |process| !rules.meet(&ping("a", process), None).is_empty();
        let order = ["blk0", "rng0", "blk0", "blk0"].map(&mut met);
        assert_eq!(order, [false, false, true, false]);
        assert_eq!(rules.injected().len(), 1);
    }

    #[test]
    fn time_comes_before_the_number() {
        let mut fault = bare("to-device.ping", Action::Drop);
        fault.at_ms = Some(100);
        fault.times = Some(2);
        let mut rules = rules(fault);
        let mut met = |ms: Option<u64>| {
            let now = ms.map(Duration::from_millis);
            !rules.meet(&ping("a", "blk0"), now).is_empty()
        };
        let order = [None, Some(99), Some(100), Some(150), Some(200)].map(&mut met);
        assert_eq!(order, [false, false, true, true, false]);
    }

    #[test]
    fn what_never_came_is_missing() {
        let rules = rules(bare("to-device.ping", Action::Drop));
        assert_eq!(rules.missing().len(), 1);
    }
}
