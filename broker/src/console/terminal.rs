//! The user's terminal in raw mode, and back again on every way out: normal return, panic, abort,
//! and every signal that can be caught.
//!
//! A signal that somebody else handles (the supervisor's SIGTERM, for instance) is left to them;
//! they end the program in the ordinary way, which drops the guard. Only for signals that would
//! kill the program on the spot does this module install a handler: restore, then die of the
//! signal as before. Handlers must therefore be registered before a terminal is attached.
#![allow(
    unsafe_code,
    reason = "signal handlers and the terminal ioctls they need"
)]

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, Ordering};

/// What a signal handler needs to put the terminal back. Leaked, so that a handler that has loaded
/// the pointer may use it whatever other threads do; a few dozen bytes for each time of attaching.
struct Saved {
    fd: i32,
    original: libc::termios,
}

static SAVED: AtomicPtr<Saved> = AtomicPtr::new(ptr::null_mut());
/// Eventfd that the handlers of SIGWINCH and SIGCONT ring; -1 for none.
static BELL: AtomicI32 = AtomicI32::new(-1);
static INSTALL: Once = Once::new();

/// Signals that end the program.
const DEADLY: [Signal; 5] = [
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGABRT,
];

/// A terminal in raw mode for as long as this lives.
#[derive(Debug)]
pub struct RawTerminal {
    terminal: OwnedFd,
    original: Termios,
    raw: Termios,
}

impl RawTerminal {
    /// Puts the terminal into raw mode. `bell` is an eventfd that is rung when its size may have
    /// changed; it must stay open for as long as the program runs.
    ///
    /// # Errors
    /// The kernel's error, or `ResourceBusy` when another terminal is raw already.
    pub fn enter(terminal: OwnedFd, bell: i32) -> io::Result<Self> {
        let original = tcgetattr(&terminal)?;
        let mut raw = original.clone();
        cfmakeraw(&mut raw);
        let saved = Box::leak(Box::new(Saved {
            fd: terminal.as_raw_fd(),
            original: original.clone().into(),
        }));
        SAVED
            .compare_exchange(ptr::null_mut(), saved, Ordering::AcqRel, Ordering::Acquire)
            .map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))?;
        BELL.store(bell, Ordering::Release);
        INSTALL.call_once(install);
        let guard = Self {
            terminal,
            original,
            raw,
        };
        tcsetattr(&guard.terminal, SetArg::TCSADRAIN, &guard.raw)?;
        Ok(guard)
    }

    /// Raw mode again, after the program was stopped and continued in the foreground.
    pub fn enter_again(&self) {
        if is_foreground(&self.terminal) {
            // A terminal that is gone needs no mode.
            let _gone = tcsetattr(&self.terminal, SetArg::TCSADRAIN, &self.raw);
        }
    }

    /// Columns and rows; zero while they are unknown.
    #[must_use]
    pub fn size(&self) -> (u16, u16) {
        terminal_size(&self.terminal)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // TCSADRAIN could wait for a terminal that is stuck; nothing may hold up the way out.
        let _gone = tcsetattr(&self.terminal, SetArg::TCSANOW, &self.original);
        BELL.store(-1, Ordering::Release);
        SAVED.store(ptr::null_mut(), Ordering::Release);
    }
}

/// Whether a terminal is in raw mode through this module.
#[must_use]
pub fn is_raw() -> bool {
    !SAVED.load(Ordering::Acquire).is_null()
}

/// Puts the terminal back now, if one is raw. For a way out that cannot wait for the guard.
pub fn restore_now() {
    // SAFETY: `Saved` is leaked and never changed, so a non-null pointer is valid for ever.
    let saved = unsafe { SAVED.load(Ordering::Acquire).as_ref() };
    if let Some(saved) = saved {
        // SAFETY: the pointer is to a valid termios; tcsetattr is async-signal-safe. A descriptor
        // that has been closed gives an error.
        unsafe { libc::tcsetattr(saved.fd, libc::TCSANOW, &raw const saved.original) };
    }
}

/// Whether this program may use the terminal: it is in the terminal's foreground process group.
#[must_use]
pub fn is_foreground(terminal: impl AsFd) -> bool {
    nix::unistd::tcgetpgrp(terminal).is_ok_and(|group| group == nix::unistd::getpgrp())
}

/// Columns and rows of a terminal; zero while they are unknown.
#[must_use]
pub fn terminal_size(terminal: impl AsFd) -> (u16, u16) {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: TIOCGWINSZ writes one winsize, which the pointer has room for.
    unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &raw mut size) };
    (size.ws_col, size.ws_row)
}

extern "C" fn die(signal: libc::c_int) {
    restore_now();
    // SAFETY: both calls are async-signal-safe; the signal is blocked until the handler returns
    // and then ends the program as it would have without a handler.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    // SAFETY: as above.
    unsafe { libc::raise(signal) };
}

extern "C" fn stop(_signal: libc::c_int) {
    restore_now();
    // SAFETY: raise is async-signal-safe. SIGSTOP cannot be caught, so this does not come back
    // here; SIGCONT rings the bell and the terminal becomes raw again.
    unsafe { libc::raise(libc::SIGSTOP) };
}

extern "C" fn ring(_signal: libc::c_int) {
    let (bell, one) = (BELL.load(Ordering::Acquire), 1u64);
    // SAFETY: errno is thread-local and valid; the interrupted code must find it unchanged.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let kept = unsafe { *errno };
    // SAFETY: eight valid bytes; write is async-signal-safe and the eventfd does not block.
    unsafe { libc::write(bell, (&raw const one).cast(), 8) };
    // SAFETY: as above.
    unsafe { *errno = kept };
}

fn install() {
    for signal in DEADLY {
        handle_if_nobody_does(signal, die);
    }
    handle_if_nobody_does(Signal::SIGTSTP, stop);
    handle_if_nobody_does(Signal::SIGWINCH, ring);
    handle_if_nobody_does(Signal::SIGCONT, ring);
    // With `panic = "abort"` no guard is dropped; the message should find a sane terminal, too.
    static HOOKED: AtomicBool = AtomicBool::new(false);
    if !HOOKED.swap(true, Ordering::AcqRel) {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore_now();
            before(info);
        }));
    }
}

fn handle_if_nobody_does(signal: Signal, handler: extern "C" fn(libc::c_int)) {
    let action = SigAction::new(
        SigHandler::Handler(handler),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    // SAFETY: the handlers above call async-signal-safe functions and atomics only.
    let before = unsafe { sigaction(signal, &action) };
    if let Ok(before) = before
        && !matches!(before.handler(), SigHandler::SigDfl)
    {
        // SAFETY: puts back what was there; this cannot be worse than never having touched it.
        let _same_as_before = unsafe { sigaction(signal, &before) };
    }
}
