//! Host and the agent inside a guest, over one stream socket (vsock) for each operation.
//!
//! Both sides first send [`hello`], without waiting for the other's; one that reads anything else than its
//! own hangs up. Then the host sends one [`ToAgent::Ask`], and what follows depends on it. Every message is a
//! frame ([`crate::agent_frames`]) of at most [`FRAME_BYTES_MAX`] bytes. Each side takes the other for hostile:
//! a guest can answer anything, and whoever is on the host's side may have been lied to about the guest.
//!
//! Errors are [`Failure`]s; one ends the operation, and the connection with it.

use serde::{Deserialize, Serialize};

/// The port that the agent listens on.
pub const AGENT_PORT: u32 = 10240;
/// Version of the messages; both sides must have the same one.
pub const AGENT_VERSION: u32 = 1;
/// Bytes of the first message in either direction.
pub const HELLO_BYTES: usize = 12;
const MAGIC: [u8; 8] = *b"bulkhead";
/// Largest encoded message in bytes.
pub const FRAME_BYTES_MAX: usize = 64 << 10;
/// Most bytes of a stream or a file in one message.
pub const DATA_BYTES_MAX: usize = 32 << 10;
/// Bytes of each stream of a command that may be under way: the receiver gives room for more with
/// [`ToAgent::Room`] and [`FromAgent::Room`].
pub const STREAM_BYTES_MAX: u64 = 256 << 10;
/// The same for a copy, where each entry counts as [`ENTRY_BYTES`] besides its data.
pub const COPY_BYTES_MAX: u64 = 512 << 10;
/// What an entry of a copy counts for.
pub const ENTRY_BYTES: u64 = 512;
/// Folders inside each other in a copy, at most.
pub const DEPTH_MAX: usize = 64;
/// Entries of a copy at most.
pub const ENTRIES_MAX: u64 = 1 << 20;
/// Longest name of a file in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// Most bytes of a file that does not say how large it is, such as those of /proc.
pub const UNSIZED_BYTES_MAX: u64 = 16 << 20;
/// Longest time for which file systems stay frozen.
pub const FREEZE_MS_MAX: u32 = 600_000;
/// Most bytes of a random seed.
pub const SEED_BYTES_MAX: usize = 512;
/// Most items of each list in [`Stats`] and [`Frozen`].
pub const LIST_MAX: usize = 64;
/// Longest text in a [`Failure`], a [`Stats`] or a [`Step`] in bytes.
pub const TEXT_BYTES_MAX: usize = 256;

/// The first message in either direction.
#[must_use]
pub fn hello(version: u32) -> [u8; HELLO_BYTES] {
    let mut bytes = [0; HELLO_BYTES];
    let (magic, number) = bytes.split_at_mut(MAGIC.len());
    magic.copy_from_slice(&MAGIC);
    number.copy_from_slice(&version.to_le_bytes());
    bytes
}

/// The version in a first message; `None` when it is something else.
#[must_use]
pub fn version_of(hello: &[u8; HELLO_BYTES]) -> Option<u32> {
    let (magic, number) = hello.split_first_chunk::<8>()?;
    let number = number.first_chunk::<4>()?;
    (*magic == MAGIC).then(|| u32::from_le_bytes(*number))
}

/// Sender: the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// What is wanted. First, and once.
    Ask(Ask),
    /// Input of the command. Not more than there is room for.
    Stdin(Vec<u8>),
    /// Its input ends.
    StdinEnd,
    /// There is room for so many more bytes of this stream of the command.
    Room {
        /// Which.
        stream: Output,
        /// How many.
        bytes: u32,
    },
    /// A signal for the command's foreground processes.
    Signal(u8),
    /// Its terminal has this size.
    Size {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// A part of what is copied to the guest. Not more than there is room for.
    Entry(Entry),
    /// Everything has been sent.
    End,
    /// There is room for so many more bytes of what is copied from the guest.
    CopyRoom(u32),
}

/// Operations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// Answered with [`FromAgent::Pong`]. *Idempotent.*
    Ping,
    /// Run a command: [`FromAgent::Started`], streams, [`FromAgent::Exited`]. It is killed when the connection
    /// ends. Not idempotent.
    Exec(Exec),
    /// Copy to the guest: entries from the host, [`FromAgent::CopyRoom`], at the end [`FromAgent::Copied`].
    /// *Idempotent* as far as files are replaced whole.
    Put {
        /// Where to: a name of a file or folder that need not exist; what is copied goes into a folder that
        /// does.
        path: Vec<u8>,
        /// The name that it gets in a folder.
        name: Vec<u8>,
    },
    /// Copy from the guest: entries to the host, at the end [`FromAgent::Copied`]. *Idempotent.*
    Get {
        /// What.
        path: Vec<u8>,
        /// Whether it may be a folder.
        recursive: bool,
    },
    /// Freeze the file systems of disks: [`FromAgent::Frozen`]. Fails when they are frozen already. They thaw by
    /// themselves when the time is over or the agent ends.
    Freeze {
        /// After this, at most [`FREEZE_MS_MAX`].
        timeout_ms: u32,
    },
    /// Thaw them: [`FromAgent::Thawed`]. *Idempotent.*
    Thaw,
    /// Shut down: [`FromAgent::Done`] once it has begun. *Idempotent.*
    Power {
        /// Which way.
        how: Power,
        /// At once, without asking any program to end. What is in memory is written first.
        force: bool,
    },
    /// [`FromAgent::Stats`]. *Idempotent.*
    Stats,
    /// Make the guest another one than that whose memory or disks it was copied from:
    /// [`FromAgent::Reidentified`]. *Idempotent.*
    Reidentify(Reidentify),
}

/// Ways to end a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Power {
    /// Power off.
    Off,
    /// Start again.
    Reboot,
}

/// A command.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments.
    pub argv: Vec<Vec<u8>>,
    /// Variables beside those that the agent sets (PATH, HOME, USER, LOGNAME, SHELL, TERM).
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory; the user's home unless it is given.
    pub cwd: Option<Vec<u8>>,
    /// `user` or `uid`, perhaps with `:group` or `:gid`; the agent's unless it is given.
    pub user: Option<String>,
    /// A terminal instead of pipes.
    pub terminal: Option<Terminal>,
    /// Whether it reads anything; otherwise its input is empty.
    pub stdin: bool,
}

/// A terminal for a command. Its output is [`Output::Stdout`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// What the terminal is: TERM.
    pub kind: String,
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// An output stream of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A part of a tree that is copied. What is between a folder and its [`Entry::Leave`] is in that folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// A folder begins.
    Folder {
        /// One name, without `/`; that of the first entry is not used.
        name: Vec<u8>,
        /// Permissions.
        mode: u32,
    },
    /// The folder ends.
    Leave,
    /// A file begins.
    File {
        /// As [`Entry::Folder::name`].
        name: Vec<u8>,
        /// Permissions.
        mode: u32,
        /// Its size; `None` of one that does not say, which has at most [`UNSIZED_BYTES_MAX`].
        bytes: Option<u64>,
    },
    /// Its next bytes, at most [`DATA_BYTES_MAX`].
    Data(Vec<u8>),
    /// The file ends. It has as many bytes as it was said to have.
    FileEnd,
    /// Something that is neither file nor folder is left out.
    Skipped {
        /// As [`Entry::Folder::name`].
        name: Vec<u8>,
    },
}

/// What makes a guest itself. Each step is done only when it is asked for, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reidentify {
    /// Random bytes, credited in full: at most [`SEED_BYTES_MAX`].
    pub seed: Option<Vec<u8>>,
    /// The machine id: 32 hexadecimal digits.
    pub machine_id: Option<String>,
    /// The host name.
    pub hostname: Option<String>,
    /// Whether SSH host keys are made anew.
    pub ssh_host_keys: bool,
    /// Hardware address of a network interface.
    pub mac: Option<Mac>,
}

/// A hardware address to set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mac {
    /// Which interface.
    pub interface: String,
    /// Its new address.
    pub address: [u8; 6],
}

/// Sender: the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// Answer to [`Ask::Ping`].
    Pong {
        /// Version of the agent's program.
        agent: String,
        /// What the guest's kernel calls this boot.
        boot_id: String,
    },
    /// The command runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Output of the command. Not more than there is room for.
    Output {
        /// Which stream.
        stream: Output,
        /// At most [`DATA_BYTES_MAX`].
        bytes: Vec<u8>,
    },
    /// There is room for so many more bytes of the command's input.
    Room(u32),
    /// The command has ended, and this was all.
    Exited(Exit),
    /// There is room for so many more bytes of what is copied to the guest.
    CopyRoom(u32),
    /// A part of what is copied from the guest. Not more than there is room for.
    Entry(Entry),
    /// The copy is complete.
    Copied(Copied),
    /// These file systems are frozen.
    Frozen(Vec<Frozen>),
    /// So many file systems were thawed; none if they had thawed by themselves.
    Thawed(u32),
    /// It has begun.
    Done,
    /// How the guest is.
    Stats(Box<Stats>),
    /// What was done of each step that was asked for.
    Reidentified(Vec<Step>),
    /// It was not done, or not to its end.
    Failed(Failure),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// With this status.
    Status(u8),
    /// By this signal.
    Signal(u8),
}

/// What was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Copied {
    /// Files.
    pub files: u64,
    /// Folders.
    pub folders: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What was left out, since it is neither file nor folder.
    pub skipped: u64,
}

/// A file system that is asked to freeze.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// Where it is mounted.
    pub mount_point: String,
    /// Why it is not frozen, if it is not.
    pub refused: Option<String>,
}

/// How a guest is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Host name.
    pub hostname: String,
    /// Version of the kernel.
    pub kernel: String,
    /// Time since it started.
    pub uptime_ms: u64,
    /// Load of the last 1, 5 and 15 minutes in hundredths.
    pub load_hundredths: [u32; 3],
    /// Memory.
    pub memory_bytes: u64,
    /// Memory that programs could have.
    pub available_bytes: u64,
    /// Swap space.
    pub swap_bytes: u64,
    /// Swap space that is free.
    pub swap_free_bytes: u64,
    /// File systems of disks.
    pub file_systems: Vec<FileSystem>,
    /// Network addresses.
    pub addresses: Vec<Address>,
    /// Users that are logged in.
    pub users: Vec<User>,
}

/// A file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// Where it is mounted.
    pub mount_point: String,
    /// What it is on.
    pub source: String,
    /// Its type.
    pub kind: String,
    /// Its size.
    pub bytes: u64,
    /// Room that everybody may use.
    pub available_bytes: u64,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// Which interface.
    pub interface: String,
    /// IPv4, IPv6 or hardware address.
    pub address: String,
}

/// A login.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Who.
    pub name: String,
    /// At which terminal.
    pub terminal: String,
    /// Since when, in seconds since 1970.
    pub since_s: u64,
}

/// A step of [`Reidentify`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Which.
    pub what: What,
    /// How it went.
    pub outcome: Outcome,
}

/// The steps of [`Reidentify`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// The seed.
    Seed,
    /// The machine id.
    MachineId,
    /// The host name.
    Hostname,
    /// SSH host keys.
    SshHostKeys,
    /// The hardware address.
    Mac,
}

/// How a step went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done.
    Done,
    /// There was nothing to do it to.
    Skipped(String),
    /// Not done.
    Failed(String),
}

/// Why an operation was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of reason.
    pub kind: FailureKind,
    /// The reason: one line.
    pub text: String,
}

/// Kinds of reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// There is no such file, program, user.
    NotFound,
    /// It may not be done.
    Denied,
    /// It is being done already, or too much else is.
    Busy,
    /// The guest has nothing to do it with.
    Unsupported,
    /// It makes no sense.
    Invalid,
    /// Anything else.
    Other,
}

impl Failure {
    /// A failure with a text of at most [`TEXT_BYTES_MAX`] bytes.
    #[must_use]
    pub fn new(kind: FailureKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text_of(&text.into()),
        }
    }
}

/// At most [`TEXT_BYTES_MAX`] bytes of a text.
#[must_use]
pub fn text_of(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hello_tells_a_version_to_those_who_know_it() {
        assert_eq!(version_of(&hello(7)), Some(7));
        let mut other = hello(7);
        other[0] ^= 1;
        assert_eq!(version_of(&other), None);
    }

    #[test]
    fn long_texts_are_cut_between_letters() {
        let text = "\u{e9}".repeat(TEXT_BYTES_MAX);
        let cut = text_of(&format!("x{text}"));
        assert_eq!(cut.len(), TEXT_BYTES_MAX - 1);
        assert_eq!(text_of("short"), "short");
    }
}
