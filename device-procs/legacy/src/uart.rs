//! The 8250 family serial port (a 16550A with its FIFO), as registers without I/O.
//!
//! The transmitter is always ready: a byte is gone when it is written, and the holding register is
//! empty again at once. Received bytes stay in the console's input ring until the guest reads them,
//! so that nothing typed is lost with this process.
//!
//! Input is held back until the guest's driver is there: a port whose modem control was written
//! receives only while it asserts RTS or has receive interrupts enabled. Linux reads the receiver while it
//! identifies the port and would swallow what was typed early.

use crate::saved_state::{Reader, Writer};
use std::collections::VecDeque;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT_EMPTY: u8 = 1 << 1;
const IER_LINE_STATUS: u8 = 1 << 2;
const IER_MODEM_STATUS: u8 = 1 << 3;
const IER_BITS: u8 = 0x0f;

const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_NONE: u8 = 0x01;
const IIR_TRANSMIT_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;

const LCR_DIVISOR_LATCH: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOPBACK: u8 = 1 << 4;
const MCR_BITS: u8 = 0x1f;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RING: u8 = 1 << 6;
const MSR_CARRIER: u8 = 1 << 7;
/// The other end is always there.
const MSR_CONNECTED: u8 = MSR_CTS | MSR_DSR | MSR_CARRIER;

/// Receive FIFO, used in loopback mode only.
const FIFO_BYTES: usize = 16;

/// Where received bytes come from.
pub(crate) trait Input {
    /// The next byte, if there is one.
    fn peek(&self) -> Option<u8>;
    /// Takes the byte that `peek` showed.
    fn take(&mut self);
}

/// The registers.
#[derive(Debug)]
pub(crate) struct Uart {
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    modem_control_written: bool,
    scratch: u8,
    divisor: [u8; 2],
    fifo_enabled: bool,
    transmit_empty: bool,
    overrun: bool,
    /// Changes of the modem lines since MSR was read (its low half).
    modem_changes: u8,
    looped: VecDeque<u8>,
    /// Causes of interrupt that were pending at the last [`Uart::take_edge`].
    causes_seen: u8,
    /// A cause came up anew although it may have been pending before.
    renewed: bool,
}

impl Default for Uart {
    fn default() -> Self {
        Self {
            interrupt_enable: 0,
            line_control: 0x03,
            modem_control: MCR_OUT2,
            modem_control_written: false,
            scratch: 0,
            divisor: [12, 0],
            fifo_enabled: false,
            transmit_empty: true,
            overrun: false,
            modem_changes: 0,
            looped: VecDeque::with_capacity(FIFO_BYTES),
            causes_seen: 0,
            renewed: false,
        }
    }
}

impl Uart {
    /// Writes its state.
    pub(crate) fn save(&self, to: &mut Writer) {
        let flags = u8::from(self.modem_control_written)
            | u8::from(self.fifo_enabled) << 1
            | u8::from(self.transmit_empty) << 2
            | u8::from(self.overrun) << 3;
        to.put(&[
            self.interrupt_enable,
            self.line_control,
            self.modem_control,
            flags,
            self.scratch,
        ]);
        to.put(&self.divisor);
        let count = u8::try_from(self.looped.len()).unwrap_or(0);
        to.put(&[self.modem_changes, count]);
        let mut looped = [0; FIFO_BYTES];
        for (place, byte) in looped.iter_mut().zip(&self.looped) {
            *place = *byte;
        }
        to.put(&looped);
    }

    /// Reads its state. Causes of interrupt that are pending come up anew, since nobody knows whether
    /// the last process got to ask for the interrupt.
    pub(crate) fn restore(from: &mut Reader<'_>) -> Option<Self> {
        let [
            interrupt_enable,
            line_control,
            modem_control,
            flags,
            scratch,
        ] = from.take()?;
        let divisor = from.take()?;
        let [modem_changes, count] = from.take()?;
        let looped = from.take::<FIFO_BYTES>()?;
        let sound = interrupt_enable & !IER_BITS == 0
            && modem_control & !MCR_BITS == 0
            && flags & !0x0f == 0
            && modem_changes & !0x0f == 0;
        let looped = looped.get(..usize::from(count)).filter(|_| sound)?;
        let mut queue = VecDeque::with_capacity(FIFO_BYTES);
        queue.extend(looped);
        Some(Self {
            interrupt_enable,
            line_control,
            modem_control,
            modem_control_written: flags & 1 != 0,
            scratch,
            divisor,
            fifo_enabled: flags & 2 != 0,
            transmit_empty: flags & 4 != 0,
            overrun: flags & 8 != 0,
            modem_changes,
            looped: queue,
            causes_seen: 0,
            renewed: true,
        })
    }

    /// The guest writes register `offset` (0 to 7). Returns a byte for the output stream.
    pub(crate) fn write(&mut self, offset: u16, value: u8) -> Option<u8> {
        match (offset, self.latch_open()) {
            (0, true) => self.divisor[0] = value,
            (1, true) => self.divisor[1] = value,
            (0, false) => return self.transmit(value),
            (1, false) => self.enable_interrupts(value & IER_BITS),
            (2, _) => self.control_fifo(value),
            (3, _) => self.line_control = value,
            (4, _) => self.control_modem(value & MCR_BITS),
            (7, _) => self.scratch = value,
            _ => {}
        }
        None
    }

    /// The guest reads register `offset`.
    pub(crate) fn read(&mut self, offset: u16, input: &mut impl Input) -> u8 {
        match (offset, self.latch_open()) {
            (0, true) => self.divisor[0],
            (0, false) => self.receive(input),
            (2, _) => self.identify_interrupt(input),
            (5, _) => {
                let status = self.line_status(input);
                self.overrun = false;
                status
            }
            (6, _) => {
                let status = self.modem_status() | self.modem_changes;
                self.modem_changes = 0;
                status
            }
            _ => self.quiet(offset, input),
        }
    }

    /// What register `offset` reads as, without the side effects of reading it.
    pub(crate) fn quiet(&self, offset: u16, input: &impl Input) -> u8 {
        match (offset, self.latch_open()) {
            (1, true) => self.divisor[1],
            (1, false) => self.interrupt_enable,
            (3, _) => self.line_control,
            (4, _) => self.modem_control,
            (5, _) => self.line_status(input),
            (6, _) => self.modem_status(),
            (7, _) => self.scratch,
            _ => 0,
        }
    }

    /// Whether the interrupt line must rise: a cause of interrupt is new since the last question.
    pub(crate) fn take_edge(&mut self, input: &impl Input) -> bool {
        let causes = self.causes(input);
        let new = causes & !self.causes_seen;
        self.causes_seen = causes;
        let renewed = std::mem::take(&mut self.renewed) && causes != 0;
        new != 0 || renewed
    }

    /// Something was typed.
    pub(crate) const fn input_arrived(&mut self) {
        self.renewed = true;
    }

    const fn latch_open(&self) -> bool {
        self.line_control & LCR_DIVISOR_LATCH != 0
    }

    const fn in_loopback(&self) -> bool {
        self.modem_control & MCR_LOOPBACK != 0
    }

    fn transmit(&mut self, byte: u8) -> Option<u8> {
        self.transmit_empty = true;
        self.renewed |= self.interrupt_enable & IER_TRANSMIT_EMPTY != 0;
        if !self.in_loopback() {
            return Some(byte);
        }
        let room = if self.fifo_enabled { FIFO_BYTES } else { 1 };
        if self.looped.len() < room {
            self.looped.push_back(byte);
        } else {
            self.overrun = true;
        }
        None
    }

    fn enable_interrupts(&mut self, enabled: u8) {
        let switched_on = enabled & !self.interrupt_enable;
        if switched_on & IER_TRANSMIT_EMPTY != 0 {
            self.transmit_empty = true;
        }
        self.renewed |= switched_on != 0;
        self.interrupt_enable = enabled;
    }

    fn control_fifo(&mut self, value: u8) {
        let enabled = value & FCR_ENABLE != 0;
        if enabled != self.fifo_enabled || value & FCR_CLEAR_RECEIVER != 0 {
            self.looped.clear();
        }
        self.fifo_enabled = enabled;
    }

    fn control_modem(&mut self, value: u8) {
        let before = self.modem_status();
        self.modem_control = value;
        self.modem_control_written = true;
        if !self.in_loopback() {
            self.looped.clear();
        }
        let after = self.modem_status();
        let changed = (before ^ after) >> 4;
        // The ring indicator reports its trailing edge only.
        let ring = (MSR_RING >> 4) & !(before >> 4);
        self.modem_changes |= changed & !ring;
    }

    const fn modem_status(&self) -> u8 {
        if !self.in_loopback() {
            return MSR_CONNECTED;
        }
        let control = self.modem_control;
        let mut status = 0;
        if control & MCR_RTS != 0 {
            status |= MSR_CTS;
        }
        if control & MCR_DTR != 0 {
            status |= MSR_DSR;
        }
        if control & MCR_OUT1 != 0 {
            status |= MSR_RING;
        }
        if control & MCR_OUT2 != 0 {
            status |= MSR_CARRIER;
        }
        status
    }

    /// Whether the line delivers what was typed.
    const fn is_receiving(&self) -> bool {
        !self.in_loopback()
            && (!self.modem_control_written
                || self.modem_control & MCR_RTS != 0
                || self.interrupt_enable & IER_RECEIVED != 0)
    }

    fn has_data(&self, input: &impl Input) -> bool {
        !self.looped.is_empty() || (self.is_receiving() && input.peek().is_some())
    }

    fn receive(&mut self, input: &mut impl Input) -> u8 {
        if let Some(byte) = self.looped.pop_front() {
            return byte;
        }
        let byte = input.peek().filter(|_| self.is_receiving());
        if byte.is_some() {
            input.take();
        }
        byte.unwrap_or(0)
    }

    fn line_status(&self, input: &impl Input) -> u8 {
        let ready = if self.has_data(input) {
            LSR_DATA_READY
        } else {
            0
        };
        let overrun = if self.overrun { LSR_OVERRUN } else { 0 };
        LSR_TRANSMITTER_EMPTY | ready | overrun
    }

    fn causes(&self, input: &impl Input) -> u8 {
        let mut causes = 0;
        if self.overrun {
            causes |= IER_LINE_STATUS;
        }
        if self.has_data(input) {
            causes |= IER_RECEIVED;
        }
        if self.transmit_empty {
            causes |= IER_TRANSMIT_EMPTY;
        }
        if self.modem_changes != 0 {
            causes |= IER_MODEM_STATUS;
        }
        causes & self.interrupt_enable
    }

    fn identify_interrupt(&mut self, input: &impl Input) -> u8 {
        let causes = self.causes(input);
        let cause = if causes & IER_LINE_STATUS != 0 {
            IIR_LINE_STATUS
        } else if causes & IER_RECEIVED != 0 {
            IIR_RECEIVED
        } else if causes & IER_TRANSMIT_EMPTY != 0 {
            self.transmit_empty = false;
            IIR_TRANSMIT_EMPTY
        } else if causes & IER_MODEM_STATUS != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        };
        cause | if self.fifo_enabled { IIR_FIFO } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Input for VecDeque<u8> {
        fn peek(&self) -> Option<u8> {
            self.front().copied()
        }

        fn take(&mut self) {
            self.pop_front();
        }
    }

    fn typed(text: &[u8]) -> VecDeque<u8> {
        text.iter().copied().collect()
    }

    #[test]
    fn transmitted_bytes_come_out_except_behind_the_latch_and_in_loopback() {
        let mut uart = Uart::default();
        assert_eq!(uart.write(0, b'a'), Some(b'a'));
        uart.write(3, 0x83);
        assert_eq!(uart.write(0, 1), None);
        uart.write(3, 0x03);
        uart.write(4, 0x1b);
        assert_eq!(uart.write(0, b'b'), None);
        uart.write(4, 0x0b);
        assert_eq!(uart.write(0, b'c'), Some(b'c'));
    }

    #[test]
    fn loopback_returns_bytes_and_modem_lines_as_linux_checks_them() {
        let (mut uart, mut input) = (Uart::default(), typed(b"x"));
        uart.write(4, 0x1a);
        assert_eq!(uart.read(6, &mut input) & 0xf0, 0x90);
        uart.write(0, 0x5a);
        assert_eq!(uart.read(5, &mut input), 0x61);
        assert_eq!(uart.read(0, &mut input), 0x5a);
        assert_eq!(uart.read(5, &mut input), 0x60);
        assert_eq!(input.len(), 1, "what was typed is not touched");
    }

    #[test]
    fn divisor_and_scratch_keep_what_was_written() {
        let (mut uart, mut none) = (Uart::default(), typed(b""));
        uart.write(3, 0x80);
        uart.write(0, 0x34);
        uart.write(1, 0x12);
        assert_eq!(
            (uart.read(0, &mut none), uart.read(1, &mut none)),
            (0x34, 0x12)
        );
        uart.write(3, 0x03);
        uart.write(1, 0xff);
        assert_eq!(uart.read(1, &mut none), 0x0f);
        uart.write(7, 0xaa);
        assert_eq!(uart.read(7, &mut none), 0xaa);
    }

    #[test]
    fn fifo_is_announced_when_enabled() {
        let (mut uart, mut none) = (Uart::default(), typed(b""));
        assert_eq!(uart.read(2, &mut none), 0x01);
        uart.write(2, 0x01);
        assert_eq!(uart.read(2, &mut none), 0xc1);
    }

    #[test]
    fn each_transmitted_byte_raises_the_line_again() {
        let (mut uart, mut none) = (Uart::default(), typed(b""));
        assert!(!uart.take_edge(&none));
        uart.write(1, IER_TRANSMIT_EMPTY);
        assert!(uart.take_edge(&none));
        assert!(!uart.take_edge(&none));
        for _ in 0..3 {
            assert_eq!(uart.read(2, &mut none), IIR_TRANSMIT_EMPTY);
            assert_eq!(uart.read(2, &mut none), IIR_NONE, "reading it clears it");
            assert!(!uart.take_edge(&none));
            uart.write(0, b'x');
            assert!(uart.take_edge(&none));
        }
    }

    #[test]
    fn typed_bytes_raise_the_line_and_are_read_in_order() {
        let (mut uart, mut input) = (Uart::default(), typed(b"ok"));
        uart.write(1, IER_RECEIVED);
        assert!(uart.take_edge(&input));
        assert_eq!(uart.read(2, &mut input), IIR_RECEIVED);
        assert_eq!(uart.read(0, &mut input), b'o');
        assert_eq!(uart.read(5, &mut input) & 1, 1);
        assert_eq!(uart.read(0, &mut input), b'k');
        assert_eq!(uart.read(5, &mut input) & 1, 0);
        assert!(!uart.take_edge(&input));
        input.push_back(b'!');
        uart.input_arrived();
        assert!(uart.take_edge(&input));
    }

    #[test]
    fn typed_bytes_wait_while_linux_identifies_the_port() {
        let (mut uart, mut input) = (Uart::default(), typed(b"ls\n"));
        // As autoconfig() does: loopback test, modem control restored, FIFOs cleared, a read.
        uart.write(4, 0x1a);
        uart.write(4, 0x08);
        uart.write(2, 0x07);
        uart.write(2, 0x00);
        uart.read(0, &mut input);
        assert_eq!(input.len(), 3);
        assert_eq!(uart.read(5, &mut input) & 1, 0);
        uart.write(4, 0x0b);
        assert_eq!(uart.read(0, &mut input), b'l');
    }

    #[test]
    fn overrun_in_loopback_is_reported_once() {
        let (mut uart, mut none) = (Uart::default(), typed(b""));
        uart.write(4, 0x10);
        uart.write(0, 1);
        uart.write(0, 2);
        assert_eq!(uart.read(5, &mut none) & LSR_OVERRUN, LSR_OVERRUN);
        assert_eq!(uart.read(5, &mut none) & LSR_OVERRUN, 0);
    }

    proptest! {
        #[test]
        fn any_sequence_keeps_the_fifo_bounded_and_output_only_from_the_transmitter(
            steps in prop::collection::vec((any::<bool>(), 0u16..8, any::<u8>()), 0..400),
        ) {
            let (mut uart, mut input) = (Uart::default(), typed(b"abc"));
            for (write, offset, value) in steps {
                if write {
                    let out = uart.write(offset, value);
                    prop_assert!(out.is_none() || (offset == 0 && out == Some(value)));
                } else {
                    uart.read(offset, &mut input);
                }
                uart.take_edge(&input);
                prop_assert!(uart.looped.len() <= FIFO_BYTES);
            }
        }
    }
}
