//! Records on serial, and the count of failures.

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bulkhead_guest::record::{Escaped, Line};

use crate::sys::ring0;

static FIRST: AtomicBool = AtomicBool::new(true);
static ERRORS: AtomicU64 = AtomicU64::new(0);

/// Writes one record: `say!("rng bytes={count}")`.
macro_rules! say {
    ($($format:tt)*) => { $crate::report::write(format_args!($($format)*)) };
}
pub(crate) use say;

/// Writes an `error` record and counts it: `fail!(mode, "key={value}")`.
macro_rules! fail {
    ($mode:expr, $($format:tt)*) => { $crate::report::error($mode, format_args!($($format)*)) };
}
pub(crate) use fail;

/// Writes one record. The entry stub has already sent the first letter of the first one.
pub fn write(record: fmt::Arguments<'_>) {
    let line = Line::new(record);
    let skipped = usize::from(FIRST.swap(false, Ordering::Relaxed));
    ring0::write_serial(&line.bytes()[skipped..]);
}

/// Writes an error record and counts it.
pub fn error(mode: &str, what: fmt::Arguments<'_>) {
    ERRORS.fetch_add(1, Ordering::Relaxed);
    write(format_args!("error mode={mode} {what}"));
}

/// Errors so far.
pub fn errors() -> u64 {
    ERRORS.load(Ordering::Relaxed)
}

/// Why a mode could not go on.
#[derive(Debug, Clone, Copy)]
pub enum Failure {
    /// The machine has no such device.
    NoDevice {
        /// Virtio device id.
        id: u32,
        /// Which one of several.
        index: u64,
    },
    /// Something did not happen in time.
    Timeout(&'static str),
    /// The device set DEVICE_NEEDS_RESET.
    NeedsReset(&'static str),
    /// A value differs from what it must be.
    Wrong {
        /// What was looked at.
        what: &'static str,
        /// What it was.
        got: u64,
        /// What it must be.
        expected: u64,
    },
    /// A parameter that cannot be used.
    Parameter(&'static str),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Failure::NoDevice { id, index } => write!(f, "kind=no_device id={id} index={index}"),
            Failure::Timeout(what) => write!(f, "kind=timeout what={what}"),
            Failure::NeedsReset(what) => write!(f, "kind=needs_reset what={what}"),
            Failure::Wrong {
                what,
                got,
                expected,
            } => {
                write!(
                    f,
                    "kind=wrong what={what} got={got:#x} expected={expected:#x}"
                )
            }
            Failure::Parameter(key) => write!(f, "kind=parameter key={}", Escaped(key.as_bytes())),
        }
    }
}

/// `Err` unless both are the same.
pub fn expect(what: &'static str, got: u64, expected: u64) -> Result<(), Failure> {
    if got == expected {
        Ok(())
    } else {
        Err(Failure::Wrong {
            what,
            got,
            expected,
        })
    }
}

/// A short text on the stack, cut when it is too long.
pub struct Text {
    bytes: [u8; 200],
    len: usize,
}

impl Text {
    /// Empty.
    pub fn new() -> Text {
        Text {
            bytes: [0; 200],
            len: 0,
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let taken = text.len().min(self.bytes.len() - self.len);
        self.bytes[self.len..self.len + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.len += taken;
        Ok(())
    }
}
