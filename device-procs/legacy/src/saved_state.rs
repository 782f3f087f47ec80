//! The state of the board as it is left in the legacy page after each step, for a successor.
//!
//! A sequence of bytes in the order in which the devices write them; numbers are little endian. The
//! first byte is [`FORMAT`]. What is read may have been written by a process that its guest had
//! taken over, so every device checks its own part, and a state that is not sound is none.
//!
//! ```text
//! format 1: u8
//! serial port: IER LCR MCR flags SCR divisor[2] modem changes, received bytes: count, 16 places
//! clock: index, registers[128], offset i128 ns, stands, resume i128 ns, seen i128 ns
//! keyboard controller: configuration, awaited (0: none, else 1 and the command), last was command,
//!   answers: count, 4 places of source and byte, last byte
//! ```

use crate::keyboard::Controller;
use crate::rtc::Rtc;
use crate::uart::Uart;
use bulkhead_ipc::legacy_page::STATE_BYTES_MAX;

/// The format's number.
const FORMAT: u8 = 1;

/// Bytes that are being written. They always fit: the format has a fixed length.
#[derive(Debug)]
pub(crate) struct Writer {
    bytes: [u8; STATE_BYTES_MAX],
    at: usize,
}

impl Writer {
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        for (place, byte) in self.bytes.iter_mut().skip(self.at).zip(bytes) {
            *place = *byte;
        }
        self.at += bytes.len();
        assert!(self.at <= STATE_BYTES_MAX, "the format has a fixed length");
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.at).unwrap_or_default()
    }
}

/// Bytes that are being read; `None` where they end.
#[derive(Debug)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    pub(crate) fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    pub(crate) fn flag(&mut self) -> Option<bool> {
        match self.byte()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
}

/// The devices' state in bytes.
pub(crate) fn save(uart: &Uart, rtc: &Rtc, controller: &Controller) -> Writer {
    let mut writer = Writer {
        bytes: [0; STATE_BYTES_MAX],
        at: 0,
    };
    writer.put(&[FORMAT]);
    uart.save(&mut writer);
    rtc.save(&mut writer);
    controller.save(&mut writer);
    writer
}

/// The devices that `bytes` describe, if they are sound.
pub(crate) fn restore(bytes: &[u8]) -> Option<(Uart, Rtc, Controller)> {
    let mut reader = Reader(bytes);
    if reader.byte()? != FORMAT {
        return None;
    }
    let uart = Uart::restore(&mut reader)?;
    let rtc = Rtc::restore(&mut reader)?;
    let controller = Controller::restore(&mut reader)?;
    reader.0.is_empty().then_some((uart, rtc, controller))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    const NOW: Duration = Duration::from_secs(1_700_000_000);

    fn busy() -> (Uart, Rtc, Controller) {
        let mut uart = Uart::default();
        for (offset, value) in [
            (4, 0x1f),
            (1, 0x0f),
            (2, 0x01),
            (0, b'a'),
            (0, b'b'),
            (7, 0x5a),
        ] {
            uart.write(offset, value);
        }
        let mut rtc = Rtc::new(-3600, NOW);
        for (index, value) in [(0x0a, 0x2f), (0x0b, 0x72), (0x32, 0x20), (0x50, 0xee)] {
            rtc.select(index);
            rtc.write(value, NOW);
        }
        let mut controller = Controller::default();
        controller.command(0xaa);
        controller.command(0xd2);
        controller.write(7);
        controller.command(0x60);
        (uart, rtc, controller)
    }

    #[test]
    fn restored_board_is_the_saved_one() {
        let (uart, rtc, controller) = busy();
        let bytes = save(&uart, &rtc, &controller).as_bytes().to_vec();
        let (uart, rtc, controller) = restore(&bytes).unwrap();
        assert_eq!(save(&uart, &rtc, &controller).as_bytes(), bytes);
    }

    /// A successor reads the state of a process of an earlier build; this is how it looks.
    #[test]
    fn format_1_stays_as_it_is() {
        let (uart, rtc, controller) = busy();
        let saved = save(&uart, &rtc, &controller);
        let bytes = saved.as_bytes();
        assert_eq!(bytes.len(), 1 + 25 + 178 + 14);
        assert_eq!(
            bytes[..12],
            [1, 0x0f, 0x03, 0x1f, 0b0111, 0x5a, 12, 0, 0, 2, b'a', b'b']
        );
        assert_eq!(bytes[26], 0x50, "the clock's index");
        assert_eq!(bytes[27 + 0x0b], 0x72);
        assert_eq!(bytes[204..208], [0x34, 1, 0x60, 1]);
    }

    #[test]
    fn cut_or_longer_state_is_none() {
        let (uart, rtc, controller) = busy();
        let bytes = save(&uart, &rtc, &controller).as_bytes().to_vec();
        for len in 0..bytes.len() {
            assert!(restore(&bytes[..len]).is_none());
        }
        assert!(restore(&[&bytes[..], &[0]].concat()).is_none());
    }

    proptest! {
        #[test]
        fn hostile_state_is_refused_or_harmless(
            mut bytes in prop::collection::vec(any::<u8>(), 1 + 25 + 178 + 14),
            sound in any::<bool>(),
            at in 0usize..218,
            byte in any::<u8>(),
        ) {
            if sound {
                let (uart, rtc, controller) = busy();
                bytes = save(&uart, &rtc, &controller).as_bytes().to_vec();
                bytes[at] = byte;
            }
            bytes[0] = FORMAT;
            if let Some((mut uart, mut rtc, mut controller)) = restore(&bytes) {
                let mut keys = std::collections::VecDeque::from(vec![1, 2, 3]);
                for offset in 0..8 {
                    uart.read(offset, &mut keys);
                    uart.write(offset, 0xff);
                }
                for index in 0..128 {
                    rtc.select(index);
                    rtc.read(NOW);
                    rtc.write(0x11, NOW);
                    rtc.look(NOW);
                    rtc.deadline(NOW);
                }
                controller.command(0x20);
                controller.write(1);
                controller.read();
                controller.status();
            }
        }
    }
}
