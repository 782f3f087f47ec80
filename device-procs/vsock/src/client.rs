//! The host's side of a connection: a Unix socket that never blocks.

use crate::link::Stream;
use bulkhead_ipc::adoption::close;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// The socket; `None` only while it is dropped.
#[derive(Debug)]
pub(crate) struct Client(Option<UnixStream>);

impl From<OwnedFd> for Client {
    fn from(fd: OwnedFd) -> Self {
        Self(Some(fd.into()))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // By the one call that a locked process may make.
        self.0.take().into_iter().for_each(close);
    }
}

impl Client {
    /// What can be watched for news.
    pub(crate) const fn socket(&self) -> Option<&UnixStream> {
        self.0.as_ref()
    }

    fn stream(&mut self) -> io::Result<&mut UnixStream> {
        self.0
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Stream for Client {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        Read::read(self.stream()?, to)
    }

    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        Write::write(self.stream()?, from)
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        self.stream()?.shutdown(how)
    }
}
