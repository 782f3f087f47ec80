//! The host's shutdown: the power button of every machine, a deadline, then what each VM file says.

use super::actor::{Ask, Vm};
use super::host::Host;
use super::life::spec_of;
use crate::api::{HostShutdown, HostShutdownVm, SCHEMA_VERSION, State, Stop};
use crate::vm::spec::OnEnd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::task::JoinSet;

/// Ends every machine. Nothing is started any more by this daemon.
pub(super) async fn shutdown(host: &Arc<Host>, how: HostShutdown) -> Vec<HostShutdownVm> {
    host.going_down.store(true, Ordering::Relaxed);
    let mut ending = JoinSet::new();
    for vm in host.all() {
        if vm.view.borrow().state.is_live() {
            ending.spawn(end(vm, how.deadline_ms));
        }
    }
    let mut ended = ending.join_all().await;
    ended.sort_by(|a, b| a.name.cmp(&b.name));
    ended
}

async fn end(vm: Arc<Vm>, deadline_ms: u64) -> HostShutdownVm {
    let record = vm.view.borrow().record.clone();
    // A VM file that cannot be read any more says nothing.
    let spec = super::blocking(move || spec_of(&record, true)).await;
    let then = spec.map_or(OnEnd::Destroy, |spec| spec.lifecycle.on_host_shutdown);
    let name = vm.view.borrow().record.name.clone();
    if then == OnEnd::Restart
        && let Err(error) = vm.ask(|reply| Ask::StartWithHost(true, reply)).await
    {
        tracing::warn!(vm = name, %error, "will not start with the host");
    }
    let button = Stop {
        timeout_ms: deadline_ms,
        force: false,
    };
    let stopped = match vm.view.borrow().state {
        // No guest would hear the button: only its power can be cut.
        State::Paused => false,
        _ => true,
    };
    let outcome = match stopped && vm.stop(button).await.is_ok() {
        true => "powered_off",
        false if then == OnEnd::Preserve => "left_running",
        false => match vm.kill().await {
            Ok(_) => "power_cut",
            Err(error) => {
                tracing::error!(vm = name, %error, "its power could not be cut");
                "left_running"
            }
        },
    };
    HostShutdownVm {
        schema_version: SCHEMA_VERSION,
        name,
        outcome: outcome.to_owned(),
    }
}
