//! The process: birth, and a loop that serves the board.
//!
//! ```text
//!   pass: posted writes drained, a call answered ── again while there is something
//!     │ output gathered: look for more for LINGER, then store it
//!     └ nothing: look for a while (spin) ── say so in the page ── sleep in epoll
//! ```

use crate::board::{Board, Wiring};
use crate::rtc::Rtc;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::input_ring::InputReader;
use bulkhead_ipc::legacy_page::LegacyPage;
use bulkhead_ipc::output_ring::OutputRing;
use bulkhead_ipc::protocol::birth::{FdRole, KindConfig};
use bulkhead_ipc::protocol::device::FromDevice;
use bulkhead_ipc::shared::Doorbell;
use bulkhead_runtime::control::Control;
use bulkhead_runtime::spin::Spin;
use bulkhead_runtime::transcript::Transcript;
use bulkhead_runtime::wait::Waiter;
use bulkhead_runtime::{Newborn, Stillbirth, leave, live_out};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

const TOKEN_KICK: u8 = 0;
const TOKEN_CONTROL: u8 = 1;
const TOKEN_INPUT: u8 = 2;

/// How long to look for more output before storing what there is. An exit to user space for one
/// byte takes a vCPU about 10 µs, so that a stream of them is stored in batches.
const LINGER: Duration = Duration::from_micros(30);
/// Busy passes after which control messages are looked for without sleeping.
const PASSES_BETWEEN_LOOKS: u32 = 1024;
const LOOKS_PER_CLOCK: u32 = 16;
const EXIT_FAULT: i32 = 71;

/// Runs the process from its birth to its end.
pub(crate) fn run() -> ExitCode {
    born(Newborn::receive(ProcKind::Legacy))
}

/// Runs a process that has received its birth message, or has not.
pub(crate) fn born(newborn: Result<Newborn, Stillbirth>) -> ExitCode {
    live_out(newborn, |newborn| {
        let mut process = bear(newborn)?;
        // Before anything of it is dropped, for which a locked process has no call.
        leave(process.serve())
    })
}

fn bear(mut newborn: Newborn) -> Result<Process, Stillbirth> {
    let waiter = Waiter::new().map_err(Stillbirth::setup)?;
    let (mut board, watched) = match prepare(&mut newborn, &waiter) {
        Ok(prepared) => prepared,
        Err(cause) => newborn.fail(&cause),
    };
    let cpus = newborn.cpus;
    let (control, id) = newborn.lock()?;
    // Only a locked process touches what a guest can see.
    board.begin(id.generation, host_now());
    Ok(Process {
        board,
        waiter,
        _watched: watched,
        control,
        spin: Spin::beside(1, cpus),
        linger: if cpus > 1 { LINGER } else { Duration::ZERO },
    })
}

fn prepare(newborn: &mut Newborn, waiter: &Waiter) -> Result<(Board, [Doorbell; 2]), Stillbirth> {
    let KindConfig::Legacy(config) = &newborn.config else {
        return Err(Stillbirth::setup("no configuration of legacy devices"));
    };
    if config.output_capacity == 0 {
        return Err(Stillbirth::Field {
            field: "output_capacity",
            got: "0".to_owned(),
            expected: "at least 1 byte",
        });
    }
    let grants = &mut newborn.grants;
    let page = LegacyPage::map(grants.take(FdRole::LegacyPage, 0)?)?;
    if !page.is_generation(newborn.id.generation) {
        return Err(Stillbirth::Field {
            field: "legacy page",
            got: "of another generation".to_owned(),
            expected: "this process's own",
        });
    }
    let mut bell = |role| grants.take(role, 0).map(Doorbell::from);
    let kick = bell(FdRole::LegacyKick)?;
    let input_bell = bell(FdRole::InputBell)?;
    let (reply, interrupt) = (bell(FdRole::LegacyReply)?, bell(FdRole::LegacyInterrupt)?);
    let output_bell = bell(FdRole::OutputBell)?;
    let output = grants.take(FdRole::Output, 0)?;
    let ring = OutputRing::new(
        output.into(),
        config.output_capacity,
        config.output_position,
    );
    let input = InputReader::map(grants.take(FdRole::Input, 0)?, config.input_position)?;
    for (fd, token) in [
        (std::os::fd::AsFd::as_fd(&kick), TOKEN_KICK),
        (std::os::fd::AsFd::as_fd(&input_bell), TOKEN_INPUT),
    ] {
        waiter.watch(fd, token).map_err(Stillbirth::setup)?;
    }
    newborn.watch_brokers(waiter, TOKEN_CONTROL)?;
    let wiring = Wiring {
        page,
        reply,
        interrupt,
        transcript: Transcript::new(ring, output_bell),
        input,
    };
    let board = Board::new(wiring, Rtc::new(config.rtc_offset_s, host_now()));
    Ok((board, [kick, input_bell]))
}

fn host_now() -> Duration {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}

struct Process {
    board: Board,
    waiter: Waiter,
    /// The doorbells that the waiter watches: they must outlive whoever rings them.
    _watched: [Doorbell; 2],
    control: Control,
    spin: Spin,
    linger: Duration,
}

impl Process {
    /// Serves until told to end. Returns the exit status.
    fn serve(&mut self) -> i32 {
        let mut passes = 0u32;
        let mut woken = false;
        loop {
            if self.board.pass(host_now()) {
                passes += 1;
                if passes.is_multiple_of(PASSES_BETWEEN_LOOKS)
                    && let Some(status) = self.sleep(Some(Duration::ZERO))
                {
                    return status;
                }
                continue;
            }
            if self.board.has_pending() {
                // While sleeping is cheaper than looking, so is storing what there is.
                let cheap = self.spin.budget().is_zero();
                if self.look(if cheap { Duration::ZERO } else { self.linger }) {
                    continue;
                }
                self.board.flush();
            }
            if std::mem::take(&mut woken) {
                self.board.wake_writer();
            }
            if self.look(self.spin.budget()) || !self.board.may_sleep() {
                continue;
            }
            let asleep = Instant::now();
            let within = self.board.deadline(host_now());
            let status = self.sleep(within);
            self.spin.slept(asleep.elapsed());
            self.board.set_awake();
            self.board.clock(host_now());
            woken = true;
            if let Some(status) = status {
                return status;
            }
        }
    }

    fn look(&self, budget: Duration) -> bool {
        if budget.is_zero() {
            return self.board.has_work();
        }
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS_PER_CLOCK {
                if self.board.has_work() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= budget {
                return false;
            }
        }
    }

    /// Sleeps; returns an exit status when the process is to end.
    fn sleep(&mut self, within: Option<Duration>) -> Option<i32> {
        let woken = match self.waiter.sleep(within) {
            Ok(woken) => woken,
            Err(errno) => {
                let reason = format!("epoll_wait: {errno}");
                tracing::error!(%reason, "the legacy devices cannot go on");
                self.control.say(&FromDevice::Fault { reason });
                return Some(EXIT_FAULT);
            }
        };
        if woken.by(TOKEN_INPUT) {
            self.board.input_arrived(host_now());
        }
        if woken.by(TOKEN_CONTROL) {
            loop {
                let wishes = self.control.listen();
                if wishes.shutdown {
                    while self.board.pass(host_now()) {}
                    self.board.flush();
                    return Some(0);
                }
                if !wishes.more {
                    break;
                }
            }
        }
        None
    }
}
