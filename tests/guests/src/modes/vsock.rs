//! `vsock-echo`: sends back what clients of the host send to port `port=`, until `count=` connections have
//! ended whole (0: until `seconds=` are over).
//!
//! `vsock-ask`: rounds of `count=` connections to port `port=` of the host, each of which sends `size=` bytes of a
//! pattern and verifies that they come back; one round, or until `seconds=` are over. A connection that
//! is refused or cut is told and is no error, but data that is wrong is.

use crate::machine::Machine;
use crate::report::{Failure, say};
use crate::sys::time::Deadline;
use crate::virtio::vsock::{CONNECTIONS_MAX, End, Task, Vsock};

const PORT: u64 = 5000;
const FOR_EVER_MS: u64 = 1 << 40;

fn end_of(machine: &Machine, default: u64) -> Result<(u64, Deadline), Failure> {
    let seconds = machine.number("seconds", default)?;
    let ms = match seconds {
        0 => FOR_EVER_MS,
        seconds => seconds.saturating_mul(1000),
    };
    Ok((seconds, Deadline::after_ms(ms)))
}

fn port(machine: &Machine) -> Result<u32, Failure> {
    u32::try_from(machine.number("port", PORT)?).map_err(|_| Failure::Parameter("port"))
}

fn sum_up(mode: &str, vsock: &Vsock) {
    say!(
        "{mode}.end whole={} refused={} cut={} open={} accepted={} bytes={} transport_resets={}",
        vsock.ended(End::Whole),
        vsock.ended(End::Refused),
        vsock.ended(End::Cut),
        vsock.open_connections(),
        vsock.accepted,
        vsock.bytes,
        vsock.transport_resets
    );
}

/// Listens.
pub fn echo(machine: &Machine) -> Result<(), Failure> {
    let (port, count) = (port(machine)?, machine.number("count", 0)?);
    let (_, end) = end_of(machine, 0)?;
    let mut vsock = Vsock::open(machine, super::timeout_ms(machine)?)?;
    vsock.listen(port);
    say!("vsock-echo.ready cid={} port={port}", vsock.cid);
    let done = vsock.run(end, |vsock| {
        Ok(count > 0 && vsock.ended(End::Whole) >= count && vsock.open_connections() == 0)
    })?;
    sum_up("vsock-echo", &vsock);
    if count > 0 && !done {
        return Err(Failure::Timeout("connections"));
    }
    Ok(())
}

/// Connects.
pub fn ask(machine: &Machine) -> Result<(), Failure> {
    let (port, count) = (port(machine)?, machine.number("count", 1)?);
    let bytes = machine.number("size", 1 << 20)?;
    let seed = machine.number("seed", 1)?;
    if count == 0 || count > CONNECTIONS_MAX as u64 {
        return Err(Failure::Parameter("count"));
    }
    let rounds_wanted = machine.number("iterations", 1)?;
    let (seconds, end) = end_of(machine, 0)?;
    let mut vsock = Vsock::open(machine, super::timeout_ms(machine)?)?;
    say!(
        "vsock-ask.begin cid={} port={port} count={count} size={bytes}",
        vsock.cid
    );
    let mut rounds = 0;
    loop {
        let mut asked = 0;
        let deadline = vsock.patience();
        let done = vsock.run(deadline, |vsock| {
            while asked < count {
                let task = Task::Ask {
                    bytes,
                    seed: seed + asked,
                };
                if !vsock.connect(port, task)? {
                    return Ok(false);
                }
                asked += 1;
            }
            Ok(vsock.open_connections() == 0)
        })?;
        if !done {
            sum_up("vsock-ask", &vsock);
            return Err(Failure::Timeout("connections"));
        }
        rounds += 1;
        say!(
            "vsock-ask.round round={rounds} whole={} refused={} cut={}",
            vsock.ended(End::Whole),
            vsock.ended(End::Refused),
            vsock.ended(End::Cut)
        );
        if if seconds == 0 {
            rounds >= rounds_wanted
        } else {
            end.passed()
        } {
            break;
        }
    }
    sum_up("vsock-ask", &vsock);
    Ok(())
}
