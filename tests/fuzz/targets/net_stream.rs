//! Any bytes, cut anywhere, from the program at the other end of a network card's stream socket: the guest gets the frames
//! that were announced with a length that can be, as they are, and nothing after one that cannot.
#![no_main]

use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::protocol::birth::{DeviceConfig, DeviceOwn, DiskLimits, FdRole, UringGrant};
use bulkhead_net::Net;
use bulkhead_net::request::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES};
use bulkhead_runtime::testing::Rig;
use libfuzzer_sys::fuzz_target;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Buffers of the guest, of which each has room for any frame.
const BUFFERS: usize = 16;
const BUFFER_BYTES: usize = 70_000;

/// The frames in a stream, and whether it ends with a length that cannot be.
fn frames(mut stream: &[u8]) -> (Vec<&[u8]>, bool) {
    let mut frames = Vec::new();
    while let Some((length, rest)) = stream.split_first_chunk() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap();
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&length) {
            return (frames, true);
        }
        let Some((frame, behind)) = rest.split_at_checked(length) else {
            break;
        };
        frames.push(frame);
        stream = behind;
    }
    (frames, false)
}

fn config() -> DeviceConfig {
    DeviceConfig {
        kind: VirtioKind::Net,
        queue_sizes: vec![64; 2],
        window_bytes: 8 << 20,
        features: u64::MAX,
        config: Vec::new(),
        own: DeviceOwn::Net {
            link_up: true,
            cuts_udp: true,
            limits: DiskLimits::default(),
        },
    }
}

/// Pieces of the stream: what the fuzzer says, but that some lengths are made to fit.
fn pieces(data: &[u8]) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    let mut rest = data;
    while let Some((&[what, size], behind)) = rest.split_first_chunk() {
        let (piece, left) = behind.split_at(usize::from(size).min(behind.len()));
        rest = left;
        let mut bytes = Vec::new();
        match what % 4 {
            0 | 1 if piece.len() >= FRAME_BYTES_MIN => {
                bytes.extend(u32::try_from(piece.len()).unwrap().to_be_bytes());
                bytes.extend(piece);
            }
            2 => {
                // A long one.
                let length = usize::from(size) * 300;
                bytes.extend(u32::try_from(length).unwrap().to_be_bytes());
                bytes.extend(piece.iter().cycle().take(length));
            }
            _ => bytes.extend(piece),
        }
        pieces.push(bytes);
    }
    pieces
}

fuzz_target!(|data: &[u8]| {
    let (near, mut far) = UnixStream::pair().unwrap();
    for socket in [&near, &far] {
        socket.set_nonblocking(true).unwrap();
    }
    let held = vec![(FdRole::Frames, 0, near.into())];
    let mut rig: Rig<Net> = Rig::new(&config(), held, &UringGrant::default()).unwrap();
    rig.start_driver(u64::from(data.first().copied().unwrap_or(0)));
    let mut stream = Vec::new();
    let mut received: Vec<Vec<u8>> = Vec::new();
    let (mut fault, mut offered) = (None, 0);
    for (n, piece) in pieces(data).into_iter().enumerate() {
        let mut left = piece.as_slice();
        while !left.is_empty() && fault.is_none() {
            let sent = far.write(left).unwrap_or(0);
            stream.extend(&left[..sent]);
            left = &left[sent..];
            while offered < BUFFERS {
                rig.submit(RECEIVE, None, &[], BUFFER_BYTES).unwrap();
                offered += 1;
            }
            if n % 3 == 0 {
                let frame = [&[0; HEADER_BYTES], &[7; 60][..]].concat();
                rig.submit(TRANSMIT, None, &frame, 0).unwrap();
            }
            fault = rig.run().err();
            for answer in rig.answers(RECEIVE) {
                received.push(answer.bytes[HEADER_BYTES..answer.written as usize].to_vec());
                offered -= 1;
            }
            rig.answers(TRANSMIT);
            let mut taken = [0; 4096];
            while far.read(&mut taken).is_ok_and(|n| n > 0) {}
        }
    }
    let (expected, is_broken) = frames(&stream);
    assert_eq!(fault.is_some(), is_broken, "{fault:?}");
    assert!(received.len() <= expected.len() && (is_broken || received.len() == expected.len()));
    assert!(
        received
            .iter()
            .zip(&expected)
            .all(|(got, sent)| got == sent)
    );
});
