//! Claims about a server that takes the place of one that died at any moment, made by a client that gives it the
//! last request again, as a gate does.

use crate::server::Held;
use crate::wire::{self, op};
use crate::{Access, Server, Terms, front_bytes};
use bulkhead_runtime::Kept;
use nix::errno::Errno;
use std::fs;
use std::io::Write;
use std::path::Path;
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

const BYTES: usize = 16 << 20;
/// Where the journal says how much of it counts.
const COUNTS: usize = 8;
/// Bytes of the record that announces a change.
const BEGUN_BYTES: u64 = 48;

struct Guest {
    folder: TempDir,
    kept: Kept,
    server: Server,
    number: u64,
    last: Vec<u8>,
    /// The last answer, as it was.
    told: Vec<u8>,
}

type Answer = Result<Vec<u8>, Errno>;

fn server(folder: &Path, kept: &Kept) -> Server {
    let folder = fs::File::open(folder).unwrap().into();
    let kept = Some(kept.clone());
    Server::new(folder, Access::ReadWrite, Terms::default(), kept).unwrap()
}

fn numbered(server: &mut Server, request: (u64, &[u8]), room: usize, answer: &mut Vec<u8>) {
    let (number, request) = request;
    let (front, given) = request.split_at(front_bytes(request).min(request.len()));
    let mut data = Held::new(given);
    let filled = server.serve_numbered(number, front, &mut data, room, answer);
    answer.extend_from_slice(&data.got[..filled]);
}

impl Guest {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kept = Kept::of_its_own(BYTES);
        let server = server(folder.path(), &kept);
        let mut guest = Self {
            folder,
            kept,
            server,
            number: 0,
            last: Vec::new(),
            told: Vec::new(),
        };
        let init = wire::InitIn {
            major: 7,
            minor: 31,
            readahead: 0,
            flags: 0,
        };
        guest.ask(op::INIT, 0, &[init.as_bytes()]).unwrap();
        guest
    }

    fn serve(&mut self) -> Answer {
        let mut answer = Vec::new();
        let request = (self.number, &self.last[..]);
        numbered(&mut self.server, request, 1 << 20, &mut answer);
        self.told.clone_from(&answer);
        let (out, rest) = wire::OutHeader::read_from_prefix(&answer).unwrap();
        match out.error {
            0 => Ok(rest.to_vec()),
            error => Err(Errno::from_raw(-error)),
        }
    }

    fn ask(&mut self, opcode: u32, node: u64, parts: &[&[u8]]) -> Answer {
        let body = parts.concat();
        let header = wire::InHeader {
            len: u32::try_from(40 + body.len()).unwrap(),
            opcode,
            node,
            unique: 7,
            ..Default::default()
        };
        self.number += 1;
        self.last = [header.as_bytes(), &body].concat();
        self.serve()
    }

    /// The process dies after it has told the last answer, or before if it is asked again.
    fn die(&mut self) {
        self.server = server(self.folder.path(), &self.kept);
    }

    /// The same, but right after the change was made: nothing that came after its announcement counts.
    fn die_in_the_middle(&mut self, counted_before: u64) {
        self.kept.store(COUNTS, counted_before + BEGUN_BYTES);
        self.die();
    }

    fn counted(&self) -> u64 {
        self.kept.load(COUNTS)
    }

    fn create(&mut self, name: &str, flags: u32) -> Result<(u64, u64), Errno> {
        let asked = wire::CreateIn {
            flags,
            mode: 0o644,
            ..Default::default()
        };
        let answer = self.ask(op::CREATE, 1, &[asked.as_bytes(), name.as_bytes(), b"\0"])?;
        let (entry, rest) = wire::EntryOut::read_from_prefix(&answer).unwrap();
        let opened = wire::OpenOut::read_from_bytes(rest).unwrap();
        Ok((entry.node, opened.handle))
    }

    fn write(&mut self, handle: u64, offset: u64, data: &[u8]) -> Answer {
        self.write_as(handle, offset, 0, data)
    }

    fn write_as(&mut self, handle: u64, offset: u64, flags: u32, data: &[u8]) -> Answer {
        let asked = wire::WriteIn {
            handle,
            offset,
            flags,
            size: u32::try_from(data.len()).unwrap(),
            ..Default::default()
        };
        self.ask(op::WRITE, 0, &[asked.as_bytes(), data])
    }

    fn read(&mut self, handle: u64) -> Answer {
        let asked = wire::ReadIn {
            handle,
            size: 4096,
            ..Default::default()
        };
        self.ask(op::READ, 0, &[asked.as_bytes()])
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }
}

/// A change that must not be made twice: what it is asked with, and whether it has been made.
struct Change {
    opcode: u32,
    ask: fn(&mut Guest) -> Answer,
    is_made: fn(&Guest) -> bool,
}

fn changes() -> Vec<Change> {
    let change = |opcode, ask, is_made| Change {
        opcode,
        ask,
        is_made,
    };
    vec![
        change(
            op::MKDIR,
            |guest| {
                let asked = wire::MkdirIn {
                    mode: 0o755,
                    umask: 0,
                };
                guest.ask(op::MKDIR, 1, &[asked.as_bytes(), b"new\0"])
            },
            |guest| guest.path("new").is_dir(),
        ),
        change(
            op::MKNOD,
            |guest| {
                let asked = wire::MknodIn {
                    mode: 0o100_644,
                    ..Default::default()
                };
                guest.ask(op::MKNOD, 1, &[asked.as_bytes(), b"new\0"])
            },
            |guest| guest.path("new").is_file(),
        ),
        change(
            op::SYMLINK,
            |guest| guest.ask(op::SYMLINK, 1, &[b"new\0away\0"]),
            |guest| guest.path("new").is_symlink(),
        ),
        change(
            op::CREATE,
            |guest| guest.create("new", 0o302).map(|_| Vec::new()),
            |guest| guest.path("new").is_file(),
        ),
        change(
            op::LINK,
            |guest| {
                let old = guest.ask(op::LOOKUP, 1, &[b"old\0"])?;
                guest.ask(op::LINK, 1, &[&old[..8], b"new\0"])
            },
            |guest| guest.path("new").exists() && guest.path("old").exists(),
        ),
        change(
            op::UNLINK,
            |guest| guest.ask(op::UNLINK, 1, &[b"old\0"]),
            |guest| !guest.path("old").exists(),
        ),
        change(
            op::RMDIR,
            |guest| guest.ask(op::RMDIR, 1, &[b"dir\0"]),
            |guest| !guest.path("dir").exists(),
        ),
        change(
            op::RENAME,
            |guest| guest.ask(op::RENAME, 1, &[&1u64.to_le_bytes(), b"old\0new\0"]),
            |guest| !guest.path("old").exists() && guest.path("new").exists(),
        ),
    ]
}

fn prepared() -> Guest {
    let guest = Guest::new();
    fs::write(guest.path("old"), b"old").unwrap();
    fs::create_dir(guest.path("dir")).unwrap();
    guest
}

#[test]
fn what_was_done_is_answered_as_it_was() {
    for change in changes() {
        let mut guest = prepared();
        let told = (change.ask)(&mut guest);
        assert!(
            told.is_ok() && (change.is_made)(&guest),
            "{}",
            change.opcode
        );
        let told = guest.told.clone();
        let after = fs::read_dir(guest.folder.path()).unwrap().count();
        guest.die();
        assert!(guest.serve().is_ok(), "{}", change.opcode);
        assert_eq!(guest.told, told, "{}", change.opcode);
        let now = fs::read_dir(guest.folder.path()).unwrap().count();
        assert_eq!(now, after, "{}", change.opcode);
    }
}

#[test]
fn change_in_the_middle_of_which_a_process_died_is_recognised() {
    for change in changes() {
        let mut guest = prepared();
        if change.opcode == op::LINK {
            // It looks its file up first; below.
            continue;
        }
        let before = guest.counted();
        (change.ask)(&mut guest).unwrap();
        guest.die_in_the_middle(before);
        assert!(guest.serve().is_ok(), "{}", change.opcode);
        assert!((change.is_made)(&guest), "{}", change.opcode);
        // Asked anew it is what it always was.
        guest.number += 1;
        assert!(guest.serve().is_err(), "{}", change.opcode);
    }
}

#[test]
fn link_in_the_middle_of_which_a_process_died_is_recognised() {
    let mut guest = prepared();
    let old = guest.ask(op::LOOKUP, 1, &[b"old\0"]).unwrap();
    let before = guest.counted();
    guest.ask(op::LINK, 1, &[&old[..8], b"new\0"]).unwrap();
    guest.die_in_the_middle(before);
    assert!(guest.serve().is_ok());
    assert!(guest.path("new").exists());
}

#[test]
fn change_that_was_announced_and_not_made_is_made() {
    let mut guest = prepared();
    // Made before, or it would be given the inode number that has become free.
    let about = guest.path("kept");
    fs::write(&about, b"").unwrap();
    let before = guest.counted();
    guest.ask(op::UNLINK, 1, &[b"old\0"]).unwrap();
    guest.die_in_the_middle(before);
    // As if it had not come to that: another file is there now, which is not the one that was meant.
    fs::rename(&about, guest.path("old")).unwrap();
    assert!(guest.serve().is_ok());
    assert!(guest.path("old").exists(), "it is somebody else's");
    let asked = wire::MkdirIn {
        mode: 0o755,
        umask: 0,
    };
    let before = guest.counted();
    guest
        .ask(op::MKDIR, 1, &[asked.as_bytes(), b"new\0"])
        .unwrap();
    fs::remove_dir(guest.path("new")).unwrap();
    guest.die_in_the_middle(before);
    assert!(guest.serve().is_ok());
    assert!(guest.path("new").is_dir());
}

#[test]
fn data_are_appended_once() {
    const APPEND: u32 = 0o2001;
    let mut guest = Guest::new();
    let (_, handle) = guest.create("log", APPEND | 0o100).unwrap();
    guest.write_as(handle, 0, APPEND, b"one ").unwrap();
    let before = guest.counted();
    guest.write_as(handle, 0, APPEND, b"two ").unwrap();
    guest.die_in_the_middle(before);
    assert!(guest.serve().is_ok());
    assert_eq!(fs::read(guest.path("log")).unwrap(), b"one two ");
    // Not made: it is made. In part: nobody knows.
    let before = guest.counted();
    guest.write_as(handle, 0, APPEND, b"three ").unwrap();
    let log = fs::OpenOptions::new()
        .write(true)
        .open(guest.path("log"))
        .unwrap();
    log.set_len(8).unwrap();
    guest.die_in_the_middle(before);
    assert!(guest.serve().is_ok());
    assert_eq!(fs::read(guest.path("log")).unwrap(), b"one two three ");
    let before = guest.counted();
    guest.write_as(handle, 0, APPEND, b"four ").unwrap();
    log.set_len(16).unwrap();
    guest.die_in_the_middle(before);
    assert_eq!(guest.serve(), Err(Errno::EIO));
}

#[test]
fn open_files_go_on_and_those_without_a_name_are_lost() {
    let mut guest = Guest::new();
    let (node, handle) = guest.create("file", 0o302).unwrap();
    guest.write(handle, 0, b"before").unwrap();
    let (_, gone) = guest.create("gone", 0o302).unwrap();
    guest.ask(op::UNLINK, 1, &[b"gone\0"]).unwrap();
    assert!(guest.write(gone, 0, b"still").is_ok());
    guest.die();
    assert_eq!(guest.read(handle).unwrap(), b"before");
    guest.write(handle, 6, b" after").unwrap();
    assert_eq!(guest.read(handle).unwrap(), b"before after");
    assert_eq!(guest.read(gone), Err(Errno::EIO));
    assert!(guest.ask(op::GETATTR, node, &[&[0; 16]]).is_ok());
    // A file that took its name is not taken for it.
    fs::remove_file(guest.path("file")).unwrap();
    fs::write(guest.path("other"), b"other").unwrap();
    fs::rename(guest.path("other"), guest.path("file")).unwrap();
    guest.die();
    assert_eq!(guest.read(handle), Err(Errno::EIO));
}

#[test]
fn listing_goes_on_where_it_was() {
    let mut guest = Guest::new();
    for n in 0..500 {
        fs::File::create(guest.path(&format!("file{n}")))
            .and_then(|mut file| file.write_all(b"x"))
            .unwrap();
    }
    let opened = guest.ask(op::OPENDIR, 1, &[&[0; 8]]).unwrap();
    let handle = wire::OpenOut::read_from_bytes(&opened).unwrap().handle;
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let asked = wire::ReadIn {
            handle,
            offset,
            size: 4096,
            ..Default::default()
        };
        let part = guest.ask(op::READDIR, 1, &[asked.as_bytes()]).unwrap();
        if part.is_empty() {
            break;
        }
        let mut rest = part.as_slice();
        while let Ok((dirent, after)) = wire::Dirent::read_from_prefix(rest) {
            let len = dirent.name_bytes as usize;
            names.push(String::from_utf8(after[..len].to_vec()).unwrap());
            offset = dirent.next;
            rest = &after[len.next_multiple_of(8)..];
        }
        guest.die();
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 500);
}

#[test]
fn long_journal_is_written_anew_and_nothing_is_lost() {
    let mut guest = Guest::new();
    let (node, handle) = guest.create("file", 0o302).unwrap();
    guest.write(handle, 0, b"data").unwrap();
    for _ in 0..60_000 {
        guest.ask(op::LOOKUP, 1, &[b"file\0"]).unwrap();
    }
    guest.die();
    assert_eq!(guest.read(handle).unwrap(), b"data");
    let count = 60_000u64.to_le_bytes();
    guest.last.clear();
    let mut answer = Vec::new();
    let header = wire::InHeader {
        len: 48,
        opcode: op::FORGET,
        node,
        ..Default::default()
    };
    let request = [header.as_bytes(), &count].concat();
    guest.number += 1;
    let request = (guest.number, &request[..]);
    numbered(&mut guest.server, request, 0, &mut answer);
    assert!(
        guest.ask(op::GETATTR, node, &[&[0; 16]]).is_ok(),
        "told once more"
    );
}
