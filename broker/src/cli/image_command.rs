//! `image create|info`.

use super::SCHEMA_VERSION;
use super::failure::{Failure, START, USAGE, print, print_json};
use crate::image::raw::{ImageError, Info, create, info};
use crate::vmfile::{parse_size, show_size};
use clap::{Args, Subcommand, ValueHint};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Commands about disk images.
#[derive(Debug, Subcommand)]
pub(super) enum ImageCommand {
    /// Make an image of zeros that takes no room until it is written
    #[command(after_long_help = "\
Examples:
  bulkhead image create root.img 8GiB
  bulkhead image create scratch.img 512MiB --force --json
")]
    Create(CreateArgs),
    /// Tell the sizes of an image, without looking into it
    #[command(after_long_help = "\
The format is what --format says and never probed: a guest can write any header.

Examples:
  bulkhead image info root.img
")]
    Info(InfoArgs),
}

/// Options of `image create`.
#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// File to make
    #[arg(value_hint = ValueHint::FilePath)]
    path: PathBuf,
    /// Size with a unit, such as 8GiB; a multiple of 512 bytes
    #[arg(value_parser = parse_size)]
    size: u64,
    /// Replace an existing file and lose what it holds
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    common: CommonArgs,
}

/// Options of `image info`.
#[derive(Debug, Args)]
pub(super) struct InfoArgs {
    /// Image file or block device
    #[arg(value_hint = ValueHint::FilePath)]
    path: PathBuf,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct CommonArgs {
    /// Image format; only raw is supported yet
    #[arg(long, default_value = "raw", value_parser = parse_format)]
    format: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn parse_format(text: &str) -> Result<String, String> {
    match text {
        "raw" => Ok(text.to_owned()),
        _ => Err("expected raw".to_owned()),
    }
}

#[derive(Serialize)]
struct Report<'a> {
    schema_version: u32,
    path: &'a Path,
    format: &'a str,
    apparent_size: u64,
    allocated_size: Option<u64>,
    block_device: bool,
}

/// Runs an image command.
pub(super) fn run(command: &ImageCommand) -> Result<u8, Failure> {
    let (doing, path, common, done) = match command {
        ImageCommand::Create(args) => {
            let done = create(&args.path, args.size, args.force);
            ("making", &args.path, &args.common, done)
        }
        ImageCommand::Info(args) => ("inspecting", &args.path, &args.common, info(&args.path)),
    };
    let found = done.map_err(|error| {
        let code = match &error {
            ImageError::Size(_) | ImageError::Kind(_) => USAGE,
            ImageError::Io(error) => match error.kind() {
                std::io::ErrorKind::NotFound
                | std::io::ErrorKind::AlreadyExists
                | std::io::ErrorKind::PermissionDenied => USAGE,
                _ => START,
            },
        };
        Failure::because(
            code,
            format!("{doing} the image {}", path.display()),
            &error,
        )
    })?;
    report(path, common, &found)?;
    Ok(0)
}

fn report(path: &Path, common: &CommonArgs, found: &Info) -> Result<(), Failure> {
    if common.json {
        return print_json(&Report {
            schema_version: SCHEMA_VERSION,
            path,
            format: &common.format,
            apparent_size: found.apparent_bytes,
            allocated_size: found.allocated_bytes,
            block_device: found.is_block_device,
        });
    }
    let size = |bytes: u64| match show_size(bytes) {
        text if text.ends_with("iB") => format!("{text} ({bytes} bytes)"),
        _ => format!("{bytes} bytes"),
    };
    let allocated = found
        .allocated_bytes
        .map_or_else(|| "all of it (block device)".to_owned(), size);
    print(&format!(
        "path       {}\nformat     {}\napparent   {}\nallocated  {allocated}\n",
        super::failure::printable(&path.display().to_string()),
        common.format,
        size(found.apparent_bytes),
    ))
}
