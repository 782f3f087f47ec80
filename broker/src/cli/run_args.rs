//! The options of `run`, and the draft of a machine that they make.

use super::disk_arg::parse_disk;
use super::net_arg::parse_net;
use super::share_arg::parse_share;
use crate::console::keys::parse_escape;
use crate::vm::spec::{ConsoleChoice, OnEnd};
use crate::vmfile::{
    Draft, DraftCloudInit, DraftVsock, Located, Place, Problem, Problems, parse_console_size,
    parse_duration, parse_size, show_size,
};
use bulkhead_ipc::protocol::birth::HugePages;
use clap::{Args, ValueEnum, ValueHint};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Backing of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum HugePagesChoice {
    /// 4 KiB pages
    Off,
    /// Huge pages where the kernel finds some
    Transparent,
    /// 2 MiB pages of the host's reserved pool
    Reserved,
}

/// A console.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ConsoleName {
    /// The serial port (ttyS0)
    Serial,
    /// The virtio console (hvc0)
    Virtio,
}

/// The key that leaves the console; none if every key is for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EscapeKey(pub(super) Option<u8>);

pub(super) fn escape_key(text: &str) -> Result<EscapeKey, String> {
    parse_escape(text).map(EscapeKey)
}

/// A machine, as a VM file, options, or both describe it. Options of `run` and `create`.
#[derive(Debug, Clone, Args)]
pub(super) struct MachineArgs {
    /// VM file; its paths are relative to it
    #[arg(value_name = "VMFILE", value_hint = ValueHint::FilePath)]
    pub(super) vmfile: Option<PathBuf>,
    /// Name of the machine [default: the VM file's name, or one that no other machine has]
    #[arg(long, value_name = "NAME")]
    pub(super) name: Option<String>,

    /// Kernel: bzImage, or ELF with PVH, Linux or Multiboot entry
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Machine")]
    pub(super) kernel: Option<PathBuf>,
    /// Boot the kernel that is on a disk, the first one unless named
    ///
    /// It is looked for at each start: an ext4 file system on the disk or on one of its partitions, in it
    /// /vmlinuz, /boot/vmlinuz or the newest /boot/vmlinuz-VERSION, with the initial RAM disk of that kernel.
    /// --kernel and --initrd are paths there then. --cmdline says what the guest's root is.
    #[arg(long, value_name = "DISK", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "", help_heading = "Machine")]
    pub(super) boot_from_disk: Option<String>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Machine")]
    initrd: Option<PathBuf>,
    /// Kernel command line; console= is added unless given
    #[arg(
        long,
        value_name = "STRING",
        allow_hyphen_values = true,
        help_heading = "Machine"
    )]
    cmdline: Option<String>,
    /// Memory with a unit, such as 512MiB; at least 16MiB [default: 256MiB]
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size, help_heading = "Machine")]
    memory: Option<u64>,
    /// Number of virtual processors, 1 to 32 [default: 1]
    #[arg(short, long, value_name = "N", help_heading = "Machine")]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: Option<u8>,
    /// Disk image or block device; may be given several times
    ///
    /// PATH[,readonly][,ephemeral][,shareable][,format=raw|qcow2|vmdk][,backing=PATH:FORMAT][,extent=PATH]
    /// [,name=NAME][,serial=TEXT][,queues=N]. A comma in
    /// PATH is written twice. The format is never probed, since a guest can write any header.
    #[arg(
        long = "disk",
        value_name = "PATH[,OPTION]...",
        help_heading = "Machine"
    )]
    disks: Vec<OsString>,
    /// What cloud-init finds in the guest: a folder with user-data, meta-data or network-config, or a file
    /// of user data
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath, help_heading = "Machine")]
    cloud_init: Option<PathBuf>,
    /// Directory that the guest can mount (mount -t virtiofs TAG DIR); may be given several times
    ///
    /// PATH[,tag=NAME][,readonly][,owner=UID:GID][,guest_owner=UID:GID][,cache_ms=N]. A comma in PATH is written
    /// twice. The guest can use what owner (default: that of PATH) owns, and sees it as guest_owner's.
    #[arg(
        long = "share",
        value_name = "PATH[,OPTION]...",
        help_heading = "Machine"
    )]
    shares: Vec<OsString>,
    /// Network device; may be given several times
    ///
    /// user, network=NAME, tap=NAME or bridge=NAME, and then [,mac=MAC][,mtu=N][,queues=N][,link=up|down][,name=NAME]
    /// [,bytes_per_s=SIZE][,bytes_burst=SIZE][,packets_per_s=N][,packets_burst=N]. With user, passt speaks for the guest with the
    /// host's own sockets, without root; [,publish=[ADDRESS:]PORT:GUEST_PORT[/tcp|udp]]... lets the host's ports lead to it. A TAP
    /// interface that is not there is made, and one is made for a bridge; both are removed with the machine. Networks are
    /// those of `bulkhead network create`; only the daemon's machines can be in one.
    #[arg(
        long = "net",
        value_name = "user|network=NAME|tap=NAME|bridge=NAME[,OPTION]...",
        help_heading = "Machine"
    )]
    nets: Vec<String>,
    /// Host pages behind the memory; without a value, reserved [default: transparent]
    #[arg(long, value_name = "MODE", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "reserved", help_heading = "Machine")]
    hugepages: Option<HugePagesChoice>,

    /// Sockets between programs of the guest and of the host [default for PATH: vsock.sock in the machine's
    /// runtime directory]
    ///
    /// A client that connects to PATH and says "CONNECT PORT" in a line is connected to that port of the guest
    /// (context id 3); what the guest connects to port PORT of the host (context id 2) reaches the listener at
    /// PATH_PORT.
    #[arg(long, value_name = "PATH", num_args = 0..=1, require_equals = true)]
    #[arg(value_hint = ValueHint::FilePath, help_heading = "Machine")]
    vsock: Option<Option<PathBuf>>,

    /// Discard what the guest writes to its disks
    #[arg(long, help_heading = "Life cycle")]
    ephemeral: bool,
    /// End when the guest resets itself, instead of starting it again
    #[arg(long, help_heading = "Life cycle")]
    pub(super) no_reboot: bool,

    /// Console that a terminal is attached to [default: serial]
    #[arg(long, value_name = "CONSOLE", help_heading = "Console")]
    console: Option<ConsoleName>,
    /// Columns and rows of the virtio console while no terminal is attached [default: 80x25]
    #[arg(long, value_name = "COLUMNSxROWS", value_parser = parse_console_size)]
    #[arg(help_heading = "Console")]
    console_size: Option<(u16, u16)>,
    /// Output kept of each console, 4KiB to 64MiB [default: 1MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Console")]
    console_history: Option<u64>,
}

/// Run a virtual machine in this terminal
///
/// The machine is described by VMFILE (TOML), by options, or by both: an option wins over the file,
/// --disk adds to its disks, --share to its folders and --net to its network devices. With neither VMFILE nor a kernel
/// the built-in guest is started.
///
/// Everything is checked before any process is started. Then each part of the machine runs in a
/// sandboxed process of its own; this program stays outside of every data path.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = AFTER)]
pub(super) struct RunArgs {
    #[command(flatten)]
    pub(super) machine: MachineArgs,
    /// Start even if the memory is more than the host has available now
    #[arg(long, help_heading = "Machine")]
    pub(super) overcommit: bool,

    /// Kill the machine after this time, such as 60s, and exit with 124
    #[arg(long, value_name = "TIME", value_parser = parse_duration, help_heading = "Life cycle")]
    pub(super) timeout: Option<Duration>,
    /// Remove the machine's state (its console history) at the end; implied for machines without
    /// VM file and name
    #[arg(long, help_heading = "Life cycle")]
    pub(super) rm: bool,
    /// Write an ELF core, which gdb opens, when the machine crashes
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    #[arg(help_heading = "Life cycle")]
    pub(super) core: Option<PathBuf>,

    /// Key that quits, such as ^T, or none
    #[arg(long, value_name = "KEY", default_value = "^]", value_parser = escape_key)]
    #[arg(help_heading = "Console")]
    escape: EscapeKey,

    /// Accept policy overrides that grant more than the built-in policies
    #[arg(long, help_heading = "Policies")]
    pub(super) allow_looser_policy: bool,
    /// Print the equivalent VM file and exit
    #[arg(long, help_heading = "Output")]
    pub(super) print_config: bool,
    /// Print how the machine ended as one JSON object; the console is not shown
    #[arg(long, help_heading = "Output")]
    pub(super) json: bool,
}

const AFTER: &str = "\
Console:
  The terminal is attached to the console named by --console. While it is, every key goes to the
  guest, Ctrl-C included, except:
    Ctrl-]         quit, which ends the machine (another key with --escape)
    Ctrl-A x       quit, too
    Ctrl-A Ctrl-A  send Ctrl-A to the guest
    Ctrl-A h       show these keys
  The terminal is restored on every way out. If standard input is not a terminal, its bytes go to
  the guest as they are. The guest's output reaches standard output unchanged. A reader that is
  too slow never holds up the guest: the oldest output is lost, and standard error says how much.

Exit codes:
  0    the guest powered itself off, or reset itself with --no-reboot
  2    wrong usage or configuration
  4    the host lacks something; see bulkhead doctor
  6    starting failed
  8    the guest panicked
  10   triple fault
  12   killed
  14   a process of the machine was lost for good
  16   KVM could not run the guest
  124  --timeout passed
  130  interrupted, or quit from the console
  A guest that writes v to the isa-debug-exit port 0xf4 makes it (v << 1) | 1, as with QEMU.

Environment:
  BULKHEAD_CONFIG_DIR, BULKHEAD_STATE_DIR, BULKHEAD_RUNTIME_DIR, BULKHEAD_LIBEXEC_DIR
        as the options of the same name; an option wins

Examples:
  bulkhead run
        boots the built-in guest
  bulkhead run web.toml
        runs the machine that web.toml describes
  bulkhead run --kernel vmlinuz --initrd initrd.img --disk root.img -m 512MiB -c 2
        runs a Linux kernel
  bulkhead run --disk debian.img --boot-from-disk --cmdline root=/dev/vda -m 1GiB
        boots the kernel that the disk itself has
  bulkhead run --kernel vmlinuz --disk base.img,readonly --disk data.img --print-config > vm.toml
        writes the VM file for these options
";

fn located<T>(option: &str, shown: impl Into<String>, value: T) -> Located<T> {
    Located {
        value,
        place: Place::Option {
            option: option.to_owned(),
            value: shown.into(),
        },
    }
}

/// What `--cloud-init` says.
fn seed(path: &Path) -> Result<DraftCloudInit, Problem> {
    const OPTION: &str = "--cloud-init";
    let shown = path.display().to_string();
    let found = crate::seed::of_path(path).map_err(|expectation| Problem {
        place: Place::Option {
            option: OPTION.to_owned(),
            value: shown.clone(),
        },
        expectation,
    })?;
    let file = |path: Option<PathBuf>| path.map(|path| located(OPTION, shown.clone(), path));
    Ok(DraftCloudInit {
        user_data: file(found.user_data),
        meta_data: file(found.meta_data),
        network_config: file(found.network_config),
        ..DraftCloudInit::default()
    })
}

impl MachineArgs {
    /// The machine as far as the options describe it.
    ///
    /// # Errors
    /// Every wrong `--disk`, `--share` and `--net`.
    pub(super) fn draft(&self) -> Result<Draft, Problems> {
        let (mut disks, mut problems) = (Vec::new(), Vec::new());
        for disk in &self.disks {
            match parse_disk(disk) {
                Ok(disk) => disks.push(disk),
                Err(problem) => problems.push(problem),
            }
        }
        let mut cloud_init = None;
        if let Some(path) = &self.cloud_init {
            match seed(path) {
                Ok(draft) => cloud_init = Some(draft),
                Err(problem) => problems.push(problem),
            }
        }
        let mut shares = Vec::new();
        for share in &self.shares {
            match parse_share(share) {
                Ok(share) => shares.push(share),
                Err(problem) => problems.push(problem),
            }
        }
        let mut nets = Vec::new();
        for net in &self.nets {
            match parse_net(net) {
                Ok(net) => nets.push(net),
                Err(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            return Err(Problems(problems));
        }
        let path = |option: &str, path: &Option<PathBuf>| {
            let path = path.as_ref()?;
            let absolute = match self.boot_from_disk {
                Some(_) => PathBuf::from("/").join(path),
                None => std::path::absolute(path).unwrap_or_else(|_| path.clone()),
            };
            Some(located(option, path.display().to_string(), absolute))
        };
        let size = |option: &str, bytes: Option<u64>| {
            bytes.map(|bytes| located(option, show_size(bytes), bytes))
        };
        let text = |option: &str, text: &Option<String>| {
            text.as_ref()
                .map(|text| located(option, text.clone(), text.clone()))
        };
        Ok(Draft {
            name: text("--name", &self.name),
            vcpus: self.cpus.map(|n| located("--cpus", n.to_string(), n)),
            memory: size("--memory", self.memory),
            huge_pages: self.hugepages.map(|choice| match choice {
                HugePagesChoice::Off => located("--hugepages", "off", HugePages::Off),
                HugePagesChoice::Transparent => {
                    located("--hugepages", "transparent", HugePages::Transparent)
                }
                HugePagesChoice::Reserved => {
                    located("--hugepages", "reserved", HugePages::Reserved)
                }
            }),
            from_disk: self.boot_from_disk.as_ref().map(|disk| {
                let name = (!disk.is_empty()).then(|| disk.clone());
                located("--boot-from-disk", disk.clone(), name)
            }),
            kernel: path("--kernel", &self.kernel),
            initrd: path("--initrd", &self.initrd),
            cmdline: text("--cmdline", &self.cmdline),
            disks,
            vsock: self.vsock.as_ref().map(|socket| DraftVsock {
                cid: None,
                path: path("--vsock", socket),
            }),
            cloud_init,
            shares,
            nets,
            console_attach: self.console.map(|name| match name {
                ConsoleName::Serial => located("--console", "serial", ConsoleChoice::Serial),
                ConsoleName::Virtio => located("--console", "virtio", ConsoleChoice::Virtio),
            }),
            console_history: size("--console-history", self.console_history),
            console_size: self.console_size.map(|size| {
                let shown = format!("{}x{}", size.0, size.1);
                located("--console-size", shown, size)
            }),
            on_reboot: self
                .no_reboot
                .then(|| located("--no-reboot", "", OnEnd::Destroy)),
            ..Draft::default()
        })
    }

    /// Makes every disk of `draft` ephemeral if the options say so.
    pub(super) fn make_ephemeral(&self, draft: &mut Draft) {
        if self.ephemeral {
            for disk in &mut draft.disks {
                disk.ephemeral = Some(located("--ephemeral", "", true));
            }
        }
    }
}

impl RunArgs {
    /// The key that leaves the console.
    pub(super) const fn escape(&self) -> Option<u8> {
        self.escape.0
    }
}
