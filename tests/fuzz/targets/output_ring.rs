//! A reader of a console ring file that a hostile device process wrote.
#![no_main]

use bulkhead_ipc::output_ring::{OutputReader, create};
use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::os::unix::fs::FileExt;

fuzz_target!(|data: &[u8]| {
    let fd = nix::sys::memfd::memfd_create("ring", nix::sys::memfd::MFdFlags::empty()).unwrap();
    let file = File::from(fd);
    create(&file, 4096).unwrap();
    let (before, after) = data.split_at(data.len() / 2);
    file.write_all_at(&before[..before.len().min(8192)], 0)
        .unwrap();
    let Ok(mut reader) = OutputReader::new(file.try_clone().unwrap()) else {
        return;
    };
    let mut buffer = [0; 100];
    for chunk in after.chunks(16) {
        file.write_all_at(chunk, 8).unwrap();
        // A file that shrank under the reader is an error and no panic.
        let Ok(got) = reader.read(&mut buffer) else {
            return;
        };
        assert!(got.bytes <= buffer.len());
    }
});
