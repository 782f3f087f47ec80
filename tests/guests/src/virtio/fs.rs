//! A shared folder: a FUSE client (protocol 7.31) of a few operations, one request at a time or several.

use bulkhead_guest::split::SEGMENTS_MAX;

use crate::machine::Machine;
use crate::report::Failure;
use crate::sys::phys::{self, Dma};
use crate::sys::time::Deadline;
use crate::virtio::mmio::{self, Device, feature, id};
use crate::virtio::queue::{Queue, Segment};

/// Operations by their numbers.
pub mod op {
    #![allow(missing_docs, reason = "the names are those of FUSE")]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const CREATE: u32 = 35;
    pub const FALLOCATE: u32 = 43;
}

/// The folder itself.
pub const ROOT: u64 = 1;
/// Bytes of data of the largest request.
pub const DATA_MAX: usize = 1 << 20;
/// Errors of the host, as FUSE tells them.
pub const EPERM: i32 = 1;
/// There is none.
pub const ENOENT: i32 = 2;
/// It is there already.
pub const EEXIST: i32 = 17;
/// Nothing may be changed.
pub const EROFS: i32 = 30;

const HEADER: usize = 40;
const ANSWER: usize = 16;
const CONTROL: usize = 4096;

/// A request that FUSE answers with an error, or that never gets that far.
#[derive(Debug, Clone, Copy)]
pub enum Refusal {
    /// The error number.
    Errno(i32),
    /// The device does not do what devices do.
    Failure(Failure),
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        Refusal::Failure(failure)
    }
}

impl Refusal {
    /// As a failure of the mode.
    pub fn failure(self, what: &'static str) -> Failure {
        match self {
            Refusal::Failure(failure) => failure,
            Refusal::Errno(errno) => Failure::Wrong {
                what,
                got: errno as u64,
                expected: 0,
            },
        }
    }
}

/// A started shared folder with a session.
#[derive(Debug)]
pub struct Folder {
    queue: Queue,
    urgent: Queue,
    /// Its tag.
    pub tag: [u8; 36],
    control: Dma,
    data: Dma,
    unique: u64,
    timeout_ms: u64,
}

/// What [`Folder::attributes`] tells, in the order of its description.
pub type Attributes = (u64, u64, u32, u32, (u32, u32));

impl Folder {
    /// Finds folder number `index`, starts it and begins a session.
    pub fn open(machine: &Machine, index: u64, timeout_ms: u64) -> Result<Folder, Failure> {
        let device: Device = mmio::find(machine, id::FS, index)?;
        let features = device.negotiate(feature::INDIRECT_DESC | feature::EVENT_IDX)?;
        let mut tag = [0; 36];
        for (place, at) in tag.iter_mut().zip(0..) {
            *place = device.config::<u8>(at);
        }
        crate::report::expect("request_queues", device.config::<u32>(36).into(), 1)?;
        let urgent = device.queue(0, features)?;
        let queue = device.queue(1, features)?;
        device.start()?;
        let mut folder = Folder {
            queue,
            urgent,
            tag,
            control: phys::allocate(2 * CONTROL),
            data: phys::allocate(DATA_MAX),
            unique: 0,
            timeout_ms,
        };
        let mut init = [0; 16];
        put(&mut init, 0, &7_u32.to_le_bytes());
        put(&mut init, 4, &31_u32.to_le_bytes());
        put(&mut init, 8, &(1_u32 << 17).to_le_bytes());
        put(&mut init, 12, &((1_u32 << 22) | (1 << 5)).to_le_bytes());
        folder
            .ask(op::INIT, 0, &[&init], 0, 64)
            .map_err(|e| e.failure("init"))?;
        let max_write: u32 = folder.word(20);
        crate::report::expect("max_write", max_write.into(), DATA_MAX as u64)?;
        Ok(folder)
    }

    /// Memory for the data of a request: what is written is taken from here, what is read is put here.
    pub fn data(&mut self) -> &mut [u8] {
        &mut self.data.all_mut()[..DATA_MAX]
    }

    /// A word of the last answer, behind its header.
    pub fn word<T: Copy>(&self, at: usize) -> T {
        self.control.read(CONTROL + ANSWER + at)
    }

    /// One request: its arguments, and `sent` bytes of [`Folder::data`] behind them. The answer has at most
    /// `room` bytes, which are in [`Folder::word`]'s reach when they fit, in [`Folder::data`] otherwise.
    /// Returns how many there are.
    pub fn ask(
        &mut self,
        opcode: u32,
        node: u64,
        arguments: &[&[u8]],
        sent: usize,
        room: usize,
    ) -> Result<usize, Refusal> {
        self.unique += 2;
        let mut len = HEADER;
        for argument in arguments {
            let part = self.control.part(len, argument.len());
            for (at, byte) in argument.iter().enumerate() {
                part.write(at, *byte);
            }
            len += argument.len();
        }
        let total = (len + sent) as u32;
        self.control.write(0, total);
        self.control.write(4, opcode);
        self.control.write(8, self.unique);
        self.control.write(16, node);
        self.control.write(24, 0_u64);
        self.control.write(32, 0_u64);
        let answer = self.control.part(CONTROL, CONTROL);
        answer.write(0, 0_u32);
        answer.write(8, 0_u64);
        let mut segments = [Segment::readable(self.control.part(0, len)); SEGMENTS_MAX];
        let mut count = 1;
        let mut push = |segment| {
            segments[count] = segment;
            count += 1;
        };
        if sent > 0 {
            push(Segment::readable(self.data.part(0, sent)));
        }
        if opcode != op::FORGET {
            push(Segment::writable(answer.part(0, ANSWER)));
        }
        if room > CONTROL - ANSWER {
            push(Segment::writable(self.data.part(0, room)));
        } else if room > 0 {
            push(Segment::writable(answer.part(ANSWER, room)));
        }
        let deadline = Deadline::after_ms(self.timeout_ms);
        let queue = match opcode {
            op::FORGET => &mut self.urgent,
            _ => &mut self.queue,
        };
        let used = queue.transfer(&segments[..count], deadline)?;
        if opcode == op::FORGET {
            return Ok(0);
        }
        let told: u32 = answer.read(0);
        crate::report::expect("unique", answer.read(8), self.unique)?;
        crate::report::expect("answer_len", u64::from(used.len), u64::from(told))?;
        match answer.read::<i32>(4) {
            0 => Ok((told as usize).saturating_sub(ANSWER)),
            error => Err(Refusal::Errno(-error)),
        }
    }

    /// The node at `name` in a directory.
    pub fn lookup(&mut self, parent: u64, name: &[u8]) -> Result<u64, Refusal> {
        self.ask(op::LOOKUP, parent, &[name, b"\0"], 0, 128)?;
        Ok(self.word(0))
    }

    /// Its size, as [`Folder::lookup`] or [`Folder::create`] was told of it.
    pub fn told_size(&self) -> u64 {
        self.word(40 + 8)
    }

    /// Makes and opens a file: its node and handle.
    pub fn create(&mut self, parent: u64, name: &[u8]) -> Result<(u64, u64), Refusal> {
        let mut arguments = [0; 16];
        // O_RDWR | O_CREAT | O_EXCL
        put(&mut arguments, 0, &0o302_u32.to_le_bytes());
        put(&mut arguments, 4, &0o100_644_u32.to_le_bytes());
        self.ask(op::CREATE, parent, &[&arguments, name, b"\0"], 0, 144)?;
        Ok((self.word(0), self.word(128)))
    }

    /// Opens a file or a directory.
    pub fn open_node(&mut self, opcode: u32, node: u64, flags: u32) -> Result<u64, Refusal> {
        let mut arguments = [0; 8];
        put(&mut arguments, 0, &flags.to_le_bytes());
        self.ask(opcode, node, &[&arguments], 0, 16)?;
        Ok(self.word(0))
    }

    /// Closes it.
    pub fn release(&mut self, opcode: u32, node: u64, handle: u64) -> Result<(), Refusal> {
        let mut arguments = [0; 24];
        put(&mut arguments, 0, &handle.to_le_bytes());
        self.ask(opcode, node, &[&arguments], 0, 0).map(drop)
    }

    /// Writes `len` bytes of [`Folder::data`].
    pub fn write(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        len: usize,
    ) -> Result<usize, Refusal> {
        let arguments = transfer(handle, offset, len);
        self.ask(op::WRITE, node, &[&arguments], len, 8)?;
        Ok(self.word::<u32>(0) as usize)
    }

    /// Reads up to `len` bytes into [`Folder::data`].
    pub fn read(
        &mut self,
        opcode: u32,
        node: u64,
        handle: u64,
        offset: u64,
        len: usize,
    ) -> Result<usize, Refusal> {
        let arguments = transfer(handle, offset, len);
        let got = self.ask(opcode, node, &[&arguments], 0, len)?;
        if len <= CONTROL - ANSWER {
            for at in 0..got {
                let byte: u8 = self.word(at);
                self.data.write(at, byte);
            }
        }
        Ok(got)
    }

    /// Makes what was written durable; the data alone if `data`.
    pub fn sync(&mut self, node: u64, handle: u64, data: bool) -> Result<(), Refusal> {
        let mut arguments = [0; 16];
        put(&mut arguments, 0, &handle.to_le_bytes());
        put(&mut arguments, 8, &u32::from(data).to_le_bytes());
        self.ask(op::FSYNC, node, &[&arguments], 0, 0).map(drop)
    }

    /// Makes a directory.
    pub fn make_directory(&mut self, parent: u64, name: &[u8]) -> Result<u64, Refusal> {
        let mut arguments = [0; 8];
        put(&mut arguments, 0, &0o755_u32.to_le_bytes());
        self.ask(op::MKDIR, parent, &[&arguments, name, b"\0"], 0, 128)?;
        Ok(self.word(0))
    }

    /// Makes a symbolic link.
    pub fn link_to(&mut self, parent: u64, name: &[u8], target: &[u8]) -> Result<u64, Refusal> {
        let arguments: [&[u8]; 4] = [name, b"\0", target, b"\0"];
        self.ask(op::SYMLINK, parent, &arguments, 0, 128)?;
        Ok(self.word(0))
    }

    /// Gives a file another name.
    pub fn name_again(&mut self, node: u64, parent: u64, name: &[u8]) -> Result<(), Refusal> {
        let node = node.to_le_bytes();
        self.ask(op::LINK, parent, &[&node, name, b"\0"], 0, 128)
            .map(drop)
    }

    /// Makes room for a file, up to `len` bytes.
    pub fn allocate(&mut self, node: u64, handle: u64, len: u64) -> Result<(), Refusal> {
        let mut arguments = [0; 32];
        put(&mut arguments, 0, &handle.to_le_bytes());
        put(&mut arguments, 16, &len.to_le_bytes());
        self.ask(op::FALLOCATE, node, &[&arguments], 0, 0).map(drop)
    }

    /// Sets attributes: FUSE's bits for which, then size, time of the last change in seconds, mode, owner.
    pub fn set(
        &mut self,
        node: u64,
        which: u32,
        (size, mtime, mode, owner): (u64, u64, u32, (u32, u32)),
    ) -> Result<(), Refusal> {
        let mut arguments = [0; 88];
        put(&mut arguments, 0, &which.to_le_bytes());
        put(&mut arguments, 16, &size.to_le_bytes());
        put(&mut arguments, 40, &mtime.to_le_bytes());
        put(&mut arguments, 68, &mode.to_le_bytes());
        put(&mut arguments, 76, &owner.0.to_le_bytes());
        put(&mut arguments, 80, &owner.1.to_le_bytes());
        self.ask(op::SETATTR, node, &[&arguments], 0, 104).map(drop)
    }

    /// Attributes: size, time of the last change, mode, links, owner.
    pub fn attributes(&mut self, node: u64) -> Result<Attributes, Refusal> {
        self.ask(op::GETATTR, node, &[&[0; 16]], 0, 104)?;
        let owner = (self.word(16 + 68), self.word(16 + 72));
        let (mode, links) = (self.word(16 + 60), self.word(16 + 64));
        Ok((self.word(16 + 8), self.word(16 + 32), mode, links, owner))
    }

    /// Removes a file or a directory.
    pub fn remove(&mut self, opcode: u32, parent: u64, name: &[u8]) -> Result<(), Refusal> {
        self.ask(opcode, parent, &[name, b"\0"], 0, 0).map(drop)
    }

    /// Renames.
    pub fn rename(&mut self, from: (u64, &[u8]), to: (u64, &[u8])) -> Result<(), Refusal> {
        let parent = to.0.to_le_bytes();
        let arguments: [&[u8]; 5] = [&parent, from.1, b"\0", to.1, b"\0"];
        self.ask(op::RENAME, from.0, &arguments, 0, 0).map(drop)
    }

    /// The guest does not need the node any more.
    pub fn forget(&mut self, node: u64, count: u64) -> Result<(), Refusal> {
        let count = count.to_le_bytes();
        self.ask(op::FORGET, node, &[&count], 0, 0).map(drop)
    }

    /// Number of entries of a directory, and the sum of their names' checksums, which does not depend on
    /// their order.
    pub fn list(&mut self, node: u64) -> Result<(u64, u64), Refusal> {
        let handle = self.open_node(op::OPENDIR, node, 0)?;
        let (mut count, mut sum, mut offset) = (0, 0_u64, 0);
        loop {
            let got = self.read(op::READDIR, node, handle, offset, 4096)?;
            let mut at = 0;
            while at + 24 <= got {
                offset = self.data.read::<u64>(at + 8);
                let len = self.data.read::<u32>(at + 16) as usize;
                let name = &self.data.all()[at + 24..at + 24 + len];
                sum = sum.wrapping_add(bulkhead_guest::pattern::checksum(0, name));
                count += 1;
                at += (24 + len).next_multiple_of(8);
            }
            if got == 0 {
                break;
            }
        }
        self.release(op::RELEASEDIR, node, handle)?;
        Ok((count, sum))
    }
}

/// Arguments of reads and writes.
fn transfer(handle: u64, offset: u64, len: usize) -> [u8; 40] {
    let mut arguments = [0; 40];
    put(&mut arguments, 0, &handle.to_le_bytes());
    put(&mut arguments, 8, &offset.to_le_bytes());
    put(&mut arguments, 16, &(len as u32).to_le_bytes());
    arguments
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}
