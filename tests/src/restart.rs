//! How `bulkhead run` says on standard error that a process has taken another's place. `cargo xtask` reads it
//! with the same file.

use std::time::Duration;

/// A process that took another's place, as `bulkhead run` tells on standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restart {
    /// Name of the device.
    pub name: String,
    /// Pid of the new process.
    pub pid: u32,
    /// Its generation.
    pub generation: u32,
    /// Its program's version.
    pub version: String,
    /// Time from the death to service in microseconds.
    pub after_us: u64,
    /// Why the one before died.
    pub reason: String,
}

impl Restart {
    /// All restarts that `errors` tells of.
    #[must_use]
    pub fn all(errors: &str) -> Vec<Self> {
        errors.lines().filter_map(Self::parse).collect()
    }

    /// The restart that a line tells of.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let rest = line.trim().strip_prefix("bulkhead: restarted: ")?;
        let (name, rest) = rest.split_once(" is served by process ")?;
        let (pid, rest) = rest.split_once(" (generation ")?;
        let (generation, rest) = rest.split_once(", version ")?;
        let (version, rest) = rest.split_once(") after ")?;
        let (after_us, reason) = rest.split_once(" us: ")?;
        Some(Self {
            name: name.to_owned(),
            pid: pid.parse().ok()?,
            generation: generation.parse().ok()?,
            version: version.to_owned(),
            after_us: after_us.parse().ok()?,
            reason: reason.to_owned(),
        })
    }

    /// Time from the death to service in milliseconds.
    #[must_use]
    pub fn after_ms(&self) -> f64 {
        Duration::from_micros(self.after_us).as_secs_f64() * 1e3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restart_is_read_from_the_notice() {
        let line = "bulkhead: restarted: disk0 is served by process 7 (generation 2, version 0.1.0) \
                    after 8123 us: killed";
        let expected = Restart {
            name: "disk0".to_owned(),
            pid: 7,
            generation: 2,
            version: "0.1.0".to_owned(),
            after_us: 8123,
            reason: "killed".to_owned(),
        };
        assert_eq!(Restart::parse(line), Some(expected));
        assert_eq!(Restart::parse("bulkhead: degraded: disk0 is lost"), None);
    }
}
