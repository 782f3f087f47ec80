//! Any bytes as a disk on which a kernel is looked for: they end in an error, or in files of the sizes that are told.
#![no_main]

use bulkhead_image::boot::{Wish, take_out};
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::rc::Rc;

fn file() -> File {
    File::from(memfd_create("target", MFdFlags::empty()).unwrap())
}

fuzz_target!(|data: &[u8]| {
    let (kernel, initrd) = (file(), file());
    let disk = Rc::new(data.to_vec());
    let Ok(found) = take_out(disk, &Wish::default(), &kernel, &initrd, |_, _| {}) else {
        return;
    };
    assert_eq!(found.kernel.bytes, kernel.metadata().unwrap().len());
    let bytes = found.initrd.map_or(0, |file| file.bytes);
    assert_eq!(bytes, initrd.metadata().unwrap().len());
});
