//! The consoles of a running machine, for any number of attached readers.
//!
//! The ring file on disk is what readers read, each at its own pace; here is only the bell that
//! says that there is more, and the one keyboard that all of them share.

use crate::api::ConsoleName;
use crate::supervisor::driver::readable;
use crate::vm::session::{ConsoleEnds, Consoles};
use bulkhead_ipc::shared::Doorbell;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Pieces of typed bytes that wait for the guest; whoever types more waits.
const KEYS_CAPACITY: usize = 4;
/// How often a guest whose keyboard is full is asked again: it does not ring when it reads.
const RETRY: Duration = Duration::from_millis(5);
/// How often a console's process is heard at most.
const LISTEN_EVERY: Duration = Duration::from_millis(1);

/// Both consoles.
#[derive(Debug)]
pub(super) struct Hubs {
    serial: Hub,
    virtio: Option<Hub>,
}

/// One console. Dropped with its machine, which ends every attachment.
#[derive(Debug)]
struct Hub {
    ring: PathBuf,
    rings: watch::Receiver<()>,
    keys: mpsc::Sender<Vec<u8>>,
    tasks: [JoinHandle<()>; 2],
}

/// What an attachment needs.
#[derive(Debug)]
pub(super) struct Attachable {
    /// The ring file.
    pub(super) ring: PathBuf,
    /// Changes when there is more to read; closed when the machine is gone.
    pub(super) rings: watch::Receiver<()>,
    /// Keys for the guest.
    pub(super) keys: mpsc::Sender<Vec<u8>>,
}

/// The ring file of a console in a machine's state directory.
pub(super) fn ring_path(state: &Path, name: ConsoleName) -> PathBuf {
    state.join(match name {
        ConsoleName::Serial => "serial.ring",
        ConsoleName::Virtio => "console.ring",
    })
}

impl Hubs {
    /// Takes over the ends of a machine whose rings are in `state`.
    pub(super) fn new(state: &Path, consoles: Consoles) -> io::Result<Self> {
        let hub = |name, ends| Hub::new(ring_path(state, name), ends);
        let virtio = consoles.virtio.map(|ends| hub(ConsoleName::Virtio, ends));
        Ok(Self {
            serial: hub(ConsoleName::Serial, consoles.serial)?,
            virtio: virtio.transpose()?,
        })
    }

    /// For an attachment; `None` when the machine has no such console.
    pub(super) fn attach(&self, name: ConsoleName) -> Option<Attachable> {
        let hub = match name {
            ConsoleName::Serial => Some(&self.serial),
            ConsoleName::Virtio => self.virtio.as_ref(),
        };
        hub.map(|hub| Attachable {
            ring: hub.ring.clone(),
            rings: hub.rings.clone(),
            keys: hub.keys.clone(),
        })
    }
}

impl Hub {
    fn new(ring: PathBuf, mut ends: ConsoleEnds) -> io::Result<Self> {
        let (tell, rings) = watch::channel(());
        let (keys, mut typed) = mpsc::channel::<Vec<u8>>(KEYS_CAPACITY);
        let bell = readable(ends.output_bell.try_clone()?.into())?;
        let output_bell = ends.output_bell;
        let listen = tokio::spawn(async move {
            while let Ok(mut ready) = bell.readable().await {
                ready.clear_ready();
                output_bell.take();
                tell.send_replace(());
                // Whoever rings without a pause is heard as often as anybody can read.
                tokio::time::sleep(LISTEN_EVERY).await;
            }
        });
        let write = tokio::spawn(async move {
            while let Some(bytes) = typed.recv().await {
                type_all(&mut ends.input, &ends.input_bell, &bytes).await;
            }
        });
        Ok(Self {
            ring,
            rings,
            keys,
            tasks: [listen, write],
        })
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Types everything, as fast as the guest reads.
async fn type_all(
    input: &mut bulkhead_ipc::input_ring::InputWriter,
    bell: &Doorbell,
    mut bytes: &[u8],
) {
    while !bytes.is_empty() {
        let taken = input.write(bytes);
        if taken > 0 {
            bell.ring();
        }
        bytes = bytes.get(taken..).unwrap_or(&[]);
        if !bytes.is_empty() {
            tokio::time::sleep(RETRY).await;
        }
    }
}
