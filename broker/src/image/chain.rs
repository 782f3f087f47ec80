//! The files of an image and of those below it, opened and locked for work on them.

use crate::launch::Gift;
use crate::vm::resources::{Hold, image_file};
use crate::vm::session::RunError;
use bulkhead_ipc::protocol::birth::{FdRole, ImageFormat, ImageLayer};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

/// An image, as the user names it.
#[derive(Debug, Clone)]
pub struct Link {
    /// Where it is.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Its extents.
    pub extents: Vec<PathBuf>,
}

/// An open chain.
#[derive(Debug, Default)]
pub struct Chain {
    /// As the process is told of it.
    pub layers: Vec<ImageLayer>,
    files: Vec<File>,
}

impl Chain {
    /// Opens the images, the first one for writing if `writes`.
    ///
    /// # Errors
    /// What cannot be had, and who has it.
    pub fn open(links: &[Link], writes: bool, runtime: &Path) -> Result<Self, RunError> {
        let mut chain = Self::default();
        for (depth, link) in links.iter().enumerate() {
            let mut names = Vec::new();
            for path in std::iter::once(&link.path).chain(&link.extents) {
                let hold = match writes && depth == 0 {
                    true => Hold::Write,
                    false => Hold::Read,
                };
                chain.files.push(image_file("image", path, hold, runtime)?);
                names.push(name_of(path));
            }
            chain.layers.push(ImageLayer {
                format: link.format,
                files: names,
            });
        }
        Ok(chain)
    }

    /// Of files that nobody else has.
    #[must_use]
    pub fn of(layers: Vec<ImageLayer>, files: Vec<File>) -> Self {
        Self { layers, files }
    }

    /// One image whose file is open already, and not locked.
    #[must_use]
    pub fn of_one(link: &Link, file: File) -> Self {
        let layer = ImageLayer {
            format: link.format,
            files: vec![name_of(&link.path)],
        };
        Self::of(vec![layer], vec![file])
    }

    /// This chain on top of `below`, whose locks it relies on.
    ///
    /// # Errors
    /// When there are no descriptors to be had.
    pub fn above(mut self, below: &Self) -> io::Result<Self> {
        for file in &below.files {
            self.files.push(read_again(file)?);
        }
        self.layers.extend(below.layers.iter().cloned());
        Ok(self)
    }

    /// Its first image as one that another is made on top of.
    ///
    /// # Errors
    /// As [`Chain::above`].
    pub fn first_as_backing(&self) -> io::Result<Self> {
        let layers: Vec<_> = self.layers.iter().take(1).cloned().collect();
        let own = layers.first().map_or(0, |layer| layer.files.len());
        let files = self.files.iter().take(own).map(read_again);
        Ok(Self::of(layers, files.collect::<io::Result<_>>()?))
    }

    /// As they are handed over to work on them.
    pub fn gifts(&self) -> Vec<Gift<'_>> {
        let first = match self.layers.first().map(|layer| layer.format) {
            Some(ImageFormat::Qcow2) => FdRole::Image,
            _ => FdRole::Disk,
        };
        let own = self.layers.first().map_or(0, |layer| layer.files.len());
        let own_files = self.files.iter().take(own).zip(0..);
        let own_files = own_files.map(|(file, n)| Gift::numbered(first, n, file.as_fd()));
        let below = self.files.iter().skip(own).zip(0..);
        let below = below.map(|(file, n)| Gift::numbered(FdRole::Backing, n, file.as_fd()));
        own_files.chain(below).collect()
    }

    /// As they are handed over as what is made.
    pub fn target_gifts(&self) -> Vec<Gift<'_>> {
        let numbered = self.files.iter().zip(0..);
        numbered
            .map(|(file, n)| Gift::numbered(FdRole::Target, n, file.as_fd()))
            .collect()
    }
}

/// The same file, open for reading alone.
fn read_again(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The name of a file without its directory, fit for messages.
#[must_use]
pub fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    let mut name = crate::escape::escaped(name.as_encoded_bytes()).to_string();
    name.truncate(name.floor_char_boundary(NAME_BYTES_MAX));
    name
}

/// Longest name of an image in messages of a process, in bytes.
const NAME_BYTES_MAX: usize = 255;
