//! The control channel of a device process after its birth: the broker's messages, bounded for each
//! wake-up, and answers that never block.

use crate::adoption::Adoption;
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::protocol::birth::DiskLimits;
use bulkhead_ipc::protocol::device::{FromDevice, ToDevice};

/// Messages that are looked at before the device's own work has its turn again.
const MESSAGES_PER_TURN: usize = 16;

/// What the broker wants of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wishes {
    /// Finish what is in flight and end.
    pub shutdown: bool,
    /// The terminal's size in columns and rows has changed.
    pub resize: Option<(u16, u16)>,
    /// Do again what there was no room for.
    pub try_again: bool,
    /// What the device may do in a second has changed.
    pub limits: Option<DiskLimits>,
    /// Whether the cable is plugged in has changed.
    pub link: Option<bool>,
    /// It was asked whether it is alive, and has answered.
    pub pinged: bool,
    /// There may be more messages.
    pub more: bool,
}

/// The device's end.
#[derive(Debug)]
pub struct Control {
    channel: Channel,
    adoption: Option<Adoption>,
}

impl From<Channel> for Control {
    /// Of a process that no later broker can find.
    fn from(channel: Channel) -> Self {
        Self {
            channel,
            adoption: None,
        }
    }
}

impl Control {
    /// Of a process that has been born.
    pub(crate) const fn new(channel: Channel, adoption: Option<Adoption>) -> Self {
        Self { channel, adoption }
    }

    /// The channel itself, for a test's process that says on it what no device says.
    #[must_use]
    pub const fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Reads what the broker has sent and answers pings, and answers a new broker that asks for the
    /// process. A broker that is gone changes nothing: the device serves on, and the next broker
    /// finds it. What is no message is dropped.
    #[must_use]
    pub fn listen(&self) -> Wishes {
        if let Some(adoption) = &self.adoption {
            adoption.answer();
        }
        let mut wishes = Wishes::default();
        for _ in 0..MESSAGES_PER_TURN {
            match self.channel.try_recv::<ToDevice>() {
                Ok(None) | Err(ChannelError::Closed) => return wishes,
                Ok(Some((ToDevice::Shutdown, _))) => {
                    wishes.shutdown = true;
                    return wishes;
                }
                Ok(Some((ToDevice::Ping(number), _))) => {
                    self.say(&FromDevice::Pong(number));
                    wishes.pinged = true;
                }
                Ok(Some((ToDevice::Resize { columns, rows }, _))) => {
                    wishes.resize = Some((columns, rows));
                }
                Ok(Some((ToDevice::TryAgain, _))) => wishes.try_again = true,
                Ok(Some((ToDevice::Limits(limits), _))) => wishes.limits = Some(limits),
                Ok(Some((ToDevice::Link(up), _))) => wishes.link = Some(up),
                Err(error) => tracing::error!(%error, "the broker sent what is no message"),
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
    fn lost_broker_and_nonsense_do_not_end_the_device() {
        let (broker, device) = Channel::pair().unwrap();
        let control = Control::from(device);
        broker.send(&(200u8, 1u8), &[]).unwrap();
        broker.send(&ToDevice::Ping(3), &[]).unwrap();
        let pinged = Wishes {
            pinged: true,
            ..Wishes::default()
        };
        assert_eq!(control.listen(), pinged);
        let (answer, _) = broker.try_recv::<FromDevice>().unwrap().unwrap();
        assert_eq!(answer, FromDevice::Pong(3));
        drop(broker);
        assert_eq!(control.listen(), Wishes::default());
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
