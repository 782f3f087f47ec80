//! A disk image on a file system that takes its time: a FUSE server in the test holds one write back until
//! the test lets it go, and keeps a log of who did what to the image, in order.

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, SessionACL, WriteFlags,
};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

const NAME: &str = "disk.img";
const IMAGE: INodeNo = INodeNo(2);
/// Nothing is kept by the kernel.
const TTL: Duration = Duration::ZERO;
/// How long the test waits for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Something that was done to the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Which opening of the file: each generation of a disk's process has its own.
    pub handle: u64,
    /// Whether the image was changed; it was read otherwise.
    pub write: bool,
    /// Where.
    pub offset: u64,
}

#[derive(Debug, PartialEq, Eq)]
enum Hold {
    /// The first write to this offset will be held.
    Armed(u64),
    /// It is held.
    Holding,
    /// It was let go.
    Over,
}

#[derive(Debug)]
struct State {
    image: Vec<u8>,
    log: Vec<Access>,
    handles: u64,
    hold: Hold,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn until(&self, what: &str, condition: impl Fn(&State) -> bool) {
        let (_state, waited) = self
            .changed
            .wait_timeout_while(self.state(), PATIENCE, |state| !condition(state))
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!waited.timed_out(), "{what}");
    }

    fn let_go(&self) {
        self.state().hold = Hold::Over;
        self.changed.notify_all();
    }
}

impl State {
    fn write(&mut self, handle: u64, offset: u64, data: &[u8]) -> bool {
        let place = usize::try_from(offset).ok();
        let place = place.and_then(|at| self.image.get_mut(at..at.checked_add(data.len())?));
        let Some(place) = place else { return false };
        place.copy_from_slice(data);
        let write = true;
        self.log.push(Access {
            handle,
            write,
            offset,
        });
        true
    }
}

/// The image. Dropping it lets everything go and takes the file system away.
#[derive(Debug)]
pub struct HeldFile {
    shared: Arc<Shared>,
    session: Option<fuser::BackgroundSession>,
    mountpoint: tempfile::TempDir,
}

impl HeldFile {
    /// An image of `bytes` zero bytes, which holds the first write to `offset`.
    ///
    /// # Panics
    /// When the file system cannot be mounted.
    #[must_use]
    pub fn new(bytes: usize, offset: u64) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                image: vec![0; bytes],
                log: Vec::new(),
                handles: 0,
                hold: Hold::Armed(offset),
            }),
            changed: Condvar::new(),
        });
        let mountpoint = tempfile::tempdir().expect("a directory");
        let mut config = Config::default();
        // The disk's process is another user.
        config.acl = SessionACL::All;
        let server = Server(Arc::clone(&shared));
        let session = fuser::spawn_mount(server, mountpoint.path(), &config);
        Self {
            shared,
            session: Some(session.expect("FUSE, for root")),
            mountpoint,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.mountpoint.path().join(NAME)
    }

    /// Waits until the write is held.
    ///
    /// # Panics
    /// When that does not come within a minute.
    pub fn until_held(&self) {
        let held = |state: &State| state.hold == Hold::Holding;
        self.shared.until("nobody writes there", held);
    }

    /// Lets the write go.
    pub fn let_go(&self) {
        self.shared.let_go();
    }

    /// What was done to the image so far, in order. A write that is held is not there yet.
    #[must_use]
    pub fn log(&self) -> Vec<Access> {
        self.shared.state().log.clone()
    }

    /// The image as it is now.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        self.shared.state().image.clone()
    }
}

impl Drop for HeldFile {
    fn drop(&mut self) {
        self.let_go();
        // It may be in use still, when a test has failed; the kernel then takes it away later.
        let path = self.mountpoint.path().to_owned();
        let _gone = nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH);
        drop(self.session.take());
    }
}

struct Server(Arc<Shared>);

fn attributes(kind: FileType, ino: INodeNo, size: u64) -> FileAttr {
    FileAttr {
        ino,
        size,
        blocks: size.div_ceil(512),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: if kind == FileType::Directory {
            0o755
        } else {
            0o600
        },
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Server {
    fn about_image(&self) -> FileAttr {
        let size = self.0.state().image.len() as u64;
        attributes(FileType::RegularFile, IMAGE, size)
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match parent == INodeNo::ROOT && name == NAME {
            true => reply.entry(&TTL, &self.about_image(), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let about = match ino {
            INodeNo::ROOT => attributes(FileType::Directory, ino, 0),
            _ => self.about_image(),
        };
        reply.attr(&TTL, &about);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let mut state = self.0.state();
        state.handles += 1;
        // No page cache: the log has everything.
        reply.opened(FileHandle(state.handles), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = self.0.state();
        let write = false;
        state.log.push(Access {
            handle: handle.0,
            write,
            offset,
        });
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let from = from.min(state.image.len());
        let to = from.saturating_add(size as usize).min(state.image.len());
        reply.data(&state.image[from..to]);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let mut state = self.0.state();
        if state.hold != Hold::Armed(offset) {
            return match state.write(handle.0, offset, data) {
                true => reply.written(len),
                false => reply.error(Errno::EFBIG),
            };
        }
        state.hold = Hold::Holding;
        self.0.changed.notify_all();
        let (shared, data) = (Arc::clone(&self.0), data.to_vec());
        // Everybody else is served meanwhile.
        std::thread::spawn(move || {
            shared.until("the write is never let go", |state| {
                state.hold == Hold::Over
            });
            match shared.state().write(handle.0, offset, &data) {
                true => reply.written(len),
                false => reply.error(Errno::EFBIG),
            }
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}
