//! The device: a queue for what must not wait and one for requests, whose requests are FUSE's.
//!
//! Requests are done one after the other, each to its end, and answered at once: there is at most one that
//! was done and not answered when the process dies, and the journal knows of it.

use crate::{Access, Data, Ids, REQUEST_BYTES_MAX, Server, Terms, front_bytes};
use bulkhead_ipc::device_kind::{FUSE_ANSWER_BYTES, POSITION_BYTES, VirtioKind};
use bulkhead_ipc::protocol::birth::{DeviceOwn, FdRole};
use bulkhead_runtime::{Chain, Device, DeviceFault, Queues, Setup, Span, Stillbirth};
use nix::errno::Errno;
use nix::sys::stat::{Mode, umask};
use std::fs::File;

/// Requests after which the gate is told of their answers, so that one that takes long does not hold up those
/// before it.
const BATCH: u32 = 16;

/// A shared folder.
#[derive(Debug)]
pub(crate) struct FolderDevice {
    server: Server,
    /// Space for a request and its answer, without the data of reads and writes.
    request: Vec<u8>,
    answer: Vec<u8>,
    /// What the guest reads of it: its tag and how many queues it has.
    config: Vec<u8>,
    batch: u32,
}

/// The guest's id for the one that the process has, which all files have that it may own.
fn one_id(guest: u32, own: u32) -> Result<crate::IdMap, Stillbirth> {
    let map = format!("{guest}:{own}:1");
    map.parse().map_err(Stillbirth::setup)
}

/// Bytes of a FUSE request that say what it is.
const REQUEST_HEADER_BYTES: usize = 40;
/// Bytes of an answer before its data.
const ANSWER_HEADER_BYTES: usize = FUSE_ANSWER_BYTES as usize;

fn bytes_of(spans: &[Span]) -> usize {
    spans.iter().map(|span| span.len() as usize).sum()
}

/// The spans without their first `bytes` bytes.
fn behind(spans: &[Span], bytes: usize) -> impl Iterator<Item = Span> {
    let mut skipped = u32::try_from(bytes).unwrap_or(u32::MAX);
    spans.iter().filter_map(move |span| {
        let rest = span.part(skipped, u32::MAX);
        skipped = skipped.saturating_sub(span.len());
        (!rest.is_empty()).then_some(rest)
    })
}

/// Reads on where `to` ends, until it has `bytes` bytes or all that there are.
fn append(to: &mut Vec<u8>, queues: &Queues, spans: &[Span], bytes: usize) {
    for span in behind(spans, to.len()) {
        let start = to.len();
        let len = (span.len() as usize).min(bytes.saturating_sub(start));
        to.resize(start + len, 0);
        queues.read(span, to.get_mut(start..).unwrap_or_default());
    }
}

/// Data of a request where they are in the window.
struct InWindow<'a> {
    queues: &'a Queues,
    /// The request, and how many of its bytes are its front.
    request: (&'a [Span], usize),
    answer: &'a [Span],
}

/// The first piece of the spans behind `bytes` bytes, of at most `len` bytes.
fn piece(spans: &[Span], bytes: usize, len: usize) -> Option<Span> {
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    behind(spans, bytes).next().map(|span| span.part(0, len))
}

impl Data for InWindow<'_> {
    fn given(&self) -> usize {
        let (request, front) = self.request;
        bytes_of(request).saturating_sub(front)
    }

    fn copy(&self, to: &mut [u8]) {
        let (request, front) = self.request;
        let mut at = 0;
        for span in behind(request, front) {
            at += self.queues.read(span, to.get_mut(at..).unwrap_or_default());
        }
    }

    fn drain(&self, file: &File, offset: u64, at: usize, len: usize) -> Result<usize, Errno> {
        let (request, front) = self.request;
        match piece(request, front.saturating_add(at), len) {
            Some(span) => Ok(self.queues.write_file(file, offset, span)? as usize),
            None => Ok(0),
        }
    }

    fn fill(&mut self, file: &File, offset: u64, at: usize, len: usize) -> Result<usize, Errno> {
        match piece(self.answer, ANSWER_HEADER_BYTES.saturating_add(at), len) {
            Some(span) => Ok(self.queues.read_file(file, offset, span)? as usize),
            None => Ok(0),
        }
    }
}

impl Device for FolderDevice {
    const KIND: VirtioKind = VirtioKind::Fs;

    fn start(setup: &mut Setup<'_>) -> Result<Self, Stillbirth> {
        let DeviceOwn::Fs {
            read_only,
            own,
            guest_owner,
            cache_ms,
        } = setup.config.own
        else {
            return Err(Stillbirth::setup("no configuration of a shared folder"));
        };
        let folder = setup.grants.take(FdRole::Folder, 0)?;
        // The guest says which permissions a new file has.
        umask(Mode::empty());
        let access = match read_only {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        let ids = Ids {
            users: one_id(guest_owner.0, own.0)?,
            groups: one_id(guest_owner.1, own.1)?,
        };
        let terms = Terms { ids, cache_ms };
        let kept = Some(setup.kept.clone());
        let server = Server::new(folder, access, terms, kept).map_err(Stillbirth::setup)?;
        Ok(Self {
            server,
            request: Vec::with_capacity(REQUEST_BYTES_MAX),
            answer: Vec::with_capacity(REQUEST_BYTES_MAX),
            config: setup.config.config.clone(),
            batch: 0,
        })
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }

    fn on_request(
        &mut self,
        queue: usize,
        chain: Chain,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        self.batch += 1;
        let mut number = [0; POSITION_BYTES];
        let (first, rest) = match chain.readable() {
            [first, rest @ ..] => (*first, rest),
            [] => (Span::default(), [].as_slice()),
        };
        queues.read(first, &mut number);
        let number = u64::from_le_bytes(number);
        let Self {
            server,
            request,
            answer,
            ..
        } = self;
        request.clear();
        append(request, queues, rest, REQUEST_HEADER_BYTES);
        let front = front_bytes(request);
        append(request, queues, rest, front);
        let mut data = InWindow {
            queues,
            request: (rest, front),
            answer: chain.writable(),
        };
        let room = bytes_of(chain.writable());
        let filled = server.serve_numbered(number, request, &mut data, room, answer);
        let mut left = answer.as_slice();
        for span in chain.writable() {
            let (part, after) = left.split_at(left.len().min(span.len() as usize));
            if !part.is_empty() {
                queues.write(*span, part);
            }
            left = after;
        }
        let written = u32::try_from(answer.len() + filled).unwrap_or(0);
        queues.complete(queue, chain.head(), written)
    }

    fn settle(&mut self, _queues: &mut Queues) -> Result<bool, DeviceFault> {
        self.batch = 0;
        Ok(false)
    }

    fn is_full(&self) -> bool {
        self.batch >= BATCH
    }

    fn is_at_once(&self) -> bool {
        true
    }

    fn on_driver(
        &mut self,
        features: Option<u64>,
        _queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        if features.is_none() {
            self.server.forget_all();
        }
        Ok(())
    }
}
