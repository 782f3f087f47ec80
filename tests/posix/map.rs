//! Files that are mapped into memory.
#![allow(
    unsafe_code,
    reason = "maps files, which nobody but the check itself changes"
)]

use crate::place::{Check, Failure, Outcome, Place, ok, open, same, want};
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};
use rustix::fs::{OFlags, ftruncate};
use rustix::io::{pread, pwrite};
use std::ffi::c_void;
use std::fs;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("shared_maps_show_what_is_in_the_file", shows),
    ("shared_maps_change_the_file", changes),
    ("private_maps_change_nothing", private),
    ("writes_show_in_maps", writes_show),
    ("two_maps_of_one_file_are_one", two_maps),
    ("maps_outlive_descriptors_and_names", outlive),
    ("a_map_of_an_appender_changes_where_it_is", appender),
    ("a_file_that_is_lengthened_is_mapped_further", lengthened),
];

const BYTES: usize = 16 << 10;

/// A map of a file's first bytes.
struct Map(NonNull<c_void>);

impl Map {
    fn new(file: &OwnedFd, flags: MapFlags) -> Result<Self, Failure> {
        let length = ok!(NonZeroUsize::new(BYTES).ok_or("no bytes"));
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new map at a place that the kernel chooses.
        let map = unsafe { mmap(None, length, access, flags, file, 0) };
        Ok(Self(ok!(map)))
    }

    fn get(&self, at: usize) -> u8 {
        let place = self.place(at);
        // SAFETY: within the map, which is there as long as this is; no reference to it exists.
        unsafe { place.read_volatile() }
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            let place = self.place(at + n);
            // SAFETY: as in `get`.
            unsafe { place.write_volatile(*byte) };
        }
    }

    fn place(&self, at: usize) -> NonNull<u8> {
        assert!(at < BYTES);
        // SAFETY: within the map.
        unsafe { self.0.cast::<u8>().add(at) }
    }

    fn sync(&self) -> Outcome {
        // SAFETY: the whole map.
        let done = unsafe { msync(self.0, BYTES, MsFlags::MS_SYNC) };
        ok!(done);
        Ok(())
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the whole map, of which nothing is left.
        let _ = unsafe { munmap(self.0, BYTES) };
    }
}

fn file(p: &Place, flags: OFlags) -> Result<OwnedFd, Failure> {
    let path = p.file("f", &[b'.'; BYTES])?;
    Ok(ok!(open(&path, OFlags::RDWR | flags)))
}

fn shows(p: &Place) -> Outcome {
    let file = file(p, OFlags::empty())?;
    ok!(pwrite(&file, b"x", 5000));
    let map = Map::new(&file, MapFlags::MAP_SHARED)?;
    same!((map.get(4999), map.get(5000)), (b'.', b'x'));
    Ok(())
}

fn changes(p: &Place) -> Outcome {
    let file = file(p, OFlags::empty())?;
    let map = Map::new(&file, MapFlags::MAP_SHARED)?;
    map.put(5000, b"map");
    let mut three = [0; 3];
    ok!(pread(&file, &mut three, 5000));
    same!(three, *b"map");
    map.sync()?;
    // Without the cache of this file system, where there is one.
    same!(ok!(fs::read(p.at("f")))[5000..5003], *b"map");
    drop(map);
    same!(ok!(fs::metadata(p.at("f"))).len(), BYTES as u64);
    Ok(())
}

fn private(p: &Place) -> Outcome {
    let file = file(p, OFlags::empty())?;
    let map = Map::new(&file, MapFlags::MAP_PRIVATE)?;
    map.put(0, b"mine");
    same!(map.get(0), b'm');
    drop(map);
    want!(ok!(fs::read(p.at("f"))) == [b'.'; BYTES]);
    Ok(())
}

fn writes_show(p: &Place) -> Outcome {
    let file = file(p, OFlags::empty())?;
    let map = Map::new(&file, MapFlags::MAP_SHARED)?;
    same!(map.get(100), b'.');
    ok!(pwrite(&file, b"w", 100));
    same!(map.get(100), b'w');
    let other = ok!(open(&p.at("f"), OFlags::WRONLY));
    ok!(pwrite(&other, b"v", 101));
    same!(map.get(101), b'v');
    Ok(())
}

fn two_maps(p: &Place) -> Outcome {
    let file = file(p, OFlags::empty())?;
    let other = ok!(open(&p.at("f"), OFlags::RDWR));
    let (a, b) = (
        Map::new(&file, MapFlags::MAP_SHARED)?,
        Map::new(&other, MapFlags::MAP_SHARED)?,
    );
    a.put(1, b"a");
    same!(b.get(1), b'a');
    b.put(2, b"b");
    same!(a.get(2), b'b');
    Ok(())
}

fn outlive(p: &Place) -> Outcome {
    let file = file(p, OFlags::empty())?;
    let map = Map::new(&file, MapFlags::MAP_SHARED)?;
    drop(file);
    map.put(0, b"closed");
    map.sync()?;
    same!(ok!(fs::read(p.at("f")))[..6], *b"closed");
    ok!(fs::remove_file(p.at("f")));
    same!(map.get(5), b'd');
    // A page that nobody has read yet.
    same!(map.get(BYTES - 1), b'.');
    map.put(0, b"gone");
    Ok(())
}

fn appender(p: &Place) -> Outcome {
    let file = file(p, OFlags::APPEND)?;
    let map = Map::new(&file, MapFlags::MAP_SHARED)?;
    map.put(10, b"here");
    map.sync()?;
    let content = ok!(fs::read(p.at("f")));
    same!(content.len(), BYTES);
    same!(content[10..14], *b"here");
    ok!(rustix::io::write(&file, b"end"));
    map.put(0, b"front");
    drop((map, file));
    let content = ok!(fs::read(p.at("f")));
    same!(content.len(), BYTES + 3);
    same!(content[BYTES..], *b"end");
    same!(content[..5], *b"front");
    Ok(())
}

fn lengthened(p: &Place) -> Outcome {
    let file = file(p, OFlags::empty())?;
    ok!(ftruncate(&file, 4096));
    let map = Map::new(&file, MapFlags::MAP_SHARED)?;
    map.put(4000, b"x");
    ok!(ftruncate(&file, BYTES as u64));
    same!(map.get(8000), 0);
    map.put(8000, b"y");
    map.sync()?;
    let content = ok!(fs::read(p.at("f")));
    same!(
        (content[4000], content[8000], content[9000]),
        (b'x', b'y', 0)
    );
    Ok(())
}
