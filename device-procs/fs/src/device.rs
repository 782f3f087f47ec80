//! The device: a queue for what must not wait and one for requests, whose requests are FUSE's.
//!
//! Requests are done one after the other, each to its end, and answered at once: there is at most one that
//! was done and not answered when the process dies, and the journal knows of it.

use crate::{Access, Ids, REQUEST_BYTES_MAX, Server, Terms};
use bulkhead_ipc::device_kind::{POSITION_BYTES, VirtioKind};
use bulkhead_ipc::protocol::birth::{DeviceOwn, FdRole};
use bulkhead_runtime::{Chain, Device, DeviceFault, Queues, Setup, Span, Stillbirth};
use nix::sys::stat::{Mode, umask};

/// Requests after which the gate is told of their answers, so that one that takes long does not hold up those
/// before it.
const BATCH: u32 = 16;

/// A shared folder.
#[derive(Debug)]
pub(crate) struct FolderDevice {
    server: Server,
    /// Space for a request and its answer.
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
        self.request.clear();
        for span in rest {
            let start = self.request.len();
            let room = REQUEST_BYTES_MAX.saturating_sub(start);
            let len = usize::try_from(span.len()).unwrap_or(0).min(room);
            self.request.resize(start + len, 0);
            queues.read(*span, self.request.get_mut(start..).unwrap_or_default());
        }
        let room = chain
            .writable()
            .iter()
            .map(|span| span.len() as usize)
            .sum::<usize>();
        let number = u64::from_le_bytes(number);
        let Self {
            server,
            request,
            answer,
            ..
        } = self;
        server.serve_numbered(number, request, room, answer);
        let mut left = answer.as_slice();
        for span in chain.writable() {
            let (part, after) = left.split_at(left.len().min(span.len() as usize));
            if !part.is_empty() {
                queues.write(*span, part);
            }
            left = after;
        }
        let written = u32::try_from(answer.len()).unwrap_or(0);
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
