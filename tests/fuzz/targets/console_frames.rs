//! Any bytes as the frames of an attached console, in pieces of any size; no more than two are kept.
#![no_main]

use bulkhead::api::frame::Reader;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&size, data)) = data.split_first() else {
        return;
    };
    let mut reader = Reader::default();
    for piece in data.chunks(usize::from(size).max(1)) {
        reader.add(piece);
        loop {
            match reader.take() {
                Ok(Some(frame)) => frame.write(&mut Vec::new()),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
