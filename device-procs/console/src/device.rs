//! The console device: queue 0 receives (the guest offers buffers, which wait here for something to be
//! typed), queue 1 transmits (stored and completed at once).

use crate::backend::Line;
use crate::request;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::input_ring::InputReader;
use bulkhead_ipc::output_ring::OutputRing;
use bulkhead_ipc::protocol::birth::{DeviceOwn, FdRole};
use bulkhead_ipc::shared::Doorbell;
use bulkhead_runtime::device::FIRST_TOKEN;
use bulkhead_runtime::transcript::Transcript;
use bulkhead_runtime::{Chain, Device, DeviceFault, Queues, Setup, Stillbirth};
use std::collections::VecDeque;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const TOKEN_INPUT: u8 = FIRST_TOKEN;
/// VIRTIO_CONSOLE_F_SIZE: the configuration holds columns and rows.
const F_SIZE: u64 = 1 << 0;
const CONFIG_BYTES: usize = 12;

/// The device. Its state is the terminal's size, which is configuration, and buffers that the gate's
/// journal knows; so there is nothing to save.
#[derive(Debug)]
pub(crate) struct Console {
    line: Line,
    size: (u16, u16),
    /// Receive buffers that nothing has been typed for, oldest first. The gate has no more slots
    /// than the queue was laid out for, which bounds it.
    waiting: VecDeque<Chain>,
    // Watched; kept open by this.
    _input_bell: Doorbell,
}

impl Device for Console {
    const KIND: VirtioKind = VirtioKind::Console;

    fn start(setup: &mut Setup<'_>) -> Result<Self, Stillbirth> {
        let &DeviceOwn::Console {
            output_capacity,
            output_position,
            input_position,
            size,
        } = &setup.config.own
        else {
            return Err(Stillbirth::setup("no configuration of a console"));
        };
        if output_capacity == 0 {
            return Err(Stillbirth::Field {
                field: "output_capacity",
                got: "0".to_owned(),
                expected: "at least 1 byte",
            });
        }
        let output = setup.grants.take(FdRole::Output, 0)?;
        let ring = OutputRing::new(output.into(), output_capacity, output_position);
        let bell = Doorbell::from(setup.grants.take(FdRole::OutputBell, 0)?);
        let input = InputReader::map(setup.grants.take(FdRole::Input, 0)?, input_position)?;
        let input_bell = Doorbell::from(setup.grants.take(FdRole::InputBell, 0)?);
        setup.watch(&input_bell, TOKEN_INPUT)?;
        let slots = setup.config.queue_sizes.first().copied().unwrap_or(0);
        Ok(Self {
            line: Line::new(Transcript::new(ring, bell), input),
            size,
            waiting: VecDeque::with_capacity(slots.into()),
            _input_bell: input_bell,
        })
    }

    fn features(&self) -> u64 {
        F_SIZE
    }

    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(CONFIG_BYTES);
        config.extend(self.size.0.to_le_bytes());
        config.extend(self.size.1.to_le_bytes());
        config.resize(CONFIG_BYTES, 0);
        config
    }

    fn on_request(
        &mut self,
        queue: usize,
        chain: Chain,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        match queue {
            RECEIVE => {
                self.waiting.push_back(chain);
                self.deliver(queues)
            }
            TRANSMIT => {
                match request::output(&chain, queues) {
                    Some(output) => self.line.put(&output, queues),
                    None => tracing::warn!("transmit request without a stream position"),
                }
                queues.complete(queue, chain.head(), 0)
            }
            _ => queues.complete(queue, chain.head(), 0),
        }
    }

    fn on_event(&mut self, token: u8, queues: &mut Queues) -> Result<(), DeviceFault> {
        if token == TOKEN_INPUT {
            self.deliver(queues)?;
        }
        Ok(())
    }

    fn on_driver(&mut self, features: Option<u64>, queues: &mut Queues) -> Result<(), DeviceFault> {
        if features.is_none() {
            for chain in self.waiting.drain(..) {
                queues.complete(RECEIVE, chain.head(), 0)?;
            }
        }
        Ok(())
    }

    fn on_resize(&mut self, columns: u16, rows: u16) -> bool {
        let before = std::mem::replace(&mut self.size, (columns, rows));
        before != self.size
    }
}

impl Console {
    /// Gives the guest what was typed, as far as it has offered buffers.
    fn deliver(&mut self, queues: &mut Queues) -> Result<(), DeviceFault> {
        while let Some(chain) = self.waiting.front() {
            let head = chain.head();
            let Some(&span) = chain.writable().first() else {
                self.waiting.pop_front();
                queues.complete(RECEIVE, head, 0)?;
                continue;
            };
            let n = self.line.type_into(span, queues);
            if n == 0 {
                return Ok(());
            }
            self.waiting.pop_front();
            queues.complete(RECEIVE, head, u32::try_from(n).unwrap_or(span.len()))?;
            self.line.take(n);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::input_ring::{INPUT_RING_BYTES, InputWriter};
    use bulkhead_ipc::output_ring::{self, OutputReader};
    use bulkhead_ipc::protocol::birth::{DeviceConfig, UringGrant};
    use bulkhead_ipc::shared::sealed_memfd;
    use bulkhead_runtime::testing::Rig;
    use proptest::prelude::*;
    use std::fs::File;

    const CAPACITY: u64 = 65536;

    struct Desk {
        rig: Rig<Console>,
        keys: InputWriter,
        key_bell: Doorbell,
        output: OutputReader,
    }

    fn desk_on(file: File, reader: OutputReader) -> Desk {
        let input = sealed_memfd("input", INPUT_RING_BYTES).unwrap();
        let keys = InputWriter::map(input.try_clone().unwrap()).unwrap();
        let key_bell = Doorbell::new().unwrap();
        let config = DeviceConfig {
            kind: VirtioKind::Console,
            queue_sizes: vec![8, 8],
            window_bytes: 1 << 20,
            features: F_SIZE,
            config: Vec::new(),
            own: DeviceOwn::Console {
                output_capacity: CAPACITY,
                output_position: 0,
                input_position: 0,
                size: (80, 25),
            },
        };
        let held = vec![
            (FdRole::Output, 0, file.into()),
            (FdRole::OutputBell, 0, Doorbell::new().unwrap().into()),
            (FdRole::Input, 0, input),
            (FdRole::InputBell, 0, key_bell.try_clone().unwrap().into()),
        ];
        let mut rig: Rig<Console> = Rig::new(&config, held, &UringGrant::default()).unwrap();
        rig.start_driver(F_SIZE);
        Desk {
            rig,
            keys,
            key_bell,
            output: reader,
        }
    }

    fn desk() -> Desk {
        let file = tempfile::tempfile().unwrap();
        output_ring::create(&file, CAPACITY).unwrap();
        let reader = OutputReader::new(file.try_clone().unwrap()).unwrap();
        desk_on(file, reader)
    }

    impl Desk {
        fn keys(&mut self, text: &[u8]) {
            self.keys.write(text);
            self.key_bell.ring();
            self.rig.run().unwrap();
        }

        fn received(&mut self) -> Vec<Vec<u8>> {
            let answers = self.rig.answers(RECEIVE).into_iter();
            answers
                .map(|a| a.bytes[..a.written as usize].to_vec())
                .collect()
        }

        fn transcript(&mut self) -> Vec<u8> {
            let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
            loop {
                let got = self.output.read(&mut buffer).unwrap();
                if got.bytes == 0 {
                    return text;
                }
                text.extend_from_slice(&buffer[..got.bytes]);
            }
        }
    }

    #[test]
    fn output_is_stored_at_its_position_even_when_sent_twice() {
        let mut desk = desk();
        for (position, text) in [(0, "hello "), (6, "world"), (6, "world"), (11, "!")] {
            desk.rig
                .submit(TRANSMIT, Some(position), text.as_bytes(), 0)
                .unwrap();
        }
        desk.rig.run().unwrap();
        assert_eq!(desk.transcript(), b"hello world!");
        assert!(desk.rig.answers(TRANSMIT).iter().all(|a| a.written == 0));
    }

    #[test]
    fn long_output_arrives_whole() {
        let mut desk = desk();
        let text: Vec<u8> = (0..=255u8).cycle().take(50_000).collect();
        desk.rig.submit(TRANSMIT, Some(0), &text, 0).unwrap();
        desk.rig.run().unwrap();
        assert_eq!(desk.transcript(), text);
    }

    #[test]
    fn typed_text_fills_waiting_buffers_in_order() {
        let mut desk = desk();
        for _ in 0..3 {
            desk.rig.submit(RECEIVE, None, &[], 4).unwrap();
        }
        desk.rig.run().unwrap();
        assert!(desk.received().is_empty(), "nothing was typed");
        desk.keys(b"ls -l\n");
        assert_eq!(desk.received(), [b"ls -".to_vec(), b"l\n".to_vec()]);
        desk.keys(b"exit");
        assert_eq!(desk.received(), [b"exit".to_vec()]);
    }

    #[test]
    fn typed_text_waits_for_buffers() {
        let mut desk = desk();
        desk.keys(b"early");
        desk.rig.submit(RECEIVE, None, &[], 100).unwrap();
        desk.rig.run().unwrap();
        assert_eq!(desk.received(), [b"early".to_vec()]);
    }

    #[test]
    fn reset_gives_waiting_buffers_back_and_keeps_what_is_typed() {
        let mut desk = desk();
        desk.rig.submit(RECEIVE, None, &[], 16).unwrap();
        desk.rig.run().unwrap();
        desk.rig.reset_driver();
        desk.rig.run().unwrap();
        assert_eq!(desk.received(), [Vec::<u8>::new()]);
        desk.keys(b"x");
        desk.rig.start_driver(F_SIZE);
        desk.rig.submit(RECEIVE, None, &[], 16).unwrap();
        desk.rig.run().unwrap();
        assert_eq!(desk.received(), [b"x".to_vec()]);
    }

    #[test]
    fn buffer_taken_after_the_reset_was_noticed_is_given_back_too() {
        let mut desk = desk();
        desk.rig.run().unwrap();
        desk.rig.reset_driver();
        desk.rig.run().unwrap();
        // Put before the reset, but seen only now.
        desk.rig.submit(RECEIVE, None, &[], 16).unwrap();
        desk.rig.run().unwrap();
        assert_eq!(desk.received(), [Vec::<u8>::new()]);
    }

    #[test]
    fn size_is_published_and_published_again_when_it_changes() {
        let mut desk = desk();
        let p = desk.rig.published();
        assert_eq!((p.features, &p.config[..4]), (F_SIZE, &[80, 0, 25, 0][..]));
        assert!(!desk.rig.device().on_resize(80, 25));
        assert!(desk.rig.device().on_resize(300, 50));
        desk.rig.publish();
        assert_eq!(desk.rig.published().config[..4], [44, 1, 50, 0]);
    }

    #[test]
    fn full_disk_loses_output_but_not_the_guest() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let file = tempfile::tempfile().unwrap();
        output_ring::create(&file, CAPACITY).unwrap();
        let mut desk = desk_on(full, OutputReader::new(file).unwrap());
        for position in 0..3 {
            desk.rig.submit(TRANSMIT, Some(position), b"x", 0).unwrap();
        }
        desk.rig.run().unwrap();
        assert_eq!(desk.rig.answers(TRANSMIT).len(), 3);
    }

    proptest! {
        #[test]
        fn any_chain_on_any_queue_is_survived(
            requests in prop::collection::vec((0usize..2, prop::collection::vec(
                (0usize..1 << 21, any::<u32>(), any::<bool>()), 1..4)), 1..8),
        ) {
            let mut desk = desk();
            for (queue, spans) in requests {
                let spans = spans.into_iter().map(|(at, len, writable)| (at, len % 70_000, writable));
                desk.rig.submit_any(queue, None, spans.collect());
            }
            desk.keys(b"keys");
            desk.rig.run().unwrap();
            desk.rig.reset_driver();
            desk.rig.run().unwrap();
        }
    }
}
