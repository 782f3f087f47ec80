//! The two ends of a console outside of the guest: the ring file for what it says, the ring in
//! memory for what is typed.

use crate::request::Output;
use bulkhead_ipc::input_ring::InputReader;
use bulkhead_runtime::transcript::Transcript;
use bulkhead_runtime::{Queues, Span};

/// Bytes that are copied at a time.
const COPY_BYTES: usize = 16 * 1024;

/// Output and input.
#[derive(Debug)]
pub(crate) struct Line {
    transcript: Transcript,
    input: InputReader,
    buffer: Box<[u8]>,
}

impl Line {
    /// Takes over the rings.
    pub(crate) fn new(transcript: Transcript, input: InputReader) -> Self {
        Self {
            transcript,
            input,
            buffer: vec![0; COPY_BYTES].into_boxed_slice(),
        }
    }

    /// Stores a piece of output.
    pub(crate) fn put(&mut self, output: &Output, queues: &Queues) {
        let mut position = output.position;
        for span in output.text {
            let mut at = 0;
            while at < span.len() {
                let n = queues.read(span.part(at, u32::MAX), &mut self.buffer);
                self.transcript
                    .put(position, self.buffer.get(..n).unwrap_or_default());
                position = position.wrapping_add(n as u64);
                at += u32::try_from(n).unwrap_or(u32::MAX);
            }
        }
    }

    /// Copies what was typed into a buffer of the guest. Returns how many bytes; they are taken
    /// with [`Line::take`] once the buffer is completed.
    pub(crate) fn type_into(&mut self, span: Span, queues: &Queues) -> usize {
        let room = self.buffer.len().min(span.len() as usize);
        let Some(buffer) = self.buffer.get_mut(..room) else {
            return 0;
        };
        let n = self.input.peek(buffer);
        queues.write(span, buffer.get(..n).unwrap_or_default())
    }

    /// Takes bytes that are in the guest's hands.
    pub(crate) fn take(&mut self, n: usize) {
        self.input.take(n);
    }
}
