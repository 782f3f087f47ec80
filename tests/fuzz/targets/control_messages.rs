//! Every control message type, decoded from one packet of a hostile peer.
#![no_main]

use bulkhead_ipc::channel::{Channel, MESSAGE_BYTES_MAX};
use bulkhead_ipc::protocol::adopt::{Adopt, Adopted};
use bulkhead_ipc::protocol::birth::{Birth, Born};
use bulkhead_ipc::protocol::device::{FromDevice, ToDevice};
use bulkhead_ipc::protocol::switch::{FromSwitch, ToSwitch};
use bulkhead_ipc::protocol::vcpu::{FromVcpu, ToVcpu};
use libfuzzer_sys::fuzz_target;
use std::os::fd::{AsRawFd, OwnedFd};

fuzz_target!(|data: &[u8]| {
    let (peer, channel) = Channel::pair().unwrap();
    let peer: OwnedFd = peer.into();
    let data = &data[..data.len().min(MESSAGE_BYTES_MAX)];
    for kind in 0..10 {
        let sent = nix::sys::socket::send(
            peer.as_raw_fd(),
            data,
            nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        );
        if sent.is_err() {
            return;
        }
        match kind {
            0 => drop(channel.try_recv::<Birth>()),
            1 => drop(channel.try_recv::<Born>()),
            2 => drop(channel.try_recv::<ToDevice>()),
            3 => drop(channel.try_recv::<FromDevice>()),
            4 => drop(channel.try_recv::<ToVcpu>()),
            5 => drop(channel.try_recv::<FromVcpu>()),
            6 => drop(channel.try_recv::<Adopt>()),
            7 => drop(channel.try_recv::<ToSwitch>()),
            8 => drop(channel.try_recv::<FromSwitch>()),
            _ => drop(channel.try_recv_from::<Adopted>()),
        }
    }
});
