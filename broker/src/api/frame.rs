//! Frames of an attached console, after the HTTP upgrade.
//!
//! ```text
//! 0  kind, u8     1  length of what follows, u16 big endian     3  payload
//!
//! to the daemon:   0 keys (bytes)      1 size (columns, rows: u16 big endian each)
//! to the client:   0 output (bytes)    2 lost (u64 big endian: bytes that were overwritten unread)
//!                  3 ended (nothing: the machine is gone)
//! ```
//!
//! Both sides are bounded by the length field; a kind that is not known ends the connection.

/// Largest payload in bytes.
pub const PAYLOAD_BYTES_MAX: usize = 16 << 10;
/// Bytes before the payload.
const HEADER_BYTES: usize = 3;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Keys to the guest, or output of it.
    Bytes(Vec<u8>),
    /// The client's terminal has this size.
    Size {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// This many bytes of output were lost, because they were not read in time.
    Lost(u64),
    /// The machine has ended.
    Ended,
}

/// Bytes that are no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a frame of kind {kind} with {length} bytes")]
pub struct BadFrame {
    /// Its kind.
    pub kind: u8,
    /// Its length.
    pub length: usize,
}

impl Frame {
    /// Appends the frame to `out`. Bytes are split into frames of a legal size.
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Bytes(bytes) => {
                for chunk in bytes.chunks(PAYLOAD_BYTES_MAX) {
                    put(out, 0, chunk);
                }
            }
            Self::Size { columns, rows } => {
                let ([a, b], [c, d]) = (columns.to_be_bytes(), rows.to_be_bytes());
                put(out, 1, &[a, b, c, d]);
            }
            Self::Lost(bytes) => put(out, 2, &bytes.to_be_bytes()),
            Self::Ended => put(out, 3, &[]),
        }
    }
}

fn put(out: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    // The callers' payloads are at most PAYLOAD_BYTES_MAX, which fits.
    let length = u16::try_from(payload.len()).unwrap_or(u16::MAX);
    out.push(kind);
    out.extend(length.to_be_bytes());
    out.extend(payload);
}

/// Takes frames out of bytes that arrive in pieces. Holds less than two frames.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
}

impl Reader {
    /// Adds what has arrived. Take every frame before adding more.
    pub fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// The next whole frame.
    ///
    /// # Errors
    /// What a peer sent instead of one.
    pub fn take(&mut self) -> Result<Option<Frame>, BadFrame> {
        let Some((&[kind, high, low], rest)) = self.bytes.split_first_chunk::<HEADER_BYTES>()
        else {
            return Ok(None);
        };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length > PAYLOAD_BYTES_MAX {
            return Err(BadFrame { kind, length });
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = match (kind, payload) {
            (0, bytes) => Frame::Bytes(bytes.to_vec()),
            (1, &[a, b, c, d]) => Frame::Size {
                columns: u16::from_be_bytes([a, b]),
                rows: u16::from_be_bytes([c, d]),
            },
            (2, bytes) => match bytes.try_into() {
                Ok(bytes) => Frame::Lost(u64::from_be_bytes(bytes)),
                Err(_) => return Err(BadFrame { kind, length }),
            },
            (3, []) => Frame::Ended,
            _ => return Err(BadFrame { kind, length }),
        };
        self.bytes.drain(..HEADER_BYTES + length);
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 1..100).prop_map(Frame::Bytes),
            any::<(u16, u16)>().prop_map(|(columns, rows)| Frame::Size { columns, rows }),
            any::<u64>().prop_map(Frame::Lost),
            Just(Frame::Ended),
        ]
    }

    proptest! {
        #[test]
        fn frames_arrive_whole_however_they_are_cut(
            frames in prop::collection::vec(any_frame(), 0..10),
            cut in 1usize..20,
        ) {
            let mut bytes = Vec::new();
            for frame in &frames {
                frame.write(&mut bytes);
            }
            let (mut reader, mut got) = (Reader::default(), Vec::new());
            for piece in bytes.chunks(cut) {
                reader.add(piece);
                while let Some(frame) = reader.take().unwrap() {
                    got.push(frame);
                }
            }
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>) {
            let mut reader = Reader::default();
            reader.add(&bytes);
            while let Ok(Some(_)) = reader.take() {}
        }
    }

    #[test]
    fn long_output_is_cut_into_legal_frames() {
        let mut bytes = Vec::new();
        Frame::Bytes(vec![7; 40_000]).write(&mut bytes);
        let (mut reader, mut total) = (Reader::default(), 0);
        reader.add(&bytes);
        while let Some(Frame::Bytes(part)) = reader.take().unwrap() {
            assert!(part.len() <= PAYLOAD_BYTES_MAX);
            total += part.len();
        }
        assert_eq!(total, 40_000);
    }

    #[test]
    fn nonsense_is_refused() {
        for bytes in [
            &[9, 0, 0][..],
            &[1, 0, 1, 5],
            &[0, 0xff, 0xff],
            &[3, 0, 1, 0],
        ] {
            let mut reader = Reader::default();
            reader.add(bytes);
            assert!(reader.take().is_err(), "{bytes:?}");
        }
    }
}
