//! Output of a guest's command for a terminal that the guest must not control.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::escape::escaped;
use std::fmt::Write;

/// Makes a stream harmless: letters, line ends and tabs stay, everything else is shown as `\x1b`. Holds the
/// beginning of a letter until the rest of it has come.
#[derive(Debug, Default)]
pub(super) struct Plain {
    begun: Vec<u8>,
}

impl Plain {
    /// What is to be shown of `bytes`.
    pub(super) fn show(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut all = std::mem::take(&mut self.begun);
        all.extend(bytes);
        let mut shown = String::with_capacity(all.len());
        let mut rest = all.as_slice();
        loop {
            let error = match std::str::from_utf8(rest) {
                Ok(text) => {
                    letters(text, &mut shown);
                    break;
                }
                Err(error) => error,
            };
            let (good, behind) = rest.split_at(error.valid_up_to());
            letters(std::str::from_utf8(good).unwrap_or_default(), &mut shown);
            let Some(bad) = error.error_len() else {
                self.begun = behind.to_vec();
                break;
            };
            let (bad, behind) = behind.split_at(bad.min(behind.len()));
            let _written = write!(shown, "{}", escaped(bad));
            rest = behind;
        }
        shown.into_bytes()
    }

    /// What is left at the end.
    pub(super) fn finish(&mut self) -> Vec<u8> {
        escaped(&std::mem::take(&mut self.begun))
            .to_string()
            .into_bytes()
    }
}

fn letters(text: &str, shown: &mut String) {
    for c in text.chars() {
        match c {
            '\n' | '\t' => shown.push(c),
            // These turn what is around them about.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => hidden(c, shown),
            _ if c.is_control() => hidden(c, shown),
            _ => shown.push(c),
        }
    }
}

fn hidden(c: char, shown: &mut String) {
    let _written = write!(shown, "{}", escaped(c.encode_utf8(&mut [0; 4])));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn letters_stay_and_commands_are_seen() {
        let mut plain = Plain::default();
        let shown = plain.show("caf\u{e9}\t\x1b[2J\u{9b}1m\r\n\u{202e}x".as_bytes());
        let shown = String::from_utf8(shown).unwrap();
        assert_eq!(
            shown,
            "caf\u{e9}\t\\x1b[2J\\xc2\\x9b1m\\r\n\\xe2\\x80\\xaex"
        );
        assert_eq!(plain.show(&[0xff, b'a', 0xe2, 0x82]), b"\\xffa");
        assert_eq!(plain.show(&[0xac]), "\u{20ac}".as_bytes());
        assert_eq!(plain.show(&[0xc3]), b"");
        assert_eq!(plain.finish(), b"\\xc3");
    }

    proptest! {
        #[test]
        fn no_pieces_make_a_control_character(pieces in any::<Vec<Vec<u8>>>()) {
            let mut plain = Plain::default();
            let mut shown: Vec<u8> = pieces.iter().flat_map(|piece| plain.show(piece)).collect();
            shown.extend(plain.finish());
            let text = String::from_utf8(shown).unwrap();
            prop_assert!(text.chars().all(|c| !c.is_control() || matches!(c, '\n' | '\t')));
            let mut whole = Plain::default();
            let mut at_once = whole.show(&pieces.concat());
            at_once.extend(whole.finish());
            prop_assert_eq!(text.as_bytes(), at_once.as_slice());
        }
    }
}
