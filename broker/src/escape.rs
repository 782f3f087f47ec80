//! Makes bytes that a guest, a file or a peer chose harmless to print.
//!
//! Everything that reaches a terminal, a log, a list or an error message goes through here, except
//! the output of an attached console. The result is printable ASCII without exception: control
//! sequences, line breaks, bidirectional overrides and look-alike letters all become visible. It
//! can be read back: no two inputs give the same text.

use std::fmt::{self, Write};

/// Shows bytes as printable ASCII; everything else, and the backslash, as `\n`, `\\` or `\x1b`.
#[derive(Debug, Clone, Copy)]
pub struct Escaped<'a>(&'a [u8]);

/// Escapes `bytes` for display. Accepts text and byte strings.
pub fn escaped<B: AsRef<[u8]> + ?Sized>(bytes: &B) -> Escaped<'_> {
    Escaped(bytes.as_ref())
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.0 {
            match byte {
                b'\\' => f.write_str("\\\\")?,
                b'\n' => f.write_str("\\n")?,
                b'\r' => f.write_str("\\r")?,
                b'\t' => f.write_str("\\t")?,
                b' '..=b'~' => f.write_char(char::from(byte))?,
                _ => write!(f, "\\x{byte:02x}")?,
            }
        }
        Ok(())
    }
}

/// As [`escaped`], cut to at most `bytes_max` bytes of input, which an ellipsis shows.
#[must_use]
pub fn excerpt<B: AsRef<[u8]> + ?Sized>(bytes: &B, bytes_max: usize) -> String {
    let bytes = bytes.as_ref();
    match bytes.get(..bytes_max) {
        Some(start) if bytes.len() > bytes_max => format!("{}...", Escaped(start)),
        _ => Escaped(bytes).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unescape(text: &str) -> Vec<u8> {
        let (mut out, mut rest) = (Vec::new(), text.as_bytes());
        while let Some((&first, tail)) = rest.split_first() {
            rest = tail;
            if first != b'\\' {
                out.push(first);
                continue;
            }
            let (&kind, tail) = rest.split_first().unwrap();
            rest = tail;
            match kind {
                b'n' => out.push(b'\n'),
                b'r' => out.push(b'\r'),
                b't' => out.push(b'\t'),
                b'\\' => out.push(b'\\'),
                b'x' => {
                    let digits = std::str::from_utf8(&rest[..2]).unwrap();
                    out.push(u8::from_str_radix(digits, 16).unwrap());
                    rest = &rest[2..];
                }
                other => panic!("unknown escape {other}"),
            }
        }
        out
    }

    #[test]
    fn terminal_control_sequences_become_visible() {
        assert_eq!(escaped("\x1b]0;evil\x07").to_string(), "\\x1b]0;evil\\x07");
        assert_eq!(escaped("a\r\nb\\").to_string(), "a\\r\\nb\\\\");
        assert_eq!(escaped("\u{202e}").to_string(), "\\xe2\\x80\\xae");
        assert_eq!(escaped(&[0x9b, 0x7f]).to_string(), "\\x9b\\x7f");
    }

    #[test]
    fn long_input_is_cut_and_says_so() {
        assert_eq!(excerpt("abcdef", 6), "abcdef");
        assert_eq!(excerpt("abcdefg", 6), "abcdef...");
    }

    proptest! {
        #[test]
        fn output_is_printable_ascii_and_loses_nothing(bytes: Vec<u8>) {
            let text = escaped(&bytes).to_string();
            prop_assert!(text.bytes().all(|b| (b' '..=b'~').contains(&b)));
            prop_assert_eq!(unescape(&text), bytes);
        }
    }
}
