//! What the events of a run mean for its view, its log and its record. Pure, but for [`prepare`].

use super::Shared;
use super::budget::Share;
use super::view::View;
use crate::api::time::{now_ms, rfc3339};
use crate::api::{ApiError, Code, Degraded, Denial, Process, State};
use crate::registry::{Ended, VmRecord};
use crate::vm::session::{Command, Event, Finished, RunError};
use crate::vm::spec::VmSpec;
use crate::vmfile::{self, HostMemory, Surroundings};
use bulkhead_ipc::protocol::birth::HugePages;
use bulkhead_ipc::protocol::vcpu::Outcome;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// Longest message of an end that is recorded, in bytes.
const MESSAGE_BYTES_MAX: usize = 1024;

/// The machine that a record describes, checked against the host as it is now.
pub(super) fn spec_of(record: &VmRecord, overcommit: bool) -> Result<VmSpec, ApiError> {
    let wrong = |problems: vmfile::Problems| {
        let lines: Vec<_> = problems.0.iter().map(ToString::to_string).collect();
        ApiError::new(Code::Configuration, lines.join("\n"))
    };
    let file = format!("VM file of {}", record.name);
    let draft = vmfile::parse(&file, Path::new("/"), &record.vm_file).map_err(wrong)?;
    let around = Surroundings {
        name: record.name.clone(),
        kernel: None,
        memory: HostMemory::read(Path::new("/")),
        overcommit,
    };
    vmfile::check(draft, &around).map_err(wrong)
}

/// Everything that can be found out before a start: the specification, and a share of the budget.
pub(super) async fn prepare(
    shared: &Arc<Shared>,
    record: &VmRecord,
) -> Result<(Share, VmSpec), ApiError> {
    let (record, overcommit) = (record.clone(), shared.config.host.overcommit);
    let name = record.name.clone();
    let spec = super::blocking(move || spec_of(&record, overcommit)).await?;
    // Reserved huge pages are a budget of their own, which the kernel keeps.
    let wanted = match spec.huge_pages {
        HugePages::Reserved => 0,
        _ => spec.memory_bytes,
    };
    let share = shared.budget.take(&name, wanted);
    let share = share.map_err(|e| ApiError::new(Code::Limit, format!("{name}: {e}")))?;
    Ok((share, spec))
}

/// A command that somebody gave, for the log.
pub(super) fn asked(command: &Command) -> Option<Value> {
    let word = match command {
        Command::PowerButton => "power_button",
        Command::RunOn => "run_on",
        Command::Kill => "kill",
        Command::Reset => "reset",
        Command::Interrupt => "interrupt",
        Command::Pause => "pause",
        Command::Resume => "resume",
        Command::RestartDevice(device) => {
            return Some(json!({ "for": "restart_device", "device": device }));
        }
        Command::UpgradeDevice(device) => {
            return Some(json!({ "for": "upgrade_device", "device": device }));
        }
        Command::LimitDevice { device, limits } => {
            return Some(json!({ "for": "limit_device", "device": device, "limits": limits }));
        }
        Command::ChangeDisk { device, change } => {
            return Some(json!({ "for": change.verb(), "device": device, "to": change }));
        }
        Command::LinkDevice { device, up } => {
            return Some(json!({ "for": "link_device", "device": device, "up": up }));
        }
        Command::Resize { .. } => return None,
    };
    Some(json!({ "for": word }))
}

/// A line of the log.
pub(super) fn line_of(event: &Event) -> Option<(&'static str, Value)> {
    Some(match event {
        Event::Consoles(_) | Event::Traffic { .. } => return None,
        Event::Started { id, name, pid, .. } => (
            "process_started",
            json!({ "process": id.to_string(), "name": name, "pid": pid }),
        ),
        Event::Died { id, name, reason } => (
            "process_died",
            json!({ "process": id.to_string(), "name": name, "reason": reason }),
        ),
        Event::Locked {
            id,
            after,
            landlock_abi,
            program,
        } => (
            "process_locked",
            json!({
                "process": id.to_string(),
                "after_us": u64::try_from(after.as_micros()).unwrap_or(u64::MAX),
                "landlock_abi": landlock_abi,
                "version": program,
            }),
        ),
        Event::AllLocked { after } => (
            "running",
            json!({ "after_us": u64::try_from(after.as_micros()).unwrap_or(u64::MAX) }),
        ),
        Event::TakenOver { after } => (
            "taken_over",
            json!({ "after_us": u64::try_from(after.as_micros()).unwrap_or(u64::MAX) }),
        ),
        Event::Paused => ("paused", json!({})),
        Event::Resumed => ("resumed", json!({})),
        Event::NoRoom { name } => ("no_room", json!({ "name": name })),
        Event::HasRoom { name } => ("has_room", json!({ "name": name })),
        Event::Degraded { id, name, reason } => (
            "device_lost",
            json!({ "process": id.to_string(), "name": name, "reason": reason }),
        ),
        Event::Restarted(restart) => (
            "device_restarted",
            json!({
                "process": restart.id.to_string(),
                "name": restart.name,
                "pid": restart.pid,
                "generation": restart.id.generation,
                "version": restart.program,
                "after_us": u64::try_from(restart.after.as_micros()).unwrap_or(u64::MAX),
                "reason": restart.reason,
            }),
        ),
        Event::RequestGivenUp { name, reason } => (
            "request_given_up",
            json!({ "name": name, "reason": reason }),
        ),
        Event::Refused {
            command, reason, ..
        } => ("refused", json!({ "command": command, "reason": reason })),
        Event::Denied { id, name, denial } => (
            "denied",
            json!({
                "process": id.to_string(),
                "name": name,
                "call": denial.call,
                "thread": denial.thread,
                "policy": denial.file,
                "line": denial.line,
                "said": denial.to_string(),
            }),
        ),
        Event::DeviceFault { name, reason } => {
            ("device_fault", json!({ "name": name, "reason": reason }))
        }
        Event::GuestFault { name, reason } => {
            ("guest_fault", json!({ "name": name, "reason": reason }))
        }
        Event::Ended(outcome) => (
            "guest_ended",
            json!({ "outcome": word_of_outcome(*outcome) }),
        ),
        Event::Preserved => ("preserved", json!({})),
        Event::Restarting { count } => ("restarting", json!({ "count": count })),
    })
}

const fn word_of_outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::PowerOff => "power_off",
        Outcome::Reset => "reset",
        Outcome::GuestPanic => "guest_panic",
        Outcome::TripleFault => "triple_fault",
        Outcome::InternalError => "internal_error",
        Outcome::DebugExit(_) => "debug_exit",
        Outcome::Killed => "killed",
    }
}

/// What an event changes.
pub(super) fn apply(view: &mut View, event: Event) {
    view.devices.apply(&event);
    match event {
        Event::Started {
            id,
            name,
            pid,
            users,
            ..
        } => {
            let kind = id.kind.name();
            view.processes
                .retain(|p| (p.kind.as_str(), p.index) != (kind, id.index));
            view.processes.push(Process {
                kind: kind.to_owned(),
                index: id.index,
                generation: id.generation,
                name,
                pid,
                locked: false,
                users,
            });
        }
        Event::Locked { id, .. } => {
            let same = |p: &&mut Process| {
                (p.kind.as_str(), p.index, p.generation)
                    == (id.kind.name(), id.index, id.generation)
            };
            if let Some(process) = view.processes.iter_mut().find(same) {
                process.locked = true;
            }
        }
        Event::AllLocked { .. } => {
            view.taking_over = false;
            if view.state == State::Starting {
                view.state = State::Running;
            }
        }
        Event::TakenOver { .. } => view.taking_over = false,
        // What is being ended is not resumed by an answer that was on its way.
        Event::Paused | Event::Resumed if view.state == State::Stopping => {}
        Event::Paused => view.state = State::Paused,
        Event::Resumed => view.state = State::Running,
        Event::NoRoom { name } => {
            if !view.no_room.contains(&name) {
                view.no_room.push(name);
            }
        }
        Event::HasRoom { name } => view.no_room.retain(|other| *other != name),
        Event::Degraded { id, name, reason } => {
            view.processes
                .retain(|p| (p.kind.as_str(), p.index) != (id.kind.name(), id.index));
            view.degraded.retain(|d| d.device != name);
            view.degraded.push(Degraded {
                device: name,
                reason,
            });
        }
        // Its process is in the view since it was started.
        Event::Restarted(restart) => view.degraded.retain(|d| d.device != restart.name),
        Event::Denied { id, name, denial } => view.deny(Denial {
            at: rfc3339(now_ms()),
            process: id.to_string(),
            name,
            call: denial.call.clone(),
            thread: denial.thread.clone(),
            policy: denial.file.clone(),
            line: denial.line,
            said: denial.to_string(),
        }),
        Event::Preserved => view.state = State::Preserved,
        Event::Restarting { count } => {
            view.restarts = count;
            view.state = State::Starting;
            view.processes.clear();
            view.degraded.clear();
            view.no_room.clear();
        }
        Event::Consoles(_)
        | Event::Traffic { .. }
        | Event::Died { .. }
        | Event::DeviceFault { .. }
        | Event::GuestFault { .. }
        | Event::RequestGivenUp { .. }
        | Event::Refused { .. }
        | Event::Ended(_) => {}
    }
}

/// How a run ended, for the registry, and why it failed if it could not be started.
pub(super) fn ended_record(result: Result<Finished, RunError>) -> (Ended, Option<ApiError>) {
    let (ending, exit_code, message, failure) = match result {
        Ok(finished) => {
            let (word, message) = finished.ending.describe();
            (word, finished.ending.exit_code(), message, None)
        }
        Err(error) => {
            let message = error.to_string();
            let code = match &error {
                RunError::Configuration(_) => Code::Configuration,
                RunError::Host { .. } => Code::Host,
                RunError::Start { .. } => Code::Start,
            };
            let failure = ApiError::new(code, message.clone());
            (
                "start_failed",
                error.exit_code(),
                Some(message),
                Some(failure),
            )
        }
    };
    let ended = Ended {
        ending: ending.to_owned(),
        exit_code,
        message: message.map(|text| crate::escape::excerpt(&text, MESSAGE_BYTES_MAX)),
        at_ms: now_ms(),
    };
    (ended, failure)
}
