//! What the keys of an attached terminal mean. Pure: bytes in, bytes for the guest and a verdict out.
//!
//! ```text
//! Ctrl-]         leave (another key with --escape, none with --escape none)
//! Ctrl-A x       leave          Ctrl-A h       help
//! Ctrl-A Ctrl-A  one Ctrl-A for the guest; Ctrl-A and anything else goes to the guest as typed
//! ```

/// The byte that Ctrl-A sends.
const CTRL_A: u8 = 0x01;
/// The byte that Ctrl-] sends.
const CTRL_BRACKET: u8 = 0x1d;

/// What the user wants of the terminal itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verdict {
    /// Show which keys there are.
    pub help: bool,
    /// Leave. Bytes after this key have not been looked at.
    pub leave: bool,
}

/// The state of the keyboard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    escape: Option<u8>,
    prefix: Option<u8>,
    prefixed: bool,
}

impl Keys {
    /// The keys of `run`: `escape` leaves, and Ctrl-A is a prefix unless it is the escape itself.
    #[must_use]
    pub fn new(escape: Option<u8>) -> Self {
        let prefix = (escape != Some(CTRL_A)).then_some(CTRL_A);
        Self {
            escape,
            prefix,
            prefixed: false,
        }
    }

    /// The keys of `console`: `escape` leaves, and everything else is for the guest.
    #[must_use]
    pub const fn leaving_with(escape: Option<u8>) -> Self {
        Self {
            escape,
            prefix: None,
            prefixed: false,
        }
    }

    /// No keys: every byte goes to the guest.
    #[must_use]
    pub const fn pass_through() -> Self {
        Self {
            escape: None,
            prefix: None,
            prefixed: false,
        }
    }

    /// Takes typed bytes and appends those for the guest to `guest`.
    pub fn feed(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Verdict {
        let mut verdict = Verdict::default();
        for &byte in typed {
            if std::mem::take(&mut self.prefixed) {
                match byte {
                    b'x' => verdict.leave = true,
                    b'h' | b'?' => verdict.help = true,
                    CTRL_A => guest.push(CTRL_A),
                    other if Some(other) == self.escape => verdict.leave = true,
                    other => guest.extend([CTRL_A, other]),
                }
            } else if Some(byte) == self.escape {
                verdict.leave = true;
            } else if Some(byte) == self.prefix {
                self.prefixed = true;
            } else {
                guest.push(byte);
            }
            if verdict.leave {
                break;
            }
        }
        verdict
    }

    /// One line that says how to leave.
    #[must_use]
    pub fn banner(&self) -> String {
        let prefix = self.prefix.map(|_| "Ctrl-A x".to_owned());
        let ways: Vec<_> = self
            .escape
            .map(show_key)
            .into_iter()
            .chain(prefix)
            .collect();
        match (ways.as_slice(), self.prefix) {
            ([], _) => "no key leaves it".to_owned(),
            (ways, None) => format!("to leave press {}", ways.join(" or ")),
            (ways, Some(_)) => {
                format!("to quit press {}; Ctrl-A h shows help", ways.join(" or "))
            }
        }
    }

    /// The lines that Ctrl-A h shows.
    #[must_use]
    pub fn help(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(escape) = self.escape {
            lines.push(format!(
                "{:<14} quit, which ends the machine",
                show_key(escape)
            ));
        }
        if self.prefix.is_some() {
            for (keys, what) in [
                ("Ctrl-A x", "quit, which ends the machine"),
                ("Ctrl-A Ctrl-A", "send Ctrl-A to the guest"),
                ("Ctrl-A h", "show this help"),
            ] {
                lines.push(format!("{keys:<14} {what}"));
            }
        }
        lines
    }
}

/// A control byte as keys, such as `Ctrl-]`.
fn show_key(byte: u8) -> String {
    format!("Ctrl-{}", char::from(byte ^ 0x40))
}

/// Reads the value of `--escape`: `^]`, `Ctrl-]` or `none`.
///
/// # Errors
/// What was expected.
pub fn parse_escape(text: &str) -> Result<Option<u8>, String> {
    if text == "none" {
        return Ok(None);
    }
    let lower = text.to_ascii_lowercase();
    let key = lower
        .strip_prefix('^')
        .or_else(|| lower.strip_prefix("ctrl-"));
    match key.map(str::as_bytes) {
        Some([key @ (b'a'..=b'z' | b'[' | b'\\' | b']' | b'^' | b'_')]) => Ok(Some(*key & 0x1f)),
        _ => Err("expected a control key such as ^] or Ctrl-], or none".to_owned()),
    }
}

/// The escape key unless another is chosen.
pub const ESCAPE_DEFAULT: u8 = CTRL_BRACKET;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn typed(text: &[u8]) -> (Vec<u8>, Verdict) {
        let mut guest = Vec::new();
        let verdict = Keys::new(Some(ESCAPE_DEFAULT)).feed(text, &mut guest);
        (guest, verdict)
    }

    #[test]
    fn control_c_goes_to_the_guest() {
        let (guest, verdict) = typed(b"ls\r\x03\x04\x1a\x1c");
        assert_eq!(guest, b"ls\r\x03\x04\x1a\x1c");
        assert_eq!(verdict, Verdict::default());
    }

    #[test]
    fn both_escapes_leave_at_once() {
        for text in [&b"ab\x1dcd"[..], b"ab\x01xcd", b"ab\x01\x1dcd"] {
            let (guest, verdict) = typed(text);
            assert_eq!(guest, b"ab");
            assert!(verdict.leave);
        }
    }

    #[test]
    fn control_a_can_be_sent_and_is_kept_before_other_keys() {
        assert_eq!(typed(b"\x01\x01").0, b"\x01");
        assert_eq!(typed(b"\x01b").0, b"\x01b");
        let (guest, verdict) = typed(b"\x01h!");
        assert_eq!(guest, b"!");
        assert!(verdict.help && !verdict.leave);
    }

    #[test]
    fn prefix_and_key_may_come_in_two_reads() {
        let (mut keys, mut guest) = (Keys::new(None), Vec::new());
        assert!(!keys.feed(b"\x01", &mut guest).leave);
        assert!(keys.feed(b"x", &mut guest).leave);
        assert!(guest.is_empty());
    }

    #[test]
    fn escape_key_is_chosen_by_name() {
        assert_eq!(parse_escape("^]"), Ok(Some(0x1d)));
        assert_eq!(parse_escape("Ctrl-T"), Ok(Some(0x14)));
        assert_eq!(parse_escape("none"), Ok(None));
        for wrong in ["", "x", "^", "^1", "ctrl-", "^]]", "\u{e9}"] {
            assert!(parse_escape(wrong).is_err(), "{wrong}");
        }
        assert_eq!(
            Keys::new(Some(0x14)).banner(),
            "to quit press Ctrl-T or Ctrl-A x; Ctrl-A h shows help"
        );
        assert_eq!(Keys::new(Some(1)).banner(), "to leave press Ctrl-A");
        let detached = Keys::leaving_with(Some(0x1d));
        assert_eq!(detached.banner(), "to leave press Ctrl-]");
        assert_eq!(Keys::leaving_with(None).banner(), "no key leaves it");
    }

    proptest! {
        #[test]
        fn pass_through_changes_nothing(bytes: Vec<u8>) {
            let mut guest = Vec::new();
            prop_assert_eq!(Keys::pass_through().feed(&bytes, &mut guest), Verdict::default());
            prop_assert_eq!(guest, bytes);
        }

        #[test]
        fn split_of_reads_does_not_matter(bytes in prop::collection::vec(prop::sample::select(vec![1u8, b'x', b'h', b'a', 3]), 0..20), at: prop::sample::Index) {
            let (mut whole, mut parts) = (Vec::new(), Vec::new());
            let one = Keys::new(None).feed(&bytes, &mut whole);
            let (a, b) = bytes.split_at(at.index(bytes.len() + 1));
            let mut keys = Keys::new(None);
            let first = keys.feed(a, &mut parts);
            let leave = first.leave || keys.feed(b, &mut parts).leave;
            prop_assert_eq!(one.leave, leave);
            prop_assert_eq!(whole, parts);
        }
    }
}
