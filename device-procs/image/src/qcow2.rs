//! qcow2 images through imago, with the chain that was granted.

use crate::create::create_qcow2;
use crate::extent::Extent;
use crate::header::Header;
use crate::refcounts::{self, Repair};
use crate::{
    ImageError, ImageFormat, Layer, Place, Source, TABLES_BYTES_MAX, Use, errno_of, name_of,
};
use imago::format::PreallocateMode;
use imago::format::access::Mapping;
use imago::format::drivers::ShallowMapping;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess};
use nix::errno::Errno;
use std::cell::Cell;
use std::sync::Arc;

/// Tables of one layer that imago keeps in memory: L2 tables, and blocks of refcounts.
const TABLES_PER_LAYER: u64 = 128 + 32;
/// Zeroes written at once where an image cannot say that a range is zero.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// A part of a disk that has got a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocated {
    /// For how many bytes that was done: at least one.
    pub bytes: u64,
    /// Whether bytes of a layer below may have been copied. They are durable there, so their copies have
    /// to be before [`super::Image::commit`] puts them in their place.
    pub copied: bool,
}

/// A qcow2 image.
#[derive(Debug)]
pub struct Qcow2Image {
    access: FormatAccess<Extent>,
    name: String,
    cluster_bytes: u64,
    writable: bool,
    /// Whether it ends with its user.
    scratch: bool,
    /// Whether there is a layer below.
    has_backing: bool,
    /// Whether it knows zero clusters (version 3).
    knows_zeroes: Cell<bool>,
}

impl Qcow2Image {
    pub(crate) fn open(mut first: Layer, below: Vec<Layer>, how: Use) -> Result<Self, ImageError> {
        let name = name_of(&first).to_owned();
        let writable = how != Use::Read;
        let (mut tables, mut lower) = (0, None::<(FormatAccess<Extent>, ImageFormat)>);
        let has_backing = !below.is_empty();
        for layer in below.into_iter().rev() {
            let format = layer.format;
            let access = match format {
                ImageFormat::Raw if lower.is_none() => {
                    let (name, extent) = only_file(layer)?;
                    let raw = Raw::open_image(extent, false);
                    FormatAccess::new(raw.map_err(|e| ImageError::io(&name, e))?)
                }
                ImageFormat::Qcow2 => open_layer(layer, lower.take(), false, &mut tables)?.0,
                _ => {
                    return Err(ImageError::Chain {
                        file: name_of(&layer).to_owned(),
                        what: format!("a {format} image cannot be in this place of a chain"),
                    });
                }
            };
            lower = Some((access, format));
        }
        if how == Use::Scratch {
            format(&mut first, lower.as_ref())?;
        }
        let (access, header) = open_layer(first, lower, writable, &mut tables)?;
        Ok(Self {
            scratch: how == Use::Scratch,
            access,
            name,
            cluster_bytes: header.cluster_bytes,
            writable,
            has_backing,
            knows_zeroes: Cell::new(header.version >= 3),
        })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.access.size()
    }

    pub(crate) fn locate(&self, at: u64, bytes: u64) -> Result<(Place, u64), Errno> {
        let (mapping, has) = self.told(self.access.get_mapping(at, bytes))?;
        let place = match mapping {
            Mapping::Raw {
                storage,
                offset,
                writable,
                ..
            } => Place::File {
                number: storage.number,
                at: offset,
                writable: writable && self.writable,
            },
            Mapping::Zero { .. } => Place::Zeroes,
            Mapping::Special { .. } => Place::Encoded,
            _ => return Err(Errno::EIO),
        };
        if has == 0 {
            return Err(Errno::EIO);
        }
        Ok((place, has.min(bytes)))
    }

    pub(crate) fn has_own(&self, at: u64, bytes: u64) -> Result<(bool, u64), Errno> {
        let (mapping, has) = self.told(self.access.get_shallow_mapping(at, bytes))?;
        let own = match mapping {
            ShallowMapping::Indirect { .. }
            | ShallowMapping::Zero {
                explicit: false, ..
            } => false,
            ShallowMapping::Eof { .. } => return Err(Errno::EIO),
            _ => true,
        };
        match has {
            0 => Err(Errno::EIO),
            has => Ok((own, has.min(bytes))),
        }
    }

    pub(crate) fn resize(&mut self, bytes: u64) -> Result<(), ImageError> {
        let done = self.access.resize(bytes, PreallocateMode::None);
        done.map_err(|e| ImageError::io(&self.name, e))
    }

    pub(crate) fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        self.told(self.access.read(to, at))
    }

    pub(crate) fn allocate(
        &self,
        at: u64,
        bytes: u64,
        write: impl FnOnce(u32, u64, u64) -> Result<(), Errno>,
    ) -> Result<Allocated, Errno> {
        if !self.writable {
            return Err(Errno::EROFS);
        }
        let (place, _) = self.locate(at, bytes)?;
        let mapping = self.told(self.access.prepare_data_mapping(at, bytes, true))?;
        let has = mapping.length().min(bytes);
        // Dropping the mapping gives the room back.
        write(mapping.storage().number, mapping.offset(), has)?;
        self.told(self.access.commit_data_mapping(mapping))?;
        Ok(Allocated {
            bytes: has,
            copied: !self.scratch && (place != Place::Zeroes || self.has_backing),
        })
    }

    pub(crate) fn zero(&self, at: u64, bytes: u64) -> Result<Allocated, Errno> {
        if !self.writable {
            return Err(Errno::EROFS);
        }
        if self.knows_zeroes.get() {
            match self.access.write_zeroes(at, bytes) {
                Ok(()) => {
                    return Ok(Allocated {
                        bytes,
                        copied: !self.scratch && self.has_backing,
                    });
                }
                Err(e) if e.kind() == std::io::ErrorKind::Unsupported => {
                    self.knows_zeroes.set(false);
                }
                Err(e) => return self.told(Err(e)),
            }
        }
        let part = bytes.min(ZEROES.len() as u64);
        let zeroes = usize::try_from(part)
            .ok()
            .and_then(|part| ZEROES.get(..part));
        self.told(self.access.write(zeroes.unwrap_or_default(), at))?;
        Ok(Allocated {
            bytes: part,
            copied: !self.scratch,
        })
    }

    pub(crate) fn commit(&self) -> Result<(), Errno> {
        if self.writable {
            self.told(self.access.flush())?;
        }
        Ok(())
    }

    /// Every cluster of the disk, the tables for them, and room for what a killed writer leaks until the
    /// next opening.
    pub(crate) fn file_bytes_max(&self) -> u64 {
        let clusters = self.bytes().div_ceil(self.cluster_bytes).saturating_add(8);
        let data = clusters.saturating_mul(self.cluster_bytes);
        // L2 entries and refcounts take 8 to 16 bytes a cluster.
        data.saturating_add(clusters.saturating_mul(32))
            .saturating_add(64 * self.cluster_bytes)
            .saturating_add(64 << 20)
    }

    fn told<T>(&self, result: std::io::Result<T>) -> Result<T, Errno> {
        result.map_err(|error| {
            let errno = errno_of(&error);
            if !matches!(
                errno,
                Errno::ENOSPC | Errno::EDQUOT | Errno::EINTR | Errno::EAGAIN
            ) {
                tracing::warn!(image = self.name, %error, "the image does not do what was asked");
            }
            errno
        })
    }
}

/// Makes the first layer an image on top of the one below, unless it has become that before.
fn format(
    first: &mut Layer,
    lower: Option<&(FormatAccess<Extent>, ImageFormat)>,
) -> Result<(), ImageError> {
    let Some(source) = first.files.first() else {
        return Ok(());
    };
    let (file, name) = (&source.file, &source.name);
    let (bytes, format) = lower.map_or((0, ImageFormat::Raw), |(access, format)| {
        (access.size(), *format)
    });
    // A predecessor that was killed while it did this has left something else, and no data.
    if Header::read(file, name).is_ok_and(|header| header.bytes == bytes && header.l1_at != 0) {
        return Ok(());
    }
    let source = Source {
        file: Arc::clone(file),
        number: source.number,
        name: name.clone(),
    };
    create_qcow2(source, bytes, Some(("the disk's own image", format)))
}

fn only_file(layer: Layer) -> Result<(String, Extent), ImageError> {
    let name = name_of(&layer).to_owned();
    let mut files = layer.files.into_iter();
    match (files.next(), files.next()) {
        (Some(source), None) => {
            let extent = Extent::new(source).map_err(|e| ImageError::io(&name, e))?;
            Ok((name, extent))
        }
        _ => Err(ImageError::Chain {
            file: name,
            what: "only VMDK images have extents".to_owned(),
        }),
    }
}

fn open_layer(
    layer: Layer,
    lower: Option<(FormatAccess<Extent>, ImageFormat)>,
    writable: bool,
    tables: &mut u64,
) -> Result<(FormatAccess<Extent>, Header), ImageError> {
    let name = name_of(&layer).to_owned();
    let Some(Source { file, .. }) = layer.files.first() else {
        return Err(ImageError::Chain {
            file: name,
            what: "no file".to_owned(),
        });
    };
    let header = Header::read(file, &name)?;
    refuse(
        &header,
        &name,
        lower.as_ref().map(|(_, format)| *format),
        writable,
    )?;
    *tables += header.cluster_bytes * TABLES_PER_LAYER;
    if *tables > TABLES_BYTES_MAX {
        return Err(ImageError::Field {
            file: name,
            field: "cluster_bits",
            got: format!("tables of {tables} bytes with those of the layers below"),
            expected: format!(
                "at most {TABLES_BYTES_MAX}: fewer layers, or clusters of 64 KiB (`bulkhead image convert`)"
            ),
        });
    }
    if writable {
        refcounts::covered(file, &header, &name)?;
        match refcounts::repair(file, &header, &name)? {
            Repair::Done(count) if count.lasting > 0 => {
                return Err(ImageError::Chain {
                    file: name,
                    what: format!(
                        "the image is damaged: {} references or counts are wrong for good; it can \
                         only be read (`readonly`)",
                        count.lasting
                    ),
                });
            }
            Repair::Done(count) if count.leaks + count.corruptions > 0 => {
                tracing::info!(image = name, ?count, "refcounts were put right");
            }
            Repair::Done(_) | Repair::Skipped => {}
        }
    }
    let (name, extent) = only_file(layer)?;
    let failed = |e| ImageError::io(&name, e);
    let mut image: Qcow2<Extent> = Qcow2::open_image(extent, writable).map_err(failed)?;
    image.set_backing(lower.map(|(access, _)| access));
    image.set_data_file(None);
    let closed = image.open_implicit_dependencies_gated(DenyImplicitOpenGate::default());
    closed.map_err(failed)?;
    Ok((FormatAccess::new(image), header))
}

/// Refuses what cannot be served, or not as its header says.
fn refuse(
    header: &Header,
    name: &str,
    lower: Option<ImageFormat>,
    writable: bool,
) -> Result<(), ImageError> {
    let chain = |what: String| {
        Err(ImageError::Chain {
            file: name.to_owned(),
            what,
        })
    };
    if header.encrypted {
        return chain("the image is encrypted, which is not supported".to_owned());
    }
    if header.data_file {
        return chain("the image has its data in another file, which is not supported".to_owned());
    }
    if writable && header.corrupt {
        return chain(
            "the image is marked as corrupt: `bulkhead image check` tells more".to_owned(),
        );
    }
    let quoted = |text: &str| text.escape_debug().take(200).collect::<String>();
    match (&header.backing, lower) {
        (None, None) => Ok(()),
        (None, Some(_)) => chain("the image has no backing image, but one was given".to_owned()),
        (Some(backing), None) => {
            let format = header.backing_format.as_deref().unwrap_or("raw or qcow2");
            chain(format!(
                "it needs its backing image \"{}\" ({}), and nothing is opened only because an image \
                 names it: add `backing=PATH:FORMAT` to the disk (`backing` in a VM file)",
                quoted(backing),
                quoted(format)
            ))
        }
        (Some(_), Some(given)) => match header.backing_format.as_deref() {
            Some("raw" | "file") if given != ImageFormat::Raw => chain(format!(
                "its backing image is raw, but was given as {given}"
            )),
            Some("qcow2") if given != ImageFormat::Qcow2 => chain(format!(
                "its backing image is qcow2, but was given as {given}"
            )),
            _ => Ok(()),
        },
    }
}
