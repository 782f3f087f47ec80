//! `image info|create|convert|resize|check|rebase|commit`.

use super::SCHEMA_VERSION;
use super::failure::{Failure, START, USAGE, print, print_json_line};
use super::image_args::{
    ChainArgs, CheckArgs, CommitArgs, ConvertArgs, CreateArgs, From, ImageCommand, InfoArgs,
    RebaseArgs, ResizeArgs, SeedArgs,
};
use super::image_target::Target;
use super::paths::{PathOptions, Paths};
use super::run_command::{make_private, users};
use crate::image::chain::{Chain, Link, name_of};
use crate::image::raw::{self, ImageError};
use crate::image::work::{self, Place, WorkError};
use crate::seed::{self, SeedError};
use crate::vm::session::RunError;
use crate::vm::spec::CloudInitSpec;
use crate::vmfile::show_size;
use bulkhead_ipc::protocol::birth::ImageFormat;
use bulkhead_ipc::protocol::image::{ImageConfig, ImageJob, ImageReport};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fs;
use std::io::IsTerminal;
use std::path::Path;

#[derive(Serialize)]
struct Shown<'a> {
    schema_version: u32,
    path: &'a Path,
    format: String,
    apparent_size: u64,
    allocated_size: Option<u64>,
    block_device: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_format: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    extents: &'a [String],
    #[serde(skip_serializing_if = "is_zero")]
    snapshots: u32,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    corrupt: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    leaks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    corruptions: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    clusters_used: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    written: Option<u64>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
const fn is_zero(n: &u32) -> bool {
    *n == 0
}

#[derive(Serialize)]
struct Progress {
    schema_version: u32,
    done: u64,
    total: u64,
}

/// Where the work is done, and how far it is shown.
pub(super) struct Workshop {
    paths: Paths,
    json: bool,
}

fn usage(error: &RunError) -> Failure {
    Failure::because(USAGE, "", error)
}

impl Workshop {
    fn new(options: &PathOptions, json: bool) -> Result<Self, Failure> {
        Ok(Self {
            paths: Paths::new(options)?,
            json,
        })
    }

    fn chain(&self, links: &[Link], writes: bool) -> Result<Chain, Failure> {
        Chain::open(links, writes, &self.paths.runtime).map_err(|error| usage(&error))
    }

    /// Has work done on `chain`, and on `target` if there is one.
    fn work(
        &self,
        doing: &str,
        config: ImageConfig,
        chain: &Chain,
        target: &Chain,
    ) -> Result<ImageReport, Failure> {
        let binaries = self.paths.binaries()?;
        let policies = self.paths.policies();
        make_private(&self.paths.runtime).map_err(|error| {
            let doing = format!("making the directory {}", self.paths.runtime.display());
            Failure::because(START, doing, &error)
        })?;
        let place = Place {
            binaries: &binaries,
            policies: policies.as_deref(),
            runtime: &self.paths.runtime,
            users: users(&self.paths)?,
        };
        let mut gifts = chain.gifts();
        gifts.extend(target.target_gifts());
        let bar = self.bar(doing);
        let done = work::run(&place, config, &gifts, |done, total| match &bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            None if self.json => {
                // Who does not read them does without.
                let schema_version = SCHEMA_VERSION;
                let _shown = print_json_line(&Progress {
                    schema_version,
                    done,
                    total,
                });
            }
            None => {}
        });
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        done.map_err(|error| {
            let code = match error {
                WorkError::Failed(_) | WorkError::Policy(_) => USAGE,
                WorkError::Start(_) | WorkError::Lost(_) | WorkError::Late(_) => START,
            };
            Failure::because(code, doing, &error)
        })
    }

    fn bar(&self, doing: &str) -> Option<ProgressBar> {
        if self.json || !std::io::stderr().is_terminal() {
            return None;
        }
        let style = "{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} to go";
        let bar = ProgressBar::new(1);
        bar.set_style(
            ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_message(doing.to_owned());
        Some(bar)
    }

    fn show(
        &self,
        path: &Path,
        format: impl ToString,
        report: &ImageReport,
    ) -> Result<(), Failure> {
        let found = raw::info(path).map_err(|error| {
            Failure::because(code_of(&error), doing("inspecting", path), &error)
        })?;
        let format = format.to_string();
        if self.json {
            return print_json_line(&Shown {
                schema_version: SCHEMA_VERSION,
                path,
                format,
                apparent_size: report.bytes,
                allocated_size: found.allocated_bytes,
                block_device: found.is_block_device,
                cluster_size: report.cluster_bytes,
                version: report.version,
                backing: report.backing_name.as_deref(),
                backing_format: report.backing_format.as_deref(),
                extents: &report.extents,
                snapshots: report.snapshots,
                corrupt: report.corrupt,
                leaks: report.leaks,
                corruptions: report.corruptions,
                clusters_used: report.used,
                written: (report.written > 0).then_some(report.written),
            });
        }
        let size = |bytes: u64| match show_size(bytes) {
            text if text.ends_with("iB") => format!("{text} ({bytes} bytes)"),
            _ => format!("{bytes} bytes"),
        };
        let allocated = found
            .allocated_bytes
            .map_or_else(|| "all of it (block device)".to_owned(), size);
        let mut lines = vec![
            ("path", path.display().to_string()),
            ("format", format),
            ("apparent", size(report.bytes)),
            ("allocated", allocated),
        ];
        let mut line = |name, value: Option<String>| lines.extend(value.map(|v| (name, v)));
        line("clusters", report.cluster_bytes.map(size));
        line("version", report.version.map(|v| v.to_string()));
        line(
            "backing",
            report.backing_name.as_ref().map(|name| {
                let format = report
                    .backing_format
                    .as_deref()
                    .unwrap_or("format not told");
                format!("{name} ({format}); a disk needs backing=PATH:FORMAT")
            }),
        );
        for extent in &report.extents {
            line(
                "extent",
                Some(format!("{extent}; a disk needs extent=PATH")),
            );
        }
        line(
            "snapshots",
            (report.snapshots > 0).then(|| report.snapshots.to_string()),
        );
        line(
            "corrupt",
            report.corrupt.then(|| "so it is marked".to_owned()),
        );
        line("leaks", report.leaks.map(|n| format!("{n} clusters")));
        line("corruptions", report.corruptions.map(|n| n.to_string()));
        line(
            "written",
            (report.written > 0).then(|| size(report.written)),
        );
        let text: String = lines
            .iter()
            .map(|(name, value)| format!("{name:<11}{}\n", super::failure::printable(value)))
            .collect();
        print(&text)
    }
}

fn code_of(error: &ImageError) -> u8 {
    match error {
        ImageError::Size(_) | ImageError::Kind(_) => USAGE,
        ImageError::Io(error) => match error.kind() {
            std::io::ErrorKind::NotFound
            | std::io::ErrorKind::AlreadyExists
            | std::io::ErrorKind::PermissionDenied => USAGE,
            _ => START,
        },
    }
}

fn doing(what: &str, path: &Path) -> String {
    format!("{what} the image {}", path.display())
}

fn job(job: ImageJob, chain: &Chain, target: &Chain) -> ImageConfig {
    ImageConfig {
        job,
        layers: chain.layers.clone(),
        foreign: None,
        target: target.layers.clone(),
    }
}

/// Runs an image command.
pub(super) fn run(command: &ImageCommand, options: &PathOptions) -> Result<u8, Failure> {
    match command {
        ImageCommand::Create(args) => create(args, &Workshop::new(options, args.json)?),
        ImageCommand::Info(args) => info(args, &Workshop::new(options, args.json)?),
        ImageCommand::Convert(args) => convert(args, &Workshop::new(options, args.json)?),
        ImageCommand::Resize(args) => resize(args, &Workshop::new(options, args.json)?),
        ImageCommand::Check(args) => check(args, &Workshop::new(options, args.json)?),
        ImageCommand::Rebase(args) => rebase(args, &Workshop::new(options, args.json)?),
        ImageCommand::Commit(args) => commit(args, &Workshop::new(options, args.json)?),
        ImageCommand::Seed(args) => seed(args),
    }
}

fn create(args: &CreateArgs, shop: &Workshop) -> Result<u8, Failure> {
    let making = doing("making", &args.path);
    let below: Vec<Link> = args.backing.iter().map(|b| b.0.clone()).collect();
    if args.format == ImageFormat::Raw {
        let Some(bytes) = args.size.filter(|_| below.is_empty()) else {
            return Err(Failure::new(
                USAGE,
                format!("{making}: expected a size, and no backing image"),
            ));
        };
        raw::create(&args.path, bytes, args.force)
            .map_err(|error| Failure::because(code_of(&error), &making, &error))?;
        let report = ImageReport {
            bytes,
            ..ImageReport::default()
        };
        shop.show(&args.path, args.format, &report)?;
        return Ok(0);
    }
    if let Some(bytes) = args
        .size
        .filter(|bytes| *bytes == 0 || !bytes.is_multiple_of(raw::SECTOR_BYTES))
    {
        return Err(Failure::because(USAGE, making, &ImageError::Size(bytes)));
    }
    if below.is_empty() && args.size.is_none() {
        return Err(Failure::new(
            USAGE,
            format!("{making}: expected a size, or a backing image"),
        ));
    }
    if !below.is_empty() && args.format != ImageFormat::Qcow2 {
        return Err(Failure::new(
            USAGE,
            format!("{making}: only qcow2 images have backing images"),
        ));
    }
    let chain = shop.chain(&below, false)?;
    let target = Target::make(&args.path, args.format, args.force)?;
    let backing_name = below.first().map(|link| called(&args.path, &link.path));
    let work = ImageJob::Create {
        bytes: args.size,
        backing_name,
    };
    let report = shop.work(
        &making,
        job(work, &chain, target.chain()),
        &chain,
        target.chain(),
    )?;
    target.keep()?;
    shop.show(&args.path, args.format, &report)?;
    Ok(0)
}

/// What an image at `path` is to call one at `below`.
fn called(path: &Path, below: &Path) -> String {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let (path, below) = (absolute(path), absolute(below));
    if path.parent() == below.parent() {
        return name_of(&below);
    }
    below.to_string_lossy().into_owned()
}

fn info(args: &InfoArgs, shop: &Workshop) -> Result<u8, Failure> {
    let path = &args.path;
    if args.format == ImageFormat::Raw {
        let found = raw::info(path).map_err(|error| {
            Failure::because(code_of(&error), doing("inspecting", path), &error)
        })?;
        let report = ImageReport {
            bytes: found.apparent_bytes,
            ..ImageReport::default()
        };
        shop.show(path, args.format, &report)?;
        return Ok(0);
    }
    // Whoever has the image may go on: its header is looked at, and nothing else.
    let inspecting = doing("inspecting", path);
    let file = fs::File::open(path).map_err(|e| Failure::because(USAGE, &inspecting, &e))?;
    let link = Link {
        path: path.clone(),
        format: args.format,
        extents: Vec::new(),
    };
    let chain = Chain::of_one(&link, file);
    let none = Chain::default();
    let report = shop.work(
        &inspecting,
        job(ImageJob::Info, &chain, &none),
        &chain,
        &none,
    )?;
    shop.show(path, args.format, &report)?;
    Ok(0)
}

fn convert(args: &ConvertArgs, shop: &Workshop) -> Result<u8, Failure> {
    let converting = doing("converting", &args.source);
    let format = match args.from {
        From::Image(format) => format,
        From::Foreign(_) => ImageFormat::Raw,
    };
    let links = args.chain.links(&args.source, format);
    let chain = shop.chain(&links, false)?;
    let target = Target::make(&args.target, args.to, args.force)?;
    let mut config = job(ImageJob::Convert, &chain, target.chain());
    if let From::Foreign(foreign) = args.from {
        config.foreign = Some(foreign);
    }
    let report = shop.work(&converting, config, &chain, target.chain())?;
    target.keep()?;
    shop.show(&args.target, args.to, &report)?;
    Ok(0)
}

fn resize(args: &ResizeArgs, shop: &Workshop) -> Result<u8, Failure> {
    let resizing = doing("resizing", &args.path);
    if args.size == 0 || !args.size.is_multiple_of(raw::SECTOR_BYTES) {
        return Err(Failure::because(
            USAGE,
            resizing,
            &ImageError::Size(args.size),
        ));
    }
    let chain = shop.chain(&args.chain.links(&args.path, args.format), true)?;
    let work = ImageJob::Resize {
        bytes: args.size,
        shrink: args.shrink,
    };
    let none = Chain::default();
    let report = shop.work(&resizing, job(work, &chain, &none), &chain, &none)?;
    shop.show(&args.path, args.format, &report)?;
    Ok(0)
}

fn check(args: &CheckArgs, shop: &Workshop) -> Result<u8, Failure> {
    let checking = doing("checking", &args.path);
    // Tables are compared with each other; images below have their own.
    let none = ChainArgs::default();
    let links = match args.format {
        ImageFormat::Vmdk => args.chain.links(&args.path, args.format),
        _ => none.links(&args.path, args.format),
    };
    let chain = shop.chain(&links, args.repair)?;
    let work = ImageJob::Check {
        repair: args.repair,
    };
    let none = Chain::default();
    let report = shop.work(&checking, job(work, &chain, &none), &chain, &none)?;
    shop.show(&args.path, args.format, &report)?;
    match (report.leaks, report.corruptions) {
        (Some(0), Some(0)) => Ok(0),
        (None, _) | (_, None) => Err(Failure::new(
            START,
            format!(
                "{checking}: images with internal snapshots, bitmaps or subclusters cannot be checked"
            ),
        )),
        _ => Err(Failure::new(
            START,
            format!("{checking}: it is not as it should be"),
        )),
    }
}

fn rebase(args: &RebaseArgs, shop: &Workshop) -> Result<u8, Failure> {
    let rebasing = doing("rebasing", &args.path);
    let links = match args.name_only {
        // Nothing below is looked at.
        true => vec![Link {
            path: args.path.clone(),
            format: ImageFormat::Qcow2,
            extents: Vec::new(),
        }],
        false => args.chain.links(&args.path, ImageFormat::Qcow2),
    };
    let chain = shop.chain(&links, true)?;
    let onto: Vec<Link> = args.onto.iter().map(|onto| onto.0.clone()).collect();
    let target = match args.name_only {
        true => Chain::default(),
        false => shop.chain(&onto, false)?,
    };
    let named = onto
        .first()
        .map(|link| (called(&args.path, &link.path), link.format));
    let work = ImageJob::Rebase {
        onto: named,
        name_only: args.name_only,
    };
    let report = shop.work(&rebasing, job(work, &chain, &target), &chain, &target)?;
    shop.show(&args.path, ImageFormat::Qcow2, &report)?;
    Ok(0)
}

fn commit(args: &CommitArgs, shop: &Workshop) -> Result<u8, Failure> {
    let committing = doing("committing", &args.path);
    let links = args.chain.links(&args.path, ImageFormat::Qcow2);
    let Some((_, below)) = links.split_first().filter(|(_, below)| !below.is_empty()) else {
        return Err(Failure::new(
            USAGE,
            format!("{committing}: expected --backing, which is written to"),
        ));
    };
    // The image below is locked once, as it is written to, and opened a second time to be read.
    let target = shop.chain(below, true)?;
    let top = links.get(..1).unwrap_or_default();
    let chain = shop.chain(top, true)?;
    let chain = chain
        .above(&target)
        .map_err(|e| Failure::because(START, &committing, &e))?;
    let config = job(ImageJob::Commit, &chain, &target);
    let report = shop.work(&committing, config, &chain, &target)?;
    if !args.keep {
        let fresh = Target::make(&args.path, ImageFormat::Qcow2, true)?;
        let backing_name = below.first().map(|link| called(&args.path, &link.path));
        let work = ImageJob::Create {
            bytes: Some(report.bytes),
            backing_name,
        };
        // Of the images below only the format is of interest.
        let below = target
            .first_as_backing()
            .map_err(|e| Failure::because(START, &committing, &e))?;
        shop.work(
            &committing,
            job(work, &below, fresh.chain()),
            &below,
            fresh.chain(),
        )?;
        fresh.keep()?;
    }
    shop.show(&args.path, ImageFormat::Qcow2, &report)?;
    Ok(0)
}

/// Makes a seed disk. No process does it: only files of the user are read, and as they are.
fn seed(args: &SeedArgs) -> Result<u8, Failure> {
    let spec = CloudInitSpec {
        user_data: args.user_data.clone(),
        meta_data: args.meta_data.clone(),
        network_config: args.network_config.clone(),
        ssh_keys: args
            .ssh_keys
            .iter()
            .map(|key| key.trim().to_owned())
            .collect(),
        hostname: args.hostname.clone(),
    };
    let failed = |error: SeedError| {
        let code = match &error {
            SeedError::Write { cause, .. } => match cause.kind() {
                std::io::ErrorKind::AlreadyExists
                | std::io::ErrorKind::NotFound
                | std::io::ErrorKind::PermissionDenied => USAGE,
                _ => START,
            },
            SeedError::Read { .. } | SeedError::Large(_) | SeedError::TooLarge(_) => USAGE,
        };
        Failure::because(code, "", &error)
    };
    let image = seed::image(&spec, &args.name).map_err(failed)?;
    seed::write(&args.path, &image, args.force).map_err(failed)?;
    Ok(0)
}
