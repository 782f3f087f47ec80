//! Claims about the board: both sides of the page in one process.

use super::*;
use bulkhead_ipc::input_ring::{INPUT_RING_BYTES, InputWriter};
use bulkhead_ipc::legacy_page::{Access, LEGACY_PAGE_BYTES, read_access};
use bulkhead_ipc::output_ring::{self, OutputReader, OutputRing};
use bulkhead_ipc::shared::sealed_memfd;
use proptest::prelude::*;

const NOW: Duration = Duration::new(1_795_359_483, 250_000_000);

/// The board with the vCPU side of its page.
struct Machine {
    board: Board,
    page: LegacyPage,
    interrupt: Doorbell,
    keys: InputWriter,
    output: OutputReader,
    posted: u32,
    calls: u32,
    position: u64,
}

impl Machine {
    fn new() -> Self {
        let page_fd = sealed_memfd("page", LEGACY_PAGE_BYTES).unwrap();
        let page = LegacyPage::map(page_fd.try_clone().unwrap()).unwrap();
        let input_fd = sealed_memfd("input", INPUT_RING_BYTES).unwrap();
        let keys = InputWriter::map(input_fd.try_clone().unwrap()).unwrap();
        let file = tempfile::tempfile().unwrap();
        output_ring::create(&file, 65536).unwrap();
        let output = OutputReader::new(file.try_clone().unwrap()).unwrap();
        let interrupt = Doorbell::new().unwrap();
        let wiring = Wiring {
            page: LegacyPage::map(page_fd).unwrap(),
            reply: Doorbell::new().unwrap(),
            interrupt: interrupt.try_clone().unwrap(),
            transcript: Transcript::new(OutputRing::new(file, 65536, 0), Doorbell::new().unwrap()),
            input: InputReader::map(input_fd, 0).unwrap(),
        };
        Self {
            board: Board::new(wiring, Rtc::new(0, NOW)),
            page,
            interrupt,
            keys,
            output,
            posted: 0,
            calls: 0,
            position: 0,
        }
    }

    fn post(&mut self, port: u16, value: u8) {
        let _kick = self.page.post(
            self.posted,
            Posted {
                port,
                size: 1,
                value: value.into(),
                stream_position: self.position,
            },
        );
        self.posted = self.posted.wrapping_add(1);
    }

    fn put(&mut self, port: u16, text: &[u8]) {
        for &byte in text {
            self.post(port, byte);
            self.position += 1;
        }
    }

    fn run(&mut self) {
        while self.board.pass(NOW) {}
        self.board.flush();
        assert_eq!(self.page.consumed(), self.posted);
    }

    /// A read as a vCPU does it.
    fn read(&mut self, port: u16) -> u8 {
        match read_access(port) {
            Access::Mirror(register) => self.page.mirror(register),
            Access::MirrorAfterPosted(register) => {
                self.run();
                self.page.mirror(register)
            }
            Access::Call | Access::Post => {
                self.calls += 1;
                let _kick = self.page.call(self.calls, Call { port, size: 1 });
                self.run();
                self.page.reply(self.calls).unwrap().to_le_bytes()[0]
            }
        }
    }

    fn requests(&self) -> u32 {
        self.interrupt.take();
        self.page.take_requests()
    }

    fn transcript(&mut self) -> Vec<u8> {
        let (mut text, mut buffer) = (Vec::new(), [0; 512]);
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
fn serial_and_debug_console_bytes_keep_their_order() {
    let mut m = Machine::new();
    m.put(0x3f8, b"one ");
    m.put(0xe9, b"two ");
    m.put(0x3f8, b"three");
    m.run();
    assert_eq!(m.transcript(), b"one two three");
}

#[test]
fn posted_writes_count_as_done_only_when_their_output_is_stored() {
    let mut m = Machine::new();
    m.put(0x3f8, b"x");
    assert!(m.board.pass(NOW));
    assert_eq!((m.page.consumed(), m.transcript().len()), (0, 0));
    assert!(m.board.has_pending());
    m.board.flush();
    assert_eq!((m.page.consumed(), m.transcript().len()), (1, 1));
}

#[test]
fn output_longer_than_the_ring_arrives_whole() {
    let mut m = Machine::new();
    let text: Vec<u8> = (0..=255u8).cycle().take(5000).collect();
    for chunk in text.chunks(500) {
        m.put(0x3f8, chunk);
        m.run();
    }
    assert_eq!(m.transcript(), text);
}

#[test]
fn divisor_writes_are_no_output() {
    let mut m = Machine::new();
    m.post(0x3fb, 0x83);
    m.post(0x3f8, 0x01);
    m.post(0x3fb, 0x03);
    m.put(0x3f8, b"ok");
    assert_eq!(m.read(0x3fb), 0x03);
    assert_eq!(m.transcript(), b"ok");
}

#[test]
fn mirrored_registers_follow_posted_writes() {
    let mut m = Machine::new();
    assert_eq!(
        m.read(0x3fd),
        0x60,
        "the transmitter is ready from the start"
    );
    m.post(0x3ff, 0xaa);
    assert_eq!(m.read(0x3ff), 0xaa);
    m.post(0x3f9, 0x0f);
    assert_eq!(m.read(0x3f9), 0x0f);
    m.post(0x3fb, 0x80);
    m.post(0x3f9, 0x12);
    assert_eq!(m.read(0x3f9), 0x12, "the divisor latch shows through");
    m.post(0x3fc, 0x1a);
    m.post(0x3fb, 0x03);
    assert_eq!(m.read(0x3fe), 0x90);
}

#[test]
fn transmit_interrupts_come_one_for_each_drained_write() {
    let mut m = Machine::new();
    m.post(0x3f9, 0x02);
    m.run();
    assert_eq!(m.requests(), 1 << COM1_GSI);
    for _ in 0..3 {
        assert_eq!(m.read(0x3fa) & 0x0f, 0x02);
        assert_eq!(m.requests(), 0);
        m.put(0x3f8, b"y");
        m.run();
        assert_eq!(m.requests(), 1 << COM1_GSI);
    }
}

#[test]
fn typed_text_arrives_with_an_interrupt() {
    let mut m = Machine::new();
    m.post(0x3fc, 0x0b);
    m.post(0x3f9, 0x01);
    m.run();
    assert_eq!(m.requests(), 0);
    m.keys.write(b"hi");
    m.board.input_arrived(NOW);
    assert_eq!(m.requests(), 1 << COM1_GSI);
    assert_eq!(m.read(0x3fd) & 1, 1);
    assert_eq!((m.read(0x3f8), m.read(0x3f8)), (b'h', b'i'));
    assert_eq!(m.read(0x3fd) & 1, 0);
}

#[test]
fn keyboard_controller_resets_after_what_was_printed_is_stored() {
    let mut m = Machine::new();
    m.put(0x3f8, b"bye");
    m.post(0x64, 0xfe);
    m.board.pass(NOW);
    assert_eq!(m.requests(), RESET_REQUEST);
    assert_eq!(m.transcript(), b"bye");
}

#[test]
fn clock_is_read_through_calls_and_interrupts_when_asked() {
    let mut m = Machine::new();
    m.post(0x70, 0x04);
    assert_eq!(m.read(0x71), 0x14);
    m.post(0x70, 0x0b);
    m.post(0x71, 0x12);
    m.run();
    let wait = m.board.deadline(NOW).unwrap();
    m.board.clock(NOW + wait);
    assert_eq!(m.requests(), 1 << RTC_GSI);
    m.board.clock(NOW + wait);
    assert_eq!(m.requests(), 0);
}

#[test]
fn debug_console_is_recognised() {
    assert_eq!(Machine::new().read(0xe9), 0xe9);
}

proptest! {
    #[test]
    fn random_posts_and_calls_are_survived(
        steps in prop::collection::vec((any::<bool>(), 0usize..14, any::<u8>()), 0..300),
    ) {
        let ports = [0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x60, 0x64, 0x70, 0x71, 0xe9, 0x1234];
        let mut m = Machine::new();
        for (write, port, value) in steps {
            if write {
                m.post(ports[port], value);
                if m.posted.is_multiple_of(64) {
                    m.run();
                }
            } else {
                m.read(ports[port]);
            }
        }
        m.run();
    }

    #[test]
    fn nonsense_in_the_page_is_survived(
        port in any::<u16>(), size in any::<u8>(), value in any::<u32>(), position in any::<u64>(),
    ) {
        let mut m = Machine::new();
        let write = Posted { port, size, value, stream_position: position };
        let _kick = m.page.post(0, write);
        let _kick = m.page.call(7, Call { port, size });
        m.board.pass(NOW);
        m.board.flush();
        prop_assert!(m.page.reply(7).is_some());
    }
}
