//! What the processes of a machine have used, from `/proc`.

use super::host::Host;
use super::routes::{Name, json};
use super::view::View;
use crate::api::time::now_ms;
use crate::api::{ApiError, Process, ProcessStats, SCHEMA_VERSION, Stats};
use axum::extract::State;
use axum::response::Response;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

/// `GET /v1/vms/NAME/stats`.
pub(super) async fn stats(
    State(host): State<Arc<Host>>,
    Name(name): Name,
) -> Result<Response, ApiError> {
    let vm = host.vm(&name).await?;
    let view = vm.view.borrow().clone();
    // The kernel walks the page tables of a whole guest for its share of memory.
    json(&super::blocking(move || Ok(measure(&view))).await?)
}

fn measure(view: &View) -> Stats {
    let processes: Vec<_> = view.processes.iter().filter_map(process_stats).collect();
    Stats {
        schema_version: SCHEMA_VERSION,
        name: view.record.name.clone(),
        state: view.state,
        uptime_ms: view.started_at_ms.map(|at| now_ms().saturating_sub(at)),
        cpu_time_us: processes.iter().map(|p| p.cpu_time_us).sum(),
        pss_bytes: processes.iter().filter_map(|p| p.pss_bytes).sum(),
        processes,
        networks: view.devices.networks(),
    }
}

/// One process; `None` when it is gone.
fn process_stats(process: &Process) -> Option<ProcessStats> {
    let read = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", process.pid));
    let cpu_time_us = cpu_time_us(process.pid)?;
    let memory = read("smaps_rollup").ok();
    let io = read("io").ok();
    let counter = |name: &str| field(io.as_deref()?, name);
    Some(ProcessStats {
        process: process.clone(),
        restarts: process.generation.saturating_sub(1),
        cpu_time_us,
        pss_bytes: memory
            .as_deref()
            .and_then(|text| field(text, "Pss"))
            .map(|kib| kib * 1024),
        read_bytes: counter("rchar"),
        written_bytes: counter("wchar"),
        read_calls: counter("syscr"),
        write_calls: counter("syscw"),
    })
}

/// CPU time of all threads, those that have ended included.
fn cpu_time_us(pid: i32) -> Option<u64> {
    // Zero and below mean other things than a process.
    let pid = Some(pid).filter(|&pid| pid > 0)?;
    let clock = clock_getcpuclockid(Pid::from_raw(pid)).ok()?;
    let time = Duration::from(clock_gettime(clock).ok()?);
    u64::try_from(time.as_micros()).ok()
}

/// The number behind `name:`.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_is_measured() {
        let process = Process {
            kind: "vcpu".into(),
            index: 0,
            generation: 3,
            name: "vcpu".into(),
            pid: i32::try_from(std::process::id()).unwrap(),
            locked: true,
            users: None,
        };
        let stats = process_stats(&process).unwrap();
        assert_eq!(stats.restarts, 2);
        assert!(stats.cpu_time_us > 0);
        assert!(stats.pss_bytes.unwrap() > 10_000);
        assert!(stats.read_bytes.unwrap() > 0);
        let gone = Process { pid: -1, ..process };
        assert_eq!(process_stats(&gone), None);
    }
}
