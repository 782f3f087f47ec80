//! A disk's process with a bug: a request for one sector ends it, as a request that a device mishandles
//! would. Never installed: `tests/e2e/poison.rs` puts it in the place of `bulkhead-blk`, which it is in
//! everything else.
#![forbid(unsafe_code)]

use bulkhead_blk::Blk;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_runtime::{Chain, Device, DeviceFault, Queues, Room, Setup, Stillbirth};

/// The sector. The test names the same one to its guest.
const SECTOR: u64 = 1234;

fn main() -> std::process::ExitCode {
    bulkhead_runtime::run::<Poisoned>()
}

struct Poisoned(Blk);

impl Device for Poisoned {
    const KIND: VirtioKind = Blk::KIND;

    fn start(setup: &mut Setup<'_>) -> Result<Self, Stillbirth> {
        Blk::start(setup).map(Self)
    }

    fn features(&self) -> u64 {
        self.0.features()
    }

    fn config(&self) -> Vec<u8> {
        self.0.config()
    }

    fn on_request(
        &mut self,
        queue: usize,
        chain: Chain,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        assert_ne!(sector(&chain, queues), Some(SECTOR), "this is the bug");
        self.0.on_request(queue, chain, queues)
    }

    fn settle(&mut self, queues: &mut Queues) -> Result<bool, DeviceFault> {
        self.0.settle(queues)
    }

    fn is_full(&self) -> bool {
        self.0.is_full()
    }

    fn on_event(&mut self, token: u8, queues: &mut Queues) -> Result<(), DeviceFault> {
        self.0.on_event(token, queues)
    }

    fn on_driver(&mut self, features: Option<u64>, queues: &mut Queues) -> Result<(), DeviceFault> {
        self.0.on_driver(features, queues)
    }

    fn try_again(&mut self, queues: &mut Queues) -> Result<(), DeviceFault> {
        self.0.try_again(queues)
    }

    fn room_news(&mut self) -> Option<Room> {
        self.0.room_news()
    }

    fn is_at_once(&self) -> bool {
        self.0.is_at_once()
    }

    fn has_news(&self) -> bool {
        self.0.has_news()
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
}

/// The first sector of a request to read or write; of a flush it is zero.
fn sector(chain: &Chain, queues: &Queues) -> Option<u64> {
    let mut header = [0; 16];
    let read = queues.read(*chain.readable().first()?, &mut header);
    let sector = header.last_chunk::<8>()?;
    (read == header.len()).then(|| u64::from_le_bytes(*sector))
}
