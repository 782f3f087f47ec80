//! The system calls that no crate wraps safely: seccomp filters, the SIGSYS handler, process
//! attributes, and leaving without running destructors.
#![allow(
    unsafe_code,
    reason = "raw system calls and a signal handler; the only such module of the runtime beside uring"
)]

use bulkhead_ipc::control_page::{ControlPage, Denial, THREAD_NAME_BYTES};
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::cell::Cell;
use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::OnceLock;
use vm_memory::VolatileSlice;

/// Exit status of a process that tried a system call it may not make: 128 + SIGSYS.
pub(crate) const EXIT_DENIED: i32 = 159;

static PAGE: OnceLock<ControlPage> = OnceLock::new();

thread_local! {
    /// Thread id for the SIGSYS handler, which may not ask the kernel for it.
    static THREAD: Cell<u32> = const { Cell::new(0) };
    /// Name of the thread's locked filter.
    static THREAD_NAME: Cell<[u8; THREAD_NAME_BYTES]> = const { Cell::new([0; THREAD_NAME_BYTES]) };
}

/// Takes ownership of a descriptor that the launcher placed at a fixed number.
///
/// Called once for each number, before anything else could have made a descriptor.
pub(crate) fn adopt(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: fcntl(F_GETFD) on any number is harmless; it answers EBADF for what is not open.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_GETFD) })?;
    // SAFETY: the descriptor is open, was inherited at exec, and each is adopted once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Closes every descriptor from `first` to `last` inclusive.
pub(crate) fn close_range(first: RawFd, last: RawFd) -> Result<(), Errno> {
    let (Ok(first), Ok(last)) = (u32::try_from(first), u32::try_from(last)) else {
        return Err(Errno::EBADF);
    };
    // SAFETY: called at birth for numbers that no object of this process owns.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0u32) }).map(drop)
}

/// Makes the process non-dumpable, which also closes its /proc to others of its user, and gives up
/// gaining privileges by exec.
pub(crate) fn harden() -> Result<(), Errno> {
    // SAFETY: plain integers.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })?;
    // SAFETY: plain integers.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    Ok(())
}

/// Asks for short time slices: a process that works in small steps for others is then run soon
/// after it is woken, also beside processes that use whole slices. Its share of the CPU stays the
/// same. Linux before 6.12 has one slice for all and ignores the wish.
pub(crate) fn prefer_short_slices() {
    /// The first version of `struct sched_attr` (sched_setattr(2)).
    #[repr(C)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime_ns: u64,
        deadline_ns: u64,
        period_ns: u64,
    }
    const SLICE_NS: u64 = 100_000;
    // The call sets the nice value as well, so what the operator chose is said again. -1 is an answer
    // like any other: the call cannot fail for the calling thread.
    // SAFETY: plain integers.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let attributes = Attributes {
        size: 48,
        policy: 0,
        flags: 0,
        nice,
        priority: 0,
        runtime_ns: SLICE_NS,
        deadline_ns: 0,
        period_ns: 0,
    };
    // SAFETY: the structure has the size that it names and outlives the call. A refusal changes
    // nothing but latency, so it is not looked at.
    let _wish = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0u32) };
}

/// CPUs that the process may run on.
#[must_use]
pub fn cpus() -> usize {
    let set = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0));
    set.map_or(1, |set| {
        (0..nix::sched::CpuSet::count())
            .filter(|&cpu| set.is_set(cpu).unwrap_or(false))
            .count()
    })
}

/// Largest block that comes from the heap instead of a mapping of its own; the most that the C
/// library accepts is twice as much.
const HEAP_BLOCK_BYTES: i32 = 16 << 20;

/// Makes all threads share the one heap that grows by `brk`. Heaps of a thread's own grow by `mprotect`,
/// which no locked thread may call: a guest that makes a gate remember more would end the process.
/// Call it while there is one thread.
pub(crate) fn share_heap() {
    set_heap(&[(libc::M_ARENA_MAX, 1)]);
}

/// Makes the heap take blocks of any size from `brk`, and give nothing back: a locked thread may
/// neither map nor unmap memory.
pub(crate) fn fix_heap() {
    set_heap(&[(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, i32::MAX)]);
}

fn set_heap(parameters: &[(i32, i32)]) {
    for &(parameter, value) in parameters {
        // SAFETY: plain integers; a refused parameter keeps its default.
        let _accepted = unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives the heap `bytes` of headroom and keeps it from asking the kernel for more or giving any
/// back, so that the locked phase allocates without system calls. Untouched headroom costs nothing.
pub(crate) fn settle_heap(bytes: i32) {
    set_heap(&[
        (libc::M_TOP_PAD, bytes),
        (libc::M_TRIM_THRESHOLD, i32::MAX),
        (libc::M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES),
    ]);
    // Makes the heap that large; freed, the room stays with it. In pieces, since a large block would come from
    // a mapping of its own.
    let piece = usize::try_from(HEAP_BLOCK_BYTES / 2).unwrap_or(0);
    let bytes = usize::try_from(bytes).unwrap_or(0);
    let pieces = (0..bytes).step_by(piece.max(1));
    let room = pieces.map(|at| Vec::<u8>::with_capacity(piece.min(bytes - at)));
    drop(std::hint::black_box(room.collect::<Vec<_>>()));
}

/// Installs a seccomp filter for the calling thread.
pub(crate) fn install_filter(instructions: &[libc::sock_filter]) -> Result<(), Errno> {
    let len = u16::try_from(instructions.len()).map_err(|_| Errno::E2BIG)?;
    let program = libc::sock_fprog {
        len,
        filter: instructions.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies the program, which lives across the call, and writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    };
    Errno::result(result).map(drop)
}

/// Remembers the calling thread's id for the SIGSYS handler.
pub(crate) fn note_thread() {
    let id = u32::try_from(nix::unistd::gettid().as_raw()).unwrap_or(0);
    THREAD.set(id);
}

/// Remembers the name of the calling thread's locked filter for the SIGSYS handler.
pub(crate) fn name_thread(name: &str) {
    let mut padded = [0; THREAD_NAME_BYTES];
    for (place, byte) in padded.iter_mut().zip(name.bytes()) {
        *place = byte;
    }
    THREAD_NAME.set(padded);
}

/// Installs the SIGSYS handler, which reports to `page`. Returns the page for use by the process.
pub(crate) fn report_denials(page: ControlPage) -> Result<&'static ControlPage, Errno> {
    let page = PAGE.get_or_init(|| page);
    note_thread();
    let action = SigAction::new(
        SigHandler::SigAction(on_denial),
        SaFlags::SA_SIGINFO,
        SigSet::all(),
    );
    // SAFETY: the handler is async-signal-safe: it reads a thread-local and an initialised
    // OnceLock, writes to a mapped page and leaves the process.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    Ok(page)
}

extern "C" fn on_denial(_signal: i32, _info: *mut libc::siginfo_t, context: *mut c_void) {
    let context: *const libc::ucontext_t = context.cast();
    // SAFETY: with SA_SIGINFO the kernel passes a valid ucontext, which nothing else writes.
    let registers = unsafe { &(*context).uc_mcontext.gregs };
    let register = |name: i32| {
        let value = usize::try_from(name)
            .ok()
            .and_then(|n| registers.get(n).copied())
            .unwrap_or(0);
        value.cast_unsigned()
    };
    if let Some(page) = PAGE.get() {
        page.set_denial(Denial {
            // The kernel restores the registers of the refused call, so RAX holds its number.
            number: u32::try_from(register(libc::REG_RAX)).unwrap_or(u32::MAX),
            thread: THREAD.get(),
            thread_name: THREAD_NAME.get(),
            args: [
                register(libc::REG_RDI),
                register(libc::REG_RSI),
                register(libc::REG_RDX),
                register(libc::REG_R10),
                register(libc::REG_R8),
                register(libc::REG_R9),
            ],
        });
    }
    leave(EXIT_DENIED);
}

/// Reads file bytes into window memory, now: blocks if the file does.
pub(crate) fn read_at(file: BorrowedFd<'_>, at: u64, to: &VolatileSlice<'_>) -> Result<u32, Errno> {
    let offset = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
    let guard = to.ptr_guard_mut();
    // SAFETY: the guard's range is mapped and writable for the length given; window memory is only
    // ever accessed as volatile.
    let n = unsafe { libc::pread(file.as_raw_fd(), guard.as_ptr().cast(), to.len(), offset) };
    Errno::result(n).map(|n| u32::try_from(n).unwrap_or(0))
}

/// Writes window memory to a file, now: blocks if the file does.
pub(crate) fn write_at(
    file: BorrowedFd<'_>,
    at: u64,
    from: &VolatileSlice<'_>,
) -> Result<u32, Errno> {
    let offset = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
    let guard = from.ptr_guard();
    // SAFETY: the guard's range is mapped and readable for the length given.
    let n = unsafe { libc::pwrite(file.as_raw_fd(), guard.as_ptr().cast(), from.len(), offset) };
    Errno::result(n).map(|n| u32::try_from(n).unwrap_or(0))
}

/// Takes a connection of a listening socket. Never blocks if the listener does not; the new socket never
/// does.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let listener = listener.as_raw_fd();
    // SAFETY: no address is asked for, so nothing is written.
    let fd = unsafe { libc::accept4(listener, ptr::null_mut(), ptr::null_mut(), flags) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets the permissions of what `fd` refers to, which may be an O_PATH descriptor: no name can come to mean
/// something else meanwhile. Linux before 6.6 has no such call (ENOSYS).
///
/// # Errors
/// The kernel's errno.
pub fn change_mode(fd: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    /// fchmodat2(2).
    const FCHMODAT2: libc::c_long = 452;
    let (number, flags) = (fd.as_raw_fd(), libc::AT_EMPTY_PATH);
    // SAFETY: the path is a constant with a zero at its end; the rest are plain integers.
    let result = unsafe { libc::syscall(FCHMODAT2, number, c"".as_ptr(), mode, flags) };
    Errno::result(result).map(drop)
}

/// Most pieces of memory that one call reads into or writes from.
pub(crate) const PIECES_MAX: usize = 64;

/// The pieces of one call, on the stack. What does not fit is left out.
struct Pieces {
    list: [libc::iovec; PIECES_MAX],
    used: usize,
}

impl Pieces {
    const fn new() -> Self {
        let none = libc::iovec {
            iov_base: ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            list: [none; PIECES_MAX],
            used: 0,
        }
    }

    fn push(&mut self, base: *mut u8, len: usize) {
        if let Some(place) = self.list.get_mut(self.used) {
            *place = libc::iovec {
                iov_base: base.cast(),
                iov_len: len,
            };
            self.used += 1;
        }
    }

    fn count(&self) -> i32 {
        i32::try_from(self.used).unwrap_or(0)
    }
}

/// Reads once from something that is not a file, into window memory and then into `rest`. At most
/// [`PIECES_MAX`] - 1 slices count.
pub(crate) fn read_scattered<'a>(
    from: BorrowedFd<'_>,
    to: impl Iterator<Item = VolatileSlice<'a>>,
    rest: &mut [u8],
) -> Result<usize, Errno> {
    let mut pieces = Pieces::new();
    for slice in to.take(PIECES_MAX - 1) {
        // The window stays mapped for as long as its slices live, which is longer than this call.
        pieces.push(slice.ptr_guard_mut().as_ptr(), slice.len());
    }
    pieces.push(rest.as_mut_ptr(), rest.len());
    // SAFETY: every piece is mapped and writable for its length; window memory is only ever accessed
    // as volatile, and `rest` is borrowed.
    let n = unsafe { libc::readv(from.as_raw_fd(), pieces.list.as_ptr(), pieces.count()) };
    Errno::result(n).map(|n| usize::try_from(n).unwrap_or(0))
}

/// Writes once to something that is not a file: `front`, and then window memory. More than
/// [`PIECES_MAX`] - 1 slices are an error, for what is written must be whole.
pub(crate) fn write_gathered<'a>(
    to: BorrowedFd<'_>,
    front: &[u8],
    from: impl Iterator<Item = VolatileSlice<'a>>,
) -> Result<usize, Errno> {
    let mut pieces = Pieces::new();
    pieces.push(front.as_ptr().cast_mut(), front.len());
    for slice in from {
        if pieces.used == PIECES_MAX {
            return Err(Errno::EMSGSIZE);
        }
        pieces.push(slice.ptr_guard().as_ptr().cast_mut(), slice.len());
    }
    // SAFETY: every piece is mapped and readable for its length, and the call only reads them.
    let n = unsafe { libc::writev(to.as_raw_fd(), pieces.list.as_ptr(), pieces.count()) };
    Errno::result(n).map(|n| usize::try_from(n).unwrap_or(0))
}

/// Ends the process at once, with no destructor and no exit handler: those would unmap and close,
/// which the locked filter refuses.
pub fn leave(status: i32) -> ! {
    // SAFETY: `_exit` is exit_group; it touches no memory of the process.
    unsafe { libc::_exit(status) }
}
