//! A whole image, read and written by plain system calls, while no machine uses it.

use crate::header::read_at;
use crate::{Image, ImageError, Layer, Place, Use};
use nix::errno::Errno;
use nix::sys::uio::pwrite;
use std::fs::File;
use std::sync::Arc;

/// Most bytes that are looked at together.
pub(crate) const PART_BYTES: usize = 1 << 20;

/// Something that a disk can be copied from.
pub(crate) trait Readable {
    /// Size of the disk in bytes.
    fn bytes(&self) -> u64;

    /// Whether there may be anything but zeroes from `at` on, and for how many bytes that holds: at least one.
    fn has_data(&self, at: u64) -> Result<(bool, u64), Errno>;

    /// Reads; the range is inside of the disk.
    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno>;
}

/// An image with its files.
#[derive(Debug)]
pub(crate) struct Offline {
    pub(crate) image: Image,
    files: Vec<Arc<File>>,
}

impl Offline {
    pub(crate) fn open(layers: Vec<Layer>, how: Use) -> Result<Self, ImageError> {
        let mut files = Vec::new();
        for source in layers.iter().flat_map(|layer| &layer.files) {
            files.push(Arc::clone(&source.file));
        }
        let image = Image::open(layers, how)?;
        Ok(Self { image, files })
    }

    fn file(&self, number: u32) -> Result<&File, Errno> {
        self.files
            .get(number as usize)
            .map(AsRef::as_ref)
            .ok_or(Errno::EBADF)
    }

    /// Writes; what it has changed is in the image after [`Image::commit`].
    pub(crate) fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno> {
        let (mut at, mut rest) = (at, from);
        while !rest.is_empty() {
            let bytes = rest.len() as u64;
            let (place, has) = self.image.locate(at, bytes)?;
            let done = match place {
                Place::File {
                    number,
                    at,
                    writable: true,
                } => {
                    write_all(self.file(number)?, at, part(rest, has))?;
                    has
                }
                _ => {
                    let write =
                        |number, at, bytes| write_all(self.file(number)?, at, part(rest, bytes));
                    self.image.allocate(at, bytes, write)?.bytes
                }
            };
            at += done;
            rest = usize::try_from(done)
                .ok()
                .and_then(|done| rest.get(done..))
                .unwrap_or_default();
        }
        Ok(())
    }

    /// Gives the first image another size.
    pub(crate) fn resize(&mut self, bytes: u64) -> Result<(), ImageError> {
        match &mut self.image {
            Image::Flat(flat) => flat.resize(bytes),
            Image::Qcow2(image) => image.resize(bytes),
        }
    }

    /// Makes everything durable.
    pub(crate) fn sync(&self) -> Result<(), Errno> {
        self.image.commit()?;
        for file in &self.files {
            match nix::unistd::fdatasync(file) {
                // A file that was opened for reading.
                Ok(()) | Err(Errno::EBADF | Errno::EINVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}

impl Readable for Offline {
    fn bytes(&self) -> u64 {
        self.image.bytes()
    }

    fn has_data(&self, at: u64) -> Result<(bool, u64), Errno> {
        let left = self.bytes().saturating_sub(at);
        let (place, has) = self.image.locate(at, left)?;
        Ok((place != Place::Zeroes, has))
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        let (mut at, mut rest) = (at, to);
        while !rest.is_empty() {
            let (place, has) = self.image.locate(at, rest.len() as u64)?;
            let has = usize::try_from(has).map_or(rest.len(), |has| has.min(rest.len()));
            let (now, later) = rest.split_at_mut(has);
            match place {
                Place::File { number, at, .. } => read_at(self.file(number)?, at, now)?,
                Place::Zeroes => now.fill(0),
                Place::Encoded => self.image.read(at, now)?,
            }
            at += has as u64;
            rest = later;
        }
        Ok(())
    }
}

/// Calls `each` with every piece of `from` that is not all zeroes, and with how far it is.
pub(crate) fn copy(
    from: &dyn Readable,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), Errno>,
    mut progress: impl FnMut(u64),
) -> Result<u64, Errno> {
    let (mut at, mut written) = (0, 0);
    let mut buffer = vec![0; PART_BYTES];
    while at < from.bytes() {
        let (has_data, bytes) = from.has_data(at)?;
        let bytes = bytes.min(from.bytes() - at);
        if !has_data {
            at += bytes;
            progress(at);
            continue;
        }
        let len = usize::try_from(bytes).map_or(PART_BYTES, |bytes| bytes.min(PART_BYTES));
        let part = buffer.get_mut(..len).ok_or(Errno::EINVAL)?;
        from.read(at, part)?;
        // In pages, so that a hole in a large cluster stays one.
        for (index, page) in part.chunks(4096).enumerate() {
            if page.iter().any(|&byte| byte != 0) {
                each(at + index as u64 * 4096, page)?;
                written += page.len() as u64;
            }
        }
        at += len as u64;
        progress(at);
    }
    Ok(written)
}

fn part(from: &[u8], bytes: u64) -> &[u8] {
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    from.get(..bytes).unwrap_or(from)
}

/// Writes all of it.
pub(crate) fn write_all(file: &File, at: u64, from: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while let Some(rest) = from.get(done..)
        && !rest.is_empty()
    {
        let to = at
            .checked_add(done as u64)
            .and_then(|at| i64::try_from(at).ok());
        match pwrite(file, rest, to.ok_or(Errno::EFBIG)?) {
            Ok(0) => return Err(Errno::EIO),
            Ok(n) => done += n,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
