//! Frames of the connection between host and guest agent ([`crate::protocol::agent`]): four bytes of length,
//! little endian, and a postcard-encoded message. No I/O: bytes go in as they come.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::protocol::agent::FRAME_BYTES_MAX;
use serde::Serialize;
use serde::de::DeserializeOwned;

const LENGTH_BYTES: usize = 4;

/// Bytes that are no frame, or a message that makes none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It is longer than a frame may be.
    #[error("a frame of {0} bytes, at most {FRAME_BYTES_MAX} are allowed")]
    TooLong(usize),
    /// It is no message of the expected type.
    #[error("a malformed message: {0}")]
    Malformed(postcard::Error),
    /// There are bytes behind the message.
    #[error("a message with {0} bytes behind it")]
    Trailing(usize),
}

/// Appends a frame to `out`.
///
/// # Errors
/// When the message is too long; nothing is appended then.
pub fn put<T: Serialize>(message: &T, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let bytes = postcard::to_stdvec(message).map_err(FrameError::Malformed)?;
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    if bytes.len() > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong(bytes.len()));
    }
    out.extend(length.to_le_bytes());
    out.extend(bytes);
    Ok(())
}

/// Takes messages out of bytes that arrive in pieces. Holds less than a frame and what was added last.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    /// Where the next frame begins.
    from: usize,
}

impl Frames {
    /// Adds what has arrived. Take every message before adding more.
    pub fn add(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.from);
        self.from = 0;
        self.bytes.extend(bytes);
    }

    /// Bytes that are held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len().saturating_sub(self.from)
    }

    /// Whether nothing is held: a peer that leaves now has not left in the middle of a message.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next whole message. Do not go on after an error.
    ///
    /// # Errors
    /// What the peer sent instead of one.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let rest = self.bytes.get(self.from..).unwrap_or_default();
        let Some((length, behind)) = rest.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if length > FRAME_BYTES_MAX {
            return Err(FrameError::TooLong(length));
        }
        let Some(frame) = behind.get(..length) else {
            return Ok(None);
        };
        let (message, left) = postcard::take_from_bytes(frame).map_err(FrameError::Malformed)?;
        if !left.is_empty() {
            return Err(FrameError::Trailing(left.len()));
        }
        self.from += LENGTH_BYTES + length;
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::agent::{
        Ask, DATA_BYTES_MAX, Entry, Exec, Exit, Failure, FailureKind, FromAgent, NAME_BYTES_MAX,
        Output, Terminal, ToAgent,
    };
    use proptest::prelude::*;

    fn entries() -> impl Strategy<Value = Entry> {
        let name = || proptest::collection::vec(any::<u8>(), 0..NAME_BYTES_MAX);
        prop_oneof![
            (name(), any::<u32>()).prop_map(|(name, mode)| Entry::Folder { name, mode }),
            Just(Entry::Leave),
            (name(), any::<u32>(), any::<Option<u64>>())
                .prop_map(|(name, mode, bytes)| Entry::File { name, mode, bytes }),
            proptest::collection::vec(any::<u8>(), 0..DATA_BYTES_MAX).prop_map(Entry::Data),
            Just(Entry::FileEnd),
        ]
    }

    fn to_agent() -> impl Strategy<Value = ToAgent> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
        let exec = (
            proptest::collection::vec(bytes(), 0..5),
            proptest::collection::vec((bytes(), bytes()), 0..5),
            proptest::option::of(bytes()),
            any::<Option<String>>(),
            any::<Option<(String, u16, u16)>>(),
        )
            .prop_map(|(argv, env, cwd, user, terminal)| Exec {
                argv,
                env,
                cwd,
                user,
                terminal: terminal.map(|(kind, columns, rows)| Terminal {
                    kind,
                    columns,
                    rows,
                }),
                stdin: true,
            });
        prop_oneof![
            exec.prop_map(|exec| ToAgent::Ask(Ask::Exec(exec))),
            (bytes(), bytes()).prop_map(|(path, name)| ToAgent::Ask(Ask::Put { path, name })),
            bytes().prop_map(ToAgent::Stdin),
            any::<u32>().prop_map(|bytes| ToAgent::Room {
                stream: Output::Stderr,
                bytes
            }),
            entries().prop_map(ToAgent::Entry),
        ]
    }

    fn from_agent() -> impl Strategy<Value = FromAgent> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..DATA_BYTES_MAX);
        prop_oneof![
            bytes().prop_map(|bytes| FromAgent::Output {
                stream: Output::Stdout,
                bytes
            }),
            any::<u8>().prop_map(|status| FromAgent::Exited(Exit::Status(status))),
            entries().prop_map(FromAgent::Entry),
            any::<String>()
                .prop_map(|text| FromAgent::Failed(Failure::new(FailureKind::Other, text))),
        ]
    }

    /// Cuts `bytes` where `cuts` say and takes everything that is whole after each piece.
    fn reassembled<T: DeserializeOwned>(bytes: &[u8], cuts: &[usize]) -> Vec<T> {
        let (mut frames, mut taken, mut rest) = (Frames::default(), Vec::new(), bytes);
        for cut in cuts.iter().chain([&usize::MAX]) {
            let (piece, left) = rest.split_at((*cut).min(rest.len()));
            rest = left;
            frames.add(piece);
            while let Some(message) = frames.take().unwrap() {
                taken.push(message);
            }
        }
        assert!(frames.is_empty());
        taken
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_asked_arrives_however_it_is_cut(
            messages in proptest::collection::vec(to_agent(), 0..8),
            cuts in proptest::collection::vec(0..2000usize, 0..40),
        ) {
            let mut bytes = Vec::new();
            for message in &messages {
                put(message, &mut bytes).unwrap();
            }
            prop_assert_eq!(reassembled::<ToAgent>(&bytes, &cuts), messages);
        }

        #[test]
        fn what_is_answered_arrives_however_it_is_cut(
            messages in proptest::collection::vec(from_agent(), 0..8),
            cuts in proptest::collection::vec(0..40_000usize, 0..40),
        ) {
            let mut bytes = Vec::new();
            for message in &messages {
                put(message, &mut bytes).unwrap();
            }
            prop_assert_eq!(reassembled::<FromAgent>(&bytes, &cuts), messages);
        }

        #[test]
        fn anything_is_a_message_or_an_error(bytes in any::<Vec<u8>>()) {
            let mut frames = Frames::default();
            frames.add(&bytes);
            while let Ok(Some(message)) = frames.take::<FromAgent>() {
                let mut again = Vec::new();
                put(&message, &mut again).unwrap();
            }
            prop_assert!(frames.len() <= bytes.len());
        }
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_arrives() {
        let mut frames = Frames::default();
        let long = FRAME_BYTES_MAX + 1;
        frames.add(&u32::try_from(long).unwrap().to_le_bytes());
        assert_eq!(frames.take::<FromAgent>(), Err(FrameError::TooLong(long)));
        let message = ToAgent::Stdin(vec![0; FRAME_BYTES_MAX]);
        let mut out = Vec::new();
        assert!(matches!(
            put(&message, &mut out),
            Err(FrameError::TooLong(_))
        ));
        assert!(out.is_empty());
    }

    #[test]
    fn bytes_behind_a_message_are_refused() {
        let mut frames = Frames::default();
        let mut frame = Vec::new();
        put(&FromAgent::Done, &mut frame).unwrap();
        frame[0] += 1;
        frame.push(0);
        frames.add(&frame);
        assert_eq!(frames.take::<FromAgent>(), Err(FrameError::Trailing(1)));
    }

    #[test]
    fn the_largest_data_fits_a_frame() {
        let mut out = Vec::new();
        let largest = FromAgent::Entry(Entry::Data(vec![0xff; DATA_BYTES_MAX]));
        put(&largest, &mut out).unwrap();
        let name = vec![0xff; NAME_BYTES_MAX];
        let bytes = Some(u64::MAX);
        let mode = u32::MAX;
        put(&ToAgent::Entry(Entry::File { name, mode, bytes }), &mut out).unwrap();
    }
}
