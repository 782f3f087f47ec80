//! `net`: for `seconds=`, answers pings and UDP to port 7 at address `ip=` (`dhcp` for a leased one), and serves verified data by TCP: what
//! comes to port 9 must be the pattern, and whoever connects to port 19 is sent `size=` bytes of it.
//! `pairs=` pairs of queues; `offload=1` for offloads and frames that are spread over buffers.

use smoltcp::iface::SocketStorage;
use smoltcp::socket::{tcp, udp};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::Ipv4Address;

use super::net_peer::Stack;
use crate::machine::Machine;
use crate::report::{Failure, fail, say};
use crate::sys::time::{self, Deadline};
use crate::sys::{irq, phys};
use crate::virtio::net::Net;

const ECHO: u16 = 7;
const SINK: u16 = 9;
pub(super) const SOURCE: u16 = 19;
const TCP_BUFFER: usize = 256 << 10;
const UDP_BUFFER: usize = 64 << 10;
const UDP_PACKETS: usize = 32;

/// Byte `at` of the pattern.
fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

pub(super) fn now() -> Instant {
    let micros = time::cycles() as u128 * 1000 / u128::from(time::khz());
    Instant::from_micros(micros as i64)
}

/// Memory for a socket, for as long as the mode runs.
fn memory(len: usize) -> &'static mut [u8] {
    let memory = phys::allocate(len);
    // SAFETY: the memory is fresh, nobody else has it, and it is given back after the mode only.
    unsafe { core::slice::from_raw_parts_mut(memory.address as *mut u8, len) }
}

pub(super) fn address(machine: &Machine) -> Result<Ipv4Address, Failure> {
    let text = machine.args().text("ip").unwrap_or("10.0.0.2");
    text.parse().map_err(|_| Failure::Parameter("ip"))
}

/// How often a client that says nothing is asked whether it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(4);
/// After how long without an answer it is gone.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(20);

pub(super) fn tcp_socket() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(memory(TCP_BUFFER));
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(false);
    socket
}

/// One that serves, and does not wait for ever for a client that is gone: the port would be nobody else's.
fn serving_socket() -> tcp::Socket<'static> {
    let mut socket = tcp_socket();
    socket.set_keep_alive(Some(KEEP_ALIVE));
    socket.set_timeout(Some(GIVEN_UP_AFTER));
    socket
}

/// Serves.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let size = machine.number("size", 1 << 20)?;
    let pairs = machine.number("pairs", 1)? as usize;
    let offload = machine.number("offload", 0)? != 0;
    let net = Net::open(machine, machine.number("disk", 0)?, pairs, offload)?;
    let mut storage = [const { SocketStorage::EMPTY }; 4];
    let mac = net.mac;
    let mut stack = Stack::new(net, mac, &mut storage);
    stack.settle(machine)?;
    let ip = stack
        .interface
        .ipv4_addr()
        .unwrap_or(Ipv4Address::UNSPECIFIED);
    let Stack {
        mut net,
        mut interface,
        mut sockets,
    } = stack;
    let mut metadata = [[udp::PacketMetadata::EMPTY; UDP_PACKETS]; 2];
    let [receive, send] = &mut metadata;
    let echo = sockets.add(udp::Socket::new(
        udp::PacketBuffer::new(&mut receive[..], memory(UDP_BUFFER)),
        udp::PacketBuffer::new(&mut send[..], memory(UDP_BUFFER)),
    ));
    let sink = sockets.add(serving_socket());
    let source = sockets.add(serving_socket());
    let bound = sockets.get_mut::<udp::Socket>(echo).bind(ECHO);
    bound.map_err(|_| Failure::Parameter("port"))?;
    let mut link = net.link_is_up();
    say!(
        "net.ready ip={ip} features={:#x} link={}",
        net.features,
        u8::from(link)
    );
    let end = Deadline::after_ms(machine.number("seconds", 60)?.saturating_mul(1000));
    let mut taken = Stream::default();
    let mut given = Stream::default();
    while !end.passed() {
        interface.poll(now(), &mut net, &mut sockets);
        answer(sockets.get_mut::<udp::Socket>(echo));
        if taken.take(sockets.get_mut::<tcp::Socket>(sink)) {
            let seen = net.receiver.seen;
            say!(
                "net.sink bytes={} wrong={} frames={} largest={} spread={} pairs={:#x}",
                taken.last,
                taken.last_wrong,
                seen.frames,
                seen.largest,
                seen.spread,
                seen.pairs
            );
            if taken.last_wrong > 0 {
                fail!("net", "kind=data what=pattern wrong={}", taken.last_wrong);
            }
        }
        if given.give(sockets.get_mut::<tcp::Socket>(source), size) {
            say!("net.source bytes={}", given.last);
        }
        let moment = now();
        interface.poll(moment, &mut net, &mut sockets);
        net.flush()?;
        let wait = interface.poll_delay(moment, &sockets);
        if wait.is_some_and(|wait| wait.total_micros() == 0) || net.receiver.has_frames() {
            continue;
        }
        net.receiver.want_interrupt();
        let until = wait.map_or(20, |wait| wait.total_millis().clamp(1, 20));
        irq::sleep_until(Deadline::after_ms(until), || net.receiver.has_frames());
        net.device.take_interrupt();
        let up = net.link_is_up();
        if up != link {
            link = up;
            say!("net.link up={}", u8::from(up));
        }
    }
    irq::disable(net.device.gsi);
    let seen = net.receiver.seen;
    say!(
        "net result=ok frames={} largest={} spread={} pairs={:#x}",
        seen.frames,
        seen.largest,
        seen.spread,
        seen.pairs
    );
    Ok(())
}

fn answer(socket: &mut udp::Socket<'_>) {
    let mut packet = [0; 2048];
    while socket.can_recv() && socket.can_send() {
        let Ok((len, from)) = socket.recv_slice(&mut packet) else {
            continue;
        };
        // One that has no room is lost, as UDP is.
        let _ = socket.send_slice(&packet[..len], from.endpoint);
    }
}

/// One direction of verified data, connection after connection.
#[derive(Default)]
pub(super) struct Stream {
    at: u64,
    wrong: u64,
    /// Bytes of the last connection that has ended.
    pub(super) last: u64,
    /// Of them, those that were not the pattern.
    pub(super) last_wrong: u64,
    open: bool,
}

impl Stream {
    fn end(&mut self) -> bool {
        (self.last, self.last_wrong) = (self.at, self.wrong);
        (self.at, self.wrong, self.open) = (0, 0, false);
        true
    }

    /// Takes what has come. True when a connection has ended.
    fn take(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        if !socket.is_open() {
            // One that listens already is as good.
            let _ = socket.listen(SINK);
        }
        self.take_connected(socket)
    }

    /// The same of a connection that this side has made.
    pub(super) fn take_connected(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        self.open |= socket.may_recv();
        while socket.can_recv() {
            let (at, wrong) = (&mut self.at, &mut self.wrong);
            let taken = socket.recv(|bytes| {
                for byte in bytes.iter() {
                    *wrong += u64::from(*byte != pattern(*at));
                    *at += 1;
                }
                (bytes.len(), ())
            });
            if taken.is_err() {
                break;
            }
        }
        let over = self.open && !socket.may_recv();
        if over {
            socket.close();
        }
        over && self.end()
    }

    /// Sends what there is room for. True when a connection has ended.
    fn give(&mut self, socket: &mut tcp::Socket<'_>, size: u64) -> bool {
        if !socket.is_open() {
            let _ = socket.listen(SOURCE);
        }
        self.open |= socket.may_send();
        while self.open && self.at < size && socket.can_send() {
            let at = &mut self.at;
            let sent = socket.send(|room| {
                let len = room.len().min((size - *at) as usize);
                for byte in &mut room[..len] {
                    *byte = pattern(*at);
                    *at += 1;
                }
                (len, ())
            });
            if sent.is_err() {
                break;
            }
        }
        let over = self.open && (self.at == size || !socket.may_send());
        if over {
            socket.close();
        }
        over && self.end()
    }
}
