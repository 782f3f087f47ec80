//! The table of processes: every value comes from /proc of the living pid, or from the kernel
//! about it, and none from a policy or from what a process says.

use anyhow::{Context, Result, bail};
use bulkhead::authority::filters;
use bulkhead::authority::landlock::{self, Landlock};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

const NAMESPACES: [&str; 7] = ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"];

/// One process.
pub(super) struct Row {
    pid: u32,
    kind: String,
    uid: u32,
    fds: usize,
    threads: usize,
    /// Permitted requests of its threads: the least and the most.
    requests: (usize, usize),
    namespaces: Vec<&'static str>,
    /// What Landlock denies it, found out by trying.
    landlock: Landlock,
    root_entries: usize,
    capabilities: u64,
    no_new_privileges: bool,
    pss_kib: u64,
}

impl Row {
    /// Looks at a living process.
    pub(super) fn measure(pid: u32) -> Result<Self> {
        let status = read(pid, "status")?;
        let field = |name: &str| -> Result<String> {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(|value| value.trim().to_owned())
                .with_context(|| format!("/proc/{pid}/status has no {name}"))
        };
        let rollup = read(pid, "smaps_rollup")?;
        let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
        let pss = pss
            .context("smaps_rollup has no Pss")?
            .trim()
            .trim_end_matches(" kB");
        let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}"));
        let its = |name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}"));
        let mut requests = BTreeSet::new();
        let threads = filters::measure(i32::try_from(pid)?)?;
        for thread in &threads {
            let count = match &thread.permitted {
                Some(permitted) => permitted.len(),
                None if thread.filters == 0 => usize::MAX,
                None => bail!("the filters of thread {} cannot be read", thread.tid),
            };
            requests.insert(count);
        }
        Ok(Self {
            pid,
            // The `comm` of a process is cut to 15 bytes; its first argument is whole.
            kind: read(pid, "cmdline")?
                .split('\0')
                .next()
                .unwrap_or_default()
                .trim_start_matches("bulkhead-")
                .to_owned(),
            uid: fs::metadata(format!("/proc/{pid}"))?.uid(),
            fds: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
            threads: threads.len(),
            requests: (
                requests.first().copied().unwrap_or_default(),
                requests.last().copied().unwrap_or_default(),
            ),
            namespaces: NAMESPACES
                .into_iter()
                .filter(|name| own(name).ok() != its(name).ok())
                .collect(),
            landlock: landlock::measure(i32::try_from(pid)?).context("Landlock")?,
            root_entries: fs::read_dir(format!("/proc/{pid}/root/"))?.count(),
            capabilities: u64::from_str_radix(&field("CapEff")?, 16)?,
            no_new_privileges: field("NoNewPrivs")? == "1",
            pss_kib: pss.parse()?,
        })
    }

    /// The table's heading.
    pub(super) fn heading() -> String {
        format!(
            "{:>7}  {:<8} {:>10}  {:>3}  {:>7}  {:>9}  {:<31}  {:<9}  {:>5}  {:>4}  {:>3}  {:>7}",
            "pid",
            "kind",
            "uid",
            "fds",
            "threads",
            "permitted",
            "namespaces of its own",
            "Landlock",
            "files",
            "caps",
            "nnp",
            "PSS KiB"
        )
    }

    /// The row as it is printed.
    pub(super) fn text(&self) -> String {
        let show = |count| {
            if count == usize::MAX {
                "all".to_owned()
            } else {
                format!("{count}")
            }
        };
        let requests = match self.requests {
            (least, most) if least == most => show(most),
            (least, most) => format!("{}-{}", show(least), show(most)),
        };
        format!(
            "{:>7}  {:<8} {:>10}  {:>3}  {:>7}  {:>9}  {:<31}  {:<9}  {:>5}  {:>4}  {:>3}  {:>7}",
            self.pid,
            self.kind,
            self.uid,
            self.fds,
            self.threads,
            requests,
            self.namespaces.join(" "),
            self.landlock.to_string(),
            self.root_entries,
            self.capabilities.count_ones(),
            if self.no_new_privileges { "yes" } else { "no" },
            self.pss_kib
        )
    }

    /// Whether it is confined at all; the broker is not.
    pub(super) fn is_confined(&self) -> bool {
        self.requests.1 != usize::MAX
            && self.capabilities == 0
            && self.no_new_privileges
            && self.landlock.denies_files
    }

    /// The kind of process.
    pub(super) fn kind(&self) -> &str {
        &self.kind
    }
}

fn read(pid: u32, file: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).context(path)
}
