//! Plays a process that its guest has taken over. Never installed: the end-to-end tests put it
//! in the place of one kind's binary (`tests/e2e/hostile/`).
//!
//! It is born, confined and locked like the process it stands for, with the same policy, because what
//! is tested is what is left to a process *after* that. Then it attacks everything it holds, by the
//! method that the VM's name says: `hostile-METHOD-SEED`.
//!
//! A switch's network has such a name, and so has the machine of a hostile network card; those of others are honest.
//! Of several disks only the first one's process is hostile; the others are what they should be. The legacy
//! process is honest until it is killed for the first time when it is to try system calls
//! (`hostile-calls-FIRST-COUNT`), and when it has tried them all, since a guest needs its console.
#![deny(unsafe_code)]

mod attack;
mod calls;
mod edges;
mod host;
mod port;
mod prey;
#[allow(
    dead_code,
    unreachable_pub,
    clippy::cast_possible_truncation,
    reason = "the test guest's own, for whose CPU the width is known"
)]
#[path = "../../guests/src/prng.rs"]
mod prng;
mod switch;

use attack::Method;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::denied::Attempt;
use bulkhead_runtime::birth::EXIT_STILLBORN;
use bulkhead_runtime::{Newborn, Stillbirth, leave, log};
use prey::Prey;
use prng::Prng;

fn main() {
    let kind = kind(std::env::args().next().as_deref().unwrap_or_default());
    // While it may still do everything.
    let denied = calls::denied(kind);
    let newborn = match Newborn::receive(kind) {
        Ok(newborn) if newborn.id.kind == ProcKind::Blk && newborn.id.index > 0 => {
            let _never = bulkhead_runtime::live::<bulkhead_blk::Blk>(newborn);
            leave(EXIT_STILLBORN)
        }
        // Of one network or machine among others.
        Ok(newborn) if is_honest(&newborn) => honest(newborn),
        received => received,
    };
    let Err(cause) = newborn.and_then(|newborn| live(newborn, &denied));
    log::line(&cause.to_string());
    leave(EXIT_STILLBORN)
}

/// Of switches and cards only those are hostile whose network or machine says so, and where it says `once`, only the first one.
fn is_honest(newborn: &Newborn) -> bool {
    let is_among_others = matches!(newborn.id.kind, ProcKind::Switch | ProcKind::Net);
    let is_next = newborn.id.generation > 1 && newborn.vm.ends_with("-once");
    is_among_others && (is_next || method(&newborn.vm).is_none())
}

fn honest(newborn: Newborn) -> ! {
    match newborn.id.kind {
        ProcKind::Switch => {
            let _never = bulkhead_switch::live(newborn);
        }
        _ => {
            let _never = bulkhead_runtime::live::<bulkhead_net::Net>(newborn);
        }
    }
    leave(EXIT_STILLBORN)
}

/// The method that a name says.
fn method(name: &str) -> Option<Method> {
    let rest = name.strip_prefix("hostile-")?;
    Method::named(rest.split('-').next().unwrap_or_default())
}

/// The kind in whose place it was started: its name, as the launcher gives it.
fn kind(name: &str) -> ProcKind {
    let kinds = [
        ProcKind::Blk,
        ProcKind::Console,
        ProcKind::Rng,
        ProcKind::Net,
        ProcKind::Fs,
        ProcKind::Vcpu,
        ProcKind::Vsock,
        ProcKind::Switch,
    ];
    let named = |kind: &ProcKind| name.ends_with(&format!("-{kind}"));
    kinds.into_iter().find(named).unwrap_or(ProcKind::Legacy)
}

fn live(mut newborn: Newborn, denied: &[Attempt]) -> Result<std::convert::Infallible, Stillbirth> {
    let name = newborn.vm.clone();
    let mut words = name.split('-').skip(2);
    let method = method(&name);
    let method =
        method.ok_or_else(|| Stillbirth::setup("the VM is not named hostile-METHOD-SEED"))?;
    let mut number = || words.next().and_then(|seed| seed.parse().ok());
    let seed = number().unwrap_or(1);
    let mut prng = Prng::new(seed ^ u64::from(newborn.id.generation) << 32);
    if newborn.id.kind == ProcKind::Switch {
        return switch::run(method, newborn, &mut prng);
    }
    let call = match method {
        Method::Calls => call(&newborn, denied, seed, number().unwrap_or(u64::MAX)),
        _ => None,
    };
    if newborn.id.kind == ProcKind::Vcpu {
        let prey = host::Prey::take(&mut newborn)?;
        let (control, _id) = newborn.lock()?;
        host::run(method, call, &prey, control.channel(), &mut prng)
    }
    if method == Method::Calls && call.is_none() && newborn.id.kind == ProcKind::Legacy {
        let _never = bulkhead_legacy::live(newborn);
        leave(EXIT_STILLBORN)
    }
    let mut prey = Prey::take(&mut newborn)?;
    let is_first = newborn.id.generation == 1;
    let (control, _id) = newborn.lock()?;
    if is_first && prey.window.is_none() {
        // What it does before its broker counts it among those that serve is a start that fails.
        attack::await_ping(control.channel(), &prey.waiter);
    }
    attack::run(method, call, &mut prey, control.channel(), &mut prng)
}

/// What this life is for: the `count` calls from `first` on, counted from 1, one after the other.
fn call<'a>(
    newborn: &Newborn,
    denied: &'a [Attempt],
    first: u64,
    count: u64,
) -> Option<&'a Attempt> {
    let honest = u64::from(newborn.id.kind == ProcKind::Legacy);
    let life = u64::from(newborn.id.generation).checked_sub(1 + honest)?;
    let at = first.checked_sub(1)?.checked_add(life)?;
    (life < count)
        .then(|| denied.get(usize::try_from(at).ok()?))
        .flatten()
}
