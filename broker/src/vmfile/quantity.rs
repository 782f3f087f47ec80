//! Sizes and durations as users write them: a number and a unit, never a bare number.

use std::fmt::Write;
use std::time::Duration;

/// Why a size or duration was refused: what was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// The size has no unit or one that is not known.
    #[error(
        "expected a size with a unit, such as \"512MiB\" or \"2GiB\" (B, KiB, MiB, GiB, TiB; K, M, G, T mean the same; KB, MB, GB, TB are powers of 1000)"
    )]
    SizeUnit,
    /// The number before the unit cannot be read.
    #[error("expected a number before the unit, such as \"512MiB\"")]
    Number,
    /// The quantity is not a whole number of bytes or milliseconds.
    #[error("expected a whole number of {0}")]
    Fraction(&'static str),
    /// It does not fit 64 bits.
    #[error("the value is too large")]
    TooLarge,
    /// The duration has no unit or one that is not known.
    #[error("expected a duration with a unit, such as \"60s\" (ms, s, m, h)")]
    DurationUnit,
}

const SIZE_UNITS: [(&str, u64); 14] = [
    ("B", 1),
    ("K", 1 << 10),
    ("M", 1 << 20),
    ("G", 1 << 30),
    ("T", 1 << 40),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

const DURATION_UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

/// Reads `digits[.digits]` times `unit` exactly.
fn scaled(number: &str, unit: u64, what: &'static str) -> Result<u64, QuantityError> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return Err(QuantityError::Number);
    }
    let whole: u64 = whole.parse().map_err(|_| QuantityError::TooLarge)?;
    let fraction = fraction.trim_end_matches('0');
    let places = u32::try_from(fraction.len()).map_err(|_| QuantityError::Number)?;
    let scale = 10u128
        .checked_pow(places)
        .filter(|_| places <= 15)
        .ok_or(QuantityError::Fraction(what))?;
    let part: u128 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().map_err(|_| QuantityError::Number)?
    };
    let part = part * u128::from(unit);
    if !part.is_multiple_of(scale) {
        return Err(QuantityError::Fraction(what));
    }
    let total = u128::from(whole) * u128::from(unit) + part / scale;
    u64::try_from(total).map_err(|_| QuantityError::TooLarge)
}

fn split(text: &str) -> (&str, &str) {
    let at = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    (number, unit.strip_prefix(' ').unwrap_or(unit))
}

/// Reads a size such as `512MiB`, `1.5 GiB` or `2G`.
///
/// # Errors
/// What was expected instead.
pub fn parse_size(text: &str) -> Result<u64, QuantityError> {
    let (number, unit) = split(text);
    let Some((_, unit)) = SIZE_UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err(QuantityError::SizeUnit);
    };
    scaled(number, *unit, "bytes")
}

/// Reads a duration such as `60s` or `1.5h`.
///
/// # Errors
/// What was expected instead.
pub fn parse_duration(text: &str) -> Result<Duration, QuantityError> {
    let (number, unit) = split(text);
    let Some((_, unit)) = DURATION_UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err(QuantityError::DurationUnit);
    };
    scaled(number, *unit, "milliseconds").map(Duration::from_millis)
}

/// Writes a size with the largest binary unit that gives a whole number; [`parse_size`] reads it.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let mut out = String::new();
    let fit = units
        .iter()
        .find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    // Writing to a string cannot fail.
    let _written = match fit {
        Some((name, shift)) => write!(out, "{}{name}", bytes >> shift),
        None => write!(out, "{bytes}B"),
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn units_mean_what_they_say() {
        for (text, bytes) in [
            ("0B", 0),
            ("512MiB", 512 << 20),
            ("512M", 512 << 20),
            ("1 GiB", 1 << 30),
            ("1.5GiB", 3 << 29),
            ("1GB", 1_000_000_000),
            ("0.001KB", 1),
            ("16777215TiB", 16_777_215 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn bare_and_broken_numbers_are_refused() {
        use QuantityError::{Fraction, Number, SizeUnit, TooLarge};
        for (text, error) in [
            ("512", SizeUnit),
            ("", SizeUnit),
            ("512mib", SizeUnit),
            ("512 MiB ", SizeUnit),
            ("-1MiB", SizeUnit),
            ("MiB", Number),
            ("1.MiB", Number),
            (".5MiB", Number),
            ("1.2.3MiB", Number),
            ("0.1B", Fraction("bytes")),
            ("1.00000000000000000001TiB", Fraction("bytes")),
            ("16777216TiB", TooLarge),
            ("99999999999999999999B", TooLarge),
        ] {
            assert_eq!(parse_size(text), Err(error), "{text}");
        }
    }

    #[test]
    fn durations_have_units_too() {
        assert_eq!(parse_duration("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(parse_duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("60"), Err(QuantityError::DurationUnit));
        assert_eq!(
            parse_duration("0.0001s"),
            Err(QuantityError::Fraction("milliseconds"))
        );
    }

    proptest! {
        #[test]
        fn shown_sizes_read_back(bytes: u64, shift in 0u32..41) {
            for bytes in [bytes, bytes >> shift << shift] {
                prop_assert_eq!(parse_size(&show_size(bytes)), Ok(bytes));
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            let _either = (parse_size(&text), parse_duration(&text));
        }
    }
}
