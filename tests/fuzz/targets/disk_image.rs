//! Any file as a disk image, opened for reading and writing, and then read and written all over.
#![no_main]

use bulkhead_image::{Image, ImageFormat, Layer, Place, Source, Use, check, header::Header};
use libfuzzer_sys::fuzz_target;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

/// Images that say they are larger are refused by the limits of the process instead.
const BYTES_MAX: u64 = 1 << 40;
const FILE_BYTES_MAX: u64 = 64 << 20;

fn file(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("image", MFdFlags::empty()).unwrap());
    file.write_all(bytes).unwrap();
    file
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, bytes)) = data.split_first() else {
        return;
    };
    let source = |file: &File, number| Source {
        file: file.try_clone().unwrap().into(),
        number,
        name: "image".to_owned(),
    };
    let (image, below) = (file(bytes), file(&[7; 100_000]));
    let (format, files) = match choice % 3 {
        0 => (
            ImageFormat::Vmdk,
            vec![source(&image, 0), source(&below, 1)],
        ),
        _ => (ImageFormat::Qcow2, vec![source(&image, 0)]),
    };
    let mut layers = vec![Layer { format, files }];
    if choice % 3 == 2 {
        layers.push(Layer {
            format: ImageFormat::Raw,
            files: vec![source(&below, 1)],
        });
    }
    let header = Header::read(&image, "image");
    if let Ok(header) = &header {
        if header.bytes > BYTES_MAX {
            return;
        }
        let _any = check(&image, header, "image");
    }
    let Ok(disk) = Image::open(layers, Use::Write) else {
        return;
    };
    let bytes = disk.bytes();
    let mut seen = vec![0; 512];
    for step in 0..24u64 {
        let at = step * 7919 * 512 % bytes.max(1);
        let Ok((place, has)) = disk.locate(at, 4096) else {
            continue;
        };
        assert!(has >= 1 && has <= 4096);
        let part = usize::try_from(has.min(512)).unwrap();
        match place {
            Place::Encoded => drop(disk.read(at, &mut seen[..part])),
            Place::File { writable: true, .. } => {}
            _ if step % 3 == 0 => drop(disk.zero(at, has)),
            _ => {
                let wrote = disk.allocate(at, has, |number, at, bytes| {
                    if number != 0 || at + bytes > FILE_BYTES_MAX {
                        return Err(Errno::ENOSPC);
                    }
                    let data = vec![9; usize::try_from(bytes).unwrap()];
                    image.write_all_at(&data, at).map_err(|_| Errno::EIO)
                });
                if wrote.is_ok() && header.is_ok() {
                    assert!(!matches!(disk.locate(at, 1), Ok((Place::Zeroes, _))));
                }
            }
        }
        if step % 5 == 4 {
            let _either = disk.commit();
        }
    }
});
