//! Options of `bulkhead image`.

use crate::image::chain::Link;
use crate::vmfile::{parse_format, parse_size};
use bulkhead_ipc::protocol::birth::ImageFormat;
use bulkhead_ipc::protocol::image::ForeignFormat;
use clap::{Args, Subcommand, ValueHint};
use std::path::{Path, PathBuf};

/// Commands about disk images.
#[derive(Debug, Subcommand)]
pub(super) enum ImageCommand {
    /// Make an image of zeros, or a layer on top of another image, that takes no room until it is written
    #[command(after_long_help = "\
Examples:
  bulkhead image create root.img 8GiB
  bulkhead image create web.qcow2 --format qcow2 --backing debian.img:raw
  bulkhead image create scratch.img 512MiB --force --json
")]
    Create(CreateArgs),
    /// Tell the sizes of an image, and what its header says
    #[command(after_long_help = "\
The format is what --format says and never probed: a guest can write any header.

Examples:
  bulkhead image info root.img
  bulkhead image info web.qcow2 --format qcow2
")]
    Info(InfoArgs),
    /// Copy what an image shows into a new one of another format
    #[command(after_long_help = "\
Examples:
  bulkhead image convert root.img root.qcow2 --to qcow2
  bulkhead image convert appliance.vmdk root.img --from vmdk-sparse --to raw
  bulkhead image convert web.qcow2 web.img --from qcow2 --backing debian.img:raw --to raw
")]
    Convert(ConvertArgs),
    /// Give an image another size
    #[command(after_long_help = "\
Examples:
  bulkhead image resize root.img 20GiB
  bulkhead image resize web.qcow2 10GiB --format qcow2 --backing debian.img:raw
")]
    Resize(ResizeArgs),
    /// Compare an image's tables with each other
    #[command(after_long_help = "\
Examples:
  bulkhead image check web.qcow2 --format qcow2
  bulkhead image check web.qcow2 --format qcow2 --repair
")]
    Check(CheckArgs),
    /// Put a qcow2 image on top of another image, or of none, while it goes on to show the same
    #[command(after_long_help = "\
Examples:
  bulkhead image rebase web.qcow2 --backing old.img:raw --onto new.img:raw
  bulkhead image rebase web.qcow2 --backing debian.img:raw
        takes everything into the image
  bulkhead image rebase web.qcow2 --onto /srv/debian.img:raw --name-only
        the image below was moved
")]
    Rebase(RebaseArgs),
    /// Write what is in a qcow2 image into the image below it
    #[command(after_long_help = "\
Examples:
  bulkhead image commit web.qcow2 --backing debian.img:raw
")]
    Commit(CommitArgs),
    /// Make a disk that cloud-init reads (NoCloud): a small FAT file system labelled CIDATA
    #[command(after_long_help = "\
A machine with [cloud_init] in its VM file, or run --cloud-init, gets such a disk by itself.

Examples:
  bulkhead image seed seed.img --user-data user-data --hostname web
  bulkhead image seed seed.img --name web --ssh-key \"$(cat ~/.ssh/id_ed25519.pub)\"
")]
    Seed(SeedArgs),
}

/// Options of `image seed`.
#[derive(Debug, Args)]
pub(super) struct SeedArgs {
    /// File to make
    #[arg(value_hint = ValueHint::FilePath)]
    pub(super) path: PathBuf,
    /// File of user data
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) user_data: Option<PathBuf>,
    /// File of meta data
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    #[arg(conflicts_with_all = ["name", "ssh_keys", "hostname"])]
    pub(super) meta_data: Option<PathBuf>,
    /// File of network configuration
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) network_config: Option<PathBuf>,
    /// Name of the machine, which its instance id is made of
    #[arg(long, value_name = "NAME", default_value = "seed")]
    pub(super) name: String,
    /// Public key that may log in; may be given several times
    #[arg(long = "ssh-key", value_name = "KEY")]
    pub(super) ssh_keys: Vec<String>,
    /// Host name [default: the machine's name]
    #[arg(long, value_name = "NAME")]
    pub(super) hostname: Option<String>,
    /// Replace a file that is there
    #[arg(long)]
    pub(super) force: bool,
}

/// Files besides the image itself.
#[derive(Debug, Args, Default)]
pub(super) struct ChainArgs {
    /// Images below, the one next to it first: PATH:FORMAT
    #[arg(long, value_name = "PATH:FORMAT", value_parser = parse_below)]
    backing: Vec<Below>,
    /// Files with the data of a VMDK image, in the order of its descriptor
    #[arg(long = "extent", value_name = "PATH", value_hint = ValueHint::FilePath)]
    extents: Vec<PathBuf>,
}

impl ChainArgs {
    /// The chain of the image at `path`.
    pub(super) fn links(&self, path: &Path, format: ImageFormat) -> Vec<Link> {
        let first = Link {
            path: path.to_owned(),
            format,
            extents: self.extents.clone(),
        };
        let below = self.backing.iter().map(|below| below.0.clone());
        std::iter::once(first).chain(below).collect()
    }
}

/// An image below another.
#[derive(Debug, Clone)]
pub(super) struct Below(pub(super) Link);

fn parse_below(text: &str) -> Result<Below, String> {
    let (path, format) = text
        .rsplit_once(':')
        .filter(|(path, _)| !path.is_empty())
        .ok_or_else(|| "expected PATH:FORMAT".to_owned())?;
    Ok(Below(Link {
        path: PathBuf::from(path),
        format: parse_format(format)?,
        extents: Vec::new(),
    }))
}

/// What is converted.
#[derive(Debug, Clone, Copy)]
pub(super) enum From {
    Image(ImageFormat),
    Foreign(ForeignFormat),
}

fn parse_from(text: &str) -> Result<From, String> {
    match text {
        "vhd" | "vpc" => Ok(From::Foreign(ForeignFormat::Vhd)),
        "vmdk-sparse" => Ok(From::Foreign(ForeignFormat::VmdkSparse)),
        _ => parse_format(text)
            .map(From::Image)
            .map_err(|_| "expected raw, qcow2, vmdk, vmdk-sparse or vhd".to_owned()),
    }
}

/// Options of `image create`.
#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// File to make
    #[arg(value_hint = ValueHint::FilePath)]
    pub(super) path: PathBuf,
    /// Size with a unit, such as 8GiB; a multiple of 512 bytes. Default: that of the image below
    #[arg(value_parser = parse_size)]
    pub(super) size: Option<u64>,
    /// Image format: raw, qcow2 or vmdk
    #[arg(long, default_value = "raw", value_parser = parse_format)]
    pub(super) format: ImageFormat,
    /// Images below, the one next to it first: PATH:FORMAT
    #[arg(long, value_name = "PATH:FORMAT", value_parser = parse_below)]
    pub(super) backing: Vec<Below>,
    /// Replace an existing file and lose what it holds
    #[arg(long)]
    pub(super) force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
}

/// Options of `image info`.
#[derive(Debug, Args)]
pub(super) struct InfoArgs {
    /// Image file or block device
    #[arg(value_hint = ValueHint::FilePath)]
    pub(super) path: PathBuf,
    /// Image format: raw, qcow2 or vmdk
    #[arg(long, default_value = "raw", value_parser = parse_format)]
    pub(super) format: ImageFormat,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
}

/// Options of `image convert`.
#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    /// Image to read
    #[arg(value_hint = ValueHint::FilePath)]
    pub(super) source: PathBuf,
    /// File to make
    #[arg(value_hint = ValueHint::FilePath)]
    pub(super) target: PathBuf,
    /// Format of what is read: raw, qcow2, vmdk, vmdk-sparse or vhd
    #[arg(long, value_name = "FORMAT", default_value = "raw", value_parser = parse_from)]
    pub(super) from: From,
    /// Format of what is made: raw, qcow2 or vmdk
    #[arg(long, value_name = "FORMAT", value_parser = parse_format)]
    pub(super) to: ImageFormat,
    #[command(flatten)]
    pub(super) chain: ChainArgs,
    /// Replace an existing file and lose what it holds
    #[arg(long)]
    pub(super) force: bool,
    /// Print JSON: one object for each step, and one at the end
    #[arg(long)]
    pub(super) json: bool,
}

/// Options of `image resize`.
#[derive(Debug, Args)]
pub(super) struct ResizeArgs {
    /// Image file
    #[arg(value_hint = ValueHint::FilePath)]
    pub(super) path: PathBuf,
    /// New size with a unit, such as 8GiB; a multiple of 512 bytes
    #[arg(value_parser = parse_size)]
    pub(super) size: u64,
    /// Image format: raw or qcow2
    #[arg(long, default_value = "raw", value_parser = parse_format)]
    pub(super) format: ImageFormat,
    #[command(flatten)]
    pub(super) chain: ChainArgs,
    /// Lose what is behind the new end
    #[arg(long)]
    pub(super) shrink: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
}

/// Options of `image check`.
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Image file
    #[arg(value_hint = ValueHint::FilePath)]
    pub(super) path: PathBuf,
    /// Image format: raw, qcow2 or vmdk
    #[arg(long, default_value = "raw", value_parser = parse_format)]
    pub(super) format: ImageFormat,
    #[command(flatten)]
    pub(super) chain: ChainArgs,
    /// Put right what can be
    #[arg(long)]
    pub(super) repair: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
}

/// Options of `image rebase`.
#[derive(Debug, Args)]
pub(super) struct RebaseArgs {
    /// qcow2 image
    #[arg(value_hint = ValueHint::FilePath)]
    pub(super) path: PathBuf,
    #[command(flatten)]
    pub(super) chain: ChainArgs,
    /// New images below, the one next to it first; none takes everything into the image
    #[arg(long, value_name = "PATH:FORMAT", value_parser = parse_below)]
    pub(super) onto: Vec<Below>,
    /// Change what the image calls the one below it, and nothing else
    #[arg(long)]
    pub(super) name_only: bool,
    /// Print JSON: one object for each step, and one at the end
    #[arg(long)]
    pub(super) json: bool,
}

/// Options of `image commit`.
#[derive(Debug, Args)]
pub(super) struct CommitArgs {
    /// qcow2 image
    #[arg(value_hint = ValueHint::FilePath)]
    pub(super) path: PathBuf,
    #[command(flatten)]
    pub(super) chain: ChainArgs,
    /// Leave the image as it is, instead of emptying it
    #[arg(long)]
    pub(super) keep: bool,
    /// Print JSON: one object for each step, and one at the end
    #[arg(long)]
    pub(super) json: bool,
}
