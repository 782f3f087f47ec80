//! The i8042 keyboard controller, for what PCs use it for without a keyboard: resetting the machine.
//!
//! It answers its own commands, so that a guest which looks for it finds a working controller with
//! nothing attached and does not wait for time-outs. ACPI does not announce it.

use crate::saved_state::{Reader, Writer};
use std::collections::VecDeque;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_AUX_FULL: u8 = 1 << 5;
const STATUS_TIMEOUT: u8 = 1 << 6;

/// Both ports disabled, system flag.
const CONFIG_DEFAULT: u8 = 0x34;
/// Lines idle, A20 open, no reset.
const OUTPUT_PORT: u8 = 0xdf;
const SELF_TEST_PASSED: u8 = 0x55;
/// Port test: the clock line is stuck low, as with nothing attached.
const CLOCK_STUCK: u8 = 0x01;
/// What a keyboard that does not understand would say.
const RESEND: u8 = 0xfe;
const OUTPUT_BYTES_MAX: usize = 4;

#[derive(Debug, Clone, Copy)]
enum Answer {
    Controller(u8),
    Aux(u8),
    TimedOut(u8),
}

/// The controller.
#[derive(Debug)]
pub(crate) struct Controller {
    config: u8,
    /// Command whose data byte comes next.
    awaiting: Option<u8>,
    last_was_command: bool,
    output: VecDeque<Answer>,
    last: u8,
}

impl Default for Controller {
    fn default() -> Self {
        Self {
            config: CONFIG_DEFAULT,
            awaiting: None,
            last_was_command: false,
            output: VecDeque::with_capacity(OUTPUT_BYTES_MAX),
            last: 0,
        }
    }
}

impl Controller {
    /// Writes its state.
    pub(crate) fn save(&self, to: &mut Writer) {
        to.put(&[
            self.config,
            u8::from(self.awaiting.is_some()),
            self.awaiting.unwrap_or(0),
            u8::from(self.last_was_command),
            u8::try_from(self.output.len()).unwrap_or(0),
        ]);
        let mut answers = [[0; 2]; OUTPUT_BYTES_MAX];
        for (place, answer) in answers.iter_mut().zip(&self.output) {
            *place = match *answer {
                Answer::Controller(byte) => [0, byte],
                Answer::Aux(byte) => [1, byte],
                Answer::TimedOut(byte) => [2, byte],
            };
        }
        to.put(answers.as_flattened());
        to.put(&[self.last]);
    }

    /// Reads its state.
    pub(crate) fn restore(from: &mut Reader<'_>) -> Option<Self> {
        let config = from.byte()?;
        let awaits = from.flag()?;
        let command = from.byte()?;
        let last_was_command = from.flag()?;
        let count = from.byte()?;
        let mut output = VecDeque::with_capacity(OUTPUT_BYTES_MAX);
        for place in 0..OUTPUT_BYTES_MAX {
            let [source, byte] = from.take()?;
            if place < usize::from(count) {
                output.push_back(match source {
                    0 => Answer::Controller(byte),
                    1 => Answer::Aux(byte),
                    2 => Answer::TimedOut(byte),
                    _ => return None,
                });
            }
        }
        let last = from.byte()?;
        (usize::from(count) <= OUTPUT_BYTES_MAX).then_some(Self {
            config,
            awaiting: awaits.then_some(command),
            last_was_command,
            output,
            last,
        })
    }

    /// The status register.
    pub(crate) fn status(&self) -> u8 {
        let command = if self.last_was_command {
            STATUS_COMMAND
        } else {
            0
        };
        let output = match self.output.front() {
            None => 0,
            Some(Answer::Controller(_)) => STATUS_OUTPUT_FULL,
            Some(Answer::Aux(_)) => STATUS_OUTPUT_FULL | STATUS_AUX_FULL,
            Some(Answer::TimedOut(_)) => STATUS_OUTPUT_FULL | STATUS_TIMEOUT,
        };
        (self.config & STATUS_SYSTEM) | STATUS_UNLOCKED | command | output
    }

    /// The guest reads the data port.
    pub(crate) fn read(&mut self) -> u8 {
        if let Some(Answer::Controller(b) | Answer::Aux(b) | Answer::TimedOut(b)) =
            self.output.pop_front()
        {
            self.last = b;
        }
        self.last
    }

    /// The guest writes the command port. Returns whether it asks for a reset of the machine.
    pub(crate) fn command(&mut self, command: u8) -> bool {
        self.last_was_command = true;
        self.awaiting = None;
        match command {
            0x20 => self.answer(Answer::Controller(self.config)),
            0x60 | 0xd1..=0xd4 => self.awaiting = Some(command),
            0xa7 => self.config |= 0x20,
            0xa8 => self.config &= !0x20,
            0xa9 | 0xab => self.answer(Answer::Controller(CLOCK_STUCK)),
            0xaa => {
                self.config = CONFIG_DEFAULT;
                self.answer(Answer::Controller(SELF_TEST_PASSED));
            }
            0xad => self.config |= 0x10,
            0xae => self.config &= !0x10,
            0xd0 => self.answer(Answer::Controller(OUTPUT_PORT)),
            // Pulses the output lines whose bits are clear; bit 0 is the reset line.
            0xf0..=0xff => return command & 1 == 0,
            _ => {}
        }
        false
    }

    /// The guest writes the data port. Returns whether it asks for a reset of the machine.
    pub(crate) fn write(&mut self, value: u8) -> bool {
        self.last_was_command = false;
        match self.awaiting.take() {
            Some(0x60) => self.config = value,
            Some(0xd1) => return value & 1 == 0,
            Some(0xd2) => self.answer(Answer::Controller(value)),
            Some(0xd3) => self.answer(Answer::Aux(value)),
            // To a keyboard or mouse that is not there.
            _ => self.answer(Answer::TimedOut(RESEND)),
        }
        false
    }

    fn answer(&mut self, answer: Answer) {
        if self.output.len() < OUTPUT_BYTES_MAX {
            self.output.push_back(answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_a_pulse_of_the_reset_line_resets() {
        let mut controller = Controller::default();
        assert!(controller.command(0xfe));
        assert!(!controller.command(0xff));
        assert!(!controller.command(0xaa));
        controller.command(0xd1);
        assert!(!controller.write(OUTPUT_PORT));
        controller.command(0xd1);
        assert!(controller.write(OUTPUT_PORT & !1));
    }

    #[test]
    fn controller_tests_itself_and_keeps_its_configuration() {
        let mut controller = Controller::default();
        assert_eq!(controller.status() & 3, 0);
        controller.command(0xaa);
        assert_eq!(controller.status() & 3, 1);
        assert_eq!(controller.read(), 0x55);
        assert_eq!(controller.status() & 3, 0);
        controller.command(0x60);
        controller.write(0x47);
        controller.command(0x20);
        assert_eq!(controller.read(), 0x47);
    }

    #[test]
    fn absent_keyboard_times_out_at_once() {
        let mut controller = Controller::default();
        controller.write(0xf2);
        assert_eq!(
            controller.status() & (STATUS_OUTPUT_FULL | STATUS_TIMEOUT),
            STATUS_OUTPUT_FULL | STATUS_TIMEOUT
        );
        assert_eq!(controller.read(), RESEND);
    }

    proptest! {
        #[test]
        fn output_is_bounded_and_never_says_input_full(
            steps in prop::collection::vec((0u8..3, any::<u8>()), 0..300),
        ) {
            let mut controller = Controller::default();
            for (kind, value) in steps {
                match kind {
                    0 => { controller.command(value); }
                    1 => { controller.write(value); }
                    _ => { controller.read(); }
                }
                prop_assert!(controller.output.len() <= OUTPUT_BYTES_MAX);
                prop_assert_eq!(controller.status() & 2, 0);
            }
        }
    }
}
