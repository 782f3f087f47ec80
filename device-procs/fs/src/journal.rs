//! What the guest knows of the folder, in memory that outlives this process: nodes, handles, and which
//! request is being done.
//!
//! ```text
//!   0x00  magic          0x08  which half, and how many bytes of it count (one word)
//!   0x40  half 0: records, oldest first          half 1
//! ```
//!
//! Records are written behind those that count and count all at once, when the request is done: one store
//! decides, so a process that dies at any moment has done a request's records all or not at all. When a
//! half has grown too long, what is true now is written to the other one, and the same store turns over.
//!
//! Requests have numbers, which stay theirs when they are done again. A change that must not be done twice
//! is announced (*begun*) before it is made, with what its names meant then; what is done is kept with its
//! answer. So a successor that is given the request again knows that it was not begun, or that it was
//! done and with what answer, or has to look, for one request at most: there is one at a time.
//!
//! What is read here was written by another process, which may have been taken over by its guest: every
//! record is checked, and if one is not sound, nothing is known.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::nodes::{Identity, NUMBERS_END, Nodes};
use bulkhead_runtime::Kept;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

const MAGIC: u64 = 0x0001_5346_4842_0001;
const OFFSET_MAGIC: usize = 0;
const OFFSET_COUNTS: usize = 8;
const HALVES: usize = 64;
/// The half that counts is the second one.
const SECOND: u64 = 1 << 63;
/// Length and kind, then the words.
const HEAD_BYTES: usize = 8 + 8 * WORDS;
const WORDS: usize = 5;
/// Bytes that follow the words: an answer with a whole directory is the longest.
const BYTES_MAX: usize = (1 << 20) + 4096;
/// Records of this many bytes are worth more than writing everything anew.
const GROWTH_MIN: usize = 1 << 20;

/// Kinds of record.
mod tag {
    pub(super) const SESSION: u32 = 1;
    pub(super) const TOLD: u32 = 2;
    pub(super) const MOVED: u32 = 3;
    pub(super) const REMOVED: u32 = 4;
    pub(super) const FORGOT: u32 = 5;
    pub(super) const OPENED: u32 = 6;
    pub(super) const RELEASED: u32 = 7;
    pub(super) const BEGUN: u32 = 8;
    pub(super) const DONE: u32 = 9;
    pub(super) const NODE: u32 = 10;
    pub(super) const NEXT: u32 = 11;
}

/// An open file or directory, as far as it can be opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) handle: u64,
    pub(crate) node: u64,
    /// Those of the guest.
    pub(crate) flags: u32,
    pub(crate) directory: bool,
}

/// A change that was announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Begun {
    pub(crate) number: u64,
    /// What its name meant before, and its other name; for data that is appended, where it ended.
    pub(crate) before: [Option<Identity>; 2],
}

/// What a predecessor has left.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) ready: bool,
    pub(crate) nodes: Nodes,
    pub(crate) handles: Vec<Opened>,
    pub(crate) next_handle: u64,
    /// The change in the middle of which it died.
    pub(crate) begun: Option<Begun>,
    /// The last request that it has done, and the answer.
    pub(crate) done: Option<(u64, Vec<u8>)>,
}

/// The journal.
#[derive(Debug)]
pub(crate) struct Journal {
    kept: Option<Kept>,
    /// Bytes of a half.
    half: usize,
    second: bool,
    /// Bytes that count.
    counts: usize,
    /// Bytes that are written.
    written: usize,
    /// Bytes that counted when everything was written anew.
    base: usize,
    /// A record found no room: nothing counts until everything is written anew.
    full: bool,
    /// The request that is being done changes something.
    changes: bool,
}

impl Journal {
    /// One in `kept`; without it nothing is remembered.
    pub(crate) fn new(kept: Option<Kept>) -> Self {
        let kept = kept.filter(|kept| kept.len() > HALVES);
        let half = kept.as_ref().map_or(0, |kept| (kept.len() - HALVES) / 2);
        Self {
            kept,
            half: half & !7,
            second: false,
            counts: 0,
            written: 0,
            base: 0,
            full: false,
            changes: false,
        }
    }

    fn start_of(&self, second: bool) -> usize {
        HALVES + if second { self.half } else { 0 }
    }

    /// Begins with nothing.
    pub(crate) fn clear(&mut self) {
        (self.second, self.counts, self.written, self.base) = (false, 0, 0, 0);
        self.full = false;
        if let Some(kept) = &self.kept {
            kept.store(OFFSET_COUNTS, 0);
            kept.store(OFFSET_MAGIC, MAGIC);
        }
    }

    fn note(&mut self, tag: u32, words: [u64; WORDS], bytes: &[u8]) {
        let Some(kept) = &self.kept else {
            return;
        };
        let len = (HEAD_BYTES + bytes.len()).next_multiple_of(8);
        let fits = self.written + len <= self.half && bytes.len() <= BYTES_MAX;
        let (Ok(len_word), true) = (u32::try_from(len), fits && !self.full) else {
            self.full = true;
            return;
        };
        let at = self.start_of(self.second) + self.written;
        let mut head = [0u8; HEAD_BYTES];
        let first = u64::from(len_word) << 32 | u64::from(tag);
        let all = std::iter::once(&first).chain(&words);
        for (place, word) in head.chunks_exact_mut(8).zip(all) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        if kept.write(at, &head) && kept.write(at + HEAD_BYTES, bytes) {
            self.written += len;
        } else {
            self.full = true;
        }
    }

    /// Whether the end of the request is to be noted: there are records that do not count yet, or it changes
    /// something.
    pub(crate) const fn has_news(&self) -> bool {
        self.written > self.counts || self.changes
    }

    /// The end of the request that is being done is to be noted.
    pub(crate) const fn changes(&mut self) {
        self.changes = self.kept.is_some();
    }

    /// Everything that is written counts from now on.
    pub(crate) fn publish(&mut self) {
        let Some(kept) = &self.kept else {
            return;
        };
        if self.full {
            // A successor must not believe in a part of what happened.
            kept.store(OFFSET_MAGIC, 0);
            return;
        }
        self.counts = self.written;
        let half = if self.second { SECOND } else { 0 };
        kept.store(OFFSET_COUNTS, half | self.counts as u64);
    }

    /// Whether so much was written that everything should be written anew before the next request.
    pub(crate) const fn is_long(&self) -> bool {
        let room = self.half.saturating_sub(self.counts);
        self.kept.is_some()
            && (self.full
                || room < 2 * (BYTES_MAX + HEAD_BYTES)
                || self.counts > 2 * self.base + GROWTH_MIN)
    }

    /// Writes everything anew. Between two requests: what the last one did has been told.
    pub(crate) fn renew(
        &mut self,
        ready: bool,
        nodes: &Nodes,
        handles: impl Iterator<Item = Opened>,
        next_handle: u64,
    ) {
        (self.second, self.written, self.full) = (!self.second, 0, false);
        self.session(ready);
        nodes.each(|node| {
            let known = u64::from(node.known);
            let words = [
                node.id,
                node.parent,
                node.identity.dev,
                node.identity.ino,
                node.lookups << 1 | known,
            ];
            self.note_named(tag::NODE, words, node.name);
        });
        self.note(tag::NEXT, [nodes.next(), next_handle, 0, 0, 0], &[]);
        for opened in handles {
            self.opened(&opened);
        }
        self.publish();
        if !self.full {
            self.base = self.counts;
            if let Some(kept) = &self.kept {
                kept.store(OFFSET_MAGIC, MAGIC);
            }
        }
    }

    /// Names are short, so the length has room beside the padding.
    fn note_named(&mut self, tag: u32, words: [u64; WORDS], name: &OsStr) {
        let mut bytes = Vec::with_capacity(name.len() + 1);
        bytes.push(u8::try_from(name.len()).unwrap_or(0));
        bytes.extend_from_slice(name.as_bytes());
        self.note(tag, words, &bytes);
    }

    pub(crate) fn session(&mut self, ready: bool) {
        self.note(tag::SESSION, [ready.into(), 0, 0, 0, 0], &[]);
    }

    pub(crate) fn told(&mut self, parent: u64, name: &OsStr, of: Identity) {
        self.note_named(tag::TOLD, [parent, of.dev, of.ino, 0, 0], name);
    }

    pub(crate) fn moved(&mut self, of: Identity, parent: u64, name: &OsStr) {
        self.note_named(tag::MOVED, [parent, of.dev, of.ino, 0, 0], name);
    }

    pub(crate) fn removed(&mut self, parent: u64, name: &OsStr, of: Identity) {
        self.note_named(tag::REMOVED, [parent, of.dev, of.ino, 0, 0], name);
    }

    pub(crate) fn forgot(&mut self, node: u64, count: u64) {
        self.note(tag::FORGOT, [node, count, 0, 0, 0], &[]);
    }

    pub(crate) fn opened(&mut self, opened: &Opened) {
        let flags = u64::from(opened.flags);
        let directory = u64::from(opened.directory);
        let words = [opened.handle, opened.node, flags, directory, 0];
        self.note(tag::OPENED, words, &[]);
    }

    pub(crate) fn released(&mut self, handle: u64) {
        self.note(tag::RELEASED, [handle, 0, 0, 0, 0], &[]);
    }

    /// Announces a change. Counts at once.
    pub(crate) fn begin(&mut self, number: u64, before: [Option<Identity>; 2]) {
        // No file has inode number 0, and what is not there neither.
        let [first, second] = before.map(|of| of.unwrap_or(Identity { dev: 0, ino: 0 }));
        let words = [number, first.dev, first.ino, second.dev, second.ino];
        self.note(tag::BEGUN, words, &[]);
        self.publish();
    }

    /// The request is done. Counts at once, with everything that was noted since the last one.
    pub(crate) fn done(&mut self, number: u64, answer: &[u8]) {
        self.changes = false;
        let len = answer.len() as u64;
        self.note(tag::DONE, [number, len, 0, 0, 0], answer);
        self.publish();
    }

    /// What a predecessor has left: nothing if there was none, or if it is not sound.
    pub(crate) fn recall(&mut self, root: Identity) -> Option<Left> {
        let kept = self.kept.as_ref()?;
        if kept.load(OFFSET_MAGIC) != MAGIC {
            return None;
        }
        let word = kept.load(OFFSET_COUNTS);
        let second = word & SECOND != 0;
        let counts = usize::try_from(word & !SECOND).ok()?;
        if counts > self.half || !counts.is_multiple_of(8) {
            tracing::warn!(counts, "what was left is not sound");
            return None;
        }
        let left = Reader {
            kept,
            at: self.start_of(second),
            end: self.start_of(second) + counts,
        }
        .all(root);
        if left.is_none() {
            tracing::warn!("what was left is not sound: open files are lost");
            return None;
        }
        (self.second, self.counts, self.written) = (second, counts, counts);
        self.base = counts / 2;
        left
    }
}

/// The records of a predecessor.
struct Reader<'a> {
    kept: &'a Kept,
    at: usize,
    end: usize,
}

struct Record {
    tag: u32,
    words: [u64; WORDS],
    bytes: Vec<u8>,
}

impl Record {
    fn name(&self) -> Option<&OsStr> {
        let (&len, rest) = self.bytes.split_first()?;
        let name = rest.get(..usize::from(len))?;
        crate::folder::name(name).ok()
    }
}

impl Reader<'_> {
    fn next(&mut self) -> Option<Record> {
        let mut head = [0u8; HEAD_BYTES];
        if self.end - self.at < HEAD_BYTES || !self.kept.read(self.at, &mut head) {
            return None;
        }
        let mut fields = head.chunks_exact(8).filter_map(|eight| {
            let eight: [u8; 8] = eight.try_into().ok()?;
            Some(u64::from_le_bytes(eight))
        });
        let first = fields.next()?;
        let tag = u32::try_from(first & 0xffff_ffff).ok()?;
        let len = usize::try_from(first >> 32).ok()?;
        let fits = (HEAD_BYTES..=self.end - self.at).contains(&len) && len.is_multiple_of(8);
        if !fits || len > HEAD_BYTES + BYTES_MAX + 8 {
            return None;
        }
        let mut words = [0; WORDS];
        for (place, word) in words.iter_mut().zip(fields) {
            *place = word;
        }
        let mut bytes = vec![0; len - HEAD_BYTES];
        if !self.kept.read(self.at + HEAD_BYTES, &mut bytes) {
            return None;
        }
        self.at += len;
        Some(Record { tag, words, bytes })
    }

    fn all(mut self, root: Identity) -> Option<Left> {
        let mut left = Left {
            ready: false,
            nodes: Nodes::new(root),
            handles: Vec::new(),
            next_handle: 1,
            begun: None,
            done: None,
        };
        while self.at < self.end {
            let record = self.next()?;
            apply(&mut left, &record, root)?;
        }
        Some(left)
    }
}

/// One record. None when it cannot be.
fn apply(left: &mut Left, record: &Record, root: Identity) -> Option<()> {
    let [a, b, c, d, e] = record.words;
    match record.tag {
        tag::SESSION => {
            left.ready = a == 1;
            left.nodes = Nodes::new(root);
            left.handles.clear();
        }
        tag::TOLD => {
            let of = Identity { dev: b, ino: c };
            left.nodes.identity(a).ok()?;
            left.nodes.told(a, record.name()?, of).ok()?;
        }
        tag::MOVED => {
            let of = Identity { dev: b, ino: c };
            left.nodes.identity(a).ok()?;
            left.nodes.moved(of, a, record.name()?);
        }
        tag::REMOVED => {
            let of = Identity { dev: b, ino: c };
            left.nodes.removed(a, record.name()?, of);
        }
        tag::FORGOT => left.nodes.forget(a, b),
        tag::OPENED => {
            let opened = Opened {
                handle: a,
                node: b,
                flags: u32::try_from(c).ok()?,
                directory: d == 1,
            };
            let twice = left.handles.iter().any(|known| known.handle == a);
            if twice || left.handles.len() >= crate::server::HANDLES_MAX || a >= NUMBERS_END {
                return None;
            }
            left.next_handle = left.next_handle.max(a + 1);
            left.handles.push(opened);
        }
        tag::RELEASED => left.handles.retain(|opened| opened.handle != a),
        tag::BEGUN => {
            let known = |dev, ino| (ino != 0).then_some(Identity { dev, ino });
            left.begun = Some(Begun {
                number: a,
                before: [known(b, c), known(d, e)],
            });
        }
        tag::DONE => {
            let answer = record.bytes.get(..usize::try_from(b).ok()?)?;
            left.done = Some((a, answer.to_vec()));
            left.begun = None;
        }
        tag::NODE => {
            let of = Identity { dev: c, ino: d };
            let known = e & 1 == 1;
            left.nodes
                .restore(a, b, record.name()?, of, e >> 1, known)?;
        }
        tag::NEXT => {
            left.nodes.restore_next(a)?;
            (b < NUMBERS_END).then_some(())?;
            left.next_handle = left.next_handle.max(b);
        }
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]
    use super::*;
    use crate::nodes::ROOT;
    use proptest::prelude::*;

    const BYTES: usize = 8 << 20;

    fn file(ino: u64) -> Identity {
        Identity { dev: 1, ino }
    }

    fn name(text: &str) -> &OsStr {
        OsStr::new(text)
    }

    #[test]
    fn what_is_noted_counts_only_when_the_request_is_done() {
        let kept = Kept::of_its_own(BYTES);
        let mut journal = Journal::new(Some(kept.clone()));
        assert!(journal.recall(file(1)).is_none(), "a fresh window");
        journal.clear();
        journal.session(true);
        journal.told(ROOT, name("a"), file(2));
        journal.done(7, b"answer");
        journal.told(ROOT, name("b"), file(3));
        let left = Journal::new(Some(kept.clone())).recall(file(1)).unwrap();
        assert!(left.ready);
        assert_eq!(left.nodes.len(), 1);
        assert_eq!(left.done, Some((7, b"answer".to_vec())));
        journal.begin(8, [Some(file(3)), None]);
        let left = Journal::new(Some(kept)).recall(file(1)).unwrap();
        assert_eq!(left.nodes.len(), 2);
        let before = [Some(file(3)), None];
        assert_eq!(left.begun, Some(Begun { number: 8, before }));
    }

    #[test]
    fn everything_written_anew_is_the_same() {
        let kept = Kept::of_its_own(BYTES);
        let mut journal = Journal::new(Some(kept.clone()));
        journal.clear();
        journal.session(true);
        let mut nodes = Nodes::new(file(1));
        let a = nodes.told(ROOT, name("a"), file(2)).unwrap();
        let b = nodes.told(a, name("b"), file(3)).unwrap();
        nodes.told(a, name("b"), file(3)).unwrap();
        nodes.removed(a, name("b"), file(3));
        let opened = Opened {
            handle: 9,
            node: b,
            flags: 2,
            directory: false,
        };
        journal.renew(true, &nodes, [opened].into_iter(), 12);
        let left = Journal::new(Some(kept)).recall(file(1)).unwrap();
        assert_eq!(left.nodes.path(b), nodes.path(b));
        assert_eq!(left.nodes.next(), nodes.next());
        assert_eq!((left.handles, left.next_handle), (vec![opened], 12));
        let mut again = left.nodes;
        again.forget(b, 1);
        assert!(again.identity(b).is_ok(), "told twice, forgotten once");
        again.forget(b, 1);
        assert!(again.identity(b).is_err());
        assert!(again.identity(a).is_ok(), "the guest still knows it");
    }

    proptest! {
        #[test]
        fn whatever_was_left_is_read_or_refused(
            noise in prop::collection::vec((64usize..4096, any::<u8>()), 0..60),
            counts in any::<u16>(),
            few in any::<bool>(),
        ) {
            let kept = Kept::of_its_own(BYTES);
            let mut journal = Journal::new(Some(kept.clone()));
            journal.clear();
            journal.session(true);
            for n in 2..40 {
                journal.told(ROOT, name(&n.to_string()), file(n));
                journal.done(n, b"0123456789");
            }
            if few {
                kept.store(OFFSET_COUNTS, u64::from(counts) * 8);
            }
            for (at, byte) in noise {
                let _ = kept.write(at, &[byte]);
            }
            if let Some(left) = Journal::new(Some(kept)).recall(file(1)) {
                // Every path ends.
                for id in 0..200 {
                    let _ = left.nodes.path(id);
                }
            }
        }
    }
}
