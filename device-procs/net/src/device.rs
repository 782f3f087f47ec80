//! The network device: pairs of a receive queue, whose buffers wait here for frames, and a transmit queue,
//! whose frames are sent and completed at once; and a control queue.

use crate::backend::{Backend, Offloads, Received, Tap};
use crate::control::{self, Command};
use crate::inbox::{Fit, Inbox};
use crate::port::Switched;
use crate::request::{FRAME_BYTES_MAX, HEADER_BYTES, Header, Unsound, feature};
use crate::stream::Stream;
use bulkhead_ipc::device_kind::{NET_BUFFERS_AT, VirtioKind};
use bulkhead_ipc::port::{Port, PortEnd};
use bulkhead_ipc::protocol::birth::{DeviceOwn, DiskLimits, FdRole};
use bulkhead_ipc::protocol::device::{Direction, Traffic};
use bulkhead_ipc::shared::Doorbell;
use bulkhead_runtime::device::FIRST_TOKEN;
use bulkhead_runtime::limits::Limiter;
use bulkhead_runtime::wait::SocketNews;
use bulkhead_runtime::{Chain, Device, DeviceFault, Queues, Setup, Span, Stillbirth};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Most pairs of queues: each is woken by a token of its own.
pub(crate) const PAIRS_MAX: usize = 8;
/// Frames taken from one queue of the wire before the others have their turn.
const FRAMES_PER_TURN: u32 = 64;
/// Most buffers that the wire delivers into at once. What a frame has beyond them is copied.
const BUFFERS_MAX: usize = 62;
/// With as many buffers at hand, nobody has to say that there are more: they are seen when the next frame comes.
const BUFFERS_KEPT: usize = 16;
const STATUS_LINK_UP: u16 = 1;
const CONFIG_BYTES: usize = 12;
const STATUS_AT: usize = 6;

/// What a virtqueue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Receive(usize),
    Transmit(usize),
    Control,
    /// The driver has not negotiated it.
    None,
}

/// What became of one try to give the guest a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It has it, or it is lost.
    Done,
    /// There is none.
    Empty,
    /// It has no buffers for it.
    Starved,
    /// It has received as much as it may.
    Limited,
}

/// The device. What it would have to save is configuration (the link's state and limits, which the broker keeps)
/// and buffers that the gate's journal knows; frames that wait here are lost, as on a wire.
#[derive(Debug)]
pub struct Net {
    wire: Box<dyn Backend>,
    inboxes: Vec<Inbox>,
    /// Receive buffers of each pair that nothing has come for, the newest first: its pages are the likeliest to be in a
    /// cache. The gate has no more slots than the queues were laid out for, which bounds them.
    buffers: Vec<VecDeque<Chain>>,
    /// Frames that the limit does not let through yet, or the wire has no room for, with their queues; bounded alike.
    unsent: VecDeque<(usize, Chain)>,
    /// They wait for room, of which the wire tells.
    is_full: bool,
    /// Heads and lengths of the buffers of one frame, on their way to be completed.
    filled: Vec<(u16, u32)>,
    features: u64,
    running: bool,
    link_up: bool,
    /// Pairs that frames are received in.
    pairs_used: usize,
    /// Whether the driver was there before this process, which then does not know the number of pairs and
    /// takes those that have buffers.
    inherited: bool,
    sending: Limiter,
    receiving: Limiter,
    traffic: Traffic,
}

impl Device for Net {
    const KIND: VirtioKind = VirtioKind::Net;

    fn start(setup: &mut Setup<'_>) -> Result<Self, Stillbirth> {
        let &DeviceOwn::Net {
            link_up,
            cuts_udp,
            limits,
        } = &setup.config.own
        else {
            return Err(Stillbirth::setup("no configuration of a network device"));
        };
        let pairs = setup.config.queue_sizes.len() / 2;
        if !(1..=PAIRS_MAX).contains(&pairs) {
            return Err(Stillbirth::Field {
                field: "queue_sizes",
                got: setup.config.queue_sizes.len().to_string(),
                expected: "1 to 8 pairs of queues",
            });
        }
        let wire = wire(setup, pairs, cuts_udp)?;
        for (queue, token) in (0..wire.queues()).zip(FIRST_TOKEN..) {
            if let Some(fd) = wire.watched(queue) {
                setup.watch(fd, token)?;
            }
        }
        let now = Instant::now();
        let slots = setup.config.queue_sizes.iter().copied().map(usize::from);
        let slots = slots.max().unwrap_or(0);
        let with_room = |_| VecDeque::with_capacity(slots);
        Ok(Self {
            inboxes: (0..wire.queues()).map(|_| Inbox::new()).collect(),
            buffers: (0..pairs).map(with_room).collect(),
            unsent: VecDeque::with_capacity(slots * pairs),
            is_full: false,
            filled: Vec::with_capacity(slots),
            wire,
            features: 0,
            running: false,
            link_up,
            pairs_used: 1,
            inherited: setup.generation > 1,
            sending: Limiter::new(&limits, now),
            receiving: Limiter::new(&limits, now),
            traffic: Traffic::default(),
        })
    }

    fn features(&self) -> u64 {
        let Offloads {
            checksum,
            tso4,
            tso6,
            uso,
        } = self.wire.takes();
        let taken = [
            (checksum, feature::CSUM),
            (tso4, feature::HOST_TSO4),
            (tso6, feature::HOST_TSO6),
            (uso, feature::HOST_USO),
        ];
        let taken = taken.into_iter().filter(|(takes, _)| *takes);
        // What the wire delivers and a driver does not take is done here.
        taken.fold(
            feature::GUEST_CSUM
                | feature::GUEST_TSO4
                | feature::GUEST_TSO6
                | feature::MTU
                | feature::MAC
                | feature::MRG_RXBUF
                | feature::STATUS
                | feature::CTRL_VQ
                | feature::MQ,
            |all, (_, bit)| all | bit,
        )
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        let status = if self.link_up { STATUS_LINK_UP } else { 0 };
        if let Some(place) = config.get_mut(STATUS_AT..STATUS_AT + 2) {
            place.copy_from_slice(&status.to_le_bytes());
        }
        config
    }

    fn on_request(
        &mut self,
        queue: usize,
        chain: Chain,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        match self.role(queue) {
            Role::Receive(pair) => self.offer(queue, pair, chain, queues),
            Role::Transmit(pair) => {
                // What is sent is likely to be answered.
                if let Some(inbox) = self.inboxes.get_mut(pair) {
                    inbox.readable = true;
                }
                if !self.unsent.is_empty()
                    || self.sending_waits().is_some()
                    || !self.wire.has_room(queues)
                {
                    self.unsent.push_back((queue, chain));
                    return Ok(());
                }
                self.send(queue, &chain, queues)
            }
            Role::Control => self.control(queue, &chain, queues),
            Role::None => queues.complete(queue, chain.head(), 0),
        }
    }

    fn settle(&mut self, queues: &mut Queues) -> Result<bool, DeviceFault> {
        let mut busy = false;
        self.is_full = false;
        while !self.unsent.is_empty() && (!self.link_up || self.sending_waits().is_none()) {
            if self.link_up && !self.wire.has_room(queues) {
                self.is_full = true;
                break;
            }
            if let Some((queue, chain)) = self.unsent.pop_front() {
                self.send(queue, &chain, queues)?;
                busy = true;
            }
        }
        for tap in 0..self.inboxes.len() {
            for _ in 0..FRAMES_PER_TURN {
                let step = self.receive(tap, queues)?;
                if let Some(inbox) = self.inboxes.get_mut(tap) {
                    inbox.starved = step == Step::Starved;
                }
                match step {
                    Step::Done => busy = true,
                    Step::Empty | Step::Starved | Step::Limited => break,
                }
            }
        }
        self.wire.settle();
        if self.wire.is_over() {
            return Err(DeviceFault::Ended {
                what: "the wire of the network card",
            });
        }
        Ok(busy)
    }

    fn on_event(&mut self, token: u8, queues: &mut Queues) -> Result<(), DeviceFault> {
        self.woken(usize::from(token.wrapping_sub(FIRST_TOKEN)), queues);
        Ok(())
    }

    fn on_socket(&mut self, news: SocketNews, queues: &mut Queues) -> Result<(), DeviceFault> {
        // A guest that offers no buffers has nothing read, the end included.
        if news.hung_up {
            self.wire.hung_up();
        }
        self.woken(usize::try_from(news.number).unwrap_or(usize::MAX), queues);
        Ok(())
    }

    fn on_driver(&mut self, features: Option<u64>, queues: &mut Queues) -> Result<(), DeviceFault> {
        self.running = features.is_some();
        if let Some(features) = features {
            self.features = consistent(features);
            return Ok(());
        }
        self.features = 0;
        self.pairs_used = 1;
        self.inherited = false;
        for (pair, buffers) in self.buffers.iter_mut().enumerate() {
            for chain in buffers.drain(..) {
                queues.complete(2 * pair, chain.head(), 0)?;
            }
        }
        for (queue, chain) in self.unsent.drain(..) {
            queues.complete(queue, chain.head(), 0)?;
        }
        for inbox in &mut self.inboxes {
            inbox.clear();
        }
        Ok(())
    }

    fn on_link(&mut self, up: bool) -> bool {
        std::mem::replace(&mut self.link_up, up) != up
    }

    fn on_limits(&mut self, limits: &DiskLimits) {
        let now = Instant::now();
        self.sending.change(limits, now);
        self.receiving.change(limits, now);
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(self.traffic)
    }

    fn wakes_in(&mut self) -> Option<Duration> {
        let limited = self.receiving.limits() && self.inboxes.iter().any(|inbox| inbox.readable);
        let receive = limited
            .then(|| self.receiving.wait(Instant::now()))
            .flatten();
        let sends = !self.unsent.is_empty() && !self.is_full;
        let send = sends.then(|| self.sending_waits().unwrap_or_default());
        receive.into_iter().chain(send).min()
    }

    fn is_at_once(&self) -> bool {
        true
    }

    fn wants_kicks(&self, queue: usize) -> bool {
        let Role::Receive(pair) = self.role(queue) else {
            return true;
        };
        let few = |buffers: &VecDeque<Chain>| buffers.len() < BUFFERS_KEPT;
        self.buffers.get(pair).is_none_or(few) || self.inboxes.iter().any(|inbox| inbox.starved)
    }
}

/// What the card is plugged into: a port of a network, a program that speaks for the guest, or the queues of an interface.
fn wire(
    setup: &mut Setup<'_>,
    pairs: usize,
    cuts_udp: bool,
) -> Result<Box<dyn Backend>, Stillbirth> {
    let grants = &mut *setup.grants;
    let single = [FdRole::Port, FdRole::Frames];
    if pairs != 1 && single.into_iter().any(|role| grants.has(role, 0)) {
        return Err(Stillbirth::Field {
            field: "queue_sizes",
            got: format!("{pairs} pairs"),
            expected: "one pair of queues, except at an interface",
        });
    }
    if grants.has(FdRole::Frames, 0) {
        let socket = grants.take(FdRole::Frames, 0)?;
        let watched = setup.watcher().watch(&socket, 0);
        watched.map_err(Stillbirth::setup)?;
        return Ok(Box::new(Stream::new(socket)));
    }
    if grants.has(FdRole::Port, 0) {
        let port = Port::find(grants.take(FdRole::Port, 0)?, PortEnd::Device);
        let port = port.map_err(Stillbirth::setup)?;
        let switch = Doorbell::from(grants.take(FdRole::PortKick, 0)?);
        let own = Doorbell::from(grants.take(FdRole::PortCall, 0)?);
        return Ok(Box::new(Switched::new(port, switch, own)));
    }
    let mut taps = Vec::with_capacity(pairs);
    for index in (0..).take(pairs) {
        taps.push(grants.take(FdRole::Tap, index)?);
    }
    Ok(Box::new(Tap::new(taps, cuts_udp)))
}

/// Features that mean something without the others that they need are taken for not negotiated.
const fn consistent(features: u64) -> u64 {
    let mut features = features;
    if features & feature::CSUM == 0 {
        features &= !(feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_USO);
    }
    if features & feature::GUEST_CSUM == 0 {
        features &= !(feature::GUEST_TSO4 | feature::GUEST_TSO6);
    }
    if features & feature::CTRL_VQ == 0 {
        features &= !feature::MQ;
    }
    features
}

impl Net {
    /// There is something new on a queue of the wire.
    fn woken(&mut self, tap: usize, queues: &Queues) {
        if let Some(inbox) = self.inboxes.get_mut(tap) {
            inbox.readable = true;
            self.wire.woken(queues);
        }
    }

    fn role(&self, queue: usize) -> Role {
        let pairs = if self.features & feature::MQ == 0 {
            1
        } else {
            self.buffers.len()
        };
        let has_control = self.features & feature::CTRL_VQ != 0;
        match (queue / 2, queue % 2) {
            (pair, 0) if pair < pairs => Role::Receive(pair),
            (pair, _) if pair < pairs => Role::Transmit(pair),
            (pair, 0) if pair == pairs && has_control => Role::Control,
            _ => Role::None,
        }
    }

    fn sending_waits(&mut self) -> Option<Duration> {
        if !self.sending.limits() {
            return None;
        }
        self.sending.wait(Instant::now())
    }

    /// The guest offers a buffer. One in which not even a header has room is given back.
    fn offer(
        &mut self,
        queue: usize,
        pair: usize,
        chain: Chain,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        let room = chain.writable().first().map_or(0, |span| span.len());
        match self.buffers.get_mut(pair) {
            Some(buffers) if room as usize > HEADER_BYTES => buffers.push_front(chain),
            _ => return queues.complete(queue, chain.head(), 0),
        }
        if self.inherited {
            self.pairs_used = self.pairs_used.max(pair + 1);
        }
        Ok(())
    }

    fn control(
        &mut self,
        queue: usize,
        chain: &Chain,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        let mut bytes = [0; control::COMMAND_BYTES + 1];
        let mut got = 0;
        for &span in chain.readable() {
            let rest = bytes.get_mut(got..).unwrap_or_default();
            got += queues.read(span, rest);
        }
        let pairs = match self.features & feature::MQ {
            0 => 0,
            _ => u16::try_from(self.buffers.len()).unwrap_or(0),
        };
        let answer = match control::command(bytes.get(..got).unwrap_or_default(), pairs) {
            Some(Command::Pairs(pairs)) => {
                self.pairs_used = usize::from(pairs);
                self.inherited = false;
                control::OK
            }
            None => control::ERROR,
        };
        let written = match chain.writable().first() {
            Some(&span) => queues.write(span, &[answer]),
            None => 0,
        };
        let written = u32::try_from(written).unwrap_or(0);
        queues.complete(queue, chain.head(), written)
    }

    /// Sends a frame, or drops it, and completes it.
    fn send(
        &mut self,
        queue: usize,
        chain: &Chain,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        let sent = match parse(chain, queues, self.features) {
            Ok((header, frame, bytes)) => {
                self.sending.take(bytes);
                let up = self.link_up;
                let there = up
                    && self
                        .wire
                        .send(queue / 2, &header.bytes(), frame.spans(), queues);
                there.then_some(bytes)
            }
            Err(unsound) => {
                tracing::debug!(%unsound, "frame of the guest is dropped");
                None
            }
        };
        count(&mut self.traffic.sent, sent);
        queues.complete(queue, chain.head(), 0)
    }

    /// Takes one frame from a queue of the wire and gives it to the guest.
    fn receive(&mut self, tap: usize, queues: &mut Queues) -> Result<Step, DeviceFault> {
        let pair = tap % self.pairs_used.max(1);
        let Some(inbox) = self.inboxes.get_mut(tap) else {
            return Ok(Step::Empty);
        };
        if !self.running || !self.link_up {
            return Ok(self.discard(tap, queues));
        }
        if inbox.waiting().is_some() {
            return self.deliver(tap, pair, queues);
        }
        if !inbox.readable {
            return Ok(Step::Empty);
        }
        if self.receiving.limits() && self.receiving.wait(Instant::now()).is_some() {
            return Ok(Step::Limited);
        }
        if self.buffers.get(pair).is_none_or(VecDeque::is_empty) {
            return Ok(Step::Starved);
        }
        self.receive_next(tap, pair, queues)
    }

    /// A frame that the driver does not take as it is.
    fn admit(
        &mut self,
        tap: usize,
        pair: usize,
        bytes: usize,
        queues: &mut Queues,
    ) -> Result<Step, DeviceFault> {
        let inbox = self.inboxes.get_mut(tap);
        match inbox.map(|inbox| inbox.admit(bytes, self.features)) {
            Some(Fit::Ready) => self.deliver(tap, pair, queues),
            Some(Fit::Unsound) | None => {
                count(&mut self.traffic.received, None);
                Ok(Step::Done)
            }
        }
    }

    /// Nobody listens: what comes is gone.
    fn discard(&mut self, tap: usize, queues: &Queues) -> Step {
        let Some(inbox) = self.inboxes.get_mut(tap) else {
            return Step::Empty;
        };
        if inbox.clear() {
            count(&mut self.traffic.received, None);
        }
        if !inbox.readable {
            return Step::Empty;
        }
        match self.wire.receive(tap, 0, &[], &mut inbox.packet, queues) {
            Received::Nothing => {
                inbox.readable = false;
                Step::Empty
            }
            Received::Frame(_) | Received::Unfit(_) => {
                count(&mut self.traffic.received, None);
                Step::Done
            }
        }
    }

    /// From the wire into the guest's buffers. They are as many as the last frame has needed: naming more to the
    /// kernel costs time with each frame.
    fn receive_next(
        &mut self,
        tap: usize,
        pair: usize,
        queues: &mut Queues,
    ) -> Result<Step, DeviceFault> {
        let mergeable = self.features & feature::MRG_RXBUF != 0;
        let (Some(inbox), Some(buffers)) = (self.inboxes.get_mut(tap), self.buffers.get_mut(pair))
        else {
            return Ok(Step::Empty);
        };
        let most = if mergeable { inbox.expected } else { 1 };
        let mut spans = [Span::default(); BUFFERS_MAX];
        let mut named = 0;
        let mut room = 0;
        for (place, chain) in spans.iter_mut().zip(buffers.iter().take(most)) {
            *place = chain.writable().first().copied().unwrap_or_default();
            room += place.len() as usize;
            named += 1;
        }
        let spans = spans.get(..named).unwrap_or_default();
        let (features, packet) = (self.features, &mut inbox.packet);
        let bytes = match self.wire.receive(tap, features, spans, packet, queues) {
            Received::Nothing => {
                inbox.readable = false;
                return Ok(Step::Empty);
            }
            Received::Unfit(bytes) => return self.admit(tap, pair, bytes, queues),
            Received::Frame(bytes) => bytes,
        };
        if bytes <= HEADER_BYTES {
            count(&mut self.traffic.received, None);
            return Ok(Step::Done);
        }
        let rest = bytes.saturating_sub(room);
        if rest > 0 {
            let further = buffers.iter().skip(named);
            let further = further.filter_map(|chain| chain.writable().first());
            let further: usize = further.map(|span| span.len() as usize).sum();
            if !mergeable {
                count(&mut self.traffic.received, None);
                return Ok(Step::Done);
            }
            inbox.expected = (2 * named).clamp(1, BUFFERS_MAX);
            if further < rest {
                let front = |to: &mut [u8]| {
                    let mut at = 0;
                    for &span in spans {
                        at += queues.read(span, to.get_mut(at..).unwrap_or_default());
                    }
                    at
                };
                inbox.keep(front, rest);
                return Ok(Step::Starved);
            }
        }
        // What did not fit the named buffers is in the inbox, and goes to those behind them.
        let (mut left, mut copied) = (bytes, 0);
        self.filled.clear();
        let mut first = None;
        while left > 0 {
            let Some(chain) = buffers.pop_front() else {
                break;
            };
            let span = chain.writable().first().copied().unwrap_or_default();
            let n = left.min(span.len() as usize);
            if self.filled.len() >= named {
                let rest = inbox.packet.get(copied..copied + n).unwrap_or_default();
                copied += queues.write(span, rest);
            }
            first.get_or_insert(span);
            let len = u32::try_from(n).unwrap_or(u32::MAX);
            self.filled.push((chain.head(), len));
            left -= n;
        }
        if rest == 0 {
            inbox.expected = (self.filled.len() + 1).min(BUFFERS_MAX);
        }
        self.finish(pair, first, bytes, queues)
    }

    /// Copies what waits in an inbox into the guest's buffers.
    fn deliver(
        &mut self,
        tap: usize,
        pair: usize,
        queues: &mut Queues,
    ) -> Result<Step, DeviceFault> {
        let mergeable = self.features & feature::MRG_RXBUF != 0;
        let (Some(inbox), Some(buffers)) = (self.inboxes.get_mut(tap), self.buffers.get_mut(pair))
        else {
            return Ok(Step::Empty);
        };
        let Some(frame) = inbox.waiting() else {
            return Ok(Step::Done);
        };
        let len = |chain: &Chain| {
            chain
                .writable()
                .first()
                .map_or(0, |span| span.len() as usize)
        };
        let room: usize = if mergeable {
            buffers.iter().map(len).sum()
        } else {
            buffers.front().map_or(0, len)
        };
        let bytes = frame.len();
        if room < bytes {
            if mergeable || room == 0 {
                return Ok(Step::Starved);
            }
            inbox.done();
            count(&mut self.traffic.received, None);
            return Ok(Step::Done);
        }
        let mut at = 0;
        self.filled.clear();
        let mut first = None;
        while at < bytes {
            let Some(chain) = buffers.pop_front() else {
                break;
            };
            let span = chain.writable().first().copied().unwrap_or_default();
            let n = queues.write(span, frame.get(at..).unwrap_or_default());
            first.get_or_insert(span);
            let len = u32::try_from(n).unwrap_or(u32::MAX);
            self.filled.push((chain.head(), len));
            at += n;
        }
        inbox.done();
        self.finish(pair, first, bytes, queues)
    }

    /// The buffers of a frame are filled: the guest gets all of them at once.
    fn finish(
        &mut self,
        pair: usize,
        first: Option<Span>,
        bytes: usize,
        queues: &mut Queues,
    ) -> Result<Step, DeviceFault> {
        if let Some(first) = first {
            let buffers = u16::try_from(self.filled.len()).unwrap_or(u16::MAX);
            queues.write(first.part(NET_BUFFERS_AT, 2), &buffers.to_le_bytes());
        }
        queues.complete_together(2 * pair, &self.filled)?;
        let frame = bytes.saturating_sub(HEADER_BYTES) as u64;
        self.receiving.take(frame);
        count(&mut self.traffic.received, Some(frame));
        Ok(Step::Done)
    }
}

/// A frame of so many bytes is over, or none.
const fn count(direction: &mut Direction, bytes: Option<u64>) {
    match bytes {
        Some(bytes) => {
            direction.packets = direction.packets.saturating_add(1);
            direction.bytes = direction.bytes.saturating_add(bytes);
        }
        None => direction.dropped = direction.dropped.saturating_add(1),
    }
}

/// Where a frame to send is.
#[derive(Debug, Clone, Copy, Default)]
struct Frame {
    spans: [Span; 4],
    used: usize,
}

impl Frame {
    fn push(&mut self, span: Span) {
        if let (Some(place), false) = (self.spans.get_mut(self.used), span.is_empty()) {
            *place = span;
            self.used += 1;
        }
    }

    fn spans(&self) -> &[Span] {
        self.spans.get(..self.used).unwrap_or_default()
    }
}

/// Header, place and length of the frame in a request. The header is read once, and what is handed on is
/// what was checked.
fn parse(chain: &Chain, queues: &Queues, features: u64) -> Result<(Header, Frame, u64), Unsound> {
    let (mut header, mut got) = ([0; HEADER_BYTES], 0);
    let (mut frame, mut bytes) = (Frame::default(), 0usize);
    for &span in chain.readable() {
        let place = header.get_mut(got..).unwrap_or_default();
        let n = if place.is_empty() {
            0
        } else {
            queues.read(span, place)
        };
        got += n;
        let rest = span.part(u32::try_from(n).unwrap_or(u32::MAX), u32::MAX);
        bytes = bytes.saturating_add(rest.len() as usize);
        frame.push(rest);
    }
    if got < HEADER_BYTES || bytes > FRAME_BYTES_MAX {
        return Err(Unsound::Length(bytes));
    }
    let header = Header::parse(&header).checked(bytes, features)?;
    Ok((header, frame, bytes as u64))
}
