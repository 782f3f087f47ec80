//! The control queue (virtio 1.2, section 5.1.6.5). One command is known: how many pairs of queues
//! the driver uses.

/// Class of commands about several queues.
const CLASS_MQ: u8 = 4;
/// The number of pairs is set.
const MQ_PAIRS_SET: u8 = 0;
/// Bytes of the longest command that means anything.
pub(crate) const COMMAND_BYTES: usize = 4;
/// Answer: done.
pub(crate) const OK: u8 = 0;
/// Answer: not done.
pub(crate) const ERROR: u8 = 1;

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Frames are received in the first so many pairs of queues.
    Pairs(u16),
}

/// Reads a command of a device with `pairs` pairs of queues. `None` for what is not known or not possible.
#[must_use]
pub fn command(bytes: &[u8], pairs: u16) -> Option<Command> {
    let &[CLASS_MQ, MQ_PAIRS_SET, low, high] = bytes else {
        return None;
    };
    let wanted = u16::from_le_bytes([low, high]);
    (1..=pairs)
        .contains(&wanted)
        .then_some(Command::Pairs(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_pairs_is_one_that_there_is() {
        for (n, expected) in [
            (0, None),
            (1, Some(1)),
            (4, Some(4)),
            (5, None),
            (260, None),
        ] {
            let [low, high] = u16::to_le_bytes(n);
            let got = command(&[4, 0, low, high], 4);
            assert_eq!(got, expected.map(Command::Pairs), "{n}");
        }
    }

    #[test]
    fn other_commands_are_unknown() {
        for bytes in [
            &[][..],
            &[4],
            &[4, 0, 1],
            &[4, 0, 1, 0, 0],
            &[4, 1, 1, 0],
            &[0, 0, 1, 0],
        ] {
            assert_eq!(command(bytes, 8), None, "{bytes:?}");
        }
    }
}
