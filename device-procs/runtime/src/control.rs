//! The control channel of a device process after its birth: the broker's messages, bounded for each
//! wake-up, and answers that never block.

use crate::adoption::Adoption;
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::protocol::birth::DiskLimits;
use bulkhead_ipc::protocol::device::{FromDevice, ToDevice};
use std::os::fd::OwnedFd;

/// Messages that are looked at before the device's own work has its turn again.
const MESSAGES_PER_TURN: usize = 16;

/// What the broker wants of the device.
#[derive(Debug, Default)]
pub struct Wishes {
    /// Finish what is in flight and end.
    pub shutdown: bool,
    /// The terminal's size in columns and rows has changed.
    pub resize: Option<(u16, u16)>,
    /// Do again what there was no room for.
    pub try_again: bool,
    /// What the device may do in a second has changed.
    pub limits: Option<DiskLimits>,
    /// Answers to [`FromDevice::Dial`], by number; `None` when nobody was reached.
    pub dialled: Vec<(u64, Option<OwnedFd>)>,
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
                Ok(Some((ToDevice::Dialled { id }, fds))) => {
                    // More than one socket is not what was asked for; they are closed.
                    let socket = <[OwnedFd; 1]>::try_from(fds).ok().map(|[socket]| socket);
                    wishes.dialled.push((id, socket));
                }
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

    /// Asks for a connection. Returns whether the question is under way: a broker that is dead for
    /// long is asked no more.
    #[must_use]
    pub fn ask(&self, dial: &FromDevice) -> bool {
        self.channel.send(dial, &[]).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

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
        let wishes = control.listen();
        assert!(wishes.pinged && !wishes.more);
        let (answer, _) = broker.try_recv::<FromDevice>().unwrap().unwrap();
        assert_eq!(answer, FromDevice::Pong(3));
        drop(broker);
        let wishes = control.listen();
        assert!(!wishes.shutdown && !wishes.try_again && !wishes.more);
        let dial = FromDevice::Dial {
            id: 1,
            port: 2,
            asked_ms: 3,
        };
        assert!(!control.ask(&dial));
    }

    #[test]
    fn answers_bring_one_socket_or_none() {
        let (broker, device) = Channel::pair().unwrap();
        let control = Control::from(device);
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let near = near.as_fd();
        for (id, sockets) in [(7, vec![near]), (8, vec![]), (9, vec![near, near])] {
            broker.send(&ToDevice::Dialled { id }, &sockets).unwrap();
        }
        let dialled = control.listen().dialled;
        let got: Vec<_> = dialled.iter().map(|(id, fd)| (*id, fd.is_some())).collect();
        assert_eq!(got, [(7, true), (8, false), (9, false)]);
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
