//! The entropy device: one queue of buffers, each filled and completed at once.

use crate::backend::Entropy;
use crate::request;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::protocol::birth::FdRole;
use bulkhead_runtime::{Chain, Device, DeviceFault, Queues, Setup, Stillbirth};

/// The device. It has no state of its own, so there is nothing to save.
#[derive(Debug)]
pub(crate) struct EntropyDevice {
    source: Entropy,
}

impl Device for EntropyDevice {
    const KIND: VirtioKind = VirtioKind::Rng;

    fn start(setup: &mut Setup<'_>) -> Result<Self, Stillbirth> {
        let source = setup.grants.take(FdRole::Entropy, 0)?;
        Ok(Self {
            source: source.into(),
        })
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn on_request(
        &mut self,
        queue: usize,
        chain: Chain,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        let filled = request::buffer(&chain).map(|span| self.source.fill(&queues.slice(span)));
        let written = match filled {
            Some(Ok(written)) => written,
            // No buffer, or no entropy: zero bytes is all that the protocol can say.
            None => 0,
            Some(Err(error)) => {
                tracing::error!(%error, "the entropy source failed");
                0
            }
        };
        queues.complete(queue, chain.head(), written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::protocol::birth::{DeviceConfig, DeviceOwn, UringGrant};
    use bulkhead_runtime::testing::Rig;
    use proptest::prelude::*;
    use std::fs::File;

    fn rig(source: &str) -> Rig<EntropyDevice> {
        let config = DeviceConfig {
            kind: VirtioKind::Rng,
            queue_sizes: vec![8],
            window_bytes: 1 << 20,
            features: 0,
            config: Vec::new(),
            own: DeviceOwn::Rng,
        };
        let held = vec![(FdRole::Entropy, 0, File::open(source).unwrap().into())];
        Rig::new(&config, held, &UringGrant::default()).unwrap()
    }

    #[test]
    fn buffers_are_filled_with_fresh_bytes() {
        let mut rig = rig("/dev/urandom");
        for _ in 0..2 {
            rig.submit(0, None, &[], 64).unwrap();
        }
        rig.run().unwrap();
        assert!(rig.was_called());
        let answers = rig.answers(0);
        assert_eq!(answers.len(), 2);
        assert!(
            answers
                .iter()
                .all(|a| a.written == 64 && a.bytes != [0xa5; 64])
        );
        assert_ne!(answers[0].bytes, answers[1].bytes);
    }

    #[test]
    fn large_buffer_is_filled_in_part() {
        let mut rig = rig("/dev/urandom");
        rig.submit(0, None, &[], 200_000).unwrap();
        rig.run().unwrap();
        let answers = rig.answers(0);
        assert_eq!(answers[0].written, request::FILL_BYTES_MAX);
        assert!(
            answers[0].bytes[request::FILL_BYTES_MAX as usize..]
                .iter()
                .all(|&b| b == 0xa5)
        );
    }

    #[test]
    fn failing_source_and_readable_request_yield_no_bytes() {
        let mut empty = rig("/dev/null");
        empty.submit(0, None, &[], 10).unwrap();
        empty.submit(0, None, &[1, 2, 3], 0).unwrap();
        empty.run().unwrap();
        let written: Vec<u32> = empty.answers(0).iter().map(|a| a.written).collect();
        assert_eq!(written, [0, 0]);
    }

    proptest! {
        #[test]
        fn any_chain_is_answered(spans in prop::collection::vec(
            (0usize..1 << 21, any::<u32>(), any::<bool>()), 1..4,
        )) {
            let mut rig = rig("/dev/urandom");
            let spans = spans.into_iter().map(|(at, len, writable)| (at, len % (1 << 20), writable));
            rig.submit_any(0, None, spans.collect());
            rig.run().unwrap();
            prop_assert_eq!(rig.answers(0).len(), 1);
        }
    }
}
