//! How `bulkhead run` says on standard error that a process has taken another's place.

/// One such line.
#[derive(Debug, PartialEq)]
pub(crate) struct Restart {
    /// Name of the device.
    pub(crate) name: String,
    /// The new process.
    pub(crate) pid: u32,
    /// Its generation.
    pub(crate) generation: u32,
    /// Time from death to service.
    pub(crate) after_ms: f64,
}

impl Restart {
    /// The restart that a line tells of.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let rest = line.strip_prefix("bulkhead: restarted: ")?;
        let (name, rest) = rest.split_once(" is served by process ")?;
        let (pid, rest) = rest.split_once(" (generation ")?;
        let (generation, rest) = rest.split_once(", ")?;
        let (_, rest) = rest.split_once(" after ")?;
        let (us, _) = rest.split_once(" us")?;
        Some(Self {
            name: name.to_owned(),
            pid: pid.parse().ok()?,
            generation: generation.parse().ok()?,
            after_ms: us.parse::<f64>().ok()? / 1000.0,
        })
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
            after_ms: 8.123,
        };
        assert_eq!(Restart::parse(line), Some(expected));
        assert_eq!(Restart::parse("bulkhead: degraded: disk0 is lost"), None);
    }
}
