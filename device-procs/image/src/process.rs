//! `bulkhead-image`: one piece of work on disk images, in a process that can reach nothing but their files.
//!
//! Images are looked at only when the process is locked. It ends when its work is done, or when nobody
//! listens to how far it is.

use crate::boot::{self, Wish};
use crate::header::Header;
use crate::import::{Grains, Vhd};
use crate::offline::{Offline, PART_BYTES, Readable, copy, write_all};
use crate::{Descriptor, ImageError, Layer, Source, Use, backing_name, create_qcow2, refcounts};
use bulkhead_ipc::channel::ChannelError;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::{FdRole, ImageFormat, ImageLayer, KindConfig};
use bulkhead_ipc::protocol::image::{ForeignFormat, FromImage, ImageConfig, ImageJob, ImageReport};
use bulkhead_runtime::control::Control;
use bulkhead_runtime::{Newborn, Stillbirth, leave, live_out};
use nix::errno::Errno;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;

/// Reports of how far the work is, at most.
const REPORTS: u64 = 200;
/// Exit status of work that could not be done; its reason was told.
const EXIT_FAILED: i32 = 1;

/// Runs the process from its birth to its end.
#[must_use]
pub fn run() -> ExitCode {
    live_out(Newborn::receive(ProcKind::Image), bear)
}

fn bear(mut newborn: Newborn) -> Result<i32, Stillbirth> {
    let work = match take(&mut newborn) {
        Ok(work) => work,
        Err(cause) => newborn.fail(&cause),
    };
    let (control, _id) = newborn.lock()?;
    let teller = Teller { control, told: 0 };
    Ok(work.run(teller))
}

/// The chain of `layers` with the files that `take` hands out, numbered from 0.
///
/// # Errors
/// Those of `take`.
pub fn granted<E>(
    layers: &[ImageLayer],
    mut take: impl FnMut(FdRole, u16) -> Result<OwnedFd, E>,
) -> Result<Vec<Layer>, E> {
    let first = match layers.first().map(|layer| layer.format) {
        Some(ImageFormat::Qcow2) => FdRole::Image,
        _ => FdRole::Disk,
    };
    let (mut chain, mut number) = (Vec::new(), 0);
    for (depth, layer) in (0u16..).zip(layers) {
        let mut files = Vec::new();
        for (place, name) in (0u16..).zip(&layer.files) {
            let (role, index) = match depth {
                0 => (first, place),
                _ => (FdRole::Backing, depth - 1),
            };
            files.push(Source {
                file: Arc::new(take(role, index)?.into()),
                number,
                name: name.clone(),
            });
            number += 1;
        }
        chain.push(Layer {
            format: layer.format,
            files,
        });
    }
    Ok(chain)
}

fn take(newborn: &mut Newborn) -> Result<Work, Stillbirth> {
    let KindConfig::Image(config) = &newborn.config else {
        return Err(Stillbirth::setup("no work on images"));
    };
    let config = config.clone();
    let grants = &mut newborn.grants;
    let layers = granted(&config.layers, |role, index| grants.take(role, index))?;
    let mut next = 0;
    let mut target = Vec::new();
    for layer in &config.target {
        let mut files = Vec::new();
        for name in &layer.files {
            files.push(Source {
                file: Arc::new(grants.take(FdRole::Target, next)?.into()),
                number: next.into(),
                name: name.clone(),
            });
            next += 1;
        }
        target.push(Layer {
            format: layer.format,
            files,
        });
    }
    Ok(Work {
        config,
        layers,
        target,
    })
}

/// Says how far it is.
struct Teller {
    control: Control,
    told: u64,
}

impl Teller {
    fn at(&mut self, done: u64, total: u64) {
        let step = (total / REPORTS).max(1);
        if done / step > self.told {
            self.told = done / step;
            self.tell(&FromImage::Progress { done, total });
        }
    }

    /// Ends the process when nobody listens any more. One who is slow misses something.
    fn tell(&self, message: &FromImage) {
        if let Err(ChannelError::Closed) = self.control.channel().send(message, &[]) {
            leave(EXIT_FAILED);
        }
    }
}

struct Work {
    config: ImageConfig,
    layers: Vec<Layer>,
    target: Vec<Layer>,
}

fn missing(what: &str) -> ImageError {
    ImageError::Chain {
        file: "image".to_owned(),
        what: format!("no {what} was given"),
    }
}

fn sole(layers: Vec<Layer>, what: &str) -> Result<Layer, ImageError> {
    layers.into_iter().next().ok_or_else(|| missing(what))
}

fn first_source(layer: &Layer) -> Result<&Source, ImageError> {
    layer.files.first().ok_or_else(|| missing("file"))
}

fn io(name: &str) -> impl Fn(Errno) -> ImageError {
    move |errno| ImageError::io(name, errno)
}

fn again(source: &Source) -> Source {
    Source {
        file: Arc::clone(&source.file),
        number: source.number,
        name: source.name.clone(),
    }
}

impl Work {
    fn run(self, mut teller: Teller) -> i32 {
        let job = self.config.job.clone();
        let done = match job {
            ImageJob::Info => self.info(),
            ImageJob::Create {
                bytes,
                backing_name,
            } => self.create(bytes, backing_name.as_deref()),
            ImageJob::Convert => self.convert(&mut teller),
            ImageJob::Check { repair } => self.check(repair),
            ImageJob::Resize { bytes, shrink } => self.resize(bytes, shrink),
            ImageJob::Rebase { onto, name_only } => self.rebase(onto, name_only, &mut teller),
            ImageJob::Commit => self.commit(&mut teller),
            ImageJob::BootFiles { kernel, initrd } => {
                self.boot_files(&Wish { kernel, initrd }, &mut teller)
            }
        };
        match done {
            Ok(report) => {
                teller.tell(&FromImage::Done(Box::new(report)));
                0
            }
            Err(error) => {
                let reason = error.to_string();
                teller.tell(&FromImage::Failed { reason });
                EXIT_FAILED
            }
        }
    }

    fn info(self) -> Result<ImageReport, ImageError> {
        let layer = sole(self.layers, "image")?;
        let Source { file, name, .. } = first_source(&layer)?;
        match layer.format {
            ImageFormat::Qcow2 => Ok(about(&Header::read(file, name)?)),
            ImageFormat::Vmdk => {
                let descriptor = Descriptor::read(file, name)?;
                let sizes = descriptor.extents.iter().map(|extent| extent.bytes);
                Ok(ImageReport {
                    bytes: sizes.fold(0, u64::saturating_add),
                    extents: descriptor.names().map(str::to_owned).collect(),
                    ..ImageReport::default()
                })
            }
            ImageFormat::Raw => {
                let image = Offline::open(vec![layer], Use::Read)?;
                Ok(ImageReport {
                    bytes: image.bytes(),
                    ..ImageReport::default()
                })
            }
        }
    }

    fn create(self, bytes: Option<u64>, backing: Option<&str>) -> Result<ImageReport, ImageError> {
        let below = self.layers.first().map(|layer| layer.format);
        let bytes = match (bytes, self.layers) {
            (Some(bytes), _) => bytes,
            (None, layers) => Offline::open(layers, Use::Read)?.bytes(),
        };
        let target = sole(self.target, "target")?;
        let backing = backing.zip(below);
        empty(&target, bytes, backing)?;
        Ok(ImageReport {
            bytes,
            ..ImageReport::default()
        })
    }

    fn convert(self, teller: &mut Teller) -> Result<ImageReport, ImageError> {
        let target = sole(self.target, "target")?;
        let from: Box<dyn Readable> = match self.config.foreign {
            None => Box::new(Offline::open(self.layers, Use::Read)?),
            Some(format) => {
                let layer = sole(self.layers, "image")?;
                let Source { file, name, .. } = again(first_source(&layer)?);
                match format {
                    ForeignFormat::Vhd => Box::new(Vhd::open(file, &name)?),
                    ForeignFormat::VmdkSparse => Box::new(Grains::open(file, &name)?),
                }
            }
        };
        let bytes = from.bytes();
        empty(&target, bytes, None)?;
        let to = Offline::open(vec![target], Use::Write)?;
        let progress = |done| teller.at(done, bytes);
        let written = copy(from.as_ref(), |at, part| to.write(at, part), progress);
        let written = written.and_then(|written| to.sync().map(|()| written));
        Ok(ImageReport {
            bytes,
            written: written.map_err(io("image"))?,
            ..ImageReport::default()
        })
    }

    fn check(self, repair: bool) -> Result<ImageReport, ImageError> {
        let layer = sole(self.layers, "image")?;
        let Source { file, name, .. } = first_source(&layer)?;
        if layer.format != ImageFormat::Qcow2 {
            // There is nothing to count; opening compares sizes.
            let image = Offline::open(vec![layer], Use::Read)?;
            return Ok(ImageReport {
                bytes: image.bytes(),
                leaks: Some(0),
                corruptions: Some(0),
                ..ImageReport::default()
            });
        }
        let header = Header::read(file, name)?;
        if repair {
            refcounts::repair_all(file, &header, name)?;
            nix::unistd::fdatasync(file).map_err(io(name))?;
        }
        let found = refcounts::check(file, &header, name)?;
        Ok(ImageReport {
            leaks: found.map(|count| count.leaks),
            corruptions: found.map(|count| count.corruptions),
            used: found.map(|count| count.used),
            ..about(&header)
        })
    }

    fn resize(self, bytes: u64, shrink: bool) -> Result<ImageReport, ImageError> {
        let layers = self.layers;
        let name = layers.first().map_or("image", crate::name_of).to_owned();
        let field = |got: String, expected: &str| ImageError::Field {
            file: name.clone(),
            field: "size",
            got,
            expected: expected.to_owned(),
        };
        let mut image = Offline::open(layers, Use::Write)?;
        let before = image.bytes();
        if bytes < before && !shrink {
            let expected =
                format!("at least {before}, or `--shrink`: what is behind it would be lost");
            return Err(field(bytes.to_string(), &expected));
        }
        image.resize(bytes)?;
        image.sync().map_err(io(&name))?;
        Ok(ImageReport {
            bytes: image.bytes(),
            ..ImageReport::default()
        })
    }

    fn rebase(
        self,
        onto: Option<(String, ImageFormat)>,
        name_only: bool,
        teller: &mut Teller,
    ) -> Result<ImageReport, ImageError> {
        let top = self.layers.first().ok_or_else(|| missing("image"))?;
        let top = again(first_source(top)?);
        let failed = io(&top.name);
        let (mut bytes, mut written) = (Header::read(&top.file, &top.name)?.bytes, 0);
        if !name_only {
            let disk = Offline::open(self.layers, Use::Write)?;
            let below = match self.target.is_empty() {
                true => None,
                false => Some(Offline::open(self.target, Use::Read)?),
            };
            bytes = disk.bytes();
            let differ = |at, was: &[u8], is: &mut [u8]| {
                read_or_zero(below.as_ref(), at, is)?;
                Ok(was != is)
            };
            written = keep(
                &disk,
                false,
                differ,
                |at, part| disk.write(at, part),
                |at| {
                    teller.at(at, bytes);
                },
            )
            .map_err(&failed)?;
            disk.sync().map_err(&failed)?;
        }
        let onto = onto.as_ref().map(|(name, format)| (name.as_str(), *format));
        backing_name::rename(&top.file, onto, &top.name)?;
        nix::unistd::fdatasync(&top.file).map_err(&failed)?;
        Ok(ImageReport {
            bytes,
            written,
            ..ImageReport::default()
        })
    }

    fn boot_files(self, wish: &Wish, teller: &mut Teller) -> Result<ImageReport, ImageError> {
        let target = sole(self.target, "target")?;
        let kernel = first_source(&target)?;
        let initrd = target.files.get(1).ok_or_else(|| missing("target"))?;
        let disk = Offline::open(self.layers, Use::Read)?;
        let bytes = Readable::bytes(&disk);
        let progress = |done, total| teller.at(done, total);
        let found = boot::take_out(Rc::new(disk), wish, &kernel.file, &initrd.file, progress)?;
        Ok(ImageReport {
            bytes,
            written: found.kernel.bytes + found.initrd.as_ref().map_or(0, |file| file.bytes),
            boot: Some(found),
            ..ImageReport::default()
        })
    }

    fn commit(self, teller: &mut Teller) -> Result<ImageReport, ImageError> {
        let name = self
            .layers
            .first()
            .map_or("image", crate::name_of)
            .to_owned();
        let failed = io(&name);
        let disk = Offline::open(self.layers, Use::Read)?;
        let mut below = Offline::open(self.target, Use::Write)?;
        let bytes = disk.bytes();
        if below.bytes() < bytes {
            below.resize(bytes)?;
        }
        let differ = |at, was: &[u8], is: &mut [u8]| {
            below.read(at, is)?;
            Ok(was != is)
        };
        let written = keep(
            &disk,
            true,
            differ,
            |at, part| below.write(at, part),
            |at| {
                teller.at(at, bytes);
            },
        );
        let written = written.map_err(&failed)?;
        below.sync().map_err(&failed)?;
        Ok(ImageReport {
            bytes,
            written,
            ..ImageReport::default()
        })
    }
}

/// Gives `each` every part of `disk` that its first layer has (`own`), or has not, and that is another below.
/// Returns how many bytes that were.
fn keep(
    disk: &Offline,
    own: bool,
    differ: impl Fn(u64, &[u8], &mut [u8]) -> Result<bool, Errno>,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), Errno>,
    mut progress: impl FnMut(u64),
) -> Result<u64, Errno> {
    let (mut at, mut written) = (0, 0);
    let (mut was, mut is) = (vec![0; PART_BYTES], vec![0; PART_BYTES]);
    while at < disk.bytes() {
        let left = disk.bytes() - at;
        let (has, bytes) = disk.image.has_own(at, left)?;
        if has != own {
            at += bytes;
            progress(at);
            continue;
        }
        let len = usize::try_from(bytes).map_or(PART_BYTES, |bytes| bytes.min(PART_BYTES));
        let (Some(was), Some(is)) = (was.get_mut(..len), is.get_mut(..len)) else {
            return Err(Errno::EINVAL);
        };
        disk.read(at, was)?;
        if differ(at, was, is)? {
            each(at, was)?;
            written += len as u64;
        }
        at += len as u64;
        progress(at);
    }
    Ok(written)
}

/// What a disk shows, and zeroes behind its end.
fn read_or_zero(disk: Option<&Offline>, at: u64, to: &mut [u8]) -> Result<(), Errno> {
    let has = disk.map_or(0, |disk| disk.bytes().saturating_sub(at));
    let has = usize::try_from(has).map_or(to.len(), |has| has.min(to.len()));
    let (inside, behind) = to.split_at_mut(has);
    behind.fill(0);
    match disk {
        Some(disk) if !inside.is_empty() => disk.read(at, inside),
        _ => Ok(()),
    }
}

/// Makes empty files an image of zeroes.
fn empty(
    target: &Layer,
    bytes: u64,
    backing: Option<(&str, ImageFormat)>,
) -> Result<(), ImageError> {
    let first = first_source(target)?;
    let set_len =
        |file: &File, name: &str| file.set_len(bytes).map_err(|e| ImageError::io(name, e));
    match target.format {
        ImageFormat::Raw => set_len(&first.file, &first.name),
        ImageFormat::Qcow2 => create_qcow2(again(first), bytes, backing),
        ImageFormat::Vmdk => {
            let extent = target.files.get(1).ok_or_else(|| missing("extent"))?;
            set_len(&extent.file, &extent.name)?;
            // Any number will do: it is there to tell that an image below has changed.
            let cid = u32::try_from(bytes % 0xffff_fff1).unwrap_or(1) | 1;
            let text = Descriptor::monolithic(&extent.name, bytes, cid);
            write_all(&first.file, 0, text.as_bytes()).map_err(io(&first.name))
        }
    }
}

fn about(header: &Header) -> ImageReport {
    ImageReport {
        bytes: header.bytes,
        cluster_bytes: Some(header.cluster_bytes),
        version: Some(header.version),
        backing_name: header.backing.clone(),
        backing_format: header.backing_format.clone(),
        snapshots: header.snapshots,
        corrupt: header.corrupt,
        ..ImageReport::default()
    }
}
