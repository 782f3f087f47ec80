//! Runs inside of a Linux guest, for `e2e/vsock.rs`: `vsock-probe echo PORT COUNT` sends back what COUNT connections
//! to PORT send, `vsock-probe ask PORT BYTES` connects to PORT of the host, sends bytes of a pattern, and verifies
//! that they come back. It is in the initial RAM disk, so it links to nothing.
#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test's program: what it prints is the result, and a failure is a panic"
)]

use nix::libc::{VMADDR_CID_ANY, VMADDR_CID_HOST};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockType, VsockAddr, accept, bind,
    connect, listen, recv, send, shutdown, socket,
};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

// Not by way of the library of the tests, which is too much for a RAM disk.
#[path = "../guests/src/pattern.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    reason = "the test guest's, of which one function is used"
)]
mod pattern;
#[path = "../guests/src/prng.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    clippy::cast_possible_truncation,
    reason = "the test guest's, which the patterns use"
)]
mod prng;
use pattern::stream_byte;

const SEED: u64 = 9;

fn stream() -> OwnedFd {
    let family = AddressFamily::Vsock;
    socket(family, SockType::Stream, SockFlag::empty(), None).unwrap()
}

fn send_all(to: RawFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let n = send(to, bytes, MsgFlags::MSG_NOSIGNAL).unwrap();
        bytes = &bytes[n..];
    }
}

fn echo(port: u32, count: u32) {
    let listener = stream();
    let address = VsockAddr::new(VMADDR_CID_ANY, port);
    bind(listener.as_raw_fd(), &address).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    println!("probe: listening");
    for _ in 0..count {
        let client = accept(listener.as_raw_fd()).unwrap();
        let (mut buffer, mut bytes) = (vec![0; 1 << 16], 0);
        loop {
            let n = match recv(client, &mut buffer, MsgFlags::empty()) {
                Ok(0) => break,
                Ok(n) => n,
                Err(errno) => {
                    println!("probe: {errno}");
                    return;
                }
            };
            send_all(client, &buffer[..n]);
            bytes += n;
        }
        shutdown(client, Shutdown::Write).unwrap();
        println!("probe: echoed {bytes}");
    }
}

fn ask(port: u32, bytes: u64) {
    let host = stream();
    let fd = host.as_raw_fd();
    if let Err(errno) = connect(fd, &VsockAddr::new(VMADDR_CID_HOST, port)) {
        println!("probe: {errno}");
        return;
    }
    let sender = std::thread::spawn(move || {
        let all: Vec<u8> = (0..bytes).map(|place| stream_byte(SEED, place)).collect();
        send_all(fd, &all);
        shutdown(fd, Shutdown::Write).unwrap();
    });
    let (mut buffer, mut place) = (vec![0; 1 << 16], 0);
    loop {
        let n = recv(fd, &mut buffer, MsgFlags::empty()).unwrap();
        if n == 0 {
            break;
        }
        for &byte in &buffer[..n] {
            assert_eq!(byte, stream_byte(SEED, place), "byte {place}");
            place += 1;
        }
    }
    sender.join().unwrap();
    println!("probe: verified {place}");
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| {
        arguments
            .get(at)
            .and_then(|word| word.parse().ok())
            .unwrap()
    };
    match arguments.get(1).map(String::as_str) {
        Some("echo") => echo(number(2), number(3)),
        Some("ask") => ask(number(2), number(3).into()),
        _ => println!("probe: echo PORT COUNT, or ask PORT BYTES"),
    }
}
