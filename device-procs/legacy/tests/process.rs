//! The program as a process: born behind its built-in policy, serving, ending.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::input_ring::{INPUT_RING_BYTES, InputWriter};
use bulkhead_ipc::legacy_page::{Call, LEGACY_PAGE_BYTES, LegacyPage, Posted};
use bulkhead_ipc::output_ring::{self, OutputReader};
use bulkhead_ipc::protocol::birth::{FdRole, KindConfig, LegacyConfig};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_runtime::testing::process::{Process, Upbringing};
use std::time::{Duration, Instant};

const CAPACITY: u64 = 65536;

struct Machine {
    process: Process,
    page: LegacyPage,
    kick: Doorbell,
    interrupt: Doorbell,
    keys: InputWriter,
    key_bell: Doorbell,
    output: OutputReader,
    posted: u32,
    calls: u32,
    position: u64,
}

impl Machine {
    fn new() -> Self {
        let page_fd = sealed_memfd("page", LEGACY_PAGE_BYTES).unwrap();
        let page = LegacyPage::map(page_fd.try_clone().unwrap()).unwrap();
        page.initialise(1);
        let file = tempfile::tempfile().unwrap();
        output_ring::create(&file, CAPACITY).unwrap();
        let output = OutputReader::new(file.try_clone().unwrap()).unwrap();
        let input = sealed_memfd("input", INPUT_RING_BYTES).unwrap();
        let keys = InputWriter::map(input.try_clone().unwrap()).unwrap();
        let bell = || Doorbell::new().unwrap();
        let (kick, interrupt, key_bell) = (bell(), bell(), bell());
        let grants = vec![
            (FdRole::LegacyPage, 0, page_fd),
            (FdRole::LegacyKick, 0, kick.try_clone().unwrap().into()),
            (
                FdRole::LegacyInterrupt,
                0,
                interrupt.try_clone().unwrap().into(),
            ),
            (FdRole::LegacyReply, 0, bell().into()),
            (FdRole::Output, 0, file.into()),
            (FdRole::OutputBell, 0, bell().into()),
            (FdRole::Input, 0, input),
            (FdRole::InputBell, 0, key_bell.try_clone().unwrap().into()),
        ];
        let config = LegacyConfig {
            output_capacity: CAPACITY,
            output_position: 0,
            input_position: 0,
            rtc_offset_s: 0,
        };
        let upbringing = Upbringing::new(ProcKind::Legacy, KindConfig::Legacy(config));
        let program = env!("CARGO_BIN_EXE_bulkhead-legacy");
        let mut process = Process::spawn(program, upbringing, grants);
        process.assert_serving();
        Self {
            process,
            page,
            kick,
            interrupt,
            keys,
            key_bell,
            output,
            posted: 0,
            calls: 0,
            position: 0,
        }
    }

    fn post(&mut self, port: u16, value: u8) {
        self.wait_until(|m| m.posted.wrapping_sub(m.page.consumed()) < 512);
        let write = Posted {
            port,
            size: 1,
            value: value.into(),
            stream_position: self.position,
        };
        if self.page.post(self.posted, write) {
            self.kick.ring();
        }
        self.posted += 1;
    }

    fn read(&mut self, port: u16) -> u8 {
        self.calls += 1;
        if self.page.call(self.calls, Call { port, size: 1 }) {
            self.kick.ring();
        }
        self.wait_until(|m| m.page.reply(m.calls).is_some());
        self.page.reply(self.calls).unwrap().to_le_bytes()[0]
    }

    fn wait_until(&self, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done(self) {
            let denial = self.process.page.denial();
            assert!(Instant::now() < deadline, "denied: {denial:?}");
            std::thread::yield_now();
        }
    }

    fn interrupts(&self) -> u32 {
        let mut got = 0;
        self.wait_until(|m| {
            m.interrupt.take();
            got |= m.page.take_requests();
            got != 0
        });
        got
    }
}

#[test]
fn process_prints_reads_the_clock_interrupts_and_ends() {
    let mut m = Machine::new();
    let text: Vec<u8> = (b' '..b'~').cycle().take(20_000).collect();
    for &byte in &text {
        m.post(0x3f8, byte);
        m.position += 1;
    }
    m.wait_until(|m| m.page.consumed() == m.posted);
    let mut stored = vec![0; text.len()];
    assert_eq!(m.output.read(&mut stored).unwrap().bytes, text.len());
    assert!(stored == text);

    m.post(0x70, 0x0d);
    assert_eq!(m.read(0x71), 0x80);

    m.post(0x3f9, 0x01);
    m.keys.write(b"k");
    m.key_bell.ring();
    assert_eq!(m.interrupts(), 1 << 4);
    assert_eq!(m.read(0x3f8), b'k');

    // The update interrupt comes by itself, within a second.
    m.post(0x70, 0x0b);
    m.post(0x71, 0x12);
    assert_eq!(m.interrupts(), 1 << 8);
    m.process.assert_ends_quietly();
}
