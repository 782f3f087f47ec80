//! Capture to a pcapng file (draft-ietf-opsawg-pcapng): what passes one port or all, until the time or
//! the room is over. The caller writes what [`Capture::take`] gives to where it belongs.

use crate::PortId;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Bytes that wait to be written, at most: what comes meanwhile is counted and not kept.
pub const BUFFER_BYTES_MAX: usize = 256 * 1024;
/// Bytes of a file, at most.
pub const FILE_BYTES_MAX: u64 = 1 << 30;

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;
const ETHERNET: u16 = 1;

/// Whether a frame came from a port or went to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// It came from the port.
    In,
    /// It went to the port.
    Out,
}

/// What is captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureSettings {
    /// One port, or all.
    pub port: Option<PortId>,
    /// Bytes of each frame that are kept.
    pub snap_bytes: u32,
    /// Bytes of the file, at most [`FILE_BYTES_MAX`].
    pub file_bytes: u64,
    /// How long it goes on.
    pub within: Duration,
}

/// A capture that goes on.
#[derive(Debug)]
pub struct Capture {
    settings: CaptureSettings,
    until: Instant,
    /// What the clock of the wall showed at `started`.
    wall: Duration,
    started: Instant,
    /// Number of each port in the file, in the order in which they came up.
    interfaces: BTreeMap<PortId, u32>,
    buffer: Vec<u8>,
    left: u64,
    missed: u64,
    full: bool,
}

impl Capture {
    /// Begins one; `wall` is the time since 1970.
    #[must_use]
    pub fn new(settings: CaptureSettings, now: Instant, wall: Duration) -> Self {
        let left = settings.file_bytes.min(FILE_BYTES_MAX);
        let mut capture = Self {
            until: now + settings.within,
            settings,
            wall,
            started: now,
            interfaces: BTreeMap::new(),
            buffer: Vec::new(),
            left,
            missed: 0,
            full: false,
        };
        // Byte order, version 1.0, a section of unknown length.
        let mut body = 0x1a2b_3c4d_u32.to_le_bytes().to_vec();
        body.extend_from_slice(&[1, 0, 0, 0]);
        body.extend_from_slice(&u64::MAX.to_le_bytes());
        capture.block(SECTION, &body, true);
        capture
    }

    /// Whether it has ended: its time is over, or its file full.
    #[must_use]
    pub fn is_over(&self, now: Instant) -> bool {
        self.full || now >= self.until
    }

    /// When its time is over.
    #[must_use]
    pub const fn until(&self) -> Instant {
        self.until
    }

    /// What is to be written now. The buffer is empty again.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.buffer)
    }

    /// Frames that were not kept because nobody wrote fast enough.
    #[must_use]
    pub const fn missed(&self) -> u64 {
        self.missed
    }

    /// Ends it: the last block tells how many frames were missed.
    pub fn finish(&mut self) -> Vec<u8> {
        if let Some(interface) = self.interfaces.values().next().copied() {
            let mut body = interface.to_le_bytes().to_vec();
            body.extend_from_slice(&[0; 8]);
            option(&mut body, 5, &self.missed.to_le_bytes());
            option(&mut body, 0, &[]);
            self.block(STATISTICS, &body, true);
        }
        self.take()
    }

    /// Keeps a frame, given in parts, if it belongs here.
    pub fn keep(
        &mut self,
        port: PortId,
        name: &str,
        direction: Direction,
        parts: &[&[u8]],
        now: Instant,
    ) {
        if self.is_over(now) || self.settings.port.is_some_and(|own| own != port) {
            return;
        }
        let interface = match self.interfaces.get(&port) {
            Some(interface) => *interface,
            None => {
                let number = u32::try_from(self.interfaces.len()).unwrap_or(u32::MAX);
                if !self.interface(name) {
                    self.missed += 1;
                    return;
                }
                self.interfaces.insert(port, number);
                number
            }
        };
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let snap = usize::try_from(self.settings.snap_bytes).unwrap_or(usize::MAX);
        let kept = len.min(snap);
        let time = self.wall + now.saturating_duration_since(self.started);
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let (high, low) = (micros >> 32, micros & 0xffff_ffff);
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut body = Vec::with_capacity(kept + 48);
        let (high, low) = (
            u32::try_from(high).unwrap_or(0),
            u32::try_from(low).unwrap_or(0),
        );
        for word in [interface, high, low, number(kept), number(len)] {
            body.extend_from_slice(&word.to_le_bytes());
        }
        let start = body.len();
        for part in parts {
            let room = kept - (body.len() - start);
            body.extend_from_slice(part.get(..part.len().min(room)).unwrap_or_default());
        }
        pad(&mut body);
        let flags: u32 = match direction {
            Direction::In => 1,
            Direction::Out => 2,
        };
        option(&mut body, 2, &flags.to_le_bytes());
        option(&mut body, 0, &[]);
        if !self.block(PACKET, &body, false) {
            self.missed += 1;
        }
    }

    fn interface(&mut self, name: &str) -> bool {
        let [t0, t1] = ETHERNET.to_le_bytes();
        let mut body = vec![t0, t1, 0, 0];
        body.extend_from_slice(&self.settings.snap_bytes.to_le_bytes());
        option(&mut body, 2, name.as_bytes());
        option(&mut body, 0, &[]);
        self.block(INTERFACE, &body, false)
    }

    /// Appends a block. Returns whether there was room.
    fn block(&mut self, kind: u32, body: &[u8], must: bool) -> bool {
        let bytes = body.len() + 12;
        if u64::try_from(bytes).map_or(true, |bytes| bytes > self.left) {
            self.full = true;
            return false;
        }
        if !must && self.buffer.len() + bytes > BUFFER_BYTES_MAX {
            return false;
        }
        self.left -= bytes as u64;
        let len = u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes();
        self.buffer.extend_from_slice(&kind.to_le_bytes());
        self.buffer.extend_from_slice(&len);
        self.buffer.extend_from_slice(body);
        self.buffer.extend_from_slice(&len);
        true
    }
}

fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = value.get(..value.len().min(255)).unwrap_or_default();
    body.extend_from_slice(&code.to_le_bytes());
    let len = u16::try_from(value.len()).unwrap_or(0);
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(value);
    pad(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> CaptureSettings {
        CaptureSettings {
            port: None,
            snap_bytes: 64,
            file_bytes: 1 << 20,
            within: Duration::from_secs(10),
        }
    }

    /// Kind and body of each block of a file, each checked for its two lengths.
    fn blocks(mut file: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let word =
            |at: usize, file: &[u8]| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
        let mut blocks = Vec::new();
        while !file.is_empty() {
            let len = usize::try_from(word(4, file)).unwrap();
            assert!(len % 4 == 0 && word(len - 4, file) == word(4, file));
            blocks.push((word(0, file), file[8..len - 4].to_vec()));
            file = &file[len..];
        }
        blocks
    }

    #[test]
    fn file_has_a_section_the_ports_and_their_frames() {
        let now = Instant::now();
        let mut capture = Capture::new(settings(), now, Duration::from_secs(1_700_000_000));
        capture.keep(3, "web", Direction::In, &[&[1; 12], &[2; 50]], now);
        let later = now + Duration::from_millis(1500);
        capture.keep(3, "web", Direction::Out, &[&[3; 100]], later);
        capture.keep(4, "db", Direction::In, &[&[4; 5]], later);
        let mut file = capture.take();
        file.extend(capture.finish());
        let blocks = blocks(&file);
        let kinds: Vec<u32> = blocks.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(
            kinds,
            [
                SECTION, INTERFACE, PACKET, PACKET, INTERFACE, PACKET, STATISTICS
            ]
        );
        assert!(blocks[1].1.windows(3).any(|part| part == b"web"));
        let first = &blocks[2].1;
        assert_eq!(first[12..20], [62, 0, 0, 0, 62, 0, 0, 0]);
        assert_eq!(
            (&first[20..32], &first[32..82]),
            (&[1; 12][..], &[2; 50][..])
        );
        let second = &blocks[3].1;
        assert_eq!(second[12..20], [64, 0, 0, 0, 100, 0, 0, 0], "cut");
        let micros = |body: &[u8]| {
            let word =
                |at: usize| u64::from(u32::from_le_bytes(body[at..at + 4].try_into().unwrap()));
            word(4) << 32 | word(8)
        };
        assert_eq!(micros(first), 1_700_000_000_000_000);
        assert_eq!(micros(second), 1_700_000_001_500_000);
    }

    #[test]
    fn one_port_alone_is_captured_when_that_is_asked() {
        let now = Instant::now();
        let one = CaptureSettings {
            port: Some(4),
            ..settings()
        };
        let mut capture = Capture::new(one, now, Duration::ZERO);
        let empty = capture.take();
        capture.keep(3, "web", Direction::In, &[&[1; 60]], now);
        assert_eq!((empty.len(), capture.take().len()), (28, 0));
        capture.keep(4, "db", Direction::In, &[&[1; 60]], now);
        assert_eq!(blocks(&capture.take()).len(), 2);
    }

    #[test]
    fn time_file_and_buffer_have_an_end() {
        let now = Instant::now();
        let mut capture = Capture::new(settings(), now, Duration::ZERO);
        for _ in 0..5000 {
            capture.keep(3, "web", Direction::In, &[&[1; 60]], now);
        }
        assert!(capture.missed() > 0 && capture.take().len() <= BUFFER_BYTES_MAX);
        let mut bytes = 0;
        while !capture.is_over(now) {
            capture.keep(3, "web", Direction::In, &[&[1; 60]], now);
            bytes += capture.take().len();
        }
        assert!(bytes < 1 << 20, "the file is full");
        let mut capture = Capture::new(settings(), now, Duration::ZERO);
        let over = capture.until();
        assert!(!capture.is_over(now) && capture.is_over(over));
        let before = capture.take().len();
        capture.keep(3, "web", Direction::In, &[&[1; 60]], over);
        assert_eq!((before, capture.take().len()), (28, 0));
    }
}
