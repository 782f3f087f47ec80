//! What stands between an operator and a daemon: a socket at which every request of the API is looked at
//! before the daemon gets it, and every answer before the operator does.

use crate::api;
use crate::inject::{Engine, Occurrence};
use crate::points::{Point, When};
use crate::random::{Dice, Planned};
use crate::scenario::Action;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Longest request: the daemon takes heads of 16 KiB and bodies of 4 MiB.
const REQUEST_BYTES_MAX: usize = 5 << 20;
/// How long a request may take to come in.
const PATIENCE: Duration = Duration::from_secs(10);

/// The socket. Dropping it closes it; what is on its way goes on.
#[derive(Debug)]
pub(super) struct Front {
    path: PathBuf,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What a connection needs to know.
#[derive(Debug)]
struct Desk {
    daemon: PathBuf,
    host: usize,
    engine: Arc<Engine>,
}

impl Front {
    /// Opens the socket `path` in front of that of a host's daemon.
    pub(super) fn open(
        path: PathBuf,
        daemon: PathBuf,
        host: usize,
        engine: &Arc<Engine>,
    ) -> io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let desk = Arc::new(Desk {
            daemon,
            host,
            engine: Arc::clone(engine),
        });
        let thread = std::thread::spawn(move || {
            for client in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (desk, Ok(client)) = (Arc::clone(&desk), client) else {
                    continue;
                };
                std::thread::spawn(move || {
                    // An operator or a daemon that is gone has nothing to be told.
                    let _gone = desk.serve(client);
                });
            }
        });
        Ok(Self {
            path,
            is_over,
            thread: Some(thread),
        })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _woken = UnixStream::connect(&self.path);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

impl Desk {
    fn serve(&self, mut client: UnixStream) -> io::Result<()> {
        client.set_read_timeout(Some(PATIENCE))?;
        let mut request = read_request(&mut client)?;
        client.set_read_timeout(None)?;
        let asked = api::operation(&request);
        let mut copies = 1;
        let mut cut = false;
        for planned in self.meet(asked.as_ref(), When::Before) {
            match planned.fault.action {
                Action::Drop => return Ok(()),
                Action::Duplicate => copies += 1,
                Action::Corrupt => spoil_method(&mut request, planned.seed),
                Action::Truncate => {
                    request.truncate(length(&planned, request.len()));
                    cut = true;
                }
                _ => self.act(&planned),
            }
        }
        for _ in 1..copies {
            let mut daemon = UnixStream::connect(&self.daemon)?;
            daemon.write_all(&request)?;
            daemon.read_to_end(&mut Vec::new())?;
        }
        let mut daemon = UnixStream::connect(&self.daemon)?;
        daemon.write_all(&request)?;
        if cut {
            daemon.shutdown(Shutdown::Write)?;
        }
        // The answer has begun when its first bytes are there.
        let mut begin = vec![0; 64 << 10];
        let len = daemon.read(&mut begin)?;
        begin.truncate(len);
        let mut cut = false;
        for planned in self.meet(asked.as_ref(), When::After) {
            match planned.fault.action {
                Action::Drop => return Ok(()),
                Action::Truncate => {
                    begin.truncate(length(&planned, begin.len()));
                    cut = true;
                }
                _ => self.act(&planned),
            }
        }
        client.write_all(&begin)?;
        if cut {
            return Ok(());
        }
        both_ways(&client, &daemon)
    }

    fn meet(&self, asked: Option<&(&'static str, Option<String>)>, when: When) -> Vec<Planned> {
        let Some((operation, vm)) = asked else {
            return Vec::new();
        };
        let moment = if when == When::Before {
            "before"
        } else {
            "after"
        };
        let name = format!("{operation}:{moment}");
        let hits = self.engine.meet(&Occurrence {
            point: Point::Api(operation, when),
            name: &name,
            host: self.host,
            vm: vm.as_deref(),
            process: None,
            is_anonymous: false,
        });
        for planned in &hits {
            let whom = vm.as_deref().unwrap_or("-");
            let what = format!("{:?} at {name} ({whom})", planned.fault.action);
            self.engine.timeline.injected(planned.id, what);
        }
        hits
    }

    fn act(&self, planned: &Planned) {
        let time = Duration::from_millis(planned.fault.ms.unwrap_or(0));
        let broker = self.engine.directory.broker(self.host);
        match (planned.fault.action, broker) {
            (Action::Delay, _) => std::thread::sleep(time),
            (Action::Kill, Some(broker)) => self.engine.kill(broker, &planned.fault),
            (Action::Stop, Some(broker)) => self.engine.stop_for(broker, time),
            _ => {}
        }
    }
}

/// How much is left of `len` bytes: what the fault says, or half.
fn length(planned: &Planned, len: usize) -> usize {
    let bytes = planned
        .fault
        .bytes
        .and_then(|bytes| usize::try_from(bytes).ok());
    bytes.unwrap_or(len / 2).min(len)
}

/// Makes the method of a request one that there is none of: no other request comes of it.
fn spoil_method(request: &mut [u8], seed: u64) {
    let at = usize::try_from(Dice::new(seed).between(0, 2)).unwrap_or(0);
    if let Some(byte) = request.get_mut(at) {
        *byte ^= 0x80;
    }
}

/// Reads one request with its body.
fn read_request(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    let mut some = [0; 4096];
    loop {
        if let Some(whole) = whole_length(&request)
            && request.len() >= whole
        {
            return Ok(request);
        }
        let len = from.read(&mut some)?;
        if len == 0 || request.len() > REQUEST_BYTES_MAX {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        request.extend_from_slice(some.get(..len).unwrap_or_default());
    }
}

/// How long a request is of which at least the head is there.
fn whole_length(request: &[u8]) -> Option<usize> {
    let head = request.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let text = std::str::from_utf8(request.get(..head)?).ok()?;
    let mut lines = text.lines();
    let body = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let is_length = name.eq_ignore_ascii_case("content-length");
        is_length.then(|| value.trim().parse::<usize>().ok())?
    });
    head.checked_add(body.unwrap_or(0))
}

/// Copies in both directions until both ends are closed.
fn both_ways(client: &UnixStream, daemon: &UnixStream) -> io::Result<()> {
    let (mut from_client, mut to_daemon) = (client.try_clone()?, daemon.try_clone()?);
    let upwards = std::thread::spawn(move || {
        let _closed = io::copy(&mut from_client, &mut to_daemon);
        let _closed = to_daemon.shutdown(Shutdown::Write);
    });
    let (mut from_daemon, mut to_client) = (daemon, client);
    let _closed = io::copy(&mut from_daemon, &mut to_client);
    let _closed = client.shutdown(Shutdown::Both);
    let _panicked = upwards.join();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_read_with_its_body_and_no_further() {
        let text = b"POST /v1/vms HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody";
        assert_eq!(read_request(&mut &text[..]).unwrap(), text);
        let bare = b"GET /v1/vms HTTP/1.1\r\nhost: x\r\n\r\n";
        assert_eq!(read_request(&mut &bare[..]).unwrap(), bare);
        for cut in [0, 10, text.len() - 1] {
            read_request(&mut &text[..cut]).unwrap_err();
        }
    }

    #[test]
    fn spoiled_method_is_none() {
        for seed in 0..9 {
            let mut request = b"GET /v1/vms HTTP/1.1\r\n\r\n".to_vec();
            spoil_method(&mut request, seed);
            assert_eq!(api::operation(&request), None);
        }
        spoil_method(&mut [], 1);
    }
}
