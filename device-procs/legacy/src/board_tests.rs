//! Claims about the board: both sides of the page in one process.

use super::*;
use bulkhead_ipc::input_ring::{INPUT_RING_BYTES, InputWriter};
use bulkhead_ipc::legacy_page::{Access, LEGACY_PAGE_BYTES, Unfinished, read_access};
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
    /// What successors are given, and copies of everything that was posted.
    wiring: Box<dyn Fn(u64, u64) -> Wiring>,
    copies: Vec<Posted>,
    call: Option<Call>,
    generation: u32,
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
        let interrupts = interrupt.try_clone().unwrap();
        let wiring = move |output: u64, input: u64| Wiring {
            page: LegacyPage::map(page_fd.try_clone().unwrap()).unwrap(),
            reply: Doorbell::new().unwrap(),
            interrupt: interrupts.try_clone().unwrap(),
            transcript: Transcript::new(
                OutputRing::new(file.try_clone().unwrap(), 65536, output),
                Doorbell::new().unwrap(),
            ),
            input: InputReader::map(input_fd.try_clone().unwrap(), input).unwrap(),
        };
        let mut machine = Self {
            board: Board::new(wiring(0, 0), Rtc::new(0, NOW)),
            page,
            interrupt,
            keys,
            output,
            posted: 0,
            calls: 0,
            position: 0,
            wiring: Box::new(wiring),
            copies: vec![
                Posted {
                    port: 0,
                    size: 0,
                    value: 0,
                    stream_position: 0
                };
                POSTED_ENTRIES as usize
            ],
            call: None,
            generation: 1,
        };
        machine.board.begin(1, NOW);
        machine.requests();
        machine
    }

    /// The process dies where it stands, and another goes on, as the vCPU process lets it.
    fn die(&mut self) {
        let (progress, state) = self.page.saved().unwrap_or_default();
        let unfinished = Unfinished {
            produced: self.posted,
            posted: &self.copies,
            calls: self.calls,
            call: self.call,
        };
        self.generation += 1;
        let next = (progress.taken % POSTED_ENTRIES) as usize;
        let output = match progress.taken == self.posted {
            true => self.position,
            false => self.copies[next].stream_position,
        };
        self.page
            .renew(self.generation, &unfinished, progress, &state);
        let wiring = (self.wiring)(output, progress.input_position);
        self.board = Board::new(wiring, Rtc::new(0, NOW));
        self.board.begin(self.generation, NOW);
        assert_eq!(self.page.serving(), self.generation);
    }

    fn post(&mut self, port: u16, value: u8) {
        let write = Posted {
            port,
            size: 1,
            value: value.into(),
            stream_position: self.position,
        };
        self.copies[(self.posted % POSTED_ENTRIES) as usize] = write;
        let _kick = self.page.post(self.posted, write);
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
fn successor_has_the_registers_of_the_process_that_died() {
    let mut m = Machine::new();
    for (port, value) in [(0x3fb, 0x1b), (0x3ff, 0x5a), (0x3fc, 0x0b), (0x3f9, 0x05)] {
        m.post(port, value);
    }
    for (port, value) in [(0x70, 0x40), (0x71, 0xaa), (0x64, 0x60), (0x60, 0x47)] {
        m.post(port, value);
    }
    m.run();
    let ports = [0x3fb, 0x3ff, 0x3fc, 0x3f9, 0x3fd, 0x3fe, 0x71, 0x64];
    let before = ports.map(|port| m.read(port));
    m.die();
    assert_eq!(ports.map(|port| m.read(port)), before);
}

#[test]
fn interrupt_that_is_pending_is_asked_for_again() {
    let mut m = Machine::new();
    m.post(0x3f9, 1);
    m.run();
    m.keys.write(b"k");
    m.board.input_arrived(NOW);
    // Whether anybody saw the request before the process died, nobody knows.
    m.requests();
    m.die();
    assert_eq!(m.requests() & 1 << COM1_GSI, 1 << COM1_GSI);
}

proptest! {
    /// Wherever processes die, what is printed is printed once, and each key is read once.
    #[test]
    fn nothing_is_lost_or_doubled_by_deaths(
        steps in prop::collection::vec((0u8..6, any::<u8>()), 1..120),
    ) {
        let mut m = Machine::new();
        let (mut printed, mut typed, mut read) = (Vec::new(), Vec::new(), Vec::new());
        for (step, byte) in steps {
            match step {
                0 | 1 if m.posted.wrapping_sub(m.page.consumed()) < POSTED_ENTRIES => {
                    m.put(0x3f8, &[byte]);
                    printed.push(byte);
                }
                2 => if m.keys.write(&[byte]) == 1 {
                    typed.push(byte);
                },
                3 => {
                    // A call that may be served by several processes before it is answered.
                    m.calls += 1;
                    let call = Call { port: 0x3f8, size: 1 };
                    m.call = Some(call);
                    let there = typed.len() > read.len();
                    let _kick = m.page.call(m.calls, call);
                    for bit in 0..4 {
                        if byte & 1 << bit != 0 {
                            m.board.pass(NOW);
                        }
                        if byte & 16 << bit != 0 {
                            m.die();
                        }
                    }
                    m.run();
                    let answer = m.page.reply(m.calls).unwrap().to_le_bytes()[0];
                    m.call = None;
                    if there {
                        read.push(answer);
                    }
                }
                4 => {
                    m.board.pass(NOW);
                }
                _ => m.die(),
            }
        }
        m.run();
        prop_assert_eq!(m.transcript(), printed);
        prop_assert_eq!(&read[..], &typed[..read.len()]);
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
fn clock_interrupt_that_is_allowed_after_its_cause_comes_at_once_and_again() {
    let mut m = Machine::new();
    m.post(0x70, 0x0b);
    m.run();
    // A second has ended unnoticed: its flag is up before the guest asks for interrupts of it.
    m.board.clock(NOW + Duration::from_secs(1));
    assert_eq!(m.requests(), 0);
    m.post(0x71, 0x12);
    m.run();
    assert_eq!(m.requests(), 1 << RTC_GSI);
    m.run();
    assert_eq!(m.requests(), 0);
    // Reading register C lowers the line; it rises with the next second.
    m.post(0x70, 0x0c);
    assert_eq!(m.read(0x71) & 0x90, 0x90);
    m.board.clock(NOW + Duration::from_secs(2));
    assert_eq!(m.requests(), 1 << RTC_GSI);
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
