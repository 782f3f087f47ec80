//! Traffic between two hosts, with a checker: records over TCP, each of which must arrive once, in order and
//! with its own content, however bad the network is; and datagrams over UDP, which show how bad it was.

use super::Namespace;
use crate::random::Dice;
use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where the receiving host listens.
const PORT: u16 = 7700;
/// Bytes of a record: its number and what the seed makes of that.
const RECORD_BYTES: usize = 512;
/// Time between two records, and between two datagrams.
const INTERVAL: Duration = Duration::from_millis(5);
/// How long the last record may take after the traffic ends: TCP sends again after seconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a read waits until it looks whether all is over.
const POLL: Duration = Duration::from_millis(20);

/// What a link has shown.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkReport {
    /// Records that arrived as they were sent.
    pub records: u64,
    /// Datagrams that were sent.
    pub sent: u64,
    /// Those of them that arrived.
    pub arrived: u64,
    /// Datagrams that arrived again.
    pub again: u64,
    /// Datagrams that arrived after a later one.
    pub late: u64,
    /// Longest time without a datagram: between two of them, or behind the last one until the traffic ended.
    pub silence: Duration,
    /// What was wrong.
    pub errors: Vec<String>,
}

/// Traffic that goes on until it is ended.
#[derive(Debug)]
pub struct Link {
    is_over: Arc<AtomicBool>,
    /// Sends records, and returns how many.
    sender: JoinHandle<io::Result<u64>>,
    receiver: JoinHandle<io::Result<Received>>,
    /// Sends datagrams, and returns how many. Records wait for those before them, these for nothing.
    sprinkler: JoinHandle<u64>,
    datagrams: JoinHandle<io::Result<Datagrams>>,
}

#[derive(Debug, Default)]
struct Received {
    records: u64,
    error: Option<String>,
}

/// What was seen of numbered datagrams.
#[derive(Debug, Default)]
struct Datagrams {
    seen: BTreeSet<u64>,
    again: u64,
    late: u64,
    silence: Duration,
    last: Option<Instant>,
}

impl Datagrams {
    fn see(&mut self, number: u64, now: Instant) {
        self.end(now);
        self.last = Some(now);
        if self.seen.last().is_some_and(|last| number < *last) && !self.seen.contains(&number) {
            self.late += 1;
        }
        if !self.seen.insert(number) {
            self.again += 1;
        }
    }

    /// Counts the time since the last datagram as silence.
    fn end(&mut self, now: Instant) {
        if let Some(last) = self.last {
            self.silence = self.silence.max(now.saturating_duration_since(last));
        }
    }
}

/// Record `number` of a seed.
fn record(seed: u64, number: u64) -> [u8; RECORD_BYTES] {
    let mut dice = Dice::new(seed ^ number.rotate_left(32));
    let mut bytes = [0; RECORD_BYTES];
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&dice.roll().to_le_bytes());
    }
    if let Some(head) = bytes.first_chunk_mut::<8>() {
        *head = number.to_le_bytes();
    }
    bytes
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

impl Link {
    /// Starts traffic from one host to another.
    ///
    /// # Errors
    /// When the namespaces cannot be entered, or the sockets not be made.
    pub fn start(from: &Namespace, to: &Namespace, seed: u64) -> io::Result<Self> {
        let is_over = Arc::new(AtomicBool::new(false));
        let over = || Arc::clone(&is_over);
        let there = SocketAddr::from((to.address, PORT));
        let (listener, socket) =
            to.within(|| io::Result::Ok((TcpListener::bind(there)?, UdpSocket::bind(there)?)))??;
        listener.set_nonblocking(true)?;
        socket.set_read_timeout(Some(POLL))?;
        let outgoing = from.within(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
        let (receiving, listening, sending, sprinkling) = (over(), over(), over(), over());
        let receiver = std::thread::spawn(move || receive(&listener, seed, &receiving));
        let datagrams = std::thread::spawn(move || listen(&socket, &listening));
        let sprinkler = std::thread::spawn(move || sprinkle(&outgoing, there, &sprinkling));
        // Whoever connects must be in the namespace.
        let sender = from.within(|| std::thread::spawn(move || send(there, seed, &sending)))?;
        Ok(Self {
            is_over,
            sender,
            receiver,
            sprinkler,
            datagrams,
        })
    }

    /// Ends the traffic, waits for what is on its way, and judges.
    #[must_use]
    pub fn end(self) -> LinkReport {
        self.is_over.store(true, Ordering::SeqCst);
        let mut report = LinkReport::default();
        let mut failed = |what: &str, error: io::Error| {
            report.errors.push(format!("{what}: {error}"));
        };
        let sent = joined(self.sender).and_then(|sent| sent);
        let sent = sent.map_err(|error| failed("sending records", error));
        let received = joined(self.receiver).and_then(|received| received);
        let received = received.map_err(|error| failed("receiving records", error));
        let datagrams = joined(self.datagrams).and_then(|datagrams| datagrams);
        let datagrams = datagrams.map_err(|error| failed("receiving datagrams", error));
        let sprinkled = joined(self.sprinkler);
        let sprinkled = sprinkled.map_err(|error| failed("sending datagrams", error));
        let (sent, received) = (sent.unwrap_or_default(), received.unwrap_or_default());
        let datagrams = datagrams.unwrap_or_default();
        report.records = received.records;
        report.errors.extend(received.error);
        if sent != received.records {
            report.errors.push(format!(
                "{sent} records were sent and {} arrived",
                received.records
            ));
        }
        if received.records == 0 {
            report.errors.push("no record was verified".to_owned());
        }
        report.sent = sprinkled.unwrap_or_default();
        report.arrived = u64::try_from(datagrams.seen.len()).unwrap_or(u64::MAX);
        report.again = datagrams.again;
        report.late = datagrams.late;
        report.silence = datagrams.silence;
        report
    }
}

fn joined<T>(thread: JoinHandle<T>) -> io::Result<T> {
    let panicked = |_| io::Error::other("a thread panicked");
    thread.join().map_err(panicked)
}

/// Sends datagrams until all is over.
fn sprinkle(socket: &UdpSocket, there: SocketAddr, is_over: &AtomicBool) -> u64 {
    let mut sent: u64 = 0;
    while !is_over.load(Ordering::SeqCst) {
        // One that the kernel has no room for is one that is lost.
        let _lost = socket.send_to(&sent.to_le_bytes(), there);
        sent += 1;
        std::thread::sleep(INTERVAL);
    }
    sent
}

/// Sends records until all is over, then waits until the last one was confirmed.
fn send(there: SocketAddr, seed: u64, is_over: &AtomicBool) -> io::Result<u64> {
    let mut stream = TcpStream::connect_timeout(&there, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut sent = 0;
    while !is_over.load(Ordering::SeqCst) {
        stream.write_all(&record(seed, sent))?;
        sent += 1;
        std::thread::sleep(INTERVAL);
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // The receiver closes its end when it has everything.
    let rest = stream.read(&mut [0])?;
    match rest {
        0 => Ok(sent),
        _ => Err(io::Error::other("the receiver sends something")),
    }
}

/// Verifies records until the sender closes.
fn receive(listener: &TcpListener, seed: u64, is_over: &AtomicBool) -> io::Result<Received> {
    let mut received = Received::default();
    let mut stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if is_timeout(&error) && !is_over.load(Ordering::SeqCst) => {
                std::thread::sleep(POLL);
            }
            Err(error) => return Err(error),
        }
    };
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(POLL))?;
    let mut bytes = [0; RECORD_BYTES];
    let mut have = 0;
    let mut end = None;
    while let Some(room) = bytes.get_mut(have..) {
        match stream.read(room) {
            Ok(0) => break,
            Ok(more) => have += more,
            Err(error) if is_timeout(&error) => {
                // What is on its way when all is over has its time.
                let over = is_over.load(Ordering::SeqCst);
                let end = end.get_or_insert_with(|| Instant::now() + PATIENCE);
                if !over {
                    *end = Instant::now() + PATIENCE;
                } else if Instant::now() > *end {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
        if have == RECORD_BYTES {
            if bytes != record(seed, received.records) {
                received.error = Some(format!("record {} is not what was sent", received.records));
                break;
            }
            received.records += 1;
            have = 0;
        }
    }
    if have != 0 && received.error.is_none() {
        received.error = Some(format!("record {} was cut", received.records));
    }
    Ok(received)
}

/// Counts datagrams until all is over.
fn listen(socket: &UdpSocket, is_over: &AtomicBool) -> io::Result<Datagrams> {
    let mut datagrams = Datagrams::default();
    let mut bytes = [0; 16];
    loop {
        match socket.recv(&mut bytes) {
            Ok(8) => {
                if let Some(number) = bytes.first_chunk::<8>() {
                    datagrams.see(u64::from_le_bytes(*number), Instant::now());
                }
            }
            Ok(_) => {}
            // What was delayed may still come: as long as the last look takes.
            Err(error) if is_timeout(&error) => {
                if is_over.load(Ordering::SeqCst) {
                    datagrams.end(Instant::now());
                    return Ok(datagrams);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_that_come_late_or_again_are_told_apart() {
        let mut datagrams = Datagrams::default();
        for number in [0, 2, 1, 2, 5] {
            datagrams.see(number, Instant::now());
        }
        assert_eq!((datagrams.late, datagrams.again), (1, 1));
        assert_eq!(datagrams.seen.len(), 4);
    }

    #[test]
    fn silence_is_counted_between_datagrams_and_behind_the_last_one() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut datagrams = Datagrams::default();
        datagrams.end(at(9));
        assert_eq!(datagrams.silence, Duration::ZERO);
        datagrams.see(0, at(10));
        datagrams.see(1, at(30));
        datagrams.see(2, at(35));
        datagrams.end(at(40));
        assert_eq!(datagrams.silence, Duration::from_millis(20));
        datagrams.end(at(735));
        assert_eq!(datagrams.silence, Duration::from_millis(700));
    }

    #[test]
    fn records_differ_by_number_and_seed() {
        assert_eq!(record(1, 2), record(1, 2));
        assert_ne!(record(1, 2)[8..], record(1, 3)[8..]);
        assert_ne!(record(1, 2)[8..], record(2, 2)[8..]);
    }
}
