//! The crash report, put together from the pieces that the vCPU process sends.
//!
//! That process may have been taken over by its guest, so the text is bounded and made printable
//! here, whatever it did itself.

use super::session::REPORT_BYTES_MAX;

/// A report under construction.
#[derive(Debug, Default)]
pub(super) struct Report {
    text: String,
    cut: bool,
}

impl Report {
    /// Adds a piece. Line ends stay; every other control character and everything beyond ASCII
    /// becomes visible.
    pub(super) fn add(&mut self, piece: &str) {
        for c in piece.chars() {
            if self.text.len() >= REPORT_BYTES_MAX {
                self.cut = true;
                return;
            }
            match c {
                '\n' | ' '..='~' => self.text.push(c),
                '\t' => self.text.push(' '),
                _ => self.text.extend(c.escape_unicode()),
            }
        }
    }

    /// The report, if there was one.
    pub(super) fn finish(&mut self) -> Option<String> {
        let mut text = std::mem::take(&mut self.text);
        if self.cut {
            text.push_str("\n[the report is longer than 1 MiB and was cut here]\n");
        }
        (!text.is_empty()).then_some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_joined_and_made_printable() {
        let mut report = Report::default();
        assert_eq!(report.finish(), None);
        report.add("rip \\x1b\n");
        report.add("\x1b[2J\u{202e}");
        let expected = "rip \\x1b\n\\u{1b}[2J\\u{202e}";
        assert_eq!(report.finish().as_deref(), Some(expected));
    }

    #[test]
    fn endless_report_is_cut() {
        let mut report = Report::default();
        for _ in 0..100 {
            report.add(&"x".repeat(48 << 10));
        }
        assert!(report.finish().unwrap().len() < REPORT_BYTES_MAX + 100);
    }
}
