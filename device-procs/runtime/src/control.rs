//! The control channel of a device process after its birth: the broker's messages, bounded for each
//! wake-up, and answers that never block.

use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::protocol::device::{FromDevice, ToDevice};
use std::os::fd::{AsFd, BorrowedFd};

/// Messages that are looked at before the device's own work has its turn again.
const MESSAGES_PER_TURN: usize = 16;

/// What the broker wants of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wishes {
    /// Finish what is in flight and end.
    pub shutdown: bool,
    /// The terminal's size in columns and rows has changed.
    pub resize: Option<(u16, u16)>,
    /// There may be more messages.
    pub more: bool,
}

/// The device's end.
#[derive(Debug)]
pub struct Control {
    channel: Channel,
}

impl From<Channel> for Control {
    fn from(channel: Channel) -> Self {
        Self { channel }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Control {
    /// Reads what the broker has sent and answers pings. A broker that has gone or talks nonsense
    /// counts as one that wants the device to end: nobody could manage it any more.
    #[must_use]
    pub fn listen(&self) -> Wishes {
        let mut wishes = Wishes::default();
        for _ in 0..MESSAGES_PER_TURN {
            match self.channel.try_recv::<ToDevice>() {
                Ok(None) => return wishes,
                Ok(Some((ToDevice::Shutdown, _))) | Err(ChannelError::Closed) => {
                    wishes.shutdown = true;
                    return wishes;
                }
                Ok(Some((ToDevice::Ping(number), _))) => self.say(&FromDevice::Pong(number)),
                Ok(Some((ToDevice::Resize { columns, rows }, _))) => {
                    wishes.resize = Some((columns, rows));
                }
                Err(error) => {
                    tracing::error!(%error, "control channel");
                    wishes.shutdown = true;
                    return wishes;
                }
            }
        }
        wishes.more = true;
        wishes
    }

    /// Sends a message; a broker that does not read misses it.
    pub fn say(&self, message: &FromDevice) {
        if let Err(error) = self.channel.send(message, &[]) {
            tracing::warn!(%error, "message to the broker is lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_are_answered_and_wishes_collected() {
        let (broker, device) = Channel::pair().unwrap();
        let control = Control::from(device);
        broker.send(&ToDevice::Ping(7), &[]).unwrap();
        let resize = ToDevice::Resize {
            columns: 80,
            rows: 25,
        };
        broker.send(&resize, &[]).unwrap();
        let wishes = control.listen();
        assert_eq!(wishes.resize, Some((80, 25)));
        assert!(!wishes.shutdown);
        let (answer, _) = broker.try_recv::<FromDevice>().unwrap().unwrap();
        assert_eq!(answer, FromDevice::Pong(7));
    }

    #[test]
    fn lost_broker_and_nonsense_end_the_device() {
        let (broker, device) = Channel::pair().unwrap();
        let control = Control::from(device);
        broker.send(&(200u8, 1u8), &[]).unwrap();
        assert!(control.listen().shutdown);
        drop(broker);
        assert!(control.listen().shutdown);
    }

    #[test]
    fn flood_of_messages_is_read_in_turns() {
        let (broker, device) = Channel::pair().unwrap();
        let control = Control::from(device);
        for n in 0..MESSAGES_PER_TURN as u64 {
            broker.send(&ToDevice::Ping(n), &[]).unwrap();
        }
        assert!(control.listen().more);
        assert!(!control.listen().more);
    }
}
