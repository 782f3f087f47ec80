//! The line protocol: `BH <record> key=value …`, one record a line, values without spaces.

use core::fmt::{self, Write};

/// Longest record with its line feed; what does not fit is cut, and the line ends with `~`.
pub const LINE_MAX: usize = 1024;

/// Bytes as one value: everything but visible ASCII, and `%`, `=` and `"`, becomes `%XX`.
#[derive(Debug, Clone, Copy)]
pub struct Escaped<'a>(pub &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.0 {
            match byte {
                b'%' | b'=' | b'"' => write!(f, "%{byte:02X}")?,
                b'!'..=b'~' => f.write_char(char::from(byte))?,
                _ => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

/// Bytes as hexadecimal digits.
#[derive(Debug, Clone, Copy)]
pub struct Hex<'a>(pub &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// One record under construction.
#[derive(Debug)]
pub struct Line {
    bytes: [u8; LINE_MAX],
    len: usize,
    cut: bool,
}

impl Line {
    /// A finished record, line feed included.
    pub fn new(record: fmt::Arguments<'_>) -> Line {
        let mut line = Line {
            bytes: [0; LINE_MAX],
            len: 0,
            cut: false,
        };
        // Line::write_str cannot fail; a Display that fails leaves a shorter record.
        let _ = line.write_str("BH ");
        let _ = line.write_fmt(record);
        let end: &[u8] = if line.cut { b"~\n" } else { b"\n" };
        line.bytes[line.len..line.len + end.len()].copy_from_slice(end);
        line.len += end.len();
        line
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = LINE_MAX - 2 - self.len;
        let taken = text.len().min(room);
        self.bytes[self.len..self.len + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.len += taken;
        self.cut |= taken < text.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line() {
        let line = Line::new(format_args!("rng bytes={} first={}", 16, Hex(&[0, 0xab])));
        assert_eq!(line.bytes(), b"BH rng bytes=16 first=00ab\n");
    }

    #[test]
    fn hostile_bytes_cannot_forge_a_record() {
        let escaped = Escaped(b"a b\nBH done errors=0%\xff").to_string();
        assert_eq!(escaped, "a%20b%0ABH%20done%20errors%3D0%25%FF");
    }

    #[test]
    fn a_record_that_is_too_long_is_cut_and_says_so() {
        let long = "x".repeat(3 * LINE_MAX);
        let line = Line::new(format_args!("{long}"));
        assert_eq!(line.bytes().len(), LINE_MAX);
        assert!(line.bytes().ends_with(b"x~\n"));
    }
}
