//! Faults on control messages: the sender waits in `sendmsg` while the harness decides what arrives,
//! when and how often. What the harness sends itself goes over a duplicate of the sender's socket.

use super::{Engine, Seen, locked};
use crate::notify::{Notification, read, take_descriptor};
use crate::points::When;
use crate::random::{Dice, Planned};
use crate::scenario::Action;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, UnixCredentials, sendmsg};
use nix::unistd::Pid;
use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a message that is to come after the next one waits for it: on many channels there is none.
const REORDER_PATIENCE: Duration = Duration::from_millis(400);
/// Most descriptors of a message, and most parts.
const PARTS_MAX: u64 = 64;

/// A message as its sender wants it sent.
#[derive(Debug)]
pub(super) struct Packet {
    pub(super) bytes: Vec<u8>,
    pid: i32,
    fd: RawFd,
    inode: u64,
    address: Option<String>,
    fds: Vec<RawFd>,
    flags: i32,
}

/// A message in our hands.
#[derive(Debug)]
struct Held {
    due: Instant,
    bytes: Vec<u8>,
    socket: OwnedFd,
    address: Option<UnixAddr>,
    fds: Vec<OwnedFd>,
    sender: UnixCredentials,
    flags: MsgFlags,
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at + 8)?.try_into().ok()?;
    Some(u64::from_ne_bytes(word))
}

impl Packet {
    /// Reads `sendmsg`'s arguments from its caller's memory.
    pub(super) fn read(n: &Notification, pid: i32, fd: RawFd, inode: u64) -> Option<Self> {
        let header = read(n.thread, n.arguments[1], 56).ok()?;
        let (parts_at, parts) = (word(&header, 16)?, word(&header, 24)?.min(PARTS_MAX));
        let mut bytes = Vec::new();
        for part in 0..parts {
            let part = read(n.thread, parts_at + part * 16, 16).ok()?;
            let len = usize::try_from(word(&part, 8)?).ok()?;
            if bytes.len() + len > super::MESSAGE_BYTES_MAX {
                return None;
            }
            bytes.extend(read(n.thread, word(&part, 0)?, len).ok()?);
        }
        let name_len = usize::try_from(word(&header, 8)? & 0xffff_ffff).ok()?;
        let address = match word(&header, 0)? {
            0 => None,
            at => Some(path_of(&read(n.thread, at, name_len.min(110)).ok()?)?),
        };
        let control_len = usize::try_from(word(&header, 40)?).ok()?.min(4096);
        let fds = match word(&header, 32)? {
            0 => Vec::new(),
            at => descriptors(&read(n.thread, at, control_len).ok()?),
        };
        let flags = i32::try_from(n.arguments[2]).ok()?;
        let packet = Self {
            bytes,
            pid,
            fd,
            inode,
            address,
            fds,
            flags,
        };
        n.is_valid().then_some(packet)
    }

    pub(super) fn has_address(&self) -> bool {
        self.address.is_some()
    }

    /// Takes everything that belongs to the message, so that it can be sent without its sender.
    fn take(&self, due: Instant) -> Result<Held, Errno> {
        let fds = self.fds.iter().map(|&fd| take_descriptor(self.pid, fd));
        // The path goes through the sender's own descriptors.
        let address = self.address.as_ref().map(|path| {
            let own = format!("/proc/{}/", self.pid);
            UnixAddr::new(path.replace("/proc/self/", &own).as_str())
        });
        Ok(Held {
            due,
            bytes: self.bytes.clone(),
            socket: take_descriptor(self.pid, self.fd)?,
            address: address.transpose()?,
            fds: fds.collect::<Result<_, _>>()?,
            sender: credentials(self.pid).ok_or(Errno::ESRCH)?,
            flags: MsgFlags::from_bits_truncate(self.flags),
        })
    }
}

/// The path of a `sockaddr_un`.
fn path_of(address: &[u8]) -> Option<String> {
    let path = address.get(2..)?;
    let end = path.iter().position(|&b| b == 0).unwrap_or(path.len());
    String::from_utf8(path.get(..end)?.to_vec()).ok()
}

/// The descriptors of a control buffer's SCM_RIGHTS.
fn descriptors(control: &[u8]) -> Vec<RawFd> {
    const HEADER: usize = 16;
    let mut fds = Vec::new();
    let mut at = 0;
    while let Some(len) = word(control, at).and_then(|len| usize::try_from(len).ok()) {
        let kind = word(control, at + 8);
        let rights = u64::from(libc::SOL_SOCKET.cast_unsigned())
            | u64::from(libc::SCM_RIGHTS.cast_unsigned()) << 32;
        if len < HEADER {
            break;
        }
        if kind == Some(rights) {
            let data = control.get(at + HEADER..at + len).unwrap_or_default();
            let numbers = data.chunks_exact(4).filter_map(|n| n.try_into().ok());
            fds.extend(numbers.map(RawFd::from_ne_bytes));
        }
        at += len.next_multiple_of(8);
    }
    fds
}

/// The sender as the kernel would name it: a broker asks who answers it.
fn credentials(pid: i32) -> Option<UnixCredentials> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let id = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<u32>().ok()
    };
    let (uid, gid) = (id("Uid:")?, id("Gid:")?);
    Some(UnixCredentials::from(libc::ucred { pid, uid, gid }))
}

impl Held {
    fn send(&self) -> Result<usize, Errno> {
        let raw: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut control = vec![ControlMessage::ScmCredentials(&self.sender)];
        if !raw.is_empty() {
            control.push(ControlMessage::ScmRights(&raw));
        }
        let socket = self.socket.as_raw_fd();
        let bytes = [IoSlice::new(&self.bytes)];
        sendmsg(socket, &bytes, &control, self.flags, self.address.as_ref())
    }
}

/// What is kept back of each channel, by the inode of the sender's socket.
#[derive(Debug, Default)]
pub(super) struct Lanes(Mutex<HashMap<u64, Lane>>);

#[derive(Debug, Default)]
struct Lane {
    delayed: VecDeque<Held>,
    /// Goes after the next one.
    swapped: Option<Held>,
}

impl Lanes {
    /// Sends what is due of a channel.
    fn flush(&self, inode: u64) {
        let mut lanes = locked(&self.0);
        let Some(lane) = lanes.get_mut(&inode) else {
            return;
        };
        let now = Instant::now();
        while let Some(held) = lane.delayed.pop_front_if(|held| held.due <= now) {
            // Whoever should get it may be dead.
            let _gone = held.send();
        }
    }

    /// Sends a message that nobody came after.
    fn give_up(&self, inode: u64) {
        let mut lanes = locked(&self.0);
        if let Some(held) = lanes.get_mut(&inode).and_then(|lane| lane.swapped.take()) {
            let _gone = held.send();
        }
    }

    /// Puts a message behind those that wait for their time; gives it back when there are none.
    fn queue(&self, inode: u64, mut held: Held) -> Option<Held> {
        let mut lanes = locked(&self.0);
        let Some(lane) = lanes
            .get_mut(&inode)
            .filter(|lane| !lane.delayed.is_empty())
        else {
            return Some(held);
        };
        let last = lane.delayed.back().map_or(held.due, |last| last.due);
        held.due = held.due.max(last);
        lane.delayed.push_back(held);
        None
    }

    fn is_busy(&self, inode: u64) -> bool {
        let lanes = locked(&self.0);
        lanes
            .get(&inode)
            .is_some_and(|lane| !lane.delayed.is_empty() || lane.swapped.is_some())
    }
}

/// A control message is about to be sent.
pub(super) fn seen(engine: &Arc<Engine>, packet: Packet, seen: Seen, n: Notification) {
    let place = seen.known.place();
    let names = ["before", "after"].map(|when| format!("{}:{when}", seen.name));
    let before = engine.meet(&seen.occurrence(When::Before, &names[0], &place));
    let after = engine.meet(&seen.occurrence(When::After, &names[1], &place));
    if before.is_empty() && after.is_empty() && !engine.lanes.is_busy(packet.inode) {
        return n.go_on();
    }
    for planned in before.iter().chain(&after) {
        let target = match planned.fault.action {
            Action::Kill | Action::Stop => {
                format!(
                    " the {:?}",
                    planned.fault.who.unwrap_or(crate::scenario::Who::Sender)
                )
            }
            _ => String::new(),
        };
        let (id, vm) = (planned.id, &seen.known.vm);
        let about = format!("{vm}/{}", seen.known.id);
        let what = format!(
            "{:?}{target} at {} ({about})",
            planned.fault.action, planned.fault.point
        );
        engine.timeline.injected(id, what);
    }
    // Whatever may wait does so in a thread of its own.
    let engine = Arc::clone(engine);
    std::thread::spawn(move || inject(&engine, &packet, &seen, n, &before, &after));
}

fn inject(
    engine: &Arc<Engine>,
    packet: &Packet,
    seen: &Seen,
    n: Notification,
    before: &[Planned],
    after: &[Planned],
) {
    for planned in before {
        strike(engine, seen, planned);
    }
    let manipulated = before
        .iter()
        .find(|p| !matches!(p.fault.action, Action::Kill | Action::Stop));
    let sent = match (
        manipulated,
        after.is_empty() && !engine.lanes.is_busy(packet.inode),
    ) {
        (None, true) => return n.go_on(),
        (None, false) => deliver(engine, packet),
        (Some(planned), _) => manipulate(engine, packet, planned),
    };
    if sent.is_ok() {
        for planned in after {
            strike(engine, seen, planned);
        }
    }
    match sent {
        Ok(()) => n.returns(i64::try_from(packet.bytes.len()).unwrap_or(0)),
        Err(errno) => n.fails(errno),
    }
}

/// Kills or stops whom a fault is about. Waits while the sender is stopped: its call is still before
/// or behind it.
fn strike(engine: &Engine, seen: &Seen, planned: &Planned) {
    let fault = &planned.fault;
    let Some(target) = seen.parties.of(fault.who) else {
        return engine
            .rules()
            .failed(planned.id, "there was no such process".to_owned());
    };
    let time = Duration::from_millis(fault.ms.unwrap_or(0));
    match fault.action {
        Action::Kill => engine.kill(target, fault),
        Action::Stop if target == seen.parties.sender => {
            let pid = Pid::from_raw(target);
            let _dead = kill(pid, Signal::SIGSTOP);
            std::thread::sleep(time);
            let _dead = kill(pid, Signal::SIGCONT);
        }
        Action::Stop => engine.stop_for(target, time),
        _ => {}
    }
}

/// Sends a message in its turn.
fn deliver(engine: &Engine, packet: &Packet) -> Result<(), Errno> {
    let held = packet.take(Instant::now())?;
    let Some(held) = engine.lanes.queue(packet.inode, held) else {
        return Ok(());
    };
    held.send()?;
    engine.lanes.give_up(packet.inode);
    Ok(())
}

fn manipulate(engine: &Arc<Engine>, packet: &Packet, planned: &Planned) -> Result<(), Errno> {
    let time = Duration::from_millis(planned.fault.ms.unwrap_or(0));
    let inode = packet.inode;
    match planned.fault.action {
        Action::Drop => Ok(()),
        Action::Duplicate => {
            deliver(engine, packet)?;
            deliver(engine, packet)
        }
        Action::Delay => {
            let held = packet.take(Instant::now() + time)?;
            locked(&engine.lanes.0)
                .entry(inode)
                .or_default()
                .delayed
                .push_back(held);
            later(engine, time, move |engine| engine.lanes.flush(inode));
            Ok(())
        }
        Action::Reorder => {
            let held = packet.take(Instant::now())?;
            let mut lanes = locked(&engine.lanes.0);
            let before = lanes.entry(inode).or_default().swapped.replace(held);
            drop(lanes);
            if let Some(before) = before {
                let _gone = before.send();
            }
            later(engine, REORDER_PATIENCE, move |engine| {
                engine.lanes.give_up(inode);
            });
            Ok(())
        }
        Action::Corrupt | Action::Truncate => {
            let mut held = packet.take(Instant::now())?;
            spoil(&mut held.bytes, planned);
            match engine.lanes.queue(inode, held) {
                Some(held) => held.send().map(|_| ()),
                None => Ok(()),
            }
        }
        _ => deliver(engine, packet),
    }
}

/// Flips bits, or cuts the end off.
fn spoil(bytes: &mut Vec<u8>, planned: &Planned) {
    let mut dice = Dice::new(planned.seed);
    let len = bytes.len() as u64;
    if planned.fault.action == Action::Truncate {
        let keep = planned
            .fault
            .bytes
            .unwrap_or(len / 2)
            .min(len.saturating_sub(1));
        // A packet without a byte is the end of the connection.
        bytes.truncate(usize::try_from(keep.max(1)).unwrap_or(1));
        return;
    }
    for _ in 0..dice.between(1, 3) {
        let at = dice.between(0, len.saturating_sub(1));
        let bit = 1u8 << dice.between(0, 7);
        let byte = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at));
        if let Some(byte) = byte {
            *byte ^= bit;
        }
    }
}

fn later(engine: &Arc<Engine>, time: Duration, then: impl FnOnce(&Engine) + Send + 'static) {
    let engine = Arc::clone(engine);
    std::thread::spawn(move || {
        std::thread::sleep(time);
        then(&engine);
    });
}
