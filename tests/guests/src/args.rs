//! The command line: `key=value` words, separated by spaces.
//!
//! A key of ours that is misspelt must not silently test less, so unknown keys are found; words
//! that VMMs add for Linux (a key with a dot, `console=` …) are passed over.

/// Keys that this guest understands.
const KNOWN: &[&str] = &[
    "bs",
    "count",
    "disk",
    "end",
    "fill",
    "foreign",
    "interval",
    "ip",
    "iterations",
    "lines",
    "mac",
    "mode",
    "names",
    "offload",
    "op",
    "port",
    "pairs",
    "patience",
    "peer",
    "qd",
    "rate",
    "requests",
    "resizes",
    "rounds",
    "seconds",
    "sector",
    "sectors",
    "seed",
    "size",
    "timeout",
];
/// Words for Linux that VMMs add by themselves.
const FOREIGN: &[&str] = &[
    "console",
    "earlycon",
    "earlyprintk",
    "reboot",
    "panic",
    "pci",
    "root",
    "ro",
    "rw",
    "quiet",
];

/// A value that is not what its key needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadValue<'a> {
    /// The key.
    pub key: &'a str,
    /// The value as written.
    pub value: &'a str,
}

/// A parsed command line.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    line: &'a str,
}

impl<'a> Args<'a> {
    /// Nothing is copied; words are found when they are asked for.
    pub fn new(line: &'a str) -> Args<'a> {
        Args { line }
    }

    fn words(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        self.line
            .split_ascii_whitespace()
            .map(|word| word.split_once('=').unwrap_or((word, "")))
    }

    /// The last value that was given for a key.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.words()
            .filter(|(name, _)| *name == key)
            .last()
            .map(|(_, value)| value)
    }

    /// A number: decimal or `0x…`, with an optional `k`, `m` or `g` (binary multiples).
    pub fn number(&self, key: &'static str) -> Result<Option<u64>, BadValue<'a>> {
        let Some(value) = self.text(key) else {
            return Ok(None);
        };
        parse_number(value).map(Some).ok_or(BadValue { key, value })
    }

    /// The modes to run, in order.
    pub fn modes(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.text("mode")
            .unwrap_or("hello")
            .split(',')
            .filter(|mode| !mode.is_empty())
    }

    /// Words that are neither ours nor known to be somebody else's.
    pub fn unknown(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.words()
            .map(|(key, _)| key)
            .filter(|key| !KNOWN.contains(key) && !FOREIGN.contains(key) && !key.contains('.'))
    }
}

fn parse_number(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).ok();
    }
    let (digits, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_a_key_counts() {
        let args = Args::new("mode=hello seed=1 seed=0x10");
        assert_eq!(args.number("seed"), Ok(Some(16)));
        assert_eq!(args.number("qd"), Ok(None));
    }

    #[test]
    fn sizes_take_binary_suffixes() {
        assert_eq!(Args::new("bs=128k").number("bs"), Ok(Some(131_072)));
        assert_eq!(Args::new("size=2G").number("size"), Ok(Some(2 << 30)));
    }

    #[test]
    fn a_number_that_is_none_is_an_error() {
        for value in [
            "",
            "k",
            "12q",
            "0x",
            "-1",
            "99999999999999999999",
            "17179869184g",
            "é",
        ] {
            let line = format!("seed={value}");
            assert_eq!(
                Args::new(&line).number("seed"),
                Err(BadValue { key: "seed", value })
            );
        }
    }

    #[test]
    fn hello_is_the_default_mode() {
        assert!(Args::new("console=ttyS0").modes().eq(["hello"]));
        assert!(Args::new("mode=rng,,blk").modes().eq(["rng", "blk"]));
    }

    #[test]
    fn misspelt_keys_are_found_and_words_for_linux_are_not() {
        let args =
            Args::new("mode=blk sectrs=5 console=ttyS0 virtio_mmio.device=512@0xfeb00e00:12");
        assert!(args.unknown().eq(["sectrs"]));
    }
}
