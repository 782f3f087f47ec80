//! A network of a test's own: a network namespace of the calling thread, in which everything that the thread
//! starts runs. It vanishes with the last of them, whatever becomes of the test.

use super::tool;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

/// How long a guest may take to answer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long one packet is waited for before it is sent again.
const AGAIN: Duration = Duration::from_millis(250);
/// Where the test guest echoes.
const ECHO: u16 = 7;
/// Where it takes data.
const SINK: u16 = 9;
/// Where it gives data.
pub const SOURCE: u16 = 19;

/// The network.
#[derive(Debug)]
pub struct Network(());

/// Byte `at` of what the test guest sends and expects (`tests/guests/src/modes/net.rs`).
#[must_use]
pub const fn pattern(at: u64) -> u8 {
    let [.., top] = at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    top
}

impl Network {
    /// Leaves the host's network. `None` without root, which alone may make one.
    ///
    /// # Panics
    /// When the kernel refuses it to root.
    #[must_use]
    pub fn enter() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root can make a network");
            return None;
        }
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        let network = Self(());
        network.ip("link set lo up");
        Some(network)
    }

    /// Runs `ip` with these words.
    pub fn ip(&self, words: &str) -> String {
        let words: Vec<&str> = words.split_whitespace().collect();
        tool("ip", &words)
    }

    /// Makes a bridge with this address.
    pub fn bridge(&self, name: &str, address: &str) {
        self.ip(&format!("link add {name} type bridge"));
        self.ip(&format!("addr add {address} dev {name}"));
        self.ip(&format!("link set {name} up"));
    }

    /// Gives an interface of the host an address.
    pub fn address(&self, interface: &str, address: &str) {
        self.ip(&format!("addr add {address} dev {interface}"));
    }

    /// Names of all interfaces.
    #[must_use]
    pub fn interfaces(&self) -> Vec<String> {
        let lines = self.ip("-o link show");
        let name = |line: &str| Some(line.split(": ").nth(1)?.split('@').next()?.to_owned());
        lines.lines().filter_map(name).collect()
    }

    /// Waits until an interface is gone.
    ///
    /// # Panics
    /// When it stays.
    pub fn until_gone(&self, interface: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.interfaces().iter().any(|name| name == interface) {
            assert!(Instant::now() < deadline, "{interface} stays");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Sends ICMP echo requests until one is answered.
///
/// # Panics
/// When none is, within a minute.
pub fn ping(host: &str) {
    let host: Ipv4Addr = host.parse().expect("an address");
    let raw = socket(
        AddressFamily::Inet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Icmp,
    )
    .expect("a raw socket");
    // The calls are those of UDP.
    let raw = UdpSocket::from(raw);
    raw.set_read_timeout(Some(AGAIN)).expect("a time-out");
    let deadline = Instant::now() + PATIENCE;
    for sequence in 1u16.. {
        assert!(Instant::now() < deadline, "{host} does not answer pings");
        let [high, low] = sequence.to_be_bytes();
        let mut packet = [8, 0, 0, 0, 0x42, 0x48, high, low, 1, 2, 3, 4, 5, 6, 7, 8];
        let sum: u32 = packet
            .chunks_exact(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
            .sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(0);
        packet[2..4].copy_from_slice(&checksum.to_be_bytes());
        // Nobody may know its address yet.
        let _sent = raw.send_to(&packet, (host, 0));
        let again = Instant::now() + AGAIN;
        let mut answer = [0; 128];
        while Instant::now() < again {
            let Ok(n) = raw.recv(&mut answer) else {
                break;
            };
            // Behind the IP header: an echo reply with what was sent.
            if n == 36
                && answer[12..16] == host.octets()
                && answer[20] == 0
                && answer[24..36] == packet[4..]
            {
                return;
            }
        }
    }
}

/// Has a packet echoed, for at most `within`. Returns whether it was.
///
/// # Panics
/// When there is no socket.
#[must_use]
pub fn echoed(host: &str, len: usize, within: Duration) -> bool {
    echoed_at(&at(host, ECHO), len, within)
}

/// As [`echoed`], at any port.
///
/// # Panics
/// When there is no socket.
#[must_use]
pub fn echoed_at(address: &str, len: usize, within: Duration) -> bool {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    socket.set_read_timeout(Some(AGAIN)).expect("a time-out");
    let deadline = Instant::now() + within;
    let packet: Vec<u8> = (0..len as u64).map(pattern).collect();
    let mut answer = vec![0; len + 1];
    while Instant::now() < deadline {
        let _sent = socket.send_to(&packet, address);
        if let Ok(n) = socket.recv(&mut answer) {
            assert_eq!(answer[..n], packet, "{address} echoes something else");
            return true;
        }
    }
    false
}

/// As [`echoed`] within a minute.
///
/// # Panics
/// When it is not.
pub fn echo(host: &str, len: usize) {
    assert!(echoed(host, len, PATIENCE), "{host} does not answer");
}

fn at(host: &str, port: u16) -> String {
    format!("{host}:{port}")
}

/// Connects to a port of the test guest, which listens on it again after each connection.
fn connect(address: &str) -> TcpStream {
    let deadline = Instant::now() + PATIENCE;
    let to: SocketAddrV4 = address.parse().expect("an address");
    loop {
        match TcpStream::connect_timeout(&to.into(), PATIENCE) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
                stream
                    .set_write_timeout(Some(PATIENCE))
                    .expect("a time-out");
                return stream;
            }
            Err(error) => assert!(Instant::now() < deadline, "{address}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Sends the guest `bytes` bytes by TCP, which it verifies and tells of.
///
/// # Panics
/// When the connection breaks.
pub fn give(host: &str, bytes: u64) {
    give_at(&at(host, SINK), bytes).expect("the guest takes it");
}

/// As [`give`], at any port.
///
/// # Errors
/// What has broken the connection.
///
/// # Panics
/// When there is none, or the guest says something.
pub fn give_at(address: &str, bytes: u64) -> io::Result<()> {
    let mut stream = connect(address);
    let mut at = 0;
    while at < bytes {
        let end = (at + (64 << 10)).min(bytes);
        let piece: Vec<u8> = (at..end).map(pattern).collect();
        stream.write_all(&piece)?;
        at = end;
    }
    stream.shutdown(Shutdown::Write)?;
    assert_eq!(stream.read(&mut [0; 16])?, 0, "the guest says something");
    Ok(())
}

/// Takes everything that the guest sends by TCP, and verifies it. Returns how much that was.
///
/// # Panics
/// When it is wrong, or the connection breaks.
#[must_use]
pub fn take(host: &str) -> u64 {
    take_at(&at(host, SOURCE), &[]).expect("the guest sends")
}

/// As [`take`], at any port, with a word from here first.
///
/// # Errors
/// What has broken the connection.
///
/// # Panics
/// When there is none, or the data are wrong.
pub fn take_at(address: &str, word: &[u8]) -> io::Result<u64> {
    let mut stream = connect(address);
    stream.write_all(word)?;
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0u64;
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok(at);
        }
        for &byte in &buffer[..n] {
            assert_eq!(byte, pattern(at), "byte {at}");
            at += 1;
        }
    }
}
