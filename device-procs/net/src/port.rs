//! A wire that leads to the switch of a virtual network: a port of it, as rings in shared memory ([`bulkhead_ipc::port`]).
//!
//! The switch is another process, which others' guests may have taken over: headers of frames are checked as if the
//! driver had made them, and a switch that breaks the ring protocol is a cable with nothing at its far end, until the
//! broker has put another one there. While nothing is there, what the guest sends is lost.

use crate::backend::{Backend, Offloads, Received};
use crate::request::{HEADER_BYTES, Header, feature};
use bulkhead_ipc::port::{PACKET_BYTES_MAX, PACKET_HEADER_BYTES, Port, PortFault};
use bulkhead_ipc::shared::Doorbell;
use bulkhead_runtime::{Queues, Span};
use std::os::fd::{AsFd, BorrowedFd};

const _: () = assert!(PACKET_HEADER_BYTES == HEADER_BYTES);
/// What the switch does, and what it may leave to others. It knows no large UDP datagrams.
const TCP: Offloads = Offloads {
    checksum: true,
    tso4: true,
    tso6: true,
    uso: false,
};
/// The same in the words of drivers.
const UNDERSTOOD: u64 = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6;

/// The card's end.
#[derive(Debug)]
pub(crate) struct Switched {
    port: Port,
    /// Wakes the switch.
    switch: Doorbell,
    /// Wakes this process.
    own: Doorbell,
    /// The switch has broken the protocol.
    broken: bool,
}

impl Switched {
    pub(crate) fn new(port: Port, switch: Doorbell, own: Doorbell) -> Self {
        // It may wait for this end.
        switch.ring();
        Self {
            port,
            switch,
            own,
            broken: false,
        }
    }

    /// Whether there is a switch that can be believed.
    fn is_there(&mut self) -> bool {
        !self.broken && self.port.is_met()
    }

    fn believe<T>(&mut self, done: Result<T, PortFault>, nothing: T) -> T {
        done.unwrap_or_else(|fault| {
            // One that is late sees what its dead predecessor and the next one have written side by side.
            if !self.renewed() && !std::mem::replace(&mut self.broken, true) {
                tracing::error!(%fault, "the switch breaks the protocol of the port");
            }
            nothing
        })
    }

    fn renewed(&mut self) -> bool {
        let renewed = self.port.renew();
        if renewed {
            self.broken = false;
            self.switch.ring();
        }
        renewed
    }

    /// Whether there is a record, or else the switch has been asked to ring.
    fn has_record(&mut self) -> bool {
        let Port { memory, reader, .. } = &mut self.port;
        let found = match reader.peek(memory) {
            Ok(Some(_)) => Ok(true),
            Ok(None) => reader.ask_for_records(memory),
            Err(fault) => Err(fault),
        };
        self.believe(found, false)
    }

    /// The next record, as [`Backend::receive`]; `None` for one that is no frame.
    fn take(
        &mut self,
        features: u64,
        to: &[Span],
        rest: &mut [u8],
        window: &Queues,
    ) -> Option<Received> {
        let Port { memory, reader, .. } = &mut self.port;
        let len = reader.peek(memory);
        let len = self.believe(len, None)?;
        let Port { memory, reader, .. } = &mut self.port;
        let mut header = [0; HEADER_BYTES];
        reader.copy_out(memory, 0, &mut header);
        let frame = len.saturating_sub(HEADER_BYTES);
        let taken = Header::parse(&header).checked(frame, UNDERSTOOD);
        let taken = taken.ok().map(|header| {
            let fits = header.suits(features);
            let to = if fits { to } else { &[] };
            let header = header.bytes();
            let mut put = Put {
                header: &header,
                at: 0,
                len,
            };
            for &span in to {
                put.fill_span(span, reader, memory, window);
            }
            put.fill_rest(rest, reader, memory);
            if fits {
                Received::Frame(put.at)
            } else {
                Received::Unfit(put.at)
            }
        });
        reader.take();
        taken
    }
}

/// A record on its way out of the ring: the header as it was checked, and the frame as it is there.
struct Put<'a> {
    header: &'a [u8],
    at: usize,
    len: usize,
}

impl Put<'_> {
    fn left_of_header(&self) -> &[u8] {
        self.header.get(self.at..).unwrap_or_default()
    }

    fn fill_span(
        &mut self,
        span: Span,
        reader: &bulkhead_ipc::port::PacketReader,
        memory: &bulkhead_ipc::shared::SharedMemory,
        window: &Queues,
    ) {
        let written = window.write(span, self.left_of_header());
        self.at += written;
        let left = u32::try_from(self.len.saturating_sub(self.at)).unwrap_or(u32::MAX);
        let span = span.part(u32::try_from(written).unwrap_or(u32::MAX), left);
        if !span.is_empty() {
            self.at += reader.copy_out_volatile(memory, self.at, &window.slice(span));
        }
    }

    fn fill_rest(
        &mut self,
        rest: &mut [u8],
        reader: &bulkhead_ipc::port::PacketReader,
        memory: &bulkhead_ipc::shared::SharedMemory,
    ) {
        let header = self.left_of_header();
        let n = header.len().min(rest.len());
        let (front, rest) = rest.split_at_mut(n);
        front.copy_from_slice(header.get(..n).unwrap_or_default());
        self.at += n;
        let left = self.len.saturating_sub(self.at).min(rest.len());
        let rest = rest.get_mut(..left).unwrap_or_default();
        self.at += reader.copy_out(memory, self.at, rest);
    }
}

impl Backend for Switched {
    fn queues(&self) -> usize {
        1
    }

    fn watched(&self, queue: usize) -> Option<BorrowedFd<'_>> {
        (queue == 0).then(|| self.own.as_fd())
    }

    fn takes(&self) -> Offloads {
        TCP
    }

    fn receive(
        &mut self,
        _queue: usize,
        features: u64,
        to: &[Span],
        rest: &mut [u8],
        window: &Queues,
    ) -> Received {
        while self.is_there() && self.has_record() {
            if let Some(received) = self.take(features, to, rest, window) {
                return received;
            }
        }
        Received::Nothing
    }

    fn send(
        &mut self,
        _queue: usize,
        header: &[u8; HEADER_BYTES],
        frame: &[Span],
        window: &Queues,
    ) -> bool {
        if !self.is_there() {
            return false;
        }
        let len = HEADER_BYTES + frame.iter().map(|span| span.len() as usize).sum::<usize>();
        let Port { memory, writer, .. } = &mut self.port;
        let sent = writer.reserve(memory, len).map(|record| {
            let Some(mut record) = record else {
                return false;
            };
            record.write(header);
            for &span in frame {
                record.write_volatile(&window.slice(span));
            }
            record.commit();
            true
        });
        self.believe(sent, false)
    }

    fn has_room(&mut self, _window: &Queues) -> bool {
        if !self.is_there() {
            // What is sent is lost, at once.
            return true;
        }
        let Port { memory, writer, .. } = &mut self.port;
        let has = writer.has_room(memory, PACKET_BYTES_MAX);
        if self.believe(has, true) {
            return true;
        }
        self.settle();
        let Port { memory, writer, .. } = &mut self.port;
        let has = writer.ask_for_room(memory, PACKET_BYTES_MAX);
        self.believe(has, true)
    }

    fn settle(&mut self) {
        if !self.is_there() {
            return;
        }
        if self.port.settle() {
            self.switch.ring();
        }
    }

    fn woken(&mut self, _window: &Queues) {
        self.renewed();
    }
}
