//! Any bytes as header and frame of a guest, as a command of its control queue, and as what a wire delivers: what
//! is handed on lies in the frame, and pieces that are cut have the bytes that there were.
#![no_main]

use bulkhead_net::control::{Command, command};
use bulkhead_net::offload::{Cutter, fill_checksum};
use bulkhead_net::request::{HEADER_BYTES, Header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some(Command::Pairs(pairs)) = command(data, 8) {
        assert!((1..=8).contains(&pairs));
    }
    let Some((features, rest)) = data.split_first_chunk::<8>() else {
        return;
    };
    let Some((header, frame)) = rest.split_first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let header = Header::parse(header);
    if let Ok(checked) = header.checked(frame.len(), u64::from_le_bytes(*features)) {
        assert!(!checked.needs_checksum() || checked.checksum_is_inside(frame.len()));
        assert_eq!(Header::parse(&checked.bytes()), checked);
    }
    if let Some(mut cutter) = Cutter::new(&header, frame) {
        let mut out = vec![0; 66_000];
        let mut pieces = 0;
        while let Some(bytes) = cutter.cut(frame, &mut out) {
            assert!(bytes > HEADER_BYTES && bytes <= HEADER_BYTES + frame.len());
            pieces += 1;
        }
        assert!(pieces <= frame.len());
    }
    let mut filled = frame.to_vec();
    let inside = fill_checksum(&header, &mut filled).is_some();
    assert_eq!(inside, header.checksum_is_inside(frame.len()));
});
