//! `net-peer`: takes verified data from another machine, which runs `net`, and says what came of it.
//!
//! `ip=` is its own address, or `dhcp` for one that is leased; `peer=` the other's address, or its name for one that is asked of
//! the leased DNS server until it knows it. `rounds=` times, and for `seconds=` at least, it connects to port 19 and takes what
//! is sent; one that does not answer within `patience=` milliseconds is unreachable. `foreign=1` has it send with another
//! Ethernet address than its card's.

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::{dhcpv4, dns, tcp};
use smoltcp::time::Duration;
use smoltcp::wire::{
    DnsQueryType, EthernetAddress, HardwareAddress, IpAddress, IpCidr, Ipv4Address,
};

use super::net::{SOURCE, Stream, address, now, tcp_socket};
use crate::machine::Machine;
use crate::report::{Failure, fail, say};
use crate::sys::irq;
use crate::sys::time::Deadline;
use crate::virtio::net::Net;

/// How long a lease may take on a busy machine, and a name.
const PATIENCE_MS: u64 = 30_000;
/// When a name that has no address is asked for again.
const ASK_AGAIN_MS: u64 = 50;
const FIRST_PORT: u16 = 49_152;

/// A card with a stack on it.
pub(super) struct Stack<'a> {
    pub(super) net: Net,
    pub(super) interface: Interface,
    pub(super) sockets: SocketSet<'a>,
}

impl<'a> Stack<'a> {
    /// Over a card, with room for sockets.
    pub(super) fn new(mut net: Net, mac: [u8; 6], storage: &'a mut [SocketStorage<'a>]) -> Self {
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(mac)));
        config.random_seed = crate::sys::time::cycles();
        let interface = Interface::new(config, &mut net, now());
        irq::enable(net.device.gsi);
        Self {
            net,
            interface,
            sockets: SocketSet::new(storage),
        }
    }

    /// Does what there is to do, and then sleeps for a moment or until a frame has come.
    pub(super) fn turn(&mut self) -> Result<(), Failure> {
        let moment = now();
        self.interface
            .poll(moment, &mut self.net, &mut self.sockets);
        self.net.flush()?;
        let wait = self.interface.poll_delay(moment, &self.sockets);
        if wait.is_some_and(|wait| wait.total_micros() == 0) || self.net.receiver.has_frames() {
            return Ok(());
        }
        self.net.receiver.want_interrupt();
        let until = wait.map_or(20, |wait| wait.total_millis().clamp(1, 20));
        let net = &self.net;
        irq::sleep_until(Deadline::after_ms(until), || net.receiver.has_frames());
        self.net.device.take_interrupt();
        Ok(())
    }

    /// Has the address `ip=`, or one that is leased. Returns the DNS server that came with it.
    pub(super) fn settle(&mut self, machine: &Machine) -> Result<Option<Ipv4Address>, Failure> {
        if machine.args().text("ip") != Some("dhcp") {
            self.have(IpCidr::new(IpAddress::Ipv4(address(machine)?), 24));
            return Ok(None);
        }
        let mut socket = dhcpv4::Socket::new();
        let mut again = socket.get_retry_config();
        again.discover_timeout = Duration::from_millis(500);
        again.initial_request_timeout = Duration::from_millis(500);
        socket.set_retry_config(again);
        let handle = self.sockets.add(socket);
        let end = Deadline::after_ms(machine.number("patience", PATIENCE_MS)?);
        let mut server = None;
        let mut leased = false;
        while !leased && !end.passed() {
            self.turn()?;
            let event = self.sockets.get_mut::<dhcpv4::Socket>(handle).poll();
            let Some(dhcpv4::Event::Configured(config)) = event else {
                continue;
            };
            let own = config.address;
            server = config.dns_servers.first().copied();
            let gateway = config.server.address;
            let router = config.router;
            say!(
                "net.lease ip={} prefix={} server={gateway}",
                own.address(),
                own.prefix_len()
            );
            self.have(IpCidr::Ipv4(own));
            if let Some(router) = router {
                let _ = self.interface.routes_mut().add_default_ipv4_route(router);
            }
            leased = true;
        }
        self.sockets.remove(handle);
        if !leased {
            say!("net.lease ip=none");
        }
        Ok(server)
    }

    fn have(&mut self, address: IpCidr) {
        self.interface.update_ip_addrs(|all| {
            all.clear();
            let _ = all.push(address);
        });
    }
}

/// Asks for the address of a name.
fn resolve<'a>(
    stack: &mut Stack<'a>,
    queries: &'a mut [Option<dns::DnsQuery>],
    server: Ipv4Address,
    name: &str,
) -> Result<Option<Ipv4Address>, Failure> {
    let servers = [IpAddress::Ipv4(server)];
    let handle = stack.sockets.add(dns::Socket::new(&servers, queries));
    let ask = |stack: &mut Stack<'a>| {
        let context = stack.interface.context();
        let socket = stack.sockets.get_mut::<dns::Socket>(handle);
        let query = socket.start_query(context, name, DnsQueryType::A);
        query.map_err(|_| Failure::Parameter("peer"))
    };
    let mut query = ask(stack)?;
    let end = Deadline::after_ms(PATIENCE_MS);
    let mut found = None;
    while !end.passed() {
        stack.turn()?;
        match stack
            .sockets
            .get_mut::<dns::Socket>(handle)
            .get_query_result(query)
        {
            Err(dns::GetQueryResultError::Pending) => {}
            // A machine that has just begun has no address yet.
            Err(dns::GetQueryResultError::Failed) => {
                irq::sleep_until(Deadline::after_ms(ASK_AGAIN_MS), || false);
                query = ask(stack)?;
            }
            Ok(addresses) => {
                found = addresses.first().map(|IpAddress::Ipv4(address)| *address);
                break;
            }
        }
    }
    stack.sockets.remove(handle);
    match found {
        Some(address) => say!("net.name name={name} ip={address}"),
        None => say!("net.name name={name} ip=none"),
    }
    Ok(found)
}

/// Takes what `peer` sends. Returns whether it was reached. One that is not listening again yet is asked again.
fn take(
    stack: &mut Stack<'_>,
    handle: SocketHandle,
    peer: Ipv4Address,
    port: &mut u16,
    patience_ms: u64,
) -> Result<bool, Failure> {
    let silent = Deadline::after_ms(patience_ms);
    let mut taken = Stream::default();
    loop {
        let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
        match socket.state() {
            tcp::State::Closed | tcp::State::SynSent if silent.passed() => {
                socket.abort();
                say!("net.peer ip={peer} reached=0");
                return Ok(false);
            }
            tcp::State::Closed => {
                *port = port.checked_add(1).unwrap_or(FIRST_PORT);
                let context = stack.interface.context();
                let connected = socket.connect(context, (IpAddress::Ipv4(peer), SOURCE), *port);
                connected.map_err(|_| Failure::Parameter("peer"))?;
            }
            _ => {}
        }
        stack.turn()?;
        let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
        if taken.take_connected(socket) {
            break;
        }
    }
    say!(
        "net.peer ip={peer} reached=1 bytes={} wrong={}",
        taken.last,
        taken.last_wrong
    );
    if taken.last_wrong > 0 {
        fail!(
            "net-peer",
            "kind=data what=pattern wrong={}",
            taken.last_wrong
        );
    }
    // The other side listens again when it knows that the connection is over.
    let lingers = Deadline::after_ms(2000);
    loop {
        stack.turn()?;
        let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
        if socket.state() == tcp::State::Closed {
            return Ok(true);
        }
        if lingers.passed() {
            socket.abort();
        }
    }
}

/// Takes.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let offload = machine.number("offload", 0)? != 0;
    let net = Net::open(machine, machine.number("disk", 0)?, 1, offload)?;
    let mut mac = net.mac;
    mac[5] ^= u8::from(machine.number("foreign", 0)? != 0);
    let mut queries = [None];
    let mut storage = [const { SocketStorage::EMPTY }; 3];
    let mut stack = Stack::new(net, mac, &mut storage);
    let gsi = stack.net.device.gsi;
    let server = stack.settle(machine)?;
    let peer = machine.args().text("peer").unwrap_or("10.0.0.3");
    let peer = match (peer.parse::<Ipv4Address>(), server) {
        (Ok(address), _) => Some(address),
        (Err(_), Some(server)) => resolve(&mut stack, &mut queries, server, peer)?,
        (Err(_), None) => None,
    };
    // Without an address of its own nobody is reached.
    let peer = peer.filter(|_| stack.interface.ipv4_addr().is_some());
    let patience = machine.number("patience", PATIENCE_MS)?;
    let rounds = machine.number("rounds", 1)? as u16;
    let until = Deadline::after_ms(machine.number("seconds", 0)?.saturating_mul(1000));
    let mut done = 0;
    let handle = stack.sockets.add(tcp_socket());
    let mut reached = 0;
    if let Some(peer) = peer {
        let mut port = FIRST_PORT;
        while done < rounds || !until.passed() {
            done += 1;
            reached += u16::from(take(&mut stack, handle, peer, &mut port, patience)?);
        }
    }
    irq::disable(gsi);
    say!(
        "net-peer result=ok rounds={} reached={reached}",
        done.max(rounds)
    );
    Ok(())
}
