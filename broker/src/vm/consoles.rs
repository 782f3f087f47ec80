//! The consoles' rings: made by the broker, written and read by device processes, attached to by
//! the owner. They outlive the processes and the machine's restarts.

use super::household::Positions;
use super::session::{ConsoleEnds, Consoles, RunError};
use super::spec::VmSpec;
use crate::launch::Gift;
use bulkhead_ipc::input_ring::{self, INPUT_RING_BYTES, InputWriter};
use bulkhead_ipc::output_ring::{self, OutputReader};
use bulkhead_ipc::protocol::birth::FdRole;
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// The rings of one console.
#[derive(Debug)]
pub(super) struct Ring {
    output: File,
    output_bell: Doorbell,
    input: OwnedFd,
    input_bell: Doorbell,
}

/// The rings of all consoles.
#[derive(Debug)]
pub(super) struct Rings {
    pub(super) serial: Ring,
    pub(super) console: Option<Ring>,
}

impl Rings {
    /// Makes the rings in `directory`, and the owner's ends of them.
    pub(super) fn make(spec: &VmSpec, directory: &Path) -> Result<(Self, Consoles), RunError> {
        let make = || -> io::Result<(Self, Consoles)> {
            DirBuilder::new()
                .recursive(true)
                .mode(0o750)
                .create(directory)?;
            let history = spec.console.history_bytes;
            let (serial, serial_ends) = Ring::make(&directory.join("serial.ring"), history)?;
            let virtio = spec.console.virtio;
            let console = virtio.then(|| Ring::make(&directory.join("console.ring"), history));
            let (console, console_ends) = console.transpose()?.unzip();
            let consoles = Consoles {
                serial: serial_ends,
                virtio: console_ends,
            };
            Ok((Self { serial, console }, consoles))
        };
        make().map_err(|e| {
            let place = crate::escape::escaped(directory.as_os_str().as_encoded_bytes());
            RunError::Configuration(format!("console rings in {place}: {e}"))
        })
    }
}

impl Rings {
    /// The rings of a machine that another broker has started: its files in `directory`, and what the
    /// vCPU process has kept.
    pub(super) fn adopt(
        spec: &VmSpec,
        directory: &Path,
        kept: Vec<OwnedFd>,
    ) -> io::Result<(Self, Consoles)> {
        let mut kept = kept.into_iter();
        let mut ring = |file: &str| Ring::adopt(&directory.join(file), &mut kept);
        let (serial, serial_ends) = ring("serial.ring")?;
        let console = spec.console.virtio.then(|| ring("console.ring"));
        let (console, console_ends) = console.transpose()?.unzip();
        let consoles = Consoles {
            serial: serial_ends,
            virtio: console_ends,
        };
        Ok((Self { serial, console }, consoles))
    }
}

impl Ring {
    fn adopt(
        path: &Path,
        kept: &mut impl Iterator<Item = OwnedFd>,
    ) -> io::Result<(Self, ConsoleEnds)> {
        let (input, input_bell, output_bell) = match (kept.next(), kept.next(), kept.next()) {
            (Some(input), Some(bell), Some(output)) => (input, bell.into(), output.into()),
            // Their keeper is dead, and the machine with it: nobody reads or rings these any more.
            _ => {
                let input = sealed_memfd("bulkhead-input", INPUT_RING_BYTES)?;
                (input, Doorbell::new()?, Doorbell::new()?)
            }
        };
        let output = OpenOptions::new().read(true).write(true).open(path)?;
        let writer = InputWriter::go_on(input.try_clone()?).map_err(io::Error::other)?;
        let ring = Self {
            output,
            output_bell,
            input,
            input_bell,
        };
        ring.with_ends(path, writer)
    }

    /// What the vCPU process keeps of it for the next broker.
    pub(super) fn keepsakes(&self, index: u16) -> [Gift<'_>; 3] {
        [
            Gift::numbered(FdRole::Input, index, self.input.as_fd()),
            Gift::numbered(FdRole::InputBell, index, self.input_bell.as_fd()),
            Gift::numbered(FdRole::OutputBell, index, self.output_bell.as_fd()),
        ]
    }

    fn make(path: &Path, history: u64) -> io::Result<(Self, ConsoleEnds)> {
        // A new file each time: whoever still reads an old one is not confused.
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let output = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        output_ring::create(&output, history)?;
        let input = sealed_memfd("bulkhead-input", INPUT_RING_BYTES)?;
        let writer = InputWriter::map(input.try_clone()?).map_err(io::Error::other)?;
        let ring = Self {
            output,
            output_bell: Doorbell::new()?,
            input,
            input_bell: Doorbell::new()?,
        };
        ring.with_ends(path, writer)
    }

    /// The ring in `path`, and the ends of it that a terminal holds.
    fn with_ends(self, path: &Path, input: InputWriter) -> io::Result<(Self, ConsoleEnds)> {
        let ends = ConsoleEnds {
            // A file description of its own: reading moves no offset of the writer's.
            output: OutputReader::new(File::open(path)?)?,
            output_bell: self.output_bell.try_clone()?,
            input,
            input_bell: self.input_bell.try_clone()?,
        };
        Ok((self, ends))
    }

    /// Where a machine that starts now goes on, as the rings claim.
    pub(super) fn positions(&self) -> Positions {
        Positions {
            output: output_ring::head(&self.output).unwrap_or(0),
            input: input_ring::taken(self.input.as_fd()).unwrap_or(0),
        }
    }

    /// The descriptors for the process that serves it.
    pub(super) fn gifts(&self) -> [Gift<'_>; 4] {
        [
            Gift::new(FdRole::Output, self.output.as_fd()),
            Gift::new(FdRole::OutputBell, self.output_bell.as_fd()),
            Gift::new(FdRole::Input, self.input.as_fd()),
            Gift::new(FdRole::InputBell, self.input_bell.as_fd()),
        ]
    }
}
