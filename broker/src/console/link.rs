//! The console's side of an attachment: the rings of a machine that this program runs, or a daemon's
//! connection.

use crate::api::frame::{Frame, Reader};
use crate::vm::session::ConsoleEnds;
use bulkhead_ipc::output_ring::Got;
use nix::errno::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes that are read from a daemon at a time.
const READ_BYTES: usize = 32 << 10;

/// What an attachment reads from and types into. Nothing here blocks.
pub trait Link: Send {
    /// Readable when there may be output.
    fn bell(&self) -> BorrowedFd<'_>;

    /// Takes the bell, before reading: output that comes later rings again.
    fn take_bell(&mut self);

    /// Reads output; nothing when there is none now.
    ///
    /// # Errors
    /// When it cannot be read any more.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Got>;

    /// Types the first bytes and returns how many were taken. After 0 the same bytes come again.
    fn write(&mut self, bytes: &[u8]) -> usize;

    /// The terminal has this size.
    fn resize(&mut self, _columns: u16, _rows: u16) {}

    /// Sends what could not be sent before. Returns whether there is still something.
    fn flush(&mut self) -> bool {
        false
    }

    /// Whether no more output will come.
    fn is_over(&self) -> bool {
        false
    }
}

impl Link for ConsoleEnds {
    fn bell(&self) -> BorrowedFd<'_> {
        self.output_bell.as_fd()
    }

    fn take_bell(&mut self) {
        self.output_bell.take();
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Got> {
        self.output.read(buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> usize {
        let taken = self.input.write(bytes);
        if taken > 0 {
            self.input_bell.ring();
        }
        taken
    }
}

/// A connection to a daemon that speaks [`crate::api::frame`].
#[derive(Debug)]
pub struct Remote {
    socket: OwnedFd,
    frames: Reader,
    arrived: VecDeque<u8>,
    lost: u64,
    unsent: Vec<u8>,
    /// Typed bytes that are among the unsent ones.
    promised: usize,
    over: bool,
}

impl Remote {
    /// Over a socket that does not block.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            frames: Reader::default(),
            arrived: VecDeque::new(),
            lost: 0,
            unsent: Vec::new(),
            promised: 0,
            over: false,
        }
    }

    fn receive(&mut self) {
        let mut buffer = vec![0; READ_BYTES];
        match nix::unistd::read(&self.socket, &mut buffer) {
            Ok(0) => self.over = true,
            Ok(n) => self.frames.add(buffer.get(..n).unwrap_or(&[])),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => self.over = true,
        }
        loop {
            match self.frames.take() {
                Ok(Some(Frame::Bytes(bytes))) => self.arrived.extend(bytes),
                Ok(Some(Frame::Lost(bytes))) => self.lost = self.lost.saturating_add(bytes),
                Ok(None) => return,
                // A daemon that talks nonsense has nothing more to say.
                Ok(Some(Frame::Ended | Frame::Size { .. })) | Err(_) => {
                    self.over = true;
                    return;
                }
            }
        }
    }
}

impl Link for Remote {
    fn bell(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn take_bell(&mut self) {}

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Got> {
        if self.arrived.is_empty() && !self.over {
            self.receive();
        }
        let bytes = io::Read::read(&mut self.arrived, buffer)?;
        let lost = if bytes > 0 {
            std::mem::take(&mut self.lost)
        } else {
            0
        };
        Ok(Got { bytes, lost })
    }

    fn write(&mut self, bytes: &[u8]) -> usize {
        if self.over {
            return bytes.len();
        }
        if self.promised == 0 {
            Frame::Bytes(bytes.to_vec()).write(&mut self.unsent);
            self.promised = bytes.len();
        }
        match self.flush() {
            true => 0,
            false => std::mem::take(&mut self.promised),
        }
    }

    fn resize(&mut self, columns: u16, rows: u16) {
        Frame::Size { columns, rows }.write(&mut self.unsent);
        self.flush();
    }

    fn flush(&mut self) -> bool {
        while !self.unsent.is_empty() && !self.over {
            match nix::unistd::write(&self.socket, &self.unsent) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return true,
                Err(_) => self.over = true,
            }
        }
        false
    }

    fn is_over(&self) -> bool {
        self.over && self.arrived.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Remote, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        (Remote::new(near.into()), far)
    }

    fn frames(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            frame.write(&mut bytes);
        }
        bytes
    }

    #[test]
    fn output_and_losses_arrive_and_the_end_comes_last() {
        let (mut remote, mut far) = pair();
        let said = [
            Frame::Lost(7),
            Frame::Bytes(b"hello".to_vec()),
            Frame::Ended,
        ];
        far.write_all(&frames(&said)).unwrap();
        let mut buffer = [0; 3];
        let first = remote.read(&mut buffer).unwrap();
        assert_eq!((first.bytes, first.lost), (3, 7));
        assert!(!remote.is_over());
        assert_eq!(remote.read(&mut buffer).unwrap(), Got { bytes: 2, lost: 0 });
        assert!(remote.is_over());
    }

    #[test]
    fn typed_bytes_are_sent_once_even_if_the_daemon_is_slow() {
        let (mut remote, mut far) = pair();
        let typed: Vec<u8> = (0..4096u32)
            .map(|n| u8::try_from(n % 251).unwrap())
            .collect();
        let mut sent = 0;
        while remote.write(&typed) > 0 {
            sent += 1;
        }
        assert_eq!(remote.write(&typed), 0, "the same bytes come again");
        let mut reader = Reader::default();
        let (mut buffer, mut got) = (vec![0; 1 << 16], Vec::new());
        far.set_nonblocking(true).unwrap();
        loop {
            if remote.promised > 0 && remote.write(&typed) > 0 {
                sent += 1;
            }
            let Ok(n @ 1..) = far.read(&mut buffer) else {
                break;
            };
            reader.add(&buffer[..n]);
            while let Some(Frame::Bytes(bytes)) = reader.take().unwrap() {
                got.extend(bytes);
            }
        }
        assert_eq!(got.len(), sent * typed.len());
        assert!(got.chunks(typed.len()).all(|chunk| chunk == typed));
    }

    #[test]
    fn daemon_that_goes_away_or_talks_nonsense_is_the_end() {
        let (mut remote, far) = pair();
        drop(far);
        remote.read(&mut [0; 8]).unwrap();
        assert!(remote.is_over());
        assert_eq!(remote.write(b"x"), 1, "nobody is waited for");
        let (mut remote, mut far) = pair();
        far.write_all(&[99, 0, 0]).unwrap();
        remote.read(&mut [0; 8]).unwrap();
        assert!(remote.is_over());
    }
}
